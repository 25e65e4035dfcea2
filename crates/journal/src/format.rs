//! The bytes of a segment file.
//!
//! Owns their encoding and the judgement of what is intact; does no I/O. All numbers are
//! little-endian.
//!
//! ```text
//! segment = header record*
//! header  = "HKYJ" version:u16 class:u8 0:u8 journal:16 bytes first_seq:u64 synced:u64 crc32:u32
//! record  = payload_len:u32 crc32:u32 seq:u64 kind:u8 payload
//! ```
//!
//! `synced` says through which record the journal was on disk when the segment was made.
//! A header's checksum covers the 40 bytes before it; a record's covers everything in it but the
//! checksum itself. Sequence numbers rise within a segment and are at least `first_seq`. A file is
//! named `CLASS-FIRST_SEQ.seg`, the number in 20 digits.

use model::{JournalId, Seq};
use std::fmt;

/// The largest payload of a record, in bytes. Nothing read from a file allocates more at a time.
pub const MAX_RECORD_BYTES: usize = 64 * 1024;
/// The version of the format; a segment of a later one is refused, never guessed at.
pub const VERSION: u16 = 1;

pub(crate) const HEADER_BYTES: usize = 44;
pub(crate) const FRAME_BYTES: usize = 17;
const MAGIC: &[u8; 4] = b"HKYJ";

/// What a record is worth when there is no room; the journal knows no more about it. A bounce or
/// a complaint that came in by mail is worth as much as an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RecordKind {
    /// A transaction's final dot is about to leave. Refused before an outcome is, so that what was
    /// begun can be recorded. Never dropped.
    Start,
    /// What became of a recipient. Never dropped.
    Outcome,
    /// A person unsubscribed. Never dropped.
    Unsubscribe,
    /// A link was followed. Dropped when there are no opens left to drop.
    Click,
    /// A pixel was fetched. Dropped first.
    Open,
}

impl RecordKind {
    /// Every kind, in the order of their worth.
    pub const ALL: [Self; 5] = [
        Self::Start,
        Self::Outcome,
        Self::Unsubscribe,
        Self::Click,
        Self::Open,
    ];

    /// The label of `hikyaku_journal_dropped_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Outcome => "outcome",
            Self::Unsubscribe => "unsubscribe",
            Self::Click => "click",
            Self::Open => "open",
        }
    }

    pub(crate) const fn to_byte(self) -> u8 {
        match self {
            Self::Start => 1,
            Self::Outcome => 2,
            Self::Unsubscribe => 3,
            Self::Click => 4,
            Self::Open => 5,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_byte() == byte)
    }

    pub(crate) const fn class(self) -> Class {
        match self {
            Self::Start | Self::Outcome | Self::Unsubscribe => Class::Keep,
            Self::Click => Class::Click,
            Self::Open => Class::Open,
        }
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A chain of segments: what is dropped together. A class that may be dropped has one kind only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Class {
    Keep,
    Click,
    Open,
}

impl Class {
    pub(crate) const ALL: [Self; 3] = [Self::Keep, Self::Click, Self::Open];

    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Keep => 0,
            Self::Click => 1,
            Self::Open => 2,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Click => "click",
            Self::Open => "open",
        }
    }

    const fn to_byte(self) -> u8 {
        match self {
            Self::Keep => 1,
            Self::Click => 2,
            Self::Open => 3,
        }
    }
}

pub(crate) fn file_name(class: Class, first_seq: Seq) -> String {
    format!("{}-{first_seq:020}.seg", class.name())
}

pub(crate) fn parse_file_name(name: &str) -> Option<(Class, Seq)> {
    let (class, number) = name.strip_suffix(".seg")?.split_once('-')?;
    let class = Class::ALL.into_iter().find(|one| one.name() == class)?;
    if number.len() != 20 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((class, number.parse().ok().filter(|&seq| seq > 0)?))
}

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) class: Class,
    pub(crate) journal: JournalId,
    pub(crate) first_seq: Seq,
    pub(crate) synced: Seq,
}

/// Why a header is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Cut short, or its checksum is wrong.
    Damaged,
    /// Intact, and of a version that this program does not know.
    Version(u16),
}

impl Header {
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.class.to_byte();
        bytes[8..24].copy_from_slice(&self.journal.to_bytes());
        bytes[24..32].copy_from_slice(&self.first_seq.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.synced.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..40]);
        bytes[40..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let bytes: &[u8; HEADER_BYTES] = bytes
            .get(..HEADER_BYTES)
            .and_then(|head| head.try_into().ok())
            .ok_or(HeaderError::Damaged)?;
        if &bytes[..4] != MAGIC || u32_at(bytes, 40) != crc32fast::hash(&bytes[..40]) {
            return Err(HeaderError::Damaged);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let class = Class::ALL
            .into_iter()
            .find(|class| class.to_byte() == bytes[6]);
        let mut journal = [0; 16];
        journal.copy_from_slice(&bytes[8..24]);
        Ok(Self {
            class: class.ok_or(HeaderError::Damaged)?,
            journal: JournalId::from_bytes(journal),
            first_seq: u64_at(bytes, 24),
            synced: u64_at(bytes, 32),
        })
    }
}

/// The fixed part of a record, taken from its first [`FRAME_BYTES`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) payload_len: usize,
    crc: u32,
    pub(crate) seq: Seq,
    kind: u8,
}

impl Frame {
    /// Reads the fixed part; `None` when its length cannot be true.
    pub(crate) fn decode(bytes: &[u8; FRAME_BYTES]) -> Option<Self> {
        let payload_len = usize::try_from(u32_at(bytes, 0)).ok()?;
        (payload_len <= MAX_RECORD_BYTES).then(|| Self {
            payload_len,
            crc: u32_at(bytes, 4),
            seq: u64_at(bytes, 8),
            kind: bytes[16],
        })
    }

    /// The kind, if `payload` is what was written with this frame.
    pub(crate) fn check(&self, payload: &[u8]) -> Option<RecordKind> {
        let kind = RecordKind::from_byte(self.kind)?;
        let len = u32::try_from(payload.len()).ok()?;
        (checksum(len, self.seq, self.kind, payload) == self.crc).then_some(kind)
    }
}

/// The fixed part of the record with this payload, which is at most [`MAX_RECORD_BYTES`] long.
pub(crate) fn frame(seq: Seq, kind: RecordKind, payload: &[u8]) -> [u8; FRAME_BYTES] {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = [0; FRAME_BYTES];
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&checksum(len, seq, kind.to_byte(), payload).to_le_bytes());
    bytes[8..16].copy_from_slice(&seq.to_le_bytes());
    bytes[16] = kind.to_byte();
    bytes
}

fn checksum(len: u32, seq: Seq, kind: u8, payload: &[u8]) -> u32 {
    let mut head = [0; 13];
    head[..4].copy_from_slice(&len.to_le_bytes());
    head[4..12].copy_from_slice(&seq.to_le_bytes());
    head[12] = kind;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(payload);
    hasher.finalize()
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            class: Class::Keep,
            journal: JournalId::from_bytes([7; 16]),
            first_seq: 258,
            synced: 3,
        };
        let bytes = header.encode();
        assert_eq!(&bytes[..8], b"HKYJ\x01\x00\x01\x00");
        assert_eq!(bytes[8..24], [7; 16]);
        assert_eq!(bytes[24..32], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..40], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Header::decode(&bytes), Ok(header));
        let record = frame(258, RecordKind::Click, b"hi");
        assert_eq!(record[..4], [2, 0, 0, 0]);
        assert_eq!(record[8..], [2, 1, 0, 0, 0, 0, 0, 0, 4]);
        let decoded = Frame::decode(&record).expect("a frame");
        assert_eq!(decoded.check(b"hi"), Some(RecordKind::Click));
        assert_eq!(decoded.check(b"ho"), None);
    }

    #[test]
    fn a_later_version_is_told_from_damage() {
        let mut bytes = Header {
            class: Class::Open,
            journal: JournalId::from_bytes([1; 16]),
            first_seq: 1,
            synced: 0,
        }
        .encode();
        bytes[4] = 9;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Damaged));
        let crc = crc32fast::hash(&bytes[..40]);
        bytes[40..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Version(9)));
    }

    #[test]
    fn file_names() {
        assert_eq!(file_name(Class::Open, 42), "open-00000000000000000042.seg");
        assert_eq!(
            parse_file_name("open-00000000000000000042.seg"),
            Some((Class::Open, 42))
        );
        for bad in [
            "lock",
            "open-42.seg",
            "x-00000000000000000042.seg",
            "keep-0000000000000000004x.seg",
            "keep-00000000000000000000.seg",
            "keep-99999999999999999999.seg",
            "keep-00000000000000000042.damaged",
        ] {
            assert_eq!(parse_file_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn zeros_are_no_record() {
        let frame = Frame::decode(&[0; FRAME_BYTES]).expect("length zero");
        assert_eq!(frame.check(b""), None);
    }

    proptest! {
        #[test]
        fn any_record_comes_back_and_no_flipped_bit_does(
            seq: u64, kind in 0_usize..5, payload in proptest::collection::vec(any::<u8>(), 0..200),
            flip: proptest::sample::Index,
        ) {
            let kind = RecordKind::ALL[kind];
            let mut bytes = frame(seq, kind, &payload).to_vec();
            bytes.extend_from_slice(&payload);
            let read = |bytes: &[u8]| {
                let frame = Frame::decode(bytes.first_chunk().expect("long enough"))?;
                let payload = bytes.get(FRAME_BYTES..FRAME_BYTES + frame.payload_len)?;
                frame.check(payload).map(|kind| (frame.seq, kind, payload.to_vec()))
            };
            prop_assert_eq!(read(&bytes), Some((seq, kind, payload.clone())));
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(read(&bytes), None);
        }

        #[test]
        fn any_header_bytes_are_safe(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(Header::decode(&bytes), Err(HeaderError::Damaged));
        }
    }
}
