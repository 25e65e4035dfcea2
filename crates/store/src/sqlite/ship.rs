//! Facts on their way in: each is applied at most once, with its counters, events, retry lots and
//! suppressions, in one step with the journal's high-water mark and the windows of leases.
//!
//! Rows of a lot are unpacked only where a fact needs the address; cells and a log entry are all
//! that an ordinary outcome touches. Must not decide: `transition` does.

use super::books::{Books, RetryKey};
use super::ids::{self, LotId};
use super::range;
use super::record::{BatchRecord, By, record};
use super::stage::is_mixed;
use super::suppress;
use super::writer::Step;
use crate::form::Ref;
use crate::tell::COMPLAINT;
use crate::transition::{self, Applied};
use crate::{Result, Shipment, Shipped, tell};
use model::{
    Attempt, AttemptResult, BatchId, BatchState, Fact, FactId, Hit, HitKind, JournalId, MessageId,
    Place, Seq, Status, SuppressionReason, Timestamp, TrackingMode,
};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::json;
use std::collections::HashMap;

/// Through which sequence a journal was taken.
pub(super) fn high_water(connection: &Connection, journal: JournalId) -> Result<Seq> {
    let through: Option<i64> = connection
        .prepare_cached("SELECT through FROM journal WHERE id=?1")?
        .query_row([journal.to_bytes()], |row| row.get(0))
        .optional()?;
    Ok(through.map_or(0, ids::nat))
}

/// Applies a shipment.
pub(super) fn ship(step: &mut Step<'_>, shipment: Shipment) -> Result<Shipped> {
    let mark = high_water(step.connection, shipment.journal)?;
    let journal = shipment.journal;
    let mut shipped = Shipped::default();
    let mut last = mark.max(shipment.through);
    let mut books = Books::open(step, shipment.now);
    let mut batches = HashMap::new();
    for (seq, fact) in shipment.facts {
        if seq <= mark {
            shipped.repeated += 1;
            continue;
        }
        last = last.max(seq);
        let of = FactId { journal, seq };
        if !apply(&mut books, &mut batches, of, fact, &mut shipped)? {
            shipped.unknown += 1;
        }
    }
    for (range, window) in shipment.windows {
        if !move_window(books.step, range, window, shipment.now)? {
            shipped.lost.push(range);
        }
    }
    for range in shipment.finished {
        match range::held(books.step, range)? {
            None => shipped.lost.push(range),
            Some(held) if held.unreported(&mut books)?.is_empty() => {
                range::delete(books.step, held.id)?
            }
            Some(_) => {}
        }
    }
    if last > mark {
        books
            .step
            .connection
            .prepare_cached("INSERT INTO journal VALUES (?1, ?2) ON CONFLICT DO UPDATE SET through=excluded.through")?
            .execute(params![journal.to_bytes(), ids::int(last)])?;
    }
    shipped.completed = books.close(Some(journal))?;
    Ok(shipped)
}

fn move_window(
    step: &Step<'_>,
    range: crate::RangeRef,
    window: u32,
    now: Timestamp,
) -> Result<bool> {
    let moved = step
        .connection
        .prepare_cached(
            "UPDATE work SET window=MAX(window, MIN(?3, count)) WHERE id=?1 AND token=?2 AND holder IS NOT NULL AND expires>?4",
        )?
        .execute(params![ids::int(range.id), ids::int(range.token), window, now.millis()])?;
    Ok(moved == 1)
}

/// Applies a fact; false when it is about something that the store does not know.
fn apply(
    books: &mut Books<'_, '_>,
    numbers: &mut HashMap<BatchId, Option<i64>>,
    FactId { journal, seq }: FactId,
    fact: Fact,
    shipped: &mut Shipped,
) -> Result<bool> {
    let Some(message) = fact.message() else {
        if let Fact::Page(page) = &fact {
            books.account_event(tell::of_page(FactId { journal, seq }, page));
        }
        return Ok(true);
    };
    let no = match numbers.get(&message.batch) {
        Some(known) => *known,
        None => {
            let found = record(books.step.connection, By::Id(message.batch.to_bytes()))?;
            let no = found.map(|batch| batch.no);
            numbers.insert(message.batch, no);
            no
        }
    };
    let batch = match no {
        Some(no) => books.batch(no)?,
        None => None,
    };
    let Some(batch) = batch else {
        return Ok(false);
    };
    match fact {
        Fact::Attempt(attempt) => apply_attempt(books, &batch, seq, *attempt, shipped),
        Fact::Hit(hit) => apply_hit(books, &batch, seq, *hit),
        Fact::Revision(_) | Fact::Reply(_) | Fact::Complaint(_) => {
            apply_later(books, &batch, seq, message, fact)
        }
        Fact::Page(_) => Ok(true),
    }
}

fn apply_attempt(
    books: &mut Books<'_, '_>,
    batch: &BatchRecord,
    seq: Seq,
    attempt: Attempt,
    shipped: &mut Shipped,
) -> Result<bool> {
    let Place {
        lot: number,
        position,
    } = attempt.place;
    let lot = ids::lot_id(batch.no, number);
    let Some(mut cell) = books.cell(lot, position)? else {
        return Ok(false);
    };
    let applied = books.count(lot, |counters| {
        transition::attempt(
            &mut cell,
            counters,
            batch.released,
            attempt.number,
            &attempt.result,
        )
    })?;
    books.set_cell(lot, position, cell)?;
    let (message, result, suppress, at) = (
        attempt.message,
        attempt.result,
        attempt.suppress,
        attempt.at,
    );
    if applied == Applied::Duplicate {
        shipped.duplicates.push(message);
    }
    if cell.erased() {
        return Ok(true);
    }
    let entry = books.log(lot, position, seq, Fact::Attempt(Box::new(attempt)))?;
    if let Applied::Moved(kind) = applied {
        books.fact_event(kind, lot, entry);
    }
    if let (AttemptResult::TemporaryError { retry_at, .. }, Applied::Moved(_)) = (result, applied) {
        if batch.state == BatchState::Cancelled {
            // Its holder had started it when the batch was cancelled: there is no next time.
            books.end_unsent(lot, position, Status::Cancelled, json!({}))?;
        } else {
            let of = Ref {
                lot: number,
                position,
                attempts: cell.attempts(),
            };
            file_retry(books, lot, of, retry_at, batch.rank())?;
        }
    }
    if let Some(reason) = suppress {
        let email = address_of(books, lot, position)?;
        let account = books.head(batch.no)?.account.clone();
        if let Some(email) = email {
            let entry = suppress::entry(&account, email, None, reason, "bounce", at);
            suppress::add(books, entry, true)?;
        }
    }
    Ok(true)
}

/// Files a retry under its minute, or its second when that is soon; never early.
fn file_retry(
    books: &mut Books<'_, '_>,
    lot: LotId,
    of: Ref,
    retry_at: Timestamp,
    rank: u8,
) -> Result<()> {
    let due_at = transition::filed_at(retry_at, books.now).millis();
    let key = RetryKey {
        batch: ids::split(lot).0,
        partition: of.lot.partition(),
        queue: queue_of(books, lot, of.position)?,
        rank,
        due_at,
    };
    books.retry(key, of);
    Ok(())
}

/// The recipient's own queue: its domain.
fn queue_of(books: &Books<'_, '_>, lot: LotId, position: u16) -> Result<Box<str>> {
    let queue: String = books
        .step
        .connection
        .prepare_cached("SELECT queue FROM lot WHERE id=?1")?
        .query_row([lot], |row| row.get(0))?;
    if !is_mixed(&queue) {
        return Ok(queue.into());
    }
    let found = books.step.cache.lot(books.step.connection, lot)?;
    let row = found
        .as_ref()
        .and_then(|lot| lot.rows.get(usize::from(position)));
    Ok(row.map_or_else(|| queue.into(), |row| row.email.domain().into()))
}

fn address_of(books: &Books<'_, '_>, lot: LotId, position: u16) -> Result<Option<String>> {
    let found = books.step.cache.lot(books.step.connection, lot)?;
    let row = found
        .as_ref()
        .and_then(|lot| lot.rows.get(usize::from(position)));
    Ok(row.map(|row| row.email.normalised().into_owned()))
}

fn apply_hit(books: &mut Books<'_, '_>, batch: &BatchRecord, seq: Seq, hit: Hit) -> Result<bool> {
    let MessageId { index, .. } = hit.message;
    let Some(place) = books.place_of(batch.no, index)? else {
        return Ok(false);
    };
    let lot = ids::lot_id(batch.no, place.lot);
    let Some(mut cell) = books.cell(lot, place.position)? else {
        return Ok(false);
    };
    // Leaving a list is a person's will, not a thing that is tracked: it always counts.
    let unsubscribe = hit.kind == HitKind::Unsubscribe;
    let mode = if unsubscribe {
        TrackingMode::Individual
    } else {
        tracking_of(books, batch, lot, place.position)?.min(hit.allows())
    };
    if mode == TrackingMode::Off {
        return Ok(true);
    }
    let event = books.count(lot, |counters| transition::hit(&mut cell, counters, &hit))?;
    books.set_cell(lot, place.position, cell)?;
    if cell.erased() {
        return Ok(true);
    }
    let at = hit.at;
    let source = hit
        .method
        .clone()
        .unwrap_or_else(|| "unsubscribe_page".into());
    match mode {
        TrackingMode::Individual => {
            let entry = books.log(lot, place.position, seq, Fact::Hit(Box::new(hit)))?;
            if let Some(kind) = event {
                books.fact_event(kind, lot, entry);
            }
        }
        TrackingMode::LastDate => {
            books.log(
                lot,
                place.position,
                seq,
                Fact::Hit(Box::new(transition::only_the_date(hit))),
            )?;
        }
        TrackingMode::Aggregate | TrackingMode::Off => {}
    }
    if unsubscribe {
        let head = books.head(batch.no)?;
        if let Some(email) = address_of(books, lot, place.position)? {
            let list = Some(head.list.clone()).filter(|list| !list.is_empty());
            let reason = SuppressionReason::Unsubscribed;
            let entry = suppress::entry(&head.account, email, list, reason, &source, at);
            suppress::add(books, entry, true)?;
        }
    }
    Ok(true)
}

/// Applies what came of a hit, or of the mail, later.
fn apply_later(
    books: &mut Books<'_, '_>,
    batch: &BatchRecord,
    seq: Seq,
    message: MessageId,
    fact: Fact,
) -> Result<bool> {
    let Some(place) = books.place_of(batch.no, message.index)? else {
        return Ok(false);
    };
    let lot = ids::lot_id(batch.no, place.lot);
    let Some(mut cell) = books.cell(lot, place.position)? else {
        return Ok(false);
    };
    let event = books.count(lot, |counters| {
        transition::later(&mut cell, counters, &fact)
    })?;
    books.set_cell(lot, place.position, cell)?;
    if cell.erased() {
        return Ok(true);
    }
    let complained = matches!(fact, Fact::Complaint(_)) && event.is_some();
    let at = fact.at();
    let entry = books.log(lot, place.position, seq, fact)?;
    if let Some(kind) = event {
        books.fact_event(kind, lot, entry);
    }
    if complained && let Some(email) = address_of(books, lot, place.position)? {
        let account = books.head(batch.no)?.account.clone();
        let reason = SuppressionReason::Complaint;
        let entry = suppress::entry(&account, email, None, reason, COMPLAINT, at);
        suppress::add(books, entry, true)?;
    }
    Ok(true)
}

/// The most restrictive of the batch's and the recipient's mode and of what the person said; off
/// when archived.
fn tracking_of(
    books: &mut Books<'_, '_>,
    batch: &BatchRecord,
    lot: LotId,
    position: u16,
) -> Result<TrackingMode> {
    if batch.archived {
        return Ok(TrackingMode::Off);
    }
    let said = books.any_consents()?;
    if !said && !books.overrides(lot)? {
        return Ok(batch.tracking);
    }
    let found = books.step.cache.lot(books.step.connection, lot)?;
    let row = found
        .as_ref()
        .and_then(|lot| lot.rows.get(usize::from(position)));
    let Some(row) = row else {
        return Ok(batch.tracking);
    };
    let mut mode = batch
        .tracking
        .min(row.tracking.unwrap_or(TrackingMode::Individual));
    if said {
        let account = &books.head(batch.no)?.account;
        let consent = books.consent(account, &row.email.normalised())?;
        mode = consent.map_or(mode, |of| mode.min(of.mode));
    }
    Ok(mode)
}
