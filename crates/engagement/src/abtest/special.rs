//! The functions of statistics that the standard library does not have.
//!
//! Owns their accuracy: each is good to about 1e-12 for counts from 0 to 1e9, which a table made
//! with SciPy checks. Pure.

/// ln Γ(x) for x > 0, by Lanczos' approximation (g = 7, 9 terms).
fn ln_gamma(x: f64) -> f64 {
    const G: f64 = 7.0;
    const FIRST: f64 = 0.999_999_999_999_809_9;
    const TERMS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let mut sum = FIRST;
    let mut at = x;
    for term in TERMS {
        at += 1.0;
        sum += term / at;
    }
    let t = x + G + 0.5;
    0.5 * std::f64::consts::TAU.ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

/// The error of Stirling's formula: ln Γ(x + 1) − ((x + ½) ln x − x + ½ ln 2π).
///
/// What is left when the large terms of a binomial probability cancel (Loader, "Fast and accurate
/// computation of binomial probabilities", 2000).
fn stirling_error(x: f64) -> f64 {
    if x < 16.0 {
        return ln_gamma(x + 1.0) - ((x + 0.5) * x.ln() - x + 0.5 * std::f64::consts::TAU.ln());
    }
    let square = x * x;
    let series =
        1.0 / 360.0 - (1.0 / 1260.0 - (1.0 / 1680.0 - 1.0 / 1188.0 / square) / square) / square;
    (1.0 / 12.0 - series / square) / x
}

/// x ln(x / m) + m − x, also where x is near m and the terms cancel (Loader).
fn deviance(x: f64, m: f64) -> f64 {
    let difference = x - m;
    if difference.abs() >= 0.1 * (x + m) {
        return x * (x / m).ln() - difference;
    }
    let v = difference / (x + m);
    let mut sum = difference * v;
    let mut term = 2.0 * x * v;
    for odd in 1..200 {
        term *= v * v;
        let next = sum + term / f64::from(2 * odd + 1);
        if next == sum {
            break;
        }
        sum = next;
    }
    sum
}

/// x^a (1 − x)^b / B(a, b) for 0 < x < 1.
fn kernel(a: f64, b: f64, x: f64) -> f64 {
    let n = a + b;
    let errors = stirling_error(n) - stirling_error(a) - stirling_error(b);
    let deviances = deviance(a, n * x) + deviance(b, n * (1.0 - x));
    let scale = (a * b / (std::f64::consts::TAU * n)).sqrt();
    scale * (errors - deviances).exp()
}

/// The density of Beta(a, b) at `x`.
pub(super) fn beta_density(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    kernel(a, b, x) / (x * (1.0 - x))
}

/// P(X ≤ x) for X of Beta(a, b): the regularised incomplete beta function.
pub(super) fn beta_cdf(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    if x >= 1.0 {
        return 1.0;
    }
    // The fraction converges fast on this side of the mean.
    if x < (a + 1.0) / (a + b + 2.0) {
        (kernel(a, b, x) * beta_fraction(a, b, x) / a).min(1.0)
    } else {
        (1.0 - kernel(a, b, x) * beta_fraction(b, a, 1.0 - x) / b).max(0.0)
    }
}

/// The continued fraction of the incomplete beta function, by Lentz' method (NIST DLMF 8.17.22).
/// It needs some √max(a, b) turns.
fn beta_fraction(a: f64, b: f64, x: f64) -> f64 {
    const TINY: f64 = 1e-300;
    const TURNS: u32 = 100_000;
    let held = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / held(1.0 - (a + b) * x / (a + 1.0));
    let mut h = d;
    for turn in 1..TURNS {
        let m = f64::from(turn);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / held(1.0 + even * d);
        c = held(1.0 + even / c);
        h *= d * c;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / held(1.0 + odd * d);
        c = held(1.0 + odd / c);
        let step = d * c;
        h *= step;
        if (step - 1.0).abs() < 1e-15 {
            break;
        }
    }
    h
}

/// The `p` quantile of Beta(a, b), by bisection, to the last bits.
pub(super) fn beta_quantile(a: f64, b: f64, p: f64) -> f64 {
    bisect(0.0, 1.0, |x| beta_cdf(a, b, x) < p)
}

/// Where `is_below` turns false between `low` and `high`.
pub(super) fn bisect(mut low: f64, mut high: f64, is_below: impl Fn(f64) -> bool) -> f64 {
    // Each turn halves what is between; near 0 there is more of it than 53 bits.
    for _ in 0..200 {
        let middle = f64::midpoint(low, high);
        if middle <= low || middle >= high {
            break;
        }
        if is_below(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// P(X > x) for X of χ² with `freedom` degrees: the regularised upper incomplete gamma function
/// Q(k/2, x/2), by its series or its fraction (NIST DLMF 8.11.4, 8.9.2).
pub(super) fn chi_square_tail(freedom: u32, x: f64) -> f64 {
    let (a, x) = (f64::from(freedom) / 2.0, x / 2.0);
    if x <= 0.0 {
        return 1.0;
    }
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
        while term > sum * 1e-16 {
            n += 1.0;
            term *= x / n;
            sum += term;
        }
        return (1.0 - front * sum).max(0.0);
    }
    let mut b = x + 1.0 - a;
    let mut c = 1e300;
    let mut d = 1.0 / b;
    let mut h = d;
    for turn in 1..10_000 {
        let n = f64::from(turn);
        let an = -n * (n - a);
        b += 2.0;
        d = 1.0 / (an * d + b);
        c = b + an / c;
        let step = d * c;
        h *= step;
        if (step - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front * h
}

/// P(Z ≤ z) of the standard normal distribution.
pub(super) fn normal_cdf(z: f64) -> f64 {
    let tail = 0.5 * chi_square_tail(1, z * z);
    if z < 0.0 { tail } else { 1.0 - tail }
}

/// The `p` quantile of the standard normal distribution, within ±38.
pub(super) fn normal_quantile(p: f64) -> f64 {
    bisect(-38.0, 38.0, |z| normal_cdf(z) < p)
}

/// Points and weights of Gauss–Legendre quadrature with 8 points on −1…1; the other half mirrors.
const GAUSS: [(f64, f64); 4] = [
    (0.183_434_642_495_649_8, 0.362_683_783_378_362),
    (0.525_532_409_916_329, 0.313_706_645_877_887_3),
    (0.796_666_477_413_626_7, 0.222_381_034_453_374_48),
    (0.960_289_856_497_536_3, 0.101_228_536_290_376_26),
];

/// The points and weights with which a function is integrated from `low` to `high`.
pub(super) fn nodes(low: f64, high: f64) -> impl Iterator<Item = (f64, f64)> {
    let (middle, half) = (f64::midpoint(low, high), (high - low) / 2.0);
    GAUSS.into_iter().flat_map(move |(point, weight)| {
        [-point, point].map(|point| (middle + half * point, half * weight))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Rows of `table.csv` for one function.
    pub(in crate::abtest) fn rows(function: &str) -> Vec<Vec<f64>> {
        let table = include_str!("../../tests/abtest/table.csv");
        let numbers = |line: &str| {
            let (name, rest) = line.split_once(',')?;
            let parse = |cell: &str| cell.parse().expect("a number");
            (name == function).then(|| rest.split(',').map(parse).collect())
        };
        let rows: Vec<_> = table.lines().filter_map(numbers).collect();
        assert!(rows.len() > 5, "{function} is in the table");
        rows
    }

    fn close(found: f64, expected: f64, relative: f64, of: &[f64]) {
        let error = (found - expected).abs() / expected.abs().max(1e-30);
        assert!(error < relative, "{of:?}: {found:e}, error {error:e}");
    }

    #[test]
    fn the_beta_distribution_is_scipys() {
        for row in rows("beta_cdf") {
            // Of a value near 1 the difference to 1 counts.
            let found = beta_cdf(row[0], row[1], row[2]);
            assert!((found - row[3]).abs() < 1e-11, "{row:?}: {found:e}");
        }
        for row in rows("beta_pdf") {
            close(beta_density(row[0], row[1], row[2]), row[3], 1e-10, &row);
        }
        for row in rows("beta_ppf") {
            close(beta_quantile(row[0], row[1], row[2]), row[3], 1e-9, &row);
        }
    }

    #[test]
    fn the_tails_are_scipys() {
        for row in rows("chi2_sf") {
            let freedom = if row[0] < 1.5 {
                1
            } else if row[0] < 2.5 {
                2
            } else {
                7
            };
            close(chi_square_tail(freedom, row[1]), row[2], 1e-10, &row);
        }
        for row in rows("norm_cdf") {
            close(normal_cdf(row[0]), row[1], 1e-9, &row);
            if (1e-12..1.0 - 1e-9).contains(&row[1]) {
                assert!((normal_quantile(row[1]) - row[0]).abs() < 1e-6, "{row:?}");
            }
        }
    }
}
