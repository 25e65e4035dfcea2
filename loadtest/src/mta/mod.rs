//! The whole measurement of the MTA in one command.
//!
//! For each way of signing: a sink in a process of its own, `hikyaku up` in a fresh folder, one
//! batch over HTTP, and readings of `/proc` between the phases. System calls are counted in runs of
//! their own, since `strace` changes what it looks at.

mod peer;
mod report;

pub use peer::Peer;

use crate::batch::Shape;
use crate::bench::Bench;
use crate::counterpart::Counterpart;
use crate::format::count;
use crate::process::{self, Guarded, Usage};
use crate::redis::{Redis, Used};
use crate::signatures;
use crate::sink::{Manner, Total};
use crate::site::{self, Dkim, Setup, Site};
use crate::source::{self, Report};
use crate::strace::{self, Calls};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use testkit::dns::{DnsServer, Zone};

/// Bare signatures on each CPU, timed before a run, and again after it.
const SIGNATURES: u32 = 1000;
/// Of the two runs under `strace`, the first has this share of the recipients.
const FEW: u64 = 10;

/// Measure intake and delivery: starts a sink and `hikyaku up`, submits, waits, reports
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    /// What is submitted
    pub shape: Shape,
    /// Of the domains, how many are destinations of their own [default: all]
    #[arg(long)]
    pub destinations: Option<u64>,
    /// Find the sink by DNS, warm: each domain has an MX of its own, and gets a message before
    #[arg(long, conflicts_with = "destinations")]
    pub dns: bool,
    /// How mail is signed: a run for each
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["none", "rsa2048"])]
    pub dkim: Vec<Dkim>,
    /// The store: a run for each, in turn, for each way of signing
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["sqlite"])]
    pub store: Vec<Engine>,
    /// Connections per destination
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,
    /// Messages on each connection
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub messages_per_connection: u32,
    #[command(flatten)]
    /// What the sink is like
    pub manner: Manner,
    /// Send so many of the messages through a Postfix too, once for each way of signing [default:
    /// none; takes the rights of root]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub postfix: Option<u64>,
    /// Count system calls in runs of their own, unsigned
    #[arg(long)]
    pub strace: bool,
    /// Recipients of the larger of these runs
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    pub strace_recipients: u64,
    /// Profile each delivery with `perf record` into this folder, and keep the logs there
    #[arg(long)]
    pub profile_dir: Option<PathBuf>,
    /// Give up a run after so long, as "30m"
    #[arg(long, default_value = "30m", value_parser = model::units::parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// Where the service keeps what it must not lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// The embedded one
    Sqlite,
    /// A Redis of its own, with an append-only file synced every second
    Redis,
}

/// What one run showed.
#[derive(Debug, Clone)]
pub struct Run {
    /// How mail was signed.
    pub dkim: Dkim,
    /// Where it was kept.
    pub engine: Engine,
    /// What Redis used for the delivery, where it was kept in one.
    pub redis: Option<Used>,
    /// What was submitted and what became of it.
    pub report: Report,
    /// Of the service, from the first byte of the batch to its 202.
    pub intake: Usage,
    /// Of the service, from the 202 to the batch's completion.
    pub delivery: Usage,
    /// Of the sink, in the run.
    pub sink: Usage,
    /// What the sink counted.
    pub total: Total,
    /// Resident memory of the service at most: at intake, and afterwards where the kernel lets us
    /// start anew.
    pub peak: (u64, Option<u64>),
    /// CPU time of one bare RSA-2048 signature, before and after.
    pub signature: Option<(Duration, Duration)>,
}

impl Args {
    fn setup(
        &self,
        dkim: Dkim,
        sink: &Counterpart,
        dns: Option<&DnsServer>,
        redis: Option<&Redis>,
    ) -> Result<Setup> {
        let from = self.shape.from.rsplit_once('@');
        Ok(Setup {
            sink: sink.address(),
            from_domain: from.context("--from is no address")?.1.to_owned(),
            dkim,
            store: redis.map(Redis::url),
            tracking_keys: None,
            destinations: match dns {
                Some(_) => 0,
                None => self.destinations.unwrap_or(self.shape.domains),
            },
            slow: 0,
            routes: Vec::new(),
            dns: dns.map(DnsServer::addr),
            connections: self.connections,
            messages_per_connection: self.messages_per_connection,
            dir: self.bench.dir(),
            program: self.bench.program()?,
        })
    }

    /// A name server that knows an MX for each domain, if one is wanted.
    async fn name_server(&self) -> Result<Option<DnsServer>> {
        if !self.dns {
            return Ok(None);
        }
        let mut zone = Zone::new().ttl(86_400, 60).a("*", Ipv4Addr::LOCALHOST);
        for domain in self.shape.names() {
            zone = zone.mx(&domain, 10, &format!("mx.{domain}"));
        }
        let server = DnsServer::start(zone).await;
        Ok(Some(server.context("cannot serve DNS")?))
    }
}

/// Measures and prints the report.
///
/// # Errors
/// When anything is not delivered, or does not start or end well.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let filesystem = site::filesystem(&args.bench.dir());
    writeln!(
        out,
        "store and journal in {} ({filesystem})",
        args.bench.dir().display()
    )?;
    if let Some(dir) = &args.profile_dir {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let mut runs = Vec::new();
    for dkim in &args.dkim {
        for engine in &args.store {
            let name = report::name(*dkim, *engine);
            writeln!(out, "\n{name}: {} recipients", count(args.shape.recipients))?;
            let run = tokio::time::timeout(args.timeout, measure(args, *dkim, *engine, out));
            let run = run
                .await
                .with_context(|| format!("not done within {:?}", args.timeout))?;
            runs.push(run.with_context(|| format!("the run with {name}"))?);
        }
    }
    if !runs.is_empty() {
        writeln!(
            out,
            "\n{}",
            report::summary(&runs).render(args.bench.markdown)
        )?;
    }
    if runs.iter().any(|run| run.redis.is_some()) {
        writeln!(
            out,
            "\n{}",
            report::stores(&runs).render(args.bench.markdown)
        )?;
    }
    if let Some(recipients) = args.postfix {
        let peers = beside(args, recipients, out).await?;
        writeln!(
            out,
            "\n{}",
            peer::table(&runs, &peers).render(args.bench.markdown)
        )?;
    }
    for run in &runs {
        let name = report::name(run.dkim, run.engine);
        writeln!(out, "CPU by thread during delivery, {name}\n")?;
        writeln!(out, "{}", report::threads(run).render(args.bench.markdown))?;
    }
    if args.strace {
        let calls = tokio::time::timeout(args.timeout, system_calls(args, out));
        let calls = calls
            .await
            .with_context(|| format!("not done within {:?}", args.timeout))??;
        writeln!(
            out,
            "\nsystem calls per message, intake included, {}\n",
            Dkim::None.name()
        )?;
        writeln!(
            out,
            "{}",
            strace::table(&calls, 15).render(args.bench.markdown)
        )?;
    }
    Ok(())
}

/// Postfix, for each way of signing.
async fn beside(args: &Args, recipients: u64, out: &mut (dyn Write + Send)) -> Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for dkim in &args.dkim {
        writeln!(
            out,
            "Postfix, {}: {} recipients",
            dkim.name(),
            count(recipients)
        )?;
        let measured = tokio::time::timeout(args.timeout, peer::measure(args, *dkim, recipients));
        let peer = measured
            .await
            .with_context(|| format!("not done within {:?}", args.timeout))?;
        peers.push(peer.with_context(|| format!("Postfix with {}", dkim.name()))?);
    }
    Ok(peers)
}

async fn measure(
    args: &Args,
    dkim: Dkim,
    engine: Engine,
    out: &mut (dyn Write + Send),
) -> Result<Run> {
    let before = bare_signature(dkim).await?;
    let sink = Counterpart::sink(&args.manner).await?;
    let dns = args.name_server().await?;
    let folder = tempfile::tempdir_in(args.bench.dir())?;
    let redis = match engine {
        Engine::Sqlite => None,
        Engine::Redis => Some(Redis::start(folder.path())?),
    };
    let setup = args.setup(dkim, &sink, dns.as_ref(), redis.as_ref())?;
    let site = Site::start(&setup, None).await?;
    let measured = async {
        let warm_up = match dns {
            Some(_) => one_each(&site, &args.shape).await?,
            None => 0,
        };
        let run = phases(args, dkim, &site, &sink, redis.as_ref(), out).await?;
        anyhow::Ok((run, warm_up))
    };
    let measured = measured.await;
    let (mut run, warm_up) = site.explain(measured)?;
    run.sink = process::usage(sink.pid())?;
    if let Some(dir) = &args.profile_dir {
        site.keep_log(dir, &format!("{}.log", file_name(dkim, engine)))?;
    }
    site.stop().await?;
    run.total = sink.stop().await?;
    run.total.messages = run.total.messages.saturating_sub(warm_up);
    let after = bare_signature(dkim).await?;
    run.signature = before.zip(after);
    ensure!(
        run.total.messages == run.report.accepted,
        "{} messages were accepted and {} came to the sink",
        run.report.accepted,
        run.total.messages
    );
    Ok(run)
}

/// Sends each domain a message, so that DNS is asked and answers are kept; tells how many.
async fn one_each(site: &Site, shape: &Shape) -> Result<u64> {
    let shape = Shape {
        recipients: shape.domains,
        in_a_row: 1,
        ..shape.clone()
    };
    let mut report = source::submit(site.client(), &shape, None).await?;
    source::watch(site.client(), &mut report, &mut std::io::sink()).await?;
    report.check()?;
    Ok(report.accepted)
}

async fn phases(
    args: &Args,
    dkim: Dkim,
    site: &Site,
    sink: &Counterpart,
    redis: Option<&Redis>,
    out: &mut (dyn Write + Send),
) -> Result<Run> {
    let engine = match redis {
        None => Engine::Sqlite,
        Some(_) => Engine::Redis,
    };
    let idle = process::usage(site.pid())?;
    let mut report = source::submit(site.client(), &args.shape, None).await?;
    let accepted = process::usage(site.pid())?;
    let before = redis.map(Redis::used).transpose()?;
    let peak = process::peak_memory(site.pid())?;
    let anew = process::reset_peak_memory(site.pid());
    let profile = match &args.profile_dir {
        Some(dir) => Some(Profile::start(site.pid(), dir, file_name(dkim, engine))?),
        None => None,
    };
    source::watch(site.client(), &mut report, out).await?;
    let done = process::usage(site.pid())?;
    let after = redis.map(Redis::used).transpose()?;
    if let Some(profile) = profile {
        profile.stop().await?;
    }
    report.check()?;
    let later = anew.then(|| process::peak_memory(site.pid())).transpose()?;
    Ok(Run {
        dkim,
        engine,
        redis: after
            .zip(before)
            .map(|(after, before)| after.since(&before)),
        report,
        intake: accepted.since(&idle),
        delivery: done.since(&accepted),
        sink: process::usage(sink.pid())?,
        total: Total::default(),
        peak: (peak, later),
        signature: None,
    })
}

/// CPU time of a bare signature, where any are made.
async fn bare_signature(dkim: Dkim) -> Result<Option<Duration>> {
    if dkim == Dkim::None {
        return Ok(None);
    }
    let timed = tokio::task::spawn_blocking(|| signatures::rsa2048(SIGNATURES)).await;
    timed.context("the signing thread died")?.map(Some)
}

fn file_name(dkim: Dkim, engine: Engine) -> String {
    let signed = match dkim {
        Dkim::None => "unsigned",
        Dkim::Rsa2048 => "rsa2048",
        Dkim::Both => "rsa2048-ed25519",
    };
    let kept = match engine {
        Engine::Sqlite => "",
        Engine::Redis => "-redis",
    };
    format!("{signed}{kept}")
}

/// `perf record` beside a delivery.
struct Profile(Guarded);

impl Profile {
    fn start(pid: u32, dir: &Path, name: String) -> Result<Self> {
        let file = dir.join(format!("{name}.perf"));
        let perf = Command::new("perf")
            .args(["record", "-q", "-F", "499", "-g", "-o"])
            .arg(file)
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run perf record")?;
        Ok(Self(Guarded::new("perf record", perf)))
    }

    async fn stop(mut self) -> Result<()> {
        site::signal(self.0.pid(), "INT")?;
        // It ends with the signal's status, which says nothing about the profile.
        drop(self.0.ended(Duration::from_secs(60)).await);
        Ok(())
    }
}

async fn system_calls(args: &Args, out: &mut (dyn Write + Send)) -> Result<Vec<(String, f64)>> {
    let many = args.strace_recipients;
    let few = many / FEW;
    writeln!(
        out,
        "\nunder strace: {} and {} recipients",
        count(few),
        count(many)
    )?;
    let calls_few = traced(args, few).await?;
    let calls_many = traced(args, many).await?;
    Ok(strace::per_message((&calls_few, few), (&calls_many, many)))
}

async fn traced(args: &Args, recipients: u64) -> Result<Calls> {
    let shape = Shape {
        recipients,
        ..args.shape.clone()
    };
    let folder = tempfile::tempdir()?;
    let table = folder.path().join("calls");
    let sink = Counterpart::sink(&args.manner).await?;
    let setup = args.setup(Dkim::None, &sink, None, None)?;
    let site = Site::start(&setup, Some(&table)).await?;
    let mut report = source::submit(site.client(), &shape, None).await?;
    let watched = source::watch(site.client(), &mut report, &mut std::io::sink()).await;
    site.explain(watched)?;
    report.check()?;
    site.stop().await?;
    sink.stop().await?;
    // strace writes its table after the process has ended.
    let written = async {
        loop {
            let text = fs::read_to_string(&table).unwrap_or_default();
            if let Some(calls) = strace::parse(&text) {
                return calls;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let patience = Duration::from_secs(20);
    let calls = tokio::time::timeout(patience, written).await;
    calls.context("strace wrote no table")
}
