//! The store goes away and comes back while mail leaves; so does the journal's room.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use service::metrics::DuplicateCause;
use store::{Layer, Result, Store, StoreError};
use testkit::smtp_peer::{Keep, SmtpPeer, Temper};
use tokio::sync::watch;

use crate::station::{Station, people};

/// How a store that cannot be reached shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Up,
    /// Calls fail.
    Refuses,
    /// Calls do not return before it is back, and then take effect.
    Hangs,
    /// What it is asked of its past it thinks over for so long.
    Ponders(Duration),
}

/// What the sender asks for on a message's way; what the test asks for is not cut.
const OF_THE_SENDER: [&str; 9] = [
    "backlog",
    "lease",
    "reclaim",
    "renew",
    "release",
    "ship",
    "high_water",
    "control",
    "content",
];

/// A store that can be cut off from the sender; the test itself goes on reading it.
struct Remote {
    inner: Arc<dyn Store>,
    reach: watch::Sender<Reach>,
}

impl Remote {
    /// Puts itself between a station and its store.
    fn before(station: &mut Station) -> Arc<Self> {
        let remote = Arc::new(Self {
            inner: Arc::clone(&station.store),
            reach: watch::Sender::new(Reach::Up),
        });
        station.store = remote.clone();
        remote
    }
}

#[async_trait]
impl Layer for Remote {
    fn inner(&self) -> &dyn Store {
        &*self.inner
    }

    async fn before(&self, call: &'static str) -> Result<()> {
        let reach = *self.reach.borrow();
        if let ("upheavals", Reach::Ponders(long)) = (call, reach) {
            tokio::time::sleep(long).await;
        }
        if !OF_THE_SENDER.contains(&call) {
            return Ok(());
        }
        let mut reach = self.reach.subscribe();
        let now = reach.wait_for(|now| *now != Reach::Hangs).await;
        match now.map(|now| *now) {
            Ok(Reach::Up | Reach::Ponders(_)) => Ok(()),
            Ok(Reach::Refuses | Reach::Hangs) | Err(_) => {
                Err(StoreError::Unavailable("cut off".to_owned()))
            }
        }
    }
}

/// Shorter than by default; five seconds of it belong to what was begun.
const LEASE: Duration = Duration::from_secs(7);

/// Ambiguous attempts would come half an hour later, and the test would wait in vain.
async fn is_sent_once_in_spite_of(reach: Reach) {
    let temper = Temper::accepting()
        .keeping(Keep::PerRecipient(10_000))
        .slow_messages(Duration::from_millis(10));
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    station.lease = LEASE;
    let remote = Remote::before(&mut station);
    let batch = station.submit(&people("x.example", 1_000)).await;
    let running = station.start().await;
    peer.wait_for(100).await.expect("some messages");
    remote.reach.send_replace(reach);

    // Wherever the windows end, the leases have ended by then.
    tokio::time::sleep(LEASE).await;
    let at_the_end = peer.counts();
    let known = station.counters(batch).await.delivered;
    assert!(
        known < at_the_end.messages,
        "what was begun went on: {known} known, {at_the_end:?}"
    );
    let more = peer.wait_until(|counts| counts.messages > at_the_end.messages);
    let more = tokio::time::timeout(Duration::from_secs(1), more).await;
    assert!(more.is_err(), "something began after the lease: {more:?}");

    remote.reach.send_replace(Reach::Up);
    let counters = station.finished(batch).await;
    running.drain().await;
    assert_eq!(counters.delivered, 1_000);
    let copies = peer.copies();
    assert_eq!(copies.len(), 1_000);
    assert!(copies.values().all(|copies| copies.count == 1));
}

#[tokio::test]
async fn a_store_that_refuses_for_longer_than_a_lease_costs_no_second_copy() {
    is_sent_once_in_spite_of(Reach::Refuses).await;
}

#[tokio::test]
async fn a_store_that_hangs_for_longer_than_a_lease_costs_no_second_copy() {
    is_sent_once_in_spite_of(Reach::Hangs).await;
}

/// What was leased is known to whoever ships before its first outcome, or its window would never move.
#[tokio::test]
async fn a_store_that_ponders_while_mail_leaves_is_waited_for() {
    let temper = Temper::accepting().keeping(Keep::PerRecipient(1_000));
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    let remote = Remote::before(&mut station);
    remote
        .reach
        .send_replace(Reach::Ponders(Duration::from_secs(2)));
    let batch = station.submit(&people("x.example", 200)).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 200);
    running.drain().await;
    assert!(peer.copies().values().all(|copies| copies.count == 1));
}

#[tokio::test]
async fn a_short_outage_only_delays_what_is_known() {
    let peer = SmtpPeer::start(Temper::accepting().keeping(Keep::PerRecipient(10_000)))
        .await
        .expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    let remote = Remote::before(&mut station);
    let batch = station.submit(&people("x.example", 1_000)).await;
    let running = station.start().await;
    for (so_far, reach) in [(50, Reach::Refuses), (300, Reach::Hangs)] {
        peer.wait_for(so_far).await.expect("some messages");
        remote.reach.send_replace(reach);
        // As far as the window goes that the store knows of.
        let known = station.counters(batch).await.delivered;
        peer.wait_for(known + 1).await.expect("it goes on");
        remote.reach.send_replace(Reach::Up);
    }
    assert_eq!(station.finished(batch).await.delivered, 1_000);
    running.drain().await;
    assert!(peer.copies().values().all(|copies| copies.count == 1));
}

#[tokio::test]
async fn a_full_journal_stops_what_is_not_begun_and_loses_nothing() {
    let peer = SmtpPeer::start(Temper::accepting().keeping(Keep::PerRecipient(10_000)))
        .await
        .expect("a peer");
    let mut station = Station::towards(&peer, "", "expire = \"1h\"").await;
    // Room for some two hundred messages; the windows of ten lots would let 640 go.
    station.journal_bytes = Some(64 << 10);
    let remote = Remote::before(&mut station);
    let everybody: Vec<_> = (0..10)
        .flat_map(|n| people(&format!("d{n}.example"), 100))
        .collect();
    let batch = station.submit(&everybody).await;
    let running = station.start().await;
    peer.wait_for(20).await.expect("some messages");
    remote.reach.send_replace(Reach::Refuses);
    let mut so_far = 0;
    while let Ok(more) = tokio::time::timeout(
        Duration::from_secs(1),
        peer.wait_until(|counts| counts.messages > so_far),
    )
    .await
    {
        so_far = more.expect("counts").messages;
    }
    assert!(so_far < 500, "{so_far} messages went");
    assert!(!running.handle.has_failed());
    remote.reach.send_replace(Reach::Up);
    assert_eq!(station.finished(batch).await.delivered, 1_000);
    running.drain().await;
    let copies = peer.copies();
    assert_eq!(copies.len(), 1_000);
    assert!(copies.values().all(|copies| copies.count == 1));
}

/// What a crash in the middle of a batch costs, when the machine was started anew or not.
async fn counted_after_a_crash(machine_too: bool) -> u64 {
    let temper = Temper::accepting().keeping(Keep::PerRecipient(1_000));
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let soon = "[smtp]\nambiguous_after = \"1s\"";
    let mut station = Station::towards(&peer, soon, "rate = \"100/s\"\nexpire = \"1h\"").await;
    let batch = station.submit(&people("x.example", 300)).await;
    let running = station.start().await;
    peer.wait_for(50).await.expect("some messages");
    running.crash().await;
    station.boots += u32::from(machine_too);
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 300);
    running.drain().await;
    assert_eq!(peer.copies().len(), 300);
    let causes = &station.metrics.duplicates;
    causes.at(DuplicateCause::UnsyncedJournal).get()
}

#[tokio::test]
async fn after_a_power_cut_whoever_may_have_been_started_is_counted() {
    let counted = counted_after_a_crash(true).await;
    assert!((1..=64).contains(&counted), "{counted}");
    assert_eq!(counted_after_a_crash(false).await, 0);
}
