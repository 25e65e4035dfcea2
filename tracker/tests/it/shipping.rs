//! A store that is away is not noticed by anyone who clicks.

use crate::harness::{Place, token, until};
use async_trait::async_trait;
use links::Kind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use store::{Layer, Result, Store, StoreError};

/// A real store behind a network that fails: before the call, or after it, when only the answer is
/// lost. What the tracker does not call passes through.
struct Faulty {
    inner: Arc<dyn Store>,
    away: AtomicBool,
    loses_answers: AtomicBool,
    failed: AtomicU64,
}

impl Faulty {
    fn away(inner: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            away: AtomicBool::new(true),
            loses_answers: AtomicBool::new(false),
            failed: AtomicU64::new(0),
        })
    }

    fn cut(&self, when: &AtomicBool) -> Result<()> {
        if when.load(Ordering::SeqCst) {
            self.failed.fetch_add(1, Ordering::SeqCst);
            return Err(StoreError::Unavailable("the network is cut".into()));
        }
        Ok(())
    }

    async fn fails_again(&self) {
        let before = self.failed.load(Ordering::SeqCst);
        until("another failure", async || {
            self.failed.load(Ordering::SeqCst) > before
        })
        .await;
    }
}

#[async_trait]
impl Layer for Faulty {
    fn inner(&self) -> &dyn Store {
        &*self.inner
    }

    async fn before(&self, call: &'static str) -> Result<()> {
        match call {
            "ship" | "high_water" => self.cut(&self.away),
            _ => Ok(()),
        }
    }

    async fn after(&self, call: &'static str) -> Result<()> {
        match call {
            "ship" => self.cut(&self.loses_answers),
            _ => Ok(()),
        }
    }
}

async fn click_all(running: &crate::harness::Running, recipients: std::ops::Range<u32>) {
    for index in recipients {
        let answer = running
            .get(&format!("/c/{}", token(Kind::Click, index)))
            .await;
        assert_eq!(answer.status, 302, "{index}");
    }
}

#[tokio::test]
async fn links_and_unsubscribes_work_while_the_store_is_away_and_nothing_is_lost() {
    let place = Place::new(20).await;
    let store = Faulty::away(place.store.clone());
    let running = place.start_with(store.clone()).await;
    click_all(&running, 0..10).await;
    store.fails_again().await;
    let unsubscribe = format!("/u/{}", token(Kind::Unsubscribe, 3));
    assert_eq!(
        running.ask("POST", &unsubscribe, &[], b"").await.status,
        200
    );
    // It stays in service: without it every link would be dead.
    let ready = running.admin("/readyz").await;
    assert_eq!(ready.status, 200);
    assert!(
        ready.text().contains("hits wait in the journal"),
        "{}",
        ready.text()
    );
    assert!(
        running
            .admin("/metrics")
            .await
            .text()
            .contains("hikyaku_store_up 0")
    );
    assert_eq!(place.counters(|_| true).await.clicked_total, 0);

    store.away.store(false, Ordering::SeqCst);
    place
        .counters(|c| c.clicked_unique == 10 && c.unsubscribed == 1)
        .await;
    until("nothing is pending", async || {
        running
            .admin("/metrics")
            .await
            .text()
            .contains("hikyaku_journal_pending_records 0")
    })
    .await;
    click_all(&running, 10..20).await;
    running.drain().await;
    let counters = place.counters(|_| true).await;
    assert_eq!((counters.clicked_unique, counters.clicked_total), (20, 20));
}

#[tokio::test]
async fn a_lost_answer_of_the_store_counts_nothing_twice() {
    let place = Place::new(5).await;
    let store = Faulty::away(place.store.clone());
    store.away.store(false, Ordering::SeqCst);
    store.loses_answers.store(true, Ordering::SeqCst);
    let running = place.start_with(store.clone()).await;
    click_all(&running, 0..5).await;
    place.counters(|counters| counters.clicked_total == 5).await;
    store.fails_again().await;
    store.fails_again().await;
    store.loses_answers.store(false, Ordering::SeqCst);
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 5);
}

#[tokio::test]
async fn what_was_not_shipped_is_shipped_by_the_next_start() {
    let place = Place::new(5).await;
    let running = place.start_with(Faulty::away(place.store.clone())).await;
    let journal = running.tracker.journal_id();
    click_all(&running, 0..5).await;
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 0);
    let again = place.start().await;
    assert_eq!(again.tracker.journal_id(), journal);
    place.counters(|counters| counters.clicked_total == 5).await;
    again.drain().await;
    // And once more: the store knows how far it was.
    place.start().await.drain().await;
    assert_eq!(place.counters(|_| true).await.clicked_total, 5);
}
