//! Strangers who send too much, too slowly, or nonsense; and the admin listener.

use crate::harness::{HOST, Place, Running, ask, raw, token, until};
use links::{KeyRing, Kind};
use service::clock::SystemClock;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

async fn status_of(running: &Running, request: &[u8]) -> String {
    let answer = raw(running.tracker.addr(), request)
        .await
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&answer).into_owned();
    text.lines()
        .next()
        .unwrap_or_default()
        .chars()
        .skip(9)
        .take(3)
        .collect()
}

#[tokio::test]
async fn nonsense_is_answered_in_kind() {
    let place = Place::new(1).await;
    let running = place.start().await;
    for path in ["/", "/t.css", "/robots.txt", "/c", "/x/y"] {
        assert_eq!(running.get(path).await.status, 404, "{path}");
    }
    assert_eq!(running.ask("POST", "/q", &[], b"{}").await.status, 404);
    for kind in ["c", "o"] {
        let answer = running.ask("POST", &format!("/{kind}/x"), &[], b"").await;
        assert_eq!(
            (answer.status, answer.header("allow")),
            (405, Some("GET, HEAD"))
        );
    }
    let huge = format!(
        "GET / HTTP/1.1\r\nHost: {HOST}\r\nX: {}\r\n\r\n",
        "x".repeat(200_000)
    );
    let many = format!(
        "GET / HTTP/1.1\r\nHost: {HOST}\r\n{}\r\n",
        "A: b\r\n".repeat(500)
    );
    let long = format!(
        "GET /c/{} HTTP/1.1\r\nHost: {HOST}\r\n\r\n",
        "x".repeat(100_000)
    );
    for (request, expected) in [
        (huge, &["431", ""][..]),
        (many, &["431", ""]),
        (long, &["414", "431", ""]),
        ("\0\0\0\r\n\r\n".into(), &["400", ""]),
        (
            "GET / HTTP/1.1\r\nHost: a\nb: c\r\nContent-Length: x\r\n\r\n".into(),
            &["400", ""],
        ),
    ] {
        let status = status_of(&running, request.as_bytes()).await;
        assert!(
            expected.contains(&status.as_str()),
            "{status} for {}",
            request.len()
        );
    }
    // HTTP/1.0 says no host; the token is tried for the one that is configured.
    let old = format!("GET /c/{} HTTP/1.0\r\n\r\n", token(Kind::Click, 0));
    assert_eq!(status_of(&running, old.as_bytes()).await, "302");
    running.drain().await;
}

#[tokio::test]
async fn a_site_with_many_cookies_keeps_its_links() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let cookies = format!("site={}", "x".repeat(30_000));
    let path = format!("/c/{}", token(Kind::Click, 0));
    let answer = running
        .ask("GET", &path, &[("Cookie", &cookies)], b"")
        .await;
    assert_eq!(answer.status, 302);
    running.drain().await;
}

#[tokio::test]
async fn a_drain_answers_what_was_begun_and_takes_nothing_new() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let addr = running.tracker.addr();
    let mut stream = TcpStream::connect(addr).await.expect("connects");
    let path = format!("/u/{}", token(Kind::Unsubscribe, 0));
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 26\r\nExpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("written");
    // The server asks for the body: the request has begun.
    let mut goes_on = [0; 25];
    stream
        .read_exact(&mut goes_on)
        .await
        .expect("an interim answer");
    assert!(goes_on.starts_with(b"HTTP/1.1 100"));
    running.deps.shutdown.begin();
    until("the listener is closed", async || {
        TcpStream::connect(addr).await.is_err()
    })
    .await;
    stream
        .write_all(b"List-Unsubscribe=One-Click")
        .await
        .expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let ready = running.admin("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("the process is ending"));
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.unsubscribed, 1);
}

/// Another node was given a new key, and this one was forgotten.
#[tokio::test]
async fn a_tracker_that_lacks_a_key_says_so_until_it_has_it() {
    let place = Place::new(1).await;
    let text = KeyRing::file_text(&[9; 32]);
    let other = KeyRing::parse(&text).expect("a ring");
    let id = other.ids().next().expect("a key");
    let now = SystemClock::shared().now();
    let node = model::JournalId::new(now, 9);
    let told = store::tell_signing_key(&*place.store, node, id, now).await;
    told.expect("told");
    let running = place.start().await;
    until("it is seen", async || {
        running.admin("/readyz").await.status == 503
    })
    .await;
    let ready = running.admin("/readyz").await;
    assert!(
        ready.text().contains(&format!("here: {id:04x}")),
        "{}",
        ready.text()
    );
    // What it can answer, it answers.
    let path = format!("/c/{}", token(Kind::Click, 0));
    assert_eq!(running.get(&path).await.status, 302);
    let file = place.config.tracker.key_file.clone();
    let own = std::fs::read_to_string(&file).expect("the key file");
    std::fs::write(&file, own + &text).expect("written");
    running.tracker.reload_keys().expect("good keys");
    assert_eq!(running.admin("/readyz").await.status, 200);
    running.drain().await;
}

#[tokio::test]
async fn the_admin_listener_tells_the_operator_and_nobody_else() {
    let place = Place::new(1).await;
    let running = place.start().await;
    until("ready", async || {
        running.admin("/readyz").await.status == 200
    })
    .await;
    assert_eq!(running.admin("/healthz").await.status, 200);
    assert_eq!(running.admin("/nothing").await.status, 404);
    let metrics = running.admin("/metrics").await;
    assert!(
        metrics
            .header("content-type")
            .expect("a type")
            .starts_with("text/plain")
    );
    assert!(metrics.text().contains("hikyaku_journal_pending_records 0"));
    let post = ask(running.tracker.admin_addr(), "POST", "/healthz", &[], b"").await;
    assert_eq!(post.expect("an answer").status, 405);
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(running.get(path).await.status, 404);
    }
    running.drain().await;
}
