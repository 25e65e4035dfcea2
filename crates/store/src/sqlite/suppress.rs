//! Suppressions: kept by account, address and list; found by the hash of account and address.
//!
//! Must not decide whom to suppress.

use super::books::Books;
use super::erase;
use super::ids;
use crate::{BatchHead, Control, Page, Result, StoreError, Suppression, SuppressionQuery};
use model::{EventKind, Priority, SuppressionReason, Timestamp, partition_hash};
use rusqlite::{Connection, Row, params};
use serde_json::json;

const COLUMNS: &str = "account, email, list, reason, source, created_at";

fn read(row: &Row<'_>) -> rusqlite::Result<Suppression> {
    let list: String = row.get(2)?;
    Ok(Suppression {
        account: row.get(0)?,
        email: row.get(1)?,
        list: (!list.is_empty()).then_some(list),
        reason: SuppressionReason::from_code(row.get(3)?).unwrap_or(SuppressionReason::Manual),
        source: row.get(4)?,
        created_at: ids::time(row.get(5)?),
    })
}

fn hash(account: &str, email: &str) -> i64 {
    i64::from_le_bytes(partition_hash(account, email).to_le_bytes())
}

/// Whether the account has any suppression.
pub(super) fn any(connection: &Connection, account: &str) -> Result<bool> {
    Ok(connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM suppression WHERE account=?1)")?
        .query_row([account], |row| row.get(0))?)
}

/// All suppressions of an address; one that is left of an erasure is kept under a name.
pub(super) fn of_address(
    connection: &Connection,
    account: &str,
    email: &str,
) -> Result<Vec<Suppression>> {
    let mut all = kept_under(connection, account, email)?;
    let name = erase::eraser(connection)?.name(account, email);
    let erased = kept_under(connection, account, &name)?;
    all.extend(erased.into_iter().map(|entry| Suppression {
        email: email.to_owned(),
        ..entry
    }));
    Ok(all)
}

fn kept_under(connection: &Connection, account: &str, name: &str) -> Result<Vec<Suppression>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM suppression WHERE hash=?1 AND account=?2 AND email=?3 ORDER BY list"
    );
    let mut sql = connection.prepare_cached(&sql)?;
    let found = sql.query_map(params![hash(account, name), account, name], read)?;
    Ok(found.collect::<rusqlite::Result<_>>()?)
}

/// Why mail of this batch must not go to the address; `None` when it may.
pub(super) fn stopping(
    connection: &Connection,
    head: &BatchHead,
    email: &str,
) -> Result<Option<SuppressionReason>> {
    let all = of_address(connection, &head.account, email)?;
    let stopping = all
        .iter()
        .find(|entry| entry.stops(&head.list, head.priority));
    Ok(stopping.map(|entry| entry.reason))
}

/// Adds a suppression with its event and control item. One that stops less than what is there
/// for the same account, address and list changes nothing when `only_stronger`.
pub(super) fn add(
    books: &mut Books<'_, '_>,
    entry: Suppression,
    only_stronger: bool,
) -> Result<()> {
    let list = entry.list.clone().unwrap_or_default();
    if only_stronger {
        let known = of_address(books.step.connection, &entry.account, &entry.email)?;
        let stops = |of: &Suppression| of.stops(&list, Priority::Transactional);
        if known.iter().any(|old| {
            old.list == entry.list && (old.reason == entry.reason || stops(old) && !stops(&entry))
        }) {
            return Ok(());
        }
    }
    let name = erase::eraser(books.step.connection)?.kept_under(&entry);
    books
        .step
        .connection
        .prepare_cached(
            "INSERT INTO suppression (hash, account, email, list, reason, source, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (account, email, list) DO UPDATE SET reason=excluded.reason, source=excluded.source, created_at=excluded.created_at",
        )?
        .execute(params![
            hash(&entry.account, &name),
            entry.account,
            name,
            list,
            entry.reason.code(),
            entry.source,
            entry.created_at.millis(),
        ])?;
    if entry.reason != SuppressionReason::Erased {
        let data =
            json!({ "reason": entry.reason.as_str(), "list": entry.list, "source": entry.source });
        books.address_event(
            EventKind::SuppressionAdded,
            &entry.account,
            &entry.email,
            &data,
        );
    }
    books.tell(&Control::Suppressed(entry))
}

/// Looks at every suppression, under the name under which it is kept.
pub(super) fn each(
    connection: &Connection,
    mut each: impl FnMut(Suppression) -> Result<()>,
) -> Result<()> {
    let sql = format!("SELECT {COLUMNS} FROM suppression ORDER BY id");
    let mut sql = connection.prepare(&sql)?;
    let mut rows = sql.query([])?;
    while let Some(row) = rows.next()? {
        each(read(row)?)?;
    }
    Ok(())
}

/// Writes a suppression of another store as it was kept there; nobody is told.
pub(super) fn restore(connection: &Connection, entry: &Suppression) -> Result<()> {
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO suppression (hash, account, email, list, reason, source, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            hash(&entry.account, &entry.email),
            entry.account,
            entry.email,
            entry.list.as_deref().unwrap_or_default(),
            entry.reason.code(),
            entry.source,
            entry.created_at.millis(),
        ])?;
    Ok(())
}

/// Removes those of an address: of one list, or all.
pub(super) fn remove(
    books: &mut Books<'_, '_>,
    account: &str,
    email: &str,
    list: Option<&str>,
) -> Result<u32> {
    let known = of_address(books.step.connection, account, email)?;
    let eraser = erase::eraser(books.step.connection)?;
    let mut removed = 0;
    for entry in known
        .iter()
        .filter(|entry| list.is_none() || entry.list.as_deref() == list)
    {
        books
            .step
            .connection
            .prepare_cached("DELETE FROM suppression WHERE account=?1 AND email=?2 AND list=?3")?
            .execute(params![
                account,
                eraser.kept_under(entry),
                entry.list.as_deref().unwrap_or_default()
            ])?;
        let data =
            json!({ "reason": entry.reason.as_str(), "list": entry.list, "source": entry.source });
        books.address_event(EventKind::SuppressionRemoved, account, email, &data);
        removed += 1;
    }
    if removed > 0 {
        books.tell(&Control::Unsuppressed {
            account: account.to_owned(),
            email: email.to_owned(),
            list: list.map(str::to_owned),
        })?;
    }
    Ok(removed)
}

/// Suppressions of an account in order of address and list.
pub(super) fn page(connection: &Connection, query: &SuppressionQuery) -> Result<Page<Suppression>> {
    if let Some(email) = &query.email {
        let items = of_address(connection, &query.account, email)?;
        return Ok(Page { items, next: None });
    }
    // The cursor is the last address and its list; neither has a space.
    let (email, list) = match query.after.as_deref() {
        None => ("", ""),
        Some(cursor) => cursor
            .split_once(' ')
            .filter(|(email, _)| email.contains('@'))
            .ok_or_else(|| StoreError::Refused("is no cursor of suppressions".into()))?,
    };
    let limit = query.limit.clamp(1, 1_000);
    let sql = format!(
        "SELECT {COLUMNS} FROM suppression WHERE account=?1 AND (email, list) > (?2, ?3) ORDER BY email, list LIMIT ?4"
    );
    let mut sql = connection.prepare_cached(&sql)?;
    let found = sql.query_map(params![query.account, email, list, limit], read)?;
    let items: Vec<Suppression> = found.collect::<rusqlite::Result<_>>()?;
    let full = u32::try_from(items.len()).is_ok_and(|count| count == limit);
    let next = items.last().filter(|_| full).map(|last| {
        format!(
            "{} {}",
            last.email,
            last.list.as_deref().unwrap_or_default()
        )
    });
    Ok(Page { items, next })
}

/// Adds suppressions by hand: each replaces what is there.
pub(super) fn put(books: &mut Books<'_, '_>, entries: Vec<Suppression>) -> Result<()> {
    entries
        .into_iter()
        .try_for_each(|entry| add(books, entry, false))
}

/// The suppression that an attempt or an unsubscribe asks for.
pub(super) fn entry(
    account: &str,
    email: String,
    list: Option<String>,
    reason: SuppressionReason,
    source: &str,
    at: Timestamp,
) -> Suppression {
    Suppression {
        email,
        account: account.to_owned(),
        list,
        reason,
        source: source.to_owned(),
        created_at: at,
    }
}
