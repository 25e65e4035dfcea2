//! The messages that wait for one domain, and the ranges that they were leased with.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use model::{BatchId, Domain, Place};
use store::{BatchHead, RangeRef, WINDOW};

use super::job::{Item, Lease};
use crate::resolve::Route;
use crate::shaping::Destination;

/// A message that waits.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) item: Arc<Item>,
    /// Sessions that broke under it since it was leased.
    pub(super) broken: u8,
}

/// Where a lane's mail goes.
#[derive(Debug)]
pub(super) enum Way {
    /// Nobody has asked yet.
    Unknown,
    /// DNS is asked.
    Asked,
    /// Known until `until`, then asked again before the next connection.
    Known {
        destination: Destination,
        route: Arc<Route>,
        until: Instant,
    },
}

/// The messages for one domain, by range.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) domain: Domain,
    pub(super) way: Way,
    ranges: VecDeque<(RangeRef, VecDeque<Waiting>)>,
    len: usize,
}

impl Lane {
    pub(super) fn new(domain: Domain) -> Self {
        Self {
            domain,
            way: Way::Unknown,
            ranges: VecDeque::new(),
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds behind the others of its range.
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.of_range(waiting.item.range, false).push_back(waiting);
        self.len += 1;
    }

    /// Puts back what was taken: it goes first again.
    pub(super) fn put_back(&mut self, waiting: Waiting) {
        self.of_range(waiting.item.range, true).push_front(waiting);
        self.len += 1;
    }

    fn of_range(&mut self, range: RangeRef, first: bool) -> &mut VecDeque<Waiting> {
        let found = self.ranges.iter().position(|(of, _)| *of == range);
        let at = match found {
            Some(at) if !first => at,
            Some(_) | None => {
                let entry = found
                    .and_then(|at| self.ranges.remove(at))
                    .unwrap_or((range, VecDeque::new()));
                if first {
                    self.ranges.push_front(entry);
                    0
                } else {
                    self.ranges.push_back(entry);
                    self.ranges.len() - 1
                }
            }
        };
        &mut self.ranges[at].1
    }

    /// Takes the next message of a batch that `may_go` lets through; its ranges take turns.
    pub(super) fn take(
        &mut self,
        batch: BatchId,
        mut may_go: impl FnMut(&Item) -> bool,
    ) -> Option<Waiting> {
        let goes = |(_, waiting): &(RangeRef, VecDeque<Waiting>)| {
            let first = waiting.front();
            first.is_some_and(|first| first.item.batch.id == batch && may_go(&first.item))
        };
        let at = self.ranges.iter().position(goes)?;
        let (range, mut waiting) = self.ranges.remove(at)?;
        let taken = waiting.pop_front();
        if !waiting.is_empty() {
            self.ranges.push_back((range, waiting));
        }
        self.len -= usize::from(taken.is_some());
        taken
    }

    /// Whether [`Self::take`] would give something.
    pub(super) fn has(&self, batch: BatchId, mut may_go: impl FnMut(&Item) -> bool) -> bool {
        self.first_of_ranges()
            .any(|first| first.item.batch.id == batch && may_go(&first.item))
    }

    /// Whether anything of a batch waits here.
    pub(super) fn has_batch(&self, batch: BatchId) -> bool {
        self.has(batch, |_| true)
    }

    /// The batches of what waits, by range, and how much it is.
    pub(super) fn batches(&self) -> impl Iterator<Item = (&Arc<BatchHead>, usize)> {
        self.ranges.iter().filter_map(|(_, waiting)| {
            let first = waiting.front()?;
            Some((&first.item.batch, waiting.len()))
        })
    }

    /// How much of a batch waits here.
    pub(super) fn waiting_of(&self, batch: BatchId) -> u64 {
        let of_batch = self.batches().filter(|(head, _)| head.id == batch);
        of_batch.map(|(_, len)| len as u64).sum()
    }

    fn first_of_ranges(&self) -> impl Iterator<Item = &Waiting> {
        self.ranges
            .iter()
            .filter_map(|(_, waiting)| waiting.front())
    }

    /// Takes whatever is first, whether it may go or not.
    pub(super) fn take_first(&mut self) -> Option<Waiting> {
        let (_, waiting) = self.ranges.front_mut()?;
        let taken = waiting.pop_front();
        if waiting.is_empty() {
            self.ranges.pop_front();
        }
        self.len -= usize::from(taken.is_some());
        taken
    }

    /// The first of each range, and how many wait with it.
    pub(super) fn fronts(&self) -> impl Iterator<Item = (&Item, usize)> {
        self.ranges
            .iter()
            .filter_map(|(_, waiting)| Some((&*waiting.front()?.item, waiting.len())))
    }

    /// The message that `is_it`, and how many of this lane go before it: ranges take turns.
    pub(super) fn place_of(&self, is_it: impl Fn(&Waiting) -> bool) -> Option<(usize, &Item)> {
        let (range, at, item) = self
            .ranges
            .iter()
            .enumerate()
            .find_map(|(range, (_, of))| {
                let at = of.iter().position(&is_it)?;
                Some((range, at, &*of.get(at)?.item))
            })?;
        let before = self.ranges.iter().enumerate().map(|(other, (_, of))| {
            let turns = if other < range { at + 1 } else { at };
            turns.min(of.len())
        });
        Some((before.sum(), item))
    }

    /// Takes out everything that was leased with `range`.
    pub(super) fn withdraw(&mut self, range: RangeRef) -> Vec<Waiting> {
        let Some(at) = self.ranges.iter().position(|(of, _)| *of == range) else {
            return Vec::new();
        };
        let withdrawn: Vec<_> = self
            .ranges
            .remove(at)
            .map(|(_, waiting)| waiting.into())
            .unwrap_or_default();
        self.len -= withdrawn.len();
        withdrawn
    }

    /// Takes out everything.
    pub(super) fn drain(&mut self) -> Vec<Waiting> {
        self.len = 0;
        self.ranges
            .drain(..)
            .flat_map(|(_, waiting)| waiting)
            .collect()
    }
}

/// How a range ends before all of it has reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Handed back when nothing of it is out any more, to be due at this moment or at once.
    Return(Option<Instant>),
    /// Another node has it now.
    Lost,
}

/// A leased range.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) batch: BatchId,
    /// Its recipients have several domains.
    pub(super) mixed: bool,
    /// Items with an offset below this may be started.
    pub(super) window: u32,
    /// How many items it was leased with.
    pub(super) len: u32,
    /// How many have reported since the window moved.
    pub(super) reported: u32,
    pub(super) lease: Lease,
    pub(super) leased_at: Instant,
    /// Domains of its recipients.
    pub(super) domains: Vec<Box<str>>,
    /// In lanes.
    pub(super) waiting: usize,
    /// Handed to connections.
    pub(super) out: usize,
    pub(super) ending: Option<Ending>,
    /// For a return: who moves to the queue of their own domain.
    pub(super) requeue: Vec<(Place, Box<str>)>,
}

impl Range {
    /// Notes that an item has reported. True when shipping is to move the window now: at half of
    /// what it lets through, so that it moves before it is used up.
    pub(super) fn reported(&mut self) -> bool {
        self.reported += 1;
        self.window < self.len && self.reported.is_multiple_of(WINDOW / 2)
    }

    /// Items with an offset below `window` may be started from now on.
    pub(super) fn move_window(&mut self, window: u32) {
        self.window = self.window.max(window);
        self.reported = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::{head, item, range_ref};
    use service::clock::{Clock as _, SystemClock};
    use std::time::Duration;

    #[test]
    fn a_window_is_to_move_when_half_of_it_has_reported() {
        let now = SystemClock.instant();
        let mut range = Range {
            batch: item(1).batch.id,
            mixed: false,
            window: WINDOW,
            len: 100,
            reported: 0,
            lease: Lease::new(now, Duration::from_secs(45)),
            leased_at: now,
            domains: Vec::new(),
            waiting: 100,
            out: 0,
            ending: None,
            requeue: Vec::new(),
        };
        let asked = |range: &mut Range, reports: u32| {
            (1..=reports)
                .filter(|_| range.reported())
                .collect::<Vec<_>>()
        };
        assert_eq!(asked(&mut range, WINDOW), [WINDOW / 2, WINDOW]);
        range.move_window(90);
        assert_eq!(asked(&mut range, WINDOW / 2), [WINDOW / 2]);
        range.move_window(100);
        assert!(asked(&mut range, WINDOW).is_empty(), "all may be started");
    }

    fn waiting(range: u64, offset: u32) -> Waiting {
        let item = Item {
            range: range_ref(range),
            offset,
            ..item(1)
        };
        Waiting {
            item: Arc::new(item),
            broken: 0,
        }
    }

    fn lane(of: &[(u64, u32)]) -> Lane {
        let mut lane = Lane::new("x.example".parse().expect("a domain"));
        of.iter()
            .for_each(|&(range, offset)| lane.push(waiting(range, offset)));
        lane
    }

    fn order(lane: &mut Lane, batch: u8) -> Vec<(u64, u32)> {
        let batch = head(batch).id;
        std::iter::from_fn(|| lane.take(batch, |_| true))
            .map(|w| (w.item.range.id, w.item.offset))
            .collect()
    }

    #[test]
    fn ranges_take_turns_and_keep_their_order() {
        let mut lane = lane(&[(1, 0), (1, 1), (1, 2), (2, 0)]);
        let first = lane.take(head(1).id, |_| true).expect("one");
        lane.put_back(first);
        assert_eq!(order(&mut lane, 1), [(1, 0), (2, 0), (1, 1), (1, 2)]);
        assert!(lane.is_empty());
    }

    #[test]
    fn a_batch_is_taken_by_itself() {
        let mut lane = lane(&[(1, 0), (2, 0)]);
        let other = Item {
            batch: Arc::new(head(2)),
            range: range_ref(4),
            ..item(1)
        };
        lane.push(Waiting {
            item: Arc::new(other),
            broken: 0,
        });
        assert_eq!(order(&mut lane, 2), [(4, 0)]);
        assert!(!lane.has_batch(head(2).id) && lane.has_batch(head(1).id));
        assert_eq!(lane.batches().map(|(_, rows)| rows).sum::<usize>(), 2);
    }

    #[test]
    fn a_message_knows_how_many_go_first() {
        let mut lane = lane(&[(1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2)]);
        let all: Vec<_> = (0..6)
            .filter_map(|_| {
                let next = lane.take(head(1).id, |_| true)?;
                Some((next.item.range, next.item.offset))
            })
            .collect();
        let lane = self::lane(&[(1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2)]);
        for (turn, (range, offset)) in all.into_iter().enumerate() {
            let place = lane.place_of(|w| w.item.range == range && w.item.offset == offset);
            let (ahead, item) = place.expect("it waits");
            assert_eq!((ahead, item.range, item.offset), (turn, range, offset));
        }
        assert!(lane.place_of(|_| false).is_none());
        assert_eq!(lane.fronts().map(|(_, count)| count).sum::<usize>(), 6);
    }

    #[test]
    fn what_may_not_go_blocks_its_range_only() {
        let mut lane = lane(&[(1, 0), (1, 1), (2, 0)]);
        let batch = head(1).id;
        assert_eq!(
            lane.take(batch, |item| item.range.id == 2)
                .map(|w| w.item.range.id),
            Some(2)
        );
        assert!(lane.take(batch, |item| item.offset == 1).is_none());
        assert_eq!(lane.withdraw(range_ref(1)).len(), 2);
        assert_eq!((lane.len, lane.ranges.len()), (0, 0));
    }
}
