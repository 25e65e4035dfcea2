//! What was typed: a TOML document with the environment laid over it, each value with its origin.
//!
//! Owns parsing and overlay; knows no key of the configuration. Every syntax error of a document is
//! reported, not only the first, and every value remembers its line or variable, so that a mistake
//! found later still names its place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::{DeArray, DeTable, DeValue};

/// The prefix of environment variables that override keys: `HIKYAKU__SECTION__KEY`.
pub const ENV_PREFIX: &str = "HIKYAKU__";

/// One thing wrong with the configuration, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file it stands in; `None` when it was typed into the environment.
    pub file: Option<PathBuf>,
    /// Line in that file, from 1, where one is known.
    pub line: Option<u32>,
    /// Path of the key: `smtp.timeouts.final_dot`, `accounts[1].id`; empty for the whole file.
    pub path: String,
    /// What is wrong, in words for the person who typed it.
    pub detail: String,
}

impl std::fmt::Display for Mistake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
            f.write_str(": ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.detail)
    }
}

/// Where a value was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Line of the file, from 1.
    Line(u32),
    /// Name of the environment variable and its text as it stood there.
    Env { variable: String, text: String },
}

/// One typed value with its origin.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) value: Value,
    pub(crate) origin: Origin,
}

/// A TOML value, owned. No key takes a float or a date, so these keep nothing.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    String(String),
    Integer(i64),
    Float,
    Boolean(bool),
    Datetime,
    Array(Vec<Item>),
    Table(Table),
}

/// The keys of one table.
pub(crate) type Table = BTreeMap<String, Item>;

impl Value {
    /// What this is, for "is an integer, expected a string".
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float => "a float",
            Self::Boolean(_) => "a boolean",
            Self::Datetime => "a date",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
        }
    }
}

/// What was typed: one file and the environment over it.
#[derive(Debug, Clone)]
pub(crate) struct FileConfig {
    pub(crate) file: PathBuf,
    pub(crate) root: Table,
}

impl FileConfig {
    /// Nothing typed in `file`: every key takes its default.
    pub(crate) fn empty(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            root: Table::new(),
        }
    }

    /// Parses `text`, read from `file`.
    ///
    /// # Errors
    /// Every syntax error of the text, with its line.
    pub(crate) fn parse(file: &Path, text: &str) -> Result<Self, Vec<Mistake>> {
        let lines = Lines::of(text);
        let (document, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            let mistake = |error: &toml::de::Error| Mistake {
                file: Some(file.to_owned()),
                line: error.span().map(|span| lines.at(span.start)),
                path: String::new(),
                detail: format!("not TOML: {}", error.message().replace('\n', ", ")),
            };
            return Err(errors.iter().map(mistake).collect());
        }
        Ok(Self {
            file: file.to_owned(),
            root: table(document.get_ref(), &|offset| Origin::Line(lines.at(offset))),
        })
    }

    /// Lays each `HIKYAKU__SECTION__KEY` over what the file says; its text is a TOML value where it
    /// parses as one, else a string. A number names an element: `HIKYAKU__ACCOUNTS__0__ID`.
    pub(crate) fn overlay<'e>(
        &mut self,
        environment: impl IntoIterator<Item = (&'e str, &'e str)>,
    ) -> Vec<Mistake> {
        let mut mistakes = Vec::new();
        for (variable, text) in environment {
            let Some(rest) = variable.strip_prefix(ENV_PREFIX) else {
                continue;
            };
            let keys: Vec<String> = rest.split("__").map(str::to_ascii_lowercase).collect();
            let item = environment_item(variable, text);
            if let Err(detail) = place(&mut self.root, &keys, item) {
                mistakes.push(Mistake {
                    file: None,
                    line: None,
                    path: variable.to_owned(),
                    detail,
                });
            }
        }
        mistakes
    }
}

fn environment_item(variable: &str, text: &str) -> Item {
    let origin = Origin::Env {
        variable: variable.to_owned(),
        text: text.to_owned(),
    };
    let typed = DeValue::parse(text)
        .ok()
        .map(|parsed| value(parsed.get_ref(), &|_| origin.clone()));
    Item {
        value: typed.unwrap_or_else(|| Value::String(text.to_owned())),
        origin,
    }
}

fn place(table: &mut Table, keys: &[String], item: Item) -> Result<(), String> {
    let (key, rest) = match keys.split_first() {
        Some((key, rest)) if !key.is_empty() => (key, rest),
        _ => return Err("names no key: write HIKYAKU__SECTION__KEY".to_owned()),
    };
    let Some((_, deeper)) = rest.split_first() else {
        table.insert(key.clone(), item);
        return Ok(());
    };
    let entry = table.entry(key.clone()).or_insert_with(|| Item {
        value: Value::Table(Table::new()),
        origin: item.origin.clone(),
    });
    match &mut entry.value {
        Value::Table(inner) => place(inner, rest, item),
        Value::Array(elements) => {
            let count = elements.len();
            let element = rest
                .first()
                .and_then(|index| index.parse::<usize>().ok())
                .and_then(|index| elements.get_mut(index));
            match element.map(|element| &mut element.value) {
                Some(Value::Table(inner)) => place(inner, deeper, item),
                _ => Err(format!(
                    "{key} has {count} elements: name one by its number, from 0"
                )),
            }
        }
        other => Err(format!("{key} is {}, not a section", other.kind())),
    }
}

fn table(from: &DeTable<'_>, origin: &dyn Fn(usize) -> Origin) -> Table {
    from.iter()
        .map(|(key, spanned)| {
            let item = Item {
                value: value(spanned.get_ref(), origin),
                // The key's own line: a table's span may start at its first value.
                origin: origin(key.span().start),
            };
            (key.get_ref().clone().into_owned(), item)
        })
        .collect()
}

fn array(from: &DeArray<'_>, origin: &dyn Fn(usize) -> Origin) -> Vec<Item> {
    from.iter()
        .map(|spanned| Item {
            value: value(spanned.get_ref(), origin),
            origin: origin(spanned.span().start),
        })
        .collect()
}

/// A number beyond 64 bits becomes text, so that the reader says what it expected instead.
fn value(from: &DeValue<'_>, origin: &dyn Fn(usize) -> Origin) -> Value {
    match from {
        DeValue::String(text) => Value::String(text.clone().into_owned()),
        DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix())
            .map_or_else(|_| Value::String(digits.to_string()), Value::Integer),
        DeValue::Float(_) => Value::Float,
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(_) => Value::Datetime,
        DeValue::Array(elements) => Value::Array(array(elements, origin)),
        DeValue::Table(inner) => Value::Table(table(inner, origin)),
    }
}

/// Offsets of the line starts of one text.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        let after_breaks = text.match_indices('\n').map(|(at, _)| at + 1);
        Self(std::iter::once(0).chain(after_breaks).collect())
    }

    fn at(&self, offset: usize) -> u32 {
        let line = self.0.partition_point(|start| *start <= offset);
        u32::try_from(line).unwrap_or(u32::MAX)
    }
}
