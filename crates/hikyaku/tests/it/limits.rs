//! What shaping promises a destination, counted at the destination: across kills too.

use crate::harness::{Site, newsletter};
use anyhow::Result;
use std::time::Duration;
use testkit::smtp_peer::{SmtpPeer, Temper};

/// The most MAIL commands that any window of a second holds, by the peer's clock.
fn most_in_a_second(peer: &SmtpPeer) -> usize {
    let mut at: Vec<_> = peer
        .messages()
        .iter()
        .map(|message| message.mail_at)
        .collect();
    at.sort_unstable();
    let within = |first: usize| {
        let end = at[first] + Duration::from_secs(1);
        at[first..]
            .iter()
            .take_while(|moment| **moment < end)
            .count()
    };
    (0..at.len()).map(within).max().unwrap_or(0)
}

fn shaping(limits: &str, peer: &SmtpPeer) -> String {
    let address = peer.address();
    format!("[default]\nretry = [\"1s\"]\n{limits}\n[mx]\n\"*\" = \"{address}\"\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_holds_in_every_second_and_over_a_kill() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let limits = "rate = \"10/s\"\nconnections = 5";
    let site = Site::with(&shaping(limits, &peer), "")?;
    let mut service = site.up().await?;
    let id = service.submit(&newsletter(60, 6)).await?;
    for messages in [15, 31, 46] {
        peer.wait_for(messages).await?;
        service.kill()?;
        service = site.up().await?;
    }
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 60, "{batch}");
    let most = most_in_a_second(&peer);
    assert!(most <= 10, "{most} MAIL commands within a second");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_connections_than_allowed() -> Result<()> {
    let temper = Temper::accepting().slow_messages(Duration::from_millis(10));
    let peer = SmtpPeer::start(temper).await?;
    let limits = "rate = \"unlimited\"\nconnections = 3\nmessages_per_connection = 4";
    let site = Site::with(&shaping(limits, &peer), "")?;
    let service = site.up().await?;
    // Two batches and many domains: the limit is the destination's.
    let first = service.submit(&newsletter(150, 30)).await?;
    let second = service.submit(&newsletter(150, 30)).await?;
    service.completed(&first).await?;
    service.completed(&second).await?;
    let counts = peer.counts();
    assert_eq!(counts.messages, 300);
    assert_eq!(counts.peak, 3, "{counts:?}");
    assert!(counts.connections >= 75, "4 messages each: {counts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_hold_over_a_kill() -> Result<()> {
    let temper = Temper::accepting().slow_messages(Duration::from_millis(20));
    let peer = SmtpPeer::start(temper).await?;
    let limits = "rate = \"unlimited\"\nconnections = 3";
    let site = Site::with(&shaping(limits, &peer), "")?;
    let mut service = site.up().await?;
    let id = service.submit(&newsletter(240, 12)).await?;
    for messages in [60, 150] {
        peer.wait_for(messages).await?;
        service.kill()?;
        service = site.up().await?;
    }
    service.completed(&id).await?;
    let counts = peer.counts();
    assert!(counts.peak <= 3, "{counts:?}");
    assert!(counts.messages >= 240, "{counts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fractional_rate_is_paced() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let site = Site::with(&shaping("rate = \"120/m\"\nconnections = 3", &peer), "")?;
    let mut service = site.up().await?;
    let id = service.submit(&newsletter(12, 3)).await?;
    peer.wait_for(5).await?;
    service.kill()?;
    service = site.up().await?;
    service.completed(&id).await?;
    let mut at: Vec<_> = peer.messages().iter().map(|of| of.mail_at).collect();
    at.sort_unstable();
    for pair in at.windows(2) {
        // One each half second; what travels takes a moment of its own.
        let gap = pair[1] - pair[0];
        assert!(gap >= Duration::from_millis(400), "{gap:?} between two");
    }
    Ok(())
}
