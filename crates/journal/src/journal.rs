//! The journal as its users hold it.

use crate::append::{Batch, Buffer, Refusal};
use crate::claim::claim;
use crate::config::{Doing as _, JournalConfig, OpenError};
use crate::disk::{Disk, DiskLock};
use crate::files::{Fate, Files, Shed};
use crate::format::{Class, FRAME_BYTES, MAX_RECORD_BYTES, RecordKind};
use crate::lock;
use crate::records::{Pending, Records};
use crate::recovery::{self, Tear};
use crate::ship::ShipLog;
use crate::sync::{Pacer, Syncer};
use crate::tail::Tail;
use model::{JournalId, Seq};
use std::future::poll_fn;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::task::Poll;
use std::time::Instant;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Notify, watch};

/// The most payload that one [`Journal::read_pending`] gives, in bytes, give or take a record.
const READ_PENDING_BYTES: usize = 4 << 20;

/// What a record is taken to need when nothing is known of it.
const USUAL_RECORD_BYTES: usize = 1024;

/// The journal is no longer to be believed: a write or a sync failed. Open it anew.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the journal has failed")]
pub struct Poisoned(#[source] Arc<io::Error>);

/// Why a record was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// No room. A click or an open was dropped and counted. For the other kinds: stop beginning
    /// what would need recording; see [`Journal::has_room`].
    #[error("the journal is full")]
    Full,
    /// Larger than [`MAX_RECORD_BYTES`].
    #[error("a record is at most {MAX_RECORD_BYTES} bytes")]
    TooLarge,
    /// Nothing is taken any more.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
}

/// Why something appended is not written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    /// The disk is full. What was appended is kept in memory and tried again by every later write
    /// and by the sync thread; no new [`RecordKind::Start`] is taken until one succeeds.
    #[error("no room on the journal's disk")]
    NoSpace,
    /// Nothing is written any more.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
}

/// A journal of this process. Cheap to clone; the last clone syncs and frees the directory.
#[derive(Debug, Clone)]
pub struct Journal {
    shared: Arc<Shared>,
    _syncer: Arc<Syncer>,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    synced: Seq,
    failed: bool,
}

/// Locks are taken in the order `syncing`, `writing`, `reader`, `files`, `buffer`, `tail`; only
/// `buffer` is ever waited for by `append`, and no system call is made under it.
#[derive(Debug)]
pub(crate) struct Shared {
    id: JournalId,
    rebooted: bool,
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    buffer: Mutex<Buffer>,
    /// Has what was written before [`Self::written`] says so.
    tail: Mutex<Tail>,
    /// Held by the one who writes; tasks do not sleep for it, they wait for `write_ended`.
    writing: Mutex<()>,
    write_ended: Notify,
    files: Mutex<Files>,
    ship_log: Mutex<ShipLog>,
    syncing: Mutex<()>,
    /// Where the last read from disk ended, as the next one mostly goes on there.
    reader: Mutex<Option<Records>>,
    /// [`Buffer::written_through`], set under `files`.
    written: AtomicU64,
    progress: watch::Sender<Progress>,
    failed: OnceLock<Poisoned>,
    pub(crate) pacer: Pacer,
    _lock: Box<dyn DiskLock>,
}

impl Journal {
    /// Takes the first journal of the role in `config.dir` that no process holds, or makes one;
    /// recovers it and makes what it holds durable. Blocks.
    ///
    /// The store's mark for this journal is given to [`Self::resume`] later.
    ///
    /// # Errors
    /// When the directory cannot be taken, read or written. Nothing is lost by trying again.
    pub fn open(config: &JournalConfig, disk: Arc<dyn Disk>) -> Result<Self, OpenError> {
        let claim = claim(config, &*disk)?;
        let chains = recovery::load(&*disk, &claim.dir, claim.id, Tear::Cut)?;
        let segments = || chains.iter().flatten();
        let last = segments()
            .map(|segment| segment.last_seq)
            .max()
            .unwrap_or(0);
        let mut buffer = Buffer::new(last + 1, config.max_bytes());
        let bounds = (config.max_bytes(), config.segment_bytes());
        let files = Files::new(
            Arc::clone(&disk),
            claim.dir.clone(),
            claim.id,
            bounds,
            chains,
        );
        buffer.kept_bytes = files.kept_bytes();
        buffer.disk_bytes = files.bytes();
        let shared = Arc::new(Shared {
            id: claim.id,
            rebooted: claim.rebooted,
            dir: claim.dir,
            disk,
            buffer: Mutex::new(buffer),
            tail: Mutex::new(Tail::new(last + 1, config.tail_bytes)),
            writing: Mutex::new(()),
            write_ended: Notify::new(),
            files: Mutex::new(files),
            ship_log: Mutex::new(ShipLog::new(config.retain)),
            syncing: Mutex::new(()),
            reader: Mutex::new(None),
            written: AtomicU64::new(last),
            progress: watch::Sender::new(Progress {
                synced: last,
                failed: false,
            }),
            failed: OnceLock::new(),
            pacer: Pacer::new(config.sync_interval),
            _lock: claim.lock,
        });
        let syncer = Syncer::start(&shared).doing("start the sync thread for", &shared.dir)?;
        Ok(Self {
            shared,
            _syncer: Arc::new(syncer),
        })
    }

    /// The identity of this node.
    pub fn id(&self) -> JournalId {
        self.shared.id
    }

    /// Whether the machine was started anew since a process last had this journal: what was written
    /// and not synced then is gone.
    pub fn rebooted(&self) -> bool {
        self.shared.rebooted
    }

    /// The directory of the segments.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Takes a record and gives it its number. Costs a lock and a copy, no system call (but for
    /// waking the sync thread once per sync). Nothing is promised about the record until
    /// [`Self::written`] or [`Self::synced`].
    ///
    /// # Errors
    /// [`AppendError::Full`]: a start is refused first, an outcome or an unsubscribe only when the
    /// reserve for what was begun is used up too. A click or open so refused is counted as dropped.
    pub fn append(&self, kind: RecordKind, record: &[u8]) -> Result<Seq, AppendError> {
        self.shared.check()?;
        let seq =
            lock(&self.shared.buffer)
                .append(kind, record)
                .map_err(|refusal| match refusal {
                    Refusal::Full => AppendError::Full,
                    Refusal::TooLarge => AppendError::TooLarge,
                })?;
        self.shared.pacer.appended();
        Ok(seq)
    }

    /// Whether the journal still takes a start and the records that will follow it. To be asked
    /// before new work is fetched.
    pub fn has_room(&self) -> bool {
        let room = FRAME_BYTES + USUAL_RECORD_BYTES;
        self.shared.failed.get().is_none()
            && lock(&self.shared.buffer).has_room(RecordKind::Start, room)
    }

    /// Hands everything appended so far to the operating system, with one write per chain in use.
    /// Blocks for as long as copying into the page cache takes.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn write(&self) -> Result<(), WriteError> {
        self.shared.write()
    }

    /// Every record through this one is written (or was shed).
    pub fn written_through(&self) -> Seq {
        self.shared.written.load(Ordering::Acquire)
    }

    /// Every record through this one is on disk (or was shed).
    pub fn synced_through(&self) -> Seq {
        self.shared.progress.borrow().synced
    }

    /// Returns when the record `seq` is written. Steps behind the others first, so that one write
    /// serves all of this thread that are ready now. While another thread writes, this one goes on with
    /// other work: the system may have put that one aside in the middle of its write, for as long as a
    /// disk or another program takes. Cancel-safe.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn written(&self, seq: Seq) -> Result<(), WriteError> {
        if self.written_through() < seq {
            behind_the_others().await;
        }
        loop {
            if let Some(settled) = self.try_write_through(seq) {
                return settled;
            }
            let ended = self.shared.write_ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            // It may have ended before anybody waited for it.
            if let Some(settled) = self.try_write_through(seq) {
                return settled;
            }
            ended.await;
        }
    }

    /// How it stands with the record once it is written, if need be by a write that ends before this
    /// returns; `None` while another thread writes.
    fn try_write_through(&self, seq: Seq) -> Option<Result<(), WriteError>> {
        if let Err(poisoned) = self.shared.check() {
            return Some(Err(poisoned.into()));
        }
        if self.written_through() >= seq {
            return Some(Ok(()));
        }
        let result = self.shared.try_write()?;
        // Another chain may be the one without room.
        Some(if self.written_through() >= seq {
            self.shared.check().map_err(WriteError::from)
        } else {
            result
        })
    }

    /// Writes and syncs everything appended so far. Blocks for as long as the disk takes; for the
    /// end of a process and for tests.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn sync(&self) -> Result<(), WriteError> {
        self.shared.sync()
    }

    /// Returns when the record `seq` is on disk; asks for a sync at once, which serves all who
    /// wait. Cancel-safe.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn synced(&self, seq: Seq) -> Result<(), WriteError> {
        self.written(seq).await?;
        // A click or an open may have been dropped instead; for that there is nothing to wait.
        let seq = seq.min(self.written_through());
        if self.synced_through() < seq {
            self.shared.pacer.urge();
        }
        Ok(self.wait_synced(seq).await?)
    }

    /// Returns when there is something synced after the record `after`, for the task that ships.
    /// Asks for no sync. Cancel-safe.
    ///
    /// # Errors
    /// When the journal has failed and there is nothing more to ship.
    pub async fn readable(&self, after: Seq) -> Result<(), Poisoned> {
        self.wait_synced(after.saturating_add(1)).await
    }

    async fn wait_synced(&self, seq: Seq) -> Result<(), Poisoned> {
        let mut progress = self.shared.progress.subscribe();
        // The sender lives as long as `self`, so waiting cannot end without a value.
        let reached = progress
            .wait_for(|now| now.synced >= seq || now.failed)
            .await;
        if reached.is_ok_and(|now| now.synced >= seq) {
            Ok(())
        } else {
            self.shared.check()
        }
    }

    /// Up to `max_records` synced records after `after`, in order; from memory if they are among
    /// the newest, else from disk, for which [`Self::pending`] goes to another thread.
    ///
    /// # Errors
    /// As the disk gives them; nothing was passed over.
    pub fn read_pending(&self, after: Seq, max_records: usize) -> io::Result<Pending> {
        match self.read_tail(after, max_records) {
            Some(pending) => Ok(pending),
            None => self.shared.read_disk(after, max_records),
        }
    }

    /// Like [`Self::read_pending`], without blocking. Cancel-safe.
    ///
    /// # Errors
    /// As the disk gives them; nothing was passed over.
    pub async fn pending(&self, after: Seq, max_records: usize) -> io::Result<Pending> {
        if let Some(pending) = self.read_tail(after, max_records) {
            return Ok(pending);
        }
        // Where there is only one thread another would not spare anybody the wait, and would make
        // the order of events uncertain: simulations have one.
        if Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
            return self.shared.read_disk(after, max_records);
        }
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.read_disk(after, max_records))
            .await
            .map_err(io::Error::other)?
    }

    fn read_tail(&self, after: Seq, max_records: usize) -> Option<Pending> {
        let synced = self.synced_through();
        lock(&self.shared.tail).read(after, synced, max_records, READ_PENDING_BYTES)
    }

    /// Everything after `after` that is on disk now, for a start after a crash. Blocks while
    /// iterating.
    pub fn replay(&self, after: Seq) -> Records {
        self.shared.records(after)
    }

    /// The oldest record still here, whether shipped or not, or a number before it.
    pub fn oldest(&self) -> Seq {
        let oldest = lock(&self.shared.files).oldest();
        oldest.unwrap_or_else(|| lock(&self.shared.buffer).next_seq)
    }

    /// Records after `mark` that are no longer here: what a store that has only those through `mark`
    /// has lost for good.
    pub fn missing_after(&self, mark: Seq) -> u64 {
        self.oldest().saturating_sub(mark.saturating_add(1))
    }

    /// Everything through `seq` is in the store: whole segments of such records are unlinked once
    /// that is `retain` ago. To be called from time to time even if nothing new was shipped.
    pub fn shipped(&self, seq: Seq, now: Instant) {
        let mut files = lock(&self.shared.files);
        let newest = lock(&self.shared.buffer).next_seq - 1;
        let through = seq.min(newest).max(files.shipped());
        files.set_shipped(through);
        lock(&self.shared.tail).drop_through(through);
        let due = lock(&self.shared.ship_log).shipped(seq, now);
        if let Err(error) = files.trim(due) {
            tracing::error!(%error, dir = %files.dir().display(), "cannot remove a shipped journal segment");
        }
        self.shared.measure(&files);
    }

    /// Takes the store's high-water mark for this journal after a start. Unlike [`Self::shipped`]
    /// it may lie beyond the newest record, when the directory is an old copy: the next record
    /// gets a number that the store has not seen. To be called before the first append where the
    /// store can be asked; without it, what an old copy appends may pass for known.
    pub fn resume(&self, mark: Seq, now: Instant) {
        {
            let files = lock(&self.shared.files);
            let mut buffer = lock(&self.shared.buffer);
            if mark >= buffer.next_seq {
                tracing::warn!(
                    mark,
                    newest = buffer.next_seq - 1,
                    "store knows more of this journal than is here"
                );
                buffer.next_seq = mark + 1;
                buffer.last_written = mark;
                self.shared
                    .written
                    .store(buffer.written_through(), Ordering::Release);
            }
            drop(files);
        }
        self.shipped(mark, now);
    }

    /// The store has forgotten what came after `seq`: it counts as not shipped again, as far as it
    /// is still here (see [`Self::oldest`]).
    pub fn rewind(&self, seq: Seq) {
        let mut files = lock(&self.shared.files);
        if seq < files.shipped() {
            files.set_shipped(seq);
            lock(&self.shared.ship_log).rewind(seq);
        }
        self.shared.measure(&files);
    }

    /// Records of this kind that were dropped for want of room since the start of the process.
    pub fn dropped(&self, kind: RecordKind) -> u64 {
        lock(&self.shared.buffer).dropped(kind)
    }

    /// Records not yet shipped; an estimate within a segment where classes are mixed or records
    /// were dropped.
    pub fn pending_records(&self) -> u64 {
        let files = lock(&self.shared.files);
        files.pending() + lock(&self.shared.buffer).waiting()
    }

    /// Bytes of the segment files and of what waits to be written.
    pub fn bytes(&self) -> u64 {
        let buffer = lock(&self.shared.buffer);
        buffer.disk_bytes + buffer.buffered() as u64
    }
}

/// Lets those tasks go first that are ready now. Unlike [`tokio::task::yield_now`] not those, too, for
/// whom the system has something by then: a write would wait for them, and all whose records it takes.
async fn behind_the_others() {
    let mut stepped_back = false;
    poll_fn(|context| {
        if stepped_back {
            return Poll::Ready(());
        }
        stepped_back = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Shared {
    fn check(&self) -> Result<(), Poisoned> {
        self.failed
            .get()
            .map_or(Ok(()), |poisoned| Err(poisoned.clone()))
    }

    fn poison(&self, error: io::Error) -> Poisoned {
        tracing::error!(%error, dir = %self.dir.display(), "journal has failed, nothing is taken until a restart");
        let poisoned = self
            .failed
            .get_or_init(|| Poisoned(Arc::new(error)))
            .clone();
        self.progress.send_modify(|progress| progress.failed = true);
        poisoned
    }

    /// Writes what waits, after whoever writes now.
    fn write(&self) -> Result<(), WriteError> {
        let writing = lock(&self.writing);
        let result = self.write_alone();
        drop(writing);
        self.write_ended.notify_waiters();
        result
    }

    /// Writes what waits; `None` when another thread does.
    fn try_write(&self) -> Option<Result<(), WriteError>> {
        let writing = match self.writing.try_lock() {
            Ok(writing) => writing,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let result = self.write_alone();
        drop(writing);
        self.write_ended.notify_waiters();
        Some(result)
    }

    /// Writes what waits. Its caller holds `writing`.
    fn write_alone(&self) -> Result<(), WriteError> {
        let mut files = lock(&self.files);
        self.check()?;
        let batches = {
            let mut buffer = lock(&self.buffer);
            if buffer.batches.iter().all(Batch::is_empty) {
                return Ok(());
            }
            buffer.batches.each_mut().map(Batch::take)
        };
        let synced = self.progress.borrow().synced;
        let mut shed = Shed::new();
        match files.write(&batches, synced, &mut shed) {
            Ok(fates) => self.settle(&files, batches, fates, shed),
            Err(error) => Err(self.poison(error).into()),
        }
    }

    /// Accounts for a write.
    fn settle(
        &self,
        files: &Files,
        mut batches: [Batch; 3],
        fates: [Fate; 3],
        shed: Shed,
    ) -> Result<(), WriteError> {
        self.keep_in_memory(&mut batches, fates);
        let mut buffer = lock(&self.buffer);
        for ((class, batch), fate) in Class::ALL.into_iter().zip(batches).zip(fates) {
            match fate {
                Fate::Written => {
                    let last = batch.records.last().map_or(0, |record| record.seq);
                    buffer.last_written = buffer.last_written.max(last);
                }
                Fate::Waits => {
                    buffer.batches[class.index()].put_back(batch);
                    continue;
                }
                Fate::Shed => {}
            }
            buffer.batches[class.index()].reuse(batch);
        }
        for (kind, count) in shed {
            tracing::warn!(%kind, count, "journal is full, dropped records");
            buffer.count_dropped(kind, count);
        }
        buffer.no_space = fates.contains(&Fate::Waits);
        self.written
            .store(buffer.written_through(), Ordering::Release);
        let no_space = buffer.no_space;
        drop(buffer);
        self.measure(files);
        if no_space {
            Err(WriteError::NoSpace)
        } else {
            Ok(())
        }
    }

    /// Takes what was written into the tail: not under the lock that `append` waits for.
    fn keep_in_memory(&self, batches: &mut [Batch; 3], fates: [Fate; 3]) {
        let written = batches.iter_mut().zip(fates);
        let written = written.filter(|(_, fate)| *fate == Fate::Written);
        let mut records: Vec<_> = written.flat_map(|(batch, _)| batch.records()).collect();
        // Each chain is in order; most often there is one.
        if !records.is_sorted_by_key(|record| record.seq) {
            records.sort_unstable_by_key(|record| record.seq);
        }
        lock(&self.tail).extend(records.into_iter());
    }

    fn measure(&self, files: &Files) {
        let (kept, bytes) = (files.kept_bytes(), files.bytes());
        let mut buffer = lock(&self.buffer);
        (buffer.kept_bytes, buffer.disk_bytes) = (kept, bytes);
    }

    pub(crate) fn sync(&self) -> Result<(), WriteError> {
        let _one = lock(&self.syncing);
        let result = self.write();
        // Without room for the newest, what did find room is made durable all the same.
        self.check()?;
        let (unsynced, through) = {
            let mut files = lock(&self.files);
            (files.take_unsynced(), self.written.load(Ordering::Acquire))
        };
        for file in &unsynced.files {
            file.sync_data().map_err(|error| self.poison(error))?;
        }
        if !unsynced.begun.is_empty() {
            self.disk
                .sync_dir(&self.dir)
                .map_err(|error| self.poison(error))?;
        }
        lock(&self.files).synced(&unsynced);
        // A write that failed meanwhile does not undo this sync, but nobody is to build on it.
        self.check()?;
        self.progress.send_if_modified(|progress| {
            let further = progress.synced < through;
            progress.synced = progress.synced.max(through);
            further
        });
        result
    }

    fn records(&self, after: Seq) -> Records {
        let files = lock(&self.files);
        let through = self.progress.borrow().synced;
        let chains = files.snapshot(after);
        Records::new(Arc::clone(&self.disk), chains.into_iter(), after, through)
    }

    fn read_disk(&self, after: Seq, max_records: usize) -> io::Result<Pending> {
        let mut reader = lock(&self.reader);
        let resumed = reader.take().filter(|records| records.position() == after);
        let mut records = match resumed {
            Some(records) if !records.is_done() => records,
            _ => self.records(after),
        };
        let pending = records.take_some(max_records, READ_PENDING_BYTES)?;
        *reader = Some(records);
        Ok(pending)
    }
}
