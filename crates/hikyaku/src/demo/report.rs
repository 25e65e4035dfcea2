//! The demo's report: what the service says beside what the sandbox and the audience counted
//! themselves, to the message.

use crate::demo::audience::Played;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

/// One figure from both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    what: String,
    reported: u64,
    counted: u64,
}

/// What the service reports and what was counted outside it.
#[derive(Debug, Default)]
pub(crate) struct Report {
    lines: Vec<Line>,
    /// Recipients whose status differs: address, reported, expected.
    differing: Vec<(String, String, String)>,
}

/// What became of one recipient, as the sandbox saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// A server took the message.
    Accepted,
    /// A server refused it for good.
    Refused,
    /// No server exists for the domain.
    Unreachable,
    /// None of these: nobody in the sandbox ever heard of it.
    Unseen,
}

impl Fate {
    /// Those that are a status in the end.
    const ENDS: [Self; 3] = [Self::Accepted, Self::Refused, Self::Unreachable];

    fn status(self) -> &'static str {
        match self {
            Self::Accepted => "delivered",
            Self::Refused => "bounce",
            Self::Unreachable => "failed",
            Self::Unseen => "(never seen)",
        }
    }
}

/// What the sandbox's servers hold in the end.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Received {
    /// Messages, second copies included.
    pub(crate) copies: u64,
    /// DKIM signatures on them that verify; each message has two.
    pub(crate) signatures: u64,
}

impl Report {
    /// Compares each recipient's row with its fate, and the batch's counters with what was played.
    pub(crate) fn compare(
        rows: &[Value],
        counters: &Value,
        fates: &BTreeMap<String, Fate>,
        received: &Received,
        played: &Played,
    ) -> Self {
        let mut report = Self::default();
        let counter = |name: &str| counters[name].as_u64().unwrap_or(u64::MAX);
        report.line("people", counter("accepted"), fates.len() as u64);
        for fate in Fate::ENDS {
            let counted = fates.values().filter(|it| **it == fate).count() as u64;
            report.line(fate.status(), counter(fate.status()), counted);
        }
        report.line(
            "messages taken by the servers",
            counter("delivered"),
            received.copies,
        );
        report.line(
            "signatures that verify",
            2 * counter("delivered"),
            received.signatures,
        );
        report.line(
            "people who opened",
            counter("opened_unique"),
            played.opened.len() as u64,
        );
        report.line("opens", counter("opened_total"), played.opens);
        report.line(
            "people who clicked",
            counter("clicked_unique"),
            played.clicked.len() as u64,
        );
        report.line("clicks", counter("clicked_total"), played.clicks);
        report.line(
            "clicks known as people's",
            counter("clicked_total_human"),
            played.clicks,
        );
        report.line(
            "unsubscribed",
            counter("unsubscribed"),
            played.unsubscribed.len() as u64,
        );
        for (address, fate) in fates {
            let row = rows.iter().find(|row| row["email"] == address.as_str());
            let status = row
                .and_then(|row| row["status"].as_str())
                .unwrap_or("(no row)");
            if status != fate.status() {
                report.differing.push((
                    address.clone(),
                    status.to_owned(),
                    fate.status().to_owned(),
                ));
            }
        }
        report
    }

    fn line(&mut self, what: &str, reported: u64, counted: u64) {
        self.lines.push(Line {
            what: what.to_owned(),
            reported,
            counted,
        });
    }

    /// Whether both sides agree on every figure and every recipient.
    pub(crate) fn agrees(&self) -> bool {
        self.differing.is_empty() && self.lines.iter().all(|line| line.reported == line.counted)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<32}{:>10}{:>10}", "", "reported", "counted")?;
        for line in &self.lines {
            let mark = if line.reported == line.counted {
                ""
            } else {
                "   <- differs"
            };
            writeln!(
                f,
                "{:<32}{:>10}{:>10}{mark}",
                line.what, line.reported, line.counted
            )?;
        }
        for (address, reported, counted) in self.differing.iter().take(20) {
            writeln!(f, "{address}: reported {reported}, was {counted}")?;
        }
        if self.differing.len() > 20 {
            writeln!(f, "… and {} more recipients", self.differing.len() - 20)?;
        }
        Ok(())
    }
}

/// The rates that a marketer looks at, from the batch's counters.
pub(crate) fn rates(counters: &Value) -> String {
    let counter = |name: &str| counters[name].as_f64().unwrap_or(0.0);
    let share = |part: &str, of: &str| {
        if counter(of) > 0.0 {
            100.0 * counter(part) / counter(of)
        } else {
            0.0
        }
    };
    let mut text = String::new();
    let rows = [
        ("delivery rate", "delivered", "accepted"),
        ("open rate", "opened_unique", "delivered"),
        ("click-to-open", "clicked_unique", "opened_unique"),
    ];
    for (name, part, of) in rows {
        // Writing to a String cannot fail.
        writeln!(
            text,
            "{name:<32}{:>9.1} %   {} of {}",
            share(part, of),
            counter(part),
            counter(of)
        )
        .ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fates() -> BTreeMap<String, Fate> {
        [
            ("a@x.example".to_owned(), Fate::Accepted),
            ("b@x.example".to_owned(), Fate::Refused),
        ]
        .into()
    }

    fn counters(delivered: u64) -> Value {
        json!({"accepted": 2, "delivered": delivered, "bounce": 1, "failed": 0, "opened_unique": 0, "opened_total": 0,
               "clicked_unique": 0, "clicked_total": 0, "clicked_total_human": 0, "unsubscribed": 0})
    }

    fn received(copies: u64) -> Received {
        Received {
            copies,
            signatures: 2,
        }
    }

    #[test]
    fn agreement_is_to_the_recipient() {
        let rows = [
            json!({"email": "a@x.example", "status": "delivered"}),
            json!({"email": "b@x.example", "status": "bounce"}),
        ];
        assert!(
            Report::compare(
                &rows,
                &counters(1),
                &fates(),
                &received(1),
                &Played::default()
            )
            .agrees()
        );
        assert!(
            !Report::compare(
                &rows,
                &counters(2),
                &fates(),
                &received(1),
                &Played::default()
            )
            .agrees()
        );
        assert!(
            !Report::compare(
                &rows,
                &counters(1),
                &fates(),
                &received(2),
                &Played::default()
            )
            .agrees(),
            "a second copy"
        );
        let swapped = [
            json!({"email": "a@x.example", "status": "bounce"}),
            json!({"email": "b@x.example", "status": "delivered"}),
        ];
        let report = Report::compare(
            &swapped,
            &counters(1),
            &fates(),
            &received(1),
            &Played::default(),
        );
        assert!(!report.agrees());
        assert!(
            report
                .to_string()
                .contains("a@x.example: reported bounce, was delivered")
        );
    }
}
