//! What it costs to accept recipients, beside the bare work: parsing the same bytes with `serde_json`.
//!
//! For each form a fresh `hikyaku up`, one call with all recipients, whose time to be sent is far
//! away: nothing but acceptance is measured. The bytes are made before, and the bare work is done by
//! this process on one thread, right after.

use crate::batch::Shape;
use crate::bench::Bench;
use crate::client::Accepted;
use crate::format::{Table, bytes, count, per, per_second, rate};
use crate::process;
use crate::site::{Dkim, Setup, Site};
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use service::clock::{Clock as _, SystemClock};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

/// Measure acceptance: one call with all recipients in each form, beside bare parsing of its bytes
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    /// What is submitted
    pub shape: Shape,
    /// How: a run for each
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["json", "ndjson", "csv"])]
    pub form: Vec<Form>,
    #[command(flatten)]
    /// Where and with what
    pub bench: Bench,
}

/// How recipients are submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// One document
    Json,
    /// A stream of lines
    Ndjson,
    /// One part of a held batch
    Csv,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Json => "JSON",
            Self::Ndjson => "NDJSON",
            Self::Csv => "CSV",
        }
    }

    fn media(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Ndjson => "application/x-ndjson",
            Self::Csv => "text/csv",
        }
    }
}

/// What a run showed.
#[derive(Debug, Clone)]
struct Run {
    form: Form,
    recipients: u64,
    bytes: u64,
    wall: Duration,
    /// Of the service.
    cpu: Duration,
    /// Resident at most, beyond what was before.
    grown: Option<u64>,
    /// CPU of the bare work.
    bare: Duration,
}

/// Measures and prints the report.
///
/// # Errors
/// When anything is not accepted, or the service does not start or end well.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<()> {
    writeln!(out, "{}", process::machine())?;
    let mut runs = Vec::new();
    for form in &args.form {
        let run = measure(args, *form).await;
        runs.push(run.with_context(|| format!("the run with {}", form.name()))?);
    }
    writeln!(out, "\n{}", table(&runs).render(args.bench.markdown))?;
    Ok(())
}

async fn measure(args: &Args, form: Form) -> Result<Run> {
    let from = args.shape.from.rsplit_once('@');
    let setup = Setup {
        sink: SocketAddr::from(([127, 0, 0, 1], 1)),
        from_domain: from.map_or_else(String::new, |(_, domain)| domain.to_owned()),
        dkim: Dkim::None,
        store: None,
        tracking_keys: None,
        destinations: 0,
        slow: 0,
        routes: Vec::new(),
        dns: None,
        connections: 1,
        messages_per_connection: 1,
        dir: args.bench.dir(),
        program: args.bench.program()?,
    };
    let body = args.shape.written(form)?;
    let site = Site::start(&setup, None).await?;
    let accepted = accept(args, &site, form, &body).await;
    let mut run = site.explain(accepted)?;
    site.stop().await?;
    run.bare = tokio::task::spawn_blocking(move || bare(form, &body)).await??;
    Ok(run)
}

async fn accept(args: &Args, site: &Site, form: Form, body: &[Bytes]) -> Result<Run> {
    let mut path = "/v1/batches".to_owned();
    if form == Form::Csv {
        let held = [args.shape.held()?];
        let held = site.client().give(&path, "application/json", &held).await?;
        let held: Accepted = serde_json::from_slice(&held)?;
        path = format!("/v1/batches/{}/recipients", held.id);
    }
    let anew = process::reset_peak_memory(site.pid());
    let (before, memory) = (process::usage(site.pid())?, process::memory(site.pid())?);
    let began = SystemClock.instant();
    let answer = site.client().give(&path, form.media(), body).await?;
    let wall = SystemClock.instant() - began;
    let cpu = process::usage(site.pid())?.since(&before).cpu();
    let peak = anew.then(|| process::peak_memory(site.pid())).transpose()?;
    #[derive(serde::Deserialize)]
    struct Answered {
        accepted: u64,
    }
    let answered: Answered = serde_json::from_slice(&answer)?;
    let recipients = args.shape.recipients;
    ensure!(
        answered.accepted == recipients,
        "{} of {recipients} were accepted",
        answered.accepted
    );
    let length: usize = body.iter().map(Bytes::len).sum();
    Ok(Run {
        form,
        recipients,
        bytes: u64::try_from(length)?,
        wall,
        cpu,
        grown: peak.map(|peak| peak.saturating_sub(memory)),
        bare: Duration::ZERO,
    })
}

/// A recipient as whoever does nothing else would read it.
#[derive(serde::Deserialize)]
#[expect(dead_code, reason = "it is read for the sake of reading")]
struct Recipient<'j> {
    #[serde(borrow)]
    email: Cow<'j, str>,
    #[serde(borrow)]
    name: Option<Cow<'j, str>>,
    #[serde(borrow)]
    prospect_id: Option<Cow<'j, str>>,
    vars: serde_json::Map<String, serde_json::Value>,
}

/// A document with recipients.
#[derive(serde::Deserialize)]
struct Document<'j> {
    #[serde(borrow)]
    recipients: Vec<Recipient<'j>>,
}

/// CPU time of parsing alone, by this thread. A table is no JSON: its records are read, and their
/// variables put into a map.
fn bare(form: Form, body: &[Bytes]) -> Result<Duration> {
    let whole = body.concat();
    let began = process::of_this_thread()?;
    match form {
        Form::Json => {
            let document: Document<'_> = serde_json::from_slice(&whole)?;
            std::hint::black_box(&document.recipients);
        }
        Form::Ndjson => {
            let lines = whole.split(|byte| *byte == b'\n').skip(1);
            for line in lines.filter(|line| !line.is_empty()) {
                let recipient: Recipient<'_> = serde_json::from_slice(line)?;
                std::hint::black_box(&recipient);
            }
        }
        Form::Csv => {
            let mut table = csv::Reader::from_reader(whole.as_slice());
            for record in table.deserialize() {
                let record: HashMap<String, String> = record?;
                std::hint::black_box(&record);
            }
        }
    }
    Ok(process::of_this_thread()? - began)
}

/// A row: its name, and what a run has to say to it.
type Row = (&'static str, fn(&Run) -> String);

fn table(runs: &[Run]) -> Table {
    let head = runs.iter().map(|run| run.form.name().to_owned());
    let mut table = Table::new(std::iter::once("one call".to_owned()).chain(head));
    let rows: [Row; 9] = [
        ("recipients", |run| count(run.recipients)),
        ("bytes", |run| bytes(run.bytes)),
        ("accepted per second", |run| {
            rate(per_second(run.recipients, run.wall))
        }),
        ("wall s", |run| format!("{:.2}", run.wall.as_secs_f64())),
        ("CPU s per 1,000,000", |run| {
            format!("{:.2}", per(run.cpu, run.recipients, 1e6))
        }),
        ("bare parsing, CPU s per 1,000,000", |run| {
            format!("{:.2}", per(run.bare, run.recipients, 1e6))
        }),
        ("CPU ÷ bare parsing", |run| {
            format!("{:.2}", run.cpu.as_secs_f64() / run.bare.as_secs_f64())
        }),
        ("wall ÷ CPU", |run| {
            format!("{:.2}", run.wall.as_secs_f64() / run.cpu.as_secs_f64())
        }),
        ("memory beyond idle", |run| {
            run.grown.map_or_else(|| "–".to_owned(), bytes)
        }),
    ];
    for (name, cell) in rows {
        table.row(std::iter::once(name.to_owned()).chain(runs.iter().map(cell)));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            recipients: 20,
            domains: 3,
            in_a_row: 1,
            below: "example".to_owned(),
            beside: 0,
            vars: 5,
            links: 1,
            size: 10 * 1024,
            from: "news@brand.example".to_owned(),
        }
    }

    #[test]
    fn every_form_is_parsed_barely() {
        for form in [Form::Json, Form::Ndjson, Form::Csv] {
            let body = shape().written(form).expect("a body");
            bare(form, &body).expect("parsed");
        }
        let broken = [Bytes::from_static(b"{}\n{\"email\":7}")];
        assert!(bare(Form::Ndjson, &broken).is_err());
    }

    #[test]
    fn ratios_are_told() {
        let run = Run {
            form: Form::Ndjson,
            recipients: 1_000_000,
            bytes: 150 << 20,
            wall: Duration::from_secs(3),
            cpu: Duration::from_secs(4),
            grown: Some(50 << 20),
            bare: Duration::from_secs(2),
        };
        let text = table(&[run]).markdown();
        for line in ["| CPU ÷ bare parsing | 2.00 |", "| wall ÷ CPU | 0.75 |"] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
