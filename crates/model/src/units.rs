//! Durations, sizes and rates as people write them: `"30s"`, `"64MiB"`, `"5/s"`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a text is no duration, size or rate. `Display` is fit for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {wanted}")]
pub struct UnitError {
    /// What was found.
    pub text: String,
    /// What was wanted, with an example.
    pub wanted: &'static str,
}

fn split(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    Some((number.parse().ok()?, unit))
}

/// Reads `500ms`, `30s`, `5m`, `4h`, `30d`.
///
/// # Errors
/// When the text has no number, no such unit, or is too large to count.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError {
        text: text.into(),
        wanted: "a duration (such as \"20ms\", \"30s\", \"5m\", \"4h\", \"30d\")",
    };
    let (number, unit) = split(text).ok_or_else(error)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(error()),
    };
    number
        .checked_mul(millis)
        .filter(|&ms| i64::try_from(ms).is_ok())
        .map(Duration::from_millis)
        .ok_or_else(error)
}

/// Writes a duration in the largest unit that leaves no remainder.
pub fn format_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    let units: [(u128, &str); 4] = [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "m"),
        (1_000, "s"),
    ];
    let fit = units
        .iter()
        .find(|(unit, _)| millis >= *unit && millis.is_multiple_of(*unit));
    fit.map_or_else(
        || format!("{millis}ms"),
        |(unit, name)| format!("{}{name}", millis / unit),
    )
}

/// Reads `512`, `64KiB`, `64MiB`, `4GiB` (and `kB`, `MB`, `GB` of 1000) as bytes.
///
/// # Errors
/// When the text has no number, no such unit, or is too large to count.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError {
        text: text.into(),
        wanted: "a size (such as \"512B\", \"64KiB\", \"64MiB\", \"4GiB\")",
    };
    let (number, unit) = split(text).ok_or_else(error)?;
    let bytes = match unit {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(error()),
    };
    number.checked_mul(bytes).ok_or_else(error)
}

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Rate {
    /// As often as one likes.
    #[default]
    Unlimited,
    /// `count` (at least 1) times each `per`.
    Limited {
        /// How many.
        count: u32,
        /// In which time: a second, a minute, an hour or a day.
        per: Duration,
    },
}

impl Rate {
    /// The time between two, when evenly spread; zero when unlimited.
    pub fn interval(self) -> Duration {
        match self {
            Self::Unlimited => Duration::ZERO,
            Self::Limited { count, per } => per / count,
        }
    }

    /// How many in a second; infinite when unlimited.
    pub fn per_second(self) -> f64 {
        match self {
            Self::Unlimited => f64::INFINITY,
            Self::Limited { count, per } => f64::from(count) / per.as_secs_f64(),
        }
    }
}

impl serde::Serialize for Rate {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let error = || UnitError {
            text: text.into(),
            wanted: "a rate (such as \"5/s\", \"300/m\", \"1000/h\", \"100/d\" or \"unlimited\")",
        };
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        let (count, unit) = text.split_once('/').ok_or_else(error)?;
        let per = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            "d" => 86_400,
            _ => return Err(error()),
        };
        let digits = !count.is_empty() && count.bytes().all(|b| b.is_ascii_digit());
        let count = count
            .parse()
            .ok()
            .filter(|&n: &u32| digits && n > 0)
            .ok_or_else(error)?;
        Ok(Self::Limited {
            count,
            per: Duration::from_secs(per),
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Limited { count, per } = self else {
            return f.write_str("unlimited");
        };
        let unit = match per.as_secs() {
            1 => "s",
            60 => "m",
            3_600 => "h",
            _ => "d",
        };
        write!(f, "{count}/{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_people_write() {
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("4h"), Ok(Duration::from_secs(14_400)));
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(
            "5/m".parse::<Rate>().map(Rate::interval),
            Ok(Duration::from_secs(12))
        );
        for bad in [
            "",
            "s",
            "10",
            "10x",
            "-1s",
            "1.5h",
            "99999999999999999999d",
            "18446744073709551615d",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        for bad in ["", "/s", "0/s", "+5/s", "5", "5/w", "5/"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _parsed = (parse_duration(&text), parse_size(&text), text.parse::<Rate>());
        }

        #[test]
        fn a_duration_reads_back(ms in 0_u64..10_000_000_000) {
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
