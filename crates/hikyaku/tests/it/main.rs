//! The service from outside: real executables, real peers, real tools.
#![expect(
    clippy::unwrap_used,
    clippy::string_slice,
    clippy::disallowed_methods,
    reason = "a test speaks by failing, and its clock is the wall"
)]

mod abtests;
mod apart;
mod away;
mod bad_input;
mod browser;
mod campaign;
mod chaos;
mod commands;
mod crash;
mod dane;
mod demo;
mod deploy;
mod dns;
mod durable;
mod explain;
mod full_disk;
mod harness;
mod ill;
mod limits;
mod moving;
mod peers;
mod postfix;
mod prometheus;
mod redis;
mod reload;
mod sink;
mod specification;
mod tempers;
mod tidy;
mod tracking;
mod unsubscribe;
mod webhooks;
