//! Rows and facts by columns: what is alike stands together, numbers as differences, texts
//! without what they share with the one before, and what attempts have in common once. That is
//! little before it is compressed and half of it after.
//!
//! Owns the order of the columns, which is stored. Must not know an engine.
//!
//! A new field of a row is a new variant at the end of [`RowColumn`]: a column that holds nothing
//! is not written, so rows without it stay what they were, and a program that does not know the
//! variant refuses the rows that have it.

mod names;

pub(crate) use names::{Named, Names, TextsRef};

use crate::form::{BriefEntry, BriefFact, BriefLog, LogBlock, LogEntry, UNPACKED_MAX};
use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, EmailAddress, Fact, JournalId, LotNumber,
    MessageId, Place, Row, Seq, SuppressionReason, Timestamp, TrackingMode,
};
use serde::{Deserialize, Serialize};
use std::borrow::Borrow;

/// Attempts of a lot have one or two things in common; if none of so many, it is kept once more.
const LOOKED_AT: usize = 16;

/// Numbers as differences from the one before.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Steps(Vec<i64>);

impl Steps {
    fn of(numbers: impl Iterator<Item = i64>) -> Self {
        let mut before = 0_i64;
        let step = |number: i64| number.wrapping_sub(std::mem::replace(&mut before, number));
        Self(numbers.map(step).collect())
    }

    fn numbers(self) -> impl Iterator<Item = i64> {
        let mut before = 0_i64;
        self.0.into_iter().map(move |step| {
            before = before.wrapping_add(step);
            before
        })
    }
}

/// Texts, each without the beginning that it shares with the last one that was there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Texts {
    /// How many bytes each begins with that the last one began with.
    shared: Vec<u8>,
    /// How many bytes follow those, and one more; 0: there is none.
    own: Vec<u32>,
    /// The bytes that follow, of all.
    text: String,
}

impl Texts {
    fn of<'a>(texts: impl Iterator<Item = Option<&'a str>>) -> Self {
        let mut column = Self::default();
        let mut before = "";
        for text in texts {
            let Some(text) = text else {
                column.shared.push(0);
                column.own.push(0);
                continue;
            };
            let shared = shared_start(before, text);
            let own = text.get(usize::from(shared)..).unwrap_or_default();
            column.shared.push(shared);
            let length = u32::try_from(own.len()).unwrap_or(u32::MAX);
            column.own.push(length.saturating_add(1));
            column.text.push_str(own);
            before = text;
        }
        column
    }

    /// The texts; `None` where the column is damaged, and after the last.
    fn texts(&self) -> impl Iterator<Item = Option<Option<Box<str>>>> {
        let mut rest = self.text.as_str();
        let mut before = String::new();
        let lengths = self.shared.iter().zip(&self.own);
        lengths.map(move |(shared, own)| {
            let Some(own) = own.checked_sub(1) else {
                return Some(None);
            };
            let (text, after) = rest.split_at_checked(usize::try_from(own).ok()?)?;
            rest = after;
            if !before.is_char_boundary(usize::from(*shared)) {
                return None;
            }
            before.truncate(usize::from(*shared));
            before.push_str(text);
            Some(Some(before.as_str().into()))
        })
    }

    fn is_empty(&self) -> bool {
        self.own.iter().all(|own| *own == 0)
    }
}

/// Bytes that both begin with.
fn same_start(a: &[u8], b: &[u8]) -> usize {
    let ((eights_a, _), (eights_b, _)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let eights = eights_a.iter().zip(eights_b);
    let same = 8 * eights.take_while(|(a, b)| a == b).count();
    let (a, b) = (a.iter().skip(same), b.iter().skip(same));
    same + a.zip(b).take_while(|(a, b)| a == b).count()
}

/// How much of its beginning a text shares with the one before, up to what a byte can say.
fn shared_start(before: &str, text: &str) -> u8 {
    let same = same_start(before.as_bytes(), text.as_bytes());
    let whole = text.floor_char_boundary(same.min(usize::from(u8::MAX)));
    u8::try_from(before.floor_char_boundary(whole)).unwrap_or(0)
}

/// What a row may have beside its index and its address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RowColumn<T = Texts> {
    Name(T),
    ProspectId(T),
    Vars(T),
    Metadata(T),
    Tracking(Vec<Option<TrackingMode>>),
    TimeZone(T),
}

impl RowColumn {
    /// The columns of these rows that hold anything.
    fn all(rows: &[Row]) -> Vec<Self> {
        let texts = |of: fn(&Row) -> &Option<Box<str>>| {
            Texts::of(rows.iter().map(|row| of(row).as_deref()))
        };
        let columns = [
            Self::Name(texts(|row| &row.name)),
            Self::ProspectId(texts(|row| &row.prospect_id)),
            Self::Vars(texts(|row| &row.vars)),
            Self::Metadata(texts(|row| &row.metadata)),
            Self::Tracking(rows.iter().map(|row| row.tracking).collect()),
            Self::TimeZone(texts(|row| &row.time_zone)),
        ];
        columns.into_iter().filter(Self::holds_anything).collect()
    }

    fn holds_anything(&self) -> bool {
        match self {
            Self::Name(texts)
            | Self::ProspectId(texts)
            | Self::Vars(texts)
            | Self::Metadata(texts)
            | Self::TimeZone(texts) => !texts.is_empty(),
            Self::Tracking(modes) => modes.iter().any(Option::is_some),
        }
    }

    /// Puts the column into the rows; `None` when it does not fit them.
    fn put(self, rows: &mut [Row]) -> Option<()> {
        match self {
            Self::Name(texts) => put_texts(rows, &texts, |row| &mut row.name),
            Self::ProspectId(texts) => put_texts(rows, &texts, |row| &mut row.prospect_id),
            Self::Vars(texts) => put_texts(rows, &texts, |row| &mut row.vars),
            Self::Metadata(texts) => put_texts(rows, &texts, |row| &mut row.metadata),
            Self::TimeZone(texts) => put_texts(rows, &texts, |row| &mut row.time_zone),
            Self::Tracking(modes) => {
                let mut modes = modes.into_iter();
                for row in rows {
                    row.tracking = modes.next()?;
                }
                Some(())
            }
        }
    }
}

fn put_texts(
    rows: &mut [Row],
    texts: &Texts,
    of: fn(&mut Row) -> &mut Option<Box<str>>,
) -> Option<()> {
    let mut texts = texts.texts();
    for row in rows {
        *of(row) = texts.next()??;
    }
    Some(())
}

/// Rows of a lot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RowColumns<T = Texts> {
    index: Steps,
    local_part: T,
    domain: T,
    more: Vec<RowColumn<T>>,
}

impl RowColumns {
    pub(crate) fn of(rows: &[Row]) -> Self {
        Self {
            index: Steps::of(rows.iter().map(|row| i64::from(row.index))),
            local_part: Texts::of(rows.iter().map(|row| Some(row.email.local_part()))),
            domain: Texts::of(rows.iter().map(|row| Some(row.email.domain()))),
            more: RowColumn::all(rows),
        }
    }

    /// `None` when the columns do not fit together.
    pub(crate) fn rows(self) -> Option<Vec<Row>> {
        let mut rows = Vec::with_capacity(self.index.0.len());
        let mut local_part = self.local_part.texts();
        let mut domain = self.domain.texts();
        for index in self.index.numbers() {
            let (local_part, domain) = (local_part.next()???, domain.next()???);
            let email: EmailAddress = format!("{local_part}@{domain}").parse().ok()?;
            rows.push(Row::new(u32::try_from(index).ok()?, email));
        }
        for column in self.more {
            column.put(&mut rows)?;
        }
        Some(rows)
    }
}

/// What attempts at one destination have in common. What differs is left out of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Common {
    batch: BatchId,
    lot: LotNumber,
    number: u8,
    /// The final dot was sent.
    dotted: bool,
    /// Its time to be tried again is zero.
    result: AttemptResult,
    /// Its reply is empty, its time zero.
    detail: AttemptDetail,
    suppress: Option<SuppressionReason>,
}

/// Without its time to be tried again.
fn timeless(result: AttemptResult) -> AttemptResult {
    match result {
        AttemptResult::TemporaryError { ambiguous, .. } => AttemptResult::TemporaryError {
            retry_at: Timestamp::from_millis(0),
            ambiguous,
        },
        AttemptResult::Delivered
        | AttemptResult::Bounce
        | AttemptResult::Failed
        | AttemptResult::Suppressed(_)
        | AttemptResult::Cancelled => result,
    }
}

impl Common {
    fn of(attempt: &Attempt) -> Self {
        let detail = AttemptDetail {
            reply: Box::default(),
            transaction_ms: 0,
            ..attempt.detail.clone()
        };
        Self {
            batch: attempt.message.batch,
            lot: attempt.place.lot,
            number: attempt.number,
            dotted: attempt.dot_at.is_some(),
            result: timeless(attempt.result),
            detail,
            suppress: attempt.suppress,
        }
    }

    /// Whether it is what [`Common::of`] would make of the attempt.
    fn fits(&self, attempt: &Attempt) -> bool {
        let (one, other) = (&self.detail, &attempt.detail);
        self.batch == attempt.message.batch
            && self.lot == attempt.place.lot
            && self.number == attempt.number
            && self.dotted == attempt.dot_at.is_some()
            && self.result == timeless(attempt.result)
            && self.suppress == attempt.suppress
            && one.smtp_code == other.smtp_code
            && one.enhanced_code == other.enhanced_code
            && one.class == other.class
            && one.blame == other.blame
            && one.host == other.host
            && one.tls == other.tls
            && one.destination == other.destination
            && one.source == other.source
            && one.rule == other.rule
    }

    /// Bytes of its texts, which every attempt that has it takes.
    fn texts_len(&self) -> usize {
        let of = &self.detail;
        let tls = of.tls.as_deref().map_or(0, str::len);
        let rule = of.rule.as_ref().map_or(0, |rule| rule.name().len());
        of.host.len() + of.destination.len() + of.source.len() + tls + rule
    }
}

/// Attempts, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct AttemptColumns {
    common: Vec<Common>,
    /// Which of those each has.
    which: Vec<u32>,
    index: Steps,
    position: Steps,
    at: Steps,
    /// How long before `at` the final dot was sent, of those whose dot was.
    dot: Vec<i64>,
    /// How long after `at` it is to be tried again, of those that are.
    retry: Vec<i64>,
    reply: Texts,
    transaction_ms: Vec<u32>,
}

impl AttemptColumns {
    fn of(attempts: &[&Attempt]) -> Self {
        let mut columns = Self {
            index: Steps::of(attempts.iter().map(|of| i64::from(of.message.index))),
            position: Steps::of(attempts.iter().map(|of| i64::from(of.place.position))),
            at: Steps::of(attempts.iter().map(|of| of.at.millis())),
            reply: Texts::of(attempts.iter().map(|of| Some(&*of.detail.reply))),
            transaction_ms: attempts.iter().map(|of| of.detail.transaction_ms).collect(),
            ..Self::default()
        };
        for attempt in attempts {
            let at = attempt.at.millis();
            if let Some(dot) = attempt.dot_at {
                columns.dot.push(at.wrapping_sub(dot.millis()));
            }
            if let AttemptResult::TemporaryError { retry_at, .. } = attempt.result {
                columns.retry.push(retry_at.millis().wrapping_sub(at));
            }
            let which = columns.which_of(attempt);
            columns.which.push(which);
        }
        columns
    }

    /// Where the attempt's [`Common`] stands; looked for among the newest, else made.
    fn which_of(&mut self, attempt: &Attempt) -> u32 {
        let mut newest = self.common.iter().enumerate().rev().take(LOOKED_AT);
        let found = newest.find(|(_, common)| common.fits(attempt));
        let which = found.map_or(self.common.len(), |(which, _)| which);
        if which == self.common.len() {
            self.common.push(Common::of(attempt));
        }
        u32::try_from(which).unwrap_or(u32::MAX)
    }

    /// When each was, and when its final dot was sent; `None` when the columns do not fit together.
    fn times(self) -> Option<Vec<BriefFact>> {
        let mut times = Vec::with_capacity(self.which.len());
        let mut at = self.at.numbers();
        let mut dot = self.dot.into_iter();
        for which in self.which {
            let common = self.common.get(usize::try_from(which).ok()?)?;
            let at = at.next()?;
            let dot_at = match common.dotted {
                true => Some(Timestamp::from_millis(at.wrapping_sub(dot.next()?))),
                false => None,
            };
            times.push(BriefFact::Attempt {
                at: Timestamp::from_millis(at),
                dot_at,
            });
        }
        Some(times)
    }

    /// `None` when the columns do not fit together.
    fn attempts(self) -> Option<Vec<Attempt>> {
        let mut attempts = Vec::with_capacity(self.which.len());
        let mut index = self.index.numbers();
        let mut position = self.position.numbers();
        let mut at = self.at.numbers();
        let mut dot = self.dot.into_iter();
        let mut retry = self.retry.into_iter();
        let mut reply = self.reply.texts();
        let mut transaction_ms = self.transaction_ms.into_iter();
        // What is kept once may be large and asked for often.
        let mut room = usize::try_from(UNPACKED_MAX).ok()?;
        for which in self.which {
            let common = self.common.get(usize::try_from(which).ok()?)?;
            room = room.checked_sub(common.texts_len())?;
            let at = at.next()?;
            let dot_at = match common.dotted {
                true => Some(Timestamp::from_millis(at.wrapping_sub(dot.next()?))),
                false => None,
            };
            let mut result = common.result;
            if let AttemptResult::TemporaryError { retry_at, .. } = &mut result {
                *retry_at = Timestamp::from_millis(at.wrapping_add(retry.next()?));
            }
            attempts.push(Attempt {
                message: MessageId {
                    batch: common.batch,
                    index: u32::try_from(index.next()?).ok()?,
                },
                place: Place {
                    lot: common.lot,
                    position: u16::try_from(position.next()?).ok()?,
                },
                number: common.number,
                at: Timestamp::from_millis(at),
                dot_at,
                result,
                detail: AttemptDetail {
                    reply: reply.next()???,
                    transaction_ms: transaction_ms.next()?,
                    ..common.detail.clone()
                },
                suppress: common.suppress,
            });
        }
        Some(attempts)
    }
}

/// Facts of a lot that came in one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogColumns<F = Fact> {
    journal: JournalId,
    position: Steps,
    seq: Steps,
    /// Facts other than attempts, each with how many facts come before it.
    others: Vec<(u32, F)>,
    attempts: AttemptColumns,
}

impl<'a> LogColumns<&'a Fact> {
    pub(crate) fn of<F: Borrow<Fact>>(block: &'a LogBlock<F>) -> Self {
        let entries = &block.entries;
        let mut others = Vec::new();
        let mut attempts = Vec::new();
        for (entry, before) in entries.iter().zip(0_u32..) {
            match entry.fact.borrow() {
                Fact::Attempt(attempt) => attempts.push(&**attempt),
                other @ (Fact::Hit(_)
                | Fact::Page(_)
                | Fact::Revision(_)
                | Fact::Reply(_)
                | Fact::Complaint(_)) => others.push((before, other)),
            }
        }
        Self {
            journal: block.journal,
            position: Steps::of(entries.iter().map(|entry| i64::from(entry.position))),
            seq: Steps::of(entries.iter().map(|entry| entry.seq.cast_signed())),
            others,
            attempts: AttemptColumns::of(&attempts),
        }
    }
}

impl LogColumns {
    /// `None` when the columns do not fit together.
    pub(crate) fn block(self) -> Option<LogBlock> {
        let journal = self.journal;
        let attempts = |of: AttemptColumns| {
            let attempts = of.attempts()?.into_iter();
            Some(attempts.map(|attempt| Fact::Attempt(Box::new(attempt))))
        };
        let entries = self.joined(attempts, |fact| fact)?;
        let entries = entries.map(|(position, seq, fact)| LogEntry {
            position,
            seq,
            fact,
        });
        Some(LogBlock {
            journal,
            entries: entries.collect(),
        })
    }

    /// The same with little of the attempts.
    pub(crate) fn brief(self) -> Option<BriefLog> {
        let journal = self.journal;
        let times = |of: AttemptColumns| of.times().map(Vec::into_iter);
        let entries = self.joined(times, BriefFact::Other)?;
        let entries = entries.map(|(position, seq, fact)| BriefEntry {
            position,
            seq,
            fact,
        });
        Some(BriefLog {
            journal,
            entries: entries.collect(),
        })
    }

    /// Attempts and other facts in their order, with their positions and sequences.
    fn joined<T, A: Iterator<Item = T>>(
        self,
        attempts: impl FnOnce(AttemptColumns) -> Option<A>,
        other: impl Fn(Fact) -> T,
    ) -> Option<impl Iterator<Item = (u16, Seq, T)>> {
        let mut attempts = attempts(self.attempts)?;
        let mut others = self.others.into_iter().peekable();
        let mut seq = self.seq.numbers();
        let mut entries = Vec::with_capacity(self.position.0.len());
        for (position, number) in self.position.numbers().zip(0_u32..) {
            let fact = match others.next_if(|(before, _)| *before == number) {
                Some((_, fact)) => other(fact),
                None => attempts.next()?,
            };
            let position = u16::try_from(position).ok()?;
            entries.push((position, seq.next()?.cast_unsigned(), fact));
        }
        let whole = others.next().is_none() && attempts.next().is_none();
        whole.then(|| entries.into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::form::{self, Packer};
    use model::{Class, EnhancedCode, Hit, HitKind, RuleRef, Verdict};
    use proptest::prelude::*;

    fn text() -> impl Strategy<Value = Box<str>> {
        // More than a byte can count, equal at the beginning.
        let long = "[ab]{0,3}".prop_map(|end| "0123456789".repeat(26) + &end);
        prop_oneof!["p-[0-9]{1,3}", "Ok: [äöü→]{0,3}[a-f]{0,4}", ".{0,8}", long]
            .prop_map(String::into_boxed_str)
    }

    prop_compose! {
        fn any_row()(
            index: u32,
            local_part in "[a-z]{1,3}(\\.[a-z]{1,3})?",
            domain in "(a|b)\\.example",
            (name, prospect_id, vars, metadata, time_zone) in (
                prop::option::of(text()),
                prop::option::of(text()),
                prop::option::of(text()),
                prop::option::of(text()),
                prop::option::of(text()),
            ),
            off: Option<bool>,
        ) -> Row {
            Row {
                index,
                email: format!("{local_part}@{domain}").parse().unwrap(),
                name,
                prospect_id,
                vars,
                metadata,
                tracking: off.map(|off| if off { TrackingMode::Off } else { TrackingMode::Aggregate }),
                time_zone,
            }
        }
    }

    prop_compose! {
        fn any_attempt()(
            (index, lot, position) in any::<(u32, u32, u16)>(),
            (few, number) in (0_u8..3, 1_u8..3),
            (at, dot, retry) in any::<(i64, Option<i64>, Option<i64>)>(),
            reply in text(),
            transaction_ms: u32,
            (refused, ambiguous) in any::<(bool, bool)>(),
        ) -> Fact {
            Fact::Attempt(Box::new(Attempt {
                message: MessageId { batch: BatchId::from_bytes([few; 16]), index },
                place: Place { lot: LotNumber(lot), position },
                number,
                at: Timestamp::from_millis(at),
                dot_at: dot.map(Timestamp::from_millis),
                result: match retry.map(Timestamp::from_millis) {
                    Some(retry_at) => AttemptResult::TemporaryError { retry_at, ambiguous },
                    None if refused => AttemptResult::Bounce,
                    None => AttemptResult::Delivered,
                },
                detail: AttemptDetail {
                    smtp_code: Some(250 + u16::from(few)),
                    enhanced_code: refused.then_some(EnhancedCode(5, 1, 1)),
                    class: refused.then_some(Class::InvalidMailbox),
                    blame: None,
                    reply,
                    host: format!("mx{few}.x.example").into(),
                    tls: ambiguous.then(|| "TLSv1.3".into()),
                    destination: "x.example".into(),
                    source: "default".into(),
                    rule: refused.then(|| RuleRef::new("a-rule", "1")),
                    transaction_ms,
                },
                suppress: refused.then_some(SuppressionReason::InvalidAddress),
            }))
        }
    }

    fn hit(index: u32) -> Fact {
        Fact::Hit(Box::new(Hit {
            kind: HitKind::Open,
            message: MessageId {
                batch: BatchId::from_bytes([3; 16]),
                index,
            },
            at: Timestamp::from_millis(5),
            link: None,
            target: None,
            user_agent: "a browser".into(),
            network: "192.0.2.0/24".into(),
            visitor: None,
            method: None,
            verdict: Verdict {
                actor: model::Actor::Machine,
                machine_reasons: vec!["prefetch".into()],
                rules: 1,
            },
        }))
    }

    fn any_block() -> impl Strategy<Value = LogBlock> {
        let fact = prop_oneof![3 => any_attempt(), 1 => any::<u32>().prop_map(hit)];
        prop::collection::vec((any::<u16>(), any::<u64>(), fact), 0..12).prop_map(|entries| {
            let entry = |(position, seq, fact)| LogEntry {
                position,
                seq,
                fact,
            };
            LogBlock {
                journal: JournalId::from_bytes([9; 16]),
                entries: entries.into_iter().map(entry).collect(),
            }
        })
    }

    #[test]
    fn a_column_that_holds_nothing_is_not_written() {
        let row = Row::new(7, "a@x.example".parse().unwrap());
        let columns = RowColumns::of(&[row.clone(), row.clone()]);
        assert_eq!(columns.more, []);
        let named = Row {
            name: Some("".into()),
            ..row.clone()
        };
        let columns = RowColumns::of(&[row, named]);
        assert!(matches!(*columns.more, [RowColumn::Name(_)]), "{columns:?}");
    }

    #[test]
    fn what_is_kept_once_is_not_unfolded_without_bound() {
        let Fact::Attempt(mut attempt) = Fact::from_bytes(&large_host().write_to(vec![])).unwrap()
        else {
            panic!("no attempt")
        };
        attempt.place.position = 1;
        let count = 300_usize;
        let mut columns = AttemptColumns::of(&vec![&*attempt; count]);
        assert_eq!(columns.common.len(), 1);
        assert_eq!(columns.clone().attempts().unwrap().len(), count);
        // As many as one would like, of a megabyte each.
        columns.which = vec![0; 1_000];
        assert_eq!(columns.attempts(), None);
    }

    fn large_host() -> Fact {
        Fact::Attempt(Box::new(Attempt {
            message: MessageId {
                batch: BatchId::from_bytes([3; 16]),
                index: 1,
            },
            place: Place {
                lot: LotNumber(1),
                position: 0,
            },
            number: 1,
            at: Timestamp::from_millis(1),
            dot_at: None,
            result: AttemptResult::Delivered,
            detail: AttemptDetail {
                host: "h".repeat(800_000).into(),
                ..AttemptDetail::default()
            },
            suppress: None,
        }))
    }

    proptest! {
        #[test]
        fn rows_read_back(rows in prop::collection::vec(any_row(), 0..12)) {
            let packed = form::pack_rows(&rows).unwrap();
            let names = form::unpack_names(&packed).unwrap();
            for (row, position) in rows.iter().zip(0_u16..) {
                prop_assert_eq!(names.one(position), Some(Named::from(row)));
            }
            prop_assert_eq!(names.one(u16::try_from(rows.len()).unwrap()), None);
            prop_assert_eq!(form::unpack_rows(&packed).unwrap(), rows);
        }

        #[test]
        fn facts_read_back(block in any_block()) {
            let packed = Packer::new().unwrap().pack_log(&block).unwrap();
            prop_assert_eq!(form::unpack_log(&packed).unwrap(), block.clone());
            prop_assert_eq!(form::unpack_log_brief(&packed).unwrap(), BriefLog::from(block));
        }

        #[test]
        fn what_was_written_by_rows_is_read(
            rows in prop::collection::vec(any_row(), 0..10),
            block in any_block(),
        ) {
            let mut packer = Packer::new().unwrap();
            // There were no zones then.
            let rows: Vec<Row> = rows.into_iter().map(|row| Row { time_zone: None, ..row }).collect();
            let by_row = |row: &Row| {
                let row = row.clone();
                (row.index, row.email, row.name, row.prospect_id, row.vars, row.metadata, row.tracking)
            };
            let written: Vec<_> = rows.iter().map(by_row).collect();
            let packed = packer.pack(form::version::ROWS_BY_ROW, &written).unwrap();
            let names = form::unpack_names(&packed).unwrap();
            for (row, position) in rows.iter().zip(0_u16..) {
                prop_assert_eq!(names.one(position), Some(Named::from(row)));
            }
            prop_assert_eq!(form::unpack_rows(&packed).unwrap(), rows);
            let packed = packer.pack(form::version::LOG_BY_FACT, &block).unwrap();
            prop_assert_eq!(form::unpack_log(&packed).unwrap(), block);
        }

        #[test]
        fn a_changed_byte_is_read_or_refused(
            rows in prop::collection::vec(any_row(), 1..6),
            block in any_block(),
            at: prop::sample::Index,
            byte: u8,
        ) {
            // Uncompressed, so that the change reaches the columns.
            let mut rows = postcard::to_stdvec(&RowColumns::of(&rows)).unwrap();
            *at.get_mut(&mut rows) = byte;
            let _read = postcard::from_bytes::<RowColumns>(&rows).ok().and_then(RowColumns::rows);
            let _read = postcard::from_bytes::<RowColumns<TextsRef<'_>>>(&rows).ok().and_then(RowColumns::names);
            let mut block = postcard::to_stdvec(&LogColumns::of(&block)).unwrap();
            *at.get_mut(&mut block) = byte;
            let _read = postcard::from_bytes::<LogColumns>(&block).ok().and_then(LogColumns::block);
        }

        #[test]
        fn any_bytes_are_rows_and_facts_or_refused(bytes: Vec<u8>, zstd: bool, by_column: bool) {
            let head = [1 + u8::from(by_column), u8::from(zstd)];
            for form in [bytes.clone(), [&head[..], &bytes].concat()] {
                let _read = form::unpack_rows(&form);
                let _read = form::unpack_names(&form);
                let _read = form::unpack_log(&form);
                let _read = form::unpack_log_brief(&form);
            }
        }
    }
}
