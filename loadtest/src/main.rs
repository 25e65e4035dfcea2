//! The `loadtest` executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    loadtest::main()
}
