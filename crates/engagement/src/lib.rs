//! Human or machine, bindings, scores, A/B statistics; pure.
//!
//! Owns the judgement of what a hit means. Must not do I/O, read a clock or remember anything:
//! what it judges by comes in with the call. At present it judges one hit by itself; what only
//! several hits tell (bursts, link order, the moment of the final dot) joins it later and revises.
#![forbid(unsafe_code)]

pub mod abtest;
mod agents;
mod judge;

pub use judge::{Observed, RULES, judge};
