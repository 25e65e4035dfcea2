//! What an end means for further mail, by status profile (contract, section 6): every cell of the
//! table, over HTTP and SMTP.

use serde_json::{Value, json};
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

use crate::harness::{Home, Service, batch};

/// A daemon whose mail goes to `peer`, and whose account has this profile.
async fn service(peer: &SmtpPeer, profile: &str) -> Service {
    let home = Home::new("");
    let config = std::fs::read_to_string(home.config_file()).expect("a configuration");
    let account = "id = \"default\"\n";
    assert!(config.contains(account));
    let own = format!("{account}    status_profile = {profile:?}\n");
    std::fs::write(home.config_file(), config.replace(account, &own)).expect("written");
    let shaping = format!(
        "[default]\nrate = \"unlimited\"\nadaptive = false\nretry = [\"10s\"]\n\
         [domain.\"brief.example\"]\nretry = [\"10s\"]\nexpire = \"2s\"\n[mx]\n\"*\" = \"{}\"\n",
        peer.address()
    );
    std::fs::write(home.config_file().with_file_name("shaping.toml"), shaping).expect("written");
    Service::at(home).await
}

async fn get(service: &Service, path: &str) -> Value {
    let reply = service.api.get(path).await;
    assert_eq!(reply.status, 200, "{path}: {:?}", reply.bytes);
    reply.json()
}

/// Sends to all, and the statuses that they end with.
async fn send(service: &Service, to: &[&str]) -> (String, Vec<String>) {
    let recipients: Vec<_> = to.iter().map(|email| json!({"email": email})).collect();
    let reply = service.api.submit(&batch(&json!(recipients))).await;
    assert_eq!(reply.status, 202, "{:?}", reply.bytes);
    let id = reply.json()["id"].as_str().expect("an id").to_owned();
    let ended = async {
        while get(service, &format!("/v1/batches/{id}")).await["state"] != "completed" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, ended)
        .await
        .expect("all ended");
    let rows = get(service, &format!("/v1/batches/{id}/recipients")).await;
    let rows = rows["items"].as_array().expect("rows").iter();
    let statuses = rows.map(|row| row["status"].as_str().expect("a status").to_owned());
    (id, statuses.collect())
}

/// Refuses by the local part.
fn temper() -> Temper {
    Temper::accepting().rule(|question| {
        if question.event != smtp::ServerEvent::Rcpt {
            return None;
        }
        let (code, text) = match question.recipient.split('@').next()? {
            "unknown" => (550, "5.1.1 No such user"),
            "inactive" => (550, "5.2.1 The mailbox is disabled"),
            "full" => (552, "5.2.2 The mailbox is full"),
            "policy" => (550, "5.7.1 Administrative prohibition"),
            "spam" => (550, "5.7.1 This message is likely unsolicited email. To reduce the amount of spam sent to us, this message has been blocked."),
            "later" => (451, "4.3.0 Not now"),
            _ => return None,
        };
        Some(Answer::reply(code, text))
    })
}

const PEOPLE: [&str; 7] = [
    "well@x.example",
    "unknown@x.example",
    "inactive@x.example",
    "full@x.example",
    "policy@x.example",
    "spam@x.example",
    "later@brief.example",
];

const STATUSES: [&str; 7] = [
    "ok",
    "invalid_address",
    "error",
    "error",
    "error",
    "spam",
    "temporary_error",
];

/// Sends twice to everybody: who is stopped the second time, and why. The peer goes on.
async fn stopped_by(profile: &str) -> (SmtpPeer, Service, Vec<Option<String>>) {
    let peer = SmtpPeer::start(temper()).await.expect("a peer");
    let service = service(&peer, profile).await;
    let fresh = get(&service, "/v1/recipients/well@x.example").await;
    assert_eq!(fresh["delivery_status"], "unconfirmed");
    let (id, first) = send(&service, &PEOPLE).await;
    assert_eq!(
        first,
        [
            "delivered",
            "bounce",
            "bounce",
            "bounce",
            "bounce",
            "bounce",
            "failed"
        ]
    );
    let report = get(&service, &format!("/v1/batches/{id}/report")).await;
    let warned = report["warnings"][0].as_str().expect("a warning");
    assert!(warned.starts_with("refused as spam: 1;"), "{warned}");
    let (_, second) = send(&service, &PEOPLE).await;
    let mut stopped = Vec::new();
    for ((email, delivery_status), (first, second)) in
        PEOPLE.iter().zip(STATUSES).zip(first.iter().zip(second))
    {
        let person = get(&service, &format!("/v1/recipients/{email}")).await;
        assert_eq!(person["delivery_status"], delivery_status, "{email}");
        let reason = person["suppressions"][0]["reason"]
            .as_str()
            .map(str::to_owned);
        let is_stopped = reason.is_some();
        let expected = if is_stopped { "suppressed" } else { first };
        assert_eq!(second, expected, "{email}: {person}");
        stopped.push(reason);
    }
    (peer, service, stopped)
}

fn reasons<const N: usize>(of: [&str; N]) -> Vec<Option<String>> {
    of.iter()
        .map(|reason| (!reason.is_empty()).then(|| (*reason).to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_profile_stops_the_dead_and_a_mailbox_that_is_full_three_times() {
    let (_peer, service, stopped) = stopped_by("default").await;
    let expected = ["", "invalid_address", "inactive", "", "", "", ""];
    assert_eq!(stopped, reasons(expected));
    let (_, third) = send(&service, &["full@x.example"]).await;
    assert_eq!(third, ["bounce"]);
    let noticed = async {
        while service
            .api
            .get("/v1/suppressions/full@x.example")
            .await
            .status
            != 200
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let patience = std::time::Duration::from_secs(60);
    tokio::time::timeout(patience, noticed)
        .await
        .expect("the third is noticed");
    let found = get(&service, "/v1/suppressions/full@x.example").await;
    assert_eq!(found["items"][0]["reason"], "inactive", "{found}");
    let (id, fourth) = send(&service, &["full@x.example"]).await;
    assert_eq!(fourth, ["suppressed"]);
    let events = get(
        &service,
        &format!("/v1/events?batch={id}&types=email.suppressed"),
    )
    .await;
    assert_eq!(
        events["events"][0]["data"]["reason"], "inactive",
        "{events}"
    );
    drop(service.stop().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_profile_satori_stops_whoever_was_refused_for_good() {
    let (_peer, service, stopped) = stopped_by("satori").await;
    let expected = [
        "",
        "invalid_address",
        "inactive",
        "error",
        "error",
        "spam",
        "",
    ];
    assert_eq!(stopped, reasons(expected));
    // Whoever lifts it means it.
    let path = "/v1/suppressions/policy@x.example";
    let lifted = service
        .api
        .call(hyper::Method::DELETE, path, &[], bytes::Bytes::new())
        .await;
    assert_eq!(lifted.status, 204);
    let (_, again) = send(&service, &["policy@x.example", "spam@x.example"]).await;
    assert_eq!(again, ["bounce", "suppressed"]);
    drop(service.stop().await);
}
