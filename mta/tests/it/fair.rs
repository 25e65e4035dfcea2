//! Who goes when, and from where: pools, rates of batches, shares of a destination.

use std::time::Duration;

use model::{Priority, Status};
use service::clock::{Clock as _, SystemClock};
use testkit::smtp_peer::{SmtpPeer, Temper};

use crate::station::{Station, people};

const SOURCES: &str = r#"
    [[smtp.sources]]
    name = "ip1"
    bind = "127.0.0.2"
    [[smtp.sources]]
    name = "ip2"
    bind = "127.0.0.3"
    [[smtp.sources]]
    name = "ip3"
    bind = "127.0.0.4"
    [[pools]]
    name = "default"
    sources = [{ name = "ip1" }]
    [[pools]]
    name = "marketing"
    sources = [{ name = "ip2", weight = 1 }, { name = "ip3", weight = 3 }]
"#;

#[tokio::test]
async fn a_batch_leaves_from_the_sources_of_its_pool_by_their_weights() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::towards(&peer, SOURCES, "").await;
    let plain = station.submit(&people("x.example", 40)).await;
    let to: Vec<_> = (0..120).map(|n| format!("m{n}@x.example")).collect();
    let pooled = station
        .submit_as(&to, |head| head.pool = Some("marketing".into()))
        .await;
    let running = station.start().await;
    station.finished(plain).await;
    station.finished(pooled).await;
    running.drain().await;
    let mut from_ip3 = 0;
    for message in peer.messages() {
        let last = message.from.ip().to_string();
        match message.recipients[0].starts_with('m') {
            true if last == "127.0.0.4" => from_ip3 += 1,
            true => assert_eq!(last, "127.0.0.3"),
            false => assert_eq!(last, "127.0.0.2"),
        }
    }
    assert!((80..=100).contains(&from_ip3), "{from_ip3} of 120");
}

#[tokio::test]
async fn the_rate_of_a_batch_holds_over_all_its_destinations() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::towards(&peer, "", "").await;
    let to: Vec<_> = (0..6)
        .flat_map(|n| people(&format!("d{n}.example"), 10))
        .collect();
    let batch = station
        .submit_as(&to, |head| head.rate = "30/s".parse().expect("a rate"))
        .await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 60);
    running.drain().await;
    let messages = peer.messages();
    let mut at: Vec<_> = messages.iter().map(|message| message.mail_at).collect();
    at.sort();
    for window in at.windows(31) {
        // The peer's clock sees a command a little after it was allowed.
        let took = window[30] - window[0];
        assert!(took > Duration::from_millis(950), "31 in {took:?}");
    }
}

#[tokio::test]
async fn what_is_transactional_takes_the_next_permit() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::towards(&peer, "", "rate = \"120/m\"\nexpire = \"1h\"").await;
    // Half a second each: these alone take a quarter of an hour.
    station.submit(&people("x.example", 2_000)).await;
    let running = station.start().await;
    peer.wait_for(6).await.expect("some");
    let submitted = SystemClock.instant();
    let urgent = station
        .submit_as(&["now@x.example".to_owned()], |head| {
            head.priority = Priority::Transactional;
        })
        .await;
    assert_eq!(station.finished(urgent).await.delivered, 1);
    running.drain().await;
    let messages = peer.messages();
    let at = |message: &testkit::smtp_peer::Received| message.mail_at.into_std();
    let went = messages
        .iter()
        .find(|message| message.recipients[0] == "now@x.example")
        .map(at)
        .expect("it arrived");
    let before = messages
        .iter()
        .filter(|message| at(message) > submitted && at(message) < went)
        .count();
    // One whose turn came while it was being leased and composed.
    assert!(before <= 2, "{before} went before it");
}

#[tokio::test]
async fn a_small_batch_has_its_share_beside_a_giant() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::towards(&peer, "", "rate = \"20/s\"\nexpire = \"1h\"").await;
    station.submit(&people("x.example", 3_000)).await;
    let running = station.start().await;
    peer.wait_for(40).await.expect("some");
    let before = peer.counts().messages;
    let to: Vec<_> = (0..40).map(|n| format!("s{n}@x.example")).collect();
    let small = station.submit(&to).await;
    assert_eq!(station.finished(small).await.delivered, 40);
    let of_the_giant = peer.counts().messages - before - 40;
    running.drain().await;
    // As many as it had itself, and those of the moment in which it was leased.
    assert!(of_the_giant <= 80, "{of_the_giant} of the giant meanwhile");
}

#[tokio::test]
async fn a_destination_that_is_down_costs_its_messages_nothing() {
    let shaping = "[default]\nrate = \"unlimited\"\nretry = [\"300ms\"]\nexpire = \"3s\"\n\
                   [mx]\n\"*\" = \"127.0.0.1:1\"\n";
    let station = Station::with(shaping, "").await;
    let batch = station.submit(&people("x.example", 300)).await;
    let running = station.start().await;
    let counters = station.until(batch, |now| now.temporary_error > 0).await;
    assert!(counters.temporary_error <= 10, "{counters:?}");
    let counters = station.finished(batch).await;
    assert_eq!(counters.failed, 300);
    running.drain().await;
    let (mut untried, mut tried) = (0, 0);
    for index in 0..300 {
        let row = station.row(batch, index).await;
        assert_eq!(
            (row.status, row.class),
            (Status::Failed, Some(model::Class::Expired))
        );
        assert!(
            row.reply.is_some_and(|reply| !reply.is_empty()),
            "why is kept"
        );
        match row.attempts {
            1 => untried += 1,
            _ => tried += 1,
        }
    }
    assert!(tried <= 40 && untried >= 260, "{tried} tried");
}
