//! Stores that move: between engines, and into a file.

use crate::fixture::{Redis, Sqlite};
use store::StoreError;
use store::conformance::{
    Fixture, a_store_moves, a_store_moves_while_it_sends, half_an_import_is_no_store,
    what_is_held_back_moves_as_it_is,
};
use store::sqlite::Role;

async fn moves(from: &dyn Fixture, to: &dyn Fixture) {
    a_store_moves(from, to).await.expect("the stores answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_file_to_file() {
    moves(&Sqlite::new(1), &Sqlite::new(1)).await;
    moves(&Sqlite::new(4), &Sqlite::new(4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_file_to_redis() {
    moves(&Sqlite::new(1), &Redis::single(1)).await;
    moves(&Sqlite::new(4), &Redis::single(4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_redis_to_file() {
    moves(&Redis::single(1), &Sqlite::new(1)).await;
    moves(&Redis::single(4), &Sqlite::new(4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_filled_by_half_is_refused() {
    let (from, to) = (Sqlite::new(1), Sqlite::new(1));
    half_an_import_is_no_store(&from, &to)
        .await
        .expect("the stores answer");
    let refused = to.open(Role::Mta).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("import")),
        "{refused:?}"
    );
    let (from, to) = (Redis::single(1), Redis::single(1));
    half_an_import_is_no_store(&from, &to)
        .await
        .expect("the stores answer");
    let refused = to.open(Role::Tracker).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("import")),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_its_wave() {
    for (from, to) in [
        (
            &Sqlite::new(4) as &dyn Fixture,
            &Redis::single(4) as &dyn Fixture,
        ),
        (&Redis::single(4), &Sqlite::new(4)),
    ] {
        let moved = what_is_held_back_moves_as_it_is(from, to).await;
        moved.expect("the stores answer");
    }
}

#[tokio::test]
async fn another_number_of_partitions_is_refused() {
    let (from, to) = (Sqlite::new(1), Sqlite::new(4));
    let refused = a_store_moves(&from, &to).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("store.partitions = 1")),
        "{refused:?}"
    );
    assert_eq!(to.mta().await.partitions(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_node_sends() {
    let moved = a_store_moves_while_it_sends(&Sqlite::new(1), &Sqlite::new(1)).await;
    moved.expect("the stores answer");
    for partitions in [1, 4] {
        let (from, to) = (Redis::single(partitions), Sqlite::new(partitions));
        let moved = a_store_moves_while_it_sends(&from, &to).await;
        moved.expect("the stores answer");
    }
}
