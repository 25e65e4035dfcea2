//! The one thread that writes: group commit.
//!
//! Owns the writing connection. Takes all requests that are ready, runs each in a savepoint of one
//! transaction, commits once, then answers all. Must not know what a request does.

use super::books::Changed;
use super::cache::Cache;
use crate::form::Packer;
use crate::{Result, StoreError};
use rusqlite::Connection;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait for the writer; more wait for a place.
const WAITING: usize = 256;
/// Requests in one transaction: bounds how long the first waits for the last.
const GROUP: usize = 64;
/// Rows written after which the log is carried over into the database.
const CHECKPOINT_ROWS: u64 = 2_000;
/// Transactions after which it is.
const CHECKPOINT_GROUPS: u32 = 256;

/// What a request works on.
pub(super) struct Step<'a> {
    pub(super) connection: &'a Connection,
    pub(super) cache: &'a Cache,
    pub(super) memory: &'a mut Memory,
    /// What others will want to look at after the commit.
    pub(super) changed: Changed,
}

/// What the writer remembers between requests; nothing that a rollback would have to undo.
pub(super) struct Memory {
    pub(super) packer: Packer,
    /// The batch served last, by queue and rank: the next lease begins after it.
    pub(super) turns: HashMap<(Box<str>, u8), i64>,
    /// Which part of an open batch is being added.
    pub(super) parts: HashMap<i64, super::parts::Turn>,
}

/// How the answer is given once the commit is known.
type Answer = Box<dyn FnOnce(Result<()>) + Send>;

/// What a request does with its step, or with the reason why it has none.
type Work = Box<dyn FnOnce(Result<&mut Step<'_>>) -> Answer + Send>;

struct Request {
    /// Durability is somebody else's: the transaction need not be synced for it.
    soft: bool,
    run: Work,
}

/// The way to the writer. The thread ends when the last clone is gone.
#[derive(Clone)]
pub(super) struct Writer(mpsc::Sender<Request>);

/// Counts the commits that added to what others follow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) control: u64,
    pub(super) events: u64,
}

/// Tells of commits.
pub(super) type Changes = watch::Sender<Written>;

/// Starts the thread.
pub(super) fn start(
    connection: Connection,
    cache: Arc<Cache>,
    changes: Arc<Changes>,
) -> Result<(Writer, std::thread::JoinHandle<()>)> {
    let (sender, requests) = mpsc::channel(WAITING);
    let memory = Memory {
        packer: Packer::new()?,
        turns: HashMap::new(),
        parts: HashMap::new(),
    };
    let run = move || Loop::new(connection, cache, changes, memory).run(requests);
    let thread = std::thread::Builder::new()
        .name("store-writer".into())
        .spawn(run)
        .map_err(|error| StoreError::Refused(format!("no thread: {error}")))?;
    Ok((Writer(sender), thread))
}

impl Writer {
    /// Runs `work` in a step of its own: all of it is committed and synced when this returns `Ok`,
    /// none of it has happened when it returns an error.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Step<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.ask(false, work).await
    }

    /// As [`Writer::write`], but synced only with the next one.
    pub(super) async fn write_soft<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Step<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.ask(true, work).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        soft: bool,
        work: impl FnOnce(&mut Step<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let run = move |step: Result<&mut Step<'_>>| -> Answer {
            let outcome = step.and_then(|step| savepoint(step, work));
            Box::new(move |commit: Result<()>| {
                // Whoever asked may be gone; what was done stays done.
                let _gone = answer.send(commit.and(outcome));
            })
        };
        let request = Request {
            soft,
            run: Box::new(run),
        };
        let ended = || StoreError::Unavailable("the writer has ended".into());
        self.0.send(request).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }
}

fn savepoint<T>(step: &mut Step<'_>, work: impl FnOnce(&mut Step<'_>) -> Result<T>) -> Result<T> {
    let run = |sql| step.connection.prepare_cached(sql)?.execute([]).map(drop);
    run("SAVEPOINT request")?;
    let before = step.changed;
    let outcome = work(step);
    let run = |sql| step.connection.prepare_cached(sql)?.execute([]).map(drop);
    match &outcome {
        Ok(_) => run("RELEASE request")?,
        Err(_) => {
            step.changed = before;
            // A full disk may have ended the whole transaction, and the savepoint with it.
            if !step.connection.is_autocommit() {
                run("ROLLBACK TO request").and_then(|()| run("RELEASE request"))?;
            }
        }
    }
    outcome
}

struct Loop {
    connection: Connection,
    cache: Arc<Cache>,
    changes: Arc<Changes>,
    memory: Memory,
    synced: bool,
    rows_at_checkpoint: u64,
    groups_since_checkpoint: u32,
}

impl Loop {
    fn new(
        connection: Connection,
        cache: Arc<Cache>,
        changes: Arc<Changes>,
        memory: Memory,
    ) -> Self {
        Self {
            rows_at_checkpoint: connection.total_changes(),
            connection,
            cache,
            changes,
            memory,
            synced: true,
            groups_since_checkpoint: 0,
        }
    }

    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut waiting = Vec::with_capacity(GROUP);
        while let Some(first) = requests.blocking_recv() {
            waiting.push(first);
            while waiting.len() < GROUP
                && let Ok(next) = requests.try_recv()
            {
                waiting.push(next);
            }
            while !waiting.is_empty() {
                self.group(&mut waiting);
            }
            self.checkpoint_if_long(requests.is_empty());
        }
        self.checkpoint();
    }

    /// Runs requests from the front until all are done or the transaction is broken.
    fn group(&mut self, waiting: &mut Vec<Request>) {
        let mut answers = Vec::with_capacity(waiting.len());
        let mut changed = Changed::default();
        let soft = waiting.iter().all(|request| request.soft);
        let begun = self.begin(!soft);
        let mut broken = begun.is_err();
        let mut done = 0;
        let mut step = Step {
            connection: &self.connection,
            cache: &self.cache,
            memory: &mut self.memory,
            changed,
        };
        let mut rest = std::mem::take(waiting).into_iter();
        if !broken {
            for request in rest.by_ref() {
                answers.push((request.run)(Ok(&mut step)));
                done += 1;
                if self.connection.is_autocommit() {
                    broken = true;
                    break;
                }
            }
        }
        changed = step.changed;
        let outcome = match begun {
            Err(error) => {
                // Each learns why; none of them was run.
                fail_all(rest, &error);
                return;
            }
            Ok(()) if broken => Err(StoreError::Unavailable(
                "the transaction was ended by the disk".into(),
            )),
            Ok(()) => self.commit(),
        };
        tracing::trace!(requests = done, ok = outcome.is_ok(), "committed");
        if outcome.is_ok() && changed.any() {
            self.changes.send_modify(|written| {
                written.control += u64::from(changed.control);
                written.events += u64::from(changed.events);
            });
        }
        for answer in answers {
            answer(outcome.clone());
        }
        *waiting = rest.collect();
    }

    fn begin(&mut self, sync: bool) -> Result<()> {
        if sync != self.synced {
            let level = if sync { "FULL" } else { "NORMAL" };
            self.connection.pragma_update(None, "synchronous", level)?;
            self.synced = sync;
        }
        self.connection
            .prepare_cached("BEGIN IMMEDIATE")?
            .execute([])?;
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        self.groups_since_checkpoint += 1;
        let committed = self
            .connection
            .prepare_cached("COMMIT")
            .and_then(|mut sql| sql.execute([]));
        if let Err(error) = committed {
            if !self.connection.is_autocommit() {
                self.connection.execute_batch("ROLLBACK")?;
            }
            // Whatever the reason is, nothing of it happened: it may be tried again.
            return match error.into() {
                StoreError::Damaged(what) => Err(StoreError::Unavailable(what)),
                other => Err(other),
            };
        }
        Ok(())
    }

    fn checkpoint_if_long(&mut self, idle: bool) {
        let rows = self
            .connection
            .total_changes()
            .wrapping_sub(self.rows_at_checkpoint);
        let limit = if idle {
            CHECKPOINT_ROWS / 2
        } else {
            CHECKPOINT_ROWS
        };
        if rows >= limit || self.groups_since_checkpoint >= CHECKPOINT_GROUPS {
            self.checkpoint();
        }
    }

    fn checkpoint(&mut self) {
        self.rows_at_checkpoint = self.connection.total_changes();
        self.groups_since_checkpoint = 0;
        let done = self
            .connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        if let Err(error) = done {
            tracing::warn!(%error, "the log could not be carried over into the database");
        }
    }
}

fn fail_all(requests: impl Iterator<Item = Request>, error: &StoreError) {
    for request in requests {
        (request.run)(Err(error.clone()))(Ok(()));
    }
}
