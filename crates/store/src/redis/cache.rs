//! What never changes once written, kept decoded: heads of batches, rows of lots, index maps.
//!
//! Bounded. Must not hold anything that can change.

use super::Inner;
use super::keys;
use super::link::answer;
use super::record::Lot;
use crate::recent::Recent;
use crate::{BatchHead, Result, StoreError};
use ::redis::{Cmd, Pipeline, Value};
use futures_util::future::try_join_all;
use model::{BatchId, LotNumber, Place};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of lots kept decoded: some 30 MB.
const ROWS: usize = 128_000;
/// What a lot weighs beside its rows, in rows.
const LOT: usize = 4;
const HEADS: usize = 256;
/// Pieces of index maps: 1.5 MB.
const MAPS: usize = 256;

/// Indices in one piece of the index map.
pub(super) const MAP_CHUNK: u32 = 1024;
/// Bytes of one entry in it: lot number and position.
pub(super) const MAP_ENTRY: usize = 6;

/// Names a lot.
pub(super) type LotKey = (BatchId, LotNumber);

/// Names a piece of an index map.
type MapKey = (BatchId, u32);

/// The caches of a store.
pub(super) struct Cache {
    lots: Mutex<Recent<LotKey, Arc<Lot>>>,
    heads: Mutex<Recent<BatchId, Arc<BatchHead>>>,
    maps: Mutex<Recent<MapKey, Arc<[u8]>>>,
}

impl Cache {
    pub(super) fn new() -> Self {
        Self {
            lots: Recent::new(ROWS),
            heads: Recent::new(HEADS),
            maps: Recent::new(MAPS),
        }
    }

    pub(super) fn lot(&self, key: &LotKey) -> Option<Arc<Lot>> {
        let mut lots = self.lots.lock().unwrap_or_else(PoisonError::into_inner);
        lots.find(key)
    }

    /// Forgets the rows of a lot: they were rewritten.
    pub(super) fn forget_lot(&self, key: &LotKey) {
        let mut lots = self.lots.lock().unwrap_or_else(PoisonError::into_inner);
        lots.forget(key);
    }

    pub(super) fn keep_lot(&self, key: LotKey, lot: Arc<Lot>) {
        let mut lots = self.lots.lock().unwrap_or_else(PoisonError::into_inner);
        if lots.find(&key).is_none() {
            let weight = LOT + lot.rows.len();
            lots.keep(key, lot, weight);
        }
    }
}

/// Reads an entry of the index map.
pub(super) fn read_place(entry: &[u8]) -> Option<Place> {
    match *entry {
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => None,
        [a, b, c, d, e, f] => Some(Place {
            lot: LotNumber(u32::from_le_bytes([a, b, c, d])),
            position: u16::from_le_bytes([e, f]),
        }),
        _ => None,
    }
}

impl Inner {
    /// The head of a batch; `None` when it was never committed.
    pub(super) async fn head(&self, batch: BatchId) -> Result<Option<Arc<BatchHead>>> {
        let find = |cache: &Cache| {
            let mut heads = cache.heads.lock().unwrap_or_else(PoisonError::into_inner);
            heads.find(&batch)
        };
        if let Some(known) = find(&self.cache) {
            return Ok(Some(known));
        }
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::of_batch(batch, "head"));
        let Some(text) = answer::bytes(self.link.short(&get).await?) else {
            return Ok(None);
        };
        let head: BatchHead = serde_json::from_slice(&text)
            .map_err(|error| StoreError::Damaged(format!("the head of {batch}: {error}")))?;
        let head = Arc::new(head);
        if head.may_change() {
            // Its start decides when it was released; a wave, when that leaves.
            return Ok(Some(head));
        }
        let mut heads = self
            .cache
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        heads.keep(batch, Arc::clone(&head), 1);
        Ok(Some(head))
    }

    /// The head of a batch that is known to be there.
    pub(super) async fn known_head(&self, batch: BatchId) -> Result<Arc<BatchHead>> {
        let head = self.head(batch).await?;
        head.ok_or_else(|| StoreError::Damaged(format!("batch {batch} has no head")))
    }

    /// Heads of several batches.
    pub(super) async fn heads(
        &self,
        batches: BTreeSet<BatchId>,
    ) -> Result<HashMap<BatchId, Arc<BatchHead>>> {
        let all = batches.into_iter().map(|batch| async move {
            let head = self.head(batch).await?;
            Ok::<_, StoreError>(head.map(|head| (batch, head)))
        });
        Ok(try_join_all(all).await?.into_iter().flatten().collect())
    }

    /// A piece of an index map; `None` where the batch has none.
    pub(super) async fn map(&self, batch: BatchId, chunk: u32) -> Result<Option<Arc<[u8]>>> {
        let key = (batch, chunk);
        let find = |cache: &Cache| {
            let mut maps = cache.maps.lock().unwrap_or_else(PoisonError::into_inner);
            maps.find(&key)
        };
        if let Some(known) = find(&self.cache) {
            return Ok(Some(known));
        }
        // Asked first: what is read after the start of the batch does not change any more.
        let grows = self.head(batch).await?.is_none_or(|head| head.held);
        let mut get = Cmd::new();
        get.arg("HGET").arg(keys::of_batch(batch, "map")).arg(chunk);
        let Some(bytes) = answer::bytes(self.link.short(&get).await?) else {
            return Ok(None);
        };
        let bytes: Arc<[u8]> = bytes.into();
        if grows {
            return Ok(Some(bytes));
        }
        let mut maps = self
            .cache
            .maps
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        maps.keep(key, Arc::clone(&bytes), 1);
        Ok(Some(bytes))
    }

    /// Where an index stands; `None` when it was rejected or never given.
    pub(super) async fn place_of(&self, batch: BatchId, index: u32) -> Result<Option<Place>> {
        let Some(chunk) = self.map(batch, index / MAP_CHUNK).await? else {
            return Ok(None);
        };
        let at = usize::try_from(index % MAP_CHUNK).unwrap_or(0) * MAP_ENTRY;
        Ok(chunk.get(at..at + MAP_ENTRY).and_then(read_place))
    }

    /// The rows of lots, those that are not there left out. What cannot be read is told apart.
    pub(super) async fn lots(
        &self,
        wanted: &BTreeSet<LotKey>,
    ) -> Result<HashMap<LotKey, Result<Arc<Lot>>>> {
        let mut lots = HashMap::new();
        let mut missing: HashMap<_, Vec<LotKey>> = HashMap::new();
        for key in wanted {
            match self.cache.lot(key) {
                Some(lot) => drop(lots.insert(*key, Ok(lot))),
                None => missing.entry(key.1.partition()).or_default().push(*key),
            }
        }
        let parts = missing.into_iter().map(|(p, keys)| async move {
            let mut lots = Vec::new();
            for some in keys.chunks(64) {
                let mut pipeline = Pipeline::new();
                for (batch, lot) in some {
                    pipeline.cmd("GET").arg(keys::lot(p, *batch, lot.0));
                }
                let answers = self.link.bulk(&pipeline).await?;
                let read = some.iter().zip(answers);
                lots.extend(
                    read.filter_map(|(key, value)| Some((*key, self.decode_lot(*key, value)?))),
                );
            }
            Ok::<_, StoreError>(lots)
        });
        lots.extend(try_join_all(parts).await?.into_iter().flatten());
        Ok(lots)
    }

    fn decode_lot(&self, key: LotKey, value: Value) -> Option<Result<Arc<Lot>>> {
        let bytes = answer::bytes(value)?;
        Some(Lot::read(&bytes).map(|lot| {
            let lot = Arc::new(lot);
            self.cache.keep_lot(key, Arc::clone(&lot));
            lot
        }))
    }
}
