//! Numbers and tables as people read them. Pure.

use std::fmt::Write as _;
use std::time::Duration;

/// A whole number with commas: `12,345`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the largest binary unit that leaves at least one: `20.0 MiB`.
pub fn bytes(number: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if number < 1024 {
        return format!("{number} B");
    }
    let mut value = float(number);
    let mut name = "";
    for unit in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        name = unit;
    }
    format!("{value:.1} {name}")
}

/// What share of a whole, in percent; 0 of nothing.
pub fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        part / whole * 100.0
    } else {
        0.0
    }
}

/// So many in so long, per second; 0 when no time passed.
pub fn per_second(number: u64, took: Duration) -> f64 {
    let seconds = took.as_secs_f64();
    if seconds > 0.0 {
        float(number) / seconds
    } else {
        0.0
    }
}

/// Seconds for each `unit` of `number`; 0 of nothing.
pub fn per(took: Duration, number: u64, unit: f64) -> f64 {
    if number == 0 {
        return 0.0;
    }
    took.as_secs_f64() / float(number) * unit
}

/// As near as a float comes, which is exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "for rates that people read")]
pub fn float(number: u64) -> f64 {
    number as f64
}

/// A rate without its decimals, with commas: `1,234`.
pub fn rate(value: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are positive and far below 2^53; the cast saturates"
    )]
    count(value.round() as u64)
}

/// Columns of text: the first to the left, the others to the right.
#[derive(Debug, Clone, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Self {
        let head = head.into_iter().map(Into::into).collect();
        Self {
            head,
            rows: Vec::new(),
        }
    }

    /// Adds a row, with as many cells as there are headings.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let row: Vec<String> = cells.into_iter().map(Into::into).collect();
        debug_assert_eq!(row.len(), self.head.len(), "one cell for each heading");
        self.rows.push(row);
    }

    /// Aligned with blanks.
    pub fn text(&self) -> String {
        let mut widths = vec![0; self.head.len()];
        for row in self.lines() {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut out = String::new();
        for row in self.lines() {
            let start = out.len();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column == 0 {
                    out.push_str(&format!("{cell:<width$}"));
                } else {
                    out.push_str(&format!("  {cell:>width$}"));
                }
            }
            let end = start + out.get(start..).unwrap_or_default().trim_end().len();
            out.truncate(end);
            out.push('\n');
        }
        out
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for (at, row) in self.lines().enumerate() {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            // Writing to a string cannot fail.
            writeln!(out, "| {} |", cells.join(" | ")).ok();
            if at == 0 {
                let rule: Vec<&str> = (0..row.len())
                    .map(|column| if column == 0 { "---" } else { "---:" })
                    .collect();
                writeln!(out, "| {} |", rule.join(" | ")).ok();
            }
        }
        out
    }

    /// In the form asked for.
    pub fn render(&self, markdown: bool) -> String {
        if markdown {
            self.markdown()
        } else {
            self.text()
        }
    }

    fn lines(&self) -> impl Iterator<Item = &Vec<String>> {
        std::iter::once(&self.head).chain(&self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        for (number, expected) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (12_345, "12,345"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(count(number), expected);
        }
        for (number, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (20 << 20, "20.0 MiB"),
            (3 << 40, "3.0 TiB"),
        ] {
            assert_eq!(bytes(number), expected);
        }
        assert_eq!(rate(1234.5), "1,235");
    }

    #[test]
    fn rates() {
        assert_eq!(per_second(500, Duration::from_millis(250)), 2000.0);
        assert_eq!(per_second(500, Duration::ZERO), 0.0);
        assert_eq!(per(Duration::from_secs(3), 1500, 1000.0), 2.0);
        assert_eq!(per(Duration::from_secs(3), 0, 1000.0), 0.0);
        assert_eq!(percent(1.0, 4.0), 25.0);
        assert_eq!(percent(1.0, 0.0), 0.0);
    }

    #[test]
    fn tables() {
        let mut table = Table::new(["what", "n"]);
        table.row(["a", "1,000"]);
        table.row(["long|er", "2"]);
        assert_eq!(
            table.text(),
            "what         n\na        1,000\nlong|er      2\n"
        );
        assert_eq!(
            table.markdown(),
            "| what | n |\n| --- | ---: |\n| a | 1,000 |\n| long\\|er | 2 |\n"
        );
    }
}
