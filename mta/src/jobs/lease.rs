//! The lease on a job that one node at a time does.
//!
//! Owns when it is renewed, and for how long it is relied on. Must not know the job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::JournalId;
use service::clock::SharedClock;
use store::{Store, StoreError};

/// A job's lease as this node has it, or wants it. It is counted from before it was asked for, by
/// the monotonic clock.
pub(crate) struct JobLease {
    store: Arc<dyn Store>,
    clock: SharedClock,
    node: JournalId,
    job: &'static str,
    ttl: Duration,
    /// The fencing token, and since when.
    held: Option<(u64, Instant)>,
}

impl JobLease {
    /// Nothing is asked for yet.
    pub(crate) fn new(
        job: &'static str,
        ttl: Duration,
        node: JournalId,
        store: &Arc<dyn Store>,
        clock: &SharedClock,
    ) -> Self {
        Self {
            store: Arc::clone(store),
            clock: Arc::clone(clock),
            node,
            job,
            ttl,
            held: None,
        }
    }

    /// Takes the job, or renews it once a third of its time is over: each is a durable step of the
    /// store. The fencing token, if the job is this node's.
    ///
    /// # Errors
    /// As the store gives them.
    pub(crate) async fn keep(&mut self) -> Result<Option<u64>, StoreError> {
        let began = self.clock.instant();
        if let Some((token, since)) = self.held
            && began.saturating_duration_since(since) < self.ttl / 3
        {
            return Ok(Some(token));
        }
        let now = self.clock.now();
        let lease = self.store.job_lease(self.job, self.node, now, self.ttl);
        let token = lease.await?;
        self.held = token.map(|token| (token, began));
        Ok(token)
    }

    /// Whether a write may still begin: in the first two thirds of its time.
    ///
    /// # Errors
    /// When it may not, as if the store were away.
    pub(crate) fn holds(&self) -> Result<(), StoreError> {
        let now = self.clock.instant();
        match self.held {
            Some((_, since)) if now.saturating_duration_since(since) < self.ttl * 2 / 3 => Ok(()),
            Some(_) | None => Err(StoreError::Unavailable("the job's lease is over".into())),
        }
    }

    /// Before one of several writes that follow from what was read: renews what holds. Nobody else had the
    /// job since it was read, then.
    ///
    /// # Errors
    /// As [`JobLease::holds`] and [`JobLease::keep`].
    pub(crate) async fn go_on(&mut self) -> Result<(), StoreError> {
        self.holds()?;
        self.keep().await?;
        self.holds()
    }

    /// Lets others have it at once.
    pub(crate) async fn give_up(mut self) {
        let now = self.clock.now();
        let ended = self
            .store
            .job_lease(self.job, self.node, now, Duration::ZERO);
        if let Err(error) = ended.await {
            tracing::debug!(job = self.job, %error, "the lease on a job ends by itself");
        }
        self.held = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Timestamp;
    use service::clock::Manual;
    use store::sqlite::{Role, SqliteOptions, SqliteStore};

    const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
    const TTL: Duration = Duration::from_secs(45);

    #[tokio::test]
    async fn a_job_is_one_nodes_and_the_lease_is_renewed_after_a_third() {
        let directory = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: directory.path().join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(options).await.unwrap());
        let clock = Manual::at(T0);
        let shared: SharedClock = Arc::new(clock.clone());
        let lease = |node| JobLease::new("job", TTL, JournalId::new(T0, node), &store, &shared);
        let (mut one, mut two) = (lease(1), lease(2));
        assert!(one.holds().is_err());
        let token = one.keep().await.unwrap();
        assert!(token.is_some() && one.holds().is_ok());
        assert_eq!(two.keep().await.unwrap(), None);

        clock.advance(Duration::from_secs(14));
        assert_eq!(one.keep().await.unwrap(), token);
        clock.advance(Duration::from_secs(16));
        assert!(one.holds().is_err(), "it was not renewed at 14 s");
        assert_eq!(one.keep().await.unwrap(), token);
        clock.advance(Duration::from_secs(29));
        assert!(one.holds().is_ok());
        assert_eq!(two.keep().await.unwrap(), None);
        one.go_on().await.unwrap();
        clock.advance(Duration::from_secs(29));
        assert!(one.holds().is_ok(), "going on renewed it");
        clock.advance(Duration::from_secs(1));
        assert!(one.go_on().await.is_err(), "another may have had it");
        assert_eq!(one.keep().await.unwrap(), token);

        one.give_up().await;
        let other = two.keep().await.unwrap();
        assert!(other > token, "{other:?} fences {token:?}");
    }
}
