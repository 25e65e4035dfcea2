//! Stores that earlier programs wrote (`examples/kept.rs`): opened, upgraded, finished; and what a
//! later one wrote, which is refused.

use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, BatchState, Fact, JournalId, MessageId,
    Timestamp,
};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchChange, Erase, EventQuery, LeaseRequest, Retire, Shipment, Store as _, StoreError, Want,
};

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);

fn kept() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kept");
    let files = std::fs::read_dir(directory).expect("kept stores");
    let mut files: Vec<PathBuf> = files.map(|of| of.expect("a file").path()).collect();
    files.sort();
    files
}

/// Its own copy of a kept store.
fn unpacked(file: &Path, to: &Path) -> SqliteOptions {
    let packed = std::fs::read(file).expect("a kept store");
    let path = to.join("store.db");
    std::fs::write(&path, zstd::decode_all(packed.as_slice()).expect("zstd")).expect("written");
    SqliteOptions {
        path,
        partitions: 1,
        role: Role::Mta,
    }
}

fn batch(number: u128) -> BatchId {
    BatchId::new(T0, number)
}

/// Sends everything that is due; how many of it a holder that is gone may have sent.
async fn send_all(store: &SqliteStore, now: Timestamp) -> store::Result<usize> {
    let node = JournalId::new(T0, 2);
    let mut seq = store.high_water(node).await?;
    let mut in_doubt = 0;
    loop {
        let request = LeaseRequest {
            node,
            now,
            ttl: Duration::from_secs(45),
            wants: vec![Want::of("x.example", 500)],
        };
        let leased = store.lease(request).await?;
        if leased.is_empty() {
            return Ok(in_doubt);
        }
        let mut facts = Vec::new();
        for range in &leased {
            for item in &range.items {
                in_doubt += usize::from(item.maybe_started);
                seq += 1;
                let attempt = Attempt {
                    message: MessageId {
                        batch: range.batch.id,
                        index: item.row.index,
                    },
                    place: item.place,
                    number: item.attempts + 1,
                    at: now,
                    dot_at: Some(now),
                    result: AttemptResult::Delivered,
                    detail: AttemptDetail::default(),
                    suppress: None,
                };
                facts.push((seq, Fact::Attempt(Box::new(attempt))));
            }
        }
        let shipment = Shipment {
            journal: node,
            facts,
            through: seq,
            windows: Vec::new(),
            finished: leased.iter().map(|range| range.range).collect(),
            now,
        };
        store.ship(shipment).await?;
    }
}

async fn events(store: &SqliteStore) -> store::Result<usize> {
    let query = EventQuery {
        limit: 1_000,
        ..EventQuery::default()
    };
    Ok(store.events(query).await?.events.len())
}

async fn goes_on(options: SqliteOptions) -> store::Result<()> {
    let store = SqliteStore::open(options.clone()).await?;
    let was = store.batch(batch(1)).await?.expect("it is there");
    let of = was.counters;
    assert_eq!(
        (
            of.delivered,
            of.temporary_error,
            of.queued,
            of.clicked_unique
        ),
        (20, 10, 30, 1)
    );
    assert_eq!(store.high_water(JournalId::new(T0, 1)).await?, 31);
    // 20 deliveries, 10 deferrals, a click, two accepted, one started, one suppression.
    assert_eq!(events(&store).await?, 35);
    let message = MessageId {
        batch: batch(1),
        index: 3,
    };
    let story = store.message(message).await?.expect("its story");
    assert_eq!((story.attempts.len(), story.hits.len()), (1, 1));
    assert_eq!(story.recipient.row.name.as_deref(), Some("Person 3"));
    assert_eq!(
        store.content(batch(1)).await?.as_deref(),
        Some(&b"the content"[..])
    );
    let gone = store.address("acme", "gone@x.example").await?;
    assert_eq!(gone.suppressions.len(), 1);
    let note = store.note("kept", "a", T0).await?.expect("a note");
    assert_eq!(*note.value, [1, 2, 3]);
    assert_eq!(store.setting("kept", "another").await?, "as it was");
    // What was held by a node that is gone is in doubt, and everything is finished.
    let later = T0 + Duration::from_secs(900);
    assert_eq!(send_all(&store, later).await?, 10);
    let done = store.batch(batch(1)).await?.expect("it is there");
    assert_eq!(
        (done.state, done.counters.delivered),
        (BatchState::Completed, 60)
    );
    store
        .change_batch(batch(2), BatchChange::Pause, later)
        .await?;
    drop(store);

    // What this version added works on what came before it, after another start too.
    let store = SqliteStore::open(options).await?;
    let paused = store.batch(batch(2)).await?.expect("it is there");
    assert_eq!(
        (paused.state, paused.counters.scheduled),
        (BatchState::Paused, 5)
    );
    let mut erase = Erase {
        account: "acme".into(),
        email: "n3@x.example".into(),
        after: None,
    };
    loop {
        erase.after = store.erase(erase.clone(), later).await?.next;
        if erase.after.is_none() {
            break;
        }
    }
    assert_eq!(store.address("acme", "n3@x.example").await?.messages, []);
    let much_later = T0 + Duration::from_secs(200 * 86_400);
    let mut retire = Retire {
        events_before: much_later,
        batches_before: much_later,
        after: None,
    };
    let mut retired = 0;
    loop {
        let step = store.retire(retire.clone(), much_later).await?;
        retired += step.batches;
        retire.after = step.next;
        if retire.after.is_none() {
            break;
        }
    }
    assert_eq!((retired, events(&store).await?), (1, 0));
    Ok(())
}

#[tokio::test]
async fn every_kept_store_is_opened_upgraded_and_finished() {
    let files = kept();
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        let directory = tempfile::tempdir().expect("a directory");
        let options = unpacked(&file, directory.path());
        let went_on = goes_on(options).await;
        went_on.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

#[tokio::test]
async fn what_a_later_program_wrote_is_refused_and_left_as_it_is() {
    let newest = kept().pop().expect("a kept store");
    let directory = tempfile::tempdir().expect("a directory");
    let options = unpacked(&newest, directory.path());
    let connection = rusqlite::Connection::open(&options.path).expect("it opens");
    connection
        .pragma_update(None, "user_version", 99)
        .expect("written");
    drop(connection);
    for role in [Role::Mta, Role::Tracker, Role::Tool] {
        let options = SqliteOptions {
            role,
            ..options.clone()
        };
        match SqliteStore::open(options).await {
            Err(StoreError::Damaged(why)) => assert!(why.contains("version 99"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}
