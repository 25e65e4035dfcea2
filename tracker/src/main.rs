//! The `tracker` executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    let about = "Answers open pixels, click redirects and unsubscribes, and keeps what was asked.";
    service::daemon::main("tracker", about, tracker::daemon::run)
}
