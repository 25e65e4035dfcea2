//! `hikyaku top`: destinations as they are now, again and again.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use model::Timestamp;
use model::units::parse_duration;
use serde_json::Value;
use service::clock::{Clock as _, SystemClock};
use service::config::Scope;

use crate::cli::{Failure, Terminal};
use crate::client::Client;
use crate::reach::{Reach, runtime, told};
use crate::show::{Paint, Tone, cut, length, number, time, tone_of};

/// Clears the screen and goes to its first corner.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Widths of destination and reason.
const NAME: usize = 28;
const WHY: usize = 64;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one picture and end
    #[arg(long)]
    once: bool,
    /// Time between pictures
    #[arg(long, default_value = "1s", value_parser = parse_duration)]
    interval: Duration,
    /// Destinations shown, the busiest first
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    limit: u32,
    #[command(flatten)]
    reach: Reach,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let client = arguments.reach.client(&terminal.environment, Scope::Read)?;
    let paint = Paint(terminal.colours);
    let interval = arguments.interval.max(Duration::from_millis(100));
    runtime()?.block_on(async {
        loop {
            let picture = picture(&client, arguments.limit).await?;
            let text = table(&picture, SystemClock.now(), paint);
            let clear = if terminal.is_seen && !arguments.once {
                CLEAR
            } else {
                ""
            };
            write!(terminal.out, "{clear}{text}")?;
            terminal.out.flush()?;
            if arguments.once {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                _ = tokio::signal::ctrl_c() => return Ok(()),
            }
            if !terminal.is_seen {
                writeln!(terminal.out)?;
            }
        }
    })
}

async fn picture(client: &Client, limit: u32) -> Result<Value> {
    told(
        &client
            .get(&format!("/v1/destinations?limit={limit}"))
            .await?,
    )
}

/// The whole picture as text.
fn table(picture: &Value, now: Timestamp, paint: Paint) -> String {
    let all: Vec<&Value> = picture["items"].as_array().into_iter().flatten().collect();
    let sum = |name: &str| number(all.iter().filter_map(|of| of[name].as_u64()).sum());
    let more = match picture["next_cursor"].is_null() {
        true => "",
        false => " shown (there are more)",
    };
    let mut text = String::new();
    let out = &mut text;
    // Writing to a String does not fail.
    writeln!(
        out,
        "{} destination{}{more}: {} queued, {} leased, {} being sent over {} connections",
        all.len(),
        if all.len() == 1 { "" } else { "s" },
        sum("queued"),
        sum("leased"),
        sum("in_flight"),
        sum("connections"),
    )
    .ok();
    let head = format!(
        "{:<NAME$} {:<8} {:>10} {:>7} {:>5} {:>7} {:>7} {:>9} {:>8} {:>8}  WHY",
        "DESTINATION",
        "STATE",
        "QUEUED",
        "LEASED",
        "SENT",
        "CONNS",
        "PACE/S",
        "LIMIT",
        "NEXT",
        "DONE"
    );
    writeln!(out, "{}", paint.tone(Tone::Strong, &head)).ok();
    for of in &all {
        row(out, of, now, paint);
    }
    if all.is_empty() {
        writeln!(out, "nothing waits, nothing leaves").ok();
    }
    text
}

fn row(out: &mut String, of: &Value, now: Timestamp, paint: Paint) {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let state = text(&of["state"]);
    let queued = of["queued"].as_u64().map_or("?".to_owned(), number);
    let count = |name: &str| number(of[name].as_u64().unwrap_or(0));
    let away = |name: &str| time(&of[name]).map_or("-".to_owned(), |at| length(at.since(now)));
    let limits: Vec<&Value> = of["limits"].as_array().into_iter().flatten().collect();
    let allowed: u64 = limits
        .iter()
        .filter_map(|limit| limit["connections"]["in_force"].as_u64())
        .sum();
    let why = match (
        of["constraint"]["kind"].as_str(),
        of["constraint"]["detail"].as_str(),
    ) {
        (Some(kind), Some(detail)) => cut(&format!("{kind}: {detail}"), WHY),
        _ => "-".to_owned(),
    };
    writeln!(
        out,
        "{:<NAME$} {} {queued:>10} {:>7} {:>5} {:>7} {:>7.1} {:>9} {:>8} {:>8}  {why}",
        cut(&text(&of["destination"]), NAME),
        paint.tone(tone_of(&state), &format!("{state:<8}")),
        count("leased"),
        count("in_flight"),
        format!("{}/{allowed}", of["connections"].as_u64().unwrap_or(0)),
        of["pace"].as_f64().unwrap_or(0.0),
        rates(&limits),
        away("next_at"),
        away("eta"),
    )
    .ok();
}

/// The rate in force; of several sources the first, and how many more there are.
fn rates(limits: &[&Value]) -> String {
    let rate = |limit: &Value| limit["rate"]["in_force"].as_str().unwrap_or("-").to_owned();
    match limits {
        [] => "-".to_owned(),
        [one] => rate(one),
        [first, rest @ ..] if rest.iter().all(|other| rate(other) == rate(first)) => {
            format!("{}×{}", limits.len(), rate(first))
        }
        [first, rest @ ..] => format!("{} +{}", rate(first), rest.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    #[test]
    fn a_picture_is_a_table_whose_columns_stand() {
        let picture = json!({"next_cursor": null, "items": [
            {"destination": "gmail", "state": "moving", "queued": 12_345, "leased": 100, "in_flight": 5, "connections": 3,
             "pace": 4.94, "limits": [{"rate": {"in_force": "5/s"}, "connections": {"in_force": 5}}],
             "next_at": null, "eta": "2027-01-15T08:41:09.000Z", "constraint": {"kind": "rate", "detail": "gmail takes 5/s"}},
            {"destination": "a-very-long-name-of-a-destination.example", "state": "waiting", "queued": null, "limits": [],
             "next_at": "2027-01-15T08:05:00.000Z", "eta": null, "constraint": null},
        ]});
        let table = table(&picture, NOW, Paint(false));
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        let column = |line: &str, word: &str| {
            let at = line
                .find(word)
                .unwrap_or_else(|| panic!("{word} in {line}"));
            line.get(..at).map_or(0, |before| before.chars().count())
        };
        assert_eq!(column(lines[1], "STATE"), column(lines[2], "moving"));
        assert_eq!(column(lines[1], "STATE"), column(lines[3], "waiting"));
        assert_eq!(column(lines[1], "WHY"), column(lines[2], "rate: gmail"));
        assert_eq!(
            column(lines[1], "QUEUED") + 6,
            column(lines[2], "12,345") + 6
        );
        assert!(
            lines[2].contains("41m 9s") && lines[3].contains(" 5m "),
            "{table}"
        );
    }

    #[test]
    fn sources_with_one_rate_are_told_together() {
        let limit = |rate: &str| json!({"rate": {"in_force": rate}});
        let (a, b) = (limit("5/s"), limit("3/s"));
        assert_eq!(rates(&[&a]), "5/s");
        assert_eq!(rates(&[&a, &a]), "2×5/s");
        assert_eq!(rates(&[&a, &b]), "5/s +1");
        assert_eq!(rates(&[]), "-");
    }
}
