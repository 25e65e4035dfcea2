//! A store that forgets: which history of writes the servers tell, and what they had acknowledged.
//!
//! Three things betray it. The *generation*, a random name made with the store, stands in every
//! partition, and every step checks it: a server that came back empty refuses. The *replication id*
//! changes with the primary: leases may be missing then, so nothing is leased until every one of
//! them has run out (`commit.lua`, by the server's clock, for all nodes alike). The *marks* of
//! journals, which are written in the same step as facts: one that is lower than it was is
//! ground for its journal to ship again. Must not ship, nor judge what was lost.

use super::Inner;
use super::keys;
use super::link::answer;
use super::server::{self, Shard};
use crate::{Result, StoreError};
use ::redis::{Cmd, Pipeline};
use futures_util::future::try_join_all;
use model::{JournalId, Partition, Seq};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What this process has seen of the past.
#[derive(Debug)]
pub(super) struct Past {
    generation: String,
    shards: Mutex<BTreeMap<Partition, Shard>>,
    /// What every partition acknowledged of each journal.
    marks: Mutex<HashMap<(Partition, JournalId), Seq>>,
    upheavals: AtomicU64,
    /// Nothing was leased for it when a lease was last tried.
    quiet: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Past {
    /// The store that was opened, and how many shards of it were found empty then.
    pub(super) fn new(generation: String, missing: u64) -> Self {
        Self {
            generation,
            shards: Mutex::new(BTreeMap::new()),
            marks: Mutex::new(HashMap::new()),
            upheavals: AtomicU64::new(missing),
            quiet: AtomicBool::new(false),
        }
    }

    pub(super) fn generation(&self) -> &str {
        &self.generation
    }

    /// Whether the server of a partition has a replica, as it was when it was last looked at.
    pub(super) fn has_replicas(&self, p: Partition) -> bool {
        let shards = lock(&self.shards);
        shards.get(&p).is_some_and(|shard| shard.replicas > 0)
    }

    pub(super) fn any_replicas(&self) -> bool {
        lock(&self.shards).values().any(|shard| shard.replicas > 0)
    }

    pub(super) fn upheavals(&self) -> u64 {
        self.upheavals.load(Ordering::Relaxed)
    }

    /// What is said about a partition that is not of the store that was opened.
    pub(super) fn is_another(&self, p: Partition) -> StoreError {
        StoreError::Damaged(format!(
            "redis: partition {} is not of the store that this process opened: it came back empty, \
             or another one took its place. Bring back what it had; a node that is started anew \
             takes it as it is",
            p.0
        ))
    }

    /// Notes whether nothing is leased now.
    pub(super) fn note_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::Relaxed);
    }

    /// Whether nothing was leased for it when it was last tried.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Relaxed)
    }

    /// For how long nothing is leased, in seconds.
    pub(super) fn quiet_for(&self) -> Option<i64> {
        let shards = lock(&self.shards);
        shards
            .values()
            .map(|shard| shard.quiet_for)
            .max()
            .filter(|left| *left > 0)
    }

    /// Notes how far a partition acknowledged a journal.
    pub(super) fn note_mark(&self, p: Partition, journal: JournalId, mark: Seq) {
        let mut marks = lock(&self.marks);
        let known = marks.entry((p, journal)).or_default();
        *known = mark.max(*known);
    }

    /// Whether a partition has forgotten what it acknowledged of a journal. Says so once: what it
    /// has now is what is known from then on.
    pub(super) fn has_forgotten(&self, p: Partition, journal: JournalId, mark: Seq) -> bool {
        let mut marks = lock(&self.marks);
        let known = marks.entry((p, journal)).or_insert(mark);
        let forgotten = mark < *known;
        if forgotten {
            tracing::error!(
                partition = p.0, %journal, acknowledged = *known, has = mark,
                "the store has forgotten facts that it had acknowledged: they are shipped again"
            );
            *known = mark;
        }
        forgotten
    }

    /// Takes in what was found; counts what has changed.
    fn learn(&self, found: BTreeMap<Partition, Shard>) -> Result<()> {
        let odd = found
            .iter()
            .find(|(_, shard)| shard.generation != self.generation)
            .map(|(p, _)| *p);
        let mut shards = lock(&self.shards);
        let ids = |of: &BTreeMap<Partition, Shard>| -> BTreeSet<String> {
            of.values().map(|shard| shard.history.clone()).collect()
        };
        let was_odd = shards
            .values()
            .any(|shard| shard.generation != self.generation);
        let (before, now) = (ids(&shards), ids(&found));
        if !before.is_empty() && before != now {
            self.upheavals.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                ?before,
                ?now,
                "another server has become the primary, or it was started anew: writes that were \
                 acknowledged may be missing; nothing is leased until every lease has run out"
            );
        }
        if let Some(p) = odd
            && !was_odd
        {
            self.upheavals.fetch_add(1, Ordering::Relaxed);
            tracing::error!(error = %self.is_another(p), "THE STORE HAS LOST WHAT IT HAD");
        }
        *shards = found;
        odd.map_or(Ok(()), |p| Err(self.is_another(p)))
    }
}

impl Inner {
    /// Looks which history the servers tell.
    ///
    /// # Errors
    /// When one is not that of the store that was opened.
    pub(super) async fn look_back(&self) -> Result<()> {
        let asked = self.all_partitions().map(async |p| {
            let keys = [keys::generation(p), keys::history(p)];
            let answer = self.script(&self.scripts.past, p, &keys, &[], false);
            Ok::<_, StoreError>((p, server::read_shard(answer.await?)))
        });
        let found = try_join_all(asked).await?;
        self.past.learn(found.into_iter().collect())
    }
}

impl Inner {
    /// Of a store that was just made no lease can be missing.
    pub(super) async fn begin_history(&self) -> Result<()> {
        for p in self.all_partitions() {
            let shard = lock(&self.past.shards).get(&p).cloned().unwrap_or_default();
            let mut set = Cmd::new();
            set.arg("SET")
                .arg(keys::history(p))
                .arg(format!("{} 0", shard.history))
                .arg("NX");
            self.link.short(&set).await?;
        }
        Ok(())
    }
}

/// Finds or makes the generation of the store, and gives it to every partition. Says how many had
/// lost it.
///
/// # Errors
/// When the server does not answer.
pub(super) async fn settle(
    link: &super::link::Link,
    partitions: u16,
    (generation, made): (&str, bool),
) -> Result<u64> {
    let mut missing = 0;
    for p in (0..=u8::MAX).take(usize::from(partitions)).map(Partition) {
        let mut pipeline = Pipeline::new();
        pipeline
            .cmd("SET")
            .arg(keys::generation(p))
            .arg(generation)
            .arg("GET");
        let before = link.bulk(&pipeline).await?.into_iter().next();
        let before = before.and_then(answer::bytes);
        if before.as_deref() == Some(generation.as_bytes()) {
            continue;
        }
        if !made && before.is_none() {
            continue;
        }
        missing += 1;
        tracing::error!(
            partition = p.0,
            "A PARTITION OF THE STORE HAS LOST WHAT IT HAD: it is taken as it is"
        );
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Timestamp;

    fn shard(generation: &str, history: &str) -> BTreeMap<Partition, Shard> {
        let shard = Shard {
            generation: generation.into(),
            history: history.into(),
            ..Shard::default()
        };
        BTreeMap::from([(Partition(0), shard)])
    }

    #[test]
    fn what_changes_is_counted_once() {
        let past = Past::new("g".into(), 0);
        assert_eq!(past.learn(shard("g", "a")), Ok(()));
        assert_eq!(past.learn(shard("g", "a")), Ok(()));
        assert_eq!(past.upheavals(), 0);
        assert_eq!(past.learn(shard("g", "b")), Ok(()));
        assert_eq!(past.upheavals(), 1);
        assert!(past.learn(shard("", "b")).is_err());
        assert!(past.learn(shard("", "b")).is_err());
        assert_eq!(past.upheavals(), 2);
        assert_eq!(past.learn(shard("g", "b")), Ok(()));
        assert_eq!(past.upheavals(), 2);
    }

    #[test]
    fn a_mark_that_fell_is_told_once() {
        let (past, p) = (Past::new("g".into(), 0), Partition(3));
        let journal = JournalId::new(Timestamp::from_millis(1), 1);
        assert!(!past.has_forgotten(p, journal, 5));
        past.note_mark(p, journal, 9);
        assert!(!past.has_forgotten(p, journal, 9));
        assert!(past.has_forgotten(p, journal, 7));
        assert!(!past.has_forgotten(p, journal, 7));
    }
}
