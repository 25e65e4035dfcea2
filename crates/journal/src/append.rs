//! What was appended and is not yet with the operating system, and the numbers that `append` needs
//! without touching a file.

use crate::format::{Class, FRAME_BYTES, MAX_RECORD_BYTES, RecordKind, frame};
use crate::records::Record;
use bytes::BytesMut;
use model::Seq;

/// The most that may wait for a write. Reached only when there is no room on the disk.
const BUFFER_BYTES: usize = 8 << 20;
/// The buffer is allocated by this much, several writes' worth.
const BLOCK_BYTES: usize = 64 << 10;

/// The records of one class that wait for a write.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) bytes: BytesMut,
    pub(crate) records: Vec<Staged>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Staged {
    pub(crate) seq: Seq,
    pub(crate) kind: RecordKind,
    pub(crate) payload_len: u32,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Takes what waits and leaves the rest of the allocation.
    pub(crate) fn take(&mut self) -> Self {
        Self {
            bytes: self.bytes.split(),
            records: std::mem::take(&mut self.records),
        }
    }

    /// The records, once they are written, sharing the bytes.
    pub(crate) fn records(&mut self) -> impl Iterator<Item = Record> {
        let bytes = self.bytes.split().freeze();
        let mut at = 0;
        self.records.iter().map(move |staged| {
            let start = at + FRAME_BYTES;
            at = start + staged.payload_len as usize;
            Record {
                seq: staged.seq,
                kind: staged.kind,
                payload: bytes.slice(start..at),
            }
        })
    }

    /// Takes over the memory of a batch that is done with.
    pub(crate) fn reuse(&mut self, mut done: Self) {
        if self.records.capacity() == 0 {
            done.records.clear();
            self.records = done.records;
        }
    }

    /// Puts `older` back in front.
    pub(crate) fn put_back(&mut self, mut older: Self) {
        older.bytes.extend_from_slice(&self.bytes);
        older.records.append(&mut self.records);
        *self = older;
    }
}

/// Why a record was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Full,
    TooLarge,
}

#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) next_seq: Seq,
    /// The highest number in the files, which a restart goes on from. Lies before that of what was
    /// dropped before it was written.
    pub(crate) last_written: Seq,
    pub(crate) batches: [Batch; 3],
    /// Bytes of segments that may not be dropped.
    pub(crate) kept_bytes: u64,
    /// Bytes of all segments.
    pub(crate) disk_bytes: u64,
    max_bytes: u64,
    /// What only records of things already begun may still use.
    reserve: u64,
    /// The last write found no room.
    pub(crate) no_space: bool,
    dropped: [u64; 5],
}

impl Buffer {
    pub(crate) fn new(next_seq: Seq, max_bytes: u64) -> Self {
        Self {
            next_seq,
            last_written: next_seq - 1,
            batches: Default::default(),
            kept_bytes: 0,
            disk_bytes: 0,
            max_bytes,
            reserve: (max_bytes / 8).min(64 << 20),
            no_space: false,
            dropped: [0; 5],
        }
    }

    pub(crate) fn buffered(&self) -> usize {
        self.batches.iter().map(|batch| batch.bytes.len()).sum()
    }

    pub(crate) fn append(&mut self, kind: RecordKind, payload: &[u8]) -> Result<Seq, Refusal> {
        if payload.len() > MAX_RECORD_BYTES {
            return Err(Refusal::TooLarge);
        }
        if !self.has_room(kind, FRAME_BYTES + payload.len()) {
            if kind.class() != Class::Keep {
                self.dropped[index(kind)] += 1;
            }
            return Err(Refusal::Full);
        }
        let seq = self.next_seq;
        self.next_seq += 1;
        let batch = &mut self.batches[kind.class().index()];
        let size = FRAME_BYTES + payload.len();
        if batch.bytes.capacity() - batch.bytes.len() < size {
            batch.bytes.reserve(size.max(BLOCK_BYTES));
        }
        batch.bytes.extend_from_slice(&frame(seq, kind, payload));
        batch.bytes.extend_from_slice(payload);
        let payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        batch.records.push(Staged {
            seq,
            kind,
            payload_len,
        });
        Ok(seq)
    }

    /// Whether a record of this kind and size would be taken.
    pub(crate) fn has_room(&self, kind: RecordKind, size: usize) -> bool {
        let waiting = self.buffered() + size;
        let keep = &self.batches[Class::Keep.index()];
        let kept = self.kept_bytes + (keep.bytes.len() + size) as u64;
        match kind {
            RecordKind::Start => {
                !self.no_space
                    && waiting <= BUFFER_BYTES / 2
                    && kept <= self.max_bytes - self.reserve
            }
            RecordKind::Outcome | RecordKind::Unsubscribe => {
                waiting <= BUFFER_BYTES && kept <= self.max_bytes
            }
            RecordKind::Click | RecordKind::Open => waiting <= BUFFER_BYTES / 2,
        }
    }

    /// The highest written number such that nothing before it waits. Numbers of dropped records
    /// count only when a later record is written: a restart must not give them again.
    pub(crate) fn written_through(&self) -> Seq {
        let waiting = self
            .batches
            .iter()
            .filter_map(|batch| batch.records.first());
        let first = waiting.map(|record| record.seq).min();
        first.map_or(self.last_written, |first| self.last_written.min(first - 1))
    }

    pub(crate) fn dropped(&self, kind: RecordKind) -> u64 {
        self.dropped[index(kind)]
    }

    pub(crate) fn count_dropped(&mut self, kind: RecordKind, count: u64) {
        self.dropped[index(kind)] += count;
    }

    /// Records that wait for a write.
    pub(crate) fn waiting(&self) -> u64 {
        self.batches
            .iter()
            .map(|batch| batch.records.len() as u64)
            .sum()
    }
}

fn index(kind: RecordKind) -> usize {
    usize::from(kind.to_byte() - 1)
}
