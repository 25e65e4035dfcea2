//! `variants` and `ab_test`: what they may be, and what a test of that size can show.
//!
//! Owns the two fields as far as they can be judged without account, keys and templates. Must not
//! deal recipients.

use std::collections::HashSet;
use std::time::Duration;

use content::Mailbox;
use engagement::abtest::{Fallback, Metric, Mode, VARIANTS, default_confidence, plan};
use model::units::parse_duration;
use model::{EmailAddress, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::fields::{Fields, expected, string};
use super::head::display_name;
use crate::abtest::layout::ROUNDS;
use crate::released::Test;

const NAME_MAX: usize = 64;
/// The part of the list that is tested when the caller says nothing.
const FRACTION: f64 = 0.2;
const WAIT: Duration = Duration::from_secs(4 * 3_600);
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(14 * 24 * 3_600);
/// A test that picks the better variant less often than this is worth a warning.
const LIKELY: f64 = 0.8;

/// A variant as it was asked for.
#[derive(Debug)]
pub(crate) struct VariantRequest {
    pub(crate) name: String,
    from: Option<(Option<EmailAddress>, Option<String>)>,
    pub(crate) subject: Option<String>,
    pub(crate) html: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) send_at: Option<Timestamp>,
}

impl VariantRequest {
    /// Its sender, where that is not the batch's.
    pub(crate) fn from(&self, of_batch: &Mailbox) -> Option<Mailbox> {
        let (email, name) = self.from.as_ref()?;
        let own = Mailbox {
            email: email.as_ref().unwrap_or(&of_batch.email).clone(),
            name: name.clone().or_else(|| of_batch.name.clone()),
        };
        (own != *of_batch).then_some(own)
    }
}

/// What is to be done with variants.
#[derive(Debug)]
pub(crate) struct TestRequest {
    pub(crate) mode: Mode,
    pub(crate) fraction: f64,
    pub(crate) metric: Metric,
    pub(crate) wait: Duration,
    pub(crate) min_confidence: f64,
    pub(crate) fallback: Fallback,
}

/// Reads both fields.
pub(crate) fn read(fields: &mut Fields<'_>) -> (Vec<VariantRequest>, Option<TestRequest>) {
    let variants = fields.each("variants", *VARIANTS.end(), variant);
    let variants: Vec<_> = variants.unwrap_or_default();
    let count = variants.len();
    if count > 0 && !VARIANTS.contains(&count) {
        let (least, most) = (VARIANTS.start(), VARIANTS.end());
        fields.mistake(
            "variants",
            format!("has {count}, expected {least} to {most}"),
        );
    }
    let mut names = HashSet::new();
    for (place, of) in variants.iter().enumerate() {
        if of.as_ref().is_some_and(|of| !names.insert(of.name.clone())) {
            let name = format!("variants/{place}/name");
            fields.mistake_at(&name, "is the name of another variant");
        }
    }
    let test = if fields.has("ab_test") {
        if count == 0 {
            fields.mistake("ab_test", "is for a batch with variants");
        }
        fields.within("ab_test", |fields| test(fields, count))
    } else {
        fields.take("ab_test");
        (count > 0).then(|| split(count))
    };
    // A variant that could not be read is among the mistakes.
    (variants.into_iter().flatten().collect(), test)
}

/// Variants without a test: everybody gets one of them.
fn split(variants: usize) -> TestRequest {
    TestRequest {
        mode: Mode::Split,
        fraction: 1.0,
        metric: Metric::default(),
        wait: WAIT,
        min_confidence: default_confidence(variants),
        fallback: Fallback::default(),
    }
}

fn variant(fields: &mut Fields<'_>) -> Option<VariantRequest> {
    let from = fields.within("from", |from| {
        let email = from.parsed("email");
        let name = from.converted("name", display_name);
        (email, name.filter(|name| !name.is_empty()))
    });
    let (subject, html, text) = (
        fields.string("subject"),
        fields.string("html"),
        fields.string("text"),
    );
    let send_at = fields.time("send_at");
    if !fields.has("name") {
        fields.take("name");
        fields.mistake("name", "is missing");
    }
    Some(VariantRequest {
        name: fields.label("name", NAME_MAX)?,
        from,
        subject,
        html,
        text,
        send_at,
    })
}

fn test(fields: &mut Fields<'_>, variants: usize) -> TestRequest {
    let mode = fields.converted("mode", word("winner, split, bandit"));
    let mode = mode.unwrap_or_default();
    let fraction = fields.converted("test_fraction", |value| {
        let part = value.as_f64().filter(|part| *part > 0.0 && *part <= 1.0);
        part.ok_or_else(|| expected(&value, "a part above 0 and up to 1"))
    });
    if mode == Mode::Split && fraction.is_some_and(|part| part < 1.0) {
        fields.mistake("test_fraction", "a split holds nothing back: leave it out");
    }
    let metric = word("clicks, opens, click_to_open, conversion");
    let metric = fields.converted("metric", metric).unwrap_or_default();
    let wait = fields.converted("wait", wait).unwrap_or(WAIT);
    let min_confidence = fields.converted("min_confidence", |value| {
        let sure = value.as_f64().filter(|sure| (0.5..1.0).contains(sure));
        sure.ok_or_else(|| expected(&value, "a probability from 0.5 to below 1"))
    });
    TestRequest {
        fraction: match mode {
            Mode::Split => 1.0,
            Mode::Winner | Mode::Bandit => fraction.unwrap_or(FRACTION),
        },
        mode,
        metric,
        wait,
        min_confidence: min_confidence.unwrap_or_else(|| default_confidence(variants)),
        fallback: fields.parsed("fallback").unwrap_or_default(),
    }
}

/// Reads one of these words.
fn word<T: DeserializeOwned>(words: &'static str) -> impl FnOnce(Value) -> Result<T, String> {
    move |value| {
        let text = string(value)?;
        serde_json::from_value(Value::String(text)).map_err(|_| format!("is none of {words}"))
    }
}

fn wait(value: Value) -> Result<Duration, String> {
    let wait = parse_duration(&string(value)?).map_err(|error| error.to_string())?;
    match (WAIT_MIN..=WAIT_MAX).contains(&wait) {
        true => Ok(wait),
        false => Err("is less than a second or more than 14 days".to_owned()),
    }
}

/// When the last of a batch that is released at `release` leaves, as far as that is known before.
pub(crate) fn over(
    variants: &[VariantRequest],
    test: Option<&TestRequest>,
    release: Timestamp,
) -> Timestamp {
    let sent = variants.iter().filter_map(|of| of.send_at);
    let last = sent.fold(release, Timestamp::max);
    match test {
        Some(test) if test.fraction < 1.0 && test.mode == Mode::Bandit => last + test.wait * ROUNDS,
        Some(test) if test.fraction < 1.0 => last + test.wait,
        Some(_) | None => last,
    }
}

/// What a test of this size can show.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Promise {
    recipients_per_variant: u64,
    /// The usual rate of the metric, from which the rest is computed.
    assumed_rate: f64,
    /// The smallest difference in rate that ends `confident` in 8 tests of 10; none would.
    min_detectable_effect: Option<f64>,
    /// How often the better variant leads, when it is better by a fifth.
    chance_of_picking_right: f64,
}

impl Promise {
    /// For a test of `variants` among `recipients`; none: nothing is decided, or nobody is there.
    pub(crate) fn of(test: Option<&Test>, variants: usize, recipients: u64) -> Option<Self> {
        let test = test.filter(|test| test.mode != Mode::Split)?;
        let tested = (recipients as f64 * test.fraction / variants.max(1) as f64).round();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of a number of recipients"
        )]
        let per_variant = tested as u64;
        // Of those who opened, a fifth of all, for the metric that counts these.
        let (rate, counted) = match test.metric {
            Metric::Clicks => (0.02, per_variant),
            Metric::Opens => (0.2, per_variant),
            Metric::ClickToOpen => (0.1, per_variant / 5),
            Metric::Conversion => (0.01, per_variant),
        };
        let plan = plan(variants, counted, rate, test.min_confidence);
        (recipients > 0).then_some(Self {
            recipients_per_variant: per_variant,
            assumed_rate: rate,
            min_detectable_effect: plan.detectable,
            chance_of_picking_right: plan.chance_of_picking_right,
        })
    }

    /// What the caller should be warned of, where the test is a small one.
    pub(crate) fn warning(&self) -> Option<String> {
        (self.chance_of_picking_right < LIKELY).then(|| {
            let found = match self.min_detectable_effect {
                Some(effect) => format!(
                    "a difference of {:.1} points or more is found in 8 tests of 10",
                    100.0 * effect
                ),
                None => "no difference is found in 8 tests of 10".to_owned(),
            };
            format!(
                "a small test: {} recipients for each variant; at a usual rate of {:.0} % {found}, and a variant that is better by a fifth leads in {:.0} %",
                self.recipients_per_variant,
                100.0 * self.assumed_rate,
                100.0 * self.chance_of_picking_right,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::fields::Mistakes;
    use proptest::prelude::*;
    use serde_json::json;

    fn mistakes_of(document: Value) -> (usize, Option<TestRequest>, Vec<String>) {
        let mut mistakes = Mistakes::default();
        let mut fields = Fields::of(String::new(), document, &mut mistakes);
        let (variants, test) = read(&mut fields);
        fields.finish();
        let found = mistakes.into_vec().into_iter();
        (
            variants.len(),
            test,
            found.map(|error| error.path).collect(),
        )
    }

    #[test]
    fn defaults_are_the_contracts() {
        let two =
            json!([{"name": "A", "subject": "a"}, {"name": "B", "from": {}, "send_at": null}]);
        let (count, test, mistakes) = mistakes_of(json!({"variants": two, "ab_test": {}}));
        let test = test.expect("a test");
        assert_eq!((count, mistakes), (2, Vec::new()));
        assert_eq!((test.mode, test.metric), (Mode::Winner, Metric::Clicks));
        assert_eq!((test.wait, test.fallback), (WAIT, Fallback::Leader));
        assert!((test.min_confidence - 0.975).abs() < 1e-12 && (test.fraction - 0.2).abs() < 1e-12);
        let (_, test, _) = mistakes_of(json!({"variants": two}));
        let test = test.expect("a split");
        assert_eq!((test.mode, test.fraction >= 1.0), (Mode::Split, true));
        assert!(
            mistakes_of(json!({"variants": [], "ab_test": null}))
                .1
                .is_none()
        );
    }

    #[test]
    fn every_mistake_is_named_with_its_path() {
        let nine: Vec<_> = (0..9).map(|n| json!({"name": n.to_string()})).collect();
        let two = json!([{"name": "A"}, {"name": "B"}]);
        for (document, paths) in [
            (json!({"variants": [{"name": "A"}]}), &["/variants"][..]),
            (json!({"variants": nine}), &["/variants"]),
            (json!({"variants": {}}), &["/variants"]),
            (
                json!({"variants": [{"name": "A"}, 7]}),
                &["/variants/1", "/variants/1/name"],
            ),
            (
                json!({"variants": [{"name": "A"}, {"name": "A", "subjct": "x"}]}),
                &["/variants/1/subjct", "/variants/1/name"],
            ),
            (
                json!({"variants": [{"subject": 7}, {"name": "", "from": {"email": "no"}, "send_at": "x"}]}),
                &[
                    "/variants/0/subject",
                    "/variants/0/name",
                    "/variants/1/from/email",
                    "/variants/1/send_at",
                    "/variants/1/name",
                ],
            ),
            (json!({"ab_test": {"mode": "winner"}}), &["/ab_test"]),
            (
                json!({"variants": two, "ab_test": {"mode": "best", "test_fraction": 0, "metric": "sales", "wait": "4", "min_confidence": 1, "fallback": "x", "a": 1}}),
                &[
                    "/ab_test/mode",
                    "/ab_test/test_fraction",
                    "/ab_test/metric",
                    "/ab_test/wait",
                    "/ab_test/min_confidence",
                    "/ab_test/fallback",
                    "/ab_test/a",
                ],
            ),
            (
                json!({"variants": two, "ab_test": {"mode": "split", "test_fraction": 0.2, "wait": "99d"}}),
                &["/ab_test/test_fraction", "/ab_test/wait"],
            ),
        ] {
            assert_eq!(mistakes_of(document.clone()).2, paths, "{document}");
        }
    }

    #[test]
    fn a_small_test_is_warned_of() {
        let test = Test {
            mode: Mode::Winner,
            fraction: 0.2,
            metric: Metric::Clicks,
            wait_ms: 1,
            min_confidence: 0.975,
            fallback: Fallback::Leader,
            seed: [0; 32],
        };
        let small = Promise::of(Some(&test), 2, 10_000).expect("a promise");
        assert_eq!(small.recipients_per_variant, 1_000);
        assert!((small.chance_of_picking_right - 0.73).abs() < 0.01);
        let warning = small.warning().expect("a warning");
        assert!(warning.contains("leads in 73 %"), "{warning}");
        let large = Promise::of(Some(&test), 2, 100_000).expect("a promise");
        assert_eq!(large.warning(), None);
        assert_eq!(Promise::of(Some(&test), 2, 0), None);
    }

    proptest! {
        #[test]
        fn any_json_is_read_or_refused(text in r#"[\[\]{}":, a-z0-9.]{0,60}"#) {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let _read = mistakes_of(json!({"variants": value.clone(), "ab_test": value}));
            }
        }
    }
}
