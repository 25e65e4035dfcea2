//! What a reply means, by the rules in force.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use model::units::format_duration;
use model::{Blame, Class, SuppressionReason};
use serde::Serialize;
use smtp::Reply;

use super::Api;
use super::auth::CanRead;
use super::params::NoParams;
use super::problem::{Answer, Code, Refusal};
use crate::classify::{Classification, Peer, Signal, parse_reply};
use crate::intake::fields::{Mistakes, string};

/// The longest reply that is taken, in bytes: as much as is read of one on the wire.
const REPLY_MAX: usize = 64 * 1024;
/// The longest name of a host or provider.
const NAME_MAX: usize = 255;

/// `POST /v1/classify`
#[derive(Serialize)]
pub(super) struct Reading {
    class: Class,
    blame: Blame,
    action: &'static str,
    scope: &'static str,
    /// `slow`, `fewer_messages`, `block` or none.
    signal: Option<&'static str>,
    /// How long a `block` holds, as the peer says, else as the rule does.
    pause: Option<String>,
    /// The reason with which the address would be suppressed.
    suppress: Option<SuppressionReason>,
    /// When to come back at the earliest.
    retry_after: Option<String>,
    /// None when the codes alone decided.
    rule: Option<Arc<str>>,
    rules_version: Arc<str>,
}

impl From<Classification> for Reading {
    fn from(read: Classification) -> Self {
        let pause = match read.signal {
            Some(Signal::Block { pause }) => pause,
            Some(Signal::Slow | Signal::FewerMessages) | None => None,
        };
        Self {
            class: read.class,
            blame: read.blame,
            action: read.action.as_str(),
            scope: read.scope.as_str(),
            signal: read.signal.map(Signal::as_str),
            pause: pause.map(format_duration),
            suppress: read.suppress,
            retry_after: read.retry_after.map(format_duration),
            rule: read.rule,
            rules_version: read.rules_version,
        }
    }
}

pub(super) async fn classify(
    State(api): State<Arc<Api>>,
    CanRead(_caller): CanRead,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Reading>> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let reply = fields.required("reply", |value| refusal(&string(value)?));
    let host = fields.label("host", NAME_MAX).unwrap_or_default();
    let provider = fields.label("provider", NAME_MAX).unwrap_or_default();
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
    let peer = Peer {
        host: &host,
        destination: &provider,
    };
    Ok(Json(api.rules.load().classify(&reply, peer).into()))
}

fn refusal(text: &str) -> Result<Reply, String> {
    if text.len() > REPLY_MAX {
        return Err(format!("is longer than {REPLY_MAX} bytes"));
    }
    parse_reply(text).ok_or_else(|| "is not a reply such as \"550 5.1.1 No such user\"".to_owned())
}
