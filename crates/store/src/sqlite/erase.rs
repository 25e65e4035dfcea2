//! Erasing a person: their rows, what happened to them, and what was told of them.
//!
//! In bounded steps, each of which may be taken again: first the suppression that stays, then the lots
//! that may have the address, then the events, then the control feed. A recipient who was erased says
//! so in its cell, so that no fact that comes later brings the person back. Must not decide who.

use super::books::Books;
use super::ids::{self, LotId};
use super::suppress;
use super::writer::Step;
use crate::erased::{self, Eraser};
use crate::form::{self, EventBlock, LogBlock, StoredEvent, version};
use crate::{Control, Erase, Erased, MIXED, Result, StoreError, Suppression};
use model::{About, Event, EventKind, SuppressionReason, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, params};
use std::time::Duration;

/// Lots looked through in one step, and of these rewritten.
const LOTS: u32 = 2_000;
const REWRITTEN: usize = 8;
/// Blocks of events looked through in one step.
const BLOCKS: u32 = 64;
/// Every node has read a control item of that age.
const HEARD: Duration = Duration::from_secs(600);

/// Where an erasure is.
enum Stage {
    Suppression,
    /// Below this lot.
    Lots(LotId),
    /// After this block.
    Events(i64),
    Control,
}

impl Stage {
    fn read(text: Option<&str>) -> Self {
        let Some(text) = text else {
            return Self::Suppression;
        };
        let (name, number) = text.split_once(' ').unwrap_or((text, ""));
        let number = number.parse().ok();
        match (name, number) {
            ("lots", Some(below)) => Self::Lots(below),
            ("events", Some(after)) => Self::Events(after),
            ("control", _) => Self::Control,
            _ => Self::Suppression,
        }
    }

    fn write(&self) -> String {
        match self {
            Self::Suppression => "suppression".to_owned(),
            Self::Lots(below) => format!("lots {below}"),
            Self::Events(after) => format!("events {after}"),
            Self::Control => "control".to_owned(),
        }
    }
}

/// The store's key, made with the schema.
pub(super) fn eraser(connection: &Connection) -> Result<Eraser> {
    let key: Option<String> = connection
        .prepare_cached("SELECT value FROM setting WHERE key=?1")?
        .query_row([erased::SETTING], |row| row.get(0))
        .optional()?;
    let key = key.ok_or_else(|| StoreError::Damaged("it has lost its erasure key".into()))?;
    Ok(Eraser::of(&key))
}

/// Takes one step.
pub(super) fn erase(step: &mut Step<'_>, of: &Erase, now: Timestamp) -> Result<Erased> {
    // Pages that become free are overwritten.
    step.connection.pragma_update(None, "secure_delete", true)?;
    let done = match Stage::read(of.after.as_deref()) {
        Stage::Suppression => {
            keep_suppression(step, of, now).map(|()| (0, Some(Stage::Lots(i64::MAX))))
        }
        Stage::Lots(below) => erase_lots(step, of, below, now),
        Stage::Events(after) => erase_events(step, of, after, now),
        Stage::Control => erase_control(step, of, now).map(|()| (0, None)),
    };
    step.connection
        .pragma_update(None, "secure_delete", false)?;
    let (recipients, next) = done?;
    Ok(Erased {
        recipients,
        next: next.map(|stage| stage.write()),
    })
}

/// The one suppression that stays, in place of all others.
fn keep_suppression(step: &mut Step<'_>, of: &Erase, now: Timestamp) -> Result<()> {
    let known = suppress::of_address(step.connection, &of.account, &of.email)?;
    for list in known
        .iter()
        .filter(|old| old.reason != SuppressionReason::Erased)
    {
        step.connection
            .prepare_cached("DELETE FROM suppression WHERE account=?1 AND email=?2 AND list=?3")?
            .execute(params![
                of.account,
                of.email,
                list.list.as_deref().unwrap_or_default()
            ])?;
    }
    if known
        .iter()
        .any(|old| old.reason == SuppressionReason::Erased)
    {
        return Ok(());
    }
    let entry = Suppression {
        email: of.email.clone(),
        account: of.account.clone(),
        list: None,
        reason: SuppressionReason::Erased,
        source: "erasure".into(),
        created_at: now,
    };
    let mut books = Books::open(step, now);
    suppress::add(&mut books, entry, false)?;
    books.close(None).map(drop)
}

// ---- lots -------------------------------------------------------------------------------

fn erase_lots(
    step: &mut Step<'_>,
    of: &Erase,
    below: LotId,
    now: Timestamp,
) -> Result<(u64, Option<Stage>)> {
    let domain = of.email.rsplit_once('@').map_or("", |(_, domain)| domain);
    let hash = crate::address_hash(&of.email);
    let (mut looked, mut last) = (0_u32, below);
    let mut found: Vec<LotId> = Vec::new();
    {
        let mut sql = step.connection.prepare_cached(
            "SELECT id, hashes FROM lot WHERE queue IN (?1, ?2) AND id<?3 ORDER BY id DESC LIMIT ?4",
        )?;
        let mut lots = sql.query(params![domain, MIXED, below, LOTS])?;
        while found.len() < REWRITTEN
            && let Some(lot) = lots.next()?
        {
            let (id, hashes): (LotId, Vec<u8>) = (lot.get(0)?, lot.get(1)?);
            (looked, last) = (looked + 1, id);
            if form::unpack_u32s(&hashes).any(|of| of == hash) {
                found.push(id);
            }
        }
    }
    let full = looked == LOTS || found.len() == REWRITTEN;
    let mut recipients = 0;
    for lot in found {
        recipients += erase_in(step, of, lot, now)?;
    }
    let next = if full {
        Stage::Lots(last)
    } else {
        Stage::Events(0)
    };
    Ok((recipients, Some(next)))
}

/// Erases the person in a lot, if it is there and of the account; how many recipients.
fn erase_in(step: &mut Step<'_>, of: &Erase, lot: LotId, now: Timestamp) -> Result<u64> {
    let committed =
        super::record::record(step.connection, super::record::By::No(ids::split(lot).0))?;
    if committed.is_none()
        || step.cache.head(step.connection, ids::split(lot).0)?.account != of.account
    {
        return Ok(0);
    }
    let (packed, mut hashes): (Vec<u8>, Vec<u8>) = step
        .connection
        .prepare_cached("SELECT packed, hashes FROM lot WHERE id=?1")?
        .query_row([lot], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let mut rows: Vec<model::Row> = form::unpack_rows(&packed)?;
    let mut positions = Vec::new();
    for (position, row) in (0_u16..).zip(&mut rows) {
        if row.email.normalised() == of.email {
            *row = erased::row(row);
            let at = usize::from(position) * 4;
            hashes.get_mut(at..at + 4).unwrap_or_default().fill(0);
            positions.push(position);
        }
    }
    if positions.is_empty() {
        return Ok(0);
    }
    let mut books = Books::open(step, now);
    for &position in &positions {
        books.erase(lot, position)?;
    }
    books.close(None)?;
    let packed = step.memory.packer.pack_rows(&rows)?;
    step.connection
        .prepare_cached("UPDATE lot SET packed=?2, hashes=?3 WHERE id=?1")?
        .execute(params![lot, packed, hashes])?;
    erase_facts(step, lot, &positions)?;
    step.cache.forget_lot(lot);
    Ok(u64::try_from(positions.len()).unwrap_or(0))
}

fn erase_facts(step: &mut Step<'_>, lot: LotId, positions: &[u16]) -> Result<()> {
    let blocks: Vec<(i64, Vec<u8>)> = {
        let mut sql = step
            .connection
            .prepare_cached("SELECT id, data FROM lot_log WHERE lot=?1")?;
        let found = sql.query_map([lot], |row| Ok((row.get(0)?, row.get(1)?)))?;
        found.collect::<rusqlite::Result<_>>()?
    };
    for (id, packed) in blocks {
        let mut block: LogBlock = form::unpack_log(&packed)?;
        let mut theirs = block
            .entries
            .iter_mut()
            .filter(|entry| positions.contains(&entry.position))
            .peekable();
        if theirs.peek().is_none() {
            continue;
        }
        theirs.for_each(erased::blank);
        let packed = step.memory.packer.pack_log(&block)?;
        step.connection
            .prepare_cached("UPDATE lot_log SET data=?2 WHERE id=?1")?
            .execute(params![id, packed])?;
    }
    Ok(())
}

// ---- what was told ----------------------------------------------------------------------

/// Events of facts are gone with the facts; what names the person by itself is taken out here.
fn erase_events(
    step: &mut Step<'_>,
    of: &Erase,
    after: i64,
    now: Timestamp,
) -> Result<(u64, Option<Stage>)> {
    let mask = [
        EventKind::SuppressionAdded,
        EventKind::SuppressionRemoved,
        EventKind::EmailSuppressed,
        EventKind::EmailCancelled,
        EventKind::EmailReplied,
        EventKind::Conversion,
        EventKind::IdentityBound,
        EventKind::IdentityConflict,
        EventKind::IdentityRevoked,
    ]
    .iter()
    .fold(1_i64 << form::TOLD_BIT, |mask, kind| {
        mask | 1 << kind.code()
    });
    let blocks: Vec<(i64, i64, Vec<u8>)> = {
        let mut sql = step.connection.prepare_cached(
            "SELECT id, kinds & ?2, data FROM event WHERE id>?1 ORDER BY id LIMIT ?3",
        )?;
        let found = sql.query_map(params![after, mask, BLOCKS], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
        found.collect::<rusqlite::Result<_>>()?
    };
    let Some((last, ..)) = blocks.last() else {
        return Ok((0, Some(Stage::Control)));
    };
    let next = Stage::Events(*last);
    for (id, _, packed) in blocks.iter().filter(|(_, kinds, _)| *kinds != 0) {
        let mut block: EventBlock = form::unpack(version::EVENTS, packed)?;
        let before = block.clone();
        let mut books = Books::open(step, now);
        for event in &mut block.events {
            let gone = match event {
                StoredEvent::Address { account, email, .. } => {
                    *account == of.account && email.to_lowercase() == of.email
                }
                StoredEvent::Unsent { lot, position, .. } => books
                    .cell(*lot, *position)?
                    .is_some_and(|cell| cell.erased()),
                StoredEvent::Told(text) => {
                    let event: Event = crate::backup::json(text)?;
                    event.account == of.account
                        && event
                            .recipient
                            .is_some_and(|person| person.email.to_lowercase() == of.email)
                }
                StoredEvent::Announced { account, about, .. } => {
                    let about: About = serde_json::from_str(about).unwrap_or_default();
                    let theirs = about.recipient.map(|person| person.email.to_lowercase());
                    *account == of.account && theirs.as_deref() == Some(&of.email)
                }
                StoredEvent::Fact { .. }
                | StoredEvent::Batch { .. }
                | StoredEvent::Account { .. }
                | StoredEvent::Gone => false,
            };
            if gone {
                *event = StoredEvent::Gone;
            }
        }
        drop(books);
        if block != before {
            let packed = step.memory.packer.pack(version::EVENTS, &block)?;
            step.connection
                .prepare_cached("UPDATE event SET data=?2 WHERE id=?1")?
                .execute(params![id, packed])?;
        }
    }
    Ok((0, Some(next)))
}

/// Items that every node has read no longer say who it was.
fn erase_control(step: &Step<'_>, of: &Erase, now: Timestamp) -> Result<()> {
    let items: Vec<(i64, String)> = {
        let mut sql = step
            .connection
            .prepare_cached("SELECT id, item FROM control WHERE at<?1 AND instr(item, ?2)")?;
        let found = sql.query_map(params![(now - HEARD).millis(), of.email], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
        found.collect::<rusqlite::Result<_>>()?
    };
    let nothing = serde_json::to_string(&Control::Work)
        .map_err(|error| StoreError::Damaged(format!("a control item: {error}")))?;
    for (id, item) in items {
        if serde_json::from_str::<Control>(&item)
            .is_ok_and(|item| item.is_about(&of.account, &of.email))
        {
            step.connection
                .prepare_cached("UPDATE control SET item=?2 WHERE id=?1")?
                .execute(params![id, nothing])?;
        }
    }
    Ok(())
}
