//! Reading: a few connections, each used by one blocking thread at a time.
//!
//! Owns how many there are. A reading sees one moment: it is one read transaction. Must not write.

use super::cache::Cache;
use super::db;
use crate::{Result, StoreError};
use rusqlite::Connection;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

/// Readings at a time; more wait.
const READERS: usize = 4;

/// What a reading works on.
pub(super) struct Reading<'a> {
    pub(super) connection: &'a Connection,
    pub(super) cache: &'a Cache,
}

/// The connections.
pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Connection>>>,
    cache: Arc<Cache>,
}

impl Readers {
    pub(super) fn new(path: PathBuf, cache: Arc<Cache>) -> Self {
        Self {
            path,
            permits: Arc::new(Semaphore::new(READERS)),
            idle: Arc::default(),
            cache,
        }
    }

    /// Runs `work` on a blocking thread. A dropped future lets it run to its end.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Reading<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let ended = || StoreError::Unavailable("the store is being closed".into());
        let permit = self
            .permits
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| ended())?;
        let (path, idle, cache) = (self.path.clone(), self.idle.clone(), self.cache.clone());
        let run = move || {
            let _permit = permit;
            let kept = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = kept.map_or_else(|| db::open_reader(&path), Ok)?;
            let outcome = one_moment(&connection, &cache, work);
            // A connection that failed may be the reason: the next reading opens another.
            if outcome.is_ok() {
                idle.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(connection);
            }
            outcome
        };
        tokio::task::spawn_blocking(run)
            .await
            .map_err(|_| ended())?
    }
}

fn one_moment<T>(
    connection: &Connection,
    cache: &Cache,
    work: impl FnOnce(&Reading<'_>) -> Result<T>,
) -> Result<T> {
    let moment = connection.unchecked_transaction()?;
    let outcome = work(&Reading { connection, cache })?;
    moment.finish()?;
    Ok(outcome)
}
