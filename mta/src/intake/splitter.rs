//! Separates a batch document into its head and its recipients while it arrives.
//!
//! Owns one question: where in the bytes of the top-level object does `recipients` begin, and where
//! each of its elements. Whatever is not a recipient is kept as the *head*, with an empty array
//! where the recipients stood; each recipient goes to [`Rows`] as it is. Must not judge anything
//! else: head and rows are parsed by `serde_json` afterwards, so that a document is taken exactly
//! when `serde_json` would take it whole (a property test says so). No I/O, no allocation beyond
//! the head, which has a limit; chunks may end at any byte.

/// Where something stands in the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Position {
    /// Bytes before it.
    pub(crate) offset: u64,
    /// Its line, from 1.
    pub(crate) line: u32,
}

/// Takes the recipients, in order.
pub(crate) trait Rows {
    /// A recipient begins.
    fn begin(&mut self, at: Position);
    /// More of its bytes, JSON as it was sent.
    fn push(&mut self, bytes: &[u8]);
    /// It is complete.
    fn end(&mut self);
}

/// Why a document cannot be split.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SplitError {
    /// Not JSON.
    #[error("{detail}")]
    Syntax {
        /// What is wrong.
        detail: &'static str,
        /// Where it was noticed.
        at: Position,
    },
    /// The document without its recipients is larger than `limit` bytes.
    #[error("the document without its recipients is larger than {limit} bytes")]
    HeadTooLarge {
        /// The limit.
        limit: usize,
    },
}

/// The document without its recipients.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Head {
    /// JSON, with `[]` in place of the recipients.
    pub(crate) json: Vec<u8>,
    /// Where the recipients were taken out.
    cut: Option<Cut>,
    /// Recipients come beside the document, which must have none.
    pub(crate) is_apart: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Bytes of the head before what follows the recipients.
    head_at: usize,
    /// Where in the document that was.
    at: Position,
}

impl Head {
    /// A document that stands at `at`, without its recipients.
    pub(crate) fn apart(json: Vec<u8>, at: Position) -> Self {
        Self {
            json,
            cut: Some(Cut { head_at: 0, at }),
            is_apart: true,
        }
    }

    /// Where in the document an error is that `serde_json` found in the head.
    pub(crate) fn position(&self, error: &serde_json::Error) -> Position {
        let line_start = match error.line() {
            0 | 1 => 0,
            line => memchr::memchr_iter(b'\n', &self.json)
                .nth(line - 2)
                .map_or(0, |at| at + 1),
        };
        let in_head = (line_start + error.column().saturating_sub(1)).min(self.json.len());
        let (from, base) = match self.cut {
            Some(cut) if in_head >= cut.head_at => (cut.head_at, cut.at),
            _ => (0, Position { offset: 0, line: 1 }),
        };
        let between = self.json.get(from..in_head).unwrap_or_default();
        let lines = memchr::memchr_iter(b'\n', between).count();
        Position {
            offset: base.offset + between.len() as u64,
            line: base
                .line
                .saturating_add(u32::try_from(lines).unwrap_or(u32::MAX)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the document, outside the recipients.
    Head,
    /// In the array, before a recipient or its end; a comma was there already.
    Between { after_comma: bool },
    /// In a recipient.
    Row,
}

/// The longest spelling of `recipients` is with every letter as `\uXXXX`, and the quotes.
const KEY_MAX: usize = 6 * "recipients".len() + 2;

/// What stands at depth 1 of the document, outside strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Key,
    /// Of the key `recipients`: its first byte decides.
    Recipients,
    Value,
}

/// Splits one document.
#[derive(Debug)]
pub(crate) struct Splitter {
    state: State,
    head: Head,
    head_limit: usize,
    position: Position,
    in_string: bool,
    /// The byte before, in a string, was a backslash that escapes this one.
    escaped: bool,
    /// Open brackets: of the document in the head, of the recipient in a row.
    depth: u64,
    /// The document is an object, and this is what is due in it.
    turn: Option<Turn>,
    /// The key being read, with its quotes; cut off beyond [`KEY_MAX`].
    key: Vec<u8>,
}

impl Splitter {
    /// Splits a document whose head may have `head_limit` bytes.
    pub(crate) fn new(head_limit: usize) -> Self {
        Self {
            state: State::Head,
            head: Head::default(),
            head_limit,
            position: Position { offset: 0, line: 1 },
            in_string: false,
            escaped: false,
            depth: 0,
            turn: None,
            key: Vec::new(),
        }
    }

    /// How large the head is so far, in bytes.
    pub(crate) fn head_len(&self) -> usize {
        self.head.json.len()
    }

    /// Takes the next bytes of the document.
    ///
    /// # Errors
    /// When they cannot belong to a batch document; nothing may be pushed afterwards.
    pub(crate) fn push(&mut self, chunk: &[u8], rows: &mut impl Rows) -> Result<(), SplitError> {
        let mut rest = chunk;
        while !rest.is_empty() {
            let used = match self.state {
                State::Head => self.scan_head(rest)?,
                State::Between { after_comma } => self.scan_between(rest, after_comma, rows)?,
                State::Row => self.scan_row(rest, rows),
            };
            self.position.offset += used as u64;
            rest = rest.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    /// The document is complete.
    ///
    /// # Errors
    /// When it ends inside the recipients. (Whether the head is complete is for its parser.)
    pub(crate) fn finish(self) -> Result<Head, SplitError> {
        match self.state {
            State::Head => Ok(self.head),
            State::Between { .. } | State::Row => Err(self.syntax("ends inside the recipients")),
        }
    }

    fn syntax(&self, detail: &'static str) -> SplitError {
        SplitError::Syntax {
            detail,
            at: self.position,
        }
    }

    /// Consumes bytes of the head, up to and with the bracket that opens the recipients.
    fn scan_head(&mut self, bytes: &[u8]) -> Result<usize, SplitError> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.in_string {
                let used = self.skip_string(bytes.get(at..).unwrap_or_default());
                if self.turn == Some(Turn::Key) && self.depth == 1 {
                    self.note_key(bytes.get(at..at + used).unwrap_or_default());
                }
                at += used;
                continue;
            }
            at += 1;
            if byte == b'[' && self.depth == 1 && self.turn == Some(Turn::Recipients) {
                return self.open_recipients(bytes.get(..at - 1).unwrap_or_default());
            }
            self.step_head(byte);
        }
        self.keep(bytes)?;
        Ok(at)
    }

    /// One byte of the head outside strings.
    fn step_head(&mut self, byte: u8) {
        match byte {
            b'\n' => self.position.line = self.position.line.saturating_add(1),
            b' ' | b'\t' | b'\r' => {}
            b'"' => {
                self.in_string = true;
                self.key.clear();
                self.key.push(b'"');
                self.value_seen();
            }
            b'{' | b'[' => {
                self.value_seen();
                self.depth += 1;
                if self.depth == 1 {
                    self.turn = (byte == b'{').then_some(Turn::Key);
                }
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    self.turn = None;
                }
            }
            b',' if self.depth == 1 && self.turn.is_some() => self.turn = Some(Turn::Key),
            b':' if self.depth == 1 && self.turn == Some(Turn::Key) => {
                let is_recipients = serde_json::from_slice::<String>(&self.key)
                    .is_ok_and(|key| key == "recipients");
                self.turn = Some(if is_recipients {
                    Turn::Recipients
                } else {
                    Turn::Value
                });
            }
            _ => self.value_seen(),
        }
    }

    /// The value of `recipients` has begun, and it is no array: the head's parser will say so.
    fn value_seen(&mut self) {
        if self.depth == 1 && self.turn == Some(Turn::Recipients) {
            self.turn = Some(Turn::Value);
        }
    }

    fn note_key(&mut self, bytes: &[u8]) {
        let room = (KEY_MAX + 1).saturating_sub(self.key.len());
        self.key.extend(bytes.iter().take(room));
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), SplitError> {
        if bytes.len() > self.head_limit.saturating_sub(self.head.json.len()) {
            return Err(SplitError::HeadTooLarge {
                limit: self.head_limit,
            });
        }
        self.head.json.extend_from_slice(bytes);
        Ok(())
    }

    fn open_recipients(&mut self, before: &[u8]) -> Result<usize, SplitError> {
        if self.head.cut.is_some() {
            return Err(self.syntax("recipients is there twice"));
        }
        self.keep(before)?;
        self.keep(b"[]")?;
        self.state = State::Between { after_comma: false };
        self.turn = Some(Turn::Value);
        self.depth = 0;
        Ok(before.len() + 1)
    }

    /// The bracket after `used` bytes closes the recipients.
    fn close_recipients(&mut self, used: usize) {
        self.state = State::Head;
        self.depth = 1;
        let offset = self.position.offset + used as u64;
        let at = Position {
            offset,
            ..self.position
        };
        self.head.cut = Some(Cut {
            head_at: self.head.json.len(),
            at,
        });
    }

    /// Consumes white space between recipients, or the end of the array.
    fn scan_between(
        &mut self,
        bytes: &[u8],
        after_comma: bool,
        rows: &mut impl Rows,
    ) -> Result<usize, SplitError> {
        let space = |b: &u8| matches!(b, b' ' | b'\t' | b'\r' | b'\n');
        let used = bytes.iter().take_while(|b| space(b)).count();
        let skipped = bytes.get(..used).unwrap_or_default();
        self.count_lines(skipped);
        match bytes.get(used) {
            None => Ok(used),
            Some(b']') if !after_comma => {
                self.close_recipients(used + 1);
                Ok(used + 1)
            }
            Some(b',' | b']') => Err(self.syntax("a recipient is missing beside a comma")),
            Some(_) => {
                rows.begin(Position {
                    offset: self.position.offset + used as u64,
                    ..self.position
                });
                self.state = State::Row;
                self.depth = 0;
                Ok(used)
            }
        }
    }

    fn count_lines(&mut self, bytes: &[u8]) {
        let lines = memchr::memchr_iter(b'\n', bytes).count();
        self.position.line = self
            .position
            .line
            .saturating_add(u32::try_from(lines).unwrap_or(u32::MAX));
    }

    /// Consumes bytes of a recipient, and the comma or bracket after it.
    fn scan_row(&mut self, bytes: &[u8], rows: &mut impl Rows) -> usize {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.in_string {
                at += self.skip_string(bytes.get(at..).unwrap_or_default());
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'\n' => self.position.line = self.position.line.saturating_add(1),
                b',' | b']' if self.depth == 0 => {
                    rows.push(bytes.get(..at).unwrap_or_default());
                    rows.end();
                    if byte == b',' {
                        self.state = State::Between { after_comma: true };
                    } else {
                        self.close_recipients(at + 1);
                    }
                    return at + 1;
                }
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            at += 1;
        }
        rows.push(bytes);
        at
    }

    /// How many bytes of `bytes`, which begin inside a string, belong to it, with its closing quote.
    fn skip_string(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            if self.escaped {
                if at == bytes.len() {
                    return at;
                }
                self.escaped = false;
                at += 1;
            }
            let rest = bytes.get(at..).unwrap_or_default();
            match memchr::memchr2(b'"', b'\\', rest) {
                None => return bytes.len(),
                Some(found) => {
                    at += found + 1;
                    if rest.get(found) == Some(&b'"') {
                        self.in_string = false;
                        return at;
                    }
                    self.escaped = true;
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[derive(Default)]
    pub(in crate::intake) struct Collected(pub(in crate::intake) Vec<(Position, Vec<u8>)>);

    impl Rows for Collected {
        fn begin(&mut self, at: Position) {
            self.0.push((at, Vec::new()));
        }
        fn push(&mut self, bytes: &[u8]) {
            self.0.last_mut().expect("begun").1.extend_from_slice(bytes);
        }
        fn end(&mut self) {}
    }

    /// The document as the splitter and `serde_json` together read it.
    fn split(chunks: &[&[u8]]) -> Result<(Value, Option<Vec<Value>>), String> {
        let mut rows = Collected::default();
        let mut splitter = Splitter::new(1 << 20);
        for chunk in chunks {
            splitter
                .push(chunk, &mut rows)
                .map_err(|error| error.to_string())?;
        }
        let head = splitter.finish().map_err(|error| error.to_string())?;
        let document = serde_json::from_slice(&head.json).map_err(|error| error.to_string())?;
        let parsed = rows
            .0
            .iter()
            .map(|(_, row)| serde_json::from_slice(row).map_err(|error| error.to_string()));
        let rows = parsed.collect::<Result<Vec<Value>, _>>()?;
        Ok((document, head.cut.is_some().then_some(rows)))
    }

    fn whole(chunks: &[&[u8]]) -> Result<Value, String> {
        let (mut document, rows) = split(chunks)?;
        if let Some(rows) = rows {
            document["recipients"] = Value::Array(rows);
        }
        Ok(document)
    }

    #[test]
    fn recipients_are_taken_out_wherever_they_stand() {
        for text in [
            r#"{"recipients":[{"a":"]},\"["},{}, 3 ,"x"],"subject":"s"}"#,
            r#"{"subject":"\"recipients\":[1]", "recipients" : [ ] }"#,
            "{\"recipi\\u0065nts\":\n[\n{}\n]\n}",
            r#"{"vars":{"recipients":[1,2]},"recipients":[[]]}"#,
            r#"{"vars":["recipients",{"recipients":[1]}],"recipients":null}"#,
            r#"[{"recipients":[1]}]"#,
            r#""recipients""#,
        ] {
            let document = serde_json::from_str::<Value>(text).expect("a good document");
            assert_eq!(whole(&[text.as_bytes()]), Ok(document), "{text}");
        }
        let (document, rows) = split(&[br#"{"recipients":[1,2],"a":3}"#]).expect("split");
        assert_eq!(document, json!({"recipients": [], "a": 3}));
        assert_eq!(rows, Some(vec![json!(1), json!(2)]));
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for text in [
            "",
            "{",
            r#"{"recipients":[}"#,
            r#"{"recipients":[{]}"#,
            r#"{"recipients":[1,]}"#,
            r#"{"recipients":[,1]}"#,
            r#"{"recipients":[1 2]}"#,
            r#"{"recipients":[1]"#,
            r#"{"recipients":[1]]"#,
            r#"{"recipients":[1]}}"#,
            r#"{"recipients":[1] 2}"#,
            r#"{"recipients":[1],}"#,
            r#"{"recipients":[{"a":[}]]}"#,
            r#"{"recipients":[1],"recipients":[2]}"#,
            r#"{"recipients" [1]}"#,
            r#"{"recipients":: [1]}"#,
        ] {
            assert!(whole(&[text.as_bytes()]).is_err(), "{text}");
        }
    }

    #[test]
    fn errors_and_rows_know_their_place_in_the_document() {
        let text = "{\n\"recipients\": [\n  {\"a\": 1},\n  {}\n],\n\"subject\": x}";
        let mut rows = Collected::default();
        let mut splitter = Splitter::new(1 << 20);
        splitter.push(text.as_bytes(), &mut rows).expect("split");
        let head = splitter.finish().expect("complete");
        let at = |needle: &str| text.find(needle).expect("there") as u64;
        assert_eq!(
            rows.0[0].0,
            Position {
                offset: at("{\"a\""),
                line: 3
            }
        );
        assert_eq!(
            rows.0[1].0,
            Position {
                offset: at("{}"),
                line: 4
            }
        );
        let error = serde_json::from_slice::<Value>(&head.json).expect_err("no such value");
        assert_eq!(
            head.position(&error),
            Position {
                offset: at("x}"),
                line: 6
            }
        );
    }

    #[test]
    fn a_head_has_a_limit_and_the_recipients_do_not_count() {
        let mut splitter = Splitter::new(32);
        let mut rows = Collected::default();
        splitter
            .push(br#"{"recipients":["#, &mut rows)
            .expect("small");
        for _ in 0..100 {
            splitter.push(b"123456,", &mut rows).expect("recipients");
        }
        splitter
            .push(br#"1],"subject":"#, &mut rows)
            .expect("still small");
        assert_eq!(
            splitter.push(br#""long""#, &mut rows),
            Err(SplitError::HeadTooLarge { limit: 32 })
        );
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-z\"\\\\\\]\\[{},:é\\n]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            let key = prop_oneof![Just("recipients".to_owned()), "[a-z\"\\\\]{0,4}"];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..5).prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_document_is_read_as_serde_json_reads_it(document in any_json(), pretty: bool, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let text = if pretty { serde_json::to_vec_pretty(&document) } else { serde_json::to_vec(&document) }.expect("json");
            prop_assert_eq!(whole(&pieces(&text, &cuts)), Ok(document));
        }

        #[test]
        fn damage_is_refused_exactly_when_serde_json_refuses(
            document in any_json(), at: prop::sample::Index, byte in prop::sample::select(b"{}[],:\"\\ 1a\n\xff".to_vec()),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut text = serde_json::to_vec(&document).expect("json");
            let at = at.index(text.len());
            text[at] = byte;
            match serde_json::from_slice::<Value>(&text) {
                Err(_) => prop_assert!(whole(&pieces(&text, &cuts)).is_err()),
                // Of a key that is there twice, serde_json takes the last; we may refuse it.
                Ok(expected) => if let Ok(read) = whole(&pieces(&text, &cuts)) { prop_assert_eq!(read, expected) },
            }
        }
    }

    fn pieces<'t>(text: &'t [u8], cuts: &[prop::sample::Index]) -> Vec<&'t [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
    }
}
