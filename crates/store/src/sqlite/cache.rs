//! What never changes once written, kept decoded: heads of batches and rows of lots.
//!
//! Bounded; shared by the writer and the readers. Must not hold anything that can change.

use crate::columns::{Named, Names};
use crate::form;
use crate::recent::Recent;
use crate::{BatchHead, Result, StoreError};
use model::Row;
use rusqlite::{Connection, OptionalExtension as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of lots kept decoded: some 30 MB.
const ROWS: usize = 128_000;
/// What a lot weighs beside its rows, in rows.
const LOT: usize = 4;
const HEADS: usize = 256;
/// Bytes of who the recipients of lots are: some 300,000 of them.
const NAMES: usize = 16 << 20;

/// A lot as it was staged.
#[derive(Debug)]
pub(super) struct Lot {
    pub(super) queue: Box<str>,
    pub(super) rows: Vec<Row>,
}

/// Who the recipients of a lot are.
pub(super) enum Known {
    /// By its rows, which were there.
    Rows(Arc<Lot>),
    Names(Arc<Names>),
}

impl Known {
    /// The one at a position.
    pub(super) fn one(&self, position: u16) -> Option<Named<'_>> {
        match self {
            Self::Rows(lot) => lot.rows.get(usize::from(position)).map(Named::from),
            Self::Names(names) => names.one(position),
        }
    }
}

/// The caches of a store.
#[derive(Debug)]
pub(super) struct Cache {
    /// Not a cache, but asked for by both: ranges that could not be read.
    unreadable: AtomicU64,
    lots: Mutex<Recent<i64, Arc<Lot>>>,
    names: Mutex<Recent<i64, Arc<Names>>>,
    heads: Mutex<Recent<i64, Arc<BatchHead>>>,
}

impl Cache {
    pub(super) fn new() -> Self {
        Self {
            unreadable: AtomicU64::new(0),
            lots: Recent::new(ROWS),
            names: Recent::new(NAMES),
            heads: Recent::new(HEADS),
        }
    }

    pub(super) fn count_unreadable(&self) {
        self.unreadable.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn unreadable(&self) -> u64 {
        self.unreadable.load(Ordering::Relaxed)
    }

    fn kept_lot(&self, id: i64) -> Option<Arc<Lot>> {
        let mut lots = self.lots.lock().unwrap_or_else(PoisonError::into_inner);
        lots.find(&id)
    }

    /// Who the recipients of a lot are; `None` when there is no such lot.
    pub(super) fn names(&self, connection: &Connection, id: i64) -> Result<Option<Known>> {
        if let Some(lot) = self.kept_lot(id) {
            return Ok(Some(Known::Rows(lot)));
        }
        let names = || self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = names().find(&id);
        if let Some(kept) = kept {
            return Ok(Some(Known::Names(kept)));
        }
        let stored: Option<Vec<u8>> = connection
            .prepare_cached("SELECT packed FROM lot WHERE id=?1")?
            .query_row([id], |row| row.get(0))
            .optional()?;
        let Some(packed) = stored else {
            return Ok(None);
        };
        let read = Arc::new(form::unpack_names(&packed)?);
        names().keep(id, read.clone(), read.bytes());
        Ok(Some(Known::Names(read)))
    }

    /// The rows of a lot; `None` when there is no such lot.
    pub(super) fn lot(&self, connection: &Connection, id: i64) -> Result<Option<Arc<Lot>>> {
        if let Some(lot) = self.kept_lot(id) {
            return Ok(Some(lot));
        }
        let stored: Option<(String, Vec<u8>)> = connection
            .prepare_cached("SELECT queue, packed FROM lot WHERE id=?1")?
            .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some((queue, packed)) = stored else {
            return Ok(None);
        };
        let lot = Arc::new(Lot {
            queue: queue.into(),
            rows: form::unpack_rows(&packed)?,
        });
        self.lots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keep(id, lot.clone(), LOT + lot.rows.len());
        Ok(Some(lot))
    }

    /// Forgets the rows of a lot: they are being rewritten.
    pub(super) fn forget_lot(&self, id: i64) {
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .forget(&id);
        self.lots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .forget(&id);
    }

    /// The head of a committed batch.
    pub(super) fn head(&self, connection: &Connection, no: i64) -> Result<Arc<BatchHead>> {
        if let Some(head) = self
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .find(&no)
        {
            return Ok(head);
        }
        let text: String = connection
            .prepare_cached("SELECT head FROM batch WHERE no=?1")?
            .query_row([no], |row| row.get(0))?;
        let head: BatchHead = serde_json::from_str(&text)
            .map_err(|error| StoreError::Damaged(format!("the head of batch {no}: {error}")))?;
        let head = Arc::new(head);
        if head.may_change() {
            // Its start decides when it was released; a wave, when that leaves.
            return Ok(head);
        }
        self.heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keep(no, head.clone(), 1);
        Ok(head)
    }
}
