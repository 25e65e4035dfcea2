//! Readings of batches, of the backlog and of totals.
//!
//! Must not change anything.

use super::control::describe;
use super::ids::{self, BatchNo};
use super::readers::Reading;
use super::record::{By, record};
use crate::{Backlog, Batch, BatchQuery, Page, Result, Totals};
use model::{BatchId, BatchState, Priority, Timestamp};
use rusqlite::{OptionalExtension as _, params};
use std::collections::HashMap;
use std::sync::Arc;

/// One batch.
pub(super) fn batch(reading: &Reading<'_>, id: BatchId) -> Result<Option<Batch>> {
    let Some(found) = record(reading.connection, By::Id(id.to_bytes()))? else {
        return Ok(None);
    };
    let head = reading.cache.head(reading.connection, found.no)?;
    describe(reading.connection, &found, head.as_ref().clone()).map(Some)
}

/// The content of a batch.
pub(super) fn content(reading: &Reading<'_>, id: BatchId) -> Result<Option<Arc<[u8]>>> {
    let found: Option<Vec<u8>> = reading
        .connection
        .prepare_cached("SELECT data FROM content WHERE batch=(SELECT no FROM batch WHERE id=?1)")?
        .query_row([id.to_bytes()], |row| row.get(0))
        .optional()?;
    Ok(found.map(Arc::from))
}

/// Batches, newest first.
pub(super) fn batches(reading: &Reading<'_>, query: &BatchQuery) -> Result<Page<Batch>> {
    let limit = query.limit.clamp(1, 1_000);
    let after = query.after.map(BatchId::to_bytes);
    let state = query.state.map(BatchState::code);
    let mut sql = reading.connection.prepare_cached(
        "SELECT no FROM batch WHERE state<99 AND (?1 IS NULL OR id<?1) AND (?2 IS NULL OR account=?2)
         AND (?3 IS NULL OR state=?3) AND (?4 IS NULL OR campaign=?4) ORDER BY id DESC LIMIT ?5",
    )?;
    let values = params![after, query.account, state, query.campaign, limit];
    let found = sql.query_map(values, |row| row.get(0))?;
    let mut items = Vec::new();
    for no in found.collect::<rusqlite::Result<Vec<BatchNo>>>()? {
        if let Some(found) = record(reading.connection, By::No(no))? {
            let head = reading.cache.head(reading.connection, no)?;
            items.push(describe(reading.connection, &found, head.as_ref().clone())?);
        }
    }
    let full = u32::try_from(items.len()).is_ok_and(|count| count == limit);
    let next = items
        .last()
        .filter(|_| full)
        .map(|last| last.head.id.to_string());
    Ok(Page { items, next })
}

/// What a batch means for the backlog.
#[derive(Debug, Clone, Copy)]
enum Standing {
    /// Its mail leaves.
    Active { transactional: bool },
    /// Its mail will leave then.
    Scheduled(i64),
    /// Paused.
    Still,
}

/// The backlog, and what only the writer can bring in order.
pub(super) struct Survey {
    pub(super) backlog: Vec<Backlog>,
    /// There are batches whose time has come.
    pub(super) release: bool,
    /// Cancelled batches of which a holder that is gone left something.
    pub(super) sweep: Vec<BatchNo>,
}

fn standings(reading: &Reading<'_>) -> Result<HashMap<BatchNo, Standing>> {
    let mut sql = reading.connection.prepare_cached(
        "SELECT no, state, priority, release_at FROM batch WHERE state IN (?1, ?2, ?3, 99)",
    )?;
    let states = [
        BatchState::InProgress,
        BatchState::Scheduled,
        BatchState::Paused,
    ]
    .map(BatchState::code);
    let mut rows = sql.query(states)?;
    let mut all = HashMap::new();
    while let Some(row) = rows.next()? {
        let state: u8 = row.get(1)?;
        let standing = match BatchState::from_code(state) {
            Some(BatchState::InProgress) => Standing::Active {
                transactional: row.get::<_, u8>(2)? == Priority::Transactional.code(),
            },
            Some(BatchState::Scheduled) => Standing::Scheduled(row.get(3)?),
            _ => Standing::Still,
        };
        all.insert(row.get(0)?, standing);
    }
    Ok(all)
}

/// Looks through all ranges after a queue, in the order of an index that has all that is needed.
pub(super) fn survey(
    reading: &Reading<'_>,
    now: Timestamp,
    after: Option<&str>,
    limit: u32,
) -> Result<Survey> {
    let now = now.millis();
    let standings = standings(reading)?;
    let due_now = |standing: &Standing| matches!(standing, Standing::Scheduled(at) if *at <= now);
    let mut survey = Survey {
        backlog: Vec::new(),
        release: standings.values().any(due_now),
        sweep: Vec::new(),
    };
    let mut sql = reading.connection.prepare_cached(
        "SELECT queue, batch, SUM(CASE WHEN due_at<=?2 AND expires<=?2 THEN count ELSE 0 END),
                MIN(CASE WHEN due_at>?2 THEN due_at END), MAX(expires)
         FROM work WHERE queue>?1 GROUP BY queue, rank, batch",
    )?;
    let mut rows = sql.query(params![after.unwrap_or_default(), now])?;
    while let Some(row) = rows.next()? {
        let queue: String = row.get(0)?;
        let (due, next): (i64, Option<i64>) = (row.get(2)?, row.get(3)?);
        let no: BatchNo = row.get(1)?;
        let (due, next, transactional) = match standings.get(&no) {
            Some(Standing::Active { transactional }) => (due, next, *transactional && due > 0),
            Some(Standing::Scheduled(at)) => (0, Some((*at).max(now)), false),
            Some(Standing::Still) => continue,
            // Cancelled or completed: ranges are left only until their holder reports or is gone.
            None => {
                if row.get::<_, i64>(4)? <= now && !survey.sweep.contains(&no) {
                    survey.sweep.push(no);
                }
                continue;
            }
        };
        if due == 0 && next.is_none() {
            continue;
        }
        if !merge(
            &mut survey.backlog,
            queue,
            ids::nat(due),
            next,
            transactional,
            limit,
        ) {
            break;
        }
    }
    Ok(survey)
}

/// Adds a batch's part to its queue; false when that would be one queue too many.
fn merge(
    backlog: &mut Vec<Backlog>,
    queue: String,
    due: u64,
    next: Option<i64>,
    transactional: bool,
    limit: u32,
) -> bool {
    let next = next.map(ids::time);
    let full = u32::try_from(backlog.len()).is_ok_and(|count| count >= limit);
    match backlog.last_mut() {
        Some(last) if *last.queue == *queue => {
            last.due += due;
            last.transactional |= transactional;
            last.next_due = match (last.next_due, next) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        _ if full => return false,
        _ => backlog.push(Backlog {
            queue: queue.into(),
            due,
            next_due: next,
            transactional,
        }),
    }
    true
}

/// Recipients by state, and what is overdue longest.
pub(super) fn totals(reading: &Reading<'_>, now: Timestamp) -> Result<Totals> {
    let mut totals = Totals {
        unreadable: reading.cache.unreadable(),
        ..Totals::default()
    };
    let mut sql = reading
        .connection
        .prepare_cached("SELECT no FROM batch WHERE state<99 AND completed_at IS NULL")?;
    let open = sql.query_map([], |row| row.get(0))?;
    for no in open.collect::<rusqlite::Result<Vec<BatchNo>>>()? {
        let counters = super::record::read_counters(reading.connection, no)?;
        totals.scheduled += counters.scheduled;
        totals.queued += counters.queued;
        totals.temporary_error += counters.temporary_error;
        let Some(batch) = record(reading.connection, By::No(no))?.filter(|batch| batch.active())
        else {
            continue;
        };
        let first: Option<i64> = reading
            .connection
            .prepare_cached("SELECT MIN(due_at) FROM work WHERE batch=?1 AND due_at<=?2")?
            .query_row(params![no, now.millis()], |row| row.get(0))?;
        // A range of first attempts is due when its batch is.
        if let Some(first) = first.map(|first| ids::time(first).max(batch.release_at)) {
            totals.oldest_due = Some(totals.oldest_due.map_or(first, |oldest| oldest.min(first)));
        }
    }
    Ok(totals)
}
