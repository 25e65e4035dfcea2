//! Scripted SMTP peers, DNS server, a network in memory, manual clock and failing disk for tests and the demo's sandbox.
#![forbid(unsafe_code)]

pub mod browser;
pub mod distance;
pub mod dns;
pub mod https;
pub mod port;
pub mod proxy;
pub mod redis;
mod request;
pub mod smtp_peer;
pub mod strand;
pub mod tls;
pub mod webhook;
