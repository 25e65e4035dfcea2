//! Redis is away under load, and comes back: nobody who clicks notices, and nothing is lost.
//!
//! For some seconds; `HIKYAKU_TEST_FULL=1`: for ten minutes.

use crate::chaos::{full, role, sites, sum_of};
use crate::harness::{TrackerProcess, newsletter, shaping, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use std::time::{Duration, Instant};
use testkit::redis::RedisServer;

const PEOPLE: usize = 600;
/// No redirect takes longer, with or without a store.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Follows one link after the other for so long; how many were answered.
async fn click(links: &[String], every: Duration, long: Duration) -> Result<u64> {
    let browser = Client::new("", None);
    let begun = Instant::now();
    let mut answered = 0;
    let mut turn = tokio::time::interval(every);
    for link in links.iter().cycle() {
        if begun.elapsed() >= long {
            break;
        }
        turn.tick().await;
        let asked = Instant::now();
        let answer = browser.get(link).await?;
        ensure!(answer.status == 302, "HTTP {} to {link}", answer.status);
        ensure!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
        answered += 1;
    }
    Ok(answered)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_costs_no_click_and_no_outcome() -> Result<()> {
    let away = Duration::from_secs(if full() { 600 } else { 4 });
    let directory = tempfile::tempdir()?;
    let durable = ["--appendonly", "yes", "--appendfsync", "everysec"];
    let mut redis = RedisServer::start(directory.path().to_owned(), &durable)?;
    let sink = Sink::keeping_messages().await?;
    // A sixth of the people are due in the seconds that the outage takes at least.
    let shaping = shaping(4, "40/s", sink.address());
    let sites = sites(1, &redis.url(), &shaping)?;
    let site = sites.first().context("a site")?;
    let node = site.start(role(site, "mta")).await?;
    let _tracker = TrackerProcess::start(site).await?;
    let id = node.submit(&newsletter(PEOPLE, 3)).await?;
    until("mail on its way", async || {
        Ok((sink.copies() > 100).then_some(()))
    })
    .await?;
    let links = sink.links(&site.tracker());
    let every = Duration::from_millis(20);
    let mut clicks = click(&links, every, Duration::from_secs(1)).await?;

    redis.kill();
    clicks += click(&links, every, away).await?;
    // Mail that nobody can take responsibility for is not taken, and what is known is kept.
    let refused = node.client.post("/v1/batches", &newsletter(1, 1)).await?;
    assert_eq!(refused.status, 503, "{}", refused.text());
    let pending = async || {
        let page = node.client.get("/metrics").await?.ok()?.text();
        let pending = sum_of(&page, "hikyaku_journal_pending_records");
        anyhow::Ok((pending, sum_of(&page, "hikyaku_store_up")))
    };
    let (kept, up) = pending().await?;
    assert_eq!(up, 0.0, "it says that its store is away");
    let sent_while_away = sink.copies();
    redis.restart()?;
    clicks += click(&links, every, Duration::from_secs(1)).await?;

    let done = node.completed(&id).await?;
    assert_eq!(done["counters"]["delivered"], PEOPLE, "{done}");
    assert_eq!(sink.copies(), PEOPLE as u64, "nobody got it twice");
    let counted = until("all clicks to be counted", async || {
        let batch = node.batch(&id).await?;
        let total = batch["counters"]["clicked_total"]
            .as_u64()
            .context("clicks")?;
        ensure!(total <= clicks, "{total} counted of {clicks}");
        Ok((total == clicks).then_some(total))
    })
    .await?;
    until("the journal to be empty", async || {
        Ok((pending().await?.0 == 0.0).then_some(()))
    })
    .await?;
    println!(
        "{away:?} away: {counted} clicks, {kept} records in the node's journal meanwhile, {sent_while_away} of {PEOPLE} sent before it was back"
    );
    Ok(())
}
