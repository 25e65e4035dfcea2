//! The tracker over real sockets, with a real journal and a real store.

mod acme;
mod answers;
mod bounds;
mod client;
mod harness;
mod killed;
mod pages;
mod serving;
mod shipping;
mod tokens;
mod unsubscribing;
