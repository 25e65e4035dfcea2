//! A bounded map of what was asked for last. Must not hold anything that can change.

use hashlink::LinkedHashMap;
use std::hash::Hash;
use std::sync::Mutex;

/// Keeps the values that were asked for last, up to a weight in all.
#[derive(Debug)]
pub(crate) struct Recent<K, T> {
    limit: usize,
    weight: usize,
    /// With their weights; the one asked for last is the last.
    entries: LinkedHashMap<K, (usize, T)>,
}

impl<K: Eq + Hash, T: Clone> Recent<K, T> {
    /// `limit` in what [`Recent::keep`] weighs by: bytes, rows, or entries of weight 1.
    pub(crate) fn new(limit: usize) -> Mutex<Self> {
        Mutex::new(Self {
            limit,
            weight: 0,
            entries: LinkedHashMap::new(),
        })
    }

    pub(crate) fn find(&mut self, key: &K) -> Option<T> {
        let (_, value) = self.entries.to_back(key)?;
        Some(value.clone())
    }

    pub(crate) fn forget(&mut self, key: &K) {
        if let Some((weight, _)) = self.entries.remove(key) {
            self.weight -= weight;
        }
    }

    /// Keeps a value. What weighs more than the limit is alone.
    pub(crate) fn keep(&mut self, key: K, value: T, weight: usize) {
        self.forget(&key);
        while self.weight + weight > self.limit
            && let Some((_, (gone, _))) = self.entries.pop_front()
        {
            self.weight -= gone;
        }
        self.weight += weight;
        self.entries.insert(key, (weight, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recent_goes_first() {
        let recent = Recent::new(2);
        let mut recent = recent.lock().unwrap();
        recent.keep(1, 'a', 1);
        recent.keep(2, 'b', 1);
        assert_eq!(recent.find(&1), Some('a'));
        recent.keep(3, 'c', 1);
        assert_eq!(
            (recent.find(&1), recent.find(&2), recent.find(&3)),
            (Some('a'), None, Some('c'))
        );
    }

    #[test]
    fn what_is_heavy_takes_the_place_of_many() {
        let recent = Recent::new(10);
        let mut recent = recent.lock().unwrap();
        for key in 0..10 {
            recent.keep(key, key, 1);
        }
        recent.keep(10, 10, 8);
        assert_eq!(
            (recent.find(&7), recent.find(&8), recent.find(&9)),
            (None, Some(8), Some(9))
        );
        // Kept again, it weighs what it weighs now.
        recent.keep(10, 10, 1);
        recent.keep(11, 11, 7);
        assert_eq!((recent.find(&8), recent.find(&11)), (Some(8), Some(11)));
        recent.keep(12, 12, 11);
        assert_eq!((recent.find(&11), recent.find(&12)), (None, Some(12)));
        recent.forget(&12);
        assert_eq!((recent.weight, recent.find(&12)), (0, None));
    }
}
