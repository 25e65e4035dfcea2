//! Replies: what the peer answered, and the incremental parser that reads it.
//!
//! Owns reply syntax (RFC 5321 §4.2, RFC 2034, RFC 3463) and nothing else: what
//! a reply means for a transaction is the business of [`crate::client`].

use std::borrow::Cow;
use std::fmt;

use memchr::memchr;
use thiserror::Error;

/// Bytes kept of one reply line; the rest of a longer line is dropped.
///
/// RFC 5321 §4.5.3.1.5 allows 512; long policy texts with URLs exceed that in
/// practice.
pub const LINE_MAX: usize = 2 * 1024;

/// Bytes a whole reply may have on the wire, dropped ones included.
pub const REPLY_MAX: usize = 64 * 1024;

/// An enhanced status code (RFC 3463), such as `5.7.515`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EnhancedCode {
    /// 2 (success), 4 (persistent transient failure) or 5 (permanent failure).
    pub class: u8,
    /// What the code speaks of: 1 is addressing, 7 is policy, and so on. At most 999.
    pub subject: u16,
    /// The detail within the subject. At most 999.
    pub detail: u16,
}

impl fmt::Display for EnhancedCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.class, self.subject, self.detail)
    }
}

impl EnhancedCode {
    /// Reads a code at the start of `text`, tolerating a leading `#`, and
    /// returns it with what follows it.
    ///
    /// A dotted number of more than three parts is not a code: `5.1.1.4` may be
    /// an address or a version.
    #[must_use]
    pub fn parse_prefix(text: &str) -> Option<(Self, &str)> {
        let rest = text.strip_prefix('#').unwrap_or(text);
        let (class, rest) = number(rest)?;
        let class = u8::try_from(class)
            .ok()
            .filter(|c| matches!(c, 2 | 4 | 5))?;
        let (subject, rest) = number(rest.strip_prefix('.')?)?;
        let (detail, rest) = number(rest.strip_prefix('.')?)?;
        let mut following = rest.chars();
        let more = match following.next() {
            Some('.') => following.next().is_some_and(|c| c.is_ascii_digit()),
            Some(c) => c.is_ascii_alphanumeric(),
            None => false,
        };
        (!more).then_some((
            Self {
                class,
                subject,
                detail,
            },
            rest,
        ))
    }
}

/// One to three digits at the start of `text`.
fn number(text: &str) -> Option<(u16, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    if !(1..=3).contains(&digits) {
        return None;
    }
    let (number, rest) = text.split_at_checked(digits)?;
    Some((number.parse().ok()?, rest))
}

/// A complete reply, its lines joined (RFC 5321 §4.2.1).
///
/// Safe to log and to store: control characters, line separators and
/// direction overrides are replaced, invalid UTF-8 is kept lossily, and the
/// size is bounded by [`REPLY_MAX`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The three-digit code, 200 to 599. When lines differ, that of the first.
    pub code: u16,
    /// The enhanced status code, when the peer gave one. Its class is the
    /// peer's word and may disagree with `code`.
    pub enhanced: Option<EnhancedCode>,
    /// Lines without code and enhanced code, separated by `\n`.
    text: String,
}

impl Reply {
    /// Makes a reply, for tests and for replies that did not come off a wire.
    ///
    /// `text` may begin with an enhanced status code and have several lines.
    #[must_use]
    pub fn new(code: u16, text: &str) -> Self {
        let mut reply = Self {
            code,
            enhanced: None,
            text: String::new(),
        };
        for (index, line) in text.lines().enumerate() {
            reply.push_line(index == 0, line.as_bytes());
        }
        reply
    }

    /// 2xx: the command succeeded.
    #[must_use]
    pub fn is_positive(&self) -> bool {
        (200..300).contains(&self.code)
    }

    /// 3xx: go on (`354`).
    #[must_use]
    pub fn is_intermediate(&self) -> bool {
        (300..400).contains(&self.code)
    }

    /// 4xx: refused now, may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        (400..500).contains(&self.code)
    }

    /// 5xx: refused for good.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        (500..600).contains(&self.code)
    }

    /// The lines of text, without codes; at least one, which may be empty.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.text.split('\n')
    }

    /// The text on one line: lines joined by a space, codes left out.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        if memchr(b'\n', self.text.as_bytes()).is_some() {
            Cow::Owned(self.text.replace('\n', " "))
        } else {
            Cow::Borrowed(&self.text)
        }
    }

    fn push_line(&mut self, first: bool, raw: &[u8]) {
        let line = String::from_utf8_lossy(raw);
        let mut line = line.trim();
        if let Some((code, rest)) = EnhancedCode::parse_prefix(line) {
            if first {
                self.enhanced = Some(code);
            }
            // A differing code on a later line stays in the text: nothing is lost.
            if self.enhanced == Some(code) {
                line = rest.trim_start_matches([':', '.', '-']).trim_start();
            }
        } else if first {
            self.enhanced = trailing_code(line);
        }
        if !first {
            self.text.push('\n');
        }
        self.text.extend(line.chars().map(sanitized));
    }
}

impl fmt::Display for Reply {
    /// The whole reply on one line: `550 5.1.1 no such user`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if let Some(enhanced) = self.enhanced {
            write!(f, " {enhanced}")?;
        }
        for line in self.lines().filter(|line| !line.is_empty()) {
            write!(f, " {line}")?;
        }
        Ok(())
    }
}

/// qmail and its heirs write the code at the end: `no mailbox here (#5.1.1)`.
fn trailing_code(line: &str) -> Option<EnhancedCode> {
    let (_, tail) = line.rsplit_once("(#")?;
    let (code, rest) = EnhancedCode::parse_prefix(tail)?;
    rest.starts_with(')').then_some(code)
}

/// What cannot harm a terminal, a log line or a reader.
fn sanitized(c: char) -> char {
    match c {
        '\t' => ' ',
        // Line and paragraph separators; marks that reorder what is shown.
        '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' => char::REPLACEMENT_CHARACTER,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => char::REPLACEMENT_CHARACTER,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// Why what came cannot be a reply. The connection is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReplyError {
    /// A line does not begin with a code from 200 to 599.
    #[error("the peer sent a line that is not an SMTP reply")]
    NotAReply,
    /// The reply exceeds [`REPLY_MAX`].
    #[error("the peer sent a reply of more than 64 KiB")]
    TooLong,
}

/// Reads replies from bytes that come in any portions.
///
/// Keeps what it has of an unfinished reply between calls, and never takes
/// bytes beyond the end of the reply it returns.
#[derive(Debug, Default)]
pub struct ReplyParser {
    /// The unfinished line, at most [`LINE_MAX`] bytes of it.
    line: Vec<u8>,
    reply: Option<Reply>,
    wire_bytes: usize,
}

impl ReplyParser {
    /// A parser that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until a reply is complete.
    ///
    /// `None` means that all of `input` was taken and more is needed; after
    /// `Some`, `input` is what follows the reply.
    ///
    /// # Errors
    /// [`ReplyError`]: the stream cannot be understood from here on.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Reply>, ReplyError> {
        while !input.is_empty() {
            let end = memchr(b'\n', input);
            let taken = end.map_or(input.len(), |lf| lf.saturating_add(1));
            let (piece, rest) = input.split_at_checked(taken).unwrap_or((*input, &[]));
            *input = rest;
            self.wire_bytes = self.wire_bytes.saturating_add(piece.len());
            if self.wire_bytes > REPLY_MAX {
                return Err(ReplyError::TooLong);
            }
            let room = LINE_MAX.saturating_sub(self.line.len());
            self.line.extend(piece.iter().take(room));
            if end.is_some() && self.end_line()? {
                self.wire_bytes = 0;
                return Ok(self.reply.take());
            }
        }
        Ok(None)
    }

    /// Whether a reply has begun but not ended.
    #[must_use]
    pub fn is_mid_reply(&self) -> bool {
        self.wire_bytes > 0
    }

    /// Reads the line that just ended; true if it was the reply's last.
    fn end_line(&mut self) -> Result<bool, ReplyError> {
        let line = self.line.trim_ascii_end();
        let (code, last, text) = split_line(line).ok_or(ReplyError::NotAReply)?;
        let first = self.reply.is_none();
        self.reply
            .get_or_insert_with(|| Reply {
                code,
                enhanced: None,
                text: String::new(),
            })
            .push_line(first, text);
        self.line.clear();
        Ok(last)
    }
}

/// Code, whether it is the last line, and text. Lenient after the code: a line
/// may end right there.
fn split_line(line: &[u8]) -> Option<(u16, bool, &[u8])> {
    let (digits, rest) = line.split_first_chunk::<3>()?;
    let code = digits.iter().try_fold(0_u16, |code, digit| {
        let digit = digit.is_ascii_digit().then(|| u16::from(digit - b'0'))?;
        Some(code * 10 + digit)
    })?;
    if !(200..600).contains(&code) {
        return None;
    }
    match rest.split_first() {
        None => Some((code, true, rest)),
        Some((b'-', text)) => Some((code, false, text)),
        Some((b' ' | b'\t', text)) => Some((code, true, text)),
        Some((next, _)) if next.is_ascii_digit() => None,
        Some(_) => Some((code, true, rest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_all(mut input: &[u8]) -> Result<Vec<Reply>, ReplyError> {
        let mut parser = ReplyParser::new();
        let mut replies = Vec::new();
        while let Some(reply) = parser.feed(&mut input)? {
            replies.push(reply);
        }
        Ok(replies)
    }

    fn one(input: &str) -> Reply {
        let replies = parse_all(input.as_bytes()).expect("a reply");
        assert_eq!(replies.len(), 1, "{input:?}");
        replies.into_iter().next().expect("one")
    }

    #[test]
    fn replies_as_servers_write_them() {
        let table = [
            ("250 ok\r\n", 250, None, "ok"),
            ("250\r\n", 250, None, ""),
            ("250 \r\n", 250, None, ""),
            (
                "250 2.0.0 queued as X\r\n",
                250,
                Some((2, 0, 0)),
                "queued as X",
            ),
            (
                "550 5.7.515 Access denied\r\n",
                550,
                Some((5, 7, 515)),
                "Access denied",
            ),
            ("550 5.1.1: bad\r\n", 550, Some((5, 1, 1)), "bad"),
            ("550 #5.1.1 bad\r\n", 550, Some((5, 1, 1)), "bad"),
            ("550 5.1.1\n", 550, Some((5, 1, 1)), ""),
            ("550 5.1.1. bad\r\n", 550, Some((5, 1, 1)), "bad"),
            (
                "550 no mailbox (#5.1.1)\r\n",
                550,
                Some((5, 1, 1)),
                "no mailbox (#5.1.1)",
            ),
            (
                "550-5.1.1 one\r\n550 5.1.1 two\r\n",
                550,
                Some((5, 1, 1)),
                "one two",
            ),
            (
                "550-5.1.1 one\r\n450 4.2.2 two\r\n",
                550,
                Some((5, 1, 1)),
                "one 4.2.2 two",
            ),
            ("550-one\r\n550 5.1.1 two\r\n", 550, None, "one 5.1.1 two"),
            ("550 1.2.3.4 is listed\r\n", 550, None, "1.2.3.4 is listed"),
            ("550 5.1.1.4 is listed\r\n", 550, None, "5.1.1.4 is listed"),
            ("550 3.1.1 x\r\n", 550, None, "3.1.1 x"),
            ("550 5.1.1234 x\r\n", 550, None, "5.1.1234 x"),
            (
                "550 a\x1b[31m\tb\u{202e}c\r\n",
                550,
                None,
                "a\u{fffd}[31m b\u{fffd}c",
            ),
            ("550 a\rb\r\n", 550, None, "a\u{fffd}b"),
        ];
        for (input, code, enhanced, text) in table {
            let reply = one(input);
            let want = enhanced.map(|(class, subject, detail)| EnhancedCode {
                class,
                subject,
                detail,
            });
            assert_eq!(
                (reply.code, reply.enhanced, &*reply.text()),
                (code, want, text),
                "{input:?}"
            );
        }
    }

    #[test]
    fn several_replies_in_one_segment_stay_apart() {
        let replies = parse_all(b"250-a\r\n250 b\r\n354 go\r\n421 4.3.2 bye\r\n").expect("replies");
        let codes: Vec<_> = replies.iter().map(|r| r.code).collect();
        assert_eq!(codes, [250, 354, 421]);
        assert_eq!(replies.first().map(|r| r.lines().count()), Some(2));
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for input in [
            "HTTP/1.1 400\r\n",
            "25 x\r\n",
            "\r\n",
            "199 x\r\n",
            "600 x\r\n",
            "2500\r\n",
            "-250 x\r\n",
        ] {
            assert_eq!(
                parse_all(input.as_bytes()),
                Err(ReplyError::NotAReply),
                "{input:?}"
            );
        }
    }

    #[test]
    fn long_lines_are_cut_and_endless_replies_refused() {
        let long = format!("550 {}\r\n", "x".repeat(10_000));
        assert_eq!(one(&long).text().len(), LINE_MAX - 4);
        let endless = "250-spam spam spam\r\n".repeat(5_000);
        assert_eq!(parse_all(endless.as_bytes()), Err(ReplyError::TooLong));
        let without_end = "5".repeat(REPLY_MAX + 1);
        assert_eq!(parse_all(without_end.as_bytes()), Err(ReplyError::TooLong));
    }

    #[test]
    fn invalid_utf8_is_kept_lossily() {
        let replies = parse_all(b"550 caf\xe9 x\r\n").expect("a reply");
        assert_eq!(
            replies.first().map(|r| r.text().into_owned()),
            Some("caf\u{fffd} x".to_owned())
        );
    }

    #[test]
    fn display_is_one_line() {
        let reply = one("550-5.1.1 no\r\n550-5.1.1\r\n550 5.1.1 user\r\n");
        assert_eq!(reply.to_string(), "550 5.1.1 no user");
        assert_eq!(Reply::new(550, "5.1.1 no\n5.1.1\n5.1.1 user"), reply);
    }

    proptest! {
        #[test]
        fn splitting_anywhere_changes_nothing(
            lines in prop::collection::vec(("(250|354|421|550)", "[ -]", "[ -~]{0,40}"), 1..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let wire: String = lines.iter().map(|(code, sep, text)| format!("{code}{sep}{text}\r\n")).collect();
            let whole = parse_all(wire.as_bytes());
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).collect();
            at.sort_unstable();
            at.push(wire.len());
            let mut parser = ReplyParser::new();
            let mut replies = Vec::new();
            let mut from = 0;
            for to in at {
                let mut piece = wire.as_bytes().get(from..to).expect("sorted cuts");
                while let Some(reply) = parser.feed(&mut piece).expect("replies") {
                    replies.push(reply);
                }
                from = to;
            }
            prop_assert_eq!(Ok(replies), whole);
        }

        #[test]
        fn no_bytes_panic_or_leave_control_characters(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut wire = b"550 ".to_vec();
            wire.extend(bytes);
            wire.extend(b"\r\n");
            if let Ok(replies) = parse_all(&wire) {
                for reply in replies {
                    prop_assert!(!reply.to_string().chars().any(char::is_control));
                }
            }
        }
    }
}
