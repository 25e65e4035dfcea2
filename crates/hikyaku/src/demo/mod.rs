//! `hikyaku demo`: the whole system on one machine with nothing installed.
//!
//! Starts a sandbox of receiving mail servers with a DNS server, the service beside it, submits a
//! real newsletter to a thousand people, plays those who got it, and compares the service's
//! report with what sandbox and audience counted. Nothing here knows more than a client would: it
//! submits and reads over HTTP.

mod audience;
mod people;
mod report;
mod sandbox;
mod setup;
mod signatures;

use crate::cli::{Failure, Terminal};
use crate::client::Client;
use crate::up::{self, Running};
use anyhow::{Context, Result, ensure};
use audience::Played;
use indicatif::{ProgressBar, ProgressStyle};
use people::Person;
use report::{Received, Report};
use sandbox::Sandbox;
use serde_json::{Value, json};
use setup::Setup;
use std::net::SocketAddr;
use std::time::Duration;

/// How long the mail, and later the engagement, may take to be all recorded.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

/// Arguments of `hikyaku demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// End after the report; exit status 1 if it and the sandbox's own count differ
    #[arg(long)]
    exit: bool,
    /// Only start everything; send nothing
    #[arg(long, conflicts_with = "exit")]
    no_traffic: bool,
}

/// Runs the demo until it is done or stopped.
///
/// # Errors
/// When something does not start, or when the report is not true.
pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    up::runtime()?.block_on(play(arguments, terminal))
}

async fn play(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let setup = Setup::make(&terminal.environment)?;
    let sandbox = Sandbox::start(&setup.dkim_records()).await?;
    let running = Running::start(&setup.config(&sandbox)?).await?;
    let api = running.api();
    introduce(&setup, api, running.tracker(), terminal)?;
    let agrees = arguments.no_traffic || traffic(&setup, &sandbox, api, terminal).await?;
    if !arguments.exit {
        if !arguments.no_traffic {
            writeln!(
                terminal.out,
                "\nWho gets more mail reads it, too, some subjects more than others: try an A/B test (docs/api.md),\nfrom news@{}, to the people of people.csv.",
                setup::DOMAIN
            )?;
        }
        writeln!(terminal.out, "\nThe service stays up. Ctrl-C ends it.")?;
        let reading = async {
            match arguments.no_traffic {
                true => std::future::pending().await,
                false => audience::follow(&sandbox).await,
            }
        };
        tokio::select! {
            stopped = running.stopped() => stopped?,
            () = reading => {}
        }
    }
    running.drain().await?;
    if agrees { Ok(()) } else { Err(Failure::No) }
}

fn introduce(
    setup: &Setup,
    api: SocketAddr,
    tracker: SocketAddr,
    terminal: &mut Terminal<'_>,
) -> Result<()> {
    writeln!(
        terminal.out,
        "Hikyaku demo: MTA, tracker and embedded store in this process, and a sandbox to send to:"
    )?;
    write!(terminal.out, "{}", Sandbox::describe())?;
    writeln!(
        terminal.out,
        "Nothing leaves this machine. Deferred mail is retried within seconds here, not minutes.\n"
    )?;
    writeln!(
        terminal.out,
        "  API and metrics  http://{api}  (key in {})",
        setup.key_file().display()
    )?;
    writeln!(terminal.out, "  tracker          http://{tracker}")?;
    writeln!(
        terminal.out,
        "  files            {}\n",
        setup.dir().display()
    )?;
    Ok(())
}

/// Sends the newsletter, plays the audience, prints the report; whether it is true.
async fn traffic(
    setup: &Setup,
    sandbox: &Sandbox,
    api: SocketAddr,
    terminal: &mut Terminal<'_>,
) -> Result<bool> {
    let csv = setup.dir().join("people.csv");
    people::write(&csv, &sandbox::homes())?;
    let people = people::read(&csv)?;
    let key = std::fs::read_to_string(setup.key_file()).context("the API key")?;
    let client = Client::new(format!("http://{api}"), Some(key.trim().to_owned()));
    let id = submit(&client, &people).await?;
    writeln!(
        terminal.out,
        "Newsletter accepted as batch {id}: {} people from {}",
        people.len(),
        csv.display()
    )?;
    deliver(&client, &id, people.len()).await?;
    let mails = sandbox.mails();
    writeln!(terminal.out, "Playing the people who got it …")?;
    let signatures = signatures::verify(sandbox.dns(), &mails).await?;
    let played = audience::play(mails).await?;
    let counters = settled(&client, &id, &played).await?;
    let rows = recipients(&client, &id).await?;
    let fates = sandbox.fates(people.iter().map(|person| person.email.as_str()));
    let received = Received {
        copies: sandbox.accepted(),
        signatures,
    };
    let report = Report::compare(&rows, &counters, &fates, &received, &played);
    writeln!(terminal.out, "\n{report}\n{}", report::rates(&counters))?;
    writeln!(
        terminal.out,
        "{} requests by link checkers changed nothing.",
        played.probes
    )?;
    let verdict = if report.agrees() {
        "Every number above is true."
    } else {
        "The numbers differ."
    };
    writeln!(terminal.out, "{verdict}")?;
    Ok(report.agrees())
}

async fn submit(client: &Client, people: &[Person]) -> Result<String> {
    let recipients: Vec<Value> = people
        .iter()
        .map(|person| {
            json!({"email": person.email, "name": person.name, "prospect_id": person.prospect_id,
                   "vars": {"points": person.points, "city": person.city}})
        })
        .collect();
    let batch = json!({
        "campaign": "spring", "list": "newsletter",
        "from": {"email": format!("news@{}", setup::DOMAIN), "name": "飛脚 Demo"},
        "reply_to": format!("help@{}", setup::DOMAIN),
        "subject": "{{ name }}, spring is here 🌸",
        "html": include_str!("newsletter.html"),
        "text": include_str!("newsletter.txt"),
        "recipients": recipients,
    });
    let answer: Value = client.post("/v1/batches", &batch).await?.ok()?.json()?;
    ensure!(
        answer["accepted"] == people.len(),
        "not everyone was accepted: {answer}"
    );
    answer["id"]
        .as_str()
        .map(str::to_owned)
        .context("an answer without an id")
}

async fn counters(client: &Client, id: &str) -> Result<(bool, Value)> {
    let batch: Value = client
        .get(&format!("/v1/batches/{id}"))
        .await?
        .ok()?
        .json()?;
    Ok((batch["state"] == "completed", batch["counters"].clone()))
}

/// Shows progress until every recipient has a final status.
async fn deliver(client: &Client, id: &str, people: usize) -> Result<()> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} done, {msg}  {elapsed}")?;
    let bar = ProgressBar::new(people as u64).with_style(style);
    let watch = async {
        loop {
            let (completed, counters) = counters(client, id).await?;
            let count = |name: &str| counters[name].as_u64().unwrap_or(0);
            bar.set_position(
                count("accepted") - count("queued") - count("temporary_error") - count("scheduled"),
            );
            bar.set_message(format!(
                "{} delivered, {} to be retried",
                count("delivered"),
                count("temporary_error")
            ));
            if completed {
                return anyhow::Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, watch)
        .await
        .context("the batch did not complete")??;
    bar.finish();
    Ok(())
}

/// The batch's counters once all that was played is recorded; as they are when patience ends.
async fn settled(client: &Client, id: &str, played: &Played) -> Result<Value> {
    let recorded = async {
        loop {
            let (_, counters) = counters(client, id).await?;
            let all = counters["opened_total"] == played.opens
                && counters["clicked_total"] == played.clicks
                && counters["unsubscribed"] == played.unsubscribed.len();
            if all {
                return anyhow::Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    match tokio::time::timeout(PATIENCE / 4, recorded).await {
        Ok(done) => done?,
        // The report will show what is missing.
        Err(_) => tracing::warn!(batch = id, "not all engagement was recorded in time"),
    }
    Ok(counters(client, id).await?.1)
}

async fn recipients(client: &Client, id: &str) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/v1/batches/{id}/recipients?limit=1000{cursor}");
        let mut page: Value = client.get(&path).await?.ok()?.json()?;
        rows.extend(
            page["items"]
                .as_array_mut()
                .map(std::mem::take)
                .unwrap_or_default(),
        );
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Ok(rows),
        }
    }
}
