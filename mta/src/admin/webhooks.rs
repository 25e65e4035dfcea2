//! Webhooks of an account: where its events are pushed to.
//!
//! A webhook shows its events to whoever made it, so that changing one takes the right to read as
//! well as to steer. The secret is shown once, to whoever made it.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use ipnet::IpNet;
use model::{EventKind, Timestamp, WebhookId};
use serde::Serialize;
use serde_json::Value;
use service::config::Scope;

use super::auth::{Caller, CanRead, CanSubmit};
use super::params::{NoParams, Segment};
use super::problem::{Answer, Code, Refusal, of_cursor};
use super::{Api, List};
use crate::http::{HttpClient, HttpError, Reach};
use crate::intake::fields::{Fields, Mistakes, expected, string};
use crate::jobs::webhooks::{Change, HOOKS_MAX, Hook, NewHook, Progress, Registry, Secret, Target};

/// How long a target's name is looked up before it is taken unseen; it is looked up again for every
/// delivery.
const LOOKUP: Duration = Duration::from_secs(3);

/// The API's hand in pushing.
pub(crate) struct Hooks {
    pub(crate) registry: Arc<Registry>,
    pub(crate) http: Arc<HttpClient>,
    /// `webhooks.allow_private`
    pub(crate) allow_private: Arc<[IpNet]>,
}

/// A webhook as a caller sees it.
#[derive(Debug, Serialize)]
pub(super) struct Webhook {
    id: WebhookId,
    account: String,
    url: String,
    types: Vec<EventKind>,
    enabled: bool,
    state: &'static str,
    created_at: Timestamp,
    /// Everything before it has been taken.
    cursor: String,
    delivered_at: Option<Timestamp>,
    failure: Option<Failure>,
    /// Only in the answer to its making.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

/// Why it does not move.
#[derive(Debug, Serialize)]
struct Failure {
    since: Timestamp,
    attempts: u32,
    last_attempt_at: Timestamp,
    next_attempt_at: Option<Timestamp>,
    status: Option<u16>,
    reason: String,
    events: u32,
}

impl Webhook {
    fn new(hook: Hook, mut progress: Progress, now: Timestamp) -> Self {
        // What a change did is shown before the node that serves it has seen it.
        progress.adopt(&hook, now);
        let state = match (&progress.failure, hook.enabled) {
            (_, false) => "disabled",
            (None, true) => "active",
            (Some(_), true) if progress.is_parked() => "parked",
            (Some(_), true) => "failing",
        };
        let failure = progress.failure.map(|of| Failure {
            since: of.since,
            attempts: of.attempts,
            last_attempt_at: of.last_at,
            next_attempt_at: of.next_at,
            status: of.status,
            reason: of.reason,
            events: of.events,
        });
        Self {
            id: hook.id,
            account: hook.account,
            url: hook.url,
            types: hook.types,
            enabled: hook.enabled,
            state,
            created_at: hook.created_at,
            cursor: progress.cursor,
            delivered_at: progress.delivered_at,
            failure,
            secret: None,
        }
    }
}

/// `GET /v1/webhooks`
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    _: NoParams,
) -> Answer<Json<List<Webhook>>> {
    let (registry, now) = (&api.hooks.registry, api.clock.now());
    let mut progress = registry.all_progress().await?;
    let mut items = Vec::new();
    for hook in registry.all().await? {
        if *hook.account != *caller.account {
            continue;
        }
        let known = progress.remove(&hook.id.to_string());
        let known = match known {
            Some(known) => known,
            None => registry.progress(&hook).await?,
        };
        items.push(Webhook::new(hook, known, now));
    }
    Ok(Json(List {
        items,
        next_cursor: None,
    }))
}

/// `GET /v1/webhooks/{id}`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<Webhook>> {
    let hook = find(&api, &caller, &id).await?;
    show(&api, hook).await
}

/// `POST /v1/webhooks`
pub(super) async fn create(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<(StatusCode, Json<Webhook>)> {
    may_read(&caller)?;
    let change = read_change(body, true)?;
    check_target(&api.hooks, &change).await?;
    let made = Secret::generate();
    let made = made.map_err(|error| Refusal::internal("random bytes", &error))?;
    let new = NewHook {
        account: caller.account.to_string(),
        url: change.url.unwrap_or_default(),
        types: change.types.unwrap_or_default(),
        secret: change.secret.unwrap_or(made),
        enabled: change.enabled.unwrap_or(true),
    };
    let Some(hook) = api.hooks.registry.create(new).await? else {
        let detail = format!("the account has {HOOKS_MAX} webhooks, and may have no more");
        return Err(Refusal::new(Code::QuotaExceeded, detail));
    };
    tracing::info!(webhook = %hook.id, by = %caller.name, "a webhook was made");
    let secret = hook.secret.reveal().to_owned();
    let Json(mut webhook) = show(&api, hook).await?;
    webhook.secret = Some(secret);
    Ok((StatusCode::CREATED, Json(webhook)))
}

/// `PATCH /v1/webhooks/{id}`
pub(super) async fn change(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Webhook>> {
    may_read(&caller)?;
    let change = read_change(body, false)?;
    let hook = find(&api, &caller, &id).await?;
    check_target(&api.hooks, &change).await?;
    apply(&api, &caller, &hook, change).await
}

/// `DELETE /v1/webhooks/{id}`
pub(super) async fn delete(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<StatusCode> {
    let hook = find(&api, &caller, &id).await?;
    api.hooks.registry.remove(hook.id).await?;
    tracing::info!(webhook = %hook.id, by = %caller.name, "a webhook was deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/webhooks/{id}/replay`
pub(super) async fn replay(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(id): Segment,
    _: NoParams,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Webhook>> {
    may_read(&caller)?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let from = fields.required("from", string);
    fields.finish();
    let (Some(from), true) = (from, mistakes.is_empty()) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let hook = find(&api, &caller, &id).await?;
    let registry = &api.hooks.registry;
    let cursor = match Timestamp::parse(&from) {
        Ok(time) => registry.cursor_at(time).await?,
        Err(_) => {
            let checked = registry.check_cursor(&from).await;
            checked.map_err(of_cursor("/from"))?;
            from
        }
    };
    let change = Change {
        replay: Some(cursor),
        ..Change::default()
    };
    apply(&api, &caller, &hook, change).await
}

/// The webhook, if the caller may see it.
async fn find(api: &Api, caller: &Caller, id: &str) -> Answer<Hook> {
    let missing = || Refusal::not_found("webhook");
    let id: WebhookId = id.parse().map_err(|_| missing())?;
    let hook = api.hooks.registry.one(id).await?.ok_or_else(missing)?;
    if !caller.sees(&hook.account) {
        return Err(missing());
    }
    Ok(hook)
}

async fn show(api: &Api, hook: Hook) -> Answer<Json<Webhook>> {
    let progress = api.hooks.registry.progress(&hook).await?;
    Ok(Json(Webhook::new(hook, progress, api.clock.now())))
}

async fn apply(api: &Api, caller: &Caller, hook: &Hook, change: Change) -> Answer<Json<Webhook>> {
    let changed = api.hooks.registry.change(hook.id, change).await?;
    let changed = changed.ok_or_else(|| Refusal::not_found("webhook"))?;
    tracing::info!(webhook = %hook.id, by = %caller.name, "a webhook was changed");
    show(api, changed).await
}

/// Without this, a key that may only submit could read by pushing to itself.
fn may_read(caller: &Caller) -> Answer<()> {
    match caller.may(Scope::Read) {
        true => Ok(()),
        false => {
            let detail = "the key lacks the scope read, and a webhook shows events";
            Err(Refusal::new(Code::ForbiddenScope, detail))
        }
    }
}

/// A target that leads to private addresses is refused now, as far as can be told now.
async fn check_target(hooks: &Hooks, change: &Change) -> Answer<()> {
    let Some(url) = &change.url else {
        return Ok(());
    };
    let at = |detail: String| Refusal::at(Code::InvalidField, "/url", detail);
    let target = Target::parse(url).map_err(at)?;
    let reach = Reach::Besides(&hooks.allow_private);
    let found = hooks.http.addresses(&target.host, target.port, reach);
    match tokio::time::timeout(LOOKUP, found).await {
        Ok(Err(error @ HttpError::Private(_))) => Err(at(format!(
            "leads to an address that is not allowed: {error}"
        ))),
        // What cannot be looked up now may be later.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Reads what a webhook is to be; `whole`: it is a new one.
fn read_change(body: Result<Bytes, BytesRejection>, whole: bool) -> Answer<Change> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let change = change_of(&mut fields, whole);
    fields.finish();
    match mistakes.is_empty() {
        true => Ok(change),
        false => Err(Refusal::of_mistakes(mistakes.into_vec())),
    }
}

fn change_of(fields: &mut Fields<'_>, whole: bool) -> Change {
    let url = |value| {
        let url = string(value)?;
        Target::parse(&url).map(|_| url)
    };
    Change {
        url: match whole {
            true => fields.required("url", url),
            false => fields.converted("url", url),
        },
        types: fields.converted("types", types),
        secret: fields.converted("secret", |value| Secret::parse(&string(value)?)),
        enabled: fields.converted("enabled", |value| {
            value
                .as_bool()
                .ok_or_else(|| expected(&value, "true or false"))
        }),
        replay: None,
    }
}

/// Types of events, each once; none of them: all.
fn types(value: Value) -> Result<Vec<EventKind>, String> {
    let Value::Array(words) = value else {
        return Err(expected(&value, "a list of types of events"));
    };
    let mut kinds = Vec::new();
    for word in words {
        let word = string(word)?;
        let kind: EventKind = word
            .parse()
            .map_err(|_| format!("{word:.60?} is no type of event"))?;
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(text: &[u8], whole: bool) -> Answer<Change> {
        read_change(Ok(Bytes::copy_from_slice(text)), whole)
    }

    #[test]
    fn a_change_says_what_is_different() {
        assert_eq!(read(b"{}", false), Ok(Change::default()));
        assert_eq!(read(b"", false), Ok(Change::default()));
        let some =
            json!({"types": ["email.clicked", "email.opened", "email.clicked"], "enabled": false});
        let some = read(some.to_string().as_bytes(), false).expect("a change");
        assert_eq!(
            some.types,
            Some(vec![EventKind::EmailClicked, EventKind::EmailOpened])
        );
        assert_eq!((some.url, some.enabled), (None, Some(false)));
        let none = read(br#"{"types": [], "secret": null}"#, false).expect("a change");
        assert_eq!((none.types, none.secret), (Some(Vec::new()), None));
    }

    #[test]
    fn mistakes_are_named() {
        for (body, path, word) in [
            (json!({}), "/url", "missing"),
            (json!({"url": "ftp://x.example/"}), "/url", "http"),
            (json!({"url": 5}), "/url", "a number"),
            (
                json!({"url": "http://x.example/", "types": ["email.lost"]}),
                "/types",
                "email.lost",
            ),
            (
                json!({"url": "http://x.example/", "types": "email.opened"}),
                "/types",
                "a list",
            ),
            (
                json!({"url": "http://x.example/", "secret": "whsec_?"}),
                "/secret",
                "base64",
            ),
            (
                json!({"url": "http://x.example/", "enabled": "yes"}),
                "/enabled",
                "true or false",
            ),
            (
                json!({"url": "http://x.example/", "colour": 1}),
                "/colour",
                "no such field",
            ),
        ] {
            let refused = read(body.to_string().as_bytes(), true)
                .expect_err("a mistake")
                .0;
            let text = String::from_utf8(refused.to_bytes().to_vec()).expect("text");
            assert!(text.contains(path) && text.contains(word), "{body}: {text}");
        }
    }

    proptest! {
        #[test]
        fn any_body_is_a_change_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            url: String, kind: String, secret: String, whole: bool,
        ) {
            drop(read(&bytes, whole));
            let body = json!({"url": url, "types": [kind, "email.opened"], "secret": secret});
            drop(read(body.to_string().as_bytes(), whole));
            if let Ok(change) = read(json!({"url": url}).to_string().as_bytes(), whole) {
                prop_assert!(change.url.is_some_and(|url| Target::parse(&url).is_ok()));
            }
        }
    }
}
