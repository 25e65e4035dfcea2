//! The `hikyaku` executable.
fn main() {}
