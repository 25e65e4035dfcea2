//! A decision as it is kept: with all that it was made of, so that anybody can make it again.

use super::balance::{Breach, Limits, SRM_ALARM, breach, sample_ratio};
use super::decision::{Decision, Fallback, decide};
use super::posterior::{Count, Posterior, bandit_shares};
use serde::{Deserialize, Serialize};

/// The version of the rules of this module, kept in each record.
pub const RULES: u16 = 1;
/// The part of a bandit's round that is dealt evenly.
const BANDIT_FLOOR: f64 = 0.1;
/// Opens of which this part is machines are worth a warning.
const MANY_MACHINES: f64 = 0.25;

/// What a variant is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Recipients that clicked, of those delivered.
    #[default]
    Clicks,
    /// Recipients that opened, of those delivered. Machines make it weak.
    Opens,
    /// Recipients that clicked, of those that opened. Who opens depends on the subject line, so it
    /// does not compare subject lines.
    ClickToOpen,
    /// Recipients that did what the caller reports, of those delivered.
    Conversion,
}

impl Metric {
    /// What whoever is judged by it should know.
    pub const fn caveat(self) -> Option<&'static str> {
        match self {
            Self::Opens => Some("opens are a weak measure: mail programs open by themselves"),
            Self::ClickToOpen => {
                Some("who opens depends on the subject: click_to_open does not compare subjects")
            }
            Self::Clicks | Self::Conversion => None,
        }
    }
}

/// What is done with a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A part is tested, the rest gets the winner.
    #[default]
    Winner,
    /// All get a variant by its share; nothing is decided.
    Split,
    /// The rest goes out in rounds, each shared out by what is known by then.
    Bandit,
}

/// What is known of one variant when it is decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantInput {
    /// Its name.
    pub name: String,
    /// The part of the test that it was to get, in any proportion.
    pub share: f64,
    /// Recipients that it got.
    pub assigned: u64,
    /// Of those, delivered.
    pub delivered: u64,
    /// Refused for good.
    pub bounced: u64,
    /// Complained.
    pub complained: u64,
    /// What people did, at equal age.
    pub human: Count,
    /// What people and machines did, at equal age.
    pub any: Count,
}

/// All that a decision is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// The variants, in the order of the submission.
    pub variants: Vec<VariantInput>,
    /// What they are judged by.
    pub metric: Metric,
    /// The P(best) from which on a decision is `confident`.
    pub min_confidence: f64,
    /// What is done otherwise.
    pub fallback: Fallback,
    /// Guardrails, if the batch has some.
    pub limits: Option<Limits>,
    /// The age at which the variants are compared, in milliseconds.
    pub age_ms: u64,
}

/// A decision with its inputs. Never changed once it is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The rules by which it was made: [`RULES`].
    pub rules: u16,
    /// What it was made of.
    pub inputs: Inputs,
    /// How it was decided.
    pub decision: Decision,
    /// The variant that the rest gets; none when the rest is split or held.
    pub variant: Option<String>,
    /// The probability of each variant to be the best.
    pub p_best: Vec<f64>,
    /// What is lost on average, in rate, by each choice.
    pub expected_loss: Vec<f64>,
    /// Where each rate lies with 95 %.
    pub interval: Vec<(f64, f64)>,
    /// The guardrail that a variant broke.
    pub breaches: Vec<Option<Breach>>,
    /// The probability of so uneven a split; below 0.001 no decision is `confident`.
    pub sample_ratio: f64,
    /// How much of what was seen is machines.
    pub machine_share: f64,
    /// What a bandit's next round gives each variant.
    pub next_shares: Vec<f64>,
    /// What a reader should know.
    pub warnings: Vec<String>,
}

impl Record {
    /// Decides. The same inputs give the same record, to the last bit.
    pub fn conclude(inputs: Inputs) -> Self {
        let counts: Vec<Count> = inputs.variants.iter().map(|v| v.human).collect();
        let breaches: Vec<Option<Breach>> = inputs
            .variants
            .iter()
            .map(|v| {
                breach(
                    inputs.limits.as_ref()?,
                    v.delivered,
                    v.bounced,
                    v.complained,
                )
            })
            .collect();
        let vetoed: Vec<bool> = breaches.iter().map(Option::is_some).collect();
        let assigned: Vec<u64> = inputs.variants.iter().map(|v| v.assigned).collect();
        let shares: Vec<f64> = inputs.variants.iter().map(|v| v.share).collect();
        let sample_ratio = sample_ratio(&assigned, &shares);
        let sound = sample_ratio >= SRM_ALARM;
        let decided = decide(
            &counts,
            &vetoed,
            sound,
            inputs.min_confidence,
            inputs.fallback,
        );
        let Posterior {
            p_best,
            expected_loss,
            interval,
        } = decided.posterior;
        let machine_share = machine_share(&inputs.variants);
        let variant = decided.variant.and_then(|place| inputs.variants.get(place));
        Self {
            rules: RULES,
            decision: decided.decision,
            variant: variant.map(|variant| variant.name.clone()),
            next_shares: allowed(&bandit_shares(&p_best, BANDIT_FLOOR), &vetoed),
            p_best,
            expected_loss,
            interval,
            breaches,
            sample_ratio,
            machine_share,
            warnings: warnings(&inputs, sound, machine_share),
            inputs,
        }
    }
}

/// The part of those who did it where no person did.
fn machine_share(variants: &[VariantInput]) -> f64 {
    let human: u64 = variants.iter().map(|v| v.human.successes).sum();
    let any: u64 = variants.iter().map(|v| v.any.successes).sum();
    if any == 0 {
        0.0
    } else {
        any.saturating_sub(human) as f64 / any as f64
    }
}

/// Shares without the vetoed variants; as they are when all are.
fn allowed(shares: &[f64], vetoed: &[bool]) -> Vec<f64> {
    let left: f64 = shares
        .iter()
        .zip(vetoed)
        .filter(|(_, out)| !**out)
        .map(|(share, _)| share)
        .sum();
    if left <= 0.0 {
        return shares.to_vec();
    }
    let share = |(share, out): (&f64, &bool)| if *out { 0.0 } else { share / left };
    shares.iter().zip(vetoed).map(share).collect()
}

fn warnings(inputs: &Inputs, sound: bool, machine_share: f64) -> Vec<String> {
    let mut warnings = Vec::new();
    if !sound {
        warnings.push("the variants did not get the shares that they should have".to_owned());
    }
    warnings.extend(inputs.metric.caveat().map(str::to_owned));
    if machine_share > MANY_MACHINES {
        let percent = 100.0 * machine_share;
        warnings.push(format!(
            "{percent:.0} % of what was seen is machines, and was not counted"
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variant(name: &str, delivered: u64, human: u64, any: u64) -> VariantInput {
        let count = |successes| Count {
            trials: delivered,
            successes,
        };
        VariantInput {
            name: name.to_owned(),
            share: 1.0,
            assigned: delivered + 10,
            delivered,
            bounced: 10,
            complained: 0,
            human: count(human),
            any: count(any),
        }
    }

    fn inputs() -> Inputs {
        Inputs {
            variants: vec![variant("A", 1000, 20, 60), variant("B", 1000, 60, 90)],
            metric: Metric::Clicks,
            min_confidence: 0.975,
            fallback: Fallback::Hold,
            limits: Some(Limits {
                bounce_rate: 0.05,
                complaint_rate: 0.003,
                min_delivered: 500,
            }),
            age_ms: 14_400_000,
        }
    }

    #[test]
    fn a_record_can_be_made_again_from_itself() {
        let record = Record::conclude(inputs());
        assert_eq!(
            (record.decision, record.variant.as_deref()),
            (Decision::Confident, Some("B"))
        );
        assert!((record.machine_share - 70.0 / 150.0).abs() < 1e-12);
        assert_eq!(
            record.warnings,
            ["47 % of what was seen is machines, and was not counted"]
        );
        let kept = serde_json::to_string(&record).expect("JSON");
        assert!(
            kept.contains(r#""decision":"confident","variant":"B""#),
            "{kept}"
        );
        let read: Record = serde_json::from_str(&kept).expect("our own");
        assert_eq!(read.inputs, record.inputs);
        assert_eq!(Record::conclude(read.inputs), record);
    }

    #[test]
    fn a_guardrail_takes_a_variant_out() {
        let mut inputs = inputs();
        inputs.variants[1].complained = 4;
        inputs.fallback = Fallback::Leader;
        let record = Record::conclude(inputs);
        assert_eq!(record.breaches, [None, Some(Breach::ComplaintRate)]);
        assert_eq!(record.variant.as_deref(), Some("A"));
        assert_ne!(record.decision, Decision::Confident);
        assert_eq!(record.next_shares, [1.0, 0.0]);
    }

    #[test]
    fn a_broken_split_is_not_believed() {
        let mut inputs = inputs();
        inputs.variants[0].assigned = 2000;
        let record = Record::conclude(inputs);
        assert!(record.sample_ratio < SRM_ALARM);
        assert_eq!((record.decision.as_str(), record.variant), ("hold", None));
        assert_eq!(record.warnings.len(), 2);
    }

    #[test]
    fn names_are_the_contracts() {
        let names = |value: serde_json::Value| value.as_str().map(str::to_owned);
        let metrics = [
            Metric::Clicks,
            Metric::Opens,
            Metric::ClickToOpen,
            Metric::Conversion,
        ];
        let shown: Vec<_> = metrics
            .iter()
            .filter_map(|m| names(serde_json::json!(m)))
            .collect();
        assert_eq!(shown, ["clicks", "opens", "click_to_open", "conversion"]);
        for decision in ["confident", "none", "leader", "first", "split", "hold"] {
            let read: Decision = serde_json::from_value(decision.into()).expect(decision);
            assert_eq!(read.as_str(), decision);
        }
        assert_eq!(
            names(serde_json::json!(Mode::Bandit)).as_deref(),
            Some("bandit")
        );
    }
}
