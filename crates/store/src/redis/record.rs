//! Stored forms of what changes: batches, ranges, cells, lots.
//!
//! A record begins with eight bytes of version, which are random and new with every write, and the
//! number of its form. Cells have none: what a step looked at of them is compared. Must not touch
//! the server.

use crate::form::{self, Ref};
use crate::transition::Cell;
use crate::{Result, StoreError};
use model::{
    BatchId, BatchState, Counters, JournalId, LotNumber, Partition, Priority, Row, Timestamp,
    TrackingMode,
};
use std::sync::atomic::{AtomicU32, Ordering};

/// The form of every record here.
const FORM: u8 = 1;

/// The version of what is stored; none: there must be nothing.
pub(super) type Version = [u8; 8];

/// A new version.
pub(super) fn new_version() -> Version {
    fastrand::u64(..).to_le_bytes()
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("{what} is not readable"))
}

/// Reads fixed pieces from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn bool(&mut self) -> Option<bool> {
        self.byte().map(|byte| byte != 0)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Option<i64> {
        self.take().map(i64::from_le_bytes)
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = usize::from(u16::from_le_bytes(self.take()?));
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    to.extend(length.to_le_bytes());
    to.extend(text.as_bytes().iter().take(usize::from(length)));
}

// ---- batches ----------------------------------------------------------------------------

/// What retention left of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// All of it.
    Whole,
    /// Its rows are going: readers find nobody in it.
    Going,
    /// What it was, and its counters.
    Counters,
}

/// What of a batch can change.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BatchRecord {
    pub(super) version: Version,
    pub(super) state: BatchState,
    pub(super) released: bool,
    pub(super) archived: bool,
    pub(super) kept: Kept,
    pub(super) priority: Priority,
    pub(super) tracking: TrackingMode,
    /// Rises with every change: a copy never goes back.
    pub(super) revision: u32,
    pub(super) release_at: Timestamp,
    pub(super) started_at: Option<Timestamp>,
    pub(super) completed_at: Option<Timestamp>,
    pub(super) accepted: u64,
    pub(super) rejected: u64,
    pub(super) paused_at: Option<Timestamp>,
    pub(super) paused_ms: u64,
}

impl Kept {
    /// Its bits, beside the one of an archived batch.
    const fn bits(self) -> u8 {
        match self {
            Self::Whole => 0,
            Self::Going => 1 << 1,
            Self::Counters => 2 << 1,
        }
    }
}

const NEVER: i64 = i64::MIN;

impl BatchRecord {
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).ok_or_else(|| damaged("a batch"))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut from = Reader(bytes);
        let version = from.take()?;
        if from.byte()? != FORM {
            return None;
        }
        let time = |millis| (millis != NEVER).then(|| Timestamp::from_millis(millis));
        let (state, released) = (BatchState::from_code(from.byte()?)?, from.bool()?);
        let flags = from.byte()?;
        Some(Self {
            version,
            state,
            released,
            archived: flags & 1 != 0,
            kept: match flags >> 1 {
                0 => Kept::Whole,
                1 => Kept::Going,
                2 => Kept::Counters,
                _ => return None,
            },
            priority: Priority::from_code(from.byte()?)?,
            tracking: TrackingMode::from_code(from.byte()?)?,
            revision: from.u32()?,
            release_at: Timestamp::from_millis(from.i64()?),
            started_at: time(from.i64()?),
            completed_at: time(from.i64()?),
            accepted: from.u64()?,
            rejected: from.u64()?,
            // Where there was no pause these are left out.
            paused_at: from.i64().and_then(time),
            paused_ms: from.u64().unwrap_or(0),
        })
    }

    /// The bytes under a new version.
    pub(super) fn write(&self, version: Version) -> Vec<u8> {
        let time = |at: Option<Timestamp>| at.map_or(NEVER, Timestamp::millis).to_le_bytes();
        let mut to = version.to_vec();
        to.extend([
            FORM,
            self.state.code(),
            u8::from(self.released),
            u8::from(self.archived) | self.kept.bits(),
            self.priority.code(),
            self.tracking.code(),
        ]);
        to.extend(self.revision.to_le_bytes());
        to.extend(self.release_at.millis().to_le_bytes());
        to.extend(time(self.started_at));
        to.extend(time(self.completed_at));
        to.extend(self.accepted.to_le_bytes());
        to.extend(self.rejected.to_le_bytes());
        if self.paused_at.is_some() || self.paused_ms > 0 {
            to.extend(time(self.paused_at));
            to.extend(self.paused_ms.to_le_bytes());
        }
        to
    }

    /// Whether its recipients are there to be read.
    pub(super) fn has_rows(&self) -> bool {
        self.kept == Kept::Whole
    }

    /// Whether attempts may start.
    pub(super) fn active(&self) -> bool {
        self.state == BatchState::InProgress
    }

    /// The rank of its ranges: what goes first, then list mail.
    pub(super) fn rank(&self) -> u8 {
        u8::from(self.priority != Priority::Transactional)
    }
}

// ---- ranges -----------------------------------------------------------------------------

/// What a range refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// `count` recipients of a lot from `first`, none of which had an attempt.
    Span { lot: LotNumber, first: u16 },
    /// These.
    Refs(Vec<Ref>),
}

/// Who holds a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    Nobody,
    Node(JournalId),
    /// It could not be read: nobody has it for a while.
    PutOff,
}

/// A range as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Range {
    pub(super) version: Version,
    pub(super) id: u64,
    pub(super) partition: Partition,
    pub(super) batch: BatchId,
    pub(super) queue: Box<str>,
    pub(super) rank: u8,
    pub(super) due_at: i64,
    pub(super) count: u32,
    pub(super) holder: Holder,
    pub(super) token: u64,
    pub(super) expires: i64,
    pub(super) window: u32,
    pub(super) piece: Piece,
}

impl Range {
    pub(super) fn read(partition: Partition, bytes: &[u8]) -> Result<Self> {
        let (mut range, refs) = Self::parse(partition, bytes).ok_or_else(|| damaged("a range"))?;
        if let Some(refs) = refs {
            range.piece = Piece::Refs(form::unpack_refs(refs)?);
        }
        Ok(range)
    }

    fn parse(partition: Partition, bytes: &[u8]) -> Option<(Self, Option<&[u8]>)> {
        let mut from = Reader(bytes);
        let version = from.take()?;
        if from.byte()? != FORM {
            return None;
        }
        let rank = from.byte()?;
        let kind = from.byte()?;
        let node = JournalId::from_bytes(from.take()?);
        let holder = match kind {
            0 => Holder::Nobody,
            1 => Holder::Node(node),
            2 => Holder::PutOff,
            _ => return None,
        };
        let (id, token) = (from.u64()?, from.u64()?);
        let (expires, due_at) = (from.i64()?, from.i64()?);
        let (window, count) = (from.u32()?, from.u32()?);
        let batch = BatchId::from_bytes(from.take()?);
        let queue = from.text()?.into();
        let (piece, refs) = match from.byte()? {
            0 => {
                let lot = LotNumber(from.u32()?);
                let first = u16::from_le_bytes(from.take()?);
                (Piece::Span { lot, first }, None)
            }
            1 => (Piece::Refs(Vec::new()), Some(from.0)),
            _ => return None,
        };
        let range = Self {
            version,
            id,
            partition,
            batch,
            queue,
            rank,
            due_at,
            count,
            holder,
            token,
            expires,
            window,
            piece,
        };
        Some((range, refs))
    }

    /// The bytes under a new version.
    pub(super) fn write(&self, version: Version) -> Vec<u8> {
        let (kind, node) = match self.holder {
            Holder::Nobody => (0, [0; 16]),
            Holder::Node(node) => (1, node.to_bytes()),
            Holder::PutOff => (2, [0; 16]),
        };
        let mut to = version.to_vec();
        to.extend([FORM, self.rank, kind]);
        to.extend(node);
        to.extend(self.id.to_le_bytes());
        to.extend(self.token.to_le_bytes());
        to.extend(self.expires.to_le_bytes());
        to.extend(self.due_at.to_le_bytes());
        to.extend(self.window.to_le_bytes());
        to.extend(self.count.to_le_bytes());
        to.extend(self.batch.to_bytes());
        put_text(&mut to, &self.queue);
        match &self.piece {
            Piece::Span { lot, first } => {
                to.push(0);
                to.extend(lot.0.to_le_bytes());
                to.extend(first.to_le_bytes());
            }
            Piece::Refs(refs) => {
                to.push(1);
                to.extend(form::pack_refs(refs));
            }
        }
        to
    }

    /// Whether a node or nobody at all has it at this moment.
    pub(super) fn is_taken(&self, moment: i64) -> bool {
        self.holder != Holder::Nobody && self.expires > moment
    }

    /// From when on it may be leased.
    pub(super) fn ready(&self) -> i64 {
        match self.holder {
            Holder::Nobody => self.due_at,
            Holder::Node(_) | Holder::PutOff => self.due_at.max(self.expires),
        }
    }

    /// The recipients, with the attempts that each had when it was filed.
    pub(super) fn refs(&self) -> Vec<Ref> {
        match &self.piece {
            Piece::Refs(refs) => refs.clone(),
            Piece::Span { lot, first } => (*first..)
                .zip(0..self.count)
                .map(|(position, _)| Ref {
                    lot: *lot,
                    position,
                    attempts: 0,
                })
                .collect(),
        }
    }

    /// Below which offset its holder may have started what is unreported.
    pub(super) fn doubtful(&self) -> u32 {
        if self.holder == Holder::Nobody {
            0
        } else {
            self.window
        }
    }

    /// The same range with these recipients of it.
    pub(super) fn with_refs(&self, refs: Vec<Ref>) -> Self {
        let count = u32::try_from(refs.len()).unwrap_or(u32::MAX);
        let contiguous = refs
            .windows(2)
            .all(|pair| matches!(pair, [a, b] if a.position.checked_add(1) == Some(b.position)));
        let piece = match (&self.piece, refs.first()) {
            (&Piece::Span { lot, .. }, Some(first)) if contiguous => Piece::Span {
                lot,
                first: first.position,
            },
            _ => Piece::Refs(refs),
        };
        Self {
            count,
            piece,
            ..self.clone()
        }
    }

    /// The same range, held by nobody, due at this time.
    pub(super) fn freed(&self, due_at: i64) -> Self {
        Self {
            holder: Holder::Nobody,
            expires: 0,
            window: 0,
            due_at,
            ..self.clone()
        }
    }
}

// ---- lots -------------------------------------------------------------------------------

/// A lot as it was staged.
#[derive(Debug)]
pub(super) struct Lot {
    pub(super) queue: Box<str>,
    /// Whether some recipients have a tracking mode of their own.
    pub(super) overrides: bool,
    pub(super) rows: Vec<Row>,
}

/// The bytes of a lot: its form, how many rows, flags; four bytes of hash for each; queue; rows.
pub(super) fn write_lot(queue: &str, overrides: bool, hashes: &[u32], packed: &[u8]) -> Vec<u8> {
    let rows = u16::try_from(hashes.len()).unwrap_or(u16::MAX);
    let mut to = vec![FORM];
    to.extend(rows.to_le_bytes());
    to.push(u8::from(overrides));
    to.extend(form::pack_u32s(hashes.iter().copied()));
    put_text(&mut to, queue);
    to.extend(packed);
    to
}

/// The queue, whether some have a tracking mode of their own, and the rows as they are packed.
pub(super) fn lot_parts(bytes: &[u8]) -> Option<(&str, bool, &[u8])> {
    let mut from = Reader(bytes);
    if from.byte()? != FORM {
        return None;
    }
    let rows = usize::from(u16::from_le_bytes(from.take()?));
    let overrides = from.bool()?;
    let (_hashes, rest) = from.0.split_at_checked(rows * 4)?;
    from.0 = rest;
    let queue = from.text()?;
    Some((queue, overrides, from.0))
}

/// The queue of a lot of which the beginning was read.
pub(super) fn lot_queue(bytes: &[u8]) -> Option<&str> {
    lot_parts(bytes).map(|(queue, ..)| queue)
}

impl Lot {
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let (queue, overrides, packed) = lot_parts(bytes).ok_or_else(|| damaged("a lot"))?;
        Ok(Self {
            queue: queue.into(),
            overrides,
            rows: form::unpack_rows(packed)?,
        })
    }

    pub(super) fn row(&self, position: u16) -> Option<&Row> {
        self.rows.get(usize::from(position))
    }

    /// The row of a recipient that must be there.
    pub(super) fn expect_row(&self, position: u16) -> Result<&Row> {
        let row = self.row(position);
        row.ok_or_else(|| StoreError::Damaged(format!("a lot has no row {position}")))
    }
}

// ---- cells ------------------------------------------------------------------------------

/// The cells of a lot. A step checks those that it looked at and writes those that it changed,
/// from the first to the last: steps on different ranges of one lot do not meet.
#[derive(Debug)]
pub(super) struct Cells {
    stored: Vec<u8>,
    bytes: Vec<u8>,
    /// Positions that were looked at.
    seen: Span,
    /// Positions that were changed.
    changed: Span,
}

/// Positions from the first to the last, widened from behind a shared reference.
#[derive(Debug)]
struct Span {
    first: AtomicU32,
    end: AtomicU32,
}

impl Span {
    const fn none() -> Self {
        Self {
            first: AtomicU32::new(u32::MAX),
            end: AtomicU32::new(0),
        }
    }

    fn widen(&self, position: u16) {
        let position = u32::from(position);
        self.first.fetch_min(position, Ordering::Relaxed);
        self.end.fetch_max(position + 1, Ordering::Relaxed);
    }

    /// The bytes of these cells; `None` when there are none.
    fn bytes(&self) -> Option<std::ops::Range<usize>> {
        let (first, end) = (
            self.first.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed),
        );
        let at = |cells: u32| usize::try_from(cells).unwrap_or(0) * Cell::BYTES;
        (first < end).then(|| at(first)..at(end))
    }
}

impl Cells {
    pub(super) fn read(stored: Vec<u8>) -> Self {
        Self {
            bytes: stored.clone(),
            stored,
            seen: Span::none(),
            changed: Span::none(),
        }
    }

    /// The cell at a position; `None` when there is none.
    pub(super) fn get(&self, position: u16) -> Result<Option<Cell>> {
        let at = usize::from(position) * Cell::BYTES;
        match self.bytes.get(at..at + Cell::BYTES) {
            None => Ok(None),
            Some(bytes) => {
                self.seen.widen(position);
                Cell::read(bytes)
                    .map(Some)
                    .ok_or_else(|| damaged(&format!("cell {position}")))
            }
        }
    }

    pub(super) fn set(&mut self, position: u16, cell: Cell) {
        let at = usize::from(position) * Cell::BYTES;
        if let Some(bytes) = self.bytes.get_mut(at..at + Cell::BYTES)
            && bytes != cell.to_bytes()
        {
            bytes.copy_from_slice(&cell.to_bytes());
            self.seen.widen(position);
            self.changed.widen(position);
        }
    }

    /// What was looked at, as it was: where it begins and the bytes.
    pub(super) fn expected(&self) -> Option<(usize, &[u8])> {
        let span = self.seen.bytes()?;
        Some((span.start, self.stored.get(span)?))
    }

    /// What was changed, as it is now.
    pub(super) fn changes(&self) -> Option<(usize, &[u8])> {
        let span = self.changed.bytes()?;
        Some((span.start, self.bytes.get(span)?))
    }

    /// Takes what was changed for written: the next step looks and changes from here on.
    pub(super) fn settle(&mut self) {
        if let Some(span) = self.changed.bytes()
            && let (Some(stored), Some(bytes)) =
                (self.stored.get_mut(span.clone()), self.bytes.get(span))
        {
            stored.copy_from_slice(bytes);
        }
        self.seen = Span::none();
        self.changed = Span::none();
    }
}

// ---- counters ---------------------------------------------------------------------------

/// Every counter with its name.
pub(super) fn fields(of: &mut Counters) -> [(&'static str, &mut u64); 20] {
    let Counters {
        accepted,
        scheduled,
        queued,
        temporary_error,
        delivered,
        bounce,
        failed,
        suppressed,
        cancelled,
        complained,
        unsubscribed,
        replied,
        opened_unique,
        opened_total,
        clicked_unique,
        clicked_total,
        opened_unique_human,
        opened_total_human,
        clicked_unique_human,
        clicked_total_human,
    } = of;
    [
        ("accepted", accepted),
        ("scheduled", scheduled),
        ("queued", queued),
        ("temporary_error", temporary_error),
        ("delivered", delivered),
        ("bounce", bounce),
        ("failed", failed),
        ("suppressed", suppressed),
        ("cancelled", cancelled),
        ("complained", complained),
        ("unsubscribed", unsubscribed),
        ("replied", replied),
        ("opened_unique", opened_unique),
        ("opened_total", opened_total),
        ("clicked_unique", clicked_unique),
        ("clicked_total", clicked_total),
        ("opened_unique_human", opened_unique_human),
        ("opened_total_human", opened_total_human),
        ("clicked_unique_human", clicked_unique_human),
        ("clicked_total_human", clicked_total_human),
    ]
}

/// Adds what is stored of a partition's counters.
pub(super) fn add_counters(sum: &mut Counters, stored: &[(Vec<u8>, Vec<u8>)]) {
    for (name, value) in fields(sum) {
        let found = stored.iter().find(|(stored, _)| stored == name.as_bytes());
        let number =
            found.and_then(|(_, text)| std::str::from_utf8(text).ok()?.parse::<u64>().ok());
        *value += number.unwrap_or(0);
    }
}

/// Counters from which changes are told: so high that none falls below zero.
pub(super) fn base() -> Counters {
    let mut base = Counters::default();
    for (_, value) in fields(&mut base) {
        *value = BASE;
    }
    base
}

const BASE: u64 = 1 << 40;

/// How counters that began at [`base`] have moved.
pub(super) fn moves(mut of: Counters) -> Vec<(&'static str, i64)> {
    let moved = |value: u64| {
        let (value, base) = (i64::try_from(value), i64::try_from(BASE));
        value.unwrap_or(0) - base.unwrap_or(0)
    };
    let all = fields(&mut of).map(|(name, value)| (name, moved(*value)));
    all.into_iter().filter(|(_, by)| *by != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(refs: Vec<Ref>) -> Range {
        Range {
            version: [3; 8],
            id: 9,
            partition: Partition(2),
            batch: BatchId::from_bytes([1; 16]),
            queue: "x.example".into(),
            rank: 1,
            due_at: 5,
            count: u32::try_from(refs.len()).unwrap(),
            holder: Holder::Node(JournalId::from_bytes([2; 16])),
            token: 7,
            expires: 11,
            window: 1,
            piece: Piece::Refs(refs),
        }
    }

    #[test]
    fn a_lot_reads_back() {
        let row = Row::new(4, "a@x.example".parse().unwrap());
        let packed = form::pack_rows(std::slice::from_ref(&row)).unwrap();
        let lot = Lot::read(&write_lot("x.example", true, &[77], &packed)).unwrap();
        assert_eq!(
            (&*lot.queue, lot.overrides, lot.row(0)),
            ("x.example", true, Some(&row))
        );
        assert_eq!(lot.row(1), None);
    }

    proptest! {
        #[test]
        fn records_read_back(list in prop::collection::vec((any::<u32>(), any::<u16>(), any::<u8>()), 0..20)) {
            let refs = list
                .into_iter()
                .map(|(lot, position, attempts)| Ref { lot: LotNumber(lot), position, attempts })
                .collect();
            let range = range(refs);
            prop_assert_eq!(Range::read(Partition(2), &range.write([3; 8])), Ok(range));
        }

        #[test]
        fn any_bytes_are_a_record_or_refused(bytes: Vec<u8>) {
            for form in [bytes.clone(), [&[0; 8][..], &[FORM], &bytes].concat(), [&[FORM][..], &bytes].concat()] {
                let _read = Range::read(Partition(0), &form);
                let _read = BatchRecord::read(&form);
                let _read = Lot::read(&form);
                let _read = Cells::read(form.clone()).get(0);
            }
        }

        #[test]
        fn changed_cells_are_written_where_they_stand(changes in prop::collection::vec((0_u16..50, 1_u8..9), 0..20)) {
            let mut stored = Cell::fresh(50, &[]);
            let mut cells = Cells::read(stored.clone());
            for (position, flags) in changes {
                let mut bytes = Cell::NEW.to_bytes();
                bytes[2] = flags;
                cells.set(position, Cell::read(&bytes).unwrap());
            }
            if let Some((at, piece)) = cells.changes() {
                let (from, expected) = cells.expected().unwrap();
                prop_assert_eq!(&stored[from..from + expected.len()], expected);
                prop_assert!(from <= at && at + piece.len() <= from + expected.len());
                stored[at..at + piece.len()].copy_from_slice(piece);
            }
            prop_assert_eq!(stored, cells.bytes);
        }
    }
}
