//! Scripted SMTP peers, DNS server, manual clock and failing disk for tests and the demo's sandbox.
#![forbid(unsafe_code)]

pub mod distance;
pub mod dns;
pub mod https;
pub mod proxy;
pub mod redis;
pub mod smtp_peer;
pub mod tls;
pub mod webhook;
