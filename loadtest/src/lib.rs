//! Sink, load source and report, for the MTA and for the tracker.
//!
//! Measures the executables from outside, as a user runs them: CPU and memory come from `/proc`,
//! what was delivered from a sink in a process of its own. Must not link a daemon, and must not
//! reach beyond this machine: every address is checked to be loopback, every load is bounded in
//! number and time.
#![forbid(unsafe_code)]

pub mod batch;
pub mod bench;
pub mod cli;
pub mod client;
pub mod counterpart;
pub mod format;
pub mod intake;
pub mod isolation;
pub mod load;
pub mod local;
pub mod mta;
pub mod nodes;
pub mod postfix;
pub mod process;
pub mod queued;
pub mod redis;
pub mod signatures;
pub mod sink;
pub mod site;
pub mod source;
pub mod strace;
pub mod submission;
pub mod tracker;

pub use cli::main;
