//! Counting at equal age.
//!
//! Who got the mail an hour ago had an hour to click. An MTA throttles by destination, so without
//! care the variant that leaves first looks better. Here only recipients that have reached a
//! certain age count, and of what they did only what they did within that age.

use super::{Count, VARIANTS};
use model::Timestamp;
use std::time::Duration;

/// One recipient of a test that could do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// The place of its variant.
    pub variant: u8,
    /// When its age begins: the delivery, for click-to-open the opening.
    pub since: Timestamp,
    /// When a person first did it (clicked, opened …).
    pub human_at: Option<Timestamp>,
    /// When anybody did it, machines included.
    pub any_at: Option<Timestamp>,
}

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The age at which all are compared.
    pub age: Duration,
    /// What people did, for each variant; `trials` are those of that age.
    pub human: Vec<Count>,
    /// What people and machines did.
    pub any: Vec<Count>,
    /// Recipients too young to count, for each variant.
    pub censored: Vec<u64>,
}

impl Measured {
    /// The share of those who did it where no person did, over all variants: how much of an open
    /// rate is machines.
    pub fn machine_share(&self) -> f64 {
        let sum = |counts: &[Count]| counts.iter().map(|count| count.successes).sum::<u64>();
        let (any, human) = (sum(&self.any), sum(&self.human));
        if any == 0 {
            0.0
        } else {
            any.saturating_sub(human) as f64 / any as f64
        }
    }
}

/// How many of each variant's recipients must have reached the age of comparison, of 10.
const OLD_ENOUGH: usize = 9;

/// Counts what happened up to `now`, for tests of `variants` variants and a waiting time of `wait`.
///
/// The age of comparison is the highest that nine of ten recipients of every variant have reached,
/// and at most `wait`: normally `wait` itself, less if a destination was slow. A few stragglers
/// are left out and do not spoil it for all. Observations of variants that there are not are
/// passed over.
pub fn measure(
    observations: &[Observation],
    variants: usize,
    now: Timestamp,
    wait: Duration,
) -> Measured {
    let variants = variants.min(*VARIANTS.end());
    let age_of = |seen: &Observation| now.since(seen.since);
    let mut age = wait;
    for variant in 0..variants {
        let own = observations
            .iter()
            .filter(|seen| usize::from(seen.variant) == variant);
        let mut ages: Vec<Duration> = own.map(age_of).collect();
        let young = ages.len() - (ages.len() * OLD_ENOUGH).div_ceil(10);
        if young < ages.len() {
            age = age.min(*ages.select_nth_unstable(young).1);
        }
    }
    let mut measured = Measured {
        age,
        human: vec![Count::default(); variants],
        any: vec![Count::default(); variants],
        censored: vec![0; variants],
    };
    for seen in observations {
        let variant = usize::from(seen.variant);
        if variant >= variants {
            continue;
        }
        if age_of(seen) < age {
            measured.censored[variant] += 1;
            continue;
        }
        let counted =
            |at: Option<Timestamp>| at.is_some_and(|at| at <= now && at.since(seen.since) <= age);
        for (count, did) in [
            (&mut measured.human[variant], counted(seen.human_at)),
            (&mut measured.any[variant], counted(seen.any_at)),
        ] {
            count.trials += 1;
            count.successes += u64::from(did);
        }
    }
    measured
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: i64 = 3_600_000;

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_millis(hours * HOUR)
    }

    fn seen(variant: u8, delivered: i64, human: Option<i64>, any: Option<i64>) -> Observation {
        Observation {
            variant,
            since: at(delivered),
            human_at: human.map(at),
            any_at: any.map(at),
        }
    }

    fn pairs(counts: &[Count]) -> Vec<(u64, u64)> {
        counts
            .iter()
            .map(|count| (count.trials, count.successes))
            .collect()
    }

    /// B left three hours later. Both are clicked at the same age by the same share.
    #[test]
    fn the_variant_that_left_first_has_no_start() {
        let mut all = Vec::new();
        for person in 0..100 {
            all.push(seen(0, 0, (person % 4 == 0).then_some(3), None));
            all.push(seen(1, 3, (person % 4 == 0).then_some(6), None));
        }
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let measured = measure(&all, 2, at(4), hours(4));
        assert_eq!(measured.age, hours(1));
        assert_eq!(pairs(&measured.human), [(100, 0), (100, 0)]);
        let later = measure(&all, 2, at(7), hours(4));
        assert_eq!(later.age, hours(4));
        assert_eq!(pairs(&later.human), [(100, 25), (100, 25)]);
    }

    #[test]
    fn stragglers_are_left_out_and_machines_are_told_apart() {
        let mut all: Vec<_> = (0..18).map(|_| seen(0, 0, None, Some(1))).collect();
        all.push(seen(0, 0, Some(2), Some(1)));
        all.push(seen(0, 3, Some(3), Some(3)));
        all.push(seen(1, 0, Some(5), Some(5)));
        all.push(seen(7, 0, Some(1), Some(1)));
        let measured = measure(&all, 2, at(4), Duration::from_secs(4 * 3600));
        assert_eq!(measured.age, Duration::from_secs(4 * 3600));
        assert_eq!(measured.censored, [1, 0]);
        // What happens after the decision was made is not counted.
        assert_eq!(pairs(&measured.human), [(19, 1), (1, 0)]);
        assert_eq!(pairs(&measured.any), [(19, 19), (1, 0)]);
        assert!((measured.machine_share() - 18.0 / 19.0).abs() < 1e-12);
        assert!(measure(&[], 2, at(4), Duration::ZERO).machine_share() < 1e-12);
    }

    proptest! {
        #[test]
        fn everybody_counts_once(
            rows in prop::collection::vec((0_u8..3, 0_i64..9, prop::option::of(0_i64..9)), 0..60),
            now in 0_i64..9,
        ) {
            let all: Vec<_> = rows.iter().map(|&(v, d, e)| seen(v, d, e, e)).collect();
            let measured = measure(&all, 2, at(now), Duration::from_secs(7200));
            let trials: u64 = measured.human.iter().map(|count| count.trials).sum();
            let censored: u64 = measured.censored.iter().sum();
            let of_two = all.iter().filter(|seen| seen.variant < 2).count() as u64;
            prop_assert_eq!(trials + censored, of_two);
            for variant in 0..2 {
                let own = all.iter().filter(|seen| usize::from(seen.variant) == variant).count() as u64;
                prop_assert!(measured.human[variant].trials * 10 >= own * 9);
            }
        }
    }
}
