//! Batches in: what is accepted, what is rejected by index, what is refused.

use std::collections::BTreeSet;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::harness::{Reply, Service, batch, recipients};

#[tokio::test]
async fn a_batch_is_accepted_and_read_back() {
    let service = Service::start().await;
    let reply = service.api.submit(&batch(&recipients(3, 1))).await;
    let accepted = reply.json();
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{accepted}");
    let id = accepted["id"].as_str().expect("an id").to_owned();
    let expected = json!({
        "id": id, "state": "in_progress", "accepted": 3, "rejected": [], "rejected_count": 0,
        "links": {"tracked": 1, "skipped": []}, "warnings": [],
    });
    assert_eq!(accepted, expected);
    let found = service
        .api
        .get(&format!("/v1/batches/{}", id.to_lowercase()))
        .await
        .json();
    assert_eq!(
        (&found["state"], &found["campaign"], &found["list"]),
        (&json!("in_progress"), &json!("spring"), &json!("default"))
    );
    assert_eq!(found["counters"]["accepted"], 3);
    assert_eq!(
        service.api.get("/v1/batches").await.json()["items"][0]["id"],
        id
    );
    let events = service.api.get("/v1/events").await.json();
    let kinds: Vec<_> = events["events"]
        .as_array()
        .expect("events")
        .iter()
        .map(|event| event["type"].clone())
        .collect();
    assert_eq!(kinds, ["batch.accepted", "batch.started"]);
    let data = &events["events"][0]["data"];
    assert_eq!(
        (
            &data["first_index"],
            &data["count"],
            &data["rejected_count"]
        ),
        (&json!(0), &json!(3), &json!(0))
    );
    service.stop().await;
}

#[tokio::test]
async fn bad_recipients_are_rejected_by_index_and_the_rest_goes() {
    let service = Service::start().await;
    let mut submitted = batch(&json!([
        {"email": "a@x.example", "vars": {"points": 1}},
        {"email": "no-at-sign", "vars": {"points": 1}},
        {"email": "A@X.example", "vars": {"points": 1}},
        {"email": "b@x.example"},
        {"email": "c@x.example", "name": "C\r\nBcc: victim@x.example", "vars": {"points": 1}},
        {"email": "d@x.example", "vars": 7},
        {"email": "e@x.example", "vars": {"points": 2}},
    ]));
    submitted["subject"] = json!("{{ points }} points");
    let accepted = service.api.submit(&submitted).await.json();
    assert_eq!(
        (&accepted["accepted"], &accepted["rejected_count"]),
        (&json!(2), &json!(5)),
        "{accepted}"
    );
    let rejected: Vec<_> = accepted["rejected"]
        .as_array()
        .expect("rejected")
        .iter()
        .map(|rejection| {
            (
                rejection["index"].as_u64().expect("index"),
                rejection["code"].as_str().expect("code"),
            )
        })
        .collect();
    assert_eq!(
        rejected,
        [
            (1, "invalid_address"),
            (2, "duplicate"),
            (3, "missing_variable"),
            (4, "invalid_vars"),
            (5, "invalid_vars"),
        ]
    );
    assert_eq!(accepted["rejected"][0]["email"], "no-at-sign");
    let detail = accepted["rejected"][3]["detail"].as_str().expect("detail");
    assert!(detail.starts_with("/recipients/4/name"), "{detail}");
    let path = format!(
        "/v1/batches/{}/recipients",
        accepted["id"].as_str().expect("id")
    );
    let rows = service.api.get(&path).await.json();
    let rows: Vec<_> = rows["items"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| row["index"].clone())
        .collect();
    assert_eq!(rows, [0, 6], "rejected recipients take an index too");
}

#[tokio::test]
async fn when_all_are_rejected_the_batch_is_completed() {
    let service = Service::start().await;
    let reply = service
        .api
        .submit(&batch(&json!([{"email": "nobody"}])))
        .await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
    let accepted = reply.json();
    assert_eq!(
        (&accepted["state"], &accepted["accepted"]),
        (&json!("completed"), &json!(0))
    );
    let path = format!("/v1/batches/{}", accepted["id"].as_str().expect("id"));
    assert_eq!(service.api.get(&path).await.json()["state"], "completed");
}

#[tokio::test]
async fn the_first_thousand_rejections_are_listed_and_all_are_counted() {
    let service = Service::start().await;
    let bad: Value = (0..1_500).map(|_| json!({"email": "nobody"})).collect();
    let accepted = service.api.submit(&batch(&bad)).await.json();
    assert_eq!(accepted["rejected_count"], 1_500);
    assert_eq!(accepted["rejected"].as_array().map(Vec::len), Some(1_000));
}

#[tokio::test]
async fn duplicates_are_taken_when_the_batch_allows_them() {
    let service = Service::start().await;
    let mut twice = batch(&json!([{"email": "a@x.example"}, {"email": "A@x.example"}]));
    twice["allow_duplicates"] = json!(true);
    assert_eq!(service.api.submit(&twice).await.json()["accepted"], 2);
}

#[tokio::test]
async fn a_batch_for_later_is_scheduled() {
    let service = Service::start().await;
    let mut later = batch(&recipients(2, 1));
    later["send_at"] = json!("2999-01-01T00:00:00Z");
    let accepted = service.api.submit(&later).await.json();
    assert_eq!(accepted["state"], "scheduled");
    let found = service
        .api
        .get(&format!(
            "/v1/batches/{}",
            accepted["id"].as_str().expect("id")
        ))
        .await
        .json();
    assert_eq!(
        (&found["state"], &found["counters"]["scheduled"]),
        (&json!("scheduled"), &json!(2))
    );
    assert_eq!(found["send_at"], "2999-01-01T00:00:00.000Z");
}

/// Changes one thing of a good batch.
fn but(change: impl FnOnce(&mut Value)) -> Value {
    let mut changed = batch(&recipients(2, 1));
    change(&mut changed);
    changed
}

/// A submission, and the status, code and error that it is refused with.
type Refusal = (Value, u16, &'static str, &'static str);

fn refusals() -> Vec<Refusal> {
    vec![
        (
            but(|b| b["subjct"] = json!("x")),
            422,
            "unknown_field",
            "/subjct unknown_field",
        ),
        (
            but(|b| b["recipients"][1]["mail"] = json!("x")),
            422,
            "unknown_field",
            "/recipients/1/mail unknown_field",
        ),
        (
            but(|b| b["from"]["nme"] = json!("x")),
            422,
            "unknown_field",
            "/from/nme unknown_field",
        ),
        (
            but(|b| b["ab_test"] = json!({"mode": "winner"})),
            422,
            "invalid_field",
            "/ab_test invalid_field",
        ),
        (
            but(|b| b["pool"] = json!("marketing")),
            422,
            "invalid_field",
            "/pool invalid_field",
        ),
        (
            but(|b| b["rate"] = json!("fast")),
            422,
            "invalid_field",
            "/rate invalid_field",
        ),
        (
            but(|b| b["html"] = json!("{% if %}")),
            422,
            "template_error",
            "/html template_error",
        ),
        (
            but(|b| {
                b["html"] = json!(
                    "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
                )
            }),
            422,
            "template_error",
            "/html template_error",
        ),
    ]
}

fn more_refusals() -> Vec<Refusal> {
    vec![
        (
            but(|b| b["headers"] = json!({"Bcc": "x"})),
            422,
            "invalid_field",
            "/headers/Bcc invalid_field",
        ),
        (
            but(|b| b["from"]["name"] = json!("A\r\nBcc: v@x.example")),
            422,
            "invalid_field",
            "/from/name invalid_field",
        ),
        (
            but(|b| b["from"]["email"] = json!("news@elsewhere.example")),
            403,
            "forbidden_from",
            "/from/email forbidden_from",
        ),
        (
            but(|b| b["from"]["email"] = json!("news@keyless.example")),
            422,
            "no_dkim_key",
            "/from/email no_dkim_key",
        ),
        (
            but(|b| b["account"] = json!("other")),
            403,
            "forbidden_scope",
            "/account forbidden_scope",
        ),
        (
            but(|b| b["recipients"] = json!([])),
            422,
            "invalid_field",
            "/recipients invalid_field",
        ),
        (
            but(|b| b["recipients"][0] = json!("a@x.example")),
            422,
            "invalid_field",
            "/recipients/0 invalid_field",
        ),
        (
            but(|b| b["recipients"][1]["metadata"] = json!({"a": "x".repeat(1_100)})),
            422,
            "invalid_field",
            "/recipients/1/metadata invalid_field",
        ),
    ]
}

#[tokio::test]
async fn what_is_wrong_with_a_batch_refuses_the_call_and_names_the_field() {
    let service = Service::start().await;
    for (submitted, status, code, error) in refusals().into_iter().chain(more_refusals()) {
        let reply = service.api.submit(&submitted).await;
        assert_eq!(
            reply.problem(),
            (status, code.to_owned(), vec![error.to_owned()]),
            "{submitted}"
        );
    }
    service.api.assert_nothing_accepted().await;
    service.stop().await;
}

#[tokio::test]
async fn all_mistakes_are_told_at_once() {
    let service = Service::start().await;
    let reply = service
        .api
        .submit(&json!({"from": {"email": "x"}, "html": 7, "recipients": [{}], "hmtl": ""}))
        .await;
    let (status, _, errors) = reply.problem();
    let errors: BTreeSet<_> = errors.iter().map(String::as_str).collect();
    assert_eq!(status, 422);
    assert_eq!(
        errors,
        BTreeSet::from([
            "/from/email invalid_field",
            "/subject invalid_field",
            "/html invalid_field",
            "/hmtl unknown_field",
        ])
    );
}

#[tokio::test]
async fn an_unsigned_batch_leaves_only_when_the_account_says_so() {
    let service = Service::start().await;
    let mut unsigned = batch(&recipients(1, 1));
    unsigned["from"]["email"] = json!("news@unsigned.example");
    let accepted = service
        .api
        .with_key("hk_other")
        .submit(&unsigned)
        .await
        .json();
    assert_eq!(accepted["accepted"], 1, "{accepted}");
    assert_eq!(accepted["warnings"].as_array().map(Vec::len), Some(1));
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn what_is_not_json_is_refused_with_its_place() {
    let service = Service::start().await;
    let good = batch(&recipients(2, 1)).to_string();
    let broken: [(Vec<u8>, &str); 6] = [
        (
            good.replace("\"recipients\":[", "\"recipients\":\n[\n{]")
                .into_bytes(),
            "line 3",
        ),
        (
            good.replace("\"subject\":", "\n\"subject\":'").into_bytes(),
            "line 2",
        ),
        (good.trim_end_matches('}').to_owned().into_bytes(), "line 1"),
        (good.replace("a1@", "\u{1}").into_bytes(), "line 1"),
        (
            good.replace("\"subject\"", "\"html\"").into_bytes(),
            "twice",
        ),
        (
            [good.replace("a1@d0.example", "!").into_bytes(), Vec::new()].concat(),
            "",
        ),
    ];
    for (body, place) in broken.into_iter().take(5) {
        let reply = service.api.submit_bytes(body.clone()).await;
        let (status, code, _) = reply.problem();
        let detail = reply.json()["detail"].to_string();
        assert_eq!(
            (status, code.as_str()),
            (400, "malformed_body"),
            "{}",
            String::from_utf8_lossy(&body)
        );
        assert!(detail.contains(place), "{detail} should contain {place}");
    }
    let mut invalid = good.clone().into_bytes();
    let at = good.find("a1@").expect("there");
    invalid[at] = 0xff;
    assert_eq!(
        service.api.submit_bytes(invalid).await.problem().1,
        "malformed_body"
    );
    let mut in_head = good.clone().into_bytes();
    in_head[good.find("spring").expect("there")] = 0xff;
    assert_eq!(
        service.api.submit_bytes(in_head).await.problem().1,
        "malformed_body"
    );
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn the_order_of_keys_does_not_matter() {
    let service = Service::start().await;
    let good = batch(&recipients(600, 3));
    let list = good["recipients"].to_string();
    let mut head = good.clone();
    head.as_object_mut()
        .expect("an object")
        .remove("recipients");
    let head = head.to_string();
    let inner = head.trim_start_matches('{').trim_end_matches('}');
    for body in [
        format!("{{\"recipients\":{list},{inner}}}"),
        format!("{{{inner},\"recipients\":{list}}}"),
    ] {
        assert_eq!(service.api.submit_bytes(body).await.json()["accepted"], 600);
    }
}

#[tokio::test]
async fn a_body_of_another_type_or_encoding_is_refused() {
    let service = Service::start().await;
    let body = Bytes::from(batch(&recipients(1, 1)).to_string());
    let json_type = ("content-type", "application/json");
    for headers in [
        vec![("content-type", "text/plain")],
        vec![("content-type", "text/csv")],
        vec![],
        vec![json_type, ("content-encoding", "br")],
        vec![json_type, ("content-encoding", "gzip, zstd")],
    ] {
        let reply = service
            .api
            .call(Method::POST, "/v1/batches", &headers, body.clone())
            .await;
        assert_eq!(
            (reply.problem().0, reply.problem().1.as_str()),
            (415, "unsupported_media"),
            "{headers:?}"
        );
    }
    let headers = [("content-type", "application/json; charset=utf-8")];
    let reply = service
        .api
        .call(Method::POST, "/v1/batches", &headers, body)
        .await;
    assert_eq!(reply.status, StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_stream_of_lines_is_a_batch_and_may_be_compressed() {
    let service = Service::start().await;
    let mut head = batch(&json!([]));
    head.as_object_mut()
        .expect("an object")
        .remove("recipients");
    let lines = format!(
        "{head}\n{}\n\n{}\n{}",
        json!({"email": "a@x.example"}),
        json!({"email": "no-at-sign"}),
        json!({"email": "b@x.example"})
    );
    let mut packed = Vec::new();
    async_compression::tokio::bufread::GzipEncoder::new(lines.as_bytes())
        .read_to_end(&mut packed)
        .await
        .expect("compressed");
    let ndjson = ("content-type", "application/x-ndjson");
    for (headers, body) in [
        (vec![ndjson], Bytes::from(lines)),
        (
            vec![ndjson, ("content-encoding", "gzip")],
            Bytes::from(packed),
        ),
    ] {
        let reply = service
            .api
            .call(Method::POST, "/v1/batches", &headers, body)
            .await;
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{headers:?}");
        let answer = reply.json();
        assert_eq!(
            (&answer["accepted"], &answer["rejected_count"]),
            (&json!(2), &json!(1))
        );
        assert_eq!(answer["rejected"][0]["index"], 1);
    }
}

/// A message to this recipient.
fn message(to: Value) -> Value {
    let mut message = batch(&json!([]));
    let fields = message.as_object_mut().expect("an object");
    fields.remove("recipients");
    fields.insert("to".to_owned(), to);
    message
}

#[tokio::test]
async fn one_message_is_a_batch_of_one() {
    let service = Service::start().await;
    let json_type = [("content-type", "application/json")];
    let send = async |message: &Value| {
        let body = Bytes::from(message.to_string());
        service
            .api
            .call(Method::POST, "/v1/messages", &json_type, body)
            .await
    };
    let good =
        json!({"email": "a@x.example", "name": "A", "prospect_id": "p-1", "vars": {"points": 3}});
    let reply = send(&message(good.clone())).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{reply:?}");
    let id = reply.json()["id"].as_str().expect("an id").to_owned();
    let expected = json!({"id": id, "message_id": format!("{id}.0"), "state": "in_progress"});
    assert_eq!(reply.json(), expected);
    let story = service
        .api
        .get(&format!("/v1/messages/{id}.0"))
        .await
        .json();
    assert_eq!(
        (&story["email"], &story["prospect_id"]),
        (&json!("a@x.example"), &json!("p-1"))
    );

    let mut with_recipients = message(good);
    with_recipients["recipients"] = json!([{"email": "b@x.example"}]);
    let mut without_subject = message(json!({"email": "a@x.example"}));
    without_subject
        .as_object_mut()
        .expect("an object")
        .remove("subject");
    for (wrong, path) in [
        (
            message(json!({"email": "no-at-sign"})),
            "/to/email invalid_field",
        ),
        (
            message(json!({"email": "a@x.example", "nme": "A"})),
            "/to/nme unknown_field",
        ),
        (message(json!({})), "/to/email invalid_field"),
        (message(json!([])), "/to invalid_field"),
        (message(Value::Null), "/to invalid_field"),
        (with_recipients, "/recipients unknown_field"),
        (without_subject, "/subject invalid_field"),
    ] {
        let (status, _, paths) = send(&wrong).await.problem();
        assert_eq!((status, paths), (422, vec![path.to_owned()]), "{wrong}");
    }
    let (status, code, _) = send(&json!([1])).await.problem();
    assert_eq!((status, code.as_str()), (422, "invalid_field"));
    let batches = service.api.get("/v1/batches").await.json();
    assert_eq!(batches["items"].as_array().map(Vec::len), Some(1));
}

/// Submits `body` under an idempotency key.
async fn submit_once(service: &Service, key: &str, body: &str) -> Reply {
    let headers = [
        ("content-type", "application/json"),
        ("idempotency-key", key),
    ];
    let body = Bytes::from(body.to_owned());
    service
        .api
        .call(Method::POST, "/v1/batches", &headers, body)
        .await
}

#[tokio::test]
async fn a_call_with_a_key_takes_effect_once_across_restarts() {
    let service = Service::start().await;
    let (body, other) = (
        batch(&recipients(50, 2)).to_string(),
        batch(&recipients(3, 1)).to_string(),
    );
    let first = submit_once(&service, "order-7", &body).await;
    assert_eq!(first.status, StatusCode::ACCEPTED);
    assert_eq!(first.headers.get("idempotent-replayed"), None);
    for _ in 0..2 {
        let again = submit_once(&service, "order-7", &body).await;
        assert_eq!((again.status, &again.bytes), (first.status, &first.bytes));
        assert_eq!(again.headers["idempotent-replayed"], "true");
    }
    let (status, code, _) = submit_once(&service, "order-7", &other).await.problem();
    assert_eq!((status, code.as_str()), (409, "idempotency_conflict"));
    // A refused call is no answer: the key is free for the call that was meant.
    assert_eq!(
        submit_once(&service, "order-8", "{}").await.status,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    assert_eq!(
        submit_once(&service, "order-8", &other).await.status,
        StatusCode::ACCEPTED
    );
    for bad in ["a b", "a/b", &"k".repeat(256)] {
        let (status, _, paths) = submit_once(&service, bad, &other).await.problem();
        assert_eq!(
            (status, paths),
            (422, vec!["Idempotency-Key invalid_field".to_owned()]),
            "{bad}"
        );
    }

    let service = Service::at(service.stop().await).await;
    let again = submit_once(&service, "order-7", &body).await;
    assert_eq!((again.status, &again.bytes), (first.status, &first.bytes));
    let batches = service.api.get("/v1/batches").await.json();
    assert_eq!(batches["items"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn of_parallel_calls_with_one_key_one_takes_effect() {
    let service = Service::start().await;
    let body = batch(&recipients(2_000, 7)).to_string();
    let calls = (0..8).map(|_| submit_once(&service, "k", &body));
    let replies = futures_util::future::join_all(calls).await;
    let accepted: Vec<_> = replies
        .iter()
        .filter(|reply| reply.status == StatusCode::ACCEPTED)
        .collect();
    let fresh = accepted
        .iter()
        .filter(|reply| !reply.headers.contains_key("idempotent-replayed"));
    assert_eq!(fresh.count(), 1);
    assert!(
        accepted
            .iter()
            .all(|reply| reply.bytes == accepted[0].bytes)
    );
    for reply in &replies {
        if reply.status != StatusCode::ACCEPTED {
            let (status, code, _) = reply.problem();
            assert_eq!((status, code.as_str()), (409, "idempotency_in_progress"));
            assert_eq!(reply.headers["retry-after"], "1");
        }
    }
    let batches = service.api.get("/v1/batches").await.json();
    assert_eq!(batches["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn mistakes_in_lines_are_told_with_their_line() {
    let service = Service::start().await;
    let mut head = batch(&json!([]));
    let own = head.to_string();
    head.as_object_mut()
        .expect("an object")
        .remove("recipients");
    for (body, problem, line) in [
        (format!("{own}\n{{}}"), (422, "invalid_field"), None),
        (head.to_string(), (422, "invalid_field"), None),
        (
            format!("{head}\n{{}}\n{{\"email\"\n"),
            (400, "malformed_body"),
            Some(3),
        ),
        ("{\n".to_owned(), (400, "malformed_body"), Some(1)),
        (String::new(), (400, "malformed_body"), Some(1)),
    ] {
        let headers = [("content-type", "application/x-ndjson")];
        let reply = service
            .api
            .call(
                Method::POST,
                "/v1/batches",
                &headers,
                Bytes::from(body.clone()),
            )
            .await;
        let (status, code, _) = reply.problem();
        assert_eq!((status, code.as_str()), problem, "{body}");
        if let Some(line) = line {
            assert_eq!(reply.json()["errors"][0]["line"], line, "{body}");
        }
    }
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn sixty_four_mebibytes_and_one_byte_are_too_many() {
    let service = Service::start().await;
    let good = batch(&recipients(2, 1)).to_string();
    // White space between head and recipients: only its length is wrong with the body.
    let (start, end) = good.split_at(good.find("\"recipients\"").expect("there"));
    let (start, end) = (Bytes::from(start.to_owned()), Bytes::from(end.to_owned()));
    let body = move |length: usize| {
        let mut left = length - start.len() - end.len();
        let spaces = std::iter::from_fn(move || {
            let size = left.min(1 << 20);
            left -= size;
            (size > 0).then(|| Bytes::from(vec![b' '; size]))
        });
        std::iter::once(start.clone())
            .chain(spaces)
            .chain(std::iter::once(end.clone()))
            .map(Ok)
    };
    let limit = 64 << 20;
    let reply = service
        .api
        .submit_stream(body(limit + 1))
        .await
        .expect("an answer");
    assert_eq!(
        (reply.problem().0, reply.problem().1.as_str()),
        (413, "body_too_large")
    );
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn the_limit_of_a_body_is_the_configured_one_to_the_byte() {
    let good = batch(&recipients(20, 1)).to_string();
    let service = Service::with_api(&format!("max_body = \"{}B\"", good.len())).await;
    assert_eq!(
        service.api.submit_bytes(good.clone()).await.status,
        StatusCode::ACCEPTED
    );
    let reply = service.api.submit_bytes(format!("{good} ")).await;
    assert_eq!(
        (reply.problem().0, reply.problem().1.as_str()),
        (413, "body_too_large")
    );
}

#[tokio::test]
async fn a_connection_that_breaks_leaves_nothing() {
    let service = Service::start().await;
    let good = batch(&recipients(30_000, 7)).to_string();
    let half = Bytes::from(good.as_bytes()[..good.len() / 2].to_vec());
    let broken = [Ok(half), Err(std::io::Error::other("gone"))];
    assert!(service.api.submit_stream(broken.into_iter()).await.is_err());
    let home = service.stop().await;
    let service = Service::at(home).await;
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn a_dry_run_renders_and_accepts_nothing() {
    let service = Service::start().await;
    let body = batch(&json!([{"email": "nobody"}, {"email": "b@x.example", "name": "Bea"}]));
    let headers = [("content-type", "application/json")];
    let reply = service
        .api
        .call(
            Method::POST,
            "/v1/batches?dry_run=true",
            &headers,
            body.to_string().into(),
        )
        .await;
    let checked = reply.json();
    assert_eq!(reply.status, StatusCode::OK, "{checked}");
    assert_eq!(
        (&checked["accepted"], &checked["rejected_count"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(
        (&checked["links"]["tracked"], &checked["rendered"]["email"]),
        (&json!(1), &json!("b@x.example"))
    );
    let message = checked["rendered"]["message"].as_str().expect("a message");
    assert!(message.contains("Subject: Hello Bea\r\n"), "{message}");
    service.api.assert_nothing_accepted().await;
}

#[tokio::test]
async fn a_hundred_thousand_recipients_in_one_call() {
    let service = Service::start().await;
    let mut later = batch(&json!([]));
    later["send_at"] = json!("2999-01-01T00:00:00Z");
    let head = later.to_string();
    let (start, end) = head.split_at(head.find("[]").expect("there") + 1);
    let (start, end) = (Bytes::from(start.to_owned()), Bytes::from(end.to_owned()));
    // Three large domains, and a long tail of 20,000 small ones.
    let rows = (0..100_000_u32).map(|n| {
        let domain = if n % 2 == 0 { n % 3 } else { 100 + n % 20_000 };
        let comma = if n == 0 { "" } else { "," };
        Bytes::from(format!("{comma}{{\"email\":\"user{n}@d{domain}.example\",\"name\":\"N {n}\",\"vars\":{{\"points\":{n}}}}}"))
    });
    let body = std::iter::once(start)
        .chain(rows)
        .chain(std::iter::once(end))
        .map(Ok);
    let reply = service.api.submit_stream(body).await.expect("an answer");
    let accepted = reply.json();
    assert_eq!(
        (reply.status, &accepted["accepted"]),
        (StatusCode::ACCEPTED, &json!(100_000)),
        "{accepted}"
    );
    let path = format!(
        "/v1/batches/{}/recipients",
        accepted["id"].as_str().expect("id")
    );
    let headers = [("accept", "application/x-ndjson")];
    let all = service
        .api
        .call(Method::GET, &path, &headers, Bytes::new())
        .await
        .bytes;
    let indices = all
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            serde_json::from_slice::<Value>(line).expect("a row")["index"]
                .as_u64()
                .expect("an index")
        });
    assert!(
        indices.eq(0..100_000),
        "every recipient is there once, in order"
    );
}
