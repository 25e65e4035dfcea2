//! Accounts, keys, quotas and imported suppressions over the API.

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use testkit::smtp_peer::{SmtpPeer, Temper};

use crate::harness::{Caller, Reply, Service, batch, recipients};

const ADMIN: &str = "[[api.keys]]\nname = \"admin\"\nkey_sha256 = \"8e9b90d9fe5bbb7b04e0b1fd5c1ab6c6e2a5a0b0e0b67f3b0b2bb4a4c2c0f7ac\"\naccount = \"default\"\nscopes = [\"submit\", \"read\", \"admin\"]\n";

/// A service whose administrator has this key.
async fn administered() -> (Service, Caller) {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, b"hk_admin");
    let hex: String = digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let known = ADMIN.split('"').nth(3).expect("a hash");
    let service = Service::with_api(&ADMIN.replace(known, &hex)).await;
    let admin = service.api.with_key("hk_admin");
    (service, admin)
}

async fn send(api: &Caller, method: Method, path: &str, body: &Value) -> Reply {
    let json = [("content-type", "application/json")];
    api.call(method, path, &json, body.to_string().into()).await
}

#[tokio::test]
async fn keys_are_made_shown_once_changed_and_removed() {
    let (service, admin) = administered().await;
    let refused = service.api.get("/v1/keys").await;
    assert_eq!(refused.problem().1, "forbidden_scope");
    let made = send(
        &admin,
        Method::POST,
        "/v1/keys",
        &json!({"name": "ci", "scopes": ["read"]}),
    )
    .await;
    let key = made.json();
    assert_eq!(made.status, StatusCode::CREATED, "{key}");
    let (id, secret) = (
        key["id"].as_str().expect("an id"),
        key["key"].as_str().expect("a key"),
    );
    assert_eq!(
        (&key["account"], &key["scopes"]),
        (&json!("default"), &json!(["read"]))
    );
    let path = format!("/v1/keys/{id}");
    assert_eq!(admin.get(&path).await.json().get("key"), None);
    let all = admin.get("/v1/keys").await.json();
    let names: Vec<_> = all["items"]
        .as_array()
        .expect("keys")
        .iter()
        .map(|key| (key["name"].clone(), key["source"].clone()))
        .collect();
    assert_eq!(names.len(), 5);
    assert!(
        names.contains(&(json!("ci"), json!("api")))
            && names.contains(&(json!("all"), json!("file")))
    );

    let own = service.api.with_key(secret);
    assert_eq!(own.get("/v1/batches").await.status, StatusCode::OK);
    assert_eq!(
        own.submit(&batch(&recipients(1, 1))).await.problem().1,
        "forbidden_scope"
    );
    let changed = send(
        &admin,
        Method::PATCH,
        &path,
        &json!({"scopes": ["submit", "read"]}),
    )
    .await;
    assert_eq!(changed.status, StatusCode::OK);
    assert_eq!(
        own.submit(&batch(&recipients(1, 1))).await.status,
        StatusCode::ACCEPTED
    );
    assert_eq!(
        admin
            .call(Method::DELETE, &path, &[], Bytes::new())
            .await
            .status,
        StatusCode::NO_CONTENT
    );
    assert_eq!(own.get("/v1/batches").await.problem().1, "unauthorized");
    assert_eq!(admin.get(&path).await.problem().1, "not_found");

    let bad = send(
        &admin,
        Method::POST,
        "/v1/keys",
        &json!({"name": "a b", "scopes": ["root"], "account": "nobody", "x": 1}),
    )
    .await;
    let (status, code, errors) = bad.problem();
    assert_eq!((status, code.as_str()), (422, "invalid_field"));
    assert_eq!(
        errors,
        [
            "/name invalid_field",
            "/scopes invalid_field",
            "/account invalid_field",
            "/x unknown_field"
        ]
    );
    let file = admin
        .call(Method::DELETE, "/v1/keys/all", &[], Bytes::new())
        .await;
    assert_eq!(file.problem().1, "invalid_state");
}

#[tokio::test]
async fn an_account_is_made_used_and_survives_a_restart() {
    let (service, admin) = administered().await;
    let made = send(&admin, Method::POST, "/v1/accounts", &json!({
        "id": "shop", "from_domains": ["brand.example"], "quota": "10/h", "weight": 3, "status_profile": "satori",
        "tracking": {"base_url": "https://t.shop.example/", "mode": "aggregate"},
    })).await;
    let account = made.json();
    assert_eq!(made.status, StatusCode::CREATED, "{account}");
    assert_eq!(
        (&account["tracking"]["base_url"], &account["source"]),
        (&json!("https://t.shop.example"), &json!("api"))
    );
    let again = send(&admin, Method::POST, "/v1/accounts", &json!({"id": "shop"})).await;
    assert_eq!(again.problem().1, "invalid_state");
    let key = send(
        &admin,
        Method::POST,
        "/v1/keys",
        &json!({"name": "shop", "account": "shop"}),
    )
    .await
    .json();
    let shop = service.api.with_key(key["key"].as_str().expect("a key"));
    let accepted = shop.submit(&batch(&recipients(3, 1))).await;
    assert_eq!(
        accepted.status,
        StatusCode::ACCEPTED,
        "{:?}",
        accepted.json()
    );
    let path = format!(
        "/v1/batches/{}",
        accepted.json()["id"].as_str().expect("an id")
    );
    assert_eq!(shop.get(&path).await.json()["account"], "shop");
    let mut foreign = batch(&recipients(1, 1));
    foreign["from"] = json!({"email": "a@keyless.example"});
    assert_eq!(shop.submit(&foreign).await.problem().1, "forbidden_from");

    let home = service.stop().await;
    let service = Service::at(home).await;
    let (shop, admin) = (
        service.api.with_key(key["key"].as_str().expect("a key")),
        service.api.with_key("hk_admin"),
    );
    assert_eq!(shop.get(&path).await.status, StatusCode::OK);
    let changed = send(
        &admin,
        Method::PATCH,
        "/v1/accounts/shop",
        &json!({"weight": 0}),
    )
    .await;
    assert_eq!(changed.problem().2, ["/weight invalid_field"]);
    let changed = send(
        &admin,
        Method::PATCH,
        "/v1/accounts/shop",
        &json!({"quota": "none"}),
    )
    .await
    .json();
    assert_eq!(
        (&changed["quota"], &changed["weight"]),
        (&json!("none"), &json!(3))
    );
    let file = send(
        &admin,
        Method::PATCH,
        "/v1/accounts/default",
        &json!({"weight": 2}),
    )
    .await;
    assert_eq!(file.problem().1, "invalid_state");
    let removed = admin
        .call(Method::DELETE, "/v1/accounts/shop", &[], Bytes::new())
        .await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
    assert_eq!(shop.get("/v1/batches").await.problem().1, "unauthorized");
}

#[tokio::test]
async fn a_quota_is_counted_told_and_given_back() {
    let (service, admin) = administered().await;
    send(
        &admin,
        Method::POST,
        "/v1/accounts",
        &json!({"id": "small", "quota": "10/h"}),
    )
    .await;
    let key = send(
        &admin,
        Method::POST,
        "/v1/keys",
        &json!({"name": "small", "account": "small"}),
    )
    .await
    .json();
    let small = service.api.with_key(key["key"].as_str().expect("a key"));
    let first = small.submit(&batch(&recipients(7, 1))).await;
    assert_eq!(first.status, StatusCode::ACCEPTED);
    assert_eq!(first.headers["ratelimit-policy"], "\"quota\";q=10;w=3600");
    assert_eq!(first.headers["ratelimit-remaining"], "3");
    // What is refused takes nothing.
    let mut bad = batch(&json!([{"mail": 1}, {"email": "a@x.example"}]));
    bad["campaign"] = json!("bad");
    assert_eq!(
        small.submit(&bad).await.status,
        StatusCode::UNPROCESSABLE_ENTITY
    );
    let over = small.submit(&batch(&recipients(4, 1))).await;
    assert_eq!(
        (over.status, over.problem().1.as_str()),
        (StatusCode::TOO_MANY_REQUESTS, "quota_exceeded")
    );
    let wait: u64 = over.headers["retry-after"]
        .to_str()
        .expect("text")
        .parse()
        .expect("seconds");
    assert!((3_590..=3_600).contains(&wait), "{wait}");
    assert!(
        over.headers["ratelimit"]
            .to_str()
            .expect("text")
            .starts_with("\"quota\";r=3;t=")
    );
    assert_eq!(
        small.submit(&batch(&recipients(3, 1))).await.headers["ratelimit-remaining"],
        "0"
    );
    let one = json!({"from": {"email": "news@brand.example"}, "subject": "x", "text": "y", "to": {"email": "a@x.example"}});
    assert_eq!(
        send(&small, Method::POST, "/v1/messages", &one)
            .await
            .problem()
            .1,
        "quota_exceeded"
    );
    // Others have their own.
    assert_eq!(
        service.api.submit(&batch(&recipients(20, 1))).await.status,
        StatusCode::ACCEPTED
    );
}

#[tokio::test]
async fn suppressions_are_imported_in_lines_and_tables() {
    let service = Service::start().await;
    let post = async |media: &str, body: String| {
        service
            .api
            .call(
                Method::POST,
                "/v1/suppressions",
                &[("content-type", media)],
                body.into(),
            )
            .await
    };
    let lines = "{\"email\":\"A@x.example\",\"reason\":\"unsubscribed\",\"list\":\"news\"}\n{\"email\":\"nobody\"}\n{\"email\":\"b@x.example\",\"reason\":\"whim\"}\nx\n{\"email\":\"c@x.example\"}\n";
    let imported = post("application/x-ndjson", lines.to_owned()).await.json();
    assert_eq!(
        (&imported["accepted"], &imported["rejected_count"]),
        (&json!(2), &json!(3)),
        "{imported}"
    );
    let codes: Vec<_> = imported["rejected"]
        .as_array()
        .expect("rejected")
        .iter()
        .map(|of| (of["index"].clone(), of["code"].clone()))
        .collect();
    assert_eq!(
        codes,
        [
            (json!(1), json!("invalid_address")),
            (json!(2), json!("invalid_field")),
            (json!(3), json!("malformed_body"))
        ]
    );
    let mut table = "email,reason,list\n".to_owned();
    for n in 0..1_200 {
        table.push_str(&format!("t{n}@y.example,complaint,\n"));
    }
    let imported = post("text/csv", table).await.json();
    assert_eq!(
        (&imported["accepted"], &imported["rejected_count"]),
        (&json!(1_200), &json!(0))
    );
    let one = service.api.get("/v1/suppressions/a@x.example").await.json();
    assert_eq!(
        (&one["items"][0]["reason"], &one["items"][0]["list"]),
        (&json!("unsubscribed"), &json!("news"))
    );
    let one = service
        .api
        .get("/v1/suppressions/t1199@y.example")
        .await
        .json();
    assert_eq!(
        (&one["items"][0]["reason"], &one["items"][0]["list"]),
        (&json!("complaint"), &Value::Null)
    );
    assert_eq!(
        post("application/json", "{}".to_owned()).await.problem().1,
        "unsupported_media"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_made_over_the_api_has_its_weight_after_a_restart_too() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let (service, admin) = administered().await;
    let account = json!({"id": "heavy", "weight": 2, "dkim": "optional"});
    let made = send(&admin, Method::POST, "/v1/accounts", &account).await;
    assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.bytes);
    let key = json!({"name": "heavy", "account": "heavy", "scopes": ["submit", "read"]});
    let made = send(&admin, Method::POST, "/v1/keys", &key).await.json();
    let key = made["key"].as_str().expect("a key").to_owned();
    let home = service.stop().await;
    let shaping = format!(
        "[default]\nrate = \"40/s\"\nadaptive = false\n[mx]\n\"*\" = \"{}\"\n",
        peer.address()
    );
    std::fs::write(home.config_file().with_file_name("shaping.toml"), shaping).expect("written");
    let service = Service::at(home).await;
    // Twice over, so that a change of a running service counts as well.
    let mut before = 0_usize;
    for weight in [2, 8] {
        let admin = service.api.with_key("hk_admin");
        let change = json!({"weight": weight});
        let changed = send(&admin, Method::PATCH, "/v1/accounts/heavy", &change).await;
        assert_eq!(changed.status, StatusCode::OK);
        let mut batches = Vec::new();
        for (api, name) in [
            (&service.api, "light"),
            (&service.api.with_key(&key), "heavy"),
        ] {
            let to: Vec<_> = (0..400)
                .map(|n| json!({"email": format!("{name}{n}@x.example")}))
                .collect();
            let reply = api.submit(&batch(&json!(to))).await;
            assert_eq!(reply.status, StatusCode::ACCEPTED, "{:?}", reply.bytes);
            let id = reply.json()["id"].as_str().expect("an id").to_owned();
            batches.push((api.clone(), id));
        }
        // Those of the moment in which only one of them was there do not count.
        peer.wait_for(before as u64 + 40).await.expect("some");
        peer.wait_for(before as u64 + 160).await.expect("more");
        let messages = peer.messages();
        let some = messages.iter().skip(before + 40).take(120);
        let heavy = some
            .filter(|message| message.recipients[0].starts_with("heavy"))
            .count();
        // Of 120, 80 and 106 by weight.
        let expected = 120 * weight / (weight + 1);
        assert!(
            heavy.abs_diff(expected) <= 15,
            "{heavy} of 120 with weight {weight}"
        );
        for (api, id) in &batches {
            let path = format!("/v1/batches/{id}/cancel");
            assert_eq!(api.post(&path).await.status, StatusCode::OK);
        }
        for (api, id) in &batches {
            while api.get(&format!("/v1/batches/{id}")).await.json()["completed_at"].is_null() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
        before = peer.messages().len();
    }
    drop(service.stop().await);
}
