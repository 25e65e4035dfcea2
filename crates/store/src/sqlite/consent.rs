//! What people let be kept of them at most, under the names that stand for their addresses.
//!
//! Must not say what follows from it: shipments and leases do.

use super::{erase, ids};
use crate::backup::ConsentPiece;
use crate::{Consent, Result, StoreError};
use model::{Partition, Timestamp, TrackingMode};
use rusqlite::{Connection, OptionalExtension as _, params};

/// Whether anybody said anything.
pub(super) fn any(connection: &Connection) -> Result<bool> {
    let mut sql = connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM consent)")?;
    Ok(sql.query_row([], |row| row.get(0))?)
}

/// What the person under this name said.
pub(super) fn under(connection: &Connection, account: &str, name: &str) -> Result<Option<Consent>> {
    let mut sql = connection
        .prepare_cached("SELECT mode, since FROM consent WHERE account=?1 AND name=?2")?;
    let found: Option<(u8, i64)> = sql
        .query_row([account, name], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    found
        .map(|(mode, since)| {
            Ok(Consent {
                mode: read_mode(mode)?,
                since: ids::time(since),
            })
        })
        .transpose()
}

fn read_mode(code: u8) -> Result<TrackingMode> {
    let mode = TrackingMode::from_code(code);
    mode.ok_or_else(|| StoreError::Damaged(format!("tracking mode {code} of a person")))
}

/// What each of these people said.
pub(super) fn of(
    connection: &Connection,
    account: &str,
    emails: &[String],
) -> Result<Vec<Option<Consent>>> {
    if !any(connection)? {
        return Ok(vec![None; emails.len()]);
    }
    let eraser = erase::eraser(connection)?;
    let of = |email: &String| under(connection, account, &eraser.name(account, email));
    emails.iter().map(of).collect()
}

/// Notes what a person says, in place of what was said before, or that it no longer holds. Whether
/// something was said before.
pub(super) fn set(
    connection: &Connection,
    partitions: u16,
    (account, email): (&str, &str),
    mode: Option<TrackingMode>,
    now: Timestamp,
) -> Result<bool> {
    let name = erase::eraser(connection)?.name(account, email);
    let gone = connection
        .prepare_cached("DELETE FROM consent WHERE account=?1 AND name=?2")?
        .execute([account, &name])?;
    if let Some(mode) = mode {
        let consent = ConsentPiece {
            partition: Partition::of(account, email, partitions),
            account: account.to_owned(),
            name,
            mode: mode.code(),
            since: now,
        };
        restore(connection, &consent)?;
    }
    Ok(gone > 0)
}

/// Writes what another store has noted.
pub(super) fn restore(connection: &Connection, of: &ConsentPiece) -> Result<()> {
    read_mode(of.mode)?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO consent VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![
            of.account,
            of.name,
            of.partition.0,
            of.mode,
            of.since.millis()
        ])?;
    Ok(())
}

/// Looks at all.
pub(super) fn each(
    connection: &Connection,
    mut each: impl FnMut(ConsentPiece) -> Result<()>,
) -> Result<()> {
    let mut sql =
        connection.prepare_cached("SELECT account, name, partition, mode, since FROM consent")?;
    let mut rows = sql.query([])?;
    while let Some(row) = rows.next()? {
        each(ConsentPiece {
            account: row.get(0)?,
            name: row.get(1)?,
            partition: Partition(row.get(2)?),
            mode: row.get(3)?,
            since: ids::time(row.get(4)?),
        })?;
    }
    Ok(())
}
