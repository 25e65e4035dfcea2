//! When what was shipped may be forgotten: kept for a time, for a store that forgets.

use model::Seq;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Steps into which the time is divided, which bounds the log.
const STEPS: u32 = 60;

#[derive(Debug)]
pub(crate) struct ShipLog {
    retain: Duration,
    /// Since when a step is filled, when it was last added to, and through which record.
    steps: VecDeque<(Instant, Instant, Seq)>,
    due: Seq,
}

impl ShipLog {
    pub(crate) fn new(retain: Duration) -> Self {
        Self {
            retain,
            steps: VecDeque::new(),
            due: 0,
        }
    }

    /// Notes that everything through `seq` was shipped, and says through which record everything
    /// was shipped at least the retained time ago.
    pub(crate) fn shipped(&mut self, seq: Seq, now: Instant) -> Seq {
        match self.steps.back_mut() {
            Some((_, _, last)) if *last >= seq => {}
            Some((since, latest, last))
                if now.saturating_duration_since(*since) < self.retain / STEPS =>
            {
                (*latest, *last) = (now, seq);
            }
            _ => self.steps.push_back((now, now, seq)),
        }
        while let Some(&(_, latest, seq)) = self.steps.front() {
            if now.saturating_duration_since(latest) < self.retain {
                break;
            }
            self.due = self.due.max(seq);
            self.steps.pop_front();
        }
        self.due
    }

    /// Forgets that anything after `seq` was shipped.
    pub(crate) fn rewind(&mut self, seq: Seq) {
        self.steps.retain(|step| step.2 <= seq);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, secs: u64) -> Instant {
        start + Duration::from_secs(secs)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an origin for times that only this test moves"
    )]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn nothing_is_due_before_its_time_and_the_log_is_bounded() {
        let start = origin();
        let mut log = ShipLog::new(Duration::from_mins(10));
        for second in 0..3600_u64 {
            let due = log.shipped(second + 1, at(start, second));
            assert!(due <= (second + 1).saturating_sub(600), "{second}: {due}");
            assert!(due + 611 >= second || second < 611, "{second}: {due}");
            assert!(log.steps.len() <= 62);
        }
        assert_eq!(log.shipped(3600, at(start, 9999)), 3600);
    }

    #[test]
    fn without_retention_all_is_due_at_once() {
        let start = origin();
        let mut log = ShipLog::new(Duration::ZERO);
        assert_eq!(log.shipped(5, start), 5);
        assert_eq!(log.shipped(5, start), 5);
        assert_eq!(log.shipped(9, start), 9);
    }

    #[test]
    fn what_is_rewound_is_not_due() {
        let start = origin();
        let mut log = ShipLog::new(Duration::from_secs(60));
        log.shipped(5, start);
        log.shipped(9, at(start, 30));
        log.rewind(5);
        assert_eq!(log.shipped(0, at(start, 500)), 5);
    }
}
