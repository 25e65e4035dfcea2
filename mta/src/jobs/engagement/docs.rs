//! What is made of events, as notes of the store: prospects, browsers, bindings.
//!
//! Owns their names, and the working set of one step. Must not decide what changes.

use std::collections::BTreeMap;

use ::engagement::identity::{Binding, Browser};
use ::engagement::prospect::Prospect;
use model::{Event, EventRecipient, Timestamp, VisitorId};
use store::{Announcement, Note, Store, StoreError};

/// Kinds of note; the account follows.
pub(crate) const PROSPECTS: &str = "prospect";
pub(crate) const BINDINGS: &str = "binding";
const BROWSERS: &str = "browser";
/// As long as browsers keep a cookie: 400 days.
const BROWSER_KEPT: std::time::Duration = std::time::Duration::from_secs(400 * 86_400);
/// Notes written in one step.
const STEP: usize = 1_000;

/// The notes of an account.
pub(crate) fn kind_of(kind: &str, account: &str) -> String {
    format!("{kind}/{account}")
}

/// How a person is named: by the caller's name, else by the address.
pub(crate) fn person_of(recipient: &EventRecipient) -> Box<str> {
    match recipient.prospect_id.as_deref() {
        Some(id) if !id.is_empty() => id.into(),
        Some(_) | None => normalised(&recipient.email),
    }
}

/// An address as it is compared.
pub(super) fn normalised(email: &str) -> Box<str> {
    let address: Result<model::EmailAddress, _> = email.parse();
    address.map_or_else(|_| email.into(), |of| of.normalised().into())
}

type Key = (Box<str>, Box<str>);

/// A document and whether it was changed.
struct Doc<T> {
    value: T,
    dirty: bool,
}

/// The working set of one step.
pub(super) struct Docs<'a> {
    store: &'a dyn Store,
    pub(super) now: Timestamp,
    prospects: BTreeMap<Key, Doc<Prospect>>,
    browsers: BTreeMap<Key, Doc<Browser>>,
    notes: Vec<Note>,
    news: Vec<Announcement>,
}

impl<'a> Docs<'a> {
    pub(super) fn new(store: &'a dyn Store, now: Timestamp) -> Self {
        Self {
            store,
            now,
            prospects: BTreeMap::new(),
            browsers: BTreeMap::new(),
            notes: Vec::new(),
            news: Vec::new(),
        }
    }

    /// Reads the prospects of events at once.
    pub(super) async fn prefetch(&mut self, events: &[Event]) -> Result<(), StoreError> {
        let mut wanted: BTreeMap<Box<str>, Vec<Box<str>>> = BTreeMap::new();
        for event in events {
            if let Some(recipient) = &event.recipient {
                let keys = wanted.entry(event.account.as_str().into()).or_default();
                keys.push(person_of(recipient));
            }
        }
        for (account, mut keys) in wanted {
            keys.sort_unstable();
            keys.dedup();
            let kind = kind_of(PROSPECTS, &account);
            let found = self
                .store
                .notes_by_key(&kind, keys.clone(), self.now)
                .await?;
            for key in keys {
                self.prospects.entry((account.clone(), key)).or_insert(Doc {
                    value: Prospect::default(),
                    dirty: false,
                });
            }
            for note in found {
                let read = Prospect::from_bytes(&note.value);
                let at = (account.clone(), note.key);
                if let (Some(value), Some(doc)) = (read, self.prospects.get_mut(&at)) {
                    doc.value = value;
                }
            }
        }
        Ok(())
    }

    /// A person, to be changed; one that nothing is known of is new.
    pub(super) async fn prospect(
        &mut self,
        account: &str,
        key: &str,
    ) -> Result<&mut Prospect, StoreError> {
        let at: Key = (account.into(), key.into());
        if !self.prospects.contains_key(&at) {
            let kind = kind_of(PROSPECTS, account);
            let found = self.store.note(&kind, key, self.now).await?;
            let value = found.and_then(|note| Prospect::from_bytes(&note.value));
            let doc = Doc {
                value: value.unwrap_or_default(),
                dirty: false,
            };
            self.prospects.insert(at.clone(), doc);
        }
        let doc = self.prospects.entry(at).or_insert(Doc {
            value: Prospect::default(),
            dirty: false,
        });
        doc.dirty = true;
        Ok(&mut doc.value)
    }

    /// A browser, to be changed.
    pub(super) async fn browser(
        &mut self,
        account: &str,
        cookie: VisitorId,
    ) -> Result<&mut Browser, StoreError> {
        let at: Key = (account.into(), cookie.to_string().into());
        if !self.browsers.contains_key(&at) {
            let kind = kind_of(BROWSERS, account);
            let found = self.store.note(&kind, &at.1, self.now).await?;
            let value = found.and_then(|note| Browser::from_bytes(&note.value));
            let doc = Doc {
                value: value.unwrap_or_default(),
                dirty: false,
            };
            self.browsers.insert(at.clone(), doc);
        }
        let doc = self.browsers.entry(at).or_insert(Doc {
            value: Browser::default(),
            dirty: false,
        });
        doc.dirty = true;
        Ok(&mut doc.value)
    }

    /// A binding; `None` when there is none of this name.
    pub(super) async fn binding(
        &self,
        account: &str,
        id: &str,
    ) -> Result<Option<Binding>, StoreError> {
        let kind = kind_of(BINDINGS, account);
        let written = self.notes.iter().rev();
        let mut written = written.filter(|note| *note.kind == *kind && *note.key == *id);
        if let Some(note) = written.next() {
            return Ok(Binding::from_bytes(&note.value));
        }
        let found = self.store.note(&kind, id, self.now).await?;
        Ok(found.and_then(|note| Binding::from_bytes(&note.value)))
    }

    /// Writes a binding.
    pub(super) fn set_binding(&mut self, account: &str, id: &str, binding: &Binding) {
        self.notes.push(Note {
            kind: kind_of(BINDINGS, account).into(),
            key: id.into(),
            value: binding.to_bytes().into(),
            expires_at: None,
        });
    }

    /// Writes a note.
    pub(super) fn note(&mut self, note: Note) {
        self.notes.push(note);
    }

    /// Tells something.
    pub(super) fn tell(&mut self, news: Announcement) {
        self.news.push(news);
    }

    /// Whether there is nothing to write.
    pub(super) fn is_clean(&self) -> bool {
        self.notes.is_empty()
            && self.news.is_empty()
            && self.prospects.values().all(|doc| !doc.dirty)
            && self.browsers.values().all(|doc| !doc.dirty)
    }

    /// Writes everything that changed, mostly in one step. In more than one the checkpoint and
    /// what is told come last: what was written before them is known when it is made again.
    pub(super) async fn write(self) -> Result<(), StoreError> {
        let mut notes = Vec::new();
        for ((account, key), doc) in self.prospects {
            if doc.dirty {
                notes.push(Note {
                    kind: kind_of(PROSPECTS, &account).into(),
                    key,
                    value: doc.value.to_bytes().into(),
                    expires_at: None,
                });
            }
        }
        for ((account, key), doc) in self.browsers {
            if doc.dirty {
                notes.push(Note {
                    kind: kind_of(BROWSERS, &account).into(),
                    key,
                    value: doc.value.to_bytes().into(),
                    expires_at: Some(self.now + BROWSER_KEPT),
                });
            }
        }
        notes.extend(self.notes);
        if notes.is_empty() && self.news.is_empty() {
            return Ok(());
        }
        let last = notes.split_off(notes.len().saturating_sub(STEP));
        for chunk in notes.chunks(STEP) {
            self.store.put_notes(chunk.to_vec(), self.now).await?;
        }
        self.store.derive(last, self.news, self.now).await
    }
}
