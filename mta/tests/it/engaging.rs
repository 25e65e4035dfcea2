//! Engagement from outside: hits come as a tracker ships them; people, browsers and verdicts are
//! read through the API.

use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use model::{BatchId, Fact, Hit, MessageId, PageView, Timestamp, VisitorId};
use serde_json::{Value, json};

use crate::harness::{Service, batch};
use crate::hits::{PERSON, Tracker, click, now, person};

/// A service with a short settle time, and a tracker's store beside it.
struct Place {
    service: Service,
    tracker: Tracker,
    batch: BatchId,
}

fn browser(byte: u8) -> VisitorId {
    VisitorId::from_bytes([byte; 16])
}

impl Place {
    async fn new() -> Self {
        Self::with(json!({})).await
    }

    /// With other fields of the batch.
    async fn with(fields: Value) -> Self {
        let service = Service::with_api("[tracker]\nsettle = \"300ms\"").await;
        let recipients: Vec<Value> = (0..6)
            .map(|n| json!({"email": format!("r{n}@x.example"), "prospect_id": format!("p-{n}")}))
            .collect();
        let mut submission = batch(&json!(recipients));
        // Nothing is attempted: what is delivered when is not this test's.
        submission["send_at"] = json!("2999-01-01T00:00:00Z");
        for (name, value) in fields.as_object().into_iter().flatten() {
            submission[name] = value.clone();
        }
        let accepted = service.api.submit(&submission).await.json();
        let id = accepted["id"]
            .as_str()
            .unwrap_or_else(|| panic!("{accepted}"));
        Self {
            batch: id.parse().expect("an id"),
            tracker: Tracker::beside(&service).await,
            service,
        }
    }

    async fn ship(&self, facts: Vec<Fact>) {
        self.tracker.ship(facts).await;
    }

    fn click(&self, index: u32, link: u16, visitor: VisitorId, at: Timestamp) -> Fact {
        let message = MessageId {
            batch: self.batch,
            index,
        };
        Fact::Hit(Box::new(Hit {
            link: Some(link),
            visitor: Some(visitor),
            ..click(message, at)
        }))
    }

    fn page(visitor: VisitorId, url: &str) -> Fact {
        Fact::Page(Box::new(PageView {
            account: "default".into(),
            at: now(),
            visitor,
            url: url.into(),
            referrer: "".into(),
            title: "".into(),
            user_agent: PERSON.into(),
            network: "203.0.113.0/24".into(),
            verdict: person(),
        }))
    }

    async fn once(&self, path: &str, enough: impl Fn(&Value) -> bool) -> Value {
        self.service.api.until(path, enough).await
    }

    /// The events of a type, once there are `count`.
    async fn events(&self, kind: &str, count: usize) -> Vec<Value> {
        let path = format!("/v1/events?types={kind}&limit=1000");
        let enough = |page: &Value| {
            page["events"]
                .as_array()
                .is_some_and(|all| all.len() >= count)
        };
        let page = self.once(&path, enough).await;
        page["events"].as_array().cloned().unwrap_or_default()
    }

    async fn tell(&self, body: &Value) -> (u16, Value) {
        let api = &self.service.api;
        api.with_json(Method::POST, "/v1/events", body).await
    }

    async fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        self.service.api.with_json(Method::PUT, path, body).await
    }
}

fn clicked(person: &Value) -> bool {
    person["clicked"] == json!(true)
}

fn timeline(person: &Value) -> Vec<&str> {
    let entries = person["timeline"].as_array().expect("a timeline").iter();
    entries.filter_map(|entry| entry["type"].as_str()).collect()
}

#[tokio::test]
async fn a_click_binds_a_browser_and_a_conflict_moves_nobody() {
    let place = Place::new().await;
    // Anonymous at first: what was seen then joins the person.
    place
        .ship(vec![Place::page(browser(1), "https://shop.example/before")])
        .await;
    place.ship(vec![place.click(0, 0, browser(1), now())]).await;
    let bound = place.events("identity.bound", 1).await;
    let binding = bound[0]["data"]["binding_id"]
        .as_str()
        .expect("a name")
        .to_owned();
    assert_eq!(bound[0]["recipient"]["prospect_id"], "p-0");
    assert_eq!(bound[0]["data"]["visitor"], browser(1).to_string());
    assert_eq!(
        bound[0]["data"]["evidence"]["message_id"],
        format!("{}.0", place.batch)
    );
    place
        .ship(vec![Place::page(browser(1), "https://shop.example/after")])
        .await;
    let known = |person: &Value| timeline(person).len() == 3;
    let first = place.once("/v1/prospects/p-0", known).await;
    assert_eq!(
        timeline(&first),
        ["page.viewed", "email.clicked", "page.viewed"]
    );
    assert_eq!(
        (&first["score"], &first["clicked"]),
        (&json!(5 + 2), &json!(true))
    );
    assert_eq!(first["email"], "r0@x.example");
    assert_eq!(first["visitors"][0]["binding_id"], binding.as_str());
    assert!(first["last_human_activity"].is_string());

    // The same browser clicks in a mail to somebody else.
    place.ship(vec![place.click(1, 0, browser(1), now())]).await;
    let conflict = place.events("identity.conflict", 1).await;
    assert_eq!(conflict[0]["data"]["prospect_id"], "p-0");
    assert_eq!(conflict[0]["recipient"]["prospect_id"], "p-1");
    let bound = place.events("identity.bound", 2).await;
    let second = &bound[1]["data"];
    assert_eq!(second["visitor"], conflict[0]["data"]["new_visitor"]);
    assert_ne!(second["visitor"], browser(1).to_string());
    place
        .ship(vec![Place::page(browser(1), "https://shop.example/second")])
        .await;
    let theirs = |person: &Value| timeline(person).len() == 2;
    place.once("/v1/prospects/p-1", theirs).await;
    let first = place.service.api.get("/v1/prospects/p-0").await.json();
    assert_eq!(timeline(&first).len(), 3);

    // Undone: the browser is the first one's again, and the page goes with it.
    let path = format!(
        "/v1/bindings/{}/revoke",
        second["binding_id"].as_str().expect("a name")
    );
    let revoked = place.service.api.post(&path).await;
    assert_eq!(revoked.status, StatusCode::OK);
    assert!(revoked.json()["revoked_at"].is_string());
    assert_eq!(place.service.api.post(&path).await.status, StatusCode::OK);
    assert_eq!(place.events("identity.revoked", 1).await.len(), 1);
    let without = |person: &Value| timeline(person) == ["email.clicked"];
    place.once("/v1/prospects/p-1", without).await;
    place
        .ship(vec![Place::page(browser(1), "https://shop.example/back")])
        .await;
    let back = |person: &Value| timeline(person).len() == 4;
    place.once("/v1/prospects/p-0", back).await;
    let unknown = place.service.api.post("/v1/bindings/none/revoke").await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    let stranger = place.service.api.with_key("hk_other");
    assert_eq!(stranger.post(&path).await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        stranger.get("/v1/prospects/p-0").await.status,
        StatusCode::NOT_FOUND
    );
    place.service.stop().await;
}

#[tokio::test]
async fn who_is_erased_is_no_prospect_and_owns_no_browser() {
    let place = Place::new().await;
    for (index, visitor) in [(0, browser(1)), (1, browser(1)), (2, browser(3))] {
        place
            .ship(vec![place.click(index, 0, visitor, now())])
            .await;
    }
    let bound = place.events("identity.bound", 3).await;
    let of = |prospect: &str| {
        let own = bound
            .iter()
            .find(|event| event["data"]["prospect_id"] == prospect);
        let id = own.and_then(|event| event["data"]["binding_id"].as_str());
        format!("/v1/bindings/{}/revoke", id.expect("a name"))
    };
    let api = &place.service.api;
    place.once("/v1/prospects/p-1", clicked).await;
    for _ in 0..2 {
        let path = "/v1/recipients/R1@x.example";
        let erased = api.call(Method::DELETE, path, &[], Bytes::new()).await;
        assert_eq!(erased.status, StatusCode::NO_CONTENT);
    }
    let gone = api.get("/v1/prospects/p-1").await;
    assert_eq!(gone.status, StatusCode::NOT_FOUND);
    assert_eq!(api.post(&of("p-1")).await.status, StatusCode::NOT_FOUND);
    // The browser is whose it was before, and others are as they were.
    place
        .ship(vec![Place::page(browser(1), "https://shop.example/back")])
        .await;
    let back = |person: &Value| timeline(person) == ["page.viewed", "email.clicked"];
    place.once("/v1/prospects/p-0", back).await;
    place.once("/v1/prospects/p-2", clicked).await;
    let page = api.get("/v1/prospects").await.json();
    assert!(!page.to_string().contains("p-1"), "{page}");
    place.service.stop().await;
}

#[tokio::test]
async fn who_withdraws_consent_is_followed_no_further() {
    let place = Place::new().await;
    let api = &place.service.api;
    let said = "/v1/tracking/R0@x.example";
    assert_eq!(api.get(said).await.status, StatusCode::NOT_FOUND);
    place.ship(vec![place.click(0, 0, browser(1), now())]).await;
    let bound = place.events("identity.bound", 1).await;
    place.once("/v1/prospects/p-0", clicked).await;
    // This click still waits for its verdict.
    place.ship(vec![place.click(2, 0, browser(2), now())]).await;
    for (path, mode) in [(said, "off"), ("/v1/tracking/r2@x.example", "aggregate")] {
        let put = place.put(path, &json!({"mode": mode})).await;
        assert_eq!((put.0, &put.1["mode"]), (200, &json!(mode)), "{put:?}");
    }
    let revoked = place.events("identity.revoked", 1).await;
    assert_eq!(revoked[0]["data"]["reason"], "consent");
    let of_binding = |event: &Value| event["data"]["binding_id"].clone();
    assert_eq!(of_binding(&revoked[0]), of_binding(&bound[0]));

    place
        .ship(vec![
            place.click(0, 0, browser(1), now()),
            place.click(2, 0, browser(2), now()),
            Place::page(browser(1), "https://shop.example/a"),
            Place::page(browser(2), "https://shop.example/b"),
            place.click(1, 0, browser(3), now()),
            Place::page(browser(3), "https://shop.example/c"),
        ])
        .await;
    // Whoever came last was looked at, so everybody before was.
    let came = |person: &Value| timeline(person).len() == 2;
    place.once("/v1/prospects/p-1", came).await;
    let bound = place.events("identity.bound", 2).await;
    let of = |event: &Value| event["data"]["prospect_id"].clone();
    let bound: Vec<_> = bound.iter().map(of).collect();
    assert_eq!(bound, ["p-0", "p-1"]);
    for (path, tracking) in [("p-0", "off"), ("p-2", "aggregate")] {
        let person = api.get(&format!("/v1/prospects/{path}")).await.json();
        assert_eq!(timeline(&person), ["email.clicked"], "{person}");
        assert_eq!(person["visitors"], json!([]), "{person}");
        assert_eq!(person["tracking"]["mode"], tracking);
    }
    let clicks = place.events("email.clicked", 3).await;
    assert_eq!(clicks.len(), 3, "{clicks:?}");
    let batch = format!("/v1/batches/{}", place.batch);
    let counters = &api.get(&batch).await.json()["counters"];
    assert_eq!(counters["clicked_total"], 4, "{counters}");

    let person = api.get("/v1/recipients/r0@x.example").await.json();
    assert_eq!(person["tracking"]["mode"], "off", "{person}");
    for body in [
        json!({}),
        json!({"mode": "some"}),
        json!({"mode": "off", "x": 1}),
    ] {
        let put = place.put(said, &body).await;
        assert_eq!(put.0, 422, "{put:?}");
    }
    for _ in 0..2 {
        let lifted = api.call(Method::DELETE, said, &[], Bytes::new()).await;
        assert_eq!(lifted.status, StatusCode::NO_CONTENT);
    }
    assert_eq!(api.get(said).await.status, StatusCode::NOT_FOUND);
    place.ship(vec![place.click(0, 0, browser(1), now())]).await;
    place.events("identity.bound", 3).await;
    place.service.stop().await;
}

#[tokio::test]
async fn a_scanner_is_found_by_what_it_does_and_binds_nobody() {
    let place = Place::new().await;
    let (at, visitor) = (now(), browser(2));
    let clicks = (0..5)
        .map(|link| place.click(0, link, visitor, at))
        .collect();
    place.ship(clicks).await;
    place.ship(vec![place.click(1, 3, browser(3), now())]).await;
    let revised = place.events("engagement.reclassified", 5).await;
    let first = &revised[0];
    assert_eq!(
        (&first["data"]["was"], &first["data"]["actor"]),
        (&json!("human"), &json!("machine"))
    );
    assert_eq!(first["data"]["machine_reasons"], json!(["burst"]));
    let clicked = place.events("email.clicked", 6).await;
    assert!(
        clicked
            .iter()
            .any(|event| event["id"] == first["data"]["event_id"])
    );
    let path = format!("/v1/batches/{}", place.batch);
    let settled = |batch: &Value| batch["counters"]["clicked_total_human"] == 1;
    let counters = place.once(&path, settled).await["counters"].clone();
    assert_eq!(counters["clicked_total"], 6);
    assert_eq!(
        (
            &counters["clicked_unique"],
            &counters["clicked_unique_human"]
        ),
        (&json!(2), &json!(1))
    );
    let bound = place.events("identity.bound", 1).await;
    assert_eq!(bound.len(), 1);
    assert_eq!(bound[0]["recipient"]["prospect_id"], "p-1");
    let story = place
        .service
        .api
        .get(&format!("/v1/messages/{}.0", place.batch))
        .await
        .json();
    let actors: Vec<_> = story["engagement"]
        .as_array()
        .expect("hits")
        .iter()
        .map(|hit| &hit["actor"])
        .collect();
    assert_eq!(actors, vec!["machine"; 5]);
    place.service.stop().await;
}

#[tokio::test]
async fn callers_tell_what_only_they_know_and_search() {
    let place = Place::new().await;
    place
        .ship(vec![
            place.click(0, 0, browser(1), now()),
            place.click(1, 0, browser(2), now()),
        ])
        .await;
    let reply =
        json!({"type": "email.replied", "message_id": format!("{}.0", place.batch), "id": "r-1"});
    for _ in 0..2 {
        assert_eq!(place.tell(&reply).await, (202, json!({"id": "r-1"})));
    }
    let sale =
        json!({"type": "conversion", "prospect_id": "p-1", "data": {"yen": 9800}, "id": "c-1"});
    for _ in 0..2 {
        assert_eq!(place.tell(&sale).await.0, 202);
    }
    for (bad, code) in [
        (
            json!({"type": "email.opened", "prospect_id": "p"}),
            "invalid_field",
        ),
        (json!({"type": "conversion"}), "invalid_field"),
        (
            json!({"type": "conversion", "prospect_id": "p", "more": 1}),
            "unknown_field",
        ),
        (
            json!({"type": "email.replied", "message_id": format!("{}.77", place.batch)}),
            "invalid_field",
        ),
    ] {
        let (status, problem) = place.tell(&bad).await;
        assert_eq!((status, &problem["code"]), (422, &json!(code)), "{bad}");
    }
    let answered = |person: &Value| person["replied"] == json!(true);
    place.once("/v1/prospects/p-0", answered).await;
    let sold = |person: &Value| person["score"] == json!(5 + 30);
    let person = place.once("/v1/prospects/p-1", sold).await;
    assert_eq!(person["mailable"], true);
    assert_eq!(place.events("email.replied", 1).await.len(), 1);
    let conversions = place.events("conversion", 1).await;
    assert_eq!(
        (conversions.len(), &conversions[0]["data"]["yen"]),
        (1, &json!(9800))
    );
    let counters = place
        .service
        .api
        .get(&format!("/v1/batches/{}", place.batch))
        .await
        .json();
    assert_eq!(counters["counters"]["replied"], 1);
    people_are_found(&place).await;
    place.service.stop().await;
}

/// Who clicked, replied and bought is found by it, in each form.
async fn people_are_found(place: &Place) {
    for (query, expected) in [
        ("clicked=true&replied=false", &["p-1"][..]),
        ("campaign=spring&clicked=true", &["p-0", "p-1"]),
        ("campaign=autumn", &[]),
        ("min_score=35", &["p-1"]),
        ("inactive_for=30d", &[]),
        ("status=mailable&limit=1", &["p-0"]),
        ("status=invalid_address", &[]),
    ] {
        let page = place
            .service
            .api
            .get(&format!("/v1/prospects?{query}"))
            .await
            .json();
        let items = page["items"].as_array().unwrap_or_else(|| panic!("{page}"));
        let found: Vec<_> = items
            .iter()
            .filter_map(|item| item["prospect_id"].as_str())
            .collect();
        assert_eq!(found, expected, "{query}");
    }
    let lines = place
        .service
        .api
        .call(
            Method::GET,
            "/v1/prospects",
            &[("accept", "application/x-ndjson")],
            Bytes::new(),
        )
        .await;
    assert_eq!(
        lines
            .bytes
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .count(),
        2
    );
    let table = place
        .service
        .api
        .call(
            Method::GET,
            "/v1/prospects",
            &[("accept", "text/csv")],
            Bytes::new(),
        )
        .await;
    assert!(table.bytes.starts_with(
        b"prospect_id,email,score,status,last_human_activity,opened,clicked,replied\n"
    ));
    let bad = place
        .service
        .api
        .get("/v1/prospects?status=nice")
        .await
        .problem();
    assert_eq!((bad.0, bad.1.as_str()), (422, "invalid_field"));
}

#[tokio::test]
async fn who_follows_every_link_of_a_mail_reads_no_mail() {
    let link = |n: u8| format!("<a href=\"https://shop.example/{n}\">{n}</a>");
    let html: String = (0..3).map(link).collect();
    let place = Place::with(json!({ "html": html, "tracking": {"clicks": true} })).await;
    let began = now() - Duration::from_secs(50);
    let at = |seconds| began + Duration::from_secs(seconds);
    // Neither in order nor at once; and somebody who leaves one link out.
    for (index, links) in [(0, &[2, 0, 1][..]), (1, &[2, 0, 2])] {
        let clicks = links.iter().zip([0, 15, 40]);
        let clicks =
            clicks.map(|(link, seconds)| place.click(index, *link, browser(9), at(seconds)));
        place.ship(clicks.collect()).await;
    }
    let reclassified = place.events("engagement.reclassified", 3).await;
    assert_eq!(reclassified.len(), 3, "{reclassified:?}");
    for event in &reclassified {
        assert_eq!(event["recipient"]["prospect_id"], "p-0", "{event}");
        assert_eq!(
            event["data"]["machine_reasons"],
            json!(["all_links"]),
            "{event}"
        );
    }
    let bound = place.events("identity.bound", 1).await;
    assert_eq!(bound[0]["data"]["prospect_id"], "p-1");
}

#[tokio::test]
async fn what_a_click_leads_to_is_not_who_had_the_browser_before() {
    let place = Place::new().await;
    place.ship(vec![place.click(0, 0, browser(5), now())]).await;
    place.events("identity.bound", 1).await;
    place
        .ship(vec![Place::page(browser(5), "https://shop.example/first")])
        .await;
    let of = |person: &str| format!("/v1/prospects/{person}");
    let pages = |person: &Value| {
        let entries = person["timeline"].as_array().expect("a timeline").iter();
        entries
            .filter(|entry| entry["type"] == "page.viewed")
            .count()
    };
    place.once(&of("p-0"), |person| pages(person) == 1).await;
    // The page is told while the click still waits for company.
    let click = place.click(1, 0, browser(5), now());
    place
        .ship(vec![
            click,
            Place::page(browser(5), "https://shop.example/second"),
        ])
        .await;
    let bound = place.events("identity.bound", 2).await;
    assert_eq!(bound[1]["data"]["pages_joined"], 1, "{}", bound[1]);
    let second = place.once(&of("p-1"), |person| pages(person) == 1).await;
    assert!(second.to_string().contains("/second"), "{second}");
    let first = place.once(&of("p-0"), |person| pages(person) == 1).await;
    assert!(first.to_string().contains("/first"), "{first}");
}
