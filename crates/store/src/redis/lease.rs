//! Leases: ranges of lots and of retry lots go to a node for a time, and come back.
//!
//! A lease is three round trips to each partition that has something, however many recipients it
//! hands out: look (a script that finds candidates), read their cells, take (one step). Two nodes
//! that want the same ranges at once: the second looks again. Must not apply facts.

use super::Inner;
use super::books::{Books, Needs, RetryKey};
use super::commit::Outcome;
use super::hand_out::{Terms, after, load_recipients, take_of};
use super::keys;
use super::link::answer;
use super::look::{Found, Pick, Wish};
use super::record::{Holder, Range};
use crate::{Control, LeaseRequest, LeasedRange, RangeRef, Release, Result, StoreError};
use ::redis::Cmd;
use futures_util::future::{try_join, try_join_all};
use model::{BatchId, BatchState, JournalId, Partition, Place, Timestamp};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Looks of one request: what others took or what must not be written to is made up for.
const LOOKS: usize = 16;

impl Inner {
    /// Leases ranges.
    pub(super) async fn lease(&self, request: &LeaseRequest) -> Result<Vec<LeasedRange>> {
        let terms = Terms {
            node: request.node,
            ttl: request.ttl,
            until: request.now + request.ttl,
            own: false,
        };
        let mut wishes: Vec<Wish> = request.wants.iter().map(Wish::new).collect();
        let mut leased = Vec::new();
        // Looked for beside it: hardly ever does a batch begin just now.
        let begin = self.release_due(request.now);
        let (begun, seen) = try_join(begin, self.look(&wishes, request.now)).await?;
        let mut seen = Some(seen).filter(|_| !begun);
        for _ in 0..LOOKS {
            let found = match seen.take() {
                Some(seen) => seen,
                None => self.look(&wishes, request.now).await?,
            };
            let picks = self.plan(&found, &wishes);
            if picks.is_empty() {
                break;
            }
            self.past.note_quiet(false);
            let taken = self.take(&found, &picks, terms, request.now).await?;
            for (wish, range) in taken {
                if let Some(wish) = wishes.get_mut(wish) {
                    wish.left = wish.left.saturating_sub(range.items.len());
                    wish.room.take(range.batch.id, range.items.len());
                }
                leased.push(range);
            }
            if self.past.is_quiet() || wishes.iter().all(|wish| wish.left == 0) {
                break;
            }
        }
        Ok(leased)
    }

    // ---- take ---------------------------------------------------------------------------

    /// Takes what was planned, in each partition in one step; the ranges in the order of the plan.
    async fn take(
        &self,
        found: &[Found],
        picks: &[Pick],
        terms: Terms,
        now: Timestamp,
    ) -> Result<Vec<(usize, LeasedRange)>> {
        let parts = found.iter().enumerate().filter_map(|(at, of)| {
            let own: Vec<(usize, Pick)> = picks
                .iter()
                .copied()
                .enumerate()
                .filter(|(_, pick)| pick.of == at)
                .collect();
            (!own.is_empty()).then(|| self.take_part(of, own, terms, now))
        });
        let mut taken: Vec<_> = try_join_all(parts).await?.into_iter().flatten().collect();
        taken.sort_by_key(|(order, ..)| *order);
        Ok(taken
            .into_iter()
            .map(|(_, wish, range)| (wish, range))
            .collect())
    }

    async fn take_part(
        &self,
        found: &Found,
        picks: Vec<(usize, Pick)>,
        terms: Terms,
        now: Timestamp,
    ) -> Result<Vec<(usize, usize, LeasedRange)>> {
        let ranges: Vec<Range> = picks
            .iter()
            .filter_map(|(_, pick)| found.ranges.get(&pick.id).cloned())
            .collect();
        let mut books = Books::open(self, found.partition, now);
        books.set_time(found.seconds, found.micros);
        books.expect_suppressions(found.suppressions);
        for range in &ranges {
            if let Some(record) = found.batches.get(&range.batch) {
                books.put_batch(range.batch, record.clone());
            }
            books.put_stored(range.id, Some(range.clone()));
        }
        load_recipients(&mut books, &ranges, found.any_suppressed).await?;
        let mut taken = Vec::new();
        for (order, pick) in picks {
            let Some(range) = found.ranges.get(&pick.id) else {
                continue;
            };
            if let Some(leased) = take_of(&mut books, range, pick.rows, terms)? {
                taken.push((order, pick.wish, leased));
            }
        }
        books.commit.check_quiet(terms.ttl);
        self.finish(books, taken, now).await
    }

    /// Does the step; nothing was leased when somebody else was faster.
    async fn finish<T>(&self, books: Books<'_>, leased: Vec<T>, now: Timestamp) -> Result<Vec<T>> {
        let (commit, told) = books.close(None, 0)?;
        match commit.run(self, true).await? {
            Outcome::Conflict => Ok(Vec::new()),
            Outcome::Quiet(_) => {
                self.past.note_quiet(true);
                Ok(Vec::new())
            }
            Outcome::Done { seq, open } => {
                self.completions(&told, &open, now, seq).await?;
                Ok(leased)
            }
        }
    }

    // ---- what a node has ----------------------------------------------------------------

    /// The ranges that a node holds in a partition.
    async fn held_by(&self, p: Partition, node: JournalId) -> Result<Vec<u64>> {
        let mut find = Cmd::new();
        find.arg("SMEMBERS").arg(keys::held(p, node));
        let names = answer::list(self.link.short(&find).await?);
        let id = |name| keys::read_range_name(&answer::bytes(name)?);
        let mut ids: Vec<u64> = names.into_iter().filter_map(id).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// Gives a node its own leases back.
    pub(super) async fn reclaim(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<LeasedRange>> {
        let terms = Terms {
            node,
            ttl,
            until: now + ttl,
            own: true,
        };
        let mut leased = Vec::new();
        for p in self.all_partitions() {
            for some in self.held_by(p, node).await?.chunks(64) {
                leased.extend(self.reclaim_some(p, some, terms, now).await?);
            }
        }
        Ok(leased)
    }

    async fn reclaim_some(
        &self,
        p: Partition,
        ids: &[u64],
        terms: Terms,
        now: Timestamp,
    ) -> Result<Vec<LeasedRange>> {
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = self.books_with(p, now, ids).await?;
            let own = |id: &u64| {
                let range = books.range(*id)?;
                (range.holder == Holder::Node(terms.node)).then(|| range.clone())
            };
            let ranges: Vec<Range> = ids.iter().filter_map(own).collect();
            let any = self.any_suppressed(&mut books).await?;
            load_recipients(&mut books, &ranges, any).await?;
            let mut leased = Vec::new();
            for range in &ranges {
                let record = books.batch(range.batch);
                let ended = record.is_none_or(|batch| batch.state == BatchState::Cancelled);
                // What it may have started it alone can tell of.
                if !ended || books.cancel_range(range, range.doubtful())? {
                    leased.extend(take_of(&mut books, range, usize::MAX, terms)?);
                }
            }
            books.commit.check_quiet(terms.ttl);
            let (commit, told) = books.close(None, 0)?;
            match commit.run(self, true).await? {
                Outcome::Conflict => {}
                Outcome::Done { seq, open } => {
                    self.completions(&told, &open, now, seq).await?;
                    return Ok(leased);
                }
                // What another node took over may be forgotten.
                Outcome::Quiet(left) => {
                    return Err(StoreError::Unavailable(format!(
                        "redis: the primary has changed, nothing is leased for another {left} ms"
                    )));
                }
            }
        }
        Ok(Vec::new())
    }

    /// Whether anybody is suppressed in the books' partition; the commit checks that it stays so.
    async fn any_suppressed(&self, books: &mut Books<'_>) -> Result<bool> {
        let mut pipeline = ::redis::Pipeline::new();
        pipeline
            .cmd("GET")
            .arg(keys::suppressions_version(books.partition));
        pipeline.cmd("SCARD").arg(keys::suppressed(books.partition));
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        let version = answers.next().and_then(answer::bytes);
        books.expect_suppressions(version.and_then(|bytes| bytes.try_into().ok()));
        Ok(answers.next().map_or(0, answer::number) > 0)
    }

    /// Extends the leases of a node.
    pub(super) async fn renew(
        &self,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<RangeRef>> {
        let parts = self
            .all_partitions()
            .map(|p| self.renew_part(p, node, now, ttl));
        Ok(try_join_all(parts).await?.into_iter().flatten().collect())
    }

    async fn renew_part(
        &self,
        p: Partition,
        node: JournalId,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<RangeRef>> {
        let mut tries = self.tries();
        while tries.again().await? {
            let ids = self.held_by(p, node).await?;
            if ids.is_empty() {
                break;
            }
            let mut books = self.books_with(p, now, &ids).await?;
            let mut held = Vec::new();
            for id in ids {
                let Some(range) = books.range(id).cloned() else {
                    continue;
                };
                if range.holder != Holder::Node(node) || !range.is_taken(books.moment) {
                    continue;
                }
                held.push(RangeRef {
                    id,
                    partition: p,
                    token: range.token,
                });
                let expires = after(books.moment, ttl);
                books.set_range(Range { expires, ..range });
            }
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, true).await? != Outcome::Conflict {
                return Ok(held);
            }
        }
        Ok(Vec::new())
    }

    /// Takes ranges back, and tells the others that there is work.
    pub(super) async fn release(&self, all: Vec<Release>, now: Timestamp) -> Result<()> {
        let mut parts: BTreeMap<Partition, Vec<Release>> = BTreeMap::new();
        for release in all {
            parts
                .entry(release.range.partition)
                .or_default()
                .push(release);
        }
        let parts = parts.into_iter().map(|(p, releases)| async move {
            for some in releases.chunks(64) {
                self.release_some(p, some, now).await?;
            }
            Ok::<_, StoreError>(())
        });
        try_join_all(parts).await?;
        self.wrote();
        Ok(())
    }

    async fn release_some(&self, p: Partition, some: &[Release], now: Timestamp) -> Result<()> {
        let ids: Vec<u64> = some.iter().map(|release| release.range.id).collect();
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = self.books_with(p, now, &ids).await?;
            let held: Vec<(&Release, Range)> = some
                .iter()
                .filter_map(|release| Some((release, books.held(release.range)?.clone())))
                .collect();
            let mut needs = Needs::default();
            for (_, range) in &held {
                needs.batches.insert(range.batch);
                let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
                needs.cells.extend(lots);
            }
            books.load(&needs).await?;
            let cancelled = |range: &Range| {
                let record = books.batch(range.batch);
                record.is_none_or(|batch| batch.state == BatchState::Cancelled)
            };
            if held.iter().any(|(_, range)| cancelled(range)) {
                // Their events say whom they are about.
                let rows = Needs {
                    lots: needs.cells.clone(),
                    ..Needs::default()
                };
                books.load(&rows).await?;
            }
            for (release, range) in &held {
                release_one(&mut books, release, range)?;
            }
            let collected = Needs {
                ranges: books.retry_ranges(),
                ..Needs::default()
            };
            if !collected.ranges.is_empty() {
                books.load(&collected).await?;
                books.file_retries();
            }
            books.tell(Control::Work);
            let (commit, told) = books.close(None, 0)?;
            if let Outcome::Done { seq, open } = commit.run(self, false).await? {
                return self.completions(&told, &open, now, seq).await.map(drop);
            }
        }
        Ok(())
    }

    /// Completes the batches of which a step has left nothing open.
    pub(super) async fn completions(
        &self,
        told: &[BatchId],
        open: &[i64],
        now: Timestamp,
        floor: u64,
    ) -> Result<Vec<BatchId>> {
        self.wrote();
        let mut completed = Vec::new();
        for (&batch, _) in told.iter().zip(open).filter(|(_, open)| **open == 0) {
            if self.complete(batch, now, floor).await? {
                completed.push(batch);
            }
        }
        Ok(completed)
    }
}

fn release_one(books: &mut Books<'_>, release: &Release, range: &Range) -> Result<()> {
    let batch = books.batch(range.batch);
    if batch.is_none_or(|batch| batch.state == BatchState::Cancelled) {
        return books.cancel_range(range, 0).map(drop);
    }
    let due_at = release.due_at.map_or(range.due_at, Timestamp::millis);
    let moved: HashMap<Place, &Box<str>> = release
        .requeue
        .iter()
        .map(|(place, queue)| (*place, queue))
        .collect();
    let mut rest = Vec::new();
    for (_, of) in books.unreported(range)? {
        let place = Place {
            lot: of.lot,
            position: of.position,
        };
        let Some(queue) = moved.get(&place) else {
            rest.push(of);
            continue;
        };
        let key = RetryKey {
            batch: range.batch,
            queue: (*queue).clone(),
            rank: range.rank,
            due_at,
        };
        books.retry(key, of);
    }
    if rest.is_empty() {
        books.remove_range(range.id);
    } else {
        books.set_range(range.with_refs(rest).freed(due_at));
    }
    Ok(())
}
