//! What is believed of the variants after what was counted.

use serde::{Deserialize, Serialize};

use super::special::{beta_cdf, beta_density, beta_quantile, nodes};

/// What was counted of one variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Count {
    /// Recipients that could do it: those it was delivered to, or for click-to-open those that
    /// opened.
    pub trials: u64,
    /// Recipients that did it, at most `trials`.
    pub successes: u64,
}

impl Count {
    /// Parameters of the Beta distribution.
    fn beta(self) -> (f64, f64) {
        let successes = self.successes.min(self.trials);
        (
            1.0 + successes as f64,
            1.0 + (self.trials - successes) as f64,
        )
    }

    /// The share, or 0 without trials.
    pub fn rate(self) -> f64 {
        if self.trials == 0 {
            0.0
        } else {
            self.successes.min(self.trials) as f64 / self.trials as f64
        }
    }

    /// Compares rates without rounding.
    pub(super) fn cmp_rate(self, other: Self) -> std::cmp::Ordering {
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        product(self.successes, other.trials.max(1))
            .cmp(&product(other.successes, self.trials.max(1)))
    }
}

/// What is believed of each variant.
#[derive(Debug, Clone, PartialEq)]
pub struct Posterior {
    /// The probability that the variant is the best of all, in their order; they add up to 1.
    pub p_best: Vec<f64>,
    /// What is lost on average, in rate, by taking the variant and not the truly best.
    pub expected_loss: Vec<f64>,
    /// Where the rate lies with 95 %.
    pub interval: Vec<(f64, f64)>,
}

/// The share of a distribution that is left out at either end.
const LEFT_OUT: f64 = 1e-13;
/// Into how many pieces the rest of each distribution is cut.
const PIECES: u32 = 24;

impl Posterior {
    /// Computes it for up to some dozens of variants; without variants it is empty.
    pub fn of(counts: &[Count]) -> Self {
        let betas: Vec<_> = counts.iter().map(|count| count.beta()).collect();
        let ranges: Vec<_> = betas.iter().map(|&(a, b)| range(a, b)).collect();
        let mut p_best = vec![0.0; betas.len()];
        let pieces = pieces(&ranges);
        // E[X] of a positive X is the integral of P(X > x); below the first piece that is 1.
        let mut best_mean = pieces.first().map_or(0.0, |first| first.0);
        for (low, high) in pieces {
            for (x, weight) in nodes(low, high) {
                let below: Vec<_> = betas.iter().map(|&(a, b)| beta_cdf(a, b, x)).collect();
                for (variant, p) in p_best.iter_mut().enumerate() {
                    let (a, b) = betas[variant];
                    let others = below
                        .iter()
                        .enumerate()
                        .filter(|(other, _)| *other != variant);
                    let all_below: f64 = others.map(|(_, below)| below).product();
                    *p += weight * beta_density(a, b, x) * all_below;
                }
                best_mean += weight * (1.0 - below.iter().product::<f64>());
            }
        }
        // The quadrature is off by less than 1e-9; the sum is made exact for whoever adds up.
        let total: f64 = p_best.iter().sum();
        p_best.iter_mut().for_each(|p| *p /= total);
        let loss = |&(a, b): &(f64, f64)| (best_mean - a / (a + b)).max(0.0);
        let interval =
            |&(a, b): &(f64, f64)| (beta_quantile(a, b, 0.025), beta_quantile(a, b, 0.975));
        Self {
            p_best,
            expected_loss: betas.iter().map(loss).collect(),
            interval: betas.iter().map(interval).collect(),
        }
    }
}

/// Where all but a trace of Beta(a, b) lies.
fn range(a: f64, b: f64) -> (f64, f64) {
    let mean = a / (a + b);
    let deviation = (mean * (1.0 - mean) / (a + b + 1.0)).sqrt();
    let (mut low, mut high) = (mean, mean);
    while low > 0.0 && beta_cdf(a, b, low) > LEFT_OUT {
        low = (low - deviation).max(0.0);
    }
    while high < 1.0 && 1.0 - beta_cdf(a, b, high) > LEFT_OUT {
        high = (high + deviation).min(1.0);
    }
    (low, high)
}

/// Cuts the line so that no distribution changes much within a piece.
fn pieces(ranges: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = |&(low, high): &(f64, f64)| (high - low) / f64::from(PIECES);
    let cuts = |range: &(f64, f64)| {
        let (low, step) = (range.0, step(range));
        (0..=PIECES).map(move |cut| low + step * f64::from(cut))
    };
    let finest = ranges.iter().map(step).fold(f64::INFINITY, f64::min);
    let mut cuts: Vec<f64> = ranges.iter().flat_map(cuts).collect();
    cuts.sort_by(f64::total_cmp);
    // Cuts of like distributions fall together; the first and the last of all stay.
    let last = cuts.last().copied().unwrap_or_default();
    cuts.dedup_by(|cut, before| *cut - *before < finest / 2.0);
    cuts.push(last);
    let pairs = cuts.windows(2).filter_map(|pair| match pair {
        [low, high] if low < high => Some((*low, *high)),
        _ => None,
    });
    pairs.collect()
}

/// The shares of a bandit's next round: each variant by its probability to be the best (Thompson's
/// rule, without the dice), of which `floor` in all is dealt evenly, so that late news can still
/// change the picture. `floor` is from 0 to 1; 0.1 is a good value.
pub fn bandit_shares(p_best: &[f64], floor: f64) -> Vec<f64> {
    let floor = floor.clamp(0.0, 1.0);
    let even = floor / p_best.len().max(1) as f64;
    p_best.iter().map(|p| even + (1.0 - floor) * p).collect()
}

#[cfg(test)]
mod tests {
    use super::super::special::tests::rows;
    use super::*;
    use proptest::prelude::*;

    fn counts(pairs: &[(u64, u64)]) -> Vec<Count> {
        let count = |&(trials, successes)| Count { trials, successes };
        pairs.iter().map(count).collect()
    }

    /// Rows: variants, then trials and successes of each, then P(best) and loss of each.
    #[test]
    fn p_best_and_loss_are_scipys() {
        for row in rows("p_best") {
            let variants = (row.len() - 1) / 4;
            let whole = |cell: f64| format!("{cell:.0}").parse().expect("a count");
            let pairs: Vec<(u64, u64)> = row[1..=2 * variants]
                .chunks(2)
                .map(|pair| (whole(pair[0]), whole(pair[1])))
                .collect();
            let found = Posterior::of(&counts(&pairs));
            for variant in 0..variants {
                let p = row[1 + 2 * variants + variant];
                let loss = row[1 + 3 * variants + variant];
                assert!(
                    (found.p_best[variant] - p).abs() < 1e-8,
                    "{pairs:?}: {found:?}, not {p}"
                );
                let error = (found.expected_loss[variant] - loss).abs();
                assert!(error < 1e-9, "{pairs:?}: {found:?}, not {loss}");
            }
        }
    }

    #[test]
    fn nothing_counted_is_an_even_bet() {
        let found = Posterior::of(&counts(&[(0, 0); 4]));
        assert!(found.p_best.iter().all(|p| (p - 0.25).abs() < 1e-12));
        let all_the_same = Posterior::of(&counts(&[(1_000_000, 20_000); 8]));
        assert!(all_the_same.p_best.iter().all(|p| (p - 0.125).abs() < 1e-9));
        assert!(Posterior::of(&[]).p_best.is_empty());
    }

    #[test]
    fn shares_keep_a_floor() {
        let shares = bandit_shares(&[1.0, 0.0], 0.1);
        assert!((shares[0] - 0.95).abs() < 1e-12 && (shares[1] - 0.05).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn whatever_was_counted_is_a_probability(
            pairs in prop::collection::vec((0_u64..3_000_000, 0.0..1.0_f64), 2..=8)
        ) {
            let part = |&(trials, share): &(u64, f64)| {
                let successes = format!("{:.0}", trials as f64 * share).parse().expect("a count");
                Count { trials, successes }
            };
            let counts: Vec<_> = pairs.iter().map(part).collect();
            let found = Posterior::of(&counts);
            prop_assert!((found.p_best.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            for (p, loss) in found.p_best.iter().zip(&found.expected_loss) {
                prop_assert!((0.0..=1.0).contains(p) && (0.0..=1.0).contains(loss));
            }
            for (count, interval) in counts.iter().zip(&found.interval) {
                prop_assert!(interval.0 < interval.1, "{count:?} {interval:?}");
            }
        }
    }
}
