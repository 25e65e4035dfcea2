//! Which recipients of the leased ranges have reported, hence how far each window goes.

use std::collections::{HashMap, HashSet};

use model::{BatchId, Place};
use store::{RangeRef, WINDOW};

/// The leased ranges; see the module. Pure.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    ranges: HashMap<RangeRef, Entry>,
    /// The range of a recipient, and which of its items that is.
    places: HashMap<(BatchId, Place), (RangeRef, usize)>,
    /// Ranges of which somebody reported since the last shipment.
    moved: HashSet<RangeRef>,
}

#[derive(Debug)]
struct Entry {
    batch: BatchId,
    /// By offset: the place, and whether it has reported.
    items: Vec<(u32, Place, bool)>,
    /// Items before this one have all reported.
    low: usize,
    window: u32,
}

/// What a shipment tells of the leases.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Moves {
    pub(super) windows: Vec<(RangeRef, u32)>,
    pub(super) finished: Vec<RangeRef>,
}

impl Ledger {
    pub(super) fn register(
        &mut self,
        range: RangeRef,
        batch: BatchId,
        places: Vec<(Place, u32)>,
        window: u32,
    ) {
        let mut items: Vec<_> = places
            .into_iter()
            .map(|(place, offset)| (offset, place, false))
            .collect();
        items.sort_unstable();
        self.places
            .extend(items.iter().enumerate().map(|(at, (_, place, _))| {
                let known = (range, at);
                ((batch, *place), known)
            }));
        self.ranges.insert(
            range,
            Entry {
                batch,
                items,
                low: 0,
                window,
            },
        );
    }

    /// Notes that a recipient has reported; the fact goes with the next shipment.
    pub(super) fn report(&mut self, batch: BatchId, place: Place) {
        let Some((range, at)) = self.places.get(&(batch, place)) else {
            return;
        };
        let entry = self.ranges.get_mut(range);
        if let Some((.., reported)) = entry.and_then(|entry| entry.items.get_mut(*at)) {
            *reported = true;
            self.moved.insert(*range);
        }
    }

    /// What has moved by the reports so far.
    pub(super) fn moves(&mut self) -> Moves {
        let mut moves = Moves::default();
        for range in &self.moved {
            let Some(entry) = self.ranges.get_mut(range) else {
                continue;
            };
            while entry
                .items
                .get(entry.low)
                .is_some_and(|(_, _, reported)| *reported)
            {
                entry.low += 1;
            }
            match (entry.items.get(entry.low), entry.items.last()) {
                (Some((first, ..)), Some((last, ..))) => {
                    let window = first.saturating_add(WINDOW);
                    // Once all of it may be started the store need not hear more.
                    if window > entry.window && entry.window <= *last {
                        entry.window = window;
                        moves.windows.push((*range, window));
                    }
                }
                (None, _) | (_, None) => moves.finished.push(*range),
            }
        }
        moves
    }

    /// The shipment that carried [`Self::moves`] has arrived.
    pub(super) fn arrived(&mut self, moves: &Moves) {
        self.moved.clear();
        for range in &moves.finished {
            self.forget(*range);
        }
    }

    /// The store may have forgotten how far windows went: all of them are told again.
    pub(super) fn repeat(&mut self) {
        for (id, entry) in &mut self.ranges {
            entry.window = 0;
            self.moved.insert(*id);
        }
    }

    /// The range is another's, or was handed back.
    pub(super) fn forget(&mut self, range: RangeRef) {
        let Some(entry) = self.ranges.remove(&range) else {
            return;
        };
        for (_, place, _) in entry.items {
            let key = (entry.batch, place);
            if self.places.get(&key).is_some_and(|(of, _)| *of == range) {
                self.places.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::range_ref;
    use model::LotNumber;
    use proptest::prelude::*;

    const BATCH: BatchId = BatchId::from_bytes([1; 16]);

    fn place(position: u16) -> Place {
        Place {
            lot: LotNumber(0),
            position,
        }
    }

    fn ledger(items: u16) -> Ledger {
        let mut ledger = Ledger::default();
        let places = (0..items).map(|at| (place(at), u32::from(at))).collect();
        ledger.register(range_ref(1), BATCH, places, WINDOW);
        ledger
    }

    #[test]
    fn a_window_follows_the_first_that_has_not_reported() {
        let mut ledger = ledger(200);
        for at in [0, 1, 2, 5] {
            ledger.report(BATCH, place(at));
        }
        let moves = ledger.moves();
        assert_eq!(
            moves,
            Moves {
                windows: vec![(range_ref(1), 3 + WINDOW)],
                finished: vec![]
            }
        );
        ledger.arrived(&moves);
        ledger.report(BATCH, place(6));
        assert_eq!(ledger.moves(), Moves::default());
    }

    #[test]
    fn a_range_is_finished_when_all_have_reported() {
        let mut ledger = ledger(3);
        [2, 0, 1]
            .iter()
            .for_each(|at| ledger.report(BATCH, place(*at)));
        let moves = ledger.moves();
        assert_eq!(
            moves,
            Moves {
                windows: vec![],
                finished: vec![range_ref(1)]
            }
        );
        // Until it has arrived, it is told again.
        assert_eq!(ledger.moves(), moves);
        ledger.arrived(&moves);
        assert!(ledger.ranges.is_empty() && ledger.places.is_empty());
        ledger.report(BATCH, place(0));
        assert_eq!(ledger.moves(), Moves::default());
    }

    proptest! {
        #[test]
        fn a_window_never_goes_back_nor_beyond_its_width(order in Just((0..300_u16).collect::<Vec<_>>()).prop_shuffle(), step in 1_usize..40) {
            let mut ledger = ledger(300);
            let mut reported = std::collections::BTreeSet::new();
            let mut window = WINDOW;
            let mut finished = false;
            for some in order.chunks(step) {
                for &at in some {
                    ledger.report(BATCH, place(at));
                    reported.insert(u32::from(at));
                }
                let moves = ledger.moves();
                let first_open = (0..300).find(|at| !reported.contains(at)).unwrap_or(300);
                for (_, moved) in &moves.windows {
                    prop_assert!(*moved > window && *moved <= first_open + WINDOW);
                    window = *moved;
                }
                finished |= !moves.finished.is_empty();
                ledger.arrived(&moves);
            }
            prop_assert!(finished);
        }
    }
}
