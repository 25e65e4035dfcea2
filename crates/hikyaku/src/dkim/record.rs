//! DKIM key records (RFC 6376 section 3.6.1): how they are written, and whether DNS has ours.

use model::Domain;
use service::logging::log_safe;

/// The most bytes in one string of a TXT record (RFC 1035 section 3.3).
const STRING: usize = 255;

/// The name of a key's record, without a final dot.
pub(crate) fn name(selector: &str, domain: &Domain) -> String {
    format!("{selector}._domainkey.{domain}")
}

/// A line of a zone file.
pub(super) fn zone_line(name: &str, value: &str) -> String {
    let bytes: Vec<char> = value.chars().collect();
    let strings: Vec<String> = bytes
        .chunks(STRING)
        .map(|part| format!("\"{}\"", part.iter().collect::<String>()))
        .collect();
    format!("{name}. IN TXT ( {} )", strings.join(" "))
}

/// What DNS says of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The very key.
    Same,
    /// The very key, but receivers are told that this is a test (`t=y`).
    Testing,
    /// No record.
    Missing,
    /// An empty `p=`: signatures with this key are invalid.
    Revoked,
    /// Another key, or one that receivers may not use as we do.
    Different(String),
    /// Several records: receivers take any of them, or none.
    Several(usize),
    /// A record that is not a key.
    NotAKey(String),
    /// The name server did not tell.
    NoAnswer(String),
}

impl Verdict {
    pub(crate) fn is_well(&self) -> bool {
        matches!(self, Self::Same | Self::Testing)
    }

    /// For the table.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Same | Self::Testing => "ok",
            Self::Missing => "missing",
            Self::Revoked => "revoked",
            Self::Different(_) => "different",
            Self::Several(_) => "several",
            Self::NotAKey(_) => "no key",
            Self::NoAnswer(_) => "no answer",
        }
    }

    /// For the person who has to mend it.
    pub(crate) fn note(&self) -> String {
        match self {
            Self::Same => "the published key is the one in the file".to_owned(),
            Self::Testing => "t=y tells receivers to ignore failures: remove it".to_owned(),
            Self::Missing => "publish the record that `dkim generate` printed".to_owned(),
            Self::Revoked => "p= is empty: receivers refuse this key".to_owned(),
            Self::Several(count) => format!("{count} records: receivers take any of them, or none"),
            Self::Different(why) | Self::NotAKey(why) | Self::NoAnswer(why) => {
                log_safe(why).to_string()
            }
        }
    }
}

/// Compares `expected`, our own record, with what is published.
pub(crate) fn judge(expected: &str, published: &[String]) -> Verdict {
    // Other texts may stand at the name; only what says p= takes part.
    let keys: Vec<&String> = published
        .iter()
        .filter(|text| tag(text, "p").is_some())
        .collect();
    match (keys.as_slice(), published) {
        ([], []) => Verdict::Missing,
        ([], [other, ..]) => Verdict::NotAKey(format!("the record has no p=: {other}")),
        ([record], _) => judge_one(expected, record),
        (several, _) => Verdict::Several(several.len()),
    }
}

fn judge_one(expected: &str, record: &str) -> Verdict {
    let version = tag(record, "v").unwrap_or_else(|| "DKIM1".to_owned());
    if version != "DKIM1" {
        return Verdict::NotAKey(format!("v={version} is not a DKIM key record"));
    }
    let key = tag(record, "p").unwrap_or_default();
    if key.is_empty() {
        return Verdict::Revoked;
    }
    let kind = |record| tag(record, "k").unwrap_or_else(|| "rsa".to_owned());
    let (ours, theirs) = (kind(expected), kind(record));
    if ours != theirs {
        return Verdict::Different(format!("k={theirs} is published, the file is {ours}"));
    }
    if Some(key) != tag(expected, "p") {
        return Verdict::Different("the published key is not the one in the file".to_owned());
    }
    let allows = |name, needed: &str| {
        tag(record, name).is_none_or(|list| list.split(':').any(|one| one == needed || one == "*"))
    };
    if !allows("h", "sha256") {
        return Verdict::Different("h= does not allow sha256, which we sign with".to_owned());
    }
    if !allows("s", "email") {
        return Verdict::Different("s= does not allow email".to_owned());
    }
    let testing = tag(record, "t").is_some_and(|flags| flags.split(':').any(|flag| flag == "y"));
    if testing {
        Verdict::Testing
    } else {
        Verdict::Same
    }
}

/// The value of a tag (RFC 6376 section 3.2), without any white space in it: a key may be folded,
/// and no other value that we look at may have any.
fn tag(record: &str, wanted: &str) -> Option<String> {
    record.split(';').find_map(|part| {
        let (name, value) = part.split_once('=')?;
        (name.trim() == wanted).then(|| value.split_whitespace().collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OURS: &str = "v=DKIM1; k=rsa; p=MIIBIjAN/+==";

    #[test]
    fn what_dns_says_is_told_apart() {
        for (published, word) in [
            (&[][..], "missing"),
            (&[OURS], "ok"),
            (&["v=DKIM1;p=MIIB IjAN/+==;"], "ok"),
            (&["k=rsa; h=sha1:sha256; s=*; p=MIIBIjAN/+=="], "ok"),
            (&["v=DKIM1; t=s; p=MIIBIjAN/+=="], "ok"),
            (&["some note", OURS], "ok"),
            (&["v=DKIM1; p="], "revoked"),
            (&["v=DKIM1; k=rsa; p=MIIBIjAN"], "different"),
            (&["v=DKIM1; k=ed25519; p=MIIBIjAN/+=="], "different"),
            (&["v=DKIM1; h=sha1; p=MIIBIjAN/+=="], "different"),
            (&["v=DKIM1; s=tlsrpt; p=MIIBIjAN/+=="], "different"),
            (&["v=spf1 -all"], "no key"),
            (&["v=DKIM2; p=MIIBIjAN/+=="], "no key"),
            (&[OURS, OURS], "several"),
        ] {
            let texts: Vec<String> = published.iter().map(ToString::to_string).collect();
            let verdict = judge(OURS, &texts);
            assert_eq!(verdict.word(), word, "{published:?}");
            assert_eq!(verdict.is_well(), word == "ok", "{published:?}");
        }
    }

    #[test]
    fn a_test_flag_is_noticed() {
        let testing = judge(OURS, &[format!("{OURS}; t=s:y")]);
        assert_eq!(testing, Verdict::Testing);
    }

    #[test]
    fn a_long_value_is_split_for_the_zone_file() {
        let value = "x".repeat(300);
        let line = zone_line("s._domainkey.a.example", &value);
        let (head, tail) = ("x".repeat(255), "x".repeat(45));
        assert_eq!(
            line,
            format!("s._domainkey.a.example. IN TXT ( \"{head}\" \"{tail}\" )")
        );
    }

    proptest! {
        #[test]
        fn any_published_text_is_judged_and_shown_on_one_line(text: String) {
            let verdict = judge(OURS, &[text]);
            prop_assert!(!verdict.note().contains(char::is_control));
        }
    }
}
