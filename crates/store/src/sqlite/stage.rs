//! Intake: lots are staged in short steps, the index map is made in short steps, and one small
//! step makes the batch visible.
//!
//! Lots, cells and ranges are written in their final form while staged; they are invisible because
//! their batch is in state [`STAGED`]. So the commit of a million recipients writes the index map
//! (6 bytes a recipient) and a few records. The map needs all indices at once, which arrive by
//! lot: it is made in passes of [`PASS`] indices, so that memory does not grow with the batch.

use super::books::Books;
use super::calls;
use super::ids::{self, BatchNo};
use super::range::TRANSACTIONAL;
use super::writer::{Step, Writer};
use crate::form::Packer;
use crate::{Control, LOT_ROWS, MIXED, NewBatch, NewLot, Result, StoreError, address_hash, form};
use model::{BatchId, BatchState, Counters, EventKind, Row, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::json;

/// The state of a batch that is not committed.
const STAGED: i64 = 99;
/// Indices mapped in one pass: 24 MB.
const PASS: u32 = 4 << 20;
/// Pieces of the index map written in one step.
const PIECES: usize = 256;
/// Lots deleted in one step.
const DELETED: i64 = 256;

/// A lot in its stored form, made on the caller's thread.
pub(super) struct PackedLot {
    number: model::LotNumber,
    queue: Box<str>,
    count: u32,
    overrides: bool,
    hashes: Vec<u8>,
    indices: Vec<u8>,
    packed: Vec<u8>,
    variants: Vec<u8>,
}

/// Packs a lot; refuses one that breaks the rules of a lot.
fn pack(lot: NewLot, packer: &mut Packer) -> Result<PackedLot> {
    // Addresses are hashed without their account, which is known only at the commit.
    let hash = |row: &Row| address_hash(&row.email.normalised());
    let count = u32::try_from(lot.rows.len()).unwrap_or(u32::MAX);
    if lot.rows.is_empty() || lot.rows.len() > LOT_ROWS {
        return Err(StoreError::Refused(format!("a lot of {count} recipients")));
    }
    Ok(PackedLot {
        number: lot.number,
        count,
        overrides: lot.rows.iter().any(|row| row.tracking.is_some()),
        hashes: form::pack_u32s(lot.rows.iter().map(hash)),
        indices: form::pack_u32s(lot.rows.iter().map(|row| row.index)),
        packed: packer.pack_rows(&lot.rows)?,
        variants: lot.variants,
        queue: lot.queue,
    })
}

/// Packs lots beside the threads that serve others.
pub(super) async fn pack_all(lots: Vec<NewLot>) -> Result<Vec<PackedLot>> {
    let pack = move || {
        let mut packer = Packer::new()?;
        let packed = lots.into_iter().map(|lot| pack(lot, &mut packer));
        packed.collect::<Result<Vec<_>>>()
    };
    let packed = tokio::task::spawn_blocking(pack);
    packed
        .await
        .map_err(|error| StoreError::Unavailable(error.to_string()))?
}

/// Writes lots of a batch that is not committed.
pub(super) fn stage(step: &Step<'_>, batch: BatchId, lots: Vec<PackedLot>) -> Result<()> {
    let no = staged_no(step.connection, batch)?;
    write_lots(step.connection, no, lots, true)
}

/// Writes lots, those that are there already left as they are; `ranged`: with their ranges.
pub(super) fn write_lots(
    connection: &Connection,
    no: BatchNo,
    lots: Vec<PackedLot>,
    ranged: bool,
) -> Result<()> {
    for lot in lots {
        let id = ids::lot_id(no, lot.number);
        if is_staged(connection, id, &lot)? {
            continue;
        }
        connection
            .prepare_cached("INSERT INTO lot (id, queue, count, overrides, hashes, packed) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
            .execute(params![id, lot.queue, lot.count, lot.overrides, lot.hashes, lot.packed])?;
        connection
            .prepare_cached("INSERT INTO staged VALUES (?1, ?2)")?
            .execute(params![id, lot.indices])?;
        let count = usize::try_from(lot.count).unwrap_or(LOT_ROWS);
        let cells = crate::transition::Cell::fresh(count, &lot.variants);
        connection
            .prepare_cached("INSERT INTO cell VALUES (?1, ?2)")?
            .execute(params![id, cells])?;
        if !ranged {
            continue;
        }
        connection
            .prepare_cached("INSERT INTO work (batch, partition, queue, due_at, count, lot, first) VALUES (?1, ?2, ?3, ?6, ?4, ?5, 0)")?
            .execute(params![
                no,
                lot.number.partition().0,
                lot.queue,
                lot.count,
                lot.number.0,
                first_due(!lot.variants.is_empty()),
            ])?;
    }
    Ok(())
}

/// From when on a new lot may be leased, once its batch is released.
pub(super) const fn first_due(in_waves: bool) -> i64 {
    if in_waves { crate::HELD_BACK } else { 0 }
}

/// Whether this lot is staged already: whoever got no answer asks again.
fn is_staged(connection: &Connection, id: ids::LotId, lot: &PackedLot) -> Result<bool> {
    let found: Option<(String, Vec<u8>)> = connection
        .prepare_cached("SELECT queue, packed FROM lot WHERE id=?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match found {
        None => Ok(false),
        Some((queue, packed)) if *queue == *lot.queue && packed == lot.packed => Ok(true),
        Some(_) => Err(StoreError::Refused(format!(
            "lot {} was staged with other recipients",
            lot.number.0
        ))),
    }
}

pub(super) fn staged_no(connection: &Connection, batch: BatchId) -> Result<BatchNo> {
    let found: Option<(BatchNo, i64)> = connection
        .prepare_cached("SELECT no, state FROM batch WHERE id=?1")?
        .query_row([batch.to_bytes()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match found {
        Some((no, STAGED)) => Ok(no),
        Some(_) => Err(StoreError::Refused(format!("batch {batch} is committed"))),
        None => {
            connection
                .prepare_cached("INSERT INTO batch (id, state) VALUES (?1, ?2)")?
                .execute(params![batch.to_bytes(), STAGED])?;
            Ok(connection.last_insert_rowid())
        }
    }
}

/// Makes a staged batch visible.
pub(super) async fn commit(writer: &Writer, batch: NewBatch, now: Timestamp) -> Result<()> {
    let (id, total) = (batch.head.id, batch.accepted + batch.rejected);
    let total = u32::try_from(total)
        .map_err(|_| StoreError::Refused("more than 2^32 recipients".into()))?;
    let Some(no) = writer
        .write_soft(move |step| begin(step.connection, id))
        .await?
    else {
        return Ok(());
    };
    write_maps(writer, no, total).await?;
    writer
        .write(move |step| finish(step, no, &batch, now))
        .await
}

/// Makes the index map of a staged batch, in short steps.
pub(super) async fn write_maps(writer: &Writer, no: BatchNo, total: u32) -> Result<()> {
    let mut from = 0;
    while from < total {
        let until = total.min(from.saturating_add(PASS));
        let mut pieces = writer
            .write_soft(move |step| map(step.connection, no, from, until))
            .await?;
        while !pieces.is_empty() {
            let rest = pieces.split_off(pieces.len().min(PIECES));
            let some = std::mem::replace(&mut pieces, rest);
            writer
                .write_soft(move |step| write_map(step.connection, &some))
                .await?;
        }
        from = until;
    }
    Ok(())
}

/// The number of the staged batch; `None` when it is committed already.
fn begin(connection: &Connection, id: BatchId) -> Result<Option<BatchNo>> {
    let committed: Option<i64> = connection
        .prepare_cached("SELECT no FROM batch WHERE id=?1 AND state<>?2")?
        .query_row(params![id.to_bytes(), STAGED], |row| row.get(0))
        .optional()?;
    match committed {
        Some(_) => Ok(None),
        None => staged_no(connection, id).map(Some),
    }
}

/// Where the indices from `from` until `until` stand, in the pieces in which that is kept.
pub(super) fn map(
    connection: &Connection,
    no: BatchNo,
    from: u32,
    until: u32,
) -> Result<Vec<(i64, Vec<u8>)>> {
    let (first, last) = ids::lot_range(no);
    let mut sql =
        connection.prepare_cached("SELECT lot, indices FROM staged WHERE lot BETWEEN ?1 AND ?2")?;
    let mut rows = sql.query([first, last])?;
    let width = usize::try_from(until - from).unwrap_or(usize::MAX);
    // All ones: an index that was rejected.
    let mut places = vec![0xff_u8; width.saturating_mul(ids::MAP_ENTRY)];
    while let Some(row) = rows.next()? {
        let lot = ids::split(row.get(0)?).1;
        let indices: Vec<u8> = row.get(1)?;
        for (position, index) in (0_u16..).zip(form::unpack_u32s(&indices)) {
            if !(from..until).contains(&index) {
                continue;
            }
            let at = usize::try_from(index - from).unwrap_or(usize::MAX) * ids::MAP_ENTRY;
            if let Some([a, b, c, d, e, f]) = places.get_mut(at..at + ids::MAP_ENTRY) {
                [*a, *b, *c, *d] = lot.0.to_le_bytes();
                [*e, *f] = position.to_le_bytes();
            }
        }
    }
    let chunk = usize::try_from(ids::MAP_CHUNK).unwrap_or(1) * ids::MAP_ENTRY;
    let pieces = places.chunks(chunk).map(<[u8]>::to_vec);
    Ok((ids::map_id(no, from)..).zip(pieces).collect())
}

pub(super) fn write_map(connection: &Connection, pieces: &[(i64, Vec<u8>)]) -> Result<()> {
    // A commit that failed may have left pieces: they are the same.
    let mut sql = connection.prepare_cached("INSERT OR REPLACE INTO index_map VALUES (?1, ?2)")?;
    for (id, data) in pieces {
        sql.execute(params![id, data])?;
    }
    Ok(())
}

fn finish(step: &mut Step<'_>, no: BatchNo, batch: &NewBatch, now: Timestamp) -> Result<()> {
    check_staged(step.connection, no, batch)?;
    if let Some(call) = &batch.call {
        calls::end(step.connection, call, batch.head.id, now)?;
    }
    let (first, last) = ids::lot_range(no);
    step.connection
        .prepare_cached("DELETE FROM staged WHERE lot BETWEEN ?1 AND ?2")?
        .execute([first, last])?;
    let released = batch.head.release_at <= now && !batch.head.held;
    let state = match (batch.accepted, released) {
        _ if batch.head.held => BatchState::Open,
        (0, _) => BatchState::Completed,
        (_, true) => BatchState::InProgress,
        (_, false) => BatchState::Scheduled,
    };
    write_batch(step.connection, no, batch, state, released, now)?;
    write_first_counters(step, no, released && !batch.head.is_in_waves())?;
    let mut books = Books::open(step, now);
    let accepted =
        json!({ "first_index": 0, "count": batch.accepted, "rejected_count": batch.rejected });
    books.batch_event(EventKind::BatchAccepted, no, &accepted);
    if state == BatchState::InProgress {
        books.batch_event(EventKind::BatchStarted, no, &json!({}));
    }
    if state == BatchState::Completed {
        books.batch_event(EventKind::BatchCompleted, no, &json!({}));
    }
    books.tell(&Control::Work)?;
    books.close(None)?;
    Ok(())
}

fn check_staged(connection: &Connection, no: BatchNo, batch: &NewBatch) -> Result<()> {
    let (first, last) = ids::lot_range(no);
    let staged: i64 = connection
        .prepare_cached("SELECT COALESCE(SUM(count), 0) FROM lot WHERE id BETWEEN ?1 AND ?2")?
        .query_row([first, last], |row| row.get(0))?;
    if ids::nat(staged) == batch.accepted {
        return Ok(());
    }
    Err(StoreError::Refused(format!(
        "batch {}: {staged} recipients are staged, {} are said to be",
        batch.head.id, batch.accepted
    )))
}

fn write_batch(
    connection: &Connection,
    no: BatchNo,
    batch: &NewBatch,
    state: BatchState,
    released: bool,
    now: Timestamp,
) -> Result<()> {
    let head = serde_json::to_string(&batch.head)
        .map_err(|error| StoreError::Refused(format!("a head that cannot be kept: {error}")))?;
    let at = |condition: bool| condition.then_some(now.millis());
    connection
        .prepare_cached(
            "UPDATE batch SET state=?2, released=?3, priority=?4, release_at=?5, started_at=?6, completed_at=?7,
             accepted=?8, rejected=?9, tracking=?10, account=?11, campaign=?12, list=?13, head=?14 WHERE no=?1",
        )?
        .execute(params![
            no,
            state.code(),
            released,
            batch.head.priority.code(),
            batch.head.release_at.millis(),
            at(state == BatchState::InProgress),
            at(state == BatchState::Completed),
            ids::int(batch.accepted),
            ids::int(batch.rejected),
            batch.head.tracking.code(),
            batch.head.account,
            batch.head.campaign,
            batch.head.list,
            head,
        ])?;
    if batch.head.priority == model::Priority::Transactional {
        connection
            .prepare_cached("UPDATE work SET rank=?2 WHERE batch=?1")?
            .execute(params![no, TRANSACTIONAL])?;
    }
    connection
        .prepare_cached("INSERT INTO content VALUES (?1, ?2)")?
        .execute(params![no, &batch.content[..]])?;
    Ok(())
}

fn write_first_counters(step: &mut Step<'_>, no: BatchNo, queued: bool) -> Result<()> {
    let (first, last) = ids::lot_range(no);
    let mut sql = step.connection.prepare_cached(
        "SELECT (id >> 24) & 255, SUM(count) FROM lot WHERE id BETWEEN ?1 AND ?2 GROUP BY 1",
    )?;
    let sums = sql.query_map([first, last], |row| Ok((row.get(0)?, row.get(1)?)))?;
    for sum in sums.collect::<rusqlite::Result<Vec<(u8, i64)>>>()? {
        let (partition, count) = (model::Partition(sum.0), ids::nat(sum.1));
        let counters = Counters {
            accepted: count,
            queued: if queued { count } else { 0 },
            scheduled: if queued { 0 } else { count },
            ..Counters::default()
        };
        let data = step
            .memory
            .packer
            .pack(form::version::COUNTERS, &counters)?;
        step.connection
            .prepare_cached("INSERT INTO counter VALUES (?1, ?2)")?
            .execute(params![ids::counter_id(no, partition), data])?;
    }
    Ok(())
}

/// Throws away what is staged of a batch, in short steps.
pub(super) async fn abandon(writer: &Writer, batch: BatchId) -> Result<()> {
    while writer
        .write_soft(move |step| throw(step.connection, Some(batch)))
        .await?
    {}
    Ok(())
}

/// Throws away what earlier processes left staged. Before the writer starts.
pub(super) fn abandon_leftovers(connection: &mut Connection) -> Result<()> {
    loop {
        let step = connection.transaction()?;
        let more = throw(&step, None)? || super::parts::throw_any(&step)?;
        step.commit()?;
        if !more {
            return Ok(());
        }
    }
}

/// Deletes some of what is staged of one batch, or of any. Whether there is more.
fn throw(connection: &Connection, batch: Option<BatchId>) -> Result<bool> {
    let id = batch.map(BatchId::to_bytes);
    let staged: Option<BatchNo> = connection
        .prepare_cached("SELECT no FROM batch WHERE state=?1 AND (?2 IS NULL OR id=?2) LIMIT 1")?
        .query_row(params![STAGED, id], |row| row.get(0))
        .optional()?;
    let Some(no) = staged else {
        return Ok(false);
    };
    let (first, last) = ids::lot_range(no);
    let until: Option<i64> = connection
        .prepare_cached("SELECT MAX(id) FROM (SELECT id FROM lot WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3)")?
        .query_row([first, last, DELETED], |row| row.get(0))?;
    if let Some(until) = until {
        for sql in [
            "DELETE FROM lot WHERE id BETWEEN ?1 AND ?2",
            "DELETE FROM staged WHERE lot BETWEEN ?1 AND ?2",
            "DELETE FROM cell WHERE lot BETWEEN ?1 AND ?2",
        ] {
            connection.prepare_cached(sql)?.execute([first, until])?;
        }
        return Ok(true);
    }
    for sql in [
        "DELETE FROM work WHERE batch=?1",
        "DELETE FROM batch WHERE no=?1",
    ] {
        connection.prepare_cached(sql)?.execute([no])?;
    }
    connection
        .prepare_cached("DELETE FROM index_map WHERE id BETWEEN ?1 AND ?2")?
        .execute([first, last])?;
    Ok(true)
}

/// Whether lots of this queue have recipients of several domains.
pub(super) fn is_mixed(queue: &str) -> bool {
    queue == MIXED
}
