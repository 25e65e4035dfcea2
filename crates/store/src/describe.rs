//! A recipient as it is read: what its cell and its facts say together.
//!
//! Pure, and the same for every engine. Must not do I/O.

use crate::erased;
use crate::transition::{Cell, Engagement};
use crate::{BatchHead, KeptHit, RecipientQuery, RecipientRow};
use model::{
    Actor, Attempt, AttemptResult, Fact, FactId, HitKind, Revision, Row, Status, Timestamp,
    TrackingMode,
};

/// Facts told of one message.
const FACTS: usize = 10_000;

/// Whether a query wants a recipient, as far as its cell says. In the modes that count only, who
/// opened is nobody's to know.
pub(crate) fn wanted(
    query: &RecipientQuery,
    cell: Cell,
    released: bool,
    tracking: TrackingMode,
) -> bool {
    let told = tracking >= TrackingMode::LastDate;
    let has = |engagement| told && cell.has(engagement);
    query
        .status
        .is_none_or(|status| status == cell.status(released))
        && query
            .opened
            .is_none_or(|opened| opened == has(Engagement::Opened))
        && query
            .clicked
            .is_none_or(|clicked| clicked == has(Engagement::Clicked))
        && (!query.with_variant || cell.variant() > 0)
}

/// What happened to one recipient, as the store learned it.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) hits: Vec<KeptHit>,
    pub(crate) replies: Vec<Timestamp>,
    pub(crate) complaints: Vec<Timestamp>,
}

impl Facts {
    /// Adds a fact, up to a bound.
    pub(crate) fn add(&mut self, id: FactId, fact: Fact) {
        if self.attempts.len() + self.hits.len() >= FACTS {
            return;
        }
        match fact {
            Fact::Attempt(attempt) => self.attempts.push(*attempt),
            Fact::Hit(hit) => self.hits.push(KeptHit { id, hit: *hit }),
            Fact::Revision(revision) => self.revise(*revision),
            Fact::Reply(reply) => self.replies.push(reply.at),
            Fact::Complaint(complaint) => self.complaints.push(complaint.at),
            // Belongs to no message, so it is in no log of one.
            Fact::Page(_) => {}
        }
    }

    /// The newest verdict holds. It came after the hit: its maker had read of that in an event.
    fn revise(&mut self, revision: Revision) {
        let hit = self.hits.iter_mut().find(|kept| kept.id == revision.hit);
        if let Some(kept) = hit {
            kept.hit.verdict = revision.verdict;
        }
    }

    /// Puts them in order of time.
    pub(crate) fn sort(&mut self) {
        self.attempts.sort_by_key(|attempt| attempt.at);
        self.hits.sort_by_key(|kept| kept.hit.at);
    }
}

/// The attempt that made the recipient what it is: its delivery, else the one with the highest
/// number, the first of these that was learned.
fn decisive<'a>(status: Status, attempts: &'a [Attempt]) -> Option<&'a Attempt> {
    let delivered = |attempt: &&Attempt| attempt.result == AttemptResult::Delivered;
    if status == Status::Delivered {
        return attempts.iter().find(delivered);
    }
    let by_number = |best: &'a Attempt, next: &'a Attempt| {
        if next.number > best.number {
            next
        } else {
            best
        }
    };
    attempts.iter().reduce(by_number)
}

/// A recipient as it is read, of a batch that is `released` or not yet.
pub(crate) fn describe(
    row: Row,
    cell: Cell,
    released: bool,
    head: &BatchHead,
    facts: &Facts,
) -> RecipientRow {
    let row = if cell.erased() {
        erased::row(&row)
    } else {
        row
    };
    let status = cell.status(released);
    let last = decisive(status, &facts.attempts);
    // Who expired while waiting was told nothing new: the last reply stands.
    let silent = |attempt: &&Attempt| attempt.detail.reply.is_empty();
    let heard = facts.attempts.iter().filter(|attempt| !silent(attempt));
    let said = match last.filter(silent) {
        Some(last) => heard.max_by_key(|attempt| attempt.number).or(Some(last)),
        None => last,
    };
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let first = |kind: HitKind| {
        facts
            .hits
            .iter()
            .map(|kept| &kept.hit)
            .filter(|hit| hit.kind == kind)
            .map(|hit| hit.at)
            .min()
    };
    let first_human = |kind: HitKind| {
        let hits = facts.hits.iter().map(|kept| &kept.hit);
        let human = hits.filter(|hit| hit.kind == kind && hit.verdict.actor == Actor::Human);
        human.map(|hit| hit.at).min()
    };
    let delivery = facts
        .attempts
        .iter()
        .find(|attempt| attempt.result == AttemptResult::Delivered);
    RecipientRow {
        row,
        variant: head.variant_name(cell.variant()).map(Box::from),
        status,
        attempts: cell.attempts(),
        next_attempt_at: match last.map(|attempt| attempt.result) {
            Some(AttemptResult::TemporaryError { retry_at, .. })
                if status == Status::TemporaryError =>
            {
                Some(retry_at)
            }
            _ => None,
        },
        smtp_code: said.and_then(|attempt| attempt.detail.smtp_code),
        enhanced_code: said.and_then(|attempt| attempt.detail.enhanced_code),
        class: last.and_then(|attempt| attempt.detail.class),
        blame: last.and_then(|attempt| attempt.detail.blame),
        reply: said.and_then(|attempt| text(&attempt.detail.reply)),
        host: said.and_then(|attempt| text(&attempt.detail.host)),
        accepted_at: head.created_at,
        decided_at: last.map(|attempt| attempt.at),
        delivered_at: delivery.map(|attempt| attempt.at),
        opened_at: first(HitKind::Open),
        opened_human_at: first_human(HitKind::Open),
        clicked_at: first(HitKind::Click),
        clicked_human_at: first_human(HitKind::Click),
        complained_at: facts.complaints.iter().copied().min(),
        unsubscribed_at: first(HitKind::Unsubscribe),
        replied_at: facts.replies.iter().copied().min(),
    }
}
