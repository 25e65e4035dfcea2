//! What a test of this size can show, told before it is sent.

use super::special::{bisect, nodes, normal_cdf, normal_quantile};

/// What can be promised. Rates are shares of recipients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Recipients of each variant in the test.
    pub per_variant: u64,
    /// The smallest difference in rate that ends `confident` in 8 tests of 10, with more than two
    /// variants in 8 or a little more; `None` when no difference would.
    pub detectable: Option<f64>,
    /// How often the truly better variant has the higher rate, when it is better by a fifth.
    pub chance_of_picking_right: f64,
}

const POWER: f64 = 0.8;
/// How much better the one variant is for [`Plan::chance_of_picking_right`].
const LIFT: f64 = 0.2;

/// Tells what `per_variant` recipients for each of `variants` can show, when the usual rate is
/// `baseline` and `min_confidence` is asked for.
///
/// By the normal approximation, which is good from some dozens of events on: with fewer the
/// promise is on the bright side by some percentage points.
pub fn plan(variants: usize, per_variant: u64, baseline: f64, min_confidence: f64) -> Plan {
    let baseline = baseline.clamp(1e-6, 1.0 - 1e-6);
    let power =
        |difference: f64| power(variants, per_variant, baseline, difference, min_confidence);
    let most = 1.0 - baseline;
    let found = power(most) >= POWER;
    let detectable = found.then(|| bisect(0.0, most, |difference| power(difference) < POWER));
    let better = (baseline * LIFT).min(most);
    Plan {
        per_variant,
        detectable,
        chance_of_picking_right: leads(variants, per_variant, baseline, better),
    }
}

fn variance(rate: f64, n: u64) -> f64 {
    rate * (1.0 - rate) / n.max(1) as f64
}

/// The probability that a variant better by `difference` than all others ends `confident`: P(best)
/// of at least `confidence` means that it beats each of the others by some deviations.
fn power(variants: usize, n: u64, baseline: f64, difference: f64, confidence: f64) -> f64 {
    let better = baseline + difference;
    let deviation = (variance(baseline, n) + variance(better, n)).sqrt();
    // P(best) is at least 1 − Σ P(another is better). With several equal ones each has its part, as
    // if all came as close as the closest: that promises a little too little, never too much.
    let others = variants.saturating_sub(1).max(1) as f64;
    let z = normal_quantile(1.0 - (1.0 - confidence) / others);
    let needed = z * deviation;
    over_the_others(variants, n, baseline, better, needed)
}

/// The probability that the better variant shows the highest rate.
fn leads(variants: usize, n: u64, baseline: f64, difference: f64) -> f64 {
    over_the_others(variants, n, baseline, baseline + difference, 0.0)
}

/// The probability that a variant of rate `better` shows a rate higher by `margin` than each of
/// the others, whose rate is `baseline`.
fn over_the_others(variants: usize, n: u64, baseline: f64, better: f64, margin: f64) -> f64 {
    let (own, other) = (variance(better, n).sqrt(), variance(baseline, n).sqrt());
    let others = i32::try_from(variants.saturating_sub(1)).unwrap_or(i32::MAX);
    let mut sum = 0.0;
    for piece in -20..20_i32 {
        let low = f64::from(piece) * 0.4;
        for (z, weight) in nodes(low, low + 0.4) {
            let density = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
            let ahead = (better - baseline - margin + own * z) / other;
            sum += weight * density * normal_cdf(ahead).powi(others);
        }
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The classical table: 80 % power at a two-sided 5 %, which is what 0.975 of P(best) is.
    #[test]
    fn the_numbers_of_the_books() {
        for (baseline, better, n) in [
            (0.20, 0.22, 6_510),
            (0.02, 0.024, 21_109),
            (0.02, 0.03, 3_826),
        ] {
            let plan = plan(2, n, baseline, 0.975);
            let detectable = plan.detectable.expect("detectable");
            let error = (detectable - (better - baseline)).abs() / (better - baseline);
            assert!(error < 0.01, "{baseline} {n}: {detectable}");
        }
    }

    #[test]
    fn small_lists_are_close_to_a_coin() {
        // 2.0 against 2.4 %: 58, 62, 67, 73, 83, 91 of 100.
        for (n, chance) in [
            (100, 0.58),
            (250, 0.62),
            (500, 0.67),
            (1_000, 0.73),
            (2_500, 0.83),
            (5_000, 0.91),
        ] {
            let found = plan(2, n, 0.02, 0.975).chance_of_picking_right;
            assert!((found - chance).abs() < 0.01, "{n}: {found}");
        }
        let eight = plan(8, 100, 0.02, 0.99375);
        assert!(eight.chance_of_picking_right < 0.25 && eight.detectable.is_some_and(|d| d > 0.05));
        assert_eq!(plan(2, 2, 0.3, 0.999).detectable, None);
    }
}
