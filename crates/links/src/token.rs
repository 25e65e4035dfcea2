//! The bytes of a token. The format is frozen: links live for years, so a change is a new version
//! byte beside this one, never in place of it.
//!
//! ```text
//! version 1 | key id 2 | kind 1 | flags 1 | batch 16 | index varint | link varint | target … | MAC 12
//! ```
//!
//! base64url without padding, canonical: one token has one spelling. Varints are LEB128, shortest
//! form. The MAC is HMAC-SHA256 truncated to 96 bits over one byte of host length, the lower-case
//! host name and everything that stands before the MAC.

use crate::KeyRing;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use model::{BatchId, TrackingMode};

/// The longest target, in bytes, that a token takes. Longer URLs stay as they are, untracked.
pub const MAX_TARGET: usize = 4096;
/// The longest token, in characters, that is looked at.
pub const MAX_TOKEN: usize = (MAX_BYTES * 4).div_ceil(3);

pub(crate) const VERSION: u8 = 1;
pub(crate) const MAC_LEN: usize = 12;
/// Version, key id, kind, flags, batch.
const FIXED: usize = 1 + 2 + 1 + 1 + 16;
const MAX_BYTES: usize = FIXED + 5 + 3 + MAX_TARGET + MAC_LEN;

/// What a link or an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The pixel: `/o/TOKEN.gif`.
    Open,
    /// A tracked link: `/c/TOKEN`.
    Click,
    /// The unsubscribe page and its one-click POST: `/u/TOKEN`.
    Unsubscribe,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Click => 2,
            Self::Unsubscribe => 3,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Open),
            2 => Some(Self::Click),
            3 => Some(Self::Unsubscribe),
            _ => None,
        }
    }
}

/// What the tracker must know of the message without looking it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flags {
    /// The tracking mode in force when the message was made.
    pub mode: TrackingMode,
    /// A proof: works like the real thing, outside all counters.
    pub proof: bool,
}

impl Flags {
    const PROOF: u8 = 0b100;

    const fn byte(self) -> u8 {
        let mode = match self.mode {
            TrackingMode::Off => 0,
            TrackingMode::Aggregate => 1,
            TrackingMode::LastDate => 2,
            TrackingMode::Individual => 3,
        };
        if self.proof { mode | Self::PROOF } else { mode }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        let mode = match byte & 0b11 {
            0 => TrackingMode::Off,
            1 => TrackingMode::Aggregate,
            2 => TrackingMode::LastDate,
            _ => TrackingMode::Individual,
        };
        if byte & !0b111 != 0 {
            None
        } else {
            Some(Self {
                mode,
                proof: byte & Self::PROOF != 0,
            })
        }
    }
}

/// What a link says, in full. Borrows its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token<'a> {
    /// What it is for.
    pub kind: Kind,
    /// Tracking mode and the like.
    pub flags: Flags,
    /// The batch.
    pub batch: BatchId,
    /// The recipient's index in the batch.
    pub index: u32,
    /// The number of the link in the content, from 0; 0 for what is not a click.
    pub link: u16,
    /// Where a click leads; empty for what is not a click.
    pub target: &'a str,
}

/// A token that was verified. Owns its bytes; [`VerifiedToken::token`] reads them.
///
/// Kept apart from [`Token`] so that only the verifier can make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedToken {
    kind: Kind,
    flags: Flags,
    batch: BatchId,
    index: u32,
    link: u16,
    target: String,
}

impl VerifiedToken {
    /// What the token says.
    pub fn token(&self) -> Token<'_> {
        let Self {
            kind,
            flags,
            batch,
            index,
            link,
            ref target,
        } = *self;
        Token {
            kind,
            flags,
            batch,
            index,
            link,
            target,
        }
    }
}

/// Why a token is refused. Strangers learn none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// Too long, not canonical base64url, or cut short.
    #[error("not a token")]
    Malformed,
    /// A version of the format that this program does not know.
    #[error("unknown token version")]
    Version,
    /// Signed with a key that is not in the ring.
    #[error("unknown key")]
    UnknownKey,
    /// The MAC does not fit: changed, made up, or of another host.
    #[error("wrong signature")]
    Signature,
}

/// Why a URL cannot be a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Neither `http://` nor `https://`.
    #[error("not an http or https URL")]
    Scheme,
    /// Nothing where the host should be.
    #[error("no host")]
    Host,
    /// A control character, which could end the header that will carry the URL.
    #[error("a control character")]
    Control,
    /// More than [`MAX_TARGET`] bytes.
    #[error("longer than {MAX_TARGET} bytes")]
    TooLong,
}

/// Says whether a click may lead to `url`: http or https, a host, no control characters, at most
/// [`MAX_TARGET`] bytes.
///
/// # Errors
/// The first rule that `url` breaks.
pub fn check_target(url: &str) -> Result<(), TargetError> {
    let bytes = url.as_bytes();
    let starts = |scheme: &[u8]| {
        bytes
            .get(..scheme.len())
            .is_some_and(|b| b.eq_ignore_ascii_case(scheme))
    };
    let rest = match (starts(b"http://"), starts(b"https://")) {
        (true, _) => bytes.get(7..),
        (_, true) => bytes.get(8..),
        _ => return Err(TargetError::Scheme),
    };
    if rest
        .and_then(<[u8]>::first)
        .is_none_or(|b| matches!(b, b'/' | b'?' | b'#' | b'\\' | b' '))
    {
        return Err(TargetError::Host);
    }
    if bytes.iter().any(u8::is_ascii_control) {
        return Err(TargetError::Control);
    }
    if bytes.len() > MAX_TARGET {
        Err(TargetError::TooLong)
    } else {
        Ok(())
    }
}

/// Writes everything but the MAC.
pub(crate) fn write_body(out: &mut Vec<u8>, key_id: u16, token: &Token<'_>) {
    out.reserve(FIXED + 8 + token.target.len() + MAC_LEN);
    out.push(VERSION);
    out.extend_from_slice(&key_id.to_be_bytes());
    out.push(token.kind.code());
    out.push(token.flags.byte());
    out.extend_from_slice(&token.batch.to_bytes());
    write_varint(out, token.index);
    write_varint(out, u32::from(token.link));
    out.extend_from_slice(token.target.as_bytes());
}

pub(crate) fn encode(out: &mut String, bytes: &[u8]) {
    URL_SAFE_NO_PAD.encode_string(bytes, out);
}

impl KeyRing {
    /// Reads `text` as a token that was signed for `host` with any key of the ring.
    ///
    /// Never allocates more than a token may be long; the MAC is compared in constant time and
    /// before anything it covers is believed.
    ///
    /// # Errors
    /// [`Bad`]; the caller answers all of them alike.
    pub fn verify(&self, text: &str, host: &str) -> Result<VerifiedToken, Bad> {
        if text.len() > MAX_TOKEN {
            return Err(Bad::Malformed);
        }
        // The engine refuses padding and non-zero trailing bits, so a token has one spelling.
        let mut bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Bad::Malformed)?;
        if bytes.first().is_some_and(|&version| version != VERSION) {
            return Err(Bad::Version);
        }
        let body_len = bytes.len().checked_sub(MAC_LEN).ok_or(Bad::Malformed)?;
        let (body, mac) = bytes.split_at(body_len);
        let key_id = body
            .get(1..3)
            .and_then(|id| id.try_into().ok())
            .ok_or(Bad::Malformed)?;
        self.check_mac(u16::from_be_bytes(key_id), host, body, mac)?;
        bytes.truncate(body_len);
        read_body(bytes).ok_or(Bad::Malformed)
    }
}

/// Reads what stands before the MAC; the target keeps the memory.
fn read_body(mut body: Vec<u8>) -> Option<VerifiedToken> {
    let (fixed, rest) = body.split_at_checked(FIXED)?;
    let batch: [u8; 16] = fixed.get(5..)?.try_into().ok()?;
    let (kind, flags) = (*fixed.get(3)?, *fixed.get(4)?);
    let (index, rest) = read_varint(rest)?;
    let (link, rest) = read_varint(rest)?;
    let link = link.try_into().ok()?;
    let before = body.len() - rest.len();
    body.drain(..before);
    let target = String::from_utf8(body).ok()?;
    let kind = Kind::from_code(kind)?;
    let sound = match kind {
        Kind::Click => check_target(&target).is_ok(),
        Kind::Open | Kind::Unsubscribe => target.is_empty(),
    };
    sound.then_some(VerifiedToken {
        kind,
        flags: Flags::from_byte(flags)?,
        batch: BatchId::from_bytes(batch),
        index,
        link,
        target,
    })
}

fn write_varint(out: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Reads a varint of at most 32 bits in its shortest form.
fn read_varint(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let mut value = 0_u64;
    for at in 0..5 {
        let byte = *bytes.get(at)?;
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte < 0x80 {
            let shortest = byte != 0 || at == 0;
            let rest = bytes.get(at + 1..)?;
            return u32::try_from(value)
                .ok()
                .filter(|_| shortest)
                .map(|value| (value, rest));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_varint_has_one_spelling(value: u32, tail: Vec<u8>) {
            let mut bytes = Vec::new();
            write_varint(&mut bytes, value);
            bytes.extend_from_slice(&tail);
            prop_assert_eq!(read_varint(&bytes), Some((value, &tail[..])));
        }

        #[test]
        fn what_reads_as_a_varint_is_written_the_same(bytes: Vec<u8>) {
            if let Some((value, rest)) = read_varint(&bytes) {
                let mut again = Vec::new();
                write_varint(&mut again, value);
                again.extend_from_slice(rest);
                prop_assert_eq!(again, bytes);
            }
        }
    }

    #[test]
    fn targets() {
        for good in [
            "http://a",
            "HTTPS://B.example/x?y#z",
            "https://日本.example/道",
            "http://[::1]/",
        ] {
            assert_eq!(check_target(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("javascript:alert(1)", TargetError::Scheme),
            ("", TargetError::Scheme),
            ("https:/x", TargetError::Scheme),
            (" https://x", TargetError::Scheme),
            ("data:text/html,x", TargetError::Scheme),
            ("//x.example", TargetError::Scheme),
            ("https://", TargetError::Host),
            ("https:///x", TargetError::Host),
            ("http://?x", TargetError::Host),
            ("http://x/\r\nSet-Cookie: a", TargetError::Control),
            ("http://x/\0", TargetError::Control),
        ] {
            assert_eq!(check_target(bad), Err(why), "{bad:?}");
        }
        let long = |extra: usize| format!("http://{}", "x".repeat(MAX_TARGET - 7 + extra));
        assert_eq!(check_target(&long(0)), Ok(()));
        assert_eq!(check_target(&long(1)), Err(TargetError::TooLong));
    }
}
