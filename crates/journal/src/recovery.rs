//! Taking up what an earlier process left: which segments there are, where each of them ends, and
//! making all of it durable before anything is believed.
//!
//! A torn tail of a chain's last segment is what a crash leaves; it is cut. Bad bytes before that
//! (a damaged disk, or a power cut just after a new segment was begun) are reported, and reading
//! goes on with the next segment. Every step may be repeated when it was interrupted.

use crate::config::{Doing as _, OpenError};
use crate::disk::{Disk, DiskFile, read_full_at, write_all_at};
use crate::format::{self, Class, HEADER_BYTES, Header, HeaderError};
use crate::segment::{Segment, SegmentReader, Step};
use model::{JournalId, Seq};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The segments of each class, oldest first.
pub(crate) type Chains = [VecDeque<Segment>; 3];

/// What to do about bad bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tear {
    /// Cut torn tails, put unreadable segments aside, rewrite and sync: the journal is ours.
    Cut,
    /// Change nothing: the journal is another's.
    Leave,
}

/// Finds the segments in `dir` and where each ends.
pub(crate) fn load(
    disk: &dyn Disk,
    dir: &Path,
    id: JournalId,
    tear: Tear,
) -> Result<Chains, OpenError> {
    let mut names: Vec<(Class, Seq)> = disk
        .list(dir)
        .doing("list", dir)?
        .iter()
        .filter_map(|name| format::parse_file_name(name))
        .collect();
    names.sort_unstable();
    let mut chains = Chains::default();
    let mut loader = Loader {
        disk,
        dir,
        id,
        tear,
        synced: 0,
        files: Vec::new(),
    };
    for (at, &(class, first_seq)) in names.iter().enumerate() {
        let last = names.get(at + 1).is_none_or(|next| next.0 != class);
        chains[class.index()].extend(loader.segment(class, first_seq, last)?);
    }
    if tear == Tear::Cut {
        loader.make_durable(&chains)?;
    }
    Ok(chains)
}

struct Loader<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    id: JournalId,
    tear: Tear,
    /// Through which record an earlier process knew the journal to be on disk.
    synced: Seq,
    files: Vec<(PathBuf, Arc<dyn DiskFile>)>,
}

impl Loader<'_> {
    fn segment(
        &mut self,
        class: Class,
        first_seq: Seq,
        last: bool,
    ) -> Result<Option<Segment>, OpenError> {
        let path = self.dir.join(format::file_name(class, first_seq));
        let file = self
            .disk
            .open(&path, self.tear == Tear::Cut)
            .doing("open", &path)?;
        let size = file.size().doing("measure", &path)?;
        let mut head = [0; HEADER_BYTES];
        let read = read_full_at(&*file, &mut head, 0).doing("read", &path)?;
        let expected = |header: &Header| {
            (header.class, header.journal, header.first_seq) == (class, self.id, first_seq)
        };
        match Header::decode(&head[..read]) {
            Ok(header) if expected(&header) => self.synced = self.synced.max(header.synced),
            Err(HeaderError::Version(version)) => return Err(OpenError::Version { path, version }),
            Ok(_) | Err(HeaderError::Damaged) => {
                return self.without_header(path, class, first_seq, last, size);
            }
        }
        let mut segment = Segment::empty(path, class, first_seq);
        scan(&mut segment, &file, size, last)?;
        if self.tear == Tear::Cut && last && segment.len < size {
            file.set_size(segment.len)
                .doing("cut the torn tail of", &segment.path)?;
        }
        self.files.push((segment.path.clone(), file));
        Ok(Some(segment))
    }

    /// Deals with a file whose name is a segment's and whose header is not. The last one of a
    /// chain is made anew: its name says which numbers may have been used.
    fn without_header(
        &mut self,
        path: PathBuf,
        class: Class,
        first_seq: Seq,
        last: bool,
        size: u64,
    ) -> Result<Option<Segment>, OpenError> {
        // A shorter file is what remains of one that was just being made.
        let unfinished = last && size <= HEADER_BYTES as u64;
        if !unfinished {
            tracing::error!(path = %path.display(), size, "journal segment has no readable header");
        }
        if self.tear == Tear::Leave {
            return Ok(None);
        }
        if !unfinished {
            let aside = path.with_extension("damaged");
            self.disk.rename(&path, &aside).doing("put aside", &path)?;
        }
        if !last {
            return Ok(None);
        }
        let file = if unfinished {
            self.disk.open(&path, true).doing("open", &path)?
        } else {
            self.disk.create(&path).doing("make", &path)?
        };
        let header = Header {
            class,
            journal: self.id,
            first_seq,
            synced: 0,
        };
        write_all_at(&*file, &header.encode(), 0).doing("write", &path)?;
        self.files.push((path.clone(), file));
        Ok(Some(Segment::empty(path, class, first_seq)))
    }

    /// Makes sure of everything that is not known to be on disk.
    ///
    /// What the last process wrote may sit in the page cache marked clean because a sync of it
    /// failed, and would be gone after a power cut. Writing the same bytes in their place makes
    /// the pages dirty, so that the sync is a real one.
    fn make_durable(&mut self, chains: &Chains) -> Result<(), OpenError> {
        for (path, file) in &self.files {
            let segment = chains
                .iter()
                .flatten()
                .find(|segment| &segment.path == path);
            if let Some(segment) = segment.filter(|s| s.last_seq > self.synced || s.records == 0) {
                rewrite(&**file, segment.len).doing("rewrite", path)?;
            }
            file.sync_data().doing("sync", path)?;
        }
        self.disk.sync_dir(self.dir).doing("sync", self.dir)
    }
}

/// Counts the records of a segment and finds its end.
fn scan(
    segment: &mut Segment,
    file: &Arc<dyn DiskFile>,
    size: u64,
    last: bool,
) -> Result<(), OpenError> {
    let mut reader = SegmentReader::new(Arc::clone(file), segment.class, segment.first_seq, size);
    loop {
        match reader.step().doing("read", &segment.path)? {
            Step::Record { seq, .. } => {
                segment.records += 1;
                segment.last_seq = seq;
            }
            Step::End => break,
            Step::Damaged => {
                segment.damaged = !last;
                break;
            }
        }
    }
    segment.len = reader.offset();
    let lost = size - segment.len;
    let path = segment.path.display();
    if segment.damaged {
        tracing::error!(%path, lost, "journal segment is damaged, going on after it");
        segment.len = size;
    } else if lost > 0 {
        tracing::warn!(%path, lost, "cutting the torn tail of a journal segment");
    }
    Ok(())
}

fn rewrite(file: &dyn DiskFile, len: u64) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let mut at = 0;
    while at < len {
        let want = usize::try_from(len - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let read = read_full_at(file, &mut buffer[..want], at)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        write_all_at(file, &buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}
