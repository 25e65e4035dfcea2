//! DKIM signing (RFC 6376, RFC 8463): relaxed/relaxed, every key signs.
//!
//! Owns keys in memory, the choice of signed fields and the canonical forms. Must not read files,
//! DNS or a clock: PEM text and the signing time come in. Signing with RSA-2048 takes most of a
//! millisecond of CPU, so callers do it on threads of their own.

use aws_lc_rs::digest;
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use model::Timestamp;
use std::fmt;

/// Signed once more than they occur, so that nobody can add another one (RFC 6376 §8.15).
const OVERSIGNED: [&str; 5] = ["from", "to", "subject", "date", "reply-to"];
/// Signed as often as they occur. Other fields may be changed on the way without breaking us.
const SIGNED: [&str; 4] = ["cc", "message-id", "mime-version", "feedback-id"];
const SIGNED_PREFIXES: [&str; 2] = ["content-", "list-"];
/// RFC 5322 §2.1.1 asks for lines of at most 78 characters.
const LINE: usize = 78;

/// A signature algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// `rsa-sha256` with a key of 2048 bits; every receiver knows it.
    Rsa2048,
    /// `ed25519-sha256` (RFC 8463); small and fast, beside an RSA signature.
    Ed25519,
}

/// Why a key cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not PEM with a private key.
    #[error("not a private key in PEM (PKCS#8)")]
    NotPem,
    /// The key is of another kind or broken.
    #[error("not an RSA key of 2048 to 8192 bits, and not an Ed25519 key ({0})")]
    Rejected(String),
    /// A selector is a DNS name.
    #[error("selector {0:?} is not a DNS label or several joined by dots")]
    Selector(String),
    /// The library could not make a key.
    #[error("the cryptographic library could not make a key")]
    Generate,
}

/// The library refused to sign: out of memory, or a key that is wrong inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the cryptographic library could not sign")]
pub struct SignError;

enum Pair {
    Rsa(Box<RsaKeyPair>),
    Ed25519(Ed25519KeyPair),
}

/// A signing key with its selector.
pub struct Key {
    selector: String,
    pair: Pair,
    random: SystemRandom,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("selector", &self.selector)
            .field("algorithm", &self.algorithm())
            .finish()
    }
}

impl Key {
    /// Reads a private key in PEM: PKCS#8, or PKCS#1 for RSA, as `openssl` writes them.
    ///
    /// # Errors
    /// [`KeyError`]; it never contains a part of the key.
    pub fn from_pem(selector: &str, pem: &str) -> Result<Self, KeyError> {
        let label = |l: &str| {
            !l.is_empty()
                && l.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if selector.len() > 253 || !selector.split('.').all(label) {
            return Err(KeyError::Selector(selector.chars().take(64).collect()));
        }
        let der = pem_body(pem).ok_or(KeyError::NotPem)?;
        let pair = match RsaKeyPair::from_pkcs8(&der).or_else(|_| RsaKeyPair::from_der(&der)) {
            Ok(pair) => Pair::Rsa(Box::new(pair)),
            // OpenSSL writes Ed25519 keys without their public half.
            Err(_) => Pair::Ed25519(
                Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der)
                    .map_err(|e| KeyError::Rejected(e.to_string()))?,
            ),
        };
        Ok(Self {
            selector: selector.to_ascii_lowercase(),
            pair,
            random: SystemRandom::new(),
        })
    }

    /// The selector, lower case.
    pub fn selector(&self) -> &str {
        &self.selector
    }

    /// What it signs with.
    pub fn algorithm(&self) -> Algorithm {
        match self.pair {
            Pair::Rsa(_) => Algorithm::Rsa2048,
            Pair::Ed25519(_) => Algorithm::Ed25519,
        }
    }

    /// The value of the TXT record at `SELECTOR._domainkey.DOMAIN`.
    ///
    /// # Errors
    /// [`KeyError::Generate`] when the library cannot write the public key.
    pub fn public_record(&self) -> Result<String, KeyError> {
        Ok(match &self.pair {
            Pair::Rsa(pair) => {
                let der: PublicKeyX509Der<'_> =
                    pair.public_key().as_der().map_err(|_| KeyError::Generate)?;
                format!("v=DKIM1; k=rsa; p={}", STANDARD.encode(der.as_ref()))
            }
            Pair::Ed25519(pair) => format!(
                "v=DKIM1; k=ed25519; p={}",
                STANDARD.encode(pair.public_key().as_ref())
            ),
        })
    }

    fn name(&self) -> &'static str {
        match self.pair {
            Pair::Rsa(_) => "rsa-sha256",
            Pair::Ed25519(_) => "ed25519-sha256",
        }
    }

    fn sign(&self, data: &[u8]) -> Result<Vec<u8>, SignError> {
        match &self.pair {
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                // PKCS#1 v1.5 takes nothing from the random source: same input, same bytes.
                pair.sign(&RSA_PKCS1_SHA256, &self.random, data, &mut signature)
                    .map_err(|_| SignError)?;
                Ok(signature)
            }
            // RFC 8463 §3: pure EdDSA over the SHA-256 of the data.
            Pair::Ed25519(pair) => {
                let hash = digest::digest(&digest::SHA256, data);
                pair.try_sign(hash.as_ref())
                    .map(|signature| signature.as_ref().to_vec())
                    .map_err(|_| SignError)
            }
        }
    }
}

/// Makes a key: PKCS#8 in PEM.
///
/// # Errors
/// [`KeyError::Generate`] when the library has no randomness or memory.
pub fn generate(algorithm: Algorithm) -> Result<String, KeyError> {
    let der = match algorithm {
        Algorithm::Rsa2048 => {
            let pair = RsaKeyPair::generate(KeySize::Rsa2048).map_err(|_| KeyError::Generate)?;
            let der: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| KeyError::Generate)?;
            der.as_ref().to_vec()
        }
        Algorithm::Ed25519 => {
            let pair = Ed25519KeyPair::generate().map_err(|_| KeyError::Generate)?;
            pair.to_pkcs8v1()
                .map_err(|_| KeyError::Generate)?
                .as_ref()
                .to_vec()
        }
    };
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|&b| char::from(b)));
        pem.push('\n');
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    Ok(pem)
}

fn pem_body(pem: &str) -> Option<Vec<u8>> {
    let (_, rest) = pem.split_once("-----BEGIN ")?;
    let (label, rest) = rest.split_once("-----")?;
    if !matches!(label, "PRIVATE KEY" | "RSA PRIVATE KEY") {
        return None;
    }
    let (body, _) = rest.split_once("-----END ")?;
    let body: String = body.split_ascii_whitespace().collect();
    STANDARD.decode(body).ok()
}

/// Signs the message with each key and appends the `DKIM-Signature` fields, first key first, to
/// `out`; they stand before `headers`. The body is hashed once.
///
/// `headers` are complete lines ending in CRLF, without the empty line; `body` has no bare CR or
/// LF. `signed_at` becomes `t=`: the release time of the batch, so that each attempt has the same
/// bytes.
///
/// # Errors
/// [`SignError`], when the library fails; `out` may then hold some of the signatures.
pub fn sign(
    out: &mut Vec<u8>,
    headers: &[u8],
    body: &[u8],
    domain: &str,
    keys: &[Key],
    signed_at: Timestamp,
) -> Result<(), SignError> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut body_hash = digest::Context::new(&digest::SHA256);
    relaxed_body(body, |piece| body_hash.update(piece));
    let body_hash = STANDARD.encode(body_hash.finish());
    let selected = Selected::new(headers);
    let mut data = Vec::with_capacity(selected.canonical.len() + 512);
    for key in keys {
        let mut field = format!(
            "DKIM-Signature: v=1; a={}; c=relaxed/relaxed; d={domain};\r\n\ts={}; t={};",
            key.name(),
            key.selector,
            signed_at.seconds().max(0)
        );
        push_folded(
            &mut field,
            "h=",
            selected.names.iter().map(String::as_str),
            ":",
        );
        field.push_str(";\r\n\tbh=");
        field.push_str(&body_hash);
        field.push_str(";\r\n\tb=");
        data.clear();
        data.extend_from_slice(&selected.canonical);
        relaxed_field(&mut data, field.as_bytes());
        let signature = STANDARD.encode(key.sign(&data)?);
        let chunks = signature
            .as_bytes()
            .chunks(LINE - 8)
            .map(|c| std::str::from_utf8(c).unwrap_or_default());
        for (at, chunk) in chunks.enumerate() {
            if at > 0 {
                field.push_str("\r\n\t");
            }
            field.push_str(chunk);
        }
        field.push_str("\r\n");
        out.extend_from_slice(field.as_bytes());
    }
    Ok(())
}

/// Appends `tag` and `items` on lines of their own, broken after the separator.
fn push_folded<'a>(
    field: &mut String,
    tag: &str,
    items: impl Iterator<Item = &'a str>,
    separator: &str,
) {
    field.push_str("\r\n\t");
    field.push_str(tag);
    let mut column = 8 + tag.len();
    for (at, item) in items.enumerate() {
        if at > 0 {
            field.push_str(separator);
            column += separator.len();
        }
        if column + item.len() + separator.len() > LINE {
            field.push_str("\r\n\t");
            column = 8;
        }
        field.push_str(item);
        column += item.len();
    }
}

/// The fields that are signed: their names for `h=`, and their canonical form.
struct Selected {
    names: Vec<String>,
    canonical: Vec<u8>,
}

impl Selected {
    fn new(headers: &[u8]) -> Self {
        let mut names = Vec::with_capacity(20);
        let mut canonical = Vec::with_capacity(headers.len());
        // A verifier takes several fields of one name from the bottom up (RFC 6376 §5.4.2), so
        // going upward here makes both orders the same.
        for field in fields(headers).into_iter().rev() {
            let Some(colon) = memchr::memchr(b':', field) else {
                continue;
            };
            let (name, _) = field.split_at(colon);
            let name = String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase();
            let signed = OVERSIGNED.contains(&name.as_str())
                || SIGNED.contains(&name.as_str())
                || SIGNED_PREFIXES
                    .iter()
                    .any(|prefix| name.starts_with(prefix));
            if signed {
                relaxed_field(&mut canonical, field);
                canonical.extend_from_slice(b"\r\n");
                names.push(name);
            }
        }
        names.extend(OVERSIGNED.iter().map(|&name| name.to_owned()));
        Self { names, canonical }
    }
}

/// Splits a header section into fields, continuation lines with their field.
fn fields(headers: &[u8]) -> Vec<&[u8]> {
    let mut fields = Vec::with_capacity(20);
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', headers).map(|at| at + 1) {
        if headers
            .get(end)
            .is_some_and(|&next| next == b' ' || next == b'\t')
        {
            continue;
        }
        fields.extend(headers.get(start..end));
        start = end;
    }
    fields
}

/// RFC 6376 §3.4.2, without the final CRLF.
fn relaxed_field(out: &mut Vec<u8>, field: &[u8]) {
    let colon = memchr::memchr(b':', field).unwrap_or(field.len());
    let (name, value) = field.split_at(colon);
    out.extend(name.trim_ascii().iter().map(u8::to_ascii_lowercase));
    out.push(b':');
    let mut space = false;
    let mut first = true;
    for &byte in value.iter().skip(1) {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => space = true,
            _ => {
                if space && !first {
                    out.push(b' ');
                }
                out.push(byte);
                (space, first) = (false, false);
            }
        }
    }
}

/// The canonical body on its way to whoever takes it: what stays as it is goes on in stretches of
/// many lines, without a copy.
struct RelaxedBody<'a, F: FnMut(&[u8])> {
    body: &'a [u8],
    /// Everything before has been emitted.
    done: usize,
    emit: F,
}

/// Gives `emit` the body as RFC 6376 §3.4.4 has it, piece by piece: runs of white space become one
/// space, none at the end of a line, no empty lines at the end (a line of white space only is empty
/// by then), one CRLF at the end of what is not empty.
fn relaxed_body(body: &[u8], emit: impl FnMut(&[u8])) {
    let end = body.iter().rposition(|&b| !is_white(b) && b != b'\n');
    let Some(content) = end.and_then(|at| body.get(..=at)) else {
        return;
    };
    let mut relaxed = RelaxedBody {
        body: content,
        done: 0,
        emit,
    };
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', content) {
        relaxed.line(start, end.saturating_sub(1));
        start = end + 1;
    }
    relaxed.line(start, content.len());
    relaxed.pass_on(content.len());
    (relaxed.emit)(b"\r\n");
}

impl<F: FnMut(&[u8])> RelaxedBody<'_, F> {
    /// The line `start..end` of the body, without its end.
    fn line(&mut self, start: usize, end: usize) {
        let line = self.body.get(start..end).unwrap_or_default();
        // Most lines stay as they are. Folded without a branch, so that many bytes are looked at at
        // once: with a search for each space, 10 KiB took 25 µs.
        let pairs = line.iter().zip(line.get(1..).unwrap_or_default());
        let changes = pairs.fold(line.first() == Some(&b'\t'), |changes, (&a, &b)| {
            changes | (b == b'\t') | (a == b' ' && b == b' ')
        });
        if !changes && line.last() != Some(&b' ') {
            return;
        }
        self.pass_on(start);
        let mut rest = line.trim_ascii_end();
        while let Some(at) = rest.iter().position(|&b| is_white(b)) {
            let (word, white) = rest.split_at(at);
            (self.emit)(word);
            (self.emit)(b" ");
            let run = white.iter().take_while(|&&b| is_white(b)).count();
            rest = white.get(run..).unwrap_or_default();
        }
        (self.emit)(rest);
        self.done = end;
    }

    /// Emits what stays as it is before `end`.
    fn pass_on(&mut self, end: usize) {
        (self.emit)(self.body.get(self.done..end).unwrap_or_default());
        self.done = end;
    }
}

fn is_white(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bodies_of_rfc_6376() {
        let cases: [(&[u8], &[u8]); 11] = [
            (b" C \r\nD \t E\r\n\r\n\r\n", b" C\r\nD E\r\n"),
            (b"", b""),
            (b"\r\n", b""),
            (b" \t \r\n\t\r\n", b""),
            (b"hello", b"hello\r\n"),
            (b"hello\r\n \r\n", b"hello\r\n"),
            (b"hello\r\n \r\nx\r\n", b"hello\r\n\r\nx\r\n"),
            (b"a\tb\r\n", b"a b\r\n"),
            (b"a \t  b  c\r\n", b"a b c\r\n"),
            (b"\ta\r\n", b" a\r\n"),
            (b"\r\n\r\na\r\n", b"\r\n\r\na\r\n"),
        ];
        for (body, canonical) in cases {
            assert_eq!(
                relaxed(body),
                canonical,
                "{:?}",
                String::from_utf8_lossy(body)
            );
        }
    }

    #[test]
    fn fields_of_rfc_6376() {
        let mut out = Vec::new();
        for field in fields(b"A: X\r\nB : Y\t\r\n\tZ  \r\n") {
            relaxed_field(&mut out, field);
            out.extend_from_slice(b"\r\n");
        }
        assert_eq!(out, b"a:X\r\nb:Y Z\r\n");
    }

    #[test]
    fn keys_survive_their_pem() {
        for algorithm in [Algorithm::Rsa2048, Algorithm::Ed25519] {
            let pem = generate(algorithm).expect("a key");
            let key = Key::from_pem("S1.Mail", &pem).expect("our own PEM");
            assert_eq!((key.algorithm(), key.selector()), (algorithm, "s1.mail"));
            let record = key.public_record().expect("a record");
            assert!(record.starts_with("v=DKIM1; k="), "{record}");
            assert!(!format!("{key:?}").contains("p="));
        }
        let pem = generate(Algorithm::Ed25519).expect("a key");
        for selector in ["", "a b", "a;b", "a..b", ".", "a\r\n"] {
            assert!(
                matches!(Key::from_pem(selector, &pem), Err(KeyError::Selector(_))),
                "{selector:?}"
            );
        }
        for pem in [
            "",
            "-----BEGIN PRIVATE KEY-----",
            &pem.replace("PRIVATE KEY", "PUBLIC KEY"),
        ] {
            assert_eq!(Key::from_pem("s", pem).err(), Some(KeyError::NotPem));
        }
        let broken = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(
            Key::from_pem("s", broken),
            Err(KeyError::Rejected(_))
        ));
    }

    fn relaxed(body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        relaxed_body(body, |piece| out.extend_from_slice(piece));
        out
    }

    /// The definition of RFC 6376, step by step, slowly.
    fn slow_relaxed_body(body: &str) -> String {
        let mut lines: Vec<String> = body
            .split("\r\n")
            .map(|line| {
                let mut reduced = String::new();
                for c in line.chars() {
                    let white = matches!(c, ' ' | '\t');
                    if !white {
                        reduced.push(c);
                    } else if !reduced.ends_with(' ') {
                        reduced.push(' ');
                    }
                }
                reduced.trim_end_matches(' ').to_owned()
            })
            .collect();
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        lines.into_iter().map(|line| line + "\r\n").collect()
    }

    proptest! {
        #[test]
        fn relaxed_bodies_follow_the_definition(body in "([ab \t]|\r\n){0,40}") {
            prop_assert_eq!(relaxed(body.as_bytes()), slow_relaxed_body(&body).into_bytes());
        }
    }
}
