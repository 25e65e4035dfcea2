//! The tracker over real sockets, with a real journal and a real store.

mod answers;
mod bounds;
mod harness;
mod killed;
mod pages;
mod shipping;
mod tokens;
mod unsubscribing;
