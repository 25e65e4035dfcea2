//! A small bounded map of what was asked for last. Must not hold anything that can change.

use std::sync::Mutex;

/// Keeps the values that were asked for last. Found by a scan: there are few.
#[derive(Debug)]
pub(crate) struct Recent<K, T> {
    limit: usize,
    clock: u64,
    entries: Vec<(K, u64, T)>,
}

impl<K: PartialEq, T: Clone> Recent<K, T> {
    pub(crate) fn new(limit: usize) -> Mutex<Self> {
        Mutex::new(Self {
            limit,
            clock: 0,
            entries: Vec::with_capacity(limit),
        })
    }

    pub(crate) fn find(&mut self, key: &K) -> Option<T> {
        self.clock += 1;
        let entry = self.entries.iter_mut().find(|(at, ..)| at == key)?;
        entry.1 = self.clock;
        Some(entry.2.clone())
    }

    pub(crate) fn forget(&mut self, key: &K) {
        self.entries.retain(|(at, ..)| at != key);
    }

    pub(crate) fn keep(&mut self, key: K, value: T) {
        if self.entries.len() >= self.limit {
            let oldest = self
                .entries
                .iter()
                .enumerate()
                .min_by_key(|(_, entry)| entry.1);
            if let Some((at, _)) = oldest {
                self.entries.swap_remove(at);
            }
        }
        self.entries.push((key, self.clock, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recent_goes_first() {
        let recent = Recent::new(2);
        let mut recent = recent.lock().unwrap();
        recent.keep(1, 'a');
        recent.keep(2, 'b');
        assert_eq!(recent.find(&1), Some('a'));
        recent.keep(3, 'c');
        assert_eq!(
            (recent.find(&1), recent.find(&2), recent.find(&3)),
            (Some('a'), None, Some('c'))
        );
    }
}
