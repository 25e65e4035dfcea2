//! The content of one message on its way to the wire.
//!
//! Owns line endings, dot-stuffing (RFC 5321 §4.5.2) and the terminator. It
//! does not look into headers or MIME, and never repairs what it is given: a
//! bare CR or LF is refused, since sending one is SMTP smuggling.

use bytes::{BufMut, Bytes, BytesMut};
use memchr::memchr2;
use thiserror::Error;

/// Dots that are stuffed by cutting the slices; a body with more is copied
/// once, so that it cannot become a list of thousands of fragments.
const CUTS_MAX: usize = 32;

/// Why content may not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BodyError {
    /// A CR without LF or an LF without CR, at this byte of the content.
    #[error("the content has a bare CR or LF at byte {at}")]
    BareNewline {
        /// Offset in bytes, over all slices.
        at: u64,
    },
}

/// Checked content: CRLF line endings only, ending in one.
///
/// Slices are shared, never copied, so what is common to a batch can be one
/// allocation for all of its messages.
#[derive(Debug, Clone, Default)]
pub struct Body {
    slices: Vec<Bytes>,
    size: u64,
    eight_bit: bool,
    /// Lines that begin with a dot: slice and offset of the dot.
    dots: Vec<(usize, usize)>,
}

impl Body {
    /// Checks `slices`, which together are the message, and makes sure of a
    /// final CRLF.
    ///
    /// # Errors
    /// [`BodyError::BareNewline`].
    pub fn new(slices: Vec<Bytes>) -> Result<Self, BodyError> {
        let mut body = Self::default();
        let mut scan = Scan {
            line_start: true,
            after_cr: false,
        };
        for (index, slice) in slices.iter().enumerate() {
            body.eight_bit |= !slice.is_ascii();
            scan.slice(slice, |dot| body.dots.push((index, dot)))
                .map_err(|at| BodyError::BareNewline {
                    at: body.size.saturating_add(at as u64),
                })?;
            body.size += slice.len() as u64;
        }
        if scan.after_cr {
            return Err(BodyError::BareNewline {
                at: body.size.saturating_sub(1),
            });
        }
        body.slices = slices;
        if !scan.line_start {
            body.slices.push(Bytes::from_static(b"\r\n"));
            body.size += 2;
        }
        Ok(body)
    }

    /// Bytes as the recipient gets them: with the final CRLF, without
    /// dot-stuffing. This is what SIZE (RFC 1870) declares.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether any byte has its high bit set (RFC 6152).
    #[must_use]
    pub fn is_eight_bit(&self) -> bool {
        self.eight_bit
    }

    /// For BDAT (RFC 3030): the slices as they are.
    pub(crate) fn into_slices(self) -> Vec<Bytes> {
        self.slices
    }

    /// For DATA: the slices with leading dots doubled and the terminator.
    pub(crate) fn into_stuffed(self) -> Vec<Bytes> {
        if self.dots.len() > CUTS_MAX {
            return vec![self.stuffed_copy()];
        }
        let mut stuffed = Vec::with_capacity(self.slices.len() + 2 * self.dots.len() + 1);
        let mut dots = self.dots.iter().peekable();
        for (index, mut slice) in self.slices.into_iter().enumerate() {
            let mut cut = 0;
            while let Some((_, dot)) = dots.next_if(|(at, _)| *at == index) {
                let rest = slice.split_off(dot - cut);
                stuffed.push(std::mem::replace(&mut slice, rest));
                stuffed.push(Bytes::from_static(b"."));
                cut = *dot;
            }
            stuffed.push(slice);
        }
        stuffed.push(Bytes::from_static(b".\r\n"));
        stuffed.retain(|slice| !slice.is_empty());
        stuffed
    }

    fn stuffed_copy(&self) -> Bytes {
        let length: usize = self.slices.iter().map(Bytes::len).sum();
        let mut copy = BytesMut::with_capacity(length + self.dots.len() + 3);
        let mut dots = self.dots.iter().peekable();
        for (index, slice) in self.slices.iter().enumerate() {
            let mut from = 0;
            while let Some((_, dot)) = dots.next_if(|(at, _)| *at == index) {
                copy.put_slice(slice.get(from..*dot).unwrap_or_default());
                copy.put_u8(b'.');
                from = *dot;
            }
            copy.put_slice(slice.get(from..).unwrap_or_default());
        }
        copy.put_slice(b".\r\n");
        copy.freeze()
    }
}

/// Where a scan stands between slices.
struct Scan {
    line_start: bool,
    after_cr: bool,
}

impl Scan {
    /// Checks one slice, reports leading dots; the error is the offset of a
    /// bare CR or LF in it (or of the slice, for a CR that ended the last one).
    fn slice(&mut self, slice: &[u8], mut dot: impl FnMut(usize)) -> Result<(), usize> {
        let mut at = 0;
        while let Some(rest) = slice.get(at..).filter(|rest| !rest.is_empty()) {
            if self.after_cr {
                if rest.first() != Some(&b'\n') {
                    return Err(at);
                }
                (self.after_cr, self.line_start) = (false, true);
                at += 1;
                continue;
            }
            if self.line_start && rest.first() == Some(&b'.') {
                dot(at);
            }
            let Some(end) = memchr2(b'\r', b'\n', rest) else {
                self.line_start = false;
                return Ok(());
            };
            if rest.get(end) == Some(&b'\n') {
                return Err(at + end);
            }
            (self.after_cr, self.line_start) = (true, false);
            at += end + 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn body(slices: &[&str]) -> Result<Body, BodyError> {
        Body::new(
            slices
                .iter()
                .map(|s| Bytes::copy_from_slice(s.as_bytes()))
                .collect(),
        )
    }

    fn joined(slices: Vec<Bytes>) -> String {
        String::from_utf8_lossy(&slices.concat()).into_owned()
    }

    #[test]
    fn stuffing_and_termination() {
        let table: [(&[&str], &str); 9] = [
            (&[], ".\r\n"),
            (&[""], ".\r\n"),
            (&["a"], "a\r\n.\r\n"),
            (&["a\r\n"], "a\r\n.\r\n"),
            (&[".\r\n"], "..\r\n.\r\n"),
            (&["a\r\n.b\r\n..\r\n"], "a\r\n..b\r\n...\r\n.\r\n"),
            (&["a\r", "\n", ".", "b"], "a\r\n..b\r\n.\r\n"),
            (&["a\r\n", ".b", ".c"], "a\r\n..b.c\r\n.\r\n"),
            (&["", "", ".", "", "\r\n"], "..\r\n.\r\n"),
        ];
        for (slices, wire) in table {
            assert_eq!(
                joined(body(slices).expect("clean").into_stuffed()),
                wire,
                "{slices:?}"
            );
        }
    }

    #[test]
    fn bare_newlines_are_refused_where_they_are() {
        let table: [(&[&str], u64); 7] = [
            (&["a\nb"], 1),
            (&["a\rb"], 2),
            (&["a\r\r\n"], 2),
            (&["a\r"], 1),
            (&["a\r", "b"], 2),
            (&["\n"], 0),
            (&["a\r\n", "b", "\n.\r\n"], 4),
        ];
        for (slices, at) in table {
            assert_eq!(
                body(slices).err(),
                Some(BodyError::BareNewline { at }),
                "{slices:?}"
            );
        }
    }

    #[test]
    fn size_counts_what_the_recipient_gets() {
        let dotted = body(&[".a\r\n", "é"]).expect("clean");
        assert_eq!((dotted.size(), dotted.is_eight_bit()), (8, true));
        assert_eq!(joined(dotted.into_slices()), ".a\r\né\r\n");
    }

    #[test]
    fn many_dots_are_one_copy() {
        let text = ".x\r\n".repeat(CUTS_MAX + 1);
        let stuffed = body(&[&text]).expect("clean").into_stuffed();
        assert_eq!(stuffed.len(), 1);
        assert_eq!(joined(stuffed), "..x\r\n".repeat(CUTS_MAX + 1) + ".\r\n");
    }

    /// The plain definition of RFC 5321 §4.5.2, line by line.
    fn reference(text: &str) -> String {
        let mut wire = String::new();
        for line in text.split_inclusive("\r\n") {
            if line.starts_with('.') {
                wire.push('.');
            }
            wire.push_str(line);
        }
        if !wire.is_empty() && !wire.ends_with("\r\n") {
            wire.push_str("\r\n");
        }
        wire + ".\r\n"
    }

    proptest! {
        #[test]
        fn stuffing_equals_its_definition(lines in prop::collection::vec("[.]{0,2}[ab]{0,3}", 0..80), cut in any::<prop::sample::Index>()) {
            let text = lines.join("\r\n");
            let (head, tail) = text.split_at(if text.is_empty() { 0 } else { cut.index(text.len()) });
            let stuffed = body(&[head, tail]).expect("clean").into_stuffed();
            prop_assert_eq!(joined(stuffed), reference(&text));
        }

        #[test]
        fn a_bare_newline_anywhere_is_found(text in "[ab\r\n.]{0,30}", cut in any::<prop::sample::Index>()) {
            let bare = text.replace("\r\n", "").contains(['\r', '\n']);
            let (head, tail) = text.split_at(if text.is_empty() { 0 } else { cut.index(text.len()) });
            prop_assert_eq!(body(&[head, tail]).is_err(), bare);
        }
    }
}
