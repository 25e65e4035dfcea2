//! The text of an event: JSON, as campaign systems read it (contract, section 5).
//!
//! Where events are kept as text this is what costs most of a hit on its way to the store, so the
//! fields that every event has are written here, and not by a general serializer, which takes more
//! than twice as long for a click. What must be escaped, and what is rare, is still that one's. Must
//! not know where an event comes from: `tell` does.

use crate::tell::{Details, HitDetails, Line, Recipient};
use serde::Serialize;
use std::fmt::{Display, Write as _};

/// A text that is being written. Nothing that is put in can fail to be written.
pub(crate) struct Text(String);

/// The text of an event, in a piece of memory of this size at first.
pub(crate) fn text_of(line: &Line<'_>, bytes: usize) -> Vec<u8> {
    let mut text = Text(String::with_capacity(bytes));
    text.line(line);
    text.0.into_bytes()
}

impl Text {
    fn line(&mut self, line: &Line<'_>) {
        self.put("{\"id\":\"");
        let mut id = [0; uuid::fmt::Hyphenated::LENGTH];
        self.put(line.id.hyphenated().encode_lower(&mut id));
        self.put("\",\"seq\":");
        self.shown(line.seq);
        self.put(",\"type\":\"");
        self.put(line.kind.as_str());
        self.put("\",\"occurred_at\":\"");
        self.shown(line.occurred_at);
        self.put("\",\"recorded_at\":\"");
        self.shown(line.recorded_at);
        self.put("\",\"account\":");
        self.quoted(&line.account);
        self.put(",\"campaign\":");
        self.quoted_or_null(line.campaign.as_deref());
        self.put(",\"batch_id\":");
        self.shown_or_null(line.batch_id);
        self.put(",\"message_id\":");
        self.shown_or_null(line.message_id);
        self.put(",\"variant\":");
        self.quoted_or_null(line.variant.as_deref());
        self.put(",\"recipient\":");
        self.recipient(line.recipient.as_ref());
        self.put(",\"metadata\":");
        self.value(&line.metadata);
        self.put(",\"data\":");
        match &line.data {
            Details::Hit(hit) => self.hit(hit),
            rare => self.value(rare),
        }
        self.put("}");
    }

    fn recipient(&mut self, of: Option<&Recipient<'_>>) {
        let Some(of) = of else {
            return self.put("null");
        };
        self.put("{\"email\":");
        self.quoted(&of.email);
        self.put(",\"prospect_id\":");
        self.quoted_or_null(of.prospect_id.as_deref());
        self.put("}");
    }

    fn hit(&mut self, hit: &HitDetails<'_>) {
        self.put("{\"actor\":\"");
        self.put(hit.actor.as_str());
        self.put("\",\"machine_reasons\":");
        self.value(hit.machine_reasons);
        self.put(",\"rules\":");
        self.shown(hit.rules);
        self.put(",\"hit\":\"");
        self.shown(hit.hit);
        self.put("\",\"link\":");
        match hit.link {
            Some(link) => self.shown(link),
            None => self.put("null"),
        }
        self.put(",\"url\":");
        self.quoted_or_null(hit.url);
        self.put(",\"user_agent\":");
        self.quoted(hit.user_agent);
        self.put(",\"network\":");
        self.quoted(hit.network);
        self.put(",\"visitor\":");
        self.shown_or_null(hit.visitor);
        self.put("}");
    }

    fn put(&mut self, text: &str) {
        self.0.push_str(text);
    }

    /// A number or a time or an id: nothing in it is to be escaped.
    fn shown(&mut self, value: impl Display) {
        let written = write!(self.0, "{value}");
        debug_assert!(written.is_ok(), "a string takes everything");
    }

    fn shown_or_null(&mut self, value: Option<impl Display>) {
        match value {
            Some(value) => {
                self.put("\"");
                self.shown(value);
                self.put("\"");
            }
            None => self.put("null"),
        }
    }

    fn quoted(&mut self, text: &str) {
        // Without an early end: many bytes are looked at in one instruction.
        let escaped = |byte: u8| byte < 0x20 || byte == b'"' || byte == b'\\';
        if text.bytes().fold(false, |any, byte| any | escaped(byte)) {
            return self.value(text);
        }
        self.put("\"");
        self.put(text);
        self.put("\"");
    }

    fn quoted_or_null(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.quoted(text),
            None => self.put("null"),
        }
    }

    /// What a general serializer writes. Texts, numbers and trees of them never fail.
    fn value(&mut self, value: &(impl Serialize + ?Sized)) {
        let written = serde_json::to_string(value);
        debug_assert!(written.is_ok(), "{written:?}");
        self.put(written.as_deref().unwrap_or("null"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tell::{Told, bare};
    use model::{
        Actor, BatchId, Event, EventKind, FactId, JournalId, MessageId, Timestamp, VisitorId,
    };
    use proptest::prelude::*;
    use std::borrow::Cow;

    proptest! {
        #[test]
        fn a_text_reads_back_as_its_event(
            (account, email, agent) in (".*", ".{0,40}", "\\PC*"),
            (campaign, variant, prospect) in any::<(Option<String>, Option<String>, Option<String>)>(),
            (network, url, reasons) in any::<(String, Option<String>, Vec<String>)>(),
            (id, seq, journal) in any::<(u128, u64, [u8; 16])>(),
            (batch, index, link) in any::<(Option<[u8; 16]>, Option<u32>, Option<u16>)>(),
            (at, recorded) in (0..253_402_300_799_999_i64, 0..253_402_300_799_999_i64),
            (visitor, rules, metadata) in any::<(Option<[u8; 16]>, u16, Option<String>)>(),
            is_of_someone: bool,
        ) {
            let reasons: Vec<Box<str>> = reasons.into_iter().map(Box::from).collect();
            let batch_id = batch.map(BatchId::from_bytes);
            let told = Told {
                kind: EventKind::EmailClicked,
                occurred_at: Timestamp::from_millis(at),
                identity: String::new(),
                data: Details::Hit(HitDetails {
                    actor: Actor::Unknown,
                    machine_reasons: &reasons,
                    rules,
                    hit: FactId { journal: JournalId::from_bytes(journal), seq },
                    link,
                    url: url.as_deref(),
                    user_agent: &agent,
                    network: &network,
                    visitor: visitor.map(VisitorId::from_bytes),
                }),
            };
            let line = Line {
                id: uuid::Uuid::from_u128(id),
                campaign: campaign.map(Cow::Owned),
                batch_id,
                message_id: batch_id.zip(index).map(|(batch, index)| MessageId { batch, index }),
                variant: variant.map(Cow::Owned),
                recipient: is_of_someone.then(|| Recipient {
                    email: email.into(),
                    prospect_id: prospect.map(Cow::Owned),
                }),
                metadata: Cow::Owned(serde_json::json!({ "given": metadata })),
                ..bare(told, seq, Timestamp::from_millis(recorded), &account)
            };
            let text = String::from_utf8(text_of(&line, 768)).unwrap();
            prop_assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), Event::from(line));
        }
    }
}
