//! RFC 8058: only a POST acts, and it acts before it is answered.

use crate::harness::{CHROME, Place, token};
use links::Kind;

fn path(index: u32) -> String {
    format!("/u/{}", token(Kind::Unsubscribe, index))
}

#[tokio::test]
async fn looking_changes_nothing() {
    let place = Place::new(1).await;
    let running = place.start().await;
    for method in ["GET", "HEAD"] {
        let page = running
            .ask(method, &path(0), &[("User-Agent", CHROME)], b"")
            .await;
        assert_eq!(page.status, 200);
        let policy = page.header("content-security-policy").expect("a policy");
        assert!(policy.contains("default-src 'none'") && policy.contains("form-action 'self'"));
        assert_eq!(page.header("cache-control"), Some("no-store"));
        assert_eq!(page.header("referrer-policy"), Some("no-referrer"));
        assert_eq!(page.header("set-cookie"), None);
        if method == "GET" {
            let text = page.text();
            assert_eq!(text.matches("<form method=\"post\">").count(), 1);
            assert_eq!(text.matches("<button").count(), 1);
            assert!(text.contains("配信停止"));
        }
    }
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.unsubscribed, 0);
    assert!(place.hits(0).await.is_empty());
}

#[tokio::test]
async fn a_post_unsubscribes_at_once() {
    let place = Place::new(4).await;
    let running = place.start().await;
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    let multipart = ("Content-Type", "multipart/form-data; boundary=x");
    let parts: &[u8] =
        b"--x\r\nContent-Disposition: form-data; name=\"List-Unsubscribe\"\r\n\r\nOne-Click\r\n--x--\r\n";
    for (index, header, body, way) in [
        (0, form, &b"List-Unsubscribe=One-Click"[..], "one_click"),
        (1, multipart, parts, "one_click"),
        (2, form, b"unsubscribe=page", "page"),
        (3, form, b"", "page"),
    ] {
        let before = running.deps.metrics.journal_pending_records.get();
        let answer = running.ask("POST", &path(index), &[header], body).await;
        assert_eq!(answer.status, 200, "{index}: {before}");
        assert_eq!(answer.header("location"), None);
        assert!(answer.text().contains("You are unsubscribed"));
        let unsubscribed = u64::from(index) + 1;
        place
            .counters(|counters| counters.unsubscribed == unsubscribed)
            .await;
        let hits = place.hits(index).await;
        assert_eq!(hits[0].method.as_deref(), Some(way));
    }
    // Twice is once.
    assert_eq!(
        running.ask("POST", &path(0), &[form], b"").await.status,
        200
    );
    running.drain().await;
    let query = store::SuppressionQuery {
        account: "default".into(),
        limit: 10,
        ..Default::default()
    };
    assert_eq!(place.counters(|_| true).await.unsubscribed, 4);
    let suppressed = place
        .store
        .suppressions(query)
        .await
        .expect("a store")
        .items;
    assert_eq!(suppressed.len(), 4);
    assert!(
        suppressed
            .iter()
            .all(|entry| entry.list.as_deref() == Some("default"))
    );
}

#[tokio::test]
async fn what_is_too_large_or_of_no_token_changes_nothing() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let large = vec![b'x'; 17 * 1024];
    assert_eq!(running.ask("POST", &path(0), &[], &large).await.status, 413);
    assert_eq!(
        running.ask("POST", "/u/unknown", &[], b"").await.status,
        404
    );
    assert_eq!(running.get("/u/unknown").await.status, 404);
    let put = running.ask("PUT", &path(0), &[], b"").await;
    assert_eq!(
        (put.status, put.header("allow")),
        (405, Some("GET, HEAD, POST"))
    );
    // A body that breaks off.
    let broken = format!(
        "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Length: 26\r\n\r\nList-Unsub",
        path(0),
        crate::harness::HOST
    );
    let mut stream = tokio::net::TcpStream::connect(running.tracker.addr())
        .await
        .expect("connects");
    tokio::io::AsyncWriteExt::write_all(&mut stream, broken.as_bytes())
        .await
        .expect("written");
    drop(stream);
    running.drain().await;
    assert_eq!(place.counters(|_| true).await.unsubscribed, 0);
}
