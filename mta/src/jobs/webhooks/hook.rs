//! What a webhook is: whose events go where, under which secret.
//!
//! Owns the forms in which it is kept; a secret is never printed. Must not ask the store.

use std::fmt;

use aws_lc_rs::{digest, hmac, rand};
use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use hyper::Uri;
use model::{Event, EventKind, Timestamp, WebhookId};
use serde::{Deserialize, Serialize};

/// What a secret that is base64 begins with (Standard Webhooks).
const PREFIX: &str = "whsec_";
/// Bytes of a secret, with its prefix.
const SECRET_MAX: usize = 256;
/// Bytes of a secret that is made here.
const SECRET_BYTES: usize = 32;
/// Bytes of a URL.
const URL_MAX: usize = 2_048;

/// A webhook as it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hook {
    pub(crate) id: WebhookId,
    pub(crate) account: String,
    pub(crate) url: String,
    /// Which events; empty: all.
    pub(crate) types: Vec<EventKind>,
    pub(crate) secret: Secret,
    pub(crate) enabled: bool,
    pub(crate) created_at: Timestamp,
    /// Rises with every change.
    pub(crate) edition: u64,
    /// The last time that somebody asked for events once more.
    pub(crate) replay: Option<Replay>,
}

/// Events from a place on are to be told again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replay {
    /// The edition that came of the request.
    pub(crate) edition: u64,
    /// After this.
    pub(crate) cursor: String,
}

/// What signatures are made with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A new one, at random.
    pub(crate) fn generate() -> std::io::Result<Self> {
        let mut key = [0; SECRET_BYTES];
        rand::fill(&mut key).map_err(std::io::Error::other)?;
        Ok(Self(format!("{PREFIX}{}", STANDARD.encode(key))))
    }

    /// One that a caller chose.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > SECRET_MAX {
            return Err(format!(
                "has {} bytes, expected 1 to {SECRET_MAX}",
                text.len()
            ));
        }
        if text.chars().any(char::is_control) {
            return Err("has a control character, such as a line break".to_owned());
        }
        match decode(text) {
            Some(Ok(key)) if key.is_empty() => Err(format!("has nothing after {PREFIX}")),
            Some(Err(())) => Err(format!("is not base64 after {PREFIX}")),
            Some(Ok(_)) | None => Ok(Self(text.to_owned())),
        }
    }

    /// The text itself; the caller keeps it out of sight.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    fn key(&self) -> hmac::Key {
        let bytes = decode(&self.0).and_then(Result::ok);
        let bytes = bytes.unwrap_or_else(|| self.0.as_bytes().to_vec());
        hmac::Key::new(hmac::HMAC_SHA256, &bytes)
    }

    /// The value of `webhook-signature` (contract, section 5).
    pub(crate) fn sign(&self, id: &str, seconds: i64, body: &[u8]) -> String {
        let mut signing = hmac::Context::with_key(&self.key());
        signing.update(format!("{id}.{seconds}.").as_bytes());
        signing.update(body);
        format!("v1,{}", STANDARD.encode(signing.sign()))
    }
}

/// What is base64 after the prefix; none without it.
fn decode(text: &str) -> Option<Result<Vec<u8>, ()>> {
    let lenient =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let base64 = GeneralPurpose::new(&alphabet::STANDARD, lenient);
    let encoded = text.strip_prefix(PREFIX)?;
    Some(base64.decode(encoded).map_err(drop))
}

/// The id of a delivery: the same as long as it carries the same events to the same webhook.
pub(crate) fn delivery_id(hook: WebhookId, events: &[Event]) -> String {
    let mut of = digest::Context::new(&digest::SHA256);
    of.update(&hook.to_bytes());
    for event in events {
        of.update(event.id.as_bytes());
    }
    let hash = of.finish();
    let hex: String = hash
        .as_ref()
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("msg_{hex}")
}

/// Where a webhook's events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) is_tls: bool,
    /// A name, or an address without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// With its query.
    pub(crate) path: String,
}

impl Target {
    /// Reads a URL.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        if url.len() > URL_MAX {
            return Err(format!(
                "has {} bytes, at most {URL_MAX} are taken",
                url.len()
            ));
        }
        let wrong = || "is no URL such as \"https://campaigns.example/hook\"".to_owned();
        if url.contains('#') {
            return Err("has a fragment, which no server would see".to_owned());
        }
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("is neither http nor https".to_owned()),
        };
        let authority = uri.authority().ok_or_else(wrong)?;
        if authority.as_str().contains('@') {
            return Err("has a user or password in it; verify the signature instead".to_owned());
        }
        let host = authority.host().to_ascii_lowercase();
        let host = match host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            Some(literal) => literal
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| wrong())?
                .to_string(),
            None => name(&host).ok_or_else(wrong)?,
        };
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => Some(if is_tls { 443 } else { 80 }),
            Some(rest) => rest.strip_prefix(':').and_then(|port| port.parse().ok()),
            None => None,
        };
        let port = port
            .filter(|port| *port > 0)
            .ok_or_else(|| "has a port that is none".to_owned())?;
        // A query may stand directly behind the host.
        let path = match uri.path_and_query().map_or("/", |path| path.as_str()) {
            query if query.starts_with('?') => format!("/{query}"),
            path => path.to_owned(),
        };
        Ok(Self {
            is_tls,
            host,
            port,
            path,
        })
    }
}

/// A host name or IPv4 address as name servers know it.
fn name(host: &str) -> Option<String> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let fits = (1..=253).contains(&host.len()) && host.chars().all(plain) && !host.contains("..");
    (fits && !host.starts_with('.')).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_url_is_read_as_a_client_would() {
        let target = |is_tls, host: &str, port, path: &str| Target {
            is_tls,
            host: host.to_owned(),
            port,
            path: path.to_owned(),
        };
        for (url, expected) in [
            ("https://X.example", target(true, "x.example", 443, "/")),
            (
                "http://x.example:8080/a?b=c",
                target(false, "x.example", 8080, "/a?b=c"),
            ),
            ("http://127.0.0.1:1/", target(false, "127.0.0.1", 1, "/")),
            ("https://[::1]/x", target(true, "::1", 443, "/x")),
            ("http://x.example.?q", target(false, "x.example", 80, "/?q")),
        ] {
            assert_eq!(Target::parse(url), Ok(expected), "{url}");
        }
        for url in [
            "",
            "x.example",
            "/hook",
            "ftp://x.example/",
            "https://",
            "https:///x",
            "https://user@x.example/",
            "https://a:b@x.example/",
            "https://x.example:0/",
            "https://x.example:99999/",
            "https://x.example:/",
            "https://x.example/#f",
            "https://x example/",
            "https://..example/",
            "https://[::1/",
            "https://[1]/",
            "https://%31/",
            "https://x.example/\r\nX: y",
        ] {
            assert!(Target::parse(url).is_err(), "{url}");
        }
        assert!(Target::parse(&format!("https://x.example/{}", "a".repeat(URL_MAX))).is_err());
    }

    /// The example of the Standard Webhooks specification.
    #[test]
    fn a_signature_is_that_of_the_specification() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a secret");
        let signature = secret.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        let made = Secret::generate().expect("random bytes");
        assert_eq!(Secret::parse(made.reveal()), Ok(made.clone()));
        assert_eq!(format!("{made:?}"), "Secret(…)");
        // Without the prefix the key is the text.
        let (text, base64) = (
            Secret::parse("abc").expect("text"),
            Secret::parse("whsec_YWJj"),
        );
        assert_eq!(
            text.sign("i", 1, b"x"),
            base64.expect("base64").sign("i", 1, b"x")
        );
        for bad in ["", "whsec_", "whsec_?", "a\nb", &"a".repeat(257)] {
            assert!(Secret::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_target_or_refused(text: String, host in "[a-zA-Z0-9.:@\\[\\]/%-]{0,20}") {
            drop(Target::parse(&text));
            if let Ok(target) = Target::parse(&format!("http://{host}")) {
                prop_assert!(!target.host.is_empty() && target.port > 0);
                prop_assert!(target.path.starts_with('/'));
                prop_assert!(!target.host.contains(['@', '/', '[']));
            }
        }

        #[test]
        fn any_text_is_a_secret_or_refused(text: String) {
            if let Ok(secret) = Secret::parse(&text) {
                prop_assert!(secret.sign("a", 0, b"").starts_with("v1,"));
            }
        }
    }
}
