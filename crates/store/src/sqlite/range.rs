//! Ranges as they are stored: pieces of lots and of retry lots, with who holds them.
//!
//! Whether a recipient of a range was reported is said by its cell alone; references that are
//! behind their cell are skipped. Must not decide who gets a range: `lease` does.

use super::books::Books;
use super::ids::{self, BatchNo, LotId};
use super::writer::Step;
use crate::form::{self, Ref};
use crate::{RangeRef, Result, StoreError};
use model::{LotNumber, Partition, Status};
use rusqlite::{Connection, Row, params};
use serde_json::json;

/// The rank of what goes first.
pub(super) const TRANSACTIONAL: u8 = 0;
/// The rank of list mail.
pub(super) const BULK: u8 = 1;

/// What a range refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// `count` recipients of a lot from `first`, none of which had an attempt.
    Span { lot: LotNumber, first: u16 },
    /// These.
    Refs(Vec<Ref>),
}

/// A range as it is stored.
#[derive(Debug, Clone)]
pub(super) struct Range {
    pub(super) id: i64,
    pub(super) batch: BatchNo,
    pub(super) partition: Partition,
    pub(super) queue: Box<str>,
    pub(super) rank: u8,
    pub(super) due_at: i64,
    pub(super) count: u32,
    pub(super) held: bool,
    pub(super) token: u64,
    pub(super) expires: i64,
    pub(super) window: u32,
    pub(super) piece: Piece,
}

const COLUMNS: &str = "id, batch, partition, queue, due_at, count, holder IS NOT NULL, token, expires, window, lot, first, refs, rank";

fn read_range(row: &Row<'_>) -> rusqlite::Result<(Range, Option<Vec<u8>>)> {
    let lot: Option<u32> = row.get(10)?;
    let range = Range {
        id: row.get(0)?,
        batch: row.get(1)?,
        partition: Partition(row.get(2)?),
        queue: row.get::<_, String>(3)?.into(),
        rank: row.get(13)?,
        due_at: row.get(4)?,
        count: row.get(5)?,
        held: row.get(6)?,
        token: ids::nat(row.get(7)?),
        expires: row.get(8)?,
        window: row.get(9)?,
        piece: match lot {
            Some(lot) => Piece::Span {
                lot: LotNumber(lot),
                first: row.get(11)?,
            },
            None => Piece::Refs(Vec::new()),
        },
    };
    Ok((range, row.get(12)?))
}

/// Reads ranges.
pub(super) fn ranges(
    step: &Step<'_>,
    condition: &str,
    values: impl rusqlite::Params,
) -> Result<Vec<Range>> {
    let sql = format!("SELECT {COLUMNS} FROM work WHERE {condition}");
    let mut sql = step.connection.prepare_cached(&sql)?;
    let found = sql.query_map(values, read_range)?;
    found
        .map(|range| {
            let (mut range, refs) = range?;
            if let (Piece::Refs(all), Some(packed)) = (&mut range.piece, refs) {
                *all = form::unpack_refs(&packed)?;
            }
            Ok(range)
        })
        .collect()
}

/// Looks at every range of a batch, one at a time.
pub(super) fn parse(
    connection: &Connection,
    batch: BatchNo,
    mut each: impl FnMut(&Range),
) -> Result<()> {
    let sql = format!("SELECT {COLUMNS} FROM work WHERE batch=?1");
    let mut sql = connection.prepare_cached(&sql)?;
    let mut rows = sql.query([batch])?;
    while let Some(row) = rows.next()? {
        let (mut range, refs) = read_range(row)?;
        if let (Piece::Refs(all), Some(packed)) = (&mut range.piece, refs) {
            *all = form::unpack_refs(&packed)?;
        }
        each(&range);
    }
    Ok(())
}

impl Range {
    /// The recipients, with the attempts that each had when it was filed.
    pub(super) fn refs(&self) -> Vec<Ref> {
        match &self.piece {
            Piece::Refs(refs) => refs.clone(),
            Piece::Span { lot, first } => (*first..)
                .zip(0..self.count)
                .map(|(position, _)| Ref {
                    lot: *lot,
                    position,
                    attempts: 0,
                })
                .collect(),
        }
    }

    pub(super) fn lot_id(&self, of: Ref) -> LotId {
        ids::lot_id(self.batch, of.lot)
    }

    /// The recipients that nobody reported, with their offsets.
    pub(super) fn unreported(&self, books: &mut Books<'_, '_>) -> Result<Vec<(u32, Ref)>> {
        let mut open = Vec::new();
        for (offset, of) in (0_u32..).zip(self.refs()) {
            let cell = books.cell(self.lot_id(of), of.position)?;
            if cell.is_some_and(|cell| !cell.reported_since(of.attempts)) {
                open.push((offset, of));
            }
        }
        Ok(open)
    }

    /// Below which offset its holder may have started what is unreported.
    pub(super) const fn doubtful(&self) -> u32 {
        if self.held { self.window } else { 0 }
    }

    /// Notes in the cells what a holder that is gone may have started; where a cell cannot be
    /// read, nothing.
    pub(super) fn settle_lost(&mut self, books: &mut Books<'_, '_>) -> Result<()> {
        if !self.held {
            return Ok(());
        }
        for (offset, of) in (0_u32..).zip(self.refs()) {
            if offset >= self.window {
                break;
            }
            match mark(books, self.lot_id(of), of) {
                Ok(()) | Err(StoreError::Damaged(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.held = false;
        self.window = 0;
        Ok(())
    }

    /// A smaller range: these recipients of it.
    pub(super) fn part(&self, refs: Vec<Ref>) -> (Piece, u32) {
        let count = u32::try_from(refs.len()).unwrap_or(u32::MAX);
        let contiguous = refs
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.position.checked_add(1) == Some(b.position)));
        match (&self.piece, refs.first()) {
            (&Piece::Span { lot, .. }, Some(first)) if contiguous => {
                let first = first.position;
                (Piece::Span { lot, first }, count)
            }
            _ => (Piece::Refs(refs), count),
        }
    }
}

/// Notes that a holder that is gone may have started this, if it is unreported.
pub(super) fn mark(books: &mut Books<'_, '_>, lot: LotId, of: Ref) -> Result<()> {
    let cell = books.cell(lot, of.position)?;
    if let Some(mut cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) {
        cell.mark_maybe_started();
        books.set_cell(lot, of.position, cell)?;
    }
    Ok(())
}

pub(super) fn delete(step: &Step<'_>, id: i64) -> Result<()> {
    step.connection
        .prepare_cached("DELETE FROM work WHERE id=?1")?
        .execute([id])?;
    Ok(())
}

/// Who holds a range, and how long.
pub(super) struct Lease<'a> {
    pub(super) holder: Option<&'a [u8; 16]>,
    pub(super) token: u64,
    pub(super) expires: i64,
    pub(super) window: u32,
    pub(super) due_at: i64,
}

pub(super) fn write(
    step: &Step<'_>,
    range: &Range,
    id: Option<i64>,
    piece: (&Piece, u32),
    lease: &Lease<'_>,
) -> Result<i64> {
    let (lot, first, refs) = match piece.0 {
        Piece::Span { lot, first } => (Some(lot.0), Some(*first), None),
        Piece::Refs(refs) => (None, None, Some(form::pack_refs(refs))),
    };
    step.connection
        .prepare_cached(
            "INSERT OR REPLACE INTO work (id, batch, partition, queue, due_at, count, holder, token, expires, window, lot, first, refs, rank)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
        )?
        .execute(params![
            id,
            range.batch,
            range.partition.0,
            range.queue,
            lease.due_at,
            piece.1,
            lease.holder.map(|holder| &holder[..]),
            ids::int(lease.token),
            lease.expires,
            lease.window,
            lot,
            first,
            refs,
            range.rank,
        ])?;
    Ok(id.unwrap_or_else(|| step.connection.last_insert_rowid()))
}

pub(super) fn free<'a>(range: &Range, due_at: i64) -> Lease<'a> {
    Lease {
        holder: None,
        token: range.token,
        expires: 0,
        window: 0,
        due_at,
    }
}

/// Ends as cancelled what is unreported from the offset `from` on. The rest of the range stays
/// with its holder; a range of which nothing stays is removed. Whether something stays.
pub(super) fn cancel_range(books: &mut Books<'_, '_>, range: &Range, from: u32) -> Result<bool> {
    let mut something_stays = false;
    for (offset, of) in range.unreported(books)? {
        if offset < from {
            something_stays = true;
        } else {
            books.end_unsent(range.lot_id(of), of.position, Status::Cancelled, json!({}))?;
        }
    }
    if !something_stays {
        delete(books.step, range.id)?;
    }
    Ok(something_stays)
}

/// The range, if this lease on it was not followed by another.
pub(super) fn held(step: &Step<'_>, of: RangeRef) -> Result<Option<Range>> {
    let found = ranges(
        step,
        "id=?1 AND token=?2 AND holder IS NOT NULL",
        [ids::int(of.id), ids::int(of.token)],
    )?;
    Ok(found.into_iter().next())
}
