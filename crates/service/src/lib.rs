//! Configuration, clock, named tasks, drain, metrics and logging.
//!
//! What every daemon needs before it can do anything of its own. Must not know mail: a destination
//! is a name here, a class is a word.
#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod daemon;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod power;
pub mod secrets;
pub mod tasks;
pub mod workers;
