//! The books of one step: cells, counters, logs, retry lots and events are changed here in memory
//! and written once at its end.
//!
//! Owns how these are stored. Every change of a recipient goes through here, so that its status,
//! the counters and the event change together. Must not decide what changes: `transition` does.

use super::consent;
use super::control;
use super::erase;
use super::ids::{self, BatchNo, LotId};
use super::map;
use super::record::{
    BatchRecord, By, counter_ids, load_counters, read_counters, record, save_record,
};
use super::writer::Step;
use crate::erased::Eraser;
use crate::form::{self, EventBlock, LogBlock, LogEntry, Ref, StoredEvent, version};
use crate::tell;
use crate::transition::{self, Applied, Cell};
use crate::types::json_of;
use crate::{Announcement, BatchHead, Consent, Control, Result, StoreError};
use model::{
    About, BatchId, BatchState, Counters, EventKind, Fact, JournalId, Partition, Place, Seq,
    Status, Timestamp,
};
use rusqlite::{OptionalExtension as _, params};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// References in one retry lot.
const RETRY_ROWS: usize = crate::LOT_ROWS;
/// Events in one block: what a page of events has to unpack.
const BLOCK_EVENTS: usize = 1_000;
/// Chunks of index maps kept in a step: 1.5 MB.
const MAPS: usize = 256;

/// What a step changed that others follow.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Changed {
    pub(super) control: bool,
    pub(super) events: bool,
}

impl Changed {
    pub(super) const fn any(self) -> bool {
        self.control || self.events
    }
}

/// The mutable bytes of a lot.
struct LotBook {
    cells: Vec<u8>,
    dirty: bool,
    /// Whether some of its recipients have a tracking mode of their own; none: not asked yet.
    overrides: Option<bool>,
    log: Vec<LogEntry>,
}

/// An event that may wait for the number of its log entry.
enum Pending {
    Fact {
        kind: EventKind,
        lot: LotId,
        entry: usize,
    },
    Other(StoredEvent),
}

/// Where retries are filed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RetryKey {
    pub(super) batch: BatchNo,
    pub(super) partition: Partition,
    pub(super) queue: Box<str>,
    pub(super) rank: u8,
    pub(super) due_at: i64,
}

/// The open books of a step.
pub(super) struct Books<'s, 'c> {
    pub(super) step: &'s mut Step<'c>,
    pub(super) now: Timestamp,
    lots: HashMap<LotId, Option<LotBook>>,
    counters: HashMap<i64, Counters>,
    batches: HashMap<BatchNo, Option<BatchRecord>>,
    /// Chunks of index maps.
    maps: HashMap<i64, Vec<u8>>,
    retries: BTreeMap<RetryKey, Vec<Ref>>,
    events: Vec<Pending>,
    /// Batches whose counters moved.
    touched: BTreeSet<BatchNo>,
    /// What finds the consent of a person, where anybody said anything; none: not asked yet.
    consents: Option<Option<Eraser>>,
}

impl<'s, 'c> Books<'s, 'c> {
    pub(super) fn open(step: &'s mut Step<'c>, now: Timestamp) -> Self {
        Self {
            step,
            now,
            lots: HashMap::new(),
            counters: HashMap::new(),
            batches: HashMap::new(),
            maps: HashMap::new(),
            retries: BTreeMap::new(),
            events: Vec::new(),
            touched: BTreeSet::new(),
            consents: None,
        }
    }

    /// The batch as it is now.
    pub(super) fn batch(&mut self, no: BatchNo) -> Result<Option<BatchRecord>> {
        if let Some(known) = self.batches.get(&no) {
            return Ok(known.clone());
        }
        let found = record(self.step.connection, By::No(no))?;
        self.batches.insert(no, found.clone());
        Ok(found)
    }

    /// Changes the batch.
    pub(super) fn set_batch(&mut self, batch: BatchRecord) -> Result<()> {
        save_record(self.step.connection, &batch)?;
        self.batches.insert(batch.no, Some(batch));
        Ok(())
    }

    pub(super) fn head(&self, no: BatchNo) -> Result<Arc<BatchHead>> {
        self.step.cache.head(self.step.connection, no)
    }

    fn lot(&mut self, lot: LotId) -> Result<Option<&mut LotBook>> {
        use std::collections::hash_map::Entry;
        let book = match self.lots.entry(lot) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(free) => {
                let cells: Option<Vec<u8>> = self
                    .step
                    .connection
                    .prepare_cached("SELECT data FROM cell WHERE lot=?1")?
                    .query_row([lot], |row| row.get(0))
                    .optional()?;
                free.insert(cells.map(|cells| LotBook {
                    cells,
                    dirty: false,
                    overrides: None,
                    log: Vec::new(),
                }))
            }
        };
        Ok(book.as_mut())
    }

    /// Whether some recipients of the lot have a tracking mode of their own.
    pub(super) fn overrides(&mut self, lot: LotId) -> Result<bool> {
        if let Some(known) = self.lot(lot)?.and_then(|book| book.overrides) {
            return Ok(known);
        }
        let found = self
            .step
            .connection
            .prepare_cached("SELECT overrides FROM lot WHERE id=?1")?
            .query_row([lot], |row| row.get(0))?;
        if let Some(book) = self.lot(lot)? {
            book.overrides = Some(found);
        }
        Ok(found)
    }

    /// Whether anybody said how much may be kept of them.
    pub(super) fn any_consents(&mut self) -> Result<bool> {
        if self.consents.is_none() {
            let connection = self.step.connection;
            let any = consent::any(connection)?;
            self.consents = Some(any.then(|| erase::eraser(connection)).transpose()?);
        }
        Ok(self.consents.iter().flatten().next().is_some())
    }

    /// What a person said, asked where [`Books::any_consents`].
    pub(super) fn consent(&self, account: &str, email: &str) -> Result<Option<Consent>> {
        match &self.consents {
            Some(Some(eraser)) => {
                let name = eraser.name(account, email);
                consent::under(self.step.connection, account, &name)
            }
            Some(None) | None => Ok(None),
        }
    }

    /// Where an index stands; `None` when it was rejected or never given.
    pub(super) fn place_of(&mut self, batch: BatchNo, index: u32) -> Result<Option<Place>> {
        let id = ids::map_id(batch, index);
        if let Some(chunk) = self.maps.get(&id) {
            return Ok(map::place_in(chunk, index));
        }
        let chunk = map::chunk(self.step.connection, id)?.unwrap_or_default();
        let place = map::place_in(&chunk, index);
        if self.maps.len() >= MAPS {
            self.maps.clear();
        }
        self.maps.insert(id, chunk);
        Ok(place)
    }

    /// The cell of a recipient; `None` when there is none at that place.
    pub(super) fn cell(&mut self, lot: LotId, position: u16) -> Result<Option<Cell>> {
        let Some(book) = self.lot(lot)? else {
            return Ok(None);
        };
        let at = usize::from(position) * Cell::BYTES;
        match book.cells.get(at..at + Cell::BYTES) {
            None => Ok(None),
            Some(bytes) => Cell::read(bytes)
                .map(Some)
                .ok_or_else(|| StoreError::Damaged(format!("cell {position} of lot {lot}"))),
        }
    }

    pub(super) fn set_cell(&mut self, lot: LotId, position: u16, cell: Cell) -> Result<()> {
        let at = usize::from(position) * Cell::BYTES;
        if let Some(book) = self.lot(lot)?
            && let Some(bytes) = book.cells.get_mut(at..at + Cell::BYTES)
        {
            bytes.copy_from_slice(&cell.to_bytes());
            book.dirty = true;
        }
        Ok(())
    }

    /// Changes the counters of the batch in the partition of `lot`.
    pub(super) fn count<T>(
        &mut self,
        lot: LotId,
        change: impl FnOnce(&mut Counters) -> T,
    ) -> Result<T> {
        let (batch, number) = ids::split(lot);
        let id = ids::counter_id(batch, number.partition());
        self.touched.insert(batch);
        if let Some(counters) = self.counters.get_mut(&id) {
            return Ok(change(counters));
        }
        let mut counters = load_counters(self.step.connection, id)?;
        let outcome = change(&mut counters);
        self.counters.insert(id, counters);
        Ok(outcome)
    }

    /// Keeps a fact for the story; its number among those of the lot in this step.
    pub(super) fn log(&mut self, lot: LotId, position: u16, seq: Seq, fact: Fact) -> Result<usize> {
        let Some(book) = self.lot(lot)? else {
            return Ok(0);
        };
        book.log.push(LogEntry {
            position,
            seq,
            fact,
        });
        Ok(book.log.len() - 1)
    }

    /// Ends a recipient that was not written to, with its event. Whether it was still open.
    pub(super) fn end_unsent(
        &mut self,
        lot: LotId,
        position: u16,
        status: Status,
        data: serde_json::Value,
    ) -> Result<bool> {
        let Some(mut cell) = self.cell(lot, position)? else {
            return Ok(false);
        };
        let data = tell::unsent(data, cell);
        let released = self.released(lot)?;
        let applied = self.count(lot, |counters| {
            transition::end_unsent(&mut cell, counters, released, status)
        })?;
        let Applied::Moved(kind) = applied else {
            return Ok(false);
        };
        self.set_cell(lot, position, cell)?;
        self.events.push(Pending::Other(StoredEvent::Unsent {
            kind: kind.code(),
            lot,
            position,
            data: data.to_string(),
        }));
        Ok(true)
    }

    /// Notes that a recipient was erased; one that is open ends as suppressed, and no event tells of
    /// it, since it would say who.
    pub(super) fn erase(&mut self, lot: LotId, position: u16) -> Result<()> {
        let Some(mut cell) = self.cell(lot, position)? else {
            return Ok(());
        };
        let released = self.released(lot)?;
        self.count(lot, |counters| {
            transition::end_unsent(&mut cell, counters, released, Status::Suppressed)
        })?;
        cell.erase();
        self.set_cell(lot, position, cell)
    }

    /// Whether the mail of the lot's batch may leave.
    pub(super) fn released(&mut self, lot: LotId) -> Result<bool> {
        let batch = self.batch(ids::split(lot).0)?;
        Ok(batch.is_none_or(|batch| batch.released))
    }

    /// Notes the event of a fact that was logged as `entry`.
    pub(super) fn fact_event(&mut self, kind: EventKind, lot: LotId, entry: usize) {
        self.events.push(Pending::Fact { kind, lot, entry });
    }

    /// Notes an event of a batch.
    pub(super) fn batch_event(
        &mut self,
        kind: EventKind,
        batch: BatchNo,
        data: &serde_json::Value,
    ) {
        self.events.push(Pending::Other(StoredEvent::Batch {
            kind: kind.code(),
            batch,
            data: data.to_string(),
        }));
    }

    /// Notes an event of an address.
    pub(super) fn address_event(
        &mut self,
        kind: EventKind,
        account: &str,
        email: &str,
        data: &serde_json::Value,
    ) {
        self.events.push(Pending::Other(StoredEvent::Address {
            kind: kind.code(),
            account: account.to_owned(),
            email: email.to_owned(),
            data: data.to_string(),
        }));
    }

    /// Notes an event of an account.
    pub(super) fn account_event(&mut self, of: Announcement) {
        let (kind, account, data) = (of.kind.code(), of.account.into(), of.data.into_json());
        let event = if of.about == About::default() {
            StoredEvent::Account {
                kind,
                account,
                data,
            }
        } else {
            StoredEvent::Announced {
                kind,
                account,
                data,
                about: json_of(&of.about),
            }
        };
        self.events.push(Pending::Other(event));
    }

    /// Tells every node.
    pub(super) fn tell(&mut self, item: &Control) -> Result<()> {
        self.step.changed.control = true;
        control::append(self.step.connection, item, self.now)
    }

    /// Files a reference in a retry lot.
    pub(super) fn retry(&mut self, key: RetryKey, of: Ref) {
        self.retries.entry(key).or_default().push(of);
    }

    /// Lets the mail of a batch leave: what was scheduled is queued.
    pub(super) fn release_batch(&mut self, mut batch: BatchRecord) -> Result<()> {
        // What has waves stays scheduled until they are released.
        let in_waves = self.head(batch.no)?.is_in_waves();
        let ids = match in_waves {
            true => Vec::new(),
            false => counter_ids(self.step.connection, batch.no)?,
        };
        for id in ids {
            let lot = ids::any_lot(id);
            self.count(lot, |counters| {
                counters.queued += std::mem::take(&mut counters.scheduled);
            })?;
        }
        batch.released = true;
        self.set_batch(batch)
    }

    /// Writes everything; the batches that were completed by it.
    pub(super) fn close(mut self, journal: Option<JournalId>) -> Result<Vec<BatchId>> {
        self.write_counters()?;
        let completed = self.complete()?;
        let logs = self.write_lots(journal)?;
        for (key, refs) in std::mem::take(&mut self.retries) {
            file_retries(self.step, &key, &refs)?;
        }
        self.write_events(&logs)?;
        Ok(completed)
    }

    fn write_counters(&mut self) -> Result<()> {
        for (id, counters) in &self.counters {
            let data = self.step.memory.packer.pack(version::COUNTERS, counters)?;
            self.step
                .connection
                .prepare_cached("INSERT INTO counter VALUES (?1, ?2) ON CONFLICT DO UPDATE SET data=excluded.data")?
                .execute(params![id, data])?;
        }
        Ok(())
    }

    /// Completes the batches in which nothing is open any more.
    fn complete(&mut self) -> Result<Vec<BatchId>> {
        let mut completed = Vec::new();
        for no in std::mem::take(&mut self.touched) {
            let open = |(id, counters): (&i64, &Counters)| id >> 8 == no && counters.open() > 0;
            if self.counters.iter().any(open) {
                continue;
            }
            let Some(mut batch) = self.batch(no)? else {
                continue;
            };
            if batch.state == BatchState::Open
                || batch.completed_at.is_some()
                || read_counters(self.step.connection, no)?.open() > 0
            {
                continue;
            }
            batch.completed_at = Some(self.now);
            if batch.state != BatchState::Cancelled {
                batch.state = BatchState::Completed;
                completed.push(batch.id);
                self.batch_event(EventKind::BatchCompleted, no, &serde_json::json!({}));
            }
            self.set_batch(batch)?;
        }
        Ok(completed)
    }

    /// Writes cells and logs; the number of each lot's log.
    fn write_lots(&mut self, journal: Option<JournalId>) -> Result<HashMap<LotId, i64>> {
        let mut logs = HashMap::new();
        for (lot, book) in std::mem::take(&mut self.lots) {
            let Some(book) = book else { continue };
            let step = &mut *self.step;
            if book.dirty {
                step.connection
                    .prepare_cached("UPDATE cell SET data=?2 WHERE lot=?1")?
                    .execute(params![lot, book.cells])?;
            }
            if let Some(journal) = journal
                && !book.log.is_empty()
            {
                let block = LogBlock {
                    journal,
                    entries: book.log,
                };
                let data = step.memory.packer.pack_log(&block)?;
                step.connection
                    .prepare_cached("INSERT INTO lot_log (lot, data) VALUES (?1, ?2)")?
                    .execute(params![lot, data])?;
                logs.insert(lot, step.connection.last_insert_rowid());
            }
        }
        Ok(logs)
    }

    fn write_events(&mut self, logs: &HashMap<LotId, i64>) -> Result<()> {
        let events: Vec<StoredEvent> = std::mem::take(&mut self.events)
            .into_iter()
            .filter_map(|pending| match pending {
                Pending::Other(event) => Some(event),
                Pending::Fact { kind, lot, entry } => Some(StoredEvent::Fact {
                    kind: kind.code(),
                    lot,
                    log: *logs.get(&lot)?,
                    entry: u32::try_from(entry).ok()?,
                }),
            })
            .collect();
        for chunk in events.chunks(BLOCK_EVENTS) {
            write_block(self.step, chunk.to_vec(), self.now)?;
        }
        Ok(())
    }
}

fn write_block(step: &mut Step<'_>, events: Vec<StoredEvent>, now: Timestamp) -> Result<()> {
    let kinds = events
        .iter()
        .filter_map(StoredEvent::kind)
        .fold(0_i64, |mask, kind| mask | 1 << kind);
    let of = |event: &StoredEvent| match event {
        StoredEvent::Fact { lot, .. } | StoredEvent::Unsent { lot, .. } => ids::split(*lot).0,
        StoredEvent::Batch { batch, .. } => *batch,
        StoredEvent::Address { .. }
        | StoredEvent::Account { .. }
        | StoredEvent::Announced { .. }
        | StoredEvent::Gone
        | StoredEvent::Told(_) => 0,
    };
    let mut batches: BTreeSet<BatchNo> = events.iter().map(of).collect();
    let batch = match batches.first() {
        Some(only) if batches.len() == 1 => *only,
        _ => 0,
    };
    batches.remove(&0);
    let data = step
        .memory
        .packer
        .pack(version::EVENTS, &EventBlock { events })?;
    step.connection
        .prepare_cached(
            "INSERT INTO event (recorded_at, kinds, batch, data) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![now.millis(), kinds, batch, data])?;
    let block = step.connection.last_insert_rowid();
    for no in batches {
        step.connection
            .prepare_cached("UPDATE batch SET last_event=?2 WHERE no=?1")?
            .execute([no, block])?;
    }
    step.changed.events = true;
    Ok(())
}

/// Adds references to retry lots that nobody holds, or makes new ones.
pub(super) fn file_retries(step: &Step<'_>, key: &RetryKey, refs: &[Ref]) -> Result<()> {
    let open: Option<(i64, Vec<u8>)> = step
        .connection
        .prepare_cached(
            "SELECT id, refs FROM work WHERE queue=?1 AND rank=?6 AND batch=?2 AND due_at=?3 AND expires=0 AND count<?4
             AND partition=?5 AND refs IS NOT NULL AND holder IS NULL LIMIT 1",
        )?
        .query_row(
            params![key.queue, key.batch, key.due_at, length(RETRY_ROWS), key.partition.0, key.rank],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let (open, mut all) = match open {
        Some((id, packed)) => (Some(id), form::unpack_refs(&packed)?),
        None => (None, Vec::new()),
    };
    all.extend_from_slice(refs);
    let mut chunks = all.chunks(RETRY_ROWS);
    if let Some(id) = open {
        let chunk = chunks.next().unwrap_or_default();
        step.connection
            .prepare_cached("UPDATE work SET refs=?2, count=?3 WHERE id=?1")?
            .execute(params![id, form::pack_refs(chunk), length(chunk.len())])?;
    }
    for chunk in chunks {
        step.connection
            .prepare_cached("INSERT INTO work (batch, partition, queue, due_at, count, refs, rank) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
            .execute(params![
                key.batch,
                key.partition.0,
                key.queue,
                key.due_at,
                length(chunk.len()),
                form::pack_refs(chunk),
                key.rank,
            ])?;
    }
    Ok(())
}

fn length(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}
