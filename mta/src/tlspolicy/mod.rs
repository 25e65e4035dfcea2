//! What recipient domains ask of the connections that carry their mail: MTA-STS (RFC 8461) and
//! DANE (RFC 7672).
//!
//! Owns policies, their memory, and the judgement whether a connection may carry a domain's mail.
//! Policy is the domain's, never the destination's: connections are shared by all domains with the
//! same hosts, and [`Security::satisfies`] stands between. Must not open an SMTP connection and
//! decides no retry.

mod asked;
pub mod dane;
mod policies;
pub(crate) mod report;
mod shelf;
pub mod sts;
pub(crate) mod tally;

pub use asked::{Asked, Level, Security};
pub use policies::{Policies, PoliciesDeps};
