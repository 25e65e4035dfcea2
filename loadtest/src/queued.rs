//! What it costs that much is queued: memory, a start after kill -9, and the mail that goes on beside.
//!
//! The queued recipients are at destinations that take a message an hour; the others at ones that
//! take all there is. Both wait in the same store.

use crate::batch::Shape;
use crate::bench::Bench;
use crate::counterpart::Counterpart;
use crate::format::{Table, bytes, count, per, per_second, rate};
use crate::process::{self, Usage};
use crate::site::{Dkim, Setup, Site};
use crate::source::{self, Report};
use anyhow::{Context as _, Result};
use std::io::Write;
use std::time::Duration;

/// Measure with much queued: for each number, `hikyaku up`, so many recipients that wait, a batch
/// that does not, and kill -9 before a second one
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    /// The batch that does not wait
    pub shape: Shape,
    /// Recipients that wait: a run for each
    #[arg(long, value_delimiter = ',', default_values = ["10000", "10000000"], value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    pub queued: Vec<u64>,
    /// Domains that they are at, in turn
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub queued_domains: u64,
    /// Connections per destination
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub connections: u32,
    /// Messages on each connection
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub messages_per_connection: u32,
    /// Give up a run after so long, as "30m"
    #[arg(long, default_value = "30m", value_parser = model::units::parse_duration)]
    pub timeout: Duration,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// What one run showed.
#[derive(Debug, Clone)]
pub struct Run {
    /// What waits.
    pub queued: Report,
    /// Resident memory at most while it came in.
    pub intake_peak: u64,
    /// The batch that did not wait, and what the service used for its delivery.
    pub before: (Report, Usage),
    /// Resident memory at most since intake of what waits, where the kernel lets us start anew.
    pub delivery_peak: Option<u64>,
    /// From the start after kill -9 until it is ready.
    pub start: Duration,
    /// Resident memory then.
    pub started: u64,
    /// The same batch again.
    pub after: (Report, Usage),
}

/// Measures and prints the report.
///
/// # Errors
/// When anything is not accepted or delivered, or does not start or end well.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let mut runs = Vec::new();
    for queued in &args.queued {
        writeln!(out, "\n{} queued", count(*queued))?;
        let run = tokio::time::timeout(args.timeout, measure(args, *queued, out)).await;
        let run = run.with_context(|| format!("not done within {:?}", args.timeout))?;
        runs.push(run.with_context(|| format!("the run with {} queued", count(*queued)))?);
    }
    writeln!(out, "\n{}", table(&runs).render(args.bench.markdown))?;
    Ok(())
}

async fn measure(args: &Args, queued: u64, out: &mut (dyn Write + Send)) -> Result<Run> {
    let sink = Counterpart::start("sink").await?;
    let from = args.shape.from.rsplit_once('@');
    let setup = Setup {
        sink: sink.address(),
        from_domain: from.context("--from is no address")?.1.to_owned(),
        dkim: Dkim::None,
        store: None,
        tracking_keys: None,
        destinations: args.shape.domains,
        slow: args.queued_domains,
        routes: Vec::new(),
        dns: None,
        connections: args.connections,
        messages_per_connection: args.messages_per_connection,
        dir: args.bench.dir(),
        program: args.bench.program()?,
    };
    let mut site = Site::start(&setup, None).await?;
    let measured = phases(args, queued, &mut site, out).await;
    let run = site.explain(measured)?;
    site.stop().await?;
    sink.stop().await?;
    Ok(run)
}

async fn phases(
    args: &Args,
    queued: u64,
    site: &mut Site,
    out: &mut (dyn Write + Send),
) -> Result<Run> {
    let waiting = Shape {
        recipients: queued,
        domains: args.queued_domains,
        below: "slow.example".to_owned(),
        ..args.shape.clone()
    };
    let queued = source::submit(site.client(), &waiting, None).await?;
    let intake_peak = process::peak_memory(site.pid())?;
    let anew = process::reset_peak_memory(site.pid());
    let before = deliver(args, site, out).await?;
    let delivery_peak = anew.then(|| process::peak_memory(site.pid())).transpose()?;
    let start = site.crash().await?;
    let started = process::memory(site.pid())?;
    let after = deliver(args, site, out).await?;
    Ok(Run {
        queued,
        intake_peak,
        before,
        delivery_peak,
        start,
        started,
        after,
    })
}

async fn deliver(
    args: &Args,
    site: &Site,
    out: &mut (dyn Write + Send),
) -> Result<(Report, Usage)> {
    let mut report = source::submit(site.client(), &args.shape, None).await?;
    let accepted = process::usage(site.pid())?;
    source::watch(site.client(), &mut report, out).await?;
    let used = process::usage(site.pid())?.since(&accepted);
    report.check()?;
    Ok((report, used))
}

/// A row: its name, and what a run has to say to it.
type Row = (&'static str, fn(&Run) -> String);

fn table(runs: &[Run]) -> Table {
    let head = runs.iter().map(|run| count(run.queued.accepted));
    let mut table = Table::new(std::iter::once("queued".to_owned()).chain(head));
    let rows: [Row; 9] = [
        ("recipients queued per second", |run| {
            rate(per_second(run.queued.accepted, run.queued.submit_time))
        }),
        ("peak memory, intake of these", |run| bytes(run.intake_peak)),
        ("peak memory, delivery beside these", |run| {
            run.delivery_peak.map_or_else(|| "–".to_owned(), bytes)
        }),
        ("messages delivered beside these", |run| {
            count(run.before.0.accepted)
        }),
        ("CPU s per 1,000 of them", |run| cost(&run.before)),
        ("… per second", |run| speed(&run.before)),
        ("s from kill -9 until ready", |run| {
            format!("{:.2}", run.start.as_secs_f64())
        }),
        ("memory when ready", |run| bytes(run.started)),
        ("CPU s per 1,000 delivered after that", |run| {
            cost(&run.after)
        }),
    ];
    for (name, cell) in rows {
        table.row(std::iter::once(name.to_owned()).chain(runs.iter().map(cell)));
    }
    table
}

fn cost((report, used): &(Report, Usage)) -> String {
    format!("{:.4}", per(used.cpu(), report.accepted, 1000.0))
}

fn speed((report, _): &(Report, Usage)) -> String {
    rate(per_second(report.counters.delivered, report.delivery_time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_column_for_each_number() {
        let delivered = |millis| {
            let report = Report {
                accepted: 1_000,
                ..Report::default()
            };
            let used = Usage {
                user: Duration::from_millis(millis),
                ..Usage::default()
            };
            (report, used)
        };
        let run = |queued| Run {
            queued: Report {
                accepted: queued,
                submit_time: Duration::from_secs(2),
                ..Report::default()
            },
            intake_peak: 50 << 20,
            before: delivered(100),
            delivery_peak: Some(60 << 20),
            start: Duration::from_millis(1500),
            started: 40 << 20,
            after: delivered(110),
        };
        let text = table(&[run(10), run(20_000)]).markdown();
        for line in [
            "| queued | 10 | 20,000 |",
            "| recipients queued per second | 5 | 10,000 |",
            "| CPU s per 1,000 of them | 0.1000 | 0.1000 |",
            "| s from kill -9 until ready | 1.50 | 1.50 |",
            "| CPU s per 1,000 delivered after that | 0.1100 | 0.1100 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
