//! Events: stored as references, told in full.
//!
//! Owns ids, cursors and the `data` of each type (contract, section 5). An id is computed from
//! the fact's journal and sequence, so a fact has the same one whenever and wherever it is told.
//! Must not change anything.

use super::cache::Lot;
use super::feeds::{self, Feed};
use super::ids::{self, LotId};
use super::readers::Reading;
use super::record::{By, record};
use crate::form::{self, EventBlock, LogBlock, StoredEvent, version};
use crate::{BatchHead, EventPage, EventQuery, Result, StoreError};
use model::{
    Attempt, AttemptResult, Event, EventKind, EventRecipient, Fact, Hit, HitKind, MessageId, Row,
    RuleRef, Timestamp, partition_hash,
};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// Bits of a sequence number for the place in a block.
const ORDINAL_BITS: u32 = 20;
const ORDINALS: i64 = (1 << ORDINAL_BITS) - 1;

/// Reads a cursor: the sequence number of the last event told. Only what [`write_cursor`] writes.
pub(super) fn read_cursor(text: &str) -> Result<i64> {
    let number = text
        .strip_prefix("e1-")
        .and_then(|number| number.parse().ok())
        .filter(|number| *number >= 0 && write_cursor(*number) == text);
    number.ok_or_else(|| StoreError::Refused("is no cursor of events".into()))
}

/// The sequence number after which there is no event yet.
pub(super) fn end(connection: &Connection) -> Result<i64> {
    let last = feeds::last(connection, Feed::Events)?;
    Ok(if last == 0 {
        0
    } else {
        last << ORDINAL_BITS | ORDINALS
    })
}

fn write_cursor(seq: i64) -> String {
    format!("e1-{seq}")
}

/// What a page is gathered with.
struct Telling<'a> {
    reading: &'a Reading<'a>,
    query: &'a EventQuery,
    batch: Option<i64>,
    logs: HashMap<i64, Arc<LogBlock>>,
}

/// Events after a cursor.
pub(super) fn page(reading: &Reading<'_>, query: &EventQuery) -> Result<EventPage> {
    let after = query.after.as_deref().map_or(Ok(0), read_cursor)?;
    let end = end(reading.connection)?;
    if after > end {
        return Err(StoreError::Refused(
            "is beyond the newest event: a cursor of another store".into(),
        ));
    }
    let batch = match query.batch {
        None => None,
        Some(id) => match record(reading.connection, By::Id(id.to_bytes()))? {
            Some(batch) => Some(batch.no),
            // Should it come to be, its events will come after this moment.
            None => {
                return Ok(EventPage {
                    events: Vec::new(),
                    next: write_cursor(end),
                });
            }
        },
    };
    let limit = usize::try_from(query.limit.clamp(1, 1_000)).unwrap_or(1);
    let mask = query
        .kinds
        .iter()
        .fold(0_i64, |mask, kind| mask | 1 << kind.code());
    let mask = if mask == 0 { i64::MAX } else { mask };
    let mut sql = reading.connection.prepare_cached(
        "SELECT id, recorded_at, data FROM event WHERE id>=?1 AND (kinds & ?2)<>0 AND (?3 IS NULL OR batch IN (0, ?3)) ORDER BY id",
    )?;
    let mut blocks = sql.query(params![after >> ORDINAL_BITS, mask, batch])?;
    let mut telling = Telling {
        reading,
        query,
        batch,
        logs: HashMap::new(),
    };
    let mut events = Vec::new();
    while let Some(block) = blocks.next()? {
        let id: i64 = block.get(0)?;
        let recorded_at = ids::time(block.get(1)?);
        let packed: Vec<u8> = block.get(2)?;
        let stored: EventBlock = form::unpack(version::EVENTS, &packed)?;
        for (seq, event) in (id << ORDINAL_BITS..).zip(&stored.events) {
            if seq <= after {
                continue;
            }
            if events.len() >= limit {
                return Ok(EventPage {
                    events,
                    next: write_cursor(seq - 1),
                });
            }
            events.extend(telling.tell(seq, recorded_at, event)?);
        }
    }
    Ok(EventPage {
        events,
        next: write_cursor(end),
    })
}

/// What an event says beside its batch and recipient.
struct Told {
    kind: EventKind,
    occurred_at: Timestamp,
    /// What its id is made of.
    identity: String,
    data: Value,
}

impl Telling<'_> {
    /// The event in full, if the query wants it.
    fn tell(
        &mut self,
        seq: i64,
        recorded_at: Timestamp,
        stored: &StoredEvent,
    ) -> Result<Option<Event>> {
        let Some(kind) = EventKind::from_code(stored.kind()) else {
            return Err(StoreError::Damaged(format!(
                "event {seq} is of an unknown type"
            )));
        };
        if !self.query.kinds.is_empty() && !self.query.kinds.contains(&kind) {
            return Ok(None);
        }
        let own = |data: &str| Told {
            kind,
            occurred_at: recorded_at,
            identity: format!("step {seq}"),
            data: serde_json::from_str(data).unwrap_or_default(),
        };
        match stored {
            StoredEvent::Address {
                account,
                email,
                data,
                ..
            } => {
                if !self.of_account(account) {
                    return Ok(None);
                }
                let mut event = bare(own(data), seq, recorded_at, account.clone());
                event.recipient = Some(EventRecipient {
                    email: email.clone(),
                    prospect_id: None,
                });
                Ok(Some(event))
            }
            StoredEvent::Account { account, data, .. } => {
                let event = || bare(own(data), seq, recorded_at, account.clone());
                Ok(self.of_account(account).then(event))
            }
            StoredEvent::Batch { batch, data, .. } => {
                let Some(head) = self.wanted(*batch)? else {
                    return Ok(None);
                };
                Ok(Some(of_batch(own(data), seq, recorded_at, &head)))
            }
            StoredEvent::Unsent {
                lot,
                position,
                data,
                ..
            } => {
                let Some(head) = self.wanted(ids::split(*lot).0)? else {
                    return Ok(None);
                };
                Ok(self.of_recipient(own(data), seq, recorded_at, &head, *lot, *position)?)
            }
            StoredEvent::Fact {
                lot, log, entry, ..
            } => {
                let Some(head) = self.wanted(ids::split(*lot).0)? else {
                    return Ok(None);
                };
                let Some(block) = self.log(*log)? else {
                    return Ok(None);
                };
                let at = usize::try_from(*entry).unwrap_or(usize::MAX);
                let Some(logged) = block.entries.get(at) else {
                    return Ok(None);
                };
                let told = Told {
                    kind,
                    occurred_at: match &logged.fact {
                        Fact::Attempt(attempt) => attempt.at,
                        Fact::Hit(hit) => hit.at,
                    },
                    identity: format!("fact {} {kind}", logged.seq),
                    data: data_of(&logged.fact, &head),
                };
                let identity = format!("{} {}", block.journal, told.identity);
                let told = Told { identity, ..told };
                Ok(self.of_recipient(told, seq, recorded_at, &head, *lot, logged.position)?)
            }
        }
    }

    /// Whether the query wants the events of this account that belong to no batch.
    fn of_account(&self, account: &str) -> bool {
        let wanted = self.query.account.as_deref();
        self.batch.is_none() && wanted.is_none_or(|wanted| wanted == account)
    }

    /// The batch, if the query wants its events.
    fn wanted(&self, batch: i64) -> Result<Option<Arc<BatchHead>>> {
        if self.batch.is_some_and(|wanted| wanted != batch) {
            return Ok(None);
        }
        let head = self.reading.cache.head(self.reading.connection, batch)?;
        let foreign = self
            .query
            .account
            .as_ref()
            .is_some_and(|wanted| *wanted != head.account);
        Ok((!foreign).then_some(head))
    }

    fn log(&mut self, id: i64) -> Result<Option<Arc<LogBlock>>> {
        if let Some(block) = self.logs.get(&id) {
            return Ok(Some(block.clone()));
        }
        let packed: Option<Vec<u8>> = self
            .reading
            .connection
            .prepare_cached("SELECT data FROM lot_log WHERE id=?1")?
            .query_row([id], |row| row.get(0))
            .optional()?;
        // Retired with its batch, or erased with the person: there is nothing left to tell.
        let Some(packed) = packed else {
            return Ok(None);
        };
        let block: Arc<LogBlock> = Arc::new(form::unpack(version::LOG, &packed)?);
        self.logs.insert(id, block.clone());
        Ok(Some(block))
    }

    fn of_recipient(
        &self,
        told: Told,
        seq: i64,
        recorded_at: Timestamp,
        head: &BatchHead,
        lot: LotId,
        position: u16,
    ) -> Result<Option<Event>> {
        let found: Option<Arc<Lot>> = self.reading.cache.lot(self.reading.connection, lot)?;
        let Some(row) = found
            .as_ref()
            .and_then(|lot| lot.rows.get(usize::from(position)))
        else {
            return Ok(None);
        };
        let mut event = of_batch(told, seq, recorded_at, head);
        event.message_id = Some(MessageId {
            batch: head.id,
            index: row.index,
        });
        event.recipient = Some(EventRecipient {
            email: row.email.to_string(),
            prospect_id: row.prospect_id.as_deref().map(str::to_owned),
        });
        event.metadata = metadata_of(head, row);
        Ok(Some(event))
    }
}

fn bare(told: Told, seq: i64, recorded_at: Timestamp, account: String) -> Event {
    Event {
        id: event_id(told.occurred_at, &told.identity),
        seq: ids::nat(seq),
        kind: told.kind,
        occurred_at: told.occurred_at,
        recorded_at,
        account,
        campaign: None,
        batch_id: None,
        message_id: None,
        variant: None,
        recipient: None,
        metadata: json!({}),
        data: told.data,
    }
}

fn of_batch(told: Told, seq: i64, recorded_at: Timestamp, head: &BatchHead) -> Event {
    let mut event = bare(told, seq, recorded_at, head.account.clone());
    event.campaign = head.campaign.clone();
    event.batch_id = Some(head.id);
    event.metadata = head.metadata.clone();
    event
}

/// A UUIDv7 of the time and of what the event is about.
fn event_id(at: Timestamp, identity: &str) -> uuid::Uuid {
    let millis = u64::try_from(at.millis()).unwrap_or(0);
    let (a, b) = (
        partition_hash("event", identity),
        partition_hash("event id", identity),
    );
    let mut random = [0_u8; 10];
    for (to, from) in random
        .iter_mut()
        .zip(a.to_be_bytes().into_iter().chain(b.to_be_bytes()))
    {
        *to = from;
    }
    uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()
}

/// What the caller gave: the recipient's fields over the batch's.
fn metadata_of(head: &BatchHead, row: &Row) -> Value {
    let own: Option<Value> = row
        .metadata
        .as_deref()
        .and_then(|text| serde_json::from_str(text).ok());
    match (head.metadata.clone(), own) {
        (Value::Object(mut all), Some(Value::Object(own))) => {
            all.extend(own);
            Value::Object(all)
        }
        (_, Some(own)) if !own.is_null() => own,
        (all, _) => all,
    }
}

fn data_of(fact: &Fact, head: &BatchHead) -> Value {
    match fact {
        Fact::Attempt(attempt) => data_of_attempt(attempt),
        Fact::Hit(hit) => data_of_hit(hit, head),
    }
}

fn data_of_attempt(attempt: &Attempt) -> Value {
    let (ambiguous, next) = match attempt.result {
        AttemptResult::TemporaryError {
            retry_at,
            ambiguous,
        } => (ambiguous, Some(retry_at)),
        AttemptResult::Suppressed(reason) => return json!({ "reason": reason.as_str() }),
        AttemptResult::Cancelled => return json!({}),
        AttemptResult::Delivered | AttemptResult::Bounce | AttemptResult::Failed => (false, None),
    };
    let detail = &attempt.detail;
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "attempt": attempt.number,
        "smtp_code": detail.smtp_code,
        "enhanced_code": detail.enhanced_code.map(|code| code.to_string()),
        "class": detail.class,
        "blame": detail.blame,
        "reply": text(&detail.reply),
        "host": text(&detail.host),
        "tls": detail.tls,
        "destination": text(&detail.destination),
        "source": text(&detail.source),
        "rule": detail.rule.as_ref().map(RuleRef::name),
        "rules_version": detail.rule.as_ref().and_then(RuleRef::version),
        "ambiguous": ambiguous,
        "next_attempt_at": next,
        "transaction_ms": detail.transaction_ms,
    })
}

fn data_of_hit(hit: &Hit, head: &BatchHead) -> Value {
    match hit.kind {
        HitKind::Unsubscribe => json!({ "list": head.list, "method": hit.method }),
        HitKind::Open | HitKind::Click | HitKind::Probe => json!({
            "actor": hit.verdict.actor,
            "machine_reasons": hit.verdict.machine_reasons,
            "link": hit.link,
            "url": hit.target,
            "user_agent": hit.user_agent,
            "network": hit.network,
            "visitor": hit.visitor,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_is_a_uuid_of_version_7_and_always_the_same() {
        let at = Timestamp::from_millis(1_763_712_300_007);
        let id = event_id(at, "x");
        assert_eq!(id.get_version_num(), 7);
        assert_eq!(id, event_id(at, "x"));
        assert_ne!(id, event_id(at, "y"));
        assert!(id.to_string().starts_with("019aa571-f3e7-7"), "{id}");
    }

    #[test]
    fn a_cursor_reads_back() {
        assert_eq!(read_cursor(&write_cursor(77)), Ok(77));
        for text in [
            "",
            "77",
            "e1-",
            "e1--1",
            "e1-+1",
            "e1-01",
            "e2-1",
            "e1-9223372036854775808",
        ] {
            assert!(read_cursor(text).is_err(), "{text}");
        }
    }
}
