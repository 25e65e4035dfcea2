//! Content from outside: a spec in, the bytes of a message out.

mod common;
mod compile;
mod corpora;
mod dkim;
mod render;
