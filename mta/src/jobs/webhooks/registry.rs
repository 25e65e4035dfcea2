//! Webhooks in the store: the configuration, which only callers of the API write, and how far each
//! is, which only the node that serves it writes.
//!
//! Both are notes. Callers take turns by a lease, so that no change is lost; every change says so in
//! one small note, which is all that nodes look at twice a second. Must not decide when to send.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;
use model::{EventKind, JournalId, Timestamp, WebhookId};
use service::clock::SharedClock;
use store::{EVENT_CURSORS, EventQuery, Note, Result, Store, StoreError};
use tokio::sync::Notify;

use super::course::Progress;
use super::hook::{Hook, Replay, Secret};

/// Webhooks of one account.
pub(crate) const HOOKS_MAX: usize = 100;
/// Kinds of notes.
const HOOK: &str = "webhook";
const PROGRESS: &str = "webhook-progress";
const EDITION: (&str, &str) = ("webhooks", "edition");
/// How retention knows what is still needed; one that does not move holds the events back no longer than a delivery is tried.
const CURSOR_TTL: Duration = Duration::from_secs(73 * 3_600);
/// The lease on changing webhooks, how long it lasts, and how long to wait for it.
const TURN: &str = "webhooks-change";
const TURN_TTL: Duration = Duration::from_secs(5);
const TURN_WAIT: Duration = Duration::from_millis(50);
const TURN_TRIES: u32 = 200;

/// The webhooks that there are.
pub(crate) struct Registry {
    store: Arc<dyn Store>,
    clock: SharedClock,
    /// Something was changed through this process.
    pub(super) changed: Notify,
}

/// What a new webhook is made of.
#[derive(Debug, Clone)]
pub(crate) struct NewHook {
    pub(crate) account: String,
    pub(crate) url: String,
    pub(crate) types: Vec<EventKind>,
    pub(crate) secret: Secret,
    pub(crate) enabled: bool,
}

/// What is to be different.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) url: Option<String>,
    pub(crate) types: Option<Vec<EventKind>>,
    pub(crate) secret: Option<Secret>,
    pub(crate) enabled: Option<bool>,
    /// Tell the events after this cursor again.
    pub(crate) replay: Option<String>,
}

impl Change {
    fn apply(self, hook: &mut Hook) {
        hook.edition += 1;
        hook.url = self.url.unwrap_or_else(|| std::mem::take(&mut hook.url));
        hook.types = self
            .types
            .unwrap_or_else(|| std::mem::take(&mut hook.types));
        hook.enabled = self.enabled.unwrap_or(hook.enabled);
        if let Some(secret) = self.secret {
            hook.secret = secret;
        }
        if let Some(cursor) = self.replay {
            let edition = hook.edition;
            hook.replay = Some(Replay { edition, cursor });
        }
    }
}

fn note(kind: &str, key: &str, value: Vec<u8>) -> Note {
    Note {
        kind: kind.into(),
        key: key.into(),
        value: value.into(),
        expires_at: None,
    }
}

/// Our own types have no failing serializer.
fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: serde::de::DeserializeOwned>(note: &Note) -> Option<T> {
    let read = serde_json::from_slice(&note.value);
    read.inspect_err(|error| {
        tracing::error!(kind = %note.kind, key = %note.key, %error, "a webhook cannot be read: was it written by a newer version?");
    })
    .ok()
}

impl Registry {
    pub(crate) fn new(store: Arc<dyn Store>, clock: SharedClock) -> Self {
        Self {
            store,
            clock,
            changed: Notify::new(),
        }
    }

    // ---- reading ------------------------------------------------------------------------

    /// What changes with every change; empty as long as there never was a webhook.
    pub(super) async fn edition(&self) -> Result<Box<[u8]>> {
        let (kind, key) = EDITION;
        let note = self.store.note(kind, key, self.clock.now()).await?;
        Ok(note.map(|note| note.value).unwrap_or_default())
    }

    /// All webhooks.
    pub(crate) async fn all(&self) -> Result<Vec<Hook>> {
        let notes = self.store.notes(HOOK, self.clock.now()).await?;
        Ok(notes.iter().filter_map(read).collect())
    }

    /// One webhook.
    pub(crate) async fn one(&self, id: WebhookId) -> Result<Option<Hook>> {
        let key = id.to_string();
        let note = self.store.note(HOOK, &key, self.clock.now()).await?;
        Ok(note.as_ref().and_then(read))
    }

    /// How far a webhook is.
    pub(crate) async fn progress(&self, hook: &Hook) -> Result<Progress> {
        let now = self.clock.now();
        let key = hook.id.to_string();
        let known = self.store.note(PROGRESS, &key, now).await?;
        if let Some(progress) = known.as_ref().and_then(read) {
            return Ok(progress);
        }
        // It is written together with the webhook: this is another version's, or damage.
        let cursor = self.store.event_cursor(hook.created_at).await?;
        Ok(Progress::new(cursor, now))
    }

    /// How far webhooks are.
    pub(crate) async fn all_progress(&self) -> Result<BTreeMap<String, Progress>> {
        let notes = self.store.notes(PROGRESS, self.clock.now()).await?;
        let read = |note: &Note| Some((note.key.to_string(), read(note)?));
        Ok(notes.iter().filter_map(read).collect())
    }

    /// The cursor before the events that were recorded at or after `at`.
    pub(crate) async fn cursor_at(&self, at: Timestamp) -> Result<String> {
        self.store.event_cursor(at).await
    }

    /// Whether the store can go on from a cursor.
    ///
    /// # Errors
    /// [`StoreError::Refused`]: it is none of this store's.
    pub(crate) async fn check_cursor(&self, cursor: &str) -> Result<()> {
        let query = EventQuery {
            after: Some(cursor.to_owned()),
            limit: 1,
            ..EventQuery::default()
        };
        self.store.events(query).await.map(drop)
    }

    // ---- changing -----------------------------------------------------------------------

    /// Makes a webhook that begins with the events from now on. `None`: the account has as many as it
    /// may have.
    pub(crate) async fn create(&self, new: NewHook) -> Result<Option<Hook>> {
        let turn = self.turn().await?;
        let created = self.create_in_turn(new).await;
        self.end_turn(turn).await;
        created
    }

    async fn create_in_turn(&self, new: NewHook) -> Result<Option<Hook>> {
        let all = self.all().await?;
        if all
            .iter()
            .filter(|hook| hook.account == new.account)
            .count()
            >= HOOKS_MAX
        {
            return Ok(None);
        }
        let now = self.clock.now();
        let hook = Hook {
            id: WebhookId::new(now, random()?),
            account: new.account,
            url: new.url,
            types: new.types,
            secret: new.secret,
            enabled: new.enabled,
            created_at: now,
            edition: 1,
            replay: None,
        };
        let end = self
            .store
            .event_cursor(Timestamp::from_millis(i64::MAX))
            .await?;
        let mut progress = Progress::new(end, now);
        progress.adopt(&hook, now);
        let mut notes = vec![note(HOOK, &hook.id.to_string(), json(&hook))];
        notes.extend(self.progress_notes(hook.id, &progress));
        self.write(notes).await?;
        Ok(Some(hook))
    }

    /// Changes a webhook; none: there is no such webhook.
    pub(crate) async fn change(&self, id: WebhookId, change: Change) -> Result<Option<Hook>> {
        let turn = self.turn().await?;
        let changed = self.change_in_turn(id, change).await;
        self.end_turn(turn).await;
        changed
    }

    async fn change_in_turn(&self, id: WebhookId, change: Change) -> Result<Option<Hook>> {
        let Some(mut hook) = self.one(id).await? else {
            return Ok(None);
        };
        change.apply(&mut hook);
        let key = id.to_string();
        let mut notes = vec![note(HOOK, &key, json(&hook))];
        match (&hook.replay, hook.enabled) {
            // Retention is not to pass by before the replay begins.
            (Some(replay), true) if replay.edition == hook.edition => {
                notes.push(self.cursor_note(&key, &replay.cursor));
            }
            (_, true) => {}
            (_, false) => notes.push(note(EVENT_CURSORS, &cursor_key(&key), Vec::new())),
        }
        self.write(notes).await?;
        Ok(Some(hook))
    }

    /// Takes a webhook away; whether there was one.
    pub(crate) async fn remove(&self, id: WebhookId) -> Result<bool> {
        let turn = self.turn().await?;
        let removed = async {
            let was = self.one(id).await?.is_some();
            self.write(removal(&id.to_string()).into()).await?;
            Ok(was)
        };
        let removed = removed.await;
        self.end_turn(turn).await;
        removed
    }

    /// Writes a change, and that there was one.
    async fn write(&self, mut notes: Vec<Note>) -> Result<()> {
        let (kind, key) = EDITION;
        notes.push(note(kind, key, random()?.to_be_bytes().to_vec()));
        self.store.put_notes(notes, self.clock.now()).await?;
        self.changed.notify_one();
        Ok(())
    }

    /// Waits until nobody else changes webhooks.
    async fn turn(&self) -> Result<JournalId> {
        let me = JournalId::new(self.clock.now(), random()?);
        for _ in 0..TURN_TRIES {
            let taken = self.store.job_lease(TURN, me, self.clock.now(), TURN_TTL);
            if taken.await?.is_some() {
                return Ok(me);
            }
            tokio::time::sleep(TURN_WAIT).await;
        }
        Err(StoreError::Unavailable(
            "webhooks are being changed by others".to_owned(),
        ))
    }

    async fn end_turn(&self, me: JournalId) {
        let given = self
            .store
            .job_lease(TURN, me, self.clock.now(), Duration::ZERO);
        if let Err(error) = given.await {
            tracing::debug!(%error, "the lease on changing webhooks ends by itself");
        }
    }

    // ---- progress -----------------------------------------------------------------------

    /// Writes how far a webhook is.
    pub(super) async fn save(&self, id: WebhookId, progress: &Progress) -> Result<()> {
        let notes = self.progress_notes(id, progress);
        self.store.put_notes(notes.into(), self.clock.now()).await
    }

    fn progress_notes(&self, id: WebhookId, progress: &Progress) -> [Note; 2] {
        let key = id.to_string();
        let cursor = match progress.is_parked() {
            true => note(EVENT_CURSORS, &cursor_key(&key), Vec::new()),
            false => Note {
                expires_at: Some(progress.moved_at + CURSOR_TTL),
                ..self.cursor_note(&key, &progress.cursor)
            },
        };
        [note(PROGRESS, &key, json(progress)), cursor]
    }

    fn cursor_note(&self, key: &str, cursor: &str) -> Note {
        Note {
            expires_at: Some(self.clock.now() + CURSOR_TTL),
            ..note(EVENT_CURSORS, &cursor_key(key), cursor.as_bytes().to_vec())
        }
    }

    /// Takes away what nodes wrote of webhooks that were taken away meanwhile.
    pub(super) async fn sweep(&self) -> Result<()> {
        // In this order: a webhook is written together with its progress.
        let progress = self.store.notes(PROGRESS, self.clock.now()).await?;
        let hooks = self.store.notes(HOOK, self.clock.now()).await?;
        let known: BTreeSet<&str> = hooks.iter().map(|note| &*note.key).collect();
        let orphans = progress.iter().filter(|note| !known.contains(&*note.key));
        let notes: Vec<Note> = orphans.flat_map(|note| removal(&note.key)).collect();
        if notes.is_empty() {
            return Ok(());
        }
        self.store.put_notes(notes, self.clock.now()).await
    }
}

fn cursor_key(key: &str) -> String {
    format!("webhook {key}")
}

fn removal(key: &str) -> [Note; 3] {
    [
        note(HOOK, key, Vec::new()),
        note(PROGRESS, key, Vec::new()),
        note(EVENT_CURSORS, &cursor_key(key), Vec::new()),
    ]
}

fn random() -> Result<u128> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes)
        .map_err(|_| StoreError::Unavailable("the system gives no random bytes".to_owned()))?;
    Ok(u128::from_be_bytes(bytes))
}
