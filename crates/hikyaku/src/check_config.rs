//! `hikyaku check-config`: every mistake at once.

use std::path::PathBuf;

use mta::classify::{RuleError, Rules};
use service::config::{Checker, Config, Mistake};

use crate::cli::{Failure, Terminal};

/// Files whose syntax other rooms own.
const CHECKERS: &[Checker] = &[bounce_rules, engagement_rules];

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

fn engagement_rules(config: &Config) -> Vec<Mistake> {
    let file = &config.engagement.rules_file;
    let mistake = |detail: String| Mistake {
        file: Some(file.path.clone()),
        line: None,
        path: String::new(),
        detail,
    };
    let text = match file.read() {
        Ok(text) => text,
        Err(mistake) => return vec![mistake],
    };
    let parsed = text.map(|text| engagement::Rules::parse(&text));
    let wrong = parsed.and_then(Result::err);
    wrong
        .into_iter()
        .map(|error| mistake(error.to_string()))
        .collect()
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
