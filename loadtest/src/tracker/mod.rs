//! The measurement of the tracker: valid links over kept connections, beside a bare server and
//! nginx; with its store there, or away and back again.

pub mod bare;
mod nginx;
mod report;

use crate::batch::Shape;
use crate::bench::Bench;
use crate::counterpart::Counterpart;
use crate::format::{count, per_second, rate};
use crate::load::{self, Answered, Jar, Plan};
use crate::process;
use crate::redis::SETTINGS;
use crate::site::{Dkim, Setup, Site};
use crate::{local, source};
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use links::{Flags, KeyRing, Kind, Token};
use model::{BatchId, TrackingMode};
use nginx::Nginx;
use report::Servers;
use service::clock::{Clock as _, SystemClock};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use testkit::redis::RedisServer;

/// Rounds of each server, in turn: what else the machine does falls on both.
const ROUNDS: u32 = 3;
/// Requests at most, over all connections and rounds of one server.
const MOST: u64 = 20_000_000;
/// A process that uses less than this share of a CPU is at rest.
const REST: f64 = 0.02;
const REST_WINDOW: Duration = Duration::from_millis(500);
/// That of a service that judges: it pauses for a second in between.
const REST_WINDOW_OF_JUDGE: Duration = Duration::from_secs(2);
/// For so long it is looked how much a service uses that has nothing to do.
const IDLE_WINDOW: Duration = Duration::from_secs(5);
/// For a backlog of hits to be handed on.
const REST_PATIENCE: Duration = Duration::from_secs(300);
/// Hits in the journal that are not in the store.
const PENDING: &str = "hikyaku_journal_pending_records";
/// Hits in the store that are not judged.
const WAITING: &str = "hikyaku_engagement_waiting_hits";
/// How often it is looked how far a backlog is.
const LOOK: Duration = Duration::from_millis(100);

/// Which hits are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Hit {
    /// A click: 302
    Click,
    /// A pixel: 200
    Open,
}

impl Hit {
    fn status(self) -> u16 {
        match self {
            Self::Click => 302,
            Self::Open => 200,
        }
    }
}

/// Measure redirects or pixels beside a bare server: starts `hikyaku up` itself, or takes --url
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A tracker that runs: http://HOST:PORT, loopback [default: starts a service and sends a
    /// batch, so that hits have messages that they belong to]
    #[arg(long, value_parser = local::parse_url, requires = "key_file")]
    pub url: Option<String>,
    /// With --url: its file of tracking keys
    #[arg(long)]
    pub key_file: Option<PathBuf>,
    /// With --url: the batch that hits are of [default: one that does not exist]
    #[arg(long)]
    pub batch: Option<BatchId>,
    /// With --url: the tracker's process, for its CPU time
    #[arg(long)]
    pub pid: Option<u32>,
    /// Connections, each with one request at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub connections: u16,
    /// How long each server is asked, in all
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// What is asked for
    #[arg(long, value_enum, default_value = "click")]
    pub kind: Hit,
    /// Recipients whose links are used
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub recipients: u32,
    /// Of 100 clicks, how many come from a browser of the person that keeps its cookie; every other
    /// comes from a new one
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub returning: u32,
    /// Ask nginx, too (Debian: nginx-light)
    #[arg(long)]
    pub nginx: bool,
    /// The store is a Redis that goes away before the measurement, so that hits stay in the journal
    /// (Debian: redis-server)
    #[arg(long, conflicts_with = "url")]
    pub store_away: bool,
    /// With --store-away: let it come back to so many hits while half the load goes on
    #[arg(long, requires = "store_away", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    pub backlog: u64,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// What is measured.
struct Target {
    address: SocketAddr,
    pid: Option<u32>,
    keys: String,
    batch: BatchId,
    /// Live as long as the measurement.
    site: Option<Site>,
    redis: Option<Away>,
}

/// A Redis, and where it keeps what it has.
struct Away {
    server: RedisServer,
    _dir: tempfile::TempDir,
}

/// One server's numbers.
#[derive(Debug, Clone, Default)]
struct Measured {
    answered: Answered,
    /// While it was asked, and until it was at rest again.
    cpu: Option<(Duration, Duration)>,
    /// From the last answer until it was at rest.
    resting: Duration,
    /// What it uses a second when nothing is asked of it.
    idle: Option<Duration>,
    /// At half of what the tracker takes.
    half: Answered,
}

/// Measures and prints the report.
///
/// # Errors
/// When a server does not start, or does not answer as it must.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let mut target = match &args.url {
        Some(url) => running(args, local::url(url)?)?,
        None => start(args, out).await?,
    };
    let address = target.address;
    let requests = requests(args, &target)?;
    let bare = Counterpart::start("bare").await?;
    let nginx = match args.nginx {
        true => Some(Nginx::start(&args.bench.dir()).await?),
        false => None,
    };
    let jar = (args.returning > 0).then(|| Arc::new(Jar::new(requests.len(), args.returning)));
    let plan = |address, status, pace| Plan {
        jar: jar.clone(),
        address,
        requests: requests.clone(),
        connections: usize::from(args.connections),
        time: Duration::from_secs(args.seconds.into()) / ROUNDS,
        most: MOST / u64::from(ROUNDS),
        status,
        pace,
        enough: Arc::new(AtomicBool::new(false)),
    };
    if let Some(redis) = &mut target.redis {
        redis.server.kill();
    }
    let memory = target.pid.map(process::memory).transpose()?;
    let servers = beside_each_other(args, &target, &bare, nginx.as_ref(), &plan).await?;
    let half = servers.tracker.per_second() / 2.0;
    let table = servers.table().render(args.bench.markdown);
    writeln!(
        out,
        "\n{table}\nHalf load: {} requests per second",
        rate(half)
    )?;
    bare.stop().await?;
    if args.backlog > 0 {
        let half = |most, time| Plan {
            most,
            time,
            ..plan(address, args.kind.status(), Some(half))
        };
        backlog(args, &mut target, memory, half, out).await?;
    }
    match target.site {
        Some(site) => site.stop().await,
        None => Ok(()),
    }
}

/// Asks each server as fast as it answers, and then at half of what the tracker takes.
async fn beside_each_other(
    args: &Args,
    target: &Target,
    bare: &Counterpart,
    nginx: Option<&Nginx>,
    plan: &impl Fn(SocketAddr, u16, Option<f64>) -> Plan,
) -> Result<Servers> {
    let (expected, address) = (args.kind.status(), target.address);
    let mut servers = Servers::new(nginx.is_some());
    let usage = |pid| move || process::usage(pid);
    // Without its store nothing is judged.
    let judge = target.site.as_ref().filter(|_| target.redis.is_none());
    if let Some(site) = judge {
        let before = process::usage(site.pid())?;
        tokio::time::sleep(IDLE_WINDOW).await;
        let used = process::usage(site.pid())?.since(&before).cpu();
        servers.tracker.idle = Some(used.div_f64(IDLE_WINDOW.as_secs_f64()));
    }
    for _ in 0..ROUNDS {
        let asked = plan(address, expected, None);
        let used = target.pid.map(usage);
        servers.tracker.round(&asked, used, judge).await?;
        let asked = plan(bare.address(), 302, None);
        let used = Some(usage(bare.pid()));
        servers.bare.round(&asked, used, None).await?;
        if let (Some(server), Some(measured)) = (nginx, &mut servers.nginx) {
            let asked = plan(server.address(), expected, None);
            let used = Some(|| server.usage());
            measured.round(&asked, used, None).await?;
        }
    }
    let half = Some(servers.tracker.per_second() / 2.0);
    for _ in 0..ROUNDS {
        let answered = load::run(&plan(address, expected, half)).await?;
        servers.tracker.half.add(&answered);
        let answered = load::run(&plan(bare.address(), 302, half)).await?;
        servers.bare.half.add(&answered);
        if let (Some(server), Some(measured)) = (nginx, &mut servers.nginx) {
            let answered = load::run(&plan(server.address(), expected, half)).await?;
            measured.half.add(&answered);
        }
    }
    Ok(servers)
}

/// Lets hits wait until there are enough, then lets the store come back while half the load goes
/// on.
async fn backlog(
    args: &Args,
    target: &mut Target,
    memory: Option<u64>,
    half: impl Fn(u64, Duration) -> Plan,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let (Some(site), Some(redis), Some(before)) = (&target.site, &mut target.redis, memory) else {
        bail!("a backlog needs a service of our own");
    };
    let pid = site.pid();
    let mut waiting = report::whole(site.gauge(PENDING).await?);
    while waiting < args.backlog {
        let plan = Plan {
            pace: None,
            ..half(args.backlog - waiting, REST_PATIENCE)
        };
        load::run(&plan).await?;
        waiting = report::whole(site.gauge(PENDING).await?);
    }
    let away = process::memory(pid)?;
    redis.server.restart()?;
    let (start, cpu) = (SystemClock.instant(), process::usage(pid)?);
    let plan = half(MOST, REST_PATIENCE);
    let enough = plan.enough.clone();
    let drained = async {
        // What came a moment ago is no backlog.
        let reached = async {
            while report::whole(site.gauge(PENDING).await?) > waiting / 100 {
                tokio::time::sleep(LOOK).await;
            }
            anyhow::Ok(SystemClock.instant().duration_since(start))
        };
        let reached = tokio::time::timeout(REST_PATIENCE, reached).await;
        enough.store(true, Ordering::Relaxed);
        reached.with_context(|| format!("the backlog is not gone after {REST_PATIENCE:?}"))?
    };
    let (answered, drained) = tokio::join!(load::run(&plan), drained);
    let (answered, drained) = (answered?, drained?);
    // Verdicts on all of it may take much longer.
    writeln!(
        out,
        "\nIn the store {:.1} s after it came back: {} hits that waited, while {} more were answered",
        drained.as_secs_f64(),
        count(waiting),
        count(answered.latency.count()),
    )?;
    at_rest(site).await?;
    let cpu = process::usage(pid)?.since(&cpu).cpu();
    let drain = report::Drain {
        waiting,
        drained,
        answered,
        cpu,
        memory: [before, away, process::memory(pid)?],
    };
    writeln!(
        out,
        "
{}",
        drain.table().render(args.bench.markdown)
    )?;
    Ok(())
}
fn running(args: &Args, address: SocketAddr) -> Result<Target> {
    let path = args.key_file.as_ref().context("--key-file is missing")?;
    let keys = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the tracking keys in {}", path.display()))?;
    Ok(Target {
        address,
        pid: args.pid,
        keys,
        batch: args.batch.unwrap_or(BatchId::from_bytes([7; 16])),
        site: None,
        redis: None,
    })
}

/// Starts a service and sends a batch to a sink, so that hits are of messages that were delivered.
async fn start(args: &Args, out: &mut (dyn Write + Send)) -> Result<Target> {
    let sink = Counterpart::start("sink").await?;
    let redis = match args.store_away {
        true => Some(Away::start(&args.bench.dir())?),
        false => None,
    };
    let setup = Setup {
        store: redis.as_ref().map(|redis| redis.server.url()),
        sink: sink.address(),
        from_domain: "brand.example".to_owned(),
        dkim: Dkim::None,
        tracking_keys: None,
        destinations: 0,
        slow: 0,
        routes: Vec::new(),
        dns: None,
        connections: 8,
        messages_per_connection: 1000,
        dir: args.bench.dir(),
        program: args.bench.program()?,
    };
    let site = Site::start(&setup, None).await?;
    let shape = Shape {
        recipients: args.recipients.into(),
        domains: 100,
        in_a_row: 1,
        below: "example".to_owned(),
        beside: 0,
        vars: 0,
        links: 1,
        size: 1024,
        from: "news@brand.example".to_owned(),
    };
    writeln!(
        out,
        "sending {} messages, whose links are used",
        count(shape.recipients)
    )?;
    let mut report = source::submit(site.client(), &shape, None).await?;
    let watched = source::watch(site.client(), &mut report, out).await;
    site.explain(watched)?;
    report.check()?;
    sink.stop().await?;
    let Some(batch) = report.batches.first() else {
        bail!("no batch");
    };
    at_rest(&site).await?;
    Ok(Target {
        address: site.tracker(),
        pid: Some(site.pid()),
        keys: site.tracking_keys()?,
        batch: batch.parse()?,
        site: Some(site),
        redis,
    })
}

impl Away {
    fn start(within: &std::path::Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-redis-")
            .tempdir_in(within)?;
        let server = RedisServer::start(dir.path().to_owned(), SETTINGS)?;
        Ok(Self { server, _dir: dir })
    }
}

/// One request for each recipient.
fn requests(args: &Args, target: &Target) -> Result<Arc<[Bytes]>> {
    let ring = KeyRing::parse(&target.keys)?;
    let host = target.address.to_string();
    let signer = ring.signer(&host, None).context("no key that signs")?;
    (0..args.recipients)
        .map(|index| {
            let token = Token {
                kind: match args.kind {
                    Hit::Click => Kind::Click,
                    Hit::Open => Kind::Open,
                },
                flags: Flags {
                    mode: TrackingMode::Individual,
                    proof: false,
                },
                batch: target.batch,
                index,
                link: 0,
                target: "https://shop.example/offer/0?from=mail",
            };
            let mut text = String::new();
            signer.sign(&token, &mut text)?;
            let path = match args.kind {
                Hit::Click => format!("/c/{text}"),
                Hit::Open => format!("/o/{text}.gif"),
            };
            Ok(request(&host, &path))
        })
        .collect()
}

/// As a browser's, cut to what a tracker looks at.
fn request(host: &str, path: &str) -> Bytes {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\n\
         User-Agent: Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36\r\n\
         Accept: */*\r\nAccept-Language: ja\r\n\r\n"
    )
    .into()
}

impl Measured {
    /// Asks as planned; `usage` tells what the server has used so far, `judge` is who judges what
    /// was asked for.
    async fn round(
        &mut self,
        plan: &Plan,
        usage: Option<impl Fn() -> Result<process::Usage>>,
        judge: Option<&Site>,
    ) -> Result<()> {
        let before = usage.as_ref().map(|usage| usage()).transpose()?;
        let answered = load::run(plan).await?;
        ensure!(answered.latency.count() > 0, "nothing was answered");
        self.answered.add(&answered);
        if let (Some(usage), Some(before)) = (usage, before) {
            let loaded = usage()?.since(&before).cpu();
            let asked = SystemClock.instant();
            rested(&usage, judge).await?;
            self.resting += SystemClock.instant().duration_since(asked);
            let settled = usage()?.since(&before).cpu();
            let (sum_loaded, sum_settled) = self.cpu.unwrap_or_default();
            self.cpu = Some((sum_loaded + loaded, sum_settled + settled));
        }
        Ok(())
    }

    fn per_second(&self) -> f64 {
        per_second(self.answered.latency.count(), self.answered.took)
    }
}

/// Waits until the service has handed on and judged what it had to.
async fn at_rest(site: &Site) -> Result<()> {
    rested(&|| process::usage(site.pid()), Some(site)).await
}

async fn rested(usage: &impl Fn() -> Result<process::Usage>, judge: Option<&Site>) -> Result<()> {
    let window = judge.map_or(REST_WINDOW, |_| REST_WINDOW_OF_JUDGE);
    let rest = async {
        loop {
            let before = usage()?;
            tokio::time::sleep(window).await;
            let used = usage()?.since(&before).cpu();
            let waits = match judge {
                Some(site) => waits(site).await?,
                None => false,
            };
            if !waits && used.as_secs_f64() < window.as_secs_f64() * REST {
                return anyhow::Ok(());
            }
        }
    };
    let rested = tokio::time::timeout(REST_PATIENCE, rest).await;
    rested.with_context(|| format!("a server is not at rest after {REST_PATIENCE:?}"))?
}

/// Whether hits wait to be shipped or judged.
async fn waits(site: &Site) -> Result<bool> {
    let waiting = site.gauge(PENDING).await? + site.gauge(WAITING).await?;
    Ok(waiting > 0.0)
}
