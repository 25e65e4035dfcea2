//! Retention: old events go, and the rows of batches that ended long ago.
//!
//! One step is bounded: some blocks of events, else some pieces of one batch. A batch goes when none
//! of its events is left, since events refer to its rows. The map of its indices goes first: from then
//! on readers find nobody in it. Must not decide what is old.

use super::control;
use super::events::{ORDINAL_BITS, ORDINALS, read_cursor};
use super::ids::{self, BatchNo};
use super::shared;
use super::writer::Step;
use crate::form::{self, EventBlock, version};
use crate::{EVENT_CURSORS, Result, Retire, Retired};
use model::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, params};

/// Blocks of events removed in one step.
const BLOCKS: i64 = 64;
/// Lots removed in one step.
const LOTS: i64 = 32;
/// Pieces of the index map removed in one step: 512,000 recipients.
const PIECES: i64 = 500;

/// What `batch.retired` says.
const GOING: i64 = 1;
const GONE: i64 = 2;

/// Takes one step.
pub(super) fn retire(step: &Step<'_>, of: &Retire, now: Timestamp) -> Result<Retired> {
    let connection = step.connection;
    if of.after.is_none() {
        control::trim(connection, now.millis() - control::KEPT)?;
    }
    let more = Some("more".to_owned());
    if let Some(events) = trim(connection, of.events_before, now)? {
        return Ok(Retired {
            events,
            next: more,
            ..Retired::default()
        });
    }
    let Some(no) = candidate(connection, of.batches_before)? else {
        return Ok(Retired::default());
    };
    Ok(Retired {
        next: more,
        ..go_on(connection, no)?
    })
}

/// Removes some blocks of events from the front; how many events they had, `None` when there was
/// none to remove.
fn trim(connection: &Connection, before: Timestamp, now: Timestamp) -> Result<Option<u64>> {
    let read = read_by_all(connection, now)?;
    let mut sql = connection
        .prepare_cached("SELECT id, recorded_at, data FROM event ORDER BY id LIMIT ?1")?;
    let mut blocks = sql.query([BLOCKS])?;
    let (mut last, mut events) = (None, 0);
    while let Some(block) = blocks.next()? {
        let (id, recorded_at): (i64, i64) = (block.get(0)?, block.get(1)?);
        if recorded_at >= before.millis() || id > read {
            break;
        }
        last = Some(id);
        let packed: Vec<u8> = block.get(2)?;
        // What cannot be read is as old as the rest.
        let told = form::unpack::<EventBlock>(version::EVENTS, &packed);
        events += told.map_or(0, |block| u64::try_from(block.events.len()).unwrap_or(0));
    }
    let Some(last) = last else {
        return Ok(None);
    };
    connection
        .prepare_cached("DELETE FROM event WHERE id<=?1")?
        .execute([last])?;
    Ok(Some(events))
}

/// The block through which everybody has read who said where it is.
fn read_by_all(connection: &Connection, now: Timestamp) -> Result<i64> {
    let mut through = i64::MAX;
    for note in shared::notes(connection, EVENT_CURSORS, now)? {
        let cursor = std::str::from_utf8(&note.value).unwrap_or_default();
        let block = match read_cursor(cursor) {
            Ok(seq) if seq & ORDINALS == ORDINALS => seq >> ORDINAL_BITS,
            // Perhaps not all of the last one.
            Ok(seq) => (seq >> ORDINAL_BITS) - 1,
            Err(_) => {
                tracing::warn!(name = %note.key, "follows the events from nobody knows where: none is retired");
                0
            }
        };
        through = through.min(block);
    }
    Ok(through)
}

/// A batch that ended before this time and of which no event is left.
fn candidate(connection: &Connection, before: Timestamp) -> Result<Option<BatchNo>> {
    Ok(connection
        .prepare_cached(
            "SELECT no FROM batch WHERE completed_at IS NOT NULL AND retired<2 AND completed_at<?1
             AND last_event<COALESCE((SELECT MIN(id) FROM event), ?2) ORDER BY completed_at LIMIT 1",
        )?
        .query_row(params![before.millis(), i64::MAX], |row| row.get(0))
        .optional()?)
}

/// Removes some of what is left of a batch.
fn go_on(connection: &Connection, no: BatchNo) -> Result<Retired> {
    let mut retired = Retired::default();
    let (first, last) = ids::lot_range(no);
    let mut mark = connection.prepare_cached("UPDATE batch SET retired=?2 WHERE no=?1")?;
    mark.execute([no, GOING])?;
    // The pieces of a map are numbered as lots are.
    let pieces = connection
        .prepare_cached(
            "DELETE FROM index_map WHERE id IN (SELECT id FROM index_map WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3)",
        )?
        .execute([first, last, PIECES])?;
    if pieces > 0 {
        return Ok(retired);
    }
    let (until, recipients): (Option<i64>, Option<i64>) = connection
        .prepare_cached(
            "SELECT MAX(id), SUM(count) FROM (SELECT id, count FROM lot WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3)",
        )?
        .query_row([first, last, LOTS], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if let Some(until) = until {
        for sql in [
            "DELETE FROM lot WHERE id BETWEEN ?1 AND ?2",
            "DELETE FROM cell WHERE lot BETWEEN ?1 AND ?2",
            "DELETE FROM lot_log WHERE lot BETWEEN ?1 AND ?2",
        ] {
            connection.prepare_cached(sql)?.execute([first, until])?;
        }
        retired.recipients = ids::nat(recipients.unwrap_or(0));
        return Ok(retired);
    }
    for sql in [
        "DELETE FROM work WHERE batch=?1",
        "DELETE FROM content WHERE batch=?1",
    ] {
        connection.prepare_cached(sql)?.execute([no])?;
    }
    mark.execute([no, GONE])?;
    retired.batches = 1;
    Ok(retired)
}
