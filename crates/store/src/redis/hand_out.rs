//! Handing out: a leased range with its recipients as the node gets them, and what stays behind of it.
//!
//! Works on the books of a step; the step does it or nothing of it. Must not choose ranges.

use super::batches::put_off;
use super::books::{Books, Needs};
use super::cache::LotKey;
use super::keys;
use super::link::answer;
use super::record::{Holder, Range};
use crate::form::Ref;
use crate::hours::{self, Shut};
use crate::transition::Cell;
use crate::{LeasedRange, LeasedRecipient, RangeRef, Result, StoreError, WINDOW};
use ::redis::{Cmd, Value};
use model::{JournalId, Place, Status, Timestamp};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The terms of a lease.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) node: JournalId,
    pub(super) ttl: Duration,
    /// Until when, by the holder's clock.
    pub(super) until: Timestamp,
    /// It had the range before, and knows what it started.
    pub(super) own: bool,
}

pub(super) fn after(moment: i64, ttl: Duration) -> i64 {
    moment.saturating_add(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))
}

/// Reads cells and rows of the recipients of ranges, the suppressions of those who have any, and what
/// they let be kept.
pub(super) async fn load_recipients(
    books: &mut Books<'_>,
    ranges: &[Range],
    guarded: bool,
) -> Result<()> {
    let mut needs = Needs {
        any_consents: true,
        ..Needs::default()
    };
    for range in ranges {
        needs.batches.insert(range.batch);
        let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
        needs.cells.extend(lots);
    }
    needs.lots.clone_from(&needs.cells);
    books.load(&needs).await?;
    if !guarded && !books.any_consents {
        return Ok(());
    }
    let mut people = BTreeSet::new();
    for range in ranges {
        let account = books.head(range.batch)?.account.clone();
        for of in range.refs() {
            if let Ok(row) = books.row((range.batch, of.lot), of.position) {
                people.insert((account.clone(), row.email.normalised().into_owned()));
            }
        }
    }
    let mut needs = Needs::default();
    if guarded {
        needs.addresses = suppressed_of(books, &people).await?;
    }
    if books.any_consents {
        needs.consents = people;
    }
    books.load(&needs).await
}

/// Those of these people (account and address) whose address has a suppression.
async fn suppressed_of(
    books: &Books<'_>,
    people: &BTreeSet<(String, String)>,
) -> Result<BTreeSet<(String, String)>> {
    let people: Vec<&(String, String)> = people.iter().collect();
    let mut addresses = BTreeSet::new();
    for some in people.chunks(1_000) {
        let mut ask = Cmd::new();
        ask.arg("SMISMEMBER").arg(keys::suppressed(books.partition));
        for (account, email) in some {
            // Under the address, and under what an erasure left of it.
            let name = books.inner.eraser().name(account, email);
            for name in [email, &name] {
                ask.arg(&keys::address_hash(account, name)[..]);
            }
        }
        let found = answer::list(books.inner.link.short(&ask).await?);
        let known = |found: &[Value]| found.iter().any(|found| matches!(found, Value::Int(1)));
        let hits = some.iter().zip(found.chunks(2));
        addresses.extend(
            hits.filter(|(_, found)| known(found))
                .map(|(person, _)| (*person).clone()),
        );
    }
    Ok(addresses)
}

/// A recipient to hand out.
struct Chosen {
    of: Ref,
    cell: Cell,
    row: model::Row,
    in_window: bool,
}

/// Leases up to `rows` recipients of a range; `None` when it had none, and is gone or put off.
pub(super) fn take_of(
    books: &mut Books<'_>,
    range: &Range,
    rows: usize,
    terms: Terms,
) -> Result<Option<LeasedRange>> {
    let refs = range.refs();
    if !terms.own {
        note_doubt(books, range);
    }
    let (chosen, shut, consumed) = match choose(books, range, &refs, rows, terms.own) {
        Ok(looked) => looked,
        Err(StoreError::Damaged(what)) => {
            put_off(books, range, &what);
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let rest = refs.get(consumed..).unwrap_or_default().to_vec();
    if rest.is_empty() && chosen.is_empty() && shut.is_empty() {
        books.remove_range(range.id);
        return Ok(None);
    }
    // The range's own number goes to the first part that stays.
    let mut id = Some(range.id);
    for (until, refs) in shut {
        let id = id.take().unwrap_or_else(|| fastrand::u64(..));
        let shut = range.with_refs(refs).freed(until.millis());
        books.set_range(Range { id, ..shut });
    }
    if !rest.is_empty() {
        let id = id.take().unwrap_or_else(|| fastrand::u64(..));
        let rest = range.with_refs(rest).freed(range.due_at);
        books.set_range(Range { id, ..rest });
    }
    if chosen.is_empty() {
        return Ok(None);
    }
    let id = id.unwrap_or_else(|| fastrand::u64(..));
    hand_out(books, range, id, chosen, terms).map(Some)
}

/// Notes in the cells what a holder that is gone may have started.
pub(super) fn note_doubt(books: &mut Books<'_>, range: &Range) {
    let doubtful = usize::try_from(range.doubtful()).unwrap_or(usize::MAX);
    for of in range.refs().into_iter().take(doubtful) {
        mark(books, (range.batch, of.lot), of);
    }
}

/// Notes that a holder that is gone may have started this, if it is unreported; where the cell cannot
/// be read, nothing.
fn mark(books: &mut Books<'_>, key: LotKey, of: Ref) {
    let cell = books.cell(key, of.position).ok().flatten();
    if let Some(mut cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) {
        cell.mark_maybe_started();
        books.set_cell(key, of.position, cell);
    }
}

/// The unreported recipients that may be written to now, those to whom the window is shut, and how
/// many were looked at. Those that must not be written to are ended.
fn choose(
    books: &mut Books<'_>,
    range: &Range,
    refs: &[Ref],
    rows: usize,
    own: bool,
) -> Result<(Vec<Chosen>, Shut, usize)> {
    let head = books.head(range.batch)?;
    let (mut chosen, mut shut) = (Vec::new(), Shut::new());
    // First everything is read, so that what cannot be read changes nothing.
    for &of in refs {
        let key: LotKey = (range.batch, of.lot);
        let cell = books.cell(key, of.position)?;
        if cell.is_some_and(|cell| !cell.reported_since(of.attempts)) {
            books.row(key, of.position)?;
        }
    }
    let mut consumed = 0;
    for (offset, &of) in (0_u32..).zip(refs) {
        if chosen.len() >= rows {
            break;
        }
        consumed += 1;
        let key: LotKey = (range.batch, of.lot);
        let cell = books.cell(key, of.position)?;
        let Some(cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) else {
            continue;
        };
        let mut row = books.row(key, of.position)?;
        let person = (head.account.clone(), row.email.normalised().into_owned());
        let in_window = own && offset < range.doubtful();
        let stopping = books
            .known
            .get(&person)
            .and_then(|known| known.iter().find(|of| of.stops(&head.list, head.priority)));
        if let Some(reason) = stopping.map(|of| of.reason) {
            if in_window {
                mark(books, key, of);
            }
            let data = json!({ "reason": reason.as_str() });
            books.end_unsent(key, of.position, Status::Suppressed, data)?;
            continue;
        }
        let until = hours::shut_until(&head, &row, cell, books.now);
        if let Some(until) = until.filter(|_| !in_window) {
            shut.entry(until).or_default().push(of);
            continue;
        }
        if let Some(Some(consent)) = books.consents.get(&person) {
            consent.bind(&mut row);
        }
        chosen.push(Chosen {
            of,
            cell,
            row,
            in_window,
        });
    }
    Ok((chosen, shut, consumed))
}

fn hand_out(
    books: &mut Books<'_>,
    range: &Range,
    id: u64,
    chosen: Vec<Chosen>,
    terms: Terms,
) -> Result<LeasedRange> {
    let started = chosen.iter().filter(|item| item.in_window).count();
    let refs = chosen.iter().map(|item| item.of).collect();
    let part = range.with_refs(refs);
    let window = WINDOW
        .max(u32::try_from(started).unwrap_or(u32::MAX))
        .min(part.count);
    let token = books.token.max(range.token + 1);
    books.set_range(Range {
        id,
        holder: Holder::Node(terms.node),
        token,
        expires: after(books.moment, terms.ttl),
        window,
        ..part
    });
    let items = (0_u32..).zip(chosen).map(|(offset, item)| LeasedRecipient {
        place: Place {
            lot: item.of.lot,
            position: item.of.position,
        },
        offset,
        row: item.row,
        attempts: item.cell.attempts(),
        maybe_started: item.in_window || item.cell.maybe_started(),
        ambiguous_before: item.cell.ambiguous(),
        variant: item.cell.variant(),
    });
    Ok(LeasedRange {
        range: RangeRef {
            id,
            partition: books.partition,
            token,
        },
        batch: Arc::clone(&books.head(range.batch)?),
        queue: range.queue.clone(),
        items: items.collect(),
        window,
        expires_at: terms.until,
    })
}
