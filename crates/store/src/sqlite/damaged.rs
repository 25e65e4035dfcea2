//! What cannot be read is left where it is and keeps nobody else waiting.

use super::tests::{T0, batch, lot};
use super::writer::Step;
use super::{Role, SqliteOptions, SqliteStore};
use crate::{BatchChange, ChangeOutcome, LeaseRequest, LeasedRange, Store, Want};
use model::{BatchId, JournalId, Timestamp};
use std::time::Duration;

const LOTS: u32 = 4;
const ROWS: u32 = 10;
const MINUTE: Duration = Duration::from_mins(1);

struct Place {
    _dir: tempfile::TempDir,
    store: SqliteStore,
    batch: BatchId,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: dir.path().join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = SqliteStore::open(options).await.unwrap();
        let id = BatchId::new(T0, 1);
        let lots = (0..LOTS).map(|number| lot(number, ROWS)).collect();
        store.stage_lots(id, lots).await.unwrap();
        let all = u64::from(LOTS * ROWS);
        store.commit_batch(batch(id, all), T0).await.unwrap();
        Self {
            _dir: dir,
            store,
            batch: id,
        }
    }

    async fn run(&self, sql: &'static str) {
        let run = move |step: &mut Step<'_>| Ok(step.connection.execute_batch(sql)?);
        self.store.writer().unwrap().write(run).await.unwrap();
    }

    async fn lease(&self, node: u128, now: Timestamp) -> Vec<LeasedRange> {
        let want = Want::of("x.example", 1_000);
        let request = LeaseRequest {
            node: JournalId::new(T0, node),
            now,
            ttl: MINUTE,
            wants: vec![want],
        };
        self.store.lease(request).await.unwrap()
    }

    async fn due(&self, now: Timestamp) -> u64 {
        let backlog = self.store.backlog(now, None, 10).await.unwrap();
        backlog.iter().map(|queue| queue.due).sum()
    }

    async fn unreadable(&self) -> u64 {
        self.store.totals(T0).await.unwrap().unreadable
    }
}

fn rows(leased: &[LeasedRange]) -> Vec<u32> {
    let items = leased.iter().flat_map(|range| &range.items);
    let mut found: Vec<u32> = items.map(|item| item.row.index).collect();
    found.sort_unstable();
    found
}

/// Rows, cells, and references, each in its own way.
const DAMAGE: &str = "UPDATE lot SET packed=X'0100ff' WHERE id & 0xffffff = 1;
    UPDATE cell SET data=CAST(X'ff000000' || substr(data, 5) AS BLOB) WHERE lot & 0xffffff = 2;
    UPDATE work SET lot=NULL, first=NULL, refs=X'63' WHERE lot & 0xffffff = 3;";

#[tokio::test]
async fn what_cannot_be_read_is_put_off_and_the_rest_is_leased() {
    let place = Place::new().await;
    place
        .run("CREATE TEMP TABLE kept AS SELECT id, packed FROM lot")
        .await;
    place.run(DAMAGE).await;
    let leased = place.lease(1, T0).await;
    // Of the lot with one bad cell the others go.
    let good: Vec<u32> = (0..ROWS).chain(2 * ROWS + 1..3 * ROWS).collect();
    assert_eq!(rows(&leased), good);
    assert_eq!((place.unreadable().await, place.due(T0).await), (3, 0));
    assert!(place.lease(2, T0 + MINUTE / 2).await.is_empty());
    assert_eq!(place.unreadable().await, 3);
    // A node that comes back has what can be read.
    place
        .run("UPDATE cell SET data=CAST(X'ff' || substr(data, 2) AS BLOB) WHERE lot & 0xffffff = 0")
        .await;
    let node = JournalId::new(T0, 1);
    let back = place.store.reclaim(node, T0, MINUTE).await.unwrap();
    assert_eq!(rows(&back), good[1..]);
    assert_eq!(place.unreadable().await, 4);
    // Looked at again, and sent to once it can be read.
    place
        .run("UPDATE lot SET packed=(SELECT packed FROM kept WHERE kept.id=lot.id)")
        .await;
    let later = T0 + MINUTE * 11;
    let renewed = place.store.renew(node, T0 + MINUTE / 2, MINUTE * 30).await;
    assert_eq!(renewed.unwrap().len(), back.len());
    let leased = place.lease(2, later).await;
    assert_eq!(rows(&leased), (ROWS..2 * ROWS).collect::<Vec<_>>());
    assert_eq!(place.unreadable().await, 7);
}

#[tokio::test]
async fn what_was_in_doubt_when_it_could_not_be_read_is_in_doubt_later() {
    let place = Place::new().await;
    place
        .run("CREATE TEMP TABLE kept AS SELECT lot, data FROM cell")
        .await;
    assert_eq!(place.lease(1, T0).await.len(), 4);
    place
        .run("UPDATE cell SET data=CAST(X'ff' || substr(data, 2) AS BLOB)")
        .await;
    let leased = place.lease(2, T0 + MINUTE * 2).await;
    let firsts: Vec<u32> = (0..LOTS * ROWS).step_by(10).collect();
    assert!(rows(&leased).iter().all(|row| !firsts.contains(row)));
    assert!(
        leased
            .iter()
            .flat_map(|range| &range.items)
            .all(|item| item.maybe_started)
    );
    place
        .run("UPDATE cell SET data=(SELECT data FROM kept WHERE kept.lot=cell.lot)")
        .await;
    let leased = place.lease(3, T0 + MINUTE * 15).await;
    let doubtful: Vec<u32> = leased
        .iter()
        .flat_map(|range| &range.items)
        .filter(|item| item.maybe_started)
        .map(|item| item.row.index)
        .collect();
    assert!(
        firsts.iter().all(|row| doubtful.contains(row)),
        "{doubtful:?}"
    );
}

#[tokio::test]
async fn a_batch_with_unreadable_recipients_can_be_cancelled() {
    let place = Place::new().await;
    place
        .run("UPDATE cell SET data=CAST(X'ff' || substr(data, 2) AS BLOB) WHERE lot & 0xffffff = 0")
        .await;
    let cancel = place
        .store
        .change_batch(place.batch, BatchChange::Cancel, T0);
    let ChangeOutcome::Done { cancelled, .. } = cancel.await.unwrap() else {
        panic!("not cancelled");
    };
    assert_eq!(cancelled, u64::from((LOTS - 1) * ROWS));
    // It is not swept at every look.
    let before = place.unreadable().await;
    for _ in 0..3 {
        assert_eq!(place.due(T0).await, 0);
    }
    assert_eq!((before, place.unreadable().await), (1, 1));
    let counters = place
        .store
        .batch(place.batch)
        .await
        .unwrap()
        .unwrap()
        .counters;
    assert_eq!(counters.statuses(), counters.accepted);
}
