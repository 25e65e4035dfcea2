//! Why mail moves or does not, asked over HTTP of a daemon with real peers behind it.

use serde_json::{Value, json};
use service::clock::{Clock as _, SystemClock};
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

use crate::harness::{Home, Service, batch, recipients};

const ADMIN: &str = r#"
    [[api.keys]]
    name = "ops"
    key_env = "TEST_KEY"
    scopes = ["submit", "read", "admin"]
"#;

/// A daemon whose mail goes to `peer`, slowly, and whose key may do everything.
async fn service(peer: &SmtpPeer, shaping: &str) -> Service {
    let home = Home::new("");
    let config = std::fs::read_to_string(home.config_file()).expect("a configuration");
    let start = config.find("[[api.keys]]").expect("keys");
    let (before, after) = config.split_at(start);
    let rest = after
        .split_once("scopes = [\"submit\", \"read\"]")
        .expect("scopes")
        .1;
    std::fs::write(home.config_file(), format!("{before}{ADMIN}{rest}")).expect("written");
    let shaping = format!("{shaping}\n[mx]\n\"*\" = \"{}\"\n", peer.address());
    std::fs::write(home.config_file().with_file_name("shaping.toml"), shaping).expect("written");
    Service::at(home).await
}

async fn get(service: &Service, path: &str) -> Value {
    let reply = service.api.get(path).await;
    assert_eq!(reply.status, 200, "{path}: {:?}", reply.bytes);
    reply.json()
}

/// Asks until the answer is `so`.
async fn until(service: &Service, path: &str, so: impl Fn(&Value) -> bool) -> Value {
    until_said(async || get(service, path).await, so).await
}

async fn until_said(ask: impl AsyncFn() -> Value, so: impl Fn(&Value) -> bool) -> Value {
    let waiting = async {
        loop {
            let answer = ask().await;
            if so(&answer) {
                return answer;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    match tokio::time::timeout(patience, waiting).await {
        Ok(answer) => answer,
        Err(_) => panic!("still {}", ask().await),
    }
}

async fn submit(service: &Service, count: usize, domains: usize) -> String {
    let reply = service
        .api
        .submit(&batch(&recipients(count, domains)))
        .await;
    assert_eq!(reply.status, 202, "{:?}", reply.bytes);
    reply.json()["id"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn a_rate_is_named_with_its_source_and_an_eta() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let service = service(
        &peer,
        "[domain.\"d0.example\"]\nrate = \"2/s\"\nadaptive = false\n",
    )
    .await;
    let id = submit(&service, 400, 1).await;
    let why = until(&service, "/v1/why?domain=D0.example", |why| {
        why["constraint"]["kind"] == "rate" && why["recipients"]["in_flight"] != 0
    })
    .await;
    assert_eq!(why["subject"]["destination"], "d0.example");
    assert_eq!(why["state"], "moving", "{why}");
    assert_eq!(why["constraint"]["source"]["type"], "file");
    let section = why["constraint"]["source"]["section"]
        .as_str()
        .expect("a section");
    assert!(section.contains("d0.example"), "{section}");
    assert!(
        why["eta"].is_string() && why["eta_basis"].is_string(),
        "{why}"
    );

    let of_batch = get(&service, &format!("/v1/why?batch={id}")).await;
    assert_eq!(of_batch["state"], "moving", "{of_batch}");
    assert_eq!(of_batch["destinations"][0]["destination"], "d0.example");
    let last = until(&service, &format!("/v1/why?message={id}.399"), |why| {
        why["constraint"]["kind"] != Value::Null
    })
    .await;
    assert_eq!(last["subject"]["status"], "queued");
    assert!(
        ["rate", "turn"].contains(&last["constraint"]["kind"].as_str().expect("a kind")),
        "{last}"
    );
    until(&service, &format!("/v1/why?message={id}.0"), |why| {
        why["state"] == "finished" && why["constraint"]["kind"] == "delivered"
    })
    .await;

    let one = get(&service, "/v1/destinations/d0.example").await;
    assert_eq!(one["rolled_up"]["by"], "domain");
    assert_eq!(one["limits"][0]["rate"]["in_force"], "2/s");
    assert_eq!(one["domains"], json!(["d0.example"]));
    let all = get(&service, "/v1/destinations").await;
    assert_eq!(all["items"][0]["destination"], "d0.example");
    assert_eq!(
        (&all["next_cursor"], &all["complete"]),
        (&Value::Null, &json!(true))
    );
    // A domain without mail has an answer too.
    let none = get(&service, "/v1/destinations/quiet.example").await;
    assert_eq!(
        (&none["state"], &none["queued"]),
        (&json!("idle"), &json!(0))
    );
    assert_eq!(none["rolled_up"]["by"], "hosts", "{none}");
    drop(service.stop().await);
}

#[tokio::test]
async fn a_reply_that_puts_off_is_the_source_and_a_retry_by_hand_ends_the_wait() {
    let temper = Temper::accepting().rule(|question| {
        (question.event == smtp::ServerEvent::Rcpt && question.recipient.starts_with("a1@"))
            .then(|| Answer::reply(451, "4.7.1 <a1@d0.example>: greylisted, come back later"))
    });
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let service = service(&peer, "[default]\nretry = [\"1h\"]\n").await;
    let id = submit(&service, 4, 1).await;
    let path = format!("/v1/why?message={id}.1");
    let why = until(&service, &path, |why| {
        why["constraint"]["kind"] == "greylisted"
    })
    .await;
    let source = &why["constraint"]["source"];
    assert_eq!(
        (&source["type"], &source["class"]),
        (&json!("peer"), &json!("greylisted"))
    );
    assert!(
        source["reply"]
            .as_str()
            .is_some_and(|reply| reply.contains("a1@d0.example")),
        "{why}"
    );
    assert!(
        why["next_at"].is_string() && why["next_at"] == why["constraint"]["until"],
        "{why}"
    );
    let domain = until(&service, "/v1/why?domain=d0.example", |why| {
        why["recipients"]["deferred"] == 1
    })
    .await;
    assert_eq!(domain["constraint"]["kind"], "retry_wait", "{domain}");
    // Elsewhere it is nobody's business to whom.
    let one = get(&service, "/v1/destinations/d0.example").await;
    let reply = one["last_trouble"]["reply"].as_str().expect("a trouble");
    assert!(
        reply.contains("<***@d0.example>") && !reply.contains("a1@"),
        "{reply}"
    );

    let counted = service
        .api
        .post(&format!("/v1/batches/{id}/retry?dry_run=true"))
        .await
        .json();
    assert_eq!(
        (&counted["retried"], &counted["dry_run"]),
        (&json!(1), &json!(true))
    );
    let counted = service
        .api
        .post("/v1/destinations/d0.example/retry?dry_run=true")
        .await
        .json();
    assert_eq!(
        (&counted["recipients"], &counted["unresolved"]),
        (&json!(1), &json!(0))
    );
    let attempts = |why: &Value| {
        why["constraint"]["detail"]
            .as_str()
            .is_some_and(|text| text.contains("attempt 2"))
    };
    assert!(
        !attempts(&get(&service, &path).await),
        "counting changes nothing"
    );
    let done = service
        .api
        .post(&format!("/v1/batches/{id}/retry"))
        .await
        .json();
    assert_eq!((&done["retried"], &done["id"]), (&json!(1), &json!(id)));
    until(&service, &path, attempts).await;
    drop(service.stop().await);
}

#[tokio::test]
async fn an_operator_keeps_mail_from_a_destination_and_lets_it_go() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let shaping = "[domain.\"d0.example\"]\nrate = \"unlimited\"\nretry = [\"1s\"]\n";
    let service = service(&peer, shaping).await;
    let suspend = "/v1/destinations/d0.example/suspend";
    let call = |path: String, body: &'static str| {
        let api = service.api.clone();
        async move {
            let headers = [("content-type", "application/json")];
            api.call(hyper::Method::POST, &path, &headers, body.into())
                .await
        }
    };
    let body = r#"{"for": "1h", "reason": "complaints"}"#;
    let counted = call(format!("{suspend}?dry_run=true"), body).await.json();
    assert_eq!(
        (&counted["dry_run"], &counted["recipients"]),
        (&json!(true), &json!(0))
    );
    assert_eq!(
        get(&service, "/v1/destinations/d0.example").await["suspension"],
        Value::Null
    );
    let done = call(suspend.to_owned(), body).await.json();
    assert_eq!(
        (&done["destination"], &done["suspension"]["by"]),
        (&json!("d0.example"), &json!("ops"))
    );

    let id = submit(&service, 300, 1).await;
    let path = format!("/v1/why?message={id}.7");
    let why = until(&service, &path, |why| {
        why["constraint"]["kind"] == "suspension"
    })
    .await;
    let source = &why["constraint"]["source"];
    assert_eq!(
        (&source["type"], &source["reason"]),
        (&json!("operator"), &json!("complaints"))
    );
    assert!(
        why["next_at"].is_string() && why["state"] == "waiting",
        "{why}"
    );
    let of_batch = get(&service, &format!("/v1/why?batch={id}")).await;
    assert_eq!(of_batch["constraint"]["kind"], "suspension", "{of_batch}");
    let all = get(&service, "/v1/destinations").await;
    assert_eq!(
        all["items"][0]["suspension"]["reason"], "complaints",
        "{all}"
    );
    // Who asks in the wrong place for a count has not let anything go.
    for path in [
        "destinations/d0.example/resume",
        "destinations/d0.example/retry",
        &format!("batches/{id}/retry"),
    ] {
        let refused = call(format!("/v1/{path}"), r#"{"dry_run": true}"#).await;
        assert_eq!(
            (
                refused.status.as_u16(),
                &refused.json()["errors"][0]["path"]
            ),
            (422, &json!("/dry_run")),
            "{path}"
        );
    }
    assert_eq!(peer.counts().messages, 0);
    // What is on its way back to the store is counted neither here nor there.
    let resume = "/v1/destinations/d0.example/resume";
    let count = async || call(format!("{resume}?dry_run=true"), "").await.json();
    until_said(count, |counted| counted["recipients"] == 300).await;

    let done = call(resume.to_owned(), "").await;
    assert_eq!(done.status, 200);
    until(&service, &path, |why| why["state"] == "finished").await;
    for (body, code) in [
        (r#"{"for": "soon"}"#, "invalid_field"),
        (r#"{"until": "1h"}"#, "unknown_field"),
        (r#"{"reason": "two\nlines"}"#, "invalid_field"),
    ] {
        assert_eq!(
            call(suspend.to_owned(), body).await.problem().1,
            code,
            "{body}"
        );
    }
    drop(service.stop().await);
}

#[tokio::test]
async fn a_transcript_ends_when_it_should_and_needs_the_right_key() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let service = service(&peer, "").await;
    let heard = service
        .api
        .get("/v1/trace?domain=d0.example&for=100ms")
        .await;
    assert_eq!(heard.status, 200);
    assert!(
        heard.bytes.iter().all(|byte| *byte == b'\n'),
        "nothing was said"
    );
    assert_eq!(heard.headers["content-type"], "application/x-ndjson");
    let reader = service.api.with_key("hk_read");
    assert_eq!(
        reader.get("/v1/trace?domain=d0.example").await.problem().1,
        "forbidden_scope"
    );
    for path in [
        "/v1/trace",
        "/v1/trace?domain=d0.example&for=2h",
        "/v1/trace?domain=x&message=y",
    ] {
        assert_eq!(service.api.get(path).await.problem().0, 422, "{path}");
    }
    assert_eq!(
        service.api.get("/v1/trace?message=nonsense").await.status,
        404
    );
    // Who listens does not keep the service from ending.
    let listener = service.api.clone();
    let listening = async move { listener.get("/v1/trace?domain=d0.example").await };
    let (heard, _) = tokio::join!(listening, async {
        until(&service, "/v1/destinations", |_| true).await;
        service.stop().await
    });
    assert_eq!(heard.status, 200);
}

#[tokio::test]
async fn a_destination_that_cannot_be_reached_is_said_to_be_left_alone() {
    // Nobody listens where the harness sends everything.
    let service = Service::start().await;
    let id = submit(&service, 3, 1).await;
    let why = until(&service, "/v1/why?domain=d0.example", |why| {
        why["constraint"]["kind"] == "backoff" && why["state"] == "waiting"
    })
    .await;
    assert_eq!(why["state"], "waiting");
    assert_eq!(
        why["constraint"]["source"]["class"], "connect_failure",
        "{why}"
    );
    let why = until(&service, &format!("/v1/why?message={id}.0"), |why| {
        why["constraint"] != Value::Null
    })
    .await;
    assert!(why["next_at"].is_string(), "{why}");
    drop(service.stop().await);
}

#[tokio::test]
async fn a_pause_is_the_callers_and_a_name_that_is_none_is_not_found() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let service = service(&peer, "[default]\nrate = \"1/m\"\n").await;
    let id = submit(&service, 300, 1).await;
    service
        .api
        .post(&format!("/v1/batches/{id}/pause"))
        .await
        .json();
    let why = get(&service, &format!("/v1/why?batch={id}")).await;
    assert_eq!(
        (&why["state"], &why["constraint"]["kind"]),
        (&json!("waiting"), &json!("paused"))
    );
    assert_eq!((&why["next_at"], &why["eta"]), (&Value::Null, &Value::Null));
    until(&service, "/v1/why?domain=d0.example", |why| {
        why["constraint"]["kind"] == "paused"
    })
    .await;

    for path in [
        "/v1/destinations/not_a%20domain",
        "/v1/why?domain=-",
        "/v1/why?batch=nonsense",
        "/v1/why?message=01ARZ3NDEKTSV4RRFFQ69G5FAV.1",
    ] {
        let problem = service.api.get(path).await.problem();
        assert_eq!(
            (problem.0, problem.1.as_str()),
            (404, "not_found"),
            "{path}"
        );
    }
    for path in [
        "/v1/why",
        &format!("/v1/why?batch={id}&domain=x.example"),
        "/v1/why?batch=",
    ] {
        assert_eq!(service.api.get(path).await.problem().0, 422, "{path}");
    }
    let other = service.api.with_key("hk_other");
    assert_eq!(other.get(&format!("/v1/why?batch={id}")).await.status, 404);
    assert_eq!(other.get("/v1/destinations").await.status, 200);
    assert_eq!(
        other
            .post("/v1/destinations/d0.example/retry")
            .await
            .problem()
            .1,
        "forbidden_scope"
    );
    assert_eq!(
        service.api.post("/v1/batches/nonsense/retry").await.status,
        404
    );
    drop(service.stop().await);
}

/// So many minutes after this one of the day, in UTC.
fn minutes_from_now(minutes: i64) -> String {
    let minute = SystemClock.now().seconds() / 60 + minutes;
    let minute = minute.rem_euclid(24 * 60);
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

#[tokio::test]
async fn a_send_window_lets_through_whose_day_it_is() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let service = service(&peer, "").await;
    let mut submission = batch(&recipients(4, 1));
    submission["window"] = json!({"from": minutes_from_now(-60), "to": minutes_from_now(60)});
    // On the other side of the earth, and nowhere.
    submission["recipients"][1]["time_zone"] = json!("Etc/GMT-12");
    submission["recipients"][2]["time_zone"] = json!("Asia/Tokio");
    let reply = service.api.submit(&submission).await;
    assert_eq!(reply.status, 202, "{:?}", reply.bytes);
    let accepted = reply.json();
    assert_eq!(accepted["rejected"][0]["index"], 2, "{accepted}");
    assert_eq!(accepted["rejected"][0]["code"], "invalid_vars");
    let id = accepted["id"].as_str().expect("an id").to_owned();
    until(&service, &format!("/v1/batches/{id}"), |found| {
        found["counters"]["delivered"] == 2
    })
    .await;
    let why = until(&service, &format!("/v1/why?batch={id}"), |why| {
        why["constraint"]["kind"] == "send_window"
    })
    .await;
    assert_eq!(why["recipients"]["deferred"], 1, "{why}");
    let message = get(&service, &format!("/v1/why?message={id}.1")).await;
    assert_eq!(message["constraint"]["kind"], "send_window", "{message}");
    assert_eq!(message["next_at"], why["next_at"], "{message} {why}");
    let found = get(&service, &format!("/v1/batches/{id}")).await;
    assert_eq!(found["counters"]["delivered"], 2, "{found}");
    assert_eq!(found["counters"]["queued"], 1, "{found}");
    assert_eq!(found["window"]["time_zone"], "UTC", "{found}");
    // By hand it is due, and still nobody is woken by it.
    let retried = service.api.post(&format!("/v1/batches/{id}/retry")).await;
    assert_eq!(retried.status, 200, "{:?}", retried.bytes);
    until(&service, &format!("/v1/why?batch={id}"), |why| {
        why["constraint"]["kind"] == "send_window"
    })
    .await;
    assert_eq!(peer.messages().len(), 2);

    submission["expires_at"] =
        json!((SystemClock.now() + std::time::Duration::from_secs(3_600)).to_string());
    let reply = service.api.submit(&submission).await;
    let checked = reply.json();
    assert_eq!(
        checked["warnings"][0],
        "recipients for whom the window does not open before expires_at: 1; they get nothing"
    );
    drop(service.stop().await);
}
