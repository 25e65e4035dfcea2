//! What the store keeps of a test: its decisions with all that they were made of, as a note that is
//! only ever swapped; and which tests are not over.
//!
//! Owns the form of both. Must not decide.

use engagement::abtest::Record;
use model::{BatchId, Timestamp};
use serde::{Deserialize, Serialize};
use store::{Note, Page, Store, StoreError, Wave};

use super::Plan;
use super::measure::Seen;

/// Tests that are not over, by batch.
const RUNNING: &str = "abtest-running";
/// What was decided, by batch.
const KEPT: &str = "abtest";

/// A person decides.
pub(crate) const MANUAL: &str = "manual";
/// A person is to decide.
pub(crate) const HOLD: &str = "hold";

/// What was decided of a test.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// In their order: one, or that it is held and then one by hand.
    pub(crate) decisions: Vec<Decided>,
    /// The rounds of a bandit.
    pub(crate) rounds: Vec<Round>,
    /// Of how many decisions events tell.
    pub(crate) told: usize,
}

/// A decision. Never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Decided {
    /// The word of the contract.
    pub(crate) decision: String,
    /// What the rest gets; none: it is shared out, or held.
    pub(crate) variant: Option<String>,
    pub(crate) at: Timestamp,
    /// The key of the caller, or the service.
    pub(crate) by: String,
    /// The token of the node that decided.
    pub(crate) fence: Option<u64>,
    /// All that it was made of.
    pub(crate) record: Record,
    pub(crate) seen: Vec<Seen>,
}

/// A round of a bandit. Never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    pub(crate) at: Timestamp,
    /// What each variant gets of it.
    pub(crate) shares: Vec<f64>,
}

fn key(batch: BatchId) -> Box<str> {
    batch.to_string().into()
}

impl Kept {
    /// What was decided so far, and the bytes of it for [`Kept::swap`].
    pub(crate) async fn load(
        store: &dyn Store,
        batch: BatchId,
        now: Timestamp,
    ) -> store::Result<(Self, Option<Box<[u8]>>)> {
        let note = store.note(KEPT, &key(batch), now).await?;
        let Some(note) = note else {
            return Ok((Self::default(), None));
        };
        let kept = serde_json::from_slice(&note.value)
            .map_err(|error| StoreError::Damaged(format!("the test of {batch}: {error}")))?;
        Ok((kept, Some(note.value)))
    }

    /// Writes it, if it is still as it was read; whether it did.
    pub(crate) async fn swap(
        &self,
        store: &dyn Store,
        batch: BatchId,
        before: Option<Box<[u8]>>,
        now: Timestamp,
    ) -> store::Result<bool> {
        let value = serde_json::to_vec(self)
            .map_err(|error| StoreError::Refused(format!("a decision: {error}")))?;
        let note = Note {
            kind: KEPT.into(),
            key: key(batch),
            value: value.into(),
            expires_at: None,
        };
        store.swap_note(note, before, now).await
    }

    /// Whether a decision stands that is not to wait for a person.
    pub(crate) fn is_over(&self) -> bool {
        self.decisions.last().is_some_and(|of| of.decision != HOLD)
    }

    /// The variant that was decided.
    pub(crate) fn variant(&self) -> Option<&str> {
        self.decisions.last()?.variant.as_deref()
    }

    /// How a round of a bandit releases its wave.
    pub(super) fn round_of(&self, plan: &Plan, wave: u32) -> Option<Wave> {
        let place = wave.checked_sub(plan.layout.rest.start)?;
        let round = self.rounds.get(usize::try_from(place).ok()?)?;
        Some(Wave {
            at: round.at,
            shares: round.shares.clone(),
        })
    }
}

/// When a test was entered among those that run.
#[derive(Serialize, Deserialize)]
struct Registered {
    at: Timestamp,
}

/// Enters a test among those that run.
pub(crate) async fn register(
    store: &dyn Store,
    batch: BatchId,
    now: Timestamp,
) -> store::Result<()> {
    let value = serde_json::to_vec(&Registered { at: now }).unwrap_or_default();
    put(store, batch, value, now).await
}

/// Takes a test from among those that run.
pub(super) async fn forget(store: &dyn Store, batch: BatchId, now: Timestamp) -> store::Result<()> {
    put(store, batch, Vec::new(), now).await
}

async fn put(
    store: &dyn Store,
    batch: BatchId,
    value: Vec<u8>,
    now: Timestamp,
) -> store::Result<()> {
    let note = Note {
        kind: RUNNING.into(),
        key: key(batch),
        value: value.into(),
        expires_at: None,
    };
    store.put_notes(vec![note], now).await
}

/// Tests that run, and since when each is entered.
pub(super) async fn running(
    store: &dyn Store,
    after: Option<&str>,
    now: Timestamp,
) -> store::Result<Page<(BatchId, Timestamp)>> {
    let page = store.notes_after(RUNNING, after, 256, now).await?;
    let read = |note: Note| {
        let of: Registered = serde_json::from_slice(&note.value).ok()?;
        Some((note.key.parse().ok()?, of.at))
    };
    Ok(Page {
        items: page.items.into_iter().filter_map(read).collect(),
        next: page.next,
    })
}
