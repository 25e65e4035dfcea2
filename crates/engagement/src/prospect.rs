//! What a person did: a timeline, days, a score.
//!
//! A [`Prospect`] is made of events, each applied once however often it is told: the timeline
//! remembers which. Only what a person did counts; a hit that turns out to be a machine's is taken
//! back. Bounded: the newest 100 things, the newest 50 campaigns, the days that may count. How it
//! is stored says `stored`.

mod stored;

use model::{DeliveryStatus, EventKind, MessageId, Timestamp, VisitorId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

const TIMELINE: usize = 100;
const CAMPAIGNS: usize = 50;
const VISITORS: usize = 50;
/// Days kept: as many as a score may look back.
const DAYS: usize = 400;
const DAY: i64 = 86_400_000;

/// What a person's interest is worth.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Points {
    /// How many days count, today among them.
    pub days: u32,
    /// Of one kind, so many count a day.
    pub max_per_day: u16,
    /// For an open.
    pub open: u32,
    /// For a click.
    pub click: u32,
    /// For a page.
    pub page_view: u32,
    /// For an answer.
    pub reply: u32,
    /// For a conversion.
    pub conversion: u32,
}

/// What a person did on one day (UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Day {
    /// Opens.
    pub opens: u16,
    /// Clicks.
    pub clicks: u16,
    /// Pages.
    pub page_views: u16,
    /// Answers.
    pub replies: u16,
    /// Conversions.
    pub conversions: u16,
}

/// What there is of a person in one campaign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InCampaign {
    /// Its name; empty: none.
    pub name: Arc<str>,
    /// Opened by a person, or by what cannot be told.
    pub opened: bool,
    /// Clicked by a person.
    pub clicked: bool,
    /// Answered.
    pub replied: bool,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The event.
    pub event_id: Uuid,
    /// Its type, by code: [`Entry::kind`] reads it.
    pub code: u8,
    /// When.
    pub at: Timestamp,
    /// In which campaign; empty: in none.
    pub campaign: Arc<str>,
    /// The message.
    pub message: Option<MessageId>,
    /// The link or the page, at most 200 bytes; empty: none.
    pub url: Arc<str>,
    /// The visitor, for a page.
    pub visitor: Option<VisitorId>,
    /// Whether it counts as done by the person.
    pub human: bool,
}

impl Entry {
    /// A thing of this type.
    pub fn new(event_id: Uuid, kind: EventKind, at: Timestamp) -> Self {
        Self {
            event_id,
            code: kind.code(),
            at,
            campaign: Arc::default(),
            message: None,
            url: Arc::default(),
            visitor: None,
            human: false,
        }
    }

    /// Its type.
    pub fn kind(&self) -> Option<EventKind> {
        EventKind::from_code(self.code)
    }
}

/// A browser of the person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The visitor.
    pub visitor: VisitorId,
    /// By which binding.
    pub binding: Uuid,
    /// Since when.
    pub since: Timestamp,
}

/// A person, as far as an account knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prospect {
    /// The newest address.
    pub email: Box<str>,
    /// When the person last did something.
    pub last_human_at: Option<Timestamp>,
    /// When mail was last delivered.
    pub last_delivered_at: Option<Timestamp>,
    /// What became of the newest mail, by code.
    delivery: Option<u8>,
    /// By day, in days since 1970.
    pub days: BTreeMap<u32, Day>,
    /// Browsers, the newest last.
    pub visitors: Vec<Seen>,
    /// By campaign, the newest last.
    pub campaigns: Vec<InCampaign>,
    /// The newest last.
    pub timeline: Vec<Entry>,
    /// Which browser clicked first in which message, the newest last.
    pub first_clicks: Vec<(MessageId, VisitorId)>,
}

fn day_of(at: Timestamp) -> u32 {
    u32::try_from(at.millis().div_euclid(DAY)).unwrap_or(0)
}

/// The day's number for a type of event; `None`: it counts for nothing.
fn slot(day: &mut Day, kind: EventKind) -> Option<&mut u16> {
    match kind {
        EventKind::EmailOpened => Some(&mut day.opens),
        EventKind::EmailClicked => Some(&mut day.clicks),
        EventKind::PageViewed => Some(&mut day.page_views),
        EventKind::EmailReplied => Some(&mut day.replies),
        EventKind::Conversion => Some(&mut day.conversions),
        _ => None,
    }
}

impl Prospect {
    /// Whether an event is in the timeline.
    pub fn knows(&self, event_id: Uuid) -> bool {
        // What is asked for is mostly new, and else mostly not old.
        let mut newest = self.timeline.iter().rev();
        newest.any(|entry| entry.event_id == event_id)
    }

    /// Applies an event, unless it was applied before. Whether it was new.
    pub fn apply(&mut self, entry: Entry) -> bool {
        let Some(kind) = entry.kind() else {
            return false;
        };
        if self.knows(entry.event_id) {
            return false;
        }
        if entry.human {
            self.did(kind, &entry);
        } else if kind == EventKind::EmailOpened {
            // Image proxies hide the person: it was opened, and is worth nothing.
            self.campaign(&entry.campaign).opened = true;
        }
        // In order of time, which is mostly the order in which they come.
        let at = self
            .timeline
            .iter()
            .rposition(|known| known.at <= entry.at)
            .map_or(0, |at| at + 1);
        self.timeline.insert(at, entry);
        if self.timeline.len() > TIMELINE {
            self.timeline.remove(0);
        }
        true
    }

    fn did(&mut self, kind: EventKind, entry: &Entry) {
        let day = self.days.entry(day_of(entry.at)).or_default();
        if let Some(count) = slot(day, kind) {
            *count = count.saturating_add(1);
            self.last_human_at = self.last_human_at.max(Some(entry.at));
        }
        while self.days.len() > DAYS {
            self.days.pop_first();
        }
        let opened = matches!(kind, EventKind::EmailOpened | EventKind::EmailClicked);
        let clicked = kind == EventKind::EmailClicked;
        let replied = kind == EventKind::EmailReplied;
        if opened || replied {
            let of = self.campaign(&entry.campaign);
            of.opened |= opened;
            of.clicked |= clicked;
            of.replied |= replied;
        }
    }

    /// What there is of a campaign, which becomes the newest.
    fn campaign(&mut self, name: &Arc<str>) -> &mut InCampaign {
        let at = self.campaigns.iter().position(|of| of.name == *name);
        let known = at.map(|at| self.campaigns.remove(at));
        if self.campaigns.len() >= CAMPAIGNS {
            self.campaigns.remove(0);
        }
        let of = known.unwrap_or_else(|| InCampaign {
            name: name.clone(),
            opened: false,
            clicked: false,
            replied: false,
        });
        self.campaigns.push(of);
        let last = self.campaigns.len() - 1;
        &mut self.campaigns[last]
    }

    /// Mail of a campaign ended so.
    pub fn mailed(&mut self, campaign: &Arc<str>, status: DeliveryStatus, at: Timestamp) {
        self.campaign(campaign);
        self.delivery = Some(status.code());
        if status == DeliveryStatus::Ok {
            self.last_delivered_at = self.last_delivered_at.max(Some(at));
        }
    }

    /// What became of the newest mail.
    pub fn delivery_status(&self) -> DeliveryStatus {
        let known = self.delivery.and_then(DeliveryStatus::from_code);
        known.unwrap_or(DeliveryStatus::Unconfirmed)
    }

    /// Takes back, or gives back, that a person did something. Whether anything changed.
    pub fn revise(&mut self, event_id: Uuid, human: bool) -> bool {
        let found = self
            .timeline
            .iter_mut()
            .find(|entry| entry.event_id == event_id && entry.human != human);
        let Some(entry) = found else { return false };
        entry.human = human;
        let entry = entry.clone();
        let Some(kind) = entry.kind() else {
            return true;
        };
        if human {
            self.did(kind, &entry);
            return true;
        }
        let day = self.days.entry(day_of(entry.at)).or_default();
        if let Some(count) = slot(day, kind) {
            *count = count.saturating_sub(1);
        }
        self.recount(&entry.campaign);
        true
    }

    /// Finds anew what was made of the entries: when the person last did something, and what in a
    /// campaign.
    fn recount(&mut self, campaign: &str) {
        let did = self.timeline.iter().filter(|entry| entry.human);
        self.last_human_at = did.clone().map(|entry| entry.at).max();
        let (mut opened, mut clicked) = (false, false);
        for entry in did.filter(|entry| *entry.campaign == *campaign) {
            clicked |= entry.kind() == Some(EventKind::EmailClicked);
            opened |= clicked || entry.kind() == Some(EventKind::EmailOpened);
        }
        if let Some(of) = self.campaigns.iter_mut().find(|of| *of.name == *campaign) {
            of.opened = opened;
            of.clicked = clicked;
        }
    }

    /// A browser is the person's.
    pub fn bind(&mut self, seen: Seen) {
        if self
            .visitors
            .iter()
            .any(|known| known.binding == seen.binding)
        {
            return;
        }
        self.visitors.push(seen);
        if self.visitors.len() > VISITORS {
            self.visitors.remove(0);
        }
    }

    /// A browser is no longer the person's: the pages that came by it go with it.
    pub fn unbind(&mut self, binding: Uuid, visitor: VisitorId) -> Vec<Entry> {
        self.visitors.retain(|known| known.binding != binding);
        self.take_back(|entry| entry.visitor == Some(visitor))
    }

    /// A browser is somebody else's since then: the pages that came by it since go with it. (A
    /// click is known to be a person's a while after it; the page that it led to came before.)
    pub fn left(&mut self, visitor: VisitorId, since: Timestamp) -> Vec<Entry> {
        self.take_back(|entry| entry.visitor == Some(visitor) && entry.at >= since)
    }

    fn take_back(&mut self, theirs: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let (gone, kept): (Vec<Entry>, Vec<Entry>) = std::mem::take(&mut self.timeline)
            .into_iter()
            .partition(theirs);
        self.timeline = kept;
        if gone.is_empty() {
            return gone;
        }
        for entry in gone.iter().filter(|entry| entry.human) {
            let day = self.days.entry(day_of(entry.at)).or_default();
            day.page_views = day.page_views.saturating_sub(1);
        }
        let did = self.timeline.iter().filter(|entry| entry.human);
        self.last_human_at = did.map(|entry| entry.at).max();
        gone
    }

    /// Notes which browser clicked in a message; the one that clicked first, if it was another.
    pub fn clicked_before(&mut self, message: MessageId, visitor: VisitorId) -> Option<VisitorId> {
        let first = self.first_clicks.iter().find(|(id, _)| *id == message);
        if let Some((_, first)) = first {
            return Some(*first).filter(|first| *first != visitor);
        }
        self.first_clicks.push((message, visitor));
        if self.first_clicks.len() > CAMPAIGNS {
            self.first_clicks.remove(0);
        }
        None
    }

    /// The score at `now`.
    pub fn score(&self, points: &Points, now: Timestamp) -> u64 {
        let today = day_of(now);
        let since = (today + 1).saturating_sub(points.days);
        let capped =
            |count: u16, worth: u32| u64::from(count.min(points.max_per_day)) * u64::from(worth);
        self.days
            .range(since..=today)
            .map(|(_, day)| {
                capped(day.opens, points.open)
                    + capped(day.clicks, points.click)
                    + capped(day.page_views, points.page_view)
                    + capped(day.replies, points.reply)
                    + capped(day.conversions, points.conversion)
            })
            .sum()
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        stored::write(self)
    }

    /// Reads what is stored, by an older version too; `None` when it is of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        stored::read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points() -> Points {
        crate::Rules::shipped().points
    }

    fn at(day: i64, millis: i64) -> Timestamp {
        Timestamp::from_millis(day * DAY + millis)
    }

    /// An id out of a short name.
    fn id(name: &str) -> Uuid {
        let bytes = name
            .bytes()
            .fold(0, |all, byte| all << 8 | u128::from(byte));
        Uuid::from_u128(bytes)
    }

    fn entry(name: &str, kind: EventKind, at: Timestamp) -> Entry {
        Entry {
            campaign: "spring".into(),
            human: true,
            ..Entry::new(id(name), kind, at)
        }
    }

    fn message(index: u32) -> MessageId {
        MessageId {
            batch: model::BatchId::from_bytes([0xee; 16]),
            index,
        }
    }

    #[test]
    fn a_score_counts_ninety_days_and_so_many_a_day() {
        let mut person = Prospect::default();
        person.apply(entry("a", EventKind::EmailClicked, at(100, 5)));
        assert!(!person.apply(entry("a", EventKind::EmailClicked, at(100, 5))));
        person.apply(entry("b", EventKind::EmailOpened, at(101, 5)));
        let (click, open) = (u64::from(points().click), u64::from(points().open));
        assert_eq!(person.score(&points(), at(101, 9)), click + open);
        assert_eq!(person.score(&points(), at(189, 9)), click + open);
        assert_eq!(person.score(&points(), at(190, 9)), open);
        assert_eq!(person.score(&points(), at(191, 9)), 0);
        for number in 0..50 {
            person.apply(entry(
                &number.to_string(),
                EventKind::PageViewed,
                at(101, number),
            ));
        }
        let capped = u64::from(points().max_per_day) * u64::from(points().page_view);
        assert_eq!(person.score(&points(), at(101, 99)), click + open + capped);
        assert_eq!(person.last_human_at, Some(at(101, 49)));
    }

    #[test]
    fn what_was_a_machines_is_taken_back() {
        let mut person = Prospect::default();
        person.apply(entry("o", EventKind::EmailOpened, at(9, 1)));
        person.apply(entry("c", EventKind::EmailClicked, at(10, 5)));
        person.revise(id("c"), false);
        person.revise(id("c"), false);
        assert_eq!(person.score(&points(), at(10, 9)), u64::from(points().open));
        assert_eq!(person.last_human_at, Some(at(9, 1)));
        assert_eq!(
            (person.campaigns[0].opened, person.campaigns[0].clicked),
            (true, false)
        );
        person.revise(id("c"), true);
        assert!(person.campaigns[0].clicked);
        assert_eq!(person.last_human_at, Some(at(10, 5)));
    }

    #[test]
    fn a_revoked_browser_takes_its_pages_along() {
        let (mut person, visitor) = (Prospect::default(), VisitorId::from_bytes([4; 16]));
        person.bind(Seen {
            visitor,
            binding: id("b"),
            since: at(9, 0),
        });
        person.apply(entry("c", EventKind::EmailClicked, at(9, 0)));
        person.apply(Entry {
            visitor: Some(visitor),
            ..entry("p", EventKind::PageViewed, at(9, 1))
        });
        let gone = person.unbind(id("b"), visitor);
        assert_eq!(gone.len(), 1);
        assert!(person.visitors.is_empty());
        assert_eq!(person.score(&points(), at(9, 9)), u64::from(points().click));
        assert_eq!(person.last_human_at, Some(at(9, 0)));
    }

    #[test]
    fn the_first_browser_in_a_message_is_remembered() {
        let (mut person, v) = (Prospect::default(), |byte| {
            VisitorId::from_bytes([byte; 16])
        });
        assert_eq!(person.clicked_before(message(1), v(1)), None);
        assert_eq!(person.clicked_before(message(1), v(1)), None);
        assert_eq!(person.clicked_before(message(1), v(2)), Some(v(1)));
    }

    #[test]
    fn a_person_fits_into_a_note() {
        let mut person = Prospect::default();
        for number in 0..1_000_i64 {
            let long = "x".repeat(200);
            person.apply(Entry {
                url: long.as_str().into(),
                campaign: format!("{number}{}", "c".repeat(120)).into(),
                message: Some(message(u32::MAX - u32::try_from(number).expect("small"))),
                visitor: Some(VisitorId::from_bytes([0xff; 16])),
                ..entry(
                    &format!("{number:012}"),
                    EventKind::EmailClicked,
                    at(number, 1),
                )
            });
        }
        let bytes = person.to_bytes();
        assert!(bytes.len() < 64 << 10, "{}", bytes.len());
        assert_eq!(Prospect::from_bytes(&bytes), Some(person));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _read = Prospect::from_bytes(&bytes);
        }
    }
}
