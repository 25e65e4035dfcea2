//! Tells the store what became of limits: events for those whose mail it concerns, notes for the
//! next run.
//!
//! Owns the form of both and when they are written: every few seconds at most, whatever changes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use model::{EventKind, Timestamp};
use serde_json::json;
use service::clock::SharedClock;
use service::config::Source;
use service::metrics::Label as _;
use service::tasks::{Shutdown, Stage, Tasks};
use store::{Announcement, Note, Store};
use tokio::sync::mpsc;

use crate::queue::{KeptHold, Limited, Now, Remembered};
use crate::shaping::{Change, Destination, Kept};

/// The kind of these notes, and of those on destinations that are left alone.
const KIND: &str = "limits";
const HOLDS: &str = "holds";
/// Between writes.
const PERIOD: Duration = Duration::from_secs(2);
/// How long what was learnt is of use to anybody.
const KEPT_FOR: Duration = Duration::from_secs(7 * 86_400);
/// What waits for the store; beyond, the oldest events are not told and notes wait for a change.
const WAITING_MAX: usize = 1_024;
/// Stands between destination and source in a key: neither has one in its name.
const BETWEEN: char = ' ';

/// Something to tell.
#[derive(Debug)]
enum News {
    Event(Box<Announcement>),
    Note(Note),
}

/// By kind and key, the latest of each.
type Notes = HashMap<(Arc<str>, Box<str>), Note>;

/// The way to the task that tells.
#[derive(Debug)]
pub(super) struct LimitNotes {
    news: mpsc::Sender<News>,
    sources: Arc<[Box<str>]>,
}

impl LimitNotes {
    /// Starts the task; it ends with this.
    pub(super) fn start(
        store: Arc<dyn Store>,
        clock: SharedClock,
        sources: &[Source],
        tasks: &Tasks,
        shutdown: Shutdown,
    ) -> Self {
        let (news, inbox) = mpsc::channel(WAITING_MAX);
        tasks.spawn("limits", tell(store, clock, inbox, shutdown));
        Self {
            news,
            sources: names(sources),
        }
    }

    /// The name of a source.
    pub(super) fn source(&self, index: usize) -> Option<&str> {
        self.sources.get(index).map(|name| &**name)
    }

    /// Announces changes to the accounts that they concern.
    pub(super) fn changed(&self, limited: &Limited, now: Now) {
        for (source, change) in &limited.changes {
            let source = self.sources.get(*source).map_or("", |name| name);
            let data = data(&limited.destination, source, change, now);
            tracing::info!(destination = %limited.destination, source, kind = change.kind.text(),
                from = change.from, to = change.to, reason = change.reason.as_str(), "a limit changed");
            for account in &limited.accounts {
                self.send(News::Event(Box::new(Announcement {
                    kind: EventKind::DestinationLimitChanged,
                    account: account.clone(),
                    data: data.clone().into(),
                    about: model::About::default(),
                })));
            }
        }
    }

    /// Keeps limits for the next run.
    pub(super) fn keep(&self, limits: Vec<(Destination, usize, Option<Kept>)>, now: Now) {
        for (destination, source, kept) in limits {
            let Some(source) = self.sources.get(source) else {
                continue;
            };
            let value = kept.map(|kept| kept.to_note()).unwrap_or_default();
            self.send(News::Note(Note {
                kind: KIND.into(),
                key: key(&destination, source),
                value: value.into(),
                expires_at: Some(now.wall + KEPT_FOR),
            }));
        }
    }

    /// Keeps for the next run that a destination is left alone, or is no longer.
    pub(super) fn keep_hold(&self, destination: &Destination, hold: Option<&KeptHold>) {
        self.send(News::Note(Note {
            kind: HOLDS.into(),
            key: destination.as_str().into(),
            value: hold.map(KeptHold::to_note).unwrap_or_default().into(),
            expires_at: hold.map(KeptHold::stale_at),
        }));
    }

    fn send(&self, news: News) {
        if self.news.try_send(news).is_err() {
            tracing::debug!("the store is behind with what became of limits");
        }
    }
}

/// A destination as one source sees it, as a key in the store.
pub(super) fn key(destination: &Destination, source: &str) -> Box<str> {
    format!("{destination}{BETWEEN}{source}").into()
}

/// What was kept by former runs, and by other nodes with the same sources.
pub(super) async fn remembered(
    store: &dyn Store,
    sources: &[Source],
    now: Timestamp,
) -> Result<Vec<Remembered>, store::StoreError> {
    let names = names(sources);
    let read = |note: Note| {
        let (destination, source) = note.key.rsplit_once(BETWEEN)?;
        let source = names.iter().position(|name| **name == *source)?;
        Some(Remembered {
            destination: Destination::named(destination),
            source,
            kept: Kept::from_note(&note.value)?,
        })
    };
    let notes = store.notes(KIND, now).await?;
    Ok(notes.into_iter().filter_map(read).collect())
}

/// What former runs, and other nodes, left alone.
pub(super) async fn remembered_holds(
    store: &dyn Store,
    now: Timestamp,
) -> Result<Vec<(Destination, KeptHold)>, store::StoreError> {
    let read = |note: Note| {
        let hold = KeptHold::from_note(&note.value)?;
        Some((Destination::named(&note.key), hold))
    };
    let notes = store.notes(HOLDS, now).await?;
    Ok(notes.into_iter().filter_map(read).collect())
}

/// The names of sources, by index.
pub(super) fn names(sources: &[Source]) -> Arc<[Box<str>]> {
    let names = sources.iter().map(|source| source.name.as_str().into());
    names.collect()
}

/// The `data` of `destination.limit_changed`; a limit that is none is `null`.
fn data(destination: &Destination, source: &str, change: &Change, now: Now) -> serde_json::Value {
    let number = |limit: f64| {
        limit
            .is_finite()
            .then_some((limit * 1_000.0).round() / 1_000.0)
    };
    let until = change
        .until
        .map(|at| now.wall + at.saturating_duration_since(now.instant));
    json!({
        "destination": destination.as_str(),
        "source": source,
        "kind": change.kind.text(),
        "from": number(change.from),
        "to": number(change.to),
        "reason": change.reason.as_str(),
        "rule": change.rule.as_deref(),
        "until": until,
    })
}

/// Writes what comes, in steps, until nothing more can come.
async fn tell(
    store: Arc<dyn Store>,
    clock: SharedClock,
    mut inbox: mpsc::Receiver<News>,
    shutdown: Shutdown,
) {
    let mut events = Vec::new();
    let mut notes: Notes = HashMap::new();
    let mut is_open = true;
    while is_open {
        let mut batch = Vec::new();
        is_open = inbox.recv_many(&mut batch, WAITING_MAX).await > 0;
        for news in batch {
            match news {
                News::Event(event) => events.push(*event),
                News::Note(note) => {
                    notes.insert((note.kind.clone(), note.key.clone()), note);
                }
            }
        }
        let surplus = events.len().saturating_sub(WAITING_MAX);
        events.drain(..surplus);
        write(&*store, &clock, &mut events, &mut notes).await;
        tokio::select! {
            biased;
            () = tokio::time::sleep(PERIOD) => {}
            () = shutdown.reached(Stage::Journal) => {}
        }
    }
    write(&*store, &clock, &mut events, &mut notes).await;
}

/// What the store does not take waits for the next time.
async fn write(
    store: &dyn Store,
    clock: &SharedClock,
    events: &mut Vec<Announcement>,
    notes: &mut Notes,
) {
    if !events.is_empty() {
        match store.announce(events.clone(), clock.now()).await {
            Ok(()) => events.clear(),
            Err(error) => tracing::debug!(%error, "changes of limits are not told yet"),
        }
    }
    if !notes.is_empty() {
        let all = notes.values().cloned().collect();
        match store.put_notes(all, clock.now()).await {
            Ok(()) => notes.clear(),
            Err(error) => tracing::debug!(%error, "limits are not kept yet"),
        }
    }
}
