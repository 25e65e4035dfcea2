//! Which message is next, and what becomes of it after an attempt: order of work in this process.
//!
//! One task owns all of it; others send it messages. Facts about messages come back only as
//! reports of attempts, and only here it is decided what is next. Must not do I/O of its own, and
//! must not know what a socket is.
#![warn(clippy::wildcard_enum_match_arm)]

#[cfg(test)]
mod adapting;
pub mod control;
pub mod decide;
mod fair;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod job;
mod lane;
#[cfg(test)]
mod neighbours;
mod pace;
pub mod pool;
#[cfg(test)]
mod simulation;
pub mod snapshot;
mod state;
mod target;

pub use state::{
    Action, Claim, ConnEnd, Event, KeptHold, Limit, LimitView, Limited, Now, QueueConfig,
    QueueState, Remembered, Shares,
};
pub use target::DEPTH;
