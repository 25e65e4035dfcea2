//! `bounce-rules.toml`: replies by what they say.
//!
//! A rule matches when every condition that it names holds: `code` (exact, or `4xx`, `5xx`),
//! `enhanced` (exact), `any` (one of these texts occurs), `all` (each occurs), `none` (none does),
//! `host` (who said it). Texts are compared without case. The first rule that matches decides. Every rule carries real replies as samples,
//! and reading the file fails when a sample is taken by another rule or by none.

use std::sync::Arc;
use std::time::Duration;

use model::{Blame, Class, EnhancedCode};
use serde::Deserialize;
use smtp::Reply;

use super::{Action, Peer, Scope, Signal, parse_reply};

/// The shipped rules, for when no file is configured.
const SHIPPED: &str = include_str!("../../../config/bounce-rules.toml");

/// The most rules, and the most texts in one: reading a reply stays cheap.
const RULES_MAX: usize = 2_000;
const TEXTS_MAX: usize = 100;
/// The longest wait or pause that a rule may ask for.
const WAIT_MAX: Duration = Duration::from_secs(86_400);

/// The rules in force.
#[derive(Debug, Clone, Default)]
pub struct Rules(Arc<[Rule]>);

/// What is wrong with a rules file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Not TOML, or a field that is unknown, missing or of another type.
    #[error("line {line}: {detail}")]
    Syntax {
        /// Line in the file, from 1; 0 when not known.
        line: u32,
        /// What is wrong.
        detail: String,
    },
    /// A rule that cannot be.
    #[error("rule {rule:?}: {detail}")]
    Rule {
        /// Its name.
        rule: String,
        /// What is wrong.
        detail: String,
    },
}

#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: Arc<str>,
    codes: Vec<Codes>,
    enhanced: Vec<EnhancedCode>,
    any: Vec<String>,
    all: Vec<String>,
    none: Vec<String>,
    hosts: Vec<String>,
    pub(super) class: Class,
    pub(super) blame: Blame,
    /// None: as the reply's code says.
    pub(super) action: Option<Action>,
    /// None: as the class says.
    pub(super) scope: Option<Scope>,
    /// None: as the class says.
    pub(super) signal: Option<Option<Signal>>,
    /// The wait before the next attempt, when the peer names none.
    pub(super) retry: Option<Duration>,
    pub(super) suppress: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codes {
    Exactly(u16),
    Hundred(u16),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    #[serde(default)]
    rule: Vec<RuleForm>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleForm {
    name: String,
    #[serde(default)]
    code: Vec<String>,
    #[serde(default)]
    enhanced: Vec<String>,
    #[serde(default)]
    any: Vec<String>,
    #[serde(default)]
    all: Vec<String>,
    #[serde(default)]
    none: Vec<String>,
    #[serde(default)]
    host: Vec<String>,
    class: Class,
    blame: Blame,
    action: Option<Action>,
    scope: Option<Scope>,
    signal: Option<SignalForm>,
    pause: Option<String>,
    retry: Option<String>,
    #[serde(default = "yes")]
    suppress: bool,
    samples: Vec<SampleForm>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SignalForm {
    Slow,
    Block,
    /// Whatever the class says.
    None,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SampleForm {
    reply: String,
    /// Where the reply was seen; kept in the file for people.
    source: String,
}

fn yes() -> bool {
    true
}

impl Rules {
    /// The rules that come with the program.
    ///
    /// # Panics
    /// Never: a test reads them.
    pub fn shipped() -> Self {
        Self::parse(SHIPPED).unwrap_or_default()
    }

    /// Reads a file; `text` is all of it.
    ///
    /// # Errors
    /// Everything that is wrong with it, samples that are taken by another rule included.
    pub fn parse(text: &str) -> Result<Self, Vec<RuleError>> {
        let file: FileForm = toml::from_str(text).map_err(|error| vec![syntax(text, &error)])?;
        let mut errors = Vec::new();
        if file.rule.len() > RULES_MAX {
            let detail = format!("{} rules, at most {RULES_MAX} are read", file.rule.len());
            return Err(vec![RuleError::Syntax { line: 0, detail }]);
        }
        let mut rules = Vec::with_capacity(file.rule.len());
        for form in &file.rule {
            match rule(form) {
                Ok(rule) => rules.push(rule),
                Err(detail) => errors.push(RuleError::Rule {
                    rule: form.name.clone(),
                    detail,
                }),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let rules = Self(rules.into());
        let wrong = file
            .rule
            .iter()
            .flat_map(|form| rules.check_samples(form))
            .collect::<Vec<_>>();
        if wrong.is_empty() {
            Ok(rules)
        } else {
            Err(wrong)
        }
    }

    /// Reads the file at `path`; the shipped rules when it is a default that does not exist.
    ///
    /// # Errors
    /// As [`Rules::parse`], or that the file cannot be read.
    pub fn load(file: &service::config::ReadFile) -> Result<Self, Vec<RuleError>> {
        match file.read() {
            Ok(Some(text)) => Self::parse(&text),
            Ok(None) => Ok(Self::shipped()),
            Err(mistake) => Err(vec![RuleError::Syntax {
                line: 0,
                detail: mistake.to_string(),
            }]),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first rule that matches; `text` is the reply's in lower case.
    pub(super) fn matching(&self, reply: &Reply, text: &str, peer: Peer<'_>) -> Option<&Rule> {
        self.0.iter().find(|rule| rule.matches(reply, text, peer))
    }

    fn check_samples(&self, form: &RuleForm) -> Vec<RuleError> {
        let error = |detail: String| RuleError::Rule {
            rule: form.name.clone(),
            detail,
        };
        if form.samples.is_empty() {
            return vec![error("has no sample reply".to_owned())];
        }
        let wrong = form.samples.iter().filter_map(|sample| {
            if sample.source.trim().is_empty() {
                return Some(error(format!("sample {:?} has no source", sample.reply)));
            }
            let Some(reply) = parse_reply(&sample.reply) else {
                return Some(error(format!("sample {:?} is not a reply", sample.reply)));
            };
            let peer = form.peer();
            match self.matching(&reply, &reply.text().to_lowercase(), peer) {
                Some(rule) if *rule.name == *form.name => None,
                Some(rule) => Some(error(format!(
                    "sample {:?} is taken by rule {:?}",
                    sample.reply, rule.name
                ))),
                None => Some(error(format!(
                    "sample {:?} is taken by no rule",
                    sample.reply
                ))),
            }
        });
        wrong.collect()
    }
}

impl Rule {
    fn matches(&self, reply: &Reply, text: &str, peer: Peer<'_>) -> bool {
        let code = self.codes.iter().any(|codes| match *codes {
            Codes::Exactly(code) => reply.code == code,
            Codes::Hundred(hundred) => reply.code / 100 == hundred,
        });
        let enhanced = reply.enhanced.is_some_and(|code| {
            self.enhanced
                .contains(&EnhancedCode(code.class, code.subject, code.detail))
        });
        (self.codes.is_empty() || code)
            && (self.enhanced.is_empty() || enhanced)
            && (self.any.is_empty() || self.any.iter().any(|part| text.contains(part.as_str())))
            && self.all.iter().all(|part| text.contains(part.as_str()))
            && !self.none.iter().any(|part| text.contains(part.as_str()))
            && (self.hosts.is_empty() || self.hosts.iter().any(|host| is_of(peer, host)))
    }
}

/// Whether `peer` is what a rule's `host` names: `.x.example` is an ending of host names, anything
/// else the name of a destination.
fn is_of(peer: Peer<'_>, host: &str) -> bool {
    if host.starts_with('.') {
        let name = peer.host.as_bytes();
        name.len()
            .checked_sub(host.len())
            .and_then(|at| name.get(at..))
            .is_some_and(|end| end.eq_ignore_ascii_case(host.as_bytes()))
    } else {
        peer.destination == host
    }
}

impl RuleForm {
    /// Who gave the samples: the first that the rule is about.
    fn peer(&self) -> Peer<'_> {
        match self.host.first().map(String::as_str) {
            Some(host) if host.starts_with('.') => Peer {
                host,
                destination: "",
            },
            Some(destination) => Peer {
                host: "",
                destination,
            },
            None => Peer::default(),
        }
    }

    fn signal(&self) -> Result<Option<Option<Signal>>, String> {
        let pause = self.pause.as_deref().map(wait).transpose()?;
        match (self.signal, pause) {
            (Some(SignalForm::Block), pause) => Ok(Some(Some(Signal::Block { pause }))),
            (_, Some(_)) => Err("has a pause without signal = \"block\"".to_owned()),
            (Some(SignalForm::Slow), None) => Ok(Some(Some(Signal::Slow))),
            (Some(SignalForm::None), None) => Ok(Some(None)),
            (None, None) => Ok(None),
        }
    }
}

/// A duration of the file, within a day.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = model::units::parse_duration(text).ok();
    wait.filter(|wait| *wait <= WAIT_MAX)
        .ok_or_else(|| format!("{text:?} is not a wait of at most a day, such as \"30m\""))
}

fn rule(form: &RuleForm) -> Result<Rule, String> {
    if form.enhanced.is_empty() && form.any.is_empty() && form.all.is_empty() {
        return Err(
            "matches by code alone, which the fallback does: name enhanced, any or all".to_owned(),
        );
    }
    if form.any.len() + form.all.len() + form.none.len() > TEXTS_MAX {
        return Err(format!("has more than {TEXTS_MAX} texts"));
    }
    let texts = |texts: &[String]| -> Result<Vec<String>, String> {
        let short = texts.iter().find(|text| text.trim().len() < 3);
        match short {
            Some(text) => Err(format!("text {text:?} is too short to mean anything")),
            None => Ok(texts.iter().map(|text| text.to_lowercase()).collect()),
        }
    };
    Ok(Rule {
        name: form.name.as_str().into(),
        codes: form
            .code
            .iter()
            .map(|code| codes(code))
            .collect::<Result<_, _>>()?,
        enhanced: form
            .enhanced
            .iter()
            .map(|code| enhanced(code))
            .collect::<Result<_, _>>()?,
        any: texts(&form.any)?,
        all: texts(&form.all)?,
        none: texts(&form.none)?,
        hosts: form.host.iter().map(|host| host.to_lowercase()).collect(),
        class: form.class,
        blame: form.blame,
        action: form.action,
        scope: form.scope,
        signal: form.signal()?,
        retry: form.retry.as_deref().map(wait).transpose()?,
        suppress: form.suppress,
    })
}

fn codes(text: &str) -> Result<Codes, String> {
    let error = || format!("{text:?} is not a reply code such as \"550\", nor \"4xx\" or \"5xx\"");
    match text {
        "4xx" => Ok(Codes::Hundred(4)),
        "5xx" => Ok(Codes::Hundred(5)),
        _ => text
            .parse()
            .ok()
            .filter(|code| (400..600).contains(code))
            .map(Codes::Exactly)
            .ok_or_else(error),
    }
}

fn enhanced(text: &str) -> Result<EnhancedCode, String> {
    match smtp::EnhancedCode::parse_prefix(text) {
        Some((code, "")) if code.class != 2 => {
            Ok(EnhancedCode(code.class, code.subject, code.detail))
        }
        Some(_) | None => Err(format!(
            "{text:?} is not an enhanced status code of a refusal such as \"5.1.1\""
        )),
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> RuleError {
    let before = error
        .span()
        .and_then(|span| text.get(..span.start))
        .map(|before| before.matches('\n').count() + 1);
    let line = before
        .and_then(|line| u32::try_from(line).ok())
        .unwrap_or(0);
    RuleError::Syntax {
        line,
        detail: error.message().replace('\n', ", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::suppression_for;
    use proptest::prelude::*;

    #[test]
    fn the_shipped_rules_take_their_own_samples() {
        match Rules::parse(SHIPPED) {
            Ok(rules) => assert!(rules.len() >= 25, "{} rules", rules.len()),
            Err(errors) => {
                let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
                panic!("{}", lines.join("\n"));
            }
        }
    }

    #[test]
    fn names_are_unique_and_reputation_never_counts_against_a_person() {
        let rules = Rules::shipped();
        let mut names: Vec<_> = rules.0.iter().map(|rule| rule.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), rules.len());
        for rule in rules.0.iter() {
            let suppresses = rule.suppress && suppression_for(rule.class).is_some();
            assert!(
                !suppresses || rule.blame == Blame::Recipient,
                "{}",
                rule.name
            );
        }
    }

    fn errors(text: &str) -> String {
        let errors = Rules::parse(text).expect_err("wrong rules");
        errors
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn file(name: &str, conditions: &str, sample: &str) -> String {
        format!(
            "[[rule]]\nname = \"{name}\"\n{conditions}\nclass = \"other\"\nblame = \"us\"\nsamples = [{{ reply = \"{sample}\", source = \"test\" }}]\n"
        )
    }

    #[test]
    fn a_shadowed_rule_is_found() {
        let wide = file("wide", "any = [\"blocked\"]", "550 blocked");
        let narrow = file("narrow", "all = [\"blocked by x\"]", "550 blocked by X");
        assert!(errors(&format!("{wide}{narrow}")).contains("taken by rule \"wide\""));
        assert!(Rules::parse(&format!("{narrow}{wide}")).is_ok());
    }

    #[test]
    fn wrong_rules_are_named() {
        let table = [
            (file("a", "", "550 x"), "by code alone"),
            (file("a", "any = [\"\"]", "550 x"), "too short"),
            (
                file("a", "any = [\"xyz\"]\ncode = [\"250\"]", "550 xyz"),
                "not a reply code",
            ),
            (
                file("a", "enhanced = [\"5.1\"]", "550 xyz"),
                "not an enhanced status code",
            ),
            (file("a", "any = [\"xyz\"]", "550 abc"), "taken by no rule"),
            (file("a", "any = [\"xyz\"]", "xyz"), "not a reply"),
            ("[[rule]]\nname = \"a\"\nnope = 1".to_owned(), "line 3"),
            (
                file("a", "any = [\"xyz\"]", "550 xyz")
                    .replace("[{ reply = \"550 xyz\", source = \"test\" }]", "[]"),
                "no sample",
            ),
        ];
        for (text, part) in table {
            assert!(errors(&text).contains(part), "{text}\n{}", errors(&text));
        }
    }

    proptest! {
        #[test]
        fn any_reply_is_read(code in 200_u16..600, text in "\\PC{0,200}") {
            let reading = Rules::shipped().classify(&Reply::new(code, &text), Peer::default());
            prop_assert!(reading.suppress.is_none() || reading.blame == Blame::Recipient);
            prop_assert!(reading.action == Action::Retry || reading.rule.is_some() || code >= 500);
        }
    }
}
