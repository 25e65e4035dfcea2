//! Writing commands (RFC 5321 §4.1).
//!
//! Addresses arrive validated; they are checked again here, because one CR LF
//! in an address is somebody else's command on our connection.

use bytes::{BufMut, BytesMut};
use thiserror::Error;

/// Bytes of a path with its angle brackets (RFC 5321 §4.5.3.1.3 allows 256;
/// SMTPUTF8 addresses count in octets too).
const PATH_MAX: usize = 256;

/// Why a command cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CommandError {
    /// An address has a control character, a space outside quotes or an angle bracket.
    #[error("the address contains a character that may not stand in a command")]
    ForbiddenCharacter,
    /// An address is longer than a path may be.
    #[error("the address is longer than 254 bytes")]
    AddressTooLong,
    /// A recipient is empty, or there is none at all.
    #[error("the recipient is empty")]
    NoRecipient,
    /// The EHLO name is empty or has a character that may not stand in it.
    #[error("the EHLO name is not a host name or address literal")]
    BadHostName,
}

/// Checks a reverse-path or recipient, given without angle brackets.
///
/// # Errors
/// [`CommandError::ForbiddenCharacter`] or [`CommandError::AddressTooLong`].
pub fn check_address(address: &str) -> Result<(), CommandError> {
    if address.len() > PATH_MAX - 2 {
        return Err(CommandError::AddressTooLong);
    }
    let mut quoted = false;
    let mut escaped = false;
    for c in address.chars() {
        if c.is_control() {
            return Err(CommandError::ForbiddenCharacter);
        }
        if escaped {
            escaped = false;
            continue;
        }
        match c {
            '"' => quoted = !quoted,
            '\\' if quoted => escaped = true,
            ' ' | '<' | '>' if !quoted => return Err(CommandError::ForbiddenCharacter),
            _ => {}
        }
    }
    if quoted {
        return Err(CommandError::ForbiddenCharacter);
    }
    Ok(())
}

/// Checks the name for EHLO: a host name or an address literal.
///
/// # Errors
/// [`CommandError::BadHostName`].
pub fn check_host(host: &str) -> Result<(), CommandError> {
    let fits =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'[' | b']' | b':');
    if host.is_empty() || host.len() > 255 || !host.bytes().all(fits) {
        return Err(CommandError::BadHostName);
    }
    Ok(())
}

/// Parameters of MAIL FROM; each only if the server offers its extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MailParameters {
    /// `SIZE=`, bytes (RFC 1870).
    pub size: Option<u64>,
    /// `BODY=8BITMIME` (RFC 6152).
    pub eight_bit: bool,
    /// `SMTPUTF8` (RFC 6531).
    pub smtp_utf8: bool,
}

/// Writes `MAIL FROM`; an empty `reverse_path` is the null one.
///
/// # Errors
/// As [`check_address`]; then nothing was written.
pub fn mail(
    out: &mut BytesMut,
    reverse_path: &str,
    parameters: MailParameters,
) -> Result<(), CommandError> {
    check_address(reverse_path)?;
    put(out, &["MAIL FROM:<", reverse_path, ">"]);
    if let Some(size) = parameters.size {
        put(out, &[" SIZE="]);
        decimal(out, size);
    }
    if parameters.eight_bit {
        put(out, &[" BODY=8BITMIME"]);
    }
    if parameters.smtp_utf8 {
        put(out, &[" SMTPUTF8"]);
    }
    put(out, &["\r\n"]);
    Ok(())
}

/// Writes `RCPT TO`.
///
/// # Errors
/// As [`check_address`], or [`CommandError::NoRecipient`]; then nothing was written.
pub fn rcpt(out: &mut BytesMut, recipient: &str) -> Result<(), CommandError> {
    if recipient.is_empty() {
        return Err(CommandError::NoRecipient);
    }
    check_address(recipient)?;
    put(out, &["RCPT TO:<", recipient, ">\r\n"]);
    Ok(())
}

/// Writes `EHLO` or, for servers of the last century, `HELO`.
///
/// # Errors
/// As [`check_host`]; then nothing was written.
pub fn hello(out: &mut BytesMut, verb: Hello, host: &str) -> Result<(), CommandError> {
    check_host(host)?;
    let verb = match verb {
        Hello::Ehlo => "EHLO ",
        Hello::Helo => "HELO ",
    };
    put(out, &[verb, host, "\r\n"]);
    Ok(())
}

/// Which greeting to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hello {
    /// RFC 5321.
    Ehlo,
    /// RFC 821: no extensions.
    Helo,
}

/// Writes `BDAT n LAST` (RFC 3030 §2); `size` bytes of message follow.
pub fn bdat_last(out: &mut BytesMut, size: u64) {
    put(out, &["BDAT "]);
    decimal(out, size);
    put(out, &[" LAST\r\n"]);
}

fn put(out: &mut BytesMut, parts: &[&str]) {
    for part in parts {
        out.put_slice(part.as_bytes());
    }
}

/// Writes a number without the allocation of `to_string`.
fn decimal(out: &mut BytesMut, number: u64) {
    let mut divisor = 1_u64;
    while number / divisor >= 10 {
        divisor *= 10;
    }
    while divisor > 0 {
        out.put_u8(b'0' + u8::try_from(number / divisor % 10).unwrap_or_default());
        divisor /= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(
        write: impl FnOnce(&mut BytesMut) -> Result<(), CommandError>,
    ) -> Result<String, CommandError> {
        let mut out = BytesMut::new();
        let done = write(&mut out);
        if done.is_err() {
            assert!(out.is_empty(), "a refused command leaves nothing behind");
        }
        done.map(|()| String::from_utf8_lossy(&out).into_owned())
    }

    #[test]
    fn commands() {
        let all = MailParameters {
            size: Some(1234),
            eight_bit: true,
            smtp_utf8: true,
        };
        assert_eq!(
            written(|o| mail(o, "b+1@x.example", all)).as_deref(),
            Ok("MAIL FROM:<b+1@x.example> SIZE=1234 BODY=8BITMIME SMTPUTF8\r\n")
        );
        assert_eq!(
            written(|o| mail(o, "", MailParameters::default())).as_deref(),
            Ok("MAIL FROM:<>\r\n")
        );
        assert_eq!(
            written(|o| rcpt(o, "\"a b>\"@x.example")).as_deref(),
            Ok("RCPT TO:<\"a b>\"@x.example>\r\n")
        );
        assert_eq!(
            written(|o| rcpt(o, "飛脚@例え.example")).as_deref(),
            Ok("RCPT TO:<飛脚@例え.example>\r\n")
        );
        assert_eq!(
            written(|o| hello(o, Hello::Ehlo, "[192.0.2.1]")).as_deref(),
            Ok("EHLO [192.0.2.1]\r\n")
        );
        assert_eq!(
            written(|o| hello(o, Hello::Helo, "a.example")).as_deref(),
            Ok("HELO a.example\r\n")
        );
        for (n, text) in [
            (0, "BDAT 0 LAST\r\n"),
            (10, "BDAT 10 LAST\r\n"),
            (u64::MAX, "BDAT 18446744073709551615 LAST\r\n"),
        ] {
            assert_eq!(
                written(|o| {
                    bdat_last(o, n);
                    Ok(())
                })
                .as_deref(),
                Ok(text)
            );
        }
    }

    #[test]
    fn injections_are_refused() {
        for bad in [
            "a@x\r\nDATA",
            "a@x\n",
            "a\0@x",
            "a b@x",
            "a@x> SIZE=1",
            "<a@x",
            "\"a@x",
            "\"a\\\"@x",
            "a\u{85}@x",
            "\"a\r\nQUIT\"@x",
        ] {
            assert_eq!(
                written(|o| rcpt(o, bad)),
                Err(CommandError::ForbiddenCharacter),
                "{bad:?}"
            );
            assert_eq!(
                written(|o| mail(o, bad, MailParameters::default())),
                Err(CommandError::ForbiddenCharacter)
            );
        }
        assert_eq!(written(|o| rcpt(o, "")), Err(CommandError::NoRecipient));
        assert_eq!(
            written(|o| rcpt(o, &"a".repeat(255))),
            Err(CommandError::AddressTooLong)
        );
        for bad in ["", "a b", "a\r\nQUIT", "a\0", "例え"] {
            assert_eq!(
                written(|o| hello(o, Hello::Ehlo, bad)),
                Err(CommandError::BadHostName),
                "{bad:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn one_command_is_one_line(address in "\\PC{0,40}|[\"\\\\ <>\r\n\0a@]{0,20}") {
            if let Ok(line) = written(|o| rcpt(o, &address)) {
                prop_assert_eq!(line.find('\r'), Some(line.len() - 2));
                prop_assert_eq!(line.find('\n'), Some(line.len() - 1));
            }
        }
    }
}
