//! Taking in what another store gave away, piece by piece, into a store that is empty.
//!
//! Until the last piece has come nobody else opens the store. Lots are written as at intake, and their
//! batch makes them visible. Must not start anything: what was not ended is paused.

use super::Inner;
use super::books::{Books, RetryKey};
use super::commit::Commit;
use super::keys::{self, HOME};
use super::link::{Link, answer};
use super::record::{
    BatchRecord, Holder, Kept, Piece as RangePiece, Range, fields, new_version, write_lot,
};
use super::stage::short_hash;
use crate::backup::{self, BatchPiece, LotPiece, Piece, Statuses};
use crate::erased::{self, Eraser};
use crate::{BatchHead, Result, StoreError, Suppression, Suspension};
use ::redis::{Cmd, Pipeline};
use model::{BatchState, Event, Partition, Timestamp};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

/// In `meta`: it is being filled.
const FILLING: &str = "filling";
/// Lots whose cells are read at once.
const LOTS: usize = 256;

/// Refuses a store that is not whole.
pub(super) async fn must_be_whole(link: &Link) -> Result<()> {
    let mut get = Cmd::new();
    get.arg("HEXISTS").arg(keys::meta(HOME)).arg(FILLING);
    if answer::number(link.short(&get).await?) == 0 {
        return Ok(());
    }
    Err(StoreError::Refused(
        "an import into it did not come to its end: empty it and import again".into(),
    ))
}

impl Inner {
    /// Takes a piece.
    pub(super) async fn import(&self, piece: Piece, now: Timestamp) -> Result<()> {
        match piece {
            Piece::Begin { partitions, .. } => self.begin_import(partitions).await,
            Piece::Setting { key, value } => {
                let mut set = Cmd::new();
                set.arg("HSET")
                    .arg(keys::settings(HOME))
                    .arg(&key)
                    .arg(&value);
                if key == erased::SETTING {
                    let mut eraser = self.eraser.write().unwrap_or_else(PoisonError::into_inner);
                    *eraser = Arc::new(Eraser::of(&value));
                }
                self.link.short(&set).await.map(drop)
            }
            Piece::Journal {
                journal,
                partition,
                through,
            } => {
                let mut set = Cmd::new();
                set.arg("HSET")
                    .arg(keys::journals(partition))
                    .arg(journal.to_string())
                    .arg(through);
                self.link.short(&set).await.map(drop)
            }
            Piece::Suppression(text) => {
                let entry: Suppression = backup::json(&text)?;
                self.restore_suppression(&entry).await
            }
            Piece::Consent(of) => self.restore_consent(&of).await,
            Piece::Suspension(text) => {
                let of: Suspension = backup::json(&text)?;
                self.suspend(of, now).await
            }
            Piece::Note {
                kind,
                key,
                value,
                expires_at,
            } => {
                let note = crate::Note {
                    kind: kind.into(),
                    key: key.into(),
                    value: value.into(),
                    expires_at,
                };
                let notes = backup::note_elsewhere(note).into_iter().collect();
                self.put_notes(notes, now).await
            }
            Piece::Lot(lot) => self.take_lot(&lot, now).await,
            Piece::Call(call) => self.restore_call(*call).await,
            Piece::Batch(batch) => self.take_batch(*batch, now).await,
            Piece::Events(told) => self.take_events(&told, now).await,
            Piece::End { .. } => {
                let mut del = Cmd::new();
                del.arg("HDEL").arg(keys::meta(HOME)).arg(FILLING);
                self.link.short(&del).await.map(drop)
            }
        }
    }

    async fn begin_import(&self, of: u16) -> Result<()> {
        if of != self.partitions {
            return Err(StoreError::Refused(format!(
                "the export has {of} partitions, this store was made with {}: set store.partitions = {of} and let it be made anew",
                self.partitions
            )));
        }
        for p in self.all_partitions() {
            let mut used = Cmd::new();
            used.arg("EXISTS")
                .arg(keys::batches(p))
                .arg(keys::journals(p))
                .arg(keys::suppressed(p))
                .arg(keys::consents(p))
                .arg(keys::event_counter(p));
            if answer::number(self.link.short(&used).await?) > 0 {
                return Err(StoreError::Refused(
                    "it is not empty: import into a new one".into(),
                ));
            }
        }
        let mut set = Cmd::new();
        set.arg("HSET").arg(keys::meta(HOME)).arg(FILLING).arg(1);
        self.link.short(&set).await.map(drop)
    }

    async fn take_lot(&self, lot: &LotPiece, now: Timestamp) -> Result<()> {
        let rows = lot.read_rows()?;
        let (p, batch, number) = (lot.number.partition(), lot.batch, lot.number.0);
        let hashes: Vec<u32> = rows
            .iter()
            .map(|row| match row.email.normalised() {
                name if erased::is_name(&name) => 0,
                email => short_hash(&email),
            })
            .collect();
        let overrides = rows.iter().any(|row| row.tracking.is_some());
        let mut books = Books::open(self, p, now);
        let commit = &mut books.commit;
        let bytes = write_lot(&lot.queue, overrides, &hashes, &lot.rows);
        commit.write("SET", keys::lot(p, batch, number), [bytes]);
        commit.write("SET", keys::cells(p, batch, number), [&lot.cells]);
        if !lot.facts.is_empty() {
            commit.write("RPUSH", keys::facts(p, batch, number), &lot.facts);
        }
        let count = u16::try_from(rows.len()).unwrap_or(u16::MAX).to_le_bytes();
        let entry = [&number.to_le_bytes()[..], &count[..]].concat();
        commit.write("APPEND", keys::lots(p, batch), [entry]);
        let indices = crate::form::pack_u32s(rows.iter().map(|row| row.index));
        commit.write(
            "HSET",
            keys::indices(p, batch),
            [number.to_string().into_bytes(), indices],
        );
        let of_queue = [b"0".to_vec(), keys::lot_member(batch, lot.number)];
        commit.write("ZADD", keys::lots_of(p, &lot.queue), of_queue);
        let waiting = lot.waiting(&rows)?;
        for (due_at, first, count) in waiting.spans {
            books.set_range(Range {
                version: new_version(),
                id: fastrand::u64(..),
                partition: p,
                batch,
                queue: lot.queue.as_str().into(),
                rank: 1,
                due_at,
                count,
                holder: Holder::Nobody,
                token: 0,
                expires: 0,
                window: 0,
                piece: RangePiece::Span {
                    lot: lot.number,
                    first,
                },
            });
        }
        for ((due_at, queue), refs) in waiting.retries {
            let key = RetryKey {
                batch,
                queue,
                rank: 1,
                due_at,
            };
            refs.into_iter().for_each(|of| books.retry(key.clone(), of));
        }
        let collected = super::books::Needs {
            ranges: books.retry_ranges(),
            ..super::books::Needs::default()
        };
        if !collected.ranges.is_empty() {
            books.load(&collected).await?;
            books.file_retries();
        }
        let (commit, _) = books.close(None, 0)?;
        commit.run(self, false).await.map(drop)
    }

    async fn take_events(&self, told: &[String], now: Timestamp) -> Result<()> {
        let mut parts: BTreeMap<Partition, Vec<Event>> = BTreeMap::new();
        for text in told {
            let event: Event = backup::json(text)?;
            let of = event.recipient.as_ref().map_or(HOME, |person| {
                Partition::of(
                    &event.account,
                    &person.email.to_lowercase(),
                    self.partitions,
                )
            });
            parts.entry(of).or_default().push(event);
        }
        for (p, events) in parts {
            let mut books = Books::open(self, p, now);
            events
                .into_iter()
                .for_each(|of| books.events.push_again(of));
            let (commit, _) = books.close(None, 0)?;
            commit.run(self, false).await?;
        }
        Ok(())
    }

    // ---- batches ------------------------------------------------------------------------

    async fn take_batch(&self, piece: BatchPiece, now: Timestamp) -> Result<()> {
        let id = piece.id;
        let head: BatchHead = backup::json(&piece.head)?;
        let total = u32::try_from(piece.accepted.saturating_add(piece.rejected))
            .map_err(|_| StoreError::Damaged("a batch of more than 2^32 recipients".into()))?;
        let mut lots = BTreeMap::new();
        let mut statuses = BTreeMap::new();
        for p in self.all_partitions() {
            let of = self.lots_in(p, id).await?;
            statuses.insert(p, self.statuses(p, id, &of).await?);
            lots.insert(p, of);
        }
        if !piece.retired {
            self.write_maps(id, &lots, total).await?;
            let mut set = Cmd::new();
            set.arg("SET")
                .arg(keys::of_batch(id, "content"))
                .arg(&piece.content);
            self.link.short(&set).await?;
        }
        let mut set = Cmd::new();
        set.arg("SET")
            .arg(keys::of_batch(id, "head"))
            .arg(&piece.head);
        self.link.short(&set).await?;
        if head.priority == model::Priority::Transactional {
            self.raise(id, now).await?;
        }
        let open: u64 = statuses.values().map(Statuses::open).sum();
        let mut state = piece.restored_state()?;
        let mut completed_at = piece.completed_at;
        if open == 0 && state == BatchState::Paused {
            // Its last outcome came while it was given away.
            state = BatchState::Completed;
            completed_at = Some(now);
        }
        let record = BatchRecord {
            version: [0; 8],
            state,
            released: piece.released,
            archived: piece.archived,
            kept: if piece.retired {
                Kept::Counters
            } else {
                Kept::Whole
            },
            priority: head.priority,
            tracking: head.tracking,
            revision: 1,
            release_at: head.release_at,
            started_at: piece.started_at,
            completed_at,
            accepted: piece.accepted,
            rejected: piece.rejected,
            paused_at: (state == BatchState::Paused && piece.released).then_some(now),
            paused_ms: 0,
        };
        for (p, cells) in &statuses {
            let cells = (!piece.retired).then_some(cells);
            self.write_batch(*p, &piece, &record, cells).await?;
        }
        Ok(())
    }

    async fn statuses(
        &self,
        p: Partition,
        id: model::BatchId,
        lots: &[(model::LotNumber, u32)],
    ) -> Result<Statuses> {
        let mut statuses = Statuses::default();
        for some in lots.chunks(LOTS) {
            let mut pipeline = Pipeline::new();
            for (lot, _) in some {
                pipeline.cmd("GET").arg(keys::cells(p, id, lot.0));
            }
            for cells in self.link.bulk(&pipeline).await? {
                statuses.add(&answer::bytes(cells).unwrap_or_default())?;
            }
        }
        Ok(statuses)
    }

    async fn write_batch(
        &self,
        p: Partition,
        piece: &BatchPiece,
        record: &BatchRecord,
        cells: Option<&Statuses>,
    ) -> Result<()> {
        let id = piece.id;
        let mut commit = Commit::new(p);
        commit.write("SET", keys::batch(p, id), [record.write(new_version())]);
        let mut counters = piece.counters_with(p, cells);
        let moves: Vec<(&'static str, i64)> = fields(&mut counters)
            .into_iter()
            .filter(|(_, value)| **value > 0)
            .map(|(name, value)| (name, i64::try_from(*value).unwrap_or(i64::MAX)))
            .collect();
        if !moves.is_empty() {
            commit.count(keys::counters(p, id), &moves, false);
        }
        commit.write::<&[u8]>("DEL", keys::indices(p, id), []);
        if p == HOME {
            let name = id.to_string().into_bytes();
            commit.write("ZADD", keys::batches(HOME), [&b"0"[..], &name]);
            if record.completed_at.is_none() {
                commit.write("ZADD", keys::open(HOME), [&b"0"[..], &name]);
            }
        }
        commit.run(self, false).await.map(drop)
    }
}
