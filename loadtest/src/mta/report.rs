//! What the runs showed, as tables. Pure.

use super::{Engine, Run};
use crate::format::{Table, bytes, count, float, per, per_second, percent, rate};
use crate::redis::Used;
use crate::site::Dkim;
use std::time::Duration;

/// A row: its name, and what a run has to say to it.
type Row = (&'static str, fn(&Run) -> String);

/// One column for each run.
pub(super) fn summary(runs: &[Run]) -> Table {
    let head = runs.iter().map(|run| name(run.dkim, run.engine));
    let mut table = Table::new(std::iter::once(String::new()).chain(head));
    let rows: [Row; 17] = [
        ("recipients", |run| count(run.report.accepted)),
        ("bytes of a message at the sink", |run| {
            rate(run.total.message_bytes())
        }),
        ("recipients accepted per second", |run| {
            rate(per_second(run.report.accepted, run.report.submit_time))
        }),
        ("CPU s per 1,000,000 accepted", |run| {
            let spent = per(run.intake.cpu(), run.report.accepted, 1_000_000.0);
            format!("{spent:.1}")
        }),
        (
            "messages delivered per second, until all is recorded",
            |run| {
                rate(per_second(
                    run.report.counters.delivered,
                    run.report.delivery_time,
                ))
            },
        ),
        ("messages per second at the sink", |run| {
            rate(run.total.per_second())
        }),
        ("… on each connection", |run| {
            let each = run.total.per_second() / float(run.total.peak_connections.max(1));
            format!("{each:.1}")
        }),
        ("CPU s per 1,000 messages: delivery", |run| {
            per_thousand(run, run.delivery.cpu())
        }),
        ("… of it in the kernel", |run| {
            per_thousand(run, run.delivery.system)
        }),
        ("… as many bare RSA-2048 signatures", |run| {
            signing(run).map_or_else(dash, |spent| per_thousand(run, spent))
        }),
        ("… without them", |run| {
            let rest = signing(run).map(|spent| run.delivery.cpu().saturating_sub(spent));
            rest.map_or_else(dash, |rest| per_thousand(run, rest))
        }),
        ("CPU s per 1,000 messages: intake and delivery", |run| {
            per_thousand(run, run.intake.cpu() + run.delivery.cpu())
        }),
        ("CPU s per 1,000 messages: the sink", |run| {
            per_thousand(run, run.sink.cpu())
        }),
        ("context switches per message", |run| {
            let each = float(run.delivery.switches) / float(run.report.accepted.max(1));
            format!("{each:.2}")
        }),
        ("connections, at most at a time", |run| {
            let total = &run.total;
            format!(
                "{}, {}",
                count(total.connections),
                count(total.peak_connections)
            )
        }),
        ("peak memory, intake", |run| bytes(run.peak.0)),
        ("peak memory, delivery", |run| {
            run.peak.1.map_or_else(dash, bytes)
        }),
    ];
    for (name, cell) in rows {
        table.row(std::iter::once(name.to_owned()).chain(runs.iter().map(cell)));
    }
    table
}

/// A run in a heading.
pub(super) fn name(dkim: Dkim, engine: Engine) -> String {
    match engine {
        Engine::Sqlite => dkim.name().to_owned(),
        Engine::Redis => format!("{}, Redis", dkim.name()),
    }
}

/// The runs on Redis, each beside the embedded store's with the same signatures.
pub(super) fn stores(runs: &[Run]) -> Table {
    let on_redis = || runs.iter().filter_map(|run| Some((run, run.redis?)));
    let head = on_redis().map(|(run, _)| run.dkim.name());
    let mut table = Table::new(std::iter::once("Redis").chain(head));
    let speed = |run: &Run| per_second(run.report.counters.delivered, run.report.delivery_time);
    let beside = |run: &Run, of: &dyn Fn(&Run) -> f64| {
        let same = |other: &&Run| other.dkim == run.dkim && other.engine == Engine::Sqlite;
        let embedded = runs.iter().find(same);
        embedded.map_or_else(dash, |other| format!("{:.2}", of(run) / of(other)))
    };
    let cpu = |run: &Run| (run.intake.cpu() + run.delivery.cpu()).as_secs_f64();
    let micros =
        |spent: Duration, run: &Run| format!("{:.1}", per(spent, run.report.accepted, 1e6));
    table.row(line(
        "messages delivered per second",
        on_redis(),
        |run, _| rate(speed(run)),
    ));
    table.row(line(
        "… to those of the embedded store",
        on_redis(),
        |run, _| beside(run, &speed),
    ));
    table.row(line(
        "CPU of the service to that with the embedded store",
        on_redis(),
        |run, _| beside(run, &cpu),
    ));
    table.row(line(
        "µs of Redis' main thread per message",
        on_redis(),
        |run, used| micros(used.main, run),
    ));
    table.row(line(
        "µs of all of Redis per message",
        on_redis(),
        |run, used| micros(used.all, run),
    ));
    table.row(line("commands per message", on_redis(), |run, used| {
        format!(
            "{:.2}",
            float(used.commands) / float(run.report.accepted.max(1))
        )
    }));
    table
}

fn line<'a>(
    name: &str,
    runs: impl Iterator<Item = (&'a Run, Used)>,
    cell: impl Fn(&Run, Used) -> String,
) -> Vec<String> {
    let cells = runs.map(|(run, used)| cell(run, used));
    std::iter::once(name.to_owned()).chain(cells).collect()
}

fn dash() -> String {
    "–".to_owned()
}

fn per_thousand(run: &Run, spent: Duration) -> String {
    format!("{:.4}", per(spent, run.report.accepted, 1000.0))
}

/// What as many bare signatures as messages cost, by the mean of the two timings.
fn signing(run: &Run) -> Option<Duration> {
    let (before, after) = run.signature?;
    let nanos = (before + after).as_nanos() / 2 * u128::from(run.report.accepted);
    Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
}

/// Where the CPU time of the delivery went, by the names of the threads.
pub(super) fn threads(run: &Run) -> Table {
    let mut table = Table::new(["thread", "number", "CPU s", "share", "µs per message"]);
    let whole = run.delivery.cpu();
    let mut rows: Vec<_> = run.delivery.threads.iter().collect();
    rows.sort_by_key(|(_, threads)| std::cmp::Reverse(threads.cpu));
    let mut row = |name: &str, number: String, cpu: Duration| {
        table.row([
            name.to_owned(),
            number,
            format!("{:.2}", cpu.as_secs_f64()),
            format!("{:.1} %", percent(cpu.as_secs_f64(), whole.as_secs_f64())),
            format!("{:.1}", per(cpu, run.report.accepted, 1e6)),
        ]);
    };
    let mut known = Duration::ZERO;
    for (name, threads) in rows {
        known += threads.cpu;
        row(name, count(threads.count), threads.cpu);
    }
    // Ticks of the whole and nanoseconds of the threads differ a little; threads that ended more.
    row(
        "(ended threads, rounding)",
        dash(),
        whole.saturating_sub(known),
    );
    row("all", dash(), whole);
    table
}

impl Dkim {
    /// Whether RSA signatures are part of what is measured.
    pub fn has_rsa(self) -> bool {
        self != Self::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Counters;
    use crate::process::{Threads, Usage};
    use crate::sink::Total;
    use crate::source::Report;

    fn run(dkim: Dkim) -> Run {
        let usage = |user, system| Usage {
            user: Duration::from_millis(user),
            system: Duration::from_millis(system),
            switches: 5_000,
            threads: [(
                "tokio-rt-worker".to_owned(),
                Threads {
                    count: 2,
                    cpu: Duration::from_millis(600),
                },
            )]
            .into(),
        };
        Run {
            dkim,
            engine: Engine::Sqlite,
            redis: None,
            report: Report {
                accepted: 10_000,
                submit_time: Duration::from_millis(100),
                delivery_time: Duration::from_secs(2),
                counters: Counters {
                    accepted: 10_000,
                    delivered: 10_000,
                    ..Counters::default()
                },
                ..Report::default()
            },
            intake: usage(50, 10),
            delivery: usage(700, 300),
            sink: usage(200, 100),
            total: Total {
                messages: 10_000,
                recipients: 10_000,
                bytes: 120_000_000,
                connections: 200,
                peak_connections: 16,
                seconds: 1.6,
            },
            peak: (50 << 20, None),
            signature: dkim
                .has_rsa()
                .then_some((Duration::from_micros(50), Duration::from_micros(70))),
        }
    }

    #[test]
    fn the_summary_is_arithmetic() {
        let text = summary(&[run(Dkim::None), run(Dkim::Rsa2048)]).markdown();
        for line in [
            "|  | no DKIM | RSA-2048 |",
            "| bytes of a message at the sink | 12,000 | 12,000 |",
            "| recipients accepted per second | 100,000 | 100,000 |",
            "| CPU s per 1,000,000 accepted | 6.0 | 6.0 |",
            "| messages delivered per second, until all is recorded | 5,000 | 5,000 |",
            "| messages per second at the sink | 6,250 | 6,250 |",
            "| CPU s per 1,000 messages: delivery | 0.1000 | 0.1000 |",
            "| … of it in the kernel | 0.0300 | 0.0300 |",
            "| … as many bare RSA-2048 signatures | – | 0.0600 |",
            "| … without them | – | 0.0400 |",
            "| CPU s per 1,000 messages: intake and delivery | 0.1060 | 0.1060 |",
            "| context switches per message | 0.50 | 0.50 |",
            "| peak memory, intake | 50.0 MiB | 50.0 MiB |",
            "| peak memory, delivery | – | – |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn a_run_on_redis_stands_beside_its_like() {
        let mut on_redis = run(Dkim::Rsa2048);
        on_redis.engine = Engine::Redis;
        on_redis.report.delivery_time = Duration::from_millis(2_500);
        on_redis.redis = Some(Used {
            main: Duration::from_millis(120),
            all: Duration::from_millis(150),
            commands: 15_000,
        });
        let text = stores(&[run(Dkim::None), run(Dkim::Rsa2048), on_redis]).markdown();
        for line in [
            "| Redis | RSA-2048 |",
            "| messages delivered per second | 4,000 |",
            "| … to those of the embedded store | 0.80 |",
            "| CPU of the service to that with the embedded store | 1.00 |",
            "| µs of Redis' main thread per message | 12.0 |",
            "| µs of all of Redis per message | 15.0 |",
            "| commands per message | 1.50 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn what_no_thread_shows_is_shown_too() {
        let text = threads(&run(Dkim::None)).markdown();
        for line in [
            "| tokio-rt-worker | 2 | 0.60 | 60.0 % | 60.0 |",
            "| (ended threads, rounding) | – | 0.40 | 40.0 % | 40.0 |",
            "| all | – | 1.00 | 100.0 % | 100.0 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
