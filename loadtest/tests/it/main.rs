//! The pieces of the load test against each other: the sink as a process, the source against a
//! service that says what the real one would.

mod load;
mod postfix;
mod service;
mod sink;
mod source;
