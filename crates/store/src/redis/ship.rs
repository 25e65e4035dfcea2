//! Facts on their way in: each is applied at most once, with its counters, events, retry lots and
//! suppressions, in one step with the journal's high-water mark and the windows of leases.
//!
//! Every partition has its own part of a shipment and its own mark, so a shipment that came through
//! in some partitions only is shipped again as a whole. Two round trips: read, do. Many hits go in
//! several steps, each of which is put together while the server does the one before it: otherwise
//! one side waits for the other all the time. Must not decide: `transition` does.

use super::Inner;
use super::apply::{address_of, apply};
use super::books::{Books, Needs};
use super::cache::LotKey;
use super::commit::{Commit, Outcome};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{Holder, Range};
use crate::{RangeRef, Result, Shipment, Shipped};
use ::redis::Pipeline;
use futures_util::future::{join, try_join_all};
use model::{BatchId, Fact, HitKind, JournalId, Partition, Place, Seq, Timestamp};
use rustc_hash::FxHashSet;
use std::collections::BTreeMap;

/// The most hits in one step. Large, since what a lot costs does not grow with the hits on it; bounded,
/// since the server does nothing else meanwhile.
const STEP: usize = 4_000;
/// The most facts that one shipment of hits should have: with so many, the server and this side work at
/// the same time but for the first step and the last.
pub(super) const SHIPMENT: usize = 4 * STEP;
/// The most lots whose rows and cells are in memory for it: some 100 KB each.
const LOTS: usize = 2_000;
/// Facts that are entered without looking aside.
const AT_A_TIME: usize = 128;

/// A fact and where its recipient stands.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) seq: Seq,
    pub(super) fact: Fact,
    pub(super) place: Option<Place>,
}

impl Placed {
    pub(super) fn key(&self) -> Option<LotKey> {
        Some((self.fact.message()?.batch, self.place?.lot))
    }
}

/// The part of a shipment that is of one partition.
#[derive(Debug, Default)]
struct Part {
    facts: Vec<Placed>,
    windows: Vec<(RangeRef, u32)>,
    finished: Vec<RangeRef>,
}

impl Part {
    /// Whether it may be taken in several steps: no range moves, and none is made.
    fn is_divisible(&self) -> bool {
        let attempt = |placed: &Placed| matches!(placed.fact, Fact::Attempt(_));
        self.windows.is_empty() && self.finished.is_empty() && !self.facts.iter().any(attempt)
    }

    /// The facts to go on with, and whether these are all that are left.
    fn after(&self, taken: &Taken) -> (&[Placed], bool) {
        let done = |placed: &Placed| placed.seq <= taken.through;
        let rest = self.facts.split_at(self.facts.partition_point(done)).1;
        if !self.is_divisible() {
            return (rest, true);
        }
        let most = if taken.one_by_one { STEP } else { rest.len() };
        let mut lots = FxHashSet::default();
        let fits = |placed: &&Placed| {
            let of = placed.key();
            of.is_none_or(|key| lots.len() < LOTS || lots.contains(&key)) && {
                lots.extend(of);
                true
            }
        };
        let some = rest.iter().take(most).take_while(fits).count();
        (rest.split_at(some).0, some == rest.len())
    }

    /// Steps for these facts. `end`: they are the last; through where the journal is taken with them.
    fn steps<'a>(&'a self, facts: &'a [Placed], end: Option<Seq>) -> Vec<Step<'a>> {
        let most = if self.is_divisible() {
            STEP
        } else {
            usize::MAX
        };
        let step = |facts: &'a [Placed]| Step {
            through: facts.last().map_or(0, |placed| placed.seq),
            facts,
            part: self,
        };
        let mut steps: Vec<Step<'_>> = facts.chunks(most).map(step).collect();
        if let Some(through) = end {
            match steps.last_mut() {
                Some(last) => last.through = through,
                None => steps.push(Step {
                    through,
                    ..step(&[])
                }),
            }
        }
        steps
    }
}

/// What all parts of a shipment share.
#[derive(Debug, Clone, Copy)]
struct Of {
    journal: JournalId,
    through: Seq,
    now: Timestamp,
}

/// How far a part was taken, and what it came to.
#[derive(Debug, Default)]
struct Taken {
    shipped: Shipped,
    /// Every fact through here is in the store.
    through: Seq,
    /// Whether no step is put together before the one before it is done.
    one_by_one: bool,
}

impl Taken {
    /// Counts facts that the store has already; the others.
    fn skip_repeated<'a>(&mut self, facts: &'a [Placed], mark: Seq) -> &'a [Placed] {
        let (old, new) = facts.split_at(facts.partition_point(|placed| placed.seq <= mark));
        self.shipped.repeated += u64::try_from(old.len()).unwrap_or(u64::MAX);
        self.through = self.through.max(mark);
        new
    }

    /// Whether to go on.
    fn note(&mut self, finished: Finished) -> bool {
        match finished {
            Finished::Nothing => true,
            Finished::Conflict => false,
            Finished::Done(shipped, through) => {
                add(&mut self.shipped, shipped);
                self.through = self.through.max(through);
                true
            }
        }
    }
}

/// Facts of a part that go in one step.
struct Step<'a> {
    facts: &'a [Placed],
    part: &'a Part,
    through: Seq,
}

/// A step that was put together.
struct Ready {
    commit: Commit,
    told: Vec<BatchId>,
    shipped: Shipped,
    through: Seq,
}

enum Finished {
    Nothing,
    Conflict,
    /// What it came to, and through where.
    Done(Shipped, Seq),
}

impl<'a> Step<'a> {
    /// Enters it in the books. Steps aside from time to time: somebody may wait for an answer.
    async fn put_together(self, books: &mut Books<'a>, journal: JournalId) -> Result<Ready> {
        let mut shipped = Shipped::default();
        for some in self.facts.chunks(AT_A_TIME) {
            for placed in some {
                if !apply(books, placed, journal, &mut shipped)? {
                    shipped.unknown += 1;
                }
            }
            tokio::task::yield_now().await;
        }
        move_ranges(books, self.part, &mut shipped)?;
        let ranges = books.retry_ranges();
        if !ranges.is_empty() {
            books
                .load(&Needs {
                    ranges,
                    ..Needs::default()
                })
                .await?;
            books.file_retries();
        }
        books.move_mark(journal, self.through);
        let (commit, told) = books.step(Some(journal), 0)?;
        Ok(Ready {
            commit,
            told,
            shipped,
            through: self.through,
        })
    }
}

/// Adds what one step or part came to.
fn add(all: &mut Shipped, one: Shipped) {
    all.duplicates.extend(one.duplicates);
    all.unknown += one.unknown;
    all.repeated += one.repeated;
    all.lost.extend(one.lost);
    all.completed.extend(one.completed);
    all.behind = match (all.behind, one.behind) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
}

impl Inner {
    /// Through which sequence every partition took a journal.
    pub(super) async fn high_water(&self, journal: JournalId) -> Result<Seq> {
        let marks = self.all_partitions().map(|p| self.mark(p, journal));
        let marks = try_join_all(marks).await?;
        Ok(marks.into_iter().min().unwrap_or(0))
    }

    async fn mark(&self, p: Partition, journal: JournalId) -> Result<Seq> {
        let mut pipeline = Pipeline::new();
        ask_mark(&mut pipeline, p, journal);
        let mark = self.link.bulk(&pipeline).await?.into_iter().next();
        Ok(u64::try_from(mark.map_or(0, answer::number)).unwrap_or(0))
    }

    /// Applies a shipment.
    pub(super) async fn ship(&self, shipment: Shipment) -> Result<Shipped> {
        let last = shipment.facts.last().map_or(0, |(seq, _)| *seq);
        let of = Of {
            journal: shipment.journal,
            through: shipment.through.max(last),
            now: shipment.now,
        };
        let parts = self.divide(shipment).await?;
        let shipped = parts
            .into_iter()
            .map(|(p, part)| self.ship_part(p, part, of));
        let mut all = Shipped::default();
        for one in try_join_all(shipped).await? {
            add(&mut all, one);
        }
        Ok(all)
    }

    /// Divides a shipment by partition. A fact that has no place is partition 0's to count.
    async fn divide(&self, shipment: Shipment) -> Result<BTreeMap<Partition, Part>> {
        let parts = self.all_partitions().map(|p| (p, Part::default()));
        let mut parts: BTreeMap<Partition, Part> = parts.collect();
        for (seq, fact) in shipment.facts {
            let place = match &fact {
                Fact::Attempt(attempt) => Some(attempt.place),
                Fact::Hit(_)
                | Fact::Page(_)
                | Fact::Revision(_)
                | Fact::Reply(_)
                | Fact::Complaint(_) => match fact.message() {
                    Some(of) => self.place_of(of.batch, of.index).await?,
                    None => None,
                },
            };
            let of = place.map_or(HOME, |place| place.lot.partition());
            let known = parts.contains_key(&of);
            let place = place.filter(|_| known);
            let of = if known { of } else { HOME };
            if let Some(part) = parts.get_mut(&of) {
                part.facts.push(Placed { seq, fact, place });
            }
        }
        for (range, window) in shipment.windows {
            if let Some(part) = parts.get_mut(&range.partition) {
                part.windows.push((range, window));
            }
        }
        for range in shipment.finished {
            if let Some(part) = parts.get_mut(&range.partition) {
                part.finished.push(range);
            }
        }
        Ok(parts)
    }

    /// Takes what a shipment has of a partition.
    async fn ship_part(&self, p: Partition, part: Part, of: Of) -> Result<Shipped> {
        let mut taken = Taken::default();
        let mut tries = self.tries();
        while tries.again().await? {
            let before = taken.through;
            let (facts, is_all) = part.after(&taken);
            let mut books = Books::open(self, p, of.now);
            load_for(&mut books, &part, facts, of.journal).await?;
            if self.past.has_forgotten(p, of.journal, books.mark) {
                taken.shipped.behind = Some(books.mark);
                break;
            }
            let facts = taken.skip_repeated(facts, books.mark);
            let steps = part.steps(facts, is_all.then_some(of.through));
            let done = self.take_steps(books, steps, of, &mut taken).await?;
            if done && is_all {
                break;
            }
            // Somebody else writes to the same recipients: nothing is put together ahead of them now.
            taken.one_by_one |= !done;
            if taken.through > before {
                tries = self.tries();
            }
        }
        Ok(taken.shipped)
    }

    /// Does steps, one behind the other: while the server does one, the next is put together, from
    /// what that will leave. Whether all were done; where one was not, none behind it is.
    async fn take_steps<'a>(
        &self,
        mut books: Books<'a>,
        steps: Vec<Step<'a>>,
        of: Of,
        taken: &mut Taken,
    ) -> Result<bool> {
        let mut ready = None;
        for step in steps {
            let next = step.put_together(&mut books, of.journal);
            let (done, next) = join(self.finish_step(ready.take(), of), next).await;
            if !taken.note(done?) {
                return Ok(false);
            }
            ready = Some(next?);
        }
        Ok(taken.note(self.finish_step(ready, of).await?))
    }

    /// Has the server do a step that was put together, if there is one.
    async fn finish_step(&self, ready: Option<Ready>, of: Of) -> Result<Finished> {
        let Some(ready) = ready else {
            return Ok(Finished::Nothing);
        };
        let p = ready.commit.partition;
        let Outcome::Done { seq, open } = ready.commit.run(self, false).await? else {
            return Ok(Finished::Conflict);
        };
        self.past.note_mark(p, of.journal, ready.through);
        let mut shipped = ready.shipped;
        shipped.completed = self.completions(&ready.told, &open, of.now, seq).await?;
        Ok(Finished::Done(shipped, ready.through))
    }
}

/// Asks how far a journal was taken.
pub(super) fn ask_mark(pipeline: &mut Pipeline, p: Partition, journal: JournalId) {
    pipeline
        .cmd("HGET")
        .arg(keys::journals(p))
        .arg(journal.to_string());
}

/// Reads what the facts and ranges of a part need.
async fn load_for(
    books: &mut Books<'_>,
    part: &Part,
    facts: &[Placed],
    journal: JournalId,
) -> Result<()> {
    let mut needs = Needs {
        mark_of: Some(journal),
        any_consents: facts.iter().any(|placed| is_tracked(&placed.fact)),
        ..Needs::default()
    };
    for placed in facts {
        let batch = placed.fact.message().map(|message| message.batch);
        needs.batches.extend(batch);
        needs.cells.extend(placed.key());
    }
    needs.lots.clone_from(&needs.cells);
    let windows = part.windows.iter().map(|(range, _)| range.id);
    let finished = part.finished.iter().map(|range| range.id);
    needs.ranges.extend(windows.chain(finished));
    books.load(&needs).await?;
    // What the facts themselves lead to.
    let mut more = Needs::default();
    for range in &part.finished {
        if let Some(range) = books.held(*range) {
            let lots = range.refs().into_iter().map(|of| (range.batch, of.lot));
            more.cells.extend(lots);
        }
    }
    more.cells.retain(|key| !needs.cells.contains(key));
    for placed in facts.iter().filter(|placed| suppresses(&placed.fact)) {
        more.addresses.extend(address_of(books, placed));
    }
    if books.any_consents {
        let hits = facts.iter().filter(|placed| is_tracked(&placed.fact));
        more.consents
            .extend(hits.filter_map(|placed| address_of(books, placed)));
    }
    if !more.cells.is_empty() || !more.addresses.is_empty() || !more.consents.is_empty() {
        books.load(&more).await?;
    }
    Ok(())
}

/// Whether how much of it is kept depends on the person.
fn is_tracked(fact: &Fact) -> bool {
    match fact {
        Fact::Hit(hit) => hit.kind != HitKind::Unsubscribe,
        Fact::Attempt(_)
        | Fact::Page(_)
        | Fact::Revision(_)
        | Fact::Reply(_)
        | Fact::Complaint(_) => false,
    }
}

fn suppresses(fact: &Fact) -> bool {
    match fact {
        Fact::Attempt(attempt) => attempt.suppress.is_some(),
        Fact::Hit(hit) => hit.kind == HitKind::Unsubscribe,
        Fact::Complaint(_) => true,
        Fact::Page(_) | Fact::Revision(_) | Fact::Reply(_) => false,
    }
}

/// Moves windows and removes finished ranges.
fn move_ranges(books: &mut Books<'_>, part: &Part, shipped: &mut Shipped) -> Result<()> {
    for (of, window) in &part.windows {
        let held = books.held(*of).cloned();
        match held.filter(|range| range.is_taken(books.moment)) {
            None => shipped.lost.push(*of),
            Some(range) => {
                let window = range.window.max((*window).min(range.count));
                if window != range.window {
                    books.set_range(Range { window, ..range });
                }
            }
        }
    }
    for of in &part.finished {
        let held = books.held(*of);
        match held.filter(|range| range.holder != Holder::PutOff).cloned() {
            None => shipped.lost.push(*of),
            Some(range) if books.unreported(&range)?.is_empty() => books.remove_range(range.id),
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{LotNumber, MessageId, Reply};

    fn placed(seq: Seq, lot: u32) -> Placed {
        let reply = Reply {
            message: MessageId {
                batch: BatchId::from_bytes([1; 16]),
                index: 0,
            },
            at: Timestamp::from_millis(1),
            data: "{}".into(),
        };
        Placed {
            seq,
            fact: Fact::Reply(Box::new(reply)),
            place: Some(Place {
                lot: LotNumber(lot),
                position: 0,
            }),
        }
    }

    fn part(facts: u64, lots: u32) -> Part {
        let facts = (0..facts).zip((0..lots).cycle());
        Part {
            facts: facts.map(|(n, lot)| placed(n + 1, lot)).collect(),
            ..Part::default()
        }
    }

    #[test]
    fn what_is_in_memory_for_many_hits_is_bounded() {
        let many = u64::try_from(SHIPMENT).unwrap();
        let lots = u32::try_from(LOTS).unwrap();
        let mut taken = Taken::default();
        // As many lots as fit, however many hits they have; of more lots, those that fit.
        let few = part(many, lots);
        assert_eq!(few.after(&taken).0.len(), SHIPMENT);
        assert_eq!(part(many, lots + 1).after(&taken).0.len(), LOTS);
        let steps = few.steps(few.after(&taken).0, Some(many + 9));
        let through: Vec<Seq> = steps.iter().map(|step| step.through).collect();
        assert_eq!(through, [4_000, 8_000, 12_000, many + 9]);
        // Behind a conflict one step at a time, and from where it came to.
        taken.one_by_one = true;
        taken.through = 11_000;
        let (facts, is_all) = few.after(&taken);
        assert_eq!((facts.len(), facts[0].seq, is_all), (STEP, 11_001, false));
        taken.through = many;
        assert!(few.after(&taken).1);
        assert_eq!(few.steps(&[], Some(many + 9)).len(), 1);
    }

    #[test]
    fn what_moves_a_range_goes_in_one_step() {
        let lots = u32::try_from(LOTS).unwrap();
        let mut part = part(5_000, lots + 1);
        let range = RangeRef {
            partition: HOME,
            id: 1,
            token: 1,
        };
        part.finished.push(range);
        let (facts, is_all) = part.after(&Taken::default());
        assert_eq!((facts.len(), is_all), (5_000, true));
        assert_eq!(part.steps(facts, Some(5_000)).len(), 1);
    }
}
