//! The `hikyaku` executable.

use std::process::ExitCode;

/// A message is some hundred small pieces of memory, made on one thread and often freed on another.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    hikyaku::cli::main()
}
