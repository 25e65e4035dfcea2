//! Which tracking keys sign links now, told among nodes: each has a note of its own, so that a key
//! with which a node no longer signs is forgotten at once, and a node that is gone soon.
//!
//! Owns how it is written down. Whether a node that lacks a key may serve is its own judgement.

use std::time::Duration;

use model::{JournalId, Timestamp};

use crate::{Note, Result, Store};

/// The kind of these notes: by node, the id of the key that it signs with.
const KIND: &str = "signing-key";
/// How often a node that signs says so, and others look.
pub const SIGNING_KEY_TOLD: Duration = Duration::from_secs(15);
/// How long it counts when it is not said again.
const KEPT: Duration = Duration::from_secs(15 * 60);

/// Says that `node` signs links with the key `id` now.
///
/// # Errors
/// When the store does not take it.
pub async fn tell_signing_key(
    store: &dyn Store,
    node: JournalId,
    id: u16,
    now: Timestamp,
) -> Result<()> {
    let note = Note {
        kind: KIND.into(),
        key: node.to_string().into(),
        value: Box::from(id.to_le_bytes()),
        expires_at: Some(now + KEPT),
    };
    store.put_notes(vec![note], now).await
}

/// The ids of the keys that some node signs links with now, each once.
///
/// # Errors
/// When the store does not answer.
pub async fn signing_keys(store: &dyn Store, now: Timestamp) -> Result<Vec<u16>> {
    let notes = store.notes(KIND, now).await?;
    let id = |note: &Note| Some(u16::from_le_bytes(note.value.as_ref().try_into().ok()?));
    let mut ids: Vec<u16> = notes.iter().filter_map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}
