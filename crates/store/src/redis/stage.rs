//! Intake: lots are staged in their final form, invisible because their batch has no record; the
//! commit writes what never changes, then the batch.
//!
//! Order of a commit, so that a process may end anywhere: content, index map and head; the copies
//! of the batch in the other partitions, not yet active; the batch itself, with its events, which
//! makes all of it visible; the copies again, now as the batch is. Whoever finds copies behind
//! brings them forward (`batches`).

use super::Inner;
use super::books::Books;
use super::cache::{MAP_CHUNK, MAP_ENTRY};
use super::commit::{Commit, Outcome, not_replicated, wait};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{BatchRecord, Holder, Kept, Piece, Range, lot_queue, new_version, write_lot};
use super::server;
use crate::form::Packer;
use crate::transition::Cell;
use crate::{Control, LOT_ROWS, NewBatch, NewLot, Result, StoreError, form};
use ::redis::{Cmd, Pipeline};
use model::{BatchId, BatchState, EventKind, LotNumber, Partition, Timestamp};
use serde_json::json;
use std::collections::BTreeMap;

/// Indices mapped in one pass: 24 MB.
const PASS: u32 = 4 << 20;
/// Pieces of the index map written at once.
const PIECES: usize = 64;
/// Lots read or deleted at once.
pub(super) const LOTS: usize = 128;
/// The last byte of a lot that may belong to what comes before its rows: the name of its queue.
const LOT_HEAD: usize = 4 + LOT_ROWS * 4 + 2 + 512;
/// Bytes of an entry in the list of lots: number and count.
pub(super) const LIST_ENTRY: usize = 6;
/// What is staged and was not touched for so long was left by a process that is gone.
const LEFT: i64 = 6 * 60 * 60 * 1000;

/// The low half of the hash of an address: what finds it in a lot. Without its account, which is
/// known only at the commit.
pub(super) fn short_hash(email: &str) -> u32 {
    crate::address_hash(email)
}

/// A lot in its stored form.
pub(super) struct PackedLot {
    pub(super) number: LotNumber,
    queue: Box<str>,
    pub(super) rows: usize,
    pub(super) indices: Vec<u8>,
    pub(super) bytes: Vec<u8>,
    pub(super) cells: Vec<u8>,
    in_waves: bool,
}

fn pack(lot: &NewLot, packer: &mut Packer) -> Result<PackedLot> {
    if lot.rows.is_empty() || lot.rows.len() > LOT_ROWS {
        return Err(StoreError::Refused(format!(
            "a lot of {} recipients",
            lot.rows.len()
        )));
    }
    let hash = |row: &model::Row| short_hash(&row.email.normalised());
    let hashes: Vec<u32> = lot.rows.iter().map(hash).collect();
    let overrides = lot.rows.iter().any(|row| row.tracking.is_some());
    Ok(PackedLot {
        number: lot.number,
        queue: lot.queue.clone(),
        rows: lot.rows.len(),
        cells: Cell::fresh(lot.rows.len(), &lot.variants),
        in_waves: !lot.variants.is_empty(),
        indices: form::pack_u32s(lot.rows.iter().map(|row| row.index)),
        bytes: write_lot(
            &lot.queue,
            overrides,
            &hashes,
            &packer.pack_rows(&lot.rows)?,
        ),
    })
}

/// From when on a new lot may be leased, once its batch is released.
pub(super) const fn first_due(in_waves: bool) -> i64 {
    if in_waves { crate::HELD_BACK } else { 0 }
}

/// Packs lots beside the threads that serve others.
pub(super) async fn pack_all(lots: Vec<NewLot>) -> Result<Vec<PackedLot>> {
    let packing = move || {
        let mut packer = Packer::new()?;
        let packed = lots.iter().map(|lot| pack(lot, &mut packer));
        packed.collect::<Result<Vec<_>>>()
    };
    tokio::task::spawn_blocking(packing)
        .await
        .map_err(|error| StoreError::Unavailable(error.to_string()))?
}

impl Inner {
    /// Writes lots of a batch that is not committed.
    pub(super) async fn stage(&self, batch: BatchId, lots: Vec<NewLot>) -> Result<()> {
        let packed = pack_all(lots).await?;
        let mut note = Cmd::new();
        note.arg("ZADD")
            .arg(keys::staged(HOME))
            .arg(self.wall().await?)
            .arg(batch.to_string());
        self.link.short(&note).await?;
        for lot in packed {
            self.stage_one(batch, lot).await?;
        }
        Ok(())
    }

    async fn stage_one(&self, batch: BatchId, lot: PackedLot) -> Result<()> {
        let p = lot.number.partition();
        let (key, fresh) = (keys::lot(p, batch, lot.number.0), new_version());
        let count = u32::try_from(lot.rows).unwrap_or(u32::MAX);
        let mut commit = Commit::new(p);
        commit.check(keys::batch(p, batch), None);
        commit.check(key.clone(), None);
        commit.write("SET", key.clone(), [&lot.bytes]);
        commit.write("SET", keys::cells(p, batch, lot.number.0), [&lot.cells]);
        let number = lot.number.0.to_le_bytes();
        let rows = u16::try_from(lot.rows).unwrap_or(u16::MAX).to_le_bytes();
        commit.write(
            "APPEND",
            keys::lots(p, batch),
            [[&number[..], &rows[..]].concat()],
        );
        commit.write(
            "HSET",
            keys::indices(p, batch),
            [lot.number.0.to_string().into_bytes(), lot.indices],
        );
        let of_queue = [b"0".to_vec(), keys::lot_member(batch, lot.number)];
        commit.write("ZADD", keys::lots_of(p, &lot.queue), of_queue);
        let range = Range {
            version: fresh,
            id: fastrand::u64(..),
            partition: p,
            batch,
            queue: lot.queue,
            rank: 1,
            due_at: first_due(lot.in_waves),
            count,
            holder: Holder::Nobody,
            token: 0,
            expires: 0,
            window: 0,
            piece: Piece::Span {
                lot: lot.number,
                first: 0,
            },
        };
        let mut books = Books::open(self, p, Timestamp::from_millis(0));
        books.commit = commit;
        books.set_range(range);
        let (commit, _) = books.close(None, 0)?;
        if commit.run(self, false).await? != Outcome::Conflict {
            return Ok(());
        }
        // It is there already, when whoever got no answer asks again; or the batch is committed.
        let mut pipeline = Pipeline::new();
        pipeline.cmd("EXISTS").arg(keys::batch(p, batch));
        pipeline.cmd("GET").arg(key);
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        if answers.next().map_or(0, answer::number) == 1 {
            return Err(StoreError::Refused(format!("batch {batch} is committed")));
        }
        if answers.next().and_then(answer::bytes).as_ref() == Some(&lot.bytes) {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "lot {} was staged with other recipients",
            lot.number.0
        )))
    }

    /// The lots of a batch in a partition, with how many recipients each has.
    pub(super) async fn lots_in(
        &self,
        p: Partition,
        batch: BatchId,
    ) -> Result<Vec<(LotNumber, u32)>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::lots(p, batch));
        let bytes = answer::bytes(self.link.short(&get).await?).unwrap_or_default();
        let read = |entry: &[u8]| {
            let (number, rows) = entry.split_first_chunk::<4>()?;
            let rows = u16::from_le_bytes(rows.try_into().ok()?);
            Some((LotNumber(u32::from_le_bytes(*number)), u32::from(rows)))
        };
        Ok(bytes.chunks(LIST_ENTRY).filter_map(read).collect())
    }

    /// Makes a staged batch visible.
    pub(super) async fn commit(&self, batch: NewBatch, now: Timestamp) -> Result<()> {
        let id = batch.head.id;
        if let Some(record) = self.home(id).await? {
            // Committed before; what came after it may be missing.
            return self.settle(id, &record).await;
        }
        let total = u32::try_from(batch.accepted + batch.rejected)
            .map_err(|_| StoreError::Refused("more than 2^32 recipients".into()))?;
        let mut lots = BTreeMap::new();
        for p in self.all_partitions() {
            lots.insert(p, self.lots_in(p, id).await?);
        }
        let rows = |of: &Vec<(LotNumber, u32)>| of.iter().map(|(_, rows)| u64::from(*rows)).sum();
        let counts: BTreeMap<Partition, u64> = lots.iter().map(|(p, of)| (*p, rows(of))).collect();
        let staged: u64 = counts.values().sum();
        if staged != batch.accepted {
            return Err(StoreError::Refused(format!(
                "batch {id}: {staged} recipients are staged, {} are said to be",
                batch.accepted
            )));
        }
        if let Some(call) = &batch.call {
            // Looked at again with the batch: this only saves the work.
            self.end_call(&mut Commit::new(HOME), call, id, now).await?;
        }
        self.write_maps(id, &lots, total).await?;
        self.write_content(&batch).await?;
        if batch.head.priority == model::Priority::Transactional {
            self.raise(id, now).await?;
        }
        let record = first_record(&batch, now);
        for (&p, &count) in counts.iter().filter(|(p, _)| **p != HOME) {
            let queued = record.released && !batch.head.is_in_waves();
            self.first_copy(p, id, &record, (count, queued)).await?;
        }
        self.commit_home(&batch, record.clone(), counts.get(&HOME).copied(), now)
            .await?;
        self.settle(id, &record).await
    }

    /// The index map, in passes so that memory does not grow with the batch.
    pub(super) async fn write_maps(
        &self,
        batch: BatchId,
        lots: &BTreeMap<Partition, Vec<(LotNumber, u32)>>,
        total: u32,
    ) -> Result<()> {
        let mut from = 0;
        while from < total {
            let until = total.min(from.saturating_add(PASS));
            let width = usize::try_from(until - from).unwrap_or(usize::MAX);
            // All ones: an index that was rejected.
            let mut places = vec![0xff_u8; width.saturating_mul(MAP_ENTRY)];
            for (&p, lots) in lots {
                for some in lots.chunks(LOTS) {
                    self.place_lots(p, batch, some, (from, until), &mut places)
                        .await?;
                }
            }
            self.write_map(batch, from / MAP_CHUNK, &places).await?;
            from = until;
        }
        Ok(())
    }

    pub(super) async fn place_lots(
        &self,
        p: Partition,
        batch: BatchId,
        lots: &[(LotNumber, u32)],
        (from, until): (u32, u32),
        places: &mut [u8],
    ) -> Result<()> {
        let mut get = Cmd::new();
        get.arg("HMGET").arg(keys::indices(p, batch));
        for (lot, _) in lots {
            get.arg(lot.0);
        }
        let answers = answer::list(self.link.short(&get).await?);
        for ((lot, _), value) in lots.iter().zip(answers) {
            let indices = answer::bytes(value).unwrap_or_default();
            for (position, index) in (0_u16..).zip(form::unpack_u32s(&indices)) {
                if !(from..until).contains(&index) {
                    continue;
                }
                let at = usize::try_from(index - from).unwrap_or(usize::MAX) * MAP_ENTRY;
                if let Some([a, b, c, d, e, f]) = places.get_mut(at..at + MAP_ENTRY) {
                    [*a, *b, *c, *d] = lot.0.to_le_bytes();
                    [*e, *f] = position.to_le_bytes();
                }
            }
        }
        Ok(())
    }

    async fn write_map(&self, batch: BatchId, first: u32, places: &[u8]) -> Result<()> {
        let chunk = usize::try_from(MAP_CHUNK).unwrap_or(1) * MAP_ENTRY;
        let pieces: Vec<(u32, &[u8])> = (first..).zip(places.chunks(chunk)).collect();
        for some in pieces.chunks(PIECES) {
            let mut set = Cmd::new();
            set.arg("HSET").arg(keys::of_batch(batch, "map"));
            for (number, piece) in some {
                set.arg(number).arg(*piece);
            }
            self.link.short(&set).await?;
        }
        Ok(())
    }

    async fn write_content(&self, batch: &NewBatch) -> Result<()> {
        let id = batch.head.id;
        let head = serde_json::to_vec(&batch.head)
            .map_err(|error| StoreError::Refused(format!("a head that cannot be kept: {error}")))?;
        let mut pipeline = Pipeline::new();
        pipeline
            .cmd("SET")
            .arg(keys::of_batch(id, "content"))
            .arg(&batch.content[..]);
        pipeline
            .cmd("SET")
            .arg(keys::of_batch(id, "head"))
            .arg(head);
        let safe = self.past.any_replicas();
        if safe {
            // On a Cluster this may be another node than those of the partitions.
            pipeline
                .cmd("EVAL")
                .arg("return redis.call('INFO', 'replication')")
                .arg(1)
                .arg(keys::of_batch(id, "head"));
            wait(&mut pipeline);
        }
        let mut answers = self.link.bulk(&pipeline).await?.into_iter().skip(2);
        if let (Some(info), Some(replicas)) = (answers.next(), answers.next())
            && server::replicas(&answer::bytes(info).unwrap_or_default()) > 0
            && answer::number(replicas) == 0
        {
            return Err(not_replicated());
        }
        Ok(())
    }

    /// Staged ranges are of list mail; those of a batch that goes first are moved.
    pub(super) async fn raise(&self, batch: BatchId, now: Timestamp) -> Result<()> {
        for p in self.all_partitions() {
            let ids = self.ranges_of(p, batch).await?;
            for some in ids.chunks(LOTS) {
                let mut tries = self.tries();
                while tries.again().await? {
                    let mut books = self.books_with(p, now, some).await?;
                    for id in some {
                        if let Some(range) = books.range(*id).cloned() {
                            books.set_range(Range { rank: 0, ..range });
                        }
                    }
                    let (commit, _) = books.close(None, 0)?;
                    if commit.run(self, false).await? != Outcome::Conflict {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// The copy in another partition, with its counters, not active yet.
    async fn first_copy(
        &self,
        p: Partition,
        batch: BatchId,
        record: &BatchRecord,
        (count, queued): (u64, bool),
    ) -> Result<()> {
        let copy = BatchRecord {
            state: BatchState::Open,
            revision: 0,
            ..record.clone()
        };
        let mut commit = Commit::new(p);
        commit.check(keys::batch(p, batch), None);
        commit.write("SET", keys::batch(p, batch), [copy.write(new_version())]);
        count_first(&mut commit, batch, count, queued);
        commit.write::<&[u8]>("DEL", keys::indices(p, batch), []);
        // A conflict: it is there since an earlier try.
        commit.run(self, true).await.map(drop)
    }

    async fn commit_home(
        &self,
        batch: &NewBatch,
        record: BatchRecord,
        count: Option<u64>,
        now: Timestamp,
    ) -> Result<()> {
        let id = batch.head.id;
        let mut books = Books::open(self, HOME, now);
        let accepted =
            json!({ "first_index": 0, "count": batch.accepted, "rejected_count": batch.rejected });
        books.batch_event(EventKind::BatchAccepted, &batch.head, 1, accepted);
        match record.state {
            BatchState::InProgress => {
                books.batch_event(EventKind::BatchStarted, &batch.head, 1, json!({}));
            }
            BatchState::Completed => {
                books.batch_event(EventKind::BatchCompleted, &batch.head, 1, json!({}));
            }
            BatchState::Scheduled
            | BatchState::Open
            | BatchState::Paused
            | BatchState::Cancelled => {}
        }
        books.tell(Control::Work);
        let name = id.to_string().into_bytes();
        let commit = &mut books.commit;
        commit.check(keys::batch(HOME, id), None);
        commit.write("SET", keys::batch(HOME, id), [record.write(new_version())]);
        let queued = record.released && !batch.head.is_in_waves();
        count_first(commit, id, count.unwrap_or(0), queued);
        commit.write("ZADD", keys::batches(HOME), [&b"0"[..], &name]);
        commit.write("ZREM", keys::staged(HOME), [&name]);
        if record.state != BatchState::Completed {
            commit.write("ZADD", keys::open(HOME), [&b"0"[..], &name]);
        }
        if record.state == BatchState::Scheduled {
            let at = record.release_at.millis().to_string().into_bytes();
            commit.write("ZADD", keys::scheduled(HOME), [at, name.clone()]);
        }
        if self.partitions > 1 {
            commit.write("ZADD", keys::unsettled(HOME), [&b"0"[..], &name]);
        }
        commit.write::<&[u8]>("DEL", keys::indices(HOME, id), []);
        if let Some(call) = &batch.call {
            self.end_call(commit, call, id, now).await?;
        }
        let (commit, _) = books.close(None, 0)?;
        let done = commit.run(self, true).await? != Outcome::Conflict;
        self.wrote();
        if done || self.home(id).await?.is_some() {
            // In a conflict another try of the same commit was faster.
            return Ok(());
        }
        Err(StoreError::Unavailable(
            "another try of the same call has taken over".to_owned(),
        ))
    }

    /// Throws away what is staged of a batch.
    pub(super) async fn abandon(&self, batch: BatchId, now: Timestamp) -> Result<()> {
        if self.home(batch).await?.is_some() {
            return Ok(());
        }
        for p in self.all_partitions() {
            let ids = self.ranges_of(p, batch).await?;
            for some in ids.chunks(LOTS) {
                let mut books = self.books_with(p, now, some).await?;
                some.iter().for_each(|id| books.remove_range(*id));
                let (commit, _) = books.close(None, 0)?;
                commit.run(self, false).await?;
            }
            let lots = self.lots_in(p, batch).await?;
            for some in lots.chunks(LOTS) {
                self.forget_lots(p, batch, some).await?;
            }
            let mut del = Cmd::new();
            del.arg("UNLINK")
                .arg(keys::indices(p, batch))
                .arg(keys::lots(p, batch))
                .arg(keys::batch(p, batch))
                .arg(keys::counters(p, batch));
            self.link.short(&del).await?;
        }
        let mut pipeline = Pipeline::new();
        for what in ["map", "content", "head"] {
            pipeline.cmd("UNLINK").arg(keys::of_batch(batch, what));
        }
        self.link.bulk(&pipeline).await?;
        let mut done = Cmd::new();
        done.arg("ZREM")
            .arg(keys::staged(HOME))
            .arg(batch.to_string());
        self.link.short(&done).await.map(drop)
    }

    /// Removes lots with what happened to their recipients.
    pub(super) async fn forget_lots(
        &self,
        p: Partition,
        batch: BatchId,
        some: &[(LotNumber, u32)],
    ) -> Result<()> {
        let mut find = Pipeline::new();
        for (lot, _) in some {
            find.cmd("GETRANGE")
                .arg(keys::lot(p, batch, lot.0))
                .arg(0)
                .arg(LOT_HEAD);
        }
        let heads = self.link.bulk(&find).await?;
        let mut pipeline = Pipeline::new();
        for ((lot, _), head) in some.iter().zip(heads) {
            let head = answer::bytes(head).unwrap_or_default();
            if let Some(queue) = lot_queue(&head) {
                pipeline
                    .cmd("ZREM")
                    .arg(keys::lots_of(p, queue))
                    .arg(keys::lot_member(batch, *lot));
            }
            for key in [keys::lot, keys::cells, keys::facts] {
                pipeline.cmd("UNLINK").arg(key(p, batch, lot.0));
            }
        }
        self.link.bulk(&pipeline).await.map(drop)
    }

    /// Throws away what processes that are gone left staged.
    pub(super) async fn abandon_leftovers(&self, now: Timestamp) -> Result<()> {
        let before = self.wall().await? - LEFT;
        let mut find = Cmd::new();
        find.arg("ZRANGEBYSCORE")
            .arg(keys::staged(HOME))
            .arg("-inf")
            .arg(before);
        for name in answer::list(self.link.short(&find).await?) {
            let name = answer::bytes(name).unwrap_or_default();
            if let Some(batch) = std::str::from_utf8(&name)
                .ok()
                .and_then(|id| id.parse().ok())
            {
                self.abandon(batch, now).await?;
            }
        }
        Ok(())
    }
}

fn first_record(batch: &NewBatch, now: Timestamp) -> BatchRecord {
    let released = batch.head.release_at <= now && !batch.head.held;
    let state = match (batch.accepted, released) {
        _ if batch.head.held => BatchState::Open,
        (0, _) => BatchState::Completed,
        (_, true) => BatchState::InProgress,
        (_, false) => BatchState::Scheduled,
    };
    BatchRecord {
        version: [0; 8],
        state,
        released,
        archived: false,
        kept: Kept::Whole,
        priority: batch.head.priority,
        tracking: batch.head.tracking,
        revision: 1,
        release_at: batch.head.release_at,
        started_at: (state == BatchState::InProgress).then_some(now),
        completed_at: (state == BatchState::Completed).then_some(now),
        accepted: batch.accepted,
        rejected: batch.rejected,
        paused_at: None,
        paused_ms: 0,
    }
}

fn count_first(commit: &mut Commit, batch: BatchId, count: u64, queued: bool) {
    let count = i64::try_from(count).unwrap_or(i64::MAX);
    if count > 0 {
        let waiting = if queued { "queued" } else { "scheduled" };
        let key = keys::counters(commit.partition, batch);
        commit.count(key, &[("accepted", count), (waiting, count)], false);
    }
}
