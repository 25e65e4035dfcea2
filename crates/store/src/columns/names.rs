//! Who the recipients of a lot are: what signs say of them, read without the rest of their rows.
//!
//! Hits come for a few recipients of each of many lots, and a row is made of many pieces. Here the
//! columns that are wanted stay in one piece each, a tenth of the memory and time. Must not change
//! what is stored.

use super::{RowColumn, RowColumns};
use model::Row;
use serde::Deserialize;

/// [`super::Texts`] in the bytes that they were read from.
#[derive(Deserialize)]
pub(crate) struct TextsRef<'a> {
    #[serde(borrow)]
    shared: &'a [u8],
    own: Vec<u32>,
    #[serde(borrow)]
    text: &'a str,
}

impl<'a> TextsRef<'a> {
    fn walk(&self) -> Walk<'_, 'a> {
        Walk {
            lengths: self.shared.iter().zip(&self.own),
            rest: self.text,
            text: String::new(),
        }
    }
}

/// Goes from text to text.
struct Walk<'s, 'a> {
    lengths: std::iter::Zip<std::slice::Iter<'a, u8>, std::slice::Iter<'s, u32>>,
    rest: &'a str,
    text: String,
}

impl Walk<'_, '_> {
    /// The next text, if it is there; `None` where the column is damaged, and after the last.
    fn step(&mut self) -> Option<Option<&str>> {
        let (shared, own) = self.lengths.next()?;
        let Some(own) = own.checked_sub(1) else {
            return Some(None);
        };
        let (own, rest) = self.rest.split_at_checked(usize::try_from(own).ok()?)?;
        self.rest = rest;
        if !self.text.is_char_boundary(usize::from(*shared)) {
            return None;
        }
        self.text.truncate(usize::from(*shared));
        self.text.push_str(own);
        Some(Some(&self.text))
    }
}

/// Texts in one piece.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Strings {
    text: String,
    /// Where each ends, and whether it is there.
    ends: Vec<(u32, bool)>,
}

impl Strings {
    /// `None` when it is longer than a number says.
    fn push<const N: usize>(&mut self, parts: Option<[&str; N]>) -> Option<()> {
        let is_there = parts.is_some();
        for part in parts.iter().flatten() {
            self.text.push_str(part);
        }
        let end = u32::try_from(self.text.len()).ok()?;
        self.ends.push((end, is_there));
        Some(())
    }

    fn one(&self, at: usize) -> Option<&str> {
        let (end, is_there) = *self.ends.get(at)?;
        let before = at.checked_sub(1).and_then(|before| self.ends.get(before));
        let start = before.map_or(0, |(end, _)| *end);
        let (start, end) = (usize::try_from(start).ok()?, usize::try_from(end).ok()?);
        self.text.get(start..end).filter(|_| is_there)
    }

    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.ends)
    }
}

/// Who a recipient is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Named<'a> {
    pub(crate) index: u32,
    pub(crate) email: &'a str,
    pub(crate) prospect_id: Option<&'a str>,
    /// JSON.
    pub(crate) metadata: Option<&'a str>,
}

impl<'a> From<&'a Row> for Named<'a> {
    fn from(row: &'a Row) -> Self {
        Self {
            index: row.index,
            email: row.email.as_str(),
            prospect_id: row.prospect_id.as_deref(),
            metadata: row.metadata.as_deref(),
        }
    }
}

/// Who the recipients of a lot are, by position.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Names {
    index: Vec<u32>,
    email: Strings,
    /// Empty when nobody has one.
    prospect_id: Strings,
    metadata: Strings,
}

impl Names {
    /// The one at a position.
    pub(crate) fn one(&self, position: u16) -> Option<Named<'_>> {
        let at = usize::from(position);
        Some(Named {
            index: *self.index.get(at)?,
            email: self.email.one(at)?,
            prospect_id: self.prospect_id.one(at),
            metadata: self.metadata.one(at),
        })
    }

    /// The memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        let texts = [&self.email, &self.prospect_id, &self.metadata];
        size_of_val(&*self.index) + texts.map(Strings::bytes).iter().sum::<usize>()
    }

    /// Those of whole rows; `None` when their texts are longer than a number says.
    pub(crate) fn of(rows: &[Row]) -> Option<Self> {
        let mut names = Self::default();
        for row in rows {
            let of = Named::from(row);
            names.index.push(of.index);
            names.email.push(Some([of.email]))?;
            names.prospect_id.push(of.prospect_id.map(|text| [text]))?;
            names.metadata.push(of.metadata.map(|text| [text]))?;
        }
        Some(names)
    }
}

impl RowColumns<TextsRef<'_>> {
    /// `None` when the columns do not fit together.
    pub(crate) fn names(self) -> Option<Names> {
        let mut names = Names::default();
        let (mut local_part, mut domain) = (self.local_part.walk(), self.domain.walk());
        for index in self.index.numbers() {
            names.index.push(u32::try_from(index).ok()?);
            let (local_part, domain) = (local_part.step()??, domain.step()??);
            names.email.push(Some([local_part, "@", domain]))?;
        }
        for column in &self.more {
            let (texts, to) = match column {
                RowColumn::ProspectId(texts) => (texts, &mut names.prospect_id),
                RowColumn::Metadata(texts) => (texts, &mut names.metadata),
                RowColumn::Name(_)
                | RowColumn::Vars(_)
                | RowColumn::Tracking(_)
                | RowColumn::TimeZone(_) => continue,
            };
            let mut texts = texts.walk();
            for _ in &names.index {
                to.push(texts.step()?.map(|text| [text]))?;
            }
        }
        Some(names)
    }
}
