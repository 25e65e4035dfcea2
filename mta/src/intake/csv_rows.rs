//! Turns a table (RFC 4180) into recipients while it arrives.
//!
//! Owns the first line, which names the columns: `email`, `name`, `prospect_id`; every other one is
//! a variable. Each line becomes the JSON of a recipient, so that all recipients are judged by the
//! same code. No I/O; what it holds is one line, which has a limit.

use csv_core::{ReadRecordResult, Reader};
use serde_json::Value;

use super::scan;
use super::splitter::{Position, Rows};
use super::spool::ROW_MAX;
use crate::admin::problem::{Answer, Code, Refusal};
use crate::intake::fields::pointer_step;
use crate::intake::recipients::malformed;

/// The most columns.
const COLUMNS_MAX: usize = 1_000;
/// Spreadsheets put it before the first column's name.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// What a column is for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Column {
    Email,
    /// Left out where it is empty. Its key, as JSON and with its colon.
    Field(&'static str),
    /// The same.
    Var(String),
}

/// The recipients of one table.
pub(crate) struct CsvRows {
    reader: Reader,
    /// The fields of the present line, one after the other.
    text: Vec<u8>,
    length: usize,
    /// Where each ends.
    ends: Vec<usize>,
    fields: usize,
    /// Named in the first line.
    columns: Option<Vec<Column>>,
    offset: u64,
    /// Where the present line began.
    began: Position,
    too_large: bool,
    /// The present recipient as JSON.
    json: Vec<u8>,
}

impl Default for CsvRows {
    fn default() -> Self {
        Self {
            reader: Reader::new(),
            text: vec![0; 4 << 10],
            length: 0,
            ends: vec![0; COLUMNS_MAX + 1],
            fields: 0,
            columns: None,
            offset: 0,
            began: Position { offset: 0, line: 1 },
            too_large: false,
            json: Vec::new(),
        }
    }
}

impl CsvRows {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they are no such table; nothing may be pushed afterwards.
    pub(crate) fn push(&mut self, mut bytes: &[u8], rows: &mut impl Rows) -> Answer<()> {
        // To the reader no bytes mean the end.
        while !bytes.is_empty() {
            let used = self.read(bytes, rows)?;
            self.offset += used as u64;
            bytes = bytes.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    /// The table is complete; its last line needs no end.
    ///
    /// # Errors
    /// When it had not even a first line.
    pub(crate) fn finish(mut self, rows: &mut impl Rows) -> Answer<()> {
        self.read(&[], rows)?;
        match self.columns {
            Some(_) => Ok(()),
            None => Err(Refusal::at(
                Code::InvalidField,
                "/email",
                "is missing: the first line names the columns",
            )),
        }
    }

    /// Reads on until a line or the bytes end; how many bytes that were.
    fn read(&mut self, bytes: &[u8], rows: &mut impl Rows) -> Answer<usize> {
        let mut used = 0;
        loop {
            let rest = bytes.get(used..).unwrap_or_default();
            let (result, read, wrote, ended) = self.reader.read_record(
                rest,
                self.text.get_mut(self.length..).unwrap_or_default(),
                self.ends.get_mut(self.fields..).unwrap_or_default(),
            );
            used += read;
            self.length += wrote;
            self.fields += ended;
            match result {
                ReadRecordResult::InputEmpty | ReadRecordResult::End => return Ok(used),
                ReadRecordResult::OutputFull if self.text.len() < ROW_MAX => {
                    let longer = self.text.len() * 2;
                    self.text.resize(longer, 0);
                }
                ReadRecordResult::OutputFull => {
                    // Larger than any recipient may be: its index stays, its values are dropped.
                    self.too_large = true;
                    self.length = 0;
                }
                ReadRecordResult::OutputEndsFull => {
                    return Err(self.broken("has more than 1,000 columns"));
                }
                ReadRecordResult::Record => {
                    self.line(rows)?;
                    self.length = 0;
                    self.fields = 0;
                    self.too_large = false;
                    self.began = Position {
                        offset: self.offset + used as u64,
                        line: u32::try_from(self.reader.line()).unwrap_or(u32::MAX),
                    };
                    return Ok(used);
                }
            }
        }
    }

    fn broken(&self, detail: &str) -> Refusal {
        malformed("", self.began, detail)
    }

    fn line(&mut self, rows: &mut impl Rows) -> Answer<()> {
        let Some(columns) = &self.columns else {
            self.columns = Some(self.header()?);
            return Ok(());
        };
        if self.too_large {
            rows.begin(self.began);
            rows.push(&vec![b' '; ROW_MAX + 1]);
            rows.end();
            return Ok(());
        }
        if self.fields != columns.len() {
            let detail = format!(
                "has {} fields, the first line has {}",
                self.fields,
                columns.len()
            );
            return Err(self.broken(&detail));
        }
        let text = self.text.get(..self.length).unwrap_or_default();
        let text = std::str::from_utf8(text).ok();
        let written = text.and_then(|text| write(&mut self.json, columns, text, &self.ends));
        written.ok_or_else(|| self.broken("is not UTF-8"))?;
        rows.begin(self.began);
        rows.push(&self.json);
        rows.end();
        Ok(())
    }

    /// What the first line says.
    fn header(&self) -> Answer<Vec<Column>> {
        let mut columns = Vec::new();
        let mut from = 0;
        for &end in self.ends.iter().take(self.fields) {
            let name = self.text.get(from..end).unwrap_or_default();
            from = end;
            let name = std::str::from_utf8(name).map_err(|_| self.broken("is not UTF-8"))?;
            let name = name.trim_start_matches(BYTE_ORDER_MARK).trim();
            let column = match name {
                "email" => Column::Email,
                "name" => Column::Field("\"name\":"),
                "prospect_id" => Column::Field("\"prospect_id\":"),
                "time_zone" => Column::Field("\"time_zone\":"),
                other => Column::Var(format!("{}:", Value::from(other))),
            };
            if name.is_empty() || columns.contains(&column) {
                let detail = "every column needs a name of its own in the first line";
                let path = format!("/{}", pointer_step(name));
                return Err(Refusal::at(Code::InvalidField, path, detail));
            }
            columns.push(column);
        }
        if !columns.contains(&Column::Email) {
            let detail = "is missing: the first line has to name a column email";
            return Err(Refusal::at(Code::InvalidField, "/email", detail));
        }
        Ok(columns)
    }
}

/// Writes a recipient as JSON in place of what `json` holds. None: a field ends inside a character.
fn write(json: &mut Vec<u8>, columns: &[Column], text: &str, ends: &[usize]) -> Option<()> {
    let fields = || {
        let starts = std::iter::once(&0).chain(ends);
        let places = starts.zip(ends).map(|(&from, &end)| text.get(from..end));
        columns.iter().zip(places)
    };
    json.clear();
    json.push(b'{');
    for (column, field) in fields() {
        let field = field?;
        match column {
            Column::Email => member(json, "\"email\":", field.trim()),
            Column::Field(key) if !field.is_empty() => member(json, key, field),
            Column::Field(_) | Column::Var(_) => {}
        }
    }
    json.extend_from_slice(b"\"vars\":{");
    for (column, field) in fields() {
        if let Column::Var(key) = column {
            member(json, key, field?);
        }
    }
    json.pop_if(|last| *last == b',');
    json.extend_from_slice(b"}}");
    Some(())
}

/// Writes a key, with its colon, its text, and a comma.
fn member(json: &mut Vec<u8>, key: &str, text: &str) {
    json.extend_from_slice(key.as_bytes());
    if scan::is_plain(text) {
        json.push(b'"');
        json.extend_from_slice(text.as_bytes());
        json.push(b'"');
    } else {
        json.extend_from_slice(Value::from(text).to_string().as_bytes());
    }
    json.push(b',');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Collected(Vec<Vec<u8>>, Vec<u32>);

    impl Rows for Collected {
        fn begin(&mut self, at: Position) {
            self.0.push(Vec::new());
            self.1.push(at.line);
        }
        fn push(&mut self, bytes: &[u8]) {
            if let Some(row) = self.0.last_mut() {
                row.extend_from_slice(bytes);
            }
        }
        fn end(&mut self) {}
    }

    fn split(table: &[u8], piece: usize) -> Answer<Vec<Value>> {
        let (mut rows, mut csv) = (Collected::default(), CsvRows::default());
        for bytes in table.chunks(piece.max(1)) {
            csv.push(bytes, &mut rows)?;
        }
        csv.finish(&mut rows)?;
        Ok(rows
            .0
            .iter()
            .map(|row| serde_json::from_slice(row).unwrap_or(Value::Null))
            .collect())
    }

    #[test]
    fn a_table_becomes_recipients() {
        let table = "\u{feff}email,name,points,prospect_id\r\na@x.example,\"B, \"\"C\"\"\",3,\n\"d@x.example\",,\"two\nlines\",p-1";
        for piece in [1, 3, 1_000] {
            let rows = split(table.as_bytes(), piece).expect("a table");
            assert_eq!(
                rows,
                [
                    serde_json::json!({"email": "a@x.example", "name": "B, \"C\"", "vars": {"points": "3"}}),
                    serde_json::json!({"email": "d@x.example", "prospect_id": "p-1", "vars": {"points": "two\nlines"}}),
                ]
            );
        }
    }

    #[test]
    fn a_table_that_is_none_says_where() {
        for (table, expected) in [
            ("", "invalid_field /email"),
            ("name\nA\n", "invalid_field /email"),
            ("email,email\n", "invalid_field /email"),
            ("email,\n", "invalid_field /"),
            ("email,a\nx@x.example\n", "malformed_body line 2"),
            (
                "email\na@x.example\nb@x.example,1\n",
                "malformed_body line 3",
            ),
        ] {
            let refusal = split(table.as_bytes(), 2).expect_err(table);
            let error = refusal.0.errors().first().cloned().expect("an error");
            let place = match error.line {
                Some(line) => format!("line {line}"),
                None => error.path,
            };
            assert_eq!(format!("{} {place}", error.code), expected, "{table:?}");
        }
    }

    #[test]
    fn a_line_that_is_too_large_keeps_its_index() {
        let table = format!(
            "email,x\na@x.example,{}\nb@x.example,1\n",
            "y".repeat(ROW_MAX)
        );
        let rows = split(table.as_bytes(), 1_000).expect("a table");
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (&rows[0], &rows[1]["email"]),
            (&Value::Null, &"b@x.example".into())
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_or_refused(bytes: Vec<u8>, piece in 1_usize..50) {
            let whole = split(&bytes, bytes.len());
            prop_assert_eq!(split(&bytes, piece).is_ok(), whole.is_ok());
            if let Ok(rows) = whole {
                prop_assert_eq!(split(&bytes, piece).unwrap_or_default(), rows);
            }
        }
    }
}
