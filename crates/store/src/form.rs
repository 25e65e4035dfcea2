//! Stored forms: the bytes of rows, references, log entries and events.
//!
//! Owns their versions. The first byte is the version, the second says whether the rest is
//! compressed; an unknown one is [`StoreError::Damaged`], never a guess. Must not know an engine.

use crate::columns::{LogColumns, Names, RowColumns, TextsRef};
use crate::{Result, StoreError};
use model::{EmailAddress, Fact, JournalId, LotNumber, Row, Seq, Timestamp, TrackingMode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;
use std::cell::RefCell;

/// What a stored form may grow to when it is unpacked: 500 rows of what intake lets through.
pub(crate) const UNPACKED_MAX: u32 = 256 << 20;
/// Below this, compression costs more than it saves.
const COMPRESS_FROM: usize = 200;
const LEVEL: i32 = 1;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// The version of every form here; each has its own number so that they can part ways.
pub(crate) mod version {
    /// Rows of a lot, one after the other: read, no longer written.
    pub(crate) const ROWS_BY_ROW: u8 = 1;
    /// Rows of a lot, by columns.
    pub(crate) const ROWS: u8 = 2;
    /// References of a retry lot.
    pub(crate) const REFS: u8 = 1;
    /// Facts of a lot, one after the other, [`model::Fact`] in its form 1: read, no longer written.
    pub(crate) const LOG_BY_FACT: u8 = 1;
    /// Facts of a lot, by columns.
    pub(crate) const LOG: u8 = 2;
    /// Events.
    pub(crate) const EVENTS: u8 = 1;
    /// Counters.
    pub(crate) const COUNTERS: u8 = 1;
}

/// Packs values; keeps a compressor, which is expensive to make.
pub(crate) struct Packer(zstd::bulk::Compressor<'static>);

impl Packer {
    pub(crate) fn new() -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(LEVEL).map_err(|error| unavailable(&error))?;
        Ok(Self(compressor))
    }

    pub(crate) fn pack(&mut self, version: u8, value: &impl Serialize) -> Result<Vec<u8>> {
        let plain = postcard::to_extend(value, vec![version, PLAIN])
            .map_err(|error| StoreError::Damaged(format!("cannot be written: {error}")))?;
        let body = plain.get(2..).unwrap_or_default();
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        if length > UNPACKED_MAX {
            return Err(StoreError::Refused("more than 256 MiB in one piece".into()));
        }
        if body.len() < COMPRESS_FROM {
            return Ok(plain);
        }
        let mut packed = vec![version, ZSTD];
        packed.extend_from_slice(&length.to_le_bytes());
        packed.extend(self.0.compress(body).map_err(|error| unavailable(&error))?);
        Ok(packed)
    }
}

impl Packer {
    /// Packs the rows of a lot.
    pub(crate) fn pack_rows(&mut self, rows: &[Row]) -> Result<Vec<u8>> {
        self.pack(version::ROWS, &RowColumns::of(rows))
    }

    /// Packs facts of a lot.
    pub(crate) fn pack_log<F: Borrow<Fact>>(&mut self, block: &LogBlock<F>) -> Result<Vec<u8>> {
        self.pack(version::LOG, &LogColumns::of(block))
    }
}

fn unavailable(error: &std::io::Error) -> StoreError {
    StoreError::Unavailable(format!("zstd: {error}"))
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("a stored form is not readable: {what}"))
}

/// Reads what [`Packer::pack`] wrote.
pub(crate) fn unpack<T: DeserializeOwned>(version: u8, bytes: &[u8]) -> Result<T> {
    unpack_with(version, bytes, |body| {
        postcard::from_bytes(body).map_err(|_| damaged("its content"))
    })
}

fn unpack_with<T>(version: u8, bytes: &[u8], read: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    match bytes {
        [found, ..] if *found != version => Err(damaged(&format!("version {found}"))),
        [_, PLAIN, body @ ..] => read(body),
        [_, ZSTD, a, b, c, d, body @ ..] => {
            let length = u32::from_le_bytes([*a, *b, *c, *d]);
            if length > UNPACKED_MAX {
                return Err(damaged("its length"));
            }
            let length = usize::try_from(length).map_err(|_| damaged("its length"))?;
            let plain = decompress(body, length)?;
            read(&plain)
        }
        _ => Err(damaged("its head")),
    }
}

thread_local! {
    /// A context is expensive to make, and a page of events unpacks hundreds of logs.
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

fn decompress(body: &[u8], length: usize) -> Result<Vec<u8>> {
    let plain = DECOMPRESSOR.with_borrow_mut(|kept| {
        let made = match kept.take() {
            Some(made) => made,
            None => zstd::bulk::Decompressor::new()?,
        };
        kept.insert(made).decompress(body, length)
    });
    plain.map_err(|_| damaged("its compression"))
}

/// A row in form 1, which ended before its time zone.
#[derive(Deserialize)]
struct RowByRow {
    index: u32,
    email: EmailAddress,
    name: Option<Box<str>>,
    prospect_id: Option<Box<str>>,
    vars: Option<Box<str>>,
    metadata: Option<Box<str>>,
    tracking: Option<TrackingMode>,
}

impl From<RowByRow> for Row {
    fn from(of: RowByRow) -> Self {
        Self {
            index: of.index,
            email: of.email,
            name: of.name,
            prospect_id: of.prospect_id,
            vars: of.vars,
            metadata: of.metadata,
            tracking: of.tracking,
            time_zone: None,
        }
    }
}

/// The rows of a lot, packed on the caller's thread.
pub(crate) fn pack_rows(rows: &[Row]) -> Result<Vec<u8>> {
    Packer::new()?.pack_rows(rows)
}

/// Reads [`pack_rows`], and what an older version wrote.
pub(crate) fn unpack_rows(bytes: &[u8]) -> Result<Vec<Row>> {
    if bytes.first() == Some(&version::ROWS_BY_ROW) {
        let rows: Vec<RowByRow> = unpack(version::ROWS_BY_ROW, bytes)?;
        return Ok(rows.into_iter().map(Row::from).collect());
    }
    let columns: RowColumns = unpack(version::ROWS, bytes)?;
    columns.rows().ok_or_else(|| damaged("its columns"))
}

/// Reads of [`pack_rows`], and of what an older version wrote, who the recipients are.
pub(crate) fn unpack_names(bytes: &[u8]) -> Result<Names> {
    if bytes.first() == Some(&version::ROWS_BY_ROW) {
        return Names::of(&unpack_rows(bytes)?).ok_or_else(|| damaged("its length"));
    }
    unpack_with(version::ROWS, bytes, |body| {
        let columns = postcard::from_bytes::<RowColumns<TextsRef<'_>>>(body);
        let columns = columns.map_err(|_| damaged("its content"))?;
        columns.names().ok_or_else(|| damaged("its columns"))
    })
}

/// Reads [`Packer::pack_log`], and what an older version wrote.
pub(crate) fn unpack_log(bytes: &[u8]) -> Result<LogBlock> {
    if bytes.first() == Some(&version::LOG_BY_FACT) {
        return unpack(version::LOG_BY_FACT, bytes);
    }
    let columns: LogColumns = unpack(version::LOG, bytes)?;
    columns.block().ok_or_else(|| damaged("its columns"))
}

/// Reads [`Packer::pack_log`] without what attempts have to say beside their times.
pub(crate) fn unpack_log_brief(bytes: &[u8]) -> Result<BriefLog> {
    if bytes.first() == Some(&version::LOG_BY_FACT) {
        return Ok(unpack::<LogBlock>(version::LOG_BY_FACT, bytes)?.into());
    }
    let columns: LogColumns = unpack(version::LOG, bytes)?;
    columns.brief().ok_or_else(|| damaged("its columns"))
}

/// A reference to a recipient, with the attempts that it had when it was filed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ref {
    pub(crate) lot: LotNumber,
    pub(crate) position: u16,
    pub(crate) attempts: u8,
}

const REF_BYTES: usize = 7;

/// References, uncompressed: they are appended to.
pub(crate) fn pack_refs(refs: &[Ref]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + refs.len() * REF_BYTES);
    bytes.push(version::REFS);
    for of in refs {
        bytes.extend_from_slice(&of.lot.0.to_le_bytes());
        bytes.extend_from_slice(&of.position.to_le_bytes());
        bytes.push(of.attempts);
    }
    bytes
}

pub(crate) fn unpack_refs(bytes: &[u8]) -> Result<Vec<Ref>> {
    let Some((&version::REFS, body)) = bytes.split_first() else {
        return Err(damaged("references"));
    };
    let chunks = body.chunks_exact(REF_BYTES);
    if !chunks.remainder().is_empty() {
        return Err(damaged("references"));
    }
    let refs = chunks.filter_map(|chunk| match *chunk {
        [a, b, c, d, e, f, attempts] => Some(Ref {
            lot: LotNumber(u32::from_le_bytes([a, b, c, d])),
            position: u16::from_le_bytes([e, f]),
            attempts,
        }),
        _ => None,
    });
    Ok(refs.collect())
}

/// Numbers of four bytes each, little end first.
pub(crate) fn pack_u32s(numbers: impl Iterator<Item = u32>) -> Vec<u8> {
    numbers.flat_map(u32::to_le_bytes).collect()
}

pub(crate) fn unpack_u32s(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.chunks_exact(4).filter_map(|chunk| {
        let bytes: [u8; 4] = chunk.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    })
}

/// Facts of one lot that came in one step. Its entries are told from events by (log, entry). What is
/// to be packed may have them borrowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogBlock<F = Fact> {
    pub(crate) journal: JournalId,
    pub(crate) entries: Vec<LogEntry<F>>,
}

/// One fact in a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogEntry<F = Fact> {
    pub(crate) position: u16,
    pub(crate) seq: Seq,
    pub(crate) fact: F,
}

/// A [`LogBlock`] of which only some is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BriefLog {
    pub(crate) journal: JournalId,
    pub(crate) entries: Vec<BriefEntry>,
}

/// One fact in a [`BriefLog`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BriefEntry {
    pub(crate) position: u16,
    pub(crate) seq: Seq,
    pub(crate) fact: BriefFact,
}

/// A fact, of an attempt only when it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BriefFact {
    Attempt {
        at: Timestamp,
        dot_at: Option<Timestamp>,
    },
    Other(Fact),
}

impl From<Fact> for BriefFact {
    fn from(fact: Fact) -> Self {
        match fact {
            Fact::Attempt(of) => Self::Attempt {
                at: of.at,
                dot_at: of.dot_at,
            },
            other => Self::Other(other),
        }
    }
}

impl From<LogBlock> for BriefLog {
    fn from(block: LogBlock) -> Self {
        let entries = block.entries.into_iter().map(|of| BriefEntry {
            position: of.position,
            seq: of.seq,
            fact: of.fact.into(),
        });
        Self {
            journal: block.journal,
            entries: entries.collect(),
        }
    }
}

/// Events of one step, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct EventBlock {
    pub(crate) events: Vec<StoredEvent>,
}

/// An event as it is kept: it refers to what else is kept, so that a person's erasure there
/// takes the person out of the events too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StoredEvent {
    /// Of a fact: the entry of a log.
    Fact {
        kind: u8,
        lot: i64,
        log: i64,
        entry: u32,
    },
    /// Of a recipient that was not written to.
    Unsent {
        kind: u8,
        lot: i64,
        position: u16,
        /// JSON.
        data: String,
    },
    /// Of a batch.
    Batch {
        kind: u8,
        batch: i64,
        /// JSON.
        data: String,
    },
    /// Of an address in an account.
    Address {
        kind: u8,
        account: String,
        email: String,
        /// JSON.
        data: String,
    },
    /// Of an account.
    Account {
        kind: u8,
        account: String,
        /// JSON.
        data: String,
    },
    /// Of a person who was erased: only the place is kept.
    Gone,
    /// As it was told by another store: JSON. Its block has the bit [`TOLD_BIT`].
    Told(String),
    /// Announced, with more than its account.
    Announced {
        kind: u8,
        account: String,
        /// JSON.
        data: String,
        /// [`model::About`] as JSON.
        about: String,
    },
}

/// The bit of a block, among those for types of events, that says that some came from another store.
pub(crate) const TOLD_BIT: u32 = 62;

/// An event as it goes from store to store.
pub(crate) fn event_json(event: &model::Event) -> Result<String> {
    serde_json::to_string(event).map_err(|error| damaged(&error.to_string()))
}

impl StoredEvent {
    pub(crate) const fn kind(&self) -> Option<u8> {
        match self {
            Self::Fact { kind, .. }
            | Self::Unsent { kind, .. }
            | Self::Batch { kind, .. }
            | Self::Address { kind, .. }
            | Self::Account { kind, .. }
            | Self::Announced { kind, .. } => Some(*kind),
            Self::Gone | Self::Told(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_form_says_its_version() {
        let packed = Packer::new().unwrap().pack(3, &vec![7_u32; 1000]).unwrap();
        assert!(packed.len() < 200);
        assert_eq!(unpack::<Vec<u32>>(3, &packed), Ok(vec![7; 1000]));
        assert!(matches!(
            unpack::<Vec<u32>>(4, &packed),
            Err(StoreError::Damaged(_))
        ));
        assert!(unpack_refs(&[2]).is_err());
    }

    proptest! {
        #[test]
        fn references_read_back(list in prop::collection::vec((any::<u32>(), any::<u16>(), any::<u8>()), 0..50)) {
            let refs: Vec<Ref> = list
                .into_iter()
                .map(|(lot, position, attempts)| Ref { lot: LotNumber(lot), position, attempts })
                .collect();
            prop_assert_eq!(unpack_refs(&pack_refs(&refs)), Ok(refs));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, zstd: bool) {
            let head = [1, u8::from(zstd)];
            for form in [bytes.clone(), [&head[..], &bytes].concat()] {
                let _read = unpack::<EventBlock>(version::EVENTS, &form);
                let _read = unpack_refs(&form);
            }
        }
    }
}
