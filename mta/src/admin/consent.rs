//! What one person lets be kept of them: said, read, lifted.
//!
//! Owns the calls. Must not say what follows for a hit or a message: the store does, with its shipments
//! and leases.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use engagement::identity::Binding;
use engagement::prospect::Prospect;
use model::{Timestamp, TrackingMode};
use serde::Serialize;
use store::Consent;

use super::Api;
use super::auth::{CanRead, CanSubmit};
use super::params::{NoParams, Segment};
use super::problem::{Answer, Refusal};
use super::suppressions::address;
use super::told::{turn, undone};
use crate::intake::fields::Mistakes;
use crate::jobs::engagement::{BINDINGS, PROSPECTS, kind_of, normalised};

/// What a person said.
#[derive(Debug, Serialize)]
pub(super) struct Said {
    mode: TrackingMode,
    since: Timestamp,
}

impl From<Consent> for Said {
    fn from(of: Consent) -> Self {
        Self {
            mode: of.mode,
            since: of.since,
        }
    }
}

/// What a person said, by itself.
#[derive(Debug, Serialize)]
pub(super) struct SaidView {
    email: String,
    account: String,
    #[serde(flatten)]
    said: Said,
}

/// `GET /v1/tracking/{email}`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(email): Segment,
    _: NoParams,
) -> Answer<Json<SaidView>> {
    let email = address(&email)?;
    let found = api.store.consent(&caller.account, &email).await?;
    let consent = found.ok_or_else(|| Refusal::not_found("tracking mode of the address"))?;
    Ok(Json(SaidView {
        email,
        account: caller.account.to_string(),
        said: consent.into(),
    }))
}

/// `PUT /v1/tracking/{email}`
pub(super) async fn put(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(email): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<SaidView>> {
    let email = address(&email)?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let mode: Option<TrackingMode> = fields.required("mode", |value| {
        let word = crate::intake::fields::string(value)?;
        word.parse().map_err(|error| format!("{error}"))
    });
    fields.finish();
    let Some(mode) = mode.filter(|_| mistakes.is_empty()) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let (account, now) = (&*caller.account, api.clock.now());
    let (store, consent) = (&api.store, Consent { mode, since: now });
    store.set_consent(account, &email, Some(mode), now).await?;
    if mode < TrackingMode::Individual {
        unbind(&api, account, &email, now).await?;
    }
    Ok(Json(SaidView {
        email,
        account: account.to_owned(),
        said: consent.into(),
    }))
}

/// The browsers that were known as the person's are so no more: what they see next is not theirs.
async fn unbind(api: &Api, account: &str, email: &str, now: Timestamp) -> Answer<()> {
    let messages = api.store.address(account, email).await?.messages;
    let mut names: BTreeSet<Box<str>> = BTreeSet::from([email.into()]);
    names.extend(
        messages
            .into_iter()
            .filter_map(|(_, row)| row.row.prospect_id),
    );
    let _turn = turn(api).await?;
    let (mut notes, mut news) = (Vec::new(), Vec::new());
    let names = names.into_iter().collect();
    let kind = kind_of(PROSPECTS, account);
    for person in api.store.notes_by_key(&kind, names, now).await? {
        let person = Prospect::from_bytes(&person.value);
        let visitors = person.iter().flat_map(|person| &person.visitors);
        let ids = visitors
            .map(|seen| seen.binding.to_string().into())
            .collect();
        let kind = kind_of(BINDINGS, account);
        for note in api.store.notes_by_key(&kind, ids, now).await? {
            // One name may stand for several addresses.
            let binding = Binding::from_bytes(&note.value);
            let theirs = binding.filter(|of| *normalised(&of.email) == *email);
            let Some(binding) = theirs.filter(|of| of.revoked_at.is_none()) else {
                continue;
            };
            let (_, note, told) = undone(account, &note.key, binding, "consent", now);
            notes.push(note);
            news.push(told);
        }
    }
    Ok(api.store.derive(notes, news, now).await?)
}

/// `DELETE /v1/tracking/{email}`
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(email): Segment,
    _: NoParams,
) -> Answer<StatusCode> {
    let email = address(&email)?;
    let (account, now) = (&*caller.account, api.clock.now());
    api.store.set_consent(account, &email, None, now).await?;
    Ok(StatusCode::NO_CONTENT)
}
