//! Facts on their way in: each is applied at most once, with its counters, events, retry lots and
//! suppressions, in one step with the journal's high-water mark and the windows of leases.
//!
//! Every partition has its own part of a shipment and its own mark, so a shipment that came through
//! in some partitions only is shipped again as a whole. Two round trips: read, do. Must not decide:
//! `transition` does.

use super::Inner;
use super::books::{Books, Needs, RetryKey};
use super::cache::LotKey;
use super::commit::Outcome;
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{BatchRecord, Holder, Range};
use super::suppress;
use crate::form::Ref;
use crate::tell::COMPLAINT;
use crate::transition::{self, Applied};
use crate::{MIXED, RangeRef, Result, Shipment, Shipped, Suppression, tell};
use ::redis::Pipeline;
use futures_util::future::try_join_all;
use model::{
    Attempt, AttemptResult, BatchState, Fact, FactId, Hit, HitKind, JournalId, MessageId,
    Partition, Place, Seq, Status, SuppressionReason, Timestamp, TrackingMode,
};
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// A fact and where its recipient stands.
#[derive(Debug, Clone)]
struct Placed {
    seq: Seq,
    fact: Fact,
    place: Option<Place>,
}

impl Placed {
    fn key(&self) -> Option<LotKey> {
        Some((self.fact.message()?.batch, self.place?.lot))
    }
}

/// The part of a shipment that is of one partition.
#[derive(Debug, Default)]
struct Part {
    facts: Vec<Placed>,
    windows: Vec<(RangeRef, u32)>,
    finished: Vec<RangeRef>,
}

/// What all parts of a shipment share.
#[derive(Debug, Clone, Copy)]
struct Of {
    journal: JournalId,
    through: Seq,
    now: Timestamp,
}

impl Inner {
    /// Through which sequence every partition took a journal.
    pub(super) async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        let marks = self.all_partitions().map(|p| self.mark(p, journal));
        let marks = try_join_all(marks).await?;
        Ok(marks.into_iter().min().unwrap_or(0))
    }

    async fn mark(&self, p: Partition, journal: JournalId) -> Result<Seq> {
        let mut pipeline = Pipeline::new();
        ask_mark(&mut pipeline, p, journal);
        let mark = self.link.bulk(&pipeline).await?.into_iter().next();
        Ok(u64::try_from(mark.map_or(0, answer::number)).unwrap_or(0))
    }

    /// Applies a shipment.
    pub(super) async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        let last = shipment.facts.last().map_or(0, |(seq, _)| *seq);
        let of = Of {
            journal: shipment.journal,
            through: shipment.through.max(last),
            now: shipment.now,
        };
        let parts = self.divide(shipment).await?;
        let shipped = parts
            .into_iter()
            .map(|(p, part)| self.ship_part(p, part, of));
        let mut all = Shipped::default();
        for one in try_join_all(shipped).await? {
            all.duplicates.extend(one.duplicates);
            all.unknown += one.unknown;
            all.repeated += one.repeated;
            all.lost.extend(one.lost);
            all.completed.extend(one.completed);
            all.behind = match (all.behind, one.behind) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        Ok(all)
    }

    /// Divides a shipment by partition. A fact that has no place is partition 0's to count.
    async fn divide(&self, shipment: Shipment) -> Result<BTreeMap<Partition, Part>> {
        let parts = self.all_partitions().map(|p| (p, Part::default()));
        let mut parts: BTreeMap<Partition, Part> = parts.collect();
        for (seq, fact) in shipment.facts {
            let place = match &fact {
                Fact::Attempt(attempt) => Some(attempt.place),
                Fact::Hit(_)
                | Fact::Page(_)
                | Fact::Revision(_)
                | Fact::Reply(_)
                | Fact::Complaint(_) => match fact.message() {
                    Some(of) => self.place_of(of.batch, of.index).await?,
                    None => None,
                },
            };
            let of = place.map_or(HOME, |place| place.lot.partition());
            let known = parts.contains_key(&of);
            let place = place.filter(|_| known);
            let of = if known { of } else { HOME };
            if let Some(part) = parts.get_mut(&of) {
                part.facts.push(Placed { seq, fact, place });
            }
        }
        for (range, window) in shipment.windows {
            if let Some(part) = parts.get_mut(&range.partition) {
                part.windows.push((range, window));
            }
        }
        for range in shipment.finished {
            if let Some(part) = parts.get_mut(&range.partition) {
                part.finished.push(range);
            }
        }
        Ok(parts)
    }

    async fn ship_part(&self, p: Partition, part: Part, of: Of) -> Result<Shipped> {
        let mut tries = self.tries();
        while tries.again().await? {
            let mut shipped = Shipped::default();
            let mut books = Books::open(self, p, of.now);
            load_for(&mut books, &part, of.journal).await?;
            let mark = books.mark;
            if self.past.has_forgotten(p, of.journal, mark) {
                shipped.behind = Some(mark);
                return Ok(shipped);
            }
            let (new, old): (Vec<&Placed>, Vec<&Placed>) =
                part.facts.iter().partition(|placed| placed.seq > mark);
            shipped.repeated = u64::try_from(old.len()).unwrap_or(u64::MAX);
            for placed in new {
                if !apply(&mut books, placed, of.journal, &mut shipped)? {
                    shipped.unknown += 1;
                }
            }
            move_ranges(&mut books, &part, &mut shipped)?;
            let collected = Needs {
                ranges: books.retry_ranges(),
                ..Needs::default()
            };
            if !collected.ranges.is_empty() {
                books.load(&collected).await?;
                books.file_retries();
            }
            if of.through > mark {
                let (key, field) = (keys::journals(p), of.journal.to_string());
                let before = mark.to_string();
                let expected = (mark > 0).then_some(before.as_bytes());
                books
                    .commit
                    .check_field(key.clone(), field.as_bytes(), expected);
                books
                    .commit
                    .write("HSET", key, [field, of.through.to_string()]);
            }
            let (commit, told) = books.close(Some(of.journal), 0)?;
            if let Outcome::Done { seq, open } = commit.run(self, false).await? {
                self.past.note_mark(p, of.journal, of.through.max(mark));
                shipped.completed = self.completions(&told, &open, of.now, seq).await?;
                return Ok(shipped);
            }
        }
        Ok(Shipped::default())
    }
}

/// Asks how far a journal was taken.
pub(super) fn ask_mark(pipeline: &mut Pipeline, p: Partition, journal: JournalId) {
    pipeline
        .cmd("HGET")
        .arg(keys::journals(p))
        .arg(journal.to_string());
}

/// Reads what the facts and ranges of a part need.
async fn load_for(books: &mut Books<'_>, part: &Part, journal: JournalId) -> Result<()> {
    let mut needs = Needs {
        mark_of: Some(journal),
        any_consents: part.facts.iter().any(|placed| is_tracked(&placed.fact)),
        ..Needs::default()
    };
    for placed in &part.facts {
        let batch = placed.fact.message().map(|message| message.batch);
        needs.batches.extend(batch);
        needs.cells.extend(placed.key());
    }
    needs.lots.clone_from(&needs.cells);
    let windows = part.windows.iter().map(|(range, _)| range.id);
    let finished = part.finished.iter().map(|range| range.id);
    needs.ranges.extend(windows.chain(finished));
    books.load(&needs).await?;
    // What the facts themselves lead to.
    let mut more = Needs::default();
    for range in &part.finished {
        if let Some(range) = books.held(*range) {
            let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
            more.cells.extend(lots);
        }
    }
    more.cells.retain(|key| !needs.cells.contains(key));
    for placed in part.facts.iter().filter(|placed| suppresses(&placed.fact)) {
        more.addresses.extend(address_of(books, placed));
    }
    if books.any_consents {
        let hits = part.facts.iter().filter(|placed| is_tracked(&placed.fact));
        more.consents
            .extend(hits.filter_map(|placed| address_of(books, placed)));
    }
    if !more.cells.is_empty() || !more.addresses.is_empty() || !more.consents.is_empty() {
        books.load(&more).await?;
    }
    Ok(())
}

/// Whether how much of it is kept depends on the person.
fn is_tracked(fact: &Fact) -> bool {
    match fact {
        Fact::Hit(hit) => hit.kind != HitKind::Unsubscribe,
        Fact::Attempt(_)
        | Fact::Page(_)
        | Fact::Revision(_)
        | Fact::Reply(_)
        | Fact::Complaint(_) => false,
    }
}

fn suppresses(fact: &Fact) -> bool {
    match fact {
        Fact::Attempt(attempt) => attempt.suppress.is_some(),
        Fact::Hit(hit) => hit.kind == HitKind::Unsubscribe,
        Fact::Complaint(_) => true,
        Fact::Page(_) | Fact::Revision(_) | Fact::Reply(_) => false,
    }
}

/// The account and the address that a fact is about.
fn address_of(books: &Books<'_>, placed: &Placed) -> Option<(String, String)> {
    let (key, place) = (placed.key()?, placed.place?);
    let account = books.head(key.0).ok()?.account.clone();
    let lot = books.lot(key).ok()?;
    let row = lot.row(place.position)?;
    Some((account, row.email.normalised().into_owned()))
}

/// Moves windows and removes finished ranges.
fn move_ranges(books: &mut Books<'_>, part: &Part, shipped: &mut Shipped) -> Result<()> {
    for (of, window) in &part.windows {
        let held = books.held(*of).cloned();
        match held.filter(|range| range.is_taken(books.moment)) {
            None => shipped.lost.push(*of),
            Some(range) => {
                let window = range.window.max((*window).min(range.count));
                if window != range.window {
                    books.set_range(Range { window, ..range });
                }
            }
        }
    }
    for of in &part.finished {
        let held = books.held(*of);
        match held.filter(|range| range.holder != Holder::PutOff).cloned() {
            None => shipped.lost.push(*of),
            Some(range) if books.unreported(&range)?.is_empty() => books.remove_range(range.id),
            Some(_) => {}
        }
    }
    Ok(())
}

/// Applies a fact; false when it is about something that the store does not know.
fn apply<'a>(
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
