//! Many nodes on one Redis, and any of them may die at any moment: MTA nodes, trackers, the primary.
//!
//! `HIKYAKU_TEST_FULL=1` runs it with twenty times as many people; `HIKYAKU_TEST_PROGRAM` names another
//! executable than the one that was built with the tests, such as an optimised one.

use crate::harness::{Service, Site, TrackerProcess, newsletter, program, shaping, signal, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{Duration, Instant};
use testkit::redis::{RedisSentinels, RedisServer};
use testkit::smtp_peer::{SmtpPeer, Temper};

const NODES: usize = 3;
/// The shortest that there is.
const LEASE: Duration = Duration::from_secs(6);

pub(crate) fn full() -> bool {
    std::env::var_os("HIKYAKU_TEST_FULL").is_some()
}

pub(crate) fn role(site: &Site, role: &str) -> Command {
    let mut command = Command::new(program());
    command.arg(role).arg("--config").arg(site.config());
    command
}

/// Sites that share a store, a tracking key, and the address of the first one's tracker.
pub(crate) fn sites(count: usize, url: &str, shaping: &str) -> Result<Vec<Site>> {
    let mut sites: Vec<Site> = Vec::new();
    for _ in 0..count {
        let site = Site::with(shaping, "")?;
        std::fs::remove_dir_all(site.dir.path().join("dkim-keys"))?;
        let tracker = sites.first().unwrap_or(&site).tracker();
        site.edit(|config| {
            let store = format!("[store]\nurl = \"{url}\"\nlease = \"6s\"\n[api]\n");
            let base = format!("base_url = \"{}\"", site.tracker());
            config
                .replace("[api]\n", &store)
                .replace(&base, &format!("base_url = \"{tracker}\""))
                .replace(
                    "from_domains = [\"*\"]",
                    "from_domains = [\"*\"]\ndkim = \"optional\"",
                )
        })?;
        sites.push(site);
    }
    Ok(sites)
}

/// Every node has the key that the first one made.
pub(crate) fn share_key(sites: &[Site]) -> Result<()> {
    let key = |site: &Site| site.dir.path().join("data/tracking.key");
    let first = sites.first().context("a site")?;
    for site in sites.iter().skip(1) {
        std::fs::create_dir_all(site.dir.path().join("data"))?;
        std::fs::copy(key(first), key(site)).context("the tracking key")?;
    }
    Ok(())
}

async fn start(sites: &[Site]) -> Result<Vec<Option<Service>>> {
    let mut nodes = Vec::new();
    for (at, site) in sites.iter().enumerate() {
        nodes.push(Some(site.start(role(site, "mta")).await?));
        if at == 0 {
            share_key(sites)?;
        }
    }
    Ok(nodes)
}

/// The sum of a metric's values over its labels.
pub(crate) fn sum_of(page: &str, name: &str) -> f64 {
    let of = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let family = series.split('{').next()?;
        (family == name).then(|| value.parse().unwrap_or(0.0))
    };
    page.lines().filter_map(of).sum()
}

async fn metrics(node: &Service) -> Result<String> {
    Ok(node.client.get("/metrics").await?.ok()?.text())
}

/// The second copies of which the nodes of a site said why: one line of log each.
fn second_copies_told(site: &Site) -> Vec<String> {
    let log = std::fs::read_to_string(site.dir.path().join("log")).unwrap_or_default();
    let told = |line: &&str| line.contains("delivered twice") && line.contains("\"cause\"");
    log.lines().filter(told).map(str::to_owned).collect()
}

/// Ends the server that is the primary, once its replica has everything; starts it again as a
/// replica of the other, which takes over.
async fn kill_primary(servers: &mut RedisSentinels) -> Result<()> {
    let at = until("a primary with a replica", async || {
        let is_primary = |server: &RedisServer| {
            let info = server.ask(&["INFO", "replication"]).unwrap_or_default();
            info.contains("role:master") && info.contains("connected_slaves:1")
        };
        Ok(servers.servers.iter().position(is_primary))
    })
    .await?;
    let dead = servers.servers.get_mut(at).context("a server")?;
    dead.kill();
    let other = 1 - at;
    until("the failover", async || {
        let server = servers.servers.get(other).context("a server")?;
        let info = server.ask(&["INFO", "replication"])?;
        Ok(info.contains("role:master").then_some(()))
    })
    .await?;
    let port = servers.servers.get(other).context("a server")?.port();
    let back = servers.servers.get_mut(at).context("a server")?;
    back.restart()?;
    // The sentinels would say so too, a while later; meanwhile nobody must take it for the primary.
    back.ask(&["REPLICAOF", "127.0.0.1", &port.to_string()])?;
    until("the new primary to have a replica", async || {
        let server = servers.servers.get(other).context("a server")?;
        let info = server.ask(&["INFO", "replication"])?;
        Ok(info.contains("connected_slaves:1").then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_primaries_die_and_the_books_balance() -> Result<()> {
    let people = if full() { 50_000 } else { 2_500 };
    let rate = people / 25;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut chance = fastrand::Rng::with_seed(seed);
    let directory = tempfile::tempdir()?;
    let mut servers = RedisSentinels::start(directory.path())?;
    let sink = Sink::start().await?;
    let shaping = shaping(12, &format!("{rate}/s"), sink.address());
    let sites = sites(NODES, &servers.url(), &shaping)?;
    let mut nodes = start(&sites).await?;
    let mut trackers = vec![
        TrackerProcess::start(&sites[0]).await?,
        TrackerProcess::start(&sites[1]).await?,
    ];
    let first = nodes[0].as_ref().context("a node")?;
    let id = first.submit(&newsletter(people, 4)).await?;

    let (mut allowed, mut counted, mut kills, mut failovers) = (0, 0.0, 0, 0);
    let mut beat = Instant::now();
    while sink.distinct() < people {
        if beat.elapsed() >= Duration::from_secs(2) && kills < if full() { 60 } else { 8 } {
            beat = Instant::now();
            let at = chance.usize(0..NODES);
            if let Some(node) = nodes[at].take() {
                counted += sum_of(
                    &metrics(&node).await.unwrap_or_default(),
                    "hikyaku_duplicates_total",
                );
                allowed += sink.open_connections() + u64::from(store::WINDOW);
                node.kill()?;
                kills += 1;
                nodes[at] = Some(sites[at].start(role(&sites[at], "mta")).await?);
            }
        }
        let progress = sink.distinct() * 3 / people;
        if failovers < progress.min(2) {
            failovers += 1;
            allowed += sink.open_connections();
            kill_primary(&mut servers).await?;
            // A tracker dies as well, and its journal is taken up by the next.
            drop(trackers.remove(0));
            trackers.push(TrackerProcess::start(&sites[failovers - 1]).await?);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let node = nodes[1].as_ref().context("a node")?;
    let done = node.completed(&id).await?;
    assert_eq!(done["counters"]["accepted"], people, "{done}");
    assert_eq!(done["counters"]["delivered"], people, "{done}");
    assert_eq!(sink.distinct(), people, "nobody is missing");
    sink.assert_copies_are_the_same();
    let second = sink.copies() - people as u64;
    for node in nodes.iter().flatten() {
        counted += sum_of(&metrics(node).await?, "hikyaku_duplicates_total");
    }
    // What a node counted goes with it; its log says it of each message, with the cause.
    let told: Vec<String> = sites.iter().flat_map(second_copies_told).collect();
    for (recipient, copies) in sink.several() {
        // People are numbered in order of index.
        let number = recipient.trim_start_matches("user").split('@').next();
        let name = format!("\"{id}.{}\"", number.context("a number")?);
        let of = told.iter().filter(|line| line.contains(&name)).count();
        ensure!(
            u64::try_from(of)? + 1 >= copies,
            "{copies} copies to {recipient}, {of} told with their cause"
        );
    }
    let told = told.len();
    println!(
        "{second} second copies, {allowed} allowed, {counted} counted, {told} told, {kills} kills, {failovers} failovers"
    );
    ensure!(failovers == 2 && kills >= 3, "too little happened");
    ensure!(
        second <= allowed,
        "{second} second copies, {allowed} allowed"
    );
    ensure!(
        sum_of(&metrics(node).await?, "hikyaku_facts_lost_total") == 0.0,
        "facts were lost"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_slept_starts_nothing() -> Result<()> {
    const PEOPLE: usize = 400;
    let directory = tempfile::tempdir()?;
    let redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let temper = Temper::accepting();
    let peer = SmtpPeer::start(temper).await?;
    let shaping = shaping(4, "40/s", peer.address());
    let sites = sites(2, &redis.url(), &shaping)?;
    let nodes = start(&sites).await?;
    let [Some(sleeper), Some(other)] = &nodes[..] else {
        anyhow::bail!("two nodes");
    };
    let id = sleeper.submit(&newsletter(PEOPLE, 1)).await?;
    until("both at work", async || {
        let mut delivered = Vec::new();
        for node in [sleeper, other] {
            delivered.push(sum_of(&metrics(node).await?, "hikyaku_outcomes_total"));
        }
        Ok(delivered.iter().all(|count| *count > 5.0).then_some(()))
    })
    .await?;
    signal(sleeper.pid(), "STOP")?;
    let slept = Instant::now();
    // Its recipients are the other's when its lease is over.
    let done = other.completed(&id).await?;
    assert_eq!(done["counters"]["delivered"], PEOPLE, "{done}");
    let rest = (2 * LEASE).saturating_sub(slept.elapsed());
    tokio::time::sleep(rest).await;
    let before = peer.counts().messages;
    signal(sleeper.pid(), "CONT")?;
    until("it to be awake", async || {
        Ok(sleeper
            .client
            .get("/readyz")
            .await?
            .status
            .is_success()
            .then_some(()))
    })
    .await?;
    // What it had leased is another's: shipping tells it so, and its facts are taken.
    until("its journal to be empty", async || {
        let pending = sum_of(&metrics(sleeper).await?, "hikyaku_journal_pending_records");
        Ok((pending == 0.0).then_some(()))
    })
    .await?;
    let mut copies: BTreeMap<String, usize> = BTreeMap::new();
    for message in peer.messages() {
        for recipient in message.recipients {
            *copies.entry(recipient).or_default() += 1;
        }
    }
    assert_eq!(copies.len(), PEOPLE, "nobody is missing");
    let after = peer.counts().messages;
    // What was on the wire when it fell asleep may end now; nothing else begins.
    ensure!(
        after <= before + 4,
        "{} began after it woke",
        after - before
    );
    let twice: BTreeSet<_> = copies.iter().filter(|(_, count)| **count > 1).collect();
    ensure!(
        twice.len() <= 4 + usize::try_from(store::WINDOW)? * 4,
        "{} people got a second copy",
        twice.len()
    );
    let again = other.batch(&id).await?;
    assert_eq!(
        again["counters"]["delivered"], PEOPLE,
        "each is counted once"
    );
    Ok(())
}

const RATE: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_is_kept_by_all_nodes_together() -> Result<()> {
    send_at_a_rate(&format!("{RATE}/s"), None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_of_a_batch_is_kept_by_all_nodes_together() -> Result<()> {
    send_at_a_rate("unlimited", Some(&format!("{RATE}/s"))).await
}

/// Three nodes send under the rate of a destination, or that of a batch, at [`RATE`].
async fn send_at_a_rate(of_destination: &str, of_batch: Option<&str>) -> Result<()> {
    const PEOPLE: usize = 3_000;
    let directory = tempfile::tempdir()?;
    let redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let shaping = shaping(6, of_destination, peer.address());
    let sites = sites(NODES, &redis.url(), &shaping)?;
    let nodes = start(&sites).await?;
    let first = nodes[0].as_ref().context("a node")?;
    let mut batch = newsletter(PEOPLE, 1);
    if let Some(rate) = of_batch {
        batch["rate"] = rate.into();
    }
    first.submit(&batch).await?;
    // All three have a share, and then two windows pass.
    let begun = until("all at work", async || {
        for node in nodes.iter().flatten() {
            if sum_of(&metrics(node).await?, "hikyaku_outcomes_total") < 10.0 {
                return Ok(None);
            }
        }
        Ok(Some(Instant::now()))
    })
    .await?;
    let steady = begun + Duration::from_secs(1);
    let window = Duration::from_secs(10);
    until("two windows", async || {
        Ok((steady.elapsed() >= window + Duration::from_secs(5)).then_some(()))
    })
    .await?;
    let end = Instant::now();
    let mut at: Vec<Instant> = peer
        .messages()
        .iter()
        .map(|message| message.mail_at.into_std())
        .collect();
    at.sort_unstable();
    let counts: Vec<usize> = at
        .iter()
        .filter(|from| **from >= steady && **from + window <= end)
        .map(|from| {
            let within = |moment: &&Instant| **moment >= *from && **moment < *from + window;
            at.iter().filter(within).count()
        })
        .collect();
    let (least, most) = (counts.iter().min(), counts.iter().max());
    eprintln!("{} windows of 10 s: {least:?} to {most:?}", counts.len());
    let (least, most) = (*least.context("windows")?, *most.context("windows")?);
    // What is used of a rate depends on how busy the machine is, too: 5 % less on an idle one.
    let (low, high) = (RATE * 10 * 80 / 100, RATE * 10 * 105 / 100);
    ensure!(
        least >= low && most <= high,
        "{least} to {most} in 10 s: {low} to {high} are expected"
    );
    ensure!(peer.counts().peak <= 6, "{:?}", peer.counts());
    // A client that knows nobody: the page of a node says what it shares.
    let ready = Client::new(sites[2].api(), None).get("/readyz").await?;
    ensure!(ready.status.is_success(), "{}", ready.text());
    Ok(())
}
