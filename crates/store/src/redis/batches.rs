//! What changes a whole batch: release, pause, resume, cancel, archive, completion; and bringing
//! the copies in other partitions forward.
//!
//! The record in partition 0 is the truth. A change writes it first, with its event and control
//! item, then the copies; a batch whose copies may be behind is on a list that every look for work
//! goes through. Must not change a recipient but through the books.

use super::Inner;
use super::books::{Books, Needs};
use super::commit::{Commit, Outcome};
use super::hand_out::note_doubt;
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{self, BatchRecord, Holder, Range, new_version};
use crate::{Batch, BatchChange, ChangeOutcome, Control, Result, StoreError};
use ::redis::{Cmd, Pipeline};
use futures_util::future::try_join_all;
use model::{BatchId, BatchState, Counters, EventKind, Partition, Timestamp};
use serde_json::json;
use std::time::Duration;

/// Ranges cancelled in one step.
const RANGES: usize = 32;
/// For how long a range that cannot be read is left alone.
pub(super) const UNREADABLE: Duration = Duration::from_mins(10);

impl Inner {
    /// The batch as partition 0 has it; `None` when it is not committed.
    pub(super) async fn home(&self, batch: BatchId) -> Result<Option<BatchRecord>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::batch(HOME, batch));
        let found = answer::bytes(self.link.short(&get).await?);
        found.map(|bytes| BatchRecord::read(&bytes)).transpose()
    }

    /// The counters of a batch: the sum over partitions.
    pub(super) async fn counters(&self, batch: BatchId) -> Result<Counters> {
        let mut sum = Counters::default();
        let all = self.all_partitions().map(|p| async move {
            let mut get = Cmd::new();
            get.arg("HGETALL").arg(keys::counters(p, batch));
            self.link.short(&get).await
        });
        for stored in try_join_all(all).await? {
            record::add_counters(&mut sum, &answer::pairs(stored));
        }
        Ok(sum)
    }

    /// A batch as it is read.
    pub(super) async fn describe(&self, batch: BatchId, record: &BatchRecord) -> Result<Batch> {
        Ok(Batch {
            head: self.known_head(batch).await?.as_ref().clone(),
            state: record.state,
            archived: record.archived,
            started_at: record.started_at,
            completed_at: record.completed_at,
            paused_at: record.paused_at,
            paused_for: Duration::from_millis(record.paused_ms),
            counters: self.counters(batch).await?,
        })
    }

    /// The ranges of a batch.
    pub(super) async fn ranges_of(&self, p: Partition, batch: BatchId) -> Result<Vec<u64>> {
        let mut find = Cmd::new();
        find.arg("ZRANGE")
            .arg(keys::ranges(p, batch))
            .arg(0)
            .arg(-1);
        let names = answer::list(self.link.short(&find).await?);
        let id = |name| keys::read_range_name(&answer::bytes(name)?);
        Ok(names.into_iter().filter_map(id).collect())
    }

    /// Books with these ranges read.
    pub(super) async fn books_with(
        &self,
        p: Partition,
        now: Timestamp,
        ranges: &[u64],
    ) -> Result<Books<'_>> {
        let mut books = Books::open(self, p, now);
        let needs = Needs {
            ranges: ranges.iter().copied().collect(),
            ..Needs::default()
        };
        books.load(&needs).await?;
        Ok(books)
    }

    // ---- changes ------------------------------------------------------------------------

    /// Writes a batch in partition 0, with what the books have; false when it was changed
    /// meanwhile.
    pub(super) async fn write_home(
        &self,
        mut books: Books<'_>,
        batch: BatchId,
        before: &BatchRecord,
        after: &BatchRecord,
        floor: u64,
    ) -> Result<bool> {
        let name = batch.to_string().into_bytes();
        let key = keys::batch(HOME, batch);
        let releases =
            after.released && !before.released && !self.known_head(batch).await?.is_in_waves();
        let commit = &mut books.commit;
        commit.check(key.clone(), Some(before.version));
        commit.write("SET", key, [after.write(new_version())]);
        if releases {
            commit.release_counters(keys::counters(HOME, batch));
        }
        let due = |of: &BatchRecord| of.state == BatchState::Scheduled;
        if due(before) && !due(after) {
            commit.write("ZREM", keys::scheduled(HOME), [&name]);
        }
        if due(after) && !due(before) {
            let at = after.release_at.millis().to_string().into_bytes();
            commit.write("ZADD", keys::scheduled(HOME), [at, name.clone()]);
        }
        if after.completed_at.is_some() {
            commit.write("ZREM", keys::open(HOME), [&name]);
        }
        if self.partitions > 1 {
            commit.write("ZADD", keys::unsettled(HOME), [&b"0"[..], &name]);
        }
        let (commit, _) = books.close(None, floor)?;
        let done = commit.run(self, true).await? != Outcome::Conflict;
        if done {
            self.wrote();
            self.settle(batch, after).await?;
        }
        Ok(done)
    }

    /// Brings the copies of a batch forward.
    pub(super) async fn settle(&self, batch: BatchId, home: &BatchRecord) -> Result<()> {
        if self.partitions == 1 {
            return Ok(());
        }
        for p in self.all_partitions().filter(|p| *p != HOME) {
            let mut tries = self.tries();
            while tries.again().await? {
                let mut get = Cmd::new();
                get.arg("GET").arg(keys::batch(p, batch));
                let found = answer::bytes(self.link.short(&get).await?);
                let Some(copy) = found.map(|bytes| BatchRecord::read(&bytes)).transpose()? else {
                    break;
                };
                if copy.revision >= home.revision {
                    break;
                }
                let mut commit = Commit::new(p);
                let key = keys::batch(p, batch);
                commit.check(key.clone(), Some(copy.version));
                commit.write("SET", key, [home.write(new_version())]);
                let releases = home.released && !copy.released;
                if releases && !self.known_head(batch).await?.is_in_waves() {
                    commit.release_counters(keys::counters(p, batch));
                }
                if commit.run(self, false).await? != Outcome::Conflict {
                    break;
                }
            }
        }
        // Not when it was changed again meanwhile: then that change is still to be settled.
        if self.home(batch).await?.map(|now| now.revision) == Some(home.revision) {
            let mut done = Cmd::new();
            done.arg("ZREM")
                .arg(keys::unsettled(HOME))
                .arg(batch.to_string());
            self.link.short(&done).await?;
        }
        Ok(())
    }

    /// Changes a batch; a cancel goes on in short steps after the one that makes it hold.
    pub(super) async fn change(
        &self,
        batch: BatchId,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<ChangeOutcome> {
        let mut tries = self.tries();
        while tries.again().await? {
            let Some(before) = self.home(batch).await? else {
                return Ok(ChangeOutcome::Unknown);
            };
            let cancelled_before = match change {
                BatchChange::Cancel => self.counters(batch).await?.cancelled,
                _ => 0,
            };
            let ended = matches!(before.state, BatchState::Completed | BatchState::Cancelled);
            let open = before.state == BatchState::Open;
            if open {
                self.file_pending(batch, now).await?;
            }
            match change {
                BatchChange::Start if ended => {
                    return Ok(ChangeOutcome::Impossible(before.state));
                }
                BatchChange::Pause | BatchChange::PauseFor(_) | BatchChange::Resume if open => {
                    return Ok(ChangeOutcome::Impossible(before.state));
                }
                BatchChange::Cancel if before.state == BatchState::Cancelled => {}
                BatchChange::Pause
                | BatchChange::PauseFor(_)
                | BatchChange::Resume
                | BatchChange::Cancel
                    if ended =>
                {
                    return Ok(ChangeOutcome::Impossible(before.state));
                }
                _ => {
                    if !self.change_record(batch, &before, change, now).await? {
                        continue;
                    }
                }
            }
            if open && matches!(change, BatchChange::Start | BatchChange::Cancel) {
                self.forget_parts(batch).await?;
            }
            if change == BatchChange::Cancel {
                self.cancel_all(batch, now).await?;
            }
            return self.outcome(batch, change, cancelled_before).await;
        }
        Ok(ChangeOutcome::Unknown)
    }

    async fn outcome(
        &self,
        batch: BatchId,
        change: BatchChange,
        cancelled_before: u64,
    ) -> Result<ChangeOutcome> {
        let record = self.home(batch).await?;
        let record = record.ok_or_else(|| StoreError::Damaged(format!("batch {batch} is gone")))?;
        let batch = Box::new(self.describe(batch, &record).await?);
        let cancel = change == BatchChange::Cancel;
        // Counted by what became of the recipients, not by who ended them: a holder hears of the
        // cancel too, and may be faster.
        let cancelled = batch.counters.cancelled.saturating_sub(cancelled_before);
        Ok(ChangeOutcome::Done {
            cancelled: if cancel { cancelled } else { 0 },
            in_flight: if cancel { batch.counters.open() } else { 0 },
            batch,
        })
    }

    /// Writes what a change makes of a record; false when it was changed meanwhile.
    async fn change_record(
        &self,
        batch: BatchId,
        before: &BatchRecord,
        change: BatchChange,
        now: Timestamp,
    ) -> Result<bool> {
        if change == BatchChange::Start {
            return match before.state {
                BatchState::Open => self.start_open(batch, before, now).await,
                _ => Ok(true),
            };
        }
        let head = self.known_head(batch).await?;
        let mut books = Books::open(self, HOME, now);
        let mut after = before.clone();
        after.revision += 1;
        let revision = after.revision;
        let data = match change {
            BatchChange::PauseFor(reason) => json!({ "reason": reason.as_str() }),
            _ => json!({}),
        };
        let mut event = |kind| books.batch_event(kind, &head, revision, data.clone());
        let control = match change {
            BatchChange::Pause | BatchChange::PauseFor(_) if before.state != BatchState::Paused => {
                after.state = BatchState::Paused;
                after.paused_at = before.released.then_some(now);
                event(EventKind::BatchPaused);
                vec![Control::Paused(batch)]
            }
            BatchChange::Resume if before.state == BatchState::Paused => {
                let due = before.release_at <= now;
                if let Some(at) = after.paused_at.take() {
                    let paused = u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX);
                    after.paused_ms = after.paused_ms.saturating_add(paused);
                }
                event(EventKind::BatchResumed);
                let mut told = vec![Control::Resumed(batch)];
                if due && !before.released {
                    start(&mut after, now);
                    event(EventKind::BatchStarted);
                    told.push(Control::Work);
                } else if before.released || due {
                    after.state = BatchState::InProgress;
                } else {
                    after.state = BatchState::Scheduled;
                }
                told
            }
            BatchChange::Cancel => {
                after.state = BatchState::Cancelled;
                after.released = true;
                event(EventKind::BatchCancelled);
                vec![Control::Cancelled(batch)]
            }
            BatchChange::Archive if !before.archived => {
                after.archived = true;
                vec![Control::Archived(batch)]
            }
            BatchChange::Unarchive if before.archived => {
                after.archived = false;
                vec![Control::Unarchived(batch)]
            }
            BatchChange::Start
            | BatchChange::Pause
            | BatchChange::PauseFor(_)
            | BatchChange::Resume
            | BatchChange::Archive
            | BatchChange::Unarchive => return Ok(true),
        };
        control.into_iter().for_each(|item| books.tell(item));
        self.write_home(books, batch, before, &after, 0).await
    }

    /// The start of an open batch; false when it was changed meanwhile.
    async fn start_open(
        &self,
        batch: BatchId,
        before: &BatchRecord,
        now: Timestamp,
    ) -> Result<bool> {
        let mut head = self.known_head(batch).await?.as_ref().clone();
        if head.held {
            head.held = false;
            head.release_at = head.release_at.max(now);
            let text = serde_json::to_vec(&head)
                .map_err(|error| StoreError::Refused(format!("a head: {error}")))?;
            let mut set = Cmd::new();
            set.arg("SET").arg(keys::of_batch(batch, "head")).arg(text);
            self.link.short(&set).await?;
        }
        // Else a start before this one came to no end; others may know its time already.
        let mut after = before.clone();
        after.revision += 1;
        after.release_at = head.release_at;
        let mut books = Books::open(self, HOME, now);
        let kind = if before.accepted == 0 {
            after.state = BatchState::Completed;
            after.completed_at = Some(now);
            Some(EventKind::BatchCompleted)
        } else if head.release_at > now {
            after.state = BatchState::Scheduled;
            None
        } else {
            start(&mut after, now);
            Some(EventKind::BatchStarted)
        };
        if let Some(kind) = kind {
            books.batch_event(kind, &head, after.revision, json!({}));
        }
        books.tell(Control::Work);
        self.write_home(books, batch, before, &after, 0).await
    }

    /// Lets the mail of batches leave whose time has come; whether there were any.
    pub(super) async fn release_due(&self, now: Timestamp) -> Result<bool> {
        let due = batch_list(answer::list(self.link.short(&ask_due(now)).await?));
        for batch in &due {
            self.start_batch(*batch, now).await?;
        }
        Ok(!due.is_empty())
    }

    async fn start_batch(&self, batch: BatchId, now: Timestamp) -> Result<()> {
        let mut tries = self.tries();
        while tries.again().await? {
            let Some(before) = self.home(batch).await? else {
                return Ok(());
            };
            if before.state != BatchState::Scheduled || before.release_at > now {
                return Ok(());
            }
            let mut after = before.clone();
            after.revision += 1;
            start(&mut after, now);
            let head = self.known_head(batch).await?;
            let mut books = Books::open(self, HOME, now);
            books.batch_event(EventKind::BatchStarted, &head, after.revision, json!({}));
            books.tell(Control::Work);
            if self.write_home(books, batch, &before, &after, 0).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Completes a batch in which nothing is open any more. Whether it is completed by this, and
    /// not as a cancelled one.
    pub(super) async fn complete(
        &self,
        batch: BatchId,
        now: Timestamp,
        floor: u64,
    ) -> Result<bool> {
        let mut tries = self.tries();
        while tries.again().await? {
            let Some(before) = self.home(batch).await? else {
                return Ok(false);
            };
            let over = before.state == BatchState::Open || before.completed_at.is_some();
            if over || self.counters(batch).await?.open() > 0 {
                return Ok(false);
            }
            let mut after = before.clone();
            after.revision += 1;
            after.completed_at = Some(now);
            let mut books = Books::open(self, HOME, now);
            let ended = before.state == BatchState::Cancelled;
            if !ended {
                after.state = BatchState::Completed;
                let head = self.known_head(batch).await?;
                books.batch_event(EventKind::BatchCompleted, &head, after.revision, json!({}));
            }
            if self
                .write_home(books, batch, &before, &after, floor)
                .await?
            {
                return Ok(!ended);
            }
        }
        Ok(false)
    }

    // ---- cancel -------------------------------------------------------------------------

    /// Ends what was not started of a cancelled batch, in short steps.
    pub(super) async fn cancel_all(&self, batch: BatchId, now: Timestamp) -> Result<()> {
        for p in self.all_partitions() {
            let ids = self.ranges_of(p, batch).await?;
            for some in ids.chunks(RANGES) {
                let mut tries = self.tries();
                while tries.again().await? {
                    if self.cancel_some(p, batch, some, now).await? {
                        break;
                    }
                }
            }
        }
        self.complete(batch, now, 0).await.map(drop)
    }

    async fn cancel_some(
        &self,
        p: Partition,
        batch: BatchId,
        ids: &[u64],
        now: Timestamp,
    ) -> Result<bool> {
        let mut books = self.books_with(p, now, ids).await?;
        let found: Vec<Range> = ids
            .iter()
            .filter_map(|id| books.range(*id).cloned())
            .collect();
        let mut needs = Needs {
            batches: [batch].into(),
            ..Needs::default()
        };
        for range in &found {
            let lots = range.refs().into_iter().map(|of| (batch, of.lot));
            needs.cells.extend(lots);
        }
        needs.lots.clone_from(&needs.cells);
        books.load(&needs).await?;
        for range in &found {
            let held = range.is_taken(books.moment);
            let from = if held { range.window } else { 0 };
            if !held {
                note_doubt(&mut books, range);
            }
            match books.cancel_range(range, from) {
                Err(StoreError::Damaged(what)) if !held => put_off(&mut books, range, &what),
                // Its holder is asked first; what is left is swept later.
                Err(StoreError::Damaged(_)) => {}
                ended => drop(ended?),
            }
        }
        let (commit, _) = books.close(None, 0)?;
        let done = commit.run(self, false).await? != Outcome::Conflict;
        if done {
            self.wrote();
        }
        Ok(done)
    }

    // ---- housekeeping -------------------------------------------------------------------

    /// What a process that ended in the middle left: batches whose time has come, copies that are
    /// behind, ranges of cancelled batches, completions.
    pub(super) async fn tidy(&self, now: Timestamp) -> Result<()> {
        let mut pipeline = Pipeline::new();
        pipeline.add_command(ask_due(now));
        for list in [keys::unsettled(HOME), keys::open(HOME)] {
            pipeline.cmd("ZRANGE").arg(list).arg(0).arg(-1);
        }
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        let mut next = || batch_list(answers.next().map(answer::list).unwrap_or_default());
        for batch in next() {
            self.start_batch(batch, now).await?;
        }
        for batch in next() {
            if let Some(record) = self.home(batch).await? {
                self.settle(batch, &record).await?;
            }
        }
        self.tidy_open(&next(), now).await
    }

    /// Completes batches in which nothing is open, and ends what holders that are gone left of
    /// cancelled ones.
    async fn tidy_open(&self, open: &[BatchId], now: Timestamp) -> Result<()> {
        if open.is_empty() {
            return Ok(());
        }
        let mut pipeline = Pipeline::new();
        for batch in open {
            pipeline.cmd("GET").arg(keys::batch(HOME, *batch));
            pipeline.cmd("EXISTS").arg(keys::ranges(HOME, *batch));
        }
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        let mut next = || answers.next().unwrap_or_default();
        let (mut without, mut cancelled) = (Vec::new(), Vec::new());
        for batch in open {
            let record = answer::bytes(next()).map(|bytes| BatchRecord::read(&bytes));
            if answer::number(next()) == 0 {
                without.push(*batch);
            }
            if record.transpose()?.map(|record| record.state) == Some(BatchState::Cancelled) {
                cancelled.push(*batch);
            }
        }
        for batch in self.without_ranges(without).await? {
            self.complete(batch, now, 0).await?;
        }
        for batch in cancelled {
            if self.has_leavings(batch, now).await? {
                self.cancel_all(batch, now).await?;
            }
        }
        Ok(())
    }

    /// Those of some batches without ranges in partition 0 that have none elsewhere either.
    async fn without_ranges(&self, some: Vec<BatchId>) -> Result<Vec<BatchId>> {
        if some.is_empty() {
            return Ok(some);
        }
        let elsewhere = self.all_partitions().filter(|p| *p != HOME).map(|p| {
            let mut pipeline = Pipeline::new();
            for batch in &some {
                pipeline.cmd("EXISTS").arg(keys::ranges(p, *batch));
            }
            async move { self.link.bulk(&pipeline).await }
        });
        let found = try_join_all(elsewhere).await?;
        let mut found: Vec<_> = found.into_iter().map(Vec::into_iter).collect();
        let mut left = Vec::new();
        for batch in some {
            let ranges = found.iter_mut().filter_map(Iterator::next);
            // All of them are asked, so that the answers stay side by side.
            let ranges: i64 = ranges.map(answer::number).sum();
            if ranges == 0 {
                left.push(batch);
            }
        }
        Ok(left)
    }

    /// Whether some range of a batch is held by nobody.
    async fn has_leavings(&self, batch: BatchId, now: Timestamp) -> Result<bool> {
        for p in self.all_partitions() {
            let ids = self.ranges_of(p, batch).await?;
            for some in ids.chunks(RANGES) {
                let books = self.books_with(p, now, some).await?;
                let free = |id: &u64| {
                    let range = books.range(*id);
                    range.is_some_and(|range| !range.is_taken(books.moment))
                };
                if some.iter().any(free) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

/// Asks for the batches whose time has come.
fn ask_due(now: Timestamp) -> Cmd {
    let mut find = Cmd::new();
    find.arg("ZRANGEBYSCORE")
        .arg(keys::scheduled(HOME))
        .arg("-inf")
        .arg(now.millis());
    find
}

/// Its mail begins to leave.
fn start(record: &mut BatchRecord, now: Timestamp) {
    record.state = BatchState::InProgress;
    record.started_at = Some(now);
    record.released = true;
}

/// Reads names of batches.
pub(super) fn batch_list(names: Vec<::redis::Value>) -> Vec<BatchId> {
    let read = |name| {
        let name = answer::bytes(name)?;
        std::str::from_utf8(&name).ok()?.parse().ok()
    };
    names.into_iter().filter_map(read).collect()
}

/// Leaves a range that cannot be read as it is, and lets nobody have it for a while. Its window
/// stays: a holder that nobody is, with a token that nobody has.
pub(super) fn put_off(books: &mut Books<'_>, range: &Range, what: &str) {
    tracing::error!(
        range = range.id,
        what,
        "recipients cannot be read and are not sent to; they are looked at again later"
    );
    books.inner.count_unreadable();
    let until = i64::try_from(UNREADABLE.as_millis()).unwrap_or(i64::MAX);
    let range = Range {
        holder: Holder::PutOff,
        token: books.token.max(range.token + 1),
        expires: books.moment.saturating_add(until),
        ..range.clone()
    };
    books.set_range(range);
}
