//! What quiet destinations notice of bad ones in the same batch.
//!
//! The same mail for many quiet domains twice: alone, and in one batch with mail for a host that
//! tarpits every command, one that never greets and one that resets after each message. Looked at
//! is when the sink of the quiet ones has everything; the others are not waited for.

use crate::batch::{BESIDE, Shape};
use crate::bench::Bench;
use crate::counterpart::Counterpart;
use crate::format::{Table, count, per, rate};
use crate::process::{self, Usage};
use crate::sink::Manner;
use crate::site::{Dkim, Setup, Site};
use crate::source;
use anyhow::{Context as _, Result, ensure};
use service::clock::{Clock as _, SystemClock};
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;
use testkit::smtp_peer::{SmtpPeer, Temper};

/// What the tarpit lets pass before each reply.
const TARPIT: Duration = Duration::from_secs(30);

/// Measure isolation: mail for quiet domains, alone and beside a tarpit, a host that never greets
/// and one that resets after each message
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    /// The mail for quiet domains
    pub shape: Shape,
    /// Recipients at each of the bad hosts
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub beside: u64,
    /// So often, alone and beside in turn
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Connections per destination
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,
    /// Messages on each connection
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub messages_per_connection: u32,
    /// Give up a run after so long, as "10m"
    #[arg(long, default_value = "10m", value_parser = model::units::parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// What one run showed of the quiet domains.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// From the 202 until the last of their messages was at the sink.
    pub took: Duration,
    /// What the service used until then.
    pub used: Usage,
    /// Their messages.
    pub messages: u64,
    /// Connections to their sink, most at a time.
    pub connections: u64,
}

/// Measures and prints the report.
///
/// # Errors
/// When a batch is not accepted, or the quiet domains do not get all their mail in time.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let mut rounds = Vec::new();
    for round in 1..=args.rounds {
        let alone = in_time(args, 0).await?;
        let beside = in_time(args, args.beside).await?;
        writeln!(
            out,
            "round {round}: {:.2} s alone, {:.2} s beside bad hosts",
            alone.took.as_secs_f64(),
            beside.took.as_secs_f64()
        )?;
        rounds.push((alone, beside));
    }
    writeln!(out, "\n{}", table(&rounds).render(args.bench.markdown))?;
    Ok(())
}

async fn in_time(args: &Args, beside: u64) -> Result<Run> {
    let run = tokio::time::timeout(args.timeout, measure(args, beside)).await;
    run.with_context(|| format!("not done within {:?}", args.timeout))?
}

async fn measure(args: &Args, beside: u64) -> Result<Run> {
    let quiet = args.shape.recipients;
    let sink = Counterpart::sink_of(&Manner::default(), quiet).await?;
    let peers = bad_peers().await?;
    let routes = BESIDE.iter().zip(&peers);
    let setup = args.setup(
        sink.address(),
        routes
            .map(|(name, peer)| (format!("{name}.{}", args.shape.below), peer.address()))
            .collect(),
    )?;
    let site = Site::start(&setup, None).await?;
    let shape = Shape {
        recipients: quiet + beside * BESIDE.len() as u64,
        beside,
        ..args.shape.clone()
    };
    let report = source::submit(site.client(), &shape, None).await?;
    ensure!(report.accepted == shape.recipients, "not all were accepted");
    let accepted = process::usage(site.pid())?;
    let start = SystemClock.instant();
    let total = site.explain(sink.total().await)?;
    let took = SystemClock.instant().duration_since(start);
    let used = process::usage(site.pid())?.since(&accepted);
    ensure!(total.messages >= quiet, "the sink ended before its time");
    // The bad hosts are not waited for: dropped, the service is killed.
    Ok(Run {
        took,
        used,
        messages: total.messages,
        connections: total.peak_connections,
    })
}

/// In the order of [`BESIDE`].
async fn bad_peers() -> Result<[SmtpPeer; 3]> {
    let start = async |temper: Temper| SmtpPeer::start(temper).await.context("cannot listen");
    Ok([
        start(Temper::counting().slow_commands(TARPIT)).await?,
        start(Temper::counting().never_greeting()).await?,
        start(Temper::counting().resetting_after_dot(true)).await?,
    ])
}

impl Args {
    fn setup(&self, sink: SocketAddr, routes: Vec<(String, SocketAddr)>) -> Result<Setup> {
        let from = self.shape.from.rsplit_once('@');
        Ok(Setup {
            sink,
            from_domain: from.context("--from is no address")?.1.to_owned(),
            dkim: Dkim::None,
            store: None,
            tracking_keys: None,
            destinations: self.shape.domains,
            slow: 0,
            routes,
            dns: None,
            connections: self.connections,
            messages_per_connection: self.messages_per_connection,
            dir: self.bench.dir(),
            program: self.bench.program()?,
        })
    }
}

fn table(rounds: &[(Run, Run)]) -> Table {
    let mut table = Table::new(["", "alone", "beside bad hosts", "ratio"].map(str::to_owned));
    let number = u32::try_from(rounds.len()).unwrap_or(u32::MAX).max(1);
    let mean = |of: fn(&Run) -> Duration| {
        let (mut alone, mut beside) = (Duration::ZERO, Duration::ZERO);
        for (one, other) in rounds {
            alone += of(one);
            beside += of(other);
        }
        (alone / number, beside / number)
    };
    for (at, (alone, beside)) in rounds.iter().enumerate() {
        let (alone, beside) = (alone.took.as_secs_f64(), beside.took.as_secs_f64());
        table.row([
            format!("s until all quiet ones have theirs, round {}", at + 1),
            format!("{alone:.2}"),
            format!("{beside:.2}"),
            format!("{:.3}", beside / alone),
        ]);
    }
    let (alone, beside) = mean(|run| run.took);
    table.row([
        "… mean".to_owned(),
        format!("{:.2}", alone.as_secs_f64()),
        format!("{:.2}", beside.as_secs_f64()),
        format!("{:.3}", beside.as_secs_f64() / alone.as_secs_f64()),
    ]);
    let messages = rounds.first().map_or(0, |(alone, _)| alone.messages);
    let speed = |took: Duration| rate(crate::format::per_second(messages, took));
    table.row([
        "quiet messages per second".to_owned(),
        speed(alone),
        speed(beside),
        String::new(),
    ]);
    let (alone, beside) = mean(|run| run.used.cpu());
    table.row([
        "CPU s per 1,000 of them, all work until then".to_owned(),
        format!("{:.4}", per(alone, messages, 1000.0)),
        format!("{:.4}", per(beside, messages, 1000.0)),
        format!("{:.3}", beside.as_secs_f64() / alone.as_secs_f64()),
    ]);
    let most = |of: fn(&(Run, Run)) -> u64| count(rounds.iter().map(of).max().unwrap_or(0));
    table.row([
        "connections to them, at most at a time".to_owned(),
        most(|(alone, _)| alone.connections),
        most(|(_, beside)| beside.connections),
        String::new(),
    ]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_one_round() {
        let run = |millis| Run {
            took: Duration::from_millis(millis),
            used: Usage {
                user: Duration::from_millis(millis),
                ..Usage::default()
            },
            messages: 1_000,
            connections: 7,
        };
        let text = table(&[(run(1_000), run(1_030)), (run(2_000), run(1_970))]).markdown();
        for line in [
            "| s until all quiet ones have theirs, round 1 | 1.00 | 1.03 | 1.030 |",
            "| … mean | 1.50 | 1.50 | 1.000 |",
            "| connections to them, at most at a time | 7 | 7 |  |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
