//! One look at a recipient as nearly all recipients are written.
//!
//! Owns a reader of one kind of JSON: an object of known fields, each once, whose texts have no
//! escapes, and variables whose names have none. It says where the fields stand and what kind of
//! value each variable has, in one pass and without copying. Whatever else a recipient may be is
//! none of its business: it answers `None`, and `serde_json` has the say. What it does take means
//! the same to `serde_json` (a property test says so). Pure; must not judge values.

use content::Glimpse;

use super::row::METADATA_MAX;

/// How deep values of variables may nest.
const DEPTH_MAX: usize = 16;
/// Digits of a number that every reader holds.
const DIGITS_MAX: usize = 15;
/// Variables of one recipient: more are looked for by a reader that has a map.
const VARS_MAX: usize = 100;

/// Where the fields stand; `null` is as if they were not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Plain<'j> {
    pub(crate) email: &'j str,
    pub(crate) name: Option<&'j str>,
    pub(crate) prospect_id: Option<&'j str>,
    pub(crate) time_zone: Option<&'j str>,
    /// JSON of an object.
    pub(crate) vars: Option<&'j str>,
    /// JSON of an object of at most [`METADATA_MAX`] bytes.
    pub(crate) metadata: Option<&'j str>,
}

/// What is known of the variables of the recipient that was looked at last.
#[derive(Debug, Default)]
pub(crate) struct Vars {
    /// The names, one after the other.
    names: Vec<u8>,
    /// Where each ends, and what it is.
    entries: Vec<(usize, Glimpse)>,
    known: bool,
}

impl Vars {
    /// Forgets the recipient before.
    pub(crate) fn forget(&mut self) {
        self.names.clear();
        self.entries.clear();
        self.known = false;
    }

    /// Whether the last look was enough.
    pub(crate) fn are_known(&self) -> bool {
        self.known
    }

    /// What stands under this name.
    pub(crate) fn glimpse(&self, name: &str) -> Glimpse {
        let (name, mut from, mut found) = (name.as_bytes(), 0, Glimpse::Absent);
        for &(end, kind) in &self.entries {
            let other = self.names.get(from..end).unwrap_or_default();
            from = end;
            // The last byte first: names such as v1, v2, v3 differ in it.
            if other.len() == name.len() && other.last() == name.last() && other == name {
                found = match found {
                    Glimpse::Absent => kind,
                    // Which of two counts is for the reader to say.
                    Glimpse::Text | Glimpse::Other | Glimpse::Unknown => Glimpse::Unknown,
                };
            }
        }
        found
    }

    fn add(&mut self, name: &[u8], kind: Glimpse) -> Option<()> {
        self.names.extend_from_slice(name);
        self.entries.push((self.names.len(), kind));
        (self.entries.len() <= VARS_MAX).then_some(())
    }
}

/// Looks at one recipient. `None`: it takes a closer look.
pub(crate) fn scan<'j>(json: &'j [u8], vars: &mut Vars) -> Option<Plain<'j>> {
    vars.forget();
    let mut cursor = Cursor {
        json: std::str::from_utf8(json).ok()?,
        at: 0,
    };
    let plain = cursor.recipient(vars)?;
    vars.known = true;
    Some(plain)
}

/// What ends the plain part of a string: a quote, a backslash, or what may not be there.
const ENDS: [bool; 256] = {
    let mut ends = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        ends[byte] = true;
        byte += 1;
    }
    ends[b'"' as usize] = true;
    ends[b'\\' as usize] = true;
    ends
};

/// The lowest bit that is set is in the first of eight bytes that ends a plain text.
fn ends_among(bytes: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let below = |bytes: u64, limit: u64| bytes.wrapping_sub(ONES * limit) & !bytes;
    let quote = below(bytes ^ (ONES * u64::from(b'"')), 1);
    let backslash = below(bytes ^ (ONES * u64::from(b'\\')), 1);
    (below(bytes, 0x20) | quote | backslash) & (ONES << 7)
}

/// Whether a text stands in JSON as it is.
pub(crate) fn is_plain(text: &str) -> bool {
    !text.bytes().any(ends)
}

fn ends(byte: u8) -> bool {
    ENDS.get(usize::from(byte)).is_none_or(|ends| *ends)
}

struct Cursor<'j> {
    json: &'j str,
    at: usize,
}

impl<'j> Cursor<'j> {
    fn rest(&self) -> &'j [u8] {
        self.json.as_bytes().get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.json.as_bytes().get(self.at).copied()
    }

    /// The next byte that is no white space, which stays.
    fn next(&mut self) -> Option<u8> {
        loop {
            match self.peek()? {
                b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
                byte => return Some(byte),
            }
        }
    }

    /// Consumes this byte, and white space before it.
    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.next()? == byte).then(|| self.at += 1)
    }

    /// After an entry: whether another follows, or `end`.
    fn goes_on(&mut self, end: u8) -> Option<bool> {
        let byte = self.next()?;
        self.at += 1;
        match byte {
            b',' => Some(true),
            byte if byte == end => Some(false),
            _ => None,
        }
    }

    fn recipient(&mut self, vars: &mut Vars) -> Option<Plain<'j>> {
        let mut plain = Plain::default();
        let mut seen = 0_u8;
        self.expect(b'{')?;
        loop {
            let key = self.text()?;
            self.expect(b':')?;
            let is_null = self.next()? == b'n';
            let field = match key.as_bytes() {
                b"email" => {
                    plain.email = self.text()?;
                    0
                }
                b"name" => {
                    plain.name = self.optional_text(is_null)?;
                    1
                }
                b"prospect_id" => {
                    plain.prospect_id = self.optional_text(is_null)?;
                    2
                }
                b"time_zone" => {
                    plain.time_zone = self.optional_text(is_null)?;
                    3
                }
                b"vars" if is_null => {
                    self.word(b"null")?;
                    4
                }
                b"vars" => {
                    let from = self.at;
                    self.variables(vars)?;
                    plain.vars = self.json.get(from..self.at);
                    4
                }
                b"metadata" if is_null => {
                    self.word(b"null")?;
                    5
                }
                b"metadata" => {
                    let from = self.at;
                    (self.peek()? == b'{').then_some(())?;
                    self.value(DEPTH_MAX)?;
                    plain.metadata = self.json.get(from..self.at);
                    (self.at - from <= METADATA_MAX).then_some(())?;
                    5
                }
                _ => return None,
            };
            let bit = 1 << field;
            if seen & bit != 0 {
                return None;
            }
            seen |= bit;
            if !self.goes_on(b'}')? {
                break;
            }
        }
        // Without an address there is more to say than nothing; and nothing may follow.
        (seen & 1 != 0 && self.next().is_none()).then_some(plain)
    }

    fn variables(&mut self, vars: &mut Vars) -> Option<()> {
        self.expect(b'{')?;
        if self.next()? == b'}' {
            self.at += 1;
            return Some(());
        }
        loop {
            let name = self.text()?;
            self.expect(b':')?;
            self.next()?;
            let kind = self.value(DEPTH_MAX)?;
            vars.add(name.as_bytes(), kind)?;
            if !self.goes_on(b'}')? {
                return Some(());
            }
        }
    }

    fn optional_text(&mut self, is_null: bool) -> Option<Option<&'j str>> {
        if is_null {
            return self.word(b"null").map(|()| None);
        }
        self.text().map(Some)
    }

    /// A string without escapes, and white space before it.
    fn text(&mut self) -> Option<&'j str> {
        self.expect(b'"')?;
        let from = self.at;
        self.plain_bytes()?;
        let text = self.json.get(from..self.at)?;
        (self.peek()? == b'"').then(|| self.at += 1)?;
        Some(text)
    }

    /// Goes to the next quote, backslash or control character.
    fn plain_bytes(&mut self) -> Option<()> {
        let rest = self.rest();
        let (eights, _) = rest.as_chunks::<8>();
        for eight in eights {
            let ends = ends_among(u64::from_le_bytes(*eight));
            if ends != 0 {
                self.at += usize::try_from(ends.trailing_zeros() / 8).unwrap_or(0);
                return Some(());
            }
            self.at += 8;
        }
        self.at += self.rest().iter().position(|byte| ends(*byte))?;
        Some(())
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.rest().starts_with(word).then(|| self.at += word.len())
    }

    /// Any value, which begins here, with at most `depth` levels below it.
    fn value(&mut self, depth: usize) -> Option<Glimpse> {
        match self.peek()? {
            b'"' => return self.string().map(|()| Glimpse::Text),
            b'{' => {
                self.at += 1;
                self.members(depth.checked_sub(1)?, b'}')?;
            }
            b'[' => {
                self.at += 1;
                self.members(depth.checked_sub(1)?, b']')?;
            }
            b't' => self.word(b"true")?,
            b'f' => self.word(b"false")?,
            b'n' => self.word(b"null")?,
            _ => self.number()?,
        }
        Some(Glimpse::Other)
    }

    /// What stands in an object or an array, up to and with its `end`.
    fn members(&mut self, depth: usize, end: u8) -> Option<()> {
        if self.next()? == end {
            self.at += 1;
            return Some(());
        }
        loop {
            self.next()?;
            if end == b'}' {
                self.string()?;
                self.expect(b':')?;
                self.next()?;
            }
            self.value(depth)?;
            if !self.goes_on(end)? {
                return Some(());
            }
        }
    }

    /// A string that begins here, with escapes of one letter.
    fn string(&mut self) -> Option<()> {
        (self.peek()? == b'"').then(|| self.at += 1)?;
        loop {
            self.plain_bytes()?;
            let byte = self.peek()?;
            self.at += 1;
            match byte {
                b'"' => return Some(()),
                b'\\' => match self.peek()? {
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.at += 1,
                    _ => return None,
                },
                _ => return None,
            }
        }
    }

    /// A number as people write them, which begins here.
    fn number(&mut self) -> Option<()> {
        self.at += usize::from(self.peek()? == b'-');
        let whole = self.digits();
        let starts = self.rest_before(whole);
        if whole == 0 || (whole > 1 && starts == Some(b'0')) {
            return None;
        }
        let mut all = whole;
        if self.peek() == Some(b'.') {
            self.at += 1;
            let after = self.digits();
            (after > 0).then_some(())?;
            all += after;
        }
        let more = matches!(self.peek(), Some(b'e' | b'E'));
        (all <= DIGITS_MAX && !more).then_some(())
    }

    /// Consumes digits, and says how many.
    fn digits(&mut self) -> usize {
        let rest = self.rest();
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        count
    }

    /// The byte that stands so many before this place.
    fn rest_before(&self, count: usize) -> Option<u8> {
        self.json
            .as_bytes()
            .get(self.at.checked_sub(count)?)
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn look(json: &str) -> Option<(Plain<'_>, Vars)> {
        let mut vars = Vars::default();
        let plain = scan(json.as_bytes(), &mut vars)?;
        Some((plain, vars))
    }

    #[test]
    fn a_recipient_as_they_are_is_taken() {
        let json = r#" {"email": "a@x.example","name":"山田","prospect_id":null,
            "vars":{"n":-12.50,"t":"a \"b\"","o":{"x":[1,true,null,{}]},"e":""},"metadata":{"k":"v"}}  "#;
        let (plain, vars) = look(json).expect("plain");
        assert_eq!(
            (plain.email, plain.name, plain.prospect_id),
            ("a@x.example", Some("山田"), None)
        );
        assert_eq!(plain.metadata, Some(r#"{"k":"v"}"#));
        let read: Value = serde_json::from_str(plain.vars.expect("vars")).expect("JSON");
        assert_eq!(read["o"]["x"][1], true);
        for (name, kind) in [
            ("n", Glimpse::Other),
            ("t", Glimpse::Text),
            ("o", Glimpse::Other),
            ("e", Glimpse::Text),
            ("x", Glimpse::Absent),
        ] {
            assert_eq!(vars.glimpse(name), kind, "{name}");
        }
        assert!(vars.are_known());
        let (_, twice) = look(r#"{"email":"a","vars":{"a":1,"a":""}}"#).expect("plain");
        assert_eq!(twice.glimpse("a"), Glimpse::Unknown);
    }

    #[test]
    fn what_is_not_plain_is_left_to_others() {
        for json in [
            "",
            "{}",
            "[]",
            "{\"email\":\"a\"",
            "{\"email\":\"a\",}",
            "{\"email\":\"a\"} x",
            "{\"email\":null}",
            "{\"email\":\"a\\u0040\"}",
            "{\"email\":\"a\n\"}",
            "{\"email\":\"a\",\"email\":\"a\"}",
            "{\"email\":\"a\",\"other\":1}",
            "{\"email\":\"a\",\"tracking\":{\"mode\":\"off\"}}",
            "{\"email\":\"a\",\"vars\":[]}",
            "{\"email\":\"a\",\"vars\":{\"a\":01}}",
            "{\"email\":\"a\",\"vars\":{\"a\":1e9}}",
            "{\"email\":\"a\",\"vars\":{\"a\":1.}}",
            "{\"email\":\"a\",\"vars\":{\"a\":-}}",
            "{\"email\":\"a\",\"vars\":{\"a\":1234567890123456}}",
            "{\"email\":\"a\",\"vars\":{\"a\":\"\\ud800\"}}",
            "{\"email\":\"a\",\"vars\":{\"a\":nul}}",
            "{\"email\":\"a\",\"vars\":{\"a\" 1}}",
            "{\"email\":\"a\",\"metadata\":[1]}",
        ] {
            assert!(look(json).is_none(), "{json}");
        }
        let deep = format!(
            "{{\"email\":\"a\",\"vars\":{{\"a\":{}{}}}}}",
            "[".repeat(200),
            "]".repeat(200)
        );
        assert!(look(&deep).is_none());
        let large = format!(
            "{{\"email\":\"a\",\"metadata\":{{\"a\":\"{}\"}}}}",
            "x".repeat(METADATA_MAX)
        );
        assert!(look(&large).is_none());
        assert!(scan(b"{\"email\":\"\xff\"}", &mut Vars::default()).is_none());
    }
}
