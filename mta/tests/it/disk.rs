//! A disk that cannot take more.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Value, json};
use service::tasks::Tasks;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::harness::{Caller, Home, KEY, Service, batch, recipients};

#[tokio::test]
async fn without_room_for_the_spool_nothing_is_accepted() {
    let service = Service::start().await;
    std::fs::remove_dir_all(service.home.data_dir()).expect("removed");
    // More than a spool keeps in memory.
    let large = batch(&recipients(50_000, 3)).to_string();
    let reply = service.api.submit_bytes(large.clone()).await;
    assert_eq!(
        (reply.problem().0, reply.problem().1.as_str()),
        (503, "unavailable")
    );
    assert!(reply.headers.contains_key("retry-after"));
    service.api.assert_nothing_accepted().await;
    std::fs::create_dir_all(service.home.data_dir()).expect("made");
    let accepted = service.api.submit_bytes(large).await;
    assert_eq!(
        accepted.status,
        StatusCode::ACCEPTED,
        "{:?}",
        accepted.json()
    );
}

/// The real daemon, which may write no file larger than `kibibytes`: to it, the disk is full there.
async fn limited(home: &Home, kibibytes: u32) -> (Child, Caller) {
    // Ignored, the signal becomes an error of the write.
    let script = format!(
        "trap '' XFSZ; ulimit -f {}; exec \"$0\" --config \"$1\"",
        kibibytes * 2
    );
    let mut child = Command::new("/bin/sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_mta")])
        .arg(home.config_file())
        .envs(Home::environment())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let open = async {
        while let Some(line) = lines.next_line().await.expect("readable") {
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            if let Some(addr) = line.get("addr").or_else(|| line["fields"].get("addr")) {
                return addr.as_str().expect("an address").to_owned();
            }
        }
        panic!("the daemon ended");
    };
    let addr = tokio::time::timeout(Duration::from_secs(30), open)
        .await
        .expect("it opens");
    // Whoever writes to a pipe that nobody reads stops.
    drop(Tasks::new().spawn("log", async move {
        while let Ok(Some(_)) = lines.next_line().await {}
    }));
    (child, Caller::new(format!("http://{addr}"), KEY))
}

/// A batch whose values no compression makes small, of `count` times some 400 bytes.
fn noisy(count: u32) -> Value {
    let noise = |n: u32| -> String {
        let letters = std::iter::repeat_with(fastrand::alphanumeric).take(400);
        letters.chain(n.to_string().chars()).collect()
    };
    let row = |n| json!({"email": format!("b{n}@x.example"), "vars": {"v": noise(n)}});
    batch(&(0..count).map(row).collect())
}

async fn batch_ids(api: &Caller) -> BTreeSet<String> {
    let page = api.get("/v1/batches?limit=1000").await.json();
    let items = page["items"].as_array().expect("items").iter();
    items.map(|batch| batch["id"].to_string()).collect()
}

#[tokio::test]
async fn on_a_full_disk_nothing_is_half_accepted_and_nothing_is_lost() {
    let home = Home::new("");
    let (mut child, api) = limited(&home, 4 << 10).await;
    let mut accepted = BTreeSet::new();
    // Small enough for a spool in memory: it is the store that finds the disk full.
    let refused = loop {
        let reply = api.submit(&noisy(1_500)).await;
        if reply.status != StatusCode::ACCEPTED {
            break reply;
        }
        accepted.insert(reply.json()["id"].to_string());
        assert!(accepted.len() < 40, "the limit must come");
    };
    assert_eq!(
        (refused.problem().0, refused.problem().1.as_str()),
        (503, "unavailable")
    );
    assert!(refused.headers.contains_key("retry-after"));
    assert!(!accepted.is_empty());
    assert_eq!(batch_ids(&api).await, accepted);
    child.kill().await.expect("killed");
    let service = Service::at(home).await;
    assert_eq!(batch_ids(&service.api).await, accepted);
    for id in &accepted {
        let found = service
            .api
            .get(&format!("/v1/batches/{}", id.trim_matches('"')))
            .await
            .json();
        assert_eq!(found["counters"]["accepted"], 1_500);
    }
    assert_eq!(
        service.api.submit(&noisy(20_000)).await.json()["accepted"],
        20_000
    );
}
