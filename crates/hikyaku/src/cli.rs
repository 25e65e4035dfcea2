//! Arguments, and how a command ends.
//!
//! Exit codes: 0 done, 1 failed at run time, 2 bad usage or configuration.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use service::config::{Environment, Mistakes};

use crate::{
    check_config, demo, dkim, doctor, journal_ship, reclassify, send, store_file, top, trace, up,
    why,
};

/// Sends bulk mail, tells what became of every message, and tracks opens and clicks.
#[derive(Debug, Parser)]
#[command(name = "hikyaku", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole system on this machine, with a sandbox to send to and a report at the end
    Demo(demo::Args),
    /// Run MTA and tracker in one process
    Up(up::Args),
    /// Run the sending daemon alone
    Mta(up::Args),
    /// Run the tracker alone
    Tracker(up::Args),
    /// Send a newsletter to the people in a table, and print the report
    Send(send::Args),
    /// Report every mistake in a configuration and the files it names; needs no network
    CheckConfig(check_config::Args),
    /// Move a store to another engine, or keep a copy of it
    #[command(subcommand)]
    Store(store_file::Command),
    /// Hand in the journal of a node that is lost
    #[command(subcommand)]
    Journal(journal_ship::Command),
    /// Make DKIM keys, and compare DNS with them
    #[command(subcommand)]
    Dkim(dkim::Command),
    /// Check what receivers look at before they take mail from a domain; exit status 1 if not all is well
    Doctor(doctor::Args),
    /// Say why mail for a domain, of a batch, or one message does or does not move
    Why(why::Args),
    /// Watch destinations: what waits, what leaves, and what holds the rest
    Top(top::Args),
    /// Listen to the SMTP sessions of a destination, or of one message
    Trace(trace::Args),
    /// Judge all opens and clicks that are kept by the rules in force
    Reclassify(reclassify::Args),
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The arguments make no sense: exit code 2; or help was asked for: 0.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The configuration has mistakes: exit code 2.
    #[error(transparent)]
    Configuration(#[from] Mistakes),
    /// It was tried and did not work: exit code 1.
    #[error(transparent)]
    Run(#[from] anyhow::Error),
    /// It was done, and the answer is no: exit code 1, nothing more to say.
    #[error("the answer is no")]
    No,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Run(error.into())
    }
}

impl Failure {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(stopped) if !stopped.use_stderr() => 0,
            Self::Usage(_) | Self::Configuration(_) => 2,
            Self::Run(_) | Self::No => 1,
        }
    }
}

/// Where a command reads and writes, so that a test can look.
pub struct Terminal<'a> {
    /// Standard output.
    pub out: &'a mut dyn Write,
    /// The environment.
    pub environment: Environment,
    /// A person looks at it: colours, and pictures that change in place.
    pub is_seen: bool,
    /// Colours are welcome.
    pub colours: bool,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let environment = Environment::of_process();
    let is_seen = io::stdout().is_terminal();
    let mut terminal = Terminal {
        out: &mut io::stdout().lock(),
        // https://no-color.org
        colours: is_seen && environment.var("NO_COLOR").is_none_or(str::is_empty),
        is_seen,
        environment,
    };
    match run_arguments(std::env::args_os(), &mut terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(&failure, &mut io::stderr().lock());
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Runs `arguments`, the program's name first.
///
/// # Errors
/// When the command did not do what it was asked; see [`Failure::exit_code`].
pub fn run_arguments<A: Into<OsString> + Clone>(
    arguments: impl IntoIterator<Item = A>,
    terminal: &mut Terminal<'_>,
) -> Result<(), Failure> {
    run(Cli::try_parse_from(arguments)?, terminal)
}

fn run(cli: Cli, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    match cli.command {
        Command::Demo(arguments) => demo::run(&arguments, terminal),
        Command::Up(arguments) => up::run(&arguments, terminal),
        Command::Mta(arguments) => up::mta(&arguments, terminal),
        Command::Tracker(arguments) => up::tracker(&arguments, terminal),
        Command::Send(arguments) => send::run(&arguments, terminal),
        Command::CheckConfig(arguments) => check_config::run(&arguments, terminal),
        Command::Store(command) => store_file::run(&command, terminal),
        Command::Journal(command) => journal_ship::run(&command, terminal),
        Command::Dkim(command) => dkim::run(command, terminal),
        Command::Doctor(arguments) => doctor::run(&arguments, terminal),
        Command::Why(arguments) => why::run(&arguments, terminal),
        Command::Reclassify(arguments) => reclassify::run(&arguments, terminal),
        Command::Top(arguments) => top::run(&arguments, terminal),
        Command::Trace(arguments) => trace::run(&arguments, terminal),
    }
}

fn report(failure: &Failure, to: &mut impl Write) {
    // Where nobody reads any more, the exit code still tells.
    match failure {
        // Help goes to standard output, mistakes to standard error, in colours where there are any.
        Failure::Usage(stopped) => stopped.print().ok(),
        Failure::Configuration(mistakes) => writeln!(to, "{mistakes}").ok(),
        // Whoever read has seen enough.
        Failure::Run(error) if is_unread(error) => None,
        Failure::Run(error) => writeln!(to, "hikyaku: {error:#}").ok(),
        Failure::No => None,
    };
}

fn is_unread(error: &anyhow::Error) -> bool {
    let io = error.root_cause().downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
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
    fn a_failure_says_why_and_has_the_exit_code_of_the_contract() {
        let reported = |failure: Failure| {
            let mut text = Vec::new();
            report(&failure, &mut text);
            (failure.exit_code(), String::from_utf8(text).expect("text"))
        };
        let run = anyhow::anyhow!("disk full").context("cannot write the key");
        let expected = "hikyaku: cannot write the key: disk full\n".to_owned();
        assert_eq!(reported(Failure::Run(run)), (1, expected));
        assert_eq!(reported(Failure::No), (1, String::new()));
    }

    #[test]
    fn bad_usage_is_2_and_help_is_0() {
        let code = |arguments: &[&str]| {
            let mut out = Vec::new();
            let mut terminal = Terminal {
                out: &mut out,
                environment: Environment::default(),
                is_seen: false,
                colours: false,
            };
            let ended = run_arguments(arguments.iter().copied(), &mut terminal);
            ended.map_or_else(|failure| failure.exit_code(), |()| 0)
        };
        assert_eq!(code(&["hikyaku"]), 2);
        assert_eq!(code(&["hikyaku", "fly"]), 2);
        assert_eq!(code(&["hikyaku", "dkim", "generate", "not a domain"]), 2);
        assert_eq!(code(&["hikyaku", "--help"]), 0);
        assert_eq!(code(&["hikyaku", "dkim", "check", "--version"]), 0);
    }
}
