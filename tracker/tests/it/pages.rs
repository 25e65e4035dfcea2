//! The page tag and page views.

use crate::harness::{CHROME, Place, SITE, token, until};
use links::Kind;
use model::EventKind;
use store::EventQuery;

const VIEW: &[u8] = br#"{"url":"https://shop.example/a?b=1","referrer":"","title":"A\u0000 shop"}"#;

async fn page_views(place: &Place) -> Vec<model::Event> {
    let query = EventQuery {
        kinds: vec![EventKind::PageViewed],
        limit: 100,
        ..EventQuery::default()
    };
    place.store.events(query).await.expect("a store").events
}

#[tokio::test]
async fn the_tag_is_a_script_that_caches_keep() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let tag = running.get("/t.js").await;
    assert_eq!(tag.status, 200);
    assert!(tag.body.len() < 2_000);
    assert_eq!(
        tag.header("content-type"),
        Some("text/javascript; charset=utf-8")
    );
    assert_eq!(tag.header("set-cookie"), None);
    assert!(
        tag.header("cache-control")
            .expect("it says")
            .contains("max-age")
    );
    let no = running.ask("POST", "/t.js", &[], b"").await;
    assert_eq!(no.status, 405);
    running.drain().await;
}

#[tokio::test]
async fn a_page_view_names_the_browser_of_the_click() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let clicked = running.get(&format!("/c/{}", token(Kind::Click, 0))).await;
    let cookie = clicked.cookie().expect("a cookie");
    let headers = [
        ("User-Agent", CHROME),
        ("Origin", SITE),
        ("Cookie", cookie.as_str()),
    ];
    let seen = running.ask("POST", "/p", &headers, VIEW).await;
    assert_eq!(seen.status, 204);
    assert_eq!(seen.header("access-control-allow-origin"), Some(SITE));
    assert_eq!(
        seen.header("access-control-allow-credentials"),
        Some("true")
    );
    assert_eq!(seen.cookie(), Some(cookie));
    until("a page view", async || page_views(&place).await.len() == 1).await;
    let event = &page_views(&place).await[0];
    assert_eq!(event.account, "default");
    assert_eq!(event.data["url"], "https://shop.example/a?b=1");
    assert_eq!(event.data["title"], "A shop");
    assert_eq!(event.data["actor"], "human");
    place.counters(|counters| counters.clicked_total == 1).await;
    let hit = &place.hits(0).await[0];
    let visitor = hit.visitor.expect("a visitor").to_string();
    assert_eq!(event.data["visitor"], visitor.as_str());
    running.drain().await;
}

#[tokio::test]
async fn only_sites_that_are_named_are_heard_and_nobody_who_objects() {
    let place = Place::new(1).await;
    let running = place.start().await;
    for origin in ["https://evil.example", "null", "http://shop.example"] {
        let answer = running.ask("POST", "/p", &[("Origin", origin)], VIEW).await;
        assert_eq!(answer.status, 403, "{origin}");
        assert_eq!(answer.header("access-control-allow-origin"), None);
        assert_eq!(answer.header("set-cookie"), None);
    }
    assert_eq!(running.ask("POST", "/p", &[], VIEW).await.status, 403);
    let site = ("Origin", SITE);
    for body in [&b"{}"[..], b"\xff", br#"{"url":"javascript:1"}"#] {
        assert_eq!(running.ask("POST", "/p", &[site], body).await.status, 400);
    }
    let big = vec![b' '; 64 * 1024];
    assert_eq!(running.ask("POST", "/p", &[site], &big).await.status, 413);
    assert_eq!(running.ask("GET", "/p", &[site], b"").await.status, 405);
    let asks = running.ask("OPTIONS", "/p", &[site], b"").await;
    assert_eq!(asks.status, 204);
    assert_eq!(asks.header("access-control-allow-methods"), Some("POST"));
    let objects = [site, ("Sec-GPC", "1"), ("User-Agent", CHROME)];
    let answer = running.ask("POST", "/p", &objects, VIEW).await;
    assert_eq!((answer.status, answer.header("set-cookie")), (204, None));
    let fresh = running
        .ask("POST", "/p", &[site, ("User-Agent", CHROME)], VIEW)
        .await;
    assert_eq!(fresh.status, 204);
    assert!(fresh.cookie().is_some());
    running.drain().await;
    assert_eq!(page_views(&place).await.len(), 1);
}

#[tokio::test]
async fn the_sites_of_an_account_made_over_the_api_are_heard() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let site = "https://other.example";
    let view = async || {
        let headers = [("Origin", site), ("Content-Type", "text/plain")];
        let body = br#"{"url":"https://other.example/x","referrer":"","title":""}"#;
        running.ask("POST", "/p", &headers, body).await.status
    };
    assert_eq!(view().await, 403);
    let account = format!(
        r#"{{"id":"other","from_domains":["*"],"later":1,"tracking":{{"base_url":"http://t.other.example","mode":"individual","page_origins":["{site}"]}}}}"#
    );
    let note = store::Note {
        kind: "account".into(),
        key: "other".into(),
        value: account.into_bytes().into(),
        expires_at: None,
    };
    let now = running.deps.clock.now();
    place.store.put_notes(vec![note], now).await.expect("put");
    until("the site to be heard", async || view().await == 204).await;
    running.drain().await;
}
