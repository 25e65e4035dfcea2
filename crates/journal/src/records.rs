//! Reading records back from segment files: the chains merged by sequence number.

use crate::claim::identity_of;
use crate::config::{Doing as _, OpenError};
use crate::disk::Disk;
use crate::format::RecordKind;
use crate::recovery::{self, Tear};
use crate::segment::{Segment, SegmentReader, Step};
use bytes::Bytes;
use model::{JournalId, Seq};
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A record as it was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place in the journal.
    pub seq: Seq,
    /// What it is worth.
    pub kind: RecordKind,
    /// The bytes that were appended.
    pub payload: Bytes,
}

/// Some of what is to be shipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// In order.
    pub records: Vec<Record>,
    /// There is no other record through this one: what follows is asked for with this number, and
    /// this number is what was shipped with these records. May lie beyond the last of them, as the
    /// numbers of dropped records are never used again.
    pub through: Seq,
}

/// The records of a journal in the order of their numbers, read from disk as they are asked for.
///
/// Reads block. After an error the iterator may be asked again. Damaged parts are logged and
/// passed over, segments that were trimmed meanwhile too.
#[derive(Debug)]
pub struct Records {
    disk: Arc<dyn Disk>,
    chains: Vec<ChainReader>,
    after: Seq,
    through: Seq,
}

#[derive(Debug, Default)]
struct ChainReader {
    todo: VecDeque<Segment>,
    open: Option<SegmentReader>,
    head: Option<Record>,
}

impl Records {
    /// Reads what is in `segments` after `after` and through `through`.
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        chains: impl Iterator<Item = VecDeque<Segment>>,
        after: Seq,
        through: Seq,
    ) -> Self {
        let chains = chains
            .map(|todo| ChainReader {
                todo,
                ..ChainReader::default()
            })
            .collect();
        Self {
            disk,
            chains,
            after,
            through,
        }
    }

    /// The number of the last record given.
    pub(crate) fn position(&self) -> Seq {
        self.after
    }

    /// Whether there can be nothing more.
    pub(crate) fn is_done(&self) -> bool {
        self.after >= self.through
    }

    /// Up to `max_records`, and not much more than `max_bytes` of payload.
    ///
    /// # Errors
    /// As the disk gives them. What was read until then is lost to this reader.
    pub(crate) fn take_some(
        &mut self,
        max_records: usize,
        max_bytes: usize,
    ) -> io::Result<Pending> {
        let mut pending = Pending {
            records: Vec::new(),
            through: self.after,
        };
        let mut bytes = 0;
        while pending.records.len() < max_records && bytes < max_bytes {
            let Some(record) = self.advance()? else {
                self.after = self.after.max(self.through);
                break;
            };
            bytes += record.payload.len();
            pending.records.push(record);
        }
        pending.through = self.after;
        Ok(pending)
    }

    fn advance(&mut self) -> io::Result<Option<Record>> {
        for chain in &mut self.chains {
            chain.fill_head(&*self.disk, self.after)?;
        }
        let next = self
            .chains
            .iter_mut()
            .filter(|chain| {
                chain
                    .head
                    .as_ref()
                    .is_some_and(|head| head.seq <= self.through)
            })
            .min_by_key(|chain| chain.head.as_ref().map(|head| head.seq));
        let record = next.and_then(|chain| chain.head.take());
        if let Some(record) = &record {
            self.after = record.seq;
        }
        Ok(record)
    }
}

impl Iterator for Records {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

impl ChainReader {
    fn fill_head(&mut self, disk: &dyn Disk, after: Seq) -> io::Result<()> {
        while self.head.is_none() {
            let Some(segment) = self.todo.front() else {
                return Ok(());
            };
            let Some(reader) = &mut self.open else {
                match disk.open(&segment.path, false) {
                    Ok(file) => {
                        let (class, first, len) = (segment.class, segment.first_seq, segment.len);
                        self.open = Some(SegmentReader::new(file, class, first, len));
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        self.todo.pop_front();
                    }
                    Err(error) => return Err(error),
                }
                continue;
            };
            match reader.step()? {
                Step::Record { seq, kind, payload } => {
                    if seq > after {
                        let payload = Bytes::copy_from_slice(payload);
                        self.head = Some(Record { seq, kind, payload });
                    }
                    continue;
                }
                Step::End => {}
                Step::Damaged => {
                    let (path, offset) = (segment.path.display(), reader.offset());
                    tracing::error!(%path, offset, "journal segment is damaged, going on after it");
                }
            }
            self.open = None;
            self.todo.pop_front();
        }
        Ok(())
    }
}

/// The journal of another node, for example of one that is lost.
#[derive(Debug)]
pub struct Foreign {
    /// The role in its directory's name.
    pub role: String,
    /// Its identity.
    pub id: JournalId,
    /// Everything that can be read from it.
    pub records: Records,
}

/// Reads the journal in `dir` (named `ROLE-ID`) without locking or changing anything.
///
/// # Errors
/// When `dir` is no journal or cannot be read, or has a segment of a later version.
pub fn read_foreign(dir: &Path, disk: Arc<dyn Disk>) -> Result<Foreign, OpenError> {
    // A relative path like `.` has the name only once it is resolved.
    let named = if dir.file_name().is_some() {
        Ok(dir.to_owned())
    } else {
        dir.canonicalize()
    };
    let (role, id) = identity_of(&named.doing("find", dir)?)?;
    let chains = recovery::load(&*disk, dir, id, Tear::Leave)?;
    let records = Records::new(disk, chains.into_iter(), 0, Seq::MAX);
    Ok(Foreign { role, id, records })
}
