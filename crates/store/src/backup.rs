//! A whole store as a stream of pieces, and as a file: to move it to another engine, or to keep it.
//!
//! Owns the form of both, which knows no engine, and their version. Pieces are bounded: whoever writes
//! or reads them needs the memory of one. Must not decide what may be restored where.
//!
//! The file begins with its name and version, then one zstd frame with a checksum: pieces, each after
//! its length (four bytes, little end first). The last piece counts those before it, so that a file
//! that was cut off is never taken for a whole.

use crate::form::{self, Ref};
use crate::transition::Cell;
use crate::{CURSOR, EVENT_CURSORS, HELD_BACK, Note, Result, StoreError, Suppression, Suspension};
use model::{
    BatchId, BatchState, Counters, JournalId, LotNumber, Partition, Row, Seq, Status, Timestamp,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Write};

/// What a file begins with.
const NAME: &[u8; 12] = b"HIKYAKUSTORE";
/// The version of file and pieces.
const VERSION: u16 = 1;
/// The largest piece: a lot with its facts, or a content.
const PIECE_MAX: u32 = 512 << 20;
const LEVEL: i32 = 3;

/// Events in one piece.
pub const EVENTS: usize = 500;

/// A piece of a store. Lots come before their batch, and everything between the first and the last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Piece {
    /// The first.
    Begin {
        /// In how many partitions recipients live.
        partitions: u16,
        /// When it was begun.
        at: Timestamp,
    },
    /// A setting that every node agrees on.
    Setting {
        /// Its name.
        key: String,
        /// Its value.
        value: String,
    },
    /// How far a journal was taken in a partition.
    Journal {
        /// Whose.
        journal: JournalId,
        /// Where.
        partition: Partition,
        /// Through here.
        through: Seq,
    },
    /// A suppression, under the name under which it is kept, in JSON.
    Suppression(String),
    /// A suspension, in JSON.
    Suspension(String),
    /// A note.
    Note {
        /// Which sort of record.
        kind: String,
        /// Which of its sort.
        key: String,
        /// What it says.
        value: Vec<u8>,
        /// From then on it is as if it were not there.
        expires_at: Option<Timestamp>,
    },
    /// A lot of a batch that is still to come.
    Lot(Box<LotPiece>),
    /// A batch of which all lots came.
    Batch(Box<BatchPiece>),
    /// The answer to a call that takes effect once; after its batch.
    Call(Box<CallPiece>),
    /// Events in their order, in JSON; at most [`EVENTS`].
    Events(Vec<String>),
    /// The last; how many came before it.
    End {
        /// Pieces.
        pieces: u64,
    },
    /// What a person lets be kept.
    Consent(Box<ConsentPiece>),
}

/// What a person lets be kept, under the name that stands for the address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConsentPiece {
    /// Where the address belongs, which the name does not tell.
    pub partition: Partition,
    /// Whose.
    pub account: String,
    /// The name; only the store's key leads to it.
    pub name: String,
    /// The code of the tracking mode.
    pub mode: u8,
    /// Since when.
    pub since: Timestamp,
}

/// What was answered to a call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CallPiece {
    /// Whose.
    pub account: String,
    /// The caller's name for the call.
    pub key: String,
    /// A digest of what was asked for.
    pub fingerprint: [u8; 32],
    /// Which try it was.
    pub attempt: BatchId,
    /// It is kept until then, and until its batch has ended.
    pub until: Timestamp,
    /// On which batch it took effect.
    pub batch: BatchId,
    /// What was answered.
    pub answer: Vec<u8>,
}

/// A lot with everything that happened to its recipients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LotPiece {
    /// Of which batch.
    pub batch: BatchId,
    /// Its number; the partition is part of it.
    pub number: LotNumber,
    /// The recipients' domain, or [`MIXED`](crate::MIXED).
    pub queue: String,
    /// The rows in the form in which they are stored.
    pub rows: Vec<u8>,
    /// Four bytes for each. What a node may have started and did not report says so.
    pub cells: Vec<u8>,
    /// Recipients that wait for another attempt, by position, and until when, in milliseconds.
    pub due: Vec<(u16, i64)>,
    /// Blocks of facts in the form in which they are stored.
    pub facts: Vec<Vec<u8>>,
}

/// What a batch is beside its lots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchPiece {
    /// Which.
    pub id: BatchId,
    /// What does not change, in JSON.
    pub head: String,
    /// The code of its state.
    pub state: u8,
    /// Its mail may leave.
    pub released: bool,
    /// Tracking is off.
    pub archived: bool,
    /// Nothing is left of it but its counters.
    pub retired: bool,
    /// When its mail began to leave.
    pub started_at: Option<Timestamp>,
    /// When the last recipient got a final status.
    pub completed_at: Option<Timestamp>,
    /// Recipients.
    pub accepted: u64,
    /// Those that were rejected.
    pub rejected: u64,
    /// By partition. The statuses are counted anew from the lots, if there are any.
    pub counters: Vec<(Partition, Counters)>,
    /// As submitted; none of a retired batch.
    pub content: Vec<u8>,
}

fn damaged(what: &str) -> StoreError {
    StoreError::Damaged(format!("the export is not readable: {what}"))
}

impl Piece {
    pub(crate) fn of_suppression(of: &Suppression) -> Self {
        // Every field has a form in JSON; so have those of a suspension.
        Self::Suppression(serde_json::to_string(of).unwrap_or_default())
    }

    pub(crate) fn of_suspension(of: &Suspension) -> Self {
        Self::Suspension(serde_json::to_string(of).unwrap_or_default())
    }

    pub(crate) fn of_note(of: Note) -> Self {
        Self::Note {
            kind: String::from(&*of.kind),
            key: of.key.into(),
            value: of.value.into(),
            expires_at: of.expires_at,
        }
    }
}

/// What an imported cursor becomes: no store takes it for one of its own.
const FOREIGN: &str = "of another store";

/// A note as another store takes it; none: it says nothing there. Where somebody had read to in the
/// one store is nowhere in the other, and a number that happens to fit would skip events or tell
/// all of them again.
pub(crate) fn note_elsewhere(mut note: Note) -> Option<Note> {
    if &*note.kind == EVENT_CURSORS {
        return None;
    }
    if &*note.key == CURSOR {
        note.value = FOREIGN.as_bytes().into();
    } else if let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(&note.value)
        && let Some(cursor) = value.get_mut(CURSOR)
    {
        *cursor = FOREIGN.into();
        note.value = value.to_string().into_bytes().into();
    }
    Some(note)
}

/// Reads the JSON in a piece.
pub(crate) fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| damaged(&error.to_string()))
}

impl BatchPiece {
    /// The state in which it is restored: nothing is sent before somebody has looked.
    pub(crate) fn restored_state(&self) -> Result<BatchState> {
        let state = BatchState::from_code(self.state).ok_or_else(|| damaged("a state"))?;
        Ok(match state {
            BatchState::Completed | BatchState::Cancelled | BatchState::Open => state,
            BatchState::InProgress | BatchState::Scheduled | BatchState::Paused => {
                BatchState::Paused
            }
        })
    }

    /// The counters of a partition, with the statuses of these cells; without cells as they are.
    pub(crate) fn counters_with(&self, of: Partition, cells: Option<&Statuses>) -> Counters {
        let told = self.counters.iter().find(|(partition, _)| *partition == of);
        let mut counters = told.map_or_else(Counters::default, |(_, counters)| *counters);
        let Some(cells) = cells else {
            return counters;
        };
        counters.accepted = 0;
        for &status in Status::ALL {
            *counters.of(status) = 0;
        }
        for (status, count) in cells.each() {
            let status = match status {
                Status::Queued if !self.released => Status::Scheduled,
                other => other,
            };
            *counters.of(status) += count;
            counters.accepted += count;
        }
        counters
    }
}

/// How many recipients have which status.
#[derive(Debug, Default)]
pub(crate) struct Statuses(BTreeMap<u8, u64>);

impl Statuses {
    /// Counts the cells of a lot.
    pub(crate) fn add(&mut self, cells: &[u8]) -> Result<()> {
        for cell in read_cells(cells)? {
            // What waits is queued here; whether it is scheduled its batch says.
            *self.0.entry(cell.status(true).code()).or_default() += 1;
        }
        Ok(())
    }

    fn each(&self) -> impl Iterator<Item = (Status, u64)> + use<'_> {
        let known = |(code, count): (&u8, &u64)| Some((Status::from_code(*code)?, *count));
        self.0.iter().filter_map(known)
    }

    /// Recipients of whom something is still to come.
    pub(crate) fn open(&self) -> u64 {
        let open = self.each().filter(|(status, _)| !status.is_final());
        open.map(|(_, count)| count).sum()
    }
}

fn read_cells(cells: &[u8]) -> Result<Vec<Cell>> {
    cells
        .chunks(Cell::BYTES)
        .map(|bytes| Cell::read(bytes).ok_or_else(|| damaged("a cell")))
        .collect()
}

/// Notes in cells that somebody may have started what they did not report.
pub(crate) fn mark_doubtful(cells: &mut [u8], positions: impl Iterator<Item = u16>) {
    for position in positions {
        let at = usize::from(position) * Cell::BYTES;
        if let Some(bytes) = cells.get_mut(at..at + Cell::BYTES)
            && let Some(mut cell) = Cell::read(bytes).filter(|cell| !cell.is_final())
        {
            cell.mark_maybe_started();
            bytes.copy_from_slice(&cell.to_bytes());
        }
    }
}

/// What is to be sent of a lot.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Waiting {
    /// Never tried: when due, from which position, how many.
    pub(crate) spans: Vec<(i64, u16, u32)>,
    /// To be tried again: by time and queue.
    pub(crate) retries: BTreeMap<(i64, Box<str>), Vec<Ref>>,
}

impl LotPiece {
    /// The rows; refuses what is no lot.
    pub(crate) fn read_rows(&self) -> Result<Vec<Row>> {
        let rows: Vec<Row> = form::unpack_rows(&self.rows)?;
        if rows.is_empty()
            || rows.len() > crate::LOT_ROWS
            || self.cells.len() != rows.len() * Cell::BYTES
        {
            return Err(damaged("a lot"));
        }
        Ok(rows)
    }

    /// Who waits, and for what.
    pub(crate) fn waiting(&self, rows: &[Row]) -> Result<Waiting> {
        let due: BTreeMap<u16, i64> = self.due.iter().copied().collect();
        let mut waiting = Waiting::default();
        for (position, cell) in (0_u16..).zip(read_cells(&self.cells)?) {
            if cell.is_final() {
                continue;
            }
            let at = due.get(&position).copied();
            if cell.attempts() == 0 && at.is_none() {
                let due_at = if cell.is_held_back() { HELD_BACK } else { 0 };
                match waiting.spans.last_mut() {
                    Some((due, first, count))
                        if *due == due_at && u32::from(*first) + *count == u32::from(position) =>
                    {
                        *count += 1;
                    }
                    _ => waiting.spans.push((due_at, position, 1)),
                }
                continue;
            }
            let own = rows.get(usize::from(position));
            let queue = match own {
                Some(row) if self.queue == crate::MIXED => row.email.domain(),
                _ => self.queue.as_str(),
            };
            let key = (at.unwrap_or(0), queue.into());
            waiting.retries.entry(key).or_default().push(Ref {
                lot: self.number,
                position,
                attempts: cell.attempts(),
            });
        }
        Ok(waiting)
    }
}

/// Writes pieces into a file.
pub struct BackupWriter<W: Write> {
    to: zstd::stream::write::Encoder<'static, W>,
    pieces: u64,
}

impl<W: Write> BackupWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// As `to` gives them.
    pub fn new(mut to: W) -> std::io::Result<Self> {
        to.write_all(NAME)?;
        to.write_all(&VERSION.to_le_bytes())?;
        let mut to = zstd::stream::write::Encoder::new(to, LEVEL)?;
        to.include_checksum(true)?;
        Ok(Self { to, pieces: 0 })
    }

    /// Adds a piece; whoever makes pieces needs not count them.
    ///
    /// # Errors
    /// As `to` gives them, or when a piece is too large.
    pub fn write(&mut self, piece: &Piece) -> std::io::Result<()> {
        let piece = match piece {
            Piece::End { .. } => &Piece::End {
                pieces: self.pieces,
            },
            other => other,
        };
        let bytes = postcard::to_allocvec(piece).map_err(std::io::Error::other)?;
        let length = u32::try_from(bytes.len())
            .ok()
            .filter(|length| *length <= PIECE_MAX)
            .ok_or_else(|| std::io::Error::other("a piece of more than 512 MiB"))?;
        self.to.write_all(&length.to_le_bytes())?;
        self.to.write_all(&bytes)?;
        self.pieces += 1;
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// As `to` gives them.
    pub fn finish(self) -> std::io::Result<W> {
        self.to.finish()
    }
}

/// Reads pieces from a file.
pub struct BackupReader<R: std::io::BufRead> {
    from: zstd::stream::read::Decoder<'static, R>,
    pieces: u64,
    ended: bool,
}

impl<R: std::io::BufRead> BackupReader<R> {
    /// Opens a file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it is none, or of a later version.
    pub fn new(mut from: R) -> Result<Self> {
        let mut head = [0; NAME.len() + 2];
        from.read_exact(&mut head)
            .map_err(|_| damaged("it has no head"))?;
        let (name, of) = head.split_at(NAME.len());
        if name != NAME {
            return Err(damaged("it is no export of a store"));
        }
        if of != VERSION.to_le_bytes() {
            return Err(damaged("a version that this program does not know"));
        }
        let from = zstd::stream::read::Decoder::with_buffer(from)
            .map_err(|error| damaged(&error.to_string()))?;
        Ok(Self {
            from,
            pieces: 0,
            ended: false,
        })
    }

    /// The next piece; `None` after the last.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when a part is missing or changed.
    pub fn next_piece(&mut self) -> Result<Option<Piece>> {
        let cut = |error: std::io::Error| damaged(&error.to_string());
        if self.ended {
            // The checksum is looked at when the end is read.
            let mut rest = [0];
            return match self.from.read(&mut rest).map_err(cut)? {
                0 => Ok(None),
                _ => Err(damaged("something after its end")),
            };
        }
        let mut length = [0; 4];
        self.from.read_exact(&mut length).map_err(cut)?;
        let length = u32::from_le_bytes(length);
        if length > PIECE_MAX {
            return Err(damaged("the length of a piece"));
        }
        // Grows as the bytes come: a length alone allocates nothing.
        let mut bytes = Vec::new();
        let read = (&mut self.from)
            .take(u64::from(length))
            .read_to_end(&mut bytes)
            .map_err(cut)?;
        if u32::try_from(read) != Ok(length) {
            return Err(damaged("it ends in the middle"));
        }
        let piece: Piece = postcard::from_bytes(&bytes).map_err(|_| damaged("a piece"))?;
        if let Piece::End { pieces } = piece {
            if pieces != self.pieces {
                return Err(damaged("a piece is missing"));
            }
            self.ended = true;
        }
        self.pieces += 1;
        Ok(Some(piece))
    }
}

impl<W: Write> std::fmt::Debug for BackupWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackupWriter").finish_non_exhaustive()
    }
}

impl<R: std::io::BufRead> std::fmt::Debug for BackupReader<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackupReader").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces() -> Vec<Piece> {
        let at = Timestamp::from_millis(5);
        vec![
            Piece::Begin { partitions: 1, at },
            Piece::Events(vec!["{}".repeat(500); 20]),
            Piece::End { pieces: 0 },
        ]
    }

    fn file() -> Vec<u8> {
        let mut writer = BackupWriter::new(Vec::new()).unwrap();
        pieces()
            .iter()
            .for_each(|piece| writer.write(piece).unwrap());
        writer.finish().unwrap()
    }

    fn read(file: &[u8]) -> Result<Vec<Piece>> {
        let mut reader = BackupReader::new(file)?;
        let mut found = Vec::new();
        while let Some(piece) = reader.next_piece()? {
            found.push(piece);
        }
        Ok(found)
    }

    #[test]
    fn a_cursor_is_none_of_the_other_store() {
        let note = |kind: &str, key: &str, value: &str| Note {
            kind: kind.into(),
            key: key.into(),
            value: value.as_bytes().into(),
            expires_at: None,
        };
        assert_eq!(
            note_elsewhere(note(EVENT_CURSORS, "webhook 1", "e1-7")),
            None
        );
        let value = |of: Note| String::from_utf8(note_elsewhere(of).unwrap().value.into()).unwrap();
        assert_eq!(value(note("engagement", "cursor", "e1-7")), FOREIGN);
        let progress = value(note(
            "webhook-progress",
            "1",
            "{\"cursor\":\"e2-7.9\",\"moved_at\":5}",
        ));
        assert_eq!(progress, "{\"cursor\":\"of another store\",\"moved_at\":5}");
        for kept in ["{\"score\":5}", "[1]", "\u{1}\u{2}", ""] {
            assert_eq!(value(note("prospect", "p-1", kept)), kept);
        }
    }

    #[test]
    fn a_file_reads_back_and_no_part_of_it_does() {
        let file = file();
        let mut expected = pieces();
        expected[2] = Piece::End { pieces: 2 };
        assert_eq!(read(&file), Ok(expected));
        for end in 0..file.len() {
            assert!(read(&file[..end]).is_err(), "{end} of {}", file.len());
        }
    }

    #[test]
    fn a_later_version_is_refused() {
        let mut file = file();
        file[NAME.len()] += 1;
        assert!(read(&file).unwrap_err().to_string().contains("version"));
        assert!(read(b"something else").is_err());
    }

    proptest! {
        #[test]
        fn a_changed_byte_is_noticed(at: prop::sample::Index, by in 1_u8..) {
            let mut changed = file();
            let at = at.index(changed.len());
            changed[at] ^= by;
            let found = read(&changed);
            // Some bits of a frame's head mean nothing.
            prop_assert!(found.is_err() || found == read(&file()));
        }

        #[test]
        fn any_bytes_are_pieces_or_refused(bytes: Vec<u8>) {
            let _read = read(&bytes);
            let _piece = postcard::from_bytes::<Piece>(&bytes);
            let framed = [&NAME[..], &VERSION.to_le_bytes(), &bytes].concat();
            let _read = read(&framed);
        }

        #[test]
        fn who_waits_is_found_whatever_the_cells_say(
            states in prop::collection::vec((0_u8..3, prop::option::of(0_i64..3)), 1..60)
        ) {
            let rows: Vec<Row> = (0..).zip(&states).map(|(index, _)| Row::new(index, format!("n{index}@d{}.example", index % 3).parse().unwrap())).collect();
            let cells: Vec<u8> = states.iter().flat_map(|(state, _)| match state {
                0 => Cell::NEW.to_bytes(),
                1 => [Status::TemporaryError.code(), 2, 0, 0],
                _ => [Status::Delivered.code(), 1, 4, 0],
            }).collect();
            let due = (0..).zip(&states).filter_map(|(at, (_, due))| Some((at, (*due)?))).collect();
            let lot = LotPiece {
                batch: BatchId::from_bytes([1; 16]),
                number: LotNumber(3),
                queue: crate::MIXED.to_owned(),
                rows: form::pack_rows(&rows).unwrap(),
                cells,
                due,
                facts: Vec::new(),
            };
            let waiting = lot.waiting(&lot.read_rows().unwrap()).unwrap();
            let spans = waiting.spans.iter().flat_map(|(_, first, count)| (u32::from(*first)..).take(usize::try_from(*count).unwrap()));
            let refs = waiting.retries.values().flatten().map(|of| u32::from(of.position));
            let mut found: Vec<u32> = spans.chain(refs).collect();
            found.sort_unstable();
            let expected: Vec<u32> = (0..).zip(&states).filter(|(_, (state, _))| *state < 2).map(|(at, _)| at).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
