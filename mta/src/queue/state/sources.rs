//! Egress sources that cannot connect to anybody, until they can again.
//!
//! Such a failure says nothing about a destination: no message has had an attempt, and the other
//! sources of the pool carry on.

use std::time::{Duration, Instant};

use super::QueueState;

/// How long a source is left out after its first failure; twice as long with each further one.
const FIRST: Duration = Duration::from_secs(2);
/// The longest it is left out.
const LONGEST: Duration = Duration::from_secs(60);

/// A source that is left out.
#[derive(Debug)]
pub(super) struct Down {
    until: Instant,
    times: u32,
}

impl QueueState {
    /// The sources of all pools, and whether connections can be made from each as far as is known.
    pub fn sources(&self) -> Vec<(usize, bool)> {
        let is_up = |source: usize| (source, !self.sources_down.contains_key(&source));
        self.config.pools.sources().into_iter().map(is_up).collect()
    }

    /// Whether a connection may be opened from `source`.
    pub(super) fn source_is_up(&self, source: usize, now: Instant) -> bool {
        let down = self.sources_down.get(&source);
        down.is_none_or(|down| down.until <= now)
    }

    pub(super) fn source_failed(&mut self, source: usize, now: Instant) {
        let down = self.sources_down.entry(source).or_insert(Down {
            until: now,
            times: 0,
        });
        // Connections that were opened together fail together: that is one failure.
        if down.until <= now {
            let wait = FIRST.saturating_mul(1 << down.times.min(16));
            down.until = now + wait.min(LONGEST);
            down.times = down.times.saturating_add(1);
        }
    }

    pub(super) fn source_works(&mut self, source: usize) {
        if self.sources_down.remove(&source).is_some() {
            for dest in self.dests.values_mut() {
                dest.catches_up(source);
            }
        }
    }
}
