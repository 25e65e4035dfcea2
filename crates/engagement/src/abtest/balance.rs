//! Whether a test can be believed, and whether a variant does harm.

use super::special::chi_square_tail;
use serde::{Deserialize, Serialize};

/// Below this probability the split is broken: one alarm in a thousand sound tests.
pub const SRM_ALARM: f64 = 0.001;

/// The probability that recipients split so unevenly by chance (χ² goodness of fit), when
/// `assigned[i]` of them were to be in proportion to `shares[i]`. 1 when there is nothing to test.
///
/// Count what was assigned, not what was delivered: a subject line can be refused more often, and
/// that is a result.
pub fn sample_ratio(assigned: &[u64], shares: &[f64]) -> f64 {
    let total = assigned.iter().sum::<u64>() as f64;
    let whole: f64 = shares.iter().sum();
    let pairs: Vec<_> = assigned
        .iter()
        .zip(shares)
        .filter(|(_, share)| **share > 0.0)
        .map(|(count, share)| (*count as f64, total * share / whole))
        .collect();
    let impossible = assigned
        .iter()
        .zip(shares)
        .any(|(count, share)| *share <= 0.0 && *count > 0);
    if impossible {
        return 0.0;
    }
    let square = |&(count, expected): &(f64, f64)| (count - expected).powi(2) / expected;
    let Some(freedom) = u32::try_from(pairs.len())
        .ok()
        .and_then(|n| n.checked_sub(1))
    else {
        return 1.0;
    };
    if freedom == 0 || total == 0.0 {
        return 1.0;
    }
    chi_square_tail(freedom, pairs.iter().map(square).sum())
}

/// The guardrails of a batch, applied to each variant by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Share of refused among delivered and refused.
    pub bounce_rate: f64,
    /// Share of complaints among delivered.
    pub complaint_rate: f64,
    /// Before so many are delivered or refused, nothing is judged.
    pub min_delivered: u64,
}

/// Which guardrail a variant broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Breach {
    /// Too many refusals.
    BounceRate,
    /// Too many complaints.
    ComplaintRate,
}

/// Says which guardrail is broken, if any.
pub fn breach(limits: &Limits, delivered: u64, bounced: u64, complained: u64) -> Option<Breach> {
    let ended = delivered.saturating_add(bounced);
    if ended == 0 || ended < limits.min_delivered {
        return None;
    }
    if bounced as f64 / ended as f64 > limits.bounce_rate {
        return Some(Breach::BounceRate);
    }
    let complaints = complained as f64 / delivered.max(1) as f64;
    (complaints > limits.complaint_rate).then_some(Breach::ComplaintRate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uneven_split_raises_the_alarm() {
        assert!(sample_ratio(&[5000, 5000], &[0.5, 0.5]) > 0.99);
        assert!(sample_ratio(&[4950, 5050], &[0.1, 0.1]) > 0.3);
        assert!(sample_ratio(&[4700, 5300], &[0.5, 0.5]) < SRM_ALARM);
        assert!(sample_ratio(&[1000, 2000, 1000], &[1.0, 2.0, 1.0]) > 0.99);
        assert!(sample_ratio(&[1000, 1000, 1000], &[1.0, 2.0, 1.0]) < SRM_ALARM);
        // The probability of the book: χ² = 3.841 at one degree of freedom is 5 %.
        let p = sample_ratio(&[10_000 + 139, 10_000 - 139], &[1.0, 1.0]);
        assert!((p - 0.0493).abs() < 0.0005, "{p}");
    }

    #[test]
    fn nothing_to_test_is_no_alarm() {
        for (assigned, shares) in [
            (&[][..], &[][..]),
            (&[7], &[1.0]),
            (&[0, 0], &[0.5, 0.5]),
            (&[3, 0], &[1.0, 0.0]),
        ] {
            assert!(sample_ratio(assigned, shares) >= 1.0, "{assigned:?}");
        }
        assert!(sample_ratio(&[3, 1], &[1.0, 0.0]) < SRM_ALARM);
    }

    #[test]
    fn guardrails_hold_from_a_number_on() {
        let limits = Limits {
            bounce_rate: 0.05,
            complaint_rate: 0.003,
            min_delivered: 500,
        };
        assert_eq!(breach(&limits, 100, 300, 90), None);
        assert_eq!(breach(&limits, 475, 25, 1), None);
        assert_eq!(breach(&limits, 474, 26, 0), Some(Breach::BounceRate));
        assert_eq!(breach(&limits, 1000, 0, 3), None);
        assert_eq!(breach(&limits, 1000, 0, 4), Some(Breach::ComplaintRate));
        assert_eq!(breach(&limits, 0, 0, 0), None);
    }
}
