//! What nodes share beside mail: notes, job leases, suspensions of destinations.
//!
//! Must not read a note's value, nor know what a job does.

use super::books::Books;
use super::ids;
use super::writer::Step;
use crate::{Control, Note, Page, Result, Suspension};
use model::{JournalId, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use std::sync::Arc;
use std::time::Duration;

/// Writes notes, and forgets those that have expired.
pub(super) fn put_notes(connection: &Connection, notes: Vec<Note>, now: Timestamp) -> Result<()> {
    connection
        .prepare_cached("DELETE FROM note WHERE expires_at<=?1")?
        .execute([now.millis()])?;
    // Not REPLACE: what is there stays in its place.
    let mut put = connection.prepare_cached(
        "INSERT INTO note VALUES (?1, ?2, ?3, ?4) ON CONFLICT (kind, key)
         DO UPDATE SET value=excluded.value, expires_at=excluded.expires_at",
    )?;
    for note in notes {
        note.check()?;
        if note.value.is_empty() {
            connection
                .prepare_cached("DELETE FROM note WHERE kind=?1 AND key=?2")?
                .execute(params![note.kind, note.key])?;
            continue;
        }
        let expires_at = note.expires_at.map(Timestamp::millis);
        put.execute(params![note.kind, note.key, &note.value[..], expires_at])?;
    }
    Ok(())
}

/// Writes a note, unless it is no longer what it was.
pub(super) fn swap_note(
    connection: &Connection,
    note: Note,
    before: Option<&[u8]>,
    now: Timestamp,
) -> Result<bool> {
    let found = self::note(connection, &note.kind, &note.key, now)?;
    if found.as_ref().map(|found| &*found.value) != before {
        return Ok(false);
    }
    put_notes(connection, vec![note], now)?;
    Ok(true)
}

/// The notes of a kind.
pub(super) fn notes(connection: &Connection, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
    let mut sql = connection.prepare_cached(
        "SELECT key, value, expires_at FROM note
         WHERE kind=?1 AND (expires_at IS NULL OR expires_at>?2) ORDER BY key",
    )?;
    let kind = kind.into();
    let found = sql.query_map(params![kind, now.millis()], |row| read_note(&kind, row))?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}

/// Found by kind and key, however many others there are.
const FROM_KEY: &str =
    "SELECT key, value, expires_at FROM note WHERE kind=?1 AND key>=?2 ORDER BY key";
/// Notes that nobody asked for which are read before the next that is wanted is looked for.
const BETWEEN: usize = 1;

/// One note.
pub(super) fn note(
    connection: &Connection,
    kind: &str,
    key: &str,
    now: Timestamp,
) -> Result<Option<Note>> {
    Ok(notes_by_key(connection, kind, vec![key.into()], now)?.pop())
}

/// The notes of these keys, as far as they are there, in order. Neighbours among them are read in one
/// go, and what lies between two that are there is known to be missing without being looked for.
pub(super) fn notes_by_key(
    connection: &Connection,
    kind: &str,
    mut keys: Vec<Box<str>>,
    now: Timestamp,
) -> Result<Vec<Note>> {
    let mut sql = connection.prepare_cached(FROM_KEY)?;
    let kind: Arc<str> = kind.into();
    keys.sort_unstable();
    keys.dedup();
    let mut found = Vec::with_capacity(keys.len());
    let mut keys = keys.into_iter().peekable();
    while let Some(next) = keys.peek() {
        let mut rows = sql.query(params![kind, next])?;
        let mut between = 0;
        while between <= BETWEEN {
            let Some(row) = rows.next()? else {
                return Ok(found);
            };
            let key = row.get_ref(0)?.as_str().map_err(rusqlite::Error::from)?;
            while keys.next_if(|wanted| **wanted < *key).is_some() {}
            if keys.next_if(|wanted| **wanted == *key).is_some() {
                let note = read_note(&kind, row)?;
                found.extend(Some(note).filter(|of| of.expires_at.is_none_or(|at| at > now)));
                between = 0;
            } else {
                between += 1;
            }
            if keys.peek().is_none() {
                return Ok(found);
            }
        }
    }
    Ok(found)
}

fn read_note(kind: &Arc<str>, row: &Row<'_>) -> rusqlite::Result<Note> {
    Ok(Note {
        kind: kind.clone(),
        key: row.get::<_, String>(0)?.into(),
        value: row.get::<_, Vec<u8>>(1)?.into(),
        expires_at: row.get::<_, Option<i64>>(2)?.map(ids::time),
    })
}

/// Notes of a kind after a key.
pub(super) fn notes_after(
    connection: &Connection,
    kind: &str,
    after: Option<&str>,
    limit: u32,
    now: Timestamp,
) -> Result<Page<Note>> {
    let mut sql = connection.prepare_cached(
        "SELECT key, value, expires_at FROM note
         WHERE kind=?1 AND key>?2 AND (expires_at IS NULL OR expires_at>?3) ORDER BY key LIMIT ?4",
    )?;
    let (kind, after) = (kind.into(), after.unwrap_or_default());
    let wanted = params![kind, after, now.millis(), limit];
    let found = sql.query_map(wanted, |row| read_note(&kind, row))?;
    let items: Vec<Note> = found.collect::<rusqlite::Result<_>>()?;
    let full = items.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
    let last = items.last().filter(|_| full);
    Ok(Page {
        next: last.map(|note| note.key.to_string()),
        items,
    })
}

/// Takes or renews the lease on a job.
pub(super) fn job_lease(
    connection: &Connection,
    job: &str,
    node: JournalId,
    now: Timestamp,
    ttl: Duration,
) -> Result<Option<u64>> {
    let node = node.to_bytes();
    let found: Option<(Vec<u8>, i64, i64)> = connection
        .prepare_cached("SELECT holder, token, expires FROM job WHERE name=?1")?
        .query_row([job], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    let token = match found {
        Some((holder, token, expires)) if expires > now.millis() => {
            if holder != node {
                return Ok(None);
            }
            token
        }
        Some((_, token, _)) => token + 1,
        None => 1,
    };
    connection
        .prepare_cached("INSERT OR REPLACE INTO job VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![job, node, token, (now + ttl).millis()])?;
    Ok(Some(ids::nat(token)))
}

/// Keeps mail from a destination.
pub(super) fn suspend(step: &mut Step<'_>, of: Suspension, now: Timestamp) -> Result<()> {
    step.connection
        .prepare_cached("DELETE FROM suspension WHERE until<=?1")?
        .execute([now.millis()])?;
    step.connection
        .prepare_cached("INSERT OR REPLACE INTO suspension VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![
            of.destination,
            of.until.map(Timestamp::millis),
            of.reason,
            of.by,
            of.since.millis()
        ])?;
    tell(step, &Control::DestinationSuspended(of), now)
}

/// Lets mail go to a destination again.
pub(super) fn resume(step: &mut Step<'_>, destination: &str, now: Timestamp) -> Result<bool> {
    let held = suspensions(step.connection, now)?
        .iter()
        .any(|of| *of.destination == *destination);
    step.connection
        .prepare_cached("DELETE FROM suspension WHERE destination=?1")?
        .execute([destination])?;
    if held {
        tell(step, &Control::DestinationResumed(destination.into()), now)?;
    }
    Ok(held)
}

fn tell(step: &mut Step<'_>, item: &Control, now: Timestamp) -> Result<()> {
    let mut books = Books::open(step, now);
    books.tell(item)?;
    books.close(None).map(drop)
}

/// The suspensions that hold.
pub(super) fn suspensions(connection: &Connection, now: Timestamp) -> Result<Vec<Suspension>> {
    let mut sql = connection.prepare_cached(
        "SELECT destination, until, reason, by, since FROM suspension
         WHERE until IS NULL OR until>?1 ORDER BY destination",
    )?;
    let found = sql.query_map([now.millis()], |row| {
        Ok(Suspension {
            destination: row.get::<_, String>(0)?.into(),
            until: row.get::<_, Option<i64>>(1)?.map(ids::time),
            reason: row.get::<_, String>(2)?.into(),
            by: row.get::<_, String>(3)?.into(),
            since: ids::time(row.get(4)?),
        })
    })?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::read::tests::plan;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    fn connection() -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection
            .execute_batch(include_str!("schema-2.sql"))
            .unwrap();
        connection
    }

    /// Engagement asks for a person with every delivery: a scan of all people would be felt.
    #[test]
    fn a_note_is_found_by_its_key() {
        let plan = plan(&connection(), FROM_KEY);
        assert!(plan.contains("PRIMARY KEY (kind=? AND key>?)"), "{plan}");
        assert!(!plan.contains("TEMP"), "{plan}");
    }

    proptest! {
        #[test]
        fn those_are_found_that_are_there_and_asked_for(
            there in btree_map(0..60_u32, any::<bool>(), 0..40),
            wanted in vec(0..60_u32, 0..40),
        ) {
            let (connection, now) = (connection(), Timestamp::from_millis(1_000));
            let key = |number: u32| Box::from(format!("{number:02}"));
            let note = |kind: &str, number: u32, expired: bool| Note {
                kind: kind.into(),
                key: key(number),
                value: number.to_le_bytes().into(),
                expires_at: expired.then_some(now),
            };
            let of = |kind| there.iter().map(move |(number, expired)| note(kind, *number, *expired));
            let notes = of("a").chain((0..60).map(|number| note("b", number, false)));
            put_notes(&connection, notes.collect(), Timestamp::from_millis(0)).unwrap();
            let asked = wanted.iter().map(|number| key(*number)).collect();
            let found = notes_by_key(&connection, "a", asked, now).unwrap();
            let expected = of("a").filter(|note| note.expires_at.is_none());
            let expected = expected.filter(|note| wanted.iter().any(|of| key(*of) == note.key));
            prop_assert_eq!(found, expected.collect::<Vec<_>>());
        }
    }
}
