//! The same mail over SMTP, and through a real Postfix with a real opendkim.

use anyhow::Result;
use loadtest::batch::Shape;
use loadtest::postfix::Postfix;
use loadtest::site::{Dkim, Setup};
use loadtest::submission;
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;
use testkit::smtp_peer::{SmtpPeer, Temper};

fn shape(recipients: u64) -> Shape {
    Shape {
        recipients,
        domains: 3,
        in_a_row: 1,
        below: "example".to_owned(),
        beside: 0,
        vars: 5,
        links: 10,
        size: 10 * 1024,
        from: "news@brand.example".to_owned(),
    }
}

#[tokio::test]
async fn everybody_is_submitted_once_as_a_message_of_the_batch() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    submission::submit(peer.address(), &shape(40), 4).await?;
    let messages = peer.messages();
    let recipients: HashSet<_> = messages.iter().flat_map(|one| &one.recipients).collect();
    assert_eq!((messages.len(), recipients.len()), (40, 40));
    assert_eq!(peer.counts().connections, 4);
    let text = std::str::from_utf8(&messages[0].content)?;
    // Ten links, the pixel and the header.
    assert_eq!(text.matches("http://127.0.0.1:8026/").count(), 12, "{text}");
    peer.shutdown().await;
    Ok(())
}

#[tokio::test]
async fn a_real_postfix_relays_and_signs_and_its_time_is_counted() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let setup = Setup {
        sink: peer.address(),
        from_domain: "brand.example".to_owned(),
        dkim: Dkim::Rsa2048,
        store: None,
        tracking_keys: None,
        destinations: 0,
        slow: 0,
        routes: Vec::new(),
        dns: None,
        connections: 1,
        messages_per_connection: 1,
        dir: std::env::temp_dir(),
        program: PathBuf::new(),
    };
    let postfix = Postfix::start(&setup).await?;
    let before = postfix.usage()?;
    submission::submit(postfix.address(), &shape(20), 4).await?;
    peer.wait_for(20).await?;
    postfix.idle().await?;
    let signed = |one: &testkit::smtp_peer::Received| {
        String::from_utf8_lossy(&one.content).contains("DKIM-Signature: v=1; a=rsa-sha256")
    };
    assert_eq!(peer.messages().iter().filter(|one| signed(one)).count(), 20);
    assert!(postfix.usage()?.since(&before).cpu() > Duration::ZERO);
    peer.shutdown().await;
    Ok(())
}
