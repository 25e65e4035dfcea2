//! Separates newline-delimited JSON into its head, the first line, and its recipients.
//!
//! Owns the ends of lines. Empty lines are nothing; whether a line is JSON is for its parser. No
//! I/O, no allocation beyond the head, which has a limit; chunks may end at any byte.

use super::splitter::{Head, Position, Rows, SplitError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Before,
    /// In the first line.
    Head,
    /// Between recipients.
    Between,
    /// In a recipient.
    Row,
}

/// Splits one stream of lines.
#[derive(Debug)]
pub(crate) struct Lines {
    state: State,
    head: Vec<u8>,
    /// Where the head stands.
    head_at: Position,
    head_limit: usize,
    position: Position,
}

impl Lines {
    /// Splits lines of which the first may have `head_limit` bytes.
    pub(crate) fn new(head_limit: usize) -> Self {
        let start = Position { offset: 0, line: 1 };
        Self {
            state: State::Before,
            head: Vec::new(),
            head_at: start,
            head_limit,
            position: start,
        }
    }

    /// Splits lines that are all recipients.
    pub(crate) fn without_head() -> Self {
        Self {
            state: State::Between,
            ..Self::new(0)
        }
    }

    /// How large the head is so far, in bytes.
    pub(crate) fn head_len(&self) -> usize {
        self.head.len()
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When the first line is too long; nothing may be pushed afterwards.
    pub(crate) fn push(&mut self, chunk: &[u8], rows: &mut impl Rows) -> Result<(), SplitError> {
        let mut rest = chunk;
        while !rest.is_empty() {
            let used = match self.state {
                State::Before | State::Between => self.skip_space(rest, rows),
                State::Head | State::Row => self.take_line(rest, rows)?,
            };
            self.position.offset += used as u64;
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    /// The stream is complete; its last line needs no end.
    pub(crate) fn finish(self, rows: &mut impl Rows) -> Head {
        if self.state == State::Row {
            rows.end();
        }
        Head::apart(self.head, self.head_at)
    }

    fn skip_space(&mut self, bytes: &[u8], rows: &mut impl Rows) -> usize {
        for (used, byte) in bytes.iter().enumerate() {
            match byte {
                b'\n' => self.position.line = self.position.line.saturating_add(1),
                b' ' | b'\t' | b'\r' => {}
                _ => {
                    let at = Position {
                        offset: self.position.offset + used as u64,
                        ..self.position
                    };
                    if self.state == State::Before {
                        (self.head_at, self.state) = (at, State::Head);
                    } else {
                        rows.begin(at);
                        self.state = State::Row;
                    }
                    return used;
                }
            }
        }
        bytes.len()
    }

    /// Consumes what `bytes` has of the present line, and its end.
    fn take_line(&mut self, bytes: &[u8], rows: &mut impl Rows) -> Result<usize, SplitError> {
        let end = memchr::memchr(b'\n', bytes);
        let line = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
        if self.state == State::Row {
            rows.push(line);
        } else {
            if line.len() > self.head_limit.saturating_sub(self.head.len()) {
                return Err(SplitError::HeadTooLarge {
                    limit: self.head_limit,
                });
            }
            self.head.extend_from_slice(line);
        }
        if end.is_none() {
            return Ok(bytes.len());
        }
        if self.state == State::Row {
            rows.end();
        }
        self.state = State::Between;
        self.position.line = self.position.line.saturating_add(1);
        Ok(line.len() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::splitter::tests::Collected;
    use proptest::prelude::*;

    fn split(chunks: &[&[u8]]) -> (Head, Vec<(Position, String)>) {
        let (mut lines, mut rows) = (Lines::new(1 << 10), Collected::default());
        for chunk in chunks {
            lines.push(chunk, &mut rows).expect("short enough");
        }
        let head = lines.finish(&mut rows);
        let text =
            |(at, row): (Position, Vec<u8>)| (at, String::from_utf8_lossy(&row).into_owned());
        (head, rows.0.into_iter().map(text).collect())
    }

    #[test]
    fn the_first_line_is_the_head_and_every_other_a_recipient() {
        let (head, rows) = split(&[b"\r\n {\"a\":1}\r\n\n{\"email\":1}\n  \n{\"email\":2}"]);
        assert_eq!(head.json, b"{\"a\":1}\r");
        let at = |offset, line| Position { offset, line };
        assert_eq!(
            rows,
            [
                (at(13, 4), "{\"email\":1}".to_owned()),
                (at(28, 6), "{\"email\":2}".to_owned())
            ]
        );
    }

    #[test]
    fn a_first_line_without_end_is_not_kept() {
        let mut lines = Lines::new(8);
        let refused = lines.push(b"{\"a\":\"0123\"}", &mut Collected::default());
        assert_eq!(refused, Err(SplitError::HeadTooLarge { limit: 8 }));
    }

    #[test]
    fn an_error_in_the_head_is_told_where_it_stands() {
        let (head, _) = split(&[b"\n\n{\"a\":}\n{}"]);
        let error = serde_json::from_slice::<serde_json::Value>(&head.json).expect_err("broken");
        assert_eq!(head.position(&error), Position { offset: 7, line: 3 });
    }

    proptest! {
        #[test]
        fn chunks_may_end_anywhere(text in "[a{}\n\r ]{0,40}", cut in 0_usize..40) {
            let (left, right) = text.as_bytes().split_at(cut.min(text.len()));
            prop_assert_eq!(split(&[left, right]), split(&[text.as_bytes()]));
        }
    }
}
