//! Events: stored as references, told in full.
//!
//! Owns cursors; what an event says is `tell`'s. Must not change anything.

use super::cache::Lot;
use super::feeds::{self, Feed};
use super::ids::{self, LotId};
use super::readers::Reading;
use super::record::{By, record};
use crate::form::{self, BriefFact, BriefLog, EventBlock, LogBlock, StoredEvent, version};
use crate::tell::{self, Told};
use crate::transition::Cell;
use crate::{
    BatchHead, EventPage, EventQuery, Happened, HitSign, MailSign, Result, SIGNS, Sign, SignPage,
    StoreError,
};
use model::{About, Event, EventKind, Fact, FactId, Hit, MessageId, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, params};
use std::collections::HashMap;
use std::sync::Arc;

/// Bits of a sequence number for the place in a block.
pub(super) const ORDINAL_BITS: u32 = 20;
pub(super) const ORDINALS: i64 = (1 << ORDINAL_BITS) - 1;

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

/// The cursor before the first block that was recorded at or after `at`. Blocks are in order of
/// time, so that a few looks find it.
pub(super) fn cursor_at(connection: &Connection, at: Timestamp) -> Result<String> {
    let end = end(connection)?;
    // All blocks up to `before` are older; the one at `after` is not, or there is none.
    let (mut before, mut after) = (0, (end >> ORDINAL_BITS) + 1);
    let mut sql = connection
        .prepare_cached("SELECT id, recorded_at FROM event WHERE id>=?1 ORDER BY id LIMIT 1")?;
    while before + 1 < after {
        let middle = before + (after - before) / 2;
        let found: Option<(i64, i64)> = sql
            .query_row([middle], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        match found {
            Some((id, recorded_at)) if recorded_at < at.millis() => before = id,
            Some(_) | None => after = middle,
        }
    }
    Ok(write_cursor((before << ORDINAL_BITS | ORDINALS).min(end)))
}

/// What a page is gathered with.
struct Telling<'a> {
    reading: &'a Reading<'a>,
    query: &'a EventQuery,
    batch: Option<i64>,
    /// Logs of the step that is told.
    logs: HashMap<i64, Arc<LogBlock>>,
    /// The same, read in brief.
    brief: HashMap<i64, Option<BriefLog>>,
    /// Account and campaign of batches.
    origins: HashMap<i64, Origin>,
}

/// Whose mail it is.
type Origin = (Arc<str>, Option<Arc<str>>);

/// Events after a cursor.
pub(super) fn page(reading: &Reading<'_>, query: &EventQuery) -> Result<EventPage> {
    let (events, next) = gather(reading, query, 1_000, Telling::tell)?;
    Ok(EventPage { events, next })
}

/// Events after a cursor, as signs.
pub(super) fn signs(reading: &Reading<'_>, query: &EventQuery) -> Result<SignPage> {
    let (signs, next) = gather(reading, query, SIGNS, Telling::sign)?;
    Ok(SignPage { signs, next })
}

/// What is told of the events after a cursor, at most `most`, and the cursor after it.
fn gather<'a, T>(
    reading: &'a Reading<'a>,
    query: &'a EventQuery,
    most: u32,
    tell: impl Fn(&mut Telling<'a>, i64, Timestamp, &StoredEvent) -> Result<Option<T>>,
) -> Result<(Vec<T>, String)> {
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
            None => return Ok((Vec::new(), write_cursor(end))),
        },
    };
    let limit = usize::try_from(query.limit.clamp(1, most)).unwrap_or(1);
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
        brief: HashMap::new(),
        origins: HashMap::new(),
    };
    let mut told = Vec::new();
    let mut step = None;
    while let Some(block) = blocks.next()? {
        let id: i64 = block.get(0)?;
        let recorded_at = ids::time(block.get(1)?);
        let packed: Vec<u8> = block.get(2)?;
        let stored: EventBlock = form::unpack(version::EVENTS, &packed)?;
        // A log is of one step, which has a time and may have several blocks.
        if step.replace(recorded_at) != Some(recorded_at) {
            telling.logs.clear();
            telling.brief.clear();
        }
        for (seq, event) in (id << ORDINAL_BITS..).zip(&stored.events) {
            if seq <= after {
                continue;
            }
            if told.len() >= limit {
                return Ok((told, write_cursor(seq - 1)));
            }
            told.extend(tell(&mut telling, seq, recorded_at, event)?);
        }
    }
    Ok((told, write_cursor(end)))
}

impl Telling<'_> {
    /// The event in full, if the query wants it.
    fn tell(
        &mut self,
        seq: i64,
        recorded_at: Timestamp,
        stored: &StoredEvent,
    ) -> Result<Option<Event>> {
        if let StoredEvent::Told(text) = stored {
            return self.told_before(seq, text);
        }
        let Some(code) = stored.kind() else {
            return Ok(None);
        };
        let Some(kind) = EventKind::from_code(code) else {
            return Err(StoreError::Damaged(format!(
                "event {seq} is of an unknown type"
            )));
        };
        if !self.query.kinds.is_empty() && !self.query.kinds.contains(&kind) {
            return Ok(None);
        }
        let own = |data: &str| {
            let data: serde_json::Value = serde_json::from_str(data).unwrap_or_default();
            Told {
                kind,
                occurred_at: recorded_at,
                identity: format!("step {seq}"),
                data: data.into(),
            }
        };
        match stored {
            StoredEvent::Gone | StoredEvent::Told(_) => Ok(None),
            StoredEvent::Address {
                account,
                email,
                data,
                ..
            } => {
                if !self.of_account(account) {
                    return Ok(None);
                }
                let event = tell::of_address(own(data), ids::nat(seq), recorded_at, account, email);
                Ok(Some(event.into()))
            }
            StoredEvent::Account { account, data, .. } => {
                let event = || tell::bare(own(data), ids::nat(seq), recorded_at, account).into();
                Ok(self.of_account(account).then(event))
            }
            StoredEvent::Announced {
                account,
                data,
                about,
                ..
            } => {
                let about: About = serde_json::from_str(about).unwrap_or_default();
                let wanted = self.query.account.as_deref();
                let foreign = wanted.is_some_and(|wanted| wanted != account)
                    || self.query.batch.is_some() && self.query.batch != about.batch_id;
                let event = || {
                    tell::announced(own(data), ids::nat(seq), recorded_at, account, about).into()
                };
                Ok((!foreign).then(event))
            }
            StoredEvent::Batch { batch, data, .. } => {
                let Some(head) = self.wanted(*batch)? else {
                    return Ok(None);
                };
                let event = tell::of_batch(own(data), ids::nat(seq), recorded_at, &head);
                Ok(Some(event.into()))
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
            } => self.of_fact(kind, seq, recorded_at, (*lot, *log, *entry)),
        }
    }

    /// What is read of the event, if the query wants it.
    fn sign(
        &mut self,
        seq: i64,
        recorded_at: Timestamp,
        stored: &StoredEvent,
    ) -> Result<Option<Sign>> {
        if let StoredEvent::Fact {
            kind,
            lot,
            log,
            entry,
        } = stored
            && let Some(kind) = EventKind::from_code(*kind)
            && matches!(
                kind,
                EventKind::EmailDelivered | EventKind::EmailOpened | EventKind::EmailClicked
            )
        {
            if !self.query.kinds.is_empty() && !self.query.kinds.contains(&kind) {
                return Ok(None);
            }
            let mail = self.mail(kind, recorded_at, (*lot, *log, *entry))?;
            return Ok(mail.map(|mail| Sign::Mail(Box::new(mail))));
        }
        let event = self.tell(seq, recorded_at, stored)?;
        Ok(event.map(Sign::of))
    }

    /// A delivery or a hit, as it stands in a lot's log.
    fn mail(
        &mut self,
        kind: EventKind,
        recorded_at: Timestamp,
        (lot, log, entry): (LotId, i64, u32),
    ) -> Result<Option<MailSign>> {
        let batch = ids::split(lot).0;
        let Some(head) = self.wanted(batch)? else {
            return Ok(None);
        };
        if !self.brief.contains_key(&log) {
            let packed = self.packed_log(log)?;
            let read = packed.map(|packed| form::unpack_log_brief(&packed));
            self.brief.insert(log, read.transpose()?);
        }
        let at = usize::try_from(entry).unwrap_or(usize::MAX);
        let block = self.brief.get_mut(&log).and_then(Option::as_mut);
        let Some((journal, entry)) =
            block.and_then(|of| Some((of.journal, of.entries.get_mut(at)?)))
        else {
            return Ok(None);
        };
        let (seq, position) = (entry.seq, entry.position);
        let id = FactId { journal, seq };
        let found = self.reading.cache.names(self.reading.connection, lot)?;
        let Some(who) = found.as_ref().and_then(|of| of.one(position)) else {
            return Ok(None);
        };
        let (at, what) = match &entry.fact {
            BriefFact::Attempt { at, dot_at } => (*at, Happened::Delivered { dot_at: *dot_at }),
            BriefFact::Other(Fact::Hit(hit)) => {
                let hit = Hit::clone(hit);
                let variant = self.variant(&head, lot, position)?;
                let of = HitSign {
                    id,
                    variant: head.variant_name(variant).map(Into::into),
                    metadata: tell::metadata_of(&head, who.metadata).into_owned(),
                    hit,
                };
                (of.hit.at, Happened::Hit(Box::new(of)))
            }
            BriefFact::Other(_) => return Ok(None),
        };
        let (account, campaign) = self
            .origins
            .entry(batch)
            .or_insert_with(|| {
                let campaign = head.campaign.as_deref().map(Arc::from);
                (head.account.as_str().into(), campaign)
            })
            .clone();
        Ok(Some(MailSign {
            event_id: tell::id_of_fact(id, kind, at),
            at,
            recorded_at,
            account,
            campaign,
            message: MessageId {
                batch: head.id,
                index: who.index,
            },
            email: who.email.into(),
            prospect_id: who.prospect_id.map(Into::into),
            what,
        }))
    }

    /// The event of an entry of a lot's log.
    fn of_fact(
        &mut self,
        kind: EventKind,
        seq: i64,
        recorded_at: Timestamp,
        (lot, log, entry): (LotId, i64, u32),
    ) -> Result<Option<Event>> {
        let Some(head) = self.wanted(ids::split(lot).0)? else {
            return Ok(None);
        };
        let Some(block) = self.log(log)? else {
            return Ok(None);
        };
        let at = usize::try_from(entry).unwrap_or(usize::MAX);
        let Some(logged) = block.entries.get(at) else {
            return Ok(None);
        };
        let told = Told::of_fact(kind, block.journal, logged.seq, &logged.fact, &head);
        self.of_recipient(told, seq, recorded_at, &head, lot, logged.position)
    }

    /// An event of another store, under its number in this one.
    fn told_before(&self, seq: i64, text: &str) -> Result<Option<Event>> {
        let event: Event = crate::backup::json(text)?;
        let query = self.query;
        let wanted = query.account.as_ref().is_none_or(|of| *of == event.account)
            && (query.kinds.is_empty() || query.kinds.contains(&event.kind))
            && query.batch.is_none_or(|of| event.batch_id == Some(of));
        let seq = ids::nat(seq);
        Ok(wanted.then_some(Event { seq, ..event }))
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
        let Some(packed) = self.packed_log(id)? else {
            return Ok(None);
        };
        let block: Arc<LogBlock> = Arc::new(form::unpack_log(&packed)?);
        self.logs.insert(id, block.clone());
        Ok(Some(block))
    }

    /// None: retired with its batch, or erased with the person. There is nothing left to tell.
    fn packed_log(&self, id: i64) -> Result<Option<Vec<u8>>> {
        let sql = "SELECT data FROM lot_log WHERE id=?1";
        let mut sql = self.reading.connection.prepare_cached(sql)?;
        Ok(sql.query_row([id], |row| row.get(0)).optional()?)
    }

    /// The number of a recipient's variant, which its cell says.
    fn variant(&self, head: &BatchHead, lot: LotId, position: u16) -> Result<u8> {
        if head.variants.is_none() {
            return Ok(0);
        }
        const CELL: i64 = 4;
        let from = i64::from(position) * CELL + 1;
        let cell: Option<Vec<u8>> = self
            .reading
            .connection
            .prepare_cached("SELECT substr(data, ?2, ?3) FROM cell WHERE lot=?1")?
            .query_row(params![lot, from, CELL], |row| row.get(0))
            .optional()?;
        let cell = cell.and_then(|bytes| Cell::read(&bytes));
        Ok(cell.map_or(0, Cell::variant))
    }

    fn of_recipient(
        &self,
        told: Told<'_>,
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
        let who = (row, self.variant(head, lot, position)?);
        let event = tell::of_row(told, ids::nat(seq), recorded_at, head, who);
        Ok(Some(event.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
