//! What a peer remembers of what it received.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher as _};
use std::net::SocketAddr;

use bytes::Bytes;
use tokio::time::Instant;

/// How much of the messages is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Envelope and content of the first so many; later ones are only counted.
    Messages(usize),
    /// How many copies each of so many recipients got, and whether they are all the same.
    PerRecipient(usize),
    /// A digest of each content, summed into [`Counts::digest`].
    Digest,
    /// Numbers only.
    Nothing,
}

/// One message as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Without angle brackets; empty is the null reverse-path.
    pub reverse_path: String,
    /// The recipients that were accepted.
    pub recipients: Vec<String>,
    /// Headers and body, dots unstuffed.
    pub content: Bytes,
    /// The client's EHLO name.
    pub client: String,
    /// Whether it came over TLS.
    pub tls: bool,
    /// The client's address.
    pub from: SocketAddr,
    /// Which connection, counted from 1.
    pub connection: u64,
    /// When its MAIL command came.
    pub mail_at: Instant,
}

/// What was counted since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Connections accepted.
    pub connections: u64,
    /// Connections open now: accepted, and not closed from here.
    pub open: u64,
    /// Most connections open at a time.
    pub peak: u64,
    /// Connections upgraded to TLS.
    pub tls: u64,
    /// TLS handshakes that failed.
    pub tls_failed: u64,
    /// MAIL commands.
    pub mails: u64,
    /// RCPT commands refused.
    pub refused_recipients: u64,
    /// Messages accepted.
    pub messages: u64,
    /// Recipients of accepted messages.
    pub recipients: u64,
    /// Bytes of accepted messages.
    pub bytes: u64,
    /// Messages refused after their content.
    pub refused_messages: u64,
    /// Accepted messages whose content [`Keep`] had no room for.
    pub not_kept: u64,
    /// Sum of digests, whatever the order, with [`Keep::Digest`].
    pub digest: u64,
    /// Commands that came before they might (RFC 2920).
    pub sent_ahead: u64,
}

/// The copies one recipient got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copies {
    /// How many.
    pub count: u64,
    /// Digest of the first one.
    pub digest: u64,
    /// Whether every later one had the same bytes.
    pub same: bool,
}

/// A digest of some content, as in [`Copies::digest`] and [`Counts::digest`].
pub(super) fn digest(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

#[derive(Debug, Default)]
pub(super) struct Record {
    messages: Vec<Received>,
    copies: HashMap<String, Copies>,
}

impl Record {
    pub(super) fn messages(&self) -> Vec<Received> {
        self.messages.clone()
    }

    pub(super) fn copies(&self) -> HashMap<String, Copies> {
        self.copies.clone()
    }

    /// Keeps a message, if there are less than `max`.
    pub(super) fn keep(&mut self, received: Received, max: usize) -> bool {
        let room = self.messages.len() < max;
        if room {
            self.messages.push(received);
        }
        room
    }

    /// Counts a copy for each recipient, of whom there may be `max`; false if one had no room.
    pub(super) fn count_copies(&mut self, recipients: &[String], digest: u64, max: usize) -> bool {
        let mut all = true;
        for recipient in recipients {
            if let Some(copies) = self.copies.get_mut(recipient) {
                copies.count += 1;
                copies.same &= copies.digest == digest;
            } else if self.copies.len() < max {
                let first = Copies {
                    count: 1,
                    digest,
                    same: true,
                };
                self.copies.insert(recipient.clone(), first);
            } else {
                all = false;
            }
        }
        all
    }
}
