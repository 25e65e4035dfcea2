//! The same mail through Postfix, beside a run of ours.

use super::{Args, Run};
use crate::batch::Shape;
use crate::counterpart::Counterpart;
use crate::format::{Table, count, per, per_second, rate};
use crate::postfix::Postfix;
use crate::sink::Total;
use crate::site::Dkim;
use crate::submission;
use anyhow::{Context as _, Result, ensure};
use service::clock::{Clock as _, SystemClock};
use std::time::Duration;

/// Sessions that submit at a time: as many as Postfix delivers over to one destination.
const SESSIONS: usize = 20;

/// What a run of Postfix showed.
#[derive(Debug, Clone)]
pub struct Peer {
    /// How mail was signed.
    pub dkim: Dkim,
    /// From the first byte submitted to the last message at the sink.
    pub time: Duration,
    /// CPU time of all processes of Postfix, and of opendkim.
    pub cpu: Duration,
    /// What the sink counted.
    pub total: Total,
}

/// Submits `recipients` of the batch to a Postfix that relays to a sink of ours.
pub(super) async fn measure(args: &Args, dkim: Dkim, recipients: u64) -> Result<Peer> {
    let shape = Shape {
        recipients,
        ..args.shape.clone()
    };
    let sink = Counterpart::sink_of(&args.manner, recipients).await?;
    let postfix = Postfix::start(&args.setup(dkim, &sink, None, None)?).await?;
    let before = postfix.usage()?;
    let start = SystemClock.instant();
    submission::submit(postfix.address(), &shape, SESSIONS)
        .await
        .context("cannot submit to Postfix")?;
    let total = sink.total().await?;
    let time = SystemClock.instant().duration_since(start);
    // What is delivered has still to be taken out of the queue.
    postfix.idle().await?;
    let cpu = postfix.usage()?.since(&before).cpu();
    ensure!(
        total.messages == recipients,
        "{recipients} messages were submitted to Postfix and {} came to the sink",
        total.messages
    );
    Ok(Peer {
        dkim,
        time,
        cpu,
        total,
    })
}

/// Our runs beside those of Postfix that were signed alike.
pub(super) fn table(runs: &[Run], peers: &[Peer]) -> Table {
    let pairs: Vec<(&Run, &Peer)> = peers
        .iter()
        .filter_map(|peer| Some((runs.iter().find(|run| run.dkim == peer.dkim)?, peer)))
        .collect();
    let mut table = Table::new(std::iter::once(String::new()).chain(pairs.iter().flat_map(
        |(run, _)| {
            let signed = run.dkim.name();
            ["hikyaku", "Postfix", "ratio"].map(|side| format!("{side}, {signed}"))
        },
    )));
    let mut row = |name: &str, cells: &dyn Fn(&Run, &Peer) -> [String; 3]| {
        let cells = pairs.iter().flat_map(|(run, peer)| cells(run, peer));
        table.row(std::iter::once(name.to_owned()).chain(cells));
    };
    row("messages", &|run, peer| {
        let none = String::new();
        [count(run.report.accepted), count(peer.total.messages), none]
    });
    row("bytes of a message at the sink", &|run, peer| {
        let (ours, theirs) = (run.total.message_bytes(), peer.total.message_bytes());
        [rate(ours), rate(theirs), ratio(ours, theirs)]
    });
    row(
        "messages per second, first byte in to last out",
        &|run, peer| {
            let time = run.report.submit_time + run.report.delivery_time;
            let ours = per_second(run.report.accepted, time);
            let theirs = per_second(peer.total.messages, peer.time);
            [rate(ours), rate(theirs), ratio(ours, theirs)]
        },
    );
    row("CPU s per 1,000 messages, intake included", &|run, peer| {
        let ours = per(
            run.intake.cpu() + run.delivery.cpu(),
            run.report.accepted,
            1000.0,
        );
        let theirs = per(peer.cpu, peer.total.messages, 1000.0);
        [
            format!("{ours:.4}"),
            format!("{theirs:.4}"),
            ratio(theirs, ours),
        ]
    });
    table
}

fn ratio(part: f64, whole: f64) -> String {
    if whole > 0.0 {
        format!("{:.1}", part / whole)
    } else {
        "–".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mta::Engine;
    use crate::process::Usage;
    use crate::source::Report;

    #[test]
    fn ours_stands_beside_theirs_that_was_signed_alike() {
        let total = |messages, bytes| Total {
            messages,
            bytes,
            ..Total::default()
        };
        let run = Run {
            dkim: Dkim::None,
            engine: Engine::Sqlite,
            redis: None,
            report: Report {
                accepted: 10_000,
                submit_time: Duration::from_millis(200),
                delivery_time: Duration::from_millis(800),
                ..Report::default()
            },
            intake: Usage {
                user: Duration::from_millis(100),
                ..Usage::default()
            },
            delivery: Usage {
                user: Duration::from_millis(700),
                ..Usage::default()
            },
            sink: Usage::default(),
            total: total(10_000, 120_000_000),
            peak: (0, None),
            signature: None,
        };
        let peer = |dkim| Peer {
            dkim,
            time: Duration::from_secs(2),
            cpu: Duration::from_secs(4),
            total: total(1_000, 12_300_000),
        };
        let text = table(&[run], &[peer(Dkim::None), peer(Dkim::Rsa2048)]).markdown();
        for line in [
            "|  | hikyaku, no DKIM | Postfix, no DKIM | ratio, no DKIM |",
            "| messages | 10,000 | 1,000 |  |",
            "| bytes of a message at the sink | 12,000 | 12,300 | 1.0 |",
            "| messages per second, first byte in to last out | 10,000 | 500 | 20.0 |",
            "| CPU s per 1,000 messages, intake included | 0.0800 | 4.0000 | 50.0 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
