//! What each path answers, and what of it is kept.

use crate::harness::{CHROME, HOST, Place, TARGET, batch_id, ring, sign, signed, token, until};
use links::{Flags, KeyRing, Kind, Token};
use model::{Actor, HitKind, TrackingMode};

const GMAIL: &str =
    "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)";

fn path(kind: Kind, index: u32) -> String {
    let token = token(kind, index);
    match kind {
        Kind::Open => format!("/o/{token}.gif"),
        Kind::Click => format!("/c/{token}"),
        Kind::Unsubscribe => format!("/u/{token}"),
    }
}

#[tokio::test]
async fn a_pixel_is_a_picture_whatever_its_token() {
    let place = Place::new(2).await;
    let running = place.start().await;
    for path in [
        path(Kind::Open, 1),
        "/o/unknown.gif".into(),
        path(Kind::Click, 1).replace("/c/", "/o/"),
    ] {
        let answer = running.get(&path).await;
        assert_eq!((answer.status, answer.body.len()), (200, 43), "{path}");
        assert!(answer.body.starts_with(b"GIF89a") && answer.body.ends_with(b";"));
        assert_eq!(answer.header("content-type"), Some("image/gif"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("set-cookie"), None);
    }
    let counters = place.counters(|counters| counters.opened_total == 1).await;
    assert_eq!(
        (counters.opened_unique, counters.opened_unique_human),
        (1, 1)
    );
    running.drain().await;
    let hits = place.hits(1).await;
    assert_eq!(hits.len(), 1);
    assert_eq!(hits[0].kind, HitKind::Open);
    assert_eq!((hits[0].visitor, hits[0].link), (None, None));
    assert_eq!(&*hits[0].network, "127.0.0.0/24");
    assert_eq!(&*hits[0].user_agent, CHROME);
}

#[tokio::test]
async fn a_link_leads_where_its_token_says_and_names_the_browser() {
    let place = Place::new(3).await;
    let running = place.start().await;
    let first = running.get(&path(Kind::Click, 1)).await;
    assert_eq!(first.status, 302);
    assert_eq!(first.header("location"), Some(TARGET));
    assert_eq!(first.header("cache-control"), Some("no-store"));
    assert_eq!(first.header("x-robots-tag"), Some("noindex"));
    assert!(first.header("referrer-policy").is_some());
    let cookie = first.cookie().expect("a cookie");
    let attributes = first
        .header("set-cookie")
        .expect("a cookie")
        .replace(&cookie, "");
    assert_eq!(
        attributes,
        "; Max-Age=34560000; Path=/; HttpOnly; SameSite=Lax"
    );

    let with = |cookie: String| {
        let running = &running;
        async move {
            let headers = [("User-Agent", CHROME), ("Cookie", cookie.as_str())];
            running
                .ask("GET", &path(Kind::Click, 2), &headers, b"")
                .await
        }
    };
    // The same browser keeps its name, a forged one gets another.
    assert_eq!(with(cookie.clone()).await.cookie(), Some(cookie.clone()));
    let forged = with("hk_vid=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into()).await;
    assert_ne!(forged.cookie(), Some(cookie));
    assert_eq!(forged.status, 302);

    let counters = place.counters(|counters| counters.clicked_total == 3).await;
    assert_eq!(
        (counters.clicked_unique, counters.clicked_unique_human),
        (2, 2)
    );
    assert_eq!(counters.clicked_total_human, 3);
    running.drain().await;
    let visitors: Vec<_> = [place.hits(1).await, place.hits(2).await]
        .concat()
        .iter()
        .map(|hit| {
            (
                hit.visitor,
                hit.link,
                hit.target.as_deref().map(str::to_owned),
            )
        })
        .collect();
    assert_eq!(visitors.len(), 3);
    assert!(
        visitors
            .iter()
            .all(|(_, link, target)| *link == Some(3) && target.as_deref() == Some(TARGET))
    );
    assert_eq!(visitors[0].0, visitors[1].0);
    assert_ne!(visitors[1].0, visitors[2].0);
}

#[tokio::test]
async fn https_makes_the_cookie_secure() {
    let place = Place::with(1, "trusted_proxies = [\"127.0.0.0/8\"]").await;
    let running = place.start().await;
    let headers = [
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-For", "2001:db8:9:8::1"),
    ];
    let answer = running
        .ask("GET", &path(Kind::Click, 0), &headers, b"")
        .await;
    assert!(
        answer
            .header("set-cookie")
            .expect("a cookie")
            .contains("; Secure;")
    );
    let counters = place.counters(|counters| counters.clicked_total == 1).await;
    // No user agent at all: nothing can be told.
    assert_eq!(counters.clicked_total_human, 0);
    running.drain().await;
    assert_eq!(&*place.hits(0).await[0].network, "2001:db8:9::/48");
}

#[tokio::test]
async fn forwarding_headers_of_strangers_mean_nothing() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let headers = [
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-For", "198.51.100.1"),
        ("X-Forwarded-Host", "t.other.example"),
    ];
    let answer = running
        .ask("GET", &path(Kind::Click, 0), &headers, b"")
        .await;
    assert_eq!(answer.status, 302);
    assert!(
        !answer
            .header("set-cookie")
            .expect("a cookie")
            .contains("Secure")
    );
    place.counters(|counters| counters.clicked_total == 1).await;
    running.drain().await;
    assert_eq!(&*place.hits(0).await[0].network, "127.0.0.0/24");
}

#[tokio::test]
async fn head_has_the_same_headers_and_sets_nothing() {
    let place = Place::new(2).await;
    let running = place.start().await;
    for kind in [Kind::Open, Kind::Click] {
        let path = path(kind, 1);
        let agent = [("User-Agent", CHROME)];
        let head = running.ask("HEAD", &path, &agent, b"").await;
        let get = running.ask("GET", &path, &agent, b"").await;
        assert_eq!(head.status, get.status);
        assert!(head.body.is_empty());
        assert_eq!(head.header("set-cookie"), None);
        let without = |headers: &[(String, String)]| {
            let left_out = |name: &str| ["set-cookie", "date"].contains(&name);
            let kept = headers.iter().filter(|(name, _)| !left_out(name));
            kept.cloned().collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(without(&head.headers), without(&get.headers));
    }
    let page = running
        .ask("HEAD", &path(Kind::Unsubscribe, 1), &[], b"")
        .await;
    assert_eq!((page.status, page.body.len()), (200, 0));
    let counters = place
        .counters(|c| c.clicked_total == 1 && c.opened_total == 1)
        .await;
    assert_eq!(counters.unsubscribed, 0);
    running.drain().await;
    let hits = place.hits(1).await;
    let probes: Vec<_> = hits
        .iter()
        .filter(|hit| hit.kind == HitKind::Probe)
        .collect();
    assert_eq!((hits.len(), probes.len()), (4, 2));
    assert!(probes.iter().all(|hit| hit.verdict.actor == Actor::Machine));
    assert!(probes.iter().all(|hit| hit.visitor.is_none()));
}

#[tokio::test]
async fn machines_are_counted_apart() {
    let place = Place::new(4).await;
    let running = place.start().await;
    for (kind, index, agent) in [
        (Kind::Click, 0, "curl/8.5.0"),
        (Kind::Open, 1, "Mozilla/5.0"),
        (Kind::Open, 2, GMAIL),
        (Kind::Open, 3, CHROME),
    ] {
        running
            .ask("GET", &path(kind, index), &[("User-Agent", agent)], b"")
            .await;
    }
    let counters = place
        .counters(|c| c.clicked_total == 1 && c.opened_total == 3)
        .await;
    assert_eq!(
        (counters.opened_unique, counters.opened_unique_human),
        (3, 1)
    );
    assert_eq!(
        (counters.clicked_unique, counters.clicked_unique_human),
        (1, 0)
    );
    let metrics = running.admin("/metrics").await.text();
    for line in [
        "hikyaku_engagement_total{actor=\"machine\",kind=\"click\"} 1",
        "hikyaku_engagement_total{actor=\"machine\",kind=\"open\"} 1",
        "hikyaku_engagement_total{actor=\"unknown\",kind=\"open\"} 1",
        "hikyaku_engagement_total{actor=\"human\",kind=\"open\"} 1",
        "hikyaku_tracker_requests_total{kind=\"open\",result=\"ok\"} 3",
        "hikyaku_tracker_seconds_count{kind=\"click\"} 1",
    ] {
        assert!(
            metrics.lines().any(|given| given == line),
            "{line}\n{metrics}"
        );
    }
    running.drain().await;
}

#[tokio::test]
async fn modes_keep_less_and_proofs_nothing() {
    let place = Place::new(4).await;
    let running = place.start().await;
    let modes = [
        TrackingMode::Off,
        TrackingMode::Aggregate,
        TrackingMode::LastDate,
    ];
    for (index, mode) in (0..).zip(modes) {
        let token = signed(Kind::Click, index, Flags { mode, proof: false });
        let answer = running.get(&format!("/c/{token}")).await;
        assert_eq!(
            (answer.status, answer.header("set-cookie")),
            (302, None),
            "{mode}"
        );
    }
    let proof = Flags {
        mode: TrackingMode::Individual,
        proof: true,
    };
    let answer = running
        .get(&format!("/c/{}", signed(Kind::Click, 3, proof)))
        .await;
    assert_eq!((answer.status, answer.header("set-cookie")), (302, None));
    let unsubscribed = format!("/u/{}", signed(Kind::Unsubscribe, 3, proof));
    assert_eq!(
        running.ask("POST", &unsubscribed, &[], b"").await.status,
        200
    );
    running.drain().await;
    for (index, kept) in [(0, 0), (1, 1), (2, 1), (3, 0)] {
        let hits = place.hits(index).await;
        assert_eq!(hits.len(), kept, "{index}");
        assert!(
            hits.iter()
                .all(|hit| hit.user_agent.is_empty() && hit.network.is_empty())
        );
        assert!(hits.iter().all(|hit| hit.visitor.is_none()));
    }
}

#[tokio::test]
async fn an_archived_batch_is_answered_and_not_counted() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let now = running.deps.clock.now();
    let change = store::BatchChange::Archive;
    place
        .store
        .change_batch(batch_id(), change, now)
        .await
        .expect("archived");
    // Within a second or two a browser gets no name either.
    let cookie = async || {
        let answer = running.get(&path(Kind::Click, 0)).await;
        assert_eq!(answer.status, 302);
        answer.cookie()
    };
    until("no cookie", async || cookie().await.is_none()).await;
    assert_eq!(running.get(&path(Kind::Open, 0)).await.status, 200);
    // Nor from a tracker that starts later.
    let later = place.start().await;
    until("no cookie there", async || {
        later.get(&path(Kind::Click, 0)).await.cookie().is_none()
    })
    .await;
    later.drain().await;
    until("everything shipped", async || {
        let metrics = running.admin("/metrics").await.text();
        metrics.contains("hikyaku_journal_pending_records 0")
    })
    .await;
    let counters = place.counters(|_| true).await;
    assert_eq!((counters.clicked_total, counters.opened_total), (0, 0));
    let change = store::BatchChange::Unarchive;
    let unarchived = place.store.change_batch(batch_id(), change, now).await;
    unarchived.expect("unarchived");
    until("a cookie again", async || cookie().await.is_some()).await;
    running.drain().await;
}

#[tokio::test]
async fn base_urls_with_a_path_and_proxies_that_drop_the_host_work() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let path = format!("/_t/news{}?fbclid=1", path(Kind::Click, 0));
    assert_eq!(running.get(&path).await.status, 302);
    let by_address = running
        .ask("GET", &path, &[("Host", "10.0.0.7:8026")], b"")
        .await;
    assert_eq!(by_address.status, 302);
    running.drain().await;
}

#[tokio::test]
async fn keys_rotate_without_a_restart() {
    let place = Place::new(1).await;
    let running = place.start().await;
    let both = format!(
        "{}{}",
        KeyRing::file_text(&[1; 32]),
        KeyRing::file_text(&[42; 32])
    );
    let new = KeyRing::parse(&both).expect("a ring");
    let token = Token {
        kind: Kind::Click,
        flags: Flags {
            mode: TrackingMode::Individual,
            proof: false,
        },
        batch: batch_id(),
        index: 0,
        link: 0,
        target: TARGET,
    };
    let (old_link, new_link) = (sign(&ring(), HOST, &token), sign(&new, HOST, &token));
    assert_eq!(running.get(&format!("/c/{new_link}")).await.status, 404);
    let cookie = running
        .get(&format!("/c/{old_link}"))
        .await
        .cookie()
        .expect("a cookie");
    std::fs::write(&place.config.tracker.key_file, both).expect("written");
    running.tracker.reload_keys().expect("reloads");
    assert_eq!(running.get(&format!("/c/{new_link}")).await.status, 302);
    let again = running
        .ask(
            "GET",
            &format!("/c/{old_link}"),
            &[("Cookie", &cookie)],
            b"",
        )
        .await;
    assert_eq!(again.status, 302);
    std::fs::write(&place.config.tracker.key_file, "rubbish").expect("written");
    assert!(running.tracker.reload_keys().is_err());
    assert_eq!(running.get(&format!("/c/{new_link}")).await.status, 302);
    running.drain().await;
    // The name of the browser outlives the rotation.
    let visitors: Vec<_> = place
        .hits(0)
        .await
        .iter()
        .filter_map(|hit| hit.visitor)
        .collect();
    assert_eq!(visitors.len(), 4);
    assert_eq!(visitors[0], visitors[2]);
}

#[tokio::test]
async fn who_objects_is_counted_and_not_followed() {
    let place = Place::new(2).await;
    let running = place.start().await;
    let headers = [("User-Agent", CHROME), ("Sec-GPC", "1")];
    let answer = running
        .ask("GET", &path(Kind::Click, 1), &headers, b"")
        .await;
    assert_eq!(answer.header("location"), Some(TARGET));
    assert_eq!(answer.header("set-cookie"), None);
    let counters = place.counters(|counters| counters.clicked_total == 1).await;
    assert_eq!(counters.clicked_unique_human, 1);
    running.drain().await;
    assert!(place.hits(1).await.is_empty());
}
