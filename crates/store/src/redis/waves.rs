//! Waves of a batch with variants: each is released by itself, in short steps.
//!
//! First the head says how; then ranges are moved, some in one step, with their recipients' status,
//! variant and counters. So it does not matter where a process ends, nor how many do this at once.
//! Must not decide when, or who gets what.

use super::Inner;
use super::books::{Books, Needs};
use super::commit::Outcome;
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{Piece, Range};
use crate::{BatchHead, Control, HELD_BACK, Result, StoreError, Wave, wave_of};
use ::redis::Cmd;
use model::{BatchId, Partition, Timestamp};

/// Ranges of one step.
const RANGES: usize = 32;

impl Inner {
    /// Releases a wave; how many recipients were moved now.
    pub(super) async fn release_wave(
        &self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> Result<u64> {
        let released = self.home(batch).await?.is_some_and(|of| of.released);
        let place = usize::try_from(wave).unwrap_or(usize::MAX);
        if !released {
            return Ok(0);
        }
        let Some(how) = self.say_how(batch, place, how).await? else {
            return Ok(0);
        };
        let mut moved = 0;
        for p in self.all_partitions() {
            let ids = self.held_back(p, batch).await?;
            for some in ids.chunks(RANGES) {
                let mut tries = self.tries();
                while tries.again().await? {
                    let done = self.move_wave(p, (batch, place), some, &how, now).await?;
                    if let Some(some) = done {
                        moved += some;
                        break;
                    }
                }
            }
        }
        Ok(moved)
    }

    /// Says in the head how the wave is released, unless that was said before; `None` when it
    /// cannot be.
    async fn say_how(&self, batch: BatchId, wave: usize, how: Wave) -> Result<Option<Wave>> {
        let key = keys::of_batch(batch, "head");
        let mut tries = self.tries();
        while tries.again().await? {
            let mut get = Cmd::new();
            get.arg("GET").arg(&key);
            let Some(before) = answer::bytes(self.link.short(&get).await?) else {
                return Ok(None);
            };
            let damaged = |error| StoreError::Damaged(format!("the head of {batch}: {error}"));
            let mut head: BatchHead = serde_json::from_slice(&before).map_err(damaged)?;
            let waves = head.variants.as_mut().map(|of| &mut of.waves);
            let Some(own) = waves.and_then(|waves| waves.get_mut(wave)) else {
                return Ok(None);
            };
            if let Some(said) = own {
                return Ok(Some(said.clone()));
            }
            *own = Some(how.clone());
            let after = serde_json::to_vec(&head).map_err(damaged)?;
            let keys = [key.clone()];
            let swapped = self
                .script(&self.scripts.swap, HOME, &keys, &[before, after], true)
                .await?;
            if answer::number(swapped) == 1 {
                return Ok(Some(how));
            }
        }
        Ok(None)
    }

    /// The ranges of a batch that wait for their wave.
    async fn held_back(&self, p: Partition, batch: BatchId) -> Result<Vec<u64>> {
        let mut find = Cmd::new();
        find.arg("ZRANGEBYSCORE")
            .arg(keys::ranges(p, batch))
            .arg(HELD_BACK)
            .arg(HELD_BACK);
        let names = answer::list(self.link.short(&find).await?);
        let id = |name| keys::read_range_name(&answer::bytes(name)?);
        Ok(names.into_iter().filter_map(id).collect())
    }

    /// One step: those of these ranges that are of the wave. How many recipients; `None` when
    /// something was changed meanwhile.
    async fn move_wave(
        &self,
        p: Partition,
        (batch, wave): (BatchId, usize),
        ids: &[u64],
        how: &Wave,
        now: Timestamp,
    ) -> Result<Option<u64>> {
        let mut books = self.books_with(p, now, ids).await?;
        let of_wave = |id: &u64| {
            let range = books.range(*id).filter(|of| of.due_at == HELD_BACK)?;
            match range.piece {
                Piece::Span { lot, .. } if wave_of(lot) == wave => Some(range.clone()),
                Piece::Span { .. } | Piece::Refs(_) => None,
            }
        };
        let found: Vec<Range> = ids.iter().filter_map(of_wave).collect();
        if found.is_empty() {
            return Ok(Some(0));
        }
        let mut needs = Needs::default();
        for range in &found {
            let lots = range.refs().into_iter().map(|of| (batch, of.lot));
            needs.cells.extend(lots);
        }
        books.load(&needs).await?;
        let mut moved = 0;
        for range in found {
            moved += release_range(&mut books, &range, how)?;
            books.set_range(Range {
                due_at: how.at.millis(),
                ..range
            });
        }
        books.tell(Control::Work);
        let (commit, _) = books.close(None, 0)?;
        let done = commit.run(self, true).await? != Outcome::Conflict;
        if done {
            self.wrote();
        }
        Ok(done.then_some(moved))
    }
}

fn release_range(books: &mut Books<'_>, range: &Range, how: &Wave) -> Result<u64> {
    let Piece::Span { lot, .. } = range.piece else {
        return Ok(0);
    };
    let (mut moved, variant) = (0, how.in_lot(range.batch, lot));
    for of in range.refs() {
        let key = (range.batch, of.lot);
        let Some(mut cell) = books.cell(key, of.position)? else {
            continue;
        };
        let variant = variant(of.position);
        if books.count(range.batch, |counters| cell.release(variant, counters)) {
            books.set_cell(key, of.position, cell);
            moved += 1;
        }
    }
    Ok(moved)
}
