//! Identifiers. Sixteen-byte ids are ULIDs: 48 bits of milliseconds, 80 of chance, written as 26
//! characters of Crockford's base 32, so that they sort by time as text and as bytes.

use crate::Timestamp;
use std::fmt;
use std::str::FromStr;

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// Why a text is not an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 26 characters of Crockford's base 32.
    #[error("not a 26 character id")]
    Malformed,
    /// A message id without `.INDEX`, or with an index that is not a number below 2^32.
    #[error("not of the form BATCH.INDEX")]
    Index,
}

/// What each byte stands for, in either case; [`NO_DIGIT`]: for nothing.
const DIGITS: [u8; 256] = digits();
const NO_DIGIT: u8 = u8::MAX;

const fn digits() -> [u8; 256] {
    let mut all = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 32 {
        let letter = ALPHABET[value as usize];
        all[letter as usize] = value;
        all[letter.to_ascii_lowercase() as usize] = value;
        value += 1;
    }
    all
}

/// In pieces that fit a register: an event has five ids.
fn encode(value: u128) -> [u8; 26] {
    const LOW: u128 = (1 << 60) - 1;
    let mut text = [0_u8; 26];
    let (top, rest) = text.split_at_mut(2);
    let (middle, low) = rest.split_at_mut(12);
    let pieces = [value >> 120, value >> 60 & LOW, value & LOW];
    for (to, piece) in [top, middle, low].into_iter().zip(pieces) {
        let mut piece = u64::try_from(piece).unwrap_or(0);
        for byte in to.iter_mut().rev() {
            *byte = ALPHABET[usize::try_from(piece & 31).unwrap_or(0)];
            piece >>= 5;
        }
    }
    text
}

fn digit(byte: u8) -> Option<u128> {
    let digit = DIGITS[usize::from(byte)];
    (digit != NO_DIGIT).then_some(u128::from(digit))
}

fn decode(text: &str) -> Result<u128, IdError> {
    // The first character carries three bits: beyond `7` the value would not fit.
    if text.len() != 26 || text.as_bytes()[0] > b'7' {
        return Err(IdError::Malformed);
    }
    text.bytes().try_fold(0_u128, |value, byte| {
        Ok(value << 5 | digit(byte).ok_or(IdError::Malformed)?)
    })
}

macro_rules! ulid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// Makes an id from the time (milliseconds since 1970) and 80 bits of `random`.
            pub fn new(now: Timestamp, random: u128) -> Self {
                let millis = u128::from(now.millis().unsigned_abs()) & ((1 << 48) - 1);
                Self(millis << 80 | random & ((1 << 80) - 1))
            }

            /// The sixteen bytes, most significant first.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }

            /// The id with these bytes, most significant first.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(u128::from_be_bytes(bytes))
            }

            /// When the id was made, by its maker's clock.
            pub fn created_at(self) -> Timestamp {
                Timestamp::from_millis(i64::try_from(self.0 >> 80).unwrap_or(i64::MAX))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(std::str::from_utf8(&encode(self.0)).unwrap_or_default())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                decode(text).map(Self)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() {
                    // At once: a general serializer looks at every piece that it is shown.
                    to.serialize_str(std::str::from_utf8(&encode(self.0)).unwrap_or_default())
                } else {
                    self.0.serialize(to)
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    u128::deserialize(from).map(Self)
                }
            }
        }
    };
}

ulid! {
    /// A submitted batch.
    BatchId
}
ulid! {
    /// A journal, and with it the node that writes it: a node's identity lives in its journal.
    JournalId
}
ulid! {
    /// A webhook.
    WebhookId
}
ulid! {
    /// One browser, as its cookie names it.
    VisitorId
}

/// One message: the recipient at `index` (order of arrival, from 0) of a batch. Written
/// `BATCH.INDEX`, so that the caller can compute it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// The batch.
    pub batch: BatchId,
    /// The place of the recipient in order of arrival.
    pub index: u32,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.batch, self.index)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MessageId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let (batch, index) = text.split_once('.').ok_or(IdError::Index)?;
        // One spelling per id: `01`, `+1` and `1` must not name the same message.
        let canonical =
            index == "0" || (!index.starts_with('0') && index.bytes().all(|b| b.is_ascii_digit()));
        if !canonical {
            return Err(IdError::Index);
        }
        Ok(Self {
            batch: batch.parse()?,
            index: index.parse().map_err(|_| IdError::Index)?,
        })
    }
}

impl serde::Serialize for MessageId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() {
            to.collect_str(self)
        } else {
            (self.batch, self.index).serialize(to)
        }
    }
}

impl<'de> serde::Deserialize<'de> for MessageId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if from.is_human_readable() {
            let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            let (batch, index) = <(BatchId, u32)>::deserialize(from)?;
            Ok(Self { batch, index })
        }
    }
}

/// A partition of the store: what must change together lives in one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Partition(pub u8);

impl Partition {
    /// The partition, of `count` (1 to 256), in which everything about this recipient lives.
    pub fn of(account: &str, normalised_address: &str, count: u16) -> Self {
        let hash = partition_hash(account, normalised_address);
        Self(u8::try_from(hash % u64::from(count.clamp(1, 256))).unwrap_or(0))
    }
}

/// The stable hash behind partitions and the address index of a lot (FNV-1a, 64 bit, with a
/// final avalanche). It is stored: it never changes.
pub fn partition_hash(account: &str, normalised_address: &str) -> u64 {
    let bytes = account
        .bytes()
        .chain(std::iter::once(0))
        .chain(normalised_address.bytes());
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ hash >> 33
}

/// The number of a lot within its batch: the partition in the top byte, a running number below.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct LotNumber(pub u32);

impl LotNumber {
    /// The lot `running` (below 2^24) of `partition`; `None` when a batch has too many lots.
    pub fn new(partition: Partition, running: u32) -> Option<Self> {
        (running < 1 << 24).then_some(Self(u32::from(partition.0) << 24 | running))
    }

    /// The partition that every row of the lot belongs to.
    pub fn partition(self) -> Partition {
        Partition(self.0.to_be_bytes()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_id_sorts_by_time_and_reads_back() {
        let id = BatchId::new(Timestamp::from_millis(1_763_769_600_123), 42);
        let text = id.to_string();
        assert_eq!(text.len(), 26);
        assert!(text.starts_with("01KA"), "{text}");
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(id.created_at().millis(), 1_763_769_600_123);
        assert_eq!(BatchId::from_bytes(id.to_bytes()), id);
        assert!(BatchId::new(Timestamp::from_millis(2_000_000_000_000), 0).to_string() > text);
    }

    #[test]
    fn a_message_has_one_spelling() {
        let id = MessageId {
            batch: BatchId::new(Timestamp::from_millis(1), 7),
            index: 41,
        };
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in [
            "",
            "x",
            "01.1",
            &format!("{}.", id.batch),
            &format!("{}.041", id.batch),
            &format!("{}.+1", id.batch),
            &format!("{}.4294967296", id.batch),
        ] {
            assert!(bad.parse::<MessageId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_read_back(bytes: [u8; 16]) {
            let id = JournalId::from_bytes(bytes);
            prop_assert_eq!(id.to_string().parse::<JournalId>(), Ok(id));
            prop_assert_eq!(id.to_string().to_lowercase().parse::<JournalId>(), Ok(id));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _parsed = text.parse::<MessageId>();
        }

        #[test]
        fn a_lot_number_keeps_its_partition(p: u8, running in 0_u32..1 << 24) {
            prop_assert_eq!(LotNumber::new(Partition(p), running).map(LotNumber::partition), Some(Partition(p)));
        }
    }

    /// The example of the ULID specification, and both ends.
    #[test]
    fn an_id_is_written_as_a_ulid() {
        let example = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
        let id: BatchId = example.parse().expect("an id");
        assert_eq!(id.to_string(), example);
        assert_eq!(id.created_at(), Timestamp::from_millis(1_469_922_850_259));
        let last = BatchId::from_bytes([0xff; 16]);
        assert_eq!(last.to_string(), format!("7{}", "Z".repeat(25)));
        assert_eq!(BatchId::from_bytes([0; 16]).to_string(), "0".repeat(26));
        for not_a_letter in ["I", "L", "O", "U", "u", "-", "\u{7f}"] {
            let text = example.replace('V', not_a_letter);
            assert_eq!(text.parse::<BatchId>(), Err(IdError::Malformed), "{text}");
        }
    }

    #[test]
    fn the_partition_hash_is_frozen() {
        assert_eq!(
            partition_hash("default", "a@x.example"),
            18_351_524_859_408_679_162
        );
    }
}
