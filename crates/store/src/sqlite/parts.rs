//! Parts of an open batch: whose turn it is, staging, the step that makes a part belong to it; and
//! the start.
//!
//! A part is staged under the numbers of its batch, whose lots in `staged` are invisible: they have
//! no range, no index and no counter before their part ends. Turns are kept in memory, since there
//! is one MTA on a file. Must not judge a recipient.

use super::books::Books;
use super::calls;
use super::ids::{self, BatchNo};
use super::range::TRANSACTIONAL;
use super::readers::Reading;
use super::record::{BatchRecord, By, record};
use super::stage::{PackedLot, write_lots};
use super::writer::{Step, Writer};
use super::{map, stage};
use crate::{Control, EndedPart, LotHashes, NewPart, PartEnd, PartTurn, Result, StoreError, form};
use model::{BatchId, BatchState, EventKind, LotNumber, Row, Timestamp};
use rusqlite::{Connection, params};
use serde_json::json;
use std::time::Duration;

/// Lots of a part that came to nothing, deleted in one step.
const DELETED: i64 = 256;
/// The running number of a lot, in its id.
const RUNNING: i64 = 0x00ff_ffff;

/// Whose turn it is, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    part: BatchId,
    until: i64,
}

/// Gives a part its turn.
pub(super) async fn begin(
    writer: &Writer,
    new: NewPart,
    now: Timestamp,
    ttl: Duration,
) -> Result<PartTurn> {
    let until = (now + ttl).millis();
    let no = writer
        .write_soft(move |step| take_turn(step, new, now, until))
        .await?;
    let no = match no {
        Ok(no) => no,
        Err(refused) => return Ok(refused),
    };
    while writer
        .write_soft(move |step| throw(step.connection, no))
        .await?
    {}
    writer
        .write_soft(move |step| place(step.connection, no, new))
        .await
}

fn take_turn(
    step: &mut Step<'_>,
    new: NewPart,
    now: Timestamp,
    until: i64,
) -> Result<std::result::Result<BatchNo, PartTurn>> {
    let Some(batch) = record(step.connection, By::Id(new.batch.to_bytes()))? else {
        return Ok(Err(PartTurn::Unknown));
    };
    if batch.state != BatchState::Open {
        return Ok(Err(PartTurn::Impossible(batch.state)));
    }
    let turns = &mut step.memory.parts;
    turns.retain(|_, turn| turn.until > now.millis());
    if turns.contains_key(&batch.no) {
        return Ok(Err(PartTurn::Busy));
    }
    let part = new.part;
    turns.insert(batch.no, Turn { part, until });
    Ok(Ok(batch.no))
}

/// Where the next part begins.
fn place(connection: &Connection, no: BatchNo, new: NewPart) -> Result<PartTurn> {
    let total: i64 = connection
        .prepare_cached("SELECT accepted + rejected FROM batch WHERE no=?1")?
        .query_row([no], |row| row.get(0))?;
    let mut first_lot = 0;
    for partition in 0..=i64::from(u8::MAX) {
        let last: Option<i64> = connection
            .prepare_cached("SELECT MAX(id) FROM lot WHERE id BETWEEN ?1 AND ?2")?
            .query_row(lots_from(no, partition, 0), |row| row.get(0))?;
        first_lot = first_lot.max(last.map_or(0, |last| (last & RUNNING) + 1));
    }
    if first_lot + i64::from(new.lots) > RUNNING {
        return Err(StoreError::Refused(
            "more lots than a batch can have".into(),
        ));
    }
    Ok(PartTurn::Begun {
        first_index: u32::try_from(total)
            .map_err(|_| StoreError::Refused("more than 2^32 recipients".into()))?,
        first_lot: u32::try_from(first_lot).unwrap_or(u32::MAX),
    })
}

/// The lots of a partition with a running number from `from` on.
fn lots_from(no: BatchNo, partition: i64, from: i64) -> [i64; 2] {
    let base = no << 32 | partition << 24;
    [base | from, base | RUNNING]
}

/// Whether it is still the turn of this part; then for longer.
fn keeps_turn(step: &mut Step<'_>, no: BatchNo, part: BatchId, until: i64) -> bool {
    match step.memory.parts.get_mut(&no) {
        Some(turn) if turn.part == part => {
            turn.until = turn.until.max(until);
            true
        }
        Some(_) | None => false,
    }
}

/// Writes lots of the part whose turn it is.
pub(super) fn stage(
    step: &mut Step<'_>,
    new: NewPart,
    lots: Vec<PackedLot>,
    until: i64,
) -> Result<bool> {
    let Some(batch) = record(step.connection, By::Id(new.batch.to_bytes()))? else {
        return Ok(false);
    };
    if batch.state != BatchState::Open || !keeps_turn(step, batch.no, new.part, until) {
        return Ok(false);
    }
    write_lots(step.connection, batch.no, lots, false)?;
    Ok(true)
}

/// Makes a part belong to its batch: one step, since nothing of it may be seen before.
pub(super) fn commit(step: &mut Step<'_>, ended: &EndedPart, now: Timestamp) -> Result<PartEnd> {
    let Some(batch) = record(step.connection, By::Id(ended.batch.to_bytes()))? else {
        return Ok(PartEnd::Lost);
    };
    let no = batch.no;
    if batch.state != BatchState::Open {
        return Ok(PartEnd::Impossible(batch.state));
    }
    if !keeps_turn(step, no, ended.part, 0) {
        return Ok(PartEnd::Lost);
    }
    if let Some(call) = &ended.call {
        calls::end(step.connection, call, ended.batch, now)?;
    }
    let first = first_index(step.connection, no)?;
    let total = u32::try_from(ended.accepted + ended.rejected).unwrap_or(u32::MAX);
    let until = first
        .checked_add(total)
        .ok_or_else(|| StoreError::Refused("more than 2^32 recipients".into()))?;
    write_map(step.connection, no, first, until)?;
    let in_waves = step.cache.head(step.connection, no)?.is_in_waves();
    let counts = add_ranges(step.connection, &batch, in_waves)?;
    if counts.iter().map(|(_, count)| count).sum::<u64>() != ended.accepted {
        return Err(StoreError::Refused(format!(
            "a part of batch {}: {counts:?} recipients are staged, {} are said to be",
            ended.batch, ended.accepted
        )));
    }
    let (from, to) = ids::lot_range(no);
    step.connection
        .prepare_cached("DELETE FROM staged WHERE lot BETWEEN ?1 AND ?2")?
        .execute([from, to])?;
    step.connection
        .prepare_cached("UPDATE batch SET accepted=accepted+?2, rejected=rejected+?3 WHERE no=?1")?
        .execute(params![
            no,
            ids::int(ended.accepted),
            ids::int(ended.rejected)
        ])?;
    let mut books = Books::open(step, now);
    for (partition, count) in counts {
        books.count(ids::any_lot(no << 8 | partition), |counters| {
            counters.accepted += count;
            counters.scheduled += count;
        })?;
    }
    let accepted =
        json!({ "first_index": first, "count": ended.accepted, "rejected_count": ended.rejected });
    books.batch_event(EventKind::BatchAccepted, no, &accepted);
    books.close(None)?;
    step.memory.parts.remove(&no);
    Ok(PartEnd::Done)
}

fn first_index(connection: &Connection, no: BatchNo) -> Result<u32> {
    let total: i64 = connection
        .prepare_cached("SELECT accepted + rejected FROM batch WHERE no=?1")?
        .query_row([no], |row| row.get(0))?;
    u32::try_from(total).map_err(|_| StoreError::Damaged(format!("batch {no} has {total} rows")))
}

/// Writes where the indices stand; the first piece may have entries of the part before.
fn write_map(connection: &Connection, no: BatchNo, first: u32, until: u32) -> Result<()> {
    let aligned = first - first % ids::MAP_CHUNK;
    let mut pieces = stage::map(connection, no, aligned, until)?;
    if let Some((id, piece)) = pieces.first_mut()
        && let Some(before) = map::chunk(connection, *id)?
    {
        let kept = usize::try_from(first - aligned).unwrap_or(0) * ids::MAP_ENTRY;
        for (new, old) in piece.iter_mut().zip(before.iter().take(kept)) {
            *new = *old;
        }
    }
    stage::write_map(connection, &pieces)
}

/// Makes ranges of the staged lots; how many recipients each partition got.
fn add_ranges(
    connection: &Connection,
    batch: &BatchRecord,
    in_waves: bool,
) -> Result<Vec<(i64, u64)>> {
    let (from, to) = ids::lot_range(batch.no);
    let rank = if batch.transactional {
        TRANSACTIONAL
    } else {
        super::range::BULK
    };
    connection
        .prepare_cached(
            "INSERT INTO work (batch, partition, queue, rank, due_at, count, lot, first)
             SELECT ?1, (id >> 24) & 255, queue, ?4, ?5, count, id & 4294967295, 0 FROM lot
             WHERE id IN (SELECT lot FROM staged WHERE lot BETWEEN ?2 AND ?3)",
        )?
        .execute(params![
            batch.no,
            from,
            to,
            rank,
            stage::first_due(in_waves)
        ])?;
    let mut sql = connection.prepare_cached(
        "SELECT (id >> 24) & 255, SUM(count) FROM lot
         WHERE id IN (SELECT lot FROM staged WHERE lot BETWEEN ?1 AND ?2) GROUP BY 1",
    )?;
    let sums = sql.query_map([from, to], |row| Ok((row.get(0)?, ids::nat(row.get(1)?))))?;
    Ok(sums.collect::<rusqlite::Result<_>>()?)
}

/// Ends a turn that comes to nothing.
pub(super) async fn drop_part(writer: &Writer, new: NewPart) -> Result<()> {
    let no = writer
        .write_soft(move |step| {
            let batch = record(step.connection, By::Id(new.batch.to_bytes()))?;
            let own = |no: &BatchNo| {
                step.memory
                    .parts
                    .get(no)
                    .is_some_and(|turn| turn.part == new.part)
            };
            Ok(batch.map(|batch| batch.no).filter(own))
        })
        .await?;
    let Some(no) = no else { return Ok(()) };
    while writer
        .write_soft(move |step| throw(step.connection, no))
        .await?
    {}
    writer
        .write_soft(move |step| {
            step.memory
                .parts
                .retain(|of, turn| *of != no || turn.part != new.part);
            Ok(())
        })
        .await
}

fn throw(connection: &Connection, no: BatchNo) -> Result<bool> {
    throw_between(connection, ids::lot_range(no))
}

/// What processes before this one left of parts, when nothing else is staged any more.
pub(super) fn throw_any(connection: &Connection) -> Result<bool> {
    throw_between(connection, (0, i64::MAX))
}

/// Deletes some staged lots. Whether there may be more.
fn throw_between(connection: &Connection, (first, last): (i64, i64)) -> Result<bool> {
    let some = "SELECT lot FROM staged WHERE lot BETWEEN ?1 AND ?2 ORDER BY lot LIMIT ?3";
    for table in ["lot WHERE id", "cell WHERE lot"] {
        connection
            .prepare_cached(&format!("DELETE FROM {table} IN ({some})"))?
            .execute([first, last, DELETED])?;
    }
    let deleted = connection
        .prepare_cached(&format!("DELETE FROM staged WHERE lot IN ({some})"))?
        .execute([first, last, DELETED])?;
    Ok(deleted > 0)
}

/// Takes no more parts: the mail leaves now, or at its time.
pub(super) fn start(step: &mut Step<'_>, mut batch: BatchRecord, now: Timestamp) -> Result<()> {
    let no = batch.no;
    let mut head = step.cache.head(step.connection, no)?.as_ref().clone();
    head.held = false;
    head.release_at = head.release_at.max(now);
    let text = serde_json::to_string(&head)
        .map_err(|error| StoreError::Refused(format!("a head that cannot be kept: {error}")))?;
    step.connection
        .prepare_cached("UPDATE batch SET head=?2, release_at=?3 WHERE no=?1")?
        .execute(params![no, text, head.release_at.millis()])?;
    batch.release_at = head.release_at;
    let mut books = Books::open(step, now);
    let accepted = super::record::read_counters(books.step.connection, no)?.accepted;
    if accepted == 0 {
        batch.state = BatchState::Completed;
        batch.released = true;
        batch.completed_at = Some(now);
        books.set_batch(batch)?;
        books.batch_event(EventKind::BatchCompleted, no, &json!({}));
    } else if head.release_at > now {
        batch.state = BatchState::Scheduled;
        books.set_batch(batch)?;
        // Whoever plans for it.
        books.tell(&Control::Work)?;
    } else {
        super::control::start(&mut books, batch)?;
    }
    books.close(None).map(drop)
}

/// The addresses of committed lots from a running number on.
pub(super) fn hashes(reading: &Reading<'_>, id: BatchId, from: u32) -> Result<Vec<LotHashes>> {
    let Some(batch) = record(reading.connection, By::Id(id.to_bytes()))? else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for partition in 0..=i64::from(u8::MAX) {
        let mut sql = reading.connection.prepare_cached(
            "SELECT id, hashes FROM lot WHERE id BETWEEN ?1 AND ?2 AND id NOT IN (SELECT lot FROM staged)",
        )?;
        let mut rows = sql.query(lots_from(batch.no, partition, i64::from(from)))?;
        while let Some(row) = rows.next()? {
            let hashes: Vec<u8> = row.get(1)?;
            all.push(LotHashes {
                lot: ids::split(row.get(0)?).1,
                hashes: form::unpack_u32s(&hashes).collect(),
            });
        }
    }
    Ok(all)
}

/// The rows of a lot.
pub(super) fn rows(reading: &Reading<'_>, id: BatchId, lot: LotNumber) -> Result<Vec<Row>> {
    let Some(batch) = record(reading.connection, By::Id(id.to_bytes()))? else {
        return Ok(Vec::new());
    };
    let lot = reading
        .cache
        .lot(reading.connection, ids::lot_id(batch.no, lot))?;
    Ok(lot.map_or_else(Vec::new, |lot| lot.rows.clone()))
}
