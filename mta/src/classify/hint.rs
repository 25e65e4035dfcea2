//! "Try again in five minutes": the wait that a reply asks for.

use std::time::Duration;

/// Shorter waits are noise, longer ones a mistake: the schedule decides then.
const HINTS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(24 * 3_600);

/// Words that announce a wait; what follows within a few words is a number and a unit.
const LEADS: [&str; 6] = [
    "try again in",
    "try again after",
    "retry in",
    "retry after",
    "come back in",
    "again later in",
];

/// The wait named in `text` (lower case).
pub(super) fn retry_after(text: &str) -> Option<Duration> {
    LEADS.iter().find_map(|lead| {
        let (_, rest) = text.split_once(lead)?;
        wait(rest)
    })
}

fn wait(text: &str) -> Option<Duration> {
    let mut words = text
        .split(|c: char| c.is_whitespace() || matches!(c, ',' | '(' | ')' | ';'))
        .filter(|word| !word.is_empty())
        .take(5);
    while let Some(word) = words.next() {
        let digits = word.bytes().take_while(u8::is_ascii_digit).count();
        let Some((number, unit)) = word
            .split_at_checked(digits)
            .filter(|(number, _)| !number.is_empty())
        else {
            continue;
        };
        let number: u64 = number.parse().ok()?;
        let unit = if unit.is_empty() { words.next()? } else { unit };
        let seconds = match unit.trim_matches('.') {
            "s" | "sec" | "secs" | "second" | "seconds" => 1,
            "m" | "min" | "mins" | "minute" | "minutes" => 60,
            "h" | "hour" | "hours" => 3_600,
            _ => return None,
        };
        return number
            .checked_mul(seconds)
            .map(Duration::from_secs)
            .filter(|wait| HINTS.contains(wait));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_that_peers_name() {
        let table = [
            ("greylisted, try again in 300 seconds", Some(300)),
            ("greylisted, see http://x/ (retry in 60s)", Some(60)),
            ("please try again after 5 minutes.", Some(300)),
            ("retry after: 2 hours", Some(7_200)),
            ("try again in about 10 min", Some(600)),
            ("try again in 1 second", None),
            ("try again in 99 hours", None),
            ("try again later", None),
            ("try again in 99999999999999999999 hours", None),
            ("try again in 5 parsecs", None),
        ];
        for (text, seconds) in table {
            assert_eq!(
                retry_after(text),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_safe(text in "\\PC{0,80}", lead in 0_usize..6) {
            let hint = retry_after(&format!("{} {text}", LEADS[lead]));
            prop_assert!(hint.is_none_or(|wait| HINTS.contains(&wait)));
        }
    }
}
