//! Leases: ranges of lots and of retry lots go to a node for a time, and come back.
//!
//! Owns who gets what, in which order, and what is told of it. Must not apply facts.

use super::books::{Books, RetryKey};
use super::ids::{self, BatchNo, LotId};
use super::range::{
    BULK, Lease, Range, TRANSACTIONAL, cancel_range, delete, free, held, mark, ranges, write,
};
use super::suppress;
use super::writer::Step;
use crate::form::Ref;
use crate::hours::{self, Shut};
use crate::transition::Cell;
use crate::{
    BatchHead, Control, LeaseRequest, LeasedRange, LeasedRecipient, RangeRef, Release, Result,
    StoreError, WINDOW, Want,
};
use model::{BatchId, BatchState, JournalId, Partition, Place, Status, Timestamp};
use rusqlite::{OptionalExtension as _, params};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;

/// Batches of which one request is served, per queue.
const BATCHES: usize = 256;
/// The least that a batch gets in its turn, so that ranges do not become crumbs.
const QUANTUM: usize = 16;
/// For how long a range that cannot be read is left alone.
const UNREADABLE: Duration = Duration::from_mins(10);
/// Ranges in which nobody is to be had that one wish goes through.
const IN_VAIN: usize = 256;
/// Queues of which the turn is remembered.
const TURNS: usize = 65_536;

/// The ranges of a queue that are served together.
#[derive(Clone, Copy)]
struct Queue<'a> {
    name: &'a str,
    rank: u8,
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
        Ok(Self {
            node: node.to_bytes(),
            token: new_token(step)?,
            now,
            expires: now + ttl,
        })
    }
}

fn new_token(step: &Step<'_>) -> Result<u64> {
    let mut sql = step
        .connection
        .prepare_cached("UPDATE meta SET value=value+1 WHERE key='token' RETURNING value")?;
    Ok(ids::nat(sql.query_row([], |row| row.get(0))?))
}

/// Leases ranges.
pub(super) fn lease(step: &mut Step<'_>, request: &LeaseRequest) -> Result<Vec<LeasedRange>> {
    super::control::release_due(step, request.now)?;
    let terms = Terms::new(step, request.node, request.now, request.ttl)?;
    let mut leased = Vec::new();
    for want in &request.wants {
        let mut books = Books::open(step, request.now);
        serve(&mut books, want, &terms, &mut leased)?;
        books.close(None)?;
    }
    Ok(leased)
}

/// Serves a queue: what is transactional first, then everything else.
fn serve(
    books: &mut Books<'_, '_>,
    want: &Want,
    terms: &Terms,
    leased: &mut Vec<LeasedRange>,
) -> Result<()> {
    let mut room = Room::of(want);
    let ranks: &[u8] = if want.urgent_only {
        &[TRANSACTIONAL]
    } else {
        &[TRANSACTIONAL, BULK]
    };
    for &rank in ranks {
        let of = Queue {
            name: &want.queue,
            rank,
        };
        loop {
            let before = room.left;
            serve_rank(books, of, &mut room, terms, leased)?;
            if room.left == 0 || room.left == before {
                break;
            }
        }
    }
    Ok(())
}

/// What a wish leaves to be leased.
struct Room {
    left: usize,
    largest: usize,
    per_batch: usize,
    /// What is left of batches that were looked at, or named.
    of: HashMap<BatchId, usize>,
    /// Ranges in which there may be nobody to be had.
    in_vain: usize,
}

impl Room {
    fn of(want: &Want) -> Self {
        let count = |rows: u32| usize::try_from(rows).unwrap_or(usize::MAX);
        Self {
            left: count(want.rows),
            largest: count(want.largest).max(1),
            per_batch: count(want.per_batch),
            of: want
                .of
                .iter()
                .map(|(id, rows)| (*id, count(*rows)))
                .collect(),
            in_vain: IN_VAIN,
        }
    }

    /// How much of a batch may be leased.
    fn of_batch(&self, batch: BatchId) -> usize {
        let own = self.of.get(&batch).copied();
        own.unwrap_or(self.per_batch).min(self.left)
    }

    fn take(&mut self, batch: BatchId, rows: usize) {
        let own = self.of.entry(batch).or_insert(self.per_batch);
        *own = own.saturating_sub(rows);
        self.left = self.left.saturating_sub(rows);
    }
}

/// Serves some batches of a rank in turn.
fn serve_rank(
    books: &mut Books<'_, '_>,
    queue: Queue<'_>,
    room: &mut Room,
    terms: &Terms,
    leased: &mut Vec<LeasedRange>,
) -> Result<()> {
    let mut group = batches_of(books, queue, room, terms.now)?;
    while room.left > 0 && !group.is_empty() {
        let share = (room.left / group.len()).max(QUANTUM);
        let mut still = Vec::new();
        for &(no, id) in &group {
            let mut own = share.min(room.of_batch(id));
            while own > 0
                && let Some(range) = take(books, queue, no, own, room, terms)?
            {
                let rows = range.items.len();
                own = own.saturating_sub(rows);
                room.take(id, rows);
                leased.push(range);
                remember_turn(books.step, queue, no);
            }
            if own == 0 && room.of_batch(id) > 0 {
                still.push((no, id));
            }
        }
        group = still;
    }
    Ok(())
}

fn remember_turn(step: &mut Step<'_>, queue: Queue<'_>, no: BatchNo) {
    let turns = &mut step.memory.turns;
    if turns.len() >= TURNS {
        turns.clear();
    }
    turns.insert((queue.name.into(), queue.rank), no);
}

/// The batches with due, free ranges in this queue of which mail may leave, from the one whose
/// turn it is; without those of which no more is wanted.
fn batches_of(
    books: &mut Books<'_, '_>,
    queue: Queue<'_>,
    room: &Room,
    now: Timestamp,
) -> Result<Vec<(BatchNo, BatchId)>> {
    let key = (queue.name.into(), queue.rank);
    let turn = books.step.memory.turns.get(&key).copied().unwrap_or(0);
    let mut found = Vec::new();
    // From the turn to the end, then from the beginning to the turn.
    for (first, last) in [(turn, i64::MAX), (0, turn)] {
        let mut after = first;
        while found.len() < BATCHES {
            let next: Option<BatchNo> = books
                .step
                .connection
                .prepare_cached(
                    "SELECT batch FROM work WHERE queue=?1 AND rank=?2 AND batch>?3 AND batch<=?4
                     AND due_at<=?5 AND expires<=?5 ORDER BY batch LIMIT 1",
                )?
                .query_row(
                    params![queue.name, queue.rank, after, last, now.millis()],
                    |row| row.get(0),
                )
                .optional()?;
            let Some(no) = next else { break };
            after = no;
            let batch = books.batch(no)?.filter(|batch| batch.active());
            let id = batch.map(|batch| batch.id);
            found.extend(id.filter(|id| room.of_batch(*id) > 0).map(|id| (no, id)));
        }
    }
    Ok(found)
}

/// Leases up to `rows` recipients of the first due range of a batch in a queue. What cannot be
/// read is put off: others do not wait for it.
fn take(
    books: &mut Books<'_, '_>,
    queue: Queue<'_>,
    no: BatchNo,
    rows: usize,
    room: &mut Room,
    terms: &Terms,
) -> Result<Option<LeasedRange>> {
    let rows = rows.min(room.largest);
    while room.in_vain > 0
        && let Some(first) = first_due(books.step, queue, no, terms.now)?
    {
        room.in_vain -= 1;
        match take_of(books, first, rows, terms) {
            Ok(None) => {}
            Err(StoreError::Damaged(what)) => put_off(books.step, first, terms.now, &what)?,
            taken => {
                room.in_vain += 1;
                return taken;
            }
        }
    }
    Ok(None)
}

fn first_due(
    step: &Step<'_>,
    queue: Queue<'_>,
    no: BatchNo,
    now: Timestamp,
) -> Result<Option<i64>> {
    let mut sql = step.connection.prepare_cached(
        "SELECT id FROM work WHERE queue=?1 AND rank=?2 AND batch=?3 AND due_at<=?4 AND expires<=?4
         ORDER BY due_at LIMIT 1",
    )?;
    let values = params![queue.name, queue.rank, no, now.millis()];
    Ok(sql.query_row(values, |row| row.get(0)).optional()?)
}

/// Leases up to `rows` recipients of a range that nobody holds; `None` when it had none, and is
/// gone or put off.
fn take_of(
    books: &mut Books<'_, '_>,
    id: i64,
    rows: usize,
    terms: &Terms,
) -> Result<Option<LeasedRange>> {
    let Some(mut range) = ranges(books.step, "id=?1", [id])?.pop() else {
        return Ok(None);
    };
    let lost = range.doubtful();
    range.settle_lost(books)?;
    let refs = range.refs();
    let looked = choose(books, &range, &refs, rows)?;
    let rest = refs.get(looked.consumed..).unwrap_or_default().to_vec();
    // The range's own number goes to the first part that stays.
    let mut id = Some(range.id);
    if let Some(damage) = looked.damage {
        keep_unread(books.step, &range, id.take(), damage, lost, terms.now)?;
    }
    keep_shut(books.step, &range, &mut id, looked.shut)?;
    if !rest.is_empty() {
        let (piece, count) = range.part(rest);
        let free = free(&range, range.due_at);
        write(books.step, &range, id.take(), (&piece, count), &free)?;
    }
    if looked.chosen.is_empty() {
        if let Some(id) = id {
            delete(books.step, id)?;
        }
        return Ok(None);
    }
    hand_out(books, &range, id, looked.chosen, terms).map(Some)
}

/// Recipients of a range that cannot be read.
struct Damage {
    /// The offset of the first.
    first: u32,
    refs: Vec<Ref>,
    what: String,
}

/// Makes a range of its own of what cannot be read, and puts it off. Below the offset `lost` a
/// holder that is gone may have started them, which their cells may not say.
fn keep_unread(
    step: &Step<'_>,
    range: &Range,
    id: Option<i64>,
    damage: Damage,
    lost: u32,
    now: Timestamp,
) -> Result<()> {
    let (piece, count) = range.part(damage.refs);
    let lease = Lease {
        window: if damage.first < lost { count } else { 0 },
        ..free(range, range.due_at)
    };
    let id = write(step, range, id, (&piece, count), &lease)?;
    put_off(step, id, now, &damage.what)
}

/// Makes ranges of those to whom the window of their batch is shut, due when it opens.
fn keep_shut(step: &Step<'_>, range: &Range, id: &mut Option<i64>, shut: Shut) -> Result<()> {
    for (until, refs) in shut {
        let (piece, count) = range.part(refs);
        let free = free(range, until.millis());
        write(step, range, id.take(), (&piece, count), &free)?;
    }
    Ok(())
}

/// Leaves a range that cannot be read as it is, and lets nobody have it for a while. Its window
/// stays: a holder that nobody is, with a token that nobody has.
pub(super) fn put_off(step: &Step<'_>, id: i64, now: Timestamp, what: &str) -> Result<()> {
    tracing::error!(
        range = id,
        what,
        "recipients cannot be read and are not sent to; they are looked at again later"
    );
    step.cache.count_unreadable();
    step.connection
        .prepare_cached("UPDATE work SET holder=X'', token=?2, expires=?3 WHERE id=?1")?
        .execute(params![
            id,
            ids::int(new_token(step)?),
            (now + UNREADABLE).millis()
        ])?;
    Ok(())
}

/// A recipient to hand out.
struct Chosen {
    of: Ref,
    cell: Cell,
    row: model::Row,
    in_window: bool,
}

/// What looking through a range found.
struct Looked {
    /// The unreported recipients that may be written to.
    chosen: Vec<Chosen>,
    /// Those to whom the window of the batch is shut.
    shut: Shut,
    /// How many references were looked at.
    consumed: usize,
    damage: Option<Damage>,
}

/// Looks for recipients that may be written to. Those that must not be written to are ended.
fn choose(books: &mut Books<'_, '_>, range: &Range, refs: &[Ref], rows: usize) -> Result<Looked> {
    let head = books.head(range.batch)?;
    let guarded = suppress::any(books.step.connection, &head.account)?;
    let mut looked = Looked {
        chosen: Vec::new(),
        shut: Shut::new(),
        consumed: 0,
        damage: None,
    };
    for (offset, &of) in (0_u32..).zip(refs) {
        if looked.chosen.len() >= rows {
            break;
        }
        looked.consumed += 1;
        let in_window = range.held && offset < range.window;
        match consider(books, range, of, &head, (guarded, in_window)) {
            Ok(None) => {}
            Ok(Some((cell, row))) => {
                let shut = hours::shut_until(&head, &row, cell, books.now).filter(|_| !in_window);
                match shut {
                    Some(until) => looked.shut.entry(until).or_default().push(of),
                    None => looked.chosen.push(Chosen {
                        of,
                        cell,
                        row,
                        in_window,
                    }),
                }
            }
            Err(StoreError::Damaged(what)) => {
                let damage = looked.damage.get_or_insert(Damage {
                    first: offset,
                    refs: Vec::new(),
                    what,
                });
                damage.refs.push(of);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(looked)
}

/// The recipient, unless it was reported or must not be written to.
fn consider(
    books: &mut Books<'_, '_>,
    range: &Range,
    of: Ref,
    head: &BatchHead,
    (guarded, in_window): (bool, bool),
) -> Result<Option<(Cell, model::Row)>> {
    let lot = range.lot_id(of);
    let cell = books.cell(lot, of.position)?;
    let Some(cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) else {
        return Ok(None);
    };
    let mut row = row_of(books, lot, of.position)?;
    if guarded
        && let Some(reason) =
            suppress::stopping(books.step.connection, head, &row.email.normalised())?
    {
        if in_window {
            mark(books, lot, of)?;
        }
        let data = json!({ "reason": reason.as_str() });
        books.end_unsent(lot, of.position, Status::Suppressed, data)?;
        return Ok(None);
    }
    if books.any_consents()?
        && let Some(consent) = books.consent(&head.account, &row.email.normalised())?
    {
        consent.bind(&mut row);
    }
    Ok(Some((cell, row)))
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
        variant: item.cell.variant(),
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
    let held: Vec<i64> = {
        let mut sql = step
            .connection
            .prepare_cached("SELECT id FROM work WHERE holder=?1 ORDER BY id")?;
        let ids = sql.query_map([node.to_bytes()], |row| row.get(0))?;
        ids.collect::<rusqlite::Result<_>>()?
    };
    let mut leased = Vec::new();
    for id in held {
        let mut books = Books::open(step, now);
        match reclaim_one(&mut books, id, &terms) {
            Ok(range) => leased.extend(range),
            Err(StoreError::Damaged(what)) => put_off(books.step, id, now, &what)?,
            Err(error) => return Err(error),
        }
        books.close(None)?;
    }
    Ok(leased)
}

fn reclaim_one(books: &mut Books<'_, '_>, id: i64, terms: &Terms) -> Result<Option<LeasedRange>> {
    let Some(range) = ranges(books.step, "id=?1", [id])?.pop() else {
        return Ok(None);
    };
    let ended = books
        .batch(range.batch)?
        .is_none_or(|batch| batch.state == BatchState::Cancelled);
    // What it may have started it alone can tell of.
    if ended && !cancel_range(books, &range, range.doubtful())? {
        return Ok(None);
    }
    let refs = range.refs();
    let looked = choose(books, &range, &refs, refs.len())?;
    let mut id = Some(range.id);
    if let Some(damage) = looked.damage {
        keep_unread(
            books.step,
            &range,
            id.take(),
            damage,
            range.doubtful(),
            terms.now,
        )?;
    }
    keep_shut(books.step, &range, &mut id, looked.shut)?;
    if looked.chosen.is_empty() {
        if let Some(id) = id {
            delete(books.step, id)?;
        }
        return Ok(None);
    }
    hand_out(books, &range, id, looked.chosen, terms).map(Some)
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
            rank: range.rank,
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
