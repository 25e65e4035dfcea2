//! Readings of unfinished work: whose it is, when it is due, who holds it.
//!
//! For people who ask why mail does not move; nothing on the way of a message asks this. Must not
//! change anything.

use super::ids::{self, BatchNo};
use super::readers::Reading;
use crate::{Held, Result, StoreError, Work, WorkScope};
use model::{BatchId, BatchState, JournalId, Timestamp};
use rusqlite::{Connection, ToSql, params};
use std::collections::HashMap;

/// Holders told of, over all queues of one answer.
const HOLDERS: u32 = 1_000;

/// Holders by queue and batch.
type Holders = HashMap<(Box<str>, BatchNo), Vec<Held>>;

/// Unfinished recipients of a batch by queue, or of a queue by batch; the most first.
pub(super) fn work(
    reading: &Reading<'_>,
    scope: &WorkScope,
    now: Timestamp,
    limit: u32,
) -> Result<Vec<Work>> {
    let connection = reading.connection;
    let (which, of): (&str, Box<dyn ToSql>) = match scope {
        WorkScope::Batch(batch) => (
            "work.batch=(SELECT no FROM batch WHERE id=?1)",
            Box::new(batch.to_bytes()),
        ),
        WorkScope::Queue(queue) => ("work.queue=?1", Box::new(queue.to_string())),
    };
    let mut holders = holders(connection, which, &*of, now)?;
    let mut sql = connection.prepare_cached(&format!(
        "SELECT work.queue, work.batch, batch.id, batch.state, batch.release_at,
                SUM(CASE WHEN expires<=?2 AND due_at<=?2 THEN count ELSE 0 END),
                SUM(CASE WHEN expires<=?2 AND due_at>?2 THEN count ELSE 0 END),
                MIN(CASE WHEN expires<=?2 AND due_at>?2 THEN due_at END)
         FROM work JOIN batch ON batch.no=work.batch WHERE {which} AND batch.state<99
         GROUP BY work.queue, work.batch ORDER BY SUM(count) DESC LIMIT ?3"
    ))?;
    let mut rows = sql.query(params![&*of, now.millis(), limit])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let queue: Box<str> = row.get::<_, String>(0)?.into();
        let no: BatchNo = row.get(1)?;
        let state: u8 = row.get(3)?;
        let state = BatchState::from_code(state)
            .ok_or_else(|| StoreError::Damaged(format!("a batch has the state {state}")))?;
        found.push(Work {
            batch: BatchId::from_bytes(row.get(2)?),
            state,
            release_at: ids::time(row.get(4)?),
            due: ids::nat(row.get(5)?),
            later: ids::nat(row.get(6)?),
            next_due: row
                .get::<_, Option<i64>>(7)?
                .filter(|at| *at < crate::HELD_BACK)
                .map(ids::time),
            held: holders.remove(&(queue.clone(), no)).unwrap_or_default(),
            queue,
        });
    }
    Ok(found)
}

fn holders(
    connection: &Connection,
    which: &str,
    of: &dyn ToSql,
    now: Timestamp,
) -> Result<Holders> {
    let mut sql = connection.prepare_cached(&format!(
        "SELECT queue, batch, holder, SUM(count), MAX(expires) FROM work
         WHERE {which} AND expires>?2 AND holder IS NOT NULL
         GROUP BY queue, batch, holder ORDER BY SUM(count) DESC LIMIT ?3"
    ))?;
    let mut rows = sql.query(params![of, now.millis(), HOLDERS])?;
    let mut found = Holders::new();
    while let Some(row) = rows.next()? {
        let queue: Box<str> = row.get::<_, String>(0)?.into();
        let held = Held {
            node: JournalId::from_bytes(row.get(2)?),
            recipients: ids::nat(row.get(3)?),
            until: ids::time(row.get(4)?),
        };
        found.entry((queue, row.get(1)?)).or_default().push(held);
    }
    Ok(found)
}
