//! The `loadtest` executable.
fn main() {}
