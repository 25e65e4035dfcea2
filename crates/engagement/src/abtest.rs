//! A/B tests: who gets which variant, what is measured, and what may be concluded from it.
//!
//! Owns the statistics: assignment ([`Assigner`]), measurement at equal age ([`measure`]), the
//! posterior ([`Posterior`]), the decision ([`decide`]), the checks beside it ([`sample_ratio`],
//! [`breach`]), what can be promised before ([`plan`]), and all of it together as a record that is kept
//! ([`Record`]). Must not do I/O, read a clock or draw
//! random numbers: what it computes, it computes again to the same bits from the same inputs, so a
//! decision can be audited from its record.
//!
//! The model: in each variant the share of delivered recipients that click (or open, or buy) is
//! unknown and, before anything is seen, equally likely to be anything: Beta(1, 1). After `s` of
//! `n` it is Beta(1 + s, 1 + n − s). P(best) and the expected loss are integrals over the product
//! of these, computed by Gauss–Legendre quadrature to better than 1e-9; nothing is simulated.

mod age;
mod assign;
mod balance;
mod decision;
mod plan;
mod posterior;
mod record;
mod special;

pub use age::{Measured, Observation, measure};
pub use assign::{Arm, Assigner, Shares, SharesError};
pub use balance::{Breach, Limits, SRM_ALARM, breach, sample_ratio};
pub use decision::{Decided, Decision, Fallback, decide, default_confidence};
pub use plan::{Plan, plan};
pub use posterior::{Count, Posterior, bandit_shares};
pub use record::{Inputs, Metric, Mode, RULES, Record, VariantInput};

/// The most variants that a test has, and the fewest.
pub const VARIANTS: std::ops::RangeInclusive<usize> = 2..=8;

#[cfg(test)]
mod simulation;
