//! The messages that wait for one domain, and the ranges that they were leased with.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use model::{BatchId, Domain, Place};
use store::{BatchHead, RangeRef, WINDOW};

use super::job::{Item, Lease};
use crate::resolve::Route;
use crate::shaping::Destination;

/// Messages of one range, and of one domain, that go in a row where several wait: what became of them
/// is recorded lot by lot, so that few lots at a time are cheaper than many. Fewer than those after
/// which shipping is hurried on ([`Range::reported`]).
pub(super) const IN_A_ROW: usize = WINDOW as usize / 2 - 1;

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
    ranges: VecDeque<OfRange>,
    len: usize,
}

/// What was leased with one range.
#[derive(Debug)]
struct OfRange {
    id: RangeRef,
    waiting: VecDeque<Waiting>,
    /// How many went since its turn began.
    in_a_row: usize,
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

    fn of_range(&mut self, id: RangeRef, first: bool) -> &mut VecDeque<Waiting> {
        let found = self.ranges.iter().position(|of| of.id == id);
        let at = match found {
            Some(at) if !first => at,
            Some(_) | None => {
                let known = found.and_then(|at| self.ranges.remove(at));
                let of = known.unwrap_or_else(|| OfRange {
                    id,
                    waiting: VecDeque::new(),
                    in_a_row: 0,
                });
                if first {
                    self.ranges.push_front(of);
                    0
                } else {
                    self.ranges.push_back(of);
                    self.ranges.len() - 1
                }
            }
        };
        &mut self.ranges[at].waiting
    }

    /// Takes the next message of a batch that `may_go` lets through; its ranges take turns, with
    /// [`IN_A_ROW`] each.
    pub(super) fn take(
        &mut self,
        batch: BatchId,
        mut may_go: impl FnMut(&Item) -> bool,
    ) -> Option<Waiting> {
        let goes = |of: &OfRange| {
            let first = of.waiting.front();
            first.is_some_and(|first| first.item.batch.id == batch && may_go(&first.item))
        };
        let at = self.ranges.iter().position(goes)?;
        let of = self.ranges.get_mut(at)?;
        let taken = of.waiting.pop_front();
        of.in_a_row += 1;
        if of.waiting.is_empty() {
            self.ranges.remove(at);
        } else if of.in_a_row >= IN_A_ROW {
            of.in_a_row = 0;
            let turn_over = self.ranges.remove(at);
            self.ranges.extend(turn_over);
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
        self.ranges.iter().filter_map(|of| {
            let first = of.waiting.front()?;
            Some((&first.item.batch, of.waiting.len()))
        })
    }

    /// How much of a batch waits here.
    pub(super) fn waiting_of(&self, batch: BatchId) -> u64 {
        let of_batch = self.batches().filter(|(head, _)| head.id == batch);
        of_batch.map(|(_, len)| len as u64).sum()
    }

    fn first_of_ranges(&self) -> impl Iterator<Item = &Waiting> {
        self.ranges.iter().filter_map(|of| of.waiting.front())
    }

    /// Takes whatever is first, whether it may go or not.
    pub(super) fn take_first(&mut self) -> Option<Waiting> {
        let of = self.ranges.front_mut()?;
        let taken = of.waiting.pop_front();
        if of.waiting.is_empty() {
            self.ranges.pop_front();
        }
        self.len -= usize::from(taken.is_some());
        taken
    }

    /// The first of each range, and how many wait with it.
    pub(super) fn fronts<'a>(&'a self) -> impl Iterator<Item = (&'a Item, usize)> {
        let of_each = |of: &'a OfRange| Some((&*of.waiting.front()?.item, of.waiting.len()));
        self.ranges.iter().filter_map(of_each)
    }

    /// The message that `is_it`, and how many of this lane go before it: ranges take turns.
    pub(super) fn place_of(&self, is_it: impl Fn(&Waiting) -> bool) -> Option<(usize, &Item)> {
        let (own, at) = self
            .ranges
            .iter()
            .enumerate()
            .find_map(|(own, of)| Some((own, of.waiting.iter().position(&is_it)?)))?;
        let of = self.ranges.get(own)?;
        let turns = (at + of.in_a_row) / IN_A_ROW;
        let others = self
            .ranges
            .iter()
            .enumerate()
            .filter(|(nth, _)| *nth != own);
        let before = others.map(|(nth, of)| {
            let turns = if nth < own { turns + 1 } else { turns };
            let gone = (turns * IN_A_ROW).saturating_sub(of.in_a_row);
            gone.min(of.waiting.len())
        });
        Some((at + before.sum::<usize>(), &*of.waiting.get(at)?.item))
    }

    /// Takes out everything that was leased with `range`.
    pub(super) fn withdraw(&mut self, range: RangeRef) -> Vec<Waiting> {
        let Some(at) = self.ranges.iter().position(|of| of.id == range) else {
            return Vec::new();
        };
        let withdrawn = self.ranges.remove(at).map(|of| of.waiting);
        let withdrawn = Vec::from(withdrawn.unwrap_or_default());
        self.len -= withdrawn.len();
        withdrawn
    }

    /// Takes out everything.
    pub(super) fn drain(&mut self) -> Vec<Waiting> {
        self.len = 0;
        self.ranges.drain(..).flat_map(|of| of.waiting).collect()
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
    /// When the store was asked for it.
    pub(super) leased_at: Instant,
    /// When the store's answer came.
    pub(super) learned_at: Instant,
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
            learned_at: now,
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

    /// So many of a range.
    fn of(range: u64, count: usize) -> impl Iterator<Item = (u64, u32)> {
        (0..).take(count).map(move |offset| (range, offset))
    }

    #[test]
    fn ranges_take_turns_and_keep_their_order() {
        let mixed: Vec<_> = of(1, IN_A_ROW + 2).chain(of(2, 2)).collect();
        let mut lane = lane(&mixed);
        let first = lane.take(head(1).id, |_| true).expect("one");
        lane.put_back(first);
        // Whoever was put back went twice.
        let (turn, rest) = mixed.split_at(IN_A_ROW - 1);
        let (rest, second) = rest.split_at(3);
        let expected = [turn, second, rest].concat();
        assert_eq!(order(&mut lane, 1), expected);
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
        let counts = [
            (1, 2 * IN_A_ROW + 1),
            (2, 1),
            (3, IN_A_ROW),
            (4, IN_A_ROW + 5),
        ];
        let mixed: Vec<_> = counts
            .into_iter()
            .flat_map(|(id, count)| of(id, count))
            .collect();
        // In the middle of the first turn, too.
        for gone in [0, 3] {
            let [mut lane, mut other] = [lane(&mixed), lane(&mixed)];
            for lane in [&mut lane, &mut other] {
                (0..gone).for_each(|_| drop(lane.take(head(1).id, |_| true)));
            }
            for (turn, (range, offset)) in order(&mut other, 1).into_iter().enumerate() {
                let place = lane.place_of(|w| (w.item.range.id, w.item.offset) == (range, offset));
                let (ahead, item) = place.expect("it waits");
                assert_eq!((ahead, item.range.id, item.offset), (turn, range, offset));
            }
            assert!(lane.place_of(|_| false).is_none());
            let waiting = lane.fronts().map(|(_, count)| count).sum::<usize>();
            assert_eq!(waiting, mixed.len() - gone);
        }
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
