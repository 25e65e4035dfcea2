//! `hikyaku why`: what holds a domain, a batch or a message, in words.

use std::io::Write;

use model::{BatchId, MessageId, Timestamp};
use serde_json::Value;
use service::clock::{Clock as _, SystemClock};
use service::config::Scope;

use crate::cli::{Failure, Terminal};
use crate::reach::{Reach, escaped, runtime, told};
use crate::show::{Paint, Tone, clock_time, from_now, number, time, tone_of, wrapped};

/// The width of a line.
const WIDTH: usize = 100;
/// Where values begin.
const INDENT: usize = 12;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A domain, a batch (01JD…) or a message (01JD….41)
    subject: String,
    /// Print the answer of the service as it is
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let client = arguments.reach.client(&terminal.environment, Scope::Read)?;
    let path = format!("/v1/why?{}", query(&arguments.subject));
    let answer = runtime()?.block_on(client.get(&path))?;
    let answer = told(&answer)?;
    if arguments.json {
        writeln!(terminal.out, "{answer:#}")?;
        return Ok(());
    }
    let paint = Paint(terminal.colours);
    explain(terminal.out, &answer, SystemClock.now(), paint)?;
    Ok(())
}

/// The parameter that names this subject.
pub(crate) fn query(subject: &str) -> String {
    let kind = if subject.parse::<MessageId>().is_ok() {
        "message"
    } else if subject.parse::<BatchId>().is_ok() {
        "batch"
    } else {
        "domain"
    };
    format!("{kind}={}", escaped(subject))
}

/// Writes an explanation for a person.
fn explain(out: &mut dyn Write, of: &Value, now: Timestamp, paint: Paint) -> std::io::Result<()> {
    let subject = &of["subject"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let state = text(&of["state"]);
    let mut head = format!("{} {}", text(&subject["kind"]), text(&subject["id"]));
    if let Some(status) = subject["status"].as_str() {
        head = format!("{head} ({status})");
    }
    if let Some(destination) = subject["destination"].as_str()
        && subject["id"] != destination
    {
        head = format!("{head} to {destination}");
    }
    writeln!(
        out,
        "{}: {}",
        paint.tone(Tone::Strong, &head),
        paint.tone(tone_of(&state), &state)
    )?;
    match &of["constraint"] {
        Value::Null => row(out, "because", nothing(&state))?,
        held => constraint(out, "because", held, now, paint)?,
    }
    if let Some(next) = time(&of["next_at"])
        && of["next_at"] != of["constraint"]["until"]
    {
        row(out, "next", &when(next, now))?;
    }
    if let Some(eta) = time(&of["eta"]) {
        let basis = of["eta_basis"]
            .as_str()
            .map(|basis| format!(", by {basis}"));
        row(
            out,
            "done",
            &format!("{}{}", when(eta, now), basis.unwrap_or_default()),
        )?;
    }
    recipients(out, &of["recipients"])?;
    let also = of["chain"].as_array().into_iter().flatten();
    for held in also.skip(1) {
        constraint(out, "also", held, now, paint)?;
    }
    destinations(out, &of["destinations"], now, paint)?;
    for unknown in of["unknown"].as_array().into_iter().flatten() {
        row(out, "not known", unknown.as_str().unwrap_or_default())?;
    }
    Ok(())
}

fn nothing(state: &str) -> &'static str {
    match state {
        "moving" => "nothing holds it",
        "idle" => "there is nothing to send",
        "finished" => "it is done",
        _ => "this service does not know",
    }
}

fn when(at: Timestamp, now: Timestamp) -> String {
    format!("{} ({})", from_now(at, now), clock_time(at))
}

/// A label and its text, wrapped under itself.
fn row(out: &mut dyn Write, label: &str, text: &str) -> std::io::Result<()> {
    painted_row(out, label, text, |line| line)
}

fn painted_row(
    out: &mut dyn Write,
    label: &str,
    text: &str,
    paint: impl Fn(String) -> String,
) -> std::io::Result<()> {
    let mut lines = wrapped(text, WIDTH - INDENT).into_iter().map(paint);
    let first = lines.next().unwrap_or_default();
    writeln!(out, "  {label:<9} {first}")?;
    for line in lines {
        writeln!(out, "{:INDENT$}{line}", "")?;
    }
    Ok(())
}

fn constraint(
    out: &mut dyn Write,
    label: &str,
    of: &Value,
    now: Timestamp,
    paint: Paint,
) -> std::io::Result<()> {
    let kind = of["kind"].as_str().unwrap_or_default();
    let detail = of["detail"].as_str().unwrap_or_default();
    row(out, label, &format!("{kind}: {detail}"))?;
    if let Some(said) = source(&of["source"], now) {
        painted_row(out, "", &said, |line| paint.tone(Tone::Quiet, &line))?;
    }
    if let Some(until) = time(&of["until"]) {
        row(out, "until", &when(until, now))?;
    }
    Ok(())
}

/// Who said so, in words; none where there is nothing to add.
fn source(of: &Value, now: Timestamp) -> Option<String> {
    let text = |name: &str| of[name].as_str().filter(|text| !text.is_empty());
    match text("type")? {
        "caller" => Some("said by whoever submitted it".to_owned()),
        "operator" => {
            let since = time(&of["since"]).map(|at| from_now(at, now));
            let reason = text("reason").map(|reason| format!(": {reason}"));
            Some(format!(
                "said by {} {}{}",
                text("by").unwrap_or("an operator"),
                since.unwrap_or_default(),
                reason.unwrap_or_default()
            ))
        }
        "file" => {
            let line = of["line"].as_u64().map(|line| format!(":{line}"));
            Some(format!(
                "said by {}{} {}",
                text("file").unwrap_or("a file"),
                line.unwrap_or_default(),
                text("section").unwrap_or_default()
            ))
        }
        "peer" => {
            let host = text("host").unwrap_or("nobody reached");
            let at = time(&of["at"]).map(|at| format!(", {}", from_now(at, now)));
            let rule = text("rule").map(|rule| format!(" [rule {rule}]"));
            Some(format!(
                "said by {host}{}: {}{}",
                at.unwrap_or_default(),
                text("reply").unwrap_or("no reply"),
                rule.unwrap_or_default()
            ))
        }
        _ => None,
    }
}

fn recipients(out: &mut dyn Write, of: &Value) -> std::io::Result<()> {
    let words = [
        ("due", "due"),
        ("deferred", "put off"),
        ("stopped", "in batches that do not send now"),
        ("leased", "leased here"),
        ("in_flight", "being sent"),
        ("elsewhere", "at other nodes"),
    ];
    let counted: Vec<String> = words
        .iter()
        .filter_map(|(name, word)| {
            let count = of[name].as_u64().filter(|count| *count > 0)?;
            Some(format!("{} {word}", number(count)))
        })
        .collect();
    match counted.is_empty() {
        true => Ok(()),
        false => row(out, "left", &counted.join(", ")),
    }
}

fn destinations(
    out: &mut dyn Write,
    of: &Value,
    now: Timestamp,
    paint: Paint,
) -> std::io::Result<()> {
    let all: Vec<_> = of.as_array().into_iter().flatten().collect();
    if all.len() < 2 {
        return Ok(());
    }
    writeln!(
        out,
        "\n  {:>10}  {:<8} {:<28} {:<14} WHY",
        "RECIPIENTS", "STATE", "DESTINATION", "DONE"
    )?;
    for part in all {
        let state = part["state"].as_str().unwrap_or_default();
        let done = time(&part["eta"]).map_or("-".to_owned(), |eta| from_now(eta, now));
        let held = &part["constraint"];
        let why = match held["kind"].as_str() {
            Some(kind) => format!("{kind}: {}", held["detail"].as_str().unwrap_or_default()),
            None => "-".to_owned(),
        };
        writeln!(
            out,
            "  {:>10}  {} {:<28} {done:<14} {}",
            number(part["recipients"].as_u64().unwrap_or(0)),
            paint.tone(tone_of(state), &format!("{state:<8}")),
            crate::show::cut(part["destination"].as_str().unwrap_or_default(), 28),
            crate::show::cut(&why, 80)
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn shown(of: &Value) -> String {
        let mut out = Vec::new();
        explain(&mut out, of, NOW, Paint(false)).expect("written");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_subject_is_told_apart_by_its_form() {
        assert_eq!(query("x.example"), "domain=x.example");
        assert_eq!(
            query("01ARZ3NDEKTSV4RRFFQ69G5FAV"),
            "batch=01ARZ3NDEKTSV4RRFFQ69G5FAV"
        );
        assert_eq!(
            query("01ARZ3NDEKTSV4RRFFQ69G5FAV.41"),
            "message=01ARZ3NDEKTSV4RRFFQ69G5FAV.41"
        );
    }

    #[test]
    fn an_explanation_reads_like_one() {
        let of = json!({
            "subject": {"kind": "message", "id": "B.41", "destination": "x.example", "status": "temporary_error"},
            "state": "waiting",
            "constraint": {"kind": "greylisted", "detail": "attempt 1 was greylisted", "until": "2027-01-15T08:05:00.000Z",
                "source": {"type": "peer", "host": "mx (192.0.2.1)", "reply": "451 4.7.1 later", "rule": "grey",
                           "at": "2027-01-15T07:59:00.000Z"}},
            "next_at": "2027-01-15T08:05:00.000Z", "eta": "2027-01-15T08:05:00.000Z", "eta_basis": "the rate in force, 5/s",
            "chain": [{}, {"kind": "backoff", "detail": "x", "source": null, "until": null}],
        });
        let expected = "\
message B.41 (temporary_error) to x.example: waiting
  because   greylisted: attempt 1 was greylisted
            said by mx (192.0.2.1), 1m ago: 451 4.7.1 later [rule grey]
  until     in 5m (2027-01-15 08:05:00 UTC)
  done      in 5m (2027-01-15 08:05:00 UTC), by the rate in force, 5/s
  also      backoff: x
";
        assert_eq!(shown(&of), expected);
    }

    #[test]
    fn anything_is_shown_without_a_panic() {
        for of in [
            json!(null),
            json!({}),
            json!({"destinations": [{}, {}], "chain": 3, "recipients": []}),
        ] {
            assert!(shown(&of).contains("does not know"));
        }
    }
}
