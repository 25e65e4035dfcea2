//! Lets go of what need not be kept any longer (`[retention]`), and of people who are to be erased.
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

use crate::erasure::Order;

/// The name of the job.
const JOB: &str = "keeping";
/// How long it is one node's; renewed on the way.
const LEASE: Duration = Duration::from_secs(120);
/// Between two looks for people to erase; and how many looks are between two runs of retention.
const LOOK: Duration = Duration::from_secs(30);
const RETENTION_EVERY: u32 = 20;
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
            for turn in 0_u32.. {
                if let Err(error) = self.once(turn % RETENTION_EVERY == 0).await {
                    tracing::warn!(%error, "what is old, or to be erased, goes later");
                }
                // Not all nodes at the same time.
                tokio::time::sleep(LOOK.mul_f64(0.9 + fastrand::f64() / 5.0)).await;
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

    /// Erases whoever is to be erased and, if `retention` is due, removes everything that is old now;
    /// unless another node does.
    async fn once(&self, retention: bool) -> Result<(), StoreError> {
        if !self.lease(LEASE).await? {
            return Ok(());
        }
        self.erase().await?;
        if retention && self.lease(LEASE).await? {
            self.retire().await?;
        }
        Ok(())
    }

    /// Carries out what was ordered and is not done.
    async fn erase(&self) -> Result<(), StoreError> {
        let store = &*self.store;
        let orders = Order::all(store, self.clock.now()).await?;
        let waiting = orders.iter().filter(|order| !order.again);
        let oldest = waiting
            .map(|order| self.clock.now().since(order.since))
            .max();
        self.metrics
            .erasure_oldest_seconds
            .set(oldest.unwrap_or_default().as_secs_f64());
        for mut order in orders {
            while order.is_due(self.clock.now())
                && !order.carry_out(store, &self.clock, LEASE / 4).await?
            {
                if !self.lease(LEASE).await? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Removes everything that is old now.
    async fn retire(&self) -> Result<(), StoreError> {
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
            variants: Vec::new(),
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

    async fn store_in(directory: &std::path::Path) -> SqliteStore {
        let options = SqliteOptions {
            path: directory.join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        SqliteStore::open(options).await.unwrap()
    }

    #[tokio::test]
    async fn one_node_at_a_time_removes_what_is_older_than_configured() {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(store_in(directory.path()).await);
        let clock = Manual::at(T0);
        let (one, two) = (keeping(&store, &clock, 1), keeping(&store, &clock, 2));
        let batch = ended(&store).await;
        let counted = |of: &Keeping| {
            [Kept::Events, Kept::Recipients, Kept::Batches]
                .map(|kind| of.metrics.retired.at(kind).get())
        };
        one.once(true).await.unwrap();
        assert_eq!(counted(&one), [0, 0, 0]);
        clock.set_wall(T0 + 31 * DAY);
        one.once(true).await.unwrap();
        let [events, ..] = counted(&one);
        assert!(events > 0);
        clock.set_wall(T0 + 91 * DAY);
        // The first has the job: the second leaves it alone.
        assert!(one.lease(LEASE).await.unwrap());
        two.once(true).await.unwrap();
        assert_eq!(counted(&two), [0, 0, 0]);
        one.once(true).await.unwrap();
        assert_eq!(counted(&one), [events, 2, 1]);
        let counters = store.batch(batch).await.unwrap().unwrap().counters;
        assert_eq!((counters.accepted, counters.cancelled), (2, 2));
    }

    #[tokio::test]
    async fn an_order_to_erase_is_carried_out_twice_whoever_ends_in_between() {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(store_in(directory.path()).await);
        let clock = Manual::at(T0);
        ended(&store).await;
        Order::give(&*store, "default", "a@x.example", T0)
            .await
            .unwrap();
        let orders = async || Order::all(&*store, T0).await.unwrap().len();
        let known = async || store.address("default", "a@x.example").await.unwrap();
        // Whoever took the order ended: another node carries it out.
        keeping(&store, &clock, 1).once(false).await.unwrap();
        let found = known().await;
        assert!(
            found.messages.is_empty() && found.suppressions.len() == 1,
            "{found:?}"
        );
        assert_eq!(orders().await, 1);
        clock.set_wall(T0 + Duration::from_secs(3_600));
        keeping(&store, &clock, 2).once(false).await.unwrap();
        assert_eq!(orders().await, 0);
        assert_eq!(known().await.suppressions.len(), 1);
        let other = store.address("default", "b@x.example").await.unwrap();
        assert_eq!(other.messages.len(), 1);
    }
}
