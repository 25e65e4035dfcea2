//! What events say about people: applied to prospects, browsers and bindings.

use std::collections::BTreeMap;
use std::sync::Arc;

use ::engagement::identity::{Binding, Click, Found, Owner, Page};
use ::engagement::prospect::{Entry, Prospect, Seen};
use ::engagement::settle::Judged;
use model::{
    About, Actor, Class, DeliveryStatus, Event, EventKind, EventRecipient, HitKind, MessageId,
    Status, Timestamp, VisitorId,
};
use serde::Serialize;
use serde_json::json;
use store::{Announcement, Data, Happened, MailSign, Sign, StoreError};
use uuid::Uuid;

use super::docs::{Clicked, Docs, Wanted, normalised, person_named, person_of};
use super::revise::Revised;
use super::{Hit, Work, actor_of};

/// The longest address of a link or page that is kept, in bytes.
const URL: usize = 200;

/// What a turn's work will ask for.
pub(super) fn wanted(work: &Work, revised: &[Revised]) -> BTreeMap<Arc<str>, Wanted> {
    let mut all: BTreeMap<Arc<str>, Wanted> = BTreeMap::new();
    for sign in &work.told {
        match sign {
            Sign::Mail(mail) => {
                let of = all.entry(mail.account.clone()).or_default();
                of.people.push(person_of_mail(mail).into());
            }
            Sign::Other(event) => {
                if let Some(recipient) = &event.recipient {
                    let of = all.entry(event.account.as_str().into()).or_default();
                    of.people.push(person_of(recipient).into());
                }
            }
        }
    }
    let (mut read, mut asked) = (None, None);
    for (judged, hit) in &work.judged {
        let (false, Some(hit)) = (judged.again, hit) else {
            continue;
        };
        if judged.verdict.actor == Actor::Machine {
            continue;
        }
        let of = all.entry(hit.account.clone()).or_default();
        // Hits on one message, which are one person's, come in a row.
        if read.replace(hit.message) != Some(hit.message) {
            of.people.push(hit.person.to_string());
        }
        let clicked = hit.kind == HitKind::Click && judged.verdict.actor == Actor::Human;
        if let Some(browser) = hit.visitor.filter(|_| clicked) {
            of.browsers.push(browser);
            of.clicks.push(Clicked {
                browser,
                person: hit.person.clone(),
                binding: hit.event_id,
            });
            if asked.replace(hit.message) != Some(hit.message) {
                of.consents.insert(normalised(&hit.email));
            }
        }
    }
    for revised in revised {
        let row = &revised.story.recipient.row;
        let of = all
            .entry(revised.story.batch.account.as_str().into())
            .or_default();
        let email = row.email.to_string();
        of.people
            .push(person_named(row.prospect_id.as_deref(), &email).into());
        of.bindings.push(revised.event_id);
    }
    all
}

fn person_of_mail(mail: &MailSign) -> Box<str> {
    person_named(mail.prospect_id.as_deref(), &mail.email)
}

/// Applies what is no hit.
pub(super) async fn told(docs: &mut Docs<'_>, sign: &Sign) -> Result<(), StoreError> {
    let event = match sign {
        Sign::Mail(mail) => return delivered(docs, mail).await,
        Sign::Other(event) => event,
    };
    match event.kind {
        EventKind::PageViewed => page(docs, event).await,
        EventKind::IdentityRevoked => revoked(docs, event).await,
        _ => of_person(docs, event).await,
    }
}

/// A message was delivered: the most frequent of all.
async fn delivered(docs: &mut Docs<'_>, mail: &MailSign) -> Result<(), StoreError> {
    let Happened::Delivered { .. } = mail.what else {
        return Ok(());
    };
    let campaign = mail.campaign.clone().unwrap_or_default();
    let entry = Entry {
        campaign: campaign.clone(),
        message: Some(mail.message),
        ..Entry::new(mail.event_id, EventKind::EmailDelivered, mail.at)
    };
    let change = |person: &mut Prospect| {
        person.email.clone_from(&mail.email);
        let new = person.apply(entry);
        if new {
            person.mailed(&campaign, DeliveryStatus::Ok, mail.at);
        }
        new
    };
    docs.change(&mail.account, &person_of_mail(mail), change)
        .await
}

/// An event about a person that is neither hit nor page nor delivery.
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
    let entry = Entry {
        human,
        ..entry_of(event)
    };
    let campaign = entry.campaign.clone();
    if person.apply(entry)
        && let Some(status) = became
    {
        person.mailed(&campaign, status, event.occurred_at);
    }
    Ok(())
}

fn class_of(event: &Event) -> Option<Class> {
    event.data["class"]
        .as_str()
        .and_then(|class| class.parse().ok())
}

fn entry_of(event: &Event) -> Entry {
    Entry {
        campaign: event.campaign.as_deref().unwrap_or_default().into(),
        message: event.message_id,
        url: short(event.data["url"].as_str().unwrap_or_default()).into(),
        ..Entry::new(event.id, event.kind, event.occurred_at)
    }
}

pub(super) fn short(url: &str) -> &str {
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
        url: page.url.into(),
        visitor: Some(visitor),
        human: page.human,
        ..Entry::new(id_of(&page.event_id), EventKind::PageViewed, page.at)
    }
}

/// An id that was kept as text.
fn id_of(text: &str) -> Uuid {
    text.parse().unwrap_or(Uuid::nil())
}

/// Applies a hit whose verdict is given.
pub(super) async fn judged(
    docs: &mut Docs<'_>,
    hit: &Hit,
    judged: &Judged,
) -> Result<(), StoreError> {
    if judged.verdict.actor == Actor::Machine {
        return Ok(());
    }
    let human = judged.verdict.actor == Actor::Human;
    let key = &*hit.person;
    let entry = Entry {
        campaign: hit.campaign.clone(),
        message: Some(hit.message),
        url: hit.url.clone(),
        human,
        ..Entry::new(hit.event_id, hit.event_kind(), hit.at)
    };
    let apply = |person: &mut Prospect| {
        person.email.clone_from(&hit.email);
        person.apply(entry)
    };
    docs.change(&hit.account, key, apply).await?;
    if human && hit.kind == HitKind::Click {
        bind(docs, hit, key).await?;
    }
    Ok(())
}

/// A person's click says whose browser it is.
async fn bind(docs: &mut Docs<'_>, hit: &Hit, key: &str) -> Result<(), StoreError> {
    let Some(cookie) = hit.visitor else {
        return Ok(());
    };
    // Said between the click and its verdict.
    if !docs.may_bind(&hit.account, &hit.email) {
        return Ok(());
    }
    let (account, message) = (&*hit.account, hit.message);
    let is_theirs = docs.is_owned(account, cookie, key).await?;
    if !is_theirs && docs.binding(account, hit.event_id).await?.is_some() {
        // Known from before a crash, and perhaps revoked since.
        return Ok(());
    }
    let binding_id = hit.event_id.to_string();
    let person = docs.prospect(account, key).await?;
    let clicked_before = person.clicked_before(message, cookie);
    let email = person.email.clone();
    let click = Click {
        prospect: key.into(),
        binding: binding_id.as_str().into(),
        fresh: VisitorId::new(hit.at, hit.event_id.as_u128()),
        clicked_before,
        at: hit.at,
    };
    let found = docs.click(account, cookie, click).await?;
    let (visitor, from, forward_suspected, pages) = match found {
        Found::Same => return Ok(()),
        Found::Forwarded { owner } => {
            let data = conflict(hit, cookie, &owner, None, "forwarded");
            docs.tell(cookie, news(hit, EventKind::IdentityConflict, data));
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
        theirs = before.left(owner.visitor, hit.at);
        let data = conflict(hit, cookie, &owner, Some(visitor), "other_prospect");
        docs.tell(cookie, news(hit, EventKind::IdentityConflict, data));
    }
    let data = Data::of(&Bound {
        binding_id: &binding_id,
        visitor,
        cookie,
        prospect_id: key,
        evidence: Evidence::of(hit),
        forward_suspected,
        confidence: if forward_suspected { "low" } else { "high" },
        pages_joined: pages.len() + theirs.len(),
    });
    docs.tell(cookie, news(hit, EventKind::IdentityBound, data));
    let binding = Binding {
        cookie,
        visitor,
        prospect: key.into(),
        email,
        at: hit.at,
        message,
        event_id: binding_id.as_str().into(),
        forward_suspected,
        revoked_at: None,
    };
    docs.set_binding(account, hit.event_id, binding);
    let person = docs.prospect(account, key).await?;
    person.bind(Seen {
        visitor,
        binding: hit.event_id,
        since: hit.at,
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

/// The click that proves it.
#[derive(Serialize)]
struct Evidence {
    r#type: &'static str,
    message_id: MessageId,
    event_id: Uuid,
}

impl Evidence {
    fn of(hit: &Hit) -> Self {
        Self {
            r#type: "click",
            message_id: hit.message,
            event_id: hit.event_id,
        }
    }
}

/// The data of `identity.bound`.
#[derive(Serialize)]
struct Bound<'a> {
    binding_id: &'a str,
    visitor: VisitorId,
    cookie: VisitorId,
    prospect_id: &'a str,
    evidence: Evidence,
    forward_suspected: bool,
    confidence: &'static str,
    pages_joined: usize,
}

/// The data of `identity.conflict`.
fn conflict(
    hit: &Hit,
    cookie: VisitorId,
    owner: &Owner,
    new_visitor: Option<VisitorId>,
    reason: &str,
) -> Data {
    let data = json!({
        "visitor": owner.visitor, "cookie": cookie, "prospect_id": owner.prospect,
        "binding_id": owner.binding, "new_visitor": new_visitor, "reason": reason,
        "evidence": Evidence::of(hit),
    });
    data.into()
}

/// An event of identity that follows from a hit: its id is always the same.
fn news(hit: &Hit, kind: EventKind, data: Data) -> Announcement {
    let mut bytes = hit.event_id.into_bytes();
    // Behind the version and the time, which stay those of the click.
    bytes[15] ^= kind.code() + 1;
    bytes[14] ^= 0xa5;
    Announcement {
        kind,
        account: hit.account.as_ref().into(),
        data,
        about: About {
            id: Some(Uuid::from_bytes(bytes)),
            occurred_at: Some(hit.at),
            campaign: Some(hit.campaign.as_ref())
                .filter(|name| !name.is_empty())
                .map(str::to_owned),
            batch_id: Some(hit.message.batch),
            message_id: Some(hit.message),
            variant: hit.variant.as_deref().map(str::to_owned),
            recipient: Some(EventRecipient {
                email: hit.email.to_string(),
                prospect_id: hit.prospect_id.as_deref().map(str::to_owned),
            }),
            metadata: hit.metadata.clone(),
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
    let gone = person.unbind(id_of(binding), owner.visitor);
    let browser = docs.browser(account, cookie).await?;
    if browser.owner().is_none() {
        for entry in gone {
            browser.see(Page {
                event_id: entry.event_id.to_string().into(),
                at: entry.at,
                url: entry.url.as_ref().into(),
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
    let revise = |person: &mut Prospect| person.revise(of.event_id, of.human);
    docs.change(&account, &person_of(&recipient), revise)
        .await?;
    if of.human || of.kind != HitKind::Click {
        return Ok(());
    }
    let binding_id = of.event_id.to_string();
    let Some(binding) = docs.binding(&account, of.event_id).await?.cloned() else {
        return Ok(());
    };
    if binding.revoked_at.is_some() {
        return Ok(());
    }
    let now = docs.now;
    let (binding, announcement) = revocation(
        &account,
        &binding_id,
        binding,
        recipient,
        "reclassified",
        now,
    );
    let cookie = binding.cookie;
    docs.set_binding(&account, of.event_id, binding);
    docs.tell(cookie, announcement);
    undo(docs, &account, &binding_id, cookie).await
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
        })
        .into(),
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
