//! The measurement of the tracker: valid links over kept connections, beside a bare server.

pub mod bare;

use crate::batch::Shape;
use crate::counterpart::Counterpart;
use crate::format::{Table, count, float, per, per_second, rate};
use crate::load::{self, Answered, Plan};
use crate::process;
use crate::site::{self, Dkim, Setup, Site};
use crate::{local, source};
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use links::{Flags, KeyRing, Kind, Token};
use model::{BatchId, TrackingMode};
use service::clock::{Clock as _, SystemClock};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Rounds of each server, in turn: what else the machine does falls on both.
const ROUNDS: u32 = 3;
/// Requests at most, over all connections and rounds of one server.
const MOST: u64 = 20_000_000;
/// A process that uses less than this share of a CPU is at rest.
const REST: f64 = 0.02;
const REST_WINDOW: Duration = Duration::from_millis(500);
/// For a backlog of hits to be handed on.
const REST_PATIENCE: Duration = Duration::from_secs(300);

/// Which hits are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Hit {
    /// A click: 302
    Click,
    /// A pixel: 200
    Open,
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
    /// Make the service's folder in here: on a real disk, or syncs cost nothing
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The executable [default: hikyaku, beside this one]
    #[arg(long)]
    pub program: Option<PathBuf>,
    /// Print the table as Markdown
    #[arg(long)]
    pub markdown: bool,
}

/// What is measured.
struct Target {
    address: SocketAddr,
    pid: Option<u32>,
    keys: String,
    batch: BatchId,
    /// Lives as long as the measurement.
    site: Option<Site>,
}

/// One server's numbers.
#[derive(Debug, Clone, Default)]
struct Measured {
    answered: Answered,
    /// While it was asked, and until it was at rest again.
    cpu: Option<(Duration, Duration)>,
    /// From the last answer until it was at rest.
    resting: Duration,
}

/// Measures and prints the report.
///
/// # Errors
/// When a server does not start, or does not answer as it must.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let target = match &args.url {
        Some(url) => running(args, local::url(url)?)?,
        None => start(args, out).await?,
    };
    let requests = requests(args, &target)?;
    let bare = Counterpart::start("bare").await?;
    let mut tracker = Measured::default();
    let mut reference = Measured::default();
    for _ in 0..ROUNDS {
        let plan = |address, status| Plan {
            address,
            requests: requests.clone(),
            connections: usize::from(args.connections),
            time: Duration::from_secs(args.seconds.into()) / ROUNDS,
            most: MOST / u64::from(ROUNDS),
            status,
        };
        let expected = match args.kind {
            Hit::Click => 302,
            Hit::Open => 200,
        };
        tracker
            .round(&plan(target.address, expected), target.pid)
            .await?;
        reference
            .round(&plan(bare.address(), 302), Some(bare.pid()))
            .await?;
    }
    writeln!(
        out,
        "\n{}",
        table(&tracker, &reference).render(args.markdown)
    )?;
    bare.stop().await?;
    match target.site {
        Some(site) => site.stop().await,
        None => Ok(()),
    }
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
    })
}

/// Starts a service and sends a batch to a sink, so that hits are of messages that were delivered.
async fn start(args: &Args, out: &mut (dyn Write + Send)) -> Result<Target> {
    let sink = Counterpart::start("sink").await?;
    let setup = Setup {
        sink: sink.address(),
        from_domain: "brand.example".to_owned(),
        dkim: Dkim::None,
        store: None,
        tracking_keys: None,
        destinations: 0,
        slow: 0,
        dns: None,
        connections: 8,
        messages_per_connection: 1000,
        dir: args.dir.clone().unwrap_or_else(std::env::temp_dir),
        program: match &args.program {
            Some(program) => program.clone(),
            None => site::beside_us("hikyaku")?,
        },
    };
    let site = Site::start(&setup, None).await?;
    let shape = Shape {
        recipients: args.recipients.into(),
        domains: 100,
        in_a_row: 1,
        below: "example".to_owned(),
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
    at_rest(site.pid()).await?;
    Ok(Target {
        address: site.tracker(),
        pid: Some(site.pid()),
        keys: site.tracking_keys()?,
        batch: batch.parse()?,
        site: Some(site),
    })
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
    async fn round(&mut self, plan: &Plan, pid: Option<u32>) -> Result<()> {
        let before = pid.map(process::usage).transpose()?;
        let answered = load::run(plan).await?;
        ensure!(answered.latency.count() > 0, "nothing was answered");
        self.answered.add(&answered);
        if let (Some(pid), Some(before)) = (pid, before) {
            let loaded = process::usage(pid)?.since(&before).cpu();
            let asked = SystemClock.instant();
            at_rest(pid).await?;
            self.resting += SystemClock.instant().duration_since(asked);
            let settled = process::usage(pid)?.since(&before).cpu();
            let (sum_loaded, sum_settled) = self.cpu.unwrap_or_default();
            self.cpu = Some((sum_loaded + loaded, sum_settled + settled));
        }
        Ok(())
    }

    fn per_second(&self) -> f64 {
        per_second(self.answered.latency.count(), self.answered.took)
    }
}

/// Waits until the process has handed on what it had to.
async fn at_rest(pid: u32) -> Result<()> {
    let rest = async {
        loop {
            let before = process::usage(pid)?;
            tokio::time::sleep(REST_WINDOW).await;
            let used = process::usage(pid)?.since(&before).cpu();
            if used.as_secs_f64() < REST_WINDOW.as_secs_f64() * REST {
                return anyhow::Ok(());
            }
        }
    };
    let rested = tokio::time::timeout(REST_PATIENCE, rest).await;
    rested.with_context(|| format!("process {pid} is not at rest after {REST_PATIENCE:?}"))?
}

fn table(tracker: &Measured, bare: &Measured) -> Table {
    let mut table = Table::new(["", "tracker", "bare hyper", "ratio"]);
    let ratio = |a: f64, b: f64| {
        if b > 0.0 {
            format!("{:.2}", a / b)
        } else {
            "–".to_owned()
        }
    };
    let of = |measured: &Measured| measured.answered.latency.count();
    let (asked, asked_bare) = (of(tracker), of(bare));
    table.row([
        "requests".to_owned(),
        count(asked),
        count(asked_bare),
        ratio(float(asked), float(asked_bare)),
    ]);
    let (speed, speed_bare) = (tracker.per_second(), bare.per_second());
    table.row([
        "requests per second".to_owned(),
        rate(speed),
        rate(speed_bare),
        ratio(speed, speed_bare),
    ]);
    for (name, share) in [("p50, ms", 0.5), ("p99, ms", 0.99)] {
        let millis = |of: &Measured| of.answered.latency.quantile(share).as_secs_f64() * 1e3;
        let (a, b) = (millis(tracker), millis(bare));
        table.row([
            name.to_owned(),
            format!("{a:.2}"),
            format!("{b:.2}"),
            ratio(a, b),
        ]);
    }
    type Pick = fn((Duration, Duration)) -> Duration;
    let picks: [(&str, Pick); 2] = [
        ("CPU per hit while asked, µs", |(loaded, _)| loaded),
        ("CPU per hit until at rest, µs", |(_, settled)| settled),
    ];
    for (name, pick) in picks {
        let micros = |of: &Measured| {
            of.cpu
                .map(|cpu| per(pick(cpu), of.answered.latency.count(), 1e6))
        };
        let text = |value: Option<f64>| value.map_or("–".to_owned(), |one| format!("{one:.1}"));
        let (a, b) = (micros(tracker), micros(bare));
        let both = a.zip(b).map_or("–".to_owned(), |(a, b)| ratio(a, b));
        table.row([name.to_owned(), text(a), text(b), both]);
    }
    if tracker.cpu.is_some() {
        let resting = |of: &Measured| format!("{:.1}", of.resting.as_secs_f64());
        table.row([
            "from the last answer until at rest, s".to_owned(),
            resting(tracker),
            resting(bare),
            "–".to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_servers_beside_each_other() {
        let measured = |requests: u64, took, micros, cpu| {
            let mut measured = Measured::default();
            for _ in 0..requests {
                measured
                    .answered
                    .latency
                    .record(Duration::from_micros(micros));
            }
            measured.answered.took = Duration::from_secs(took);
            measured.cpu = cpu;
            measured.resting = Duration::from_millis(1500);
            measured
        };
        let cpu = (Duration::from_millis(20), Duration::from_millis(30));
        let tracker = measured(1_000, 2, 100, Some(cpu));
        let bare = measured(2_000, 2, 100, None);
        let text = table(&tracker, &bare).markdown();
        for line in [
            "| requests per second | 500 | 1,000 | 0.50 |",
            "| p50, ms | 0.10 | 0.10 | 1.00 |",
            "| CPU per hit while asked, µs | 20.0 | – | – |",
            "| CPU per hit until at rest, µs | 30.0 | – | – |",
            "| from the last answer until at rest, s | 1.5 | 1.5 | – |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
