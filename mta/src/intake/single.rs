//! A message for one person: a batch of one, whose recipient stands in `to`.
//!
//! Owns the difference between the two documents, and the names of places in them. Everything else
//! is as for a batch.

use model::{BatchId, BatchState, MessageId};
use serde::Serialize;
use serde_json::Value;

use super::fields::{Mistakes, Strict};
use super::receive::Received;
use super::recipients::{malformed, reason};
use super::row::Rejection;
use super::splitter::{Head, Position, Rows as _};
use crate::admin::problem::{Answer, Code, Refusal};

/// Where the recipient of a batch of one stands, and where the caller wrote it.
const PLACES: [&str; 2] = ["/recipients/0", "/to"];

/// The answer (contract, section 3).
#[derive(Debug, Serialize)]
pub(crate) struct Taken {
    pub(crate) id: BatchId,
    pub(crate) message_id: MessageId,
    pub(crate) state: BatchState,
}

impl Taken {
    pub(crate) fn new(id: BatchId, state: BatchState) -> Self {
        Self {
            id,
            message_id: MessageId {
                batch: id,
                index: 0,
            },
            state,
        }
    }
}

/// Takes the recipient out of `to`, so that the document is that of a batch.
///
/// # Errors
/// When it is not JSON, or is not about one person.
pub(crate) fn taken_apart(mut received: Received) -> Answer<Received> {
    let parsed: Result<Strict, _> = serde_json::from_slice(&received.head.json);
    let Strict(mut document) = parsed.map_err(|error| {
        let at = received.head.position(&error);
        malformed("", at, &reason(&error))
    })?;
    let mut mistakes = Mistakes::default();
    let to = document.as_object_mut().and_then(|fields| {
        if fields.remove("recipients").is_some() {
            let detail = "there is no such field; a message is for the one in `to`";
            mistakes.add("/recipients".to_owned(), Code::UnknownField, detail);
        }
        fields.remove("to")
    });
    let to = to.unwrap_or_default();
    if to.is_null() {
        mistakes.add("/to".to_owned(), Code::InvalidField, "is missing");
    }
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    let at = Position { offset: 0, line: 1 };
    received.spool.begin(at);
    received.spool.push(&bytes(&to)?);
    received.spool.end();
    received.head = Head::apart(bytes(&document)?, at);
    Ok(received)
}

fn bytes(value: &Value) -> Answer<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Refusal::internal("message", &error))
}

/// What is wrong with the one recipient is wrong with the call.
pub(crate) fn rejected(rejection: &Rejection) -> Refusal {
    let (path, detail) = rejection
        .detail
        .split_once(' ')
        .unwrap_or((PLACES[0], &rejection.detail));
    Refusal::at(Code::InvalidField, path, detail)
}

/// The refusal in the words of the caller's document.
pub(crate) fn as_written(refusal: Refusal) -> Refusal {
    if refusal.0.errors().is_empty() {
        return refusal;
    }
    let errors = refusal.0.errors().iter().cloned().map(|mut error| {
        if let Some(rest) = error.path.strip_prefix(PLACES[0]) {
            error.path = format!("{}{rest}", PLACES[1]);
        }
        error
    });
    Refusal::of_mistakes(errors.collect())
}
