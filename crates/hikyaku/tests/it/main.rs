//! The service from outside: real executables, real peers, real tools.

mod apart;
mod commands;
mod crash;
mod demo;
mod dns;
mod durable;
mod harness;
mod postfix;
mod prometheus;
mod sink;
mod tidy;
