//! What there is to lease, and who gets what of it: what is transactional first, then the batches in
//! turn.
//!
//! One script finds candidates in each partition. Must not change anything.

use super::keys;
use super::link::answer;
use super::record::{BatchRecord, Range};
use super::{Clock, Inner};
use crate::{Result, Want};
use ::redis::Value;
use futures_util::future::try_join_all;
use model::{BatchId, BatchState, Partition, Timestamp};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::PoisonError;

/// Batches of which one look tells, per queue.
const BATCHES: usize = 256;
/// The least that a batch gets in its turn, so that ranges do not become crumbs.
const QUANTUM: usize = 16;
/// Queues of which the turn is remembered.
const TURNS: usize = 65_536;
/// Ranks: what goes first, then list mail.
const RANKS: [u8; 2] = [0, 1];

/// A queue of a rank.
pub(super) type Turn = (Box<str>, u8);

/// A wish that is not filled yet.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub(super) queue: Box<str>,
    pub(super) left: usize,
    /// The most in one range.
    pub(super) largest: usize,
    /// Only what is transactional.
    pub(super) urgent_only: bool,
    pub(super) room: Room,
}

/// How much of each batch is wanted.
#[derive(Debug, Clone)]
pub(super) struct Room {
    per_batch: usize,
    /// What is left of those that were named or served.
    of: HashMap<BatchId, usize>,
}

impl Room {
    fn of(&self, batch: BatchId) -> usize {
        self.of.get(&batch).copied().unwrap_or(self.per_batch)
    }

    pub(super) fn take(&mut self, batch: BatchId, rows: usize) {
        let left = self.of.entry(batch).or_insert(self.per_batch);
        *left = left.saturating_sub(rows);
    }
}

impl Wish {
    pub(super) fn new(want: &Want) -> Self {
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
pub(super) struct Found {
    pub(super) partition: Partition,
    pub(super) seconds: i64,
    pub(super) micros: i64,
    pub(super) suppressions: Option<[u8; 8]>,
    pub(super) any_suppressed: bool,
    pub(super) batches: HashMap<BatchId, BatchRecord>,
    pub(super) ranges: HashMap<u64, Range>,
    /// Per wish and rank: batches and their due ranges.
    pub(super) due: Vec<Vec<(BatchId, Vec<u64>)>>,
}

/// A part of a range that is to be taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pick {
    /// Which of the partitions found.
    pub(super) of: usize,
    pub(super) id: u64,
    pub(super) rows: usize,
    pub(super) wish: usize,
}

impl Inner {
    // ---- look ---------------------------------------------------------------------------

    pub(super) async fn look(&self, wishes: &[Wish], now: Timestamp) -> Result<Vec<Found>> {
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
    pub(super) fn plan(&self, found: &[Found], wishes: &[Wish]) -> Vec<Pick> {
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
