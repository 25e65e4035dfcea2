//! Notes: what nodes and jobs tell each other, and what is known of people.
//!
//! Partition 0 has them, so that one step writes any of them together with events. Those of people,
//! of which there are as many as people ([`PEOPLE`](crate::PEOPLE)), stand each in the partition of its
//! own key, in stores that were made since that is so ([`server`](super::server)); nothing but its own
//! key is ever written in one step with such a note. Must not read a note's value.

use super::Inner;
use super::books::Books;
use super::commit::{Commit, Outcome};
use super::keys::{self, HOME};
use super::link::answer;
use crate::{Announcement, Note, PEOPLE, Page, Result, StoreError};
use ::redis::Cmd;
use futures_util::future::try_join_all;
use model::{Partition, Timestamp};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Notes that are forgotten in one step.
const FORGOTTEN: u32 = 1_000;
/// Notes of a kind read at once, where all are wanted.
const AT_ONCE: u32 = 1_000;

/// Keys of notes of a kind, by where they stand.
type KeysOf = BTreeMap<Partition, Vec<Vec<u8>>>;

/// When a note expires that never does.
const NEVER: i64 = i64::MAX;

fn read_note(kind: &str, key: &[u8], stored: &[u8]) -> Option<Note> {
    let (expires, value) = stored.split_first_chunk::<8>()?;
    let expires = i64::from_le_bytes(*expires);
    Some(Note {
        kind: kind.into(),
        key: std::str::from_utf8(key).ok()?.into(),
        value: value.into(),
        expires_at: (expires != NEVER).then(|| Timestamp::from_millis(expires)),
    })
}

/// What is written of the notes of a kind.
#[derive(Default)]
struct Written {
    /// Keys and what is kept under them.
    kept: Vec<Vec<u8>>,
    /// Scores and keys.
    listed: Vec<Vec<u8>>,
    /// Keys.
    gone: Vec<Vec<u8>>,
}

/// Writes notes, the last of each key, with few commands however many they are: whoever follows the
/// events writes one for each person.
fn write_notes(commit: &mut Commit, notes: Vec<Note>) {
    let p = commit.partition;
    let name = |note: &Note| (note.kind.clone(), note.key.clone());
    let last: BTreeMap<_, Note> = notes.into_iter().map(|note| (name(&note), note)).collect();
    let mut kinds: BTreeMap<Arc<str>, Written> = BTreeMap::new();
    let (mut expiring, mut lasting) = (Vec::new(), Vec::new());
    for ((kind, key), note) in last {
        let named = format!("{kind}\0{key}").into_bytes();
        let written = kinds.entry(kind.clone()).or_default();
        if note.value.is_empty() {
            written.gone.push(key.as_bytes().to_vec());
            lasting.push(named);
            continue;
        }
        let until = note.expires_at.map_or(NEVER, Timestamp::millis);
        let stored = [&until.to_le_bytes()[..], &note.value].concat();
        written.kept.extend([key.as_bytes().to_vec(), stored]);
        written
            .listed
            .extend([b"0".to_vec(), key.as_bytes().to_vec()]);
        match note.expires_at {
            Some(_) => expiring.extend([until.to_string().into_bytes(), named]),
            None if kind.starts_with(PEOPLE) => {}
            None => lasting.push(named),
        }
    }
    for (kind, written) in kinds {
        let (key, index) = (keys::notes(p, &kind), keys::notes_index(p, &kind));
        commit.write_many("HDEL", &key, &written.gone, 1);
        commit.write_many("ZREM", &index, &written.gone, 1);
        commit.write_many("HSET", &key, &written.kept, 2);
        commit.write_many("ZADD", &index, &written.listed, 2);
    }
    commit.write_many("ZADD", &keys::notes_expiry(p), &expiring, 2);
    commit.write_many("ZREM", &keys::notes_expiry(p), &lasting, 1);
}

fn holds(note: &Note, now: Timestamp) -> bool {
    note.expires_at.is_none_or(|at| at > now)
}

impl Inner {
    /// Where notes of a kind stand.
    fn places_of(&self, kind: &str) -> Vec<Partition> {
        if self.spread && kind.starts_with(PEOPLE) {
            self.all_partitions().collect()
        } else {
            vec![HOME]
        }
    }

    /// Where a note stands.
    fn place_of_note(&self, kind: &str, key: &str) -> Partition {
        if self.spread && kind.starts_with(PEOPLE) {
            Partition::of(kind, key, self.partitions)
        } else {
            HOME
        }
    }

    /// Notes by where they stand. Refused, all of them: one that may not be ([`Note::check`]).
    fn divide_notes(&self, notes: Vec<Note>) -> Result<BTreeMap<Partition, Vec<Note>>> {
        let mut parts: BTreeMap<Partition, Vec<Note>> = BTreeMap::new();
        for note in notes {
            note.check()?;
            let p = self.place_of_note(&note.kind, &note.key);
            parts.entry(p).or_default().push(note);
        }
        Ok(parts)
    }

    async fn put_parts(&self, parts: BTreeMap<Partition, Vec<Note>>, now: Timestamp) -> Result<()> {
        let parts = parts.into_iter().map(|(p, notes)| async move {
            let mut commit = Commit::new(p);
            if notes.iter().any(|note| !note.kind.starts_with(PEOPLE)) {
                self.forget_expired(&mut commit, now).await?;
            }
            write_notes(&mut commit, notes);
            // Nothing is checked, so nothing conflicts.
            commit.run(self, false).await
        });
        try_join_all(parts).await.map(drop)
    }

    /// Writes notes, and forgets those that have expired.
    pub(super) async fn put_notes(&self, notes: Vec<Note>, now: Timestamp) -> Result<()> {
        self.put_parts(self.divide_notes(notes)?, now).await
    }

    /// Writes a note, unless it is no longer what it was.
    pub(super) async fn swap_note(
        &self,
        note: Note,
        before: Option<&[u8]>,
        now: Timestamp,
    ) -> Result<bool> {
        let mut tries = self.tries();
        while tries.again().await? {
            let parts = self.divide_notes(vec![note.clone()])?;
            let Some((p, notes)) = parts.into_iter().next() else {
                break;
            };
            let key = keys::notes(p, &note.kind);
            let mut get = Cmd::new();
            get.arg("HGET").arg(&key).arg(&*note.key);
            let stored = answer::bytes(self.link.short(&get).await?);
            let found = stored
                .as_deref()
                .and_then(|stored| read_note(&note.kind, note.key.as_bytes(), stored))
                .filter(|found| holds(found, now));
            if found.as_ref().map(|found| &*found.value) != before {
                return Ok(false);
            }
            let mut commit = Commit::new(p);
            commit.check_field(key, note.key.as_bytes(), stored.as_deref());
            write_notes(&mut commit, notes);
            if commit.run(self, false).await? != Outcome::Conflict {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes notes and puts events into the stream: those of people first.
    pub(super) async fn derive(
        &self,
        notes: Vec<Note>,
        news: Vec<Announcement>,
        now: Timestamp,
    ) -> Result<()> {
        let mut parts = self.divide_notes(notes)?;
        let own = parts.remove(&HOME).unwrap_or_default();
        self.put_parts(parts, now).await?;
        let mut books = Books::open(self, HOME, now);
        self.forget_expired(&mut books.commit, now).await?;
        write_notes(&mut books.commit, own);
        books.account_events(news).await?;
        books.close(None, 0)?.0.run(self, false).await?;
        self.wrote();
        Ok(())
    }

    async fn forget_expired(&self, commit: &mut Commit, now: Timestamp) -> Result<()> {
        let p = commit.partition;
        let mut find = Cmd::new();
        find.arg("ZRANGEBYSCORE")
            .arg(keys::notes_expiry(p))
            .arg("-inf")
            .arg(now.millis())
            .arg("LIMIT")
            .arg(0)
            .arg(FORGOTTEN);
        for named in answer::list(self.link.short(&find).await?) {
            let named = answer::bytes(named).unwrap_or_default();
            let text = String::from_utf8_lossy(&named).into_owned();
            if let Some((kind, key)) = text.split_once('\0') {
                commit.write("HDEL", keys::notes(p, kind), [key]);
                commit.write("ZREM", keys::notes_index(p, kind), [key]);
            }
            commit.write("ZREM", keys::notes_expiry(p), [named]);
        }
        Ok(())
    }

    // ---- reading ------------------------------------------------------------------------

    /// Notes of a kind after a key; fewer than asked for where partitions have different ones.
    pub(super) async fn notes_after(
        &self,
        kind: &str,
        after: Option<&str>,
        limit: u32,
        now: Timestamp,
    ) -> Result<Page<Note>> {
        let places = self.places_of(kind);
        let share = share_of(limit, places.len());
        let from = after.map_or_else(|| "-".to_owned(), |key| format!("({key}"));
        let parts = places.into_iter().map(|p| {
            let mut find = Cmd::new();
            find.arg("ZRANGEBYLEX")
                .arg(keys::notes_index(p, kind))
                .arg(&from)
                .arg("+")
                .arg("LIMIT")
                .arg(0)
                .arg(share);
            async move {
                let found = answer::list(self.link.short(&find).await?);
                let found = found.into_iter().filter_map(answer::bytes);
                Ok::<_, StoreError>((p, found.collect::<Vec<_>>()))
            }
        });
        let parts = try_join_all(parts).await?;
        let (wanted, next) = first_of(parts, share, limit);
        let mut items = self.read_notes(kind, wanted, now).await?;
        items.sort_by(|a, b| a.key.cmp(&b.key));
        let next = next.map(|key| String::from_utf8_lossy(&key).into_owned());
        Ok(Page { items, next })
    }

    /// Notes by their keys.
    pub(super) async fn notes_by_key(
        &self,
        kind: &str,
        keys: Vec<Box<str>>,
        now: Timestamp,
    ) -> Result<Vec<Note>> {
        let mut parts = KeysOf::new();
        for key in keys {
            let p = self.place_of_note(kind, &key);
            parts.entry(p).or_default().push(key.as_bytes().to_vec());
        }
        self.read_notes(kind, parts, now).await
    }

    /// Those of some notes of a kind that are there.
    async fn read_notes(&self, kind: &str, parts: KeysOf, now: Timestamp) -> Result<Vec<Note>> {
        let parts = parts.into_iter().map(|(p, keys)| async move {
            let mut get = Cmd::new();
            get.arg("HMGET").arg(keys::notes(p, kind)).arg(&keys);
            let stored = answer::list(self.link.short(&get).await?);
            let read = keys.iter().zip(stored).filter_map(|(key, stored)| {
                let stored = answer::bytes(stored)?;
                read_note(kind, key, &stored)
            });
            Ok::<_, StoreError>(read.collect::<Vec<_>>())
        });
        let all = try_join_all(parts).await?.into_iter().flatten();
        Ok(all.filter(|note| holds(note, now)).collect())
    }

    /// The notes of a kind.
    pub(super) async fn notes(&self, kind: &str, now: Timestamp) -> Result<Vec<Note>> {
        if !kind.starts_with(PEOPLE) {
            let mut get = Cmd::new();
            get.arg("HGETALL").arg(keys::notes(HOME, kind));
            let stored = answer::pairs(self.link.short(&get).await?);
            let read = stored
                .iter()
                .filter_map(|(key, value)| read_note(kind, key, value));
            let mut notes: Vec<Note> = read.filter(|note| holds(note, now)).collect();
            notes.sort_by(|a, b| a.key.cmp(&b.key));
            return Ok(notes);
        }
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = self
                .notes_after(kind, after.as_deref(), AT_ONCE, now)
                .await?;
            all.extend(page.items);
            after = page.next;
            if after.is_none() {
                return Ok(all);
            }
        }
    }

    /// One note.
    pub(super) async fn note(&self, kind: &str, key: &str, now: Timestamp) -> Result<Option<Note>> {
        let mut get = Cmd::new();
        get.arg("HGET")
            .arg(keys::notes(self.place_of_note(kind, key), kind))
            .arg(key);
        let stored = answer::bytes(self.link.short(&get).await?);
        let note = stored.and_then(|stored| read_note(kind, key.as_bytes(), &stored));
        Ok(note.filter(|note| holds(note, now)))
    }
}

/// How many keys each of some partitions is asked for, so that a page is hardly ever much shorter than
/// `limit` and little is read in vain.
fn share_of(limit: u32, places: usize) -> usize {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX).max(1);
    let even = limit.div_ceil(places.max(1));
    (even + even / 8 + 8).min(limit)
}

/// The first keys of all, by partition, of what each gave in order; and the last of them, where there
/// may be more. A partition that gave all that it was asked for may have more right behind its last, so
/// nothing beyond that is taken.
fn first_of(
    parts: Vec<(Partition, Vec<Vec<u8>>)>,
    share: usize,
    limit: u32,
) -> (KeysOf, Option<Vec<u8>>) {
    let full = parts.iter().filter(|(_, keys)| keys.len() >= share);
    let horizon = full.filter_map(|(_, keys)| keys.last()).min().cloned();
    let all = parts
        .into_iter()
        .flat_map(|(p, keys)| keys.into_iter().map(move |key| (key, p)));
    let mut all: Vec<(Vec<u8>, Partition)> = all
        .filter(|(key, _)| horizon.as_ref().is_none_or(|last| key <= last))
        .collect();
    all.sort_unstable();
    let limit = usize::try_from(limit).unwrap_or(usize::MAX).max(1);
    let more = horizon.is_some() || all.len() > limit;
    all.truncate(limit);
    let next = all.last().filter(|_| more).map(|(key, _)| key.clone());
    let mut wanted = KeysOf::new();
    for (key, p) in all {
        wanted.entry(p).or_default().push(key);
    }
    (wanted, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Reads all keys page by page, as they stand in partitions.
    fn paged(parts: &[BTreeSet<Vec<u8>>], limit: u32) -> Vec<Vec<u8>> {
        let share = share_of(limit, parts.len());
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let given = (0..).map(Partition).zip(parts).map(|(p, keys)| {
                let rest = keys.iter().filter(|key| Some(*key) > after.as_ref());
                (p, rest.take(share).cloned().collect())
            });
            let (wanted, next) = first_of(given.collect(), share, limit);
            let mut page: Vec<_> = wanted.into_values().flatten().collect();
            assert!(page.len() <= usize::try_from(limit).unwrap());
            page.sort();
            assert_eq!(next.as_ref(), page.last().filter(|_| next.is_some()));
            all.extend(page);
            after = next;
            if after.is_none() {
                return all;
            }
        }
    }

    proptest! {
        #[test]
        fn pages_over_partitions_have_every_key_once_and_in_order(
            keys in prop::collection::btree_set(prop::collection::vec(any::<u8>(), 1..4), 0..200),
            places in 1_usize..6,
            limit in 1_u32..60,
            seed: u64,
        ) {
            let mut chance = fastrand::Rng::with_seed(seed);
            let mut parts = vec![BTreeSet::new(); places];
            for key in &keys {
                parts[chance.usize(..places)].insert(key.clone());
            }
            let all: Vec<_> = keys.into_iter().collect();
            prop_assert_eq!(paged(&parts, limit), all);
        }
    }
}
