//! The sending daemon.
//!
//! Owns the way of a message from the HTTP call to the attempt report. It must
//! not depend on the tracker: the two share nothing but the store and, in one
//! process, the handle to it.

pub mod admin;
pub mod app;
pub mod classify;
pub mod intake;
pub mod queue;
pub mod released;
pub mod shaping;
