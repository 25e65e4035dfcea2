//! Complete messages that a caller wrote: they leave as they are.
//!
//! Owns what such a message has to be, so that it can go over SMTP and be signed. Nothing of it is
//! changed but line ends that SMTP cannot carry; what is missing is put before it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use model::EmailAddress;

/// RFC 5322 §2.1.1, without CRLF.
const LONGEST_LINE: usize = 998;

/// A message, split where its header ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raw {
    /// Complete lines.
    pub(crate) headers: Vec<u8>,
    /// Complete lines.
    pub(crate) body: Vec<u8>,
    /// The address in From.
    pub(crate) from: EmailAddress,
    pub(crate) has_date: bool,
    pub(crate) has_message_id: bool,
}

/// The From address of a complete message in base64.
///
/// # Errors
/// What is wrong with the message, for its author.
pub fn from_of_raw(base64: &str) -> Result<EmailAddress, String> {
    Raw::read(base64).map(|raw| raw.from)
}

impl Raw {
    /// Reads a message in base64 (white space in it is nothing).
    ///
    /// # Errors
    /// What is wrong with it, for its author.
    pub(crate) fn read(base64: &str) -> Result<Self, String> {
        let packed: String = base64
            .chars()
            .filter(|c| !c.is_ascii_whitespace())
            .collect();
        let bytes = STANDARD
            .decode(packed)
            .map_err(|error| format!("is not base64: {error}"))?;
        let mut lines = Lines::default();
        for (number, line) in (1_usize..).zip(bytes.split(|byte| *byte == b'\n')) {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            lines
                .take(line)
                .map_err(|detail| format!("line {number}: {detail}"))?;
        }
        lines.finish()
    }
}

#[derive(Default)]
struct Lines {
    headers: Vec<u8>,
    body: Vec<u8>,
    in_body: bool,
    /// Names in lower case with their unfolded values.
    fields: Vec<(String, String)>,
}

impl Lines {
    fn take(&mut self, line: &[u8]) -> Result<(), String> {
        if line.len() > LONGEST_LINE {
            return Err(format!("is longer than {LONGEST_LINE} bytes"));
        }
        if line.iter().any(|byte| matches!(byte, b'\r' | 0)) {
            return Err("has a carriage return or a NUL in it".to_owned());
        }
        if self.in_body {
            self.body.extend_from_slice(line);
            self.body.extend_from_slice(b"\r\n");
            return Ok(());
        }
        if line.is_empty() {
            self.in_body = true;
            return Ok(());
        }
        self.headers.extend_from_slice(line);
        self.headers.extend_from_slice(b"\r\n");
        // RFC 6532: what is not ASCII is UTF-8, and SMTPUTF8 would say so of it.
        let text = std::str::from_utf8(line);
        let text = text.map_err(|_| "is a header and not UTF-8: encode it (RFC 2047)")?;
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            let last = self.fields.last_mut();
            let (_, value) = last.ok_or("begins with a space, but is the first")?;
            value.push_str(text);
            return Ok(());
        }
        let (name, value) = text.split_once(':').ok_or("is no header field")?;
        let name = name.trim_end();
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("is no header field".to_owned());
        }
        self.fields
            .push((name.to_ascii_lowercase(), value.to_owned()));
        Ok(())
    }

    fn all<'l>(&'l self, name: &'l str) -> impl Iterator<Item = &'l str> {
        let named = self.fields.iter().filter(move |(known, _)| known == name);
        named.map(|(_, value)| value.as_str())
    }

    fn finish(mut self) -> Result<Raw, String> {
        // The last line end is followed by nothing, which is no line.
        if self.body.ends_with(b"\r\n\r\n") {
            self.body.truncate(self.body.len() - 2);
        } else if self.body == b"\r\n" {
            self.body.clear();
        }
        let from: Vec<&str> = self.all("from").collect();
        let [from] = from.as_slice() else {
            return Err(format!("has {} From fields, expected one", from.len()));
        };
        let from = address(from).ok_or("From is not one address")?;
        let (has_date, has_message_id) = (
            self.all("date").next().is_some(),
            self.all("message-id").next().is_some(),
        );
        Ok(Raw {
            from,
            has_date,
            has_message_id,
            headers: self.headers,
            body: self.body,
        })
    }
}

/// The address of `Name <address>` or `address`.
fn address(value: &str) -> Option<EmailAddress> {
    let value = value.trim();
    let inner = match value.rsplit_once('<') {
        Some((_, rest)) => rest.strip_suffix('>')?,
        None => value,
    };
    inner.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(message: &str) -> Result<Raw, String> {
        Raw::read(&STANDARD.encode(message))
    }

    #[test]
    fn a_message_is_kept_byte_for_byte() {
        let message = "Subject: =?utf-8?q?x?=\r\n y\r\nFrom: \"A, B\" <News@Brand.example>\r\nMessage-ID: <1@x>\r\n\r\nfirst \r\n\r\n.\r\n\r\n";
        let raw = read(message).expect("a message");
        let again = [&raw.headers[..], b"\r\n", &raw.body].concat();
        assert_eq!(String::from_utf8(again).as_deref(), Ok(message));
        assert_eq!(raw.from.as_str(), "News@brand.example");
        assert_eq!((raw.has_date, raw.has_message_id), (false, true));
        let unix = read(&message.replace("\r\n", "\n"));
        assert_eq!(unix, Ok(raw));
        let bare = read("From: a@x.example\r\n\r\n").expect("a message");
        assert_eq!(bare.body, b"");
        let unended = read("From: a@x.example\r\n\r\nx").expect("a message");
        assert_eq!(unended.body, b"x\r\n");
    }

    #[test]
    fn what_cannot_be_sent_is_refused_with_its_line() {
        for (message, part) in [
            ("", "0 From"),
            ("Subject: x\r\n\r\n", "0 From"),
            ("From: a@x.example\r\nFrom: b@x.example\r\n\r\n", "2 From"),
            ("From: nobody\r\n\r\n", "not one address"),
            ("From: a@x.example\r\nhello\r\n\r\n", "line 2"),
            (" From: a@x.example\r\n\r\n", "line 1"),
            ("From: a@x.example\r\n\r\na\rb\r\n", "line 3"),
            ("From: a@x.example\r\n\r\n\0", "line 3"),
        ] {
            let detail = read(message).expect_err(message);
            assert!(detail.contains(part), "{message:?}: {detail}");
        }
        assert!(Raw::read("???").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(bytes: Vec<u8>) {
            let _read = Raw::read(&STANDARD.encode(&bytes));
        }

        #[test]
        fn any_body_is_kept(body in "([a-zé .]{0,40}\r\n){0,20}") {
            let raw = read(&format!("From: a@x.example\r\n\r\n{body}")).expect("a message");
            prop_assert_eq!(String::from_utf8(raw.body).unwrap_or_default(), body);
        }
    }
}
