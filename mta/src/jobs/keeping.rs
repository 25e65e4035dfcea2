//! Lets go of what need not be kept any longer (`[retention]`).
//!
//! Owns when, and that one node at a time does it; the store's steps are short, and there is a pause
//! after each, so that nothing that sends waits for them. Whoever takes over goes on where the store
//! is.

use std::sync::Arc;
use std::time::Duration;

use model::JournalId;
use service::clock::SharedClock;
use service::config::Retention;
use service::metrics::{Kept, Metrics};
use service::tasks::Shutdown;
use store::{Retire, Store, StoreError};

/// The name of the job.
const JOB: &str = "retention";
/// How long it is one node's; renewed on the way.
const LEASE: Duration = Duration::from_secs(120);
/// Between two runs.
const EVERY: Duration = Duration::from_secs(600);
/// After a step.
const PAUSE: Duration = Duration::from_millis(20);

/// The job; see the module.
pub(crate) struct Keeping {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) node: JournalId,
    pub(crate) retention: Retention,
}

impl Keeping {
    /// Runs until the end begins.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let keep = async {
            loop {
                if let Err(error) = self.once().await {
                    tracing::warn!(%error, "what is old is removed later");
                }
                // Not all nodes at the same time.
                tokio::time::sleep(EVERY.mul_f64(0.9 + fastrand::f64() / 5.0)).await;
            }
        };
        tokio::select! {
            () = keep => {}
            () = shutdown.begun() => {}
        }
        if let Err(error) = self.lease(Duration::ZERO).await {
            tracing::debug!(%error, "the lease on retention ends by itself");
        }
    }

    /// Takes, renews or gives up the job; whether it is this node's.
    async fn lease(&self, ttl: Duration) -> Result<bool, StoreError> {
        let now = self.clock.now();
        let lease = self.store.job_lease(JOB, self.node, now, ttl).await?;
        Ok(lease.is_some())
    }

    /// Removes everything that is old now, unless another node does.
    async fn once(&self) -> Result<(), StoreError> {
        if !self.lease(LEASE).await? {
            return Ok(());
        }
        let now = self.clock.now();
        let mut of = Retire {
            events_before: now - self.retention.events,
            batches_before: now - self.retention.batches,
            after: None,
        };
        let mut renewed = self.clock.instant();
        loop {
            let step = self.store.retire(of.clone(), self.clock.now()).await?;
            for (kind, count) in [
                (Kept::Events, step.events),
                (Kept::Recipients, step.recipients),
                (Kept::Batches, step.batches),
            ] {
                self.metrics.retired.at(kind).inc_by(count);
            }
            of.after = step.next;
            if of.after.is_none() {
                return Ok(());
            }
            if self.clock.instant() - renewed > LEASE / 4 {
                renewed = self.clock.instant();
                if !self.lease(LEASE).await? {
                    return Ok(());
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::{head, row};
    use model::{LotNumber, Partition, Timestamp};
    use service::clock::Manual;
    use store::sqlite::{Role, SqliteOptions, SqliteStore};
    use store::{BatchChange, NewBatch, NewLot};

    const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
    const DAY: Duration = Duration::from_secs(86_400);

    fn keeping(store: &Arc<SqliteStore>, clock: &Manual, node: u128) -> Keeping {
        Keeping {
            store: Arc::clone(store) as Arc<dyn Store>,
            clock: Arc::new(clock.clone()),
            metrics: Arc::new(Metrics::new()),
            node: JournalId::new(T0, node),
            retention: Retention {
                events: 30 * DAY,
                batches: 90 * DAY,
            },
        }
    }

    /// A batch that ended at once.
    async fn ended(store: &SqliteStore) -> model::BatchId {
        let head = store::BatchHead {
            release_at: T0,
            ..head(7)
        };
        let id = head.id;
        let lot = NewLot {
            number: LotNumber::new(Partition(0), 0).unwrap(),
            queue: "x.example".into(),
            rows: vec![row(0, "a@x.example"), row(1, "b@x.example")],
        };
        store.stage_lots(id, vec![lot]).await.unwrap();
        let batch = NewBatch {
            head,
            content: b"content".as_slice().into(),
            accepted: 2,
            rejected: 0,
            call: None,
        };
        store.commit_batch(batch, T0).await.unwrap();
        store
            .change_batch(id, BatchChange::Cancel, T0)
            .await
            .unwrap();
        id
    }

    #[tokio::test]
    async fn one_node_at_a_time_removes_what_is_older_than_configured() {
        let directory = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: directory.path().join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = Arc::new(SqliteStore::open(options).await.unwrap());
        let clock = Manual::at(T0);
        let (one, two) = (keeping(&store, &clock, 1), keeping(&store, &clock, 2));
        let batch = ended(&store).await;
        let counted = |of: &Keeping| {
            [Kept::Events, Kept::Recipients, Kept::Batches]
                .map(|kind| of.metrics.retired.at(kind).get())
        };
        one.once().await.unwrap();
        assert_eq!(counted(&one), [0, 0, 0]);
        clock.set_wall(T0 + 31 * DAY);
        one.once().await.unwrap();
        let [events, ..] = counted(&one);
        assert!(events > 0);
        clock.set_wall(T0 + 91 * DAY);
        // The first has the job: the second leaves it alone.
        assert!(one.lease(LEASE).await.unwrap());
        two.once().await.unwrap();
        assert_eq!(counted(&two), [0, 0, 0]);
        one.once().await.unwrap();
        assert_eq!(counted(&one), [events, 2, 1]);
        let counters = store.batch(batch).await.unwrap().unwrap().counters;
        assert_eq!((counters.accepted, counters.cancelled), (2, 2));
    }
}
