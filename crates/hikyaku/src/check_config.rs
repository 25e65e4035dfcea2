//! `hikyaku check-config`: every mistake at once.

use std::path::PathBuf;

use mta::classify::{RuleError, Rules};
use service::config::{Checker, Config, Mistake};

use crate::cli::{Failure, Terminal};

/// Files whose syntax other rooms own.
const CHECKERS: &[Checker] = &[bounce_rules];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration to check
    file: PathBuf,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    Config::check(Some(&arguments.file), &terminal.environment, CHECKERS)?;
    writeln!(terminal.out, "{}: ok", arguments.file.display())?;
    Ok(())
}

fn bounce_rules(config: &Config) -> Vec<Mistake> {
    let file = &config.bounces.rules_file.path;
    let mistake = |error| {
        let (line, path, detail) = match error {
            RuleError::Syntax { line, detail } => (Some(line), String::new(), detail),
            RuleError::Rule { rule, detail } => (None, format!("rule {rule:?}"), detail),
        };
        Mistake {
            file: Some(file.clone()),
            line: line.filter(|line| *line > 0),
            path,
            detail,
        }
    };
    let wrong = Rules::load(&config.bounces.rules_file).err();
    wrong.into_iter().flatten().map(mistake).collect()
}
