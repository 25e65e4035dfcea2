//! One message with its whole story, and one person with all messages.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use model::{
    Actor, Attempt, AttemptResult, Blame, Class, DeliveryStatus, EmailAddress, Hit, HitKind,
    MessageId, Status, Timestamp,
};
use serde::Serialize;
use store::{RecipientRow, Suppression};

use super::auth::{CanRead, CanSubmit};
use super::consent::Said;
use super::params::{NoParams, Segment};
use super::problem::{Answer, Refusal};
use super::recipients::RowView;
use super::{Api, suppressions};
use crate::erasure::Order;

/// `GET /v1/messages/{message_id}`
#[derive(Serialize)]
pub(super) struct Story {
    #[serde(flatten)]
    row: RowView,
    campaign: Option<String>,
    list: String,
    timeline: Vec<AttemptView>,
    engagement: Vec<HitView>,
}

#[derive(Serialize)]
struct AttemptView {
    number: u8,
    at: Timestamp,
    /// When the final dot was sent.
    dot_at: Option<Timestamp>,
    status: Status,
    /// When the next was due.
    retry_at: Option<Timestamp>,
    /// Its final dot may have been sent, and no reply was seen.
    ambiguous: bool,
    smtp_code: Option<u16>,
    enhanced_code: Option<String>,
    class: Option<Class>,
    blame: Option<Blame>,
    reply: String,
    host: String,
    tls: Option<String>,
    destination: String,
    source: String,
    rule: Option<String>,
    rules_version: Option<String>,
    transaction_ms: u32,
}

#[derive(Serialize)]
struct HitView {
    r#type: HitKind,
    at: Timestamp,
    link: Option<u16>,
    url: Option<String>,
    user_agent: String,
    network: String,
    visitor: Option<model::VisitorId>,
    method: Option<String>,
    actor: Actor,
    machine_reasons: Vec<String>,
}

impl From<Attempt> for AttemptView {
    fn from(attempt: Attempt) -> Self {
        let (status, retry_at, ambiguous) = match attempt.result {
            AttemptResult::Delivered => (Status::Delivered, None, false),
            AttemptResult::TemporaryError {
                retry_at,
                ambiguous,
            } => (Status::TemporaryError, Some(retry_at), ambiguous),
            AttemptResult::Bounce => (Status::Bounce, None, false),
            AttemptResult::Failed => (Status::Failed, None, false),
            AttemptResult::Suppressed(_) => (Status::Suppressed, None, false),
            AttemptResult::Cancelled => (Status::Cancelled, None, false),
        };
        let detail = attempt.detail;
        Self {
            number: attempt.number,
            at: attempt.at,
            dot_at: attempt.dot_at,
            status,
            retry_at,
            ambiguous,
            smtp_code: detail.smtp_code,
            enhanced_code: detail.enhanced_code.map(|code| code.to_string()),
            class: detail.class,
            blame: detail.blame,
            reply: detail.reply.into(),
            host: detail.host.into(),
            tls: detail.tls.map(Into::into),
            destination: detail.destination.into(),
            source: detail.source.into(),
            rule: detail.rule.as_ref().map(|rule| rule.name().to_owned()),
            rules_version: detail
                .rule
                .as_ref()
                .and_then(|rule| rule.version().map(str::to_owned)),
            transaction_ms: detail.transaction_ms,
        }
    }
}

impl From<Hit> for HitView {
    fn from(hit: Hit) -> Self {
        Self {
            r#type: hit.kind,
            at: hit.at,
            link: hit.link,
            url: hit.target.map(Into::into),
            user_agent: hit.user_agent.into(),
            network: hit.network.into(),
            visitor: hit.visitor,
            method: hit.method.map(Into::into),
            actor: hit.verdict.actor,
            machine_reasons: hit
                .verdict
                .machine_reasons
                .into_iter()
                .map(Into::into)
                .collect(),
        }
    }
}

pub(super) async fn message(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<Story>> {
    let unknown = || Refusal::not_found("message");
    let id: MessageId = id.parse().map_err(|_| unknown())?;
    let story = api
        .store
        .message(id)
        .await?
        .filter(|story| caller.sees(&story.batch.account));
    let story = story.ok_or_else(unknown)?;
    Ok(Json(Story {
        row: RowView::of(id.batch, story.recipient),
        campaign: story.batch.campaign.clone(),
        list: story.batch.list.clone(),
        timeline: story.attempts.into_iter().map(Into::into).collect(),
        engagement: story.hits.into_iter().map(|kept| kept.hit.into()).collect(),
    }))
}

/// `GET /v1/recipients/{email}`
#[derive(Serialize)]
pub(super) struct Person {
    email: String,
    delivery_status: DeliveryStatus,
    suppressions: Vec<Suppression>,
    /// The most that may be kept of the person, where that was said.
    tracking: Option<Said>,
    messages: Vec<PersonMessage>,
}

#[derive(Serialize)]
struct PersonMessage {
    #[serde(flatten)]
    row: RowView,
    batch_id: model::BatchId,
    campaign: Option<String>,
}

pub(super) async fn person(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(email): Segment,
    _: NoParams,
) -> Answer<Json<Person>> {
    let email: EmailAddress = email.parse().map_err(|_| Refusal::not_found("address"))?;
    let (account, normalised) = (&*caller.account, email.normalised());
    let story = api.store.address(account, &normalised).await?;
    let consent = api.store.consent(account, &normalised).await?;
    let delivery_status = delivery_status(story.messages.iter().map(|(_, row)| row));
    let messages = story
        .messages
        .into_iter()
        .map(|(batch, row)| PersonMessage {
            row: RowView::of(batch.id, row),
            batch_id: batch.id,
            campaign: batch.campaign.clone(),
        });
    Ok(Json(Person {
        email: email.normalised().into_owned(),
        delivery_status,
        suppressions: story.suppressions,
        tracking: consent.map(Into::into),
        messages: messages.collect(),
    }))
}

/// How long the caller waits for an erasure; what is left is done within minutes.
const ERASING: Duration = Duration::from_secs(3);

/// `DELETE /v1/recipients/{email}`: 204 when it is done, 202 when a large store goes on with it.
pub(super) async fn erase(
    State(api): State<Arc<Api>>,
    CanSubmit(caller): CanSubmit,
    Segment(email): Segment,
    _: NoParams,
) -> Answer<StatusCode> {
    let email = suppressions::address(&email)?;
    let (store, now) = (&*api.store, api.clock.now());
    let mut order = Order::give(store, &caller.account, &email, now).await?;
    let done = order.carry_out(store, &api.clock, ERASING).await?;
    Ok(if done {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::ACCEPTED
    })
}

/// What the newest final outcome says of an address (contract, section 6); `messages` newest first.
fn delivery_status<'r>(messages: impl Iterator<Item = &'r RecipientRow>) -> DeliveryStatus {
    let ends = messages.filter_map(|row| {
        let end = DeliveryStatus::of(row.status, row.class)?;
        Some((row.decided_at, end))
    });
    // The newest mail is not the newest end: an older one may have been retried for longer.
    ends.reduce(|newest, next| if next.0 > newest.0 { next } else { newest })
        .map_or(DeliveryStatus::Unconfirmed, |(_, end)| end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Row;

    fn message(status: Status, class: Option<Class>, accepted: i64, decided: i64) -> RecipientRow {
        let at = |minute: i64| Timestamp::from_millis(minute * 60_000);
        RecipientRow {
            row: Row::new(0, "a@x.example".parse().expect("an address")),
            variant: None,
            status,
            attempts: 1,
            next_attempt_at: None,
            smtp_code: None,
            enhanced_code: None,
            class,
            blame: None,
            reply: None,
            host: None,
            accepted_at: at(accepted),
            decided_at: Some(at(decided)),
            delivered_at: None,
            opened_at: None,
            opened_human_at: None,
            clicked_at: None,
            clicked_human_at: None,
            complained_at: None,
            unsubscribed_at: None,
            replied_at: None,
        }
    }

    #[test]
    fn the_newest_end_counts_and_not_the_newest_mail() {
        let expired = message(Status::Failed, Some(Class::Expired), 1, 90);
        let delivered = message(Status::Delivered, None, 2, 3);
        let queued = message(Status::TemporaryError, Some(Class::Greylisted), 100, 100);
        let of = |newest_first: &[&RecipientRow]| delivery_status(newest_first.iter().copied());
        assert_eq!(
            of(&[&queued, &delivered, &expired]),
            DeliveryStatus::TemporaryError
        );
        assert_eq!(of(&[&queued, &delivered]), DeliveryStatus::Ok);
        assert_eq!(of(&[&queued]), DeliveryStatus::Unconfirmed);
        // Of two at the same time that of the newer mail counts.
        let bounced = message(Status::Bounce, None, 1, 3);
        assert_eq!(of(&[&delivered, &bounced]), DeliveryStatus::Ok);
    }
}
