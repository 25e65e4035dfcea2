//! How a person is stored: what is named more than once stands in a table, once.
//!
//! A person who clicks often is read and written often, so this is small and made of few pieces:
//! ids are bytes, and texts, messages and browsers are named by their places in tables. Must not
//! decide what is kept.
//!
//! The first byte is the form. Form 1 had every id and text in full; it is read, no longer written.

use super::{Day, Entry, InCampaign, Prospect, Seen};
use model::{MessageId, Timestamp, VisitorId};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

const FORM_1: u8 = 1;
const FORM: u8 = 2;

/// Entries and what else there may be of each kind, at most: no more is kept of a person.
const MOST: usize = 1_000;
/// Bytes that a person takes, and each entry more: mostly not less than is needed.
const ALONE: usize = 256;
const ENTRY: usize = 48;
/// Entries for which there is room in a person who was just read: something new was done.
const MORE: usize = 8;

pub(super) fn write(person: &Prospect) -> Vec<u8> {
    let mut tables = Tables::default();
    let campaigns = person.campaigns.iter();
    let campaigns = campaigns.map(|of| {
        let bits = u8::from(of.opened) | u8::from(of.clicked) << 1 | u8::from(of.replied) << 2;
        (tables.text(&of.name), bits)
    });
    let campaigns = campaigns.collect();
    let mut before = 0;
    let timeline = person.timeline.iter().map(|of| {
        let at = of.at.millis();
        Happened {
            event_id: of.event_id.into_bytes(),
            code: of.code,
            step: at.wrapping_sub(std::mem::replace(&mut before, at)),
            campaign: tables.text(&of.campaign),
            message: of.message.map_or(0, |id| tables.message(id) + 1),
            url: tables.text(&of.url),
            visitor: of.visitor.map_or(0, |id| tables.visitor(id) + 1),
            human: of.human,
        }
    });
    let timeline = timeline.collect();
    let first_clicks = person.first_clicks.iter();
    let first_clicks = first_clicks.map(|(id, by)| (tables.message(*id), tables.visitor(*by)));
    let first_clicks = first_clicks.collect();
    let visitors = person.visitors.iter().map(|seen| {
        let visitor = tables.visitor(seen.visitor);
        (visitor, seen.binding.into_bytes(), seen.since)
    });
    let visitors = visitors.collect();
    let stored = Stored {
        email: Cow::Borrowed(&*person.email),
        last_human_at: person.last_human_at,
        last_delivered_at: person.last_delivered_at,
        delivery: person.delivery,
        days: Cow::Borrowed(&person.days),
        texts: tables.texts,
        messages: tables
            .messages
            .into_iter()
            .map(|id| (id.batch.to_bytes(), id.index))
            .collect(),
        browsers: tables
            .visitors
            .into_iter()
            .map(VisitorId::to_bytes)
            .collect(),
        visitors,
        campaigns,
        timeline,
        first_clicks,
    };
    let mut bytes = Vec::with_capacity(ALONE + ENTRY * stored.timeline.len());
    bytes.push(FORM);
    // A Vec grows and these types have no failing serializer: there is no error to have.
    postcard::to_extend(&stored, bytes).unwrap_or_default()
}

pub(super) fn read(bytes: &[u8]) -> Option<Prospect> {
    match bytes.split_first() {
        Some((&FORM, rest)) => postcard::from_bytes::<Stored<'_>>(rest).ok()?.person(),
        Some((&FORM_1, rest)) => Some(postcard::from_bytes::<Person1>(rest).ok()?.person()),
        Some(_) | None => None,
    }
}

/// What is named, in the order in which it was named first.
#[derive(Default)]
struct Tables<'a> {
    texts: Vec<&'a str>,
    messages: Vec<MessageId>,
    visitors: Vec<VisitorId>,
}

impl<'a> Tables<'a> {
    fn text(&mut self, text: &'a str) -> u16 {
        place_of(&mut self.texts, text)
    }

    fn message(&mut self, id: MessageId) -> u16 {
        place_of(&mut self.messages, id)
    }

    fn visitor(&mut self, id: VisitorId) -> u16 {
        place_of(&mut self.visitors, id)
    }
}

/// Where it stands; the newest are looked at first.
fn place_of<T: PartialEq>(all: &mut Vec<T>, one: T) -> u16 {
    let found = all.iter().rposition(|of| *of == one);
    let place = found.unwrap_or_else(|| {
        all.push(one);
        all.len() - 1
    });
    // There are a few hundred: what a person has is bounded.
    u16::try_from(place).unwrap_or(u16::MAX)
}

/// Form 2, with its tables. What is borrowed when it is written is owned when it was read.
#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    email: Cow<'a, str>,
    last_human_at: Option<Timestamp>,
    last_delivered_at: Option<Timestamp>,
    delivery: Option<u8>,
    days: Cow<'a, BTreeMap<u32, Day>>,
    #[serde(borrow)]
    texts: Vec<&'a str>,
    messages: Vec<([u8; 16], u32)>,
    browsers: Vec<[u8; 16]>,
    visitors: Vec<(u16, [u8; 16], Timestamp)>,
    campaigns: Vec<(u16, u8)>,
    timeline: Vec<Happened>,
    first_clicks: Vec<(u16, u16)>,
}

/// An [`Entry`]; of message and visitor the place and one more, 0: none.
#[derive(Serialize, Deserialize)]
struct Happened {
    event_id: [u8; 16],
    code: u8,
    /// Since the one before.
    step: i64,
    campaign: u16,
    message: u16,
    url: u16,
    visitor: u16,
    human: bool,
}

impl Stored<'_> {
    /// `None` when it names what is not in a table.
    fn person(self) -> Option<Prospect> {
        let texts: Vec<Arc<str>> = self.texts.into_iter().map(Arc::from).collect();
        let text = |at: u16| texts.get(usize::from(at)).cloned();
        let messages: Vec<MessageId> = self
            .messages
            .into_iter()
            .map(|(batch, index)| MessageId {
                batch: model::BatchId::from_bytes(batch),
                index,
            })
            .collect();
        let message = |at: u16| messages.get(usize::from(at)).copied();
        let browsers = self.browsers;
        let browser = |at: u16| {
            let bytes = browsers.get(usize::from(at)).copied();
            bytes.map(VisitorId::from_bytes)
        };
        if self.timeline.len() > MOST {
            return None;
        }
        let mut at = 0_i64;
        let mut timeline = Vec::with_capacity(self.timeline.len() + MORE);
        for of in self.timeline {
            at = at.wrapping_add(of.step);
            timeline.push(Entry {
                event_id: Uuid::from_bytes(of.event_id),
                code: of.code,
                at: Timestamp::from_millis(at),
                campaign: text(of.campaign)?,
                message: match of.message.checked_sub(1) {
                    Some(place) => Some(message(place)?),
                    None => None,
                },
                url: text(of.url)?,
                visitor: match of.visitor.checked_sub(1) {
                    Some(place) => Some(browser(place)?),
                    None => None,
                },
                human: of.human,
            });
        }
        let campaigns = self.campaigns.into_iter().map(|(name, bits)| {
            Some(InCampaign {
                name: text(name)?,
                opened: bits & 1 != 0,
                clicked: bits & 2 != 0,
                replied: bits & 4 != 0,
            })
        });
        let visitors = self.visitors.into_iter().map(|(visitor, binding, since)| {
            Some(Seen {
                visitor: browser(visitor)?,
                binding: Uuid::from_bytes(binding),
                since,
            })
        });
        let first_clicks = self.first_clicks.into_iter();
        let first_clicks = first_clicks.map(|(id, by)| Some((message(id)?, browser(by)?)));
        Some(Prospect {
            email: self.email.into(),
            last_human_at: self.last_human_at,
            last_delivered_at: self.last_delivered_at,
            delivery: self.delivery,
            days: self.days.into_owned(),
            visitors: visitors.collect::<Option<_>>()?,
            campaigns: campaigns.collect::<Option<_>>()?,
            timeline,
            first_clicks: first_clicks.collect::<Option<_>>()?,
        })
    }
}

/// Form 1.
#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct Person1 {
    email: Box<str>,
    last_human_at: Option<Timestamp>,
    last_delivered_at: Option<Timestamp>,
    delivery: Option<u8>,
    days: BTreeMap<u32, Day>,
    visitors: Vec<Seen1>,
    campaigns: Vec<Campaign1>,
    timeline: Vec<Entry1>,
    first_clicks: Vec<(Box<str>, VisitorId)>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct Seen1 {
    visitor: VisitorId,
    binding: Box<str>,
    since: Timestamp,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct Campaign1 {
    name: Box<str>,
    opened: bool,
    clicked: bool,
    replied: bool,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(Serialize))]
struct Entry1 {
    event_id: Box<str>,
    code: u8,
    at: Timestamp,
    campaign: Box<str>,
    message_id: Box<str>,
    url: Box<str>,
    visitor: Option<VisitorId>,
    human: bool,
}

impl Person1 {
    /// Ids were what they still are, as text.
    fn person(self) -> Prospect {
        let id = |text: &str| text.parse().unwrap_or(Uuid::nil());
        let visitors = self.visitors.into_iter().map(|of| Seen {
            visitor: of.visitor,
            binding: id(&of.binding),
            since: of.since,
        });
        let campaigns = self.campaigns.into_iter().map(|of| InCampaign {
            name: of.name.into(),
            opened: of.opened,
            clicked: of.clicked,
            replied: of.replied,
        });
        let timeline = self.timeline.into_iter().map(|of| Entry {
            event_id: id(&of.event_id),
            code: of.code,
            at: of.at,
            campaign: of.campaign.into(),
            message: of.message_id.parse().ok(),
            url: of.url.into(),
            visitor: of.visitor,
            human: of.human,
        });
        let clicks = self.first_clicks.into_iter();
        let clicks = clicks.filter_map(|(message, by)| Some((message.parse().ok()?, by)));
        Prospect {
            email: self.email,
            last_human_at: self.last_human_at,
            last_delivered_at: self.last_delivered_at,
            delivery: self.delivery,
            days: self.days,
            visitors: visitors.collect(),
            campaigns: campaigns.collect(),
            timeline: timeline.collect(),
            first_clicks: clicks.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{BatchId, DeliveryStatus, EventKind};
    use proptest::prelude::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(1_763_769_600_000 + millis)
    }

    #[test]
    fn what_form_1_said_is_read() {
        let (event, binding) = (Uuid::from_u128(5), Uuid::from_u128(6));
        let message = MessageId {
            batch: BatchId::from_bytes([7; 16]),
            index: 41,
        };
        let visitor = VisitorId::from_bytes([8; 16]);
        let old = Person1 {
            email: "a@x.example".into(),
            last_human_at: Some(at(1)),
            last_delivered_at: None,
            delivery: Some(DeliveryStatus::Ok.code()),
            days: BTreeMap::from([(
                20_400,
                Day {
                    clicks: 2,
                    ..Day::default()
                },
            )]),
            visitors: vec![Seen1 {
                visitor,
                binding: binding.to_string().into(),
                since: at(2),
            }],
            campaigns: vec![Campaign1 {
                name: "spring".into(),
                opened: true,
                clicked: false,
                replied: true,
            }],
            timeline: vec![Entry1 {
                event_id: event.to_string().into(),
                code: EventKind::EmailClicked.code(),
                at: at(3),
                campaign: "spring".into(),
                message_id: message.to_string().into(),
                url: "https://x.example/".into(),
                visitor: Some(visitor),
                human: true,
            }],
            first_clicks: vec![(message.to_string().into(), visitor)],
        };
        let bytes = postcard::to_extend(&old, vec![FORM_1]).expect("bytes");
        let person = read(&bytes).expect("a person");
        assert_eq!(person.delivery_status(), DeliveryStatus::Ok);
        assert_eq!(
            person.visitors,
            [Seen {
                visitor,
                binding,
                since: at(2)
            }]
        );
        assert!(person.campaigns[0].opened && person.campaigns[0].replied);
        let entry = Entry {
            campaign: "spring".into(),
            message: Some(message),
            url: "https://x.example/".into(),
            visitor: Some(visitor),
            human: true,
            ..Entry::new(event, EventKind::EmailClicked, at(3))
        };
        assert_eq!(person.timeline, [entry]);
        assert_eq!(person.first_clicks, [(message, visitor)]);
        assert_eq!(person.days[&20_400].clicks, 2);
        let written = write(&person);
        assert_eq!(read(&written), Some(person));
        assert!(written.len() < bytes.len());
    }

    prop_compose! {
        fn any_entry()(
            id: u128, code in 0_u8..30, millis in 0_i64..9_999_999,
            (campaign, message, url, visitor) in (0_u8..3, 0_u32..4, 0_u8..4, 0_u8..3), human: bool,
        ) -> Entry {
            Entry {
                event_id: Uuid::from_u128(id),
                code,
                at: at(millis),
                campaign: "c".repeat(campaign.into()).into(),
                message: message.checked_sub(1).map(|index| MessageId {
                    batch: BatchId::from_bytes([1; 16]),
                    index,
                }),
                url: "u".repeat(url.into()).into(),
                visitor: visitor.checked_sub(1).map(|byte| VisitorId::from_bytes([byte; 16])),
                human,
            }
        }
    }

    proptest! {
        #[test]
        fn a_person_reads_back(entries in prop::collection::vec(any_entry(), 0..150)) {
            let mut person = Prospect::default();
            for entry in entries {
                if let (Some(message), Some(visitor)) = (entry.message, entry.visitor) {
                    person.clicked_before(message, visitor);
                    person.bind(Seen { visitor, binding: entry.event_id, since: entry.at });
                }
                person.apply(entry);
            }
            prop_assert_eq!(read(&write(&person)), Some(person));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, form in 0_u8..4) {
            let _read = read(&[&[form], bytes.as_slice()].concat());
        }
    }
}
