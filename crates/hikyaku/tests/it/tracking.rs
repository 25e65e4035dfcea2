//! Links and what follows from them, while the store is away and the tracker dies.
//!
//! `HIKYAKU_TEST_FULL=1` kills the tracker every five seconds for a minute.

use crate::harness::{Service, Site, TrackerProcess, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result, bail, ensure};
use hikyaku::client::Client;
use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::redis::RedisServer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What a person's browser says.
pub(crate) const PERSON: &str =
    "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0";
/// Who clicks at the same time.
const CLICKERS: usize = 4;

fn role(site: &Site, role: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
    command.arg(role).arg("--config").arg(site.config());
    command
}

/// A site on this Redis.
fn site(sink: &Sink, redis: &RedisServer) -> Result<Site> {
    let site = Site::unsigned(&sink.address())?;
    site.edit(|config| {
        let store = format!("[store]\nurl = \"{}\"\nlease = \"6s\"\n", redis.url());
        config.replace("[api]\n", &format!("{store}[api]\n"))
    })?;
    Ok(site)
}

/// Who has no store yet serves what needs none, and says what it waits for.
async fn waits_for_its_store(site: &Site, mta: &Service, link: &str) -> Result<()> {
    let browser = Client::new("", None);
    until("a link that works", async || {
        let answer = browser.get(link).await?;
        ensure!(answer.status == 302, "{}", answer.status);
        Ok(Some(()))
    })
    .await?;
    let admin = Client::new(site.tracker_admin(), None);
    assert_eq!(admin.get("/healthz").await?.status, 200);
    let ready = admin.get("/readyz").await?;
    ensure!(
        ready.status == 503
            && ready
                .text()
                .contains("has not been reached since the start"),
        "{}",
        ready.text()
    );
    until("the API", async || {
        Ok(Some(mta.client.get("/healthz").await?.ok()?))
    })
    .await?;
    let ready = mta.client.get("/readyz").await?;
    ensure!(
        ready.status == 503 && ready.text().contains("\"store\",\"ok\":false"),
        "{}",
        ready.text()
    );
    mta.client.get("/metrics").await?.ok()?;
    let refused = mta.client.post("/v1/batches", &newsletter(1, 1)).await?;
    ensure!(
        refused.status == 503 && refused.text().contains("\"unavailable\""),
        "{}",
        refused.text()
    );
    ensure!(
        refused.headers.contains_key("retry-after"),
        "when to come again"
    );
    // A key that was made over the API may be a good one.
    let other = Client::new(site.api(), Some("hk_made_over_the_api".to_owned()));
    assert_eq!(other.get("/v1/batches").await?.status, 503);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_at_the_start_is_waited_for() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let sink = Sink::keeping_messages().await?;
    let site = site(&sink, &redis)?;
    let service = site.up().await?;
    let id = service.submit(&newsletter(2, 1)).await?;
    service.completed(&id).await?;
    let links = sink.links(&site.tracker());
    let link = links.first().context("a link")?;
    assert_eq!(service.terminate().await?.code(), Some(0));

    let clicked = async |service: &Service, count: u64| {
        until("the clicks in the counters", async || {
            let batch = service.batch(&id).await?;
            Ok((batch["counters"]["clicked_total"] == count).then_some(()))
        })
        .await
    };
    redis.kill();
    let (mut mta, tracker) = (
        site.spawn(role(&site, "mta"))?,
        TrackerProcess::spawn(&site)?,
    );
    waits_for_its_store(&site, &mta, link).await?;
    redis.restart()?;
    mta.ready().await?;
    tracker.ready(&site).await?;
    clicked(&mta, 1).await?;
    let next = mta.submit(&newsletter(3, 1)).await?;
    assert_eq!(mta.completed(&next).await?["counters"]["delivered"], 3);
    assert_eq!(mta.terminate().await?.code(), Some(0));
    drop(tracker);

    // The same in one process; and one that is ended before its store comes ends well.
    redis.kill();
    let service = site.spawn(role(&site, "up"))?;
    waits_for_its_store(&site, &service, link).await?;
    assert_eq!(service.terminate().await?.code(), Some(0));
    let mut service = site.spawn(role(&site, "up"))?;
    waits_for_its_store(&site, &service, link).await?;
    redis.restart()?;
    service.ready().await?;
    clicked(&service, 3).await?;
    assert_eq!(service.terminate().await?.code(), Some(0));
    Ok(())
}

/// What became of a request.
pub(crate) enum Asked {
    /// Nobody listens: it was not made.
    NotMade,
    /// It was made, and whoever had it died.
    Doubtful,
    Answered(u16),
}

pub(crate) async fn ask(port: u16, path: &str, agent: &str) -> Asked {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)).await else {
        return Asked::NotMade;
    };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: {agent}\r\nConnection: close\r\n\r\n"
    );
    if stream.write_all(request.as_bytes()).await.is_err() {
        return Asked::Doubtful;
    }
    let mut answer = Vec::new();
    // What came before the end counts, however it ended.
    stream.read_to_end(&mut answer).await.ok();
    let text = String::from_utf8_lossy(&answer);
    let whole = text.contains("\r\n\r\n");
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    match status {
        Some(status) if whole => Asked::Answered(status),
        Some(_) | None => Asked::Doubtful,
    }
}

/// People who click, and what they saw.
#[derive(Default)]
struct Clicking {
    stop: AtomicBool,
    answered: AtomicU64,
    doubtful: AtomicU64,
    /// Which links were answered, and which may have been.
    links: Mutex<(BTreeSet<usize>, BTreeSet<usize>)>,
}

impl Clicking {
    /// Clicks one link after the other, each until it is answered.
    async fn run(&self, port: u16, paths: &[String], first: usize) -> Result<()> {
        let mine = (0..paths.len())
            .cycle()
            .skip(first * paths.len() / CLICKERS);
        for at in mine {
            loop {
                match ask(port, &paths[at], PERSON).await {
                    Asked::Answered(302) => {
                        self.answered.fetch_add(1, Ordering::Relaxed);
                        self.links.lock().unwrap().0.insert(at);
                        break;
                    }
                    Asked::Answered(status) => bail!("HTTP {status}"),
                    Asked::Doubtful => {
                        self.doubtful.fetch_add(1, Ordering::Relaxed);
                        self.links.lock().unwrap().1.insert(at);
                    }
                    Asked::NotMade => {}
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answered_hit_counts_once_while_the_store_is_away_and_the_tracker_dies() -> Result<()>
{
    const PEOPLE: usize = 300;
    let full = std::env::var_os("HIKYAKU_TEST_FULL").is_some();
    let (kills, between) = if full { (12, 5_000) } else { (3, 1_000) };
    let directory = tempfile::tempdir()?;
    let mut redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let sink = Sink::keeping_messages().await?;
    let site = site(&sink, &redis)?;
    let mta = site.start(role(&site, "mta")).await?;
    let mut tracker = TrackerProcess::start(&site).await?;
    let id = mta.submit(&newsletter(PEOPLE, 3)).await?;
    mta.completed(&id).await?;
    let paths: Arc<[String]> = sink
        .links(&site.tracker())
        .iter()
        .filter_map(|link| Some(link.strip_prefix(&site.tracker())?.to_owned()))
        .collect();
    ensure!(paths.len() == PEOPLE, "{} links", paths.len());

    let clicking = Arc::new(Clicking::default());
    let mut people = tokio::task::JoinSet::new();
    for first in 0..CLICKERS {
        let (clicking, paths, port) = (clicking.clone(), paths.clone(), site.tracker_port);
        people.spawn(async move { clicking.run(port, &paths, first).await });
    }
    let more = async |count: u64| {
        let wanted = clicking.answered() + count;
        until("more answers", async || {
            Ok((clicking.answered() >= wanted).then_some(()))
        })
        .await
    };
    more(100).await?;
    redis.kill();
    for _ in 0..kills {
        more(100).await?;
        tokio::time::sleep(Duration::from_millis(between)).await;
        // `drop` is kill -9.
        drop(tracker);
        tracker = TrackerProcess::spawn(&site)?;
    }
    more(100).await?;
    redis.restart()?;
    more(100).await?;
    clicking.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = people.join_next().await {
        ended??;
    }

    let admin = Client::new(site.tracker_admin(), None);
    until("an empty journal", async || {
        let page = admin.get("/metrics").await?.ok()?.text();
        Ok(page
            .contains("\nhikyaku_journal_pending_records 0\n")
            .then_some(()))
    })
    .await?;
    let counters = mta.batch(&id).await?["counters"].clone();
    let of = |name: &str| counters[name].as_u64().unwrap();
    let (answered, doubtful) = (
        clicking.answered(),
        clicking.doubtful.load(Ordering::Relaxed),
    );
    ensure!(
        (answered..=answered + doubtful).contains(&of("clicked_total")),
        "{answered} answered, {doubtful} doubtful: {counters}"
    );
    let (sure, maybe) = clicking.links.lock().unwrap().clone();
    let all = sure.union(&maybe).count() as u64;
    ensure!(
        (sure.len() as u64..=all).contains(&of("clicked_unique")),
        "{} links answered: {counters}",
        sure.len()
    );
    // Not more than what was on its way when it died, and what came while its sockets were closed
    // one by one: the listener is not the first of them.
    let at_most = (2 * kills * CLICKERS) as u64;
    ensure!(doubtful <= at_most, "{doubtful} doubtful");
    Ok(())
}
