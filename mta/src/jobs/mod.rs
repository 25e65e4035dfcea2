//! What is done beside sending, by one node for all: reports, retention, pushing events, engagement.
//!
//! Owns when, and by whom; mail that the service writes itself goes the way of all mail. Must not
//! be needed by anything that sends.

pub(crate) mod engagement;
pub(crate) mod guardrails;
mod keeping;
mod lease;
mod mailboxes;
mod signing_keys;
mod tls_reports;
pub(crate) mod webhooks;

pub(crate) use keeping::Keeping;
pub(crate) use lease::JobLease;
pub(crate) use signing_keys::SigningKeys;
pub(crate) use tls_reports::TlsReporting;
