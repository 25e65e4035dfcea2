//! Signs: what is read of an event by whoever follows people, without the JSON that others are told.
//!
//! Nearly every event tells of a delivery or a hit. Of these a follower needs a few fields, which
//! stand in the packed facts; making the whole event of each, and looking its fields up again, cost
//! a fifth of all that the delivery of a message costs. Everything else is rare, and is the event
//! itself. Pure, and the same for every engine. Must not do I/O.

use crate::{Result, StoreError};
use model::{
    Actor, Event, EventKind, FactId, Hit, HitKind, MessageId, Timestamp, Verdict, VisitorId,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::sync::Arc;
use uuid::Uuid;

/// One event, as far as it is read.
#[derive(Debug, Clone, PartialEq)]
pub enum Sign {
    /// A delivery or a hit.
    Mail(Box<MailSign>),
    /// Any other.
    Other(Box<Event>),
}

/// What happened to a message.
#[derive(Debug, Clone, PartialEq)]
pub struct MailSign {
    /// Of the event.
    pub event_id: Uuid,
    /// When it happened.
    pub at: Timestamp,
    /// When the store learned of it.
    pub recorded_at: Timestamp,
    /// Whose.
    pub account: Arc<str>,
    /// The caller's name for the campaign.
    pub campaign: Option<Arc<str>>,
    /// The message.
    pub message: MessageId,
    /// The recipient's address.
    pub email: Box<str>,
    /// The caller's name for the recipient.
    pub prospect_id: Option<Box<str>>,
    /// What it was.
    pub what: Happened,
}

/// What is told by a [`MailSign`].
#[derive(Debug, Clone, PartialEq)]
pub enum Happened {
    /// `email.delivered`
    Delivered {
        /// When the final dot was sent.
        dot_at: Option<Timestamp>,
    },
    /// `email.opened`, `email.clicked`
    Hit(Box<HitSign>),
}

/// A hit.
#[derive(Debug, Clone, PartialEq)]
pub struct HitSign {
    /// Its fact.
    pub id: FactId,
    /// What it was, with the verdict that it was told with.
    pub hit: Hit,
    /// The variant of an A/B test.
    pub variant: Option<Box<str>>,
    /// What the caller gave with the batch and the recipient.
    pub metadata: Value,
}

/// A page of signs and the cursor after it.
#[derive(Debug, Clone, PartialEq)]
pub struct SignPage {
    /// Oldest first.
    pub signs: Vec<Sign>,
    /// Where to go on; opaque, also when no event came.
    pub next: String,
}

impl Sign {
    /// What is read of an event.
    pub fn of(event: Event) -> Self {
        match event.kind {
            EventKind::EmailDelivered | EventKind::EmailOpened | EventKind::EmailClicked => {
                let mail = mail_of(&event);
                mail.map_or_else(
                    || Self::Other(Box::new(event)),
                    |of| Self::Mail(Box::new(of)),
                )
            }
            _ => Self::Other(Box::new(event)),
        }
    }

    /// When the store learned of it.
    pub fn recorded_at(&self) -> Timestamp {
        match self {
            Self::Mail(of) => of.recorded_at,
            Self::Other(event) => event.recorded_at,
        }
    }

    /// Reads an event as it stands in a stream: JSON that begins with its id, number and type.
    pub(crate) fn read(json: &[u8]) -> Result<Self> {
        let read = match type_of(json) {
            Some("email.delivered") => delivery(json),
            Some("email.opened") => hit(json, HitKind::Open),
            Some("email.clicked") => hit(json, HitKind::Click),
            _ => Ok(None),
        };
        // What is not as expected is read as any event is.
        if let Ok(Some(mail)) = read {
            return Ok(Self::Mail(Box::new(mail)));
        }
        let event = serde_json::from_slice(json);
        event
            .map(Self::of)
            .map_err(|error| StoreError::Damaged(format!("an event: {error}")))
    }
}

/// The type, where it stands in its place: behind an id of a known length and a number.
fn type_of(json: &[u8]) -> Option<&str> {
    const BEFORE: &[u8] = b"\"type\":\"";
    let head = json.get(..json.len().min(128))?;
    let at = head.windows(BEFORE.len()).position(|of| of == BEFORE)?;
    let rest = head.get(at + BEFORE.len()..)?;
    let end = rest.iter().position(|byte| *byte == b'"')?;
    std::str::from_utf8(rest.get(..end)?).ok()
}

/// An event of a message, of which only some is wanted.
#[derive(Deserialize)]
struct Told<D, M> {
    id: Uuid,
    occurred_at: Timestamp,
    recorded_at: Timestamp,
    account: Arc<str>,
    campaign: Option<Arc<str>>,
    message_id: MessageId,
    variant: Option<Box<str>>,
    recipient: Person,
    metadata: M,
    data: D,
}

#[derive(Deserialize)]
struct Person {
    email: Box<str>,
    prospect_id: Option<Box<str>>,
}

/// The `data` of a delivery.
#[derive(Deserialize)]
struct OfDelivery {
    #[serde(default)]
    dot_at: Option<Timestamp>,
}

/// The `data` of a hit.
#[derive(Deserialize)]
struct OfHit {
    hit: Box<str>,
    actor: Actor,
    #[serde(default)]
    machine_reasons: Vec<Box<str>>,
    #[serde(default)]
    rules: u16,
    link: Option<u16>,
    url: Option<Box<str>>,
    #[serde(default)]
    user_agent: Box<str>,
    #[serde(default)]
    network: Box<str>,
    visitor: Option<VisitorId>,
}

impl OfHit {
    fn named(self, kind: HitKind, message: MessageId, at: Timestamp) -> Option<(FactId, Hit)> {
        let id = self.hit.parse().ok()?;
        let hit = Hit {
            kind,
            message,
            at,
            link: self.link,
            target: self.url,
            user_agent: self.user_agent,
            network: self.network,
            visitor: self.visitor,
            method: None,
            verdict: Verdict {
                actor: self.actor,
                machine_reasons: self.machine_reasons,
                rules: self.rules,
            },
        };
        Some((id, hit))
    }
}

impl<D, M> Told<D, M> {
    /// As a sign of what `what` makes of the rest: data, variant and metadata.
    fn sign(
        self,
        what: impl FnOnce(D, Option<Box<str>>, M) -> Option<Happened>,
    ) -> Option<MailSign> {
        Some(MailSign {
            event_id: self.id,
            at: self.occurred_at,
            recorded_at: self.recorded_at,
            account: self.account,
            campaign: self.campaign,
            message: self.message_id,
            email: self.recipient.email,
            prospect_id: self.recipient.prospect_id,
            what: what(self.data, self.variant, self.metadata)?,
        })
    }
}

fn delivery(json: &[u8]) -> serde_json::Result<Option<MailSign>> {
    let told: Told<OfDelivery, IgnoredAny> = serde_json::from_slice(json)?;
    Ok(told.sign(|data, _, _| {
        Some(Happened::Delivered {
            dot_at: data.dot_at,
        })
    }))
}

fn hit(json: &[u8], kind: HitKind) -> serde_json::Result<Option<MailSign>> {
    let told: Told<OfHit, Value> = serde_json::from_slice(json)?;
    let (message, at) = (told.message_id, told.occurred_at);
    Ok(told.sign(|data, variant, metadata| {
        let (id, hit) = data.named(kind, message, at)?;
        let sign = HitSign {
            id,
            hit,
            variant,
            metadata,
        };
        Some(Happened::Hit(Box::new(sign)))
    }))
}

fn mail_of(event: &Event) -> Option<MailSign> {
    let (message, recipient) = (event.message_id?, event.recipient.as_ref()?);
    let of_hit = |kind| {
        let data = OfHit::deserialize(&event.data).ok()?;
        let (id, hit) = data.named(kind, message, event.occurred_at)?;
        Some(Happened::Hit(Box::new(HitSign {
            id,
            hit,
            variant: event.variant.as_deref().map(Into::into),
            metadata: event.metadata.clone(),
        })))
    };
    let what = match event.kind {
        EventKind::EmailOpened => of_hit(HitKind::Open)?,
        EventKind::EmailClicked => of_hit(HitKind::Click)?,
        EventKind::EmailDelivered => {
            let data = OfDelivery::deserialize(&event.data).ok();
            let dot_at = data.and_then(|data| data.dot_at);
            Happened::Delivered { dot_at }
        }
        _ => return None,
    };
    Some(MailSign {
        event_id: event.id,
        at: event.occurred_at,
        recorded_at: event.recorded_at,
        account: event.account.as_str().into(),
        campaign: event.campaign.as_deref().map(Arc::from),
        message,
        email: recipient.email.as_str().into(),
        prospect_id: recipient.prospect_id.as_deref().map(Into::into),
        what,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(kind: EventKind, data: Value) -> Event {
        Event {
            id: Uuid::from_u128(7),
            seq: 9,
            kind,
            occurred_at: Timestamp::from_millis(1_763_712_300_007),
            recorded_at: Timestamp::from_millis(1_763_712_300_107),
            account: "acme".into(),
            campaign: Some("spring \"sale\"".into()),
            batch_id: None,
            message_id: Some(MessageId {
                batch: model::BatchId::from_bytes([3; 16]),
                index: 41,
            }),
            variant: Some("B".into()),
            recipient: Some(model::EventRecipient {
                email: "a@x.example".into(),
                prospect_id: Some("p-1".into()),
            }),
            metadata: serde_json::json!({"type": "email.clicked"}),
            data,
        }
    }

    #[test]
    fn a_sign_is_the_same_read_from_text_or_from_the_event() {
        let fact = FactId {
            journal: model::JournalId::from_bytes([5; 16]),
            seq: 12,
        };
        let click = serde_json::json!({
            "hit": fact.to_string(), "actor": "machine", "machine_reasons": ["head"], "rules": 3,
            "link": 2, "url": "https://x.example/\u{e4}\n", "user_agent": "curl", "network": "192.0.2.0/24",
            "visitor": VisitorId::from_bytes([8; 16]),
        });
        let dot = serde_json::json!({"dot_at": "2025-11-21T08:05:00.007Z", "reply": "Ok"});
        for (kind, data, is_mail) in [
            (EventKind::EmailDelivered, dot, true),
            (
                EventKind::EmailDelivered,
                serde_json::json!({"dot_at": null}),
                true,
            ),
            (EventKind::EmailClicked, click.clone(), true),
            (EventKind::EmailOpened, click.clone(), true),
            (EventKind::EmailOpened, serde_json::json!({"hit": 5}), false),
            (EventKind::Conversion, click, false),
        ] {
            let event = event(kind, data);
            let text = serde_json::to_vec(&event).unwrap();
            let read = Sign::read(&text).unwrap();
            assert_eq!(read, Sign::of(event.clone()));
            assert_eq!(matches!(read, Sign::Mail(_)), is_mail, "{event:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, kind in "email\\.(delivered|opened|clicked)") {
            let _read = Sign::read(&bytes);
            let begun = [format!("{{\"type\":\"{kind}\",").as_bytes(), &bytes].concat();
            let _read = Sign::read(&begun);
        }
    }
}
