//! A MAIL's permit, from when it is taken until the destination has read the MAIL.
//!
//! Owns when that was: a destination counts what it reads, and only its reply tells that it has. Must
//! not decide what is too many: the pacer does.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use service::clock::SharedClock;

use crate::shaping::{Permit, SharedPacer};

/// The shortest of so long counts, and of as long before: routes change.
const SPAN: Duration = Duration::from_secs(5);

/// A permit in use. Dropped without an answer, its MAIL may have been read until then.
pub(super) struct Held {
    pacer: SharedPacer,
    clock: SharedClock,
    permit: Permit,
    read_at: Option<Instant>,
}

impl Held {
    /// `None` where there is nothing to be told.
    pub(super) fn new(permit: Permit, pacer: &SharedPacer, clock: &SharedClock) -> Option<Self> {
        match permit {
            Permit::Counted => None,
            Permit::UnderWay { .. } => Some(Self {
                pacer: Arc::clone(pacer),
                clock: clock.clone(),
                permit,
                read_at: None,
            }),
        }
    }

    /// The reply to the MAIL came at `now`, after it had been read for so long or longer.
    pub(super) fn answered(mut self, now: Instant, reply_takes: Duration) {
        self.read_at = Some(now.checked_sub(reply_takes).unwrap_or(now));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let read_at = self.read_at.unwrap_or_else(|| self.clock.instant());
        let mut pacer = self.pacer.lock().unwrap_or_else(PoisonError::into_inner);
        pacer.arrived(self.permit, read_at);
    }
}

/// How long a host takes to answer a MAIL, from when we mean to send it, if nothing holds it up.
pub(super) struct Usual {
    /// Until that is known: a packet there and back.
    connect: Duration,
    since: Instant,
    lately: Option<Duration>,
    before: Option<Duration>,
}

impl Usual {
    /// Connecting took so long.
    pub(super) fn new(connect: Duration, now: Instant) -> Self {
        Self {
            connect,
            since: now,
            lately: None,
            before: None,
        }
    }

    /// A reply took so long.
    pub(super) fn note(&mut self, took: Duration, now: Instant) {
        if now.saturating_duration_since(self.since) >= SPAN {
            (self.before, self.lately) = (self.lately, None);
            self.since = now;
        }
        self.lately = Some(self.lately.map_or(took, |lately| lately.min(took)));
    }

    /// The shortest lately.
    pub(super) fn shortest(&self) -> Duration {
        // A few may all have been held up by the same: then connecting was faster.
        let before = self.before.unwrap_or(self.connect);
        self.lately.map_or(before, |lately| lately.min(before))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};

    #[test]
    fn what_is_usual_is_the_shortest_lately() {
        let millis = Duration::from_millis;
        let start = SystemClock.instant();
        let mut usual = Usual::new(millis(20), start);
        assert_eq!(usual.shortest(), millis(20));
        usual.note(millis(300), start + millis(300));
        assert_eq!(usual.shortest(), millis(20));
        usual.note(millis(310), start + SPAN);
        assert_eq!(usual.shortest(), millis(300));
        usual.note(millis(5), start + SPAN);
        usual.note(millis(400), start + SPAN * 2);
        assert_eq!(usual.shortest(), millis(5));
        usual.note(millis(500), start + SPAN * 3);
        assert_eq!(usual.shortest(), millis(400));
    }
}
