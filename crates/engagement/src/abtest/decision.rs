//! What is sent to the rest.

use super::posterior::{Count, Posterior};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// What is done when no variant is good enough for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fallback {
    /// The variant with the highest rate.
    #[default]
    Leader,
    /// The first variant.
    First,
    /// Every variant goes on with its share.
    Split,
    /// Nothing is sent until a person decides.
    Hold,
}

impl Fallback {
    /// The name in the contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::First => "first",
            Self::Split => "split",
            Self::Hold => "hold",
        }
    }
}

impl std::str::FromStr for Fallback {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Leader, Self::First, Self::Split, Self::Hold]
            .into_iter()
            .find(|known| known.as_str() == text)
            .ok_or("is none of leader, first, split, hold")
    }
}

/// How it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "&'static str", try_from = "String")]
pub enum Decision {
    /// The best with the confidence that was asked for.
    Confident,
    /// A tie at the top, or nothing to decide on: the first variant.
    None,
    /// Not certain, and the fallback says so.
    Fallback(Fallback),
}

impl Decision {
    /// The name in the contract.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confident => "confident",
            Self::None => "none",
            Self::Fallback(fallback) => fallback.as_str(),
        }
    }
}

impl From<Decision> for &'static str {
    fn from(decision: Decision) -> Self {
        decision.as_str()
    }
}

impl TryFrom<String> for Decision {
    type Error = &'static str;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        match name.as_str() {
            "confident" => Ok(Self::Confident),
            "none" => Ok(Self::None),
            fallback => fallback.parse().map(Self::Fallback),
        }
    }
}

/// A decision with what it was made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Decided {
    /// How.
    pub decision: Decision,
    /// The variant that the rest gets, by its place; `None` for `split` and `hold`.
    pub variant: Option<usize>,
    /// What was believed of each variant.
    pub posterior: Posterior,
}

/// The confidence that is asked for when the caller says nothing: 1 − 0.05 / variants, so that
/// among equal variants one is called the best in at most one test of twenty.
pub fn default_confidence(variants: usize) -> f64 {
    1.0 - 0.05 / variants.max(1) as f64
}

/// Decides a test.
///
/// `vetoed` names the variants that broke a guardrail: they count in the posterior, and are never
/// chosen. A variant without trials is no candidate either. `sound` is false when the sample-ratio
/// check says that the variants did not get the shares that they should have: what such counts say
/// is not believed with confidence, whatever they say.
pub fn decide(
    counts: &[Count],
    vetoed: &[bool],
    sound: bool,
    min_confidence: f64,
    fallback: Fallback,
) -> Decided {
    let posterior = Posterior::of(counts);
    let is_vetoed = |variant: usize| vetoed.get(variant).copied().unwrap_or(false);
    let allowed: Vec<usize> = (0..counts.len()).filter(|&v| !is_vetoed(v)).collect();
    let first = allowed.first().copied().unwrap_or(0);
    let of = |variant: usize| counts.get(variant).copied().unwrap_or_default();
    let measured: Vec<usize> = allowed
        .iter()
        .copied()
        .filter(|&v| of(v).trials > 0)
        .collect();
    let best = measured
        .iter()
        .copied()
        .max_by(|&a, &b| of(a).cmp_rate(of(b)));
    let (decision, variant) = match best {
        Some(best) if has_news(counts) && !is_tie(best, &measured, counts) => {
            let sure = posterior
                .p_best
                .get(best)
                .is_some_and(|&p| p >= min_confidence);
            match fallback {
                _ if sure && sound && measured.len() > 1 => (Decision::Confident, Some(best)),
                Fallback::Leader => (Decision::Fallback(fallback), Some(best)),
                Fallback::First => (Decision::Fallback(fallback), Some(first)),
                Fallback::Split | Fallback::Hold => (Decision::Fallback(fallback), None),
            }
        }
        Some(_) | None => (Decision::None, Some(first)),
    };
    Decided {
        decision,
        variant,
        posterior,
    }
}

/// Whether anybody did anything, in at least two variants that could be compared.
fn has_news(counts: &[Count]) -> bool {
    let comparable = counts.iter().filter(|count| count.trials > 0).count() > 1;
    comparable && counts.iter().any(|count| count.successes > 0)
}

fn is_tie(best: usize, measured: &[usize], counts: &[Count]) -> bool {
    let of = |variant: usize| counts.get(variant).copied().unwrap_or_default();
    measured
        .iter()
        .any(|&other| other != best && of(other).cmp_rate(of(best)) == Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(pairs: &[(u64, u64)]) -> Vec<Count> {
        let count = |&(trials, successes)| Count { trials, successes };
        pairs.iter().map(count).collect()
    }

    fn decided(pairs: &[(u64, u64)], fallback: Fallback) -> (&'static str, Option<usize>) {
        let all = counts(pairs);
        let decided = decide(&all, &[], true, default_confidence(all.len()), fallback);
        (decided.decision.as_str(), decided.variant)
    }

    #[test]
    fn the_rule_of_the_contract() {
        use Fallback::{First, Hold, Leader, Split};
        for (pairs, fallback, decision, variant) in [
            (&[(1000, 20), (1000, 60)][..], Leader, "confident", Some(1)),
            (&[(1000, 60), (1000, 20)], Hold, "confident", Some(0)),
            (&[(1000, 20), (1000, 22)], Leader, "leader", Some(1)),
            (&[(1000, 20), (1000, 22)], First, "first", Some(0)),
            (&[(1000, 20), (1000, 22)], Split, "split", None),
            (&[(1000, 20), (1000, 22)], Hold, "hold", None),
            // A tie at the top, whatever is below; and equal rates of unequal sizes.
            (&[(1000, 22), (1000, 22)], Hold, "none", Some(0)),
            (
                &[(1000, 1), (1000, 40), (1000, 40)],
                Leader,
                "none",
                Some(0),
            ),
            (&[(1000, 10), (2000, 20)], Split, "none", Some(0)),
            // Nothing to decide on.
            (&[(1000, 0), (1000, 0)], Hold, "none", Some(0)),
            (&[(0, 0), (0, 0)], Leader, "none", Some(0)),
            (&[(0, 0), (1000, 500)], Leader, "none", Some(0)),
            // A tie below the top is none of our business.
            (
                &[(1000, 10), (1000, 10), (1000, 60)],
                Leader,
                "confident",
                Some(2),
            ),
        ] {
            assert_eq!(decided(pairs, fallback), (decision, variant), "{pairs:?}");
        }
    }

    #[test]
    fn a_vetoed_variant_is_not_chosen() {
        let all = counts(&[(1000, 20), (1000, 60), (1000, 25)]);
        let decided = |vetoed: [bool; 3], fallback| {
            let decided = decide(&all, &vetoed, true, 0.98, fallback);
            (decided.decision.as_str(), decided.variant)
        };
        let veto_best = [false, true, false];
        assert_eq!(decided(veto_best, Fallback::Leader), ("leader", Some(2)));
        let veto_two = [true, true, false];
        assert_eq!(decided(veto_two, Fallback::First), ("first", Some(2)));
        assert_eq!(decided([true; 3], Fallback::Leader), ("none", Some(0)));
    }

    #[test]
    fn counts_of_a_broken_split_are_not_believed() {
        let all = counts(&[(1000, 20), (1000, 60)]);
        let decided = decide(&all, &[], false, 0.975, Fallback::Leader);
        assert_eq!(
            (decided.decision.as_str(), decided.variant),
            ("leader", Some(1))
        );
    }

    #[test]
    fn the_default_confidence_is_the_contracts() {
        assert!((default_confidence(2) - 0.975).abs() < 1e-12);
        assert!((default_confidence(8) - 0.993_75).abs() < 1e-12);
    }

    #[test]
    fn fallbacks_have_the_names_of_the_contract() {
        for name in ["leader", "first", "split", "hold"] {
            assert_eq!(name.parse::<Fallback>().map(Fallback::as_str), Ok(name));
        }
        assert!("Leader".parse::<Fallback>().is_err());
    }

    proptest! {
        /// The order of the variants changes nothing but the name of the chosen.
        #[test]
        fn the_decision_is_the_same_in_another_order(
            pairs in prop::collection::vec((1_u64..5000, 0_u64..5000), 2..=5)
        ) {
            let pairs: Vec<_> = pairs.iter().map(|&(n, s)| (n, s.min(n))).collect();
            let reversed: Vec<_> = pairs.iter().rev().copied().collect();
            let (decision, variant) = decided(&pairs, Fallback::Leader);
            let (mirrored, mirror) = decided(&reversed, Fallback::Leader);
            prop_assert_eq!(decision, mirrored);
            if decision != "none" {
                prop_assert_eq!(variant, mirror.map(|v| pairs.len() - 1 - v));
            }
        }
    }
}
