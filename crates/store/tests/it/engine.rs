//! What is particular to the embedded engine: who may open it, and what it refuses.

use crate::fixture::Sqlite;
use store::conformance::Fixture as _;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{Store as _, StoreError};

fn refusal<T: std::fmt::Debug>(outcome: store::Result<T>) -> String {
    match outcome {
        Err(StoreError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_second_mta_is_refused_until_the_first_has_ended() {
    let fixture = Sqlite::new(1);
    let first = fixture.open(Role::Mta).await.unwrap();
    assert!(refusal(fixture.open(Role::Mta).await).contains("another MTA"));
    let tracker = fixture.open(Role::Tracker).await.unwrap();
    let tool = fixture.open(Role::Tool).await.unwrap();
    tracker.check().await.unwrap();
    tool.check().await.unwrap();
    drop(first);
    fixture.open(Role::Mta).await.unwrap();
}

#[tokio::test]
async fn the_number_of_partitions_is_fixed_when_the_store_is_made() {
    let fixture = Sqlite::new(4);
    drop(fixture.mta().await);
    let open = async |partitions, role| {
        SqliteStore::open(SqliteOptions {
            path: fixture.path(),
            partitions,
            role,
        })
        .await
    };
    assert!(refusal(open(1, Role::Mta).await).contains("made with 4"));
    assert_eq!(open(1, Role::Tracker).await.unwrap().partitions(), 4);
    assert!(refusal(open(0, Role::Mta).await).contains("1 to 256"));
    assert!(refusal(open(257, Role::Mta).await).contains("1 to 256"));
}

#[tokio::test]
async fn a_file_of_another_version_or_kind_is_left_alone() {
    let fixture = Sqlite::new(1);
    drop(fixture.mta().await);
    let file = rusqlite::Connection::open(fixture.path()).unwrap();
    file.pragma_update(None, "user_version", 99).unwrap();
    drop(file);
    let newer = fixture.open(Role::Mta).await;
    assert!(
        matches!(&newer, Err(StoreError::Damaged(why)) if why.contains("99")),
        "{newer:?}"
    );

    let foreign = Sqlite::new(1);
    std::fs::write(foreign.path(), [7; 8192]).unwrap();
    let opened = foreign.open(Role::Mta).await;
    assert!(matches!(opened, Err(StoreError::Damaged(_))), "{opened:?}");
    let nowhere = SqliteOptions {
        path: foreign.path().join("no/such/dir"),
        partitions: 1,
        role: Role::Tracker,
    };
    refusal(SqliteStore::open(nowhere).await);
}

#[tokio::test]
async fn a_file_of_the_first_version_is_brought_forward() {
    let fixture = Sqlite::new(1);
    let store = fixture.mta().await;
    assert_eq!(store.setting("kept", "one").await.unwrap(), "one");
    drop(store);
    let file = rusqlite::Connection::open(fixture.path()).unwrap();
    file.execute_batch(
        "DROP INDEX batch_ended; ALTER TABLE batch DROP COLUMN retired; ALTER TABLE batch DROP COLUMN last_event;
         ALTER TABLE batch DROP COLUMN paused_at; ALTER TABLE batch DROP COLUMN paused_ms;
         DROP TABLE note; DROP TABLE job; DROP TABLE suspension; DROP TABLE call; DROP TABLE consent; PRAGMA user_version=1;",
    )
    .unwrap();
    drop(file);
    let store = fixture.mta().await;
    assert_eq!(store.setting("kept", "two").await.unwrap(), "one");
    let now = model::Timestamp::from_millis(1);
    assert_eq!(store.suspensions(now).await.unwrap(), []);
    assert_eq!(store.notes("limit", now).await.unwrap(), []);
    assert_eq!(store.consent("acme", "a@x.example").await.unwrap(), None);
}

#[tokio::test]
async fn a_cursor_of_nobody_is_refused() {
    let fixture = Sqlite::new(1);
    let store = fixture.mta().await;
    let query = store::EventQuery {
        after: Some("x".into()),
        limit: 1,
        ..store::EventQuery::default()
    };
    assert!(refusal(store.events(query).await).contains("cursor"));
}
