//! Leases: ranges of lots and of retry lots go to a node for a time, and come back.
//!
//! Owns ranges, windows and fencing. Whether a recipient of a range was reported is said by its
//! cell alone; references that are behind their cell are skipped. Must not apply facts.

use super::books::{Books, RetryKey};
use super::ids::{self, BatchNo, LotId};
use super::suppress;
use super::writer::Step;
use crate::form::{self, Ref};
use crate::{
    Control, LeaseRequest, LeasedRange, LeasedRecipient, RangeRef, Release, Result, StoreError,
    WINDOW,
};
use model::{BatchState, JournalId, LotNumber, Partition, Place, Status, Timestamp};
use rusqlite::{OptionalExtension as _, Row, params};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;

/// Batches of which one request is served, per queue.
const BATCHES: usize = 256;
/// The least that a batch gets in its turn, so that ranges do not become crumbs.
const QUANTUM: usize = 16;
/// Queues of which the turn is remembered.
const TURNS: usize = 65_536;

/// What a range refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// `count` recipients of a lot from `first`, none of which had an attempt.
    Span { lot: LotNumber, first: u16 },
    /// These.
    Refs(Vec<Ref>),
}

/// A range as it is stored.
#[derive(Debug, Clone)]
pub(super) struct Range {
    pub(super) id: i64,
    pub(super) batch: BatchNo,
    pub(super) partition: Partition,
    pub(super) queue: Box<str>,
    pub(super) due_at: i64,
    pub(super) count: u32,
    pub(super) held: bool,
    pub(super) token: u64,
    pub(super) expires: i64,
    pub(super) window: u32,
    pub(super) piece: Piece,
}

const COLUMNS: &str = "id, batch, partition, queue, due_at, count, holder IS NOT NULL, token, expires, window, lot, first, refs";

fn read_range(row: &Row<'_>) -> rusqlite::Result<(Range, Option<Vec<u8>>)> {
    let lot: Option<u32> = row.get(10)?;
    let range = Range {
        id: row.get(0)?,
        batch: row.get(1)?,
        partition: Partition(row.get(2)?),
        queue: row.get::<_, String>(3)?.into(),
        due_at: row.get(4)?,
        count: row.get(5)?,
        held: row.get(6)?,
        token: ids::nat(row.get(7)?),
        expires: row.get(8)?,
        window: row.get(9)?,
        piece: match lot {
            Some(lot) => Piece::Span {
                lot: LotNumber(lot),
                first: row.get(11)?,
            },
            None => Piece::Refs(Vec::new()),
        },
    };
    Ok((range, row.get(12)?))
}

/// Reads ranges.
pub(super) fn ranges(
    step: &Step<'_>,
    condition: &str,
    values: impl rusqlite::Params,
) -> Result<Vec<Range>> {
    let sql = format!("SELECT {COLUMNS} FROM work WHERE {condition}");
    let mut sql = step.connection.prepare_cached(&sql)?;
    let found = sql.query_map(values, read_range)?;
    found
        .map(|range| {
            let (mut range, refs) = range?;
            if let (Piece::Refs(all), Some(packed)) = (&mut range.piece, refs) {
                *all = form::unpack_refs(&packed)?;
            }
            Ok(range)
        })
        .collect()
}

impl Range {
    /// The recipients, with the attempts that each had when it was filed.
    pub(super) fn refs(&self) -> Vec<Ref> {
        match &self.piece {
            Piece::Refs(refs) => refs.clone(),
            Piece::Span { lot, first } => (*first..)
                .zip(0..self.count)
                .map(|(position, _)| Ref {
                    lot: *lot,
                    position,
                    attempts: 0,
                })
                .collect(),
        }
    }

    fn lot_id(&self, of: Ref) -> LotId {
        ids::lot_id(self.batch, of.lot)
    }

    /// The recipients that nobody reported, with their offsets.
    pub(super) fn unreported(&self, books: &mut Books<'_, '_>) -> Result<Vec<(u32, Ref)>> {
        let mut open = Vec::new();
        for (offset, of) in (0_u32..).zip(self.refs()) {
            let cell = books.cell(self.lot_id(of), of.position)?;
            if cell.is_some_and(|cell| !cell.reported_since(of.attempts)) {
                open.push((offset, of));
            }
        }
        Ok(open)
    }

    /// Notes in the cells what a holder that is gone may have started.
    fn settle_lost(&mut self, books: &mut Books<'_, '_>) -> Result<()> {
        if !self.held {
            return Ok(());
        }
        for (offset, of) in self.unreported(books)? {
            if offset < self.window {
                mark(books, self.lot_id(of), of.position)?;
            }
        }
        self.held = false;
        self.window = 0;
        Ok(())
    }

    /// A smaller range: these recipients of it.
    fn part(&self, refs: Vec<Ref>) -> (Piece, u32) {
        let count = u32::try_from(refs.len()).unwrap_or(u32::MAX);
        let contiguous = refs
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.position.checked_add(1) == Some(b.position)));
        match (&self.piece, refs.first()) {
            (&Piece::Span { lot, .. }, Some(first)) if contiguous => {
                let first = first.position;
                (Piece::Span { lot, first }, count)
            }
            _ => (Piece::Refs(refs), count),
        }
    }
}

fn mark(books: &mut Books<'_, '_>, lot: LotId, position: u16) -> Result<()> {
    if let Some(mut cell) = books.cell(lot, position)? {
        cell.mark_maybe_started();
        books.set_cell(lot, position, cell)?;
    }
    Ok(())
}

pub(super) fn delete(step: &Step<'_>, id: i64) -> Result<()> {
    step.connection
        .prepare_cached("DELETE FROM work WHERE id=?1")?
        .execute([id])?;
    Ok(())
}

/// Who holds a range, and how long.
struct Lease<'a> {
    holder: Option<&'a [u8; 16]>,
    token: u64,
    expires: i64,
    window: u32,
    due_at: i64,
}

fn write(
    step: &Step<'_>,
    range: &Range,
    id: Option<i64>,
    piece: (&Piece, u32),
    lease: &Lease<'_>,
) -> Result<i64> {
    let (lot, first, refs) = match piece.0 {
        Piece::Span { lot, first } => (Some(lot.0), Some(*first), None),
        Piece::Refs(refs) => (None, None, Some(form::pack_refs(refs))),
    };
    step.connection
        .prepare_cached(
            "INSERT OR REPLACE INTO work (id, batch, partition, queue, due_at, count, holder, token, expires, window, lot, first, refs)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        )?
        .execute(params![
            id,
            range.batch,
            range.partition.0,
            range.queue,
            lease.due_at,
            piece.1,
            lease.holder.map(|holder| &holder[..]),
            ids::int(lease.token),
            lease.expires,
            lease.window,
            lot,
            first,
            refs,
        ])?;
    Ok(id.unwrap_or_else(|| step.connection.last_insert_rowid()))
}

fn free<'a>(range: &Range, due_at: i64) -> Lease<'a> {
    Lease {
        holder: None,
        token: range.token,
        expires: 0,
        window: 0,
        due_at,
    }
}

/// The terms of one request.
struct Terms {
    node: [u8; 16],
    token: u64,
    now: Timestamp,
    expires: Timestamp,
}

impl Terms {
    /// Every call has a token of its own, higher than all before.
    fn new(step: &Step<'_>, node: JournalId, now: Timestamp, ttl: Duration) -> Result<Self> {
        let token: i64 = step
            .connection
            .prepare_cached("UPDATE meta SET value=value+1 WHERE key='token' RETURNING value")?
            .query_row([], |row| row.get(0))?;
        Ok(Self {
            node: node.to_bytes(),
            token: ids::nat(token),
            now,
            expires: now + ttl,
        })
    }
}

/// Leases ranges.
pub(super) fn lease(step: &mut Step<'_>, request: &LeaseRequest) -> Result<Vec<LeasedRange>> {
    super::control::release_due(step, request.now)?;
    let terms = Terms::new(step, request.node, request.now, request.ttl)?;
    let mut leased = Vec::new();
    for want in &request.wants {
        let mut books = Books::open(step, request.now);
        serve(&mut books, &want.queue, want.rows, &terms, &mut leased)?;
        books.close(None)?;
    }
    Ok(leased)
}

fn serve(
    books: &mut Books<'_, '_>,
    queue: &str,
    rows: u32,
    terms: &Terms,
    leased: &mut Vec<LeasedRange>,
) -> Result<()> {
    let mut left = usize::try_from(rows).unwrap_or(usize::MAX);
    let (mut transactional, mut bulk) = batches_of(books, queue)?;
    for group in [&mut transactional, &mut bulk] {
        let after = books.step.memory.turns.get(queue).copied().unwrap_or(0);
        let pivot = group.partition_point(|&no| no <= after);
        group.rotate_left(pivot);
        while left > 0 && !group.is_empty() {
            let share = (left / group.len()).max(QUANTUM);
            let mut still = Vec::new();
            for &no in group.iter() {
                let mut own = share.min(left);
                left -= own;
                while own > 0
                    && let Some(range) = take(books, queue, no, own, terms)?
                {
                    own -= range.items.len().min(own);
                    leased.push(range);
                    remember_turn(books.step, queue, no);
                }
                if own == 0 {
                    still.push(no);
                }
                left += own;
            }
            *group = still;
        }
    }
    Ok(())
}

fn remember_turn(step: &mut Step<'_>, queue: &str, no: BatchNo) {
    let turns = &mut step.memory.turns;
    if turns.len() >= TURNS {
        turns.clear();
    }
    turns.insert(queue.into(), no);
}

/// The batches with ranges in this queue of which mail may leave: transactional ones, others.
fn batches_of(books: &mut Books<'_, '_>, queue: &str) -> Result<(Vec<BatchNo>, Vec<BatchNo>)> {
    let (mut transactional, mut bulk) = (Vec::new(), Vec::new());
    let mut after = 0;
    while transactional.len() + bulk.len() < BATCHES {
        let next: Option<BatchNo> = books
            .step
            .connection
            .prepare_cached(
                "SELECT batch FROM work WHERE queue=?1 AND batch>?2 ORDER BY batch LIMIT 1",
            )?
            .query_row(params![queue, after], |row| row.get(0))
            .optional()?;
        let Some(no) = next else { break };
        after = no;
        match books.batch(no)? {
            Some(batch) if batch.active() && batch.transactional => transactional.push(no),
            Some(batch) if batch.active() => bulk.push(no),
            _ => {}
        }
    }
    Ok((transactional, bulk))
}

/// Leases up to `rows` recipients of the first due range of a batch in a queue.
fn take(
    books: &mut Books<'_, '_>,
    queue: &str,
    no: BatchNo,
    rows: usize,
    terms: &Terms,
) -> Result<Option<LeasedRange>> {
    loop {
        let now = terms.now.millis();
        let condition =
            "queue=?1 AND batch=?2 AND due_at<=?3 AND expires<=?3 ORDER BY due_at LIMIT 1";
        let Some(mut range) = ranges(books.step, condition, params![queue, no, now])?.pop() else {
            return Ok(None);
        };
        range.settle_lost(books)?;
        let refs = range.refs();
        let (chosen, consumed) = choose(books, &range, &refs, rows)?;
        let rest = refs.get(consumed..).unwrap_or_default().to_vec();
        if chosen.is_empty() {
            // Nothing was left in what was looked at, which is all of it.
            delete(books.step, range.id)?;
            continue;
        }
        let mut id = Some(range.id);
        if !rest.is_empty() {
            let (piece, count) = range.part(rest);
            write(
                books.step,
                &range,
                id,
                (&piece, count),
                &free(&range, range.due_at),
            )?;
            id = None;
        }
        return hand_out(books, &range, id, chosen, terms).map(Some);
    }
}

/// A recipient to hand out.
struct Chosen {
    of: Ref,
    cell: crate::transition::Cell,
    row: model::Row,
    in_window: bool,
}

/// The unreported recipients that may be written to, and how many references they come from.
/// Those that must not be written to are ended.
fn choose(
    books: &mut Books<'_, '_>,
    range: &Range,
    refs: &[Ref],
    rows: usize,
) -> Result<(Vec<Chosen>, usize)> {
    let head = books.head(range.batch)?;
    let guarded = suppress::any(books.step.connection, &head.account)?;
    let mut chosen = Vec::new();
    let mut consumed = 0;
    for (offset, &of) in (0_u32..).zip(refs) {
        if chosen.len() >= rows {
            break;
        }
        consumed += 1;
        let lot = range.lot_id(of);
        let cell = books.cell(lot, of.position)?;
        let Some(cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) else {
            continue;
        };
        let row = row_of(books, lot, of.position)?;
        if guarded
            && let Some(reason) =
                suppress::stopping(books.step.connection, &head, &row.email.normalised())?
        {
            let data = json!({ "reason": reason.as_str() });
            books.end_unsent(lot, of.position, Status::Suppressed, data)?;
            continue;
        }
        chosen.push(Chosen {
            of,
            cell,
            row,
            in_window: range.held && offset < range.window,
        });
    }
    Ok((chosen, consumed))
}

fn row_of(books: &Books<'_, '_>, lot: LotId, position: u16) -> Result<model::Row> {
    let found = books.step.cache.lot(books.step.connection, lot)?;
    found
        .and_then(|lot| lot.rows.get(usize::from(position)).cloned())
        .ok_or_else(|| StoreError::Damaged(format!("lot {lot} has no row {position}")))
}

fn hand_out(
    books: &Books<'_, '_>,
    range: &Range,
    id: Option<i64>,
    chosen: Vec<Chosen>,
    terms: &Terms,
) -> Result<LeasedRange> {
    let (piece, count) = range.part(chosen.iter().map(|item| item.of).collect());
    let started = chosen.iter().filter(|item| item.in_window).count();
    let window = WINDOW
        .max(u32::try_from(started).unwrap_or(u32::MAX))
        .min(count);
    let lease = Lease {
        holder: Some(&terms.node),
        token: terms.token,
        expires: terms.expires.millis(),
        window,
        due_at: range.due_at,
    };
    let id = write(books.step, range, id, (&piece, count), &lease)?;
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
    });
    Ok(LeasedRange {
        range: RangeRef {
            id: ids::nat(id),
            partition: range.partition,
            token: terms.token,
        },
        batch: books.head(range.batch)?,
        queue: range.queue.clone(),
        items: items.collect(),
        window,
        expires_at: terms.expires,
    })
}

/// Gives a node its own leases back.
pub(super) fn reclaim(
    step: &mut Step<'_>,
    node: JournalId,
    now: Timestamp,
    ttl: Duration,
) -> Result<Vec<LeasedRange>> {
    let terms = Terms::new(step, node, now, ttl)?;
    let held = ranges(step, "holder=?1 ORDER BY id", [node.to_bytes()])?;
    let mut leased = Vec::new();
    for range in held {
        let mut books = Books::open(step, now);
        let ended = books
            .batch(range.batch)?
            .is_none_or(|batch| batch.state == BatchState::Cancelled);
        if ended {
            cancel_range(&mut books, &range, 0)?;
        } else {
            let refs = range.refs();
            let (chosen, _all) = choose(&mut books, &range, &refs, refs.len())?;
            if chosen.is_empty() {
                delete(books.step, range.id)?;
            } else {
                leased.push(hand_out(&books, &range, Some(range.id), chosen, &terms)?);
            }
        }
        books.close(None)?;
    }
    Ok(leased)
}

/// Ends as cancelled what is unreported from the offset `from` on; how many. The rest of the
/// range stays with its holder; a range of which nothing stays is removed.
pub(super) fn cancel_range(
    books: &mut Books<'_, '_>,
    range: &Range,
    from: u32,
) -> Result<(u64, u64)> {
    let (mut cancelled, mut kept) = (0, 0);
    for (offset, of) in range.unreported(books)? {
        if offset < from {
            kept += 1;
        } else if books.end_unsent(range.lot_id(of), of.position, Status::Cancelled, json!({}))? {
            cancelled += 1;
        }
    }
    if kept == 0 {
        delete(books.step, range.id)?;
    }
    Ok((cancelled, kept))
}

/// Extends the leases of a node.
pub(super) fn renew(
    step: &Step<'_>,
    node: JournalId,
    now: Timestamp,
    ttl: Duration,
) -> Result<Vec<RangeRef>> {
    let mut sql = step.connection.prepare_cached(
        "UPDATE work SET expires=?3 WHERE holder=?1 AND expires>?2 RETURNING id, partition, token",
    )?;
    let expires = now + ttl;
    let held = sql.query_map(
        params![node.to_bytes(), now.millis(), expires.millis()],
        |row| {
            Ok(RangeRef {
                id: ids::nat(row.get(0)?),
                partition: Partition(row.get(1)?),
                token: ids::nat(row.get(2)?),
            })
        },
    )?;
    Ok(held.collect::<rusqlite::Result<_>>()?)
}

/// The range, if this lease on it was not followed by another.
pub(super) fn held(step: &Step<'_>, of: RangeRef) -> Result<Option<Range>> {
    let found = ranges(
        step,
        "id=?1 AND token=?2 AND holder IS NOT NULL",
        [ids::int(of.id), ids::int(of.token)],
    )?;
    Ok(found.into_iter().next())
}

/// Takes ranges back, and tells the others that there is work.
pub(super) fn release(step: &mut Step<'_>, all: Vec<Release>, now: Timestamp) -> Result<()> {
    let mut books = Books::open(step, now);
    for release in all {
        release_one(&mut books, release)?;
    }
    books.tell(&Control::Work)?;
    books.close(None)?;
    Ok(())
}

fn release_one(books: &mut Books<'_, '_>, release: Release) -> Result<()> {
    let Some(range) = held(books.step, release.range)? else {
        return Ok(());
    };
    let batch = books.batch(range.batch)?;
    if batch.is_none_or(|batch| batch.state == BatchState::Cancelled) {
        return cancel_range(books, &range, 0).map(drop);
    }
    let due_at = release.due_at.map_or(range.due_at, Timestamp::millis);
    let moved: HashMap<Place, Box<str>> = release.requeue.into_iter().collect();
    let mut rest = Vec::new();
    for (_, of) in range.unreported(books)? {
        let place = Place {
            lot: of.lot,
            position: of.position,
        };
        let Some(queue) = moved.get(&place) else {
            rest.push(of);
            continue;
        };
        let key = RetryKey {
            batch: range.batch,
            partition: range.partition,
            queue: queue.clone(),
            due_at,
        };
        books.retry(key, of);
    }
    if rest.is_empty() {
        return delete(books.step, range.id);
    }
    let (piece, count) = range.part(rest);
    write(
        books.step,
        &range,
        Some(range.id),
        (&piece, count),
        &free(&range, due_at),
    )?;
    Ok(())
}
