//! The `mta` executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    let about = "Takes batches in over HTTP and delivers them over SMTP.";
    service::daemon::main("mta", about, mta::daemon::run)
}
