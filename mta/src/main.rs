//! The `mta` executable.
fn main() {}
