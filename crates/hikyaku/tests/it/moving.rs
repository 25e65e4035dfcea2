//! A store that is kept as a file, filled from it, and completed from a journal, by the commands.

use crate::harness::{Service, Site, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use testkit::redis::{RedisCluster, RedisServer};
use testkit::smtp_peer::{Answer, Temper};
use testkit::webhook::{Delivery, HookReceiver, Mood};

/// A newsletter to so many people of one domain.
fn to_held(count: usize) -> Result<Value> {
    let mut batch = newsletter(count, 1);
    let people = batch["recipients"].as_array_mut().context("a list")?;
    for (at, person) in people.iter_mut().enumerate() {
        person["email"] = json!(format!("user{at}@held.example"));
    }
    Ok(batch)
}

/// The journal of the MTA of a site.
fn journal_of(site: &Site) -> Result<PathBuf> {
    let dir = site.dir.path().join("data/journal");
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("mta-"))
        {
            return Ok(path);
        }
    }
    anyhow::bail!("no journal")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_and_a_lost_nodes_journal_together_lose_nobody() -> Result<()> {
    let sink = Sink::start().await?;
    let old = Site::unsigned(&sink.address())?;
    let service = old.up().await?;
    let done = service.submit(&newsletter(40, 2)).await?;
    service.completed(&done).await?;
    let mut coming = newsletter(5, 1);
    coming["send_at"] = json!("2099-01-01T00:00:00Z");
    let coming = service.submit(&coming).await?;
    // Waits while the backup is made, and is delivered after it.
    let path = "/v1/destinations/held.example";
    let hold = json!({"for": "1h", "reason": "a test"});
    service
        .client
        .post(&format!("{path}/suspend"), &hold)
        .await?
        .ok()?;
    let flying = service.submit(&to_held(30)?).await?;
    let file = old.dir.path().join("backup");
    let file = file.to_str().context("a path")?;
    let (status, said) = old.hikyaku(&["store", "export", file])?;
    assert!(
        status.success() && said.contains("2 not finished"),
        "{said}"
    );
    let (status, said) = old.hikyaku(&["store", "export", file])?;
    assert_eq!(status.code(), Some(1), "{said}");
    service
        .client
        .post(&format!("{HELD}/resume"), &json!({}))
        .await?
        .ok()?;
    service.completed(&flying).await?;
    let journal = journal_of(&old)?;
    let journal = journal.to_str().context("a path")?;
    let (status, said) = old.hikyaku(&["journal", "ship", journal])?;
    assert!(!status.success() && said.contains("open"), "{said}");
    service.kill()?;
    let copies = sink.copies();

    // The machine is gone; the backup and the disk with the journal are not.
    let new = Site::unsigned(&sink.address())?;
    let (status, said) = new.hikyaku(&["store", "import", file])?;
    assert!(status.success() && said.contains("paused"), "{said}");
    let (status, said) = new.hikyaku(&["store", "import", file])?;
    assert!(
        status.code() == Some(1) && said.contains("not empty"),
        "{said}"
    );
    for (handed, known) in [(true, false), (false, true)] {
        let (status, said) = new.hikyaku(&["journal", "ship", journal])?;
        assert!(status.success(), "{said}");
        assert_eq!(said.starts_with("0 facts"), !handed, "{said}");
        assert_eq!(said.contains(" 70 were known"), known, "{said}");
    }
    // Links that were sent are signed with it: a node without it says that it is not ready.
    let key = "data/tracking.key";
    std::fs::copy(old.dir.path().join(key), new.dir.path().join(key))?;
    let service = new.up().await?;
    for (id, state, counter, count) in [
        (&done, "completed", "delivered", 40),
        (&flying, "completed", "delivered", 30),
        (&coming, "paused", "scheduled", 5),
    ] {
        let batch = service.batch(id).await?;
        assert_eq!(
            (&batch["state"], &batch["counters"][counter]),
            (&json!(state), &json!(count)),
            "{batch}"
        );
    }
    let events = service
        .client
        .get("/v1/events?types=email.delivered&limit=1000")
        .await?;
    let events: Value = events.ok()?.json()?;
    assert_eq!(events["events"].as_array().map(Vec::len), Some(70));
    assert_eq!(sink.copies(), copies, "nobody got anything twice");
    Ok(())
}

#[test]
fn a_file_that_is_no_export_is_refused() -> Result<()> {
    let site = Site::unsigned("127.0.0.1:9")?;
    let file = site.dir.path().join("backup");
    std::fs::write(&file, b"HIKYAKUSTORE\x02\x00and so on")?;
    let (status, said) = site.hikyaku(&["store", "import", file.to_str().context("a path")?])?;
    assert!(
        status.code() == Some(1) && said.contains("version"),
        "{said}"
    );
    assert!(!site.dir.path().join("data/hikyaku.db").exists());
    Ok(())
}

/// A site whose store is there; retries wait for an hour.
fn site_on(sink: &Sink, store: &str) -> Result<Site> {
    let shaping = format!(
        "{}[mx]\n\"*\" = \"{}\"\n",
        Site::quick_shaping().replace("1s", "1h"),
        sink.address()
    );
    let site = Site::with(&shaping, "[webhooks]\nallow_private = [\"127.0.0.0/8\"]\n")?;
    site.edit(|config| {
        let store = format!("[store]\nurl = \"{store}\"\npartitions = 4\nlease = \"6s\"\n[api]\n");
        config
            .replace("[api]\n", &store)
            .replace("[tracker]\n", "[tracker]\nsettle = \"500ms\"\n")
    })?;
    Ok(site)
}

/// Fills a site from an export of another, which has ended, and starts it. `unfinished`: some batch is.
async fn moved(from: &Site, file: &str, to: &Site, unfinished: bool) -> Result<Service> {
    let (status, said) = to.hikyaku(&["store", "import", file])?;
    ensure!(status.success(), "{said}");
    assert_eq!(said.contains("paused"), unfinished, "{said}");
    let key = "data/tracking.key";
    std::fs::create_dir_all(to.dir.path().join("data"))?;
    std::fs::copy(from.dir.path().join(key), to.dir.path().join(key))?;
    to.up().await
}

/// Ends a service and makes a file of its store.
async fn exported(site: &Site, service: Service) -> Result<String> {
    let status = service.terminate().await?;
    ensure!(status.success(), "{status}");
    let file = site.dir.path().join("backup");
    let file = file.to_str().context("a path")?.to_owned();
    let (status, said) = site.hikyaku(&["store", "export", &file])?;
    ensure!(status.success(), "{said}");
    Ok(file)
}

async fn listed(service: &Service, path: &str) -> Result<Vec<Value>> {
    let list: Value = service.client.get(path).await?.ok()?.json()?;
    ensure!(list["next_cursor"].is_null(), "more of {path}");
    list["items"].as_array().cloned().context("no items")
}

/// Everything that a store says of these batches, their people, what stops mail and who is told;
/// but for the numbers of events, which each store gives anew, scores, which fall with time, and how
/// far webhooks have come.
async fn reading(service: &Service, batches: &[&str]) -> Result<BTreeMap<String, Value>> {
    let mut read = BTreeMap::new();
    for id in batches {
        let batch = service.batch(id).await?;
        for field in ["counters", "created_at", "started_at", "campaign", "list"] {
            read.insert(format!("{field} of {id}"), batch[field].clone());
        }
        let path = format!("/v1/batches/{id}/recipients?limit=1000");
        let rows = listed(service, &path).await?;
        ensure!(!rows.is_empty(), "{path}");
        for row in rows {
            read.insert(format!("row {}", row["message_id"]), row);
        }
    }
    for path in [
        "/v1/prospects?limit=1000",
        "/v1/suppressions",
        "/v1/webhooks",
    ] {
        let mut items = listed(service, path).await?;
        ensure!(!items.is_empty(), "{path}");
        for item in &mut items {
            for moving in ["score", "cursor", "delivered_at", "failure", "state"] {
                item.as_object_mut().context("an object")?.remove(moving);
            }
        }
        read.insert(path.to_owned(), items.into());
    }
    let path = "/v1/events?limit=1000";
    let events: Value = service.client.get(path).await?.ok()?.json()?;
    for event in events["events"].as_array().context("events")? {
        let mut event = event.clone();
        event.as_object_mut().context("an object")?.remove("seq");
        read.insert(format!("event {}", event["id"]), event);
    }
    Ok(read)
}

/// What differs between two readings.
fn assert_same(was: &BTreeMap<String, Value>, is: &BTreeMap<String, Value>) {
    let names = was.keys().chain(is.keys());
    let differ: BTreeMap<_, _> = names
        .filter(|name| was.get(*name) != is.get(*name))
        .map(|name| (name, (was.get(name), is.get(name))))
        .collect();
    assert!(differ.is_empty(), "{differ:#?}");
}

/// The bounces of which a webhook was told and took them.
fn bounces_in(got: &[Delivery]) -> usize {
    let taken = got.iter().filter(|delivery| delivery.is_taken);
    let bodies = taken.filter_map(|of| serde_json::from_slice::<Value>(&of.body).ok());
    let ids = bodies.flat_map(|body| body["events"].as_array().cloned().unwrap_or_default());
    let ids: BTreeSet<String> = ids.map(|event| event["id"].to_string()).collect();
    ids.len()
}

/// The destination that is suspended.
const HELD: &str = "/v1/destinations/held.example";

/// Makes a webhook, stops mail to one person, sends a batch of which some bounce and some are to come
/// again, and submits one to a destination that is suspended; these two.
async fn filled(service: &Service, receiver: &HookReceiver) -> Result<(String, String)> {
    let hook = json!({"url": receiver.url("/hook"), "types": ["email.bounced"]});
    let made = service.client.post("/v1/webhooks", &hook).await?;
    ensure!(made.status == 201, "{}", made.text());
    let stopped = "/v1/suppressions/user3@held.example";
    let (json, reason) = (Some("application/json"), br#"{"reason": "manual"}"#);
    let put = hyper::Method::PUT;
    let stop = service
        .client
        .call(put, stopped, json, reason.as_slice().into());
    stop.await?.ok()?;
    // Of sixty six do not exist, and six are told to come again.
    let some = service.submit(&newsletter(60, 3)).await?;
    until("everybody to have been tried", async || {
        let of = &service.batch(&some).await?["counters"];
        let (delivered, bounced) = (&of["delivered"], &of["bounce"]);
        let all = *delivered == 48 && *bounced == 6 && of["temporary_error"] == 6;
        all.then_some(Some(())).with_context(|| of.to_string())
    })
    .await?;
    let hold = json!({"for": "1h", "reason": "a test"});
    let suspend = format!("{HELD}/suspend");
    service.client.post(&suspend, &hold).await?.ok()?;
    let held = service.submit(&to_held(30)?).await?;
    until("nobody else to be sent to", async || {
        let of = &service.batch(&held).await?["counters"];
        let all = of["queued"] == 29 && of["suppressed"] == 1;
        all.then_some(Some(())).with_context(|| of.to_string())
    })
    .await?;
    Ok((some, held))
}

/// Somebody clicks, and is known for it.
async fn clicked(service: &Service, site: &Site, sink: &Sink) -> Result<()> {
    let link = sink
        .links(&site.tracker())
        .into_iter()
        .next()
        .context("a link")?;
    assert_eq!(Client::new("", None).get(&link).await?.status, 302);
    let first = sink.messages().into_iter().next().context("a message")?;
    let number: String = first.recipients.concat();
    let number: String = number
        .chars()
        .take_while(|c| *c != '@')
        .filter(char::is_ascii_digit)
        .collect();
    let person = format!("/v1/prospects/p-{number}");
    until("the click at its person", async || {
        let person: Value = service.client.get(&person).await?.ok()?.json()?;
        let timeline = person["timeline"].as_array().context("a timeline")?;
        let clicked = timeline
            .iter()
            .any(|entry| entry["type"] == "email.clicked");
        clicked
            .then_some(Some(()))
            .with_context(|| person.to_string())
    })
    .await?;
    Ok(())
}

/// A Redis that is outgrown: everything moves to a Cluster, is finished there, and moves to a file.
#[tokio::test(flavor = "multi_thread")]
async fn from_one_redis_to_a_cluster_and_back_to_a_file() -> Result<()> {
    let unknown = || {
        let answer = Answer::reply(550, "5.1.1 user unknown");
        Temper::accepting().refusing_recipients(answer, |to| to.contains("7@"))
    };
    let sink = Sink::keeping_messages_of(
        unknown().refusing_recipients(Answer::reply(451, "4.2.0 come again"), |to| {
            to.contains("5@")
        }),
    )
    .await?;
    let directory = tempfile::tempdir()?;
    let aof = ["--appendonly", "yes"];
    let redis = RedisServer::start(directory.path().to_owned(), &aof)?;
    let cluster = RedisCluster::start(directory.path(), 3, 1)?;
    let one = site_on(&sink, &redis.url())?;
    let many = site_on(&sink, &cluster.url())?;
    let file = site_on(&sink, "sqlite:hikyaku.db")?;

    let service = one.up().await?;
    let receiver = HookReceiver::start().await?;
    receiver.mood(Mood::Refuse(500));
    let (some, held) = filled(&service, &receiver).await?;
    clicked(&service, &one, &sink).await?;
    let batches = [&*some, &*held];
    let was = reading(&service, &batches).await?;
    let copies = sink.copies();
    let backup = exported(&one, service).await?;

    let service = moved(&one, &backup, &many, true).await?;
    assert_same(&was, &reading(&service, &batches).await?);
    assert_eq!(
        sink.copies(),
        copies,
        "nothing leaves before somebody says so"
    );
    let nobody = |p: usize| {
        let key = format!("hikyaku:{{{p}}}:n:prospect/default");
        let found = cluster
            .nodes
            .iter()
            .map(|node| node.ask(&["HLEN", &key]).unwrap_or_default());
        found
            .into_iter()
            .all(|count| count.parse().unwrap_or(0) == 0)
    };
    ensure!(!(0..4).any(nobody), "people in few partitions");
    // A webhook that took nothing there is told all of it here. The rest is finished: those that were
    // held, and those that were to come again.
    receiver.mood(Mood::Take);
    sink.set_temper(unknown());
    for call in [
        format!("{HELD}/resume"),
        format!("/v1/batches/{held}/resume"),
        format!("/v1/batches/{some}/resume"),
        format!("/v1/batches/{some}/retry"),
    ] {
        service.client.post(&call, &json!({})).await?.ok()?;
    }
    let done = service.completed(&some).await?;
    assert_eq!(done["counters"]["delivered"], 54, "{done}");
    let done = service.completed(&held).await?;
    let of = &done["counters"];
    assert_eq!(
        (&of["delivered"], &of["bounce"]),
        (&json!(26), &json!(3)),
        "{done}"
    );
    assert_eq!(of["suppressed"], 1, "{done}");
    receiver.until(|got| bounces_in(got) == 6 + 3).await;
    let was = reading(&service, &batches).await?;
    let backup = exported(&many, service).await?;

    let service = moved(&many, &backup, &file, false).await?;
    assert_same(&was, &reading(&service, &batches).await?);
    let got = sink
        .messages()
        .into_iter()
        .flat_map(|message| message.recipients);
    let mut got: Vec<String> = got.collect();
    assert_eq!(got.len(), 54 + 26);
    got.sort_unstable();
    got.dedup();
    assert_eq!(got.len(), 54 + 26, "nobody got anything twice");
    Ok(())
}
