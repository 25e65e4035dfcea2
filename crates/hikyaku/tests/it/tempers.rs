//! Receiving servers of every temper: what becomes of the mail, as the caller and the peer see it.

use crate::harness::{Service, Site, newsletter, until};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use smtp::ServerEvent;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;
use testkit::port::free_port;
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};
use testkit::tls::SelfSigned;

/// Peers by domain, and a service whose mail goes there.
struct Town {
    peers: BTreeMap<&'static str, SmtpPeer>,
    service: Service,
    /// Its folder, which must outlive it.
    _site: Site,
}

impl Town {
    async fn found(tempers: impl IntoIterator<Item = (&'static str, Temper)>) -> Result<Self> {
        let mut peers = BTreeMap::new();
        let mut shaping = format!("{}expire = \"6s\"\n[mx]\n", Site::quick_shaping());
        for (domain, temper) in tempers {
            let peer = SmtpPeer::start(temper).await?;
            writeln!(shaping, "\"{domain}\" = \"{}\"", peer.address())?;
            peers.insert(domain, peer);
        }
        writeln!(shaping, "\"*\" = \"127.0.0.1:{}\"", free_port()?)?;
        let site = Site::with(&shaping, "[smtp.timeouts]\ngreeting = \"500ms\"\n")?;
        let service = site.up().await?;
        Ok(Self {
            peers,
            service,
            _site: site,
        })
    }

    async fn submit(&self, addresses: &[&str]) -> Result<String> {
        let mut batch = newsletter(addresses.len(), 1);
        for (recipient, address) in batch["recipients"]
            .as_array_mut()
            .context("recipients")?
            .iter_mut()
            .zip(addresses)
        {
            recipient["email"] = json!(address);
        }
        self.service.submit(&batch).await
    }

    async fn row(&self, batch: &str, index: usize) -> Result<Value> {
        let message = format!("/v1/messages/{batch}.{index}");
        self.service.client.get(&message).await?.ok()?.json()
    }

    /// The events of a batch about one of its recipients: type and class.
    async fn story(&self, batch: &str, index: usize) -> Result<Vec<(String, Value)>> {
        let page = format!("/v1/events?batch={batch}&limit=1000");
        let page: Value = self.service.client.get(&page).await?.ok()?.json()?;
        let message = json!(format!("{batch}.{index}"));
        let events = page["events"].as_array().context("events")?.iter();
        let mine = events.filter(|event| event["message_id"] == message);
        Ok(mine
            .map(|event| {
                let name = event["type"].as_str().unwrap_or_default().to_owned();
                (name, event["data"]["class"].clone())
            })
            .collect())
    }

    async fn metrics(&self) -> Result<String> {
        Ok(self.service.client.get("/metrics").await?.ok()?.text())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_end_as_the_contract_says() -> Result<()> {
    let town = Town::found([
        (
            "grey.example",
            Temper::accepting().greylisting(Duration::from_millis(300)),
        ),
        (
            "users.example",
            Temper::accepting().knowing(["known@users.example"]),
        ),
        (
            "full.example",
            Temper::accepting().full_mailboxes(true, |_| true),
        ),
        (
            "later.example",
            Temper::accepting().full_mailboxes(false, |_| true),
        ),
        ("silent.example", Temper::accepting().never_greeting()),
    ])
    .await?;
    let id = town
        .submit(&[
            "a@grey.example",
            "unknown@users.example",
            "a@full.example",
            "a@later.example",
            "a@silent.example",
            "a@nobody-listens.example",
            "known@users.example",
        ])
        .await?;
    until("a temporary error", async || {
        let row = town.row(&id, 0).await?;
        Ok((row["attempts"] == 1 || row["attempts"] == 2).then_some(()))
    })
    .await?;
    town.service.completed(&id).await?;
    // status, class, SMTP code, enhanced code, exact number of attempts
    let table = [
        json!(["delivered", null, 250, "2.0.0", 2]),
        json!(["bounce", "invalid_mailbox", 550, "5.1.1", 1]),
        json!(["bounce", "mailbox_full", 552, "5.2.2", 1]),
        // A full mailbox is not asked again for hours, and that is too late here.
        json!(["failed", "expired", 452, "4.2.2", 1]),
        json!(["failed", "expired", null, null, null]),
        json!(["failed", "expired", null, null, null]),
        json!(["delivered", null, 250, "2.0.0", 1]),
    ];
    for (index, expected) in table.iter().enumerate() {
        let row = town.row(&id, index).await?;
        let fields = ["status", "class", "smtp_code", "enhanced_code"];
        let found: Vec<_> = fields.iter().map(|field| &row[field]).collect();
        let wanted: Vec<_> = (0..4).map(|n| &expected[n]).collect();
        assert_eq!(found, wanted, "{row}");
        if expected[4].is_null() {
            assert!(row["attempts"].as_u64() >= Some(2), "retried: {row}");
        } else {
            assert_eq!(row["attempts"], expected[4], "{row}");
        }
    }
    let of = |name: &str, class: Value| (name.to_owned(), class);
    let expected = [
        of("email.temporary_error", json!("greylisted")),
        of("email.delivered", Value::Null),
    ];
    assert_eq!(town.story(&id, 0).await?, expected);
    a_dead_address_is_not_tried_again(&town).await
}

async fn a_dead_address_is_not_tried_again(town: &Town) -> Result<()> {
    let suppression: Value = town
        .service
        .client
        .get("/v1/suppressions/unknown@users.example")
        .await?
        .ok()?
        .json()?;
    assert_eq!(suppression["items"][0]["reason"], "invalid_address");
    let refused = town.peers["users.example"].counts().refused_recipients;
    let id = town
        .submit(&["Unknown@USERS.example", "known@users.example"])
        .await?;
    let batch = town.service.completed(&id).await?;
    assert_eq!(batch["counters"]["suppressed"], 1, "{batch}");
    assert_eq!(batch["counters"]["delivered"], 1, "{batch}");
    let told = town.story(&id, 0).await?;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].0, "email.suppressed");
    let counts = town.peers["users.example"].counts();
    assert_eq!(counts.refused_recipients, refused, "the peer is not asked");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_one_second_copy_and_counted() -> Result<()> {
    let once = Temper::accepting().answering_times(ServerEvent::Message, 1, Answer::AcceptAndReset);
    let town = Town::found([("reset.example", once)]).await?;
    let id = town.submit(&["a@reset.example"]).await?;
    let batch = town.service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 1, "{batch}");
    let copies = town.peers["reset.example"].messages();
    assert_eq!(copies.len(), 2);
    assert_eq!(copies[0].content, copies[1].content, "the same bytes");
    let between = copies[1].mail_at.duration_since(copies[0].mail_at);
    assert!(between >= Duration::from_secs(1), "{between:?}");
    let metrics = town.metrics().await?;
    let counted = "hikyaku_duplicates_total{cause=\"reply_lost\"} 1";
    assert!(metrics.lines().any(|line| line == counted), "{metrics}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_taken_where_offered_and_left_where_broken() -> Result<()> {
    let mut broken = Temper::accepting();
    broken.server.starttls = true;
    let town = Town::found([
        (
            "tls.example",
            Temper::accepting().with_tls(&SelfSigned::new(&["other.example"])?),
        ),
        ("broken.example", broken),
        (
            "bare.example",
            Temper::accepting()
                .without_pipelining()
                .without_chunking()
                .without_eight_bit(),
        ),
    ])
    .await?;
    let domains = ["tls.example", "broken.example", "bare.example"];
    let addresses: Vec<String> = (0..9).map(|n| format!("u{n}@{}", domains[n % 3])).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let id = town.submit(&addresses).await?;
    let batch = town.service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 9, "{batch}");
    for (domain, tls) in domains.into_iter().zip([true, false, false]) {
        let peer = &town.peers[domain];
        let messages = peer.messages();
        assert_eq!(messages.len(), 3, "{domain}");
        assert!(
            messages.iter().all(|message| message.tls == tls),
            "{domain}"
        );
        assert_eq!(peer.counts().sent_ahead, 0, "{domain}: ahead of its turn");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_421_in_the_middle_costs_a_connection_and_nothing_else() -> Result<()> {
    let town = Town::found([("short.example", Temper::accepting().closing_after(3))]).await?;
    let addresses: Vec<String> = (0..40).map(|n| format!("u{n}@short.example")).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let id = town.submit(&addresses).await?;
    let batch = town.service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 40, "{batch}");
    assert_eq!(
        town.peers["short.example"].counts().messages,
        40,
        "one each"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_peer_holds_up_nobody_else() -> Result<()> {
    let slow = Temper::accepting().slow_messages(Duration::from_secs(2));
    let town = Town::found([
        ("slow.example", slow),
        ("fast.example", Temper::accepting()),
    ])
    .await?;
    let addresses: Vec<String> = (0..400)
        .map(|n| format!("u{n}@{}.example", if n % 8 == 0 { "slow" } else { "fast" }))
        .collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let id = town.submit(&addresses).await?;
    let fast = town.peers["fast.example"].wait_for(350).await?;
    assert_eq!(fast.messages, 350);
    let slow = town.peers["slow.example"].counts().messages;
    assert!(
        slow <= 16,
        "{slow} of the slow were ready before all the fast"
    );
    let other = town.submit(&["late@fast.example"]).await?;
    town.service.completed(&other).await?;
    let batch = town.service.batch(&id).await?;
    assert_ne!(batch["state"], "completed", "{batch}");
    Ok(())
}
