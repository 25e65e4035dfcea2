//! Eight bits into seven, for a server that takes no others (RFC 6152 §3).
//!
//! Owns the walk over the parts of a complete message. A part whose body has bytes above 127 leaves
//! in quoted-printable, and those around it no longer say that they are 8-bit; everything else stays
//! byte for byte. What no server could read any more, or would read as forged, is refused.

use std::borrow::Cow;

use mail_parser::parsers::MessageStream;
use mail_parser::{ContentType, HeaderValue};
use memchr::memmem;

use crate::mime;

/// Parts within parts; nobody writes more than a handful.
const DEPTH_MAX: usize = 32;

/// Why a message cannot leave in seven bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotEncodable {
    /// Only SMTPUTF8 carries such a header.
    #[error("a header, of it or of a part, has bytes above 127")]
    Header,
    /// Another encoding is another text to who verifies it (RFC 1847 §2.1).
    #[error("what has bytes above 127 is under the signature of a multipart/signed")]
    Signed,
    /// What the header says is not so, or says two things.
    #[error("a part has bytes above 127 that its header does not account for")]
    Undeclared,
    /// RFC 2046 §5.2: may have no encoding, and no parts that could.
    #[error("a part of type message/* has bytes above 127")]
    Opaque,
    /// Its parts cannot be told from each other.
    #[error("a multipart has bytes above 127 and no parts by its boundary")]
    NoParts,
    /// More parts within parts than anybody writes.
    #[error("there are more than {DEPTH_MAX} parts within parts")]
    TooDeep,
}

/// Whose header it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// A message, whole or forwarded in a part.
    Message,
    /// A part of a multipart.
    Part,
    /// A part of a multipart/digest: without a type it is a message (RFC 2046 §5.1.5).
    Digested,
}

/// What a body is made of.
#[derive(Debug, PartialEq, Eq)]
enum Form {
    Leaf,
    Message,
    Multipart { boundary: String, is_digest: bool },
}

/// The header (complete lines) and the body of a message, such that all of it is ASCII.
pub(crate) fn encode(headers: &[u8], body: &[u8]) -> Result<(Vec<u8>, Vec<u8>), NotEncodable> {
    if body.is_ascii() {
        let is_done = headers.is_ascii();
        return is_done
            .then(|| (headers.to_vec(), body.to_vec()))
            .ok_or(NotEncodable::Header);
    }
    let (headers, form) = open(headers, body, Role::Message)?;
    let mut out = Vec::with_capacity(body.len() + body.len() / 2);
    write(&mut out, body, &form, 0)?;
    Ok((headers, out))
}

/// The header of what has an 8-bit body as it leaves, and what that body is.
fn open(header: &[u8], body: &[u8], role: Role) -> Result<(Vec<u8>, Form), NotEncodable> {
    if !header.is_ascii() {
        return Err(NotEncodable::Header);
    }
    let media = only(header, "content-type")?;
    let declared = only(header, "content-transfer-encoding")?.map(word);
    let form = form(media, role)?;
    if !matches!(
        declared.as_deref(),
        None | Some("7bit" | "8bit" | "binary" | "")
    ) {
        return Err(NotEncodable::Undeclared);
    }
    let encoding = match form {
        Form::Leaf => Some("quoted-printable"),
        Form::Message | Form::Multipart { .. } => declared.as_ref().map(|_| "7bit"),
    };
    let encoding = encoding.map(|name| format!("Content-Transfer-Encoding: {name}\r\n"));
    let mut out = Vec::with_capacity(header.len() + 128);
    for field in fields(header) {
        match &encoding {
            Some(encoding) if is_named(field, "content-transfer-encoding") => {
                out.extend_from_slice(encoding.as_bytes());
            }
            Some(_) | None => out.extend_from_slice(field),
        }
    }
    if role == Role::Message && !fields(header).any(|field| is_named(field, "mime-version")) {
        out.extend_from_slice(mime::VERSION.as_bytes());
        if media.is_none() {
            // RFC 1428 §3: without MIME nobody said which charset it is.
            let charset = std::str::from_utf8(body).map_or("unknown-8bit", |_| "utf-8");
            let field = format!("Content-Type: text/plain; charset={charset}\r\n");
            out.extend_from_slice(field.as_bytes());
        }
    }
    if let Some(encoding) = encoding.filter(|_| declared.is_none()) {
        out.extend_from_slice(encoding.as_bytes());
    }
    Ok((out, form))
}

fn form(media: Option<&[u8]>, role: Role) -> Result<Form, NotEncodable> {
    let Some(media) = media.and_then(parsed) else {
        return Ok(match role {
            Role::Digested => Form::Message,
            Role::Message | Role::Part => Form::Leaf,
        });
    };
    let subtype = media.subtype().unwrap_or_default().to_ascii_lowercase();
    match (
        media.ctype().to_ascii_lowercase().as_str(),
        subtype.as_str(),
    ) {
        ("multipart", "signed") => Err(NotEncodable::Signed),
        ("multipart", _) => {
            let boundary = media.attribute("boundary").map(str::trim_end);
            let boundary = boundary.filter(|boundary| !boundary.is_empty());
            Ok(Form::Multipart {
                boundary: boundary.ok_or(NotEncodable::NoParts)?.to_owned(),
                is_digest: subtype == "digest",
            })
        }
        ("message", "rfc822") => Ok(Form::Message),
        // RFC 6532 §3.7, RFC 6533: these may have an encoding.
        ("message", name) if name.starts_with("global") => Ok(Form::Leaf),
        ("message", _) => Err(NotEncodable::Opaque),
        _ => Ok(Form::Leaf),
    }
}

fn parsed(media: &[u8]) -> Option<ContentType<'_>> {
    match MessageStream::new(media).parse_content_type() {
        HeaderValue::ContentType(media) => Some(media),
        _ => None,
    }
}

/// Writes a body of this form.
fn write(out: &mut Vec<u8>, body: &[u8], form: &Form, depth: usize) -> Result<(), NotEncodable> {
    if depth > DEPTH_MAX {
        return Err(NotEncodable::TooDeep);
    }
    match form {
        Form::Leaf => {
            mime::quoted_printable_in_part(out, body);
            Ok(())
        }
        Form::Message => part(out, body, Role::Message, depth + 1),
        Form::Multipart {
            boundary,
            is_digest,
        } => {
            let role = if *is_digest {
                Role::Digested
            } else {
                Role::Part
            };
            parts(out, body, boundary, role, depth + 1)
        }
    }
}

/// Writes the parts of a multipart and what is between them.
fn parts(
    out: &mut Vec<u8>,
    body: &[u8],
    boundary: &str,
    role: Role,
    depth: usize,
) -> Result<(), NotEncodable> {
    let delimiter = ["--", boundary].concat();
    let mut done = 0;
    let mut in_part = false;
    let found = memmem::find_iter(body, delimiter.as_bytes());
    for (start, end, is_last) in found.filter_map(|at| delimiter_line(body, at, delimiter.len())) {
        // The line break before a delimiter belongs to it (RFC 2046 §5.1.1), and to the delimiter
        // before it where there is nothing between them.
        let before = start.saturating_sub(2).max(done);
        let between = body.get(done..before).unwrap_or_default();
        if in_part {
            part(out, between, role, depth)?;
        } else {
            shown_to_nobody(out, between);
        }
        out.extend_from_slice(body.get(before..end).unwrap_or_default());
        (done, in_part) = (end, !is_last);
        if is_last {
            break;
        }
    }
    if done == 0 {
        return Err(NotEncodable::NoParts);
    }
    let rest = body.get(done..).unwrap_or_default();
    if in_part {
        // It was cut off.
        return part(out, rest, role, depth);
    }
    shown_to_nobody(out, rest);
    Ok(())
}

/// The delimiter line that begins at `at`, if one does: its start, its end, and whether it is the last.
fn delimiter_line(body: &[u8], at: usize, length: usize) -> Option<(usize, usize, bool)> {
    if at > 0 && !body.get(..at)?.ends_with(b"\r\n") {
        return None;
    }
    let after = body.get(at + length..)?;
    let line = memmem::find(after, b"\r\n").map_or(after.len(), |end| end + 2);
    let text = after.get(..line)?;
    let (is_last, text) = match text.strip_prefix(b"--") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let is_delimiter = text
        .iter()
        .all(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
    is_delimiter.then_some((at, at + length + line, is_last))
}

/// Writes a part, or a message in one.
fn part(out: &mut Vec<u8>, part: &[u8], role: Role, depth: usize) -> Result<(), NotEncodable> {
    if part.is_ascii() {
        out.extend_from_slice(part);
        return Ok(());
    }
    let (header, body) = if let Some(body) = part.strip_prefix(b"\r\n") {
        (&[][..], body)
    } else {
        // Without an empty line all of it is header, where it must not be.
        let end = memmem::find(part, b"\r\n\r\n").ok_or(NotEncodable::Header)? + 2;
        let (header, rest) = part.split_at(end);
        (header, rest.get(2..).unwrap_or_default())
    };
    let (header, form) = open(header, body, role)?;
    out.extend_from_slice(&header);
    out.extend_from_slice(b"\r\n");
    write(out, body, &form, depth)
}

/// What is before the first part and after the last is for readers without MIME, who are no more.
fn shown_to_nobody(out: &mut Vec<u8>, text: &[u8]) {
    out.extend(
        text.iter()
            .map(|byte| if byte.is_ascii() { *byte } else { b'?' }),
    );
}

/// The fields of a header, each with its line ends.
fn fields(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = header;
    std::iter::from_fn(move || {
        let mut ends = memchr::memchr_iter(b'\n', rest).map(|at| at + 1);
        let is_end = |at: &usize| !matches!(rest.get(*at), Some(b' ' | b'\t'));
        let end = ends.find(is_end).unwrap_or(rest.len());
        let (field, after) = rest.split_at(end);
        rest = after;
        (!field.is_empty()).then_some(field)
    })
}

/// The value of the one field of that name, which is in lower case.
fn only<'h>(header: &'h [u8], name: &str) -> Result<Option<&'h [u8]>, NotEncodable> {
    let mut values = fields(header).filter_map(|field| value(field, name));
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        // Who reads the first and who reads the last would read two messages.
        (_, Some(_)) => Err(NotEncodable::Undeclared),
    }
}

fn is_named(field: &[u8], name: &str) -> bool {
    value(field, name).is_some()
}

fn value<'f>(field: &'f [u8], name: &str) -> Option<&'f [u8]> {
    let (own, value) = field.split_at_checked(name.len())?;
    let colon = value
        .iter()
        .position(|byte| !matches!(byte, b' ' | b'\t'))?;
    let is_it = own.eq_ignore_ascii_case(name.as_bytes()) && value.get(colon) == Some(&b':');
    is_it.then(|| value.get(colon + 1..).unwrap_or_default())
}

/// The first word of a value, in lower case.
fn word(value: &[u8]) -> String {
    let text: Cow<'_, str> = String::from_utf8_lossy(value);
    let ends = |c: char| c.is_ascii_whitespace() || matches!(c, '(' | ';');
    let word = text.trim_start().split(ends).next().unwrap_or_default();
    word.to_ascii_lowercase()
}

#[cfg(test)]
mod tests;
