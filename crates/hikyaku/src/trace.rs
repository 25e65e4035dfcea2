//! `hikyaku trace`: what is said on connections, as it is said.

use std::time::Duration;

use anyhow::Result;
use model::MessageId;
use model::units::{format_duration, parse_duration};
use serde_json::Value;
use service::config::Scope;

use crate::cli::{Failure, Terminal};
use crate::client::Client;
use crate::reach::{Reach, escaped, runtime, told};
use crate::show::{Paint, Tone, cut};
use crate::why;

/// The longest line of an answer that is kept until it ends.
const LINE_MAX: usize = 64 << 10;
/// The width of a shown line.
const WIDTH: usize = 400;
/// How often it is looked whether more can be said about a message.
const LOOK: Duration = Duration::from_secs(1);
/// What a message ends with.
const OVER: &str = "Nothing more is said about it.";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A domain, the name of a destination, or a message (01JD….41)
    subject: String,
    /// How long to listen, at most 1h
    #[arg(long = "for", default_value = "10m", value_parser = parse_duration)]
    length: Duration,
    /// Print the lines of the service as they are (NDJSON)
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reach: Reach,
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let subject = &arguments.subject;
    let is_message = subject.parse::<MessageId>().is_ok();
    let scope = if is_message {
        Scope::Read
    } else {
        Scope::Admin
    };
    let client = arguments.reach.client(&terminal.environment, scope)?;
    let kind = if is_message { "message" } else { "domain" };
    let length = format_duration(arguments.length);
    let path = format!("/v1/trace?{kind}={}&for={length}", escaped(subject));
    runtime()?.block_on(async {
        tokio::select! {
            ended = listen(&client, &path, arguments, terminal) => ended,
            _ = tokio::signal::ctrl_c() => Ok(()),
        }
    })?;
    Ok(())
}

async fn listen(
    client: &Client,
    path: &str,
    arguments: &Args,
    terminal: &mut Terminal<'_>,
) -> Result<()> {
    let paint = Paint(terminal.colours);
    let out = &mut *terminal.out;
    let (mut begun, mut lines) = (false, Lines::default());
    // What holds it now, since nothing is said while it waits.
    let standing = match arguments.json {
        true => None,
        false => {
            let (line, is_over) = standing(client, &arguments.subject).await?;
            if is_over {
                writeln!(out, "{line}\n{OVER}")?;
                return Ok(());
            }
            Some(line)
        }
    };
    let following = client.follow(path, |bytes| {
        if !begun {
            begun = true;
            if let Some(standing) = &standing {
                writeln!(out, "{standing}")?;
                writeln!(
                    out,
                    "{}",
                    paint.tone(Tone::Quiet, "listening; Ctrl-C ends it")
                )?;
            }
        }
        for line in lines.take(bytes) {
            if arguments.json {
                writeln!(out, "{line}")?;
            } else if let Ok(line) = serde_json::from_str(&line) {
                writeln!(out, "{}", shown(&line, paint))?;
            }
        }
        out.flush()?;
        Ok(true)
    });
    let refused = tokio::select! {
        refused = following => refused?,
        line = end_of(client, &arguments.subject) => {
            if !arguments.json {
                writeln!(out, "{line}\n{OVER}")?;
            }
            None
        }
    };
    match refused {
        Some(answer) => told(&answer).map(drop),
        None => Ok(()),
    }
}

/// Waits until a message has its final status; a domain has none.
async fn end_of(client: &Client, subject: &str) -> String {
    if subject.parse::<MessageId>().is_err() {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(LOOK).await;
        // Whoever does not answer now may the next time; that the service has gone, the stream says.
        if let Ok((line, true)) = standing(client, subject).await {
            return line;
        }
    }
}

/// One line on what holds the subject, and whether it has its final status.
async fn standing(client: &Client, subject: &str) -> Result<(String, bool)> {
    let answer = client
        .get(&format!("/v1/why?{}", why::query(subject)))
        .await?;
    let of = told(&answer)?;
    let state = of["state"].as_str().unwrap_or("unknown");
    let held = match of["constraint"]["kind"].as_str() {
        Some(kind) => {
            let detail = of["constraint"]["detail"].as_str().unwrap_or_default();
            format!(" ({kind}: {detail})")
        }
        None => String::new(),
    };
    let line = cut(&format!("{subject} is {state}{held}"), WIDTH);
    Ok((line, state == "finished"))
}

/// Puts pieces of an answer together to lines.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The lines that end with `bytes`; empty ones are left out.
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut ended = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.0);
                if !line.is_empty() {
                    ended.push(String::from_utf8_lossy(&line).into_owned());
                }
            } else if self.0.len() < LINE_MAX {
                self.0.push(byte);
            }
        }
        ended
    }
}

/// A line for a person: `10:05:12.123  #7  mx (192.0.2.1)  > MAIL FROM:<…>`.
fn shown(line: &Value, paint: Paint) -> String {
    let at = line["at"]
        .as_str()
        .and_then(|at| at.get(11..23))
        .unwrap_or_default();
    let text = cut(line["text"].as_str().unwrap_or_default(), WIDTH);
    let (mark, tone) = match line["from"].as_str() {
        Some("us") => (">", Tone::Strong),
        Some("peer") if text.starts_with('4') => ("<", Tone::Careful),
        Some("peer") if text.starts_with('5') => ("<", Tone::Bad),
        Some("peer") => ("<", Tone::Good),
        _ => ("*", Tone::Quiet),
    };
    let host = cut(line["host"].as_str().unwrap_or_default(), 40);
    let connection = format!("#{}", line["connection"].as_u64().unwrap_or(0));
    let said = paint.tone(tone, &format!("{mark} {text}"));
    format!("{at}  {connection:<6} {host:<32} {said}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn a_line_says_when_where_who_and_what() {
        let line = json!({"at": "2026-11-22T10:05:12.123Z", "connection": 7, "host": "mx (192.0.2.1)",
            "from": "peer", "text": "250 ok\u{1b}[2J", "message": null});
        assert_eq!(
            shown(&line, Paint(false)),
            "10:05:12.123  #7     mx (192.0.2.1)                   < 250 ok [2J"
        );
        let line = json!({"from": "us", "text": "QUIT"});
        assert!(shown(&line, Paint(true)).ends_with("\u{1b}[1m> QUIT\u{1b}[0m"));
    }

    proptest! {
        #[test]
        fn lines_come_whole_however_they_are_cut(texts in proptest::collection::vec("[a-z]{1,20}", 1..20), cut in 1_usize..40) {
            let whole: String = texts.iter().map(|text| format!("{text}\n\n")).collect();
            let mut lines = Lines::default();
            let found: Vec<String> = whole.as_bytes().chunks(cut).flat_map(|part| lines.take(part)).collect();
            prop_assert_eq!(found, texts);
        }
    }
}
