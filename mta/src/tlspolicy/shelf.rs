//! The MTA-STS policies that were fetched, for as long as they hold.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::Timestamp;
use serde::{Deserialize, Serialize};
use store::Note;

use super::sts::StsPolicy;

/// Notes of this kind hold policies; their keys are domains.
pub(super) const KIND: &str = "mta-sts";
/// Domains whose policies are kept; beyond, those go that are over, then some.
const DOMAINS_MAX: usize = 50_000;
/// A policy is fetched again when it is this old, so that it changes before it ends.
const FRESH: Duration = Duration::from_secs(86_400);

/// A policy that was fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fetched {
    /// The id that announced it.
    pub(super) id: Box<str>,
    pub(super) policy: Arc<StsPolicy>,
    pub(super) at: Timestamp,
}

impl Fetched {
    /// When it is over.
    pub(super) fn ends(&self) -> Timestamp {
        self.at + self.policy.max_age
    }

    /// From when on it should be fetched again although its id is the same.
    fn is_old(&self, now: Timestamp) -> bool {
        now >= self.at + FRESH.min(self.policy.max_age / 2)
    }

    fn note(&self, domain: &str) -> Option<Note> {
        Some(Note {
            kind: KIND.into(),
            key: domain.into(),
            value: postcard::to_allocvec(self).ok()?.into(),
            expires_at: Some(self.ends()),
        })
    }
}

/// The memory; what is new is handed to the store by whoever asks for [`Shelf::news`].
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    domains: HashMap<Box<str>, Fetched>,
    news: Vec<Note>,
}

impl Shelf {
    /// The policy of a domain that has not run out.
    pub(super) fn of(&self, domain: &str, now: Timestamp) -> Option<Fetched> {
        let inner = self.lock();
        let known = inner.domains.get(domain)?;
        (known.ends() > now).then(|| known.clone())
    }

    /// Keeps what was fetched, here and with the next notes.
    pub(super) fn put(&self, domain: &str, fetched: Fetched, now: Timestamp) {
        let mut inner = self.lock();
        let note = fetched.note(domain);
        inner.make_room(domain, now);
        inner.domains.insert(domain.into(), fetched);
        if inner.news.len() < DOMAINS_MAX {
            inner.news.extend(note);
        }
    }

    /// Takes in what this or another node noted, unless what is here is newer.
    pub(super) fn learn(&self, notes: &[Note], now: Timestamp) {
        let mut inner = self.lock();
        for note in notes {
            let Ok(fetched) = postcard::from_bytes::<Fetched>(&note.value) else {
                tracing::warn!(domain = %note.key, "the note of an MTA-STS policy cannot be read");
                continue;
            };
            let known = inner.domains.get(&note.key);
            if known.is_none_or(|known| known.at < fetched.at) && fetched.ends() > now {
                inner.make_room(&note.key, now);
                inner.domains.insert(note.key.clone(), fetched);
            }
        }
    }

    /// What was fetched since the last call.
    pub(super) fn news(&self) -> Vec<Note> {
        std::mem::take(&mut self.lock().news)
    }

    /// Puts back what could not be noted.
    pub(super) fn not_noted(&self, notes: Vec<Note>) {
        let mut inner = self.lock();
        let newer = std::mem::replace(&mut inner.news, notes);
        inner.news.extend(newer);
    }

    /// At most `limit` domains whose policies should be fetched again.
    pub(super) fn old(&self, now: Timestamp, limit: usize) -> Vec<Box<str>> {
        let inner = self.lock();
        let old = inner
            .domains
            .iter()
            .filter(|(_, f)| f.is_old(now) && f.ends() > now);
        old.map(|(domain, _)| domain.clone()).take(limit).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn make_room(&mut self, domain: &str, now: Timestamp) {
        if self.domains.len() < DOMAINS_MAX || self.domains.contains_key(domain) {
            return;
        }
        self.domains.retain(|_, known| known.ends() > now);
        if self.domains.len() >= DOMAINS_MAX {
            let some: Vec<_> = self
                .domains
                .keys()
                .take(DOMAINS_MAX / 10)
                .cloned()
                .collect();
            for domain in some {
                self.domains.remove(&domain);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tlspolicy::sts::Mode;

    fn fetched(at: i64) -> Fetched {
        Fetched {
            id: "1".into(),
            policy: Arc::new(StsPolicy::of(Mode::Enforce, &["mx.x.example"])),
            at: Timestamp::from_millis(at),
        }
    }

    #[test]
    fn policies_end_grow_old_and_are_shared_by_notes() {
        let (shelf, other) = (Shelf::default(), Shelf::default());
        let start = Timestamp::from_millis(0);
        let (old, end) = (start + FRESH / 2, start + FRESH);
        shelf.put("x.example", fetched(0), start);
        assert_eq!(shelf.of("x.example", start), Some(fetched(0)));
        assert_eq!(shelf.of("x.example", end), None);
        assert_eq!(shelf.old(start, 9), Vec::<Box<str>>::new());
        assert_eq!(shelf.old(old, 9), [Box::<str>::from("x.example")]);
        let notes = shelf.news();
        assert!(shelf.news().is_empty());
        other.learn(&notes, end);
        assert_eq!(other.of("x.example", start), None, "over when it came");
        other.learn(&notes, start);
        assert_eq!(other.of("x.example", start), Some(fetched(0)));
        other.put("x.example", fetched(5), start);
        other.learn(&notes, start);
        assert_eq!(
            other.of("x.example", start),
            Some(fetched(5)),
            "older than known"
        );
        shelf.not_noted(notes.clone());
        assert_eq!(shelf.news(), notes);
    }

    #[test]
    fn damaged_notes_are_passed_over() {
        let shelf = Shelf::default();
        let note = Note {
            kind: KIND.into(),
            key: "x.example".into(),
            value: vec![0xff; 9].into(),
            expires_at: None,
        };
        shelf.learn(&[note], Timestamp::from_millis(0));
        assert_eq!(shelf.of("x.example", Timestamp::from_millis(0)), None);
    }
}
