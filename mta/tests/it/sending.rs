//! Sending from the store to scripted receiving servers and back: one behaviour a test, both ends
//! looked at.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::{Class, Priority, Status};
use mta::sending::Reload;
use service::clock::{Clock as _, SystemClock};
use service::config::shaping::ShapingFile;
use smtp::ServerEvent;
use store::BatchChange;
use testkit::dns::{Behaviour, DnsServer, Zone};
use testkit::smtp_peer::{Answer, Keep, SmtpPeer, Temper};
use testkit::tls::SelfSigned;

use crate::station::{Station, people};

#[tokio::test]
async fn a_batch_goes_out_signed_and_every_outcome_is_in_the_store() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 300)).await;
    let running = station.start().await;
    let counters = station.finished(batch).await;
    assert_eq!((counters.delivered, counters.accepted), (300, 300));
    let messages = peer.messages();
    let recipients: HashSet<_> = messages
        .iter()
        .flat_map(|message| message.recipients.clone())
        .collect();
    assert_eq!((messages.len(), recipients.len()), (300, 300));
    for message in &messages {
        let text = String::from_utf8_lossy(&message.content);
        assert!(text.contains("DKIM-Signature:"), "{text}");
        assert!(
            message
                .reverse_path
                .starts_with(&format!("bounce+{batch}.")),
            "{}",
            message.reverse_path
        );
    }
    let row = station.row(batch, 7).await;
    assert_eq!(
        (row.status, row.attempts, row.smtp_code),
        (Status::Delivered, 1, Some(250))
    );
    assert!(row.host.is_some_and(|host| host.contains("127.0.0.1")));
    running.drain().await;
}

#[tokio::test]
async fn refusals_are_read_and_what_is_temporary_is_tried_again() {
    let busy = AtomicU32::new(0);
    let temper = Temper::accepting().rule(move |question| {
        if question.event != ServerEvent::Rcpt {
            return None;
        }
        match question.recipient {
            "gone@x.example" => Some(Answer::reply(550, "5.1.1 No such user")),
            "busy@x.example" if busy.fetch_add(1, Ordering::Relaxed) == 0 => {
                Some(Answer::reply(451, "4.3.0 Not now"))
            }
            "never@x.example" => Some(Answer::reply(451, "4.3.0 Not today")),
            _ => None,
        }
    });
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let station = Station::new(&peer).await;
    let to = [
        "ok@x.example",
        "gone@x.example",
        "busy@x.example",
        "never@x.example",
    ]
    .map(str::to_owned);
    let batch = station.submit(&to).await;
    let running = station.start().await;
    let counters = station.finished(batch).await;
    assert_eq!(
        (counters.delivered, counters.bounce, counters.failed),
        (2, 1, 1)
    );
    let gone = station.row(batch, 1).await;
    assert_eq!(
        (gone.status, gone.class, gone.attempts),
        (Status::Bounce, Some(Class::InvalidMailbox), 1)
    );
    let busy = station.row(batch, 2).await;
    assert_eq!((busy.status, busy.attempts), (Status::Delivered, 2));
    let never = station.row(batch, 3).await;
    assert_eq!(
        (never.status, never.class),
        (Status::Failed, Some(Class::Expired))
    );
    assert_eq!(never.reply.as_deref(), Some("451 4.3.0 Not today"));
    assert_eq!(station.suppressed().await, ["gone@x.example"]);
    running.drain().await;
}

#[tokio::test]
async fn a_drain_in_the_middle_leaves_no_second_copy() {
    let peer = SmtpPeer::start(Temper::accepting().slow_messages(Duration::from_millis(2)))
        .await
        .expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 400)).await;
    let running = station.start().await;
    peer.wait_for(50).await.expect("some messages");
    running.drain().await;
    let so_far = station.counters(batch).await;
    assert_eq!(so_far.delivered, peer.counts().messages);
    assert!(so_far.delivered < 400);
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 400);
    assert_eq!(peer.counts().messages, 400);
    running.drain().await;
}

/// Shaping and configuration for names that the test's DNS server knows.
fn by_dns(dns: &DnsServer, port: u16) -> (String, String) {
    let shaping =
        "[default]\nrate = \"unlimited\"\nretry = [\"200ms\", \"400ms\"]\nexpire = \"2s\"\n"
            .to_owned();
    let config = format!(
        "[dns]\nnameservers = [\"{}\"]\n[smtp]\nport = {port}\nallow_private_mx = [\"127.0.0.0/8\"]\n[smtp.timeouts]\nconnect = \"1s\"\n",
        dns.addr()
    );
    (shaping, config)
}

#[tokio::test]
async fn mail_goes_where_dns_says_and_ends_where_there_is_no_way() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let local = std::net::Ipv4Addr::LOCALHOST;
    let zone = Zone::new()
        .mx("two.example", 10, "down.two.example")
        .mx("two.example", 20, "up.two.example")
        // Nobody listens there.
        .a("down.two.example", std::net::Ipv4Addr::new(127, 0, 0, 2))
        .a("up.two.example", local)
        .a("implicit.example", local)
        .null_mx("null.example")
        .mx("private.example", 10, "mx.private.example")
        .a("mx.private.example", std::net::Ipv4Addr::new(10, 0, 0, 1))
        .mx("broken.example", 10, "mx.broken.example")
        .behave("broken.example", Behaviour::ServFail);
    let dns = DnsServer::start(zone).await.expect("a DNS server");
    let (shaping, config) = by_dns(&dns, peer.address().port());
    let station = Station::with(&shaping, &config).await;
    let names = ["two", "implicit", "null", "gone", "private", "broken"];
    let batch = station
        .submit(&names.map(|name| format!("a@{name}.example")))
        .await;
    let running = station.start().await;
    station.finished(batch).await;
    let mut seen = Vec::new();
    for index in 0..6 {
        let row = station.row(batch, index).await;
        seen.push((row.status, row.class));
    }
    let wanted = [
        (Status::Delivered, None),
        (Status::Delivered, None),
        (Status::Failed, Some(Class::NoMx)),
        (Status::Failed, Some(Class::BadDomain)),
        (Status::Failed, Some(Class::Expired)),
        (Status::Failed, Some(Class::Expired)),
    ];
    assert_eq!(seen, wanted);
    assert_eq!(station.row(batch, 2).await.attempts, 1);
    let private = station.row(batch, 4).await;
    assert!(
        private
            .reply
            .as_deref()
            .is_some_and(|reply| reply.contains("not public")),
        "{private:?}"
    );
    let mut suppressed = station.suppressed().await;
    suppressed.sort();
    assert_eq!(suppressed, ["a@gone.example", "a@null.example"]);
    running.drain().await;
}

#[tokio::test]
async fn tls_is_taken_with_any_certificate_and_left_where_it_is_broken() {
    let certificate = SelfSigned::new(&["mx.other.example"]).expect("a certificate");
    let peer = SmtpPeer::start(Temper::accepting().with_tls(&certificate))
        .await
        .expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 5)).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 5);
    assert!(peer.messages().iter().all(|message| message.tls));
    running.drain().await;

    // STARTTLS is offered and ends the connection.
    let broken = Temper::accepting()
        .with_tls(&certificate)
        .answering(ServerEvent::StartTls, Answer::Reset);
    let peer = SmtpPeer::start(broken).await.expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 5)).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 5);
    assert!(peer.messages().iter().all(|message| !message.tls));
    running.drain().await;
}

#[tokio::test]
async fn greylisting_costs_time_and_nothing_else() {
    let peer = SmtpPeer::start(Temper::accepting().greylisting(Duration::from_millis(300)))
        .await
        .expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 20)).await;
    let running = station.start().await;
    let counters = station
        .until(batch, |counters| counters.delivered == 20)
        .await;
    assert_eq!(counters.open(), 0);
    let row = station.row(batch, 0).await;
    assert!(row.attempts >= 2, "{row:?}");
    running.drain().await;
}

#[tokio::test]
async fn a_lost_reply_is_ambiguous_and_tried_once_more() {
    let peer = SmtpPeer::start(Temper::accepting().resetting_after_dot(true))
        .await
        .expect("a peer");
    let station = Station::towards(
        &peer,
        "[smtp]\nambiguous_after = \"500ms\"\n",
        "expire = \"1h\"",
    )
    .await;
    let batch = station.submit(&people("x.example", 1)).await;
    let running = station.start().await;
    let counters = station.finished(batch).await;
    assert_eq!((counters.failed, peer.counts().messages), (1, 2));
    assert_eq!(station.row(batch, 0).await.attempts, 2);
    running.drain().await;

    let assume = "[smtp]\nambiguous = \"assume_delivered\"\n";
    let peer = SmtpPeer::start(Temper::accepting().resetting_after_dot(true))
        .await
        .expect("a peer");
    let station = Station::towards(&peer, assume, "expire = \"1h\"").await;
    let batch = station.submit(&people("x.example", 1)).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 1);
    running.drain().await;
    assert_eq!(peer.counts().messages, 1);
}

#[tokio::test]
async fn a_rate_holds_in_every_second() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let shaping = "rate = \"20/s\"\nexpire = \"1h\"";
    let station = Station::towards(&peer, "", shaping).await;
    let batch = station.submit(&people("x.example", 60)).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 60);
    running.drain().await;
    let mut at: Vec<_> = peer
        .messages()
        .iter()
        .map(|message| message.mail_at)
        .collect();
    at.sort();
    for window in at.windows(21) {
        let (first, last) = (window[0], window[20]);
        // The peer's clock sees a command a little after it was allowed.
        assert!(
            last - first > Duration::from_millis(950),
            "21 in {:?}",
            last - first
        );
    }
}

#[tokio::test]
async fn a_pause_holds_a_cancel_ends_and_a_suppression_spares() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::towards(&peer, "", "rate = \"20/s\"\nexpire = \"1h\"").await;
    let batch = station.submit(&people("x.example", 100)).await;
    let running = station.start().await;
    peer.wait_for(10).await.expect("some");
    station.change(batch, BatchChange::Pause).await;
    station.suppress("u99@x.example").await;
    // What was begun ends; then nothing comes.
    let paused = station
        .until(batch, |counters| {
            counters.delivered == peer.counts().messages
        })
        .await;
    assert!(paused.delivered < 90 && paused.queued > 0, "{paused:?}");
    station.change(batch, BatchChange::Resume).await;
    station
        .until(batch, |counters| {
            counters.delivered >= paused.delivered + 10
        })
        .await;
    station.change(batch, BatchChange::Cancel).await;
    let counters = station.finished(batch).await;
    assert_eq!(counters.delivered, peer.counts().messages);
    assert_eq!(
        counters.delivered + counters.cancelled + counters.suppressed,
        100,
        "{counters:?}"
    );
    assert!(counters.cancelled > 0);
    assert!(
        !peer
            .messages()
            .iter()
            .any(|message| message.recipients == ["u99@x.example"])
    );
    running.drain().await;
}

#[tokio::test]
async fn thousands_of_domains_in_mixed_lots() {
    let peer = SmtpPeer::start(Temper::accepting().keeping(Keep::PerRecipient(10_000)))
        .await
        .expect("a peer");
    let station = Station::towards(
        &peer,
        "",
        "connections = 8\nmessages_per_connection = 500\nexpire = \"1h\"",
    )
    .await;
    let to: Vec<_> = (0..2_000).map(|n| format!("a@d{n}.example")).collect();
    let batch = station.submit(&to).await;
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 2_000);
    assert!(peer.copies().values().all(|copies| copies.count == 1));
    running.drain().await;
}

#[test]
fn a_kill_loses_nobody_and_doubles_no_more_than_were_in_flight() {
    let outer = tokio::runtime::Runtime::new().expect("a runtime");
    let temper = Temper::accepting()
        .keeping(Keep::PerRecipient(1_000))
        .slow_messages(Duration::from_millis(3));
    let peer = outer.block_on(SmtpPeer::start(temper)).expect("a peer");
    let config = "[smtp]\nambiguous_after = \"300ms\"\n";
    let station = outer.block_on(Station::towards(&peer, config, "expire = \"1h\""));
    let batch = outer.block_on(station.submit(&people("x.example", 400)));
    for kill_after in [20, 90, 180] {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let running = runtime.block_on(station.start());
        outer
            .block_on(peer.wait_for(kill_after))
            .expect("some messages");
        // Every task stops where it is: no drain, no word to the store.
        drop(running);
        runtime.shutdown_timeout(Duration::from_secs(10));
        outer.block_on(station.counters(batch));
    }
    let running = outer.block_on(station.start());
    let counters = outer.block_on(station.finished(batch));
    outer.block_on(running.drain());
    assert_eq!(counters.delivered, 400);
    let copies = peer.copies();
    assert_eq!(copies.len(), 400);
    assert!(
        copies.values().all(|copies| copies.same),
        "every copy has the same bytes"
    );
    let second: u64 = copies.values().map(|copies| copies.count - 1).sum();
    assert!(
        second <= 3 * 4,
        "{second} second copies with 4 connections and 3 kills"
    );
}

#[tokio::test]
async fn a_reload_moves_mail_to_where_the_operator_says() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let shaping = "[default]\nrate = \"unlimited\"\nretry = [\"200ms\"]\n[mx]\n\"*\" = ";
    // Nobody listens on port 1.
    let station = Station::with(&format!("{shaping}\"127.0.0.1:1\""), "").await;
    let batch = station.submit(&people("x.example", 3)).await;
    let running = station.start().await;
    let counters = station
        .until(batch, |counters| counters.temporary_error == 3)
        .await;
    assert_eq!(counters.open(), 3);
    let row = station.row(batch, 0).await;
    assert_eq!(row.class, Some(Class::ConnectFailure));
    let text = format!("{shaping}\"{}\"", peer.address());
    let file = ShapingFile::parse(std::path::Path::new("shaping.toml"), &text);
    running
        .handle
        .reload(Reload {
            shaping: Arc::new(file.expect("a shaping file")),
            accounts: station.config.accounts.clone(),
            pools: station.config.pools.clone(),
        })
        .await;
    assert_eq!(station.finished(batch).await.delivered, 3);
    let metrics = station.metrics.render();
    let throttled = "hikyaku_throttled_total{destination=\"127.0.0.1:1\",reason=\"backoff\"}";
    assert!(metrics.contains(throttled), "{metrics}");
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mail_of_either_priority_ends_in_its_time_while_its_destination_is_left_alone() {
    // Nobody listens on port 1, and nobody looks again for half an hour.
    let shaping =
        "[default]\nrate = \"unlimited\"\nretry = [\"1h\"]\n[mx]\n\"*\" = \"127.0.0.1:1\"";
    let station = Station::with(shaping, "").await;
    let over = SystemClock.now() + Duration::from_secs(4);
    let mut batches = Vec::new();
    for priority in [Priority::Transactional, Priority::Bulk] {
        let change = |head: &mut store::BatchHead| {
            (head.priority, head.expires_at) = (priority, Some(over));
        };
        batches.push(station.submit_as(&people("x.example", 3), change).await);
    }
    let running = station.start().await;
    for batch in batches {
        assert_eq!(station.finished(batch).await.failed, 3);
        assert_eq!(station.row(batch, 2).await.class, Some(Class::Expired));
    }
    // A restart knows of it: nobody is asked again, and a note says so.
    let holds = station
        .store
        .notes("holds", SystemClock.now())
        .await
        .expect("notes");
    assert_eq!(holds.len(), 1, "{holds:?}");
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_receiver_never_counts_more_connections_than_the_limit() {
    for tls in [false, true] {
        let certificate = SelfSigned::new(&["mx.other.example"]).expect("a certificate");
        let temper = Temper::accepting().keeping(Keep::Nothing);
        let temper = if tls {
            temper.with_tls(&certificate)
        } else {
            temper
        };
        let peer = SmtpPeer::start(temper).await.expect("a peer");
        let limits = "connections = 3\nmessages_per_connection = 2\nexpire = \"1h\"";
        let station = Station::towards(&peer, "", limits).await;
        let batch = station.submit(&people("x.example", 300)).await;
        let running = station.start().await;
        assert_eq!(station.finished(batch).await.delivered, 300);
        running.drain().await;
        let counts = peer.counts();
        assert!(counts.connections >= 150, "{counts:?}");
        assert_eq!(counts.peak, 3, "{counts:?}");
    }
}

#[tokio::test]
async fn a_drain_does_not_wait_for_dead_name_servers() {
    let zone = Zone::new().behave("silent.example", Behaviour::Silent);
    let dns = DnsServer::start(zone).await.expect("a DNS server");
    let (shaping, config) = by_dns(&dns, 25);
    let station = Station::with(&shaping, &config).await;
    let batch = station.submit(&["a@silent.example".to_owned()]).await;
    let running = station.start().await;
    while dns.queries("silent.example") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The question alone is patient for ten seconds.
    let drained = tokio::time::timeout(Duration::from_secs(4), running.drain()).await;
    assert!(drained.is_ok(), "the drain waited for DNS");
    assert_eq!(station.counters(batch).await.queued, 1);
}
