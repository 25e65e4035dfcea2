//! MTA-STS (RFC 8461): the record that announces a policy, and the policy.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest `max_age` (RFC 8461 §3.2), some 366 days.
const MAX_AGE: u64 = 31_557_600;
/// MX patterns of a policy that are kept.
const PATTERNS_MAX: usize = 100;
/// The longest `id` (RFC 8461 §3.1).
const ID_MAX: usize = 32;

/// What the domain wants of senders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Nothing may be sent over a connection that does not keep to the policy.
    Enforce,
    /// Send all the same; report.
    Testing,
    /// As if there were no policy.
    None,
}

/// A policy as its domain published it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StsPolicy {
    /// What it wants.
    pub mode: Mode,
    /// Host names, lower case; one that begins with `*.` stands for one more label. Empty only
    /// with [`Mode::None`].
    pub mx: Vec<Box<str>>,
    /// How long it holds after it was fetched.
    pub max_age: Duration,
}

/// Why a policy cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not UTF-8, or a line that is not `key: value`.
    #[error("the policy is not lines of \"key: value\"")]
    Syntax,
    /// It does not begin with `version: STSv1`.
    #[error("the policy is not of version STSv1")]
    Version,
    /// No mode, or one that does not exist.
    #[error("the policy has no mode of enforce, testing or none")]
    Mode,
    /// No `max_age`, or not a number in range.
    #[error("the policy has no max_age from 0 to 31557600")]
    MaxAge,
    /// No host may take mail.
    #[error("the policy names no MX host")]
    NoHosts,
}

impl StsPolicy {
    /// Reads a policy file (RFC 8461 §3.2). Unknown keys are passed over; of a key that stands
    /// twice, but for `mx`, the first counts.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn parse(body: &[u8]) -> Result<Self, PolicyError> {
        let text = std::str::from_utf8(body).map_err(|_| PolicyError::Syntax)?;
        let (mut version, mut mode, mut max_age, mut mx) = (None, None, None, Vec::new());
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (key, value) = line.split_once(':').ok_or(PolicyError::Syntax)?;
            let value = value.trim();
            match key.trim() {
                "version" => _ = version.get_or_insert(value),
                "mode" => _ = mode.get_or_insert(value),
                "max_age" => _ = max_age.get_or_insert(value),
                "mx" if mx.len() < PATTERNS_MAX => mx.push(pattern(value)),
                _ => {}
            }
        }
        if version != Some("STSv1") {
            return Err(PolicyError::Version);
        }
        let mode = match mode {
            Some("enforce") => Mode::Enforce,
            Some("testing") => Mode::Testing,
            Some("none") => Mode::None,
            Some(_) | None => return Err(PolicyError::Mode),
        };
        let seconds = max_age
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse::<u64>().ok())
            .filter(|seconds| *seconds <= MAX_AGE)
            .ok_or(PolicyError::MaxAge)?;
        let mx: Vec<_> = mx.into_iter().flatten().collect();
        if mx.is_empty() && mode != Mode::None {
            return Err(PolicyError::NoHosts);
        }
        Ok(Self {
            mode,
            mx,
            max_age: Duration::from_secs(seconds),
        })
    }

    /// Whether a host of the domain's MX records may take its mail (RFC 8461 §4.1): it is named,
    /// or it is one label below a name that begins with `*.`.
    pub fn allows(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let below = host.split_once('.').map(|(_, rest)| rest);
        self.mx
            .iter()
            .any(|pattern| match pattern.strip_prefix("*.") {
                Some(suffix) => below == Some(suffix),
                None => **pattern == *host,
            })
    }

    /// Its lines, as they stand in a report (RFC 8460 §4.4).
    pub(crate) fn lines(&self) -> Vec<Box<str>> {
        let mode = match self.mode {
            Mode::Enforce => "enforce",
            Mode::Testing => "testing",
            Mode::None => "none",
        };
        let first = ["version: STSv1".into(), format!("mode: {mode}").into()];
        let hosts = self.mx.iter().map(|host| format!("mx: {host}").into());
        let last = format!("max_age: {}", self.max_age.as_secs()).into();
        first.into_iter().chain(hosts).chain([last]).collect()
    }

    #[cfg(test)]
    pub(crate) fn of(mode: Mode, mx: &[&str]) -> Self {
        Self {
            mode,
            mx: mx.iter().map(|&host| host.into()).collect(),
            max_age: Duration::from_secs(86_400),
        }
    }
}

/// A host name or `*.` and one, lower case; nothing else can match a host.
fn pattern(value: &str) -> Option<Box<str>> {
    let name = value.trim_end_matches('.').to_ascii_lowercase();
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let fits = name
        .strip_prefix("*.")
        .unwrap_or(&name)
        .split('.')
        .all(|label| (1..=63).contains(&label.len()) && label.bytes().all(plain));
    (fits && name.len() <= 255).then(|| name.into())
}

/// Reads the texts at `_mta-sts.DOMAIN` (RFC 8461 §3.1): the policy's id, if exactly one of them
/// announces a policy.
pub fn id_of(texts: &[Vec<u8>]) -> Option<Box<str>> {
    let mut announced = texts.iter().filter(|text| is_announcement(text));
    let (Some(text), None) = (announced.next(), announced.next()) else {
        return None;
    };
    let text = std::str::from_utf8(text).ok()?;
    let mut fields = text.split(';').map(|field| field.split_once('='));
    let id = fields.find_map(|field| {
        let (key, value) = field?;
        (key.trim() == "id").then(|| value.trim())
    })?;
    let fits = (1..=ID_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric());
    fits.then(|| id.into())
}

fn is_announcement(text: &[u8]) -> bool {
    let rest = text.strip_prefix(b"v=STSv1");
    rest.is_some_and(|rest| rest.trim_ascii_start().first() == Some(&b';'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "version: STSv1\r\nmode: enforce\r\nmx: mail.example.com\r\nmx: *.example.net\r\nmx: backupmx.example.com\r\nmax_age: 604800\r\n";

    #[test]
    fn the_policy_of_the_rfc() {
        let policy = StsPolicy::parse(GOOD.as_bytes()).expect("a policy");
        assert_eq!(policy.mode, Mode::Enforce);
        assert_eq!(policy.max_age, Duration::from_secs(604_800));
        for (host, allowed) in [
            ("mail.example.com", true),
            ("MAIL.example.com.", true),
            ("mx.example.net", true),
            ("a.mx.example.net", false),
            ("example.net", false),
            ("example.com", false),
            ("xmail.example.com", false),
            ("", false),
        ] {
            assert_eq!(policy.allows(host), allowed, "{host}");
        }
    }

    #[test]
    fn what_is_no_policy() {
        let with = |from: &str, to: &str| GOOD.replace(from, to);
        let table = [
            (with("STSv1", "STSv2"), PolicyError::Version),
            (with("version: STSv1\r\n", ""), PolicyError::Version),
            (with("enforce", "enforced"), PolicyError::Mode),
            (with("mode: enforce\r\n", ""), PolicyError::Mode),
            (with("604800", "-1"), PolicyError::MaxAge),
            (with("604800", "31557601"), PolicyError::MaxAge),
            (with("max_age", "age"), PolicyError::MaxAge),
            (with("mx:", "x:"), PolicyError::NoHosts),
            (with("mode: enforce", "<html>"), PolicyError::Syntax),
        ];
        for (text, error) in table {
            assert_eq!(StsPolicy::parse(text.as_bytes()), Err(error), "{text}");
        }
        assert_eq!(StsPolicy::parse(b"\xff: x"), Err(PolicyError::Syntax));
        let unix = with("\r\n", "\n")
            .replace("enforce", "none")
            .replace("mx:", "x:");
        assert_eq!(
            StsPolicy::parse(unix.as_bytes()).map(|p| p.mode),
            Ok(Mode::None)
        );
    }

    #[test]
    fn announcements() {
        let id = |texts: &[&str]| {
            let texts: Vec<_> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
            id_of(&texts).map(String::from)
        };
        assert_eq!(
            id(&["v=STSv1; id=20160831085700Z;"]),
            Some("20160831085700Z".into())
        );
        assert_eq!(id(&["other", "v=STSv1 ;id=1"]), Some("1".into()));
        for none in [
            &["v=STSv1; id=1", "v=STSv1; id=2"][..],
            &["v=STSv1;"],
            &["v=STSv10; id=1"],
            &["v=STSv1; id=a-b"],
            &["v=STSv1; id=123456789012345678901234567890123"],
            &["v=spf1 -all"],
            &[],
        ] {
            assert_eq!(id(none), None, "{none:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body: Vec<u8>, texts: Vec<Vec<u8>>, host: String) {
            if let Ok(policy) = StsPolicy::parse(&body) {
                prop_assert!(policy.mx.len() <= PATTERNS_MAX);
                policy.allows(&host);
            }
            id_of(&texts);
        }

        #[test]
        fn lines_in_any_order_are_the_same_policy(lines in Just(GOOD.lines().collect::<Vec<_>>()).prop_shuffle()) {
            let shuffled = StsPolicy::parse(lines.join("\n").as_bytes()).map(|mut policy| { policy.mx.sort(); policy });
            let plain = StsPolicy::parse(GOOD.as_bytes()).map(|mut policy| { policy.mx.sort(); policy });
            prop_assert_eq!(shuffled, plain);
        }
    }
}
