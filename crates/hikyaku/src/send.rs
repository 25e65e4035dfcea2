//! `hikyaku send`: a newsletter to the people in a table.
//!
//! The table goes in parts into a held batch. Every call has an idempotency key made of what is
//! sent, so that a call is repeated safely, and a command that was broken off goes on where it was
//! when it is given again.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::RETRY_AFTER;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use service::config::Scope;

use crate::cli::{Failure, Terminal};
use crate::client::{Answer, Client};
use crate::reach::{Reach, runtime, told};

/// Recipients of one part.
const PART: usize = 5_000;
/// How often a call is made before it is given up.
const TRIES: u32 = 8;
/// How long to wait where the service does not say.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// From: ADDRESS, or "NAME <ADDRESS>"
    #[arg(long)]
    from: String,
    /// The subject, a template
    #[arg(long)]
    subject: String,
    /// File with the HTML part, a template
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// File with the text part, a template
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Table with the columns email, name, prospect_id; all others are variables
    #[arg(long, value_name = "FILE.csv")]
    recipients: PathBuf,
    /// Your name for it
    #[arg(long)]
    campaign: Option<String>,
    /// At most so many in a time, such as 100/s
    #[arg(long)]
    rate: Option<String>,
    /// Only submit: do not wait until all of it is sent
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    reach: Reach,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let client = arguments
        .reach
        .client(&terminal.environment, Scope::Submit)?;
    let batch = batch(arguments)?;
    let report = runtime()?.block_on(send(arguments, &client, &batch, terminal))?;
    Ok(print(&report, terminal.out)?)
}

/// The batch without its recipients.
fn batch(arguments: &Args) -> Result<Value> {
    let read = |file: &Option<PathBuf>| {
        let read = |file: &PathBuf| {
            std::fs::read_to_string(file).with_context(|| file.display().to_string())
        };
        file.as_ref().map(read).transpose()
    };
    let (name, email) = match arguments.from.rsplit_once('<') {
        Some((name, email)) => (Some(name.trim()), email.trim_end().trim_end_matches('>')),
        None => (None, arguments.from.trim()),
    };
    let mut batch = json!({
        "from": {"email": email, "name": name.filter(|name| !name.is_empty())},
        "subject": arguments.subject, "html": read(&arguments.html)?, "text": read(&arguments.text)?,
        "campaign": arguments.campaign, "hold": true,
    });
    if let (Some(rate), Some(fields)) = (&arguments.rate, batch.as_object_mut()) {
        fields.insert("rate".to_owned(), rate.as_str().into());
    }
    Ok(batch)
}

async fn send(
    arguments: &Args,
    client: &Client,
    batch: &Value,
    terminal: &mut Terminal<'_>,
) -> Result<Value> {
    let key = key(batch, &arguments.recipients)?;
    let body = Bytes::from(batch.to_string());
    let accepted = call(client, "/v1/batches", "application/json", body, &key).await?;
    let id = accepted["id"]
        .as_str()
        .context("no id was answered")?
        .to_owned();
    for warning in accepted["warnings"].as_array().into_iter().flatten() {
        writeln!(
            terminal.out,
            "warning: {}",
            warning.as_str().unwrap_or_default()
        )?;
    }
    let rejected = upload(arguments, client, &id, &key, terminal).await?;
    if rejected > 0 {
        writeln!(terminal.out, "{rejected} recipients were rejected")?;
    }
    told(
        &client
            .call(
                hyper::Method::POST,
                &format!("/v1/batches/{id}/start"),
                None,
                Bytes::new(),
            )
            .await?,
    )?;
    if !arguments.no_wait {
        wait(client, &id, terminal).await?;
    }
    told(&client.get(&format!("/v1/batches/{id}/report")).await?)
}

/// Names what is sent: the same batch to the same table is the same call.
fn key(batch: &Value, table: &Path) -> Result<String> {
    let mut hashes = [DefaultHasher::new(), DefaultHasher::new()];
    let mut file = std::fs::File::open(table).with_context(|| table.display().to_string())?;
    let mut piece = vec![0; 64 << 10];
    1_u8.hash(&mut hashes[1]);
    for hash in &mut hashes {
        batch.to_string().hash(hash);
    }
    loop {
        let length = std::io::Read::read(&mut file, &mut piece)?;
        if length == 0 {
            let [a, b] = hashes.map(|hash| hash.finish());
            return Ok(format!("send-{a:016x}{b:016x}"));
        }
        for hash in &mut hashes {
            hash.write(piece.get(..length).unwrap_or_default());
        }
    }
}

fn bar(terminal: &Terminal<'_>, length: u64, what: &'static str) -> Result<ProgressBar> {
    let target = match terminal.is_seen {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style =
        ProgressStyle::with_template("{msg} [{bar:40}] {human_pos}/{human_len} {per_sec} {eta}")
            .context("the bar")?
            .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(length), target).with_style(style);
    bar.set_message(what);
    Ok(bar)
}

/// Adds the table in parts; how many recipients were rejected.
async fn upload(
    arguments: &Args,
    client: &Client,
    id: &str,
    key: &str,
    terminal: &Terminal<'_>,
) -> Result<u64> {
    let table = &arguments.recipients;
    let mut reader = csv::Reader::from_path(table).with_context(|| table.display().to_string())?;
    let header = reader.byte_headers()?.clone();
    let bar = bar(terminal, std::fs::metadata(table)?.len(), "uploading")?;
    let path = format!("/v1/batches/{id}/recipients");
    let mut records = reader.byte_records();
    let (mut part, mut rejected) = (0, 0);
    loop {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_byte_record(&header)?;
        let (mut count, mut at) = (0, None);
        for record in records.by_ref().take(PART) {
            let record = record.with_context(|| table.display().to_string())?;
            writer.write_byte_record(&record)?;
            count += 1;
            at = record.position().map(csv::Position::byte);
        }
        if count == 0 {
            bar.finish_and_clear();
            return Ok(rejected);
        }
        let body = writer.into_inner().context("a part of the table")?.into();
        let added = call(client, &path, "text/csv", body, &format!("{key}-{part}")).await;
        rejected += match added {
            Ok(added) => added["rejected_count"].as_u64().unwrap_or(0),
            // It was sent before, and started: this command was given once more.
            Err(error) if is_started(client, id).await? => {
                bar.finish_and_clear();
                writeln!(std::io::stderr(), "the batch was started before: {error:#}").ok();
                return Ok(rejected);
            }
            Err(error) => return Err(error),
        };
        part += 1;
        bar.set_position(at.unwrap_or(0));
    }
}

async fn is_started(client: &Client, id: &str) -> Result<bool> {
    let found = told(&client.get(&format!("/v1/batches/{id}")).await?)?;
    Ok(found["state"] != "open")
}

/// Makes a call that takes effect once, again and again until it is answered.
async fn call(client: &Client, path: &str, media: &str, body: Bytes, key: &str) -> Result<Value> {
    let mut tries = 0;
    loop {
        let answer = client.once(path, media, body.clone(), key).await;
        tries += 1;
        match answer {
            Ok(answer) => match pause(&answer) {
                Some(pause) if tries < TRIES => tokio::time::sleep(pause).await,
                Some(_) | None => return told(&answer),
            },
            Err(error) if tries >= TRIES => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE * tries).await,
        }
    }
}

/// How long to wait before the call is made again; `None`: the answer stands.
fn pause(answer: &Answer) -> Option<Duration> {
    let again = [
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::REQUEST_TIMEOUT,
    ];
    let said = answer.headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok();
    let conflict = answer.status == StatusCode::CONFLICT;
    (again.contains(&answer.status) || conflict)
        .then(|| said.map_or(PAUSE, Duration::from_secs).min(PAUSE_MAX))
}

/// Shows progress until the batch has ended.
async fn wait(client: &Client, id: &str, terminal: &Terminal<'_>) -> Result<()> {
    let mut shown = None;
    loop {
        let found = told(&client.get(&format!("/v1/batches/{id}")).await?)?;
        let counters = &found["counters"];
        let count = |name: &str| counters[name].as_u64().unwrap_or(0);
        let open = count("scheduled") + count("queued") + count("temporary_error");
        let bar = match &shown {
            Some(bar) => bar,
            None => shown.insert(bar(terminal, count("accepted"), "sending")?),
        };
        bar.set_position(count("accepted").saturating_sub(open));
        match found["state"].as_str() {
            Some("completed" | "cancelled") => {
                bar.finish_and_clear();
                return Ok(());
            }
            Some("open") => bail!("the batch was not started"),
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// Prints a report for a person.
fn print(report: &Value, out: &mut dyn Write) -> Result<()> {
    let counters = &report["counters"];
    let id = report["id"].as_str().unwrap_or_default();
    let state = report["state"].as_str().unwrap_or_default();
    writeln!(out, "batch {id}: {state}")?;
    for name in [
        "accepted",
        "delivered",
        "bounce",
        "failed",
        "suppressed",
        "cancelled",
    ] {
        let count = counters[name].as_u64().unwrap_or(0);
        let rate = report["rates"][name].as_f64();
        let rate = rate.map_or_else(String::new, |rate| format!("  {:.1} %", rate * 100.0));
        writeln!(out, "  {name:<11}{count:>10}{rate}")?;
    }
    for group in report["destinations"]
        .as_array()
        .into_iter()
        .flatten()
        .take(10)
    {
        let name = group["destination"].as_str().unwrap_or_default();
        let count = |key: &str| group[key].as_u64().unwrap_or(0);
        let (delivered, bounce) = (count("delivered"), count("bounce"));
        writeln!(out, "  {name:<30} delivered {delivered}, bounced {bounce}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_sent_under_the_same_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let table = dir.path().join("people.csv");
        std::fs::write(&table, "email\na@x.example\n").expect("written");
        let one = key(&json!({"subject": "x"}), &table).expect("a key");
        assert_eq!(key(&json!({"subject": "x"}), &table).expect("a key"), one);
        assert_ne!(key(&json!({"subject": "y"}), &table).expect("a key"), one);
        std::fs::write(&table, "email\nb@x.example\n").expect("written");
        assert_ne!(key(&json!({"subject": "x"}), &table).expect("a key"), one);
        assert!(one.len() < 200 && one.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'));
    }

    #[test]
    fn a_report_is_printed() {
        let report = json!({
            "id": "01JD", "state": "completed", "counters": {"accepted": 4, "delivered": 3, "bounce": 1},
            "rates": {"delivered": 0.75, "bounce": 0.25}, "destinations": [{"destination": "gmail", "delivered": 3}],
        });
        let mut out = Vec::new();
        print(&report, &mut out).expect("printed");
        let text = String::from_utf8(out).expect("text");
        for part in [
            "batch 01JD: completed",
            "delivered           3  75.0 %",
            "gmail",
        ] {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }
}
