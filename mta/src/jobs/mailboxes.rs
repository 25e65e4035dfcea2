//! Mailboxes that are full again and again: three refusals for that in 30 days stop further mail
//! (contract, section 6, profile `default`).
//!
//! Engagement, which reads the events, shows them; one that is shown twice suppresses nobody twice.
//! Must not judge any other refusal: those stop mail with the attempt itself.

use std::time::Duration;

use model::{
    AttemptResult, Class, EmailAddress, Event, EventKind, MessageId, Priority, Status,
    SuppressionReason, Timestamp,
};
use store::{Store, StoreError, Suppression};

/// So many refusals …
const REFUSALS: usize = 3;
/// … within this time.
const WITHIN: Duration = Duration::from_secs(30 * 24 * 3_600);

/// Counts what came before a refusal for a full mailbox, and stops mail to it if that is enough.
pub(super) async fn told(
    store: &dyn Store,
    event: &Event,
    now: Timestamp,
) -> Result<(), StoreError> {
    if event.kind != EventKind::EmailBounced || event.data["class"] != Class::MailboxFull.as_str() {
        return Ok(());
    }
    let recipient = event.recipient.as_ref();
    let email = recipient.and_then(|of| of.email.parse::<EmailAddress>().ok());
    let Some(email) = email.map(|email| email.normalised().into_owned()) else {
        return Ok(());
    };
    let story = store.address(&event.account, &email).await?;
    let stops = |of: &Suppression| of.list.is_none() && of.stops("", Priority::Transactional);
    if story.suppressions.iter().any(stops) {
        return Ok(());
    }
    let refused = story
        .messages
        .iter()
        .filter(|(_, row)| row.status == Status::Bounce && row.class == Some(Class::MailboxFull));
    let refused: Vec<_> = refused
        .map(|(batch, row)| MessageId {
            batch: batch.id,
            index: row.row.index,
        })
        .collect();
    let mut times = 0;
    for message in refused {
        times += usize::from(was_within(store, message, event.occurred_at).await?);
        if times == REFUSALS {
            break;
        }
    }
    if times < REFUSALS {
        return Ok(());
    }
    let entry = Suppression {
        email,
        account: event.account.clone(),
        list: None,
        reason: SuppressionReason::Inactive,
        source: "bounce".to_owned(),
        created_at: now,
    };
    store.suppress(vec![entry], now).await
}

/// Whether a message was refused in the time before `last`.
async fn was_within(
    store: &dyn Store,
    message: MessageId,
    last: Timestamp,
) -> Result<bool, StoreError> {
    let Some(story) = store.message(message).await? else {
        return Ok(false);
    };
    let mut refusals = story.attempts.iter();
    let is_within = |at: Timestamp| at <= last && at + WITHIN >= last;
    Ok(refusals.any(|of| of.result == AttemptResult::Bounce && is_within(of.at)))
}
