//! Destinations: what waits for them, which limits hold and why, and the operator's hand.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use model::units::parse_duration;
use model::{Blame, Class, Timestamp};
use serde::Serialize;
use store::{DueScope, Suspension};

use super::auth::{CanAdmin, CanRead};
use super::params::{NoParams, Params, Segment};
use super::problem::{Answer, Refusal};
use super::{Api, List};
use crate::explain::ask::{Full, Resolved, RolledUp};
use crate::explain::facts::{Limit, SourceLimits, Suspended};
use crate::explain::judge::{group, rate_text, throughput};
use crate::explain::mask::without_addresses;
use crate::explain::troubles::Noted;
use crate::explain::{Constraint, Source, State as Motion};
use crate::intake::fields::{Mistakes, string};

/// A destination as the contract shows it.
#[derive(Debug, Serialize)]
pub(super) struct DestinationView {
    destination: String,
    state: Motion,
    constraint: Option<Constraint>,
    next_at: Option<Timestamp>,
    eta: Option<Timestamp>,
    rolled_up: RolledUpView,
    domains: Vec<String>,
    domain_count: usize,
    /// None: the store did not answer.
    queued: Option<u64>,
    next_due: Option<Timestamp>,
    leased: u64,
    in_flight: u64,
    connections: u64,
    /// In a second, over the last minute.
    pace: f64,
    /// What the limits in force allow in a second; none: no limit.
    throughput: Option<f64>,
    limits: Vec<SourceView>,
    held_until: Option<Timestamp>,
    suspension: Option<SuspensionView>,
    last_trouble: Option<TroubleView>,
}

#[derive(Debug, Serialize)]
struct RolledUpView {
    by: RolledUp,
    detail: String,
    hosts: Vec<String>,
    /// Why the hosts are not known.
    dns: Option<String>,
    limits_from: Source,
}

/// The limits of one egress source there.
#[derive(Debug, Serialize)]
struct SourceView {
    source: String,
    rate: LimitView<String>,
    connections: LimitView<u32>,
    messages_per_connection: LimitView<u32>,
    open: usize,
    opening: usize,
    in_flight: usize,
    next_permit_at: Option<Timestamp>,
    blocked_until: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct LimitView<T> {
    in_force: T,
    base: T,
    reason: Option<String>,
    until: Option<Timestamp>,
    /// In the file that `limits_from` names.
    line: Option<u32>,
}

#[derive(Debug, Serialize)]
struct SuspensionView {
    reason: String,
    by: String,
    since: Timestamp,
    until: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct TroubleView {
    at: Timestamp,
    class: Option<Class>,
    blame: Option<Blame>,
    reply: String,
    host: String,
    rule: Option<String>,
}

impl From<Full> for DestinationView {
    fn from(full: Full) -> Self {
        let group = group(&full.facts, &full.stock, &full.node);
        let facts = full.facts;
        let view = facts.view.as_ref();
        let sources = view.map(|view| view.sources.as_slice()).unwrap_or_default();
        let limits = facts
            .limits
            .iter()
            .enumerate()
            .map(|(at, limits)| source_view(limits, sources.get(at)));
        Self {
            limits: limits.collect(),
            state: group.state,
            constraint: group.chain.into_iter().next(),
            next_at: group.next_at,
            eta: group.eta,
            queued: full.node.store_away.is_none().then_some(full.stock.due),
            next_due: full.stock.next_due,
            leased: full.stock.leased,
            in_flight: full.stock.in_flight,
            connections: sources
                .iter()
                .map(|of| (of.ready + of.opening) as u64)
                .sum(),
            pace: view.map_or(0.0, |view| (view.pace * 100.0).round() / 100.0),
            throughput: throughput(&facts).map(|(per_second, _)| per_second),
            held_until: view.and_then(|view| view.held_until),
            suspension: facts.suspension.map(Into::into),
            last_trouble: facts.trouble.as_ref().map(Into::into),
            destination: facts.name,
            rolled_up: full.resolved.into(),
            domains: full.domains,
            domain_count: full.domain_count,
        }
    }
}

fn source_view(
    limits: &SourceLimits,
    seen: Option<&crate::queue::snapshot::SourceView>,
) -> SourceView {
    SourceView {
        source: limits.source.clone(),
        rate: limit(&limits.rate, |rate| rate_text(*rate)),
        connections: limit(&limits.connections, |count| *count),
        messages_per_connection: limit(&limits.messages_per_connection, |count| *count),
        open: seen.map_or(0, |of| of.ready),
        opening: seen.map_or(0, |of| of.opening),
        in_flight: seen.map_or(0, |of| of.in_flight),
        next_permit_at: seen.map(|of| of.next_permit_at),
        blocked_until: limits.blocked_until,
    }
}

fn limit<T, U>(limit: &Limit<T>, shown: impl Fn(&T) -> U) -> LimitView<U> {
    LimitView {
        in_force: shown(&limit.in_force),
        base: shown(&limit.base),
        reason: limit.reason.clone(),
        until: limit.until,
        line: limit.line,
    }
}

impl From<Resolved> for RolledUpView {
    fn from(of: Resolved) -> Self {
        Self {
            by: of.by,
            detail: of.detail,
            hosts: of.hosts,
            dns: of.dns,
            limits_from: of.configured,
        }
    }
}

impl From<Suspended> for SuspensionView {
    fn from(of: Suspended) -> Self {
        Self {
            reason: of.reason,
            by: of.by,
            since: of.since,
            until: of.until,
        }
    }
}

impl From<&Noted> for TroubleView {
    fn from(of: &Noted) -> Self {
        Self {
            at: of.at,
            class: of.class,
            blame: of.blame,
            reply: without_addresses(&of.reply),
            host: of.host.to_string(),
            rule: of.rule.as_deref().map(str::to_owned),
        }
    }
}

/// `GET /v1/destinations`: the busiest first. A cursor is a place in that order, which moves.
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    CanRead(_): CanRead,
    mut params: Params,
) -> Answer<Json<Listing>> {
    let from: usize = params.parsed("cursor").unwrap_or(0);
    let limit = params.limit() as usize;
    params.finish()?;
    let (all, complete) = api.explainer.destinations().await;
    let total = all.len();
    let shown = all.into_iter().skip(from).take(limit).map(Into::into);
    let next = from.saturating_add(limit);
    Ok(Json(Listing {
        list: List {
            items: shown.collect(),
            next_cursor: (next < total).then(|| next.to_string()),
        },
        complete,
    }))
}

#[derive(Serialize)]
pub(super) struct Listing {
    #[serde(flatten)]
    list: List<DestinationView>,
    /// False: there are more than this service looks through for one answer.
    complete: bool,
}

fn unknown() -> Refusal {
    Refusal::not_found("domain or destination")
}

/// `GET /v1/destinations/{domain}`
pub(super) async fn one(
    State(api): State<Arc<Api>>,
    CanRead(_): CanRead,
    Segment(name): Segment,
    _: NoParams,
) -> Answer<Json<DestinationView>> {
    let full = api.explainer.destination(&name).await;
    Ok(Json(full.ok_or_else(unknown)?.into()))
}

/// What an operator's call came to.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    destination: String,
    dry_run: bool,
    /// Recipients that it is about: those whom a suspension keeps back, a resumption lets go, or
    /// whose next attempt is due now.
    recipients: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspension: Option<SuspensionView>,
    /// Queues of which nobody knows where they go, so that they are not counted in.
    unresolved: usize,
}

async fn found(api: &Api, name: &str) -> Answer<(Resolved, Vec<Suspension>)> {
    let suspensions = api.store.suspensions(api.clock.now()).await?;
    let resolved = api.explainer.resolve(name, &suspensions).await;
    Ok((resolved.ok_or_else(unknown)?, suspensions))
}

/// `POST /v1/destinations/{domain}/suspend`
pub(super) async fn suspend(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    Segment(name): Segment,
    mut params: Params,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Done>> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    params.finish()?;
    let mut mistakes = Mistakes::default();
    let mut fields = super::body::object(body, &mut mistakes)?;
    let length = fields.converted("for", |value| {
        let length = parse_duration(&string(value)?).map_err(|error| error.to_string())?;
        (!length.is_zero())
            .then_some(length)
            .ok_or_else(|| "is no time at all".to_owned())
    });
    let reason = fields.converted("reason", |value| {
        let text = string(value)?;
        let fits = text.chars().count() <= REASON_MAX && !text.chars().any(char::is_control);
        fits.then_some(text)
            .ok_or_else(|| format!("is longer than {REASON_MAX} characters, or more than one line"))
    });
    fields.finish();
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    let (resolved, _) = found(&api, &name).await?;
    let now = api.clock.now();
    let suspension = Suspension {
        destination: resolved.destination.as_str().into(),
        until: length.map(|length| now + length),
        reason: reason.unwrap_or_default().into(),
        by: caller.name.as_ref().into(),
        since: now,
    };
    let (recipients, unresolved) = waiting(&api, &resolved).await?;
    if !dry_run {
        tracing::info!(
            destination = %suspension.destination, by = %suspension.by, reason = %suspension.reason,
            "a destination is suspended"
        );
        api.store.suspend(suspension.clone(), now).await?;
        // What is submitted after the answer is not sent, here at least.
        let sending = &api.explainer.sending;
        sending.knows_of_suspension(&resolved.destination).await;
    }
    Ok(Json(Done {
        destination: resolved.destination.to_string(),
        dry_run,
        recipients,
        suspension: Some(SuspensionView {
            reason: suspension.reason.into(),
            by: suspension.by.into(),
            since: suspension.since,
            until: suspension.until,
        }),
        unresolved,
    }))
}

/// Characters of a reason.
const REASON_MAX: usize = 200;

/// Recipients in the store and the queue for a destination.
async fn waiting(api: &Api, resolved: &Resolved) -> Answer<(u64, usize)> {
    let now = api.clock.now();
    let (queues, unresolved) = api.explainer.queues_of(resolved).await?;
    let later = api
        .store
        .make_due(DueScope::Domains(queues), now, true)
        .await?;
    let full = api
        .explainer
        .destination(resolved.destination.as_str())
        .await;
    let here = full.map_or(0, |full| full.stock.due + full.stock.leased);
    Ok((later + here, unresolved))
}

/// `POST /v1/destinations/{domain}/resume`
pub(super) async fn resume(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    Segment(name): Segment,
    mut params: Params,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Done>> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    params.finish()?;
    super::body::nothing(body)?;
    let (resolved, suspensions) = found(&api, &name).await?;
    let destination = resolved.destination.as_str();
    let is_suspended = suspensions.iter().any(|of| &*of.destination == destination);
    let (recipients, unresolved) = match is_suspended {
        true => waiting(&api, &resolved).await?,
        false => (0, 0),
    };
    if !dry_run && is_suspended {
        tracing::info!(destination, by = %caller.name, "a destination is resumed");
        api.store.resume(destination, api.clock.now()).await?;
    }
    Ok(Json(Done {
        destination: destination.to_owned(),
        dry_run,
        recipients,
        suspension: None,
        unresolved,
    }))
}

/// `POST /v1/destinations/{domain}/retry`
pub(super) async fn retry(
    State(api): State<Arc<Api>>,
    CanAdmin(caller): CanAdmin,
    Segment(name): Segment,
    mut params: Params,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<Done>> {
    let dry_run = params.flag("dry_run").unwrap_or(false);
    params.finish()?;
    super::body::nothing(body)?;
    let (resolved, _) = found(&api, &name).await?;
    let (queues, unresolved) = api.explainer.queues_of(&resolved).await?;
    let now = api.clock.now();
    let recipients = api
        .store
        .make_due(DueScope::Domains(queues), now, dry_run)
        .await?;
    if !dry_run {
        let destination = resolved.destination.as_str();
        tracing::info!(destination, by = %caller.name, recipients, "deferred mail is due now");
    }
    Ok(Json(Done {
        destination: resolved.destination.to_string(),
        dry_run,
        recipients,
        suspension: None,
        unresolved,
    }))
}
