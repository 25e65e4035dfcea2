//! The `tracker` executable.

use clap::Parser;
use service::config::{Config, Environment};
use std::error::Error as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Answers open pixels, click redirects and unsubscribes, and keeps what was asked.
#[derive(Debug, Parser)]
#[command(name = "tracker", version)]
struct Arguments {
    /// The configuration; config/hikyaku.toml if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let environment = Environment::of_process();
    let config = match Config::load(arguments.config.as_deref(), &environment) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(2);
        }
    };
    match tracker::daemon::run(&config, &environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(source) = cause {
                text.push_str(&format!(": {source}"));
                cause = source.source();
            }
            eprintln!("tracker: {text}");
            ExitCode::FAILURE
        }
    }
}
