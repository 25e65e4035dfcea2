//! The rates that batches asked for, whatever their destinations allow: spread evenly here, and kept
//! together with the other nodes by shares.

use super::*;
use crate::shaping::{InForce, Pacer, Part, Spread};

/// What keeps a batch at the rate that it asked for.
#[derive(Debug)]
pub(super) struct Pace {
    /// What all nodes keep together.
    pub(super) rate: Rate,
    /// What of it is this node's.
    part: Part,
    /// When the next of its messages may be handed out.
    pub(super) plan: Spread,
    /// What each of them needs to begin.
    pub(super) permits: SharedPacer,
}

impl Pace {
    pub(super) fn new(rate: Rate, part: Part, started: Instant) -> Self {
        Self {
            rate,
            part,
            plan: Spread::exhausted(rate, started),
            permits: Arc::new(Mutex::new(Pacer::exhausted(rate, started))),
        }
    }

    pub(super) fn whole(&self) -> InForce {
        InForce {
            pace: self.rate.into(),
            connections: u32::MAX,
            messages_per_connection: u32::MAX,
            paused_until: None,
        }
    }

    /// Another part of the rate is this node's from now on, of `nodes` that have some of it.
    pub(super) fn set_part(&mut self, part: Part, nodes: u32, now: Instant) {
        // What others had of it they may have used until just now.
        let was_theirs = nodes > 1 && self.part.is_none();
        self.part = part;
        let here = part.of(self.whole());
        if here.connections == 0 {
            self.part = Part::NONE;
            return;
        }
        self.plan.change(here.pace.per_second(), now);
        let mut permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
        permits.change(here.pace);
        if was_theirs {
            permits.use_up(now);
        }
    }

    /// When the next message may be handed out; `None`: others have all of the rate.
    pub(super) fn next(&self) -> Option<Instant> {
        (!self.part.is_none()).then(|| self.plan.next())
    }

    /// Whether nothing of it has to be remembered.
    pub(super) fn is_idle(&self, now: Instant) -> bool {
        let permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
        self.plan.next() <= now && permits.is_fresh(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};

    /// Messages in ten seconds, looked at every 10 ms.
    fn in_ten_seconds(pace: &mut Pace, from: Instant) -> usize {
        let moments = (1..=1_000).map(|n| from + Duration::from_millis(10 * n));
        let mut begun = 0;
        for now in moments {
            while pace.next().is_some_and(|at| at <= now) {
                pace.plan.take(now);
                begun += 1;
            }
        }
        begun
    }

    #[test]
    fn a_node_sends_its_part_and_nothing_before_it_has_one() {
        let now = SystemClock.instant();
        let mut pace = Pace::new("20/s".parse().expect("a rate"), Part::NONE, now);
        assert_eq!(pace.next(), None);
        let half = Part {
            rate: 0.5,
            connections: 7,
        };
        pace.set_part(half, 2, now);
        let begun = in_ten_seconds(&mut pace, now);
        assert!((95..=100).contains(&begun), "{begun}");
        pace.set_part(Part::ALL, 1, now + Duration::from_secs(10));
        let begun = in_ten_seconds(&mut pace, now + Duration::from_secs(10));
        assert!((199..=201).contains(&begun), "{begun}");
        pace.set_part(Part::NONE, 2, now);
        assert_eq!(pace.next(), None);
    }
}
