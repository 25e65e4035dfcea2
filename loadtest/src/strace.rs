//! System calls as `strace -c` counts them. Pure.

use crate::format::{Table, float};
use std::collections::BTreeMap;

/// Calls by name.
pub type Calls = BTreeMap<String, u64>;

/// Reads the table that `strace -c` writes:
///
/// ```text
/// % time     seconds  usecs/call     calls    errors syscall
/// ------ ----------- ----------- --------- --------- ----------------
///  54.20    0.123456           5     24000       120 epoll_wait
/// ------ ----------- ----------- --------- --------- ----------------
/// 100.00    0.227777                48000       120 total
/// ```
///
/// `None` until it is complete.
pub fn parse(text: &str) -> Option<Calls> {
    let mut calls = Calls::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let Some(name) = fields.last() else {
            continue;
        };
        if *name == "total" {
            return Some(calls);
        }
        // The share comes first in every row; "errors" may be empty.
        let is_row = fields.len() >= 5
            && fields
                .first()
                .is_some_and(|share| share.parse::<f64>().is_ok());
        if let (true, Some(count)) = (is_row, fields.get(3)) {
            *calls.entry((*name).to_owned()).or_default() += count.parse::<u64>().ok()?;
        }
    }
    None
}

/// Calls that each further message costs: what a run of many has more than a run of few, so that
/// start, intake's fixed part and end fall out.
pub fn per_message(few: (&Calls, u64), many: (&Calls, u64)) -> Vec<(String, f64)> {
    let messages = many.1.saturating_sub(few.1).max(1);
    let mut rows: Vec<(String, f64)> = many
        .0
        .iter()
        .map(|(name, count)| {
            let before = few.0.get(name).copied().unwrap_or_default();
            // A busy machine may need fewer calls for more messages: then it is not per message.
            let more = float(count.saturating_sub(before));
            (name.clone(), more / float(messages))
        })
        .collect();
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    rows
}

/// The busiest names, and the sum of all.
pub fn table(rows: &[(String, f64)], shown: usize) -> Table {
    let mut table = Table::new(["system call", "per message"]);
    for (name, calls) in rows
        .iter()
        .take(shown)
        .filter(|(_, calls)| *calls >= 0.0005)
    {
        table.row([name.clone(), format!("{calls:.3}")]);
    }
    let sum: f64 = rows.iter().map(|(_, calls)| calls).sum();
    table.row(["all".to_owned(), format!("{sum:.3}")]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 54.20    0.123456           5     24000       120 epoll_wait
 45.80    0.104321           4     24001           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.227777           4     48001       120 total
";

    #[test]
    fn a_table_is_read_whole_or_not_at_all() {
        let calls = parse(TABLE).expect("a table");
        assert_eq!(calls.len(), 2);
        assert_eq!(calls["epoll_wait"], 24_000);
        assert_eq!(calls["sendto"], 24_001);
        let half: String = TABLE.lines().take(3).collect::<Vec<_>>().join("\n");
        assert_eq!(parse(&half), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn what_a_message_costs_is_what_more_messages_cost_more() {
        let few = Calls::from([("read".to_owned(), 500), ("mmap".to_owned(), 90)]);
        let many = Calls::from([
            ("read".to_owned(), 2_500),
            ("mmap".to_owned(), 80),
            ("writev".to_owned(), 1_000),
        ]);
        let rows = per_message((&few, 1_000), (&many, 2_000));
        let expected = [("read", 2.0), ("writev", 1.0), ("mmap", 0.0)];
        let expected: Vec<(String, f64)> = expected.map(|(n, c)| (n.to_owned(), c)).into();
        assert_eq!(rows, expected);
        let text = table(&rows, 10).text();
        assert!(
            text.ends_with("all                3.000\n") && !text.contains("mmap"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _read = parse(&text);
        }

        #[test]
        fn any_rows_are_read(lines in proptest::collection::vec("[0-9. a-z-]{0,60}", 0..6)) {
            let _read = parse(&lines.join("\n"));
        }
    }
}
