//! Readings: batches, the backlog, totals, recipients, the story of a message, an address.
//!
//! Must not change anything.

use super::batches::batch_list;
use super::cache::{LotKey, MAP_CHUNK, MAP_ENTRY, read_place};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{self, BatchRecord, Cells, Lot};
use super::stage::short_hash;
use super::{Clock, Inner};
use crate::describe::{self, Facts};
use crate::form::{self, LogBlock};
use crate::transition::Cell;
use crate::{
    AddressStory, BACKLOG_BATCHES, Backlog, Batch, BatchHead, BatchQuery, MIXED, MessageStory,
    Page, RecipientQuery, RecipientRow, Result, StoreError, Totals,
};
use ::redis::{Cmd, Pipeline, Value};
use futures_util::future::try_join_all;
use model::{BatchId, BatchState, Counters, FactId, MessageId, Partition, Place, Timestamp};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Pieces of the index map looked through for one page: a filter that finds little answers with
/// a short page and a cursor.
const CHUNKS: u32 = 64;
/// Messages told of an address.
const MESSAGES: usize = 100;
/// Lots looked through for an address, newest first, and at once.
const LOTS: usize = 50_000;
const LOTS_AT_ONCE: usize = 256;
/// Batches looked at for one page of a list, at once and in all.
const BATCHES_AT_ONCE: usize = 128;
const BATCHES: usize = 20_000;

/// A recipient chosen by its cell, not read yet.
struct Found {
    key: LotKey,
    position: u16,
    cell: Cell,
}

impl Inner {
    /// One batch.
    pub(super) async fn batch(&self, batch: BatchId) -> Result<Option<Batch>> {
        match self.home(batch).await? {
            None => Ok(None),
            Some(record) => self.describe(batch, &record).await.map(Some),
        }
    }

    /// The record of a batch whose recipients are there to be read.
    async fn with_rows(&self, batch: BatchId) -> Result<Option<BatchRecord>> {
        Ok(self.home(batch).await?.filter(BatchRecord::has_rows))
    }

    /// The content of a batch.
    pub(super) async fn content(&self, batch: BatchId) -> Result<Option<Arc<[u8]>>> {
        if self.with_rows(batch).await?.is_none() {
            return Ok(None);
        }
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::of_batch(batch, "content"));
        Ok(answer::bytes(self.link.short(&get).await?).map(Arc::from))
    }

    /// Batches, newest first.
    pub(super) async fn batches(&self, query: &BatchQuery) -> Result<Page<Batch>> {
        let limit = usize::try_from(query.limit.clamp(1, 1_000)).unwrap_or(1);
        let mut items = Vec::new();
        let mut from = query.after.map_or("+".to_owned(), |id| format!("({id}"));
        let (mut looked, mut last) = (0, None);
        while items.len() < limit && looked < BATCHES {
            let mut page = Cmd::new();
            page.arg("ZREVRANGEBYLEX")
                .arg(keys::batches(HOME))
                .arg(&from)
                .arg("-")
                .arg("LIMIT")
                .arg(0)
                .arg(BATCHES_AT_ONCE);
            let ids = batch_list(answer::list(self.link.short(&page).await?));
            let records = self.records(&ids).await?;
            for (id, record) in ids.iter().zip(records) {
                if items.len() >= limit {
                    break;
                }
                last = Some(*id);
                if let Some(record) = record.filter(|of| query.state.is_none_or(|s| s == of.state))
                    && in_list(query, self.known_head(*id).await?.as_ref())
                {
                    items.push(self.describe(*id, &record).await?);
                }
            }
            looked += ids.len();
            match ids.last() {
                Some(id) if ids.len() == BATCHES_AT_ONCE => from = format!("({id}"),
                _ => break,
            }
        }
        let more = items.len() == limit || looked >= BATCHES;
        let next = last.filter(|_| more).map(|id| id.to_string());
        Ok(Page { items, next })
    }

    /// The records of batches.
    pub(super) async fn records(&self, ids: &[BatchId]) -> Result<Vec<Option<BatchRecord>>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = Pipeline::new();
        for id in ids {
            pipeline.cmd("GET").arg(keys::batch(HOME, *id));
        }
        let found = self.link.bulk(&pipeline).await?.into_iter();
        let read = |value| answer::bytes(value).map(|bytes| BatchRecord::read(&bytes));
        found.map(|value| read(value).transpose()).collect()
    }

    // ---- backlog and totals -------------------------------------------------------------

    /// Due work by queue.
    pub(super) async fn backlog(
        &self,
        now: Timestamp,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<Backlog>> {
        self.tidy(now).await?;
        let upto = match self.clock {
            Clock::Server => Vec::new(),
            Clock::Caller => keys::moment(now.millis() + 1).to_vec(),
        };
        let from = after.map_or("-".to_owned(), |queue| format!("({queue}\u{1}"));
        let parts = self.all_partitions().map(|p| {
            let arguments = vec![
                keys::prefix(p).into_bytes(),
                upto.clone(),
                from.clone().into_bytes(),
                // Two ranks of each.
                (u64::from(limit) * 2).to_string().into_bytes(),
            ];
            async move {
                let keys = [keys::queues(p)];
                self.script(&self.scripts.survey, p, &keys, &arguments, false)
                    .await
            }
        });
        let mut queues: BTreeMap<Box<str>, Backlog> = BTreeMap::new();
        for part in try_join_all(parts).await? {
            for of in answer::list(part) {
                survey(&mut queues, of, now)?;
            }
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Ok(queues.into_values().take(limit).collect())
    }

    /// Recipients by state, and what is overdue longest.
    pub(super) async fn totals(&self, now: Timestamp) -> Result<Totals> {
        let mut totals = Totals {
            unreadable: self.unreadable(),
            ..Totals::default()
        };
        let mut find = Cmd::new();
        find.arg("ZRANGE").arg(keys::open(HOME)).arg(0).arg(-1);
        let open = batch_list(answer::list(self.link.short(&find).await?));
        for some in open.chunks(BATCHES_AT_ONCE) {
            self.total_of(some, now, &mut totals).await?;
        }
        Ok(totals)
    }

    /// Adds up some open batches.
    async fn total_of(&self, open: &[BatchId], now: Timestamp, totals: &mut Totals) -> Result<()> {
        let parts = self.all_partitions().map(|p| {
            let mut pipeline = Pipeline::new();
            for batch in open {
                pipeline.cmd("GET").arg(keys::batch(p, *batch));
                pipeline.cmd("HGETALL").arg(keys::counters(p, *batch));
                let first = pipeline.cmd("ZRANGE").arg(keys::ranges(p, *batch));
                first.arg(0).arg(0).arg("WITHSCORES");
            }
            async move { self.link.bulk(&pipeline).await }
        });
        let parts = try_join_all(parts).await?;
        let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
        for _ in open {
            let (mut counters, mut first, mut home) = (Counters::default(), None, None);
            for part in &mut parts {
                let mut next = || part.next().unwrap_or_default();
                // That of partition 0 is the truth.
                home = home.or(Some(next()));
                record::add_counters(&mut counters, &answer::pairs(next()));
                first = first.into_iter().chain(first_due(next(), now)).min();
            }
            let home = home.and_then(answer::bytes);
            let Some(record) = home.map(|bytes| BatchRecord::read(&bytes)).transpose()? else {
                continue;
            };
            totals.scheduled += counters.scheduled;
            totals.queued += counters.queued;
            totals.temporary_error += counters.temporary_error;
            // A range of first attempts is due when its batch is.
            let first = first.filter(|_| record.active());
            let first = first.map(|first| first.max(record.release_at));
            totals.oldest_due = totals.oldest_due.into_iter().chain(first).min();
        }
        Ok(())
    }

    // ---- recipients ---------------------------------------------------------------------

    /// Recipients of a batch in order of index.
    pub(super) async fn recipients(&self, query: &RecipientQuery) -> Result<Page<RecipientRow>> {
        let Some(record) = self.with_rows(query.batch).await? else {
            return Ok(Page {
                items: Vec::new(),
                next: None,
            });
        };
        let limit = usize::try_from(query.limit.clamp(1, 1_000)).unwrap_or(1);
        let (mut found, mut next) = (Vec::new(), None);
        let first = query.from_index / MAP_CHUNK;
        'pieces: for piece in first..=first.saturating_add(CHUNKS) {
            if piece == first.saturating_add(CHUNKS) {
                next = Some((piece * MAP_CHUNK).to_string());
                break;
            }
            let from = piece.saturating_mul(MAP_CHUNK);
            let Some(entries) = self.map(query.batch, piece).await? else {
                break;
            };
            let places: Vec<(u32, Place)> = (from..)
                .zip(entries.chunks_exact(MAP_ENTRY))
                .filter_map(|(index, entry)| Some((index, read_place(entry)?)))
                .filter(|(index, _)| *index >= query.from_index)
                .collect();
            // The piece is looked through in parts, so that a small page reads little.
            for part in places.chunks(limit.max(64)) {
                let wanted = self.want(query, &record, part).await?;
                for (index, one) in wanted {
                    if found.len() >= limit {
                        next = Some(index.to_string());
                        break 'pieces;
                    }
                    found.extend(one);
                }
            }
        }
        let items = self.read_rows(query.batch, &record, &found).await?;
        Ok(Page { items, next })
    }

    /// Which of some places a query wants, each with its index.
    async fn want(
        &self,
        query: &RecipientQuery,
        record: &BatchRecord,
        places: &[(u32, Place)],
    ) -> Result<Vec<(u32, Option<Found>)>> {
        let lots: BTreeSet<LotKey> = places
            .iter()
            .map(|(_, place)| (query.batch, place.lot))
            .collect();
        let cells = self.cells_of(&lots).await?;
        let rows = match &query.domain {
            None => HashMap::new(),
            Some(_) => self.lots(&lots).await?,
        };
        let mut wanted = Vec::new();
        for (index, place) in places {
            let key = (query.batch, place.lot);
            let cell = cell_at(&cells, key, place.position)?;
            let in_domain = match (&query.domain, rows.get(&key)) {
                (None, _) => true,
                (Some(domain), Some(lot)) => {
                    let lot = lot.clone()?;
                    let row = lot.row(place.position);
                    row.is_some_and(|row| row.email.domain() == domain)
                        || *lot.queue == **domain && *lot.queue != *MIXED
                }
                (Some(_), None) => false,
            };
            let wants = describe::wanted(query, cell, record.released, record.tracking);
            let found = (wants && in_domain).then_some(Found {
                key,
                position: place.position,
                cell,
            });
            wanted.push((*index, found));
        }
        Ok(wanted)
    }

    async fn cells_of(&self, lots: &BTreeSet<LotKey>) -> Result<HashMap<LotKey, Cells>> {
        let mut parts: BTreeMap<Partition, Vec<LotKey>> = BTreeMap::new();
        for key in lots {
            parts.entry(key.1.partition()).or_default().push(*key);
        }
        let parts = parts.into_iter().map(|(p, keys_of)| async move {
            let mut cells = Vec::new();
            for some in keys_of.chunks(LOTS_AT_ONCE) {
                let mut pipeline = Pipeline::new();
                for (batch, lot) in some {
                    pipeline.cmd("GET").arg(keys::cells(p, *batch, lot.0));
                }
                let found = self.link.bulk(&pipeline).await?;
                for (key, value) in some.iter().zip(found) {
                    let stored = answer::bytes(value).map(Cells::read);
                    cells.extend(stored.map(|cells| (*key, cells)));
                }
            }
            Ok::<_, StoreError>(cells)
        });
        Ok(try_join_all(parts).await?.into_iter().flatten().collect())
    }

    /// Reads the facts of a lot for some of its positions.
    async fn facts_of(&self, key: LotKey, positions: &HashSet<u16>) -> Result<HashMap<u16, Facts>> {
        let mut find = Cmd::new();
        find.arg("LRANGE")
            .arg(keys::facts(key.1.partition(), key.0, key.1.0))
            .arg(0)
            .arg(-1);
        let mut all: HashMap<u16, Facts> = HashMap::new();
        for packed in answer::list(self.link.short(&find).await?) {
            let packed = answer::bytes(packed).unwrap_or_default();
            let block: LogBlock = form::unpack_log(&packed)?;
            for entry in block.entries {
                if positions.contains(&entry.position) {
                    let id = FactId {
                        journal: block.journal,
                        seq: entry.seq,
                    };
                    all.entry(entry.position).or_default().add(id, entry.fact);
                }
            }
        }
        Ok(all)
    }

    /// Reads the rows and facts of recipients, lot by lot, and gives them back in their order.
    async fn read_rows(
        &self,
        batch: BatchId,
        record: &BatchRecord,
        found: &[Found],
    ) -> Result<Vec<RecipientRow>> {
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let head = self.known_head(batch).await?;
        let keys_of: BTreeSet<LotKey> = found.iter().map(|of| of.key).collect();
        let lots = self.lots(&keys_of).await?;
        let mut facts = HashMap::new();
        for key in keys_of {
            let of_lot = found.iter().filter(|of| of.key == key);
            let positions = of_lot.map(|of| of.position).collect();
            facts.insert(key, self.facts_of(key, &positions).await?);
        }
        let none = Facts::default();
        let mut rows = Vec::new();
        for of in found {
            let row = row_at(&lots, of.key, of.position)?;
            let facts = facts.get(&of.key).and_then(|facts| facts.get(&of.position));
            let facts = facts.unwrap_or(&none);
            rows.push(describe::describe(
                row,
                of.cell,
                record.released,
                &head,
                facts,
            ));
        }
        Ok(rows)
    }

    /// One message with all its facts.
    pub(super) async fn message(&self, message: MessageId) -> Result<Option<MessageStory>> {
        Ok(self.messages(&[message]).await?.pop())
    }

    /// Messages with all their facts, lot by lot.
    pub(super) async fn messages(&self, messages: &[MessageId]) -> Result<Vec<MessageStory>> {
        let mut by_lot: BTreeMap<LotKey, HashSet<u16>> = BTreeMap::new();
        for message in messages {
            if let Some(place) = self.place_of(message.batch, message.index).await? {
                let key = (message.batch, place.lot);
                by_lot.entry(key).or_default().insert(place.position);
            }
        }
        let mut stories = Vec::new();
        for (key, positions) in by_lot {
            let Some(record) = self.with_rows(key.0).await? else {
                continue;
            };
            let head = self.known_head(key.0).await?;
            let only = BTreeSet::from([key]);
            let (cells, rows) = (self.cells_of(&only).await?, self.lots(&only).await?);
            let mut all = self.facts_of(key, &positions).await?;
            for position in positions {
                let (cell, row) = (
                    cell_at(&cells, key, position)?,
                    row_at(&rows, key, position)?,
                );
                let mut facts = all.remove(&position).unwrap_or_default();
                facts.sort();
                stories.push(MessageStory {
                    recipient: describe::describe(row, cell, record.released, &head, &facts),
                    batch: head.clone(),
                    attempts: facts.attempts,
                    hits: facts.hits,
                });
            }
        }
        Ok(stories)
    }

    /// What is known of an address. There is no record per recipient to look up: the lots of its
    /// domain and the mixed ones have four bytes of hash for each.
    pub(super) async fn address(&self, account: &str, email: &str) -> Result<AddressStory> {
        let email = email.to_lowercase();
        let suppressions = self.suppressions_of(account, &email).await?;
        let domain = email.rsplit_once('@').map_or("", |(_, domain)| domain);
        let p = Partition::of(account, &email, self.partitions);
        let mut lots = Vec::new();
        for queue in [domain, MIXED] {
            let mut find = Cmd::new();
            find.arg("ZREVRANGEBYLEX")
                .arg(keys::lots_of(p, queue))
                .arg("+")
                .arg("-")
                .arg("LIMIT")
                .arg(0)
                .arg(LOTS);
            let members = answer::list(self.link.short(&find).await?);
            let read = |member| keys::read_lot_member(&answer::bytes(member)?);
            lots.extend(members.into_iter().filter_map(read));
        }
        lots.sort_unstable_by(|a, b| b.cmp(a));
        let mut messages = Vec::new();
        for some in lots.chunks(LOTS_AT_ONCE) {
            if messages.len() >= MESSAGES {
                break;
            }
            for key in self.lots_with(p, some, &email).await? {
                messages.extend(self.messages_at(account, &email, key).await?);
            }
        }
        messages.sort_by_key(|(head, row): &(Arc<BatchHead>, RecipientRow)| {
            std::cmp::Reverse((head.id, row.row.index))
        });
        messages.truncate(MESSAGES);
        Ok(AddressStory {
            suppressions,
            messages,
        })
    }

    /// Those of some lots that may have an address.
    pub(super) async fn lots_with(
        &self,
        p: Partition,
        some: &[LotKey],
        email: &str,
    ) -> Result<Vec<LotKey>> {
        let keys_of: Vec<String> = some
            .iter()
            .map(|(batch, lot)| keys::lot(p, *batch, lot.0))
            .collect();
        let hash = [short_hash(email).to_le_bytes().to_vec()];
        let found = self
            .script(&self.scripts.find, p, &keys_of, &hash, false)
            .await?;
        let numbers = answer::list(found).into_iter().map(answer::number);
        let key = |number: i64| some.get(usize::try_from(number - 1).ok()?).copied();
        Ok(numbers.filter_map(key).collect())
    }

    async fn messages_at(
        &self,
        account: &str,
        email: &str,
        key: LotKey,
    ) -> Result<Vec<(Arc<BatchHead>, RecipientRow)>> {
        let Some(record) = self.with_rows(key.0).await? else {
            return Ok(Vec::new());
        };
        let head = self.known_head(key.0).await?;
        // Hashes collide, and accounts share them.
        if head.account != account {
            return Ok(Vec::new());
        }
        let only = BTreeSet::from([key]);
        let Some(lot) = self.lots(&only).await?.remove(&key).transpose()? else {
            return Ok(Vec::new());
        };
        let cells = self.cells_of(&only).await?;
        let mut found = Vec::new();
        for (position, row) in (0_u16..).zip(&lot.rows) {
            let cell = cell_at(&cells, key, position)?;
            if row.email.normalised() == email && !cell.erased() {
                found.push(Found {
                    key,
                    position,
                    cell,
                });
            }
        }
        let rows = self.read_rows(key.0, &record, &found).await?;
        Ok(rows
            .into_iter()
            .map(|row| (Arc::clone(&head), row))
            .collect())
    }
}

fn in_list(query: &BatchQuery, head: &BatchHead) -> bool {
    query
        .account
        .as_ref()
        .is_none_or(|account| *account == head.account)
        && query
            .campaign
            .as_ref()
            .is_none_or(|campaign| Some(campaign) == head.campaign.as_ref())
}

/// When the first of some ranges is due, unless that is later than now. `pair`: its name and score.
fn first_due(pair: Value, now: Timestamp) -> Option<Timestamp> {
    let (_, score) = answer::pairs(pair).into_iter().next()?;
    let at = String::from_utf8(score).ok()?.parse().ok()?;
    Some(Timestamp::from_millis(at)).filter(|at| *at <= now)
}

fn cell_at(cells: &HashMap<LotKey, Cells>, key: LotKey, position: u16) -> Result<Cell> {
    let cell = match cells.get(&key) {
        Some(cells) => cells.get(position)?,
        None => None,
    };
    cell.ok_or_else(|| {
        StoreError::Damaged(format!(
            "lot {} of {} has no cell {position}",
            key.1.0, key.0
        ))
    })
}

fn row_at(
    lots: &HashMap<LotKey, Result<Arc<Lot>>>,
    key: LotKey,
    position: u16,
) -> Result<model::Row> {
    let lot = lots.get(&key).cloned().transpose()?;
    let row = lot.and_then(|lot| lot.row(position).cloned());
    row.ok_or_else(|| {
        StoreError::Damaged(format!(
            "lot {} of {} has no row {position}",
            key.1.0, key.0
        ))
    })
}

/// Adds what a partition says of a batch in a queue.
fn survey(queues: &mut BTreeMap<Box<str>, Backlog>, of: Value, now: Timestamp) -> Result<()> {
    let mut parts = answer::list(of).into_iter();
    let mut next = || parts.next().unwrap_or_default();
    let name = answer::bytes(next()).unwrap_or_default();
    let record = BatchRecord::read(&answer::bytes(next()).unwrap_or_default())?;
    let due = u64::try_from(answer::number(next())).unwrap_or(0);
    let following = answer::bytes(next()).and_then(|bytes| bytes.try_into().ok());
    let following = following.map(|bytes| {
        let millis = i64::try_from(u64::from_be_bytes(bytes)).unwrap_or(i64::MAX);
        Timestamp::from_millis(millis)
    });
    let following = following.filter(|at| at.millis() < crate::HELD_BACK);
    let batch = answer::bytes(next()).and_then(|bytes| String::from_utf8(bytes).ok());
    let batch: Option<BatchId> = batch.and_then(|text| text.parse().ok());
    let (due, following, transactional) = match record.state {
        BatchState::InProgress => (due, following, record.rank() == 0 && due > 0),
        BatchState::Scheduled => (0, Some(record.release_at.max(now)), false),
        BatchState::Open | BatchState::Paused | BatchState::Completed | BatchState::Cancelled => {
            return Ok(());
        }
    };
    let text = String::from_utf8(name).unwrap_or_default();
    let Some((queue, _)) = text
        .rsplit_once('\0')
        .filter(|_| due > 0 || following.is_some())
    else {
        return Ok(());
    };
    let backlog = queues.entry(queue.into()).or_insert_with(|| Backlog {
        queue: queue.into(),
        due: 0,
        next_due: None,
        transactional: false,
        batches: Vec::new(),
    });
    backlog.due += due;
    // Each partition tells of it.
    let named = batch.filter(|batch| !backlog.batches.contains(batch));
    let is_bulk = due > 0 && record.rank() != 0;
    if is_bulk && backlog.batches.len() < BACKLOG_BATCHES {
        backlog.batches.extend(named);
    }
    backlog.transactional |= transactional;
    backlog.next_due = match (backlog.next_due, following) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    Ok(())
}
