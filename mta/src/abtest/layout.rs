//! Who gets which variant, and in which wave they leave.
//!
//! A *wave* is what is released together: the parts of the test that leave at one time, then the
//! rest, whole or in the rounds of a bandit. Pure: the same content and the same recipients are
//! dealt the same on every node. Must not decide a test.

use std::collections::BTreeSet;
use std::ops::Range;

use engagement::abtest::{Arm, Assigner, Mode, Shares, SharesError};
use model::{Row, Timestamp};

use crate::released::Released;

/// The rounds in which a bandit sends what was not in its first part.
pub(crate) const ROUNDS: u32 = 5;

/// The waves of a batch with variants.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    /// When each wave of the test leaves; none: with the batch.
    starts: Vec<Option<Timestamp>>,
    /// The wave of each variant's part of the test.
    of_variant: Vec<u32>,
    /// The waves of the rest; empty: everybody is in the test.
    pub(crate) rest: Range<u32>,
}

impl Layout {
    /// The waves of this content; `None`: it has no variants.
    pub(crate) fn of(released: &Released) -> Option<Self> {
        let test = released.test.as_ref()?;
        let times = released.variants.iter().map(|variant| variant.send_at);
        let starts: Vec<_> = times.collect::<BTreeSet<_>>().into_iter().collect();
        let place = |at: &Option<Timestamp>| starts.iter().position(|start| start == at);
        let wave = |at| place(at).and_then(|place| u32::try_from(place).ok());
        let of_variant = released
            .variants
            .iter()
            .map(|variant| wave(&variant.send_at).unwrap_or(0))
            .collect();
        let first = u32::try_from(starts.len()).unwrap_or(0);
        let rest = match test.mode {
            _ if test.fraction >= 1.0 => 0,
            Mode::Winner => 1,
            Mode::Bandit => ROUNDS,
            Mode::Split => 0,
        };
        Some(Self {
            starts,
            of_variant,
            rest: first..first + rest,
        })
    }

    /// The wave of a variant's part of the test.
    pub(crate) fn of_variant(&self, place: usize) -> Option<u32> {
        self.of_variant.get(place).copied()
    }

    /// How many waves there are.
    pub(crate) const fn waves(&self) -> u32 {
        self.rest.end
    }

    /// When the waves of the test leave, in a batch that was released at this time.
    pub(crate) fn starts(&self, released: Timestamp) -> impl Iterator<Item = (u32, Timestamp)> {
        let at = move |start: &Option<Timestamp>| start.map_or(released, |at| at.max(released));
        (0..).zip(self.starts.iter().map(at))
    }

    /// When the last part of the test leaves: its clock begins.
    pub(crate) fn begins(&self, released: Timestamp) -> Timestamp {
        let last = self.starts(released).map(|(_, at)| at).max();
        last.unwrap_or(released)
    }
}

/// Deals recipients to variants and waves.
#[derive(Debug)]
pub(crate) struct Dealing {
    assigner: Assigner,
    shares: Shares,
    layout: Layout,
}

/// Recipients of one wave, in the order of sending, with the numbers of their variants: from 1, or
/// 0 for those who wait for the decision.
#[derive(Debug, PartialEq)]
pub(crate) struct Dealt {
    pub(crate) wave: u32,
    pub(crate) rows: Vec<Row>,
    pub(crate) variants: Vec<u8>,
}

impl Dealing {
    /// How the recipients of this content are dealt; `None`: it has no variants.
    ///
    /// # Errors
    /// When its numbers make no sense, which intake has refused.
    pub(crate) fn of(released: &Released) -> Result<Option<Self>, SharesError> {
        let (Some(layout), Some(test)) = (Layout::of(released), &released.test) else {
            return Ok(None);
        };
        Ok(Some(Self {
            assigner: Assigner::new(&test.seed),
            shares: Shares::even(released.variants.len(), test.fraction)?,
            layout,
        }))
    }

    /// Deals recipients that leave together: of one domain, or `mixed`. They stand in the order of
    /// a keyed hash, domain by domain, so that variants alternate and each domain gets its shares.
    pub(crate) fn deal(&self, rows: Vec<Row>, mixed: bool) -> Vec<Dealt> {
        let domains: BTreeSet<Box<str>> = match mixed {
            true => rows.iter().map(|row| row.email.domain().into()).collect(),
            false => BTreeSet::new(),
        };
        let place = |row: &Row| {
            let place = self.assigner.place(&row.email.normalised());
            match domains
                .iter()
                .take_while(|of| &***of < row.email.domain())
                .count()
            {
                _ if !mixed => place,
                // A lot has 500 recipients at most, so their domains fit.
                before => (before as u64) << 48 | place >> 16,
            }
        };
        let mut rows: Vec<(u64, Row)> = rows.into_iter().map(|row| (place(&row), row)).collect();
        rows.sort_by_key(|(place, _)| *place);
        let places: Vec<u64> = rows.iter().map(|(place, _)| *place).collect();
        let arms = self.assigner.deal(&places, &self.shares);
        let mut dealt: Vec<Dealt> = Vec::new();
        let mut rest = self.layout.rest.clone().cycle();
        for ((_, row), arm) in rows.into_iter().zip(arms) {
            let (wave, variant) = match arm {
                Arm::Variant(place) => {
                    let wave = self.layout.of_variant.get(usize::from(place));
                    (wave.copied().unwrap_or(0), place + 1)
                }
                Arm::Rest => (rest.next().unwrap_or(0), 0),
            };
            match dealt.iter_mut().find(|of| of.wave == wave) {
                Some(of) => {
                    of.rows.push(row);
                    of.variants.push(variant);
                }
                None => dealt.push(Dealt {
                    wave,
                    rows: vec![row],
                    variants: vec![variant],
                }),
            }
        }
        dealt
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::row;
    use crate::released::{Test, Variant};
    use engagement::abtest::{Fallback, Metric};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn released(mode: Mode, fraction: f64, sends: &[Option<i64>]) -> Released {
        let spec = serde_json::json!({"from": {"email": "news@brand.example"}, "subject": "Hello", "text": "Hi"});
        let variant = |(place, at): (usize, &Option<i64>)| Variant {
            name: format!("V{place}"),
            from: None,
            subject: None,
            html: None,
            text: None,
            dkim_selectors: Vec::new(),
            send_at: at.map(Timestamp::from_millis),
        };
        Released {
            form: Released::WITH_VARIANTS,
            spec: serde_json::from_value(spec).expect("a content"),
            dkim_selectors: Vec::new(),
            tracker_base_url: "http://127.0.0.1:8026".into(),
            tracking_key: 1,
            allow_duplicates: false,
            proof: false,
            variants: sends.iter().enumerate().map(variant).collect(),
            test: Some(Test {
                mode,
                fraction,
                metric: Metric::Clicks,
                wait_ms: 1,
                min_confidence: 0.975,
                fallback: Fallback::Leader,
                seed: [3; 32],
            }),
        }
    }

    #[test]
    fn waves_are_the_times_of_the_test_and_then_the_rest() {
        let of = |mode, fraction, sends: &[Option<i64>]| {
            Layout::of(&released(mode, fraction, sends)).expect("variants")
        };
        let winner = of(Mode::Winner, 0.2, &[None, None]);
        assert_eq!((winner.rest.clone(), winner.waves()), (1..2, 2));
        assert_eq!(of(Mode::Split, 1.0, &[None, None]).waves(), 1);
        assert_eq!(of(Mode::Winner, 1.0, &[None, None]).waves(), 1);
        let timed = of(Mode::Bandit, 0.2, &[Some(9), Some(5), Some(9)]);
        assert_eq!(timed.of_variant, [1, 0, 1]);
        assert_eq!(timed.rest, 2..2 + ROUNDS);
        // What lies before the release leaves with it.
        let at = Timestamp::from_millis;
        let starts: Vec<_> = timed.starts(at(7)).collect();
        assert_eq!(starts, [(0, at(7)), (1, at(9))]);
        assert_eq!(timed.begins(at(7)), at(9));
    }

    proptest! {
        #[test]
        fn everybody_is_dealt_once_and_the_same_in_any_order(
            people in prop::collection::btree_set((0_u32..40, 0_u32..500), 1..300),
            mixed: bool, fraction in 0.05_f64..1.0, variants in 2_usize..8, turn in 0_usize..300,
        ) {
            let dealing = Dealing::of(&released(Mode::Winner, fraction, &vec![None; variants]));
            let dealing = dealing.expect("shares").expect("variants");
            let rows: Vec<Row> = (0..).zip(&people).map(|(index, (domain, name))| {
                let domain = if mixed { *domain } else { 1 };
                row(index, &format!("{name}-{index}@d{domain}.example"))
            }).collect();
            let by_address = |dealt: Vec<Dealt>| -> BTreeMap<String, (u32, u8)> {
                dealt.into_iter().flat_map(|of| {
                    let wave = of.wave;
                    of.rows.into_iter().zip(of.variants).map(move |(row, variant)| (row.email.to_string(), (wave, variant)))
                }).collect()
            };
            let mut turned = rows.clone();
            turned.rotate_left(turn % rows.len());
            let (all, size) = (by_address(dealing.deal(rows.clone(), mixed)), rows.len());
            prop_assert_eq!(all.len(), size);
            prop_assert_eq!(&all, &by_address(dealing.deal(turned, mixed)));
            let test = all.values().filter(|(_, variant)| *variant > 0).count() as f64;
            prop_assert!((test - size as f64 * fraction).abs() <= 3.5, "{test} of {size}");
            prop_assert!(all.values().all(|(wave, variant)| (*wave == 1) == (*variant == 0)));
        }
    }
}
