//! What events say about people: applied to prospects, browsers and bindings.

use ::engagement::identity::{Binding, Click, Found, Page};
use ::engagement::prospect::{Entry, Seen};
use ::engagement::settle::Judged;
use model::{
    About, Actor, Class, DeliveryStatus, Event, EventKind, EventRecipient, HitKind, MessageId,
    Status, Timestamp, VisitorId,
};
use serde_json::{Value, json};
use store::{Announcement, StoreError};

use super::actor_of;
use super::docs::{Docs, person_of};
use super::revise::Revised;

/// The longest address of a link or page that is kept, in bytes.
const URL: usize = 200;

/// Applies an event that is no hit.
pub(super) async fn told(docs: &mut Docs<'_>, event: &Event) -> Result<(), StoreError> {
    match event.kind {
        EventKind::PageViewed => page(docs, event).await,
        EventKind::IdentityRevoked => revoked(docs, event).await,
        _ => of_person(docs, event).await,
    }
}

/// An event about a person that is neither hit nor page.
async fn of_person(docs: &mut Docs<'_>, event: &Event) -> Result<(), StoreError> {
    let Some(recipient) = &event.recipient else {
        return Ok(());
    };
    let human = match event.kind {
        EventKind::EmailTemporaryError => return Ok(()),
        EventKind::EmailReplied | EventKind::Conversion => true,
        _ => false,
    };
    let became = match event.kind {
        EventKind::EmailDelivered => Some(DeliveryStatus::Ok),
        EventKind::EmailBounced => DeliveryStatus::of(Status::Bounce, class_of(event)),
        EventKind::EmailFailed => DeliveryStatus::of(Status::Failed, class_of(event)),
        _ => None,
    };
    let person = docs.prospect(&event.account, &person_of(recipient)).await?;
    if !recipient.email.is_empty() {
        person.email = recipient.email.as_str().into();
    }
    let campaign = event.campaign.as_deref().unwrap_or_default();
    let entry = Entry {
        human,
        ..entry_of(event)
    };
    if person.apply(entry)
        && let Some(status) = became
    {
        person.mailed(campaign, status, event.occurred_at);
    }
    Ok(())
}

fn class_of(event: &Event) -> Option<Class> {
    event.data["class"]
        .as_str()
        .and_then(|class| class.parse().ok())
}

fn entry_of(event: &Event) -> Entry {
    let message = event
        .message_id
        .map(|id| id.to_string())
        .unwrap_or_default();
    Entry {
        campaign: event.campaign.as_deref().unwrap_or_default().into(),
        message_id: message.into(),
        url: short(event.data["url"].as_str().unwrap_or_default()).into(),
        ..Entry::new(&event.id.to_string(), event.kind, event.occurred_at)
    }
}

fn short(url: &str) -> &str {
    let mut end = url.len().min(URL);
    while !url.is_char_boundary(end) {
        end -= 1;
    }
    url.get(..end).unwrap_or_default()
}

fn visitor_of(event: &Event) -> Option<VisitorId> {
    event.data["visitor"]
        .as_str()
        .and_then(|id| id.parse().ok())
}

/// A page becomes its browser's owner's, or waits for one.
async fn page(docs: &mut Docs<'_>, event: &Event) -> Result<(), StoreError> {
    let human = actor_of(event) == Actor::Human;
    let Some(cookie) = visitor_of(event).filter(|_| actor_of(event) != Actor::Machine) else {
        return Ok(());
    };
    let browser = docs.browser(&event.account, cookie).await?;
    let seen = Page {
        event_id: event.id.to_string().into(),
        at: event.occurred_at,
        url: short(event.data["url"].as_str().unwrap_or_default()).into(),
        human,
    };
    let Some(owner) = browser.owner().cloned() else {
        browser.see(seen);
        return Ok(());
    };
    let person = docs.prospect(&event.account, &owner.prospect).await?;
    person.apply(page_entry(seen, owner.visitor));
    Ok(())
}

fn page_entry(page: Page, visitor: VisitorId) -> Entry {
    Entry {
        url: page.url,
        visitor: Some(visitor),
        human: page.human,
        ..Entry::new(&page.event_id, EventKind::PageViewed, page.at)
    }
}

/// Applies a hit whose verdict is given.
pub(super) async fn judged(
    docs: &mut Docs<'_>,
    event: &Event,
    judged: &Judged,
) -> Result<(), StoreError> {
    let Some(recipient) = &event.recipient else {
        return Ok(());
    };
    if judged.verdict.actor == Actor::Machine {
        return Ok(());
    }
    let human = judged.verdict.actor == Actor::Human;
    let key = person_of(recipient);
    let person = docs.prospect(&event.account, &key).await?;
    person.email = recipient.email.as_str().into();
    person.apply(Entry {
        human,
        ..entry_of(event)
    });
    if human && event.kind == EventKind::EmailClicked {
        bind(docs, event, &key).await?;
    }
    Ok(())
}

/// A person's click says whose browser it is.
async fn bind(docs: &mut Docs<'_>, event: &Event, key: &str) -> Result<(), StoreError> {
    let (Some(cookie), Some(message)) = (visitor_of(event), event.message_id) else {
        return Ok(());
    };
    let (account, binding_id) = (event.account.as_str(), event.id.to_string());
    if docs.binding(account, &binding_id).await?.is_some() {
        // Known from before a crash, and perhaps revoked since.
        return Ok(());
    }
    let person = docs.prospect(account, key).await?;
    let clicked_before = person.clicked_before(&message.to_string(), cookie);
    let email = person.email.clone();
    let click = Click {
        prospect: key.into(),
        binding: binding_id.as_str().into(),
        fresh: VisitorId::new(event.occurred_at, event.id.as_u128()),
        clicked_before,
        at: event.occurred_at,
    };
    let found = docs.browser(account, cookie).await?.click(cookie, click);
    let (visitor, from, forward_suspected, pages) = match found {
        Found::Same => return Ok(()),
        Found::Forwarded { owner } => {
            let data = json!({
                "visitor": owner.visitor, "cookie": cookie, "prospect_id": owner.prospect,
                "binding_id": owner.binding, "new_visitor": null, "reason": "forwarded",
                "evidence": evidence(message, event),
            });
            docs.tell(news(event, EventKind::IdentityConflict, data));
            return Ok(());
        }
        Found::Bound {
            visitor,
            from,
            forward_suspected,
            pages,
        } => (visitor, from, forward_suspected, pages),
    };
    let mut theirs = Vec::new();
    if let Some(owner) = from {
        // What the click led to was seen before the click was known to be a person's.
        let before = docs.prospect(account, &owner.prospect).await?;
        theirs = before.left(owner.visitor, event.occurred_at);
        let data = json!({
            "visitor": owner.visitor, "cookie": cookie, "prospect_id": owner.prospect,
            "binding_id": owner.binding, "new_visitor": visitor, "reason": "other_prospect",
            "evidence": evidence(message, event),
        });
        docs.tell(news(event, EventKind::IdentityConflict, data));
    }
    let data = json!({
        "binding_id": binding_id, "visitor": visitor, "cookie": cookie, "prospect_id": key,
        "evidence": evidence(message, event), "forward_suspected": forward_suspected,
        "confidence": if forward_suspected { "low" } else { "high" }, "pages_joined": pages.len() + theirs.len(),
    });
    docs.tell(news(event, EventKind::IdentityBound, data));
    let binding = Binding {
        cookie,
        visitor,
        prospect: key.into(),
        email,
        at: event.occurred_at,
        message,
        event_id: binding_id.as_str().into(),
        forward_suspected,
        revoked_at: None,
    };
    docs.set_binding(account, &binding_id, &binding);
    let person = docs.prospect(account, key).await?;
    person.bind(Seen {
        visitor,
        binding: binding_id.into(),
        since: event.occurred_at,
    });
    for page in pages {
        person.apply(page_entry(page, visitor));
    }
    for entry in theirs {
        person.apply(Entry {
            visitor: Some(visitor),
            ..entry
        });
    }
    Ok(())
}

fn evidence(message: MessageId, event: &Event) -> Value {
    json!({ "type": "click", "message_id": message, "event_id": event.id })
}

/// An event of identity that follows from `event`: its id is always the same.
fn news(event: &Event, kind: EventKind, data: Value) -> Announcement {
    let mut bytes = event.id.into_bytes();
    // Behind the version and the time, which stay those of the click.
    bytes[15] ^= kind.code() + 1;
    bytes[14] ^= 0xa5;
    Announcement {
        kind,
        account: event.account.as_str().into(),
        data,
        about: About {
            id: Some(uuid::Uuid::from_bytes(bytes)),
            occurred_at: Some(event.occurred_at),
            campaign: event.campaign.clone(),
            batch_id: event.batch_id,
            message_id: event.message_id,
            variant: event.variant.clone(),
            recipient: event.recipient.clone(),
            metadata: event.metadata.clone(),
        },
    }
}

/// A binding was revoked, by an operator or by ourselves: whoever had the browser before has it.
async fn revoked(docs: &mut Docs<'_>, event: &Event) -> Result<(), StoreError> {
    let cookie = event.data["cookie"].as_str().and_then(|id| id.parse().ok());
    match (event.data["binding_id"].as_str(), cookie) {
        (Some(binding), Some(cookie)) => undo(docs, &event.account, binding, cookie).await,
        _ => Ok(()),
    }
}

async fn undo(
    docs: &mut Docs<'_>,
    account: &str,
    binding: &str,
    cookie: VisitorId,
) -> Result<(), StoreError> {
    let browser = docs.browser(account, cookie).await?;
    let Some(owner) = browser.revoke(binding) else {
        return Ok(());
    };
    let person = docs.prospect(account, &owner.prospect).await?;
    let gone = person.unbind(binding, owner.visitor);
    let browser = docs.browser(account, cookie).await?;
    if browser.owner().is_none() {
        for entry in gone {
            browser.see(Page {
                event_id: entry.event_id,
                at: entry.at,
                url: entry.url,
                human: entry.human,
            });
        }
    }
    Ok(())
}

/// A verdict was revised: what a person did is taken back or given back, and a machine's click
/// proves nothing about a browser.
pub(super) async fn revised(docs: &mut Docs<'_>, of: &Revised) -> Result<(), StoreError> {
    let row = &of.story.recipient.row;
    let recipient = EventRecipient {
        email: row.email.to_string(),
        prospect_id: row.prospect_id.as_deref().map(str::to_owned),
    };
    let account = of.story.batch.account.clone();
    let person = docs.prospect(&account, &person_of(&recipient)).await?;
    person.revise(&of.event_id, of.human);
    if of.human || of.kind != HitKind::Click {
        return Ok(());
    }
    let Some(binding) = docs.binding(&account, &of.event_id).await? else {
        return Ok(());
    };
    if binding.revoked_at.is_some() {
        return Ok(());
    }
    let now = docs.now;
    let (binding, announcement) = revocation(
        &account,
        &of.event_id,
        binding,
        recipient,
        "reclassified",
        now,
    );
    docs.set_binding(&account, &of.event_id, &binding);
    docs.tell(announcement);
    undo(docs, &account, &of.event_id, binding.cookie).await
}

/// A binding as it is once revoked, and the event that tells of it.
pub(crate) fn revocation(
    account: &str,
    id: &str,
    binding: Binding,
    recipient: EventRecipient,
    reason: &str,
    now: Timestamp,
) -> (Binding, Announcement) {
    let announcement = Announcement {
        kind: EventKind::IdentityRevoked,
        account: account.into(),
        data: json!({
            "binding_id": id, "visitor": binding.visitor, "cookie": binding.cookie,
            "prospect_id": binding.prospect, "reason": reason,
        }),
        about: About {
            occurred_at: Some(now),
            message_id: Some(binding.message),
            batch_id: Some(binding.message.batch),
            recipient: Some(recipient),
            ..About::default()
        },
    };
    let binding = Binding {
        revoked_at: Some(now),
        ..binding
    };
    (binding, announcement)
}
