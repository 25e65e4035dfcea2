//! Content on its way in: the end of DATA, dot-unstuffing, limits.
//!
//! Only CR LF `.` CR LF ends DATA (RFC 5321 §4.1.1.4). A server that also
//! takes bare LF there lets a sender smuggle a second message past it.

use bytes::{BufMut, BytesMut};
use memchr::{memchr2, memchr2_iter};

/// Content collected so far, never more than its limit.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) bytes: BytesMut,
    /// More came than the limit; the rest was dropped.
    pub(super) too_large: bool,
    /// A CR or LF stood alone.
    pub(super) bare_newline: bool,
}

impl Content {
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        (self.too_large, self.bare_newline) = (false, false);
    }

    pub(super) fn push(&mut self, bytes: &[u8], max: usize) {
        if self.too_large || self.bytes.len().saturating_add(bytes.len()) > max {
            // Nobody will see it: give the memory to the next message.
            self.bytes.clear();
            self.too_large = true;
        } else {
            self.bytes.put_slice(bytes);
        }
    }

    /// For content that did not come through [`DataReader`].
    pub(super) fn find_bare_newlines(&mut self) {
        self.bare_newline |= has_bare_newline(&self.bytes);
    }
}

fn has_bare_newline(bytes: &[u8]) -> bool {
    let mut after_cr = None;
    for at in memchr2_iter(b'\r', b'\n', bytes) {
        let lf = bytes.get(at) == Some(&b'\n');
        match after_cr.take() {
            Some(cr) if lf && at == cr + 1 => {}
            None if !lf => after_cr = Some(at),
            _ => return true,
        }
    }
    after_cr.is_some()
}

/// Where in the stream of DATA the reader stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum DataReader {
    /// After CRLF, or at the very start.
    #[default]
    LineStart,
    /// A dot at the start of a line, not passed on.
    Dot,
    /// And a CR after it.
    DotCr,
    /// Within a line.
    Text,
    /// A CR within a line, not passed on yet.
    Cr,
}

impl DataReader {
    /// Takes `input` up to the end of the content; returns the number of bytes
    /// taken and whether the end was among them.
    pub(super) fn feed(
        &mut self,
        input: &[u8],
        content: &mut Content,
        max: usize,
    ) -> (usize, bool) {
        let mut at = 0;
        while let Some((&first, _)) = input.get(at..).and_then(<[u8]>::split_first) {
            match (*self, first) {
                (Self::LineStart, b'.') => *self = Self::Dot,
                (Self::Dot, b'\r') => *self = Self::DotCr,
                (Self::DotCr, b'\n') => {
                    *self = Self::LineStart;
                    return (at + 1, true);
                }
                (Self::Cr, b'\n') => {
                    content.push(b"\r\n", max);
                    *self = Self::LineStart;
                }
                (Self::DotCr | Self::Cr, _) => {
                    // A CR that stood alone; this byte is looked at again.
                    content.bare_newline = true;
                    content.push(b"\r", max);
                    *self = Self::Text;
                    continue;
                }
                (Self::LineStart | Self::Dot | Self::Text, _) => {
                    at += self.run(input.get(at..).unwrap_or_default(), content, max);
                    continue;
                }
            }
            at += 1;
        }
        (at, false)
    }

    /// Takes what needs no thought: up to the next CR, or through a bare LF.
    fn run(&mut self, rest: &[u8], content: &mut Content, max: usize) -> usize {
        *self = Self::Text;
        let Some(end) = memchr2(b'\r', b'\n', rest) else {
            content.push(rest, max);
            return rest.len();
        };
        if rest.get(end) == Some(&b'\n') {
            // Part of the line: neither its end nor a place where a dot counts.
            content.bare_newline = true;
        } else if rest.get(end + 1) == Some(&b'\n') {
            // A whole line at once, the usual case.
            content.push(rest.get(..end + 2).unwrap_or_default(), max);
            *self = Self::LineStart;
            return end + 2;
        } else {
            content.push(rest.get(..end).unwrap_or_default(), max);
            *self = Self::Cr;
            return end + 1;
        }
        content.push(rest.get(..=end).unwrap_or_default(), max);
        end + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(pieces: &[&[u8]]) -> (Vec<u8>, bool, Option<usize>) {
        let mut reader = DataReader::default();
        let mut content = Content::default();
        let mut before = 0;
        for piece in pieces {
            let (taken, done) = reader.feed(piece, &mut content, usize::MAX);
            if done {
                return (
                    content.bytes.to_vec(),
                    content.bare_newline,
                    Some(before + taken),
                );
            }
            assert_eq!(taken, piece.len());
            before += taken;
        }
        (content.bytes.to_vec(), content.bare_newline, None)
    }

    #[test]
    fn only_the_strict_end_ends() {
        let table: [(&[u8], &[u8], bool, bool); 12] = [
            (b".\r\n", b"", false, true),
            (b"a\r\n.\r\n", b"a\r\n", false, true),
            (b"..a\r\n.\r\n", b".a\r\n", false, true),
            (b".a\r\n.\r\n", b"a\r\n", false, true),
            (b"a\n.\r\nb\r\n.\r\n", b"a\n.\r\nb\r\n", true, true),
            (b"a\n.\nb\r\n.\r\n", b"a\n.\nb\r\n", true, true),
            (b"a\r\n.\nb\r\n.\r\n", b"a\r\n\nb\r\n", true, true),
            (b"a\r.\r\nb\r\n.\r\n", b"a\r.\r\nb\r\n", true, true),
            (b"a\r\n.\rb\r\n.\r\n", b"a\r\n\rb\r\n", true, true),
            (b"a\r\r\n.\r\n", b"a\r\r\n", true, true),
            (b"a\r\n.\r.\r\n", b"a\r\n\r.\r\n", true, false),
            (b"a\n.\n", b"a\n.\n", true, false),
        ];
        for (wire, content, bare, ended) in table {
            let (got, got_bare, end) = read(&[wire]);
            let shown = String::from_utf8_lossy(wire);
            assert_eq!((got.as_slice(), got_bare), (content, bare), "{shown:?}");
            assert_eq!(end, ended.then_some(wire.len()), "{shown:?}");
            let mut scanned = Content {
                bytes: BytesMut::from(content),
                ..Content::default()
            };
            scanned.find_bare_newlines();
            assert_eq!(scanned.bare_newline, bare, "{shown:?}");
        }
    }

    #[test]
    fn content_beyond_the_limit_is_dropped() {
        let mut content = Content::default();
        let (taken, done) =
            DataReader::default().feed(b"aaaa\r\nbbbb\r\n.\r\nQUIT", &mut content, 8);
        assert_eq!(
            (taken, done, content.too_large, content.bytes.len()),
            (15, true, true, 0)
        );
    }

    proptest! {
        #[test]
        fn splitting_anywhere_changes_nothing(wire in "[a.\r\n]{0,24}", cut in 0_usize..25) {
            let cut = cut.min(wire.len());
            let (head, tail) = wire.as_bytes().split_at(cut);
            let whole = read(&[wire.as_bytes()]);
            prop_assert_eq!(read(&[head, tail]), whole.clone());
            let single: Vec<&[u8]> = wire.as_bytes().chunks(1).collect();
            prop_assert_eq!(read(&single), whole);
        }

        #[test]
        fn what_the_client_stuffs_the_server_unstuffs(lines in prop::collection::vec("[.]{0,2}[ab]{0,3}", 1..20)) {
            let text = lines.join("\r\n") + "\r\n";
            let body = crate::Body::new(vec![text.clone().into()]).expect("clean");
            let wire = body.into_stuffed().concat();
            prop_assert_eq!(read(&[&wire]), (text.into_bytes(), false, Some(wire.len())));
        }
    }
}
