//! Events as they are told: ids and the `data` of each type (contract, section 5).
//!
//! An id is computed from the fact's journal and sequence, so a fact has the same one whenever and
//! wherever it is told. Pure, and the same for every engine. Must not do I/O.

use crate::transition::Cell;
use crate::{Announcement, BatchHead};
use model::{
    About, Attempt, AttemptResult, Event, EventKind, EventRecipient, Fact, FactId, Hit, HitKind,
    JournalId, MessageId, PageView, Revision, Row, RuleRef, Seq, Timestamp, partition_hash,
};
use serde_json::{Value, json};

/// The source of a suppression that a complaint led to.
pub(crate) const COMPLAINT: &str = "complaint";

/// What an event says beside its batch and recipient.
pub(crate) struct Told {
    pub(crate) kind: EventKind,
    pub(crate) occurred_at: Timestamp,
    /// What its id is made of.
    pub(crate) identity: String,
    pub(crate) data: Value,
}

impl Told {
    /// What a fact says.
    pub(crate) fn of_fact(
        kind: EventKind,
        journal: JournalId,
        seq: Seq,
        fact: &Fact,
        head: &BatchHead,
    ) -> Self {
        Self {
            kind,
            occurred_at: fact.at(),
            identity: identity_of(FactId { journal, seq }, kind),
            data: data_of(FactId { journal, seq }, fact, head),
        }
    }
}

/// The id of a fact's event.
pub(crate) fn id_of_fact(of: FactId, kind: EventKind, at: Timestamp) -> uuid::Uuid {
    event_id(at, &identity_of(of, kind))
}

/// What the id of a fact's event is made of.
fn identity_of(id: FactId, kind: EventKind) -> String {
    format!("{} fact {} {kind}", id.journal, id.seq)
}

/// A page view as it is announced: it belongs to no message.
pub(crate) fn of_page(id: FactId, page: &PageView) -> Announcement {
    let kind = EventKind::PageViewed;
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Announcement {
        kind,
        account: page.account.clone(),
        data: json!({
            "visitor": page.visitor,
            "url": page.url,
            "referrer": text(&page.referrer),
            "title": text(&page.title),
            "actor": page.verdict.actor,
            "machine_reasons": page.verdict.machine_reasons,
            "user_agent": page.user_agent,
            "network": page.network,
        })
        .into(),
        about: About {
            id: Some(event_id(page.at, &identity_of(id, kind))),
            occurred_at: Some(page.at),
            ..About::default()
        },
    }
}

/// What was announced, as an event.
pub(crate) fn announced(
    told: Told,
    seq: u64,
    now: Timestamp,
    account: &str,
    about: About,
) -> Event {
    let mut event = bare(told, seq, now, account.to_owned());
    if let Some(occurred_at) = about.occurred_at {
        event.occurred_at = occurred_at;
    }
    if let Some(id) = about.id {
        event.id = id;
    }
    event.campaign = about.campaign;
    event.batch_id = about.batch_id;
    event.message_id = about.message_id;
    event.variant = about.variant;
    event.recipient = about.recipient;
    if !about.metadata.is_null() {
        event.metadata = about.metadata;
    }
    event
}

/// An event of an account alone.
pub(crate) fn bare(told: Told, seq: u64, recorded_at: Timestamp, account: String) -> Event {
    Event {
        id: event_id(told.occurred_at, &told.identity),
        seq,
        kind: told.kind,
        occurred_at: told.occurred_at,
        recorded_at,
        account,
        campaign: None,
        batch_id: None,
        message_id: None,
        variant: None,
        recipient: None,
        metadata: json!({}),
        data: told.data,
    }
}

/// An event of a batch.
pub(crate) fn of_batch(told: Told, seq: u64, recorded_at: Timestamp, head: &BatchHead) -> Event {
    let mut event = bare(told, seq, recorded_at, head.account.clone());
    event.campaign = head.campaign.clone();
    event.batch_id = Some(head.id);
    event.metadata = head.metadata.clone();
    event
}

/// An event of an address in an account.
pub(crate) fn of_address(
    told: Told,
    seq: u64,
    recorded_at: Timestamp,
    account: String,
    email: String,
) -> Event {
    let mut event = bare(told, seq, recorded_at, account);
    event.recipient = Some(EventRecipient {
        email,
        prospect_id: None,
    });
    event
}

/// An event of a recipient, which has the variant of this number.
pub(crate) fn of_row(
    told: Told,
    seq: u64,
    recorded_at: Timestamp,
    head: &BatchHead,
    (row, variant): (&Row, u8),
) -> Event {
    let mut event = of_batch(told, seq, recorded_at, head);
    event.variant = head.variant_name(variant).map(str::to_owned);
    event.message_id = Some(MessageId {
        batch: head.id,
        index: row.index,
    });
    event.recipient = Some(EventRecipient {
        email: row.email.to_string(),
        prospect_id: row.prospect_id.as_deref().map(str::to_owned),
    });
    event.metadata = metadata_of(head, row.metadata.as_deref());
    event
}

/// A UUIDv7 of the time and of what the event is about.
fn event_id(at: Timestamp, identity: &str) -> uuid::Uuid {
    let millis = u64::try_from(at.millis()).unwrap_or(0);
    let (a, b) = (
        partition_hash("event", identity),
        partition_hash("event id", identity),
    );
    let mut random = [0_u8; 10];
    for (to, from) in random
        .iter_mut()
        .zip(a.to_be_bytes().into_iter().chain(b.to_be_bytes()))
    {
        *to = from;
    }
    uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}

/// What the caller gave: the recipient's fields, as JSON, over the batch's.
pub(crate) fn metadata_of(head: &BatchHead, own: Option<&str>) -> Value {
    let own: Option<Value> = own.and_then(|text| serde_json::from_str(text).ok());
    match (head.metadata.clone(), own) {
        (Value::Object(mut all), Some(Value::Object(own))) => {
            all.extend(own);
            Value::Object(all)
        }
        (_, Some(own)) if !own.is_null() => own,
        (all, _) => all,
    }
}

fn data_of(id: FactId, fact: &Fact, head: &BatchHead) -> Value {
    match fact {
        Fact::Attempt(attempt) => data_of_attempt(attempt),
        Fact::Hit(hit) => data_of_hit(id, hit, head),
        Fact::Page(page) => of_page(id, page).data.into_value(),
        Fact::Revision(revision) => data_of_revision(revision),
        Fact::Reply(reply) => data_as_told(&reply.data),
        Fact::Complaint(complaint) => data_as_told(&complaint.data),
    }
}

fn data_of_revision(of: &Revision) -> Value {
    let kind = match of.kind {
        HitKind::Open | HitKind::Probe => EventKind::EmailOpened,
        HitKind::Click => EventKind::EmailClicked,
        HitKind::Unsubscribe => EventKind::EmailUnsubscribed,
    };
    json!({
        "event_id": event_id(of.hit_at, &identity_of(of.hit, kind)),
        "type": kind,
        "hit": of.hit.to_string(),
        "hit_at": of.hit_at,
        "was": of.was,
        "actor": of.verdict.actor,
        "machine_reasons": of.verdict.machine_reasons,
        "rules": of.verdict.rules,
    })
}

fn data_as_told(data: &str) -> Value {
    serde_json::from_str(data).unwrap_or_else(|_| json!({}))
}

/// The data of an event that tells of an end without an attempt: of whom nobody knows whether an
/// attempt was begun, `ambiguous` says so.
pub(crate) fn unsent(mut data: Value, cell: Cell) -> Value {
    if cell.maybe_started() {
        data["ambiguous"] = json!(true);
    }
    data
}

fn data_of_attempt(attempt: &Attempt) -> Value {
    let (ambiguous, next) = match attempt.result {
        AttemptResult::TemporaryError {
            retry_at,
            ambiguous,
        } => (ambiguous, Some(retry_at)),
        AttemptResult::Suppressed(reason) => return json!({ "reason": reason.as_str() }),
        AttemptResult::Cancelled => return json!({}),
        AttemptResult::Delivered | AttemptResult::Bounce | AttemptResult::Failed => (false, None),
    };
    let detail = &attempt.detail;
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "attempt": attempt.number,
        "dot_at": attempt.dot_at,
        "smtp_code": detail.smtp_code,
        "enhanced_code": detail.enhanced_code.map(|code| code.to_string()),
        "class": detail.class,
        "blame": detail.blame,
        "reply": text(&detail.reply),
        "host": text(&detail.host),
        "tls": detail.tls,
        "destination": text(&detail.destination),
        "source": text(&detail.source),
        "rule": detail.rule.as_ref().map(RuleRef::name),
        "rules_version": detail.rule.as_ref().and_then(RuleRef::version),
        "ambiguous": ambiguous,
        "next_attempt_at": next,
        "transaction_ms": detail.transaction_ms,
    })
}

fn data_of_hit(id: FactId, hit: &Hit, head: &BatchHead) -> Value {
    match hit.kind {
        HitKind::Unsubscribe => json!({ "list": head.list, "method": hit.method }),
        HitKind::Open | HitKind::Click | HitKind::Probe => json!({
            "actor": hit.verdict.actor,
            "machine_reasons": hit.verdict.machine_reasons,
            "rules": hit.verdict.rules,
            "hit": id.to_string(),
            "link": hit.link,
            "url": hit.target,
            "user_agent": hit.user_agent,
            "network": hit.network,
            "visitor": hit.visitor,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_is_a_uuid_of_version_7_and_always_the_same() {
        let at = Timestamp::from_millis(1_763_712_300_007);
        let id = event_id(at, "x");
        assert_eq!(id.get_version_num(), 7);
        assert_eq!(id, event_id(at, "x"));
        assert_ne!(id, event_id(at, "y"));
        assert!(id.to_string().starts_with("019aa571-f3e7-7"), "{id}");
    }
}
