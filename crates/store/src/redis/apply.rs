//! What a fact changes in the books of a step: the recipient, its counters, what is kept for the story,
//! the event, a retry, a suppression.
//!
//! Must not decide what changes: `transition` does.

use super::books::{Books, RetryKey};
use super::cache::LotKey;
use super::record::BatchRecord;
use super::ship::Placed;
use super::suppress;
use crate::form::Ref;
use crate::tell::COMPLAINT;
use crate::transition::{self, Applied};
use crate::{MIXED, Result, Shipped, Suppression, tell};
use model::{
    Attempt, AttemptResult, BatchState, Fact, FactId, Hit, HitKind, JournalId, MessageId, Status,
    SuppressionReason, TrackingMode,
};
use serde_json::json;
use std::borrow::Cow;

/// The account and the address that a fact is about.
pub(super) fn address_of(books: &Books<'_>, placed: &Placed) -> Option<(String, String)> {
    let (key, place) = (placed.key()?, placed.place?);
    let account = books.head(key.0).ok()?.account.clone();
    let lot = books.lot(key).ok()?;
    let row = lot.row(place.position)?;
    Some((account, row.email.normalised().into_owned()))
}

/// Applies a fact; false when it is about something that the store does not know.
pub(super) fn apply<'a>(
    books: &mut Books<'a>,
    placed: &'a Placed,
    journal: JournalId,
    shipped: &mut Shipped,
) -> Result<bool> {
    let Some(MessageId { batch, .. }) = placed.fact.message() else {
        if let Fact::Page(page) = &placed.fact {
            let id = FactId {
                journal,
                seq: placed.seq,
            };
            books.account_event(tell::of_page(id, page));
        }
        return Ok(true);
    };
    let Some(record) = books.batch(batch).filter(|of| of.has_rows()).cloned() else {
        return Ok(false);
    };
    let Some((key, place)) = placed.key().zip(placed.place) else {
        return Ok(false);
    };
    match &placed.fact {
        Fact::Attempt(attempt) => apply_attempt(
            books,
            &record,
            (key, place.position),
            (journal, placed),
            attempt,
            shipped,
        ),
        Fact::Hit(hit) => apply_hit(
            books,
            &record,
            (key, place.position),
            (journal, placed),
            hit,
        ),
        Fact::Revision(_) | Fact::Reply(_) | Fact::Complaint(_) => {
            apply_later(books, (key, place.position), (journal, placed))
        }
        Fact::Page(_) => Ok(true),
    }
}

/// Applies what came of a hit, or of the mail, later.
fn apply_later<'a>(
    books: &mut Books<'a>,
    (key, position): (LotKey, u16),
    (journal, placed): (JournalId, &'a Placed),
) -> Result<bool> {
    let Some(mut cell) = books.cell(key, position)? else {
        return Ok(false);
    };
    let event = books.count(key.0, |counters| {
        transition::later(&mut cell, counters, &placed.fact)
    });
    books.set_cell(key, position, cell);
    if cell.erased() {
        return Ok(true);
    }
    books.log(key, position, placed.seq, Cow::Borrowed(&placed.fact));
    if let Some(kind) = event {
        books.fact_event(kind, journal, placed.seq, &placed.fact, (key, position))?;
    }
    if let (Fact::Complaint(complaint), Some(_)) = (&placed.fact, event)
        && let Some((account, email)) = address_of(books, placed)
    {
        let entry = Suppression {
            email,
            account,
            list: None,
            reason: SuppressionReason::Complaint,
            source: COMPLAINT.into(),
            created_at: complaint.at,
        };
        suppress::add(books, entry, true);
    }
    Ok(true)
}

fn apply_attempt<'a>(
    books: &mut Books<'a>,
    record: &BatchRecord,
    (key, position): (LotKey, u16),
    (journal, placed): (JournalId, &'a Placed),
    attempt: &Attempt,
    shipped: &mut Shipped,
) -> Result<bool> {
    let Some(mut cell) = books.cell(key, position)? else {
        return Ok(false);
    };
    let applied = books.count(key.0, |counters| {
        transition::attempt(
            &mut cell,
            counters,
            record.released,
            attempt.number,
            &attempt.result,
        )
    });
    books.set_cell(key, position, cell);
    if applied == Applied::Duplicate {
        shipped.duplicates.push(attempt.message);
    }
    if cell.erased() {
        return Ok(true);
    }
    books.log(key, position, placed.seq, Cow::Borrowed(&placed.fact));
    if let Applied::Moved(kind) = applied {
        books.fact_event(kind, journal, placed.seq, &placed.fact, (key, position))?;
    }
    if let (AttemptResult::TemporaryError { retry_at, .. }, Applied::Moved(_)) =
        (attempt.result, applied)
    {
        if record.state == BatchState::Cancelled {
            // Its holder had started it when the batch was cancelled: there is no next time.
            books.end_unsent(key, position, Status::Cancelled, json!({}))?;
        } else {
            let retry = RetryKey {
                batch: key.0,
                queue: queue_of(books, key, position)?,
                rank: record.rank(),
                due_at: transition::filed_at(retry_at, books.now).millis(),
            };
            let of = Ref {
                lot: key.1,
                position,
                attempts: cell.attempts(),
            };
            books.retry(retry, of);
        }
    }
    if let Some(reason) = attempt.suppress
        && let Some((account, email)) = address_of(books, placed)
    {
        let entry = Suppression {
            email,
            account,
            list: None,
            reason,
            source: "bounce".into(),
            created_at: attempt.at,
        };
        suppress::add(books, entry, true);
    }
    Ok(true)
}

/// The recipient's own queue: its domain.
fn queue_of(books: &Books<'_>, key: LotKey, position: u16) -> Result<Box<str>> {
    let lot = books.lot(key)?;
    let own = lot.row(position).filter(|_| *lot.queue == *MIXED);
    Ok(own.map_or_else(|| lot.queue.clone(), |row| row.email.domain().into()))
}

fn apply_hit<'a>(
    books: &mut Books<'a>,
    record: &BatchRecord,
    (key, position): (LotKey, u16),
    (journal, placed): (JournalId, &'a Placed),
    hit: &Hit,
) -> Result<bool> {
    let Some(mut cell) = books.cell(key, position)? else {
        return Ok(false);
    };
    // Leaving a list is a person's will, not a thing that is tracked: it always counts.
    let unsubscribe = hit.kind == HitKind::Unsubscribe;
    let mode = if unsubscribe {
        TrackingMode::Individual
    } else {
        tracking_of(books, record, key, placed)?.min(hit.allows())
    };
    if mode == TrackingMode::Off {
        return Ok(true);
    }
    let event = books.count(key.0, |counters| transition::hit(&mut cell, counters, hit));
    books.set_cell(key, position, cell);
    if cell.erased() {
        return Ok(true);
    }
    match mode {
        TrackingMode::Individual => {
            books.log(key, position, placed.seq, Cow::Borrowed(&placed.fact));
            if let Some(kind) = event {
                books.fact_event(kind, journal, placed.seq, &placed.fact, (key, position))?;
            }
        }
        TrackingMode::LastDate => {
            let date = transition::only_the_date(hit.clone());
            books.log(
                key,
                position,
                placed.seq,
                Cow::Owned(Fact::Hit(Box::new(date))),
            );
        }
        TrackingMode::Aggregate | TrackingMode::Off => {}
    }
    if unsubscribe && let Some((account, email)) = address_of(books, placed) {
        let head = books.head(key.0)?;
        let source = hit.method.as_deref().unwrap_or("unsubscribe_page");
        let entry = Suppression {
            email,
            account,
            list: Some(head.list.clone()).filter(|list| !list.is_empty()),
            reason: SuppressionReason::Unsubscribed,
            source: source.to_owned(),
            created_at: hit.at,
        };
        suppress::add(books, entry, true);
    }
    Ok(true)
}

/// The most restrictive of the batch's and the recipient's mode and of what the person said; off
/// when archived.
fn tracking_of(
    books: &Books<'_>,
    record: &BatchRecord,
    key: LotKey,
    placed: &Placed,
) -> Result<TrackingMode> {
    if record.archived {
        return Ok(TrackingMode::Off);
    }
    let mut mode = record.tracking;
    if books.any_consents
        && let Some(person) = address_of(books, placed)
        && let Some(Some(consent)) = books.consents.get(&person)
    {
        mode = mode.min(consent.mode);
    }
    let lot = books.lot(key)?;
    if !lot.overrides {
        return Ok(mode);
    }
    let own = placed
        .place
        .and_then(|place| lot.row(place.position)?.tracking);
    Ok(own.map_or(mode, |own| own.min(mode)))
}
