//! What nodes share beside mail and notes: settings, job leases, suspensions, announcements; and
//! deferred mail made due by hand.
//!
//! Must not know what a job does.

use super::books::{Books, Needs};
use super::commit::{Commit, Outcome};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{Range, new_version};
use super::{Clock, Inner};
use crate::{Announcement, Control, DueScope, Result, StoreError, Suspension};
use ::redis::{Cmd, Pipeline};
use model::{BatchId, BatchState, JournalId, Partition, Timestamp};
use std::time::Duration;

/// Ranges made due in one step.
const RANGES: usize = 64;
impl Inner {
    /// Whoever sets it first is right for everyone.
    pub(super) async fn setting(&self, key: &str, default: &str) -> Result<String> {
        let mut pipeline = Pipeline::new();
        pipeline
            .cmd("HSETNX")
            .arg(keys::settings(HOME))
            .arg(key)
            .arg(default);
        pipeline.cmd("HGET").arg(keys::settings(HOME)).arg(key);
        let found = self.link.bulk(&pipeline).await?.into_iter().nth(1);
        let text = found.and_then(answer::bytes);
        text.and_then(|text| String::from_utf8(text).ok())
            .ok_or_else(|| StoreError::Damaged(format!("the setting {key} is not readable")))
    }

    // ---- jobs ---------------------------------------------------------------------------

    /// Takes or renews the lease on a job.
    pub(super) async fn job_lease(
        &self,
        job: &str,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Option<u64>> {
        let key = keys::job(HOME, job);
        let mut tries = self.tries();
        while tries.again().await? {
            let mut get = Cmd::new();
            get.arg("GET").arg(&key);
            let stored = answer::bytes(self.link.short(&get).await?);
            let moment = match self.clock {
                Clock::Server => self.wall().await?,
                Clock::Caller => now.millis(),
            };
            let known = stored.as_deref().and_then(read_job);
            let token = match known {
                Some((_, holder, token, expires)) if expires > moment => {
                    if holder != node {
                        return Ok(None);
                    }
                    token
                }
                Some((_, _, token, _)) => token + 1,
                None => 1,
            };
            let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
            let mut value = new_version().to_vec();
            value.extend(node.to_bytes());
            value.extend(token.to_le_bytes());
            value.extend(moment.saturating_add(ttl).to_le_bytes());
            let mut commit = Commit::new(HOME);
            commit.check(key.clone(), known.map(|(version, ..)| version));
            commit.write("SET", key.clone(), [value]);
            if commit.run(self, true).await? != Outcome::Conflict {
                return Ok(Some(token));
            }
        }
        Ok(None)
    }

    // ---- suspensions --------------------------------------------------------------------

    /// Keeps mail from a destination.
    pub(super) async fn suspend(&self, of: Suspension, now: Timestamp) -> Result<()> {
        let stored = serde_json::to_vec(&of)
            .map_err(|error| StoreError::Damaged(format!("a suspension: {error}")))?;
        let mut books = Books::open(self, HOME, now);
        let field = of.destination.as_bytes().to_vec();
        books
            .commit
            .write("HSET", keys::suspensions(HOME), [field, stored]);
        books.tell(Control::DestinationSuspended(of));
        books.close(None, 0)?.0.run(self, true).await?;
        self.wrote();
        Ok(())
    }

    /// Lets mail go to a destination again.
    pub(super) async fn resume(&self, destination: &str, now: Timestamp) -> Result<bool> {
        let mut tries = self.tries();
        while tries.again().await? {
            let mut get = Cmd::new();
            get.arg("HGET")
                .arg(keys::suspensions(HOME))
                .arg(destination);
            let Some(stored) = answer::bytes(self.link.short(&get).await?) else {
                return Ok(false);
            };
            let held = read_suspension(&stored)?.holds(now);
            let mut books = Books::open(self, HOME, now);
            let (key, field) = (keys::suspensions(HOME), destination.as_bytes());
            books.commit.check_field(key.clone(), field, Some(&stored));
            books.commit.write("HDEL", key, [field]);
            if held {
                books.tell(Control::DestinationResumed(destination.into()));
            }
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, true).await? != Outcome::Conflict {
                self.wrote();
                return Ok(held);
            }
        }
        Ok(false)
    }

    /// The suspensions that hold.
    pub(super) async fn suspensions(&self, now: Timestamp) -> Result<Vec<Suspension>> {
        let mut get = Cmd::new();
        get.arg("HVALS").arg(keys::suspensions(HOME));
        let stored = answer::list(self.link.short(&get).await?);
        let read = |value| read_suspension(&answer::bytes(value).unwrap_or_default());
        let all = stored.into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let mut holding: Vec<Suspension> = all.into_iter().filter(|of| of.holds(now)).collect();
        holding.sort_by(|a, b| a.destination.cmp(&b.destination));
        Ok(holding)
    }

    /// Puts events that belong to no recipient into the stream.
    pub(super) async fn announce(&self, news: Vec<Announcement>, now: Timestamp) -> Result<()> {
        let mut books = Books::open(self, HOME, now);
        books.account_events(news).await?;
        books.close(None, 0)?.0.run(self, false).await?;
        self.wrote();
        Ok(())
    }

    // ---- due ----------------------------------------------------------------------------

    /// Makes deferred recipients due; how many.
    pub(super) async fn make_due(
        &self,
        scope: DueScope,
        now: Timestamp,
        dry_run: bool,
    ) -> Result<u64> {
        let mut count = 0;
        for p in self.all_partitions() {
            let ids = match &scope {
                DueScope::Batch(batch) => self.ranges_of(p, *batch).await?,
                DueScope::Domains(queues) => self.ranges_in(p, queues).await?,
            };
            for some in ids.chunks(RANGES) {
                count += self.make_some_due(p, some, now, dry_run).await?;
            }
        }
        Ok(count)
    }

    /// All ranges that stand in queues.
    pub(super) async fn ranges_in(&self, p: Partition, queues: &[Box<str>]) -> Result<Vec<u64>> {
        let mut ids = Vec::new();
        for queue in queues {
            for rank in [0, 1] {
                let mut find = Cmd::new();
                find.arg("ZRANGE")
                    .arg(keys::queue(p, rank, queue))
                    .arg(0)
                    .arg(-1);
                for member in answer::list(self.link.short(&find).await?) {
                    let member = answer::bytes(member).unwrap_or_default();
                    ids.extend(keys::read_member(&member).map(|member| member.id));
                }
            }
        }
        Ok(ids)
    }

    async fn make_some_due(
        &self,
        p: Partition,
        ids: &[u64],
        now: Timestamp,
        dry_run: bool,
    ) -> Result<u64> {
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = self.books_with(p, now, ids).await?;
            let waiting = |id: &u64| {
                let range = books.range(*id)?;
                let later = now.millis() + 1..crate::HELD_BACK;
                let waits = later.contains(&range.due_at) && !range.is_taken(books.moment);
                waits.then(|| range.clone())
            };
            let ranges: Vec<Range> = ids.iter().filter_map(waiting).collect();
            let mut needs = Needs::default();
            for range in &ranges {
                needs.batches.insert(range.batch);
                let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
                needs.cells.extend(lots);
            }
            books.load(&needs).await?;
            let mut count = 0;
            for range in ranges {
                let open = open_in(&books, &range)?;
                count += open;
                if open > 0 && !dry_run {
                    books.set_range(Range {
                        due_at: now.millis(),
                        ..range
                    });
                }
            }
            if dry_run || count == 0 {
                return Ok(count);
            }
            books.tell(Control::Work);
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, false).await? != Outcome::Conflict {
                self.wrote();
                return Ok(count);
            }
        }
        Ok(0)
    }
}

/// How many of a range wait in a batch whose mail has begun to leave. What cannot be read waits on.
fn open_in(books: &Books<'_>, range: &Range) -> Result<u64> {
    let goes_on = |batch: BatchId| {
        books.batch(batch).is_some_and(|batch| {
            batch.released && matches!(batch.state, BatchState::InProgress | BatchState::Paused)
        })
    };
    if !goes_on(range.batch) {
        return Ok(0);
    }
    match books.unreported(range) {
        Ok(open) => Ok(u64::try_from(open.len()).unwrap_or(u64::MAX)),
        Err(StoreError::Damaged(_)) => Ok(0),
        Err(error) => Err(error),
    }
}

fn read_suspension(stored: &[u8]) -> Result<Suspension> {
    serde_json::from_slice(stored)
        .map_err(|error| StoreError::Damaged(format!("a suspension: {error}")))
}

type Job = ([u8; 8], JournalId, u64, i64);

fn read_job(stored: &[u8]) -> Option<Job> {
    let (version, rest) = stored.split_first_chunk::<8>()?;
    let (node, rest) = rest.split_first_chunk::<16>()?;
    let (token, rest) = rest.split_first_chunk::<8>()?;
    let expires = i64::from_le_bytes(rest.try_into().ok()?);
    Some((
        *version,
        JournalId::from_bytes(*node),
        u64::from_le_bytes(*token),
        expires,
    ))
}
