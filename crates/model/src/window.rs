//! The hours of a person's day in which mail may leave, and the time zones that they are counted in.
//!
//! Owns when a window is open, by the wall clock of a zone, and when it opens or closes next.
//! Zones are those of the IANA database as it is built in: every node of one build agrees, whatever
//! its system knows. Must not read a clock.

use std::sync::OnceLock;

use jiff::ToSpan as _;
use jiff::civil::{DateTime, Time};
use jiff::tz::{AmbiguousOffset, TimeZone, TimeZoneDatabase};
use serde::{Deserialize, Serialize};

use crate::Timestamp;

const MINUTES_OF_DAY: u16 = 24 * 60;
/// A window opens within so many days, even where a day of the calendar was left out.
const DAYS_AHEAD: i64 = 3;

/// Hours of the day in which mail may leave, in the recipient's own time zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendWindow {
    /// From this minute of the day on (0 to 1,439) …
    pub from: u16,
    /// … and until before this one (1 to 1,440); at or before `from`: of the next day.
    pub to: u16,
    /// The zone of recipients that have none; none: UTC.
    #[serde(default)]
    pub time_zone: Option<Box<str>>,
}

impl SendWindow {
    /// Whether mail may leave at `at` for somebody in `zone`, a name of the IANA database; in an
    /// unknown one as if none were given.
    pub fn is_open(&self, zone: Option<&str>, at: Timestamp) -> bool {
        self.hours()
            .contain(self.zone(zone).to_datetime(moment(at)))
    }

    /// The first moment from `at` on at which it is open: `at` itself when it is.
    pub fn opens_at(&self, zone: Option<&str>, at: Timestamp) -> Timestamp {
        self.hours().next(&self.zone(zone), at).unwrap_or(at)
    }

    /// The first moment from `at` on at which it is closed; none: it never is.
    pub fn closes_at(&self, zone: Option<&str>, at: Timestamp) -> Option<Timestamp> {
        let hours = self.hours();
        let closed = Hours {
            from: hours.to,
            to: hours.from,
        };
        // A day from end to end has the same minute at both.
        (hours.from != hours.to)
            .then(|| closed.next(&self.zone(zone), at))
            .flatten()
    }

    fn hours(&self) -> Hours {
        Hours {
            from: self.from % MINUTES_OF_DAY,
            to: self.to % MINUTES_OF_DAY,
        }
    }

    fn zone(&self, own: Option<&str>) -> TimeZone {
        let own = own.and_then(find);
        own.or_else(|| self.time_zone.as_deref().and_then(find))
            .unwrap_or(TimeZone::UTC)
    }
}

/// The name of a time zone as the IANA database spells it; none: it has no such zone.
pub fn time_zone(name: &str) -> Option<Box<str>> {
    find(name)?.iana_name().map(Box::from)
}

fn find(name: &str) -> Option<TimeZone> {
    static ZONES: OnceLock<TimeZoneDatabase> = OnceLock::new();
    let zones = ZONES.get_or_init(TimeZoneDatabase::bundled);
    zones.get(name).ok().filter(|zone| !zone.is_unknown())
}

/// Minutes of the day, both below 1,440; the same twice: the whole day.
#[derive(Clone, Copy)]
struct Hours {
    from: u16,
    to: u16,
}

impl Hours {
    fn contain(self, local: DateTime) -> bool {
        let minute = u16::try_from(i32::from(local.hour()) * 60 + i32::from(local.minute()));
        let minute = minute.unwrap_or(0);
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }

    /// The first moment from `at` on that they contain: `at`, a day's `from`, or a change of the
    /// zone's offset that leads into them. None: a change of the clock leaves no such minute.
    fn next(self, zone: &TimeZone, at: Timestamp) -> Option<Timestamp> {
        let start = moment(at);
        let local = zone.to_datetime(start);
        if self.contain(local) {
            return Some(at);
        }
        let end = start
            .checked_add((24 * (DAYS_AHEAD + 1)).hours())
            .unwrap_or(jiff::Timestamp::MAX);
        let changes = zone.following(start).map(|change| change.timestamp());
        let changes = changes.take_while(|change| *change < end);
        let hour = i8::try_from(self.from / 60).unwrap_or(0);
        let minute = i8::try_from(self.from % 60).unwrap_or(0);
        let time = Time::new(hour, minute, 0, 0).unwrap_or(Time::midnight());
        let days = (0..=DAYS_AHEAD).filter_map(|day| local.date().checked_add(day.days()).ok());
        let openings = days.flat_map(|day| instants(zone, day.to_datetime(time)));
        openings
            .chain(changes)
            .filter(|found| *found >= start && self.contain(zone.to_datetime(*found)))
            .min()
            .map(|found| Timestamp::from_millis(found.as_millisecond()))
    }
}

/// When a clock of the zone shows `local`: never, once or twice.
fn instants(zone: &TimeZone, local: DateTime) -> impl Iterator<Item = jiff::Timestamp> + use<> {
    let [first, second] = match zone.to_ambiguous_timestamp(local).offset() {
        AmbiguousOffset::Unambiguous { offset } => [Some(offset), None],
        AmbiguousOffset::Gap { .. } => [None, None],
        AmbiguousOffset::Fold { before, after } => [Some(before), Some(after)],
    };
    let offsets = first.into_iter().chain(second);
    offsets.filter_map(move |offset| offset.to_timestamp(local).ok())
}

fn moment(at: Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(at.millis()).unwrap_or(jiff::Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        Timestamp::parse(text).expect("a time")
    }

    fn window(from: u16, to: u16) -> SendWindow {
        SendWindow {
            from,
            to,
            time_zone: None,
        }
    }

    const NINE: u16 = 9 * 60;
    const EVENING: u16 = 21 * 60;

    #[test]
    fn a_day_has_its_hours_in_every_zone() {
        let day = window(NINE, EVENING);
        for (zone, now, opens, closes) in [
            (
                None,
                "2026-12-01T08:59:59.999Z",
                "2026-12-01T09:00:00Z",
                "2026-12-01T08:59:59.999Z",
            ),
            (
                None,
                "2026-12-01T09:00:00Z",
                "2026-12-01T09:00:00Z",
                "2026-12-01T21:00:00Z",
            ),
            (
                None,
                "2026-12-01T21:00:00Z",
                "2026-12-02T09:00:00Z",
                "2026-12-01T21:00:00Z",
            ),
            (
                Some("Asia/Tokyo"),
                "2026-12-01T11:59:00Z",
                "2026-12-01T11:59:00Z",
                "2026-12-01T12:00:00Z",
            ),
            (
                Some("Asia/Tokyo"),
                "2026-12-01T12:00:00Z",
                "2026-12-02T00:00:00Z",
                "2026-12-01T12:00:00Z",
            ),
            (
                Some("Asia/Kathmandu"),
                "2026-12-01T00:00:00Z",
                "2026-12-01T03:15:00Z",
                "2026-12-01T00:00:00Z",
            ),
            (
                Some("America/New_York"),
                "2026-12-01T00:00:00Z",
                "2026-12-01T00:00:00Z",
                "2026-12-01T02:00:00Z",
            ),
            (
                Some("no/such"),
                "2026-12-01T08:00:00Z",
                "2026-12-01T09:00:00Z",
                "2026-12-01T08:00:00Z",
            ),
        ] {
            assert_eq!(day.opens_at(zone, at(now)), at(opens), "{zone:?} {now}");
            assert_eq!(
                day.closes_at(zone, at(now)),
                Some(at(closes)),
                "{zone:?} {now}"
            );
        }
        let tokyo = SendWindow {
            time_zone: Some("Asia/Tokyo".into()),
            ..day
        };
        assert!(tokyo.is_open(None, at("2026-12-01T00:00:00Z")));
        assert!(!tokyo.is_open(Some("UTC"), at("2026-12-01T00:00:00Z")));
    }

    #[test]
    fn a_night_goes_over_midnight_and_a_day_may_be_whole() {
        let night = window(EVENING, 6 * 60);
        assert!(night.is_open(None, at("2026-12-01T23:30:00Z")));
        assert!(night.is_open(None, at("2026-12-01T05:59:00Z")));
        assert_eq!(
            night.opens_at(None, at("2026-12-01T06:00:00Z")),
            at("2026-12-01T21:00:00Z")
        );
        assert_eq!(
            night.closes_at(None, at("2026-12-01T22:00:00Z")),
            Some(at("2026-12-02T06:00:00Z"))
        );
        for whole in [window(0, MINUTES_OF_DAY), window(NINE, NINE)] {
            let now = at("2026-12-01T08:00:00Z");
            assert_eq!(
                (whole.opens_at(None, now), whole.closes_at(None, now)),
                (now, None)
            );
        }
    }

    #[test]
    fn the_clock_of_the_wall_counts_when_it_is_put_forward_or_back() {
        let berlin = Some("Europe/Berlin");
        // 2027-03-28: 02:00 becomes 03:00. What would open between opens with the jump, if it is
        // open then; a window that lies in what is left out does not open that day.
        let early = window(2 * 60 + 30, 6 * 60);
        assert_eq!(
            early.opens_at(berlin, at("2027-03-28T00:00:00Z")),
            at("2027-03-28T01:00:00Z")
        );
        let gone = window(2 * 60 + 15, 2 * 60 + 45);
        assert_eq!(
            gone.opens_at(berlin, at("2027-03-27T02:00:00Z")),
            at("2027-03-29T00:15:00Z")
        );
        // 2026-10-25: 03:00 becomes 02:00. 09:00 comes an hour later than the day before.
        let day = window(NINE, EVENING);
        assert_eq!(
            day.opens_at(berlin, at("2026-10-24T19:00:00Z")),
            at("2026-10-25T08:00:00Z")
        );
        let twice = window(2 * 60, 2 * 60 + 30);
        assert_eq!(
            twice.opens_at(berlin, at("2026-10-25T00:30:00Z")),
            at("2026-10-25T01:00:00Z")
        );
        // A day that the calendar of the place left out (Apia, 2011-12-30).
        let apia = Some("Pacific/Apia");
        assert_eq!(
            day.opens_at(apia, at("2011-12-30T07:00:00Z")),
            at("2011-12-30T19:00:00Z")
        );
    }

    #[test]
    fn zones_have_the_names_of_the_database() {
        assert_eq!(time_zone("asia/tokyo").as_deref(), Some("Asia/Tokyo"));
        assert_eq!(time_zone("utc").as_deref(), Some("UTC"));
        for name in [
            "",
            "Asia",
            "Mars/Phobos",
            "+09:00",
            "JST-9",
            "../etc/passwd",
            "Etc/Unknown",
        ] {
            assert_eq!(time_zone(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn it_opens_and_closes_at_the_first_minute_that_says_so(
            from in 0_u16..1_440, to in 1_u16..=1_440, minutes in 0_i64..3 * 366 * 1_440,
            zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "Africa/Casablanca"]),
        ) {
            let window = window(from, to);
            let start = at("2026-01-01T00:00:00Z");
            let now = Timestamp::from_millis(start.millis() + minutes * 60_000);
            let minute = |n: i64| Timestamp::from_millis(now.millis() + n * 60_000);
            let first = |open: bool| (0..3 * 1_440).map(minute).find(|at| window.is_open(Some(zone), *at) == open);
            prop_assert_eq!(Some(window.opens_at(Some(zone), now)), first(true));
            prop_assert_eq!(window.closes_at(Some(zone), now), first(false));
        }

        #[test]
        fn any_name_is_known_or_not(name in "\\PC{0,40}") {
            if let Some(known) = time_zone(&name) {
                prop_assert!(known.eq_ignore_ascii_case(&name));
            }
        }
    }
}
