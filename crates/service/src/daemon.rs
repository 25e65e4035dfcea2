//! What the executables of the daemons share: their one argument and their exit codes.

use crate::config::{Config, Environment};
use clap::{Arg, Command, value_parser};
use std::error::Error;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// The `main` of a daemon called `name`: reads `--config FILE` and runs it. Exit code 2 for bad
/// usage and for mistakes in the configuration, 1 when `run` fails.
pub fn main<E: Into<Box<dyn Error + Send + Sync>>>(
    name: &'static str,
    about: &'static str,
    run: impl FnOnce(&Config, &Environment) -> Result<(), E>,
) -> ExitCode {
    let config = Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help("The configuration; config/hikyaku.toml if it exists");
    let command = Command::new(name)
        .about(about)
        .version(env!("CARGO_PKG_VERSION"))
        .arg(config);
    let arguments = command.get_matches();
    let environment = Environment::of_process();
    let path = arguments.get_one::<PathBuf>("config");
    match Config::load(path.map(PathBuf::as_path), &environment) {
        Err(mistakes) => ended(2, &mistakes.to_string()),
        Ok(config) => match run(&config, &environment) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => ended(1, &format!("{name}: {}", chain(error.into().as_ref()))),
        },
    }
}

fn ended(code: u8, text: &str) -> ExitCode {
    // Where nobody reads, the exit code still tells.
    writeln!(std::io::stderr(), "{text}").ok();
    ExitCode::from(code)
}

/// An error and its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes() {
        let cause = std::io::Error::other("disk full");
        let error = anyhow::Error::from(cause).context("cannot open the journal");
        assert_eq!(chain(error.as_ref()), "cannot open the journal: disk full");
    }
}
