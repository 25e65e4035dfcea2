//! What is kept of adapted limits over a restart: the form of a note, in wall-clock time.
//!
//! Owns the form. What another version wrote and this one cannot read is as if it were not there.

use std::time::{Duration, Instant};

use model::Timestamp;
use serde::{Deserialize, Serialize};

use super::warmup::HeldDays;

/// The moment, by both clocks: limits live by the one and are kept by the other.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Monotonic.
    pub instant: Instant,
    /// Wall clock.
    pub wall: Timestamp,
}

impl Moment {
    /// A monotonic moment by the wall clock.
    pub(super) fn wall_of(self, at: Instant) -> Timestamp {
        self.wall + at.saturating_duration_since(self.instant)
    }

    /// How long it is until `at`.
    pub(super) fn until(self, at: Timestamp) -> Duration {
        at.since(self.wall)
    }
}

/// The limits of one destination as one source sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Messages in a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rate: Option<KeptLimit>,
    /// Connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<KeptLimit>,
    /// Messages over one connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) messages: Option<KeptLimit>,
    /// Nothing starts before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) paused_until: Option<Timestamp>,
    /// Pauses in a row.
    #[serde(default)]
    pub(super) pauses: u32,
    /// Answers in peace that are still to come after a pause.
    #[serde(default)]
    pub(super) probing: u32,
    /// Days of a warm-up that were held.
    #[serde(default, skip_serializing_if = "HeldDays::is_none")]
    pub(crate) held_days: HeldDays,
}

/// One limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct KeptLimit {
    /// What holds when nothing is held down.
    pub(super) steady: f64,
    /// Where a signal came last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) edge: Option<f64>,
    /// Held down until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) held_until: Option<Timestamp>,
}

impl Kept {
    /// As the value of a note.
    pub fn to_note(&self) -> Vec<u8> {
        // Numbers, moments and nothing else: there is no way to fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a note.
    pub fn from_note(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}
