//! A Redis that is ill rather than gone: it does not answer, only reads, has no room, or is far away.

use crate::chaos::{role, sites};
use crate::harness::{Service, TrackerProcess, newsletter, shaping, signal, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use std::time::{Duration, Instant};
use testkit::distance::Distance;
use testkit::redis::RedisServer;

const PEOPLE: usize = 900;
/// Nobody who clicks waits longer, whatever the store does.
const AT_ONCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
enum Illness {
    /// Connections stand, new ones are taken, and nothing is answered.
    Hangs,
    /// It was made a replica, of nobody that can be reached.
    OnlyReads,
    /// No write has room.
    IsFull,
}

impl Illness {
    fn befalls(self, redis: &RedisServer) -> Result<()> {
        match self {
            Self::Hangs => signal(redis.pid().context("a server")?, "STOP"),
            Self::OnlyReads => redis.ask(&["REPLICAOF", "127.0.0.1", "1"]).map(drop),
            Self::IsFull => redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).map(drop),
        }
    }

    fn leaves(self, redis: &RedisServer) -> Result<()> {
        match self {
            Self::Hangs => signal(redis.pid().context("a server")?, "CONT"),
            Self::OnlyReads => redis.ask(&["REPLICAOF", "NO", "ONE"]).map(drop),
            Self::IsFull => redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).map(drop),
        }
    }
}

async fn is_ready(node: &Service) -> Result<bool> {
    Ok(node.client.get("/readyz").await?.status.is_success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_ill_costs_time_and_nothing_else() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let durable = ["--appendonly", "yes", "--appendfsync", "everysec"];
    let redis = RedisServer::start(directory.path().to_owned(), &durable)?;
    let sink = Sink::keeping_messages().await?;
    let shaping = shaping(4, "60/s", sink.address());
    let sites = sites(1, &redis.url(), &shaping)?;
    let site = sites.first().context("a site")?;
    let node = site.start(role(site, "mta")).await?;
    let _tracker = TrackerProcess::start(site).await?;
    let id = node.submit(&newsletter(PEOPLE, 3)).await?;
    let browser = Client::new("", None);
    let mut clicks = 0;
    for illness in [Illness::Hangs, Illness::OnlyReads, Illness::IsFull] {
        let so_far = sink.copies();
        until("mail on its way", async || {
            let moved = sink.copies() > so_far + 20 || sink.distinct() == PEOPLE;
            Ok(moved.then_some(()))
        })
        .await?;
        illness.befalls(&redis)?;
        until("it to be noticed", async || {
            Ok((!is_ready(&node).await?).then_some(()))
        })
        .await?;
        let refused = node.client.post("/v1/batches", &newsletter(1, 1)).await?;
        assert_eq!(refused.status, 503, "{illness:?}: {}", refused.text());
        for link in sink.links(&site.tracker()).iter().take(20) {
            let asked = Instant::now();
            let answer = browser.get(link).await?;
            ensure!(answer.status == 302, "{illness:?}: HTTP {}", answer.status);
            ensure!(
                asked.elapsed() < AT_ONCE,
                "{illness:?}: {:?}",
                asked.elapsed()
            );
            clicks += 1;
        }
        illness.leaves(&redis)?;
        until("it to be well", async || {
            Ok(is_ready(&node).await?.then_some(()))
        })
        .await?;
    }
    let done = node.completed(&id).await?;
    assert_eq!(done["counters"]["delivered"], PEOPLE, "{done}");
    assert_eq!(sink.copies(), PEOPLE as u64, "nobody got it twice");
    until("all clicks to be counted", async || {
        let batch = node.batch(&id).await?;
        let total = batch["counters"]["clicked_total"]
            .as_u64()
            .context("clicks")?;
        ensure!(total <= clicks, "{total} counted of {clicks}");
        Ok((total == clicks).then_some(()))
    })
    .await
}

/// A tenth of a second each way: what a Redis in another region, or a busy one, takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_is_waited_for() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let far = Distance::to(
        ([127, 0, 0, 1], redis.port()).into(),
        Duration::from_millis(200),
    )
    .await?;
    let sink = Sink::start().await?;
    let shaping = shaping(4, "unlimited", sink.address());
    let sites = sites(1, &format!("redis://{}", far.address()), &shaping)?;
    let site = sites.first().context("a site")?;
    // Of a shorter one nothing is left: it counts from before it was asked for, and what is begun
    // must end in its last five seconds.
    site.edit(|config| config.replace("lease = \"6s\"", "lease = \"20s\""))?;
    let node = site.start(role(site, "mta")).await?;
    let id = node.submit(&newsletter(PEOPLE, 3)).await?;
    let done = node.completed(&id).await?;
    assert_eq!(done["counters"]["delivered"], PEOPLE, "{done}");
    sink.assert_one_copy_each(PEOPLE);
    ensure!(is_ready(&node).await?, "slow is not away");
    Ok(())
}
