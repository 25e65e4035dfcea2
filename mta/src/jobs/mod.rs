//! What is done from time to time, by one node for all.
//!
//! Owns when, and by whom; mail that the service writes itself goes the way of all mail. Must not
//! be needed by anything that sends.

pub(crate) mod guardrails;
mod keeping;
mod tls_reports;

pub(crate) use keeping::Keeping;
pub(crate) use tls_reports::TlsReporting;
