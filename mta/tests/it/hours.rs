//! Send windows: mail leaves in the hours of its recipient, and waits in the store for them.

use model::SendWindow;
use service::clock::{Clock as _, SystemClock};
use std::sync::Arc;
use std::time::Duration;
use store::WorkScope;
use testkit::smtp_peer::{SmtpPeer, Temper};

use crate::station::{Ahead, Station, people};

#[tokio::test]
async fn a_window_that_shuts_while_a_batch_is_sent_keeps_the_rest_until_it_opens() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let mut station = Station::towards(
        &peer,
        "",
        "rate = \"20/s\"\nadaptive = false\nexpire = \"72h\"",
    )
    .await;
    let window = SendWindow {
        from: 9 * 60,
        to: 21 * 60,
        time_zone: Some("Asia/Tokyo".into()),
    };
    let now = SystemClock.now();
    let closes_at = window.closes_at(None, window.opens_at(None, now));
    let closes_at = closes_at.expect("it closes");
    let before = Duration::from_secs(3);
    station.clock = Arc::new(Ahead(closes_at.since(now) - before));
    let shut = window.clone();
    let batch = station
        .submit_as(&people("x.example", 120), |head| {
            (head.window, head.release_at) = (Some(shut), closes_at - before);
        })
        .await;
    let running = station.start().await;
    let opens_at = window.opens_at(None, closes_at);
    let waits = async || {
        let work = station.store.work(WorkScope::Batch(batch), closes_at, 10);
        let work = work.await.expect("an answer").expect("told");
        let later: u64 = work.iter().map(|of| of.later).sum();
        let free = work.iter().all(|of| {
            of.due == 0 && of.held.is_empty() && of.next_due.is_none_or(|at| at == opens_at)
        });
        (free && later > 0).then_some(later)
    };
    let waiting = async {
        loop {
            if let Some(later) = waits().await {
                return later;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let later = tokio::time::timeout(Duration::from_secs(60), waiting).await;
    let later = later.expect("the rest waits in the store");
    let counters = station.counters(batch).await;
    assert_eq!((counters.queued, counters.delivered), (later, 120 - later));
    assert!(counters.delivered > 0, "it was open");
    assert_eq!(u64::try_from(peer.messages().len()), Ok(120 - later));
    running.drain().await;

    station.clock = Arc::new(Ahead(opens_at.since(now)));
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 120);
    running.drain().await;
}
