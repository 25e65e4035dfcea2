//! The HTTP API: authentication, problems, read-outs, health, metrics.

pub(crate) mod problem;
