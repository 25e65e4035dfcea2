//! The report of a batch: rates, over time, per destination, per link, per variant.
//!
//! Owns tallies: what the events of a batch add up to, kept with the place in the event stream up to
//! which that is, so that a report that is asked for again reads only what is new. A few bytes for
//! each recipient, for a few batches. The counters of the batch are the truth for the sums; where
//! events are no longer kept, the rest begins with the oldest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use model::units::format_duration;
use model::{BatchId, Class, Counters, Event, EventKind, Timestamp};
use serde::Serialize;
use store::EventQuery;
use tokio::sync::Mutex;

use super::Api;
use super::auth::CanRead;
use super::batches::{BatchView, visible};
use super::params::{NoParams, Segment};
use super::problem::Answer;

/// Batches whose tallies are kept.
const KEPT: usize = 16;
/// The most destinations and links that are told apart; then `other`.
const GROUPS_MAX: usize = 1_000;
/// The most points of a series, and how far apart they may be.
const POINTS_MAX: usize = 200;
const STEPS: [Duration; 7] = [
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(900),
    Duration::from_secs(3_600),
    Duration::from_secs(6 * 3_600),
    Duration::from_secs(24 * 3_600),
    Duration::from_secs(7 * 24 * 3_600),
];
const OTHER: &str = "other";
const MINUTE: i64 = 60_000;

const KINDS: [EventKind; 10] = [
    EventKind::EmailDelivered,
    EventKind::EmailBounced,
    EventKind::EmailFailed,
    EventKind::EmailSuppressed,
    EventKind::EmailCancelled,
    EventKind::EmailOpened,
    EventKind::EmailClicked,
    EventKind::EmailComplained,
    EventKind::EmailUnsubscribed,
    EventKind::EmailReplied,
];

/// Recipients of a group by what became of them; each counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Group {
    delivered: u64,
    bounce: u64,
    /// Of these, refused as spam.
    spam: u64,
    failed: u64,
    suppressed: u64,
    cancelled: u64,
    complained: u64,
    unsubscribed: u64,
    replied: u64,
    opened: u64,
    opened_human: u64,
    clicked: u64,
    clicked_human: u64,
}

/// A group with its name and rates.
#[derive(Debug, Serialize)]
struct NamedGroup {
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
    #[serde(flatten)]
    group: Group,
    rates: GroupRates,
}

#[derive(Debug, Serialize)]
struct GroupRates {
    /// Of what has an end.
    delivered: Option<f64>,
    bounce: Option<f64>,
    /// Of the delivered.
    opened: Option<f64>,
    opened_human: Option<f64>,
    clicked: Option<f64>,
    clicked_human: Option<f64>,
    /// Clicked of the opened.
    click_to_open: Option<f64>,
    click_to_open_human: Option<f64>,
}

impl From<&Group> for GroupRates {
    fn from(of: &Group) -> Self {
        let ended = of.delivered + of.bounce + of.failed + of.suppressed + of.cancelled;
        Self {
            delivered: share(of.delivered, ended),
            bounce: share(of.bounce, ended),
            opened: share(of.opened, of.delivered),
            opened_human: share(of.opened_human, of.delivered),
            clicked: share(of.clicked, of.delivered),
            clicked_human: share(of.clicked_human, of.delivered),
            click_to_open: share(of.clicked, of.opened),
            click_to_open_human: share(of.clicked_human, of.opened_human),
        }
    }
}

/// What happened in a span of time: facts, not recipients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Point {
    delivered: u64,
    bounce: u64,
    failed: u64,
    opened: u64,
    opened_human: u64,
    clicked: u64,
    clicked_human: u64,
    complained: u64,
    unsubscribed: u64,
}

impl Point {
    fn add(&mut self, other: &Self) {
        self.delivered += other.delivered;
        self.bounce += other.bounce;
        self.failed += other.failed;
        self.opened += other.opened;
        self.opened_human += other.opened_human;
        self.clicked += other.clicked;
        self.clicked_human += other.clicked_human;
        self.complained += other.complained;
        self.unsubscribed += other.unsubscribed;
    }
}

#[derive(Debug, Serialize)]
struct PointView {
    at: Timestamp,
    #[serde(flatten)]
    point: Point,
}

#[derive(Debug, Serialize)]
struct Series {
    /// How far apart the points are.
    interval: String,
    points: Vec<PointView>,
}

/// What became of a link.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
struct Link {
    link: Option<u64>,
    url: Option<String>,
    clicks: u64,
    clicks_human: u64,
    /// Recipients.
    clicked: u64,
    clicked_human: u64,
}

/// What is known of a recipient, in bits.
mod bit {
    pub(super) const DELIVERED: u8 = 1;
    pub(super) const OPENED: u8 = 2;
    pub(super) const OPENED_HUMAN: u8 = 4;
    pub(super) const CLICKED: u8 = 8;
    pub(super) const CLICKED_HUMAN: u8 = 16;
    pub(super) const ENDED: u8 = 32;
}

/// What the events of a batch add up to.
#[derive(Debug, Default)]
struct Tally {
    cursor: Option<String>,
    /// By index: bits, the number of the destination, that of the variant.
    recipients: Vec<(u8, u16, u8)>,
    destinations: Names,
    variants: Names,
    by_destination: Vec<Group>,
    by_variant: Vec<Group>,
    minutes: BTreeMap<i64, Point>,
    links: HashMap<String, Link>,
    /// Which recipients followed which link, and whether a person.
    followed: HashSet<(u64, u32, bool)>,
}

/// Names with their numbers.
#[derive(Debug, Default)]
struct Names {
    numbers: HashMap<String, u16>,
    names: Vec<String>,
}

impl Names {
    fn number(&mut self, name: &str) -> u16 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let name = if self.names.len() >= GROUPS_MAX {
            OTHER
        } else {
            name
        };
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = u16::try_from(self.names.len()).unwrap_or(u16::MAX);
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), number);
        number
    }
}

impl Tally {
    fn take(&mut self, event: &Event) {
        let Some(message) = event.message_id else {
            return;
        };
        let human = event.data["actor"] == "human";
        let index = usize::try_from(message.index).unwrap_or(usize::MAX);
        if self.recipients.len() <= index {
            self.recipients.resize(index + 1, (0, u16::MAX, 0));
        }
        self.take_place(event, index);
        let minute = event.occurred_at.millis().div_euclid(MINUTE);
        let point = self.minutes.entry(minute).or_default();
        let Some((bits, destination, variant)) = self.recipients.get_mut(index) else {
            return;
        };
        let before = *bits;
        let mut first = |bit: u8| {
            let is_first = *bits & bit == 0;
            *bits |= bit;
            u64::from(is_first)
        };
        let mut change = Group::default();
        match event.kind {
            EventKind::EmailDelivered => {
                point.delivered += 1;
                change.delivered = first(bit::DELIVERED);
            }
            EventKind::EmailBounced => {
                point.bounce += 1;
                change.bounce = first(bit::ENDED);
                if event.data["class"] == Class::SpamContent.as_str() {
                    change.spam = change.bounce;
                }
            }
            EventKind::EmailFailed => {
                point.failed += 1;
                change.failed = first(bit::ENDED);
            }
            EventKind::EmailSuppressed => change.suppressed = first(bit::ENDED),
            EventKind::EmailCancelled => change.cancelled = first(bit::ENDED),
            EventKind::EmailOpened => {
                point.opened += 1;
                change.opened = first(bit::OPENED);
                if human {
                    point.opened_human += 1;
                    change.opened_human = first(bit::OPENED_HUMAN);
                }
            }
            EventKind::EmailClicked => {
                point.clicked += 1;
                change.clicked = first(bit::CLICKED);
                if human {
                    point.clicked_human += 1;
                    change.clicked_human = first(bit::CLICKED_HUMAN);
                }
            }
            EventKind::EmailComplained => {
                point.complained += 1;
                change.complained = 1;
            }
            EventKind::EmailUnsubscribed => {
                point.unsubscribed += 1;
                change.unsubscribed = 1;
            }
            EventKind::EmailReplied => change.replied = 1,
            _ => return,
        }
        // What was delivered may bounce later: then it is no longer delivered.
        let undelivered = change.bounce > 0 && before & bit::DELIVERED != 0;
        for group in [
            self.by_destination.get_mut(usize::from(*destination)),
            self.by_variant.get_mut(usize::from(*variant)),
        ]
        .into_iter()
        .flatten()
        {
            group.add(&change);
            group.delivered -= u64::from(undelivered);
        }
        if event.kind == EventKind::EmailClicked {
            self.take_click(event, message.index, human);
        }
    }

    /// Where the recipient belongs: the destination that took it, or else its domain.
    fn take_place(&mut self, event: &Event, index: usize) {
        let unknown = self
            .recipients
            .get(index)
            .is_some_and(|known| known.1 == u16::MAX);
        if !unknown {
            return;
        }
        let named = event.data["destination"].as_str();
        let email = event.recipient.as_ref().map(|of| of.email.as_str());
        let domain = email.and_then(|email| Some(email.rsplit_once('@')?.1));
        let destination = self.destinations.number(named.or(domain).unwrap_or(OTHER));
        let variant = self.variants.number(event.variant.as_deref().unwrap_or(""));
        let variant = u8::try_from(variant).unwrap_or(u8::MAX);
        if let Some(known) = self.recipients.get_mut(index) {
            (known.1, known.2) = (destination, variant);
        }
        self.by_destination
            .resize(self.destinations.names.len(), Group::default());
        self.by_variant
            .resize(self.variants.names.len(), Group::default());
    }

    fn take_click(&mut self, event: &Event, index: u32, human: bool) {
        let number = event.data["link"].as_u64();
        let url = event.data["url"].as_str().map(str::to_owned);
        let key = match (number, &url) {
            (Some(number), _) => number.to_string(),
            (None, Some(url)) => url.clone(),
            (None, None) => OTHER.to_owned(),
        };
        let full = self.links.len() >= GROUPS_MAX && !self.links.contains_key(&key);
        let key = if full { OTHER.to_owned() } else { key };
        let link = self.links.entry(key).or_insert_with(|| Link {
            link: number.filter(|_| !full),
            url: url.filter(|_| !full),
            ..Link::default()
        });
        let number = number.unwrap_or(u64::MAX);
        link.clicks += 1;
        link.clicked += u64::from(self.followed.insert((number, index, false)));
        if human {
            link.clicks_human += 1;
            link.clicked_human += u64::from(self.followed.insert((number, index, true)));
        }
    }

    fn series(&self) -> Series {
        let span = |minutes: &BTreeMap<i64, Point>| {
            let (first, last) = (minutes.keys().next()?, minutes.keys().next_back()?);
            Some(last - first)
        };
        let span = span(&self.minutes).unwrap_or(0);
        let minutes = |step: &Duration| i64::try_from(step.as_secs() / 60).unwrap_or(1).max(1);
        let most = i64::try_from(POINTS_MAX).unwrap_or(1);
        let fits = |step: &&Duration| span / minutes(step) < most;
        let step = STEPS.iter().find(fits).unwrap_or(&STEPS[STEPS.len() - 1]);
        let mut points: BTreeMap<i64, Point> = BTreeMap::new();
        for (minute, point) in &self.minutes {
            let begin = minute.div_euclid(minutes(step)) * minutes(step);
            points.entry(begin).or_default().add(point);
        }
        let view = |(minute, point): (i64, Point)| PointView {
            at: Timestamp::from_millis(minute * MINUTE),
            point,
        };
        Series {
            interval: format_duration(*step),
            points: points.into_iter().map(view).collect(),
        }
    }

    fn destinations(&self) -> Vec<NamedGroup> {
        let groups = self.destinations.names.iter().zip(&self.by_destination);
        let mut all: Vec<_> = groups
            .map(|(name, group)| NamedGroup {
                destination: Some(name.clone()),
                variant: None,
                rates: group.into(),
                group: *group,
            })
            .collect();
        all.sort_by_key(|of| std::cmp::Reverse(of.group.delivered + of.group.bounce));
        all
    }

    fn variants(&self) -> Vec<NamedGroup> {
        let groups = self.variants.names.iter().zip(&self.by_variant);
        let mut all: Vec<_> = groups
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, group)| NamedGroup {
                destination: None,
                variant: Some(name.clone()),
                rates: group.into(),
                group: *group,
            })
            .collect();
        all.sort_by(|a, b| a.variant.cmp(&b.variant));
        all
    }

    fn warnings(&self) -> Vec<String> {
        let spam = self.by_destination.iter().map(|group| group.spam).sum();
        let tell = |spam: u64| {
            format!(
                "refused as spam: {spam}; what is sent or who sends it is at fault, not the recipients"
            )
        };
        (spam > 0).then(|| tell(spam)).into_iter().collect()
    }

    fn links(&self) -> Vec<Link> {
        let mut all: Vec<Link> = self.links.values().cloned().collect();
        all.sort_by(|a, b| b.clicks.cmp(&a.clicks).then_with(|| a.url.cmp(&b.url)));
        all
    }
}

impl Group {
    fn add(&mut self, other: &Self) {
        self.delivered += other.delivered;
        self.bounce += other.bounce;
        self.spam += other.spam;
        self.failed += other.failed;
        self.suppressed += other.suppressed;
        self.cancelled += other.cancelled;
        self.complained += other.complained;
        self.unsubscribed += other.unsubscribed;
        self.replied += other.replied;
        self.opened += other.opened;
        self.opened_human += other.opened_human;
        self.clicked += other.clicked;
        self.clicked_human += other.clicked_human;
    }
}

/// The tallies of this process.
#[derive(Debug, Default)]
pub(crate) struct Reports(StdMutex<HashMap<BatchId, Arc<Mutex<Tally>>>>);

impl Reports {
    fn of(&self, batch: BatchId) -> Arc<Mutex<Tally>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT && !all.contains_key(&batch) {
            // Whoever is asked for next begins anew.
            all.clear();
        }
        Arc::clone(all.entry(batch).or_default())
    }
}

/// The report as it is shown.
#[derive(Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    batch: BatchView,
    rates: Rates,
    variants: Vec<NamedGroup>,
    destinations: Vec<NamedGroup>,
    links: Vec<Link>,
    series: Series,
    /// What whoever runs the campaign should know.
    warnings: Vec<String>,
}

/// Shares between 0 and 1; none where there is nothing to divide by.
#[derive(Debug, PartialEq, Serialize)]
struct Rates {
    /// Of the accepted.
    delivered: Option<f64>,
    bounce: Option<f64>,
    failed: Option<f64>,
    suppressed: Option<f64>,
    /// Of the delivered.
    opened: Option<f64>,
    opened_human: Option<f64>,
    clicked: Option<f64>,
    clicked_human: Option<f64>,
    unsubscribed: Option<f64>,
    complained: Option<f64>,
    replied: Option<f64>,
    /// Clicked of the opened.
    click_to_open: Option<f64>,
    click_to_open_human: Option<f64>,
}

impl From<Counters> for Rates {
    fn from(c: Counters) -> Self {
        let of_accepted = |count| share(count, c.accepted);
        let of_delivered = |count| share(count, c.delivered);
        Self {
            delivered: of_accepted(c.delivered),
            bounce: of_accepted(c.bounce),
            failed: of_accepted(c.failed),
            suppressed: of_accepted(c.suppressed),
            opened: of_delivered(c.opened_unique),
            opened_human: of_delivered(c.opened_unique_human),
            clicked: of_delivered(c.clicked_unique),
            clicked_human: of_delivered(c.clicked_unique_human),
            unsubscribed: of_delivered(c.unsubscribed),
            complained: of_delivered(c.complained),
            replied: of_delivered(c.replied),
            click_to_open: share(c.clicked_unique, c.opened_unique),
            click_to_open_human: share(c.clicked_unique_human, c.opened_unique_human),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "beyond 2^53 recipients a rate has other problems"
)]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// `GET /v1/batches/{id}/report`
pub(super) async fn report(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    Segment(id): Segment,
    _: NoParams,
) -> Answer<Json<Report>> {
    let batch = visible(&api, &caller, &id).await?;
    let tally = api.reports.of(batch.head.id);
    let mut tally = tally.lock().await;
    loop {
        let page = api
            .store
            .events(EventQuery {
                after: tally.cursor.clone(),
                account: None,
                kinds: KINDS.to_vec(),
                batch: Some(batch.head.id),
                limit: 1_000,
            })
            .await?;
        page.events.iter().for_each(|event| tally.take(event));
        tally.cursor = Some(page.next);
        if page.events.is_empty() {
            break;
        }
    }
    Ok(Json(Report {
        rates: batch.counters.into(),
        variants: tally.variants(),
        destinations: tally.destinations(),
        links: tally.links(),
        series: tally.series(),
        warnings: tally.warnings(),
        batch: api.view(batch).await?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::MessageId;
    use serde_json::{Value, json};

    fn event(kind: EventKind, index: u32, minute: i64, data: Value) -> Event {
        let batch = BatchId::from_bytes([1; 16]);
        let event = json!({
            "id": "019aa571-f3e7-7000-8000-000000000000", "seq": 1, "type": kind,
            "occurred_at": Timestamp::from_millis(minute * MINUTE + 5),
            "recorded_at": Timestamp::from_millis(0), "account": "acme", "campaign": null,
            "batch_id": batch, "message_id": MessageId { batch, index }, "variant": null,
            "recipient": {"email": format!("a@d{}.example", index % 2), "prospect_id": null},
            "metadata": {}, "data": data,
        });
        serde_json::from_value(event).expect("an event")
    }

    #[test]
    fn events_add_up() {
        let mut tally = Tally::default();
        let gmail = || json!({"destination": "gmail"});
        let (human, machine) = (
            json!({"actor": "human", "link": 3, "url": "https://x/"}),
            json!({"actor": "machine", "link": 3, "url": "https://x/"}),
        );
        for (kind, index, minute, data) in [
            (EventKind::EmailDelivered, 0, 0, gmail()),
            (EventKind::EmailDelivered, 2, 1, gmail()),
            (EventKind::EmailBounced, 1, 1, json!({})),
            (EventKind::EmailOpened, 0, 2, machine.clone()),
            (EventKind::EmailOpened, 0, 300, human.clone()),
            (EventKind::EmailClicked, 0, 300, human.clone()),
            (EventKind::EmailClicked, 0, 301, human),
            (EventKind::EmailClicked, 2, 301, machine),
            (EventKind::EmailBounced, 2, 400, json!({})),
        ] {
            tally.take(&event(kind, index, minute, data));
        }
        let groups = tally.destinations();
        assert_eq!(groups[0].destination.as_deref(), Some("gmail"));
        let gmail = groups[0].group;
        assert_eq!((gmail.delivered, gmail.bounce), (1, 1));
        assert_eq!(
            (
                gmail.opened,
                gmail.opened_human,
                gmail.clicked,
                gmail.clicked_human
            ),
            (1, 1, 2, 1)
        );
        assert_eq!(groups[1].destination.as_deref(), Some("d1.example"));
        assert_eq!(groups[0].rates.click_to_open_human, Some(1.0));
        let links = tally.links();
        assert_eq!(
            (
                links.len(),
                links[0].clicks,
                links[0].clicked,
                links[0].clicked_human
            ),
            (1, 3, 2, 1)
        );
        let series = tally.series();
        assert_eq!(series.interval, "5m");
        assert_eq!(series.points[0].point.delivered, 2);
        assert_eq!(series.points.len(), 3);
        assert!(tally.variants().is_empty());
    }

    #[test]
    fn rates_follow_from_counters() {
        let counters = Counters {
            accepted: 8,
            delivered: 4,
            bounce: 2,
            opened_unique: 2,
            clicked_unique: 1,
            ..Counters::default()
        };
        let rates = Rates::from(counters);
        assert_eq!(
            (rates.delivered, rates.bounce, rates.failed),
            (Some(0.5), Some(0.25), Some(0.0))
        );
        assert_eq!(
            (rates.opened, rates.clicked, rates.click_to_open),
            (Some(0.5), Some(0.25), Some(0.5))
        );
        assert_eq!(
            (
                rates.click_to_open_human,
                Rates::from(Counters::default()).delivered
            ),
            (None, None)
        );
    }
}
