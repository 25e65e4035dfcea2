//! Header fields: RFC 5322 folding, RFC 2047 encoded words, display names.
//!
//! Owns the rule that no value ever brings a line break or another control character into a
//! header. Everything written here is complete lines ending in CRLF, each at most 998 octets, and
//! ASCII but for an address that is not (RFC 6532; the peer must then offer SMTPUTF8).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use model::EmailAddress;
use std::borrow::Cow;

/// Where lines are folded when they can be (RFC 5322 §2.1.1).
const LINE: usize = 78;
/// RFC 2047 §2: an encoded word is at most 75 characters, its line at most 76.
const ENCODED_WORD: usize = 75;
/// A word that cannot be folded and comes near the hard limit of 998 is encoded instead.
const LONGEST_WORD: usize = 900;
const CHARSET_B: &str = "=?utf-8?B?";
const CHARSET_Q: &str = "=?utf-8?Q?";

/// Makes `value` fit for one line: each run of control characters (line breaks, tabs, NUL, …)
/// becomes one space, and the ends are trimmed.
pub(crate) fn one_line(value: &str) -> Cow<'_, str> {
    // U+2028 and U+2029 break lines in some readers, though not in RFC 5322.
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    if !value.contains(breaks) {
        return Cow::Borrowed(value.trim());
    }
    let mut out = String::with_capacity(value.len());
    let mut pending = false;
    for c in value.trim().chars() {
        if breaks(c) {
            pending = true;
        } else {
            if std::mem::take(&mut pending) && !out.ends_with(' ') && c != ' ' {
                out.push(' ');
            }
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// Writes `Name: value` for unstructured text, folded, encoded when it must be.
pub(crate) fn text(out: &mut Vec<u8>, name: &str, value: &str) {
    let value = one_line(value);
    out.extend_from_slice(name.as_bytes());
    out.push(b':');
    if needs_encoding(&value) {
        let mut column = name.len() + 1;
        encoded_words(out, &mut column, &value);
    } else {
        fold(out, name.len() + 1, &value);
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes `Name: value` as it is. `value` is ours: one line, ASCII, short.
pub(crate) fn plain(out: &mut Vec<u8>, name: &str, value: &str) {
    debug_assert!(
        value.is_ascii() && value.len() < LONGEST_WORD,
        "a header of ours"
    );
    for piece in [name, ": ", value, "\r\n"] {
        out.extend_from_slice(piece.as_bytes());
    }
}

/// Writes `Name: "Display" <address>` (RFC 5322 §3.4).
pub(crate) fn mailbox(
    out: &mut Vec<u8>,
    name: &str,
    display: Option<&str>,
    address: &EmailAddress,
) {
    out.extend_from_slice(name.as_bytes());
    out.push(b':');
    let mut column = name.len() + 1;
    let display = display.map(one_line).unwrap_or_default();
    if !display.is_empty() {
        phrase(out, &mut column, &display);
    }
    let address = address.as_str();
    let brackets = if display.is_empty() {
        ["", ""]
    } else {
        ["<", ">"]
    };
    let separator = if column + address.len() + 3 > LINE && column > name.len() + 1 {
        "\r\n "
    } else {
        " "
    };
    for piece in [separator, brackets[0], address, brackets[1], "\r\n"] {
        out.extend_from_slice(piece.as_bytes());
    }
}

fn phrase(out: &mut Vec<u8>, column: &mut usize, display: &str) {
    let atom = |b: u8| b.is_ascii_alphanumeric() || b" !#$%&'*+-/=?^_`{|}~".contains(&b);
    if needs_encoding(display) || display.len() > LINE {
        encoded_words(out, column, display);
        return;
    }
    out.push(b' ');
    *column += 1;
    if display.bytes().all(atom) && !display.contains("  ") {
        out.extend_from_slice(display.as_bytes());
        *column += display.len();
        return;
    }
    out.push(b'"');
    *column += display.len() + 2;
    for byte in display.bytes() {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
            *column += 1;
        }
        out.push(byte);
    }
    out.push(b'"');
}

/// Text that is not ASCII, would be taken for an encoded word, or cannot be folded.
fn needs_encoding(value: &str) -> bool {
    !value.is_ascii()
        || value.contains("=?")
        || value.split(' ').any(|word| word.len() > LONGEST_WORD)
}

/// Folds before single spaces only: unfolding then gives the very text back, and no line is made
/// of white space alone.
fn fold(out: &mut Vec<u8>, mut column: usize, value: &str) {
    let mut spaces = 1;
    for (at, word) in value.split(' ').enumerate() {
        if word.is_empty() && at > 0 {
            spaces += 1;
            continue;
        }
        if at > 0 && column + spaces + word.len() > LINE {
            out.extend_from_slice(b"\r\n");
            column = 0;
        }
        out.extend(std::iter::repeat_n(b' ', spaces));
        out.extend_from_slice(word.as_bytes());
        column += spaces + word.len();
        spaces = 1;
    }
}

/// Writes ` =?utf-8?…?=` as often as needed, in the shorter of the two encodings, never cutting a
/// character in two (RFC 2047 §5).
fn encoded_words(out: &mut Vec<u8>, column: &mut usize, value: &str) {
    let q_len: usize = value
        .bytes()
        .map(|b| if q_safe(b) || b == b' ' { 1 } else { 3 })
        .sum();
    let base64 = q_len > value.len().div_ceil(3) * 4;
    let mut rest = value;
    while !rest.is_empty() {
        let mut room = (LINE - 2)
            .saturating_sub(*column + 1)
            .min(ENCODED_WORD)
            .saturating_sub(CHARSET_B.len() + 2);
        if room < 16 {
            out.extend_from_slice(b"\r\n");
            *column = 0;
            room = ENCODED_WORD - CHARSET_B.len() - 2;
        }
        let (word, tail) = split_word(rest, room, base64);
        out.push(b' ');
        let start = out.len();
        if base64 {
            out.extend_from_slice(CHARSET_B.as_bytes());
            out.extend_from_slice(STANDARD.encode(word).as_bytes());
        } else {
            out.extend_from_slice(CHARSET_Q.as_bytes());
            word.bytes().for_each(|byte| q_byte(out, byte));
        }
        out.extend_from_slice(b"?=");
        *column += 1 + out.len() - start;
        rest = tail;
        if !rest.is_empty() {
            out.extend_from_slice(b"\r\n");
            *column = 0;
        }
    }
}

/// The longest prefix of whole characters that encodes into `room`, and what follows it.
fn split_word(text: &str, room: usize, base64: bool) -> (&str, &str) {
    let mut used = 0;
    let mut end = 0;
    for c in text.chars() {
        let mut buffer = [0; 4];
        let bytes = c.encode_utf8(&mut buffer).bytes();
        used += if base64 {
            c.len_utf8()
        } else {
            bytes
                .map(|b| if q_safe(b) || b == b' ' { 1 } else { 3 })
                .sum()
        };
        let len = if base64 { used.div_ceil(3) * 4 } else { used };
        if len > room {
            break;
        }
        end += c.len_utf8();
    }
    text.split_at(end)
}

/// The characters that stand for themselves in a phrase (RFC 2047 §5 (3)), the strictest place.
fn q_safe(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'!' | b'*' | b'+' | b'-' | b'/')
}

fn q_byte(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    match byte {
        b' ' => out.push(b'_'),
        _ if q_safe(byte) => out.push(byte),
        _ => out.extend([
            b'=',
            HEX[usize::from(byte >> 4)],
            HEX[usize::from(byte & 15)],
        ]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mail_parser::MessageParser;
    use proptest::prelude::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).expect("headers are UTF-8")
    }

    fn address(text: &str) -> EmailAddress {
        text.parse().expect("an address")
    }

    #[test]
    fn plain_text_is_folded_only_when_long() {
        assert_eq!(
            written(|o| text(o, "Subject", "Hello")),
            "Subject: Hello\r\n"
        );
        assert_eq!(written(|o| text(o, "Subject", "")), "Subject: \r\n");
        assert_eq!(
            written(|o| text(o, "Subject", &"word ".repeat(20))),
            format!(
                "Subject: {}\r\n {}\r\n",
                "word ".repeat(14).trim(),
                "word ".repeat(6).trim()
            )
        );
    }

    #[test]
    fn line_breaks_in_values_become_one_space() {
        assert_eq!(
            written(|o| text(o, "Subject", " a\r\nBcc: x@y.example\r\n\r\nbody\0\t ")),
            "Subject: a Bcc: x@y.example body\r\n"
        );
        assert_eq!(one_line("a \n b"), "a  b");
        assert_eq!(one_line("\r\n\r\n"), "");
        assert_eq!(one_line("a\u{2028}b\u{85}c"), "a b c");
    }

    #[test]
    fn names_are_bare_quoted_or_encoded() {
        let a = address("a@x.example");
        let to = |name| written(|o| mailbox(o, "To", name, &a));
        assert_eq!(to(None), "To: a@x.example\r\n");
        assert_eq!(to(Some(" \r\n")), "To: a@x.example\r\n");
        assert_eq!(to(Some("Ann Example")), "To: Ann Example <a@x.example>\r\n");
        assert_eq!(
            to(Some(r#"Ex, "A" \ 1"#)),
            "To: \"Ex, \\\"A\\\" \\\\ 1\" <a@x.example>\r\n"
        );
        assert_eq!(
            to(Some("山田 太郎")),
            "To: =?utf-8?B?5bGx55SwIOWkqumDjg==?= <a@x.example>\r\n"
        );
        assert_eq!(
            to(Some("Chloé Example")),
            "To: =?utf-8?Q?Chlo=C3=A9_Example?= <a@x.example>\r\n"
        );
        assert_eq!(
            to(Some("=?utf-8?Q?x?=")),
            "To: =?utf-8?B?PT91dGYtOD9RP3g/PQ==?= <a@x.example>\r\n"
        );
    }

    fn lines_are_sound(field: &str) -> Result<(), TestCaseError> {
        prop_assert!(field.ends_with("\r\n"));
        for (at, line) in field.trim_end_matches("\r\n").split("\r\n").enumerate() {
            prop_assert!(
                line.len() <= 998 && !line.contains(['\r', '\n', '\0']),
                "{field:?}"
            );
            prop_assert!(
                at == 0 || (line.starts_with(' ') && !line.trim().is_empty()),
                "{field:?}"
            );
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn any_text_survives(value in "(\\PC|[ é日\r\n\t=?_]){0,300}|[a-z]{880,1200}") {
            let field = written(|o| text(o, "Subject", &value));
            lines_are_sound(&field)?;
            prop_assert!(field.is_ascii());
            let expected = one_line(&value).into_owned();
            let message = format!("{field}\r\n");
            let parsed = MessageParser::new().parse(message.as_bytes()).expect("a message");
            // The parser trims what it reads.
            prop_assert_eq!(parsed.subject().unwrap_or_default().trim(), expected.trim());
            prop_assert_eq!(parsed.headers().len(), 1);
        }

        #[test]
        fn any_name_survives(name in "(\\PC|[ é日\r\n\"\\\\,<>@=?]){0,200}") {
            let field = written(|o| mailbox(o, "To", Some(&name), &address("a@x.example")));
            lines_are_sound(&field)?;
            let message = format!("{field}\r\n");
            let parsed = MessageParser::new().parse(message.as_bytes()).expect("a message");
            let to = parsed.to().and_then(|to| to.first()).expect("an address");
            prop_assert_eq!(to.address(), Some("a@x.example"));
            prop_assert_eq!(parsed.to().map(|to| to.iter().count()), Some(1));
            let read = to.name().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
            let expected = one_line(&name).split_whitespace().collect::<Vec<_>>().join(" ");
            prop_assert_eq!(read, expected);
        }
    }
}
