//! One segment file: what is known of it, and reading it record by record.
//!
//! Must not decide what damage means; that is for recovery and for the readers.

use crate::disk::{DiskFile, read_full_at};
use crate::format::{Class, FRAME_BYTES, Frame, HEADER_BYTES, MAX_RECORD_BYTES, RecordKind};
use model::Seq;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Room for the largest record and then some: the bound of what reading a file allocates.
const READ_BYTES: usize = 2 * MAX_RECORD_BYTES;

/// A segment with an intact header.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) path: PathBuf,
    pub(crate) class: Class,
    /// No record in it, or in a later segment of its chain, is below this.
    pub(crate) first_seq: Seq,
    /// `first_seq - 1` while it is empty.
    pub(crate) last_seq: Seq,
    pub(crate) records: u64,
    /// Bytes up to the end of the last intact record (of the file, when damaged).
    pub(crate) len: u64,
    /// Bad bytes were found in it; when trimmed it is put aside instead of unlinked.
    pub(crate) damaged: bool,
    /// It and its name are on disk, so that another can go.
    pub(crate) durable: bool,
}

impl Segment {
    pub(crate) fn empty(path: PathBuf, class: Class, first_seq: Seq) -> Self {
        let len = HEADER_BYTES as u64;
        let last_seq = first_seq.saturating_sub(1);
        Self {
            path,
            class,
            first_seq,
            last_seq,
            records: 0,
            len,
            damaged: false,
            durable: false,
        }
    }
}

/// What came next in a segment.
#[derive(Debug)]
pub(crate) enum Step<'a> {
    Record {
        seq: Seq,
        kind: RecordKind,
        payload: &'a [u8],
    },
    End,
    /// The bytes from [`SegmentReader::offset`] on are no record; nothing after them can be found.
    Damaged,
}

/// Reads the records of one segment in order.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    file: Arc<dyn DiskFile>,
    class: Class,
    end: u64,
    /// Where in the file `buffer` ends.
    filled_to: u64,
    buffer: Vec<u8>,
    at: usize,
    last_seq: Seq,
}

impl SegmentReader {
    /// Reads from the first record up to the byte `end`.
    pub(crate) fn new(file: Arc<dyn DiskFile>, class: Class, first_seq: Seq, end: u64) -> Self {
        let last_seq = first_seq.saturating_sub(1);
        let filled_to = HEADER_BYTES as u64;
        Self {
            file,
            class,
            end,
            filled_to,
            buffer: Vec::new(),
            at: 0,
            last_seq,
        }
    }

    /// Where the next record begins.
    pub(crate) fn offset(&self) -> u64 {
        self.filled_to - (self.buffer.len() - self.at) as u64
    }

    /// The next record.
    ///
    /// # Errors
    /// As the disk gives them; the call may be repeated.
    pub(crate) fn step(&mut self) -> io::Result<Step<'_>> {
        if !self.fill(FRAME_BYTES)? {
            let clean = self.at == self.buffer.len();
            return Ok(if clean { Step::End } else { Step::Damaged });
        }
        let head = self
            .buffer
            .get(self.at..)
            .and_then(|rest| rest.first_chunk());
        let Some(frame) = head.and_then(Frame::decode) else {
            return Ok(Step::Damaged);
        };
        let size = FRAME_BYTES + frame.payload_len;
        if frame.seq <= self.last_seq || !self.fill(size)? {
            return Ok(Step::Damaged);
        }
        let payload = self
            .buffer
            .get(self.at + FRAME_BYTES..self.at + size)
            .unwrap_or_default();
        match frame.check(payload) {
            Some(kind) if kind.class() == self.class => {
                self.at += size;
                self.last_seq = frame.seq;
                Ok(Step::Record {
                    seq: frame.seq,
                    kind,
                    payload,
                })
            }
            _ => Ok(Step::Damaged),
        }
    }

    /// Has at least `want` bytes in the buffer from `at`; false when the segment ends before.
    fn fill(&mut self, want: usize) -> io::Result<bool> {
        if self.buffer.len() - self.at >= want {
            return Ok(true);
        }
        let left = usize::try_from(self.end.saturating_sub(self.filled_to)).unwrap_or(usize::MAX);
        if left > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
            let had = self.buffer.len();
            self.buffer.resize(had + left.min(READ_BYTES - had), 0);
            let read = read_full_at(&*self.file, &mut self.buffer[had..], self.filled_to);
            self.buffer
                .truncate(had + read.as_ref().map_or(0, |read| *read));
            self.filled_to += read? as u64;
        }
        Ok(self.buffer.len() - self.at >= want)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::FaultDisk;
    use crate::format::frame;
    use proptest::prelude::*;
    use std::path::Path;

    fn read(bytes: &[u8]) -> (Vec<(Seq, Vec<u8>)>, bool, u64) {
        let disk = FaultDisk::new(1).mount();
        disk.create_dir_all(Path::new("/d")).expect("mkdir");
        let file = disk.create(Path::new("/d/f")).expect("create");
        let mut whole = vec![0; HEADER_BYTES];
        whole.extend_from_slice(bytes);
        crate::disk::write_all_at(&*file, &whole, 0).expect("write");
        let mut reader = SegmentReader::new(file, Class::Open, 1, whole.len() as u64);
        let mut records = Vec::new();
        loop {
            let clean = match reader.step().expect("no I/O error") {
                Step::Record { seq, payload, .. } => {
                    records.push((seq, payload.to_vec()));
                    continue;
                }
                Step::End => true,
                Step::Damaged => false,
            };
            assert!(
                reader.buffer.capacity() <= READ_BYTES,
                "{}",
                reader.buffer.capacity()
            );
            return (records, clean, reader.offset() - HEADER_BYTES as u64);
        }
    }

    fn encode(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        let mut ends = vec![0];
        for (at, payload) in payloads.iter().enumerate() {
            bytes.extend_from_slice(&frame(at as u64 + 1, RecordKind::Open, payload));
            bytes.extend_from_slice(payload);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn records_of_every_size_up_to_the_largest() {
        let payloads: Vec<_> = [
            0,
            1,
            17,
            4096,
            MAX_RECORD_BYTES,
            MAX_RECORD_BYTES - 1,
            3,
            MAX_RECORD_BYTES,
        ]
        .map(|len| vec![b'x'; len])
        .into();
        let (bytes, _) = encode(&payloads);
        let (records, clean, offset) = read(&bytes);
        assert!(clean);
        assert_eq!(offset, bytes.len() as u64);
        assert_eq!(
            records
                .into_iter()
                .map(|(_, payload)| payload)
                .collect::<Vec<_>>(),
            payloads
        );
    }

    #[test]
    fn sequence_numbers_must_rise() {
        let mut bytes = frame(5, RecordKind::Open, b"").to_vec();
        bytes.extend_from_slice(&frame(5, RecordKind::Open, b""));
        let (records, clean, _) = read(&bytes);
        assert_eq!((records.len(), clean), (1, false));
    }

    #[test]
    fn a_record_of_another_chain_is_damage() {
        let (records, clean, _) = read(&frame(5, RecordKind::Outcome, b""));
        assert_eq!((records.len(), clean), (0, false));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (records, clean, offset) = read(&bytes);
            prop_assert!(records.is_empty());
            prop_assert_eq!(clean, bytes.is_empty());
            prop_assert_eq!(offset, 0);
        }

        #[test]
        fn a_cut_leaves_exactly_the_whole_records_before_it(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..8),
            cut: proptest::sample::Index, garbage in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let (bytes, ends) = encode(&payloads);
            let cut = cut.index(bytes.len() + 1);
            let whole = ends.iter().filter(|&&end| end <= cut).count() - 1;
            let (records, clean, offset) = read(&bytes[..cut]);
            prop_assert_eq!(records.len(), whole);
            prop_assert_eq!(clean, ends[whole] == cut);
            prop_assert_eq!(offset, ends[whole] as u64);
            // What follows the cut may be the remains of anything.
            let mut dirty = bytes[..ends[whole]].to_vec();
            dirty.extend_from_slice(&garbage);
            let (records, _, _) = read(&dirty);
            prop_assert_eq!(records.len(), whole);
        }
    }
}
