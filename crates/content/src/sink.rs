//! Where templates are rendered to: bounded, with CRLF line ends.

use std::io;

/// Collects rendered text, turns each CR, LF and CRLF into CRLF, and refuses what exceeds its
/// limit: fuel bounds the steps of a template, not its output.
pub(crate) struct Sink {
    text: Vec<u8>,
    limit: usize,
    /// The last byte was a CR, written as CRLF already: an LF now is its second half.
    after_cr: bool,
    overflow: bool,
}

impl Sink {
    /// `hint` is how much to expect.
    pub(crate) fn new(hint: usize, limit: usize) -> Self {
        Self {
            text: Vec::with_capacity(hint.min(limit)),
            limit,
            after_cr: false,
            overflow: false,
        }
    }

    /// Whether more came than the limit.
    pub(crate) fn overflowed(&self) -> bool {
        self.overflow
    }

    pub(crate) fn into_text(self) -> Vec<u8> {
        self.text
    }

    pub(crate) fn push(&mut self, text: &[u8]) {
        let mut rest = text;
        while let Some(&first) = rest.first() {
            if first == b'\n' && std::mem::take(&mut self.after_cr) {
                rest = rest.get(1..).unwrap_or_default();
                continue;
            }
            self.after_cr = false;
            let len = memchr::memchr2(b'\r', b'\n', rest).unwrap_or(rest.len());
            let (line, tail) = rest.split_at(len);
            self.text.extend_from_slice(line);
            rest = tail;
            if let Some((&end, tail)) = tail.split_first() {
                self.text.extend_from_slice(b"\r\n");
                self.after_cr = end == b'\r';
                rest = tail;
            }
        }
    }
}

impl io::Write for Sink {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.text.len() + text.len() > self.limit {
            self.overflow = true;
            return Err(io::Error::other("rendered text is too large"));
        }
        self.push(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The whole of `text` with CRLF line ends.
pub(crate) fn crlf(text: &str) -> Vec<u8> {
    let mut sink = Sink::new(text.len() + text.len() / 32, usize::MAX);
    sink.push(text.as_bytes());
    sink.into_text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    #[test]
    fn it_ends_at_its_limit() {
        let mut sink = Sink::new(0, 4);
        assert!(sink.write_all(b"abcd").is_ok() && !sink.overflowed());
        assert!(sink.write_all(b"e").is_err() && sink.overflowed());
        assert_eq!(sink.into_text(), b"abcd");
    }

    proptest! {
        #[test]
        fn line_ends_are_crlf_however_the_text_is_cut(pieces in prop::collection::vec("[a\r\n]{0,4}", 0..8)) {
            let mut sink = Sink::new(0, usize::MAX);
            pieces.iter().for_each(|piece| sink.push(piece.as_bytes()));
            let whole = pieces.concat();
            let expected = whole.replace("\r\n", "\n").replace('\r', "\n").replace('\n', "\r\n");
            prop_assert_eq!(sink.into_text(), expected.into_bytes());
        }
    }
}
