//! The newest written records, in memory, so that shipping what has just happened reads no file.

use crate::records::{Pending, Record};
use model::Seq;
use std::collections::VecDeque;

/// What an entry costs beside its payload, roughly.
const ENTRY_BYTES: usize = size_of::<Record>() + crate::format::FRAME_BYTES;

#[derive(Debug)]
pub(crate) struct Tail {
    records: VecDeque<Record>,
    bytes: usize,
    max_bytes: usize,
    /// Every written record from this number on is here.
    from: Seq,
}

impl Tail {
    pub(crate) fn new(from: Seq, max_bytes: usize) -> Self {
        Self {
            records: VecDeque::new(),
            bytes: 0,
            max_bytes,
            from,
        }
    }

    /// Takes records that were just written. They are in order, but for those of a chain that had
    /// to wait for room while another was written.
    pub(crate) fn extend(&mut self, records: impl Iterator<Item = Record>) {
        let last = self.records.back().map_or(0, |record| record.seq);
        let old = self.records.len();
        for record in records {
            self.bytes += record.payload.len() + ENTRY_BYTES;
            self.records.push_back(record);
        }
        let sorted = self
            .records
            .range(old..)
            .try_fold(last, |last, record| {
                (record.seq > last).then_some(record.seq)
            })
            .is_some();
        if !sorted {
            self.records
                .make_contiguous()
                .sort_unstable_by_key(|record| record.seq);
        }
        while self.bytes > self.max_bytes && self.pop() {}
    }

    pub(crate) fn drop_through(&mut self, seq: Seq) {
        while self.records.front().is_some_and(|record| record.seq <= seq) && self.pop() {}
    }

    fn pop(&mut self) -> bool {
        let Some(record) = self.records.pop_front() else {
            return false;
        };
        self.bytes -= record.payload.len() + ENTRY_BYTES;
        self.from = self.from.max(record.seq + 1);
        true
    }

    /// Up to `max` records after `after` and through `through`, if all of them are here.
    pub(crate) fn read(
        &self,
        after: Seq,
        through: Seq,
        max: usize,
        max_bytes: usize,
    ) -> Option<Pending> {
        if after.saturating_add(1) < self.from {
            return None;
        }
        let start = self.records.partition_point(|record| record.seq <= after);
        let end = self.records.partition_point(|record| record.seq <= through);
        let mut pending = Pending {
            records: Vec::new(),
            through: through.max(after),
        };
        let mut bytes = 0;
        for record in self.records.range(start..end.max(start)) {
            if pending.records.len() >= max || bytes >= max_bytes {
                pending.through = pending.records.last().map_or(after, |record| record.seq);
                break;
            }
            bytes += record.payload.len();
            pending.records.push(record.clone());
        }
        Some(pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RecordKind;
    use bytes::Bytes;

    fn record(seq: Seq) -> Record {
        Record {
            seq,
            kind: RecordKind::Open,
            payload: Bytes::from(vec![0; 100]),
        }
    }

    fn seqs(pending: Option<Pending>) -> Option<(Vec<Seq>, Seq)> {
        let pending = pending?;
        Some((
            pending.records.iter().map(|record| record.seq).collect(),
            pending.through,
        ))
    }

    #[test]
    fn says_when_it_no_longer_has_everything() {
        let mut tail = Tail::new(1, 3 * (100 + ENTRY_BYTES));
        tail.extend([1, 2, 3].map(record).into_iter());
        assert_eq!(seqs(tail.read(0, 3, 9, 9999)), Some((vec![1, 2, 3], 3)));
        assert_eq!(seqs(tail.read(1, 2, 9, 9999)), Some((vec![2], 2)));
        assert_eq!(seqs(tail.read(0, 3, 2, 9999)), Some((vec![1, 2], 2)));
        assert_eq!(seqs(tail.read(0, 3, 9, 150)), Some((vec![1, 2], 2)));
        tail.extend([6].map(record).into_iter());
        assert_eq!(seqs(tail.read(0, 9, 9, 9999)), None);
        assert_eq!(seqs(tail.read(1, 9, 9, 9999)), Some((vec![2, 3, 6], 9)));
        assert_eq!(seqs(tail.read(3, 5, 9, 9999)), Some((vec![], 5)));
        tail.drop_through(6);
        assert_eq!(seqs(tail.read(6, 9, 9, 9999)), Some((vec![], 9)));
        assert_eq!(seqs(tail.read(5, 9, 9, 9999)), None);
    }

    #[test]
    fn late_records_find_their_place() {
        let mut tail = Tail::new(1, 9999);
        tail.extend([2, 5].map(record).into_iter());
        tail.extend([1, 3, 4].map(record).into_iter());
        assert_eq!(
            seqs(tail.read(0, 9, 9, 9999)),
            Some((vec![1, 2, 3, 4, 5], 9))
        );
    }
}
