//! Whole tests, simulated with known truth: assignment, delivery, clicks, machines, measurement
//! and decision. 10,000 runs each with `HIKYAKU_TEST_FULL=1`, fewer without.

use super::*;
use model::Timestamp;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(4 * 3600);
const HOUR: i64 = 3_600_000;

/// xorshift64*: small, seeded, the same everywhere.
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11;
        high as f64 / 9_007_199_254_740_992.0
    }

    fn is(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    fn hours(&mut self, most: i64) -> i64 {
        #[allow(
            clippy::cast_possible_truncation,
            reason = "some hours in milliseconds"
        )]
        let drawn = (self.unit() * (most * HOUR) as f64) as i64;
        drawn
    }
}

fn runs() -> u32 {
    if std::env::var_os("HIKYAKU_TEST_FULL").is_some() {
        10_000
    } else {
        400
    }
}

/// One campaign: `per_variant` recipients for each rate, of whom `machines` open by machine too.
/// Delivery takes an hour; people act within three hours of it, machines at once.
fn campaign(dice: &mut Dice, rates: &[f64], per_variant: usize, machines: f64) -> Measured {
    let mut seed = [0; 32];
    seed.fill_with(|| u8::from(dice.is(0.5)));
    let shares = Shares::even(rates.len(), 1.0).expect("shares");
    let assigner = Assigner::new(&seed);
    let mut seen = Vec::with_capacity(rates.len() * per_variant);
    for stratum in 0..rates.len() * per_variant / 250 {
        let places: Vec<u64> = (0..250)
            .map(|person| (stratum as u64 * 250 + person).wrapping_mul(0x9E6C_63D0_676A_9A99))
            .collect();
        for arm in assigner.deal(&places, &shares) {
            let Arm::Variant(variant) = arm else {
                panic!("nobody is held back")
            };
            let delivered = dice.hours(1);
            let human = dice
                .is(rates[usize::from(variant)])
                .then(|| Timestamp::from_millis(delivered + dice.hours(3)));
            let machine = dice.is(machines).then(|| Timestamp::from_millis(delivered));
            seen.push(Observation {
                variant,
                since: Timestamp::from_millis(delivered),
                human_at: human,
                any_at: machine.or(human),
            });
        }
    }
    measure(&seen, rates.len(), Timestamp::from_millis(5 * HOUR), WAIT)
}

/// How often of 1 `done` says so.
fn share(runs: u32, mut run: impl FnMut() -> bool) -> f64 {
    f64::from((0..runs).map(|_| u32::from(run())).sum::<u32>()) / f64::from(runs)
}

fn decided(counts: &[Count]) -> Decided {
    let confidence = default_confidence(counts.len());
    decide(counts, &[], true, confidence, Fallback::Leader)
}

/// What chance alone adds to a share of `p` in so many runs, three deviations of it.
fn noise(p: f64) -> f64 {
    3.0 * (p * (1.0 - p) / f64::from(runs())).sqrt()
}

#[test]
fn equal_variants_are_seldom_called_different() {
    for (variants, per_variant, rate) in
        [(2, 1000, 0.2), (2, 500, 0.02), (3, 500, 0.1), (8, 250, 0.2)]
    {
        let mut dice = Dice(42 + variants as u64);
        let rates = vec![rate; variants];
        let wrong = share(runs(), || {
            let measured = campaign(&mut dice, &rates, per_variant, 0.5);
            decided(&measured.human).decision == Decision::Confident
        });
        println!("A/A, {variants} variants of {per_variant}, rate {rate}: {wrong:.4}");
        assert!(wrong <= 0.05 + noise(0.05), "{wrong}");
    }
}

/// The same without dice: every pair of counts with its probability. Two equal variants are the
/// worst case, and their share comes out at 5 % but for what counts being whole adds or takes.
#[test]
fn equal_variants_are_called_different_in_one_test_of_twenty_exactly() {
    for (trials, rate, told) in [
        (1000, 0.2, 0.04996),
        (500, 0.02, 0.04960),
        (1000, 0.01, 0.04482),
        (5000, 0.02, 0.04929),
    ] {
        let wrong = exactly_wrong(trials, rate);
        assert!((wrong - told).abs() < 0.0001, "{trials} {rate}: {wrong}");
    }
}

fn exactly_wrong(trials: u64, rate: f64) -> f64 {
    // Binomial probabilities, each from the one before; the rarest are left out.
    let mut probabilities = vec![(trials as f64 * (1.0 - rate).ln()).exp()];
    for k in 1..=trials {
        let last = probabilities.last().copied().unwrap_or_default();
        let odds = rate / (1.0 - rate);
        probabilities.push(last * odds * (trials - k + 1) as f64 / k as f64);
    }
    let seen: Vec<(u64, f64)> = (0..)
        .zip(probabilities)
        .filter(|(_, p)| *p > 1e-9)
        .collect();
    let is_confident = |low: u64, high: u64| {
        let count = |successes| Count { trials, successes };
        decided(&[count(low), count(high)]).decision == Decision::Confident
    };
    let mut wrong = 0.0;
    for (at, (low, p)) in seen.iter().enumerate() {
        let above = &seen[at..];
        let from = above.partition_point(|(high, _)| !is_confident(*low, *high));
        let all: f64 = above[from..].iter().map(|(_, q)| q).sum();
        wrong += 2.0 * p * all;
    }
    wrong
}

#[test]
fn a_difference_is_found_as_often_as_was_told() {
    for (variants, per_variant, baseline) in [(2, 2000, 0.2), (2, 1000, 0.05), (4, 1000, 0.2)] {
        let plan = plan(
            variants,
            per_variant as u64,
            baseline,
            default_confidence(variants),
        );
        let mut dice = Dice(7 + variants as u64);
        let mut rates = vec![baseline; variants];
        rates[1] += plan.detectable.expect("detectable");
        let found = share(runs(), || {
            let decided = decided(&campaign(&mut dice, &rates, per_variant, 0.5).human);
            decided.decision == Decision::Confident && decided.variant == Some(1)
        });
        println!("{variants} variants of {per_variant}, {rates:?}: found {found:.4}, told 0.8");
        let most = if variants == 2 { 0.82 } else { 0.92 };
        assert!(
            (0.78 - noise(0.8)..most + noise(0.8)).contains(&found),
            "{found}"
        );
        // The chance of being right, when one is better by a fifth.
        rates[1] = baseline * 1.2;
        let right = share(runs(), || {
            decided(&campaign(&mut dice, &rates, per_variant, 0.5).human).variant == Some(1)
        });
        println!(
            "better by a fifth: right {right:.4}, told {:.4}",
            plan.chance_of_picking_right
        );
        let told = plan.chance_of_picking_right;
        assert!((right - told).abs() < 0.02 + noise(told), "{right} {told}");
    }
}

/// Machines open half of all mail: in what everybody did, a real difference drowns.
#[test]
fn people_alone_show_what_machines_hide() {
    let mut dice = Dice(99);
    let (mut of_people, mut of_all, mut machine_share) = (0, 0, 0.0);
    for _ in 0..runs() {
        let measured = campaign(&mut dice, &[0.2, 0.26], 1000, 0.5);
        of_people += u32::from(decided(&measured.human).decision == Decision::Confident);
        of_all += u32::from(decided(&measured.any).decision == Decision::Confident);
        machine_share += measured.machine_share() / f64::from(runs());
    }
    println!(
        "found: {of_people} by people, {of_all} by all, of {}; machines {machine_share:.3}",
        runs()
    );
    assert!(f64::from(of_people) > 1.5 * f64::from(of_all));
    assert!((0.55..0.7).contains(&machine_share), "{machine_share}");
}
