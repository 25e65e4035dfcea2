//! Wall-clock time as milliseconds since 1970, UTC.

use jiff::fmt::StdFmtWrite;
use jiff::fmt::temporal::DateTimePrinter;
use std::fmt;
use std::time::Duration;

/// A moment: milliseconds since 1970-01-01T00:00:00Z. Shown as RFC 3339 with milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The moment `millis` after 1970.
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970.
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970, rounded down.
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// The time from `earlier` to this, zero when it is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// As RFC 5322 section 3.3 writes a date, in UTC: `Fri, 21 Nov 2025 08:05:00 +0000`.
    pub fn rfc5322(self) -> String {
        self.instant()
            .strftime("%a, %d %b %Y %H:%M:%S +0000")
            .to_string()
    }

    /// Reads RFC 3339 with any offset.
    ///
    /// # Errors
    /// The reason, for a person, when `text` is no such date.
    pub fn parse(text: &str) -> Result<Self, String> {
        text.parse::<jiff::Timestamp>()
            .map(|t| Self(t.as_millisecond()))
            .map_err(|error| error.to_string())
    }

    fn instant(self) -> jiff::Timestamp {
        // Beyond year 9999 nothing of ours has a meaning: clamp rather than fail.
        jiff::Timestamp::from_millisecond(self.0).unwrap_or(jiff::Timestamp::MAX)
    }
}

impl std::ops::Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, by: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)),
        )
    }
}

impl std::ops::Sub<Duration> for Timestamp {
    type Output = Self;
    fn sub(self, by: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)),
        )
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));
        PRINTER
            .print_timestamp(&self.instant(), StdFmtWrite(f))
            .map_err(|_| fmt::Error)
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() {
            to.collect_str(self)
        } else {
            self.0.serialize(to)
        }
    }
}

impl<'de> serde::Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if from.is_human_readable() {
            let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
            Self::parse(&text).map_err(serde::de::Error::custom)
        } else {
            i64::deserialize(from).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_as_the_contract_says() {
        let at = Timestamp::from_millis(1_763_712_300_007);
        assert_eq!(at.to_string(), "2025-11-21T08:05:00.007Z");
        assert_eq!(at.rfc5322(), "Fri, 21 Nov 2025 08:05:00 +0000");
        assert_eq!(Timestamp::parse("2025-11-21T17:05:00.007+09:00"), Ok(at));
        assert!(Timestamp::parse("tomorrow").is_err());
        assert_eq!(at + Duration::from_secs(1) - Duration::from_secs(1), at);
    }
}
