//! The tracking keys and the hosts that tokens are bound to.
//!
//! Owns the key file's reading; the format and the judgement of a token are `links`'.

use arc_swap::ArcSwap;
use links::{Bad, KeyFileError, KeyRing, Kind, VerifiedToken};
use service::clock::SharedClock;
use service::secrets::{self, SecretError};
use service::tasks::Shutdown;
use std::borrow::Cow;
use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::Arc;
use store::{SIGNING_KEY_TOLD, Store, signing_keys};

/// Hosts that a token is tried for when the client's host says nothing, at most.
const MOST_FALLBACKS: usize = 64;

/// Why there are no tracking keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file can be neither read nor made.
    #[error(transparent)]
    File(#[from] SecretError),
    /// What is in it are no keys.
    #[error("{path}: {error}")]
    Text {
        /// The file.
        path: String,
        /// What is wrong.
        error: KeyFileError,
    },
}

/// The keys in the file at `path`, which is made with one new key if it does not exist. Blocks.
///
/// # Errors
/// When the file can be neither read nor made, or has something else in it.
pub fn load(path: &Path) -> Result<KeyRing, KeysError> {
    let text = secrets::load_or_create(path, || {
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret)
            .map_err(|_| std::io::Error::other("the system gives no random bytes"))?;
        Ok(KeyRing::file_text(&secret))
    })?;
    KeyRing::parse(&text).map_err(|error| KeysError::Text {
        path: path.display().to_string(),
        error,
    })
}

/// Follows which keys links are signed with on all nodes, until the process ends. While the store
/// is away, what was known stays.
pub(crate) async fn follow(
    store: Arc<dyn Store>,
    clock: SharedClock,
    in_use: Arc<ArcSwap<Vec<u16>>>,
    shutdown: Shutdown,
) {
    let following = async {
        loop {
            match signing_keys(&*store, clock.now()).await {
                Ok(ids) => in_use.store(Arc::new(ids)),
                Err(error) => tracing::debug!(%error, "tracking keys in use are seen later"),
            }
            tokio::time::sleep(SIGNING_KEY_TOLD).await;
        }
    };
    tokio::select! {
        () = following => {}
        () = shutdown.begun() => {}
    }
}

/// The hosts of the base URLs that the configuration names.
#[derive(Debug)]
pub(crate) struct Hosts(Vec<Host>);

#[derive(Debug)]
struct Host {
    authority: String,
    https: bool,
}

impl Hosts {
    pub(crate) fn of<'a>(base_urls: impl Iterator<Item = &'a str>) -> Self {
        let mut hosts: Vec<Host> = Vec::new();
        for url in base_urls {
            let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
            let authority = Self::normalised(rest.split('/').next().unwrap_or_default());
            if hosts.iter().all(|host| host.authority != authority) {
                let https = scheme.eq_ignore_ascii_case("https");
                let authority = authority.into_owned();
                hosts.push(Host { authority, https });
            }
        }
        Self(hosts)
    }

    /// A host in the form in which tokens are bound to it: lower case, without the port that its
    /// scheme implies.
    pub(crate) fn normalised(authority: &str) -> Cow<'_, str> {
        let authority = authority.trim();
        let implied = [":443", ":80"];
        let bare = implied.iter().find_map(|port| authority.strip_suffix(port));
        let bare = bare.unwrap_or(authority);
        if bare.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(bare.to_ascii_lowercase())
        } else {
            Cow::Borrowed(bare)
        }
    }

    /// Whether links to this host begin with https.
    pub(crate) fn is_https(&self, authority: &str) -> bool {
        let found = self.0.iter().find(|host| host.authority == authority);
        found.is_some_and(|host| host.https)
    }

    /// Reads a token of this kind that was signed for the client's host.
    ///
    /// A host that can be nobody's public name (an address, a name without a dot, none) is what a
    /// proxy leaves that does not pass on the client's: then every configured host is tried, so
    /// that the link works all the same. Between public names a token never wanders.
    pub(crate) fn verify(
        &self,
        keys: &KeyRing,
        token: &str,
        authority: &str,
        kind: Kind,
    ) -> Result<VerifiedToken, Bad> {
        let tried = keys.verify(token, authority);
        let verified = match tried {
            Err(Bad::Signature) if !is_public_name(authority) => {
                let others = self.0.iter().take(MOST_FALLBACKS);
                let mut found = others.map(|host| keys.verify(token, &host.authority));
                found.find(Result::is_ok).unwrap_or(tried)
            }
            tried => tried,
        }?;
        if verified.token().kind == kind {
            Ok(verified)
        } else {
            Err(Bad::Malformed)
        }
    }
}

fn is_public_name(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) | None => authority,
    };
    let is_v6 = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inner| inner.parse::<Ipv6Addr>().is_ok());
    let is_v4 = host.parse::<std::net::Ipv4Addr>().is_ok();
    host.trim_end_matches('.').contains('.') && !is_v4 && !is_v6
}

#[cfg(test)]
mod tests {
    use super::*;
    use links::{Flags, Token};
    use model::{BatchId, TrackingMode};

    fn ring() -> KeyRing {
        KeyRing::parse(&KeyRing::file_text(&[3; 32])).expect("a ring")
    }

    fn token(host: &str) -> String {
        let token = Token {
            kind: Kind::Click,
            flags: Flags {
                mode: TrackingMode::Individual,
                proof: false,
            },
            batch: BatchId::from_bytes([1; 16]),
            index: 4,
            link: 2,
            target: "https://shop.example/",
        };
        let mut text = String::new();
        let signer = ring().signer(host, None).expect("a signer");
        signer.sign(&token, &mut text).expect("signed");
        text
    }

    #[test]
    fn a_token_stays_with_its_host() {
        let base = ["https://t.brand.example", "http://127.0.0.1:8026/x"];
        let hosts = Hosts::of(base.into_iter());
        for (host, asked, good) in [
            ("t.brand.example", "t.brand.example", true),
            ("t.brand.example", "T.Brand.example:443", true),
            ("t.brand.example", "t.other.example", false),
            ("t.brand.example", "t.brand.example:8443", false),
            // What proxies leave that do not pass the host on.
            ("t.brand.example", "10.0.0.7:8026", true),
            ("t.brand.example", "[::1]:8026", true),
            ("t.brand.example", "tracker:8026", true),
            ("t.brand.example", "", true),
            ("127.0.0.1:8026", "localhost:8026", true),
            ("127.0.0.1:8026", "t.brand.example", false),
            // A host that only the API knows of has no fallback.
            ("t.api.example", "t.api.example", true),
            ("t.api.example", "10.0.0.7", false),
        ] {
            let asked_as = Hosts::normalised(asked);
            let verified = hosts.verify(&ring(), &token(host), &asked_as, Kind::Click);
            assert_eq!(verified.is_ok(), good, "{host} as {asked}");
        }
        let other_kind = hosts.verify(&ring(), &token("a.example"), "a.example", Kind::Open);
        assert!(other_kind.is_err());
        assert!(hosts.is_https("t.brand.example"));
        assert!(!hosts.is_https("127.0.0.1:8026"));
    }

    #[test]
    fn a_key_file_is_made_once_and_checked() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tracking.key");
        let made: Vec<u16> = load(&path).expect("made").ids().collect();
        let read: Vec<u16> = load(&path).expect("read").ids().collect();
        assert_eq!(made, read);
        std::fs::write(&path, "nonsense").expect("written");
        let error = load(&path).expect_err("refused").to_string();
        assert!(error.contains("tracking.key: line 1") && !error.contains("nonsense"));
    }
}
