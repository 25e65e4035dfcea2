//! The daemon from outside: real sockets, the real store.

mod abtests;
mod contents;
mod disk;
mod engaging;
mod explaining;
mod fair;
mod harness;
mod hits;
mod hours;
mod intake;
mod outage;
mod parts;
mod peers;
mod reading;
mod sending;
mod serving;
mod simulation;
mod station;
mod statuses;
mod storm;
mod tenants;
mod tls;
mod webhooks;
