//! Readings of recipients: rows of a batch, the story of a message, an address.
//!
//! A recipient's details are read from the log of its lot, its status from its cell. Must not
//! change anything.

use super::ids::{self, BatchNo, LotId, MAP_CHUNK, MAP_ENTRY};
use super::map::{place_of, read_place};
use super::readers::Reading;
use super::record::{BatchRecord, By, record};
use super::stage::is_mixed;
use super::suppress;
use crate::describe::{self, Facts, describe};
use crate::form::{self, LogBlock};
use crate::transition::Cell;
use crate::{
    AddressStory, BatchHead, MIXED, MessageStory, Page, RecipientQuery, RecipientRow, Result,
    StoreError, address_hash,
};
use model::{BatchId, FactId, MessageId, Place};
use rusqlite::{OptionalExtension as _, params};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Pieces of the index map looked through for one page: a filter that finds little answers with
/// a short page and a cursor.
const CHUNKS: u32 = 64;
/// Messages told of an address.
const MESSAGES: usize = 100;
/// Lots looked through for an address, newest first.
const LOTS: u32 = 50_000;

/// Reads the log of a lot for some of its positions.
fn facts_of(
    reading: &Reading<'_>,
    lot: LotId,
    positions: &HashSet<u16>,
) -> Result<HashMap<u16, Facts>> {
    let mut sql = reading
        .connection
        .prepare_cached("SELECT data FROM lot_log WHERE lot=?1 ORDER BY id")?;
    let mut rows = sql.query([lot])?;
    let mut all: HashMap<u16, Facts> = HashMap::new();
    while let Some(row) = rows.next()? {
        let packed: Vec<u8> = row.get(0)?;
        let block: LogBlock = form::unpack_log(&packed)?;
        for entry in block.entries {
            if !positions.contains(&entry.position) {
                continue;
            }
            let id = FactId {
                journal: block.journal,
                seq: entry.seq,
            };
            all.entry(entry.position).or_default().add(id, entry.fact);
        }
    }
    Ok(all)
}

fn cells_of(reading: &Reading<'_>, lot: LotId) -> Result<Vec<u8>> {
    let cells: Option<Vec<u8>> = reading
        .connection
        .prepare_cached("SELECT data FROM cell WHERE lot=?1")?
        .query_row([lot], |row| row.get(0))
        .optional()?;
    cells.ok_or_else(|| StoreError::Damaged(format!("lot {lot} has no cells")))
}

fn cell_at(cells: &[u8], lot: LotId, position: u16) -> Result<Cell> {
    let at = usize::from(position) * Cell::BYTES;
    cells
        .get(at..at + Cell::BYTES)
        .and_then(Cell::read)
        .ok_or_else(|| StoreError::Damaged(format!("cell {position} of lot {lot}")))
}

/// A recipient chosen by its cell, not read yet.
struct Found {
    lot: LotId,
    position: u16,
    cell: Cell,
}

/// Reads the rows and facts of recipients, lot by lot, and gives them back in their order.
fn read_rows(
    reading: &Reading<'_>,
    batch: &BatchRecord,
    found: &[Found],
) -> Result<Vec<RecipientRow>> {
    let head = reading.cache.head(reading.connection, batch.no)?;
    let mut by_lot: BTreeMap<LotId, Vec<usize>> = BTreeMap::new();
    for (at, of) in found.iter().enumerate() {
        by_lot.entry(of.lot).or_default().push(at);
    }
    let mut rows: BTreeMap<usize, RecipientRow> = BTreeMap::new();
    for (id, places) in by_lot {
        let lot = reading.cache.lot(reading.connection, id)?;
        let of_lot = |at: &usize| found.get(*at);
        let positions = places
            .iter()
            .filter_map(of_lot)
            .map(|of| of.position)
            .collect();
        let facts = facts_of(reading, id, &positions)?;
        let none = Facts::default();
        for at in places {
            let Some(of) = found.get(at) else { continue };
            let row = lot
                .as_ref()
                .and_then(|lot| lot.rows.get(usize::from(of.position)));
            let row = row.ok_or_else(|| {
                StoreError::Damaged(format!("lot {id} has no row {}", of.position))
            })?;
            let facts = facts.get(&of.position).unwrap_or(&none);
            rows.insert(
                at,
                describe(row.clone(), of.cell, batch.released, &head, facts),
            );
        }
    }
    Ok(rows.into_values().collect())
}

/// What was looked at while a page is gathered.
struct Gathering<'a> {
    reading: &'a Reading<'a>,
    query: &'a RecipientQuery,
    batch: &'a BatchRecord,
    cells: HashMap<LotId, Vec<u8>>,
}

impl Gathering<'_> {
    /// The recipient, if the query wants it.
    fn want(&mut self, place: Place) -> Result<Option<Found>> {
        let lot = ids::lot_id(self.batch.no, place.lot);
        let cells = match self.cells.entry(lot) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(cells_of(self.reading, lot)?),
        };
        let cell = cell_at(cells, lot, place.position)?;
        let (batch, query) = (self.batch, self.query);
        let wanted = describe::wanted(query, cell, batch.released, batch.tracking);
        if !wanted || !self.in_domain(lot, place.position)? {
            return Ok(None);
        }
        Ok(Some(Found {
            lot,
            position: place.position,
            cell,
        }))
    }

    fn in_domain(&self, id: LotId, position: u16) -> Result<bool> {
        let Some(domain) = &self.query.domain else {
            return Ok(true);
        };
        let lot = self.reading.cache.lot(self.reading.connection, id)?;
        Ok(lot.is_some_and(|lot| {
            let row = lot.rows.get(usize::from(position));
            if is_mixed(&lot.queue) {
                row.is_some_and(|row| row.email.domain() == domain)
            } else {
                *lot.queue == **domain || row.is_some_and(|row| row.email.domain() == domain)
            }
        }))
    }
}

/// Recipients of a batch in order of index.
pub(super) fn recipients(
    reading: &Reading<'_>,
    query: &RecipientQuery,
) -> Result<Page<RecipientRow>> {
    let empty = Page {
        items: Vec::new(),
        next: None,
    };
    let Some(batch) = record(reading.connection, By::Id(query.batch.to_bytes()))? else {
        return Ok(empty);
    };
    let limit = usize::try_from(query.limit.clamp(1, 1_000)).unwrap_or(1);
    let mut gathering = Gathering {
        reading,
        query,
        batch: &batch,
        cells: HashMap::new(),
    };
    let (mut found, mut next) = (Vec::new(), None);
    let first = query.from_index / MAP_CHUNK;
    'pieces: for piece in first..=first.saturating_add(CHUNKS) {
        if piece == first.saturating_add(CHUNKS) {
            next = Some((piece * MAP_CHUNK).to_string());
            break;
        }
        let from = piece.saturating_mul(MAP_CHUNK);
        let Some(entries) = chunk(reading, batch.no, from)? else {
            break;
        };
        for (index, entry) in (from..).zip(entries.chunks_exact(MAP_ENTRY)) {
            let Some(place) = read_place(entry).filter(|_| index >= query.from_index) else {
                continue;
            };
            if found.len() >= limit {
                next = Some(index.to_string());
                break 'pieces;
            }
            found.extend(gathering.want(place)?);
        }
    }
    let items = read_rows(reading, &batch, &found)?;
    Ok(Page { items, next })
}

fn chunk(reading: &Reading<'_>, batch: BatchNo, index: u32) -> Result<Option<Vec<u8>>> {
    Ok(reading
        .connection
        .prepare_cached("SELECT data FROM index_map WHERE id=?1")?
        .query_row([ids::map_id(batch, index)], |row| row.get(0))
        .optional()?)
}

/// One message with all its facts.
pub(super) fn message(reading: &Reading<'_>, message: MessageId) -> Result<Option<MessageStory>> {
    Ok(messages(reading, &[message])?.pop())
}

/// Messages with all their facts, lot by lot.
pub(super) fn messages(reading: &Reading<'_>, messages: &[MessageId]) -> Result<Vec<MessageStory>> {
    let mut batches: HashMap<BatchId, Option<BatchRecord>> = HashMap::new();
    let mut by_lot: BTreeMap<LotId, (BatchId, HashSet<u16>)> = BTreeMap::new();
    for message in messages {
        let batch = match batches.entry(message.batch) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => {
                let id = By::Id(message.batch.to_bytes());
                free.insert(record(reading.connection, id)?)
            }
        };
        let Some(batch) = batch else { continue };
        if let Some(place) = place_of(reading.connection, batch.no, message.index)? {
            let id = ids::lot_id(batch.no, place.lot);
            let of = by_lot.entry(id).or_insert((batch.id, HashSet::new()));
            of.1.insert(place.position);
        }
    }
    let mut stories = Vec::new();
    for (id, (batch, positions)) in by_lot {
        if let Some(Some(batch)) = batches.get(&batch) {
            stories_of(reading, batch, id, &positions, &mut stories)?;
        }
    }
    Ok(stories)
}

/// Adds the stories of some recipients of a lot.
fn stories_of(
    reading: &Reading<'_>,
    batch: &BatchRecord,
    id: LotId,
    positions: &HashSet<u16>,
    stories: &mut Vec<MessageStory>,
) -> Result<()> {
    let head: Arc<BatchHead> = reading.cache.head(reading.connection, batch.no)?;
    let (cells, lot) = (
        cells_of(reading, id)?,
        reading.cache.lot(reading.connection, id)?,
    );
    let mut all = facts_of(reading, id, positions)?;
    for position in positions {
        let cell = cell_at(&cells, id, *position)?;
        let row = lot
            .as_ref()
            .and_then(|of| of.rows.get(usize::from(*position)));
        let row =
            row.ok_or_else(|| StoreError::Damaged(format!("lot {id} has no row {position}")))?;
        let mut facts = all.remove(position).unwrap_or_default();
        facts.sort();
        stories.push(MessageStory {
            recipient: describe(row.clone(), cell, batch.released, &head, &facts),
            batch: head.clone(),
            attempts: facts.attempts,
            hits: facts.hits,
        });
    }
    Ok(())
}

/// What is known of an address. There is no record per recipient to look up: the lots of its
/// domain and the mixed ones have four bytes of hash for each.
pub(super) fn address(reading: &Reading<'_>, account: &str, email: &str) -> Result<AddressStory> {
    let email = email.to_lowercase();
    let suppressions = suppress::of_address(reading.connection, account, &email)?;
    let domain = email.rsplit_once('@').map_or("", |(_, domain)| domain);
    let hash = address_hash(&email);
    let mut sql = reading.connection.prepare_cached(
        "SELECT id, hashes FROM lot WHERE queue IN (?1, ?2) AND id NOT IN (SELECT lot FROM staged) ORDER BY id DESC LIMIT ?3",
    )?;
    let mut lots = sql.query(params![domain, MIXED, LOTS])?;
    let mut messages = Vec::new();
    while messages.len() < MESSAGES
        && let Some(lot) = lots.next()?
    {
        let (id, hashes): (LotId, Vec<u8>) = (lot.get(0)?, lot.get(1)?);
        for (position, found) in (0_u16..).zip(form::unpack_u32s(&hashes)) {
            if found == hash {
                messages.extend(message_at(reading, account, &email, id, position)?);
            }
        }
    }
    messages.sort_by_key(|(head, row)| std::cmp::Reverse((head.id, row.row.index)));
    messages.truncate(MESSAGES);
    Ok(AddressStory {
        suppressions,
        messages,
    })
}

fn message_at(
    reading: &Reading<'_>,
    account: &str,
    email: &str,
    id: LotId,
    position: u16,
) -> Result<Option<(Arc<BatchHead>, RecipientRow)>> {
    let Some(batch) = record(reading.connection, By::No(ids::split(id).0))? else {
        return Ok(None);
    };
    let head = reading.cache.head(reading.connection, batch.no)?;
    let lot = reading.cache.lot(reading.connection, id)?;
    let row = lot.and_then(|lot| lot.rows.get(usize::from(position)).cloned());
    // Hashes collide, and accounts share them.
    if head.account != account || row.is_none_or(|row| row.email.normalised() != email) {
        return Ok(None);
    }
    let cell = cell_at(&cells_of(reading, id)?, id, position)?;
    if cell.erased() {
        return Ok(None);
    }
    let found = [Found {
        lot: id,
        position,
        cell,
    }];
    let row = read_rows(reading, &batch, &found)?.pop();
    Ok(row.map(|row| (head, row)))
}
