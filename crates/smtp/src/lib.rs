//! SMTP client and server sessions and the reply parser, without I/O.
//!
//! This crate owns the wire: which bytes leave, in which order, and what the
//! bytes that come back mean (RFC 5321, 2920, 3030, 3207, 6152, 6531, 2034,
//! 9422). Bytes go in, bytes and events come out. It opens no socket, reads no
//! clock, starts no task and knows nothing of batches, queues or retries: the
//! caller reads and writes, applies the deadline named by
//! [`client::ClientSession::waiting_for`], and decides what an outcome means.
//!
//! Whatever a peer sends is bounded, never panics, and is made safe for logs
//! before anybody can see it.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing)]

pub mod body;
pub mod capabilities;
pub mod client;
pub mod command;
pub mod reply;
pub mod server;

pub use body::{Body, BodyError};
pub use capabilities::Capabilities;
pub use client::{ClientSession, Envelope, Outcome, Scope, SessionError, Stage, TxId};
pub use command::CommandError;
pub use reply::{EnhancedCode, Reply, ReplyError, ReplyParser};
pub use server::{ServerConfig, ServerEvent, ServerSession};
