//! What is made of events, as notes of the store: prospects, browsers, bindings.
//!
//! Owns their names, and the working set of one step. Must not decide what changes.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Display;
use std::hash::Hash;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use ::engagement::identity::{Binding, Browser, Click, Found};
use ::engagement::prospect::Prospect;
use model::{EventRecipient, Timestamp, TrackingMode, VisitorId};
use rustc_hash::FxHashMap;
use store::{Announcement, Note, Store, StoreError};
use uuid::Uuid;

use crate::jobs::JobLease;

/// Kinds of note; the account follows. Prospects are what the store calls notes of people: they are
/// written before the rest, each by itself.
pub(crate) const PROSPECTS: &str = "prospect";
pub(crate) const BINDINGS: &str = "binding";
const BROWSERS: &str = "browser";
/// As long as browsers keep a cookie: 400 days.
const BROWSER_KEPT: Duration = Duration::from_hours(400 * 24);
/// A browser that is only seen again is kept longer once so much of that is gone.
const BROWSER_SEEN: Duration = Duration::from_hours(24);
/// Notes written in one step.
const STEP: usize = 1_000;

/// The notes of an account.
pub(crate) fn kind_of(kind: &str, account: &str) -> Arc<str> {
    format!("{kind}/{account}").into()
}

/// How a person is named: by the caller's name, else by the address.
pub(crate) fn person_of(recipient: &EventRecipient) -> Box<str> {
    person_named(recipient.prospect_id.as_deref(), &recipient.email)
}

/// The same, of the caller's name and the address.
pub(super) fn person_named(prospect_id: Option<&str>, email: &str) -> Box<str> {
    match prospect_id {
        Some(id) if !id.is_empty() => id.into(),
        Some(_) | None => normalised(email),
    }
}

/// An address as it is compared.
pub(crate) fn normalised(email: &str) -> Box<str> {
    let address: Result<model::EmailAddress, _> = email.parse();
    address.map_or_else(|_| email.into(), |of| of.normalised().into())
}

/// What a note keeps.
trait Document: Default {
    const KIND: &'static str;
    /// What names it, its note's key as text.
    type Name: Hash + Ord + Display + FromStr + Borrow<Self::Asked>;
    /// The same as it is asked for.
    type Asked: Hash + Eq + ToOwned<Owned = Self::Name> + ?Sized;

    fn read(bytes: &[u8]) -> Option<Self>;
}

impl Document for Prospect {
    const KIND: &'static str = PROSPECTS;
    type Name = String;
    type Asked = str;

    fn read(bytes: &[u8]) -> Option<Self> {
        Self::from_bytes(bytes)
    }
}

impl Document for Browser {
    const KIND: &'static str = BROWSERS;
    type Name = VisitorId;
    type Asked = VisitorId;

    fn read(bytes: &[u8]) -> Option<Self> {
        Self::from_bytes(bytes)
    }
}

/// None: there is none of this name.
impl Document for Option<Binding> {
    const KIND: &'static str = BINDINGS;
    type Name = Uuid;
    type Asked = Uuid;

    fn read(bytes: &[u8]) -> Option<Self> {
        Some(Binding::from_bytes(bytes))
    }
}

/// A document and whether it was changed.
#[derive(Default)]
struct Doc<T> {
    value: T,
    dirty: bool,
    /// Whether the store has one of this name, and until when.
    stored: bool,
    expires_at: Option<Timestamp>,
}

impl<T: Document> Doc<T> {
    /// What the store has of this name; what is not readable is new.
    fn of(found: Option<Note>) -> Self {
        let value = found.as_ref().and_then(|note| T::read(&note.value));
        Self {
            value: value.unwrap_or_default(),
            dirty: false,
            stored: found.is_some(),
            expires_at: found.and_then(|note| note.expires_at),
        }
    }
}

/// Documents of one kind.
struct Shelf<T: Document> {
    /// Where they stand, by account and name.
    places: BTreeMap<Arc<str>, HashMap<T::Name, usize>>,
    docs: Vec<Doc<T>>,
}

impl<T: Document> Shelf<T> {
    const fn new() -> Self {
        Self {
            places: BTreeMap::new(),
            docs: Vec::new(),
        }
    }

    fn place(&self, account: &str, name: &T::Asked) -> Option<usize> {
        self.places.get(account)?.get(name).copied()
    }

    fn find(&self, account: &str, name: &T::Asked) -> Option<&Doc<T>> {
        self.docs.get(self.place(account, name)?)
    }

    fn put(&mut self, account: &str, name: T::Name, doc: Doc<T>) -> usize {
        let known = self.place(account, name.borrow());
        let at = known.unwrap_or_else(|| {
            self.add(account, [name]);
            self.docs.len() - 1
        });
        if let Some(known) = self.docs.get_mut(at) {
            *known = doc;
        }
        at
    }

    /// Adds new ones, which are not there yet.
    fn add(&mut self, account: &str, names: impl IntoIterator<Item = T::Name>) {
        let places = self.places.entry(account.into()).or_default();
        for name in names {
            places.insert(name, self.docs.len());
            self.docs.push(Doc::default());
        }
    }

    /// Reads those of an account that are not there yet; what nothing is known of is new.
    async fn fetch(
        &mut self,
        (store, now): (&dyn Store, Timestamp),
        account: &str,
        mut names: Vec<T::Name>,
    ) -> Result<(), StoreError> {
        names.retain(|name| self.place(account, name.borrow()).is_none());
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Ok(());
        }
        let keys = names.iter().map(|name| name.to_string().into()).collect();
        let kind = kind_of(T::KIND, account);
        let found = store.notes_by_key(&kind, keys, now).await?;
        self.docs.reserve(names.len());
        self.add(account, names);
        for note in found {
            if let Ok(name) = note.key.parse() {
                self.put(account, name, Doc::of(Some(note)));
            }
        }
        Ok(())
    }

    /// One of an account, read if it is not there yet; what nothing is known of is new.
    async fn get(
        &mut self,
        (store, now): (&dyn Store, Timestamp),
        account: &str,
        name: &T::Asked,
    ) -> Result<&mut Doc<T>, StoreError> {
        let at = match self.place(account, name) {
            Some(at) => at,
            None => {
                let name = name.to_owned();
                let kind = kind_of(T::KIND, account);
                let found = store.note(&kind, &name.to_string(), now).await?;
                self.put(account, name, Doc::of(found))
            }
        };
        let doc = self.docs.get_mut(at);
        doc.ok_or_else(|| StoreError::Damaged("a note that was just read".into()))
    }

    fn is_clean(&self) -> bool {
        self.docs.iter().all(|doc| !doc.dirty)
    }

    /// What was changed, in order of account and name: neighbours stand on the same page.
    fn changed(self) -> impl Iterator<Item = (Arc<str>, T::Name, T)> {
        let Self { places, mut docs } = self;
        places.into_iter().flat_map(move |(account, of)| {
            let kind = kind_of(T::KIND, &account);
            let mut dirty: Vec<_> = of
                .into_iter()
                .filter_map(|(name, at)| {
                    let doc = docs.get_mut(at).filter(|doc| doc.dirty)?;
                    Some((kind.clone(), name, std::mem::take(&mut doc.value)))
                })
                .collect();
            dirty.sort_unstable_by(|(_, a, _), (_, b, _)| a.cmp(b));
            dirty
        })
    }
}

/// What is to be read of an account, before it is asked for one by one; names may come twice.
#[derive(Default)]
pub(super) struct Wanted {
    pub(super) people: Vec<String>,
    pub(super) browsers: Vec<VisitorId>,
    pub(super) bindings: Vec<Uuid>,
    /// Clicks that say whose a browser is.
    pub(super) clicks: Vec<Clicked>,
    /// Addresses of those whose browser may be bound to them.
    pub(super) consents: BTreeSet<Box<str>>,
}

/// A click that says whose a browser is.
pub(super) struct Clicked {
    pub(super) browser: VisitorId,
    pub(super) person: Arc<str>,
    pub(super) binding: Uuid,
}

/// What belongs to one browser, and is written in one step: whose it was, the bindings that say
/// so, what is told of them.
struct OfBrowser {
    notes: Vec<Note>,
    news: Vec<Announcement>,
}

impl OfBrowser {
    /// Nothing yet; mostly it comes to itself, a binding, and the event that tells of it.
    fn new() -> Self {
        Self {
            notes: Vec::with_capacity(2),
            news: Vec::with_capacity(1),
        }
    }
}

/// The working set of one step.
pub(super) struct Docs<'a> {
    store: &'a dyn Store,
    pub(super) now: Timestamp,
    prospects: Shelf<Prospect>,
    browsers: Shelf<Browser>,
    bindings: Shelf<Option<Binding>>,
    /// Account and address of those of whom less is to be kept than everything.
    reserved: HashSet<(Arc<str>, Box<str>)>,
    of_browsers: FxHashMap<VisitorId, OfBrowser>,
    notes: Vec<Note>,
}

impl<'a> Docs<'a> {
    pub(super) fn new(store: &'a dyn Store, now: Timestamp) -> Self {
        Self {
            store,
            now,
            prospects: Shelf::new(),
            browsers: Shelf::new(),
            bindings: Shelf::new(),
            reserved: HashSet::new(),
            of_browsers: FxHashMap::default(),
            notes: Vec::new(),
        }
    }

    /// Reads what will be needed at once.
    pub(super) async fn prefetch(
        &mut self,
        wanted: BTreeMap<Arc<str>, Wanted>,
    ) -> Result<(), StoreError> {
        let from = (self.store, self.now);
        for (account, of) in wanted {
            self.prospects.fetch(from, &account, of.people).await?;
            self.browsers.fetch(from, &account, of.browsers).await?;
            let mut bindings = of.bindings;
            bindings.extend(self.in_question(&account, of.clicks));
            self.bindings.fetch(from, &account, bindings).await?;
            self.ask_consents(account, of.consents).await?;
        }
        Ok(())
    }

    /// The bindings that the clicks may have made before: none where the browser is the person's
    /// anyway, and none of a browser that the store does not have, since they are written together.
    fn in_question(&mut self, account: &str, clicks: Vec<Clicked>) -> Vec<Uuid> {
        let (mut in_question, mut new) = (Vec::new(), Vec::new());
        for click in clicks {
            let browser = self.browsers.find(account, &click.browser);
            let owner = browser.and_then(|of| of.value.owner());
            if owner.is_some_and(|owner| *owner.prospect == *click.person) {
                continue;
            }
            if browser.is_some_and(|of| !of.stored) {
                new.push(click.binding);
            } else {
                in_question.push(click.binding);
            }
        }
        new.retain(|id| self.bindings.place(account, id).is_none());
        self.bindings.add(account, new);
        in_question
    }

    async fn ask_consents(
        &mut self,
        account: Arc<str>,
        emails: BTreeSet<Box<str>>,
    ) -> Result<(), StoreError> {
        if emails.is_empty() {
            return Ok(());
        }
        let asked = emails.iter().map(|email| email.to_string()).collect();
        let found = self.store.consents(&account, asked).await?;
        let reserved = emails
            .into_iter()
            .zip(found)
            .filter(|(_, of)| of.is_some_and(|of| of.mode < TrackingMode::Individual));
        self.reserved
            .extend(reserved.map(|(email, _)| (account.clone(), email)));
        Ok(())
    }

    /// Whether the person lets a browser be known as theirs, as far as they were asked with
    /// [`Docs::prefetch`].
    pub(super) fn may_bind(&self, account: &Arc<str>, email: &str) -> bool {
        self.reserved.is_empty()
            || !self
                .reserved
                .contains(&(account.clone(), normalised(email)))
    }

    /// A person; one that nothing is known of is new.
    async fn person(&mut self, account: &str, key: &str) -> Result<&mut Doc<Prospect>, StoreError> {
        self.prospects
            .get((self.store, self.now), account, key)
            .await
    }

    /// A person, to be changed.
    pub(super) async fn prospect(
        &mut self,
        account: &str,
        key: &str,
    ) -> Result<&mut Prospect, StoreError> {
        let doc = self.person(account, key).await?;
        doc.dirty = true;
        Ok(&mut doc.value)
    }

    /// Changes a person, unless there is nothing to change: `change` says.
    pub(super) async fn change(
        &mut self,
        account: &str,
        key: &str,
        change: impl FnOnce(&mut Prospect) -> bool,
    ) -> Result<(), StoreError> {
        let doc = self.person(account, key).await?;
        doc.dirty |= change(&mut doc.value);
        Ok(())
    }

    /// A browser; one that nothing is known of is new.
    async fn doc_of_browser(
        &mut self,
        account: &str,
        cookie: VisitorId,
    ) -> Result<&mut Doc<Browser>, StoreError> {
        self.browsers
            .get((self.store, self.now), account, &cookie)
            .await
    }

    /// A browser, to be changed.
    pub(super) async fn browser(
        &mut self,
        account: &str,
        cookie: VisitorId,
    ) -> Result<&mut Browser, StoreError> {
        let doc = self.doc_of_browser(account, cookie).await?;
        doc.dirty = true;
        Ok(&mut doc.value)
    }

    /// Whether a browser is this person's.
    pub(super) async fn is_owned(
        &mut self,
        account: &str,
        cookie: VisitorId,
        person: &str,
    ) -> Result<bool, StoreError> {
        let doc = self.doc_of_browser(account, cookie).await?;
        let owner = doc.value.owner();
        Ok(owner.is_some_and(|owner| *owner.prospect == *person))
    }

    /// A person clicked with a browser. One that stays as it is, is written only to be kept longer.
    pub(super) async fn click(
        &mut self,
        account: &str,
        cookie: VisitorId,
        click: Click,
    ) -> Result<Found, StoreError> {
        let fresh = self.now + (BROWSER_KEPT - BROWSER_SEEN);
        let doc = self.doc_of_browser(account, cookie).await?;
        let found = doc.value.click(cookie, click);
        let ages = doc.expires_at.is_none_or(|expires_at| expires_at < fresh);
        doc.dirty |= match found {
            Found::Bound { .. } => true,
            Found::Same | Found::Forwarded { .. } => ages,
        };
        Ok(found)
    }

    /// A binding; `None` when there is none of this name.
    pub(super) async fn binding(
        &mut self,
        account: &str,
        id: Uuid,
    ) -> Result<Option<&Binding>, StoreError> {
        let from = (self.store, self.now);
        let doc = self.bindings.get(from, account, &id).await?;
        Ok(doc.value.as_ref())
    }

    /// Writes a binding.
    pub(super) fn set_binding(&mut self, account: &str, id: Uuid, binding: Binding) {
        let note = Note {
            kind: kind_of(BINDINGS, account),
            key: id.to_string().into(),
            value: binding.to_bytes().into(),
            expires_at: None,
        };
        self.of_browser(binding.cookie).notes.push(note);
        let doc = Doc {
            value: Some(binding),
            ..Doc::default()
        };
        self.bindings.put(account, id, doc);
    }

    /// Writes a note.
    pub(super) fn note(&mut self, note: Note) {
        self.notes.push(note);
    }

    /// Tells something about a browser.
    pub(super) fn tell(&mut self, cookie: VisitorId, news: Announcement) {
        self.of_browser(cookie).news.push(news);
    }

    fn of_browser(&mut self, cookie: VisitorId) -> &mut OfBrowser {
        self.of_browsers
            .entry(cookie)
            .or_insert_with(OfBrowser::new)
    }

    /// Whether there is nothing to write.
    pub(super) fn is_clean(&self) -> bool {
        self.notes.is_empty()
            && self.of_browsers.is_empty()
            && self.prospects.is_clean()
            && self.browsers.is_clean()
    }

    /// Writes everything that changed: people first, which know what was applied to them; then
    /// browsers, each in one step with its bindings and what is told of them; the checkpoint last. So
    /// what is made again after a crash finds a browser either as it was, or with all that it led to.
    /// `held`: the lease under which it is written, kept from step to step, since there may be many;
    /// once it is another node's, nothing more is written.
    pub(super) async fn write(mut self, mut held: Option<&mut JobLease>) -> Result<(), StoreError> {
        let (store, now) = (self.store, self.now);
        let mut notes = Vec::new();
        for (kind, name, person) in self.prospects.changed() {
            notes.push(Note {
                kind,
                key: name.into(),
                value: person.to_bytes().into(),
                expires_at: None,
            });
            if notes.len() >= STEP {
                go_on(&mut held).await?;
                store.put_notes(std::mem::take(&mut notes), now).await?;
            }
        }
        for (kind, cookie, browser) in self.browsers.changed() {
            let of = self.of_browsers.entry(cookie);
            of.or_insert_with(OfBrowser::new).notes.push(Note {
                kind,
                key: cookie.to_string().into(),
                value: browser.to_bytes().into(),
                expires_at: Some(now + BROWSER_KEPT),
            });
        }
        let mut news = Vec::new();
        // In the order of their names, and so of their age: neighbours stand on the same page.
        let mut of_browsers: Vec<_> = self.of_browsers.into_iter().collect();
        of_browsers.sort_unstable_by_key(|(cookie, _)| *cookie);
        for (_, of) in of_browsers {
            notes.extend(of.notes);
            news.extend(of.news);
            if notes.len() >= STEP {
                go_on(&mut held).await?;
                let (notes, news) = (std::mem::take(&mut notes), std::mem::take(&mut news));
                store.derive(notes, news, now).await?;
            }
        }
        notes.extend(self.notes);
        if notes.is_empty() && news.is_empty() {
            return Ok(());
        }
        go_on(&mut held).await?;
        store.derive(notes, news, now).await
    }
}

/// Before a step: the job, if it is one, is this node's.
async fn go_on(held: &mut Option<&mut JobLease>) -> Result<(), StoreError> {
    match held {
        Some(held) => held.go_on().await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::MessageId;
    use store::sqlite::{Role, SqliteOptions, SqliteStore};

    const T0: Timestamp = Timestamp::from_millis(1_763_712_300_000);
    const COOKIE: VisitorId = VisitorId::from_bytes([7; 16]);
    const B1: Uuid = Uuid::from_u128(1);
    const B2: Uuid = Uuid::from_u128(2);

    async fn store() -> (tempfile::TempDir, SqliteStore) {
        let dir = tempfile::tempdir().expect("a directory");
        let options = SqliteOptions {
            path: dir.path().join("test.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = SqliteStore::open(options).await.expect("a store");
        (dir, store)
    }

    fn click(person: &str, binding: Uuid, at: Timestamp) -> Click {
        Click {
            prospect: person.into(),
            binding: binding.to_string().into(),
            fresh: VisitorId::from_bytes([8; 16]),
            clicked_before: None,
            at,
        }
    }

    fn wanted(person: &str, binding: Uuid) -> BTreeMap<Arc<str>, Wanted> {
        let of = Wanted {
            browsers: vec![COOKIE],
            clicks: vec![Clicked {
                browser: COOKIE,
                person: person.into(),
                binding,
            }],
            ..Wanted::default()
        };
        [("acme".into(), of)].into()
    }

    #[test]
    fn prospects_are_what_the_store_calls_notes_of_people() {
        assert!(kind_of(PROSPECTS, "acme").starts_with(store::PEOPLE));
    }

    #[tokio::test]
    async fn a_browser_that_is_only_seen_again_is_written_once_a_day() {
        let (_dir, store) = store().await;
        let kind = kind_of(BROWSERS, "acme");
        let hour = Duration::from_hours(1);
        let mut expires = Vec::new();
        for at in [T0, T0 + hour, T0 + 23 * hour, T0 + 25 * hour] {
            let mut docs = Docs::new(&store, at);
            docs.prefetch(wanted("p-1", B1)).await.expect("read");
            let found = docs.click("acme", COOKIE, click("p-1", B1, at)).await;
            let is_new = matches!(found.expect("a browser"), Found::Bound { .. });
            assert_eq!(is_new, at == T0);
            docs.write(None).await.expect("written");
            let note = store.note(&kind, &COOKIE.to_string(), at).await;
            let note = note.expect("read").expect("a browser");
            expires.push(note.expires_at.expect("not for ever"));
        }
        let first = T0 + BROWSER_KEPT;
        assert_eq!(expires, [first, first, first, first + 25 * hour]);
    }

    /// Who reads an event again after a crash must not bind what was revoked since.
    #[tokio::test]
    async fn a_binding_is_asked_for_where_the_click_may_have_made_it() {
        let (_dir, store) = store().await;
        let binding = Binding {
            cookie: COOKIE,
            visitor: COOKIE,
            prospect: "p-1".into(),
            email: "a@x.example".into(),
            at: T0,
            message: MessageId {
                batch: model::BatchId::from_bytes([3; 16]),
                index: 1,
            },
            event_id: B1.to_string().into(),
            forward_suspected: false,
            revoked_at: Some(T0),
        };
        let mut docs = Docs::new(&store, T0);
        // Nobody's: there is nothing to ask, and nothing is said to be there.
        docs.prefetch(wanted("p-1", B1)).await.expect("read");
        assert!(!docs.is_owned("acme", COOKIE, "p-1").await.expect("read"));
        assert_eq!(docs.binding("acme", B1).await.expect("read"), None);
        // Bound by the click, and revoked.
        let bound = docs.click("acme", COOKIE, click("p-1", B1, T0)).await;
        assert!(matches!(bound, Ok(Found::Bound { .. })));
        docs.set_binding("acme", B1, binding.clone());
        let browser = docs.browser("acme", COOKIE).await.expect("a browser");
        assert!(browser.revoke(&B1.to_string()).is_some());
        docs.write(None).await.expect("written");
        // Read again, it is known.
        let mut docs = Docs::new(&store, T0);
        docs.prefetch(wanted("p-1", B1)).await.expect("read");
        let known = docs.binding("acme", B1).await.expect("read");
        assert_eq!(known, Some(&binding));
        // Another person's, it may have been made by this click, too.
        let bound = docs.click("acme", COOKIE, click("p-2", B2, T0)).await;
        assert!(matches!(bound, Ok(Found::Bound { .. })));
        docs.write(None).await.expect("written");
        let mut docs = Docs::new(&store, T0);
        docs.prefetch(wanted("p-1", B1)).await.expect("read");
        assert_eq!(
            docs.binding("acme", B1).await.expect("read"),
            Some(&binding)
        );
        assert!(docs.is_owned("acme", COOKIE, "p-2").await.expect("read"));
    }
}
