//! The rules in force: replies by what they say.
//!
//! A rule matches when every condition that it names holds: `code` (exact, or `4xx`, `5xx`),
//! `enhanced` (exact), `any` (one of these texts occurs), `all` (each occurs), `none` (none does),
//! `host` (who said it). Texts are compared without case, all of them in one pass over the reply,
//! so that two thousand rules cost what a hundred do. The first rule that matches decides. Every
//! rule carries real replies as samples, and reading the file fails when a sample is taken by
//! another rule or by none.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aho_corasick::AhoCorasick;
use model::{Blame, Class, EnhancedCode};
use smtp::Reply;

use super::form::{FileForm, RuleForm};
use super::{Action, Peer, Scope, Signal, parse_reply};

/// The shipped rules, for when no file is configured.
pub(super) const SHIPPED: &str = include_str!("../../../config/bounce-rules.toml");

/// The rules in force.
#[derive(Debug, Clone, Default)]
pub struct Rules(Arc<RuleSet>);

#[derive(Debug, Default)]
struct RuleSet {
    rules: Vec<Rule>,
    /// Finds all texts of all rules; none without rules.
    texts: Option<AhoCorasick>,
    version: Arc<str>,
}

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
    pub(super) codes: Vec<Codes>,
    pub(super) enhanced: Vec<EnhancedCode>,
    pub(super) any: Vec<TextId>,
    pub(super) all: Vec<TextId>,
    pub(super) none: Vec<TextId>,
    /// In small letters.
    pub(super) hosts: Vec<String>,
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
pub(super) enum Codes {
    Exactly(u16),
    Hundred(u16),
}

/// The place of a text in [`Texts`].
pub(super) type TextId = usize;

/// The texts of all rules, each once, in small letters.
#[derive(Debug, Default)]
pub(super) struct Texts {
    places: HashMap<String, TextId>,
    all: Vec<String>,
}

impl Texts {
    pub(super) fn add_all(&mut self, texts: &[String]) -> Result<Vec<TextId>, String> {
        texts.iter().map(|text| self.add(text)).collect()
    }

    fn add(&mut self, text: &str) -> Result<TextId, String> {
        if text.trim().len() < 3 {
            return Err(format!("text {text:?} is too short to mean anything"));
        }
        let text = text.to_lowercase();
        if let Some(&place) = self.places.get(&text) {
            return Ok(place);
        }
        self.all.push(text.clone());
        self.places.insert(text, self.all.len() - 1);
        Ok(self.all.len() - 1)
    }
}

/// Which texts occur in a reply.
struct Found(Vec<bool>);

impl Found {
    fn has(&self, text: TextId) -> bool {
        self.0.get(text).copied().unwrap_or(false)
    }
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
        let file = FileForm::parse(text).map_err(|error| vec![error])?;
        let rules = Self::of(&file, version_of(text))?;
        let wrong: Vec<_> = file
            .rule
            .iter()
            .flat_map(|form| rules.check_samples(form, &file))
            .collect();
        if wrong.is_empty() {
            Ok(rules)
        } else {
            Err(wrong)
        }
    }

    pub(super) fn of(file: &FileForm, version: Arc<str>) -> Result<Self, Vec<RuleError>> {
        let mut texts = Texts::default();
        let rules = file.rules(&mut texts)?;
        let too_much = |error: aho_corasick::BuildError| {
            let detail = error.to_string();
            vec![RuleError::Syntax { line: 0, detail }]
        };
        let texts = AhoCorasick::new(&texts.all).map_err(too_much)?;
        Ok(Self(Arc::new(RuleSet {
            rules,
            texts: Some(texts),
            version,
        })))
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
        self.0.rules.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.rules.is_empty()
    }

    /// A hash of the file's content: the same rules have the same version everywhere. Empty
    /// without a file.
    pub fn version(&self) -> &Arc<str> {
        &self.0.version
    }

    /// For tests, which read many replies: the file is large.
    #[cfg(test)]
    pub(super) fn shipped_once() -> &'static Self {
        static RULES: std::sync::LazyLock<Rules> = std::sync::LazyLock::new(Rules::shipped);
        &RULES
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> &[Rule] {
        &self.0.rules
    }

    /// The first rule that matches; `text` is the reply's in lower case.
    pub(super) fn matching(&self, reply: &Reply, text: &str, peer: Peer<'_>) -> Option<&Rule> {
        let texts = self.0.texts.as_ref()?;
        let mut found = Found(vec![false; texts.patterns_len()]);
        for hit in texts.find_overlapping_iter(text) {
            if let Some(occurs) = found.0.get_mut(hit.pattern().as_usize()) {
                *occurs = true;
            }
        }
        let mut rules = self.0.rules.iter();
        rules.find(|rule| rule.matches(reply, &found, peer))
    }

    fn check_samples(&self, form: &RuleForm, file: &FileForm) -> Vec<RuleError> {
        let error = |detail: String| RuleError::Rule {
            rule: form.name.clone(),
            detail,
        };
        if form.samples.is_empty() {
            return vec![error("has no sample reply".to_owned())];
        }
        let wrong = form.samples.iter().filter_map(|sample| {
            if let Err(detail) = file.check_source(&sample.source) {
                return Some(error(format!("sample {:?}: {detail}", sample.reply)));
            }
            let Some(reply) = parse_reply(&sample.reply) else {
                return Some(error(format!("sample {:?} is not a reply", sample.reply)));
            };
            match self.matching(&reply, &reply.text().to_lowercase(), form.peer()) {
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
    fn matches(&self, reply: &Reply, found: &Found, peer: Peer<'_>) -> bool {
        let code = || {
            self.codes.iter().any(|codes| match *codes {
                Codes::Exactly(code) => reply.code == code,
                Codes::Hundred(hundred) => reply.code / 100 == hundred,
            })
        };
        let enhanced = || {
            reply.enhanced.is_some_and(|code| {
                self.enhanced
                    .contains(&EnhancedCode(code.class, code.subject, code.detail))
            })
        };
        (self.any.is_empty() || self.any.iter().any(|text| found.has(*text)))
            && self.all.iter().all(|text| found.has(*text))
            && !self.none.iter().any(|text| found.has(*text))
            && (self.codes.is_empty() || code())
            && (self.enhanced.is_empty() || enhanced())
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

/// Sixteen hexadecimal digits that tell one file's content from another's.
fn version_of(text: &str) -> Arc<str> {
    format!("{:016x}", model::partition_hash("bounce-rules", text)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn the_version_is_of_the_content() {
        let one = file("a", "any = [\"xyz\"]", "550 xyz");
        let parse = |text: &str| Rules::parse(text).expect("rules");
        assert_eq!(parse(&one).version(), parse(&one).version());
        assert_ne!(
            parse(&one).version(),
            parse(&format!("{one}# more\n")).version()
        );
        assert_eq!(parse(&one).version().len(), 16);
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
            (
                file("a", "any = [\"xyz\"]\nnone = [\"abc\"]", "550 xyz abc"),
                "taken by no rule",
            ),
            (
                file("a", "any = [\"xyz\"]\norigin = \"nobody\"", "550 xyz"),
                "not in [origins]",
            ),
            (
                file("a", "any = [\"xyz\"]\nretry = \"30d\"", "550 xyz"),
                "at most a day",
            ),
            (
                file("a", "any = [\"xyz\"]\npause = \"1h\"", "550 xyz"),
                "without signal",
            ),
            (file("a b", "any = [\"xyz\"]", "550 xyz"), "small letters"),
            (
                file("a", "any = [\"xyz\"]", "550 xyz") + &file("a", "any = [\"abc\"]", "550 abc"),
                "two of this name",
            ),
            (file("a", "any = [\"xyz\"]", "xyz"), "not a reply"),
            (
                file("a", "any = [\"xyz\"]", "550 xyz").replace("\"test\"", "\" \""),
                "has no source",
            ),
            (
                file("a", "any = [\"xyz\"]", "550 xyz").replace("\"test\"", "\"book:12\""),
                "not in [sources]",
            ),
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
            let reading = Rules::shipped_once().classify(&Reply::new(code, &text), Peer::default());
            prop_assert!(reading.suppress.is_none() || reading.blame == Blame::Recipient);
            prop_assert!(reading.action == Action::Retry || reading.rule.is_some() || code >= 500);
        }

        #[test]
        fn any_file_is_read_or_refused(text in "\\PC{0,200}", conditions in "(any|all|none|code|enhanced|host) = \\[\"[a-z0-9.]{0,9}\"\\]") {
            let _read = Rules::parse(&text);
            let _read = Rules::parse(&file("a", &conditions, &text.replace(['"', '\\'], "")));
        }
    }
}
