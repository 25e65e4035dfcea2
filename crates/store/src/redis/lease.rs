//! Leases: ranges of lots and of retry lots go to a node for a time, and come back.
//!
//! A lease is three round trips to each partition that has something, however many recipients it
//! hands out: look (a script that finds candidates), read their cells, take (one step). Two nodes
//! that want the same ranges at once: the second looks again. Must not apply facts.

use super::batches::put_off;
use super::books::{Books, Needs, RetryKey};
use super::cache::LotKey;
use super::commit::Outcome;
use super::keys;
use super::link::answer;
use super::record::{BatchRecord, Holder, Range};
use super::{Clock, Inner};
use crate::form::Ref;
use crate::hours::{self, Shut};
use crate::transition::Cell;
use crate::{
    Control, LeaseRequest, LeasedRange, LeasedRecipient, RangeRef, Release, Result, StoreError,
    WINDOW, Want,
};
use ::redis::{Cmd, Value};
use futures_util::future::{try_join, try_join_all};
use model::{BatchId, BatchState, JournalId, Partition, Place, Status, Timestamp};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Batches of which one look tells, per queue.
const BATCHES: usize = 256;
/// The least that a batch gets in its turn, so that ranges do not become crumbs.
const QUANTUM: usize = 16;
/// Looks of one request: what others took or what must not be written to is made up for.
const LOOKS: usize = 16;
/// Queues of which the turn is remembered.
const TURNS: usize = 65_536;
/// Ranks: what goes first, then list mail.
const RANKS: [u8; 2] = [0, 1];

/// A queue of a rank.
pub(super) type Turn = (Box<str>, u8);

/// A wish that is not filled yet.
#[derive(Debug, Clone)]
struct Wish {
    queue: Box<str>,
    left: usize,
    /// The most in one range.
    largest: usize,
    /// Only what is transactional.
    urgent_only: bool,
    room: Room,
}

/// How much of each batch is wanted.
#[derive(Debug, Clone)]
struct Room {
    per_batch: usize,
    /// What is left of those that were named or served.
    of: HashMap<BatchId, usize>,
}

impl Room {
    fn of(&self, batch: BatchId) -> usize {
        self.of.get(&batch).copied().unwrap_or(self.per_batch)
    }

    fn take(&mut self, batch: BatchId, rows: usize) {
        let left = self.of.entry(batch).or_insert(self.per_batch);
        *left = left.saturating_sub(rows);
    }
}

impl Wish {
    fn new(want: &Want) -> Self {
        let count = |rows: u32| usize::try_from(rows).unwrap_or(usize::MAX);
        Self {
            queue: want.queue.clone(),
            left: count(want.rows),
            largest: count(want.largest).max(1),
            urgent_only: want.urgent_only,
            room: Room {
                per_batch: count(want.per_batch),
                of: want
                    .of
                    .iter()
                    .map(|(id, rows)| (*id, count(*rows)))
                    .collect(),
            },
        }
    }
}

/// What a partition has for all wishes.
struct Found {
    partition: Partition,
    seconds: i64,
    micros: i64,
    suppressions: Option<[u8; 8]>,
    any_suppressed: bool,
    batches: HashMap<BatchId, BatchRecord>,
    ranges: HashMap<u64, Range>,
    /// Per wish and rank: batches and their due ranges.
    due: Vec<Vec<(BatchId, Vec<u64>)>>,
}

/// A part of a range that is to be taken.
#[derive(Debug, Clone, Copy)]
struct Pick {
    /// Which of the partitions found.
    of: usize,
    id: u64,
    rows: usize,
    wish: usize,
}

/// The terms of a lease.
#[derive(Debug, Clone, Copy)]
struct Terms {
    node: JournalId,
    ttl: Duration,
    /// Until when, by the holder's clock.
    until: Timestamp,
    /// It had the range before, and knows what it started.
    own: bool,
}

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

    // ---- look ---------------------------------------------------------------------------

    async fn look(&self, wishes: &[Wish], now: Timestamp) -> Result<Vec<Found>> {
        let open = wishes.iter().any(|wish| wish.left > 0);
        if !open {
            return Ok(Vec::new());
        }
        let upto = match self.clock {
            Clock::Server => Vec::new(),
            Clock::Caller => keys::moment(now.millis() + 1).to_vec(),
        };
        let all = self.all_partitions().map(|p| {
            let mut arguments = vec![
                keys::prefix(p).into_bytes(),
                upto.clone(),
                vec![BatchState::InProgress.code()],
            ];
            for wish in wishes {
                for rank in RANKS {
                    // Of those that are named perhaps nothing more is wanted.
                    let most = wish.left.div_ceil(QUANTUM) + wish.room.of.len();
                    let most = most.clamp(1, BATCHES);
                    let most = if wish.left == 0 { 0 } else { most };
                    let turn = self.turn(&(wish.queue.clone(), rank));
                    arguments.extend([
                        wish.queue.as_bytes().to_vec(),
                        rank.to_string().into_bytes(),
                        wish.left.to_string().into_bytes(),
                        most.to_string().into_bytes(),
                        turn.map_or(Vec::new(), |batch| batch.to_string().into_bytes()),
                    ]);
                }
            }
            async move {
                let keys = [keys::queues(p)];
                let answer = self
                    .script(&self.scripts.look, p, &keys, &arguments, false)
                    .await?;
                read_found(p, answer)
            }
        });
        try_join_all(all).await
    }

    fn turn(&self, key: &Turn) -> Option<BatchId> {
        let turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.get(key).copied()
    }

    fn remember_turn(&self, key: Turn, batch: BatchId) {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.len() >= TURNS {
            turns.clear();
        }
        turns.insert(key, batch);
    }

    // ---- plan ---------------------------------------------------------------------------

    /// Who gets what: what is transactional first, then the batches in turn.
    fn plan(&self, found: &[Found], wishes: &[Wish]) -> Vec<Pick> {
        let mut picks = Vec::new();
        for (wish, of) in wishes.iter().enumerate() {
            let mut left = of.left;
            let mut room = of.room.clone();
            for rank in RANKS {
                if of.urgent_only && rank != 0 {
                    continue;
                }
                let turn = (of.queue.clone(), rank);
                let group = due_batches(
                    found,
                    wish * RANKS.len() + usize::from(rank),
                    self.turn(&turn),
                );
                if let Some(last) = share_out(
                    group,
                    (&mut left, &mut room),
                    (wish, of.largest),
                    &mut picks,
                ) {
                    self.remember_turn(turn, last);
                }
            }
        }
        picks
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
                if record.is_none_or(|batch| batch.state == BatchState::Cancelled) {
                    books.cancel_range(range, 0)?;
                } else {
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

fn after(moment: i64, ttl: Duration) -> i64 {
    moment.saturating_add(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))
}

fn read_found(partition: Partition, answer: Value) -> Result<Found> {
    let mut parts = answer::list(answer).into_iter();
    let mut next = || parts.next().unwrap_or_default();
    let mut found = Found {
        partition,
        seconds: answer::number(next()),
        micros: answer::number(next()),
        suppressions: answer::bytes(next()).and_then(|bytes| bytes.try_into().ok()),
        any_suppressed: answer::number(next()) > 0,
        batches: HashMap::new(),
        ranges: HashMap::new(),
        due: Vec::new(),
    };
    for wish in parts {
        let mut due = Vec::new();
        for of_batch in answer::list(wish) {
            let mut of_batch = answer::list(of_batch).into_iter().filter_map(answer::bytes);
            let name = of_batch.next().unwrap_or_default();
            let Some(batch) = std::str::from_utf8(&name)
                .ok()
                .and_then(|id| id.parse().ok())
            else {
                continue;
            };
            let record = BatchRecord::read(&of_batch.next().unwrap_or_default())?;
            found.batches.insert(batch, record);
            let mut ids = Vec::new();
            for bytes in of_batch {
                match Range::read(partition, &bytes) {
                    Ok(range) => {
                        ids.push(range.id);
                        found.ranges.insert(range.id, range);
                    }
                    Err(error) => tracing::error!(%error, "a range cannot be read"),
                }
            }
            due.push((batch, ids));
        }
        found.due.push(due);
    }
    Ok(found)
}

/// A range that a batch has for a wish: in which partition, which, how many recipients.
type Share = (usize, u64, usize);

/// The batches with due ranges over all partitions, from the one whose turn it is.
fn due_batches(
    found: &[Found],
    wish: usize,
    turn: Option<BatchId>,
) -> Vec<(BatchId, VecDeque<Share>)> {
    let mut batches: BTreeMap<BatchId, Vec<(i64, Share)>> = BTreeMap::new();
    for (at, of) in found.iter().enumerate() {
        for (batch, ids) in of.due.get(wish).into_iter().flatten() {
            let ranges = ids.iter().filter_map(|id| of.ranges.get(id));
            let shares = ranges.map(|range| {
                let count = usize::try_from(range.count).unwrap_or(usize::MAX);
                (range.due_at, (at, range.id, count))
            });
            batches.entry(*batch).or_default().extend(shares);
        }
    }
    let (later, earlier): (Vec<_>, Vec<_>) = batches
        .into_iter()
        .partition(|(batch, _)| turn.is_none_or(|turn| *batch > turn));
    let in_order = |(batch, mut ranges): (BatchId, Vec<(i64, Share)>)| {
        ranges.sort_by_key(|(due, (at, ..))| (*due, *at));
        (batch, ranges.into_iter().map(|(_, share)| share).collect())
    };
    later.into_iter().chain(earlier).map(in_order).collect()
}

/// Shares out what is left among batches; the last that got something.
fn share_out(
    mut group: Vec<(BatchId, VecDeque<Share>)>,
    (left, room): (&mut usize, &mut Room),
    (wish, largest): (usize, usize),
    picks: &mut Vec<Pick>,
) -> Option<BatchId> {
    let mut last = None;
    while *left > 0 && !group.is_empty() {
        let share = (*left / group.len()).max(QUANTUM);
        let mut still = Vec::new();
        for (batch, mut ranges) in group {
            let mut own = share.min(*left).min(room.of(batch));
            let given = own;
            *left -= own;
            while own > 0
                && let Some((of, id, count)) = ranges.pop_front()
            {
                let before = picks.iter().position(|pick| (pick.of, pick.id) == (of, id));
                let has = before
                    .and_then(|at| picks.get(at))
                    .map_or(0, |pick| pick.rows);
                let rows = count.min(own).min(largest.saturating_sub(has));
                own -= rows;
                last = Some(batch);
                match before.and_then(|at| picks.get_mut(at)) {
                    Some(pick) => pick.rows += rows,
                    None => picks.push(Pick { of, id, rows, wish }),
                }
                // The rest of a range that is taken as large as it may be is for the next look.
                if rows < count && has + rows < largest {
                    ranges.push_front((of, id, count - rows));
                }
            }
            *left += own;
            room.take(batch, given - own);
            if own == 0 && !ranges.is_empty() && room.of(batch) > 0 {
                still.push((batch, ranges));
            }
        }
        group = still;
    }
    last
}

/// Reads cells and rows of the recipients of ranges, the suppressions of those who have any, and what
/// they let be kept.
async fn load_recipients(books: &mut Books<'_>, ranges: &[Range], guarded: bool) -> Result<()> {
    let mut needs = Needs {
        any_consents: true,
        ..Needs::default()
    };
    for range in ranges {
        needs.batches.insert(range.batch);
        let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
        needs.cells.extend(lots);
    }
    needs.lots.clone_from(&needs.cells);
    books.load(&needs).await?;
    if !guarded && !books.any_consents {
        return Ok(());
    }
    let mut people = BTreeSet::new();
    for range in ranges {
        let account = books.head(range.batch)?.account.clone();
        for of in range.refs() {
            if let Ok(row) = books.row((range.batch, of.lot), of.position) {
                people.insert((account.clone(), row.email.normalised().into_owned()));
            }
        }
    }
    let mut needs = Needs::default();
    if guarded {
        needs.addresses = suppressed_of(books, &people).await?;
    }
    if books.any_consents {
        needs.consents = people;
    }
    books.load(&needs).await
}

/// Those of these people (account and address) whose address has a suppression.
async fn suppressed_of(
    books: &Books<'_>,
    people: &BTreeSet<(String, String)>,
) -> Result<BTreeSet<(String, String)>> {
    let people: Vec<&(String, String)> = people.iter().collect();
    let mut addresses = BTreeSet::new();
    for some in people.chunks(1_000) {
        let mut ask = Cmd::new();
        ask.arg("SMISMEMBER").arg(keys::suppressed(books.partition));
        for (account, email) in some {
            // Under the address, and under what an erasure left of it.
            let name = books.inner.eraser().name(account, email);
            for name in [email, &name] {
                ask.arg(&keys::address_hash(account, name)[..]);
            }
        }
        let found = answer::list(books.inner.link.short(&ask).await?);
        let known = |found: &[Value]| found.iter().any(|found| matches!(found, Value::Int(1)));
        let hits = some.iter().zip(found.chunks(2));
        addresses.extend(
            hits.filter(|(_, found)| known(found))
                .map(|(person, _)| (*person).clone()),
        );
    }
    Ok(addresses)
}

/// A recipient to hand out.
struct Chosen {
    of: Ref,
    cell: Cell,
    row: model::Row,
    in_window: bool,
}

/// Leases up to `rows` recipients of a range; `None` when it had none, and is gone or put off.
fn take_of(
    books: &mut Books<'_>,
    range: &Range,
    rows: usize,
    terms: Terms,
) -> Result<Option<LeasedRange>> {
    let refs = range.refs();
    if !terms.own {
        note_doubt(books, range);
    }
    let (chosen, shut, consumed) = match choose(books, range, &refs, rows, terms.own) {
        Ok(looked) => looked,
        Err(StoreError::Damaged(what)) => {
            put_off(books, range, &what);
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let rest = refs.get(consumed..).unwrap_or_default().to_vec();
    if rest.is_empty() && chosen.is_empty() && shut.is_empty() {
        books.remove_range(range.id);
        return Ok(None);
    }
    // The range's own number goes to the first part that stays.
    let mut id = Some(range.id);
    for (until, refs) in shut {
        let id = id.take().unwrap_or_else(|| fastrand::u64(..));
        let shut = range.with_refs(refs).freed(until.millis());
        books.set_range(Range { id, ..shut });
    }
    if !rest.is_empty() {
        let id = id.take().unwrap_or_else(|| fastrand::u64(..));
        let rest = range.with_refs(rest).freed(range.due_at);
        books.set_range(Range { id, ..rest });
    }
    if chosen.is_empty() {
        return Ok(None);
    }
    let id = id.unwrap_or_else(|| fastrand::u64(..));
    hand_out(books, range, id, chosen, terms).map(Some)
}

/// Notes in the cells what a holder that is gone may have started.
fn note_doubt(books: &mut Books<'_>, range: &Range) {
    let doubtful = usize::try_from(range.doubtful()).unwrap_or(usize::MAX);
    for of in range.refs().into_iter().take(doubtful) {
        let key = (range.batch, of.lot);
        let cell = books.cell(key, of.position).ok().flatten();
        if let Some(mut cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) {
            cell.mark_maybe_started();
            books.set_cell(key, of.position, cell);
        }
    }
}

/// The unreported recipients that may be written to now, those to whom the window is shut, and how
/// many were looked at. Those that must not be written to are ended.
fn choose(
    books: &mut Books<'_>,
    range: &Range,
    refs: &[Ref],
    rows: usize,
    own: bool,
) -> Result<(Vec<Chosen>, Shut, usize)> {
    let head = books.head(range.batch)?;
    let (mut chosen, mut shut) = (Vec::new(), Shut::new());
    // First everything is read, so that what cannot be read changes nothing.
    for &of in refs {
        let key: LotKey = (range.batch, of.lot);
        let cell = books.cell(key, of.position)?;
        if cell.is_some_and(|cell| !cell.reported_since(of.attempts)) {
            books.row(key, of.position)?;
        }
    }
    let mut consumed = 0;
    for (offset, &of) in (0_u32..).zip(refs) {
        if chosen.len() >= rows {
            break;
        }
        consumed += 1;
        let key: LotKey = (range.batch, of.lot);
        let cell = books.cell(key, of.position)?;
        let Some(cell) = cell.filter(|cell| !cell.reported_since(of.attempts)) else {
            continue;
        };
        let mut row = books.row(key, of.position)?;
        let person = (head.account.clone(), row.email.normalised().into_owned());
        let stopping = books
            .known
            .get(&person)
            .and_then(|known| known.iter().find(|of| of.stops(&head.list, head.priority)));
        if let Some(reason) = stopping.map(|of| of.reason) {
            let data = json!({ "reason": reason.as_str() });
            books.end_unsent(key, of.position, Status::Suppressed, data)?;
            continue;
        }
        let in_window = own && offset < range.doubtful();
        let until = hours::shut_until(&head, &row, cell, books.now);
        if let Some(until) = until.filter(|_| !in_window) {
            shut.entry(until).or_default().push(of);
            continue;
        }
        if let Some(Some(consent)) = books.consents.get(&person) {
            consent.bind(&mut row);
        }
        chosen.push(Chosen {
            of,
            cell,
            row,
            in_window,
        });
    }
    Ok((chosen, shut, consumed))
}

fn hand_out(
    books: &mut Books<'_>,
    range: &Range,
    id: u64,
    chosen: Vec<Chosen>,
    terms: Terms,
) -> Result<LeasedRange> {
    let started = chosen.iter().filter(|item| item.in_window).count();
    let refs = chosen.iter().map(|item| item.of).collect();
    let part = range.with_refs(refs);
    let window = WINDOW
        .max(u32::try_from(started).unwrap_or(u32::MAX))
        .min(part.count);
    let token = books.token.max(range.token + 1);
    books.set_range(Range {
        id,
        holder: Holder::Node(terms.node),
        token,
        expires: after(books.moment, terms.ttl),
        window,
        ..part
    });
    let items = (0_u32..).zip(chosen).map(|(offset, item)| LeasedRecipient {
        place: Place {
            lot: item.of.lot,
            position: item.of.position,
        },
        offset,
        row: item.row,
        attempts: item.cell.attempts(),
        maybe_started: item.in_window || item.cell.maybe_started(),
        ambiguous_before: item.cell.ambiguous(),
        variant: item.cell.variant(),
    });
    Ok(LeasedRange {
        range: RangeRef {
            id,
            partition: books.partition,
            token,
        },
        batch: Arc::clone(&books.head(range.batch)?),
        queue: range.queue.clone(),
        items: items.collect(),
        window,
        expires_at: terms.until,
    })
}

fn release_one(books: &mut Books<'_>, release: &Release, range: &Range) -> Result<()> {
    let batch = books.batch(range.batch);
    if batch.is_none_or(|batch| batch.state == BatchState::Cancelled) {
        return books.cancel_range(range, 0);
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
