//! The typed reader: takes what was typed, key by key, and collects every mistake on the way.
//!
//! A section is read by asking for each of its keys with its type and default; what nobody asked for
//! is an unknown key. Reading never stops at a mistake: the key takes its default and the walk goes
//! on, so that one run reports everything.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::document::{FileConfig, Item, Mistake, Origin, Table, Value};

/// A type that can be read from one typed value.
pub(crate) trait Meant: Sized {
    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with the value, naming what was expected: `"10x" is not a duration (…)`.
    fn meant(item: &Item) -> Result<Self, String>;
}

/// A name that an operator gives: a key of a table whose keys are data.
pub(crate) trait Name: Ord + Sized {
    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with it.
    fn name(text: &str) -> Result<Self, String>;
}

/// One walk over one document.
pub(crate) struct Reader {
    file: PathBuf,
    root: Table,
    mistakes: RefCell<Vec<Mistake>>,
    /// Every key asked for, elements as `[]`, and whether it was typed: the schema, as it is read.
    asked: RefCell<BTreeMap<String, bool>>,
}

impl Reader {
    pub(crate) fn new(typed: FileConfig, mistakes: Vec<Mistake>) -> Self {
        Self {
            file: typed.file,
            root: typed.root,
            mistakes: RefCell::new(mistakes),
            asked: RefCell::default(),
        }
    }

    /// Reads the whole document with `read`.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        self.section(String::new(), Some(&self.root), read)
    }

    /// Ends the walk: mistakes in the order of the file, those of the environment last.
    pub(crate) fn finish(self) -> Vec<Mistake> {
        let mut mistakes = self.mistakes.into_inner();
        mistakes.sort_by_key(|mistake| mistake.line.unwrap_or(u32::MAX));
        mistakes
    }

    /// Every key asked for so far and whether it was typed.
    #[cfg(test)]
    pub(crate) fn asked(&self) -> BTreeMap<String, bool> {
        self.asked.borrow().clone()
    }

    fn section<'r, T>(
        &'r self,
        path: String,
        table: Option<&'r Table>,
        read: impl FnOnce(&mut Section<'r>) -> T,
    ) -> T {
        let mut section = Section {
            reader: self,
            path,
            table,
            keys: Vec::new(),
        };
        let meant = read(&mut section);
        section.refuse_unknown_keys();
        meant
    }

    fn mistake(&self, path: &str, origin: Option<&Origin>, detail: String) {
        let mistake = match origin {
            Some(Origin::Env { variable, .. }) => Mistake {
                file: None,
                line: None,
                path: variable.clone(),
                detail: format!("{path}: {detail}"),
            },
            Some(Origin::Line(line)) => Mistake {
                file: Some(self.file.clone()),
                line: Some(*line),
                path: path.to_owned(),
                detail,
            },
            None => Mistake {
                file: Some(self.file.clone()),
                line: None,
                path: path.to_owned(),
                detail,
            },
        };
        self.mistakes.borrow_mut().push(mistake);
    }
}

/// One table of the document, present or not.
pub(crate) struct Section<'r> {
    reader: &'r Reader,
    path: String,
    table: Option<&'r Table>,
    keys: Vec<&'static str>,
}

impl<'r> Section<'r> {
    /// The key, or `default` where it was not typed or is wrong.
    pub(crate) fn value<T: Meant>(&mut self, key: &'static str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    /// The key, if it was typed and is right.
    pub(crate) fn optional<T: Meant>(&mut self, key: &'static str) -> Option<T> {
        self.checked(key, |_| Ok(()))
    }

    /// The key, if it was typed, is right and passes `check`, which says what is wrong otherwise.
    pub(crate) fn checked<T: Meant>(
        &mut self,
        key: &'static str,
        check: impl FnOnce(&T) -> Result<(), String>,
    ) -> Option<T> {
        let item = self.item(key)?;
        let meant = T::meant(item).and_then(|meant| check(&meant).map(|()| meant));
        self.or_mistake(key, Some(item), meant)
    }

    /// The key turned into something else by `convert`, which says what is wrong otherwise.
    pub(crate) fn converted<T: Meant, U>(
        &mut self,
        key: &'static str,
        convert: impl FnOnce(T) -> Result<U, String>,
    ) -> Option<U> {
        let item = self.item(key)?;
        self.or_mistake(key, Some(item), T::meant(item).and_then(convert))
    }

    /// The key, which has to be there; where it is not, `placeholder` keeps the walk going.
    pub(crate) fn required<T: Meant>(&mut self, key: &'static str, placeholder: T) -> T {
        if self.item(key).is_none() {
            self.mistake(key, "is required".to_owned());
        }
        self.value(key, placeholder)
    }

    /// A list of values. One value alone is a list of one; from the environment, commas separate.
    pub(crate) fn list<T: Meant>(&mut self, key: &'static str) -> Option<Vec<T>> {
        let item = self.item(key)?;
        let alone;
        let elements = match (&item.value, &item.origin) {
            (Value::Array(elements), _) => elements.as_slice(),
            (Value::String(text), origin @ Origin::Env { .. }) => {
                alone = separated(text, origin);
                alone.as_slice()
            }
            _ => std::slice::from_ref(item),
        };
        let numbered = elements.iter().enumerate();
        Some(
            numbered
                .filter_map(|(index, element)| {
                    let path = format!("{key}[{index}]");
                    self.or_mistake(&path, Some(element), T::meant(element))
                })
                .collect(),
        )
    }

    /// A table below this one, read whether it was typed or not.
    pub(crate) fn table<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'r>) -> T,
    ) -> T {
        let table = match self.item(key).map(|item| (&item.value, item)) {
            Some((Value::Table(table), _)) => Some(table),
            Some((other, item)) => {
                let detail = format!("is {}, expected a table", other.kind());
                self.at(key, Some(item), detail);
                None
            }
            None => None,
        };
        self.reader.section(self.below(key), table, read)
    }

    /// An array of tables; a single table stands for an array of one.
    pub(crate) fn tables<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'r>) -> T,
    ) -> Vec<T> {
        let Some(item) = self.item(key) else {
            return Vec::new();
        };
        let elements = match &item.value {
            Value::Array(elements) => elements.as_slice(),
            _ => std::slice::from_ref(item),
        };
        let mut all = Vec::with_capacity(elements.len());
        for (index, element) in elements.iter().enumerate() {
            let path = format!("{key}[{index}]");
            match &element.value {
                Value::Table(table) => {
                    let whole = self.below(&path);
                    all.push(self.reader.section(whole, Some(table), &mut read));
                }
                other => {
                    let detail = format!("is {}, expected a table", other.kind());
                    self.at(&path, Some(element), detail);
                }
            }
        }
        all
    }

    /// Tables whose names are data, such as `[domain."slow.example"]`.
    pub(crate) fn named<K: Name, T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'r>) -> T,
    ) -> BTreeMap<K, T> {
        let reader = self.reader;
        self.entries_with(key, |path, item| match &item.value {
            Value::Table(table) => Ok(reader.section(path, Some(table), &mut read)),
            other => Err(format!("is {}, expected a table", other.kind())),
        })
    }

    /// Values whose names are data, such as the routes of `[mx]`.
    pub(crate) fn entries<K: Name, T: Meant>(&mut self, key: &'static str) -> BTreeMap<K, T> {
        self.entries_with(key, |_, item| T::meant(item))
    }

    fn entries_with<K: Name, T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(String, &'r Item) -> Result<T, String>,
    ) -> BTreeMap<K, T> {
        let mut all = BTreeMap::new();
        let Some(item) = self.item(key) else {
            return all;
        };
        let Value::Table(table) = &item.value else {
            let detail = format!("is {}, expected a table", item.value.kind());
            self.at(key, Some(item), detail);
            return all;
        };
        for (name, item) in table {
            let path = format!("{key}.{}", shown(name));
            let known = self.or_mistake(&path, Some(item), K::name(name));
            let meant = read(self.below(&path), item);
            let Some(meant) = self.or_mistake(&path, Some(item), meant) else {
                continue;
            };
            if let Some(known) = known
                && all.insert(known, meant).is_some()
            {
                self.at(
                    &path,
                    Some(item),
                    "stands here twice, written differently".to_owned(),
                );
            }
        }
        all
    }

    /// Reports a mistake of `key`, at its line if it was typed and at the section's otherwise.
    ///
    /// `key` may reach deeper: `keys[1].name`.
    pub(crate) fn mistake(&self, key: &str, detail: String) {
        let item = self.table.and_then(|table| find(table, key));
        self.at(key, item, detail);
    }

    /// The directory that files to be read are relative to.
    pub(crate) fn directory(&self) -> &'r Path {
        self.reader.file.parent().unwrap_or(Path::new(""))
    }

    /// Whether `key` was typed.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// The line of the file at which `key` was typed.
    pub(crate) fn line(&self, key: &str) -> Option<u32> {
        match self.table?.get(key)?.origin {
            Origin::Line(line) => Some(line),
            Origin::Env { .. } => None,
        }
    }

    /// Whether `key` was typed as an array with nothing in it.
    pub(crate) fn is_empty_list(&self, key: &str) -> bool {
        let item = self.table.and_then(|table| table.get(key));
        item.is_some_and(|item| matches!(&item.value, Value::Array(all) if all.is_empty()))
    }

    fn item(&mut self, key: &'static str) -> Option<&'r Item> {
        if !self.keys.contains(&key) {
            self.keys.push(key);
        }
        let item = self.table.and_then(|table| table.get(key));
        let schema_path = without_numbers(&self.below(key));
        let mut asked = self.reader.asked.borrow_mut();
        *asked.entry(schema_path).or_default() |= item.is_some();
        item
    }

    fn below(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn or_mistake<T>(&self, key: &str, item: Option<&Item>, meant: Result<T, String>) -> Option<T> {
        match meant {
            Ok(meant) => Some(meant),
            Err(detail) => {
                self.at(key, item, detail);
                None
            }
        }
    }

    fn at(&self, key: &str, item: Option<&Item>, detail: String) {
        // A key that is missing is reported at the first thing its section holds.
        let origin = item.map(|item| &item.origin).or_else(|| {
            let neighbours = self.table.into_iter().flat_map(Table::values);
            let lines = neighbours.filter(|item| matches!(item.origin, Origin::Line(_)));
            lines
                .map(|item| &item.origin)
                .min_by_key(|origin| match origin {
                    Origin::Line(line) => *line,
                    Origin::Env { .. } => u32::MAX,
                })
        });
        self.reader.mistake(&self.below(key), origin, detail);
    }

    fn refuse_unknown_keys(&self) {
        for (key, item) in self.table.into_iter().flatten() {
            if self.keys.contains(&key.as_str()) {
                continue;
            }
            let near = self
                .keys
                .iter()
                .map(|known| (strsim::damerau_levenshtein(key, known), known))
                .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
                .min();
            let detail = match near {
                Some((_, known)) => format!("unknown key; did you mean `{known}`?"),
                None => format!("unknown key; known here: {}", self.keys.join(", ")),
            };
            self.at(&shown(key), Some(item), detail);
        }
    }
}

/// The item at a path such as `keys[1].name`, as far as it goes.
fn find<'r>(table: &'r Table, path: &str) -> Option<&'r Item> {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    let (key, index) = first.split_once('[').unwrap_or((first, ""));
    let mut item = table.get(key)?;
    if let Some(index) = index.strip_suffix(']')
        && let Value::Array(elements) = &item.value
    {
        item = elements.get(index.parse::<usize>().ok()?)?;
    }
    match &item.value {
        Value::Table(inner) if !rest.is_empty() => find(inner, rest).or(Some(item)),
        _ => Some(item),
    }
}

/// A key as it would have to be typed: bare where TOML allows that, else quoted and escaped.
fn shown(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !key.is_empty() && key.chars().all(bare) {
        key.to_owned()
    } else {
        format!("{key:?}")
    }
}

fn separated(text: &str, origin: &Origin) -> Vec<Item> {
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts
        .map(|part| Item {
            value: Value::String(part.to_owned()),
            // The text of the whole variable would be read instead of the part.
            origin: match origin {
                Origin::Env { variable, .. } => Origin::Env {
                    variable: variable.clone(),
                    text: part.to_owned(),
                },
                Origin::Line(line) => Origin::Line(*line),
            },
        })
        .collect()
}

fn without_numbers(path: &str) -> String {
    let mut schema = String::with_capacity(path.len());
    let mut inside = false;
    for c in path.chars() {
        inside = inside && c != ']';
        if !inside {
            schema.push(c);
        }
        inside = inside || c == '[';
    }
    schema
}
