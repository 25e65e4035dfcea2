//! The `mta` executable.

use clap::Parser;
use service::config::{Config, Environment};
use std::path::PathBuf;
use std::process::ExitCode;

/// Takes batches in over HTTP and delivers them over SMTP.
#[derive(Debug, Parser)]
#[command(name = "mta", version)]
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
    match mta::daemon::run(&config, &environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mta: {error:#}");
            ExitCode::FAILURE
        }
    }
}
