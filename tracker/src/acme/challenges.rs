//! What is answered to an authority that looks whether a host is ours (RFC 8555 section 8.3).
//!
//! The authority comes to any node, so what one node has to answer is in the store for the others.
//! Strangers may ask, too: few at a time reach the store, and none for what cannot be a token.

use model::Timestamp;
use service::clock::SharedClock;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use store::{Note, Store};
use tokio::sync::Semaphore;

/// The kind of these notes in the store.
const NOTES: &str = "acme-challenge";
/// How long an answer is kept in the store.
const KEPT: Duration = Duration::from_mins(5);
/// How long the store may take.
const STORE_TIME: Duration = Duration::from_secs(2);
/// How many may ask the store at a time.
const ASKING: usize = 4;
/// Tokens have at least 128 bits, in base64url; none that was seen is nearly as long as this.
const TOKEN_CHARS: std::ops::RangeInclusive<usize> = 16..=128;

/// The answers that are to be given now.
pub(crate) struct Challenges {
    mine: Mutex<HashMap<String, String>>,
    store: Arc<dyn Store>,
    clock: SharedClock,
    asking: Semaphore,
}

impl std::fmt::Debug for Challenges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Challenges").finish_non_exhaustive()
    }
}

impl Challenges {
    pub(crate) fn new(store: Arc<dyn Store>, clock: SharedClock) -> Self {
        Self {
            mine: Mutex::default(),
            store,
            clock,
            asking: Semaphore::new(ASKING),
        }
    }

    /// Answers this token from now on, on every node that the store reaches.
    pub(crate) async fn put(&self, token: &str, answer: &str) {
        self.lock().insert(token.to_owned(), answer.to_owned());
        self.note(token, answer, self.clock.now() + KEPT).await;
    }

    /// Answers it no more.
    pub(crate) async fn remove(&self, token: &str) {
        self.lock().remove(token);
        self.note(token, "", self.clock.now()).await;
    }

    /// What is to be answered to this token; `None`: it is not ours.
    pub(crate) async fn answer(&self, token: &str) -> Option<String> {
        let known = self.lock().get(token).cloned();
        if known.is_some() {
            return known;
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if !TOKEN_CHARS.contains(&token.len()) || !token.bytes().all(plain) {
            return None;
        }
        let _permit = self.asking.try_acquire().ok()?;
        let asked = self.store.note(NOTES, token, self.clock.now());
        let note = tokio::time::timeout(STORE_TIME, asked).await.ok()?;
        let value = note.ok()??.value;
        String::from_utf8(value.into())
            .ok()
            .filter(|answer| !answer.is_empty())
    }

    async fn note(&self, token: &str, answer: &str, expires_at: Timestamp) {
        let note = Note {
            kind: NOTES.into(),
            key: token.into(),
            value: answer.as_bytes().into(),
            expires_at: Some(expires_at),
        };
        let put = self.store.put_notes(vec![note], self.clock.now());
        match tokio::time::timeout(STORE_TIME, put).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "other nodes do not know the challenge"),
            Err(_) => tracing::debug!("other nodes may not know the challenge"),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
