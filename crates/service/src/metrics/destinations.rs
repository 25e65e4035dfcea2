//! The bounded label `destination`: the busiest names, then `other`.
//!
//! Names come from strangers' DNS, so their number is not ours. The first [`MOST_DESTINATIONS`] get
//! a label at once; of the rest the busiest are remembered, and one that is clearly busier than the
//! quietest labelled one takes its place at the next election.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// How many destinations have a label of their own.
pub const MOST_DESTINATIONS: usize = 100;
/// How many unlabelled names are remembered; beyond, the newcomer inherits the quietest one's place.
const MOST_CANDIDATES: usize = 400;
/// A candidate must be this many times busier, so that two of a size do not swap for ever.
const CLEARLY_BUSIER: u64 = 4;
/// Of so many uses of names without a label one is counted, for all of them: which is quietest takes a
/// look at all, and each message asks for its label.
const COUNTED: u64 = 8;
/// 2^64 by the golden ratio: its multiples are spread evenly, in step with nobody's turns.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const OTHER: &str = "other";

/// A value of the label `destination`. Resolve it each time: an election may take it away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination(Arc<str>);

impl Destination {
    /// The value.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it shares the label `other`, for which a limit would mean nothing.
    pub fn is_other(&self) -> bool {
        &*self.0 == OTHER
    }
}

/// Which destinations have a label.
#[derive(Debug)]
pub struct Destinations {
    labelled: RwLock<HashMap<Arc<str>, AtomicU64>>,
    candidates: Mutex<HashMap<Box<str>, u64>>,
    /// Uses of names without a label.
    unlabelled: AtomicU64,
    other: Destination,
}

impl Default for Destinations {
    fn default() -> Self {
        Self {
            labelled: RwLock::default(),
            candidates: Mutex::default(),
            unlabelled: AtomicU64::new(0),
            other: Destination(OTHER.into()),
        }
    }
}

impl Destinations {
    /// The label of a destination; counts one use of it.
    pub fn label(&self, name: &str) -> Destination {
        if let Some(label) = self.known(name) {
            return label;
        }
        let mut labelled = self
            .labelled
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been faster between the two locks.
        let known = labelled.get_key_value(name).map(|(label, _)| label.clone());
        if let Some(label) = known {
            return Destination(label);
        }
        if labelled.len() < MOST_DESTINATIONS && name != OTHER {
            let label: Arc<str> = name.into();
            labelled.insert(label.clone(), AtomicU64::new(1));
            return Destination(label);
        }
        drop(labelled);
        self.count_candidate(name);
        self.other.clone()
    }

    fn known(&self, name: &str) -> Option<Destination> {
        let labelled = self.labelled.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((label, uses)) = labelled.get_key_value(name) {
            uses.fetch_add(1, Ordering::Relaxed);
            return Some(Destination(label.clone()));
        }
        // Without a free label there is nothing to write, so the write lock stays untouched.
        if labelled.len() < MOST_DESTINATIONS {
            return None;
        }
        drop(labelled);
        self.count_candidate(name);
        Some(self.other.clone())
    }

    /// Counts with the space-saving algorithm: memory is bounded, and a name that is truly busy
    /// cannot be pushed out by any number of quiet ones.
    fn count_candidate(&self, name: &str) {
        let nth = self.unlabelled.fetch_add(1, Ordering::Relaxed);
        if nth.wrapping_mul(SPREAD) > u64::MAX / COUNTED {
            return;
        }
        let mut candidates = self
            .candidates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(uses) = candidates.get_mut(name) {
            *uses += COUNTED;
            return;
        }
        let mut inherited = 0;
        if candidates.len() >= MOST_CANDIDATES {
            let quietest = candidates.iter().min_by_key(|(_, uses)| **uses);
            if let Some((quietest, uses)) = quietest.map(|(name, uses)| (name.clone(), *uses)) {
                candidates.remove(&quietest);
                inherited = uses;
            }
        }
        candidates.insert(name.into(), inherited + COUNTED);
    }

    /// Gives labels to candidates that are clearly busier than the quietest labelled destinations,
    /// and returns the names that lost theirs. Uses count half at the next election.
    pub(super) fn elect(&self) -> Vec<Arc<str>> {
        let mut labelled = self
            .labelled
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut candidates = self
            .candidates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut lost = Vec::new();
        let mut busiest: Vec<(u64, Box<str>)> = candidates
            .iter()
            .map(|(name, uses)| (*uses, name.clone()))
            .collect();
        busiest.sort_by(|a, b| b.cmp(a));
        for (uses, name) in busiest {
            let quietest = labelled
                .iter()
                .map(|(label, uses)| (uses.load(Ordering::Relaxed), label.clone()))
                .min();
            match quietest {
                Some((least, label)) if uses > CLEARLY_BUSIER * least.max(COUNTED) => {
                    labelled.remove(&label);
                    labelled.insert(name.clone().into(), AtomicU64::new(uses));
                    candidates.remove(&name);
                    lost.push(label);
                }
                _ => break,
            }
        }
        for uses in labelled.values_mut() {
            *uses.get_mut() /= 2;
        }
        candidates.retain(|_, uses| {
            *uses /= 2;
            *uses > 0
        });
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_hundred_have_labels_and_the_rest_are_other() {
        let destinations = Destinations::default();
        for number in 0..150 {
            let name = format!("d{number}.example");
            let label = destinations.label(&name);
            assert_eq!(label.is_other(), number >= MOST_DESTINATIONS, "{number}");
            assert_eq!(
                label.as_str() == name,
                number < MOST_DESTINATIONS,
                "{number}"
            );
        }
        assert_eq!(
            destinations.elect(),
            Vec::<Arc<str>>::new(),
            "all are as busy"
        );
    }

    #[test]
    fn a_busy_newcomer_takes_the_place_of_a_quiet_one() {
        let destinations = Destinations::default();
        for number in 0..MOST_DESTINATIONS {
            for _ in 0..=number {
                destinations.label(&format!("d{number}.example"));
            }
        }
        for _ in 0..50 {
            assert!(destinations.label("busy.example").is_other());
        }
        assert_eq!(destinations.elect(), ["d0.example".into()]);
        assert_eq!(destinations.label("busy.example").as_str(), "busy.example");
        assert!(destinations.label("d0.example").is_other());
    }

    #[test]
    fn strangers_cannot_fill_memory_nor_hide_a_busy_name() {
        let destinations = Destinations::default();
        for number in 0..MOST_DESTINATIONS {
            destinations.label(&format!("d{number}.example"));
        }
        for number in 0..20_000 {
            destinations.label(&format!("once{number}.example"));
            destinations.label("busy.example");
        }
        let remembered = destinations.candidates.lock().expect("not poisoned").len();
        assert!(remembered <= MOST_CANDIDATES, "{remembered}");
        destinations.elect();
        assert!(!destinations.label("busy.example").is_other());
    }

    #[test]
    fn a_destination_called_other_gets_no_label_of_its_own() {
        assert!(Destinations::default().label(OTHER).is_other());
    }
}
