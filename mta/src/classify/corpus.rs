//! The shipped rules against their own proofs, and the coverage table of `docs/bounce-rules.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use model::{Blame, Class};
use service::config::shaping::ShapingFile;

use super::form::{FileForm, RuleForm};
use super::rules::SHIPPED;
use super::{Rules, parse_reply, suppression_for};

fn file() -> FileForm {
    FileForm::parse(SHIPPED).expect("the shipped rules")
}

fn path(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of)
}

fn texts_of(form: &RuleForm) -> Vec<String> {
    form.samples
        .iter()
        .filter_map(|sample| parse_reply(&sample.reply))
        .map(|reply| reply.text().to_lowercase())
        .collect()
}

#[test]
fn every_sample_is_taken_by_its_rule() {
    match Rules::parse(SHIPPED) {
        Ok(rules) => assert!(rules.len() >= 120, "{} rules", rules.len()),
        Err(errors) => {
            let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
            panic!("{}", lines.join("\n"));
        }
    }
}

/// A text, code or host that no sample shows is invented, or dead.
#[test]
fn every_condition_is_seen_in_a_sample() {
    let mut invented = Vec::new();
    for form in &file().rule {
        let texts = texts_of(form);
        let replies: Vec<_> = form.samples.iter().map(|s| s.reply.as_str()).collect();
        for text in &form.any {
            let text = text.to_lowercase();
            if !texts.iter().any(|sample| sample.contains(&text)) {
                invented.push(format!("{}: any {text:?}", form.name));
            }
        }
        for code in &form.code {
            let start = code.trim_end_matches('x');
            if !replies.iter().any(|reply| reply.starts_with(start)) {
                invented.push(format!("{}: code {code:?}", form.name));
            }
        }
        for code in &form.enhanced {
            if !replies.iter().any(|reply| reply.contains(code.as_str())) {
                invented.push(format!("{}: enhanced {code:?}", form.name));
            }
        }
    }
    assert!(invented.is_empty(), "{}", invented.join("\n"));
}

#[test]
fn every_sample_has_a_public_source() {
    let file = file();
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    for form in &file.rule {
        for sample in &form.samples {
            let public = match sample.source.split_once(':') {
                Some(("https" | "http", rest)) => rest.starts_with("//") && rest.contains('.'),
                Some((short, _)) => {
                    used.insert(short.to_owned());
                    file.sources.contains_key(short)
                }
                None => false,
            };
            if !public {
                wrong.push(format!("{}: {:?}", form.name, sample.source));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let unused: Vec<_> = file.sources.keys().filter(|k| !used.contains(*k)).collect();
    assert!(unused.is_empty(), "unused: {unused:?}");
    let dead: Vec<_> = file
        .sources
        .values()
        .filter(|beginning| !beginning.starts_with("http") && !beginning.starts_with("captured"))
        .collect();
    assert!(dead.is_empty(), "neither an address nor captured: {dead:?}");
}

#[test]
fn every_origin_and_host_exists() {
    let file = file();
    let shaping = std::fs::read_to_string(path("config/shaping.toml")).expect("shaping.toml");
    let shaping = ShapingFile::parse(Path::new("shaping.toml"), &shaping).expect("shaping.toml");
    let providers: BTreeSet<_> = shaping.providers.iter().map(|p| &*p.name).collect();
    for form in &file.rule {
        assert!(form.origin.is_some(), "{} has no origin", form.name);
        for host in &form.host {
            let is_suffix = host.starts_with('.') && host.len() > 3;
            assert!(
                is_suffix || providers.contains(host.as_str()),
                "{}: host {host:?} is neither a suffix nor a provider of shaping.toml",
                form.name
            );
        }
    }
    let used: BTreeSet<_> = file.rule.iter().filter_map(|r| r.origin.as_ref()).collect();
    let unused: Vec<_> = file.origins.keys().filter(|k| !used.contains(k)).collect();
    assert!(unused.is_empty(), "origins without a rule: {unused:?}");
}

/// A refusal for reputation, content or policy never counts against a person.
#[test]
fn reputation_never_suppresses() {
    for form in &file().rule {
        for sample in &form.samples {
            let reply = parse_reply(&sample.reply).expect("a reply");
            let read = Rules::shipped_once().classify(&reply, form.peer());
            let suppresses = read.suppress.is_some();
            let is_recipients = read.blame == Blame::Recipient;
            assert!(!suppresses || is_recipients, "{}", form.name);
            let about_us = matches!(
                read.class,
                Class::IpBlocked
                    | Class::DomainBlocked
                    | Class::SpamContent
                    | Class::AuthFailed
                    | Class::Policy
                    | Class::RateLimited
                    | Class::Greylisted
            );
            assert!(!(suppresses && about_us), "{}", form.name);
        }
    }
    for rule in Rules::shipped_once().all() {
        let suppresses = rule.suppress && suppression_for(rule.class).is_some();
        assert!(
            !suppresses || rule.blame == Blame::Recipient,
            "{}",
            rule.name
        );
    }
}

#[test]
fn every_class_of_the_contract_can_be_reached() {
    let by_rules: BTreeSet<_> = Rules::shipped_once()
        .all()
        .iter()
        .map(|r| r.class)
        .collect();
    let missing: Vec<_> = Class::ALL
        .iter()
        // What an automatic answer says arrives as mail, not as a reply to ours.
        .filter(|class| **class != Class::AutoReply && !by_rules.contains(class))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

const FROM: &str = "<!-- coverage: written by a test -->\n";
const TO: &str = "<!-- end of coverage -->";

/// The table is of the rules as they are. `HIKYAKU_WRITE_DOCS=1` writes it.
#[test]
fn the_documented_coverage_is_of_these_rules() {
    let place = path("docs/bounce-rules.md");
    let page = std::fs::read_to_string(&place).expect("docs/bounce-rules.md");
    let (before, rest) = page.split_once(FROM).expect("the first mark");
    let (documented, after) = rest.split_once(TO).expect("the last mark");
    let table = coverage(&file());
    if std::env::var_os("HIKYAKU_WRITE_DOCS").is_some() {
        std::fs::write(&place, format!("{before}{FROM}{table}{TO}{after}")).expect("written");
    } else {
        assert_eq!(documented, table, "HIKYAKU_WRITE_DOCS=1 writes it anew");
    }
}

fn coverage(file: &FileForm) -> String {
    let mut rows: BTreeMap<&str, (usize, usize, BTreeSet<Class>)> = BTreeMap::new();
    for form in &file.rule {
        let origin = form.origin.as_deref().unwrap_or_default();
        let (rules, samples, classes) = rows.entry(origin).or_default();
        *rules += 1;
        *samples += form.samples.len();
        classes.insert(form.class);
    }
    let mut sorted: Vec<_> = rows.into_iter().collect();
    sorted.sort_by_key(|(origin, (rules, ..))| (std::cmp::Reverse(*rules), *origin));
    let samples: usize = file.rule.iter().map(|form| form.samples.len()).sum();
    let mut table = format!(
        "\n{} rules with {samples} samples, whose replies are of:\n\n| origin | rules | samples | classes |\n|---|---|---|---|\n",
        file.rule.len()
    );
    for (origin, (rules, samples, classes)) in sorted {
        let title = file.origins.get(origin).map_or(origin, String::as_str);
        let classes: Vec<_> = classes.iter().map(|class| class.as_str()).collect();
        let row = format!("| {title} | {rules} | {samples} | {} |", classes.join(", "));
        writeln!(table, "{row}").expect("a string takes everything");
    }
    table.push('\n');
    table
}
