//! Rules of open batches: parts, turns, the start.

use super::Fixture;
use super::support::*;
use crate::{
    BatchChange, BatchQuery, CallKey, ChangeOutcome, EndedCall, EndedPart, NewCall, NewLot,
    NewPart, PartEnd, PartTurn, Result, Store, address_hash,
};
use model::{BatchId, BatchState, LotNumber, MessageId, Timestamp};

/// Part `number` of a batch.
fn part(batch: BatchId, number: u128) -> NewPart {
    NewPart {
        batch,
        part: id(1_000 + number),
        lots: 100,
    }
}

/// An open batch with these people.
async fn opened(store: &dyn Store, emails: Vec<String>) -> Result<BatchId> {
    let mut spec = Spec::new(1, emails);
    spec.head.held = true;
    spec.submit(store, T0).await
}

/// The lots of a part that begins there.
fn lots(store: &dyn Store, emails: &[String], first_index: u32, first_lot: u32) -> Vec<NewLot> {
    let mut lots = Spec::new(1, emails.to_vec()).lots(store.partitions());
    for lot in &mut lots {
        let running = first_lot + (lot.number.0 & 0x00ff_ffff);
        lot.number = LotNumber::new(lot.number.partition(), running).expect("few lots");
        for row in &mut lot.rows {
            row.index += first_index;
        }
    }
    lots
}

/// Stages a part; where it begins.
async fn staged(store: &dyn Store, new: NewPart, emails: &[String]) -> Result<u32> {
    match store.begin_part(new, T0, TTL).await? {
        PartTurn::Begun {
            first_index,
            first_lot,
        } => {
            let lots = lots(store, emails, first_index, first_lot);
            assert!(store.stage_part(new, lots, T0, TTL).await?);
            Ok(first_index)
        }
        other => panic!("not its turn: {other:?}"),
    }
}

fn ended(new: NewPart, accepted: usize, rejected: u64) -> EndedPart {
    EndedPart {
        batch: new.batch,
        part: new.part,
        accepted: accepted as u64,
        rejected,
        call: None,
    }
}

async fn add(store: &dyn Store, new: NewPart, emails: &[String]) -> Result<u32> {
    let first = staged(store, new, emails).await?;
    let end = store.commit_part(ended(new, emails.len(), 0), T0).await?;
    assert_eq!(end, PartEnd::Done);
    Ok(first)
}

async fn start(store: &dyn Store, batch: BatchId, now: Timestamp) -> Result<crate::Batch> {
    match store.change_batch(batch, BatchChange::Start, now).await? {
        ChangeOutcome::Done { batch, .. } => Ok(*batch),
        other => panic!("not started: {other:?}"),
    }
}

/// Parts follow each other without holes; after the start all of it is sent, at the time of the
/// start.
pub async fn an_open_batch_is_filled_and_started(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = opened(&*store, people(700, "x.example")).await?;
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.counters.scheduled),
        (BatchState::Open, 700)
    );
    assert_eq!(found.started_at, None);
    let second = people(1_500, "y.example");
    assert_eq!(add(&*store, part(batch, 1), &second).await?, 700);
    // Rejected recipients take indices too.
    let new = part(batch, 2);
    let third = people(3, "z.example");
    assert_eq!(staged(&*store, new, &third).await?, 2_200);
    store.commit_part(ended(new, 3, 2), T0).await?;
    assert_eq!(
        add(&*store, part(batch, 3), &people(2, "w.example")).await?,
        2_205
    );

    for store in [store.clone(), fixture.another().await] {
        let found = checked(&*store, batch).await?;
        assert_eq!(
            (found.state, found.counters.scheduled),
            (BatchState::Open, 2_205)
        );
        let rows = all_rows(&*store, batch).await?;
        let indices: Vec<u32> = rows.iter().map(|row| row.row.index).collect();
        let expected: Vec<u32> = (0..2_203).chain(2_205..2_207).collect();
        assert_eq!(indices, expected);
        assert_eq!(rows[700].row.email.as_str(), "n0@y.example");
        let message = MessageId {
            batch,
            index: 2_206,
        };
        let story = store.message(message).await?.expect("the last");
        assert_eq!(story.recipient.row.email.as_str(), "n1@w.example");
    }
    assert_eq!(store.backlog(T0, None, 10).await?, []);
    assert_eq!(Node::new(1).lease(&*store, T0, "y.example", 10).await?, []);
    let query = BatchQuery {
        state: Some(BatchState::Open),
        limit: 10,
        ..BatchQuery::default()
    };
    assert_eq!(store.batches(query).await?.items.len(), 1);

    let now = T0 + secs(60);
    let started = start(&*store, batch, now).await?;
    assert_eq!(
        (started.state, started.started_at),
        (BatchState::InProgress, Some(now))
    );
    assert_eq!((started.head.held, started.head.release_at), (false, now));
    assert_eq!(started.counters.queued, 2_205);
    start(&*store, batch, now).await?;
    checked(&*store, batch).await?;
    let mut sent = Vec::new();
    for domain in ["x.example", "y.example", "z.example", "w.example"] {
        let leased = Node::new(1).lease(&*store, now, domain, 2_000).await?;
        assert!(leased.iter().all(|range| range.batch.release_at == now));
        sent.extend(emails(&leased));
    }
    sent.sort();
    sent.dedup();
    assert_eq!(sent.len(), 2_205);
    let accepted: Vec<_> = all_events(&*store)
        .await?
        .into_iter()
        .map(|event| (event.kind.as_str(), event.data["first_index"].as_u64()))
        .collect();
    let expected = [
        ("batch.accepted", Some(0)),
        ("batch.accepted", Some(700)),
        ("batch.accepted", Some(2_200)),
        ("batch.accepted", Some(2_205)),
        ("batch.started", None),
    ];
    assert_eq!(accepted, expected);
    Ok(())
}

/// One part at a time; what one that came to nothing staged is seen by nobody and leaves no hole.
pub async fn a_part_that_comes_to_nothing_leaves_nothing(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = opened(&*store, Vec::new()).await?;
    let (lost, next) = (part(batch, 1), part(batch, 2));
    assert_eq!(staged(&*store, lost, &people(600, "x.example")).await?, 0);
    assert_eq!(store.begin_part(next, T0, TTL).await?, PartTurn::Busy);
    assert_eq!(all_rows(&*store, batch).await?, []);
    assert_eq!(store.part_hashes(batch, 0).await?, []);
    assert_eq!(store.address("acme", "n1@x.example").await?.messages, []);
    assert_eq!(checked(&*store, batch).await?.counters.accepted, 0);

    store.drop_part(lost, T0).await?;
    assert_eq!(staged(&*store, next, &people(3, "x.example")).await?, 0);
    // This one is not heard of again, and its turn runs out.
    let later = T0 + TTL + secs(1);
    let third = part(batch, 3);
    let PartTurn::Begun {
        first_index,
        first_lot,
    } = store.begin_part(third, later, TTL).await?
    else {
        panic!("its turn");
    };
    assert_eq!(first_index, 0);
    assert!(!store.stage_part(next, Vec::new(), later, TTL).await?);
    assert_eq!(
        store.commit_part(ended(next, 3, 0), later).await?,
        PartEnd::Lost
    );
    let people = people(5, "y.example");
    let lots = lots(&*store, &people, first_index, first_lot);
    assert!(store.stage_part(third, lots, later, TTL).await?);
    assert_eq!(
        store.commit_part(ended(third, 5, 0), later).await?,
        PartEnd::Done
    );
    let rows = all_rows(&*store, batch).await?;
    assert_eq!(rows.len(), 5);
    assert!(rows.iter().all(|row| row.row.email.domain() == "y.example"));
    start(&*store, batch, later).await?;
    assert_eq!(
        Node::new(1).lease(&*store, later, "x.example", 10).await?,
        []
    );
    assert_eq!(checked(&*store, batch).await?.counters.queued, 5);
    Ok(())
}

/// A part takes effect once, and not after the start or the cancel of its batch.
pub async fn a_part_comes_before_the_start_or_not_at_all(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = opened(&*store, people(2, "x.example")).await?;
    let (late, attempt) = (part(batch, 1), id(1_001));
    let key = CallKey {
        account: "acme".into(),
        key: "k".into(),
    };
    let call = NewCall {
        key: key.clone(),
        fingerprint: [1; 32],
        attempt,
    };
    store.begin_call(call.clone(), T0, TTL).await?;
    staged(&*store, late, &people(4, "y.example")).await?;
    let mut end = ended(late, 4, 0);
    end.call = Some(EndedCall {
        key,
        attempt,
        answer: b"added".as_slice().into(),
    });
    assert_eq!(store.commit_part(end, T0).await?, PartEnd::Done);
    let again = store
        .begin_call(
            NewCall {
                attempt: id(7),
                ..call
            },
            T0,
            TTL,
        )
        .await?;
    assert_eq!(again, crate::Begun::Done(b"added".as_slice().into()));

    let late = part(batch, 2);
    staged(&*store, late, &people(3, "z.example")).await?;
    start(&*store, batch, T0).await?;
    let refused = PartEnd::Impossible(BatchState::InProgress);
    assert_eq!(store.commit_part(ended(late, 3, 0), T0).await?, refused);
    store.drop_part(late, T0).await?;
    let refused = PartTurn::Impossible(BatchState::InProgress);
    assert_eq!(store.begin_part(part(batch, 3), T0, TTL).await?, refused);
    assert_eq!(
        store.begin_part(part(id(99), 3), T0, TTL).await?,
        PartTurn::Unknown
    );
    assert_eq!(checked(&*store, batch).await?.counters.queued, 6);
    Ok(())
}

/// An open batch is neither paused nor completed; a cancel ends all of it, and one of nobody is
/// completed by its start.
pub async fn an_open_batch_ends_by_a_cancel_or_its_start(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = opened(&*store, people(2, "x.example")).await?;
    add(&*store, part(batch, 1), &people(600, "y.example")).await?;
    for change in [BatchChange::Pause, BatchChange::Resume] {
        let outcome = store.change_batch(batch, change, T0).await?;
        assert_eq!(outcome, ChangeOutcome::Impossible(BatchState::Open));
    }
    store.backlog(T0, None, 10).await?;
    assert_eq!(checked(&*store, batch).await?.state, BatchState::Open);
    let outcome = store.change_batch(batch, BatchChange::Cancel, T0).await?;
    let ChangeOutcome::Done {
        cancelled,
        in_flight,
        ..
    } = outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!((cancelled, in_flight), (602, 0));
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.counters.cancelled),
        (BatchState::Cancelled, 602)
    );
    let outcome = store.change_batch(batch, BatchChange::Start, T0).await?;
    assert_eq!(outcome, ChangeOutcome::Impossible(BatchState::Cancelled));

    let mut spec = Spec::new(2, Vec::new());
    spec.head.held = true;
    spec.head.release_at = T0 + secs(60);
    let nobody = spec.submit(&*store, T0).await?;
    assert_eq!(
        start(&*store, nobody, T0).await?.state,
        BatchState::Completed
    );
    let mut spec = Spec::new(3, people(1, "x.example"));
    spec.head.held = true;
    spec.head.release_at = T0 + secs(60);
    let later = spec.submit(&*store, T0).await?;
    assert_eq!(
        start(&*store, later, T0).await?.state,
        BatchState::Scheduled
    );
    store.backlog(T0 + secs(60), None, 10).await?;
    assert_eq!(checked(&*store, later).await?.state, BatchState::InProgress);
    Ok(())
}

/// The addresses of the parts before are found, by whoever asks.
pub async fn addresses_of_earlier_parts_are_found(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let batch = opened(&*store, people(3, "x.example")).await?;
    add(&*store, part(batch, 1), &people(501, "y.example")).await?;
    let all = store.part_hashes(batch, 0).await?;
    assert_eq!(all.iter().map(|lot| lot.hashes.len()).sum::<usize>(), 504);
    let hash = address_hash("n500@y.example");
    let with = all
        .iter()
        .find(|lot| lot.hashes.contains(&hash))
        .expect("its lot");
    let rows = store.lot_rows(batch, with.lot).await?;
    assert!(
        rows.iter()
            .any(|row| row.email.as_str() == "n500@y.example")
    );
    let after = all
        .iter()
        .map(|lot| (lot.lot.0 & 0x00ff_ffff) + 1)
        .max()
        .expect("lots");
    assert_eq!(store.part_hashes(batch, after).await?, []);
    add(&*store, part(batch, 2), &people(2, "z.example")).await?;
    let new = store.part_hashes(batch, after).await?;
    assert_eq!(new.iter().map(|lot| lot.hashes.len()).sum::<usize>(), 2);
    Ok(())
}
