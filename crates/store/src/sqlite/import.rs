//! Taking in what another store gave away, piece by piece, into a store that is empty.
//!
//! Until the last piece has come nobody else opens the store: what is half there is thrown away whole,
//! with its file. Lots are staged as at intake, and their batch makes them visible. Must not start
//! anything: what was not ended is paused.

use super::books::{RetryKey, file_retries};
use super::ids::{self, BatchNo};
use super::range::{BULK, TRANSACTIONAL};
use super::stage;
use super::writer::{Step, Writer};
use crate::backup::{self, BatchPiece, LotPiece, Piece, Statuses};
use crate::form::{self, EventBlock, StoredEvent, version};
use crate::{BatchHead, Result, StoreError, Suppression, Suspension};
use model::{BatchState, Event, Partition, Priority, Timestamp};
use rusqlite::{Connection, params};
use std::collections::BTreeMap;

/// In `meta`: it is being filled.
const FILLING: &str = "filling";
/// What a store has that was used.
const USED: [&str; 6] = [
    "batch",
    "suppression",
    "event",
    "journal",
    "note",
    "consent",
];

/// Refuses a store that is not whole.
pub(super) fn must_be_whole(connection: &Connection) -> Result<()> {
    let mut sql = connection.prepare("SELECT EXISTS (SELECT 1 FROM meta WHERE key=?1)")?;
    if sql.query_row([FILLING], |row| row.get::<_, bool>(0))? {
        return Err(StoreError::Refused(
            "an import into it did not come to its end: remove the file and import again".into(),
        ));
    }
    Ok(())
}

/// Takes a piece.
pub(super) async fn import(
    writer: &Writer,
    partitions: u16,
    piece: Piece,
    now: Timestamp,
) -> Result<()> {
    match piece {
        Piece::Batch(batch) => take_batch(writer, *batch, partitions, now).await,
        Piece::Begin { .. } | Piece::End { .. } => {
            writer
                .write(move |step| take(step, partitions, piece, now))
                .await
        }
        piece => {
            writer
                .write_soft(move |step| take(step, partitions, piece, now))
                .await
        }
    }
}

fn take(step: &mut Step<'_>, partitions: u16, piece: Piece, now: Timestamp) -> Result<()> {
    let connection = step.connection;
    match piece {
        Piece::Begin { partitions: of, .. } => begin(connection, of, partitions),
        Piece::Setting { key, value } => execute(
            connection,
            "INSERT INTO setting VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value=excluded.value",
            params![key, value],
        ),
        Piece::Journal {
            journal, through, ..
        } => execute(
            connection,
            // What one partition lacks is shipped to all again.
            "INSERT INTO journal VALUES (?1, ?2) ON CONFLICT DO UPDATE SET through=MIN(through, excluded.through)",
            params![journal.to_bytes(), ids::int(through)],
        ),
        Piece::Suppression(text) => {
            let entry: Suppression = backup::json(&text)?;
            super::suppress::restore(connection, &entry)
        }
        Piece::Consent(of) => super::consent::restore(connection, &of),
        Piece::Suspension(text) => {
            let of: Suspension = backup::json(&text)?;
            super::shared::suspend(step, of, now)
        }
        Piece::Note {
            kind,
            key,
            value,
            expires_at,
        } => {
            let note = crate::Note {
                kind: kind.into(),
                key: key.into(),
                value: value.into(),
                expires_at,
            };
            let notes = backup::note_elsewhere(note).into_iter().collect();
            super::shared::put_notes(connection, notes, now)
        }
        Piece::Lot(lot) => take_lot(step, &lot),
        Piece::Call(call) => super::calls::restore(connection, &call),
        Piece::Events(told) => take_events(step, &told),
        // Taken elsewhere.
        Piece::Batch(_) => Ok(()),
        Piece::End { .. } => execute(
            connection,
            "DELETE FROM meta WHERE key=?1",
            params![FILLING],
        ),
    }
}

fn execute(connection: &Connection, sql: &str, values: impl rusqlite::Params) -> Result<()> {
    connection.prepare_cached(sql)?.execute(values)?;
    Ok(())
}

fn begin(connection: &Connection, of: u16, partitions: u16) -> Result<()> {
    if of != partitions {
        return Err(StoreError::Refused(format!(
            "the export has {of} partitions, this store was made with {partitions}: set store.partitions = {of} and let it be made anew"
        )));
    }
    for table in USED {
        let sql = format!("SELECT EXISTS (SELECT 1 FROM {table})");
        if connection.query_row(&sql, [], |row| row.get::<_, bool>(0))? {
            return Err(StoreError::Refused(
                "it is not empty: import into a new one".into(),
            ));
        }
    }
    execute(
        connection,
        "INSERT INTO meta VALUES (?1, 1)",
        params![FILLING],
    )
}

fn take_lot(step: &mut Step<'_>, lot: &LotPiece) -> Result<()> {
    let rows = lot.read_rows()?;
    let connection = step.connection;
    let no = stage::staged_no(connection, lot.batch)?;
    let id = ids::lot_id(no, lot.number);
    let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
    let hashes = rows.iter().map(|row| match row.email.normalised() {
        name if crate::erased::is_name(&name) => 0,
        email => crate::address_hash(&email),
    });
    execute(
        connection,
        "INSERT INTO lot (id, queue, count, overrides, hashes, packed) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            id,
            lot.queue,
            count,
            rows.iter().any(|row| row.tracking.is_some()),
            form::pack_u32s(hashes),
            lot.rows
        ],
    )?;
    let indices = form::pack_u32s(rows.iter().map(|row| row.index));
    execute(
        connection,
        "INSERT INTO staged VALUES (?1, ?2)",
        params![id, indices],
    )?;
    execute(
        connection,
        "INSERT INTO cell VALUES (?1, ?2)",
        params![id, lot.cells],
    )?;
    for block in &lot.facts {
        execute(
            connection,
            "INSERT INTO lot_log (lot, data) VALUES (?1, ?2)",
            params![id, block],
        )?;
    }
    let waiting = lot.waiting(&rows)?;
    let partition = lot.number.partition();
    for (due_at, first, count) in waiting.spans {
        execute(
            connection,
            "INSERT INTO work (batch, partition, queue, due_at, count, lot, first) VALUES (?1, ?2, ?3, ?7, ?4, ?5, ?6)",
            params![
                no,
                partition.0,
                lot.queue,
                count,
                lot.number.0,
                first,
                due_at
            ],
        )?;
    }
    for ((due_at, queue), refs) in waiting.retries {
        let key = RetryKey {
            batch: no,
            partition,
            queue,
            rank: BULK,
            due_at,
        };
        file_retries(step, &key, &refs)?;
    }
    Ok(())
}

fn take_events(step: &mut Step<'_>, told: &[String]) -> Result<()> {
    let mut kinds = 1 << form::TOLD_BIT;
    let mut recorded_at = Timestamp::from_millis(0);
    for text in told {
        let event: Event = backup::json(text)?;
        kinds |= 1_i64 << event.kind.code();
        recorded_at = event.recorded_at;
    }
    let told = told.iter().map(|text| StoredEvent::Told(text.clone()));
    let block = EventBlock {
        events: told.collect(),
    };
    let data = step.memory.packer.pack(version::EVENTS, &block)?;
    execute(
        step.connection,
        "INSERT INTO event (recorded_at, kinds, batch, data) VALUES (?1, ?2, 0, ?3)",
        params![recorded_at.millis(), kinds, data],
    )
}

// ---- batches ----------------------------------------------------------------------------

async fn take_batch(
    writer: &Writer,
    batch: BatchPiece,
    partitions: u16,
    now: Timestamp,
) -> Result<()> {
    let total = u32::try_from(batch.accepted.saturating_add(batch.rejected))
        .map_err(|_| StoreError::Damaged("a batch of more than 2^32 recipients".into()))?;
    let id = batch.id;
    let no = writer
        .write_soft(move |step| stage::staged_no(step.connection, id))
        .await?;
    if !batch.retired {
        stage::write_maps(writer, no, total).await?;
    }
    writer
        .write_soft(move |step| finish(step, no, &batch, partitions, now))
        .await
}

fn finish(
    step: &mut Step<'_>,
    no: BatchNo,
    batch: &BatchPiece,
    partitions: u16,
    now: Timestamp,
) -> Result<()> {
    let head: BatchHead = backup::json(&batch.head)?;
    let statuses = statuses(step.connection, no)?;
    for partition in (0..=u8::MAX).take(usize::from(partitions)).map(Partition) {
        let none = Statuses::default();
        let cells = statuses.get(&partition).unwrap_or(&none);
        let counters = batch.counters_with(partition, (!batch.retired).then_some(cells));
        let data = step.memory.packer.pack(version::COUNTERS, &counters)?;
        execute(
            step.connection,
            "INSERT INTO counter VALUES (?1, ?2)",
            params![ids::counter_id(no, partition), data],
        )?;
    }
    let connection = step.connection;
    let state = batch.restored_state()?;
    let millis = |at: Option<Timestamp>| at.map(Timestamp::millis);
    execute(
        connection,
        "UPDATE batch SET state=?2, released=?3, archived=?4, priority=?5, release_at=?6, started_at=?7, completed_at=?8,
         accepted=?9, rejected=?10, tracking=?11, account=?12, campaign=?13, list=?14, head=?15, retired=?16, paused_at=?17 WHERE no=?1",
        params![
            no,
            state.code(),
            batch.released,
            batch.archived,
            head.priority.code(),
            head.release_at.millis(),
            millis(batch.started_at),
            millis(batch.completed_at),
            ids::int(batch.accepted),
            ids::int(batch.rejected),
            head.tracking.code(),
            head.account,
            head.campaign,
            head.list,
            batch.head,
            if batch.retired { 2 } else { 0 },
            (state == BatchState::Paused && batch.released).then_some(now.millis()),
        ],
    )?;
    if head.priority == Priority::Transactional {
        execute(
            connection,
            "UPDATE work SET rank=?2 WHERE batch=?1",
            params![no, TRANSACTIONAL],
        )?;
    }
    let (first, last) = ids::lot_range(no);
    execute(
        connection,
        "DELETE FROM staged WHERE lot BETWEEN ?1 AND ?2",
        [first, last],
    )?;
    if !batch.retired {
        execute(
            connection,
            "INSERT INTO content VALUES (?1, ?2)",
            params![no, batch.content],
        )?;
    }
    let open = statuses.values().map(Statuses::open).sum::<u64>();
    if open == 0 && state == BatchState::Paused {
        // Its last outcome came while it was given away.
        execute(
            connection,
            "UPDATE batch SET state=?2, completed_at=?3 WHERE no=?1",
            params![no, BatchState::Completed.code(), now.millis()],
        )?;
    }
    Ok(())
}

fn statuses(connection: &Connection, no: BatchNo) -> Result<BTreeMap<Partition, Statuses>> {
    let (first, last) = ids::lot_range(no);
    let mut sql =
        connection.prepare_cached("SELECT lot, data FROM cell WHERE lot BETWEEN ?1 AND ?2")?;
    let mut rows = sql.query([first, last])?;
    let mut all: BTreeMap<Partition, Statuses> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        let partition = ids::split(row.get(0)?).1.partition();
        let cells: Vec<u8> = row.get(1)?;
        all.entry(partition).or_default().add(&cells)?;
    }
    Ok(all)
}
