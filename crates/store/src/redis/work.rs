//! Readings of unfinished work: whose it is, when it is due, who holds it.
//!
//! For people who ask why mail does not move; nothing on the way of a message asks this. Must not
//! change anything.

use super::Inner;
use super::record::{Holder, Range};
use crate::{Held, Result, Work, WorkScope};
use model::{BatchId, Timestamp};
use std::collections::BTreeMap;

/// Ranges read at once.
const RANGES: usize = 256;

impl Inner {
    /// Unfinished recipients of a batch by queue, or of a queue by batch; the most first.
    pub(super) async fn work(
        &self,
        scope: WorkScope,
        now: Timestamp,
        limit: u32,
    ) -> Result<Vec<Work>> {
        let mut found: BTreeMap<(BatchId, Box<str>), Work> = BTreeMap::new();
        for p in self.all_partitions() {
            let ids = match &scope {
                WorkScope::Batch(batch) => self.ranges_of(p, *batch).await?,
                WorkScope::Queue(queue) => self.ranges_in(p, std::slice::from_ref(queue)).await?,
            };
            for some in ids.chunks(RANGES) {
                let books = self.books_with(p, now, some).await?;
                for range in some.iter().filter_map(|id| books.range(*id)) {
                    let key = (range.batch, range.queue.clone());
                    if !found.contains_key(&key) {
                        let Some(record) = self.home(range.batch).await? else {
                            continue;
                        };
                        let work = Work {
                            queue: range.queue.clone(),
                            batch: range.batch,
                            state: record.state,
                            release_at: record.release_at,
                            due: 0,
                            later: 0,
                            next_due: None,
                            held: Vec::new(),
                        };
                        found.insert(key.clone(), work);
                    }
                    if let Some(work) = found.get_mut(&key) {
                        add(work, range, now, books.moment);
                    }
                }
            }
        }
        let mut all: Vec<Work> = found.into_values().collect();
        all.sort_by_key(|work| std::cmp::Reverse(total(work)));
        all.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(all)
    }
}

fn total(work: &Work) -> u64 {
    let held = work.held.iter().map(|held| held.recipients);
    work.due + work.later + held.sum::<u64>()
}

fn add(work: &mut Work, range: &Range, now: Timestamp, moment: i64) {
    let count = u64::from(range.count);
    let due_at = Timestamp::from_millis(range.due_at);
    match range.holder {
        Holder::Node(node) if range.is_taken(moment) => {
            let until = Timestamp::from_millis(range.expires);
            match work.held.iter_mut().find(|held| held.node == node) {
                Some(held) => {
                    held.recipients += count;
                    held.until = held.until.max(until);
                }
                None => work.held.push(Held {
                    node,
                    recipients: count,
                    until,
                }),
            }
        }
        // Nobody holds what could not be read; it is looked at again later.
        Holder::PutOff if range.is_taken(moment) => work.later += count,
        Holder::Nobody | Holder::Node(_) | Holder::PutOff if due_at <= now => work.due += count,
        Holder::Nobody | Holder::Node(_) | Holder::PutOff => {
            work.later += count;
            if range.due_at < crate::HELD_BACK {
                work.next_due = Some(work.next_due.map_or(due_at, |next| next.min(due_at)));
            }
        }
    }
}
