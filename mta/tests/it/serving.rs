//! Keys, health, metrics, and how connections begin and end.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Caller, Home, Service, batch, recipients};

#[tokio::test]
async fn a_key_opens_what_its_scopes_say() {
    let service = Service::start().await;
    let code = |reply: crate::harness::Reply| reply.problem().1;
    for key in ["", "wrong", "hk_test_ke", "hk_test_key2"] {
        let reply = service.api.with_key(key).get("/v1/batches").await;
        assert_eq!(reply.headers["www-authenticate"], "Bearer");
        assert_eq!(
            (reply.problem().0, reply.problem().1.as_str()),
            (401, "unauthorized")
        );
    }
    let reader = service.api.with_key("hk_read");
    assert_eq!(reader.get("/v1/batches").await.status, StatusCode::OK);
    assert_eq!(
        code(reader.submit(&batch(&recipients(1, 1))).await),
        "forbidden_scope"
    );
    assert_eq!(
        code(
            reader
                .call(
                    Method::PUT,
                    "/v1/suppressions/a@x.example",
                    &[],
                    Bytes::new()
                )
                .await
        ),
        "forbidden_scope"
    );
}

#[tokio::test]
async fn a_stranger_with_a_large_body_gets_an_answer_too() {
    let service = Service::start().await;
    let large = batch(&recipients(200_000, 1));
    let reply = service.api.with_key("wrong").submit(&large).await;
    assert_eq!(reply.problem().1, "unauthorized");
}

#[tokio::test]
async fn the_first_start_makes_a_key() {
    let home = Home::new("");
    let text = std::fs::read_to_string(home.config_file()).expect("read");
    let (before, rest) = text.split_once("[[api.keys]]").expect("keys");
    let (_, after) = rest.split_once("[[accounts]]").expect("accounts");
    std::fs::write(home.config_file(), format!("{before}[[accounts]]{after}")).expect("written");
    let service = Service::at(home).await;
    let path = service.home.data_dir().join("api-key");
    let key = std::fs::read_to_string(&path).expect("a key");
    assert_eq!(key.trim(), key, "the key alone");
    assert_eq!(
        std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
    assert_eq!(
        service
            .api
            .with_key(&key)
            .submit(&batch(&recipients(1, 1)))
            .await
            .status,
        StatusCode::ACCEPTED
    );
    let home = service.stop().await;
    let again = Service::at(home).await;
    assert_eq!(
        again.api.with_key(&key).get("/v1/batches").await.status,
        StatusCode::OK,
        "the key stays"
    );
}

#[tokio::test]
async fn health_metrics_and_specification_need_no_key() {
    let service = Service::start().await;
    service.api.submit(&batch(&recipients(7, 1))).await;
    let stranger = service.api.with_key("");
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
        assert_eq!(stranger.get(path).await.status, StatusCode::OK, "{path}");
    }
    let ready = stranger.get("/readyz").await.json();
    assert_eq!(
        (&ready["ok"], &ready["checks"][0]["name"]),
        (&true.into(), &"store".into())
    );
    let metrics = service.metrics().await;
    for line in [
        "hikyaku_recipients_accepted_total{account=\"default\"} 7",
        "hikyaku_store_up 1",
        "hikyaku_queue_oldest_seconds",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    assert_eq!(
        stranger.get("/openapi.json").await.json()["openapi"],
        "3.1.0"
    );
}

#[tokio::test]
async fn unknown_paths_and_methods_are_problems() {
    let service = Service::start().await;
    for path in ["/", "/v1", "/v1/nothing", "/v1/batches/x/y"] {
        assert_eq!(
            service.api.get(path).await.problem().1,
            "not_found",
            "{path}"
        );
    }
    let reply = service
        .api
        .call(Method::DELETE, "/v1/batches", &[], Bytes::new())
        .await;
    assert_eq!(
        (reply.problem().0, reply.problem().1.as_str()),
        (405, "method_not_allowed")
    );
    assert!(reply.headers.contains_key("allow"));
}

#[tokio::test]
async fn draining_finishes_the_call_and_closes_the_door() {
    let service = Service::start().await;
    let address = service.api.base().trim_start_matches("http://").to_owned();
    let mut idle = TcpStream::connect(&address).await.expect("connected");
    let mut busy = TcpStream::connect(&address).await.expect("connected");
    let body = batch(&recipients(1, 1)).to_string();
    let head = format!(
        "POST /v1/batches HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         expect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        crate::harness::KEY,
        body.len()
    );
    busy.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = vec![0; 64];
    // It says 100 when the call is being read: from here on it is under way.
    let length = busy.read(&mut answer).await.expect("an answer");
    assert!(answer[..length].starts_with(b"HTTP/1.1 100"));
    let finishing = async move {
        busy.write_all(body.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        busy.read_to_string(&mut answer)
            .await
            .expect("answered and closed");
        answer
    };
    let (home, answer) = tokio::join!(service.stop(), finishing);
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!(idle.read(&mut [0; 1]).await.expect("closed"), 0);
    assert!(TcpStream::connect(&address).await.is_err());
    let service = Service::at(home).await;
    assert_eq!(
        service.api.get("/v1/batches").await.json()["items"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );
}

#[tokio::test]
async fn a_draining_process_keeps_no_long_poll() {
    let service = Service::start().await;
    let api: Caller = service.api.clone();
    let cursor = api.get("/v1/events").await.json()["next"]
        .as_str()
        .expect("a cursor")
        .to_owned();
    let poll = {
        let path = format!("/v1/events?after={cursor}&wait=30s");
        async move { api.get(&path).await.status }
    };
    // The poll has begun when the store was asked a second time.
    let stop = async {
        service.asked_for_events(2).await;
        service.stop().await
    };
    let both = async { tokio::join!(poll, stop).0 };
    let status = tokio::time::timeout(Duration::from_secs(20), both)
        .await
        .expect("at once");
    assert_eq!(status, StatusCode::OK);
}
