//! The control feed and the events: reading them by cursor, and waiting for more.
//!
//! Each partition has its own of both; a cursor has a place in each. What comes from several is
//! put in order by time, for events by their number, which follows the server's clock. Must not
//! change anything.

use super::Inner;
use super::keys;
use super::link::answer;
use crate::{
    Control, ControlCursor, ControlPage, EventPage, EventQuery, FeedPlace, Happened, Result, SIGNS,
    Sign, SignPage, StoreError,
};
use ::redis::{Cmd, Pipeline, Value};
use futures_util::future::try_join_all;
use model::{Event, EventKind, HitKind, Partition, Timestamp};
use std::collections::VecDeque;

/// Items of one page of the control feed, events read at once.
const PAGE: usize = 1_000;
/// Events looked through for one page: a filter that finds little answers with a cursor.
const SEARCHED: usize = 50_000;

/// A place in a feed of this store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Control(Vec<u64>),
    Events(Vec<u64>),
}

/// Reads a cursor of events: the number of the last event told, of each partition. Only what
/// [`write_cursor`] writes.
pub(super) fn read_cursor(text: &str, partitions: u16) -> Result<Vec<u64>> {
    let places = text
        .strip_prefix("e2-")
        .and_then(|rest| rest.split('.').map(|number| number.parse().ok()).collect())
        .filter(|places: &Vec<u64>| {
            places.len() == usize::from(partitions) && write_cursor(places) == text
        });
    places.ok_or_else(|| StoreError::Refused("is no cursor of events".into()))
}

fn write_cursor(places: &[u64]) -> String {
    let numbers: Vec<String> = places.iter().map(u64::to_string).collect();
    format!("e2-{}", numbers.join("."))
}

/// Names and values of an entry of a stream.
pub(super) type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// An entry of a stream: its number and its fields.
pub(super) fn read_entry(entry: Value) -> Option<(u64, Fields)> {
    let mut parts = answer::list(entry).into_iter();
    let id = answer::bytes(parts.next()?)?;
    let number = std::str::from_utf8(&id).ok()?.split_once('-')?.0;
    Some((number.parse().ok()?, answer::pairs(parts.next()?)))
}

pub(super) fn field(fields: &Fields, name: &[u8]) -> Vec<u8> {
    let found = fields.iter().find(|(key, _)| key == name);
    found.map(|(_, value)| value.clone()).unwrap_or_default()
}

/// What was read ahead of a partition's events.
struct Ahead<T> {
    partition: Partition,
    /// The number of the last event told.
    told: u64,
    /// The number of the last event read.
    read: u64,
    ended: bool,
    /// With their numbers.
    events: VecDeque<(u64, T)>,
}

impl Inner {
    // ---- control ------------------------------------------------------------------------

    /// The numbers of the newest item of each partition's feed.
    async fn newest(&self, key: impl Fn(Partition) -> String + Copy) -> Result<Vec<u64>> {
        let all = self.all_partitions().map(|p| async move {
            let mut get = Cmd::new();
            get.arg("GET").arg(key(p));
            let number = answer::number(self.link.short(&get).await?);
            Ok::<_, StoreError>(u64::try_from(number).unwrap_or(0))
        });
        try_join_all(all).await
    }

    /// Reads the control feed after a cursor.
    pub(super) async fn control_page(&self, after: Option<ControlCursor>) -> Result<ControlPage> {
        let Some(ControlCursor(after)) = after else {
            return self.control_of_now(false).await;
        };
        if after.len() != usize::from(self.partitions) {
            return self.control_of_now(true).await;
        }
        let share = PAGE / after.len().max(1);
        let parts = self
            .all_partitions()
            .zip(&after)
            .map(|(p, after)| self.control_part(p, *after, share.max(1)));
        let mut items = Vec::new();
        let mut next = Vec::new();
        for part in try_join_all(parts).await? {
            let Some((told, last)) = part else {
                return self.control_of_now(true).await;
            };
            next.push(last);
            items.extend(told);
        }
        items.sort_by_key(|(at, _)| *at);
        Ok(ControlPage {
            reset: false,
            items: items.into_iter().map(|(_, item)| item).collect(),
            next: ControlCursor(next),
        })
    }

    async fn control_of_now(&self, reset: bool) -> Result<ControlPage> {
        Ok(ControlPage {
            reset,
            items: Vec::new(),
            next: ControlCursor(self.newest(keys::control_counter).await?),
        })
    }

    /// Items of one partition after a number, with their times, and the number of the last; `None`
    /// when the feed no longer reaches back, or never reached so far.
    async fn control_part(
        &self,
        p: Partition,
        after: u64,
        limit: usize,
    ) -> Result<Option<(Vec<(i64, Control)>, u64)>> {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("GET").arg(keys::control_counter(p));
        pipeline
            .cmd("XRANGE")
            .arg(keys::control(p))
            .arg(format!("({after}-0"))
            .arg("+")
            .arg("COUNT")
            .arg(limit);
        let mut answers = self.link.bulk(&pipeline).await?.into_iter();
        let newest = u64::try_from(answers.next().map_or(0, answer::number)).unwrap_or(0);
        if after > newest {
            return Ok(None);
        }
        let (mut items, mut last) = (Vec::new(), after);
        for entry in answers.next().map(answer::list).unwrap_or_default() {
            let Some((number, fields)) = read_entry(entry) else {
                continue;
            };
            if number != last + 1 {
                // Numbers have no gaps: what stood here was trimmed.
                return Ok(None);
            }
            last = number;
            let at = String::from_utf8(field(&fields, b"t")).ok();
            let at = at.and_then(|text| text.parse().ok()).unwrap_or(0);
            let item = serde_json::from_slice(&field(&fields, b"i"))
                .map_err(|error| StoreError::Damaged(format!("control item {last}: {error}")))?;
            items.push((at, item));
        }
        Ok((!items.is_empty() || after == newest).then_some((items, last)))
    }

    // ---- events -------------------------------------------------------------------------

    /// Events after a cursor.
    pub(super) async fn event_page(&self, query: &EventQuery) -> Result<EventPage> {
        let read = |json: &[u8]| {
            let event: serde_json::Result<Event> = serde_json::from_slice(json);
            event.map_err(|error| StoreError::Damaged(format!("an event: {error}")))
        };
        let (events, next) = self.gather(query, PAGE, read, wanted).await?;
        Ok(EventPage { events, next })
    }

    /// Events after a cursor, as signs.
    pub(super) async fn sign_page(&self, query: &EventQuery) -> Result<SignPage> {
        let most = usize::try_from(SIGNS).unwrap_or(PAGE);
        let (signs, next) = self.gather(query, most, Sign::read, wanted_sign).await?;
        Ok(SignPage { signs, next })
    }

    /// What is read of the events after a cursor, at most `most`, and the cursor after it.
    async fn gather<T>(
        &self,
        query: &EventQuery,
        most: usize,
        read: impl Fn(&[u8]) -> Result<T> + Copy,
        wanted: impl Fn(&EventQuery, &T) -> bool,
    ) -> Result<(Vec<T>, String)> {
        let newest = self.newest(keys::event_counter).await?;
        let after = match query.after.as_deref() {
            None => vec![0; usize::from(self.partitions)],
            Some(text) => read_cursor(text, self.partitions)?,
        };
        if after
            .iter()
            .zip(&newest)
            .any(|(after, newest)| after > newest)
        {
            return Err(StoreError::Refused(
                "is beyond the newest event: a cursor of another store".into(),
            ));
        }
        if let Some(batch) = query.batch
            && self.home(batch).await?.is_none()
        {
            // Should it come to be, its events will come after this moment.
            return Ok((Vec::new(), write_cursor(&newest)));
        }
        // Nothing is asked of a partition that has nothing new.
        let of = |((p, after), newest): ((Partition, u64), u64)| Ahead {
            partition: p,
            told: after,
            read: after,
            ended: after == newest,
            events: VecDeque::new(),
        };
        let places = self.all_partitions().zip(after).zip(newest);
        let mut parts: Vec<Ahead<T>> = places.map(of).collect();
        let limit = usize::try_from(query.limit).unwrap_or(most).clamp(1, most);
        let (mut found, mut searched) = (Vec::new(), 0);
        while found.len() < limit && searched < SEARCHED {
            let empty = |part: &&mut Ahead<T>| part.events.is_empty() && !part.ended;
            let fill = parts.iter_mut().filter(empty);
            let left = limit - found.len();
            try_join_all(fill.map(|part| self.read_ahead(part, left, read))).await?;
            let first =
                |part: &&mut Ahead<T>| part.events.front().map_or(u64::MAX, |(number, _)| *number);
            let Some(part) = parts.iter_mut().min_by_key(first) else {
                break;
            };
            let Some((number, event)) = part.events.pop_front() else {
                break;
            };
            part.told = number;
            searched += 1;
            if wanted(query, &event) {
                found.push(event);
            }
        }
        let told: Vec<u64> = parts.iter().map(|part| part.told).collect();
        Ok((found, write_cursor(&told)))
    }

    /// The cursor before the first event that was recorded at or after `at`.
    pub(super) async fn event_cursor(&self, at: Timestamp) -> Result<String> {
        let newest = self.newest(keys::event_counter).await?;
        // An event's number is the server's time in microseconds, or above it.
        let micros = at.millis().saturating_mul(1_000).saturating_sub(1);
        let before = u64::try_from(micros).unwrap_or(0);
        let places: Vec<u64> = newest.into_iter().map(|last| last.min(before)).collect();
        Ok(write_cursor(&places))
    }

    async fn read_ahead<T>(
        &self,
        part: &mut Ahead<T>,
        limit: usize,
        read: impl Fn(&[u8]) -> Result<T>,
    ) -> Result<()> {
        let count = limit.clamp(64, PAGE);
        let mut range = Cmd::new();
        range
            .arg("XRANGE")
            .arg(keys::events(part.partition))
            .arg(format!("({}-{}", part.read, u64::MAX))
            .arg("+")
            .arg("COUNT")
            .arg(count);
        let entries = answer::list(self.link.short(&range).await?);
        part.ended = entries.len() < count;
        for entry in entries {
            let Some((number, fields)) = read_entry(entry) else {
                continue;
            };
            part.read = number;
            part.events
                .push_back((number, read(&field(&fields, b"e"))?));
        }
        Ok(())
    }

    // ---- waiting ------------------------------------------------------------------------

    /// The place in this store; `None` when there is no such place.
    pub(super) fn place(&self, of: FeedPlace<'_>) -> Option<Place> {
        match of {
            FeedPlace::Control(cursor) => Some(Place::Control(cursor.0.clone()))
                .filter(|_| cursor.0.len() == usize::from(self.partitions)),
            FeedPlace::Events(text) => {
                let read = read_cursor(text, self.partitions);
                read.ok().map(Place::Events)
            }
        }
    }

    /// Whether the feed does not end at the place. One that ends before it is of another time:
    /// reading tells.
    pub(super) async fn is_ahead(&self, place: &Place) -> Result<bool> {
        Ok(match place {
            Place::Control(after) => self.newest(keys::control_counter).await? != *after,
            Place::Events(after) => self.newest(keys::event_counter).await? != *after,
        })
    }
}

fn wanted(query: &EventQuery, event: &Event) -> bool {
    let account = |of: &String| *of == event.account;
    query.account.as_ref().is_none_or(account)
        && (query.kinds.is_empty() || query.kinds.contains(&event.kind))
        && query
            .batch
            .is_none_or(|batch| event.batch_id == Some(batch))
}

fn wanted_sign(query: &EventQuery, sign: &Sign) -> bool {
    let of = match sign {
        Sign::Other(event) => return wanted(query, event),
        Sign::Mail(of) => of,
    };
    let kind = match &of.what {
        Happened::Delivered { .. } => EventKind::EmailDelivered,
        Happened::Hit(of) if of.hit.kind == HitKind::Click => EventKind::EmailClicked,
        Happened::Hit(_) => EventKind::EmailOpened,
    };
    let account = |wanted: &String| **wanted == *of.account;
    query.account.as_ref().is_none_or(account)
        && (query.kinds.is_empty() || query.kinds.contains(&kind))
        && query.batch.is_none_or(|batch| of.message.batch == batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn cursors_read_back(places in prop::collection::vec(any::<u64>(), 1..5)) {
            let count = u16::try_from(places.len()).unwrap();
            let text = write_cursor(&places);
            prop_assert_eq!(read_cursor(&text, count), Ok(places));
            prop_assert!(read_cursor(&text, count + 1).is_err());
        }

        #[test]
        fn any_text_is_a_cursor_or_refused(text: String, count in 1_u16..5) {
            let _read = read_cursor(&text, count);
            let _read = read_cursor(&format!("e2-{text}"), count);
        }
    }

    #[test]
    fn a_number_is_written_in_one_way_only() {
        for text in ["e2-+1", "e2-01", "e1-1", "e2-", "1"] {
            assert!(read_cursor(text, 1).is_err(), "{text}");
        }
    }
}
