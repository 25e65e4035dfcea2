//! What a batch may be beside a text: a complete message, files, a follow-up, a proof, a report.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Reply, Service, batch, recipients};

async fn post(service: &Service, path: &str, body: &Value) -> Reply {
    let json = [("content-type", "application/json")];
    service
        .api
        .call(Method::POST, path, &json, body.to_string().into())
        .await
}

#[tokio::test]
async fn a_complete_message_is_taken_as_it_is_and_nothing_beside_it() {
    let service = Service::start().await;
    let message = "From: News <news@brand.example>\r\nTo: you@x.example\r\nSubject: raw\r\nMessage-ID: <own@brand.example>\r\nDate: Mon, 1 Dec 2025 09:00:00 +0000\r\n\r\nBody é\r\n";
    let raw = json!({"raw": STANDARD.encode(message), "recipients": [{"email": "a@x.example"}]});
    let reply = post(&service, "/v1/batches?dry_run=true", &raw).await;
    let checked = reply.json();
    assert_eq!(reply.status, StatusCode::OK, "{checked}");
    assert_eq!(
        checked["rendered"]["message"].as_str().expect("a message"),
        message
    );
    assert_eq!(service.api.submit(&raw).await.status, StatusCode::ACCEPTED);
    let mut beside = raw.clone();
    beside["subject"] = json!("x");
    assert_eq!(
        service.api.submit(&beside).await.problem().2,
        ["/subject invalid_field"]
    );
    let mut other = raw.clone();
    other["from"] = json!({"email": "other@brand.example"});
    assert_eq!(
        service.api.submit(&other).await.problem().2,
        ["/from/email invalid_field"]
    );
    let foreign = json!({"raw": STANDARD.encode("From: a@else.example\r\n\r\nx"), "recipients": [{"email": "a@x.example"}]});
    assert_eq!(
        service.api.submit(&foreign).await.problem().1,
        "forbidden_from"
    );
    let broken = json!({"raw": "?", "recipients": [{"email": "a@x.example"}]});
    assert_eq!(
        service.api.submit(&broken).await.problem().2,
        ["/raw invalid_field"]
    );
}

#[tokio::test]
async fn files_are_attached_and_shown() {
    let service = Service::start().await;
    let mut with = batch(&json!([{"email": "a@x.example"}]));
    with["attachments"] = json!([
        {"filename": "a.pdf", "type": "application/pdf", "content": STANDARD.encode("file")},
        {"filename": "l.png", "type": "image/png", "content": STANDARD.encode("logo"), "content_id": "logo"},
    ]);
    let checked = post(&service, "/v1/batches?dry_run=true", &with)
        .await
        .json();
    let message = checked["rendered"]["message"].as_str().expect("a message");
    for part in [
        "multipart/mixed",
        "multipart/related",
        "Content-ID: <logo>",
        "filename=\"a.pdf\"",
        "ZmlsZQ==",
    ] {
        assert!(message.contains(part), "{part} in {message}");
    }
    with["attachments"][0]["type"] = json!("pdf");
    assert_eq!(
        service.api.submit(&with).await.problem().2,
        ["/attachments/0/type invalid_field"]
    );
}

#[tokio::test]
async fn a_follow_up_goes_to_whom_it_chooses() {
    let service = Service::start().await;
    let mut first = batch(&json!([
        {"email": "a@x.example", "name": "A", "vars": {"points": 1}},
        {"email": "b@x.example", "prospect_id": "p-2", "vars": {"points": 2}},
    ]));
    first["send_at"] = json!("2099-01-01T00:00:00Z");
    first["subject"] = json!("{{ points }}");
    let id = service.api.submit(&first).await.json()["id"].clone();
    let mut second = first.clone();
    second
        .as_object_mut()
        .expect("an object")
        .remove("recipients");
    let choose = |of: Value| {
        let mut second = second.clone();
        second["recipients_from"] = json!({"batch": id, "where": of});
        second
    };
    let accepted = service
        .api
        .submit(&choose(
            json!({"status": "scheduled", "opened": false, "clicked": null}),
        ))
        .await;
    let accepted = accepted.json();
    assert_eq!(
        (&accepted["accepted"], &accepted["rejected_count"]),
        (&json!(2), &json!(0)),
        "{accepted}"
    );
    let path = format!(
        "/v1/batches/{}/recipients",
        accepted["id"].as_str().expect("an id")
    );
    let rows = service.api.get(&path).await.json();
    assert_eq!(rows["items"][1]["prospect_id"], "p-2");
    let none = service
        .api
        .submit(&choose(json!({"status": "delivered"})))
        .await
        .json();
    assert_eq!(
        (&none["accepted"], &none["state"]),
        (&json!(0), &json!("completed"))
    );
    let mut both = choose(json!({}));
    both["recipients"] = json!([{"email": "c@x.example"}]);
    assert_eq!(
        service.api.submit(&both).await.problem().2,
        ["/recipients_from invalid_field"]
    );
    let mut unknown = choose(json!({"colour": 1}));
    unknown["recipients_from"]["batch"] = json!("01JD0000000000000000000000");
    assert_eq!(
        service.api.submit(&unknown).await.problem().2,
        [
            "/recipients_from/batch invalid_field",
            "/recipients_from/where/colour unknown_field"
        ]
    );
}

#[tokio::test]
async fn a_proof_is_a_message_of_its_own() {
    let service = Service::start().await;
    let mut held = batch(
        &json!([{"email": "a@x.example", "vars": {"points": 1}}, {"email": "b@x.example", "vars": {"points": 2}}]),
    );
    held["hold"] = json!(true);
    held["subject"] = json!("{{ points }} points");
    let id = service.api.submit(&held).await.json()["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let path = format!("/v1/batches/{id}/proof");
    let reply = post(
        &service,
        &path,
        &json!({"to": ["me@y.example", "you@y.example"], "as_recipient": 1}),
    )
    .await;
    let proof = reply.json();
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{proof}");
    assert_eq!(
        (&proof["proof_of"], &proof["messages"][1]["email"]),
        (&json!(id), &json!("you@y.example"))
    );
    let message = proof["messages"][0]["message_id"].as_str().expect("an id");
    assert_eq!(
        service
            .api
            .get(&format!("/v1/messages/{message}"))
            .await
            .json()["email"],
        "me@y.example"
    );
    let found = service.api.get(&format!("/v1/batches/{id}")).await.json();
    assert_eq!(
        (&found["counters"]["accepted"], &found["state"]),
        (&json!(2), &json!("open"))
    );
    for (body, error) in [
        (json!({}), "/to invalid_field"),
        (json!({"to": []}), "/to invalid_field"),
        (json!({"to": ["nobody"]}), "/to invalid_field"),
        (
            json!({"to": ["a@x.example"], "as_recipient": 7}),
            "/as_recipient invalid_field",
        ),
        (json!({"to": ["a@x.example"], "x": 7}), "/x unknown_field"),
    ] {
        assert_eq!(
            post(&service, &path, &body).await.problem().2,
            [error],
            "{body}"
        );
    }
}

#[tokio::test]
async fn a_guardrail_and_a_report_are_there() {
    let service = Service::start().await;
    let mut guarded = batch(&recipients(3, 2));
    guarded["guardrails"] =
        json!({"bounce_rate": 0.05, "complaint_rate": 0.003, "min_delivered": 500});
    let id = service.api.submit(&guarded).await.json()["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let report = service
        .api
        .get(&format!("/v1/batches/{id}/report"))
        .await
        .json();
    for key in [
        "rates",
        "variants",
        "destinations",
        "links",
        "series",
        "counters",
    ] {
        assert!(!report[key].is_null(), "{key} in {report}");
    }
    guarded["guardrails"] = json!({"bounce_rate": 5, "x": 1});
    let errors = service.api.submit(&guarded).await.problem().2;
    assert_eq!(
        errors,
        [
            "/guardrails/bounce_rate invalid_field",
            "/guardrails/x unknown_field"
        ]
    );
    let cancelled = service.api.post(&format!("/v1/batches/{id}/cancel")).await;
    assert_eq!(cancelled.status, StatusCode::OK);
    let ended = async {
        loop {
            let report = service
                .api
                .get(&format!("/v1/batches/{id}/report"))
                .await
                .json();
            let groups = report["destinations"].as_array().expect("groups").clone();
            if groups
                .iter()
                .filter_map(|group| group["cancelled"].as_u64())
                .sum::<u64>()
                == 3
            {
                return groups.len();
            }
        }
    };
    let groups = tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .expect("told");
    assert_eq!(groups, 2);
}
