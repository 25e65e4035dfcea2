//! Parts of an open batch: whose turn it is, staging, the step that makes a part belong to it.
//!
//! A part is staged as bytes under its lots' keys and in `si`, with no range, count or index: so it
//! is invisible. The step that ends it writes into partition 0 how far the batch reaches now and
//! which lots are *pending*; then they are filed: the index map, and in each partition ranges and
//! counters, in pieces that are numbered so that each is filed once, whoever does it and however
//! late. A part begins, and a batch starts or is cancelled, only after what is pending was filed.
//! Must not judge a recipient.

use super::Inner;
use super::books::Books;
use super::cache::{MAP_CHUNK, MAP_ENTRY};
use super::commit::{Commit, Outcome, not_replicated, wait};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{BatchRecord, Holder, Piece, Range, Version, new_version};
use super::stage::{first_due, pack_all};
use crate::{EndedPart, LotHashes, NewLot, NewPart, PartEnd, PartTurn, Result, StoreError, form};
use ::redis::{Cmd, Pipeline};
use model::{BatchId, BatchState, EventKind, LotNumber, Partition, Row, Timestamp, partition_hash};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

/// Lots filed in one step.
const FILED: usize = 64;
/// Lots written or read at once.
const LOTS: usize = 128;
/// For how many seconds it is remembered what was filed of a batch that takes no more parts.
const LATE: u32 = 24 * 3_600;
/// Running numbers of lots.
const RUNNING: u32 = 1 << 24;

/// How an open batch stands, in partition 0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Standing {
    version: Option<Version>,
    /// The part that is being added, with the running numbers of its lots, and until when.
    turn: Option<(BatchId, u32, u32, i64)>,
    next_lot: u32,
    /// How many parts ended.
    parts: u32,
    pending: Option<Pending>,
}

/// A part that belongs to the batch and is not filed everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pending {
    first_index: u32,
    total: u32,
    /// With the recipients of each.
    lots: Vec<(LotNumber, u16)>,
}

impl Standing {
    fn write(&self, version: Version) -> Vec<u8> {
        let mut to = version.to_vec();
        let (part, from, count, until) =
            self.turn
                .unwrap_or((BatchId::from_bytes([0; 16]), 0, 0, i64::MIN));
        to.extend(part.to_bytes());
        for number in [from, count, self.next_lot, self.parts] {
            to.extend(number.to_le_bytes());
        }
        to.extend(until.to_le_bytes());
        if let Some(pending) = &self.pending {
            to.extend(pending.first_index.to_le_bytes());
            to.extend(pending.total.to_le_bytes());
            for (lot, rows) in &pending.lots {
                to.extend(lot.0.to_le_bytes());
                to.extend(rows.to_le_bytes());
            }
        }
        to
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (part, mut rest) = rest.split_first_chunk()?;
        let mut number = || {
            let (number, after) = rest.split_first_chunk()?;
            rest = after;
            Some(u32::from_le_bytes(*number))
        };
        let (from, count, next_lot, parts) = (number()?, number()?, number()?, number()?);
        let (until, rest) = rest.split_first_chunk()?;
        let until = i64::from_le_bytes(*until);
        let turn = (until != i64::MIN).then(|| (BatchId::from_bytes(*part), from, count, until));
        Some(Self {
            version: Some(*version),
            turn,
            next_lot,
            parts,
            pending: Pending::read(rest),
        })
    }
}

impl Pending {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (first_index, rest) = bytes.split_first_chunk()?;
        let (total, rest) = rest.split_first_chunk()?;
        let lots = rest.chunks_exact(6).filter_map(|entry| {
            let (lot, rows) = entry.split_first_chunk()?;
            let rows = u16::from_le_bytes(rows.try_into().ok()?);
            Some((LotNumber(u32::from_le_bytes(*lot)), rows))
        });
        Some(Self {
            first_index: u32::from_le_bytes(*first_index),
            total: u32::from_le_bytes(*total),
            lots: lots.collect(),
        })
    }

    fn in_partition(&self, p: Partition) -> Vec<(LotNumber, u32)> {
        let of = |(lot, rows): &(LotNumber, u16)| {
            (lot.partition() == p).then_some((*lot, u32::from(*rows)))
        };
        self.lots.iter().filter_map(of).collect()
    }
}

impl Inner {
    async fn standing_of(&self, batch: BatchId) -> Result<Standing> {
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::parts(HOME, batch));
        let stored = answer::bytes(self.link.short(&get).await?);
        let damaged = || StoreError::Damaged(format!("the parts of {batch} are not readable"));
        match stored {
            Some(stored) => Standing::read(&stored).ok_or_else(damaged),
            None => {
                // Lots that came with the batch itself.
                let mut standing = Standing::default();
                for p in self.all_partitions() {
                    let lots = self.lots_in(p, batch).await?;
                    let next = lots
                        .iter()
                        .map(|(lot, _)| (lot.0 & (RUNNING - 1)) + 1)
                        .max();
                    standing.next_lot = standing.next_lot.max(next.unwrap_or(0));
                }
                Ok(standing)
            }
        }
    }

    /// Writes a standing; false when it was changed meanwhile.
    async fn put_standing(
        &self,
        batch: BatchId,
        before: &Standing,
        after: &Standing,
    ) -> Result<bool> {
        let mut commit = Commit::new(HOME);
        let key = keys::parts(HOME, batch);
        commit.check(key.clone(), before.version);
        commit.write("SET", key, [after.write(new_version())]);
        Ok(commit.run(self, false).await? != Outcome::Conflict)
    }

    /// Gives a part its turn.
    pub(super) async fn begin_part(
        &self,
        new: NewPart,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<PartTurn> {
        let mut tries = self.tries();
        while tries.again().await? {
            let Some(record) = self.home(new.batch).await? else {
                return Ok(PartTurn::Unknown);
            };
            if record.state != BatchState::Open {
                return Ok(PartTurn::Impossible(record.state));
            }
            let before = self.standing_of(new.batch).await?;
            if before.pending.is_some() {
                self.file_pending(new.batch, now).await?;
                continue;
            }
            if before
                .turn
                .is_some_and(|(_, _, _, until)| until > now.millis())
            {
                return Ok(PartTurn::Busy);
            }
            let next_lot = before.next_lot + new.lots;
            if next_lot >= RUNNING {
                return Err(StoreError::Refused(
                    "more lots than a batch can have".into(),
                ));
            }
            let until = (now + ttl).millis();
            let after = Standing {
                turn: Some((new.part, before.next_lot, new.lots, until)),
                next_lot,
                ..before.clone()
            };
            if !self.put_standing(new.batch, &before, &after).await? {
                continue;
            }
            self.throw_staged(new.batch, before.next_lot).await?;
            let first = u32::try_from(record.accepted + record.rejected)
                .map_err(|_| StoreError::Refused("more than 2^32 recipients".into()))?;
            return Ok(PartTurn::Begun {
                first_index: first,
                first_lot: before.next_lot,
            });
        }
        Ok(PartTurn::Busy)
    }

    /// Deletes what parts before left staged: lots with a running number below `below`.
    async fn throw_staged(&self, batch: BatchId, below: u32) -> Result<()> {
        for p in self.all_partitions() {
            let staged = self.staged_lots(p, batch).await?;
            let left = staged
                .into_keys()
                .filter(|lot| lot.0 & (RUNNING - 1) < below);
            let left: Vec<LotNumber> = left.collect();
            for some in left.chunks(LOTS) {
                let mut pipeline = Pipeline::new();
                for lot in some {
                    pipeline.cmd("UNLINK").arg(keys::lot(p, batch, lot.0));
                    pipeline.cmd("UNLINK").arg(keys::cells(p, batch, lot.0));
                    pipeline.cmd("HDEL").arg(keys::indices(p, batch)).arg(lot.0);
                }
                self.link.bulk(&pipeline).await?;
            }
        }
        Ok(())
    }

    /// The staged lots of a partition, with their indices.
    async fn staged_lots(
        &self,
        p: Partition,
        batch: BatchId,
    ) -> Result<BTreeMap<LotNumber, Vec<u8>>> {
        let mut get = Cmd::new();
        get.arg("HGETALL").arg(keys::indices(p, batch));
        let pairs = answer::pairs(self.link.short(&get).await?);
        let read = |(lot, indices): (Vec<u8>, Vec<u8>)| {
            let lot = std::str::from_utf8(&lot).ok()?.parse().ok()?;
            Some((LotNumber(lot), indices))
        };
        Ok(pairs.into_iter().filter_map(read).collect())
    }

    /// Writes lots of the part whose turn it is.
    pub(super) async fn stage_part(
        &self,
        new: NewPart,
        lots: Vec<NewLot>,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<bool> {
        let packed = pack_all(lots).await?;
        let before = self.standing_of(new.batch).await?;
        let Some((part, from, count, until)) = before.turn else {
            return Ok(false);
        };
        if part != new.part {
            return Ok(false);
        }
        if until - now.millis() < i64::try_from(ttl.as_millis()).unwrap_or(0) / 2 {
            let until = (now + ttl).millis();
            let after = Standing {
                turn: Some((part, from, count, until)),
                ..before.clone()
            };
            if !self.put_standing(new.batch, &before, &after).await? {
                return Ok(false);
            }
        }
        for some in packed.chunks(LOTS) {
            let mut pipelines: BTreeMap<Partition, Pipeline> = BTreeMap::new();
            for lot in some {
                let (p, number) = (lot.number.partition(), lot.number.0);
                let pipeline = pipelines.entry(p).or_default();
                pipeline
                    .cmd("SET")
                    .arg(keys::lot(p, new.batch, number))
                    .arg(&lot.bytes);
                pipeline
                    .cmd("SET")
                    .arg(keys::cells(p, new.batch, number))
                    .arg(&lot.cells);
                pipeline
                    .cmd("HSET")
                    .arg(keys::indices(p, new.batch))
                    .arg(number)
                    .arg(&lot.indices);
            }
            for (p, mut pipeline) in pipelines {
                let safe = self.past.has_replicas(p);
                if safe {
                    wait(&mut pipeline);
                }
                let replicas = self.link.bulk(&pipeline).await?.pop();
                if safe && replicas.map(answer::number) == Some(0) {
                    return Err(not_replicated());
                }
            }
        }
        Ok(true)
    }

    /// Makes a part belong to its batch, and files it.
    pub(super) async fn commit_part(&self, ended: EndedPart, now: Timestamp) -> Result<PartEnd> {
        let batch = ended.batch;
        let mut tries = self.tries();
        while tries.again().await? {
            let Some(record) = self.home(batch).await? else {
                return Ok(PartEnd::Lost);
            };
            if record.state != BatchState::Open {
                return Ok(PartEnd::Impossible(record.state));
            }
            let before = self.standing_of(batch).await?;
            let Some((_, from, count, _)) = before.turn.filter(|turn| turn.0 == ended.part) else {
                return Ok(PartEnd::Lost);
            };
            let pending = self
                .staged_part(&ended, &record, from..from + count)
                .await?;
            if self
                .end_part(&ended, &record, &before, pending, now)
                .await?
            {
                self.file_pending(batch, now).await?;
                return Ok(PartEnd::Done);
            }
        }
        Ok(PartEnd::Lost)
    }

    /// What is staged of a part, if that is what is said to be.
    async fn staged_part(
        &self,
        ended: &EndedPart,
        record: &BatchRecord,
        numbers: std::ops::Range<u32>,
    ) -> Result<Pending> {
        let mut lots = Vec::new();
        for p in self.all_partitions() {
            let staged = self.staged_lots(p, ended.batch).await?;
            let own = staged
                .into_iter()
                .filter(|(lot, _)| numbers.contains(&(lot.0 & (RUNNING - 1))));
            lots.extend(
                own.map(|(lot, indices)| {
                    (lot, u16::try_from(indices.len() / 4).unwrap_or(u16::MAX))
                }),
            );
        }
        let staged: u64 = lots.iter().map(|(_, rows)| u64::from(*rows)).sum();
        if staged != ended.accepted {
            return Err(StoreError::Refused(format!(
                "a part of batch {}: {staged} recipients are staged, {} are said to be",
                ended.batch, ended.accepted
            )));
        }
        let too_many = |_| StoreError::Refused("more than 2^32 recipients".into());
        Ok(Pending {
            first_index: u32::try_from(record.accepted + record.rejected).map_err(too_many)?,
            total: u32::try_from(ended.accepted + ended.rejected).map_err(too_many)?,
            lots,
        })
    }

    /// The step in partition 0; false when something was changed meanwhile.
    async fn end_part(
        &self,
        ended: &EndedPart,
        record: &BatchRecord,
        before: &Standing,
        pending: Pending,
        now: Timestamp,
    ) -> Result<bool> {
        let batch = ended.batch;
        let head = self.known_head(batch).await?;
        let mut books = Books::open(self, HOME, now);
        let accepted = json!({ "first_index": pending.first_index, "count": ended.accepted, "rejected_count": ended.rejected });
        // Told apart from the changes of the batch, which count from below.
        let number = u32::MAX - before.parts;
        books.batch_event(EventKind::BatchAccepted, &head, number, accepted);
        let commit = &mut books.commit;
        let key = keys::batch(HOME, batch);
        commit.check(key.clone(), Some(record.version));
        let longer = BatchRecord {
            accepted: record.accepted + ended.accepted,
            rejected: record.rejected + ended.rejected,
            ..record.clone()
        };
        commit.write("SET", key, [longer.write(new_version())]);
        let key = keys::parts(HOME, batch);
        commit.check(key.clone(), before.version);
        let after = Standing {
            turn: None,
            parts: before.parts + 1,
            pending: Some(pending),
            ..before.clone()
        };
        commit.write("SET", key, [after.write(new_version())]);
        if let Some(call) = &ended.call {
            self.end_call(commit, call, batch, now).await?;
        }
        let (commit, _) = books.close(None, 0)?;
        let done = commit.run(self, true).await? != Outcome::Conflict;
        if done {
            self.wrote();
        }
        Ok(done)
    }

    /// Files what is pending of an open batch.
    pub(super) async fn file_pending(&self, batch: BatchId, now: Timestamp) -> Result<()> {
        let standing = self.standing_of(batch).await?;
        let Some(pending) = &standing.pending else {
            return Ok(());
        };
        self.file_map(batch, pending).await?;
        for p in self.all_partitions() {
            self.file_in(p, batch, standing.parts, &pending.in_partition(p), now)
                .await?;
        }
        let after = Standing {
            pending: None,
            ..standing.clone()
        };
        // A conflict: another did it, and this is the same.
        self.put_standing(batch, &standing, &after).await.map(drop)
    }

    async fn file_map(&self, batch: BatchId, pending: &Pending) -> Result<()> {
        let first = pending.first_index - pending.first_index % MAP_CHUNK;
        let until = pending.first_index.saturating_add(pending.total);
        let width = usize::try_from(until - first).unwrap_or(usize::MAX);
        let mut places = vec![0xff_u8; width.saturating_mul(MAP_ENTRY)];
        for p in self.all_partitions() {
            for some in pending.in_partition(p).chunks(LOTS) {
                self.place_lots(p, batch, some, (first, until), &mut places)
                    .await?;
            }
        }
        let chunk = usize::try_from(MAP_CHUNK).unwrap_or(1) * MAP_ENTRY;
        for (number, piece) in (first / MAP_CHUNK..).zip(places.chunks(chunk)) {
            let arguments = [number.to_string().into_bytes(), piece.to_vec()];
            let keys = [keys::of_batch(batch, "map")];
            // On a Cluster the map may stand on a shard that nothing else waits for.
            self.script(&self.scripts.patch, HOME, &keys, &arguments, true)
                .await?;
        }
        Ok(())
    }

    /// Files the lots of a partition, in numbered pieces.
    async fn file_in(
        &self,
        p: Partition,
        batch: BatchId,
        part: u32,
        lots: &[(LotNumber, u32)],
        now: Timestamp,
    ) -> Result<()> {
        for (number, some) in (0_u32..).zip(lots.chunks(FILED)) {
            let key = keys::filed(p, batch);
            let own = marker(part, number);
            let mut tries = self.tries();
            while tries.again().await? {
                let mut get = Cmd::new();
                get.arg("GET").arg(&key);
                let last = answer::bytes(self.link.short(&get).await?);
                let last: Option<Version> = last.and_then(|last| last.try_into().ok());
                if last.is_some_and(|last| last >= own) {
                    break;
                }
                if self.file_some(p, batch, (last, own), some, now).await? {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn file_some(
        &self,
        p: Partition,
        batch: BatchId,
        (last, own): (Option<Version>, Version),
        lots: &[(LotNumber, u32)],
        now: Timestamp,
    ) -> Result<bool> {
        let wanted = lots.iter().map(|(lot, _)| (batch, *lot)).collect();
        let read = self.lots(&wanted).await?;
        let rank = self.home(batch).await?.map_or(1, |record| record.rank());
        let due_at = first_due(self.known_head(batch).await?.is_in_waves());
        let mut books = Books::open(self, p, now);
        books.commit.check(keys::filed(p, batch), last);
        books.commit.write("SET", keys::filed(p, batch), [own]);
        let mut count = 0;
        for (lot, rows) in lots {
            let found = read
                .get(&(batch, *lot))
                .cloned()
                .unwrap_or_else(|| Err(StoreError::Damaged(format!("lot {} is gone", lot.0))))?;
            let commit = &mut books.commit;
            let rows16 = u16::try_from(*rows).unwrap_or(u16::MAX).to_le_bytes();
            let entry = [&lot.0.to_le_bytes()[..], &rows16[..]].concat();
            commit.write("APPEND", keys::lots(p, batch), [entry]);
            let of_queue = [b"0".to_vec(), keys::lot_member(batch, *lot)];
            commit.write("ZADD", keys::lots_of(p, &found.queue), of_queue);
            commit.write("HDEL", keys::indices(p, batch), [lot.0.to_string()]);
            count += i64::from(*rows);
            let range = range_of(p, batch, *lot, *rows, &found.queue);
            books.set_range(Range {
                rank,
                due_at,
                ..range
            });
        }
        let key = keys::counters(p, batch);
        books
            .commit
            .count(key, &[("accepted", count), ("scheduled", count)], false);
        let (commit, _) = books.close(None, 0)?;
        Ok(commit.run(self, false).await? != Outcome::Conflict)
    }

    /// Ends a turn that comes to nothing.
    pub(super) async fn drop_part(&self, new: NewPart) -> Result<()> {
        let before = self.standing_of(new.batch).await?;
        if before.turn.is_none_or(|turn| turn.0 != new.part) {
            return Ok(());
        }
        self.throw_staged(new.batch, before.next_lot).await?;
        let after = Standing {
            turn: None,
            ..before.clone()
        };
        self.put_standing(new.batch, &before, &after)
            .await
            .map(drop)
    }

    /// Forgets how parts stood: the batch takes no more.
    pub(super) async fn forget_parts(&self, batch: BatchId) -> Result<()> {
        self.throw_staged(batch, RUNNING).await?;
        let mut pipeline = Pipeline::new();
        pipeline.cmd("UNLINK").arg(keys::parts(HOME, batch));
        self.link.bulk(&pipeline).await?;
        for p in self.all_partitions() {
            // Kept a while: nobody who is late may file a piece again.
            let mut expire = Cmd::new();
            expire.arg("EXPIRE").arg(keys::filed(p, batch)).arg(LATE);
            self.link.short(&expire).await?;
        }
        Ok(())
    }

    /// The addresses of committed lots from a running number on.
    pub(super) async fn part_hashes(&self, batch: BatchId, from: u32) -> Result<Vec<LotHashes>> {
        let mut all = Vec::new();
        for p in self.all_partitions() {
            let lots = self.lots_in(p, batch).await?;
            let new = lots
                .into_iter()
                .filter(|(lot, _)| lot.0 & (RUNNING - 1) >= from);
            let new: Vec<_> = new.collect();
            for some in new.chunks(LOTS) {
                let mut pipeline = Pipeline::new();
                for (lot, rows) in some {
                    // Four bytes of form before them.
                    pipeline
                        .cmd("GETRANGE")
                        .arg(keys::lot(p, batch, lot.0))
                        .arg(4)
                        .arg(3 + rows * 4);
                }
                let answers = self.link.bulk(&pipeline).await?;
                for ((lot, _), hashes) in some.iter().zip(answers) {
                    let hashes = answer::bytes(hashes).unwrap_or_default();
                    all.push(LotHashes {
                        lot: *lot,
                        hashes: form::unpack_u32s(&hashes).collect(),
                    });
                }
            }
        }
        Ok(all)
    }

    /// The rows of a lot.
    pub(super) async fn lot_rows(&self, batch: BatchId, lot: LotNumber) -> Result<Vec<Row>> {
        let found = self.lots(&[(batch, lot)].into()).await?;
        match found.into_values().next() {
            Some(lot) => Ok(lot?.rows.clone()),
            None => Ok(Vec::new()),
        }
    }
}

/// The number of a piece of a part, in the order in which they are filed.
fn marker(part: u32, piece: u32) -> Version {
    (u64::from(part) << 32 | u64::from(piece)).to_be_bytes()
}

/// The range of a new lot: found by its name, so that it is never made twice.
fn range_of(p: Partition, batch: BatchId, lot: LotNumber, rows: u32, queue: &str) -> Range {
    Range {
        version: [0; 8],
        id: partition_hash(&format!("part {batch}"), &lot.0.to_string()),
        partition: p,
        batch,
        queue: queue.into(),
        rank: 1,
        due_at: 0,
        count: rows,
        holder: Holder::Nobody,
        token: 0,
        expires: 0,
        window: 0,
        piece: Piece::Span { lot, first: 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn standings_read_back(
            version: [u8; 8],
            turn in prop::option::of((any::<[u8; 16]>(), any::<u32>(), any::<u32>(), 0..i64::MAX)),
            numbers: [u32; 4],
            lots in prop::option::of(prop::collection::vec((any::<u32>(), any::<u16>()), 0..5)),
        ) {
            let [next_lot, parts, first_index, total] = numbers;
            let standing = Standing {
                version: Some(version),
                turn: turn.map(|(id, from, count, until)| (BatchId::from_bytes(id), from, count, until)),
                next_lot,
                parts,
                pending: lots.map(|lots| Pending {
                    first_index,
                    total,
                    lots: lots.into_iter().map(|(lot, rows)| (LotNumber(lot), rows)).collect(),
                }),
            };
            prop_assert_eq!(Standing::read(&standing.write(version)), Some(standing));
        }

        #[test]
        fn any_bytes_are_a_standing_or_none(bytes: Vec<u8>) {
            let _read = Standing::read(&bytes);
        }
    }
}
