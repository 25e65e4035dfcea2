//! `bounce-rules.toml` as it is typed, and how it becomes rules.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::{Blame, Class, EnhancedCode};
use serde::Deserialize;

use super::rules::{Codes, Rule, RuleError, Texts};
use super::{Action, Peer, Scope, Signal};

/// The most rules, and the most texts in one: reading a reply stays cheap.
const RULES_MAX: usize = 2_000;
const TEXTS_MAX: usize = 100;
/// The longest wait or pause that a rule may ask for.
const WAIT_MAX: Duration = Duration::from_secs(86_400);

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileForm {
    /// Short names for the beginnings of sources.
    #[serde(default)]
    pub(super) sources: BTreeMap<String, String>,
    /// Whose replies the rules are about: name and title.
    #[serde(default)]
    pub(super) origins: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) rule: Vec<RuleForm>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleForm {
    pub(super) name: String,
    pub(super) origin: Option<String>,
    #[serde(default)]
    pub(super) host: Vec<String>,
    #[serde(default)]
    pub(super) code: Vec<String>,
    #[serde(default)]
    pub(super) enhanced: Vec<String>,
    #[serde(default)]
    pub(super) any: Vec<String>,
    #[serde(default)]
    pub(super) all: Vec<String>,
    #[serde(default)]
    pub(super) none: Vec<String>,
    pub(super) class: Class,
    blame: Blame,
    action: Option<Action>,
    scope: Option<Scope>,
    signal: Option<SignalForm>,
    pause: Option<String>,
    retry: Option<String>,
    #[serde(default = "yes")]
    suppress: bool,
    pub(super) samples: Vec<SampleForm>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SignalForm {
    Slow,
    #[serde(rename = "fewer_messages")]
    FewerMessages,
    Block,
    /// Whatever the class says.
    None,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SampleForm {
    pub(super) reply: String,
    /// Where the reply was seen; kept in the file for people.
    pub(super) source: String,
}

fn yes() -> bool {
    true
}

impl FileForm {
    /// Reads a file; `text` is all of it.
    pub(super) fn parse(text: &str) -> Result<Self, RuleError> {
        let file: Self = toml::from_str(text).map_err(|error| syntax(text, &error))?;
        if file.rule.len() > RULES_MAX {
            let detail = format!("{} rules, at most {RULES_MAX} are read", file.rule.len());
            return Err(RuleError::Syntax { line: 0, detail });
        }
        Ok(file)
    }

    /// Refuses an empty source, and a short name that `[sources]` does not have.
    pub(super) fn check_source(&self, source: &str) -> Result<(), String> {
        match source.split_once(':') {
            None if source.trim().is_empty() => Err("has no source".to_owned()),
            Some((short, rest)) if !rest.starts_with("//") && !self.sources.contains_key(short) => {
                Err(format!("source {short:?} is not in [sources]"))
            }
            None | Some(_) => Ok(()),
        }
    }

    /// The rules, or everything that is wrong with them by themselves.
    pub(super) fn rules(&self, texts: &mut Texts) -> Result<Vec<Rule>, Vec<RuleError>> {
        let mut errors = Vec::new();
        let mut rules = Vec::with_capacity(self.rule.len());
        let mut names = BTreeSet::new();
        for form in &self.rule {
            let unknown = form
                .origin
                .as_ref()
                .filter(|origin| !self.origins.contains_key(*origin));
            let made = match unknown {
                Some(origin) => Err(format!("origin {origin:?} is not in [origins]")),
                None if !names.insert(&form.name) => Err("there are two of this name".to_owned()),
                None => form.rule(texts),
            };
            match made {
                Ok(rule) => rules.push(rule),
                Err(detail) => errors.push(RuleError::Rule {
                    rule: form.name.clone(),
                    detail,
                }),
            }
        }
        if errors.is_empty() {
            Ok(rules)
        } else {
            Err(errors)
        }
    }
}

impl RuleForm {
    /// Who gave the samples: the first that the rule is about.
    pub(super) fn peer(&self) -> Peer<'_> {
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

    fn rule(&self, texts: &mut Texts) -> Result<Rule, String> {
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || !self.name.chars().all(is_name) {
            return Err("a name is small letters, digits and hyphens".to_owned());
        }
        if self.enhanced.is_empty() && self.any.is_empty() && self.all.is_empty() {
            return Err(
                "matches by code alone, which is done without a rule: name enhanced, any or all"
                    .to_owned(),
            );
        }
        if self.any.len() + self.all.len() + self.none.len() > TEXTS_MAX {
            return Err(format!("has more than {TEXTS_MAX} texts"));
        }
        Ok(Rule {
            name: self.name.as_str().into(),
            codes: self
                .code
                .iter()
                .map(|code| codes(code))
                .collect::<Result<_, _>>()?,
            enhanced: self
                .enhanced
                .iter()
                .map(|code| enhanced(code))
                .collect::<Result<_, _>>()?,
            any: texts.add_all(&self.any)?,
            all: texts.add_all(&self.all)?,
            none: texts.add_all(&self.none)?,
            hosts: self.host.iter().map(|host| host.to_lowercase()).collect(),
            class: self.class,
            blame: self.blame,
            action: self.action,
            scope: self.scope,
            signal: self.signal()?,
            retry: self.retry.as_deref().map(wait).transpose()?,
            suppress: self.suppress,
        })
    }

    fn signal(&self) -> Result<Option<Option<Signal>>, String> {
        let pause = self.pause.as_deref().map(wait).transpose()?;
        match (self.signal, pause) {
            (Some(SignalForm::Block), pause) => Ok(Some(Some(Signal::Block { pause }))),
            (_, Some(_)) => Err("has a pause without signal = \"block\"".to_owned()),
            (Some(SignalForm::Slow), None) => Ok(Some(Some(Signal::Slow))),
            (Some(SignalForm::FewerMessages), None) => Ok(Some(Some(Signal::FewerMessages))),
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
