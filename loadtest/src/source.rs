//! The load source: submits, and watches until all is done.

use crate::batch::Shape;
use crate::client::{Accepted, Batch, Client, Counters};
use crate::format::{count, per_second, rate};
use crate::local;
use anyhow::{Context as _, Result, bail};
use service::clock::{Clock as _, SystemClock};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often a batch is asked for. Each answer costs the service a reading of counters.
pub(crate) const POLL: Duration = Duration::from_millis(200);
/// How often its progress is printed.
const LINE: Duration = Duration::from_secs(1);
/// After which a delivery that does not move is given up.
const STALLED: Duration = Duration::from_secs(60);

/// Submit generated batches over HTTP, and watch their delivery
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The service: http://HOST:PORT, loopback
    #[arg(long, default_value = "http://127.0.0.1:8025", value_parser = local::parse_url)]
    pub url: String,
    /// File with the API key
    #[arg(long, default_value = "data/api-key")]
    pub key_file: PathBuf,
    #[command(flatten)]
    /// What is submitted
    pub shape: Shape,
    /// Recipients of each call [default: all in one]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub batch_size: Option<u64>,
    /// Give up after so long, as "15m"
    #[arg(long, default_value = "15m", value_parser = model::units::parse_duration)]
    pub timeout: Duration,
}

/// What became of a load.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The batches.
    pub batches: Vec<String>,
    /// Recipients accepted.
    pub accepted: u64,
    /// From the first byte sent to the last 202.
    pub submit_time: Duration,
    /// From the last 202 to the completion of the last batch.
    pub delivery_time: Duration,
    /// The sum over the batches at the end.
    pub counters: Counters,
}

/// Submits, waits and reports.
///
/// # Errors
/// When a batch is refused, or not all is delivered within the time.
pub async fn run(args: &Args, out: &mut (dyn Write + Send)) -> Result<Report> {
    let key = std::fs::read_to_string(&args.key_file)
        .with_context(|| format!("cannot read the API key in {}", args.key_file.display()))?;
    let client = Client::new(&args.url, key.trim());
    let work = async {
        let mut report = submit(&client, &args.shape, args.batch_size).await?;
        writeln!(
            out,
            "accepted {} in {:.2} s: {} recipients/s",
            count(report.accepted),
            report.submit_time.as_secs_f64(),
            rate(per_second(report.accepted, report.submit_time)),
        )?;
        watch(&client, &mut report, out).await?;
        writeln!(
            out,
            "delivered {} in {:.2} s: {} messages/s",
            count(report.counters.delivered),
            report.delivery_time.as_secs_f64(),
            rate(per_second(report.counters.delivered, report.delivery_time)),
        )?;
        anyhow::Ok(report)
    };
    let report = tokio::time::timeout(args.timeout, work)
        .await
        .with_context(|| format!("not done within {:?}", args.timeout))??;
    report.check()?;
    Ok(report)
}

/// Submits all recipients, in calls of `batch_size`, one after the other.
///
/// # Errors
/// When one is refused, or has recipients that are.
pub async fn submit(client: &Client, shape: &Shape, batch_size: Option<u64>) -> Result<Report> {
    let size = batch_size.unwrap_or(shape.recipients).max(1);
    let start = SystemClock.instant();
    let mut report = Report::default();
    let mut first = 0;
    while first < shape.recipients {
        let end = shape.recipients.min(first.saturating_add(size));
        let Accepted {
            id,
            accepted,
            rejected_count,
        } = client.submit(shape.body(first, end)?).await?;
        if rejected_count > 0 {
            bail!("{rejected_count} recipients of batch {id} were rejected: our own are all good");
        }
        report.accepted += accepted;
        report.batches.push(id);
        first = end;
    }
    report.submit_time = SystemClock.instant().duration_since(start);
    Ok(report)
}

/// Asks until every batch is completed; prints how far it is each second.
///
/// # Errors
/// When the service does not answer, a batch is stopped, or nothing moves for a minute.
pub async fn watch(
    client: &Client,
    report: &mut Report,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let start = SystemClock.instant();
    let mut progress = Progress::new(report.accepted, start);
    let mut done = Counters::default();
    for id in report.batches.clone() {
        loop {
            let Batch { state, counters } = client.batch(&id).await?;
            let now = SystemClock.instant();
            let sum = done.plus(&counters);
            if state == "completed" {
                done = sum;
                break;
            }
            if state != "in_progress" {
                bail!("batch {id} is {state}");
            }
            progress.see(&sum, now, out)?;
            tokio::time::sleep(POLL).await;
        }
    }
    report.delivery_time = SystemClock.instant().duration_since(start);
    report.counters = done;
    Ok(())
}

/// What was said of a delivery, and when it last moved.
struct Progress {
    accepted: u64,
    said: (u64, Instant),
    moved: (Counters, Instant),
}

impl Progress {
    fn new(accepted: u64, now: Instant) -> Self {
        Self {
            accepted,
            said: (0, now),
            moved: (Counters::default(), now),
        }
    }

    fn see(
        &mut self,
        counters: &Counters,
        now: Instant,
        out: &mut (dyn Write + Send),
    ) -> Result<()> {
        if *counters != self.moved.0 {
            self.moved = (*counters, now);
        }
        if now.duration_since(self.moved.1) >= STALLED {
            bail!("nothing has moved for {STALLED:?}: {counters:?}");
        }
        let (before, at) = self.said;
        if now.duration_since(at) >= LINE && counters.delivered != before {
            self.said = (counters.delivered, now);
            let more = counters.delivered.saturating_sub(before);
            let speed = rate(per_second(more, now.duration_since(at)));
            let (delivered, all) = (count(counters.delivered), count(self.accepted));
            writeln!(out, "{delivered:>12} of {all}  {speed:>8}/s")?;
            out.flush()?;
        }
        Ok(())
    }
}

impl Counters {
    /// The sum of two.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            accepted: self.accepted + other.accepted,
            queued: self.queued + other.queued,
            temporary_error: self.temporary_error + other.temporary_error,
            delivered: self.delivered + other.delivered,
            bounce: self.bounce + other.bounce,
            failed: self.failed + other.failed,
        }
    }
}

impl Report {
    /// Everything must have been delivered: a measurement of anything else means nothing.
    ///
    /// # Errors
    /// With the counters, when it was not.
    pub fn check(&self) -> Result<()> {
        if self.counters.delivered == self.accepted && self.accepted > 0 {
            return Ok(());
        }
        bail!("not everything was delivered: {:?}", self.counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_that_does_not_move_is_given_up() {
        let start = SystemClock.instant();
        let mut progress = Progress::new(1_000, start);
        let mut out = Vec::new();
        let mut see = |delivered, seconds| {
            let counters = Counters {
                delivered,
                ..Counters::default()
            };
            progress.see(&counters, start + Duration::from_secs(seconds), &mut out)
        };
        see(0, 0).expect("just begun");
        see(500, 59).expect("moved");
        see(500, 118).expect("patient");
        let error = see(500, 119).expect_err("stalled").to_string();
        assert!(error.contains("nothing has moved for 60s"), "{error}");
        let text = String::from_utf8(out).expect("text");
        assert_eq!(text, "         500 of 1,000         8/s\n");
    }
}
