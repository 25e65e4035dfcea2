//! Who goes when, and from where: pools, rates of batches, shares of a destination.

use std::time::Duration;

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
    assert!((60..=110).contains(&from_ip3), "{from_ip3} of 120");
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
