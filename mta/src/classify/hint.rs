//! "Try again in five minutes": the wait that a reply asks for.

use std::time::Duration;

/// Shorter waits are noise, longer ones a mistake: the schedule decides then.
const HINTS: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(24 * 3_600);

/// Words that announce a wait; what follows within a few words is a number and a unit.
const LEADS: [&str; 19] = [
    "try again in",
    "try again after",
    "try again at least",
    "try again",
    "retry in",
    "retry after",
    "retry time",
    "retry your message in",
    "resend in",
    "resend after",
    "come back in",
    "come back after",
    "again later in",
    "listed for",
    "deferred for",
    "blocked for",
    "wait for",
    "wait",
    "versuchen sie es in",
];

/// Words looked at after a lead: "try again in about 5 (five) minutes" is within.
const WORDS_MAX: usize = 6;

/// The wait named in `text` (lower case).
pub(super) fn retry_after(text: &str) -> Option<Duration> {
    LEADS.iter().find_map(|lead| {
        let (before, rest) = text.split_once(lead)?;
        // "await", "greenlisted": the lead is a part of another word. "Greylisted for" is not.
        let starts = !before.ends_with(char::is_alphanumeric) || lead.starts_with("listed");
        starts.then(|| wait(rest)).flatten()
    })
}

fn wait(text: &str) -> Option<Duration> {
    let mut words = text
        .split(|c: char| c.is_whitespace() || matches!(c, ',' | '(' | ')' | ';' | '<' | '>' | '"'))
        .map(|word| word.trim_matches(['.', '!', '\'']))
        .filter(|word| !word.is_empty())
        .take(WORDS_MAX);
    while let Some(word) = words.next() {
        if let Some(wait) = clock_time(word) {
            return bounded(wait);
        }
        let digits = word.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = match word.split_at_checked(digits) {
            Some(("", name)) => match named(name) {
                Some(number) => (number, ""),
                None => continue,
            },
            Some((number, unit)) => (number.parse().ok()?, unit),
            None => return None,
        };
        // "5-10 minutes": the longer one keeps the promise.
        if let Some(upper) = unit.strip_prefix(['-', '–']) {
            return wait(
                &std::iter::once(upper)
                    .chain(words)
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        }
        let unit = if unit.is_empty() { words.next()? } else { unit };
        return bounded(number.checked_mul(seconds(unit)?)?);
    }
    None
}

fn seconds(unit: &str) -> Option<u64> {
    Some(match unit {
        "s" | "sec" | "secs" | "second" | "seconds" | "sekunden" => 1,
        "m" | "min" | "mins" | "minute" | "minutes" | "minuten" => 60,
        "h" | "hr" | "hrs" | "hour" | "hours" | "stunde" | "stunden" => 3_600,
        "d" | "day" | "days" => 86_400,
        _ => return None,
    })
}

fn named(word: &str) -> Option<u64> {
    Some(match word {
        "a" | "an" | "one" => 1,
        "two" => 2,
        "three" => 3,
        "five" => 5,
        "ten" => 10,
        "fifteen" => 15,
        "twenty" => 20,
        "thirty" => 30,
        "sixty" => 60,
        _ => return None,
    })
}

/// `00:04:32`, as some greylisting filters count down.
fn clock_time(word: &str) -> Option<u64> {
    let mut parts = word.split(':').map(|part| part.parse::<u64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let is_time = parts.next().is_none() && hours < 24 && minutes < 60 && seconds < 60;
    is_time.then_some(hours * 3_600 + minutes * 60 + seconds)
}

fn bounded(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds)).filter(|wait| HINTS.contains(wait))
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
            ("greylisted: try again in 5 minutes", Some(300)),
            (
                "recipient address rejected: greylisted for 5 minutes",
                Some(300),
            ),
            ("x.example greylisted for 60 seconds by zerospam", Some(60)),
            ("dt:spm 163 mx13, please try again 15min later", Some(900)),
            ("try again in five minutes", Some(300)),
            ("try again in an hour", Some(3_600)),
            ("please wait 15 minutes and retry", Some(900)),
            ("you have to wait for 1 hour", Some(3_600)),
            ("greylisted, retry time 00:04:32", Some(272)),
            ("resend in 5-10 minutes", Some(600)),
            ("temporarily deferred for 30 minutes", Some(1_800)),
            ("bitte versuchen sie es in 20 minuten erneut", Some(1_200)),
            ("try again in 1 day", Some(86_400)),
            ("try again in 1 second", None),
            ("try again in 99 hours", None),
            ("try again later", None),
            ("try again later, closing connection", None),
            ("please try again later from [192.0.2.10]", None),
            ("try again in 99999999999999999999 hours", None),
            ("try again in 9999999999999999 hours", None),
            ("try again in 5 parsecs", None),
            ("we await 10 minutes of fame", None),
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
        fn any_text_is_safe(text in "\\PC{0,80}", lead in 0..LEADS.len()) {
            let hint = retry_after(&format!("{} {text}", LEADS[lead]));
            prop_assert!(hint.is_none_or(|wait| HINTS.contains(&wait)));
        }

        #[test]
        fn any_number_and_unit_is_within_bounds(number: u64, unit in "(s|min|hours|days)", dash in "(-[0-9]{1,4})?") {
            let hint = retry_after(&format!("try again in {number}{dash} {unit}"));
            prop_assert!(hint.is_none_or(|wait| HINTS.contains(&wait)));
        }
    }
}
