//! Names of keys and members of indices; `docs/redis.md` lists them with sizes and lifetimes.
//!
//! Everything that changes together has the hash tag of its partition; what never changes after
//! intake has that of its batch. Must not touch the server.

use model::{BatchId, JournalId, LotNumber, Partition, partition_hash};

/// What every key of a partition begins with.
pub(super) fn prefix(p: Partition) -> String {
    format!("hikyaku:{{{}}}:", p.0)
}

/// Partition 0 has what belongs to the store as a whole.
pub(super) const HOME: Partition = Partition(0);

macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) = $format:literal;)*) => {
        $($(#[$doc])* pub(super) fn $name(p: Partition, $($arg: $type),*) -> String {
            format!(concat!("hikyaku:{{{}}}:", $format), p.0, $($arg),*)
        })*
    };
}

keys! {
    /// A lot: hashes and rows. Never changes.
    lot(batch: BatchId, lot: u32) = "l:{}:{}";
    /// The cells of a lot.
    cells(batch: BatchId, lot: u32) = "c:{}:{}";
    /// The facts of a lot.
    facts(batch: BatchId, lot: u32) = "f:{}:{}";
    /// A range.
    range(id: &str) = "w:{}";
    /// What stands in a queue, by rank.
    queue(rank: u8, queue: &str) = "q{}:{}";
    /// The queues in which something stands.
    queues() = "queues";
    /// The ranges of a batch by due time.
    ranges(batch: BatchId) = "bw:{}";
    /// The ranges that a node holds.
    held(node: JournalId) = "h:{}";
    /// A batch; in partition 0 the truth, elsewhere a copy.
    batch(batch: BatchId) = "b:{}";
    /// The counters of a batch.
    counters(batch: BatchId) = "k:{}";
    /// The lots of a batch.
    lots(batch: BatchId) = "bl:{}";
    /// The indices of staged lots, until the commit.
    indices(batch: BatchId) = "si:{}";
    /// The lots whose recipients are in a queue, for finding an address.
    lots_of(queue: &str) = "lq:{}";
    /// How far journals were taken.
    journals() = "j";
    /// The suppressions of an account.
    suppressions(account: &str) = "s:{}";
    /// Hashes of all suppressed addresses.
    suppressed() = "sh";
    /// Changes with every suppression.
    suppressions_version() = "sv";
    /// What people let be kept of them at most.
    consents() = "consent";
    /// The number of the newest event.
    event_counter() = "seq";
    /// The control feed.
    control() = "control";
    /// The number of its newest item.
    control_counter() = "cseq";
    /// All batches by id.
    batches() = "batches";
    /// Those that are not completed.
    open() = "open";
    /// Those that wait for their time.
    scheduled() = "sched";
    /// Those whose copies may be behind.
    unsettled() = "unsettled";
    /// How the parts of an open batch stand.
    parts(batch: BatchId) = "op:{}";
    /// Through which piece of which part an open batch was filed.
    filed(batch: BatchId) = "of:{}";
    /// Those that are not committed, by when something was last staged.
    staged() = "staged";
    /// The store to which the partition belongs.
    generation() = "gen";
    /// The primary that leases know, and until when nothing is leased.
    history() = "hist";
    /// A call that takes effect once.
    call(account: &str, key: &str) = "call:{}\0{}";
    /// When calls may be forgotten.
    calls() = "calls";
    /// Settings that every node agrees on.
    settings() = "settings";
    /// What was fixed when the store was made.
    meta() = "meta";
    /// Destinations that get no mail.
    suspensions() = "susp";
    /// Notes of a kind.
    notes(kind: &str) = "n:{}";
    /// The keys of the notes of a kind, in order.
    notes_index(kind: &str) = "ni:{}";
    /// When notes expire.
    notes_expiry() = "nx";
    /// Who runs a job.
    job(job: &str) = "job:{}";
}

/// The events of a partition (contract, section 5).
pub(super) fn events(p: Partition) -> String {
    format!("hikyaku:events:{{{}}}", p.0)
}

/// What a batch was committed with and never changes: `head`, `content`, `map`.
pub(super) fn of_batch(batch: BatchId, what: &str) -> String {
    format!("hikyaku:{{{batch}}}:{what}")
}

/// The id of a range as it stands in keys and indices.
pub(super) fn range_name(id: u64) -> String {
    format!("{id:016x}")
}

/// Reads [`range_name`].
pub(super) fn read_range_name(name: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(name).ok()?;
    (text.len() == 16)
        .then(|| u64::from_str_radix(text, 16).ok())
        .flatten()
}

/// A moment as eight bytes that sort as it does.
pub(super) fn moment(millis: i64) -> [u8; 8] {
    u64::try_from(millis).unwrap_or(0).to_be_bytes()
}

/// The member of a queue among those in which something stands: by name, then by rank.
pub(super) fn queue_name(rank: u8, queue: &str) -> Vec<u8> {
    format!("{queue}\0{rank}").into_bytes()
}

/// In the count of a member: it is held.
const HELD: u16 = 1 << 15;

/// The member of a range in its queue: by batch, then by the moment from which it may be leased.
pub(super) fn member(batch: BatchId, ready: i64, id: u64, count: u32, held: bool) -> Vec<u8> {
    let mut member = batch.to_string().into_bytes();
    member.extend(moment(ready));
    member.extend(range_name(id).into_bytes());
    let count = u16::try_from(count).unwrap_or(u16::MAX).min(HELD - 1);
    let held = if held { HELD } else { 0 };
    member.extend((count | held).to_be_bytes());
    member
}

/// What the member of a range in its queue says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) batch: BatchId,
    pub(super) ready: i64,
    pub(super) id: u64,
    pub(super) count: u32,
}

/// Reads [`member`].
pub(super) fn read_member(bytes: &[u8]) -> Option<Member> {
    let (batch, rest) = bytes.split_at_checked(26)?;
    let (ready, rest) = rest.split_first_chunk::<8>()?;
    let (id, count) = rest.split_at_checked(16)?;
    Some(Member {
        batch: std::str::from_utf8(batch).ok()?.parse().ok()?,
        ready: i64::try_from(u64::from_be_bytes(*ready)).unwrap_or(i64::MAX),
        id: read_range_name(id)?,
        count: u32::from(u16::from_be_bytes(count.try_into().ok()?) & !HELD),
    })
}

/// The member of a lot among those of its queue.
pub(super) fn lot_member(batch: BatchId, lot: LotNumber) -> Vec<u8> {
    let mut member = batch.to_string().into_bytes();
    member.extend(lot.0.to_be_bytes());
    member
}

/// Reads [`lot_member`].
pub(super) fn read_lot_member(bytes: &[u8]) -> Option<(BatchId, LotNumber)> {
    let (batch, lot) = bytes.split_at_checked(26)?;
    let batch = std::str::from_utf8(batch).ok()?.parse().ok()?;
    Some((batch, LotNumber(u32::from_be_bytes(lot.try_into().ok()?))))
}

/// What stands for an address among the suppressed.
pub(super) fn address_hash(account: &str, email: &str) -> [u8; 8] {
    partition_hash(account, email).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_of_a_partition_share_its_tag() {
        let (p, id) = (Partition(7), BatchId::from_bytes([1; 16]));
        for key in [cells(p, id, 3), queue(p, 1, "x"), events(p), journals(p)] {
            assert!(key.contains("{7}"), "{key}");
        }
        assert_eq!(of_batch(id, "head"), format!("hikyaku:{{{id}}}:head"));
    }

    proptest! {
        #[test]
        fn members_read_back(bytes: [u8; 16], ready in 0..i64::MAX, id: u64, count in 0_u32..1000, held: bool, lot: u32) {
            let batch = BatchId::from_bytes(bytes);
            let read = read_member(&member(batch, ready, id, count, held));
            prop_assert_eq!(read, Some(Member { batch, ready, id, count }));
            let lot = LotNumber(lot);
            prop_assert_eq!(read_lot_member(&lot_member(batch, lot)), Some((batch, lot)));
        }

        #[test]
        fn any_bytes_are_a_member_or_none(bytes: Vec<u8>) {
            let _read = read_member(&bytes);
            let _read = read_lot_member(&bytes);
            let _read = read_range_name(&bytes);
        }
    }
}
