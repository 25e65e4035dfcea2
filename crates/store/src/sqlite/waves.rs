//! Waves of a batch with variants: each is released by itself, in short steps.
//!
//! What a step takes is moved whole: status, variant, counters and the time from which it may be
//! leased. So it does not matter where a process ends, nor how many do this at once. Must not decide
//! when, or who gets what.

use super::books::Books;
use super::ids::{self, BatchNo};
use super::range::{Piece, Range, ranges};
use super::record::{By, record};
use super::writer::{Step, Writer};
use crate::{Control, HELD_BACK, Result, StoreError, WAVES, Wave};
use model::{BatchId, Timestamp};
use rusqlite::params;

/// Ranges of one step.
const RANGES: i64 = 64;

/// Releases a wave; how many recipients were moved now.
pub(super) async fn release(
    writer: &Writer,
    id: BatchId,
    wave: u32,
    how: Wave,
    now: Timestamp,
) -> Result<u64> {
    let begun = writer.write(move |step| begin(step, id, wave, how)).await?;
    let Some((no, how)) = begun else {
        return Ok(0);
    };
    let (mut moved, mut after) = (0, Some(0));
    while let Some(from) = after {
        let how = how.clone();
        let (some, next) = writer
            .write(move |step| release_some(step, (no, wave), from, &how, now))
            .await?;
        moved += some;
        after = next;
    }
    Ok(moved)
}

/// Says how the wave is released, unless that was said before; `None` when it cannot be.
fn begin(
    step: &mut Step<'_>,
    id: BatchId,
    wave: u32,
    how: Wave,
) -> Result<Option<(BatchNo, Wave)>> {
    let Some(batch) = record(step.connection, By::Id(id.to_bytes()))?.filter(|of| of.released)
    else {
        return Ok(None);
    };
    let mut head = step.cache.head(step.connection, batch.no)?.as_ref().clone();
    let place = usize::try_from(wave).unwrap_or(usize::MAX);
    let waves = head.variants.as_mut().map(|of| &mut of.waves);
    let Some(own) = waves.and_then(|waves| waves.get_mut(place)) else {
        return Ok(None);
    };
    if let Some(said) = own {
        return Ok(Some((batch.no, said.clone())));
    }
    *own = Some(how.clone());
    let text = serde_json::to_string(&head)
        .map_err(|error| StoreError::Refused(format!("a head that cannot be kept: {error}")))?;
    step.connection
        .prepare_cached("UPDATE batch SET head=?2 WHERE no=?1")?
        .execute(params![batch.no, text])?;
    Ok(Some((batch.no, how)))
}

/// One step: some ranges after `after`; how many recipients, and where to go on.
fn release_some(
    step: &mut Step<'_>,
    (no, wave): (BatchNo, u32),
    after: i64,
    how: &Wave,
    now: Timestamp,
) -> Result<(u64, Option<i64>)> {
    let some = ranges(
        step,
        "batch=?1 AND due_at=?2 AND lot%?3=?4 AND id>?5 ORDER BY id LIMIT ?6",
        params![no, HELD_BACK, WAVES, wave, after, RANGES],
    )?;
    let next = some.last().map(|range| range.id);
    let mut books = Books::open(step, now);
    let batch = books.batch(no)?.map(|batch| batch.id);
    let batch = batch.ok_or_else(|| StoreError::Damaged(format!("batch {no} is gone")))?;
    let mut moved = 0;
    for range in &some {
        moved += release_range(&mut books, batch, range, how)?;
        books
            .step
            .connection
            .prepare_cached("UPDATE work SET due_at=?2 WHERE id=?1")?
            .execute([range.id, how.at.millis()])?;
    }
    if moved > 0 {
        books.tell(&Control::Work)?;
    }
    books.close(None)?;
    Ok((moved, next))
}

fn release_range(
    books: &mut Books<'_, '_>,
    batch: BatchId,
    range: &Range,
    how: &Wave,
) -> Result<u64> {
    let Piece::Span { lot, .. } = range.piece else {
        return Ok(0);
    };
    let (mut moved, variant) = (0, how.in_lot(batch, lot));
    for of in range.refs() {
        let lot = ids::lot_id(range.batch, of.lot);
        let Some(mut cell) = books.cell(lot, of.position)? else {
            continue;
        };
        let variant = variant(of.position);
        if books.count(lot, |counters| cell.release(variant, counters))? {
            books.set_cell(lot, of.position, cell)?;
            moved += 1;
        }
    }
    Ok(moved)
}
