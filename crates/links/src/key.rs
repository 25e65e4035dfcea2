//! Tracking keys: the file of them, the ring in memory, and signing.

use crate::token::{Bad, MAC_LEN, TargetError, Token, check_target, encode, write_body};
use crate::{Kind, MAX_TARGET};
use aws_lc_rs::{constant_time, digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;

/// The longest host name that a token can be bound to (RFC 1035 §2.3.4).
const MAX_HOST: usize = 255;
const MAX_KEYS: usize = 64;

/// Why a key file cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// No line with a key.
    #[error("no key in the file")]
    Empty,
    /// A line that is not 32 bytes in hex or base64.
    #[error("line {line}: not a key of 32 bytes in base64 or hex")]
    Line {
        /// The line, from 1.
        line: usize,
    },
    /// The same key twice.
    #[error("line {line}: a key that is there already")]
    Twice {
        /// The line, from 1.
        line: usize,
    },
    /// More keys than anyone rotates through.
    #[error("more than {MAX_KEYS} keys")]
    TooMany,
}

struct Key {
    id: u16,
    hmac: hmac::Key,
}

impl Key {
    fn new(secret: &[u8; 32]) -> Self {
        let hash = digest::digest(&digest::SHA256, secret);
        let id = match hash.as_ref() {
            [high, low, ..] => u16::from_be_bytes([*high, *low]),
            _ => 0,
        };
        Self {
            id,
            hmac: hmac::Key::new(hmac::HMAC_SHA256, secret),
        }
    }

    /// A MAC that has taken in `host` already.
    fn context(&self, host: &str) -> hmac::Context {
        let mut context = hmac::Context::with_key(&self.hmac);
        let mut name = [0_u8; MAX_HOST + 1];
        // The length comes first, so that no host and body can be read as another pair.
        let len = host.len().min(MAX_HOST);
        name[0] = u8::try_from(len).unwrap_or(u8::MAX);
        for (to, from) in name[1..].iter_mut().zip(host.bytes()) {
            *to = from.to_ascii_lowercase();
        }
        context.update(&name[..=len]);
        context
    }
}

/// The keys of the service. The first signs, all verify.
pub struct KeyRing {
    keys: Vec<Key>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing")
            .field("ids", &self.ids().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl KeyRing {
    /// Reads the text of a key file: one key of 32 bytes per line, in base64 or hex; empty lines
    /// and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// Names the first line that is wrong, never its content.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys: Vec<Key> = Vec::new();
        let mut secrets = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line_number = at + 1;
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let secret = decode_secret(line).ok_or(KeyFileError::Line { line: line_number })?;
            if secrets.contains(&secret) {
                return Err(KeyFileError::Twice { line: line_number });
            }
            if keys.len() == MAX_KEYS {
                return Err(KeyFileError::TooMany);
            }
            keys.push(Key::new(&secret));
            secrets.push(secret);
        }
        if keys.is_empty() {
            Err(KeyFileError::Empty)
        } else {
            Ok(Self { keys })
        }
    }

    /// The text of a key file with the one key `secret`, which the caller took from a good random
    /// source.
    pub fn file_text(secret: &[u8; 32]) -> String {
        let key = STANDARD.encode(secret);
        format!(
            "# Tracking keys, one per line. The first signs, all verify: put a new one on top and keep\n# the old ones as long as their links shall live.\n{key}\n"
        )
    }

    /// The ids of the keys, the signing one first.
    pub fn ids(&self) -> impl Iterator<Item = u16> + '_ {
        self.keys.iter().map(|key| key.id)
    }

    /// Says, for an operator, which of the keys `in_use` are not here; nothing when all are.
    pub fn trouble(&self, in_use: &[u16]) -> Option<String> {
        let missing = in_use.iter().filter(|id| self.ids().all(|own| own != **id));
        let missing: Vec<_> = missing.map(|id| format!("{id:04x}")).collect();
        (!missing.is_empty()).then(|| {
            let ids = missing.join(", ");
            format!("links are signed with a key that is not in the key file here: {ids}")
        })
    }

    /// Secrets for another `purpose`, one of each key, the signing one's first. Nothing that is
    /// signed with them is a token, nor the other way round: no token's MAC begins with these bytes.
    pub fn derive(&self, purpose: &str) -> Vec<[u8; 32]> {
        let derived = |key: &Key| {
            let mut context = hmac::Context::with_key(&key.hmac);
            // A host of length 0 and a version that no token has.
            context.update(b"\0hikyaku derived key ");
            context.update(purpose.as_bytes());
            let mut secret = [0; 32];
            let tag = context.sign();
            secret
                .iter_mut()
                .zip(tag.as_ref())
                .for_each(|(to, from)| *to = *from);
            secret
        };
        self.keys.iter().map(derived).collect()
    }

    /// Prepares signing for `host` (the host of the tracker's base URL, with its port if it has
    /// one, in any case) with the key that signs, or with the one of `key_id`, which a batch noted
    /// at its release. `None` when there is no such key or `host` is longer than 255 bytes.
    pub fn signer(&self, host: &str, key_id: Option<u16>) -> Option<Signer> {
        let key = self
            .keys
            .iter()
            .find(|key| key_id.is_none_or(|id| key.id == id))?;
        (host.len() <= MAX_HOST).then(|| Signer {
            key_id: key.id,
            context: key.context(host),
        })
    }

    pub(crate) fn check_mac(
        &self,
        key_id: u16,
        host: &str,
        body: &[u8],
        mac: &[u8],
    ) -> Result<(), Bad> {
        if host.len() > MAX_HOST {
            return Err(Bad::Signature);
        }
        let mut answer = Err(Bad::UnknownKey);
        // Two keys may share an id by chance: each is tried.
        for key in self.keys.iter().filter(|key| key.id == key_id) {
            let mut context = key.context(host);
            context.update(body);
            let tag = context.sign();
            let expected = tag.as_ref().get(..MAC_LEN).ok_or(Bad::Signature)?;
            match constant_time::verify_slices_are_equal(expected, mac) {
                Ok(()) => return Ok(()),
                Err(_) => answer = Err(Bad::Signature),
            }
        }
        answer
    }
}

fn decode_secret(line: &str) -> Option<[u8; 32]> {
    if line.len() == 64 {
        let mut secret = [0_u8; 32];
        for (to, pair) in secret.iter_mut().zip(line.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(pair)
                .ok()
                .filter(|_| pair.iter().all(u8::is_ascii_hexdigit))?;
            *to = u8::from_str_radix(digits, 16).ok()?;
        }
        return Some(secret);
    }
    STANDARD.decode(line).ok()?.try_into().ok()
}

/// Signs tokens for one host: the key and the host are taken in once, each token costs one hash.
#[derive(Clone)]
pub struct Signer {
    key_id: u16,
    context: hmac::Context,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl Signer {
    /// The id of the key that signs.
    pub fn key_id(&self) -> u16 {
        self.key_id
    }

    /// Appends the signed `token` to `out`.
    ///
    /// # Errors
    /// When a click's target breaks [`check_target`]; `out` is then as it was. The target of
    /// anything but a click is not written.
    pub fn sign(&self, token: &Token<'_>, out: &mut String) -> Result<(), TargetError> {
        let mut token = *token;
        match token.kind {
            Kind::Click => check_target(token.target)?,
            Kind::Open | Kind::Unsubscribe => token.target = "",
        }
        debug_assert!(token.target.len() <= MAX_TARGET, "checked above");
        let mut bytes = Vec::new();
        write_body(&mut bytes, self.key_id, &token);
        let mut context = self.context.clone();
        context.update(&bytes);
        let tag = context.sign();
        bytes.extend_from_slice(tag.as_ref().get(..MAC_LEN).unwrap_or_default());
        encode(out, &bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_read_and_written() {
        let text = KeyRing::file_text(&[7; 32]);
        let hex = "07".repeat(32);
        let from_base64 = KeyRing::parse(&text).expect("our own text");
        let from_hex = KeyRing::parse(&hex).expect("hex");
        assert_eq!(
            from_base64.ids().collect::<Vec<_>>(),
            from_hex.ids().collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_bad_key_file_names_the_line() {
        let good = "07".repeat(32);
        let cases = [
            (String::new(), KeyFileError::Empty),
            ("# only words\n\n".into(), KeyFileError::Empty),
            (format!("{good}\nshort"), KeyFileError::Line { line: 2 }),
            (format!("{good}\n\n{good}"), KeyFileError::Twice { line: 3 }),
            (
                format!("{}+f", "07".repeat(31)),
                KeyFileError::Line { line: 1 },
            ),
            ("é".repeat(32), KeyFileError::Line { line: 1 }),
        ];
        for (text, error) in cases {
            assert_eq!(KeyRing::parse(&text).err(), Some(error), "{text}");
        }
        let many: String = (0..=64).map(|n| format!("{n:064x}\n")).collect();
        assert_eq!(KeyRing::parse(&many).err(), Some(KeyFileError::TooMany));
    }

    #[test]
    fn each_key_and_purpose_has_a_secret_of_its_own() {
        let two = format!("{}{}", KeyRing::file_text(&[7; 32]), "08".repeat(32));
        let ring = KeyRing::parse(&two).expect("a ring");
        let one = KeyRing::parse(&KeyRing::file_text(&[7; 32])).expect("a ring");
        let mut all = [ring.derive("a"), ring.derive("b")].concat();
        assert_eq!(one.derive("a"), all[..1]);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 4);
        assert!(!all.contains(&[7; 32]) && !all.contains(&[0; 32]));
    }

    #[test]
    fn keys_that_are_missing_are_named() {
        let ring = KeyRing::parse(&KeyRing::file_text(&[7; 32])).expect("a ring");
        let own = ring.ids().next().expect("a key");
        assert_eq!(ring.trouble(&[]), None);
        assert_eq!(ring.trouble(&[own]), None);
        let trouble = ring.trouble(&[own, !own]).expect("trouble");
        assert!(
            trouble.ends_with(&format!("here: {:04x}", !own)),
            "{trouble}"
        );
    }

    #[test]
    fn secrets_do_not_print() {
        let ring = KeyRing::parse(&KeyRing::file_text(&[0xab; 32])).expect("a ring");
        let signer = ring.signer("t.example", None).expect("a signer");
        let shown = format!("{ring:?} {signer:?}").to_lowercase();
        assert!(
            !shown.contains("abab") && !shown.contains("q6ur"),
            "{shown}"
        );
    }
}
