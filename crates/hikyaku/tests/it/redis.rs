//! Two MTA nodes and a tracker, three processes that share nothing but a Redis.

use crate::harness::{Site, TrackerProcess, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use std::collections::BTreeSet;
use std::process::Command;
use testkit::redis::RedisServer;

const PEOPLE: usize = 600;
const DOMAINS: usize = 7;

/// A site whose store is this Redis, with leases as short as they may be.
fn site(sink: &Sink, redis: &RedisServer) -> Result<Site> {
    let site = Site::new(&sink.address())?;
    site.edit(|config| {
        let store = format!("[store]\nurl = \"{}\"\nlease = \"6s\"\n", redis.url());
        config.replace("[api]\n", &format!("{store}[api]\n"))
    })?;
    Ok(site)
}

fn mta(site: &Site) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
    command.arg("mta").arg("--config").arg(site.config());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_is_replaced_by_another() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let sink = Sink::keeping_messages().await?;
    let (one, two) = (site(&sink, &redis)?, site(&sink, &redis)?);
    let first = one.start(mta(&one)).await?;
    // Links are made by either node and followed at one tracker: they share its key.
    std::fs::create_dir_all(two.dir.path().join("data"))?;
    let key = |site: &Site| site.dir.path().join("data/tracking.key");
    std::fs::copy(key(&one), key(&two)).context("the tracking key")?;
    two.edit(|config| config.replace(&two.tracker(), &one.tracker()))?;
    let second = two.start(mta(&two)).await?;
    let _tracker = TrackerProcess::start(&one).await?;

    let id = first.submit(&newsletter(PEOPLE, DOMAINS)).await?;
    until("the first deliveries", async || {
        Ok((sink.copies() > 20).then_some(()))
    })
    .await?;
    first.kill()?;
    // What the dead node held comes free with its lease; what it may have started waits a second.
    let done = second.completed(&id).await?;
    assert_eq!(done["counters"]["accepted"], PEOPLE);
    assert_eq!(done["counters"]["delivered"], PEOPLE);
    let got: Vec<String> = sink
        .messages()
        .into_iter()
        .flat_map(|message| message.recipients)
        .collect();
    let distinct: BTreeSet<&String> = got.iter().collect();
    assert_eq!(distinct.len(), PEOPLE);
    // Second copies: at most what the dead node may have started in each queue and not reported.
    let doubtful = DOMAINS * usize::try_from(store::WINDOW)?;
    ensure!(got.len() <= PEOPLE + doubtful, "{} copies", got.len());

    let links = sink.links(&one.tracker());
    let browser = Client::new("", None);
    let link = links.first().context("a link")?;
    assert_eq!(browser.get(link).await?.status, 302);
    until("the click in the counters", async || {
        let batch = second.batch(&id).await?;
        Ok((batch["counters"]["clicked_unique"] == 1).then_some(()))
    })
    .await?;
    // A store that syncs every second says so.
    let ready = Client::new(two.api(), None).get("/readyz").await?;
    ensure!(ready.text().contains("everysec"), "{}", ready.text());
    let status = second.terminate().await?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}
