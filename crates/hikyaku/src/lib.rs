//! The command line: what an operator types, and what is printed.
//!
//! Owns arguments, output and exit codes, and wires the rooms together. Must not contain mail logic.
#![forbid(unsafe_code)]

mod check_config;
pub mod cli;
pub mod client;
mod demo;
mod dkim;
mod doctor;
mod journal_ship;
mod reach;
mod reclassify;
mod send;
mod show;
mod store_file;
mod top;
mod trace;
mod up;
mod why;
