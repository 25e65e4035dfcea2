//! What is told of the servers beside each other, and of a backlog.

use super::Measured;
use crate::format::{Table, bytes, count, float, per, rate};
use crate::load::Answered;
use std::time::Duration;

/// The servers that were measured.
pub(super) struct Servers {
    pub(super) tracker: Measured,
    pub(super) bare: Measured,
    /// Only when it was asked for.
    pub(super) nginx: Option<Measured>,
}

/// A number of a server as it is shown.
type Shown = fn(&Measured) -> Option<(f64, String)>;

impl Servers {
    pub(super) fn new(nginx: bool) -> Self {
        Self {
            tracker: Measured::default(),
            bare: Measured::default(),
            nginx: nginx.then(Measured::default),
        }
    }

    pub(super) fn table(&self) -> Table {
        let mut head = vec!["", "tracker", "bare hyper", "ratio"];
        if self.nginx.is_some() {
            head.extend(["nginx", "ratio"]);
        }
        let mut table = Table::new(head);
        let rows: [(&str, Shown); 9] = [
            ("requests", |of| {
                let asked = of.answered.latency.count();
                Some((float(asked), count(asked)))
            }),
            ("requests per second", |of| {
                let speed = of.per_second();
                Some((speed, rate(speed)))
            }),
            ("p50, ms", |of| millis(&of.answered, 0.5)),
            ("p99, ms", |of| millis(&of.answered, 0.99)),
            ("p50 at half load, ms", |of| millis(&of.half, 0.5)),
            ("p99 at half load, ms", |of| millis(&of.half, 0.99)),
            ("CPU per hit while asked, µs", |of| micros(of, of.cpu?.0)),
            ("CPU per hit until at rest, µs", |of| micros(of, of.cpu?.1)),
            ("… without what it uses at rest anyway", |of| {
                let at_rest = of.idle?.mul_f64(of.resting.as_secs_f64());
                micros(of, of.cpu?.1.saturating_sub(at_rest))
            }),
        ];
        for (name, shown) in rows {
            table.row(self.row(name, shown));
        }
        if self.tracker.cpu.is_some() {
            let resting: Shown = |of| Some((0.0, format!("{:.1}", of.resting.as_secs_f64())));
            table.row(self.row("from the last answer until at rest, s", resting));
        }
        table
    }

    fn row(&self, name: &str, shown: Shown) -> Vec<String> {
        let ours = shown(&self.tracker);
        let text = |of: &Option<(f64, String)>| of.as_ref().map_or("–".into(), |of| of.1.clone());
        let mut row = vec![name.to_owned(), text(&ours)];
        for other in [Some(&self.bare), self.nginx.as_ref()]
            .into_iter()
            .flatten()
        {
            let theirs = shown(other);
            row.push(text(&theirs));
            let both = ours.as_ref().zip(theirs.as_ref());
            let ratio = both.filter(|(_, theirs)| theirs.0 > 0.0);
            row.push(ratio.map_or("–".into(), |(a, b)| format!("{:.2}", a.0 / b.0)));
        }
        row
    }
}

fn millis(of: &Answered, share: f64) -> Option<(f64, String)> {
    let millis = of.latency.quantile(share).as_secs_f64() * 1e3;
    (of.latency.count() > 0).then(|| (millis, format!("{millis:.2}")))
}

fn micros(of: &Measured, cpu: Duration) -> Option<(f64, String)> {
    let micros = per(cpu, of.answered.latency.count(), 1e6);
    Some((micros, format!("{micros:.1}")))
}

/// A backlog that was handed on while half the load went on.
pub(super) struct Drain {
    pub(super) waiting: u64,
    pub(super) drained: Duration,
    pub(super) answered: Answered,
    /// Of the service, until it was at rest.
    pub(super) cpu: Duration,
    /// Before hits waited, when they all did, and at rest.
    pub(super) memory: [u64; 3],
}

impl Drain {
    pub(super) fn table(&self) -> Table {
        let hits = self.waiting + self.answered.latency.count();
        let speed = crate::format::per_second(hits, self.drained);
        let p99 = self.answered.latency.quantile(0.99).as_secs_f64() * 1e3;
        let [before, away, after] = self.memory.map(bytes);
        let mut table = Table::new(["", "with the store back"]);
        for (name, value) in [
            ("hits that waited", count(self.waiting)),
            (
                "until they were in the store, s",
                format!("{:.1}", self.drained.as_secs_f64()),
            ),
            ("hits into the store per second", rate(speed)),
            (
                "requests answered meanwhile",
                count(self.answered.latency.count()),
            ),
            ("p99 meanwhile, ms", format!("{p99:.2}")),
            (
                "CPU per hit, to its verdict, µs",
                format!("{:.1}", per(self.cpu, hits, 1e6)),
            ),
            ("memory before the store went away", before),
            ("memory with all of them waiting", away),
            ("memory afterwards", after),
        ] {
            table.row([name.to_owned(), value]);
        }
        table
    }
}

/// A gauge that counts things.
pub(super) fn whole(gauge: f64) -> u64 {
    // Counters of this size are whole in a float.
    format!("{gauge:.0}").parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(requests: u64, took: u64, micros: u64, cpu: Option<[u64; 2]>) -> Measured {
        let mut measured = Measured::default();
        for _ in 0..requests {
            let took = Duration::from_micros(micros);
            measured.answered.latency.record(took);
            measured.half.latency.record(took * 2);
        }
        measured.answered.took = Duration::from_secs(took);
        measured.cpu = cpu.map(|[a, b]| (Duration::from_millis(a), Duration::from_millis(b)));
        measured.resting = Duration::from_millis(1500);
        measured
    }

    #[test]
    fn servers_beside_each_other() {
        let mut servers = Servers::new(false);
        servers.tracker = measured(1_000, 2, 100, Some([20, 30]));
        servers.bare = measured(2_000, 2, 100, None);
        servers.tracker.idle = Some(Duration::from_millis(10));
        let text = servers.table().markdown();
        for line in [
            "| requests per second | 500 | 1,000 | 0.50 |",
            "| p50, ms | 0.10 | 0.10 | 1.00 |",
            "| p99 at half load, ms | 0.20 | 0.20 | 1.00 |",
            "| CPU per hit while asked, µs | 20.0 | – | – |",
            "| CPU per hit until at rest, µs | 30.0 | – | – |",
            // 10 ms for each of the 1.5 s that it took to come to rest.
            "| … without what it uses at rest anyway | 15.0 | – | – |",
            "| from the last answer until at rest, s | 1.5 | 1.5 | – |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        servers.nginx = Some(measured(500, 2, 100, Some([5, 5])));
        let text = servers.table().markdown();
        let line = "| requests per second | 500 | 1,000 | 0.50 | 250 | 2.00 |";
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }

    #[test]
    fn a_backlog_that_is_gone() {
        let drain = Drain {
            waiting: 900,
            drained: Duration::from_secs(2),
            answered: measured(100, 2, 100, None).answered,
            cpu: Duration::from_millis(30),
            memory: [1 << 20, 2 << 20, 2 << 20],
        };
        let text = drain.table().markdown();
        for line in [
            "| hits into the store per second | 500 |",
            "| CPU per hit, to its verdict, µs | 30.0 |",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert_eq!((whole(0.0), whole(1e6), whole(-1.0)), (0, 1_000_000, 0));
    }
}
