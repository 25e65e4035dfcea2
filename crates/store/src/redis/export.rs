//! Giving everything away piece by piece, while others go on.
//!
//! Redis has no moment that can be read at leisure, so every lot is given away as it is at a moment of
//! its own: what cannot be shown to have stood still around that moment is marked as perhaps started.
//! The statuses of a batch are counted again from its lots by whoever takes them in, so the accounts
//! are right whatever moved meanwhile. Must not change anything, but that it files what the last part of
//! an open batch left pending.

use super::Inner;
use super::batches::batch_list;
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{BatchRecord, Holder, Piece as RangePiece, Range, add_counters, lot_parts};
use crate::backup::{self, BatchPiece, LotPiece, Piece};
use crate::form;
use crate::transition::Cell;
use crate::{EventQuery, Result, StoreError};
use ::redis::{Cmd, Pipeline};
use model::{BatchId, BatchState, Counters, LotNumber, Partition, Timestamp};
use std::collections::{BTreeSet, HashMap};
use tokio::sync::mpsc;

/// Lots read at once.
const LOTS: usize = 64;
/// Notes read at once.
const NOTES: u32 = 1_000;
/// Ranges, batches and entries of a list read at once.
const AT_ONCE: usize = 256;

async fn give(to: &mpsc::Sender<Piece>, piece: Piece) -> Result<()> {
    to.send(piece)
        .await
        .map_err(|_| StoreError::Unavailable("nobody takes the export".into()))
}

/// What the ranges of a batch say of a recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stand {
    /// When it is due, if it was deferred.
    due: Option<i64>,
    /// A node may have started it.
    doubtful: bool,
}

impl Stand {
    /// Whether whoever stood like this before, and does so after, was started by nobody between: it
    /// waited all the time, or a node that took it meanwhile has not come to it. Whoever was sent
    /// to left its range; whoever was deferred is due at another time.
    fn is_untouched(before: Option<&Self>, after: Option<&Self>) -> bool {
        before
            .zip(after)
            .is_some_and(|(a, b)| a.due == b.due && !a.doubtful && !b.doubtful)
    }
}

/// Recipients by lot and position.
type Stands = HashMap<(LotNumber, u16), Stand>;

impl Inner {
    /// Gives everything to `to`.
    pub(super) async fn export(&self, to: &mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        let begin = Piece::Begin {
            partitions: self.partitions,
            at: now,
        };
        give(to, begin).await?;
        self.give_shared(to, now).await?;
        let mut from = "-".to_owned();
        loop {
            let mut page = Cmd::new();
            page.arg("ZRANGEBYLEX")
                .arg(keys::batches(HOME))
                .arg(&from)
                .arg("+")
                .arg("LIMIT")
                .arg(0)
                .arg(AT_ONCE);
            let ids = batch_list(answer::list(self.link.short(&page).await?));
            for id in &ids {
                self.give_batch(*id, to, now).await?;
            }
            match ids.last() {
                Some(id) if ids.len() == AT_ONCE => from = format!("({id}"),
                _ => break,
            }
        }
        let mut from = 0;
        loop {
            let (looked, calls) = self.kept_calls(from, AT_ONCE).await?;
            for call in calls {
                give(to, Piece::Call(Box::new(call))).await?;
            }
            if looked < AT_ONCE {
                break;
            }
            from += looked;
        }
        self.give_events(to).await?;
        give(to, Piece::End { pieces: 0 }).await
    }

    async fn hash(&self, key: String) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut get = Cmd::new();
        get.arg("HGETALL").arg(key);
        Ok(answer::pairs(self.link.short(&get).await?))
    }

    /// What is neither a batch nor an event.
    async fn give_shared(&self, to: &mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        for (key, value) in self.hash(keys::settings(HOME)).await? {
            let (key, value) = (text(key), text(value));
            give(to, Piece::Setting { key, value }).await?;
        }
        for partition in self.all_partitions() {
            for (journal, through) in self.hash(keys::journals(partition)).await? {
                if let (Ok(journal), Ok(through)) = (text(journal).parse(), text(through).parse()) {
                    let mark = Piece::Journal {
                        journal,
                        partition,
                        through,
                    };
                    give(to, mark).await?;
                }
            }
            self.give_suppressions(partition, to).await?;
            self.give_consents(partition, to).await?;
        }
        for suspension in self.suspensions(now).await? {
            give(to, Piece::of_suspension(&suspension)).await?;
        }
        self.give_notes(to, now).await
    }

    async fn give_notes(&self, to: &mpsc::Sender<Piece>, now: Timestamp) -> Result<()> {
        let mut kinds = BTreeSet::new();
        for p in self.all_partitions() {
            kinds.extend(self.names(p, &keys::notes(p, "")).await?);
        }
        for kind in kinds {
            let mut after = None;
            loop {
                let page = self.notes_after(&kind, after.as_deref(), NOTES, now);
                let page = page.await?;
                for note in page.items {
                    give(to, Piece::of_note(note)).await?;
                }
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// What comes behind `prefix` in the names of keys, on the server that has the partition.
    async fn names(&self, p: Partition, prefix: &str) -> Result<Vec<String>> {
        let pattern = prefix.replace('{', "[{]").replace('}', "[}]");
        let mut names = Vec::new();
        let mut cursor = "0".to_owned();
        loop {
            let keys = [keys::meta(p)];
            let arguments = [cursor.into_bytes(), format!("{pattern}*").into_bytes()];
            let answer = self
                .script(&self.scripts.scan, p, &keys, &arguments, false)
                .await?;
            let mut parts = answer::list(answer).into_iter();
            let next = parts.next().and_then(answer::bytes).unwrap_or_default();
            cursor = String::from_utf8_lossy(&next).into_owned();
            for name in parts.next().map(answer::list).unwrap_or_default() {
                let name = answer::bytes(name).unwrap_or_default();
                let name = String::from_utf8_lossy(&name).into_owned();
                names.extend(name.strip_prefix(prefix).map(str::to_owned));
            }
            if cursor == "0" || cursor.is_empty() {
                break;
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    async fn give_suppressions(&self, p: Partition, to: &mpsc::Sender<Piece>) -> Result<()> {
        for account in self.names(p, &keys::suppressions(p, "")).await? {
            let mut at = 0;
            loop {
                let mut page = Cmd::new();
                page.arg("ZRANGE")
                    .arg(keys::suppressions(p, &account))
                    .arg(at)
                    .arg(at + AT_ONCE - 1);
                let found = super::suppress::read_all(&account, self.link.short(&page).await?);
                let ended = found.len() < AT_ONCE;
                for entry in found {
                    give(to, Piece::of_suppression(&entry)).await?;
                }
                if ended {
                    break;
                }
                at += AT_ONCE;
            }
        }
        Ok(())
    }

    async fn give_consents(&self, p: Partition, to: &mpsc::Sender<Piece>) -> Result<()> {
        let mut cursor = b"0".to_vec();
        loop {
            let mut scan = Cmd::new();
            scan.arg("HSCAN")
                .arg(keys::consents(p))
                .arg(&cursor)
                .arg("COUNT")
                .arg(AT_ONCE);
            let mut parts = answer::list(self.link.short(&scan).await?).into_iter();
            cursor = parts.next().and_then(answer::bytes).unwrap_or_default();
            // What moves meanwhile may come twice, which does no harm.
            let pairs = parts.next().map(answer::pairs).unwrap_or_default();
            for of in Self::read_consents(p, pairs) {
                give(to, Piece::Consent(Box::new(of?))).await?;
            }
            if cursor.is_empty() || cursor == b"0" {
                return Ok(());
            }
        }
    }

    // ---- batches ------------------------------------------------------------------------

    async fn give_batch(
        &self,
        id: BatchId,
        to: &mpsc::Sender<Piece>,
        now: Timestamp,
    ) -> Result<()> {
        if self.home(id).await?.map(|of| of.state) == Some(BatchState::Open) {
            self.file_pending(id, now).await?;
        }
        let Some(record) = self.home(id).await? else {
            return Ok(());
        };
        let mut counters = Vec::new();
        for p in self.all_partitions() {
            if record.has_rows() {
                self.give_lots(p, id, to).await?;
            }
            let mut of = Counters::default();
            add_counters(&mut of, &self.hash(keys::counters(p, id)).await?);
            counters.push((p, of));
        }
        let mut content = Vec::new();
        if record.has_rows() {
            content = self.bytes(keys::of_batch(id, "content")).await?;
        }
        let head = self.bytes(keys::of_batch(id, "head")).await?;
        let BatchRecord {
            released,
            archived,
            started_at,
            completed_at,
            accepted,
            rejected,
            ..
        } = record;
        let piece = BatchPiece {
            id,
            head: String::from_utf8_lossy(&head).into_owned(),
            state: record.state.code(),
            released,
            archived,
            retired: !record.has_rows(),
            started_at,
            completed_at,
            accepted,
            rejected,
            counters,
            content,
        };
        give(to, Piece::Batch(Box::new(piece))).await
    }

    async fn bytes(&self, key: String) -> Result<Vec<u8>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(key);
        Ok(answer::bytes(self.link.short(&get).await?).unwrap_or_default())
    }

    async fn stands(&self, p: Partition, batch: BatchId) -> Result<Stands> {
        let mut stands = Stands::new();
        for some in self.ranges_of(p, batch).await?.chunks(AT_ONCE) {
            let mut pipeline = Pipeline::new();
            for id in some {
                pipeline
                    .cmd("GET")
                    .arg(keys::range(p, &keys::range_name(*id)));
            }
            for stored in self.link.bulk(&pipeline).await? {
                let Some(stored) = answer::bytes(stored) else {
                    continue;
                };
                let range = Range::read(p, &stored)?;
                let deferred = matches!(range.piece, RangePiece::Refs(_));
                let held = range.holder != Holder::Nobody;
                for (offset, of) in (0_u32..).zip(range.refs()) {
                    let stand = Stand {
                        due: deferred.then_some(range.due_at),
                        doubtful: held && offset < range.window,
                    };
                    stands.insert((of.lot, of.position), stand);
                }
            }
        }
        Ok(stands)
    }

    async fn give_lots(
        &self,
        p: Partition,
        batch: BatchId,
        to: &mpsc::Sender<Piece>,
    ) -> Result<()> {
        let lots = self.lots_in(p, batch).await?;
        for some in lots.chunks(LOTS) {
            let before = self.stands(p, batch).await?;
            let mut pieces = Vec::new();
            for (lot, _) in some {
                pieces.extend(self.lot_piece(p, batch, *lot).await?);
            }
            let after = self.stands(p, batch).await?;
            for mut piece in pieces {
                let rows = u16::try_from(piece.cells.len() / Cell::BYTES);
                let mut doubtful = Vec::new();
                for position in 0..rows.unwrap_or(u16::MAX) {
                    let key = (piece.number, position);
                    let (then, now) = (before.get(&key), after.get(&key));
                    if !Stand::is_untouched(then, now) {
                        doubtful.push(position);
                    }
                    let due = now.or(then).and_then(|stand| stand.due);
                    piece.due.extend(due.map(|due| (position, due)));
                }
                backup::mark_doubtful(&mut piece.cells, doubtful.into_iter());
                give(to, Piece::Lot(Box::new(piece))).await?;
            }
        }
        Ok(())
    }

    async fn lot_piece(
        &self,
        p: Partition,
        batch: BatchId,
        lot: LotNumber,
    ) -> Result<Option<LotPiece>> {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("GET").arg(keys::lot(p, batch, lot.0));
        pipeline.cmd("GET").arg(keys::cells(p, batch, lot.0));
        pipeline
            .cmd("LRANGE")
            .arg(keys::facts(p, batch, lot.0))
            .arg(0)
            .arg(-1);
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        let mut next = || answers.next().unwrap_or_default();
        let (Some(stored), Some(cells)) = (answer::bytes(next()), answer::bytes(next())) else {
            return Ok(None);
        };
        let (queue, _, rows) = lot_parts(&stored)
            .ok_or_else(|| StoreError::Damaged(format!("lot {} of {batch}", lot.0)))?;
        let facts = answer::list(next()).into_iter().filter_map(answer::bytes);
        Ok(Some(LotPiece {
            batch,
            number: lot,
            queue: queue.to_owned(),
            rows: rows.to_vec(),
            cells,
            due: Vec::new(),
            facts: facts.collect(),
        }))
    }

    async fn give_events(&self, to: &mpsc::Sender<Piece>) -> Result<()> {
        let mut query = EventQuery {
            limit: u32::try_from(backup::EVENTS).unwrap_or(1),
            ..EventQuery::default()
        };
        loop {
            let page = self.event_page(&query).await?;
            if page.events.is_empty() {
                return Ok(());
            }
            let told = page.events.iter().map(form::event_json);
            give(to, Piece::Events(told.collect::<Result<_>>()?)).await?;
            query.after = Some(page.next);
        }
    }
}
