//! Rules of batches with variants: what waits for its wave, and how waves are released.

use super::Fixture;
use super::moving::{exported, imported};
use super::support::*;
use crate::{
    BatchChange, ChangeOutcome, DueScope, EndedPart, EventQuery, LeasedRange, NewLot, NewPart,
    PartEnd, PartTurn, Result, Store, Variants, WAVES, Wave, WorkScope, wave_of,
};
use model::{AttemptResult, BatchId, BatchState, LotNumber, Status, Timestamp};
use std::collections::BTreeMap;
use std::time::Duration;

/// A batch of two variants and two waves: every third recipient is in the second, undecided.
struct Tested {
    spec: Spec,
}

impl Tested {
    fn new(number: u128, count: usize) -> Self {
        let mut spec = Spec::new(number, people(count, "x.example"));
        spec.head.variants = Some(Box::new(Variants {
            names: vec!["A".to_owned(), "B".to_owned()],
            waves: vec![None, None],
        }));
        Self { spec }
    }

    fn lots(&self, partitions: u16, first: u32) -> Vec<NewLot> {
        let mut lots = Vec::new();
        for (group, lot) in (0_u32..).zip(self.spec.lots(partitions)) {
            let base = first.next_multiple_of(WAVES) + group * WAVES;
            let (mut test, mut rest) = (Vec::new(), Vec::new());
            for row in lot.rows {
                if row.index % 3 == 2 {
                    rest.push(row);
                } else {
                    test.push(row);
                }
            }
            for (wave, rows) in [(0, test), (1, rest)] {
                let number = LotNumber::new(lot.number.partition(), base + wave);
                let variant =
                    |row: &model::Row| u8::from(wave == 0) * (1 + u8::from(row.index % 3 == 1));
                if !rows.is_empty() {
                    lots.push(NewLot {
                        number: number.expect("few lots"),
                        queue: lot.queue.clone(),
                        variants: rows.iter().map(variant).collect(),
                        rows,
                    });
                }
            }
        }
        lots
    }

    async fn submit(&self, store: &dyn Store) -> Result<BatchId> {
        let lots = self.lots(store.partitions(), 0);
        store.stage_lots(self.spec.head.id, lots).await?;
        store.commit_batch(self.spec.committed(), T0).await?;
        Ok(self.spec.head.id)
    }
}

fn wave(at: Timestamp, shares: [f64; 2]) -> Wave {
    Wave {
        at,
        shares: shares.to_vec(),
    }
}

/// Which variant and release time each leased recipient has, by index.
fn dealt(leased: &[LeasedRange]) -> BTreeMap<u32, (u8, Timestamp)> {
    let items = leased.iter().flat_map(|range| {
        let of = |item: &crate::LeasedRecipient| {
            let at = range.batch.release_of(item.place.lot);
            (item.row.index, (item.variant, at))
        };
        range.items.iter().map(of).collect::<Vec<_>>()
    });
    items.collect()
}

/// What waits for its wave is `scheduled` and nobody's; a wave is released once, as the first
/// caller said, and everybody in it has one variant for good.
pub async fn waves_are_released_each_by_itself(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Tested::new(1, 1_200).submit(&*store).await?;
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.counters.scheduled),
        (BatchState::InProgress, 1_200)
    );
    // Nobody gets it, and no operator hurries it.
    let due = DueScope::Batch(batch);
    assert_eq!(store.make_due(due.clone(), T0, false).await?, 0);
    assert_eq!(node.lease(&*store, T0, "x.example", 10).await?, []);
    let backlog = store.backlog(T0, None, 10).await?;
    assert!(
        backlog
            .iter()
            .all(|of| of.due == 0 && of.next_due.is_none())
    );
    if let Some(work) = store.work(WorkScope::Batch(batch), T0, 10).await? {
        assert!(work.iter().all(|of| of.due == 0 && of.next_due.is_none()));
    }
    assert_eq!(store.totals(T0).await?.oldest_due, None);

    let even = wave(T0, [1.0, 1.0]);
    assert_eq!(store.release_wave(batch, 0, even.clone(), T0).await?, 800);
    assert_eq!(store.release_wave(batch, 0, even.clone(), T0).await?, 0);
    assert_eq!(store.release_wave(batch, 7, even, T0).await?, 0);
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!((counters.scheduled, counters.queued), (400, 800));
    let leased = node.lease(&*store, T0, "x.example", 2_000).await?;
    let first = dealt(&leased);
    let expected: BTreeMap<u32, (u8, Timestamp)> = (0..1_200_u32)
        .filter(|index| index % 3 < 2)
        .map(|index| (index, (1 + u8::from(index % 3 == 1), T0)))
        .collect();
    assert_eq!(first, expected);
    assert!(
        leased
            .iter()
            .all(|range| { range.items.iter().all(|item| wave_of(item.place.lot) == 0) })
    );
    let facts = outcomes(&leased, AttemptResult::Delivered, T0);
    node.report(&*store, facts, T0).await?;

    // Another process, which may have seen the batch before.
    let other = fixture.another().await;
    assert_eq!(checked(&*other, batch).await?.counters.scheduled, 400);
    let later = T0 + secs(60);
    assert_eq!(
        store
            .release_wave(batch, 1, wave(later, [0.0, 1.0]), later)
            .await?,
        400
    );
    let again = wave(later + secs(9), [1.0, 0.0]);
    assert_eq!(store.release_wave(batch, 1, again, later).await?, 0);
    let leased = node.lease(&*store, later, "x.example", 2_000).await?;
    let rest = dealt(&leased);
    assert_eq!(rest.len(), 400);
    assert!(rest.values().all(|of| *of == (2, later)));
    let facts = outcomes(&leased, AttemptResult::Delivered, later);
    node.report(&*store, facts, later).await?;
    for store in [&store, &other] {
        let done = checked(&**store, batch).await?;
        assert_eq!(
            (done.state, done.counters.delivered),
            (BatchState::Completed, 1_200)
        );
        for row in all_rows(&**store, batch).await? {
            let name = if row.row.index % 3 == 0 { "A" } else { "B" };
            assert_eq!(row.variant.as_deref(), Some(name), "{}", row.row.index);
        }
        let query = EventQuery {
            kinds: vec![model::EventKind::EmailDelivered],
            batch: Some(batch),
            limit: 1_000,
            ..EventQuery::default()
        };
        let events = events_of(&**store, query).await?;
        let of_a = events
            .iter()
            .filter(|of| of.variant.as_deref() == Some("A"));
        assert_eq!((events.len(), of_a.count()), (1_200, 400));
    }
    Ok(())
}

/// Shares are spread evenly over what has no variant yet, and are the same for whoever computes
/// them.
pub async fn a_wave_is_shared_out_evenly(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = Tested::new(1, 900).submit(&*store).await?;
    store
        .release_wave(batch, 1, wave(T0, [1.0, 2.0]), T0)
        .await?;
    let leased = Node::new(1).lease(&*store, T0, "x.example", 2_000).await?;
    let rest = dealt(&leased);
    let of_a = rest.values().filter(|(variant, _)| *variant == 1).count();
    assert_eq!(rest.len(), 300);
    assert!((90..=110).contains(&of_a), "{of_a}");
    Ok(())
}

/// Waves wait for their batch; a cancel ends what is held back; pauses since the start are added up.
pub async fn a_wave_waits_for_its_batch(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tested = Tested::new(1, 30);
    tested.spec.head.release_at = T0 + secs(100);
    let batch = tested.submit(&*store).await?;
    let even = wave(T0, [1.0, 1.0]);
    assert_eq!(store.release_wave(batch, 0, even.clone(), T0).await?, 0);
    let change = async |what, at| store.change_batch(batch, what, at).await;
    // Before it began a pause is none of the test's.
    change(BatchChange::Pause, T0).await?;
    change(BatchChange::Resume, T0 + secs(10)).await?;
    let now = T0 + secs(100);
    assert_eq!(Node::new(1).lease(&*store, now, "x.example", 9).await?, []);
    let begun = checked(&*store, batch).await?;
    assert_eq!(
        (begun.state, begun.counters.scheduled, begun.paused_for),
        (BatchState::InProgress, 30, Duration::ZERO)
    );
    assert_eq!(store.release_wave(batch, 0, even, now).await?, 20);
    change(BatchChange::Pause, now).await?;
    assert_eq!(Node::new(1).lease(&*store, now, "x.example", 9).await?, []);
    let paused = checked(&*store, batch).await?;
    assert_eq!(paused.paused_at, Some(now));
    change(BatchChange::Resume, now + secs(7)).await?;
    change(BatchChange::Pause, now + secs(20)).await?;
    change(BatchChange::Resume, now + secs(25)).await?;
    let resumed = checked(&*store, batch).await?;
    assert_eq!((resumed.paused_at, resumed.paused_for), (None, secs(12)));
    let ended = change(BatchChange::Cancel, now + secs(30)).await?;
    assert!(
        matches!(ended, ChangeOutcome::Done { cancelled: 30, .. }),
        "{ended:?}"
    );
    assert_eq!(checked(&*store, batch).await?.counters.cancelled, 30);
    // What was never begun, too.
    let mut unborn = Tested::new(2, 30);
    unborn.spec.head.release_at = T0 + secs(1_000);
    let unborn = unborn.submit(&*store).await?;
    store.change_batch(unborn, BatchChange::Cancel, T0).await?;
    assert_eq!(checked(&*store, unborn).await?.counters.cancelled, 30);
    Ok(())
}

/// Parts of an open batch wait for their waves like the batch itself.
pub async fn parts_wait_for_their_wave(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tested = Tested::new(1, 0);
    tested.spec.head.held = true;
    let batch = tested.submit(&*store).await?;
    let mut index = 0;
    for number in 0..2 {
        let mut more = Tested::new(1, 300);
        more.spec.emails = people(300, &format!("y{number}.example"));
        let new = NewPart {
            batch,
            part: id(100 + number),
            lots: 10 * WAVES,
        };
        let turn = store.begin_part(new, T0, TTL).await?;
        let PartTurn::Begun {
            first_index,
            first_lot,
        } = turn
        else {
            panic!("its turn: {turn:?}");
        };
        assert_eq!(first_index, index);
        let mut lots = more.lots(store.partitions(), first_lot);
        lots.iter_mut()
            .flat_map(|lot| &mut lot.rows)
            .for_each(|row| row.index += first_index);
        index += 300;
        assert!(store.stage_part(new, lots, T0, TTL).await?);
        let ended = EndedPart {
            batch,
            part: new.part,
            accepted: 300,
            rejected: 0,
            call: None,
        };
        assert_eq!(store.commit_part(ended, T0).await?, PartEnd::Done);
    }
    let now = T0 + secs(5);
    store.change_batch(batch, BatchChange::Start, now).await?;
    let begun = checked(&*store, batch).await?;
    assert_eq!(begun.counters.scheduled, 600);
    assert_eq!(
        store
            .release_wave(batch, 0, wave(now, [1.0, 1.0]), now)
            .await?,
        400
    );
    assert_eq!(checked(&*store, batch).await?.counters.queued, 400);
    let one = Node::new(1).lease(&*store, now, "y1.example", 900).await?;
    assert_eq!(dealt(&one).len(), 200);
    Ok(())
}

/// A store that was moved holds back what was held back.
pub async fn what_is_held_back_moves_as_it_is(from: &dyn Fixture, to: &dyn Fixture) -> Result<()> {
    let store = from.mta().await;
    let batch = Tested::new(1, 90).submit(&*store).await?;
    store
        .release_wave(batch, 0, wave(T0, [1.0, 1.0]), T0)
        .await?;
    let file = exported(&*store, T0).await?;
    let moved = to.mta().await;
    let moved = &*moved;
    imported(moved, &file, T0).await?;
    let found = checked(moved, batch).await?;
    assert_eq!(
        (found.state, found.paused_at),
        (BatchState::Paused, Some(T0))
    );
    assert_eq!((found.counters.scheduled, found.counters.queued), (30, 60));
    moved.change_batch(batch, BatchChange::Resume, T0).await?;
    let first = Node::new(1).lease(moved, T0, "x.example", 900).await?;
    assert_eq!(dealt(&first).len(), 60);
    assert_eq!(
        moved
            .release_wave(batch, 1, wave(T0, [1.0, 0.0]), T0)
            .await?,
        30
    );
    let rows = all_rows(moved, batch).await?;
    let held = |row: &&crate::RecipientRow| row.status == Status::Scheduled;
    assert_eq!(rows.iter().filter(held).count(), 0);
    Ok(())
}
