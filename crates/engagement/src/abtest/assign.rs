//! Who gets which variant.
//!
//! The order in which recipients are dealt is a keyed hash of the address: nobody can choose or
//! foresee it, and every node that deals the same recipients deals them the same. They are dealt
//! stratum by stratum (a stratum is a destination), so that each variant has its share of each
//! mailbox provider with its scanners, prefetchers and delays, and so that variants alternate in
//! the order of sending.

use aws_lc_rs::hmac;
use std::collections::BTreeMap;

/// 2⁶⁴ divided by the golden ratio: steps of this size spread over the circle as evenly as can be,
/// however many there are.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// What a recipient is in for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arm {
    /// In the test, with the variant of this place.
    Variant(u8),
    /// Held back until it is decided.
    Rest,
}

/// Shares that do not make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SharesError {
    /// Not 2 to 8 variants.
    #[error("a test has 2 to 8 variants")]
    Variants,
    /// Not more than 0 and at most 1.
    #[error("the part of the test is more than 0 and at most 1")]
    Fraction,
    /// A weight that is negative or not a number, or none above 0.
    #[error("weights are 0 or more, and one of them is more")]
    Weights,
}

/// How recipients are divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// The upper end of each variant's part of the circle; beyond the last is the rest.
    ends: Vec<u64>,
    /// Nothing is held back.
    all: bool,
}

impl Shares {
    /// `fraction` of the recipients are in the test, in equal parts.
    ///
    /// # Errors
    /// [`SharesError`].
    pub fn even(variants: usize, fraction: f64) -> Result<Self, SharesError> {
        Self::weighted(&vec![1.0; variants], fraction)
    }

    /// `fraction` of the recipients are in the test, in parts of these proportions.
    ///
    /// # Errors
    /// [`SharesError`].
    pub fn weighted(weights: &[f64], fraction: f64) -> Result<Self, SharesError> {
        if !super::VARIANTS.contains(&weights.len()) {
            return Err(SharesError::Variants);
        }
        if !(fraction > 0.0 && fraction <= 1.0) {
            return Err(SharesError::Fraction);
        }
        let total: f64 = weights.iter().sum();
        let sound = weights
            .iter()
            .all(|weight| weight.is_finite() && *weight >= 0.0);
        if !sound || !total.is_finite() || total <= 0.0 {
            return Err(SharesError::Weights);
        }
        let mut sum = 0.0;
        let ends = weights.iter().map(|weight| {
            sum += weight;
            on_circle(sum / total * fraction)
        });
        Ok(Self {
            ends: ends.collect(),
            all: fraction >= 1.0,
        })
    }

    fn arm(&self, point: u64) -> Arm {
        let place = self.ends.partition_point(|end| *end <= point);
        // The last variant's end is a little short of the whole circle.
        let place = if self.all {
            place.min(self.ends.len() - 1)
        } else {
            place
        };
        match u8::try_from(place) {
            Ok(variant) if place < self.ends.len() => Arm::Variant(variant),
            _ => Arm::Rest,
        }
    }
}

/// A share of 2⁶⁴, in steps of 2⁻⁵³.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and the share is from 0 to 1"
)]
fn on_circle(share: f64) -> u64 {
    (share * 18_446_744_073_709_551_616.0) as u64
}

/// Deals recipients to variants, the same on every node that has the key.
pub struct Assigner {
    key: hmac::Key,
}

impl std::fmt::Debug for Assigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assigner").finish_non_exhaustive()
    }
}

impl Assigner {
    /// `seed` is drawn once for a test, from a good random source, and kept with it.
    pub fn new(seed: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, seed),
        }
    }

    /// The place of an address in the order of dealing; `address` is normalised already.
    pub fn place(&self, address: &str) -> u64 {
        self.hash(b"address", address.as_bytes())
    }

    fn hash(&self, what: &[u8], bytes: &[u8]) -> u64 {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(what);
        context.update(&[0]);
        context.update(bytes);
        let tag = context.sign();
        let mut first = [0; 8];
        first
            .iter_mut()
            .zip(tag.as_ref())
            .for_each(|(to, from)| *to = *from);
        u64::from_be_bytes(first)
    }

    /// Deals one stratum: the arm of each recipient, in the order given. `places` are the
    /// [`Assigner::place`]s of all of the stratum's recipients in this lot.
    ///
    /// Each recipient gets each arm with the probability of its share; together they get each arm
    /// as often as its share says, give or take two or three. Who is there twice gets the same
    /// twice.
    pub fn deal(&self, places: &[u64], shares: &Shares) -> Vec<Arm> {
        let mut ranks: BTreeMap<u64, u64> = places.iter().map(|place| (*place, 0)).collect();
        for (rank, (_, at)) in (0..).zip(ranks.iter_mut()) {
            *at = rank;
        }
        // Where on the circle dealing starts: another point for each stratum, so that among many
        // small strata no arm is preferred.
        let first = places.iter().min().copied().unwrap_or_default();
        let start = self.hash(b"stratum", &first.to_be_bytes());
        let point = |place: &u64| {
            let rank = ranks.get(place).copied().unwrap_or_default();
            start.wrapping_add(rank.wrapping_mul(GOLDEN))
        };
        places
            .iter()
            .map(|place| shares.arm(point(place)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn places(assigner: &Assigner, count: usize, domain: &str) -> Vec<u64> {
        (0..count)
            .map(|n| assigner.place(&format!("p{n}@{domain}")))
            .collect()
    }

    fn tally(arms: &[Arm], variants: u8) -> Vec<usize> {
        let of = |arm| arms.iter().filter(|a| **a == arm).count();
        (0..variants)
            .map(Arm::Variant)
            .chain([Arm::Rest])
            .map(of)
            .collect()
    }

    #[test]
    fn golden_assignment() {
        // Frozen: a test in flight must survive an upgrade.
        let assigner = Assigner::new(&[7; 32]);
        let shares = Shares::even(3, 0.5).expect("shares");
        let arms = assigner.deal(&places(&assigner, 12, "x.example"), &shares);
        let shown: String = arms
            .iter()
            .map(|arm| match arm {
                Arm::Variant(variant) => char::from(b'A' + variant),
                Arm::Rest => '-',
            })
            .collect();
        assert_eq!(shown, "C--C--BA-BA-");
    }

    #[test]
    fn each_stratum_is_balanced() {
        let assigner = Assigner::new(&[1; 32]);
        for (variants, fraction) in [(2, 1.0), (2, 0.2), (3, 0.5), (8, 0.9), (5, 1.0)] {
            let shares = Shares::even(variants, fraction).expect("shares");
            for size in [10, 100, 500] {
                for stratum in 0..50 {
                    let all = places(&assigner, size, &format!("d{stratum}.example"));
                    let arms = assigner.deal(&all, &shares);
                    let expected = size as f64 * fraction / variants as f64;
                    for count in tally(&arms, 8).into_iter().take(variants) {
                        assert!((count as f64 - expected).abs() < 4.0, "{size} {arms:?}");
                    }
                }
            }
        }
    }

    /// Thousands of domains with one recipient each: the shares hold in the sum, too.
    #[test]
    fn the_long_tail_is_balanced() {
        let assigner = Assigner::new(&[2; 32]);
        let shares = Shares::weighted(&[3.0, 1.0], 0.4).expect("shares");
        let arms: Vec<Arm> = (0..20_000)
            .flat_map(|n| assigner.deal(&places(&assigner, 1, &format!("d{n}.example")), &shares))
            .collect();
        let counts = tally(&arms, 2);
        for (count, expected) in counts.iter().zip([6000_i64, 2000, 12_000]) {
            let count = i64::try_from(*count).expect("small");
            assert!((count - expected).abs() < 300, "{counts:?}");
        }
    }

    #[test]
    fn variants_alternate_in_the_order_of_arrival() {
        let assigner = Assigner::new(&[3; 32]);
        let shares = Shares::even(2, 1.0).expect("shares");
        let arms = assigner.deal(&places(&assigner, 500, "x.example"), &shares);
        // In every stretch of 50 both are there, neither much more often than the other.
        for stretch in arms.chunks(50) {
            let first = tally(stretch, 2)[0];
            assert!((10..=40).contains(&first), "{first}");
        }
    }

    #[test]
    fn shares_are_checked() {
        for (weights, fraction, error) in [
            (&[1.0][..], 0.5, SharesError::Variants),
            (&[1.0; 9], 0.5, SharesError::Variants),
            (&[1.0, 1.0], 0.0, SharesError::Fraction),
            (&[1.0, 1.0], 1.1, SharesError::Fraction),
            (&[1.0, 1.0], f64::NAN, SharesError::Fraction),
            (&[1.0, -1.0], 0.5, SharesError::Weights),
            (&[0.0, 0.0], 0.5, SharesError::Weights),
            (&[f64::INFINITY, 1.0], 0.5, SharesError::Weights),
        ] {
            assert_eq!(
                Shares::weighted(weights, fraction),
                Err(error),
                "{weights:?} {fraction}"
            );
        }
        assert!(!format!("{:?}", Assigner::new(&[9; 32])).contains('9'));
    }

    proptest! {
        /// In any order, on any node, and for who is there twice: the same.
        #[test]
        fn the_assignment_is_the_recipients_own(
            names in prop::collection::vec("[a-e]{1,2}", 1..60),
            variants in 2_usize..=8,
            fraction in 0.01..=1.0_f64,
        ) {
            let shares = Shares::even(variants, fraction).expect("shares");
            let place = |name: &String| Assigner::new(&[5; 32]).place(name);
            let forward: Vec<_> = names.iter().map(place).collect();
            let backward: Vec<_> = forward.iter().rev().copied().collect();
            let dealt = Assigner::new(&[5; 32]).deal(&forward, &shares);
            let mut again = Assigner::new(&[5; 32]).deal(&backward, &shares);
            again.reverse();
            prop_assert_eq!(&dealt, &again);
            let by_name: BTreeMap<_, _> = names.iter().zip(&dealt).collect();
            for (name, arm) in names.iter().zip(&dealt) {
                prop_assert_eq!(by_name[name], arm);
                prop_assert!(fraction < 1.0 || *arm != Arm::Rest);
            }
        }
    }
}
