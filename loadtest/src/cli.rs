//! Arguments, and how a command ends.
//!
//! Exit codes: 0 done, 1 failed at run time, 2 bad usage.

use crate::{intake, isolation, mta, nodes, queued, sink, source, tracker};
use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// Load and measurement, on this machine alone.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Sink(sink::Args),
    Source(source::Args),
    Mta(Box<mta::Args>),
    Intake(Box<intake::Args>),
    Queued(Box<queued::Args>),
    Nodes(Box<nodes::Args>),
    Isolation(Box<isolation::Args>),
    Tracker(tracker::Args),
    #[command(hide = true)]
    Bare(tracker::bare::Args),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let mut out = io::stdout();
    match run_arguments(std::env::args_os(), &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<clap::Error>() {
            Some(usage) => {
                // Where nobody reads any more, the exit code still tells.
                usage.print().ok();
                ExitCode::from(if usage.use_stderr() { 2 } else { 0 })
            }
            None => {
                writeln!(io::stderr(), "loadtest: {error:#}").ok();
                ExitCode::FAILURE
            }
        },
    }
}

/// Runs `arguments`, the program's name first, printing to `out`.
///
/// # Errors
/// When the command did not do what it was asked; a [`clap::Error`] when that makes no sense.
pub fn run_arguments<A: Into<OsString> + Clone>(
    arguments: impl IntoIterator<Item = A>,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let cli = Cli::try_parse_from(arguments)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let done = runtime.block_on(run(cli.command, out));
    // A read of standard input may be under way, which nothing ends.
    runtime.shutdown_background();
    done
}

async fn run(command: Command, out: &mut (dyn Write + Send)) -> Result<()> {
    let stop = stopped()?;
    match command {
        Command::Sink(args) => sink::run(&args, out, stop).await.map(drop),
        Command::Bare(args) => tracker::bare::run(&args, out, stop).await,
        Command::Source(args) => or(stop, async { source::run(&args, out).await.map(drop) }).await,
        Command::Mta(args) => or(stop, mta::run(&args, out)).await,
        Command::Intake(args) => or(stop, intake::run(&args, out)).await,
        Command::Queued(args) => or(stop, queued::run(&args, out)).await,
        Command::Nodes(args) => or(stop, nodes::run(&args, out)).await,
        Command::Isolation(args) => or(stop, isolation::run(&args, out)).await,
        Command::Tracker(args) => or(stop, tracker::run(&args, out)).await,
    }
}

/// A measurement that is interrupted has no result; what it started ends as it is dropped.
async fn or(
    stop: impl Future<Output = Result<()>>,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    tokio::select! {
        done = work => done,
        stopped = stop => {
            stopped?;
            bail!("interrupted")
        }
    }
}

/// Ends at the first SIGINT or SIGTERM.
fn stopped() -> Result<impl Future<Output = Result<()>>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_arguments_make_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_load_elsewhere_is_bad_usage() {
        for arguments in [
            &["loadtest", "sink", "--listen", "0.0.0.0:25"][..],
            &["loadtest", "source", "--url", "http://mta.example:8025"],
            &[
                "loadtest",
                "tracker",
                "--url",
                "http://192.0.2.1:8026",
                "--key-file",
                "k",
            ],
            &["loadtest", "mta", "--recipients", "0"],
            &["loadtest", "tracker", "--url", "http://127.0.0.1:1"],
            &["loadtest"],
        ] {
            let error = run_arguments(arguments.iter().copied(), &mut io::sink());
            let error = error.expect_err("refused");
            assert!(error.is::<clap::Error>(), "{arguments:?}: {error:#}");
        }
    }
}
