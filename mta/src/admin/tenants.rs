//! Accounts and keys over the API: made, changed and removed without touching the file.
//!
//! Owns what callers may say of them. Those of the configuration file are shown and not changed. A
//! key is shown once, when it is made.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use model::units::Rate;
use model::{BatchId, Domain, Timestamp};
use serde::Serialize;
use serde_json::Value;
use service::config::{Account, DkimPolicy, Scope, StatusProfile};

use super::auth::{CanAdmin, fresh_key, sha256_hex};
use super::params::{NoParams, Segment};
use super::problem::{Answer, Code, Refusal};
use super::{Api, List};
use crate::intake::fields::{Fields, Mistakes, expected, string};
use crate::tenants::{AccountDoc, KeyDoc};

const NAME_MAX: usize = 64;
const LIST_MAX: usize = 1_000;

/// An account as it is shown.
#[derive(Debug, Serialize)]
pub(super) struct AccountView {
    #[serde(flatten)]
    doc: AccountDoc,
    /// `file` or `api`.
    source: &'static str,
}

/// A key as it is shown.
#[derive(Debug, Serialize)]
pub(super) struct KeyView {
    id: String,
    name: String,
    account: String,
    scopes: Vec<String>,
    source: &'static str,
    created_at: Option<Timestamp>,
    /// Only when it was made now.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

type Body = Result<Bytes, BytesRejection>;

fn view(api: &Api, account: &Account) -> AccountView {
    let configured = api.tenants.is_configured(&account.id);
    AccountView {
        doc: AccountDoc::of(account),
        source: if configured { "file" } else { "api" },
    }
}

fn whole<T>(items: Vec<T>) -> Json<List<T>> {
    Json(List {
        items,
        next_cursor: None,
    })
}

fn in_file(what: &str) -> Refusal {
    let detail = format!("the {what} stands in the configuration file and is changed there");
    Refusal::new(Code::InvalidState, detail)
}

// ---- accounts ---------------------------------------------------------------------------

/// `GET /v1/accounts`
pub(super) async fn accounts(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    _: NoParams,
) -> Answer<Json<List<AccountView>>> {
    api.tenants.read().await?;
    let all = api.tenants.accounts();
    Ok(whole(all.iter().map(|of| view(&api, of)).collect()))
}

async fn account_of(api: &Api, id: &str) -> Answer<Account> {
    api.tenants.read().await?;
    let all = api.tenants.accounts();
    let found = all.iter().find(|account| account.id == id).cloned();
    found.ok_or_else(|| Refusal::not_found("account"))
}

/// `GET /v1/accounts/{id}`
pub(super) async fn account(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<AccountView>> {
    Ok(Json(view(&api, &account_of(&api, &id).await?)))
}

/// `POST /v1/accounts`
pub(super) async fn add_account(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    _: NoParams,
    body: Body,
) -> Answer<Response> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let id = fields.required("id", name);
    let mut account = Account::implied();
    change_account(&mut fields, &mut account);
    fields.finish();
    let (true, Some(id)) = (mistakes.is_empty(), id) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    account.id = id;
    if account_of(&api, &account.id).await.is_ok() {
        let detail = format!("there is an account {:?} already", account.id);
        return Err(Refusal::new(Code::InvalidState, detail));
    }
    api.tenants.put_account(&account).await?;
    Ok((StatusCode::CREATED, Json(view(&api, &account))).into_response())
}

/// `PATCH /v1/accounts/{id}`
pub(super) async fn patch_account(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    Segment(id): Segment,
    _: NoParams,
    body: Body,
) -> Answer<Json<AccountView>> {
    let mut account = account_of(&api, &id).await?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    change_account(&mut fields, &mut account);
    fields.finish();
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    if api.tenants.is_configured(&id) {
        return Err(in_file("account"));
    }
    api.tenants.put_account(&account).await?;
    Ok(Json(view(&api, &account)))
}

/// `DELETE /v1/accounts/{id}`: its keys end with it, its batches and facts stay.
pub(super) async fn remove_account(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<StatusCode> {
    account_of(&api, &id).await?;
    if api.tenants.is_configured(&id) {
        return Err(in_file("account"));
    }
    for key in api.tenants.key_docs().await? {
        if key.account == id {
            api.tenants.remove_key(&key.id).await?;
        }
    }
    api.tenants.remove_account(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads what is said of an account into it.
fn change_account(fields: &mut Fields<'_>, account: &mut Account) {
    if let Some(domains) = fields.converted("from_domains", from_domains) {
        account.from_domains = domains;
    }
    if let Some(dkim) = fields.converted("dkim", |value| {
        word(value, DkimPolicy::ALL, |of| of.as_str())
    }) {
        account.dkim = dkim;
    }
    let profile = |value| word(value, StatusProfile::ALL, |of| of.as_str());
    if let Some(profile) = fields.converted("status_profile", profile) {
        account.status_profile = profile;
    }
    if let Some(weight) = fields.converted("weight", weight) {
        account.weight = weight;
    }
    if let Some(quota) = fields.converted("quota", quota) {
        account.quota = quota;
    }
    fields.within("tracking", |fields| {
        let tracking = &mut account.tracking;
        let checked =
            |check: fn(&str) -> Result<String, String>| move |value: Value| check(&string(value)?);
        if let Some(url) = fields.converted("base_url", checked(service::config::base_url)) {
            tracking.base_url = url;
        }
        if let Some(mode) = fields.parsed("mode") {
            tracking.mode = mode;
        }
        let targets = |value| texts(value, service::config::link_target);
        if let Some(targets) = fields.converted("allowed_targets", targets) {
            tracking.allowed_targets = targets;
        }
        let origins = |value| texts(value, service::config::page_origin);
        if let Some(origins) = fields.converted("page_origins", origins) {
            tracking.page_origins = origins;
        }
    });
}

fn from_domains(value: Value) -> Result<Option<Vec<Domain>>, String> {
    let names = texts(value, |name| match name {
        "*" => Ok("*".to_owned()),
        name => match name.parse::<Domain>() {
            Ok(domain) => Ok(domain.to_string()),
            Err(_) => Err(format!("{name:?} is not a domain name")),
        },
    })?;
    if names.is_empty() {
        return Err("is empty: write [\"*\"] for any domain".to_owned());
    }
    if names.iter().any(|name| name == "*") {
        return Ok(None);
    }
    Ok(Some(
        names.iter().filter_map(|name| name.parse().ok()).collect(),
    ))
}

fn texts(
    value: Value,
    check: impl Fn(&str) -> Result<String, String>,
) -> Result<Vec<String>, String> {
    match value {
        Value::Array(items) if items.len() > LIST_MAX => {
            Err(format!("has more than {LIST_MAX} entries"))
        }
        Value::Array(items) => items
            .into_iter()
            .map(|item| check(&string(item)?))
            .collect(),
        other => Err(expected(&other, "an array of strings")),
    }
}

fn word<T: Copy>(value: Value, all: &[T], name: impl Fn(T) -> &'static str) -> Result<T, String> {
    let text = string(value)?;
    let found = all.iter().copied().find(|known| name(*known) == text);
    found.ok_or_else(|| {
        let known: Vec<_> = all.iter().map(|known| name(*known)).collect();
        format!("{text:.40?} is not one of {}", known.join(", "))
    })
}

fn weight(value: Value) -> Result<u32, String> {
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number
        .filter(|number| *number > 0)
        .ok_or_else(|| expected(&value, "a number of at least 1"))
}

fn quota(value: Value) -> Result<Rate, String> {
    match string(value)?.as_str() {
        "none" => Ok(Rate::Unlimited),
        rate => rate
            .parse()
            .map_err(|error: model::units::UnitError| format!("{error}, or \"none\"")),
    }
}

fn name(value: Value) -> Result<String, String> {
    let text = string(value)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if text.is_empty() || text.len() > NAME_MAX || !text.bytes().all(plain) {
        return Err(format!(
            "is not 1 to {NAME_MAX} letters, digits, dots, underscores and hyphens"
        ));
    }
    Ok(text)
}

// ---- keys -------------------------------------------------------------------------------

fn key_view(doc: KeyDoc, key: Option<String>) -> KeyView {
    KeyView {
        id: doc.id,
        name: doc.name,
        account: doc.account,
        scopes: doc.scopes,
        source: "api",
        created_at: Some(doc.created_at),
        key,
    }
}

fn configured_keys(api: &Api) -> impl Iterator<Item = KeyView> {
    let words = |scopes: &[Scope]| scopes.iter().map(|of| of.as_str().to_owned()).collect();
    api.keys.configured().map(move |caller| KeyView {
        id: caller.name.to_string(),
        name: caller.name.to_string(),
        account: caller.account.to_string(),
        scopes: words(caller.scopes()),
        source: "file",
        created_at: None,
        key: None,
    })
}

/// `GET /v1/keys`
pub(super) async fn keys(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    _: NoParams,
) -> Answer<Json<List<KeyView>>> {
    let mut all: Vec<KeyView> = configured_keys(&api).collect();
    let added = api.tenants.key_docs().await?;
    all.extend(added.into_iter().map(|doc| key_view(doc, None)));
    Ok(whole(all))
}

/// `GET /v1/keys/{id}`
pub(super) async fn key(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<KeyView>> {
    let configured = configured_keys(&api).find(|key| key.id == id);
    match configured {
        Some(key) => Ok(Json(key)),
        None => Ok(Json(key_view(added_key(&api, &id).await?, None))),
    }
}

async fn added_key(api: &Api, id: &str) -> Answer<KeyDoc> {
    let all = api.tenants.key_docs().await?;
    let found = all.into_iter().find(|key| key.id == id);
    found.ok_or_else(|| Refusal::not_found("key"))
}

/// `POST /v1/keys`
pub(super) async fn add_key(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    _: NoParams,
    body: Body,
) -> Answer<Response> {
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let name = fields.required("name", name);
    let account = fields.label("account", NAME_MAX);
    let scopes = fields.converted("scopes", scopes);
    let account = account.unwrap_or_else(|| caller.account.to_string());
    if account_of(&api, &account).await.is_err() {
        fields.mistake("account", "there is no such account");
    }
    fields.finish();
    let (true, Some(name)) = (mistakes.is_empty(), name) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let secret = fresh_key().map_err(|error| Refusal::internal("random", &error))?;
    let now = api.clock.now();
    let mut random = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut random).map_err(|error| Refusal::internal("random", &error))?;
    let doc = KeyDoc {
        id: BatchId::new(now, u128::from_be_bytes(random)).to_string(),
        name,
        account,
        // What steers other tenants has to be said.
        scopes: scopes.unwrap_or_else(|| vec!["submit".to_owned(), "read".to_owned()]),
        sha256: sha256_hex(&secret),
        created_at: now,
    };
    api.tenants.put_key(&doc).await?;
    tracing::info!(key = doc.id, account = doc.account, by = %caller.name, "an API key was made");
    Ok((StatusCode::CREATED, Json(key_view(doc, Some(secret)))).into_response())
}

/// `PATCH /v1/keys/{id}`
pub(super) async fn patch_key(
    State(api): State<Arc<Api>>,
    _: CanAdmin,
    Segment(id): Segment,
    _: NoParams,
    body: Body,
) -> Answer<Json<KeyView>> {
    if configured_keys(&api).any(|key| key.id == id) {
        return Err(in_file("key"));
    }
    let mut doc = added_key(&api, &id).await?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    if let Some(name) = fields.converted("name", name) {
        doc.name = name;
    }
    if let Some(scopes) = fields.converted("scopes", scopes) {
        doc.scopes = scopes;
    }
    fields.finish();
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    api.tenants.put_key(&doc).await?;
    Ok(Json(key_view(doc, None)))
}

/// `DELETE /v1/keys/{id}`
pub(super) async fn remove_key(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<StatusCode> {
    if configured_keys(&api).any(|key| key.id == id) {
        return Err(in_file("key"));
    }
    added_key(&api, &id).await?;
    api.tenants.remove_key(&id).await?;
    tracing::info!(key = id, by = %caller.name, "an API key was removed");
    Ok(StatusCode::NO_CONTENT)
}

fn scopes(value: Value) -> Result<Vec<String>, String> {
    let Value::Array(items) = value else {
        return Err(expected(&value, "an array of submit, read, admin"));
    };
    let mut scopes = Vec::new();
    for item in items {
        let scope = word(item, Scope::ALL, |of| of.as_str())?
            .as_str()
            .to_owned();
        if !scopes.contains(&scope) {
            scopes.push(scope);
        }
    }
    if scopes.is_empty() {
        return Err("is empty, so the key could do nothing".to_owned());
    }
    Ok(scopes)
}
