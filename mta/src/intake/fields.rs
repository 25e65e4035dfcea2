//! Reads JSON objects of the API field by field, and collects every mistake with its path.
//!
//! Owns what is the same for all of them: unknown fields are refused by name, `null` is absent,
//! a key must not be there twice. Must not know any particular field.

use std::fmt;

use model::Timestamp;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use service::http::ProblemError;

use crate::admin::problem::{Code, ERRORS_MAX, mistake};

/// All mistakes of one body.
#[derive(Debug, Default)]
pub(crate) struct Mistakes(Vec<ProblemError>);

impl Mistakes {
    pub(crate) fn add(&mut self, path: String, code: Code, detail: impl Into<String>) {
        self.0.push(mistake(path, code, detail));
    }

    pub(crate) fn push(&mut self, error: ProblemError) {
        self.0.push(error);
    }

    /// More would not be shown.
    pub(crate) fn is_full(&self) -> bool {
        self.0.len() > ERRORS_MAX
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn into_vec(self) -> Vec<ProblemError> {
        self.0
    }
}

/// One step of a JSON pointer (RFC 6901), bounded and printable: it is a stranger's text.
pub(crate) fn pointer_step(key: &str) -> String {
    let plain: String = key
        .chars()
        .take(100)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    plain.replace('~', "~0").replace('/', "~1")
}

/// One object that is being read.
pub(crate) struct Fields<'m> {
    path: String,
    map: Map<String, Value>,
    mistakes: &'m mut Mistakes,
}

impl<'m> Fields<'m> {
    /// Reads the object at `path`; anything else is a mistake, and then it has no field.
    pub(crate) fn of(path: String, value: Value, mistakes: &'m mut Mistakes) -> Self {
        let map = match value {
            Value::Object(map) => map,
            other => {
                mistakes.add(
                    path.clone(),
                    Code::InvalidField,
                    format!("is {}, expected an object", kind(&other)),
                );
                Map::new()
            }
        };
        Self {
            path,
            map,
            mistakes,
        }
    }

    /// Where the field stands.
    pub(crate) fn path(&self, key: &str) -> String {
        format!("{}/{}", self.path, pointer_step(key))
    }

    pub(crate) fn mistake(&mut self, key: &str, detail: impl Into<String>) {
        let path = self.path(key);
        self.mistakes.add(path, Code::InvalidField, detail);
    }

    /// The field's value; `null` is as if it were not there.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    /// Whether the field is there, and not `null`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// The fields not read so far.
    pub(crate) fn keys(&self) -> Vec<String> {
        self.map.keys().cloned().collect()
    }

    /// A value that `convert` takes, and that has to be there.
    pub(crate) fn required<T>(
        &mut self,
        key: &str,
        convert: impl FnOnce(Value) -> Result<T, String>,
    ) -> Option<T> {
        if !self.has(key) {
            self.map.remove(key);
            self.mistake(key, "is missing");
            return None;
        }
        self.converted(key, convert)
    }

    /// A value that `convert` takes.
    pub(crate) fn converted<T>(
        &mut self,
        key: &str,
        convert: impl FnOnce(Value) -> Result<T, String>,
    ) -> Option<T> {
        let converted = convert(self.take(key)?);
        converted.map_err(|detail| self.mistake(key, detail)).ok()
    }

    pub(crate) fn string(&mut self, key: &str) -> Option<String> {
        self.converted(key, string)
    }

    /// Text that names something: 1 to `max` bytes, no control character.
    pub(crate) fn label(&mut self, key: &str, max: usize) -> Option<String> {
        self.converted(key, |value| {
            let text = string(value)?;
            if text.is_empty() || text.len() > max {
                return Err(format!("has {} bytes, expected 1 to {max}", text.len()));
            }
            no_control(&text).map(|()| text)
        })
    }

    pub(crate) fn flag(&mut self, key: &str, default: bool) -> bool {
        let flag = self.converted(key, |value| {
            value
                .as_bool()
                .ok_or_else(|| expected(&value, "true or false"))
        });
        flag.unwrap_or(default)
    }

    /// Text that parses.
    pub(crate) fn parsed<T>(&mut self, key: &str) -> Option<T>
    where
        T: std::str::FromStr<Err: fmt::Display>,
    {
        self.converted(key, |value| {
            string(value)?
                .parse()
                .map_err(|error: T::Err| error.to_string())
        })
    }

    pub(crate) fn time(&mut self, key: &str) -> Option<Timestamp> {
        self.converted(key, |value| {
            let text = string(value)?;
            Timestamp::parse(&text)
                .map_err(|_| format!("{text:.40?} is not a time such as \"2026-12-01T09:00:00Z\""))
        })
    }

    pub(crate) fn object(&mut self, key: &str) -> Option<Map<String, Value>> {
        self.converted(key, |value| match value {
            Value::Object(map) => Ok(map),
            other => Err(expected(&other, "an object")),
        })
    }

    /// Reads the object in this field.
    pub(crate) fn within<T>(
        &mut self,
        key: &str,
        read: impl FnOnce(&mut Fields<'_>) -> T,
    ) -> Option<T> {
        let value = self.take(key)?;
        let mut fields = Fields::of(self.path(key), value, self.mistakes);
        let read = read(&mut fields);
        fields.finish();
        Some(read)
    }

    /// Notes a mistake at a path below this object.
    pub(crate) fn mistake_at(&mut self, below: &str, detail: impl Into<String>) {
        let path = format!("{}/{below}", self.path);
        self.mistakes.add(path, Code::InvalidField, detail);
    }

    /// Reads the objects of the array in this field; one beyond `most` of them, so that there
    /// being too many shows.
    pub(crate) fn each<T>(
        &mut self,
        key: &str,
        most: usize,
        mut read: impl FnMut(&mut Fields<'_>) -> T,
    ) -> Option<Vec<T>> {
        let items = self.converted(key, |value| match value {
            Value::Array(items) => Ok(items),
            other => Err(expected(&other, "an array")),
        })?;
        let path = self.path(key);
        let mut all = Vec::new();
        for (place, item) in items.into_iter().take(most + 1).enumerate() {
            let mut fields = Fields::of(format!("{path}/{place}"), item, self.mistakes);
            all.push(read(&mut fields));
            fields.finish();
        }
        Some(all)
    }

    /// Whatever was not read does not exist.
    pub(crate) fn finish(self) {
        for key in self.map.keys() {
            let path = self.path(key);
            self.mistakes
                .add(path, Code::UnknownField, "there is no such field");
        }
    }
}

pub(crate) fn expected(value: &Value, what: &str) -> String {
    format!("is {}, expected {what}", kind(value))
}

pub(crate) fn string(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(expected(&other, "a string")),
    }
}

/// No value of ours may carry a line break into a header, a log or an event.
pub(crate) fn no_control(text: &str) -> Result<(), String> {
    match text.chars().any(char::is_control) {
        true => Err("has a control character, such as a line break".to_owned()),
        false => Ok(()),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Any JSON in which no object has a key twice: of two values, none is what was meant.
#[derive(Debug)]
pub(crate) struct Strict(pub(crate) Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = from.next_element()? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((key, Strict(value))) = from.next_entry::<String, Strict>()? {
            if map.contains_key(&key) {
                return Err(serde::de::Error::custom(format!(
                    "the key {:?} is there twice",
                    pointer_step(&key)
                )));
            }
            map.insert(key, value);
        }
        Ok(map.into())
    }
}
