//! How things look: times from now on, numbers, columns, colours where there is a terminal.

use std::time::Duration;

use model::Timestamp;
use serde_json::Value;

/// What a word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Careful,
    Bad,
    Strong,
    Quiet,
}

/// Writes with colours, or without.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint(pub(crate) bool);

impl Paint {
    /// `text` in its tone; as it is where there are no colours.
    pub(crate) fn tone(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Careful => "33",
            Tone::Bad => "31",
            Tone::Strong => "1",
            Tone::Quiet => "2",
        };
        match self.0 {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}

/// A state of the API in its tone.
pub(crate) fn tone_of(state: &str) -> Tone {
    match state {
        "moving" | "finished" => Tone::Good,
        "waiting" => Tone::Careful,
        "idle" => Tone::Quiet,
        _ => Tone::Bad,
    }
}

/// `3d 4h`, `4h 5m`, `5m 6s`, `7s`: two units at most.
pub(crate) fn length(of: Duration) -> String {
    let seconds = of.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    let two = |large: u64, large_unit, small: u64, small_unit| match small {
        0 => format!("{large}{large_unit}"),
        _ => format!("{large}{large_unit} {small}{small_unit}"),
    };
    match seconds {
        0 => "now".to_owned(),
        1..60 => format!("{seconds}s"),
        60..3_600 => two(minutes, "m", seconds % 60, "s"),
        3_600..86_400 => two(hours, "h", minutes % 60, "m"),
        _ => two(days, "d", hours % 24, "h"),
    }
}

/// How far a moment is from `now`: `in 5m 6s`, `7s ago`, `now`.
pub(crate) fn from_now(at: Timestamp, now: Timestamp) -> String {
    match (at.since(now), now.since(at)) {
        (Duration::ZERO, past) if past < Duration::from_secs(1) => "now".to_owned(),
        (Duration::ZERO, past) => format!("{} ago", length(past)),
        (ahead, _) if ahead < Duration::from_secs(1) => "now".to_owned(),
        (ahead, _) => format!("in {}", length(ahead)),
    }
}

/// The time of a JSON value, if it is one.
pub(crate) fn time(value: &Value) -> Option<Timestamp> {
    Timestamp::parse(value.as_str()?).ok()
}

/// `2026-11-22 10:05:12 UTC`.
pub(crate) fn clock_time(at: Timestamp) -> String {
    let text = at.to_string();
    let day = text.get(..10).unwrap_or_default();
    let time = text.get(11..19).unwrap_or_default();
    format!("{day} {time} UTC")
}

/// `1,234,567`.
pub(crate) fn number(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// At most `width` characters of printable text.
pub(crate) fn cut(text: &str, width: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let count = text.chars().count();
    if count <= width {
        return text.chars().map(clean).collect();
    }
    let kept = text.chars().map(clean).take(width.saturating_sub(1));
    kept.chain(['…']).collect()
}

/// Text in lines of at most `width` characters, broken at spaces.
pub(crate) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let used = lines.last().map_or(0, |line| line.chars().count());
        if used > 0 && used + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.extend(word.chars().map(|c| if c.is_control() { ' ' } else { c }));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_numbers_are_short() {
        for (seconds, text) in [
            (0, "now"),
            (7, "7s"),
            (60, "1m"),
            (306, "5m 6s"),
            (3_600, "1h"),
            (14_700, "4h 5m"),
            (100_000, "1d 3h"),
        ] {
            assert_eq!(length(Duration::from_secs(seconds)), text);
        }
        for (count, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(number(count), text);
        }
        let now = Timestamp::from_millis(1_800_000_000_000);
        assert_eq!(from_now(now + Duration::from_secs(61), now), "in 1m 1s");
        assert_eq!(from_now(now, now + Duration::from_secs(61)), "1m 1s ago");
        assert_eq!(from_now(now, now), "now");
        assert_eq!(clock_time(now), "2027-01-15 08:00:00 UTC");
    }

    #[test]
    fn texts_keep_their_width() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
        assert_eq!(cut("a\u{1b}[31m", 9), "a [31m");
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("", 7), [""]);
    }
}
