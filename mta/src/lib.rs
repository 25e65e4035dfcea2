//! The sending daemon.
//!
//! Owns the way of a message from the HTTP call to the attempt report. It must
//! not depend on the tracker: the two share nothing but the store and, in one
//! process, the handle to it.

mod abtest;
mod admin;
pub mod app;
pub mod classify;
pub mod compose;
pub mod daemon;
pub mod deliver;
mod erasure;
pub mod explain;
pub mod http;
mod intake;
mod jobs;
pub mod queue;
pub mod released;
pub mod resolve;
pub mod sending;
pub mod shaping;
pub mod ship;
mod tenants;
pub mod tlspolicy;
pub mod trace;

pub use app::{Deps, Mta, start};
