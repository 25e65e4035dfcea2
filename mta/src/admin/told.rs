//! What callers tell us: replies, complaints and conversions; a binding undone; history judged anew.
//!
//! A call with an `id` takes effect once however often it is made. Must not apply anything to a
//! person: the job of engagement does, from the event.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use engagement::identity::Binding;
use engagement::prospect::Prospect;
use model::{
    About, Complaint, EventKind, EventRecipient, Fact, JournalId, MessageId, Reply, Timestamp,
    VisitorId,
};
use serde::Serialize;
use serde_json::{Value, json};
use store::{Announcement, MessageStory, Note, Shipment};

use super::Api;
use super::auth::{Caller, CanAdmin, CanSubmit};
use super::params::{NoParams, Segment};
use super::problem::{Answer, Code, Refusal};
use crate::intake::fields::Mistakes;
use crate::jobs::engagement::{BINDINGS, NOTES, PROSPECTS, RECLASSIFY, kind_of, revocation};

/// How long a call is known by its `id`.
const TOLD_KEPT: Duration = Duration::from_secs(7 * 86_400);
/// The most of `data`, as JSON.
const DATA: usize = 8 << 10;

/// `POST /v1/events`
#[derive(Debug)]
struct Told {
    kind: EventKind,
    message: Option<MessageId>,
    prospect: Option<String>,
    data: Value,
    id: Option<String>,
}

/// What was taken.
#[derive(Debug, Serialize)]
pub(super) struct Taken {
    id: String,
}

fn read(body: Result<Bytes, BytesRejection>) -> Answer<Told> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let kind = fields.required("type", |value| match value.as_str() {
        Some("email.replied") => Ok(EventKind::EmailReplied),
        Some("conversion") => Ok(EventKind::Conversion),
        Some("email.complained") => Ok(EventKind::EmailComplained),
        _ => Err("is none of email.replied, email.complained, conversion".to_owned()),
    });
    let told = Told {
        kind: kind.unwrap_or(EventKind::Conversion),
        message: fields.parsed("message_id"),
        prospect: fields.label("prospect_id", 255),
        data: fields
            .object("data")
            .map_or_else(|| json!({}), Value::Object),
        id: fields.label("id", 255),
    };
    if told.message.is_none() && told.prospect.is_none() && !fields.has("message_id") {
        fields.mistake("message_id", "or prospect_id has to say whose it is");
    } else if told.kind == EventKind::EmailComplained
        && told.message.is_none()
        && !fields.has("message_id")
    {
        fields.mistake("message_id", "has to say which mail was complained about");
    }
    if told.data.to_string().len() > DATA {
        fields.mistake("data", format!("has more than {DATA} bytes"));
    }
    fields.finish();
    if mistakes.is_empty() {
        Ok(told)
    } else {
        Err(Refusal::of_mistakes(mistakes.into_vec()))
    }
}

pub(super) async fn tell(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<(StatusCode, Json<Taken>)> {
    let told = read(body)?;
    let story = match told.message {
        None => None,
        Some(id) => Some(message(&api, &caller, id).await?),
    };
    let id = match &told.id {
        Some(id) => id.clone(),
        None => fresh_id()?,
    };
    let taken = (StatusCode::ACCEPTED, Json(Taken { id: id.clone() }));
    if let Some(message) = told.message
        && let Some(fact) = fact_of(&told, message, api.clock.now())
    {
        ship(&api, &caller, &id, fact).await?;
        return Ok(taken);
    }
    // One at a time, so that the same call made twice at once is one.
    let _turn = turn(&api).await?;
    let now = api.clock.now();
    let kind = kind_of("told", &caller.account);
    if api.store.note(&kind, &id, now).await?.is_some() {
        return Ok(taken);
    }
    let known = Note {
        kind,
        key: id.into(),
        value: b"1".as_slice().into(),
        expires_at: Some(now + TOLD_KEPT),
    };
    let about = about(&api, &caller, &told, story, now).await?;
    let news = Announcement {
        kind: told.kind,
        account: (*caller.account).into(),
        data: told.data.into(),
        about,
    };
    api.store.derive(vec![known], vec![news], now).await?;
    Ok(taken)
}

/// One at a time; freed on drop.
pub(super) async fn turn(api: &Api) -> Answer<tokio::sync::SemaphorePermit<'_>> {
    let turn = api.telling.acquire().await;
    turn.map_err(|error| Refusal::internal("telling", &error))
}

async fn message(api: &Api, caller: &Caller, id: MessageId) -> Answer<MessageStory> {
    let story = api.store.message(id).await?;
    story
        .filter(|story| *story.batch.account == *caller.account)
        .ok_or_else(|| {
            Refusal::at(
                Code::InvalidField,
                "/message_id",
                "names no message of the account",
            )
        })
}

/// The fact of its message that is told; none: what is told is none.
fn fact_of(told: &Told, message: MessageId, at: Timestamp) -> Option<Fact> {
    let data = told.data.to_string().into();
    match told.kind {
        EventKind::EmailReplied => Some(Fact::Reply(Box::new(Reply { message, at, data }))),
        EventKind::EmailComplained => {
            Some(Fact::Complaint(Box::new(Complaint { message, at, data })))
        }
        _ => None,
    }
}

/// Hands in a fact. Its journal is named after the call, so the store takes it once however often it
/// is told.
async fn ship(api: &Api, caller: &Caller, id: &str, fact: Fact) -> Answer<()> {
    let named = format!("told\0{}\0{id}", caller.account);
    let hash = digest::digest(&digest::SHA256, named.as_bytes());
    let mut journal = [0; 16];
    journal
        .iter_mut()
        .zip(hash.as_ref())
        .for_each(|(to, from)| *to = *from);
    let now = api.clock.now();
    let shipment = Shipment {
        journal: JournalId::from_bytes(journal),
        facts: vec![(1, fact)],
        through: 1,
        windows: Vec::new(),
        finished: Vec::new(),
        now,
    };
    api.store.ship(shipment).await?;
    Ok(())
}

/// Whom the event is about.
async fn about(
    api: &Api,
    caller: &Caller,
    told: &Told,
    story: Option<MessageStory>,
    now: Timestamp,
) -> Answer<About> {
    if let Some(story) = story {
        let (batch, row) = (&story.batch, &story.recipient.row);
        return Ok(About {
            campaign: batch.campaign.clone(),
            batch_id: Some(batch.id),
            message_id: told.message,
            recipient: Some(EventRecipient {
                email: row.email.to_string(),
                prospect_id: row.prospect_id.as_deref().map(str::to_owned),
            }),
            metadata: batch.metadata.clone(),
            variant: story.recipient.variant.as_deref().map(str::to_owned),
            ..About::default()
        });
    }
    let key = told.prospect.as_deref().unwrap_or_default();
    let kind = kind_of(PROSPECTS, &caller.account);
    let known = api.store.note(&kind, key, now).await?;
    let known = known.and_then(|note| Prospect::from_bytes(&note.value));
    Ok(About {
        recipient: Some(EventRecipient {
            email: known.map(|person| person.email.into()).unwrap_or_default(),
            prospect_id: told.prospect.clone(),
        }),
        ..About::default()
    })
}

fn fresh_id() -> Answer<String> {
    let mut random = [0; 16];
    aws_lc_rs::rand::fill(&mut random).map_err(|error| Refusal::internal("random", &error))?;
    Ok(uuid::Builder::from_random_bytes(random)
        .into_uuid()
        .to_string())
}

/// A binding as it is shown.
#[derive(Debug, Serialize)]
pub(super) struct BindingView {
    id: String,
    binding_id: String,
    visitor: VisitorId,
    cookie: VisitorId,
    prospect_id: String,
    bound_at: Timestamp,
    message_id: MessageId,
    event_id: String,
    forward_suspected: bool,
    revoked_at: Option<Timestamp>,
}

impl BindingView {
    fn of(id: String, binding: Binding) -> Self {
        Self {
            binding_id: id.clone(),
            id,
            visitor: binding.visitor,
            cookie: binding.cookie,
            prospect_id: binding.prospect.into(),
            bound_at: binding.at,
            message_id: binding.message,
            event_id: binding.event_id.into(),
            forward_suspected: binding.forward_suspected,
            revoked_at: binding.revoked_at,
        }
    }
}

/// `POST /v1/bindings/{id}/revoke`
pub(super) async fn revoke(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<BindingView>> {
    let kind = kind_of(BINDINGS, &caller.account);
    let _turn = turn(&api).await?;
    let now = api.clock.now();
    let note = api.store.note(&kind, &id, now).await?;
    let binding = note.and_then(|note| Binding::from_bytes(&note.value));
    let binding = binding.ok_or_else(|| Refusal::not_found("binding"))?;
    if binding.revoked_at.is_some() {
        return Ok(Json(BindingView::of(id, binding)));
    }
    let (binding, note, news) = undone(&caller.account, &id, binding, "api", now);
    api.store.derive(vec![note], vec![news], now).await?;
    Ok(Json(BindingView::of(id, binding)))
}

/// A binding that is undone, its note, and what is told of it.
pub(super) fn undone(
    account: &str,
    id: &str,
    binding: Binding,
    reason: &str,
    now: Timestamp,
) -> (Binding, Note, Announcement) {
    let named = *binding.prospect != *binding.email;
    let recipient = EventRecipient {
        email: binding.email.to_string(),
        prospect_id: named.then(|| binding.prospect.to_string()),
    };
    let (binding, news) = revocation(account, id, binding, recipient, reason, now);
    let note = Note {
        kind: kind_of(BINDINGS, account),
        key: id.into(),
        value: binding.to_bytes().into(),
        expires_at: None,
    };
    (binding, note, news)
}

/// `POST /v1/reclassify`
pub(super) async fn reclassify(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    _: NoParams,
) -> Answer<(StatusCode, Json<Value>)> {
    let note = Note {
        kind: NOTES.into(),
        key: RECLASSIFY.into(),
        value: caller.name.as_bytes().into(),
        expires_at: None,
    };
    api.store.put_notes(vec![note], api.clock.now()).await?;
    let rules = api.engagement.load().version;
    Ok((StatusCode::ACCEPTED, Json(json!({ "rules": rules }))))
}
