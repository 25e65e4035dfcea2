//! Events as they are told: ids and the `data` of each type (contract, section 5).
//!
//! An id is computed from the fact's journal and sequence, so a fact has the same one whenever and
//! wherever it is told. Pure, and the same for every engine. Must not do I/O.

use crate::transition::Cell;
use crate::{Announcement, BatchHead, Data};
use model::{
    About, Actor, Attempt, AttemptResult, BatchId, Blame, Class, Event, EventKind, EventRecipient,
    Fact, FactId, Hit, HitKind, JournalId, MessageId, PageView, Revision, Row, RuleRef, Seq,
    Timestamp, VisitorId, partition_hash,
};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::borrow::Cow;

/// The source of a suppression that a complaint led to.
pub(crate) const COMPLAINT: &str = "complaint";

/// What an event says beside its batch and recipient.
pub(crate) struct Told<'a> {
    pub(crate) kind: EventKind,
    pub(crate) occurred_at: Timestamp,
    /// What its id is made of.
    pub(crate) identity: String,
    pub(crate) data: Details<'a>,
}

/// An event of which nothing is a copy yet. Where it is kept as text, the text is written of this
/// (`line`); where somebody asks for it, it becomes an [`Event`], which has the same fields.
pub(crate) struct Line<'a> {
    pub(crate) id: uuid::Uuid,
    pub(crate) seq: u64,
    pub(crate) kind: EventKind,
    pub(crate) occurred_at: Timestamp,
    pub(crate) recorded_at: Timestamp,
    pub(crate) account: Cow<'a, str>,
    pub(crate) campaign: Option<Cow<'a, str>>,
    pub(crate) batch_id: Option<BatchId>,
    pub(crate) message_id: Option<MessageId>,
    pub(crate) variant: Option<Cow<'a, str>>,
    pub(crate) recipient: Option<Recipient<'a>>,
    pub(crate) metadata: Cow<'a, Value>,
    pub(crate) data: Details<'a>,
}

/// The recipient of an event.
pub(crate) struct Recipient<'a> {
    pub(crate) email: Cow<'a, str>,
    pub(crate) prospect_id: Option<Cow<'a, str>>,
}

impl From<Line<'_>> for Event {
    fn from(line: Line<'_>) -> Self {
        Self {
            id: line.id,
            seq: line.seq,
            kind: line.kind,
            occurred_at: line.occurred_at,
            recorded_at: line.recorded_at,
            account: line.account.into_owned(),
            campaign: line.campaign.map(Cow::into_owned),
            batch_id: line.batch_id,
            message_id: line.message_id,
            variant: line.variant.map(Cow::into_owned),
            recipient: line.recipient.map(|of| EventRecipient {
                email: of.email.into_owned(),
                prospect_id: of.prospect_id.map(Cow::into_owned),
            }),
            metadata: line.metadata.into_owned(),
            data: line.data.into_value(),
        }
    }
}

/// What is particular to an event's type.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Details<'a> {
    Attempt(Box<AttemptDetails<'a>>),
    Hit(HitDetails<'a>),
    /// As it was given, or of a rare type.
    Value(Value),
    /// As it was given: JSON.
    Json(Box<RawValue>),
}

impl Details<'_> {
    fn into_value(self) -> Value {
        match self {
            Self::Value(value) => value,
            // Fields that are numbers, texts and the like have no failing serializer.
            other => serde_json::to_value(other).unwrap_or_default(),
        }
    }
}

impl From<Value> for Details<'_> {
    fn from(value: Value) -> Self {
        Self::Value(value)
    }
}

impl From<Data> for Details<'_> {
    fn from(data: Data) -> Self {
        match data {
            Data::Value(value) => Self::Value(value),
            Data::Json(text) => {
                RawValue::from_string(text).map_or(Self::Value(Value::Null), Self::Json)
            }
        }
    }
}

/// The `data` of what became of an attempt.
#[derive(Serialize)]
pub(crate) struct AttemptDetails<'a> {
    attempt: u8,
    dot_at: Option<Timestamp>,
    smtp_code: Option<u16>,
    enhanced_code: Option<String>,
    class: Option<Class>,
    blame: Option<Blame>,
    reply: Option<&'a str>,
    host: Option<&'a str>,
    tls: Option<&'a str>,
    destination: Option<&'a str>,
    source: Option<&'a str>,
    rule: Option<&'a str>,
    rules_version: Option<&'a str>,
    ambiguous: bool,
    next_attempt_at: Option<Timestamp>,
    transaction_ms: u32,
}

/// The `data` of an open or a click.
#[derive(Serialize)]
pub(crate) struct HitDetails<'a> {
    pub(crate) actor: Actor,
    pub(crate) machine_reasons: &'a [Box<str>],
    pub(crate) rules: u16,
    #[serde(serialize_with = "as_shown")]
    pub(crate) hit: FactId,
    pub(crate) link: Option<u16>,
    pub(crate) url: Option<&'a str>,
    pub(crate) user_agent: &'a str,
    pub(crate) network: &'a str,
    pub(crate) visitor: Option<VisitorId>,
}

fn as_shown<S: serde::Serializer>(
    value: &impl std::fmt::Display,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

impl<'a> Told<'a> {
    /// What a fact says.
    pub(crate) fn of_fact(
        kind: EventKind,
        journal: JournalId,
        seq: Seq,
        fact: &'a Fact,
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
    Announcement {
        kind,
        account: page.account.clone(),
        data: json!({
            "visitor": page.visitor,
            "url": page.url,
            "referrer": stated(&page.referrer),
            "title": stated(&page.title),
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
pub(crate) fn announced<'a>(
    told: Told<'a>,
    seq: u64,
    now: Timestamp,
    account: &'a str,
    about: About,
) -> Line<'a> {
    let mut line = bare(told, seq, now, account);
    if let Some(occurred_at) = about.occurred_at {
        line.occurred_at = occurred_at;
    }
    if let Some(id) = about.id {
        line.id = id;
    }
    line.campaign = about.campaign.map(Cow::Owned);
    line.batch_id = about.batch_id;
    line.message_id = about.message_id;
    line.variant = about.variant.map(Cow::Owned);
    line.recipient = about.recipient.map(|of| Recipient {
        email: of.email.into(),
        prospect_id: of.prospect_id.map(Cow::Owned),
    });
    if !about.metadata.is_null() {
        line.metadata = Cow::Owned(about.metadata);
    }
    line
}

/// An event of an account alone.
pub(crate) fn bare<'a>(
    told: Told<'a>,
    seq: u64,
    recorded_at: Timestamp,
    account: &'a str,
) -> Line<'a> {
    Line {
        id: event_id(told.occurred_at, &told.identity),
        seq,
        kind: told.kind,
        occurred_at: told.occurred_at,
        recorded_at,
        account: account.into(),
        campaign: None,
        batch_id: None,
        message_id: None,
        variant: None,
        recipient: None,
        metadata: Cow::Owned(json!({})),
        data: told.data,
    }
}

/// An event of a batch.
pub(crate) fn of_batch<'a>(
    told: Told<'a>,
    seq: u64,
    recorded_at: Timestamp,
    head: &'a BatchHead,
) -> Line<'a> {
    Line {
        campaign: head.campaign.as_deref().map(Cow::Borrowed),
        batch_id: Some(head.id),
        metadata: Cow::Borrowed(&head.metadata),
        ..bare(told, seq, recorded_at, &head.account)
    }
}

/// An event of an address in an account.
pub(crate) fn of_address<'a>(
    told: Told<'a>,
    seq: u64,
    recorded_at: Timestamp,
    account: &'a str,
    email: &'a str,
) -> Line<'a> {
    Line {
        recipient: Some(Recipient {
            email: email.into(),
            prospect_id: None,
        }),
        ..bare(told, seq, recorded_at, account)
    }
}

/// An event of a recipient, which has the variant of this number.
pub(crate) fn of_row<'a>(
    told: Told<'a>,
    seq: u64,
    recorded_at: Timestamp,
    head: &'a BatchHead,
    (row, variant): (&'a Row, u8),
) -> Line<'a> {
    Line {
        variant: head.variant_name(variant).map(Cow::Borrowed),
        message_id: Some(MessageId {
            batch: head.id,
            index: row.index,
        }),
        recipient: Some(Recipient {
            email: row.email.as_str().into(),
            prospect_id: row.prospect_id.as_deref().map(Cow::Borrowed),
        }),
        metadata: metadata_of(head, row.metadata.as_deref()),
        ..of_batch(told, seq, recorded_at, head)
    }
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
pub(crate) fn metadata_of<'a>(head: &'a BatchHead, own: Option<&str>) -> Cow<'a, Value> {
    let own: Option<Value> = own.and_then(|text| serde_json::from_str(text).ok());
    match (&head.metadata, own) {
        (all, None | Some(Value::Null)) => Cow::Borrowed(all),
        (Value::Object(all), Some(Value::Object(own))) => {
            let mut all = all.clone();
            all.extend(own);
            Cow::Owned(Value::Object(all))
        }
        (_, Some(own)) => Cow::Owned(own),
    }
}

fn data_of<'a>(id: FactId, fact: &'a Fact, head: &BatchHead) -> Details<'a> {
    match fact {
        Fact::Attempt(attempt) => data_of_attempt(attempt),
        Fact::Hit(hit) => data_of_hit(id, hit, head),
        Fact::Page(page) => of_page(id, page).data.into(),
        Fact::Revision(revision) => Details::Value(data_of_revision(revision)),
        Fact::Reply(reply) => Details::Value(data_as_told(&reply.data)),
        Fact::Complaint(complaint) => Details::Value(data_as_told(&complaint.data)),
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

fn data_of_attempt(attempt: &Attempt) -> Details<'_> {
    let (ambiguous, next) = match attempt.result {
        AttemptResult::TemporaryError {
            retry_at,
            ambiguous,
        } => (ambiguous, Some(retry_at)),
        AttemptResult::Suppressed(reason) => {
            return Details::Value(json!({ "reason": reason.as_str() }));
        }
        AttemptResult::Cancelled => return Details::Value(json!({})),
        AttemptResult::Delivered | AttemptResult::Bounce | AttemptResult::Failed => (false, None),
    };
    let detail = &attempt.detail;
    Details::Attempt(Box::new(AttemptDetails {
        attempt: attempt.number,
        dot_at: attempt.dot_at,
        smtp_code: detail.smtp_code,
        enhanced_code: detail.enhanced_code.map(|code| code.to_string()),
        class: detail.class,
        blame: detail.blame,
        reply: stated(&detail.reply),
        host: stated(&detail.host),
        tls: detail.tls.as_deref(),
        destination: stated(&detail.destination),
        source: stated(&detail.source),
        rule: detail.rule.as_ref().map(RuleRef::name),
        rules_version: detail.rule.as_ref().and_then(RuleRef::version),
        ambiguous,
        next_attempt_at: next,
        transaction_ms: detail.transaction_ms,
    }))
}

/// None where nothing is said.
fn stated(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn data_of_hit<'a>(id: FactId, hit: &'a Hit, head: &BatchHead) -> Details<'a> {
    match hit.kind {
        HitKind::Unsubscribe => Details::Value(json!({ "list": head.list, "method": hit.method })),
        HitKind::Open | HitKind::Click | HitKind::Probe => Details::Hit(HitDetails {
            actor: hit.verdict.actor,
            machine_reasons: &hit.verdict.machine_reasons,
            rules: hit.verdict.rules,
            hit: id,
            link: hit.link,
            url: hit.target.as_deref(),
            user_agent: &hit.user_agent,
            network: &hit.network,
            visitor: hit.visitor,
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

    #[test]
    fn a_line_says_as_text_what_its_event_says() {
        let at = Timestamp::from_millis(1_763_712_300_007);
        let detail = AttemptDetails {
            attempt: 2,
            dot_at: Some(at),
            smtp_code: Some(451),
            enhanced_code: Some("4.7.1".into()),
            class: None,
            blame: Some(Blame::SenderIp),
            reply: Some("later \"please\""),
            host: None,
            tls: None,
            destination: Some("x.example"),
            source: None,
            rule: None,
            rules_version: None,
            ambiguous: true,
            next_attempt_at: Some(at),
            transaction_ms: 12,
        };
        let given = Data::of(&json!({ "cookie": "c", "pages_joined": 0 }));
        for data in [Details::Attempt(Box::new(detail)), given.into()] {
            let told = Told {
                kind: EventKind::EmailTemporaryError,
                occurred_at: at,
                identity: "x".into(),
                data,
            };
            let line = of_address(told, 7, at, "acme", "a@x.example");
            let text = String::from_utf8(crate::line::text_of(&line, 0)).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), line.into());
            assert!(
                text.contains("a@x.example") && !text.contains('\n'),
                "{text}"
            );
        }
    }
}
