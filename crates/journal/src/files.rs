//! The segment files of a journal that is ours: where the next bytes go, what is unlinked when.
//!
//! Every call blocks. Must not hold anything that `append` waits for.

use crate::append::{Batch, Staged};
use crate::disk::{Disk, DiskFile, is_no_space, write_all_at};
use crate::format::{self, Class, HEADER_BYTES, Header, RecordKind};
use crate::recovery::Chains;
use crate::segment::{Segment, SegmentReader, Step};
use model::{JournalId, Seq};
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) disk: Arc<dyn Disk>,
    dir: PathBuf,
    id: JournalId,
    max_bytes: u64,
    segment_bytes: u64,
    chains: [Chain; 3],
    /// Of all segments.
    bytes: u64,
    unsynced: Unsynced,
    shipped: Seq,
}

#[derive(Debug, Default)]
struct Chain {
    /// Oldest first; only the newest is written to.
    segments: VecDeque<Segment>,
    /// The newest segment's file, opened when first needed.
    file: Option<Arc<dyn DiskFile>>,
    /// `file` is in [`Files::unsynced`].
    dirty: bool,
    /// A new segment for whose header there was no room.
    unfinished: Option<(Segment, Arc<dyn DiskFile>)>,
}

/// What a sync must make durable.
#[derive(Debug, Default)]
pub(crate) struct Unsynced {
    pub(crate) files: Vec<Arc<dyn DiskFile>>,
    /// Segments begun since the last sync: their classes and first numbers.
    pub(crate) begun: Vec<(Class, Seq)>,
}

/// What became of the batch of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Written,
    /// There is no room on the disk; to be offered again.
    Waits,
    /// Dropped, as the journal is full of what is worth more.
    Shed,
}

/// What was dropped while writing: the kind and how many unshipped records.
pub(crate) type Shed = Vec<(RecordKind, u64)>;

impl Files {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        id: JournalId,
        (max_bytes, segment_bytes): (u64, u64),
        mut chains: Chains,
    ) -> Self {
        let bytes = chains.iter().flatten().map(|segment| segment.len).sum();
        chains
            .iter_mut()
            .flatten()
            .for_each(|segment| segment.durable = true);
        let chains = chains.map(|segments| Chain {
            segments,
            ..Chain::default()
        });
        let unsynced = Unsynced::default();
        Self {
            disk,
            dir,
            id,
            max_bytes,
            segment_bytes,
            chains,
            bytes,
            unsynced,
            shipped: 0,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// Bytes of the segments that hold unshipped records which may not be dropped.
    pub(crate) fn kept_bytes(&self) -> u64 {
        let keep = &self.chains[Class::Keep.index()].segments;
        let newest = keep.back().map_or(0, |segment| segment.first_seq);
        let counts = |s: &&Segment| s.last_seq > self.shipped || s.first_seq == newest;
        keep.iter().filter(counts).map(|segment| segment.len).sum()
    }

    /// How many records are not shipped. Of the one segment in each chain that `shipped` lies in,
    /// it is their share by number: exact where no number is missing, and never zero.
    pub(crate) fn pending(&self) -> u64 {
        let segments = self.chains.iter().flat_map(|chain| &chain.segments);
        let unshipped =
            segments.filter(|segment| segment.records > 0 && segment.last_seq > self.shipped);
        unshipped
            .map(|segment| {
                let span = segment.last_seq - (segment.first_seq - 1);
                let left = segment.last_seq - self.shipped.max(segment.first_seq - 1);
                let share = u128::from(segment.records) * u128::from(left);
                let share = share.div_ceil(u128::from(span));
                u64::try_from(share).unwrap_or(segment.records)
            })
            .sum()
    }

    /// The segments with records after `after`, by class.
    pub(crate) fn snapshot(&self, after: Seq) -> Vec<VecDeque<Segment>> {
        let since = |chain: &Chain| {
            chain
                .segments
                .iter()
                .filter(|segment| segment.last_seq > after)
                .cloned()
                .collect()
        };
        self.chains.iter().map(since).collect()
    }

    /// The first record that is still here, whether shipped or not.
    pub(crate) fn oldest(&self) -> Option<Seq> {
        let segments = self.chains.iter().flat_map(|chain| &chain.segments);
        segments
            .filter(|segment| segment.records > 0)
            .map(|segment| segment.first_seq)
            .min()
    }

    /// Writes one batch per class; `synced` goes into the header of a new segment.
    ///
    /// # Errors
    /// Only such after which nothing may be believed any more.
    pub(crate) fn write(
        &mut self,
        batches: &[Batch; 3],
        synced: Seq,
        shed: &mut Shed,
    ) -> io::Result<[Fate; 3]> {
        let mut fates = [Fate::Written; 3];
        for class in Class::ALL {
            let batch = &batches[class.index()];
            if !batch.is_empty() {
                fates[class.index()] = self.write_batch(class, batch, synced, shed)?;
            }
        }
        Ok(fates)
    }

    fn write_batch(
        &mut self,
        class: Class,
        batch: &Batch,
        synced: Seq,
        shed: &mut Shed,
    ) -> io::Result<Fate> {
        let Some(first) = batch.records.first() else {
            return Ok(Fate::Written);
        };
        let need = (batch.bytes.len() + HEADER_BYTES) as u64;
        while self.bytes + need > self.max_bytes && self.shed_one(class, synced, shed)? {}
        // What may not be dropped was held below the bound when it was appended.
        if self.bytes + need > self.max_bytes && class != Class::Keep {
            shed.push((first.kind, batch.records.len() as u64));
            return Ok(Fate::Shed);
        }
        loop {
            match self.write_records(class, &batch.bytes, &batch.records, synced) {
                Ok(()) => return Ok(Fate::Written),
                Err(error) if is_no_space(&error) => {
                    if !self.shed_one(class, synced, shed)? {
                        return Ok(Fate::Waits);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One `write`, to the newest segment or to a new one.
    fn write_records(
        &mut self,
        class: Class,
        bytes: &[u8],
        records: &[Staged],
        synced: Seq,
    ) -> io::Result<()> {
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            return Ok(());
        };
        let newest = self.chains[class.index()].segments.back();
        let fits = newest.is_some_and(|segment| {
            segment.records == 0 || segment.len + bytes.len() as u64 <= self.segment_bytes
        });
        if !fits {
            self.begin_segment(class, first.seq, synced)?;
        }
        let file = self.newest_file(class)?;
        let chain = &mut self.chains[class.index()];
        let Some(segment) = chain.segments.back_mut() else {
            return Ok(());
        };
        if let Err(error) = write_all_at(&*file, bytes, segment.len) {
            if is_no_space(&error) {
                // The next try overwrites the part that fitted, and recovery would cut it. But no
                // part of it may be taken for a record while the file is as it is now.
                file.set_size(segment.len)?;
            }
            return Err(error);
        }
        segment.len += bytes.len() as u64;
        segment.records += records.len() as u64;
        segment.last_seq = last.seq;
        self.bytes += bytes.len() as u64;
        if !chain.dirty {
            chain.dirty = true;
            self.unsynced.files.push(file);
        }
        Ok(())
    }

    fn newest_file(&mut self, class: Class) -> io::Result<Arc<dyn DiskFile>> {
        let chain = &mut self.chains[class.index()];
        if let (None, Some(segment)) = (&chain.file, chain.segments.back()) {
            chain.file = Some(self.disk.open(&segment.path, true)?);
        }
        chain
            .file
            .clone()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn begin_segment(&mut self, class: Class, first_seq: Seq, synced: Seq) -> io::Result<()> {
        let chain = &mut self.chains[class.index()];
        let (segment, file) = match chain.unfinished.take() {
            Some(unfinished) => unfinished,
            None => {
                let path = self.dir.join(format::file_name(class, first_seq));
                let file = self.disk.create(&path)?;
                (Segment::empty(path, class, first_seq), file)
            }
        };
        let header = Header {
            class,
            journal: self.id,
            first_seq: segment.first_seq,
            synced,
        };
        if let Err(error) = write_all_at(&*file, &header.encode(), 0) {
            if is_no_space(&error) {
                chain.unfinished = Some((segment, file));
            }
            return Err(error);
        }
        self.bytes += segment.len;
        let first_seq = segment.first_seq;
        chain.segments.push_back(segment);
        chain.file = Some(Arc::clone(&file));
        chain.dirty = true;
        self.unsynced.files.push(file);
        self.unsynced.begun.push((class, first_seq));
        Ok(())
    }

    /// Takes the list of what the next sync must make durable.
    pub(crate) fn take_unsynced(&mut self) -> Unsynced {
        for chain in &mut self.chains {
            chain.dirty = false;
        }
        std::mem::take(&mut self.unsynced)
    }

    /// Notes that a sync has succeeded.
    pub(crate) fn synced(&mut self, done: &Unsynced) {
        for &(class, first_seq) in &done.begun {
            let segments = &mut self.chains[class.index()].segments;
            let begun = segments
                .iter_mut()
                .rev()
                .find(|segment| segment.first_seq == first_seq);
            if let Some(segment) = begun {
                segment.durable = true;
            }
        }
    }

    /// Makes room for a record of `class` by dropping the oldest segment of what is worth least;
    /// false when there is nothing left to drop.
    fn shed_one(&mut self, class: Class, synced: Seq, shed: &mut Shed) -> io::Result<bool> {
        for victim in [Class::Keep, Class::Click, Class::Open] {
            if self.oldest_is_trimmable(victim, self.shipped) {
                self.unlink_oldest(victim)?;
                return Ok(true);
            }
        }
        let droppable = [
            (Class::Open, RecordKind::Open),
            (Class::Click, RecordKind::Click),
        ];
        for (victim, kind) in droppable {
            // Nothing is dropped for the sake of what is worth less.
            if victim < class || !self.make_droppable(victim, synced)? {
                continue;
            }
            let Some(segment) = self.chains[victim.index()].segments.front() else {
                continue;
            };
            let count = self.count_unshipped(segment)?;
            self.unlink_oldest(victim)?;
            if count > 0 {
                shed.push((kind, count));
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// Has the oldest segment of a chain ready to be unlinked, if there is one with records. A
    /// later one must be on disk before, as it says which numbers were used.
    fn make_droppable(&mut self, class: Class, synced: Seq) -> io::Result<bool> {
        let segments = &self.chains[class.index()].segments;
        if let (1, Some(only)) = (segments.len(), segments.back()) {
            if only.records == 0 {
                return Ok(false);
            }
            match self.begin_segment(class, only.last_seq + 1, synced) {
                Ok(()) => {}
                Err(error) if is_no_space(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let Some(next) = self.chains[class.index()].segments.get_mut(1) else {
            return Ok(false);
        };
        if !next.durable {
            // Rare, as syncs follow writes closely: only here a write waits for the disk.
            self.disk.open(&next.path, true)?.sync_data()?;
            self.disk.sync_dir(&self.dir)?;
            next.durable = true;
        }
        Ok(true)
    }

    fn count_unshipped(&self, segment: &Segment) -> io::Result<u64> {
        if segment.last_seq <= self.shipped {
            return Ok(0);
        }
        if segment.first_seq > self.shipped {
            return Ok(segment.records);
        }
        let file = self.disk.open(&segment.path, false)?;
        let mut reader = SegmentReader::new(file, segment.class, segment.first_seq, segment.len);
        let mut count = 0;
        while let Step::Record { seq, .. } = reader.step()? {
            count += u64::from(seq > self.shipped);
        }
        Ok(count)
    }

    pub(crate) fn shipped(&self) -> Seq {
        self.shipped
    }

    pub(crate) fn set_shipped(&mut self, seq: Seq) {
        self.shipped = seq;
    }

    /// Unlinks the segments all of whose records are at most `through`.
    pub(crate) fn trim(&mut self, through: Seq) -> io::Result<()> {
        for class in Class::ALL {
            while self.oldest_is_trimmable(class, through) {
                self.unlink_oldest(class)?;
            }
        }
        Ok(())
    }

    /// Whether the oldest segment of a chain has only records through `through`, and a later one is
    /// on disk to say which numbers were used.
    fn oldest_is_trimmable(&self, class: Class, through: Seq) -> bool {
        let segments = &self.chains[class.index()].segments;
        segments
            .front()
            .is_some_and(|oldest| oldest.last_seq <= through)
            && segments.get(1).is_some_and(|next| next.durable)
    }

    fn unlink_oldest(&mut self, class: Class) -> io::Result<()> {
        let chain = &mut self.chains[class.index()];
        let Some(segment) = chain.segments.front() else {
            return Ok(());
        };
        if segment.damaged {
            self.disk
                .rename(&segment.path, &segment.path.with_extension("damaged"))?;
        } else {
            self.disk.remove(&segment.path)?;
        }
        self.bytes -= segment.len;
        chain.segments.pop_front();
        Ok(())
    }
}
