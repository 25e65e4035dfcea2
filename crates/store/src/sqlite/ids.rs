//! Integer keys made of several numbers, so that what belongs together stands together.
//!
//! Must not touch the database.

use model::{LotNumber, Partition, Timestamp};

/// The number of a batch in this file, from 1; below 2^31.
pub(super) type BatchNo = i64;
/// `batch << 32 | lot number`.
pub(super) type LotId = i64;

/// Indices in one piece of the index map.
pub(super) const MAP_CHUNK: u32 = 1024;
/// Bytes of one entry in it: lot number and position.
pub(super) const MAP_ENTRY: usize = 6;

pub(super) fn lot_id(batch: BatchNo, lot: LotNumber) -> LotId {
    batch << 32 | i64::from(lot.0)
}

/// The batch and the lot number.
pub(super) fn split(lot: LotId) -> (BatchNo, LotNumber) {
    let number = u32::try_from(lot & 0xffff_ffff).unwrap_or(u32::MAX);
    (lot >> 32, LotNumber(number))
}

/// All lots of a batch: the first and the last possible.
pub(super) fn lot_range(batch: BatchNo) -> (LotId, LotId) {
    (batch << 32, batch << 32 | 0xffff_ffff)
}

pub(super) fn counter_id(batch: BatchNo, partition: Partition) -> i64 {
    batch << 8 | i64::from(partition.0)
}

pub(super) fn counter_range(batch: BatchNo) -> (i64, i64) {
    (batch << 8, batch << 8 | 0xff)
}

/// Some lot id, perhaps of no lot, in the batch and partition of a counter.
pub(super) fn any_lot(counter: i64) -> LotId {
    (counter >> 8) << 32 | (counter & 0xff) << 24
}

pub(super) fn map_id(batch: BatchNo, index: u32) -> i64 {
    batch << 32 | i64::from(index / MAP_CHUNK)
}

pub(super) const fn time(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

/// A number for a column; beyond what one holds, the largest.
pub(super) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A number from a column; never below zero.
pub(super) fn nat(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_read_back(batch in 1_i64..1 << 31, lot: u32) {
            let id = lot_id(batch, LotNumber(lot));
            prop_assert_eq!(split(id), (batch, LotNumber(lot)));
            let (first, last) = lot_range(batch);
            prop_assert!(first <= id && id <= last);
            let counter = counter_id(batch, LotNumber(lot).partition());
            let (of, number) = split(any_lot(counter));
            prop_assert_eq!(counter_id(of, number.partition()), counter);
        }
    }
}
