//! Giving everything away piece by piece: one moment of the store, while others go on writing.
//!
//! The moment is a read transaction; the log grows until it ends. What a node holds and may have
//! started is marked so in what is given away. Must not change anything.

use super::events;
use super::ids::{self, BatchNo};
use super::range::{Piece as RangePiece, parse};
use super::readers::Reading;
use super::record::{By, load_counters, record};
use super::shared;
use crate::backup::{self, BatchPiece, LotPiece, Piece};
use crate::form;
use crate::{EventQuery, Result, StoreError};
use model::{JournalId, LotNumber, Partition, Timestamp};
use rusqlite::OptionalExtension as _;
use std::collections::HashMap;
use tokio::sync::mpsc;

/// Where the pieces go.
struct Sink<'a>(&'a mpsc::Sender<Piece>);

impl Sink<'_> {
    fn give(&self, piece: Piece) -> Result<()> {
        self.0
            .blocking_send(piece)
            .map_err(|_| StoreError::Unavailable("nobody takes the export".into()))
    }
}

/// Gives everything to `to`. On a blocking thread.
pub(super) fn export(
    reading: &Reading<'_>,
    partitions: u16,
    to: &mpsc::Sender<Piece>,
    now: Timestamp,
) -> Result<()> {
    let sink = Sink(to);
    sink.give(Piece::Begin {
        partitions,
        at: now,
    })?;
    shared_records(reading, partitions, &sink, now)?;
    let batches: Vec<BatchNo> = {
        let mut sql = reading
            .connection
            .prepare_cached("SELECT no FROM batch WHERE state<99 ORDER BY no")?;
        let found = sql.query_map([], |row| row.get(0))?;
        found.collect::<rusqlite::Result<_>>()?
    };
    for no in batches {
        batch(reading, no, &sink)?;
    }
    super::calls::each(reading.connection, |call| {
        sink.give(Piece::Call(Box::new(call)))
    })?;
    all_events(reading, &sink)?;
    sink.give(Piece::End { pieces: 0 })
}

/// What is neither a batch nor an event.
fn shared_records(
    reading: &Reading<'_>,
    partitions: u16,
    sink: &Sink<'_>,
    now: Timestamp,
) -> Result<()> {
    let connection = reading.connection;
    let mut sql = connection.prepare_cached("SELECT key, value FROM setting ORDER BY key")?;
    let mut rows = sql.query([])?;
    while let Some(row) = rows.next()? {
        let (key, value) = (row.get(0)?, row.get(1)?);
        sink.give(Piece::Setting { key, value })?;
    }
    let mut sql = connection.prepare_cached("SELECT id, through FROM journal")?;
    let mut rows = sql.query([])?;
    while let Some(row) = rows.next()? {
        let journal = JournalId::from_bytes(row.get(0)?);
        let through = ids::nat(row.get(1)?);
        // One step takes a journal in all partitions.
        for partition in (0..=u8::MAX).take(usize::from(partitions)).map(Partition) {
            sink.give(Piece::Journal {
                journal,
                partition,
                through,
            })?;
        }
    }
    super::suppress::each(connection, |entry| sink.give(Piece::of_suppression(&entry)))?;
    super::consent::each(connection, |of| sink.give(Piece::Consent(Box::new(of))))?;
    for suspension in shared::suspensions(connection, now)? {
        sink.give(Piece::of_suspension(&suspension))?;
    }
    let kinds: Vec<String> = {
        let mut sql = connection.prepare_cached("SELECT DISTINCT kind FROM note ORDER BY kind")?;
        let found = sql.query_map([], |row| row.get(0))?;
        found.collect::<rusqlite::Result<_>>()?
    };
    for kind in kinds {
        for note in shared::notes(connection, &kind, now)? {
            sink.give(Piece::of_note(note))?;
        }
    }
    Ok(())
}

/// What the ranges of a batch say of its recipients, by lot.
#[derive(Default)]
struct OfLot {
    due: Vec<(u16, i64)>,
    doubtful: Vec<u16>,
}

fn ranges_of(reading: &Reading<'_>, no: BatchNo) -> Result<HashMap<LotNumber, OfLot>> {
    let mut by_lot: HashMap<LotNumber, OfLot> = HashMap::new();
    parse(reading.connection, no, |range| {
        let refs = range.refs();
        let deferred = matches!(range.piece, RangePiece::Refs(_));
        for (offset, of) in (0_u32..).zip(refs) {
            let lot = by_lot.entry(of.lot).or_default();
            if deferred {
                lot.due.push((of.position, range.due_at));
            }
            if offset < range.doubtful() {
                lot.doubtful.push(of.position);
            }
        }
    })?;
    Ok(by_lot)
}

fn batch(reading: &Reading<'_>, no: BatchNo, sink: &Sink<'_>) -> Result<()> {
    let connection = reading.connection;
    let Some(record) = record(connection, By::No(no))? else {
        return Ok(());
    };
    let mut ranges = ranges_of(reading, no)?;
    let (first, last) = ids::lot_range(no);
    let (head, retired, accepted, rejected): (String, i64, i64, i64) = connection
        .prepare_cached("SELECT head, retired, accepted, rejected FROM batch WHERE no=?1")?
        .query_row([no], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?;
    if retired == 0 {
        let mut sql = connection.prepare_cached(
            "SELECT lot.id, queue, packed, cell.data FROM lot JOIN cell ON cell.lot=lot.id WHERE lot.id BETWEEN ?1 AND ?2
             AND lot.id NOT IN (SELECT lot FROM staged) ORDER BY lot.id",
        )?;
        let mut rows = sql.query([first, last])?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            let number = ids::split(id).1;
            let of = ranges.remove(&number).unwrap_or_default();
            let mut cells: Vec<u8> = row.get(3)?;
            backup::mark_doubtful(&mut cells, of.doubtful.into_iter());
            sink.give(Piece::Lot(Box::new(LotPiece {
                batch: record.id,
                number,
                queue: row.get(1)?,
                rows: row.get(2)?,
                cells,
                due: of.due,
                facts: facts(reading, id)?,
            })))?;
        }
    }
    let content: Option<Vec<u8>> = connection
        .prepare_cached("SELECT data FROM content WHERE batch=?1")?
        .query_row([no], |row| row.get(0))
        .optional()?;
    let mut counters = Vec::new();
    for id in super::record::counter_ids(connection, no)? {
        let partition = Partition(u8::try_from(id & 0xff).unwrap_or(u8::MAX));
        counters.push((partition, load_counters(connection, id)?));
    }
    sink.give(Piece::Batch(Box::new(BatchPiece {
        id: record.id,
        head,
        state: record.state.code(),
        released: record.released,
        archived: record.archived,
        retired: retired != 0,
        started_at: record.started_at,
        completed_at: record.completed_at,
        accepted: ids::nat(accepted),
        rejected: ids::nat(rejected),
        counters,
        content: content.unwrap_or_default(),
    })))
}

fn facts(reading: &Reading<'_>, lot: i64) -> Result<Vec<Vec<u8>>> {
    let mut sql = reading
        .connection
        .prepare_cached("SELECT data FROM lot_log WHERE lot=?1 ORDER BY id")?;
    let found = sql.query_map([lot], |row| row.get(0))?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}

fn all_events(reading: &Reading<'_>, sink: &Sink<'_>) -> Result<()> {
    let mut query = EventQuery {
        limit: u32::try_from(backup::EVENTS).unwrap_or(1),
        ..EventQuery::default()
    };
    loop {
        let page = events::page(reading, &query)?;
        if page.events.is_empty() {
            return Ok(());
        }
        let told = page.events.iter().map(form::event_json);
        sink.give(Piece::Events(told.collect::<Result<_>>()?))?;
        query.after = Some(page.next);
    }
}
