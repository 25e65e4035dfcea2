//! What more nodes bring: 1, 2, … on one Redis, each bound by how long a destination takes to answer.
//!
//! Every node has so many connections to one destination that answers late, so the machine is
//! mostly idle, and what limits the sum is what the nodes share: Redis' one thread, which is
//! measured.

use crate::batch::Shape;
use crate::bench::Bench;
use crate::client::Client;
use crate::counterpart::Counterpart;
use crate::format::{Table, count, float, per, per_second, rate};
use crate::process;
use crate::redis::{Redis, Used};
use crate::sink::Manner;
use crate::site::{Dkim, Setup, Site};
use crate::source;
use anyhow::{Context as _, Result, bail, ensure};
use service::clock::{Clock as _, SystemClock};
use std::io::Write;
use std::time::{Duration, Instant};

/// Of the recipients, this part is delivered before the measurement, and as much after it: nodes
/// have come to terms about connections, and none is without work yet.
const MARGIN: u64 = 5;
/// Between looks at how far it is: each is work for the Redis that is measured.
const LOOK: Duration = Duration::from_secs(1);

/// Measure nodes that share a Redis (AOF everysec): for each number of nodes, `hikyaku up` so many
/// times, and a batch that all of them deliver to a destination that answers late
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    /// What is submitted; recipients are those of each node
    pub shape: Shape,
    /// How many nodes: a run for each
    #[arg(long, value_delimiter = ',', default_values = ["1", "2", "3", "4"], value_parser = clap::value_parser!(u32).range(1..=16))]
    pub nodes: Vec<u32>,
    /// Connections of each node
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,
    /// Messages on each connection
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub messages_per_connection: u32,
    #[command(flatten)]
    /// What the sink is like: a round trip of 200 ms to it is what an answer after 200 ms is
    pub manner: Manner,
    /// Give up a run after so long, as "30m"
    #[arg(long, default_value = "30m", value_parser = model::units::parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// What one run showed, between its margins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// How many nodes.
    pub nodes: u32,
    /// Messages delivered.
    pub messages: u64,
    /// How long that took.
    pub took: Duration,
    /// CPU time of all nodes.
    pub cpu: Duration,
    /// What Redis used.
    pub redis: Used,
}

/// Measures and prints the report.
///
/// # Errors
/// When anything is not delivered, or does not start or end well.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let mut runs = Vec::new();
    for nodes in &args.nodes {
        writeln!(out, "\n{nodes} nodes")?;
        let run = tokio::time::timeout(args.timeout, measure(args, *nodes)).await;
        let run = run.with_context(|| format!("not done within {:?}", args.timeout))?;
        let run = run.with_context(|| format!("the run with {nodes} nodes"))?;
        writeln!(out, "{} messages in {:.1?}", count(run.messages), run.took)?;
        runs.push(run);
    }
    writeln!(out, "\n{}", table(&runs).render(args.bench.markdown))?;
    Ok(())
}

async fn measure(args: &Args, nodes: u32) -> Result<Run> {
    let dir = args.bench.dir();
    let folder = tempfile::tempdir_in(&dir)?;
    let redis = Redis::start(folder.path())?;
    let sink = Counterpart::sink(&args.manner).await?;
    let from = args.shape.from.rsplit_once('@');
    let mut setup = Setup {
        sink: sink.address(),
        from_domain: from.context("--from is no address")?.1.to_owned(),
        dkim: Dkim::None,
        store: Some(redis.url()),
        tracking_keys: None,
        destinations: 0,
        slow: 0,
        routes: Vec::new(),
        dns: None,
        // All nodes together have what a destination allows.
        connections: args.connections * nodes,
        messages_per_connection: args.messages_per_connection,
        dir,
        program: args.bench.program()?,
    };
    let mut sites: Vec<Site> = Vec::new();
    for _ in 0..nodes {
        if let Some(first) = sites.first() {
            setup.tracking_keys = Some(first.tracking_keys()?);
        }
        sites.push(Site::start(&setup, None).await?);
    }
    let measured = deliver(args, &sites, &redis).await;
    let first = sites.first().context("no nodes")?;
    let run = first.explain(measured)?;
    for site in sites {
        site.stop().await?;
    }
    sink.stop().await?;
    Ok(run)
}

/// What was used up to a moment.
struct Moment {
    at: Instant,
    delivered: u64,
    cpu: Duration,
    redis: Used,
}

impl Moment {
    fn now(sites: &[Site], redis: &Redis, delivered: u64) -> Result<Self> {
        let mut cpu = Duration::ZERO;
        for site in sites {
            cpu += process::usage(site.pid())?.cpu();
        }
        Ok(Self {
            at: SystemClock.instant(),
            delivered,
            cpu,
            redis: redis.used()?,
        })
    }
}

async fn deliver(args: &Args, sites: &[Site], redis: &Redis) -> Result<Run> {
    let nodes = u32::try_from(sites.len()).unwrap_or(u32::MAX);
    let shape = Shape {
        recipients: args.shape.recipients * u64::from(nodes),
        ..args.shape.clone()
    };
    let client = sites.first().context("no nodes")?.client();
    let report = source::submit(client, &shape, None).await?;
    let batch = report.batches.first().context("no batch")?;
    let margin = shape.recipients / MARGIN;
    let begin = reached(client, batch, margin).await?;
    let begin = Moment::now(sites, redis, begin)?;
    let end = reached(client, batch, shape.recipients - margin).await?;
    let end = Moment::now(sites, redis, end)?;
    let all = reached(client, batch, shape.recipients).await?;
    ensure!(all == shape.recipients, "{all} were delivered");
    Ok(Run {
        nodes,
        messages: end.delivered - begin.delivered,
        took: end.at.duration_since(begin.at),
        cpu: end.cpu.saturating_sub(begin.cpu),
        redis: end.redis.since(&begin.redis),
    })
}

/// Waits until so many of the batch are delivered; tells how many are.
async fn reached(client: &Client, batch: &str, wanted: u64) -> Result<u64> {
    loop {
        let seen = client.batch(batch).await?;
        if seen.counters.delivered >= wanted {
            return Ok(seen.counters.delivered);
        }
        if seen.state != "in_progress" {
            bail!("batch {batch} is {}: {:?}", seen.state, seen.counters);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn table(runs: &[Run]) -> Table {
    let head = runs.iter().map(|run| run.nodes.to_string());
    let mut table = Table::new(std::iter::once("nodes".to_owned()).chain(head));
    let speed = |run: &Run| per_second(run.messages, run.took);
    let each = |run: &Run| speed(run) / f64::from(run.nodes);
    let one = runs.first().map(each).unwrap_or_default();
    let micros = |of: Duration, run: &Run| format!("{:.1}", per(of, run.messages, 1e6));
    type Cell<'a> = Box<dyn Fn(&Run) -> String + 'a>;
    let rows: [(&str, Cell<'_>); 7] = [
        ("messages per second", Box::new(|run| rate(speed(run)))),
        (
            "… of each node, to the first run's",
            Box::new(|run| format!("{:.3}", each(run) / one)),
        ),
        (
            "µs of Redis' main thread per message",
            Box::new(|run| micros(run.redis.main, run)),
        ),
        (
            "µs of all of Redis per message",
            Box::new(|run| micros(run.redis.all, run)),
        ),
        (
            "commands per message",
            Box::new(|run| {
                let commands = float(run.redis.commands) / float(run.messages.max(1));
                format!("{commands:.2}")
            }),
        ),
        (
            "µs of the nodes per message",
            Box::new(|run| micros(run.cpu, run)),
        ),
        (
            "messages per second of one Redis thread",
            Box::new(|run| rate(per_second(run.messages, run.redis.main))),
        ),
    ];
    for (name, cell) in rows {
        table.row(std::iter::once(name.to_owned()).chain(runs.iter().map(cell)));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_compared_with_the_first() {
        let run = |nodes, messages| Run {
            nodes,
            messages,
            took: Duration::from_secs(10),
            cpu: Duration::from_secs(1),
            redis: Used {
                main: Duration::from_millis(100),
                all: Duration::from_millis(150),
                commands: 15_000,
            },
        };
        let text = table(&[run(1, 10_000), run(2, 19_000)]).markdown();
        for line in [
            "| nodes | 1 | 2 |",
            "| messages per second | 1,000 | 1,900 |",
            "| … of each node, to the first run's | 1.000 | 0.950 |",
            "| µs of Redis' main thread per message | 10.0 | 5.3 |",
            "| commands per message | 1.50 | 0.79 |",
            "| messages per second of one Redis thread | 100,000 | 190,000 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
