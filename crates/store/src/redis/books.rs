//! The books of one step in one partition: what it needs is read before, everything is changed
//! here in memory, and [`Books::close`] makes one [`Commit`] of it.
//!
//! Every change of a recipient goes through here, so that its status, the counters and the event
//! change together. What was read is checked by the commit. Must not decide what changes:
//! `transition` does.

use super::Inner;
use super::cache::LotKey;
use super::commit::Commit;
use super::keys;
use super::link::answer;
use super::news::{self, Texts};
use super::record::{self, BatchRecord, Cells, Holder, Lot, Piece, Range, Version, new_version};
use crate::form::{LogBlock, LogEntry, Packer, Ref};
use crate::tell::{self, Details, Told};
use crate::transition::{self, Applied, Cell};
use crate::{Announcement, BatchHead, Consent, Control, LOT_ROWS, Result, StoreError, Suppression};
use ::redis::Pipeline;
use model::{
    BatchId, Counters, EventKind, Fact, JournalId, LotNumber, Partition, Seq, Status, Timestamp,
    partition_hash,
};
use rustc_hash::FxHashMap;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use tokio::time::Instant;

/// What a step has to read.
#[derive(Debug, Default)]
pub(super) struct Needs {
    pub(super) cells: BTreeSet<LotKey>,
    pub(super) lots: BTreeSet<LotKey>,
    pub(super) batches: BTreeSet<BatchId>,
    pub(super) ranges: BTreeSet<u64>,
    /// Account and address.
    pub(super) addresses: BTreeSet<(String, String)>,
    /// Whether anybody said how much may be kept of them.
    pub(super) any_consents: bool,
    /// Of whom what they said: account and address.
    pub(super) consents: BTreeSet<(String, String)>,
    /// How far this journal was taken.
    pub(super) mark_of: Option<JournalId>,
}

/// A range as it was read and as it is to be.
#[derive(Debug, Clone)]
struct RangeBook {
    stored: Option<Range>,
    now: Option<Range>,
    changed: bool,
}

/// Where retries are filed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RetryKey {
    pub(super) batch: BatchId,
    pub(super) queue: Box<str>,
    pub(super) rank: u8,
    pub(super) due_at: i64,
}

impl RetryKey {
    /// The range in which these are collected: found by its name alone, without an index.
    fn range_id(&self, partition: Partition) -> u64 {
        let name = format!("{} {} {}", self.batch, self.due_at, self.queue);
        partition_hash(&format!("retry {} {}", partition.0, self.rank), &name)
    }
}

/// What a step looks up for every fact, by names of our own making: nobody else chooses their hashes.
type Table<K, V> = FxHashMap<K, V>;

/// What is kept of each lot for the story.
type Logs<'a> = BTreeMap<LotKey, Vec<LogEntry<Cow<'a, Fact>>>>;

/// The open books of a step.
pub(super) struct Books<'a> {
    pub(super) inner: &'a Inner,
    pub(super) partition: Partition,
    pub(super) now: Timestamp,
    /// The time by which leases run out.
    pub(super) moment: i64,
    /// The server's time in microseconds: a fencing token.
    pub(super) token: u64,
    /// When that was told.
    asked_at: Instant,
    /// The number of the last event of the step before.
    numbered: u64,
    /// How far the journal that was asked for was taken.
    pub(super) mark: Seq,
    cells: Table<LotKey, Option<Cells>>,
    lots: Table<LotKey, Result<Arc<Lot>>>,
    heads: Table<BatchId, Arc<BatchHead>>,
    batches: Table<BatchId, Option<BatchRecord>>,
    ranges: BTreeMap<u64, RangeBook>,
    counters: Table<BatchId, Counters>,
    logs: Logs<'a>,
    pub(super) retries: BTreeMap<RetryKey, Vec<Ref>>,
    pub(super) known: HashMap<(String, String), Vec<Suppression>>,
    suppressions_version: Option<Option<Version>>,
    /// The version that this step gives them.
    touched: Option<Version>,
    /// Whether anybody in the partition said how much may be kept of them, as far as it was asked.
    pub(super) any_consents: bool,
    pub(super) consents: HashMap<(String, String), Option<Consent>>,
    pub(super) events: Texts,
    control: Vec<Control>,
    /// What else is written.
    pub(super) commit: Commit,
}

impl<'a> Books<'a> {
    pub(super) fn open(inner: &'a Inner, partition: Partition, now: Timestamp) -> Self {
        Self {
            inner,
            partition,
            now,
            moment: now.millis(),
            token: 0,
            asked_at: Instant::now(),
            numbered: 0,
            mark: 0,
            cells: Table::default(),
            lots: Table::default(),
            heads: Table::default(),
            batches: Table::default(),
            ranges: BTreeMap::new(),
            counters: Table::default(),
            logs: BTreeMap::new(),
            retries: BTreeMap::new(),
            known: HashMap::new(),
            suppressions_version: None,
            touched: None,
            any_consents: false,
            consents: HashMap::new(),
            events: Texts::default(),
            control: Vec::new(),
            commit: Commit::new(partition),
        }
    }

    /// Notes the server's time.
    pub(super) fn set_time(&mut self, seconds: i64, micros: i64) {
        let micros = seconds * 1_000_000 + micros;
        self.asked_at = Instant::now();
        self.token = u64::try_from(micros).unwrap_or(0);
        if self.inner.clock == super::Clock::Server {
            self.moment = micros / 1_000;
        }
    }

    /// The server's time in microseconds, behind the events of the step before; 0 when it is not known.
    fn time_for_events(&self) -> u64 {
        if self.token == 0 {
            return 0;
        }
        let since = u64::try_from(self.asked_at.elapsed().as_micros()).unwrap_or(0);
        (self.token + since).max(self.numbered + 1)
    }

    // ---- reading ------------------------------------------------------------------------

    /// Reads what is needed and was not read yet, in one round trip when the rows are cached.
    pub(super) async fn load(&mut self, needs: &Needs) -> Result<()> {
        let p = self.partition;
        let cells: Vec<LotKey> = missing(&needs.cells, |key| self.cells.contains_key(key));
        let batches: Vec<BatchId> = missing(&needs.batches, |key| self.batches.contains_key(key));
        let ranges: Vec<u64> = missing(&needs.ranges, |key| self.ranges.contains_key(key));
        let addresses = missing(&needs.addresses, |key| self.known.contains_key(key));
        let mut pipeline = Pipeline::new();
        pipeline.cmd("TIME");
        for (batch, lot) in &cells {
            pipeline.cmd("GET").arg(keys::cells(p, *batch, lot.0));
        }
        for batch in &batches {
            pipeline.cmd("GET").arg(keys::batch(p, *batch));
        }
        for id in &ranges {
            pipeline
                .cmd("GET")
                .arg(keys::range(p, &keys::range_name(*id)));
        }
        let with_suppressions = !addresses.is_empty() && self.suppressions_version.is_none();
        if with_suppressions {
            pipeline.cmd("GET").arg(keys::suppressions_version(p));
        }
        for (account, email) in &addresses {
            super::suppress::ask(&mut pipeline, self.inner, p, account, email);
        }
        if let Some(journal) = needs.mark_of {
            super::ship::ask_mark(&mut pipeline, p, journal);
        }
        if needs.any_consents {
            pipeline.cmd("EXISTS").arg(keys::consents(p));
        }
        let people = missing(&needs.consents, |key| self.consents.contains_key(key));
        super::consent::ask(&mut pipeline, self.inner, p, &people);
        let mut answers = self.inner.link.bulk(&pipeline).await?.into_iter();
        let mut next = || answers.next().unwrap_or_default();
        let mut time = answer::list(next()).into_iter().map(answer::number);
        if let (Some(seconds), Some(micros)) = (time.next(), time.next()) {
            self.set_time(seconds, micros);
        }
        for key in cells {
            let stored = answer::bytes(next());
            self.cells.insert(key, stored.map(Cells::read));
        }
        for batch in batches {
            let found = answer::bytes(next());
            let record = found.map(|bytes| BatchRecord::read(&bytes)).transpose()?;
            self.batches.insert(batch, record);
        }
        for id in ranges {
            let found = answer::bytes(next());
            let range = found.map(|bytes| Range::read(p, &bytes)).transpose()?;
            self.put_stored(id, range);
        }
        if with_suppressions {
            let found = answer::bytes(next());
            self.suppressions_version = Some(found.and_then(|bytes| bytes.try_into().ok()));
        }
        for key in addresses {
            let found =
                super::suppress::read_asked(&key.0, &key.1, std::array::from_fn(|_| next()));
            self.known.insert(key, found);
        }
        if needs.mark_of.is_some() {
            self.mark = u64::try_from(answer::number(next())).unwrap_or(0);
        }
        if needs.any_consents {
            self.any_consents = answer::number(next()) > 0;
        }
        super::consent::read_asked(self, people, next)?;
        self.load_rows(needs).await
    }

    /// Reads rows and heads, which never change.
    async fn load_rows(&mut self, needs: &Needs) -> Result<()> {
        let wanted: BTreeSet<LotKey> = needs
            .lots
            .iter()
            .filter(|key| !self.lots.contains_key(key))
            .copied()
            .collect();
        self.lots.extend(self.inner.lots(&wanted).await?);
        let of_lots = needs.lots.iter().map(|(batch, _)| *batch);
        let batches = of_lots.chain(needs.batches.iter().copied());
        let unknown = batches.filter(|batch| !self.heads.contains_key(batch));
        let heads = self.inner.heads(unknown.collect()).await?;
        self.heads.extend(heads);
        Ok(())
    }

    /// Takes in a batch that was read elsewhere in this step.
    pub(super) fn put_batch(&mut self, batch: BatchId, record: BatchRecord) {
        self.batches.insert(batch, Some(record));
    }

    /// Takes in a range that was read elsewhere in this step.
    pub(super) fn put_stored(&mut self, id: u64, range: Option<Range>) {
        let book = RangeBook {
            now: range.clone(),
            stored: range,
            changed: false,
        };
        self.ranges.insert(id, book);
    }

    /// The commit is to see that suppressions are still those of this version.
    pub(super) fn expect_suppressions(&mut self, version: Option<Version>) {
        self.suppressions_version = Some(version);
    }

    pub(super) fn batch(&self, batch: BatchId) -> Option<&BatchRecord> {
        self.batches.get(&batch)?.as_ref()
    }

    pub(super) fn head(&self, batch: BatchId) -> Result<Arc<BatchHead>> {
        let head = self.heads.get(&batch).cloned();
        head.ok_or_else(|| StoreError::Damaged(format!("batch {batch} has no head")))
    }

    pub(super) fn lot(&self, key: LotKey) -> Result<Arc<Lot>> {
        match self.lots.get(&key) {
            Some(lot) => lot.clone(),
            None => Err(StoreError::Damaged(format!(
                "{} has no lot {}",
                key.0, key.1.0
            ))),
        }
    }

    pub(super) fn row(&self, key: LotKey, position: u16) -> Result<model::Row> {
        self.lot(key)?.expect_row(position).cloned()
    }

    /// The cell of a recipient; `None` when there is none at that place.
    pub(super) fn cell(&self, key: LotKey, position: u16) -> Result<Option<Cell>> {
        match self.cells.get(&key) {
            Some(Some(cells)) => cells.get(position),
            Some(None) | None => Ok(None),
        }
    }

    pub(super) fn set_cell(&mut self, key: LotKey, position: u16, cell: Cell) {
        if let Some(Some(cells)) = self.cells.get_mut(&key) {
            cells.set(position, cell);
        }
    }

    pub(super) fn range(&self, id: u64) -> Option<&Range> {
        self.ranges.get(&id)?.now.as_ref()
    }

    /// The range, if this lease on it was not followed by another.
    pub(super) fn held(&self, of: crate::RangeRef) -> Option<&Range> {
        self.range(of.id)
            .filter(|range| range.token == of.token && range.holder != Holder::Nobody)
    }

    // ---- changing -----------------------------------------------------------------------

    /// Writes a range.
    pub(super) fn set_range(&mut self, range: Range) {
        let book = self.ranges.entry(range.id).or_insert(RangeBook {
            stored: None,
            now: None,
            changed: false,
        });
        book.changed = true;
        book.now = Some(range);
    }

    pub(super) fn remove_range(&mut self, id: u64) {
        if let Some(book) = self.ranges.get_mut(&id) {
            book.changed = true;
            book.now = None;
        }
    }

    /// Changes the counters of a batch.
    pub(super) fn count<T>(
        &mut self,
        batch: BatchId,
        change: impl FnOnce(&mut Counters) -> T,
    ) -> T {
        change(self.counters.entry(batch).or_insert_with(record::base))
    }

    /// Keeps a fact for the story.
    pub(super) fn log(&mut self, key: LotKey, position: u16, seq: Seq, fact: Cow<'a, Fact>) {
        let entry = LogEntry {
            position,
            seq,
            fact,
        };
        self.logs.entry(key).or_default().push(entry);
    }

    /// Notes the event of a fact.
    pub(super) fn fact_event(
        &mut self,
        kind: EventKind,
        journal: JournalId,
        seq: Seq,
        fact: &Fact,
        (key, position): (LotKey, u16),
    ) -> Result<()> {
        let head = self.head(key.0)?;
        let told = Told::of_fact(kind, journal, seq, fact, &head);
        let lot = self.lot(key)?;
        let variant = self.cell(key, position)?.map_or(0, Cell::variant);
        let who = (lot.expect_row(position)?, variant);
        self.events
            .push(tell::of_row(told, 0, self.now, &head, who));
        Ok(())
    }

    fn own<'t>(&self, kind: EventKind, identity: String, data: impl Into<Details<'t>>) -> Told<'t> {
        Told {
            kind,
            occurred_at: self.now,
            identity,
            data: data.into(),
        }
    }

    /// Notes an event of a batch.
    pub(super) fn batch_event(
        &mut self,
        kind: EventKind,
        head: &BatchHead,
        revision: u32,
        data: Value,
    ) {
        let told = self.own(kind, format!("{} {kind} {revision}", head.id), data);
        self.events.push(tell::of_batch(told, 0, self.now, head));
    }

    /// Notes an event of an address.
    pub(super) fn address_event(
        &mut self,
        kind: EventKind,
        account: &str,
        email: &str,
        data: Value,
    ) {
        let told = self.own(kind, format!("{}", fastrand::u128(..)), data);
        self.events
            .push(tell::of_address(told, 0, self.now, account, email));
    }

    /// Notes an event of an account.
    pub(super) fn account_event(&mut self, of: Announcement) {
        let told = self.own(of.kind, format!("{}", fastrand::u128(..)), of.data);
        self.events
            .push(tell::announced(told, 0, self.now, &of.account, of.about));
    }

    /// Notes events of accounts. The server's time numbers them, so that many are added beside the
    /// script and not by it.
    pub(super) async fn account_events(&mut self, all: Vec<Announcement>) -> Result<()> {
        if all.len() >= news::MANY {
            self.load(&Needs::default()).await?;
        }
        all.into_iter().for_each(|of| self.account_event(of));
        Ok(())
    }

    /// Ends a recipient that was not written to, with its event. Whether it was still open.
    pub(super) fn end_unsent(
        &mut self,
        key: LotKey,
        position: u16,
        status: Status,
        data: Value,
    ) -> Result<bool> {
        let Some(mut cell) = self.cell(key, position)? else {
            return Ok(false);
        };
        let data = tell::unsent(data, cell);
        let released = self.batch(key.0).is_none_or(|batch| batch.released);
        let lot = self.lot(key)?;
        let row = lot.expect_row(position)?;
        let applied = self.count(key.0, |counters| {
            transition::end_unsent(&mut cell, counters, released, status)
        });
        let Applied::Moved(kind) = applied else {
            return Ok(false);
        };
        self.set_cell(key, position, cell);
        let head = self.head(key.0)?;
        let told = self.own(kind, format!("{}.{} {kind}", key.0, row.index), data);
        let who = (row, cell.variant());
        self.events
            .push(tell::of_row(told, 0, self.now, &head, who));
        Ok(true)
    }

    /// Tells every node.
    pub(super) fn tell(&mut self, item: Control) {
        self.control.push(item);
    }

    /// Files a reference in a retry lot.
    pub(super) fn retry(&mut self, key: RetryKey, of: Ref) {
        self.retries.entry(key).or_default().push(of);
    }

    /// The ranges in which retries are collected, to be read before [`Books::file_retries`].
    pub(super) fn retry_ranges(&self) -> BTreeSet<u64> {
        let id = |key: &RetryKey| key.range_id(self.partition);
        self.retries.keys().map(id).collect()
    }

    /// Notes that suppressions change: whoever asked before has to ask again.
    pub(super) fn touch_suppressions(&mut self) {
        let version = *self.touched.get_or_insert_with(new_version);
        let key = keys::suppressions_version(self.partition);
        self.commit.write("SET", key, [version]);
    }

    /// Moves the mark of a journal, if it was not as far yet.
    pub(super) fn move_mark(&mut self, journal: JournalId, through: Seq) {
        if through <= self.mark {
            return;
        }
        let (key, field) = (keys::journals(self.partition), journal.to_string());
        let before = self.mark.to_string();
        let expected = (self.mark > 0).then_some(before.as_bytes());
        self.commit
            .check_field(key.clone(), field.as_bytes(), expected);
        self.commit.write("HSET", key, [field, through.to_string()]);
        self.mark = through;
    }

    /// Adds references to retry lots that nobody holds, or makes new ones.
    pub(super) fn file_retries(&mut self) {
        for (key, refs) in std::mem::take(&mut self.retries) {
            let id = key.range_id(self.partition);
            let known = self.ranges.get(&id).and_then(|book| book.now.clone());
            let fits = |range: &Range| {
                range.holder == Holder::Nobody
                    && range.batch == key.batch
                    && range.queue == key.queue
                    && range.due_at == key.due_at
                    && usize::try_from(range.count).unwrap_or(LOT_ROWS) + refs.len() <= LOT_ROWS
            };
            match known {
                Some(range) if fits(&range) => {
                    let mut all = range.refs();
                    all.extend(refs);
                    let range = Range {
                        count: u32::try_from(all.len()).unwrap_or(u32::MAX),
                        piece: Piece::Refs(all),
                        ..range
                    };
                    self.set_range(range);
                }
                known => {
                    let mut id = known.is_none().then_some(id);
                    for refs in refs.chunks(LOT_ROWS) {
                        let id = id.take().unwrap_or_else(|| fastrand::u64(..));
                        let range = self.new_range(id, &key, refs.to_vec());
                        self.set_range(range);
                    }
                }
            }
        }
    }

    fn new_range(&self, id: u64, key: &RetryKey, refs: Vec<Ref>) -> Range {
        Range {
            version: [0; 8],
            id,
            partition: self.partition,
            batch: key.batch,
            queue: key.queue.clone(),
            rank: key.rank,
            due_at: key.due_at,
            count: u32::try_from(refs.len()).unwrap_or(u32::MAX),
            holder: Holder::Nobody,
            token: 0,
            expires: 0,
            window: 0,
            piece: Piece::Refs(refs),
        }
    }

    /// The recipients of a range that nobody reported, with their offsets.
    pub(super) fn unreported(&self, range: &Range) -> Result<Vec<(u32, Ref)>> {
        let mut open = Vec::new();
        for (offset, of) in (0_u32..).zip(range.refs()) {
            let cell = self.cell((range.batch, of.lot), of.position)?;
            if cell.is_some_and(|cell| !cell.reported_since(of.attempts)) {
                open.push((offset, of));
            }
        }
        Ok(open)
    }

    /// Ends as cancelled what is unreported from the offset `from` on. The rest of the range stays
    /// with its holder; a range of which nothing stays is removed. Whether something stays.
    pub(super) fn cancel_range(&mut self, range: &Range, from: u32) -> Result<bool> {
        let mut something_stays = false;
        for (offset, of) in self.unreported(range)? {
            if offset < from {
                something_stays = true;
            } else {
                let data = serde_json::json!({});
                self.end_unsent((range.batch, of.lot), of.position, Status::Cancelled, data)?;
            }
        }
        if !something_stays {
            self.remove_range(range.id);
        }
        Ok(something_stays)
    }

    // ---- writing ------------------------------------------------------------------------

    /// The only or last step; with it the batches whose open recipients it will tell, in that order.
    pub(super) fn close(
        mut self,
        journal: Option<JournalId>,
        floor: u64,
    ) -> Result<(Commit, Vec<BatchId>)> {
        self.step(journal, floor)
    }

    /// The step, as [`Books::close`]. The books are then as it will leave them, for another step of the
    /// same kind, if neither moves a range.
    pub(super) fn step(
        &mut self,
        journal: Option<JournalId>,
        floor: u64,
    ) -> Result<(Commit, Vec<BatchId>)> {
        let p = self.partition;
        let fresh = new_version();
        let mut commit = std::mem::replace(&mut self.commit, Commit::new(p));
        for (batch, record) in &self.batches {
            let version = record.as_ref().map(|record| record.version);
            commit.check(keys::batch(p, *batch), version);
        }
        if let Some(version) = self.suppressions_version {
            commit.check(keys::suppressions_version(p), version);
        }
        if let Some(version) = self.touched.take() {
            self.suppressions_version = Some(Some(version));
        }
        for ((batch, lot), cells) in &mut self.cells {
            let key = || keys::cells(p, *batch, lot.0);
            let Some(cells) = cells else {
                commit.check(key(), None);
                continue;
            };
            if let Some((at, bytes)) = cells.expected() {
                commit.check_bytes(key(), at, bytes);
            }
            if let Some((at, bytes)) = cells.changes() {
                let at = at.to_string();
                commit.write("SETRANGE", key(), [at.as_bytes(), bytes]);
            }
            cells.settle();
        }
        write_ranges(&mut commit, p, std::mem::take(&mut self.ranges), fresh);
        if let Some(journal) = journal {
            write_logs(&mut commit, p, journal, std::mem::take(&mut self.logs))?;
        }
        let mut told = Vec::new();
        for (batch, counters) in std::mem::take(&mut self.counters) {
            let moves = record::moves(counters);
            let open = ["scheduled", "queued", "temporary_error"];
            let less = moves
                .iter()
                .any(|(name, by)| *by < 0 && open.contains(name));
            if !moves.is_empty() {
                commit.count(keys::counters(p, batch), &moves, less);
            }
            if less {
                told.push(batch);
            }
        }
        let time = self.time_for_events();
        commit.events(std::mem::take(&mut self.events), floor, time)?;
        self.numbered = commit.last_event();
        commit.control(&std::mem::take(&mut self.control), self.now)?;
        Ok((commit, told))
    }
}

fn missing<K: Ord + Clone>(wanted: &BTreeSet<K>, known: impl Fn(&K) -> bool) -> Vec<K> {
    wanted.iter().filter(|key| !known(key)).cloned().collect()
}

/// Members that leave and come in one index.
#[derive(Default)]
struct Moves {
    gone: Vec<Vec<u8>>,
    come: Vec<Vec<u8>>,
}

/// Writes ranges and their places in the indices.
fn write_ranges(
    commit: &mut Commit,
    p: Partition,
    ranges: BTreeMap<u64, RangeBook>,
    fresh: Version,
) {
    let mut queues: BTreeMap<(u8, Box<str>), Moves> = BTreeMap::new();
    let mut batches: BTreeMap<BatchId, Moves> = BTreeMap::new();
    let mut nodes: BTreeMap<JournalId, Moves> = BTreeMap::new();
    for (id, book) in ranges {
        let name = keys::range_name(id);
        let key = keys::range(p, &name);
        commit.check(key.clone(), book.stored.as_ref().map(|range| range.version));
        if !book.changed {
            continue;
        }
        let member = |of: &Range| {
            let held = of.holder != Holder::Nobody;
            keys::member(of.batch, of.ready(), id, of.count, held)
        };
        let (old, new) = (book.stored.as_ref(), book.now.as_ref());
        let at = |of: &Range| ((of.rank, of.queue.clone()), member(of));
        let (from, to) = (old.map(at), new.map(at));
        if from != to {
            if let Some((queue, member)) = from {
                queues.entry(queue).or_default().gone.push(member);
            }
            if let Some((queue, member)) = to {
                let come = &mut queues.entry(queue).or_default().come;
                come.extend([b"0".to_vec(), member]);
            }
        }
        let due = |of: &Range| (of.batch, of.due_at);
        if old.map(due) != new.map(due) {
            match (old, new) {
                (_, Some(new)) => {
                    let come = &mut batches.entry(new.batch).or_default().come;
                    come.extend([
                        new.due_at.to_string().into_bytes(),
                        name.clone().into_bytes(),
                    ]);
                }
                (Some(old), None) => {
                    let gone = &mut batches.entry(old.batch).or_default().gone;
                    gone.push(name.clone().into_bytes());
                }
                (None, None) => {}
            }
        }
        let holder = |of: &Range| match of.holder {
            Holder::Node(node) => Some(node),
            Holder::Nobody | Holder::PutOff => None,
        };
        let (before, after) = (old.and_then(holder), new.and_then(holder));
        if before != after {
            let name = name.into_bytes();
            if let Some(node) = before {
                nodes.entry(node).or_default().gone.push(name.clone());
            }
            if let Some(node) = after {
                nodes.entry(node).or_default().come.push(name);
            }
        }
        match new {
            Some(range) => commit.write("SET", key, [range.write(fresh)]),
            None => commit.write::<&[u8]>("DEL", key, []),
        }
    }
    for ((rank, queue), moves) in queues {
        let key = keys::queue(p, rank, &queue);
        commit.write_many("ZREM", &key, &moves.gone, 1);
        commit.write_many("ZADD", &key, &moves.come, 2);
        commit.list_queue(rank, &queue);
    }
    for (batch, moves) in batches {
        let key = keys::ranges(p, batch);
        commit.write_many("ZREM", &key, &moves.gone, 1);
        commit.write_many("ZADD", &key, &moves.come, 2);
    }
    for (node, moves) in nodes {
        let key = keys::held(p, node);
        commit.write_many("SREM", &key, &moves.gone, 1);
        commit.write_many("SADD", &key, &moves.come, 1);
    }
}

fn write_logs(commit: &mut Commit, p: Partition, journal: JournalId, logs: Logs<'_>) -> Result<()> {
    let mut packer = Packer::new()?;
    for ((batch, LotNumber(lot)), entries) in logs {
        let block = LogBlock { journal, entries };
        let data = packer.pack_log(&block)?;
        commit.write("RPUSH", keys::facts(p, batch, lot), [data]);
    }
    Ok(())
}
