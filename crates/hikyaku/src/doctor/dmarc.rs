//! DMARC: the record of a domain, and whether SPF and DKIM are aligned with it.
//!
//! The organisational domain is found by walking up the tree (RFC 9989 section 4.10), so that no
//! list of public suffixes has to be kept.

use model::Domain;

use super::Finding;
use super::names::Names;

/// Names that are asked on one walk.
const STEPS_MAX: usize = 8;

/// A DMARC record, as far as it concerns a sender.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    /// `none`, `quarantine` or `reject`.
    policy: String,
    /// For names below it.
    subdomain_policy: Option<String>,
    /// Exact alignment is asked for.
    strict_spf: bool,
    strict_dkim: bool,
    reports: bool,
    /// `psd=`
    public_suffix: Option<char>,
}

/// What a walk up the tree found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Walk {
    organisation: String,
    /// With the name at which it stands.
    record: Option<(String, Record)>,
}

/// The record, and whether what is signed and sent fits it.
pub(super) async fn check(
    names: &Names,
    domain: &Domain,
    bounces: &Domain,
    signs: bool,
) -> Vec<Finding> {
    let walk = match walk(names, domain.as_str()).await {
        Ok(walk) => walk,
        Err(why) => return vec![Finding::fail("dmarc", why, "ask again later")],
    };
    let other = match self::walk(names, bounces.as_str()).await {
        Ok(walk) => walk.organisation,
        Err(why) => return vec![Finding::fail("dmarc", why, "ask again later")],
    };
    let Some((at, record)) = walk.record else {
        let text =
            format!("{domain} has no DMARC record: large providers ask bulk senders for one");
        let advice = format!(
            "publish as TXT: _dmarc.{domain} \"v=DMARC1; p=none; rua=mailto:dmarc@{domain}\""
        );
        return vec![Finding::fail("dmarc", text, advice)];
    };
    let by_spf = match record.strict_spf {
        true => domain == bounces,
        false => walk.organisation == other,
    };
    vec![
        told(domain, &at, &record),
        aligned(domain, bounces, by_spf, signs, &record),
    ]
}

fn told(domain: &Domain, at: &str, record: &Record) -> Finding {
    let policy = match (&record.subdomain_policy, at == domain.as_str()) {
        (Some(below), false) => below,
        _ => &record.policy,
    };
    let text = format!("_dmarc.{at} says {policy}");
    match (policy.as_str(), record.reports) {
        (_, false) => Finding::warn(
            "dmarc",
            format!("{text}, and asks nobody for reports"),
            "add rua=mailto:ADDRESS to learn who sends in your name",
        ),
        ("none", true) => Finding::ok("dmarc", format!("{text}: receivers report and do nothing")),
        (_, true) => Finding::ok("dmarc", text),
    }
}

fn aligned(
    domain: &Domain,
    bounces: &Domain,
    by_spf: bool,
    signs: bool,
    record: &Record,
) -> Finding {
    // Our keys are those of the From domain: aligned however strict.
    let strict = if record.strict_spf { "exactly " } else { "" };
    match (signs, by_spf) {
        (true, true) => Finding::ok(
            "aligned",
            format!("DKIM signs for {domain}, and the reverse-path {bounces} fits it"),
        ),
        (true, false) => Finding::warn(
            "aligned",
            format!(
                "only DKIM: the reverse-path {bounces} is not {strict}of {domain}, so SPF does not count"
            ),
            format!("set bounce_domain to a name below {domain}"),
        ),
        (false, true) => Finding::warn(
            "aligned",
            format!("only SPF, by the reverse-path {bounces}: it is lost when mail is forwarded"),
            "publish the DKIM keys",
        ),
        (false, false) => Finding::fail(
            "aligned",
            format!("neither DKIM nor SPF is aligned with {domain}: DMARC fails"),
            format!("publish the DKIM keys, and set bounce_domain to a name below {domain}"),
        ),
    }
}

async fn walk(names: &Names, domain: &str) -> Result<Walk, String> {
    let mut found = Vec::new();
    for name in steps(domain) {
        let texts = names
            .txt(&format!("_dmarc.{name}"))
            .await
            .map_err(|why| format!("_dmarc.{name}: {why}"))?;
        let records: Vec<_> = texts.iter().filter_map(|text| parse(text)).collect();
        // Several are as good as none.
        if let [record] = records.as_slice() {
            found.push((name, record.clone()));
        }
    }
    Ok(conclude(domain, &found))
}

/// The names that are asked, the longest first.
fn steps(domain: &str) -> Vec<String> {
    let labels: Vec<&str> = domain.split('.').collect();
    let below = |count: usize| labels.iter().skip(labels.len().saturating_sub(count));
    let name = |count: usize| below(count).copied().collect::<Vec<_>>().join(".");
    let first = std::iter::once(domain.to_owned());
    let rest = (1..labels.len().min(STEPS_MAX)).rev().map(name);
    first.chain(rest).collect()
}

/// RFC 9989 section 4.10.2; `found` the longest name first.
fn conclude(domain: &str, found: &[(String, Record)]) -> Walk {
    let own = found
        .iter()
        .find(|(_, record)| record.public_suffix == Some('n'));
    let suffix = found
        .iter()
        .find(|(name, record)| record.public_suffix == Some('y') && name != domain);
    let organisation = match (own, suffix, found.last()) {
        (Some((name, _)), _, _) => name.clone(),
        (None, Some((name, _)), _) => one_below(domain, name),
        (None, None, Some((name, _))) => name.clone(),
        (None, None, None) => domain.to_owned(),
    };
    let at = |wanted: &str| found.iter().find(|(name, _)| name == wanted).cloned();
    let record = at(domain)
        .or_else(|| at(&organisation))
        .or_else(|| found.last().cloned());
    Walk {
        organisation,
        record,
    }
}

/// The part of `domain` that is one label longer than `suffix`.
fn one_below(domain: &str, suffix: &str) -> String {
    let labels = suffix.split('.').count() + 1;
    let all: Vec<&str> = domain.split('.').collect();
    let kept = all.iter().skip(all.len().saturating_sub(labels));
    kept.copied().collect::<Vec<_>>().join(".")
}

fn parse(text: &str) -> Option<Record> {
    let mut tags = text.split(';').filter_map(|part| {
        let (name, value) = part.split_once('=')?;
        Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
    });
    if tags.next() != Some(("v".to_owned(), "DMARC1".to_owned())) {
        return None;
    }
    let tags: Vec<(String, String)> = tags.collect();
    let tag = |wanted: &str| {
        let found = tags.iter().find(|(name, _)| name == wanted);
        found.map(|(_, value)| value.to_ascii_lowercase())
    };
    Some(Record {
        policy: tag("p").unwrap_or_else(|| "none".to_owned()),
        subdomain_policy: tag("sp"),
        strict_spf: tag("aspf").as_deref() == Some("s"),
        strict_dkim: tag("adkim").as_deref() == Some("s"),
        reports: tag("rua").is_some_and(|address| !address.is_empty()),
        public_suffix: tag("psd").and_then(|value| value.chars().next()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(text: &str) -> Record {
        parse(text).expect("a record")
    }

    #[test]
    fn records_are_read_as_they_are_written() {
        let full = record(
            "v=DMARC1; p=Reject ; sp=quarantine;aspf=s; adkim=r; rua=mailto:a@b.example; psd=n",
        );
        assert_eq!(
            (full.policy.as_str(), full.subdomain_policy.as_deref()),
            ("reject", Some("quarantine"))
        );
        assert!(full.strict_spf && !full.strict_dkim && full.reports);
        assert_eq!(full.public_suffix, Some('n'));
        for text in ["", "v=spf1 -all", "p=none; v=DMARC1", "v=DMARC2; p=none"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_walk_goes_up_and_skips_the_middle_of_very_long_names() {
        assert_eq!(
            steps("a.b.example"),
            ["a.b.example", "b.example", "example"]
        );
        let long = steps("a.b.c.d.e.f.g.h.i.example");
        assert_eq!(long.len(), 8);
        assert_eq!(long[1], "d.e.f.g.h.i.example");
    }

    #[test]
    fn the_organisation_is_the_topmost_record_unless_one_says_otherwise() {
        let none = record("v=DMARC1; p=none");
        let at = |names: &[(&str, &Record)]| {
            let found: Vec<_> = names
                .iter()
                .map(|(name, of)| ((*name).to_owned(), (*of).clone()))
                .collect();
            conclude("m.a.co.example", &found).organisation
        };
        assert_eq!(at(&[]), "m.a.co.example");
        assert_eq!(
            at(&[("m.a.co.example", &none), ("a.co.example", &none)]),
            "a.co.example"
        );
        let (suffix, own) = (record("v=DMARC1; psd=y"), record("v=DMARC1; psd=n"));
        assert_eq!(at(&[("co.example", &suffix)]), "a.co.example");
        assert_eq!(
            at(&[("a.co.example", &own), ("co.example", &none)]),
            "a.co.example"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            if let Some(record) = parse(&text) {
                prop_assert!(text.starts_with('v') || text.trim_start().to_ascii_lowercase().starts_with('v'));
                prop_assert!(record.policy.len() <= text.len().max(4));
            }
        }

        #[test]
        fn a_walk_is_short(domain in "[a-z]{1,5}(\\.[a-z]{1,5}){0,20}") {
            let steps = steps(&domain);
            prop_assert!(steps.len() <= STEPS_MAX && steps[0] == domain);
            prop_assert!(steps.iter().all(|step| domain.ends_with(step.as_str())));
        }
    }
}
