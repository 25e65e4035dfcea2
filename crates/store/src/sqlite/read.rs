//! Readings of batches, of the backlog and of totals.
//!
//! Must not change anything.

use super::control::describe;
use super::ids::{self, BatchNo};
use super::range::TRANSACTIONAL;
use super::readers::Reading;
use super::record::{By, record};
use crate::{BACKLOG_BATCHES, Backlog, Batch, BatchQuery, Page, Result, Totals};
use model::{BatchId, BatchState, Timestamp};
use rusqlite::{OptionalExtension as _, params};
use std::collections::HashMap;
use std::sync::Arc;

/// Free ranges of a batch in a queue that are counted: more than a node wants at a time.
const COUNTED: usize = 64;
/// Ranges that are rather read than passed over with another search.
const PASSED: usize = 8;

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
    Active(BatchId),
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
        "SELECT no, state, id, release_at FROM batch WHERE state IN (?1, ?2, ?3, ?4, 99)",
    )?;
    let states = [
        BatchState::InProgress,
        BatchState::Scheduled,
        BatchState::Paused,
        BatchState::Open,
    ]
    .map(BatchState::code);
    let mut rows = sql.query(states)?;
    let mut all = HashMap::new();
    while let Some(row) = rows.next()? {
        let state: u8 = row.get(1)?;
        let standing = match BatchState::from_code(state) {
            Some(BatchState::InProgress) => Standing::Active(BatchId::from_bytes(row.get(2)?)),
            Some(BatchState::Scheduled) => Standing::Scheduled(row.get(3)?),
            _ => Standing::Still,
        };
        all.insert(row.get(0)?, standing);
    }
    Ok(all)
}

/// Looks for due ranges in the queues after `after`, in the order of an index that has all that is
/// needed. Of a batch in a queue so many are looked at as a node may want; the rest is passed over
/// without being read, so that the cost is that of the queues and batches, not of the recipients.
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
    let mut from = Group {
        queue: after.unwrap_or_default().into(),
        rank: u8::MAX,
        batch: BatchNo::MAX,
    };
    while let Some(passed) = survey_from(reading, &from, (now, limit), &standings, &mut survey)? {
        from = passed;
    }
    Ok(survey)
}

/// The ranges of a batch in a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    queue: Box<str>,
    rank: u8,
    batch: BatchNo,
}

/// What was found of a [`Group`].
#[derive(Default)]
struct Found {
    due: u64,
    free: usize,
    next: Option<i64>,
    /// Nothing more has to be known of it.
    done: bool,
    /// Ranges read after that.
    passed: usize,
}

/// The index in which the backlog is looked up.
const IN_ORDER: &str = "SELECT queue, rank, batch, due_at, expires, count FROM work \
    WHERE (queue, rank, batch) > (?1, ?2, ?3) ORDER BY queue, rank, batch, due_at, expires";

/// Reads on after `from`. The answer is the group to go on after, when it is not worth reading to
/// its end; `None`: that was all, or as many queues as are wanted.
fn survey_from(
    reading: &Reading<'_>,
    from: &Group,
    (now, limit): (i64, u32),
    standings: &HashMap<BatchNo, Standing>,
    survey: &mut Survey,
) -> Result<Option<Group>> {
    let mut sql = reading.connection.prepare_cached(IN_ORDER)?;
    let mut rows = sql.query(params![from.queue, from.rank, from.batch])?;
    let mut present: Option<(Group, Found)> = None;
    while let Some(row) = rows.next()? {
        let queue = row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?;
        let (rank, batch): (u8, BatchNo) = (row.get(1)?, row.get(2)?);
        let same =
            |group: &Group| *group.queue == *queue && (group.rank, group.batch) == (rank, batch);
        if !present.as_ref().is_some_and(|(group, _)| same(group)) {
            if let Some((group, found)) = present.take()
                && !tell(reading, &group, &found, (now, limit), standings, survey)?
            {
                return Ok(None);
            }
            let group = Group {
                queue: queue.into(),
                rank,
                batch,
            };
            present = Some((group, Found::default()));
        }
        let Some((group, found)) = &mut present else {
            continue;
        };
        if found.done {
            found.passed += 1;
            if found.passed >= PASSED {
                let group = group.clone();
                let more = tell(reading, &group, found, (now, limit), standings, survey)?;
                return Ok(more.then_some(group));
            }
            continue;
        }
        found.look((row.get(3)?, row.get(4)?), ids::nat(row.get(5)?), now);
    }
    if let Some((group, found)) = present {
        tell(reading, &group, &found, (now, limit), standings, survey)?;
    }
    Ok(None)
}

impl Found {
    /// Looks at the next range of the group, in order of due time.
    fn look(&mut self, (due_at, expires): (i64, i64), count: u64, now: i64) {
        if due_at > now {
            self.next = Some(due_at).filter(|at| *at < crate::HELD_BACK);
            self.done = true;
        } else if expires <= now {
            self.due += count;
            self.free += 1;
            self.done = self.free >= COUNTED;
        }
    }
}

/// Adds what was found of a group to the survey; false when that would be one queue too many.
fn tell(
    reading: &Reading<'_>,
    group: &Group,
    found: &Found,
    (now, limit): (i64, u32),
    standings: &HashMap<BatchNo, Standing>,
    survey: &mut Survey,
) -> Result<bool> {
    let (due, next, id) = match standings.get(&group.batch) {
        Some(Standing::Active(id)) => (found.due, found.next, Some(*id)),
        Some(Standing::Scheduled(at)) => (0, Some((*at).max(now)), None),
        Some(Standing::Still) => return Ok(true),
        // Cancelled or completed: ranges are left only until their holder reports or is gone.
        None => {
            if !survey.sweep.contains(&group.batch) && is_left(reading, group, now)? {
                survey.sweep.push(group.batch);
            }
            return Ok(true);
        }
    };
    if due == 0 && next.is_none() {
        return Ok(true);
    }
    let backlog = &mut survey.backlog;
    let full = u32::try_from(backlog.len()).is_ok_and(|count| count >= limit);
    if backlog.last().is_none_or(|last| last.queue != group.queue) {
        if full {
            return Ok(false);
        }
        backlog.push(Backlog {
            queue: group.queue.clone(),
            due: 0,
            next_due: None,
            transactional: false,
            batches: Vec::new(),
        });
    }
    if let Some(queue) = backlog.last_mut() {
        queue.due += due;
        queue.next_due = [queue.next_due, next.map(ids::time)]
            .into_iter()
            .flatten()
            .min();
        let id = id.filter(|_| due > 0);
        if group.rank == TRANSACTIONAL {
            queue.transactional |= id.is_some();
        } else if queue.batches.len() < BACKLOG_BATCHES {
            queue.batches.extend(id);
        }
    }
    Ok(true)
}

/// Whether nobody holds anything of a group any more.
fn is_left(reading: &Reading<'_>, group: &Group, now: i64) -> Result<bool> {
    let mut sql = reading
        .connection
        .prepare_cached("SELECT MAX(expires) FROM work WHERE queue=?1 AND rank=?2 AND batch=?3")?;
    let values = params![group.queue, group.rank, group.batch];
    let last: Option<i64> = sql.query_row(values, |row| row.get(0))?;
    Ok(last.is_some_and(|last| last <= now))
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// How the engine would find what a statement asks for, a line for each step.
    pub(in crate::sqlite) fn plan(connection: &rusqlite::Connection, sql: &str) -> String {
        let mut explain = connection
            .prepare(&format!("EXPLAIN QUERY PLAN {sql}"))
            .unwrap();
        let nulls = vec![rusqlite::types::Null; explain.parameter_count()];
        let details = explain
            .query_map(rusqlite::params_from_iter(nulls), |row| {
                row.get::<_, String>(3)
            })
            .unwrap();
        details.map(|line| line.unwrap() + "\n").collect()
    }

    /// What is asked several times a second never reads the ranges one by one.
    #[test]
    fn the_backlog_is_looked_up_in_order_of_its_index() {
        let connection = rusqlite::Connection::open_in_memory().unwrap();
        connection
            .execute_batch(include_str!("schema.sql"))
            .unwrap();
        let plan = plan(&connection, IN_ORDER);
        assert!(
            plan.contains("SEARCH work USING COVERING INDEX work_queue"),
            "{plan}"
        );
        assert!(!plan.contains("TEMP B-TREE"), "{plan}");
    }
}
