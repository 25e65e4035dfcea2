//! Held batches: filled in parts by many callers, then started.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures_util::future::join_all;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Caller, Reply, Service, batch, recipients};

const NDJSON: &str = "application/x-ndjson";

/// A batch that waits for its parts.
async fn held(api: &Caller) -> String {
    let mut submitted = batch(&json!([]));
    submitted["hold"] = json!(true);
    submitted
        .as_object_mut()
        .expect("an object")
        .remove("recipients");
    let reply = api.submit(&submitted).await;
    let accepted = reply.json();
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{accepted}");
    assert_eq!(
        (&accepted["state"], &accepted["accepted"]),
        (&json!("open"), &json!(0))
    );
    accepted["id"].as_str().expect("an id").to_owned()
}

async fn add(api: &Caller, id: &str, media: &str, body: impl Into<Bytes>) -> Reply {
    let path = format!("/v1/batches/{id}/recipients");
    api.call(Method::POST, &path, &[("content-type", media)], body.into())
        .await
}

fn lines(emails: impl Iterator<Item = String>) -> String {
    emails
        .map(|email| json!({"email": email}).to_string() + "\n")
        .collect()
}

#[tokio::test]
async fn parts_in_every_form_are_added_and_the_batch_is_started() {
    let service = Service::start().await;
    let (api, id) = (&service.api, held(&service.api).await);
    let body = json!({"recipients": [{"email": "a@x.example"}, {"email": "nobody"}, {"email": "b@x.example"}]});
    let reply = add(api, &id, "application/json", body.to_string()).await;
    let added = reply.json();
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{added}");
    assert_eq!(
        (
            &added["first_index"],
            &added["accepted"],
            &added["rejected_count"]
        ),
        (&json!(0), &json!(2), &json!(1))
    );
    assert_eq!(
        (
            &added["rejected"][0]["index"],
            &added["rejected"][0]["code"]
        ),
        (&json!(1), &json!("invalid_address"))
    );
    let names: BTreeSet<&str> = added
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        names,
        BTreeSet::from(["first_index", "accepted", "rejected", "rejected_count"])
    );

    // An address that came before, in whatever spelling.
    let body = lines(
        ["c@x.example", "A@X.example", "d@x.example"]
            .map(str::to_owned)
            .into_iter(),
    );
    let added = add(api, &id, NDJSON, body).await.json();
    assert_eq!(
        (&added["first_index"], &added["accepted"]),
        (&json!(3), &json!(2)),
        "{added}"
    );
    assert_eq!(
        (
            &added["rejected"][0]["index"],
            &added["rejected"][0]["code"]
        ),
        (&json!(4), &json!("duplicate"))
    );
    let table = "email,name,prospect_id,points\r\ne@x.example,E,p-1,3\r\nd@x.example,,,\r\n";
    let added = add(api, &id, "text/csv; charset=utf-8", table).await.json();
    assert_eq!(
        (
            &added["first_index"],
            &added["accepted"],
            &added["rejected_count"]
        ),
        (&json!(6), &json!(1), &json!(1)),
        "{added}"
    );

    is_open_with_five(api, &id).await;
    for _ in 0..2 {
        let started = api.post(&format!("/v1/batches/{id}/start")).await;
        assert_eq!(
            (started.status, &started.json()["state"]),
            (StatusCode::OK, &json!("in_progress"))
        );
    }
    let late = add(api, &id, NDJSON, "{\"email\":\"z@x.example\"}").await;
    assert_eq!(
        (late.status, late.problem().1),
        (StatusCode::CONFLICT, "invalid_state".into())
    );
    let row = api.get(&format!("/v1/messages/{id}.6")).await.json();
    assert_eq!(row["email"], "e@x.example", "{row}");
    service.stop().await;
}

/// What is shown of a batch while it takes parts.
async fn is_open_with_five(api: &Caller, id: &str) {
    let found = api.get(&format!("/v1/batches/{id}")).await.json();
    assert_eq!(
        (&found["state"], &found["started_at"]),
        (&json!("open"), &Value::Null)
    );
    assert_eq!(
        (
            &found["counters"]["accepted"],
            &found["counters"]["scheduled"]
        ),
        (&json!(5), &json!(5))
    );
    let rows = api
        .get(&format!("/v1/batches/{id}/recipients?status=scheduled"))
        .await
        .json();
    let rows: Vec<_> = rows["items"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["index"].clone())
        .collect();
    assert_eq!(rows, [0, 2, 3, 5, 6]);
    let open = api.get("/v1/batches?state=open").await.json();
    assert_eq!(open["items"][0]["id"], id);
    let paused = api.post(&format!("/v1/batches/{id}/pause")).await;
    assert_eq!(paused.problem().1, "invalid_state");
}

#[tokio::test]
async fn a_refused_or_broken_part_leaves_no_gap() {
    let service = Service::start().await;
    let (api, id) = (&service.api, held(&service.api).await);
    let refused = [
        (
            "application/json",
            "{\"recipients\":[{\"email\":\"a@x.example\"},{\"mail\":1}]}",
            422,
            "unknown_field",
        ),
        (
            "application/json",
            "{\"recipients\":[], \"subject\":\"x\"}",
            422,
            "unknown_field",
        ),
        ("application/json", "{}", 422, "invalid_field"),
        (
            NDJSON,
            "{\"email\":\"a@x.example\"}\n{\"email\"",
            400,
            "malformed_body",
        ),
        ("text/csv", "name\nA\n", 422, "invalid_field"),
        ("text/csv", "email,a\na@x.example\n", 400, "malformed_body"),
        ("text/plain", "a@x.example", 415, "unsupported_media"),
    ];
    for (media, body, status, code) in refused {
        let reply = add(api, &id, media, body).await;
        let (found, name, _) = reply.problem();
        assert_eq!((found, name.as_str()), (status, code), "{body}");
    }
    let half: Bytes = lines((0..5_000).map(|n| format!("n{n}@x.example"))).into();
    let frames = [Ok(half), Err(std::io::Error::other("gone"))];
    let frames = frames
        .into_iter()
        .map(|chunk| chunk.map(hyper::body::Frame::data));
    let body = http_body_util::BodyExt::boxed_unsync(http_body_util::StreamBody::new(
        futures_util::stream::iter(frames),
    ));
    let path = format!("/v1/batches/{id}/recipients");
    let broken = api
        .send(Method::POST, &path, &[("content-type", NDJSON)], body)
        .await;
    assert!(broken.is_err(), "{broken:?}");
    let added = add(api, &id, NDJSON, "{\"email\":\"a@x.example\"}")
        .await
        .json();
    assert_eq!(
        (&added["first_index"], &added["accepted"]),
        (&json!(0), &json!(1)),
        "{added}"
    );
    let unknown = add(api, "01JD0000000000000000000000", NDJSON, "").await;
    assert_eq!(unknown.problem().1, "not_found");
    let other = api.with_key("hk_other");
    assert_eq!(
        add(&other, &id, NDJSON, "{}").await.problem().1,
        "not_found"
    );
    let reader = api.with_key("hk_read");
    assert_eq!(
        add(&reader, &id, NDJSON, "{}").await.problem().1,
        "forbidden_scope"
    );
}

#[tokio::test]
async fn fifty_callers_fill_one_batch_and_every_row_is_there_once() {
    let service = Service::start().await;
    let (api, id) = (&service.api, held(&service.api).await);
    // Each brings 40 of its own, and 10 that two others bring too.
    let part = |caller: usize| {
        let own = (0..40).map(move |n| format!("own{caller}-{n}@d{}.example", n % 7));
        let shared =
            (0..10).map(move |n| format!("shared{}@x.example", (caller * 10 / 3 + n) % 170));
        lines(own.chain(shared))
    };
    let calls = (0..50).map(|caller| add(api, &id, NDJSON, part(caller)));
    let replies = join_all(calls).await;
    let mut firsts = BTreeSet::new();
    let (mut accepted, mut rejected) = (0, 0);
    for reply in &replies {
        let added = reply.json();
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{added}");
        firsts.insert(added["first_index"].as_u64().expect("an index"));
        accepted += added["accepted"].as_u64().expect("a count");
        rejected += added["rejected_count"].as_u64().expect("a count");
    }
    let expected: BTreeSet<u64> = (0..50).map(|part| part * 50).collect();
    assert_eq!(firsts, expected);
    let distinct: BTreeSet<String> = (0..50)
        .flat_map(|caller| part(caller).lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    assert_eq!(
        (accepted, accepted + rejected),
        (distinct.len() as u64, 2_500)
    );
    api.post(&format!("/v1/batches/{id}/start")).await;
    let path = format!("/v1/batches/{id}/recipients");
    let all = api
        .call(Method::GET, &path, &[("accept", NDJSON)], Bytes::new())
        .await
        .bytes;
    let all: Vec<Value> = std::str::from_utf8(&all)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row"))
        .collect();
    let emails: BTreeSet<String> = all
        .iter()
        .map(|row| json!({"email": row["email"]}).to_string())
        .collect();
    assert_eq!((all.len(), emails), (distinct.len(), distinct));
    service.stop().await;
}

#[tokio::test]
async fn a_part_with_a_key_is_added_once() {
    let service = Service::start().await;
    let (api, id) = (&service.api, held(&service.api).await);
    let body = json!({"recipients": recipients(3, 1)}).to_string();
    let call = |id: String, body: String| {
        let headers = [
            ("content-type", "application/json"),
            ("idempotency-key", "part-1"),
        ];
        async move {
            let path = format!("/v1/batches/{id}/recipients");
            api.call(Method::POST, &path, &headers, body.into()).await
        }
    };
    let first = call(id.clone(), body.clone()).await;
    let again = call(id.clone(), body.clone()).await;
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_eq!(first.bytes, again.bytes);
    let other = call(id.clone(), body.replace("a0", "b0")).await;
    assert_eq!(other.problem().1, "idempotency_conflict");
    let elsewhere = held(api).await;
    assert_eq!(
        call(elsewhere, body).await.problem().1,
        "idempotency_conflict"
    );
    let found = api.get(&format!("/v1/batches/{id}")).await.json();
    assert_eq!(found["counters"]["accepted"], 3);
}

#[tokio::test]
async fn a_batch_may_be_held_with_some_and_ended_by_hand() {
    let service = Service::start().await;
    let api = &service.api;
    let mut submitted = batch(&recipients(3, 1));
    submitted["hold"] = json!(true);
    let accepted = api.submit(&submitted).await.json();
    let id = accepted["id"].as_str().expect("an id");
    assert_eq!(
        (&accepted["state"], &accepted["accepted"]),
        (&json!("open"), &json!(3))
    );
    let body = json!({"recipients": recipients(5, 1)}).to_string();
    let added = add(api, id, "application/json", body).await.json();
    assert_eq!(
        (
            &added["first_index"],
            &added["accepted"],
            &added["rejected_count"]
        ),
        (&json!(3), &json!(2), &json!(3))
    );
    let cancelled = api.post(&format!("/v1/batches/{id}/cancel")).await.json();
    assert_eq!(
        (&cancelled["state"], &cancelled["cancelled"]),
        (&json!("cancelled"), &json!(5))
    );
    let started = api.post(&format!("/v1/batches/{id}/start")).await;
    assert_eq!(started.problem().1, "invalid_state");

    let empty = held(api).await;
    let started = api.post(&format!("/v1/batches/{empty}/start")).await.json();
    assert_eq!(started["state"], "completed");
}

#[tokio::test]
async fn parts_with_many_time_zones_do_not_get_into_each_others_lots() {
    let service = Service::start().await;
    let api = &service.api;
    let mut submitted = batch(&json!([]));
    (submitted["hold"], submitted["window"]) =
        (json!(true), json!({"from": "09:00", "to": "21:00"}));
    submitted
        .as_object_mut()
        .expect("an object")
        .remove("recipients");
    let accepted = api.submit(&submitted).await.json();
    let id = accepted["id"].as_str().expect("an id").to_owned();
    let zones: Vec<String> = (-14..=12)
        .map(|hours| format!("Etc/GMT{hours:+}"))
        .collect();
    for part in 0..3 {
        let lines: String = zones
            .iter()
            .enumerate()
            .map(|(n, zone)| {
                let email = format!("a{n}@p{part}n{n}.example");
                json!({"email": email, "time_zone": zone}).to_string() + "\n"
            })
            .collect();
        let added = add(api, &id, NDJSON, lines).await.json();
        assert_eq!(added["accepted"], zones.len(), "{added}");
    }
    let rows = api
        .get(&format!("/v1/batches/{id}/recipients?limit=1000"))
        .await
        .json();
    let emails: BTreeSet<String> = rows["items"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["email"].to_string())
        .collect();
    assert_eq!(emails.len(), 3 * zones.len());
    service.stop().await;
}
