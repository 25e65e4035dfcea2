//! Query parameters and ids in paths.
//!
//! Owns how they are read: unknown parameters are refused by name, like unknown fields; all
//! mistakes at once.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use model::BatchId;
use service::http::ProblemError;

use super::problem::{Answer, Code, Refusal, mistake};
use crate::intake::fields::pointer_step;

/// The most items in a page.
pub(crate) const PAGE_MAX: u32 = 1_000;
/// The items in a page when the caller does not say.
pub(crate) const PAGE: u32 = 100;

/// The parameters of one call.
#[derive(Debug)]
pub(crate) struct Params {
    pairs: Vec<(String, String)>,
    mistakes: Vec<ProblemError>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Infallible> {
        let query = Query::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        Ok(match query {
            Ok(Query(pairs)) => Self {
                pairs,
                mistakes: Vec::new(),
            },
            Err(_) => Self {
                pairs: Vec::new(),
                mistakes: vec![mistake("", Code::InvalidField, "the query cannot be read")],
            },
        })
    }
}

impl Params {
    /// The parameter's text; empty is as if it were not there.
    pub(crate) fn text(&mut self, name: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(known, _)| known == name)?;
        Some(self.pairs.remove(at).1).filter(|text| !text.is_empty())
    }

    /// A parameter that `read` takes.
    pub(crate) fn read<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(name)?;
        read(&text)
            .map_err(|detail| self.mistake(name, detail))
            .ok()
    }

    /// A parameter that means something only with a value: left empty it is a mistake, where
    /// overlooking it would do more than was asked for.
    pub(crate) fn filled(&mut self, name: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(known, _)| known == name)?;
        let text = self.pairs.remove(at).1;
        if text.is_empty() {
            self.mistake(name, "has no value");
            return None;
        }
        Some(text)
    }

    /// `true` or `false`, and nothing else.
    pub(crate) fn flag(&mut self, name: &str) -> Option<bool> {
        let text = self.filled(name)?;
        let flag = text.parse();
        flag.map_err(|_| self.mistake(name, "is neither true nor false"))
            .ok()
    }

    /// A parameter that parses.
    pub(crate) fn parsed<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Option<T> {
        self.read(name, |text| {
            text.parse().map_err(|error: T::Err| error.to_string())
        })
    }

    /// How many items: `limit`, between 1 and [`PAGE_MAX`].
    pub(crate) fn limit(&mut self) -> u32 {
        let limit = self.read("limit", |text| match text.parse() {
            Ok(limit @ 1..=PAGE_MAX) => Ok(limit),
            _ => Err(format!("is not a number from 1 to {PAGE_MAX}")),
        });
        limit.unwrap_or(PAGE)
    }

    pub(crate) fn mistake(&mut self, name: &str, detail: impl Into<String>) {
        let path = format!("/{name}");
        self.mistakes
            .push(mistake(path, Code::InvalidField, detail));
    }

    /// No other parameter exists.
    ///
    /// # Errors
    /// Every mistake in the query.
    pub(crate) fn finish(mut self) -> Answer<()> {
        for (name, _) in &self.pairs {
            let path = format!("/{}", pointer_step(name));
            let detail = "there is no such parameter, or it stands there twice";
            self.mistakes
                .push(mistake(path, Code::UnknownField, detail));
        }
        if self.mistakes.is_empty() {
            Ok(())
        } else {
            Err(Refusal::of_mistakes(self.mistakes))
        }
    }
}

/// Calls without parameters: any is refused by name.
#[derive(Debug)]
pub(crate) struct NoParams;

impl<S: Send + Sync> FromRequestParts<S> for NoParams {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let params = Params::from_request_parts(parts, state).await;
        let Ok(params) = params;
        params.finish()?;
        Ok(Self)
    }
}

/// The one variable segment of a path, decoded.
#[derive(Debug)]
pub(crate) struct Segment(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let segment = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = segment.map_err(|_| Refusal::not_found("path"))?;
        Ok(Self(text))
    }
}

/// Reads a batch id out of a path; what is none names no batch.
pub(crate) fn batch_id(text: &str) -> Answer<BatchId> {
    text.parse().map_err(|_| Refusal::not_found("batch"))
}
