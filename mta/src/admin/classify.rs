//! What a reply means, by the rules in force.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use model::{Blame, Class};
use serde::Serialize;

use super::Api;
use super::auth::CanRead;
use super::params::NoParams;
use super::problem::{Answer, Code, Refusal};
use crate::classify::{Peer, parse_reply};
use crate::intake::fields::{Mistakes, string};

/// `POST /v1/classify`
#[derive(Serialize)]
pub(super) struct Reading {
    class: Class,
    blame: Blame,
    action: &'static str,
    rule: Option<Arc<str>>,
}

pub(super) async fn classify(
    State(api): State<Arc<Api>>,
    CanRead(_caller): CanRead,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Reading>> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let reply = fields.required("reply", |value| {
        let reply = parse_reply(&string(value)?);
        reply.ok_or_else(|| "is not a reply such as \"550 5.1.1 No such user\"".to_owned())
    });
    fields.finish();
    let Some(reply) = reply.filter(|_| mistakes.is_empty()) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    // A reply that accepts has nothing to classify.
    if reply.code < 400 {
        return Err(Refusal::at(
            Code::InvalidField,
            "/reply",
            "is not a refusal: codes 400 to 599 are",
        ));
    }
    let read = api.rules.load().classify(&reply, Peer::default());
    Ok(Json(Reading {
        class: read.class,
        blame: read.blame,
        action: read.action.as_str(),
        rule: read.rule,
    }))
}
