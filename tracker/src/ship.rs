//! Shipping: from the journal into the store, in batches, in the background.
//!
//! Owns the pace and the patience. Nothing waits for it: while the store is away the journal
//! grows, and drains afterwards. A fact is shipped at least once and counted once, since the store
//! keeps a mark for each journal; that mark is where shipping begins after a start.

use journal::{Journal, Pending, RecordKind};
use model::{Fact, Seq};
use service::clock::SharedClock;
use service::metrics::{DroppedKind, Metrics, Portion};
use service::tasks::{Hold, Shutdown, Stage};
use std::sync::Arc;
use std::time::Duration;
use store::{Shipment, Store, StoreError};

/// How long a hit waits for others to go with it; a full shipment does not wait.
const LINGER: Duration = Duration::from_millis(50);
/// How often the gauges are set while nothing happens.
const IDLE: Duration = Duration::from_secs(1);
/// How often it is asked whether the store may have forgotten something.
const LOOK_BACK: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The task that ships.
#[derive(Debug)]
pub(crate) struct Shipper<S: ?Sized> {
    pub(crate) journal: Journal,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) shutdown: Shutdown,
    /// What the gauge has of this journal; other journals of the process have theirs.
    pub(crate) pending: Portion,
    /// What the counters have of it.
    pub(crate) reported: Reported,
    pub(crate) store: Arc<S>,
}

#[derive(Debug, Default)]
pub(crate) struct Reported {
    opens: u64,
    clicks: u64,
}

/// Whether the process goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// What is there is shipped, if the store is.
    Ending,
}

impl<S: Store + ?Sized> Shipper<S> {
    /// Ships until the process has come to its end: then once more all there is, unless the store
    /// is away, in which case the next start does it.
    pub(crate) async fn run(mut self, _hold: Hold) {
        let Some(mut after) = self.find_mark().await else {
            return;
        };
        let mut pause = FIRST_PAUSE;
        let mut seen = 0;
        let mut looked = self.clock.instant();
        loop {
            self.measure();
            if self.clock.instant() >= looked + LOOK_BACK {
                looked = self.clock.instant();
                self.compare_clocks().await;
                after = self.look_back(after, &mut seen).await;
            }
            let phase = self.wait(after).await;
            if phase == Phase::Ending && !self.has_more(after) {
                break;
            }
            match self.ship(after).await {
                Ok(through) => {
                    after = through;
                    pause = FIRST_PAUSE;
                }
                Err(error) => {
                    tracing::warn!(%error, pending = self.journal.pending_records(), "hits cannot be shipped now");
                    if phase == Phase::Ending {
                        break;
                    }
                    self.sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        self.measure();
    }

    /// Through where the store has this journal; waits for the store. `None`: the process ends.
    async fn find_mark(&mut self) -> Option<Seq> {
        let mut pause = FIRST_PAUSE;
        loop {
            let mark = self.store.high_water(self.journal.id()).await;
            self.note_store(mark.as_ref().err());
            match mark {
                Ok(mark) => {
                    self.note_lost(mark);
                    self.journal.resume(mark, self.clock.instant());
                    return Some(mark);
                }
                Err(error) => {
                    tracing::warn!(%error, "store does not answer; hits wait in the journal");
                }
            }
            self.measure();
            if self.sleep(pause).await == Phase::Ending {
                return None;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits until there is something to ship and a little longer, so that it goes in company;
    /// not at all when a full shipment is there.
    async fn wait(&self, after: Seq) -> Phase {
        // The last but one of a full shipment: `readable` waits for what follows it.
        let most = self.store.shipment_size();
        let full = after.saturating_add(Seq::try_from(most - 1).unwrap_or(Seq::MAX));
        let something = async {
            if self.journal.readable(after).await.is_err() {
                // A journal that has failed gives nothing new; what it had was shipped.
                std::future::pending::<()>().await;
            }
            tokio::select! {
                biased;
                // A failure cuts the company short: what is there goes.
                _full = self.journal.readable(full) => {}
                () = tokio::time::sleep(LINGER) => {}
            }
        };
        tokio::select! {
            () = self.shutdown.reached(Stage::Journal) => self.last_sync().await,
            () = something => Phase::Running,
            () = tokio::time::sleep(IDLE) => Phase::Running,
        }
    }

    /// Brings to disk what was answered last, which is the condition for shipping it.
    async fn last_sync(&self) -> Phase {
        let journal = self.journal.clone();
        let synced = tokio::task::spawn_blocking(move || journal.sync()).await;
        if let Ok(Err(error)) = synced {
            tracing::error!(%error, "last hits are not on disk");
        }
        Phase::Ending
    }

    fn has_more(&self, after: Seq) -> bool {
        self.journal.synced_through() > after
    }

    async fn sleep(&self, pause: Duration) -> Phase {
        // Jitter: trackers that lost the store together do not come back together.
        let pause = pause.mul_f64(0.75 + fastrand::f64() / 2.0);
        tokio::select! {
            () = self.shutdown.reached(Stage::Journal) => Phase::Ending,
            () = tokio::time::sleep(pause) => Phase::Running,
        }
    }

    /// Ships some of what is after `after`; says through where.
    async fn ship(&mut self, after: Seq) -> Result<Seq, StoreError> {
        let read = self
            .journal
            .pending(after, self.store.shipment_size())
            .await;
        let pending = read.map_err(|error| {
            StoreError::Unavailable(format!("the journal cannot be read: {error}"))
        })?;
        if pending.through <= after {
            // To be called even if nothing is new: what was retained may be dropped now.
            self.journal.shipped(after, self.clock.instant());
            return Ok(after);
        }
        let through = pending.through;
        let began = self.clock.instant();
        let shipped = self.store.ship(self.shipment(pending)).await;
        let took = self.clock.instant().saturating_duration_since(began);
        self.metrics
            .store_seconds("ship")
            .observe(took.as_secs_f64());
        self.note_store(shipped.as_ref().err());
        let shipped = shipped?;
        if let Some(mark) = shipped.behind {
            return Ok(self.rewind(after, mark));
        }
        if shipped.unknown > 0 {
            tracing::info!(
                hits = shipped.unknown,
                "hits on messages that are no longer there"
            );
        }
        self.journal.shipped(through, self.clock.instant());
        Ok(through)
    }

    /// Finds out whether the store may have forgotten what it acknowledged; says after which record
    /// to go on.
    async fn look_back(&self, after: Seq, seen: &mut u64) -> Seq {
        let upheavals = self.store.upheavals().await;
        let Some(count) = upheavals.ok().filter(|count| count != seen) else {
            return after;
        };
        let gauge = i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.store_upheavals.set(gauge);
        match self.store.high_water(self.journal.id()).await {
            Ok(mark) => {
                *seen = count;
                if mark < after {
                    self.rewind(after, mark)
                } else {
                    after
                }
            }
            Err(error) => {
                tracing::debug!(%error, "the store does not tell how far it has the journal");
                after
            }
        }
    }

    async fn compare_clocks(&self) {
        match store::clock_offset(&*self.store, || self.clock.now()).await {
            Ok(offset) => self.metrics.clock_offset_seconds.set(offset),
            Err(error) => tracing::debug!(%error, "the store does not tell its time"),
        }
    }

    /// The store has this journal only through `mark`: what came after goes once more.
    fn rewind(&self, after: Seq, mark: Seq) -> Seq {
        tracing::error!(
            mark,
            shipped = after,
            "the store has forgotten hits: they are shipped again"
        );
        let again = after.saturating_sub(mark);
        self.metrics.facts_shipped_again.inc_by(again);
        self.note_lost(mark);
        self.journal.rewind(mark);
        mark
    }

    /// Tells what a store that has the journal only through `mark` has lost for good.
    fn note_lost(&self, mark: Seq) {
        let lost = self.journal.missing_after(mark);
        if lost > 0 {
            tracing::error!(
                lost,
                mark,
                "THE STORE LACKS HITS THAT IT HAD ACKNOWLEDGED, and the journal no longer has them: \
                 is it an older copy, or has it lost data?"
            );
            self.metrics.facts_lost.inc_by(lost);
        }
    }

    fn shipment(&self, pending: Pending) -> Shipment {
        let facts = pending.records.iter().filter_map(|record| {
            let fact = Fact::from_bytes(&record.payload);
            if let Err(error) = &fact {
                // Its checksum was right, so another version wrote it: skipping is all there is.
                tracing::error!(%error, seq = record.seq, "journal has a record that is no fact");
            }
            Some((record.seq, fact.ok()?))
        });
        Shipment {
            journal: self.journal.id(),
            facts: facts.collect(),
            through: pending.through,
            windows: Vec::new(),
            finished: Vec::new(),
            now: self.clock.now(),
        }
    }

    fn note_store(&self, error: Option<&StoreError>) {
        self.metrics.store_up.set(i64::from(error.is_none()));
    }

    /// Brings the gauge and the counters up to date.
    fn measure(&mut self) {
        self.pending.set(self.journal.pending_records());
        let reported = &mut self.reported;
        for (kind, label, before) in [
            (RecordKind::Open, DroppedKind::Open, &mut reported.opens),
            (RecordKind::Click, DroppedKind::Click, &mut reported.clicks),
        ] {
            let dropped = self.journal.dropped(kind);
            let counter = self.metrics.journal_dropped.at(label);
            counter.inc_by(dropped.saturating_sub(*before));
            *before = dropped;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use journal::{JournalConfig, RealDisk};
    use model::{JournalId, Timestamp};
    use service::clock::Manual;
    use store::SHIPMENT;
    use store::sqlite::{Role, SqliteOptions, SqliteStore};

    /// How long a shipper waits with so many records in its journal.
    async fn waits(records: usize) -> Duration {
        let dir = tempfile::tempdir().expect("a directory");
        let config = JournalConfig {
            sync_interval: None,
            ..JournalConfig::new(dir.path(), "tracker", JournalId::from_bytes([1; 16]))
        };
        let journal = Journal::open(&config, Arc::new(RealDisk)).expect("opens");
        for _ in 0..records {
            journal.append(RecordKind::Open, b"x").expect("appended");
        }
        journal.sync().expect("synced");
        let options = SqliteOptions {
            path: dir.path().join("hikyaku.db"),
            partitions: 1,
            role: Role::Tracker,
        };
        let metrics = Arc::new(Metrics::new());
        let shipper = Shipper {
            journal,
            clock: Arc::new(Manual::at(Timestamp::from_millis(1))),
            pending: Portion::of(&metrics.journal_pending_records),
            metrics,
            shutdown: Shutdown::new(),
            reported: Reported::default(),
            store: Arc::new(SqliteStore::open(options).await.expect("a store")),
        };
        // From here on nothing but timers is waited for, and these cost no time.
        tokio::time::pause();
        let began = tokio::time::Instant::now();
        assert_eq!(shipper.wait(0).await, Phase::Running);
        let waited = began.elapsed();
        tokio::time::resume();
        waited
    }

    #[tokio::test]
    async fn a_full_shipment_leaves_at_once_and_a_hit_waits_for_company() {
        // The timer of tokio counts whole milliseconds, and may add one.
        let close = |waited: Duration, to: Duration| waited.saturating_sub(to).as_millis() <= 2;
        assert!(close(waits(SHIPMENT).await, Duration::ZERO));
        for (records, expected) in [(SHIPMENT - 1, LINGER), (1, LINGER), (0, IDLE)] {
            let waited = waits(records).await;
            assert!(
                waited >= expected && close(waited, expected),
                "{records}: {waited:?}"
            );
        }
    }
}
