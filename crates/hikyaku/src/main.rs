//! The `hikyaku` executable.

use std::process::ExitCode;

fn main() -> ExitCode {
    hikyaku::cli::main()
}
