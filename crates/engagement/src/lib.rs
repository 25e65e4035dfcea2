//! Human or machine, bindings, scores, A/B statistics; pure.
//!
//! Owns the judgement of what a hit means: by itself ([`Rules::judge`]), together with others
//! ([`settle`]), whose browser it was ([`identity`]) and what it says about a person
//! ([`prospect`]). Must not do I/O or read a clock: what it judges by comes in with the call.
#![forbid(unsafe_code)]

pub mod abtest;
mod agents;
pub mod identity;
mod judge;
pub mod prospect;
mod rules;
pub mod settle;

pub use judge::Observed;
pub use rules::{Behaviour, Rules, RulesError};
