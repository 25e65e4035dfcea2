//! Read-outs and steering.

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Service, batch, recipients};

async fn submitted(service: &Service, count: usize) -> String {
    let accepted = service
        .api
        .submit(&batch(&recipients(count, 2)))
        .await
        .json();
    accepted["id"]
        .as_str()
        .unwrap_or_else(|| panic!("{accepted}"))
        .to_owned()
}

fn items(page: &Value) -> &Vec<Value> {
    page["items"].as_array().unwrap_or_else(|| panic!("{page}"))
}

#[tokio::test]
async fn batches_are_listed_newest_first_in_pages() {
    let service = Service::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.insert(0, submitted(&service, 1).await);
    }
    let mut found = Vec::new();
    let mut path = "/v1/batches?limit=2&state=in_progress&campaign=spring".to_owned();
    loop {
        let page = service.api.get(&path).await.json();
        found.extend(
            items(&page)
                .iter()
                .map(|batch| batch["id"].as_str().expect("id").to_owned()),
        );
        let Some(cursor) = page["next_cursor"].as_str() else {
            break;
        };
        path = format!("/v1/batches?limit=2&cursor={cursor}");
    }
    // Ids of one millisecond are in no order of their own.
    found.sort_unstable();
    ids.sort_unstable();
    assert_eq!(found, ids);
    assert!(items(&service.api.get("/v1/batches?campaign=autumn").await.json()).is_empty());
}

#[tokio::test]
async fn recipients_come_in_pages_or_whole() {
    let service = Service::start().await;
    let id = submitted(&service, 2_500).await;
    let path = format!("/v1/batches/{id}/recipients");
    let page = service.api.get(&path).await.json();
    assert_eq!(items(&page).len(), 100);
    let row = &items(&page)[0];
    let mut names: Vec<_> = row
        .as_object()
        .expect("a row")
        .keys()
        .map(String::as_str)
        .collect();
    names.sort_unstable();
    let mut contract = [
        "index",
        "message_id",
        "email",
        "prospect_id",
        "variant",
        "status",
        "attempts",
        "next_attempt_at",
        "smtp_code",
        "enhanced_code",
        "class",
        "blame",
        "reply",
        "host",
        "accepted_at",
        "delivered_at",
        "opened_at",
        "clicked_at",
        "complained_at",
        "unsubscribed_at",
        "replied_at",
    ];
    contract.sort_unstable();
    assert_eq!(names, contract);
    assert_eq!(row["message_id"], format!("{id}.0"));
    let mut seen = 0;
    let mut next = Some(String::new());
    while let Some(cursor) = next {
        let page = service
            .api
            .get(&format!("{path}?limit=1000{cursor}"))
            .await
            .json();
        for row in items(&page) {
            assert_eq!(row["index"], seen);
            seen += 1;
        }
        next = page["next_cursor"]
            .as_str()
            .map(|cursor| format!("&cursor={cursor}"));
    }
    assert_eq!(seen, 2_500);
    let csv = service
        .api
        .call(Method::GET, &path, &[("accept", "text/csv")], Bytes::new())
        .await
        .bytes;
    let text = String::from_utf8(csv.to_vec()).expect("text");
    assert!(
        text.starts_with("index,message_id,email,prospect_id,variant,status,"),
        "{:.200}",
        text
    );
    assert_eq!(text.lines().count(), 2_501);
    let only = service
        .api
        .get(&format!("{path}?domain=d1.example&limit=1000"))
        .await
        .json();
    assert!(items(&only).iter().all(|row| {
        row["email"]
            .as_str()
            .expect("email")
            .ends_with("@d1.example")
    }));
    assert!(!items(&only).is_empty());
}

#[tokio::test]
async fn a_batch_is_steered() {
    let service = Service::start().await;
    let id = submitted(&service, 3).await;
    let change = |what: &'static str| {
        let (api, path) = (service.api.clone(), format!("/v1/batches/{id}/{what}"));
        async move { api.post(&path).await }
    };
    for (what, state) in [
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "in_progress"),
        ("resume", "in_progress"),
        ("pause", "paused"),
    ] {
        let reply = change(what).await;
        assert_eq!(
            (reply.status, &reply.json()["state"]),
            (StatusCode::OK, &json!(state)),
            "{what}"
        );
    }
    let archived = change("archive").await.json();
    assert_eq!(archived["archived"], true);
    assert_eq!(change("unarchive").await.json()["archived"], false);
    let cancelled = change("cancel").await.json();
    assert_eq!(cancelled["state"], "cancelled");
    // What a connection is at may still end; nothing else is left.
    let ended = ["cancelled", "in_flight"].map(|name| cancelled[name].as_u64().expect("a number"));
    assert_eq!(ended.iter().sum::<u64>(), 3);
    assert_eq!(cancelled["counters"]["cancelled"], ended[0]);
    assert_eq!(
        change("cancel").await.status,
        StatusCode::OK,
        "repeating is no error"
    );
    assert_eq!(change("pause").await.problem().1, "invalid_state");
    assert_eq!(
        service
            .api
            .post("/v1/batches/01KA0000000000000000000000/pause")
            .await
            .problem()
            .1,
        "not_found"
    );
}

#[tokio::test]
async fn what_is_scheduled_is_cancelled_whole() {
    let service = Service::start().await;
    let mut later = batch(&recipients(3, 2));
    later["send_at"] = json!("2999-01-01T00:00:00Z");
    let id = service.api.submit(&later).await.json()["id"].clone();
    let path = format!("/v1/batches/{}/cancel", id.as_str().expect("id"));
    let cancelled = service.api.post(&path).await.json();
    assert_eq!(
        (&cancelled["cancelled"], &cancelled["in_flight"]),
        (&json!(3), &json!(0))
    );
    assert_eq!(cancelled["counters"]["cancelled"], 3);
}

#[tokio::test]
async fn a_message_and_a_person_have_a_story() {
    let service = Service::start().await;
    let id = submitted(&service, 2).await;
    let story = service
        .api
        .get(&format!("/v1/messages/{id}.1"))
        .await
        .json();
    assert_eq!(
        (&story["email"], &story["campaign"], &story["message_id"]),
        (
            &json!("a1@d1.example"),
            &json!("spring"),
            &json!(format!("{id}.1"))
        )
    );
    assert_eq!(story["engagement"], json!([]));
    for unknown in [format!("{id}.7"), format!("{id}.01"), "x".to_owned()] {
        assert_eq!(
            service
                .api
                .get(&format!("/v1/messages/{unknown}"))
                .await
                .problem()
                .0,
            404
        );
    }
    let person = service.api.get("/v1/recipients/A1@D1.EXAMPLE").await.json();
    assert_eq!(
        (&person["email"], &person["delivery_status"]),
        (&json!("a1@d1.example"), &json!("unconfirmed"))
    );
    assert_eq!(
        (
            person["messages"].as_array().map(Vec::len),
            &person["suppressions"]
        ),
        (Some(1), &json!([]))
    );
}

#[tokio::test]
async fn suppressions_are_kept_without_case_and_by_list() {
    let service = Service::start().await;
    let put = |body: &'static str| {
        let api = service.api.clone();
        async move {
            api.call(
                Method::PUT,
                "/v1/suppressions/A@X.example",
                &[],
                Bytes::from_static(body.as_bytes()),
            )
            .await
        }
    };
    let first = put("{\"reason\": \"unsubscribed\", \"list\": \"news\"}").await;
    assert_eq!(first.status, StatusCode::OK);
    let entry = first.json();
    assert_eq!(
        (
            &entry["email"],
            &entry["list"],
            &entry["reason"],
            &entry["source"]
        ),
        (
            &json!("a@x.example"),
            &json!("news"),
            &json!("unsubscribed"),
            &json!("api")
        )
    );
    assert_eq!(put("").await.json()["reason"], "manual");
    assert_eq!(
        put("{\"reason\": \"erased\"}").await.problem().2,
        ["/reason invalid_field"]
    );
    assert_eq!(
        put("{\"reson\": \"manual\"}").await.problem().2,
        ["/reson unknown_field"]
    );
    let path = "/v1/suppressions/a@x.EXAMPLE";
    assert_eq!(items(&service.api.get(path).await.json()).len(), 2);
    assert_eq!(
        items(&service.api.get("/v1/suppressions").await.json()).len(),
        2
    );
    let delete = |path: String| {
        let api = service.api.clone();
        async move {
            api.call(Method::DELETE, &path, &[], Bytes::new())
                .await
                .status
        }
    };
    assert_eq!(
        delete(format!("{path}?list=news")).await,
        StatusCode::NO_CONTENT
    );
    assert_eq!(items(&service.api.get(path).await.json()).len(), 1);
    assert_eq!(delete(path.to_owned()).await, StatusCode::NO_CONTENT);
    assert_eq!(service.api.get(path).await.problem().1, "not_found");
    let kinds = service
        .api
        .get("/v1/events?types=suppression.added,suppression.removed")
        .await
        .json();
    assert_eq!(kinds["events"].as_array().map(Vec::len), Some(4));
}

#[tokio::test]
async fn events_are_followed_by_cursor_and_waited_for() {
    let service = Service::start().await;
    let start = service.api.get("/v1/events").await.json();
    assert_eq!(start["events"], json!([]));
    let cursor = start["next"].as_str().expect("a cursor").to_owned();
    let api = service.api.clone();
    let path = format!("/v1/events?after={cursor}&types=batch.accepted&wait=30s");
    let waiting = async move { api.get(&path).await.json() };
    let (told, id) = tokio::join!(waiting, submitted(&service, 1));
    assert_eq!(told["events"][0]["batch_id"], id);
    let rest = format!("/v1/events?after={cursor}&batch={id}&types=batch.started",);
    let rest = service.api.get(&rest).await.json();
    assert_eq!(rest["events"][0]["type"], "batch.started");
    assert_eq!(
        service
            .api
            .get("/v1/events?after=nonsense")
            .await
            .problem()
            .2,
        ["/after invalid_field"]
    );
    assert_eq!(
        service
            .api
            .get("/v1/events?types=email.lost")
            .await
            .problem()
            .2,
        ["/types invalid_field"]
    );
}

/// Values that no parameter takes, each of a route with the parameter.
const BAD_VALUES: &[(&str, &str, &[&str])] = &[
    (
        "GET /v1/batches",
        "limit",
        &["0", "1001", "-1", "1e2", "x", "99999999999999999999"],
    ),
    (
        "GET /v1/batches",
        "cursor",
        &["x", "0", "%00", "e1-5", "01JD"],
    ),
    ("GET /v1/batches", "state", &["lost", "Paused"]),
    ("GET /v1/batches/ID/recipients", "limit", &["0", "1001"]),
    (
        "GET /v1/batches/ID/recipients",
        "cursor",
        &["x", "-1", "%2B1", "4294967296", "1.5"],
    ),
    ("GET /v1/batches/ID/recipients", "status", &["lost"]),
    ("GET /v1/batches/ID/recipients", "opened", &["", "1", "yes"]),
    ("GET /v1/batches/ID/recipients", "clicked", &["", "TRUE"]),
    (
        "GET /v1/batches/ID/recipients",
        "domain",
        &["a@b", "a%20b", "%00"],
    ),
    (
        "GET /v1/events",
        "after",
        &[
            "x",
            "77",
            "e1-",
            "e1--1",
            "e1-%2B1",
            "e1-01",
            "e2-1",
            "e1-9223372036854775807",
            "e1-99999999999",
            "%00",
        ],
    ),
    (
        "GET /v1/events",
        "types",
        &["email.lost", "email.clicked,x"],
    ),
    ("GET /v1/events", "batch", &["x", "0"]),
    ("GET /v1/events", "limit", &["0", "1001"]),
    (
        "GET /v1/events",
        "wait",
        &["5", "-1s", "1parsec", "99999999999999999999d"],
    ),
    ("GET /v1/suppressions", "limit", &["0", "1001"]),
    (
        "GET /v1/suppressions",
        "cursor",
        &["x", "%00", "e1-5", "a%20b"],
    ),
    ("DELETE /v1/suppressions/a@x.example", "list", &[""]),
    ("POST /v1/batches", "dry_run", &["", "1", "yes"]),
];

/// Every route that takes a key, without the parameters that it knows.
const ROUTES: &[&str] = &[
    "GET /v1/batches",
    "POST /v1/batches",
    "GET /v1/batches/ID",
    "POST /v1/batches/ID/pause",
    "POST /v1/batches/ID/resume",
    "POST /v1/batches/ID/cancel",
    "POST /v1/batches/ID/archive",
    "POST /v1/batches/ID/unarchive",
    "GET /v1/batches/ID/recipients",
    "GET /v1/batches/ID/report",
    "GET /v1/messages/ID.0",
    "GET /v1/recipients/a@x.example",
    "DELETE /v1/recipients/a@x.example",
    "GET /v1/events",
    "GET /v1/suppressions",
    "GET /v1/suppressions/a@x.example",
    "PUT /v1/suppressions/a@x.example",
    "DELETE /v1/suppressions/a@x.example",
    "GET /v1/tracking/a@x.example",
    "PUT /v1/tracking/a@x.example",
    "DELETE /v1/tracking/a@x.example",
    "POST /v1/classify",
];

#[tokio::test]
async fn what_is_asked_for_wrongly_is_said_and_nothing_is_done() {
    let service = Service::start().await;
    let id = submitted(&service, 1).await;
    let ask = async |route: &str, query: &str| {
        let (method, path) = route
            .replace("ID", &id)
            .split_once(' ')
            .map(|(m, p)| (m.to_owned(), p.to_owned()))
            .expect("a route");
        let method = method.parse().expect("a method");
        let body = if route == "POST /v1/batches" {
            batch(&recipients(1, 1)).to_string().into()
        } else {
            Bytes::new()
        };
        let path = format!("{path}?{query}");
        let headers = [("content-type", "application/json")];
        service
            .api
            .call(method, &path, &headers, body)
            .await
            .problem()
    };
    let refused = |code: &str, name: &str| (422, code.to_owned(), vec![format!("/{name} {code}")]);
    for (route, name, values) in BAD_VALUES {
        for value in *values {
            let found = ask(route, &format!("{name}={value}")).await;
            assert_eq!(
                found,
                refused("invalid_field", name),
                "{route} {name}={value}"
            );
        }
    }
    for route in ROUTES {
        let found = ask(route, "nope=1").await;
        assert_eq!(found, refused("unknown_field", "nope"), "{route}");
    }
    let (status, _, errors) = ask("GET /v1/events", "limit=1&limit=2").await;
    assert_eq!(
        (status, errors),
        (422, vec!["/limit unknown_field".to_owned()])
    );
    let page = service.api.get("/v1/suppressions/nobody").await.problem();
    assert_eq!(page, refused("invalid_field", "email"));
    // Nothing was submitted, paused, cancelled or suppressed.
    let batches = service.api.get("/v1/batches").await.json();
    assert_eq!(items(&batches).len(), 1);
    assert_eq!(batches["items"][0]["archived"], false);
    assert!(items(&service.api.get("/v1/suppressions").await.json()).is_empty());
    // A stream with a bad cursor is refused before it begins.
    let headers = [("accept", "text/event-stream"), ("last-event-id", "x")];
    let stream = service
        .api
        .call(Method::GET, "/v1/events", &headers, Bytes::new())
        .await;
    assert_eq!(stream.problem(), refused("invalid_field", "after"));
}

#[tokio::test]
async fn every_cursor_that_was_given_is_taken() {
    let service = Service::start().await;
    let id = submitted(&service, 3).await;
    submitted(&service, 1).await;
    for email in ["a@x.example", "b@x.example"] {
        let path = format!("/v1/suppressions/{email}");
        let headers = [("content-type", "application/json")];
        let put = service.api.call(Method::PUT, &path, &headers, Bytes::new());
        assert_eq!(put.await.status, 200);
    }
    for (path, count) in [
        ("/v1/batches".to_owned(), 2),
        (format!("/v1/batches/{id}/recipients"), 3),
        ("/v1/suppressions".to_owned(), 2),
    ] {
        let (mut found, mut cursor) = (0, String::new());
        loop {
            let page = service.api.get(&format!("{path}?limit=1{cursor}")).await;
            assert_eq!(page.status, 200, "{page:?}");
            let page = page.json();
            found += items(&page).len();
            let Some(next) = page["next_cursor"].as_str() else {
                break;
            };
            cursor = format!("&cursor={}", next.replace(' ', "%20"));
        }
        assert_eq!(found, count, "{path}");
    }
    let all = service.api.get("/v1/events?limit=1000").await.json();
    let (mut found, mut cursor) = (Vec::new(), String::new());
    while found.len() < all["events"].as_array().expect("events").len() {
        let page = service
            .api
            .get(&format!("/v1/events?limit=1{cursor}"))
            .await
            .json();
        found.extend(page["events"].as_array().expect("events").clone());
        cursor = format!("&after={}", page["next"].as_str().expect("a cursor"));
    }
    assert_eq!(json!(found), all["events"]);
}

#[tokio::test]
async fn one_account_does_not_see_the_other() {
    let service = Service::start().await;
    let id = submitted(&service, 1).await;
    let other = service.api.with_key("hk_other");
    for path in ["", "/recipients", "/report"] {
        assert_eq!(
            other
                .get(&format!("/v1/batches/{id}{path}"))
                .await
                .problem()
                .0,
            404,
            "{path}"
        );
    }
    assert_eq!(
        other
            .post(&format!("/v1/batches/{id}/cancel"))
            .await
            .problem()
            .0,
        404
    );
    assert_eq!(
        other.get(&format!("/v1/messages/{id}.0")).await.problem().0,
        404
    );
    assert!(items(&other.get("/v1/batches").await.json()).is_empty());
    assert_eq!(other.get("/v1/events").await.json()["events"], json!([]));
    assert_eq!(
        other.get("/v1/recipients/a0@d0.example").await.json()["messages"],
        json!([])
    );
}

#[tokio::test]
async fn a_reply_is_classified_and_a_report_has_rates() {
    let service = Service::start().await;
    let post = |body: &'static str| {
        let api = service.api.clone();
        async move {
            api.call(
                Method::POST,
                "/v1/classify",
                &[],
                Bytes::from_static(body.as_bytes()),
            )
            .await
        }
    };
    let read = post("{\"reply\": \"550 5.1.1 No such user\"}").await.json();
    assert_eq!(
        (&read["class"], &read["blame"], &read["action"]),
        (
            &json!("invalid_mailbox"),
            &json!("recipient"),
            &json!("bounce")
        )
    );
    assert_eq!(
        (&read["rule"], &read["scope"], &read["suppress"]),
        (
            &json!("no-such-user"),
            &json!("recipient"),
            &json!("invalid_address")
        )
    );
    assert_eq!(read["rules_version"].as_str().map(str::len), Some(16));
    let lines = "{\"reply\": \"451-4.7.1 Greylisted,\\r\\n451 4.7.1 try again in 5 minutes\"}";
    let read = post(lines).await.json();
    assert_eq!(
        (&read["class"], &read["action"], &read["retry_after"]),
        (&json!("greylisted"), &json!("retry"), &json!("5m"))
    );
    // The same words mean another thing at another place.
    let unavailable = |host: &str| {
        let reply = "550 Requested action not taken: mailbox unavailable";
        format!("{{\"reply\": \"{reply}\", \"{host}\"}}").leak()
    };
    let read = post(unavailable("host\": \"x.olc.protection.outlook.com")).await;
    assert_eq!(read.json()["class"], json!("invalid_mailbox"));
    let read = post(unavailable("provider\": \"gmx")).await;
    assert_eq!(read.json()["rule"], json!("gmx-no-such-user"));
    let read = post(unavailable("host\": \"mx.x.example")).await;
    assert_eq!(
        (&read.json()["class"], &read.json()["rule"]),
        (&json!("other"), &json!(null))
    );
    let blocked = "{\"reply\": \"554 IP=192.0.2.1 - A problem occurred. (Ask your postmaster for help) (BL)\"}";
    let read = post(blocked).await.json();
    assert_eq!(
        (&read["signal"], &read["pause"], &read["suppress"]),
        (&json!("block"), &json!("12h"), &json!(null))
    );
    assert_eq!(
        post("{\"reply\": \"250 ok\", \"host\": \"\"}")
            .await
            .problem()
            .2,
        ["/host invalid_field"]
    );
    assert_eq!(
        post("{\"reply\": \"250 ok\"}").await.problem().2,
        ["/reply invalid_field"]
    );
    assert_eq!(
        post("{\"reply\": \"550 x\", \"mx\": \"y\"}")
            .await
            .problem()
            .2,
        ["/mx unknown_field"]
    );
    assert_eq!(
        post("{\"reply\": \"hello\"}").await.problem().2,
        ["/reply invalid_field"]
    );
    assert_eq!(post("{\"reply\": ").await.problem().1, "malformed_body");
    let id = submitted(&service, 1).await;
    let report = service
        .api
        .get(&format!("/v1/batches/{id}/report"))
        .await
        .json();
    assert_eq!(
        (
            &report["counters"]["accepted"],
            &report["rates"]["delivered"]
        ),
        (&json!(1), &json!(0.0))
    );
}

#[tokio::test]
async fn events_are_streamed_until_the_process_ends() {
    let service = Service::start().await;
    let id = submitted(&service, 1).await;
    let headers = [("accept", "text/event-stream")];
    let (api, path) = (
        service.api.clone(),
        format!("/v1/events?batch={id}&types=batch.accepted,batch.paused"),
    );
    let whole = async { api.call(Method::GET, &path, &headers, Bytes::new()).await };
    let told = async {
        // The stream has told its first page when it asks for the next.
        service.asked_for_events(2).await;
        service.api.post(&format!("/v1/batches/{id}/pause")).await;
        service.stop().await;
    };
    let (stream, ()) = tokio::join!(whole, told);
    assert_eq!(stream.headers["content-type"], "text/event-stream");
    let text = String::from_utf8(stream.bytes.to_vec()).expect("text");
    let fields: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once(": "))
        .collect();
    let kinds: Vec<_> = fields
        .iter()
        .filter(|(name, _)| *name == "event")
        .map(|(_, kind)| *kind)
        .collect();
    assert_eq!(kinds, ["batch.accepted", "batch.paused"]);
    let ids: Vec<_> = fields
        .iter()
        .filter(|(name, _)| *name == "id")
        .map(|(_, id)| *id)
        .collect();
    assert_eq!(
        ids.len(),
        2,
        "each page ends with the cursor after it: {text}"
    );
}

#[tokio::test]
async fn an_erased_person_is_known_by_the_suppression_alone() {
    let service = Service::start().await;
    let id = submitted(&service, 2).await;
    let path = "/v1/recipients/A1@D1.EXAMPLE";
    for _ in 0..2 {
        let erased = service.api.call(Method::DELETE, path, &[], Bytes::new());
        assert_eq!(erased.await.status, StatusCode::NO_CONTENT);
    }
    let person = service.api.get(path).await.json();
    assert_eq!(
        (&person["delivery_status"], &person["messages"]),
        (&json!("unconfirmed"), &json!([]))
    );
    let kept = person["suppressions"].as_array().expect("a list");
    assert_eq!(kept.len(), 1, "{person}");
    assert_eq!(kept[0]["reason"], "erased");
    let listed = service.api.get("/v1/suppressions").await.json();
    assert!(!listed.to_string().contains("a1@"), "{listed}");
    let batch = service.api.get(&format!("/v1/batches/{id}")).await.json();
    assert_eq!(batch["counters"]["suppressed"], 1, "{batch}");
    let rows = format!("/v1/batches/{id}/recipients");
    let rows = service.api.get(&rows).await.json();
    assert!(!rows.to_string().contains("a1@"), "{rows}");
    assert_eq!(items(&rows).len(), 2);
    let bad = "/v1/recipients/nobody";
    let refused = service.api.call(Method::DELETE, bad, &[], Bytes::new());
    assert_eq!(refused.await.problem().0, 422);
}
