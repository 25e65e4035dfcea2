//! Calls that must take effect once: who is at it, and what was answered.
//!
//! Must not know what is asked for.

use crate::backup::CallPiece;
use crate::{Begun, CALL_KEPT, CallKey, EndedCall, NewCall, Result, StoreError};
use model::{BatchId, BatchState, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, params};
use std::time::Duration;

/// Kept answers that are forgotten with each call that begins.
const FORGOTTEN: i64 = 16;

/// What is known of a call.
struct Known {
    fingerprint: Vec<u8>,
    attempt: Vec<u8>,
    until: i64,
    answer: Option<Vec<u8>>,
}

/// Begins or renews a call.
pub(super) fn begin(
    connection: &Connection,
    call: &NewCall,
    now: Timestamp,
    ttl: Duration,
) -> Result<Begun> {
    forget(connection, now)?;
    match known(connection, &call.key)? {
        Some(Known {
            answer: Some(answer),
            fingerprint,
            ..
        }) => {
            return Ok(if fingerprint == call.fingerprint {
                Begun::Done(answer.into())
            } else {
                Begun::Conflict
            });
        }
        Some(running)
            if running.until > now.millis() && running.attempt != call.attempt.to_bytes() =>
        {
            return Ok(Begun::Running);
        }
        Some(_) | None => {}
    }
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO call (account, key, fingerprint, attempt, until) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![
            call.key.account,
            call.key.key,
            call.fingerprint,
            call.attempt.to_bytes(),
            (now + ttl).millis()
        ])?;
    Ok(Begun::Fresh)
}

fn known(connection: &Connection, key: &CallKey) -> Result<Option<Known>> {
    let found = connection
        .prepare_cached(
            "SELECT fingerprint, attempt, until, answer FROM call WHERE account=?1 AND key=?2",
        )?
        .query_row(params![key.account, key.key], |row| {
            Ok(Known {
                fingerprint: row.get(0)?,
                attempt: row.get(1)?,
                until: row.get(2)?,
                answer: row.get(3)?,
            })
        })
        .optional()?;
    Ok(found)
}

/// Forgets some calls whose time is over: answers only when their batch has ended.
fn forget(connection: &Connection, now: Timestamp) -> Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM call WHERE rowid IN (
               SELECT call.rowid FROM call LEFT JOIN batch ON batch.id=call.batch
               WHERE call.until<=?1 AND (batch.state IS NULL OR batch.state IN (?2, ?3))
               ORDER BY call.until LIMIT ?4)",
        )?
        .execute(params![
            now.millis(),
            BatchState::Completed.code(),
            BatchState::Cancelled.code(),
            FORGOTTEN
        ])?;
    Ok(())
}

/// Keeps the answer of a call, in the step in which it takes effect on `batch`.
pub(super) fn end(
    connection: &Connection,
    call: &EndedCall,
    batch: BatchId,
    now: Timestamp,
) -> Result<()> {
    let kept = connection
        .prepare_cached(
            "UPDATE call SET answer=?4, batch=?5, until=?6
             WHERE account=?1 AND key=?2 AND attempt=?3 AND answer IS NULL",
        )?
        .execute(params![
            call.key.account,
            call.key.key,
            call.attempt.to_bytes(),
            &call.answer[..],
            batch.to_bytes(),
            (now + CALL_KEPT).millis()
        ])?;
    if kept == 0 {
        return Err(StoreError::Unavailable(
            "another try of the same call has taken over".to_owned(),
        ));
    }
    Ok(())
}

/// Looks at every answer that is kept.
pub(super) fn each(
    connection: &Connection,
    mut each: impl FnMut(CallPiece) -> Result<()>,
) -> Result<()> {
    let mut sql = connection.prepare(
        "SELECT account, key, fingerprint, attempt, until, batch, answer FROM call
         WHERE answer IS NOT NULL AND batch IS NOT NULL",
    )?;
    let mut rows = sql.query([])?;
    while let Some(row) = rows.next()? {
        each(CallPiece {
            account: row.get(0)?,
            key: row.get(1)?,
            fingerprint: row.get(2)?,
            attempt: BatchId::from_bytes(row.get(3)?),
            until: Timestamp::from_millis(row.get(4)?),
            batch: BatchId::from_bytes(row.get(5)?),
            answer: row.get(6)?,
        })?;
    }
    Ok(())
}

/// Keeps an answer of another store.
pub(super) fn restore(connection: &Connection, of: &CallPiece) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO call (account, key, fingerprint, attempt, until, batch, answer) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            of.account,
            of.key,
            of.fingerprint,
            of.attempt.to_bytes(),
            of.until.millis(),
            of.batch.to_bytes(),
            of.answer
        ])?;
    Ok(())
}

/// Makes room for another try.
pub(super) fn drop_call(connection: &Connection, key: &CallKey, attempt: BatchId) -> Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM call WHERE account=?1 AND key=?2 AND attempt=?3 AND answer IS NULL",
        )?
        .execute(params![key.account, key.key, attempt.to_bytes()])?;
    Ok(())
}

/// Calls of the process before, which had the store for itself. Before the writer starts.
pub(super) fn drop_leftovers(connection: &Connection) -> Result<()> {
    connection.execute("DELETE FROM call WHERE answer IS NULL", [])?;
    Ok(())
}
