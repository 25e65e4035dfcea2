//! How one recipient changes: a cell and what happened to it make a new cell, a change of the
//! counters, and perhaps an event.
//!
//! Owns the rules that a status moves only forward, that a late *delivered* is always taken, and
//! that every unique count is one bit. Pure: every engine applies these same functions, and what
//! they do not say does not happen. Must not do I/O.

use model::{
    Actor, AttemptResult, Counters, EventKind, Fact, Hit, HitKind, Revision, Status, Timestamp,
    Verdict,
};

/// The mutable part of a recipient: four bytes, of which a lot has an array.
///
/// The stored status is `scheduled` only for what waits for its wave. Of everything else that waits
/// its batch says whether it is `scheduled` or `queued` ([`Cell::status`]), so that a release
/// changes one record and not a million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cell {
    status: u8,
    attempts: u8,
    flags: u8,
    engagement: u8,
}

/// Bits of [`Cell::flags`].
mod flag {
    pub(super) const MAYBE_STARTED: u8 = 1;
    pub(super) const AMBIGUOUS: u8 = 2;
    pub(super) const DELIVERED: u8 = 4;
    pub(super) const ERASED: u8 = 8;
    /// From here on, the number of the variant.
    pub(super) const VARIANT: u8 = 4;
}

/// One bit of engagement: set once, counted once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Engagement {
    /// The pixel was fetched.
    Opened = 1,
    /// By a person.
    OpenedHuman = 2,
    /// A link was followed.
    Clicked = 4,
    /// By a person.
    ClickedHuman = 8,
    /// The person left the list.
    Unsubscribed = 16,
    /// The person called it spam.
    Complained = 32,
    /// The person answered.
    Replied = 64,
}

impl Cell {
    /// Bytes of its stored form.
    pub const BYTES: usize = 4;

    /// A recipient that nothing happened to.
    pub const NEW: Self = Self {
        status: Status::Queued.code(),
        attempts: 0,
        flags: 0,
        engagement: 0,
    };

    /// A recipient that waits for its wave; the number of its variant, from 1, or 0.
    pub const fn held_back(variant: u8) -> Self {
        Self {
            status: Status::Scheduled.code(),
            flags: variant << flag::VARIANT,
            ..Self::NEW
        }
    }

    /// The cells of a new lot: nothing happened to anybody yet.
    pub(crate) fn fresh(rows: usize, variants: &[u8]) -> Vec<u8> {
        if variants.is_empty() {
            return Self::NEW.to_bytes().repeat(rows);
        }
        let cell = |variant: &u8| Self::held_back(*variant).to_bytes();
        variants.iter().flat_map(cell).collect()
    }

    /// The number of its variant, from 1; 0 when it has none (yet).
    pub const fn variant(self) -> u8 {
        self.flags >> flag::VARIANT
    }

    /// Whether it waits for its wave.
    pub fn is_held_back(self) -> bool {
        self.stored() == Status::Scheduled
    }

    /// Its wave is released, with this variant unless it has one. Whether it waited for that.
    pub(crate) fn release(&mut self, variant: u8, counters: &mut Counters) -> bool {
        if !self.is_held_back() {
            return false;
        }
        if self.variant() == 0 {
            self.flags |= variant << flag::VARIANT;
        }
        self.move_to(Status::Queued, true, counters);
        true
    }

    /// Reads the stored form; `None` when it is not one.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let &[status, attempts, flags, engagement] = bytes else {
            return None;
        };
        Status::from_code(status)?;
        Some(Self {
            status,
            attempts,
            flags,
            engagement,
        })
    }

    /// The stored form.
    pub const fn to_bytes(self) -> [u8; Self::BYTES] {
        [self.status, self.attempts, self.flags, self.engagement]
    }

    fn stored(self) -> Status {
        // `read` and the functions below are the only makers, and they make none but codes.
        Status::from_code(self.status).unwrap_or(Status::Failed)
    }

    /// Its status, in a batch that is `released` or not yet.
    pub fn status(self, released: bool) -> Status {
        match self.stored() {
            Status::Queued if !released => Status::Scheduled,
            other => other,
        }
    }

    /// Whether nothing more will be tried.
    pub fn is_final(self) -> bool {
        self.stored().is_final()
    }

    /// Attempts made.
    pub const fn attempts(self) -> u8 {
        self.attempts
    }

    /// Whether somebody reported since there had been `attempts` of them.
    pub fn reported_since(self, attempts: u8) -> bool {
        self.is_final() || self.attempts > attempts
    }

    /// Whether a former holder may have started it and never reported.
    pub const fn maybe_started(self) -> bool {
        self.flags & flag::MAYBE_STARTED != 0
    }

    /// Notes that a holder that is gone may have started it; the next report takes the note away.
    pub const fn mark_maybe_started(&mut self) {
        self.flags |= flag::MAYBE_STARTED;
    }

    /// Whether the person was erased: what comes is counted, and says nothing of them.
    pub const fn erased(self) -> bool {
        self.flags & flag::ERASED != 0
    }

    /// Notes that the person was erased.
    pub const fn erase(&mut self) {
        self.flags |= flag::ERASED;
    }

    /// Whether an attempt was ambiguous.
    pub const fn ambiguous(self) -> bool {
        self.flags & flag::AMBIGUOUS != 0
    }

    /// Whether this was ever seen.
    pub const fn has(self, engagement: Engagement) -> bool {
        self.engagement & engagement as u8 != 0
    }

    /// Sets a bit; whether it is new.
    const fn gain(&mut self, engagement: Engagement) -> bool {
        let new = !self.has(engagement);
        self.engagement |= engagement as u8;
        new
    }

    /// Takes a bit away; whether it was there.
    const fn lose(&mut self, engagement: Engagement) -> bool {
        let was = self.has(engagement);
        self.engagement &= !(engagement as u8);
        was
    }

    fn move_to(&mut self, status: Status, released: bool, counters: &mut Counters) {
        let from = counters.of(self.status(released));
        debug_assert!(*from > 0, "a counter that misses its recipient");
        *from = from.saturating_sub(1);
        self.status = status.code();
        *counters.of(status) += 1;
    }
}

/// What a report about a recipient did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The status moved: the event that tells of it.
    Moved(EventKind),
    /// It was delivered, and had been before.
    Duplicate,
    /// The recipient is further than this report; kept for the story, tells nobody anything.
    Stale,
}

/// Applies an attempt. `released`: whether the batch's mail may leave.
///
/// - *delivered* is taken whatever the status is; a second one is a duplicate.
/// - Anything else needs a recipient that is not final; and what was really tried, a number above
///   that of the last report.
pub fn attempt(
    cell: &mut Cell,
    counters: &mut Counters,
    released: bool,
    number: u8,
    result: &AttemptResult,
) -> Applied {
    let stale = cell.reported_since(number.saturating_sub(1));
    let applied = match *result {
        AttemptResult::Delivered if cell.flags & flag::DELIVERED != 0 => Applied::Duplicate,
        AttemptResult::Delivered => {
            cell.flags |= flag::DELIVERED;
            cell.move_to(Status::Delivered, released, counters);
            Applied::Moved(EventKind::EmailDelivered)
        }
        AttemptResult::TemporaryError { .. } if !stale => {
            cell.move_to(Status::TemporaryError, released, counters);
            Applied::Moved(EventKind::EmailTemporaryError)
        }
        AttemptResult::Bounce if !stale => {
            cell.move_to(Status::Bounce, released, counters);
            Applied::Moved(EventKind::EmailBounced)
        }
        AttemptResult::Failed if !stale => {
            cell.move_to(Status::Failed, released, counters);
            Applied::Moved(EventKind::EmailFailed)
        }
        AttemptResult::TemporaryError { .. } | AttemptResult::Bounce | AttemptResult::Failed => {
            Applied::Stale
        }
        AttemptResult::Suppressed(_) => {
            return end_unsent(cell, counters, released, Status::Suppressed);
        }
        AttemptResult::Cancelled => return end_unsent(cell, counters, released, Status::Cancelled),
    };
    cell.attempts = cell.attempts.max(number);
    if let AttemptResult::TemporaryError {
        ambiguous: true, ..
    } = result
    {
        cell.flags |= flag::AMBIGUOUS;
    }
    if applied != Applied::Stale {
        cell.flags &= !flag::MAYBE_STARTED;
    }
    applied
}

/// Ends a recipient that was not written to: `suppressed` or `cancelled`. No attempt is counted.
pub fn end_unsent(
    cell: &mut Cell,
    counters: &mut Counters,
    released: bool,
    status: Status,
) -> Applied {
    let event = if status == Status::Suppressed {
        EventKind::EmailSuppressed
    } else {
        EventKind::EmailCancelled
    };
    if cell.is_final() {
        return Applied::Stale;
    }
    cell.move_to(status, released, counters);
    cell.flags &= !flag::MAYBE_STARTED;
    Applied::Moved(event)
}

/// Applies a hit: total and unique counters, those of people too. The event that tells of it;
/// none for a probe and for a second unsubscribe.
pub fn hit(cell: &mut Cell, counters: &mut Counters, hit: &Hit) -> Option<EventKind> {
    let human = u64::from(hit.verdict.actor == Actor::Human);
    let new = |cell: &mut Cell, engagement| u64::from(cell.gain(engagement));
    match hit.kind {
        HitKind::Open => {
            counters.opened_total += 1;
            counters.opened_total_human += human;
            counters.opened_unique += new(cell, Engagement::Opened);
            if human == 1 {
                counters.opened_unique_human += new(cell, Engagement::OpenedHuman);
            }
            Some(EventKind::EmailOpened)
        }
        HitKind::Click => {
            counters.clicked_total += 1;
            counters.clicked_total_human += human;
            counters.clicked_unique += new(cell, Engagement::Clicked);
            if human == 1 {
                counters.clicked_unique_human += new(cell, Engagement::ClickedHuman);
            }
            Some(EventKind::EmailClicked)
        }
        HitKind::Unsubscribe => {
            let first = new(cell, Engagement::Unsubscribed);
            counters.unsubscribed += first;
            (first == 1).then_some(EventKind::EmailUnsubscribed)
        }
        HitKind::Probe => None,
    }
}

/// Judges a hit anew: the counters of people follow. The event that tells of it; none when the
/// verdict is only confirmed, which makes good for a person's bit that another revision took.
pub fn revise(cell: &mut Cell, counters: &mut Counters, of: &Revision) -> Option<EventKind> {
    let (bit, total, unique) = match of.kind {
        HitKind::Open => (
            Engagement::OpenedHuman,
            &mut counters.opened_total_human,
            &mut counters.opened_unique_human,
        ),
        HitKind::Click => (
            Engagement::ClickedHuman,
            &mut counters.clicked_total_human,
            &mut counters.clicked_unique_human,
        ),
        HitKind::Unsubscribe | HitKind::Probe => return None,
    };
    let (was, now) = (of.was == Actor::Human, of.verdict.actor == Actor::Human);
    match (was, now) {
        (true, false) => *total = total.saturating_sub(1),
        (false, true) => *total += 1,
        (true, true) | (false, false) => {}
    }
    if now || of.others {
        *unique += u64::from(cell.gain(bit));
    } else if was && cell.lose(bit) {
        *unique = unique.saturating_sub(1);
    }
    (of.was != of.verdict.actor).then_some(EventKind::EngagementReclassified)
}

/// Applies what comes of a hit or of the mail later. The event that tells of it.
pub(crate) fn later(cell: &mut Cell, counters: &mut Counters, fact: &Fact) -> Option<EventKind> {
    match fact {
        Fact::Revision(revision) => revise(cell, counters, revision),
        Fact::Reply(_) => Some(reply(cell, counters)),
        Fact::Complaint(_) => complaint(cell, counters),
        Fact::Attempt(_) | Fact::Hit(_) | Fact::Page(_) => None,
    }
}

/// Notes that the person answered; the event that tells of it, each time.
pub fn reply(cell: &mut Cell, counters: &mut Counters) -> EventKind {
    counters.replied += u64::from(cell.gain(Engagement::Replied));
    EventKind::EmailReplied
}

/// Notes that the person called it spam; the event that tells of it, the first time.
pub fn complaint(cell: &mut Cell, counters: &mut Counters) -> Option<EventKind> {
    let first = cell.gain(Engagement::Complained);
    counters.complained += u64::from(first);
    first.then_some(EventKind::EmailComplained)
}

/// What the mode `last_date` leaves of a hit: that there was one, and the day.
pub(crate) fn only_the_date(hit: Hit) -> Hit {
    const DAY: i64 = 24 * 60 * 60 * 1000;
    Hit {
        kind: hit.kind,
        message: hit.message,
        at: Timestamp::from_millis(hit.at.millis().div_euclid(DAY) * DAY),
        link: None,
        target: None,
        user_agent: "".into(),
        network: "".into(),
        visitor: None,
        method: None,
        verdict: Verdict {
            actor: hit.verdict.actor,
            machine_reasons: Vec::new(),
            rules: hit.verdict.rules,
        },
    }
}

/// The time under which a retry is filed: its minute, or its second when that is soon; never early.
pub(crate) fn filed_at(retry_at: Timestamp, now: Timestamp) -> Timestamp {
    /// Retries sooner than this are filed by the second, all others by the minute.
    const SOON: i64 = 60_000;
    let soon = retry_at.millis() - now.millis() < SOON;
    let step = if soon { 1_000 } else { 60_000 };
    let before = retry_at.millis().div_euclid(step) * step;
    let early = before < retry_at.millis();
    Timestamp::from_millis(if early { before + step } else { before })
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::SuppressionReason;
    use proptest::prelude::*;

    fn temporary(ambiguous: bool) -> AttemptResult {
        AttemptResult::TemporaryError {
            retry_at: Timestamp::from_millis(1),
            ambiguous,
        }
    }

    fn one() -> (Cell, Counters) {
        let counters = Counters {
            accepted: 1,
            queued: 1,
            ..Counters::default()
        };
        (Cell::NEW, counters)
    }

    #[test]
    fn a_status_moves_only_forward() {
        use AttemptResult::{Bounce, Cancelled, Delivered, Failed, Suppressed};
        let manual = Suppressed(SuppressionReason::Manual);
        type Case<'a> = (&'a [(u8, AttemptResult)], Status, u8);
        let table: &[Case<'_>] = &[
            (&[(1, Delivered)], Status::Delivered, 1),
            (
                &[(1, temporary(false)), (2, Delivered)],
                Status::Delivered,
                2,
            ),
            (
                &[(2, temporary(false)), (1, Bounce)],
                Status::TemporaryError,
                2,
            ),
            (
                &[(1, temporary(false)), (1, Failed)],
                Status::TemporaryError,
                1,
            ),
            (&[(1, Bounce), (2, temporary(false))], Status::Bounce, 2),
            (&[(1, Bounce), (1, Delivered)], Status::Delivered, 1),
            (&[(1, Failed), (1, Delivered)], Status::Delivered, 1),
            (&[(1, Cancelled), (1, Delivered)], Status::Delivered, 1),
            (&[(1, manual), (1, Delivered)], Status::Delivered, 1),
            (&[(1, Delivered), (2, Bounce)], Status::Delivered, 2),
            (&[(1, Delivered), (1, Cancelled)], Status::Delivered, 1),
            (
                &[(1, temporary(false)), (2, Cancelled)],
                Status::Cancelled,
                1,
            ),
            (&[(1, manual)], Status::Suppressed, 0),
        ];
        for (facts, status, attempts) in table {
            let (mut cell, mut counters) = one();
            for (number, result) in *facts {
                attempt(&mut cell, &mut counters, true, *number, result);
            }
            assert_eq!(
                (cell.status(true), cell.attempts()),
                (*status, *attempts),
                "{facts:?}"
            );
            assert_eq!(*counters.of(*status), 1, "{facts:?}");
            assert_eq!(counters.statuses(), 1, "{facts:?}");
        }
    }

    #[test]
    fn a_second_delivery_is_a_duplicate_even_after_a_bounce_was_overruled() {
        let (mut cell, mut counters) = one();
        let mut apply = |number, result: &AttemptResult| {
            attempt(&mut cell, &mut counters, true, number, result)
        };
        apply(1, &AttemptResult::Bounce);
        assert_eq!(
            apply(1, &AttemptResult::Delivered),
            Applied::Moved(EventKind::EmailDelivered)
        );
        assert_eq!(apply(2, &AttemptResult::Delivered), Applied::Duplicate);
    }

    #[test]
    fn what_may_have_been_started_is_known_until_reported() {
        let (mut cell, mut counters) = one();
        cell.mark_maybe_started();
        assert!(cell.maybe_started() && !cell.ambiguous());
        attempt(&mut cell, &mut counters, true, 1, &temporary(true));
        assert!(!cell.maybe_started() && cell.ambiguous());
        assert!(cell.reported_since(0) && !cell.reported_since(1));
    }

    #[test]
    fn what_waits_is_scheduled_until_its_batch_is_released() {
        let mut cell = Cell::NEW;
        let mut counters = Counters {
            accepted: 1,
            scheduled: 1,
            ..Counters::default()
        };
        assert_eq!(cell.status(false), Status::Scheduled);
        end_unsent(&mut cell, &mut counters, false, Status::Cancelled);
        assert_eq!((counters.scheduled, counters.cancelled), (0, 1));
    }

    fn any_result() -> impl Strategy<Value = AttemptResult> {
        prop_oneof![
            Just(AttemptResult::Delivered),
            any::<bool>().prop_map(temporary),
            Just(AttemptResult::Bounce),
            Just(AttemptResult::Failed),
            Just(AttemptResult::Suppressed(SuppressionReason::Manual)),
            Just(AttemptResult::Cancelled),
        ]
    }

    proptest! {
        #[test]
        fn the_identity_holds_whatever_comes(facts in prop::collection::vec((1_u8..4, any_result()), 0..12)) {
            let (mut cell, mut counters) = one();
            let mut was_delivered = false;
            for (number, result) in facts {
                let before = cell;
                let applied = attempt(&mut cell, &mut counters, true, number, &result);
                prop_assert_eq!(counters.statuses(), counters.accepted);
                prop_assert!(cell.attempts() >= before.attempts());
                prop_assert!(!before.is_final() || cell.is_final());
                if result == AttemptResult::Delivered {
                    prop_assert_eq!(applied == Applied::Duplicate, was_delivered);
                    was_delivered = true;
                }
                prop_assert_eq!(was_delivered, cell.status(true) == Status::Delivered);
                prop_assert_eq!(Cell::read(&cell.to_bytes()), Some(cell));
            }
        }

        #[test]
        fn any_bytes_are_a_cell_or_refused(bytes: Vec<u8>) {
            if let Some(cell) = Cell::read(&bytes) {
                prop_assert_eq!(cell.to_bytes().to_vec(), bytes);
            }
        }
    }
}
