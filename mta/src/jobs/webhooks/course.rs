//! How far a webhook is, and what comes next: another try, a wait, or the end of patience.
//!
//! Owns the rules of retrying; pure, so that days pass in a test at once. The cursor moves with an
//! acknowledgement and with nothing else, and always over a whole page: what comes after a page is
//! not told before it, so the order of everything is kept. Must not read a clock or do I/O.

use std::time::Duration;

use model::Timestamp;
use serde::{Deserialize, Serialize};

use super::hook::Hook;

/// Events of one delivery (contract, section 5).
pub(crate) const EVENTS_MAX: u32 = 500;
/// The first wait; each later one is twice as long, up to [`RETRY_MAX`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Also the longest that a receiver that came back waits for what it missed.
const RETRY_MAX: Duration = Duration::from_secs(600);
/// What a receiver may ask for by `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);
/// How long one delivery is tried (contract, section 5).
pub(crate) const PATIENCE: Duration = Duration::from_secs(72 * 3_600);
/// "Payload Too Large": fewer events may do.
const TOO_LARGE: u16 = 413;
/// Bytes of a reason.
const REASON_MAX: usize = 300;

/// How far a webhook is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Of the events: everything before it has been acknowledged.
    pub(crate) cursor: String,
    /// When the cursor was last moved.
    pub(crate) moved_at: Timestamp,
    /// When events were last acknowledged.
    pub(crate) delivered_at: Option<Timestamp>,
    /// Which edition of the webhook is being served.
    pub(crate) edition: u64,
    /// The most events that the receiver takes at once.
    pub(crate) limit: u32,
    /// Why it does not move.
    pub(crate) failure: Option<Failing>,
}

/// A delivery that was not acknowledged yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failing {
    /// Of the first attempt.
    pub(crate) since: Timestamp,
    pub(crate) attempts: u32,
    /// Of the last attempt.
    pub(crate) last_at: Timestamp,
    /// Of the next one; none: parked.
    pub(crate) next_at: Option<Timestamp>,
    /// The answer's, if there was one.
    pub(crate) status: Option<u16>,
    pub(crate) reason: String,
    /// How many events it has.
    pub(crate) events: u32,
}

/// What came of one attempt that was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: Option<u16>,
    pub(crate) reason: String,
    /// What the receiver asked for.
    pub(crate) retry_after: Option<Duration>,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// Events after the cursor, at most so many.
    Send(u32),
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing, until a person changes something.
    Parked,
}

impl Progress {
    /// Of a webhook that begins at `cursor`.
    pub(crate) fn new(cursor: String, now: Timestamp) -> Self {
        Self {
            cursor,
            moved_at: now,
            delivered_at: None,
            edition: 0,
            limit: EVENTS_MAX,
            failure: None,
        }
    }

    /// Serves the webhook as it is configured now. A person changed something, so that what failed is
    /// tried at once.
    pub(crate) fn adopt(&mut self, hook: &Hook, now: Timestamp) {
        if self.edition == hook.edition {
            return;
        }
        if let Some(replay) = &hook.replay
            && replay.edition > self.edition
        {
            self.cursor.clone_from(&replay.cursor);
            self.moved_at = now;
        }
        self.edition = hook.edition;
        self.failure = None;
        self.limit = EVENTS_MAX;
    }

    pub(crate) fn is_parked(&self) -> bool {
        self.failure.as_ref().is_some_and(|of| of.next_at.is_none())
    }

    pub(crate) fn due(&self, now: Timestamp) -> Due {
        match &self.failure {
            None => Due::Send(self.limit.clamp(1, EVENTS_MAX)),
            Some(Failing { next_at: None, .. }) => Due::Parked,
            Some(Failing {
                next_at: Some(at), ..
            }) if *at > now => {
                // A clock that was set back does not prolong it.
                Due::Wait(at.since(now).min(RETRY_AFTER_MAX))
            }
            // The same events once more.
            Some(failing) => Due::Send(failing.events.clamp(1, EVENTS_MAX)),
        }
    }

    /// The receiver has taken everything up to `next`.
    pub(crate) fn acknowledged(&mut self, next: String, now: Timestamp) {
        self.skipped(next, now);
        self.delivered_at = Some(now);
        self.failure = None;
        self.limit = (self.limit + self.limit / 8 + 1).min(EVENTS_MAX);
    }

    /// Up to `next` there is nothing for this webhook.
    pub(crate) fn skipped(&mut self, next: String, now: Timestamp) {
        self.cursor = next;
        self.moved_at = now;
    }

    /// The receiver has not taken `events` events; the next attempt waits, `jitter` times as long as
    /// it would.
    pub(crate) fn failed(&mut self, failure: Failure, events: u32, now: Timestamp, jitter: f64) {
        let before = self.failure.take();
        let since = before.as_ref().map_or(now, |of| of.since);
        let attempts = before.map_or(0, |of| of.attempts).saturating_add(1);
        let is_too_large = failure.status == Some(TOO_LARGE) && events > 1;
        let wait = match failure.retry_after {
            _ if is_too_large => Duration::ZERO,
            Some(asked) => asked.min(RETRY_AFTER_MAX).max(RETRY_FIRST),
            None => backoff(attempts).mul_f64(jitter),
        };
        let end = since + PATIENCE;
        let events = if is_too_large { events / 2 } else { events };
        self.limit = if is_too_large { events } else { self.limit };
        let mut reason = failure.reason.replace(char::is_control, " ");
        reason.truncate(reason.floor_char_boundary(REASON_MAX));
        self.failure = Some(Failing {
            since,
            attempts,
            last_at: now,
            next_at: (now < end).then(|| (now + wait).min(end)),
            status: failure.status,
            reason,
            events,
        });
    }
}

/// How long to wait after so many attempts.
fn backoff(attempts: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(attempts.saturating_sub(1));
    RETRY_FIRST.saturating_mul(doubled).min(RETRY_MAX)
}

#[cfg(test)]
mod tests {
    use super::super::hook::{Replay, Secret};
    use super::*;
    use model::WebhookId;
    use proptest::prelude::*;

    const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn hook(edition: u64) -> Hook {
        Hook {
            id: WebhookId::from_bytes([1; 16]),
            account: "default".into(),
            url: "https://x.example/".into(),
            types: Vec::new(),
            secret: Secret::parse("secret").expect("a secret"),
            enabled: true,
            created_at: T0,
            edition,
            replay: None,
        }
    }

    fn refused(status: u16) -> Failure {
        Failure {
            status: Some(status),
            reason: format!("answered with status {status}"),
            retry_after: None,
        }
    }

    /// The events of people, (person, number), each person's in order.
    type Log = Vec<(u8, u32)>;

    /// What a receiver does with one delivery.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Mood {
        Takes,
        Refuses,
        /// It took the events, but nobody heard.
        TakesInSilence,
        TooMany(u32),
    }

    /// A receiver in virtual time: its moods, each for so many seconds; later it takes everything.
    struct World {
        progress: Progress,
        now: Timestamp,
        moods: Vec<(Mood, u64)>,
        got: Log,
    }

    impl World {
        fn new(moods: Vec<(Mood, u64)>) -> Self {
            Self {
                progress: Progress::new("0".into(), T0),
                now: T0,
                moods,
                got: Vec::new(),
            }
        }

        fn mood(&self) -> Mood {
            let mut left = self.now.since(T0).as_secs();
            for (mood, seconds) in &self.moods {
                if left < *seconds {
                    return *mood;
                }
                left -= seconds;
            }
            Mood::Takes
        }

        /// One turn, as the runner takes it; whether something is left to do.
        fn turn(&mut self, log: &Log, jitter: f64) -> bool {
            let limit = match self.progress.due(self.now) {
                Due::Parked => return false,
                Due::Wait(wait) => {
                    self.now = self.now + wait;
                    return true;
                }
                Due::Send(limit) => limit as usize,
            };
            let at: usize = self.progress.cursor.parse().expect("a number");
            let page = &log[at..log.len().min(at + limit)];
            if page.is_empty() {
                return false;
            }
            self.now = self.now + Duration::from_millis(20);
            let count = u32::try_from(page.len()).expect("few");
            let mood = self.mood();
            let takes = match mood {
                Mood::TooMany(most) => count <= most,
                Mood::Takes | Mood::TakesInSilence => true,
                Mood::Refuses => false,
            };
            if takes {
                self.got.extend_from_slice(page);
            }
            match mood {
                Mood::Takes | Mood::TooMany(_) if takes => {
                    let next = (at + page.len()).to_string();
                    self.progress.acknowledged(next, self.now);
                }
                Mood::TooMany(_) => self.progress.failed(refused(413), count, self.now, jitter),
                _ => self.progress.failed(refused(500), count, self.now, jitter),
            }
            true
        }
    }

    fn moods() -> impl Strategy<Value = Vec<(Mood, u64)>> {
        let mood = prop_oneof![
            Just(Mood::Takes),
            Just(Mood::Refuses),
            Just(Mood::TakesInSilence),
            (1_u32..600).prop_map(Mood::TooMany),
        ];
        // Up to 16 hours each, four of them: less than the patience.
        prop::collection::vec((mood, 0_u64..60_000), 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// However long it fails, hangs and loses its answers: in the end nothing is missing, and for
        /// every person the order of what came first is the order of what happened.
        #[test]
        fn nothing_is_missing_and_nothing_out_of_order(
            log in prop::collection::vec(0_u8..5, 0..3_000),
            moods in moods(),
            jitter in 0.8_f64..1.2,
        ) {
            let log: Log = log.into_iter().zip(0..).collect();
            let mut world = World::new(moods);
            let mut turns = 0;
            while world.turn(&log, jitter) {
                turns += 1;
                prop_assert!(turns < 20_000, "it comes to no end");
            }
            prop_assert!(!world.progress.is_parked());
            prop_assert_eq!(world.progress.cursor.parse(), Ok(log.len()));
            let mut first = Log::new();
            for event in &world.got {
                // It comes for the first time, after all before it, or once more.
                match log.get(first.len()) {
                    Some(next) if next == event => first.push(*event),
                    _ => prop_assert!(first.get(event.1 as usize) == Some(event)),
                }
            }
            prop_assert_eq!(first, log);
        }
    }

    #[test]
    fn patience_ends_after_three_days_and_nothing_is_dropped() {
        let log: Log = (0..1_200).map(|n| (0, n)).collect();
        let mut world = World::new(vec![(Mood::Takes, 1), (Mood::Refuses, 10 * 86_400)]);
        // The first page is acknowledged within the first second.
        assert!(world.turn(&log, 1.0));
        world.now = T0 + Duration::from_secs(1);
        while world.turn(&log, 1.0) {}
        assert!(world.progress.is_parked());
        assert_eq!(world.progress.cursor, "500");
        let failing = world.progress.failure.clone().expect("a failure");
        let lasted = failing.last_at.since(failing.since);
        assert!(
            lasted >= PATIENCE && lasted < PATIENCE + Duration::from_secs(1),
            "{lasted:?}"
        );
        assert!(
            (430..500).contains(&failing.attempts),
            "{}",
            failing.attempts
        );
        assert_eq!((failing.status, failing.events), (Some(500), 500));
        // A person mends it: it goes on where it was.
        world.progress.adopt(&hook(7), world.now);
        world.moods.clear();
        while world.turn(&log, 1.0) {}
        assert_eq!(world.got, log);
        assert_eq!(world.progress.edition, 7);
    }

    #[test]
    fn a_replay_is_taken_once() {
        let mut progress = Progress::new("90".into(), T0);
        let mut hook = hook(3);
        hook.replay = Some(Replay {
            edition: 2,
            cursor: "10".into(),
        });
        progress.adopt(&hook, T0);
        assert_eq!((progress.cursor.as_str(), progress.edition), ("10", 3));
        progress.acknowledged("50".into(), T0);
        progress.adopt(&hook, T0);
        hook.edition = 4;
        progress.adopt(&hook, T0);
        assert_eq!((progress.cursor.as_str(), progress.edition), ("50", 4));
    }

    #[test]
    fn waits_grow_and_a_receiver_may_ask_for_more() {
        let mut progress = Progress::new("0".into(), T0);
        let mut waits = Vec::new();
        for _ in 0..12 {
            progress.failed(refused(500), 5, T0, 1.0);
            match progress.due(T0) {
                Due::Wait(wait) => waits.push(wait.as_secs()),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
        let asked = |seconds| Failure {
            retry_after: Some(Duration::from_secs(seconds)),
            ..refused(503)
        };
        progress.failed(asked(1_000), 5, T0, 1.0);
        assert_eq!(progress.due(T0), Due::Wait(Duration::from_secs(1_000)));
        progress.failed(asked(1_000_000), 5, T0, 1.0);
        assert_eq!(progress.due(T0), Due::Wait(RETRY_AFTER_MAX));
        // The clock was set back by a day.
        let before = T0 - Duration::from_secs(86_400);
        assert_eq!(progress.due(before), Due::Wait(RETRY_AFTER_MAX));
        assert_eq!(progress.due(T0 + RETRY_AFTER_MAX), Due::Send(5));
    }

    #[test]
    fn a_reason_is_short_and_plain() {
        let mut progress = Progress::new("0".into(), T0);
        let failure = Failure {
            reason: format!("a\r\nb{}", "é".repeat(400)),
            ..refused(500)
        };
        progress.failed(failure, 1, T0, 1.0);
        let reason = progress.failure.expect("a failure").reason;
        assert!(
            reason.starts_with("a  bé") && reason.len() <= REASON_MAX,
            "{reason}"
        );
        let json = serde_json::to_string(&Progress::new("e".into(), T0)).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Progress>(&json).expect("the same"),
            Progress::new("e".into(), T0)
        );
    }
}
