//! What of a batch can change: its state, its times, its counters.
//!
//! Must not decide when: the books and `control` do.

use super::ids::{self, BatchNo};
use super::range::{BULK, TRANSACTIONAL};
use crate::Result;
use crate::form::{self, version};
use model::{BatchId, BatchState, Counters, Timestamp, TrackingMode};
use rusqlite::{OptionalExtension as _, params};

/// What of a batch can change.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BatchRecord {
    pub(super) no: BatchNo,
    pub(super) id: BatchId,
    pub(super) state: BatchState,
    pub(super) released: bool,
    pub(super) archived: bool,
    pub(super) release_at: Timestamp,
    pub(super) started_at: Option<Timestamp>,
    pub(super) completed_at: Option<Timestamp>,
    pub(super) paused_at: Option<Timestamp>,
    pub(super) paused_ms: u64,
    pub(super) tracking: TrackingMode,
    pub(super) transactional: bool,
}

impl BatchRecord {
    /// Whether attempts may start.
    pub(super) fn active(&self) -> bool {
        self.state == BatchState::InProgress
    }

    /// The rank of its ranges.
    pub(super) const fn rank(&self) -> u8 {
        if self.transactional {
            TRANSACTIONAL
        } else {
            BULK
        }
    }
}

/// Reads what of a batch can change; `None` when there is no such committed batch.
pub(super) fn record(connection: &rusqlite::Connection, by: By) -> Result<Option<BatchRecord>> {
    let columns = "SELECT no, id, state, released, archived, release_at, started_at, completed_at, tracking, priority, paused_at, paused_ms FROM batch WHERE state < 99 AND";
    let (sql, key): (_, &dyn rusqlite::ToSql) = match &by {
        By::No(no) => (format!("{columns} no=?1"), no),
        By::Id(id) => (format!("{columns} id=?1"), id),
    };
    let row = connection
        .prepare_cached(&sql)?
        .query_row([key], read_record)
        .optional()?;
    Ok(row)
}

/// How a batch is named.
pub(super) enum By {
    /// By its number in this file.
    No(BatchNo),
    /// By its id.
    Id([u8; 16]),
}

fn read_record(row: &rusqlite::Row<'_>) -> rusqlite::Result<BatchRecord> {
    Ok(BatchRecord {
        no: row.get(0)?,
        id: BatchId::from_bytes(row.get(1)?),
        state: BatchState::from_code(row.get(2)?).unwrap_or(BatchState::Open),
        released: row.get(3)?,
        archived: row.get(4)?,
        release_at: ids::time(row.get(5)?),
        started_at: row.get::<_, Option<i64>>(6)?.map(ids::time),
        completed_at: row.get::<_, Option<i64>>(7)?.map(ids::time),
        tracking: TrackingMode::from_code(row.get(8)?).unwrap_or(TrackingMode::Off),
        transactional: row.get::<_, u8>(9)? == model::Priority::Transactional.code(),
        paused_at: row.get::<_, Option<i64>>(10)?.map(ids::time),
        paused_ms: ids::nat(row.get(11)?),
    })
}

/// Writes what of a batch can change.
pub(super) fn save_record(connection: &rusqlite::Connection, batch: &BatchRecord) -> Result<()> {
    connection
        .prepare_cached("UPDATE batch SET state=?2, released=?3, archived=?4, started_at=?5, completed_at=?6, paused_at=?7, paused_ms=?8 WHERE no=?1")?
        .execute(params![
            batch.no,
            batch.state.code(),
            batch.released,
            batch.archived,
            batch.started_at.map(Timestamp::millis),
            batch.completed_at.map(Timestamp::millis),
            batch.paused_at.map(Timestamp::millis),
            ids::int(batch.paused_ms),
        ])?;
    Ok(())
}

/// The counters of a batch in one partition.
pub(super) fn load_counters(connection: &rusqlite::Connection, id: i64) -> Result<Counters> {
    let data: Option<Vec<u8>> = connection
        .prepare_cached("SELECT data FROM counter WHERE id=?1")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    data.map_or_else(
        || Ok(Counters::default()),
        |data| form::unpack(version::COUNTERS, &data),
    )
}

/// The keys of all counters of a batch.
pub(super) fn counter_ids(connection: &rusqlite::Connection, batch: BatchNo) -> Result<Vec<i64>> {
    let (first, last) = ids::counter_range(batch);
    let mut sql = connection.prepare_cached("SELECT id FROM counter WHERE id BETWEEN ?1 AND ?2")?;
    let ids = sql.query_map([first, last], |row| row.get(0))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// The counters of a batch: the sum over its partitions.
pub(super) fn read_counters(connection: &rusqlite::Connection, batch: BatchNo) -> Result<Counters> {
    let (first, last) = ids::counter_range(batch);
    let mut sql =
        connection.prepare_cached("SELECT data FROM counter WHERE id BETWEEN ?1 AND ?2")?;
    let mut rows = sql.query([first, last])?;
    let mut sum = Counters::default();
    while let Some(row) = rows.next()? {
        let data: Vec<u8> = row.get(0)?;
        add(&mut sum, &form::unpack(version::COUNTERS, &data)?);
    }
    Ok(sum)
}

fn add(sum: &mut Counters, other: &Counters) {
    let Counters {
        accepted,
        scheduled,
        queued,
        temporary_error,
        delivered,
        bounce,
        failed,
        suppressed,
        cancelled,
        complained,
        unsubscribed,
        replied,
        opened_unique,
        opened_total,
        clicked_unique,
        clicked_total,
        opened_unique_human,
        opened_total_human,
        clicked_unique_human,
        clicked_total_human,
    } = other;
    sum.accepted += accepted;
    sum.scheduled += scheduled;
    sum.queued += queued;
    sum.temporary_error += temporary_error;
    sum.delivered += delivered;
    sum.bounce += bounce;
    sum.failed += failed;
    sum.suppressed += suppressed;
    sum.cancelled += cancelled;
    sum.complained += complained;
    sum.unsubscribed += unsubscribed;
    sum.replied += replied;
    sum.opened_unique += opened_unique;
    sum.opened_total += opened_total;
    sum.clicked_unique += clicked_unique;
    sum.clicked_total += clicked_total;
    sum.opened_unique_human += opened_unique_human;
    sum.opened_total_human += opened_total_human;
    sum.clicked_unique_human += clicked_unique_human;
    sum.clicked_total_human += clicked_total_human;
}
