//! Retention: old events go, and the rows of batches that ended long ago.
//!
//! One step is bounded: some events of each partition, else a look at some batches and some lots of
//! one. A batch is marked before its rows go, so that readers find nobody in it whatever they have in
//! their caches. Must not decide what is old.

use super::Inner;
use super::books::Books;
use super::feeds::read_cursor;
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{BatchRecord, Kept};
use super::stage::{LIST_ENTRY, LOTS};
use crate::{EVENT_CURSORS, Result, Retire, Retired};
use ::redis::{Cmd, Pipeline};
use futures_util::future::try_join_all;
use model::{BatchId, Partition, Timestamp};

/// Events of a partition looked at in one step.
const EVENTS: u32 = 5_000;
/// Batches looked at in one step.
const BATCHES: usize = 256;

/// Where a run of retention is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Events,
    /// After this batch; `unbroken`: all before it are retired.
    Batches {
        after: Option<BatchId>,
        unbroken: bool,
    },
}

impl Stage {
    fn read(text: Option<&str>) -> Self {
        let Some(text) = text else {
            return Self::Events;
        };
        let mut parts = text.split(' ');
        match (parts.next(), parts.next(), parts.next()) {
            (Some("batches"), Some(unbroken), Some(after)) => Self::Batches {
                after: after.parse().ok(),
                unbroken: unbroken == "1",
            },
            _ => Self::Events,
        }
    }

    fn write(self) -> String {
        match self {
            Self::Events => "events".to_owned(),
            Self::Batches { after, unbroken } => {
                let after = after.map_or(String::new(), |id| id.to_string());
                format!("batches {} {after}", u8::from(unbroken))
            }
        }
    }
}

impl Inner {
    /// Takes one step.
    pub(super) async fn retire(&self, of: &Retire, now: Timestamp) -> Result<Retired> {
        match Stage::read(of.after.as_deref()) {
            Stage::Events => {
                let (events, ended) = self.trim_events(of.events_before, now).await?;
                let next = if ended {
                    Stage::Batches {
                        after: self.retired_through().await?,
                        unbroken: true,
                    }
                } else {
                    Stage::Events
                };
                Ok(Retired {
                    events,
                    next: Some(next.write()),
                    ..Retired::default()
                })
            }
            Stage::Batches { after, unbroken } => {
                self.retire_batches(of.batches_before, after, unbroken, now)
                    .await
            }
        }
    }

    // ---- events -------------------------------------------------------------------------

    /// Removes some old events of every partition; how many, and whether these were all.
    async fn trim_events(&self, before: Timestamp, now: Timestamp) -> Result<(u64, bool)> {
        // An event's number is the server's time in microseconds.
        let oldest = before.millis().saturating_mul(1_000).max(0);
        let mut floors = vec![u64::try_from(oldest).unwrap_or(0); usize::from(self.partitions)];
        for note in self.notes(EVENT_CURSORS, now).await? {
            let cursor = std::str::from_utf8(&note.value).unwrap_or_default();
            let Ok(read) = read_cursor(cursor, self.partitions) else {
                tracing::warn!(name = %note.key, "follows the events from nobody knows where: none is retired");
                return Ok((0, true));
            };
            for (floor, read) in floors.iter_mut().zip(read) {
                *floor = (*floor).min(read + 1);
            }
        }
        let parts = self
            .all_partitions()
            .zip(floors)
            .map(|(p, floor)| async move {
                let keys = [keys::events(p)];
                let arguments = [
                    floor.to_string().into_bytes(),
                    EVENTS.to_string().into_bytes(),
                ];
                let answer = self
                    .script(&self.scripts.trim, p, &keys, &arguments, false)
                    .await?;
                let mut parts = answer::list(answer).into_iter().map(answer::number);
                let gone = u64::try_from(parts.next().unwrap_or(0)).unwrap_or(0);
                Ok::<_, crate::StoreError>((gone, parts.next() == Some(1)))
            });
        let parts = try_join_all(parts).await?;
        let events = parts.iter().map(|(gone, _)| gone).sum();
        Ok((events, parts.iter().all(|(_, ended)| *ended)))
    }

    // ---- batches ------------------------------------------------------------------------

    /// Before which batch all are known to be retired.
    async fn retired_through(&self) -> Result<Option<BatchId>> {
        let mut get = Cmd::new();
        get.arg("HGET").arg(keys::meta(HOME)).arg("retired");
        let found = answer::bytes(self.link.short(&get).await?);
        Ok(found.and_then(|text| std::str::from_utf8(&text).ok()?.parse().ok()))
    }

    async fn retire_batches(
        &self,
        before: Timestamp,
        after: Option<BatchId>,
        mut unbroken: bool,
        now: Timestamp,
    ) -> Result<Retired> {
        let mut list = Cmd::new();
        list.arg("ZRANGEBYLEX")
            .arg(keys::batches(HOME))
            .arg(after.map_or("-".to_owned(), |id| format!("({id}")))
            // What ended before was accepted before.
            .arg(format!("[{}", BatchId::new(before, u128::MAX)))
            .arg("LIMIT")
            .arg(0)
            .arg(BATCHES);
        let ids = super::batches::batch_list(answer::list(self.link.short(&list).await?));
        let mut last = after;
        for (id, record) in ids.iter().zip(self.records(&ids).await?) {
            let old = |of: &BatchRecord| of.completed_at.is_some_and(|at| at < before);
            match record {
                Some(record) if record.kept == Kept::Counters => {}
                Some(record) if old(&record) => {
                    let stage = Stage::Batches {
                        after: last,
                        unbroken,
                    };
                    self.note_retired(last.filter(|_| unbroken)).await?;
                    let retired = self.retire_batch(*id, &record, now).await?;
                    return Ok(Retired {
                        next: Some(stage.write()),
                        ..retired
                    });
                }
                _ => {
                    self.note_retired(last.filter(|_| unbroken)).await?;
                    unbroken = false;
                }
            }
            last = Some(*id);
        }
        self.note_retired(last.filter(|_| unbroken)).await?;
        let stage = Stage::Batches {
            after: last,
            unbroken,
        };
        let next = (ids.len() == BATCHES).then(|| stage.write());
        Ok(Retired {
            next,
            ..Retired::default()
        })
    }

    /// The next run begins after this batch.
    async fn note_retired(&self, through: Option<BatchId>) -> Result<()> {
        let Some(through) = through else {
            return Ok(());
        };
        let mut note = Cmd::new();
        note.arg("HSET")
            .arg(keys::meta(HOME))
            .arg("retired")
            .arg(through.to_string());
        self.link.short(&note).await.map(drop)
    }

    /// Removes some of what is left of a batch.
    async fn retire_batch(
        &self,
        batch: BatchId,
        record: &BatchRecord,
        now: Timestamp,
    ) -> Result<Retired> {
        let mut retired = Retired::default();
        if record.kept == Kept::Whole {
            self.mark_kept(batch, record, Kept::Going, now).await?;
            return Ok(retired);
        }
        for p in self.all_partitions() {
            let lots = self.lots_in(p, batch).await?;
            let some = lots.get(..LOTS.min(lots.len())).unwrap_or_default();
            if some.is_empty() {
                continue;
            }
            self.forget_lots(p, batch, some).await?;
            self.shorten_list(p, batch, some.len() == lots.len(), some.len())
                .await?;
            retired.recipients = some.iter().map(|(_, rows)| u64::from(*rows)).sum();
            return Ok(retired);
        }
        // One after the other: on a Cluster these are not where the batch is.
        for what in ["map", "content"] {
            let mut unlink = Cmd::new();
            unlink.arg("UNLINK").arg(keys::of_batch(batch, what));
            self.link.short(&unlink).await?;
        }
        if self.mark_kept(batch, record, Kept::Counters, now).await? {
            retired.batches = 1;
        }
        Ok(retired)
    }

    /// Takes the lots that are gone from the front of the list.
    async fn shorten_list(
        &self,
        p: Partition,
        batch: BatchId,
        all: bool,
        gone: usize,
    ) -> Result<()> {
        let key = keys::lots(p, batch);
        let mut pipeline = Pipeline::new();
        if all {
            pipeline.cmd("UNLINK").arg(&key);
        } else {
            pipeline
                .cmd("GETRANGE")
                .arg(&key)
                .arg(gone * LIST_ENTRY)
                .arg(-1);
        }
        let answers = self.link.bulk(&pipeline).await?;
        if let (false, Some(rest)) = (all, answers.into_iter().next().and_then(answer::bytes)) {
            // Nobody else changes the list of a batch that was committed.
            let mut set = Cmd::new();
            set.arg("SET").arg(&key).arg(rest);
            self.link.short(&set).await?;
        }
        Ok(())
    }

    /// Writes what is left of a batch; false when it was changed meanwhile.
    async fn mark_kept(
        &self,
        batch: BatchId,
        before: &BatchRecord,
        kept: Kept,
        now: Timestamp,
    ) -> Result<bool> {
        let after = BatchRecord {
            kept,
            revision: before.revision + 1,
            ..before.clone()
        };
        let books = Books::open(self, HOME, now);
        self.write_home(books, batch, before, &after, 0).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_reads_back() {
        let id = BatchId::from_bytes([3; 16]);
        for after in [None, Some(id)] {
            for unbroken in [false, true] {
                let stage = Stage::Batches { after, unbroken };
                assert_eq!(Stage::read(Some(&stage.write())), stage);
            }
        }
        assert_eq!(Stage::read(None), Stage::Events);
        assert_eq!(Stage::read(Some(&Stage::Events.write())), Stage::Events);
    }
}
