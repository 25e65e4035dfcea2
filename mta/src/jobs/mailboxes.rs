//! Mailboxes that are full again and again: three refusals for that in 30 days stop further mail
//! (contract, section 6, profile `default`).
//!
//! One node at a time reads bounces by cursor; what is read twice after a crash suppresses nobody
//! twice. Must not judge any other refusal: those stop mail with the attempt itself.

use std::sync::Arc;
use std::time::Duration;

use model::{
    AttemptResult, Class, EmailAddress, Event, EventKind, JournalId, MessageId, Priority, Status,
    SuppressionReason, Timestamp,
};
use service::clock::SharedClock;
use service::tasks::Shutdown;
use store::{EVENT_CURSORS, EventQuery, FeedPlace, Note, Store, StoreError, Suppression};

/// The job's name, and that of its cursor.
const JOB: &str = "mailboxes";
/// How long the job is one node's, and after how long it is renewed.
const LEASE: Duration = Duration::from_secs(45);
/// Between tries to get the job, and after the store failed.
const PAUSE: Duration = Duration::from_secs(5);
/// Between looks: bounces come in numbers.
const BREATH: Duration = Duration::from_secs(1);
/// A look at least so often, which renews the lease.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Events read at once.
const PAGE: u32 = 500;
/// So many refusals …
const REFUSALS: usize = 3;
/// … within this time.
const WITHIN: Duration = Duration::from_secs(30 * 24 * 3_600);

/// The job; see the module.
pub(crate) struct Mailboxes {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    /// Who runs it.
    pub(crate) node: JournalId,
}

impl Mailboxes {
    /// Runs until the end begins.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let keep = async {
            loop {
                if let Err(error) = self.tenure().await {
                    tracing::debug!(%error, "full mailboxes are looked at later");
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = keep => {}
            () = shutdown.begun() => {}
        }
        let now = self.clock.now();
        let ended = self.store.job_lease(JOB, self.node, now, Duration::ZERO);
        if let Err(error) = ended.await {
            tracing::debug!(%error, "the lease on the job ends by itself");
        }
    }

    /// Works as long as the job is this node's.
    async fn tenure(&self) -> Result<(), StoreError> {
        let known = self
            .store
            .note(EVENT_CURSORS, JOB, self.clock.now())
            .await?;
        let mut cursor = known.and_then(|note| String::from_utf8(note.value.into()).ok());
        while self.is_mine().await? {
            let query = EventQuery {
                after: cursor.clone(),
                kinds: vec![EventKind::EmailBounced],
                limit: PAGE,
                ..EventQuery::default()
            };
            let page = self.store.events(query).await?;
            for event in page.events.iter().filter(|event| is_full(event)) {
                self.look(event).await?;
            }
            if cursor.as_ref() != Some(&page.next) {
                self.keep(&page.next).await?;
            }
            if page.events.len() < usize::try_from(PAGE).unwrap_or(usize::MAX) {
                tokio::time::sleep(BREATH).await;
                let place = FeedPlace::Events(&page.next);
                self.store.changed(place, LOOK_EVERY).await;
            }
            cursor = Some(page.next);
        }
        Ok(())
    }

    async fn is_mine(&self) -> Result<bool, StoreError> {
        let lease = self
            .store
            .job_lease(JOB, self.node, self.clock.now(), LEASE);
        Ok(lease.await?.is_some())
    }

    async fn keep(&self, cursor: &str) -> Result<(), StoreError> {
        let note = Note {
            kind: EVENT_CURSORS.into(),
            key: JOB.into(),
            value: cursor.as_bytes().into(),
            expires_at: None,
        };
        self.store.put_notes(vec![note], self.clock.now()).await
    }

    /// Counts what came before a refusal for a full mailbox.
    async fn look(&self, event: &Event) -> Result<(), StoreError> {
        let recipient = event.recipient.as_ref();
        let email = recipient.and_then(|of| of.email.parse::<EmailAddress>().ok());
        let Some(email) = email.map(|email| email.normalised()) else {
            return Ok(());
        };
        let story = self.store.address(&event.account, &email).await?;
        let stops = |of: &Suppression| of.list.is_none() && of.stops("", Priority::Transactional);
        if story.suppressions.iter().any(stops) {
            return Ok(());
        }
        let refused = story.messages.iter().filter(|(_, row)| {
            row.status == Status::Bounce && row.class == Some(Class::MailboxFull)
        });
        let refused: Vec<_> = refused
            .map(|(batch, row)| MessageId {
                batch: batch.id,
                index: row.row.index,
            })
            .collect();
        let mut times = 0;
        for message in refused {
            times += usize::from(self.was_within(message, event.occurred_at).await?);
            if times == REFUSALS {
                break;
            }
        }
        if times < REFUSALS {
            return Ok(());
        }
        let now = self.clock.now();
        let entry = Suppression {
            email,
            account: event.account.clone(),
            list: None,
            reason: SuppressionReason::Inactive,
            source: "bounce".to_owned(),
            created_at: now,
        };
        self.store.suppress(vec![entry], now).await
    }

    /// Whether a message was refused in the time before `last`.
    async fn was_within(&self, message: MessageId, last: Timestamp) -> Result<bool, StoreError> {
        let Some(story) = self.store.message(message).await? else {
            return Ok(false);
        };
        let mut refusals = story.attempts.iter();
        let is_within = |at: Timestamp| at <= last && at + WITHIN >= last;
        Ok(refusals.any(|of| of.result == AttemptResult::Bounce && is_within(of.at)))
    }
}

fn is_full(event: &Event) -> bool {
    event.data["class"] == Class::MailboxFull.as_str()
}
