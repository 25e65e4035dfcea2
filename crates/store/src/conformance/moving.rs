//! Rules of moving a store: what one gives away, another one of any engine takes in.

use super::Fixture;
use super::support::*;
use crate::backup::{BackupReader, BackupWriter};
use crate::{
    BatchChange, Begun, CallKey, EndedCall, Erase, MIXED, NewBatch, NewCall, Note, PEOPLE, Piece,
    Result, Store, StoreError, Suppression, Suspension,
};
use model::{
    Actor, AttemptResult, BatchId, BatchState, Event, HitKind, SuppressionReason, Timestamp,
    TrackingMode,
};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;

/// Everything of a store, as a file.
pub(super) async fn exported(store: &dyn Store, now: Timestamp) -> Result<Vec<u8>> {
    let (to, mut pieces) = mpsc::channel(4);
    let writing = async {
        let mut writer = BackupWriter::new(Vec::new()).expect("memory");
        while let Some(piece) = pieces.recv().await {
            writer.write(&piece).expect("memory");
        }
        writer.finish().expect("memory")
    };
    let (given, file) = tokio::join!(store.export(to, now), writing);
    given.map(|()| file)
}

pub(super) async fn imported(store: &dyn Store, file: &[u8], now: Timestamp) -> Result<()> {
    let mut reader = BackupReader::new(file)?;
    while let Some(piece) = reader.next_piece()? {
        store.import(piece, now).await?;
    }
    Ok(())
}

fn ids_of(events: &[Event]) -> BTreeSet<uuid::Uuid> {
    events.iter().map(|event| event.id).collect()
}

/// A call that takes effect once.
fn called(attempt: BatchId) -> NewCall {
    let key = CallKey {
        account: "acme".into(),
        key: "the call".into(),
    };
    NewCall {
        key,
        fingerprint: [7; 32],
        attempt,
    }
}

/// A batch whose time has not come, of a call that takes effect once.
async fn promised(store: &dyn Store) -> Result<BatchId> {
    let mut coming = Spec::new(3, people(5, "later.example"));
    coming.head.release_at = T0 + secs(5_000);
    let call = called(coming.head.id);
    assert_eq!(store.begin_call(call.clone(), T0, TTL).await?, Begun::Fresh);
    store
        .stage_lots(coming.head.id, coming.lots(store.partitions()))
        .await?;
    let answered = EndedCall {
        key: call.key,
        attempt: call.attempt,
        answer: b"202".as_slice().into(),
    };
    let committed = NewBatch {
        call: Some(answered),
        ..coming.committed()
    };
    store.commit_batch(committed, T0).await?;
    Ok(coming.head.id)
}

/// What a store of every kind of thing has: the batches of it.
async fn filled(store: &dyn Store, node: &mut Node) -> Result<Vec<BatchId>> {
    let ended = Spec::new(1, people(700, "x.example"))
        .submit(store, T0)
        .await?;
    let leased = node.lease(store, T0, "x.example", 700).await?;
    node.report(store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    let click = hit(ended, 3, HitKind::Click, Actor::Human, T0);
    node.report(store, vec![click], T0).await?;
    // Some delivered, some deferred out of a mixed lot, some untouched.
    let mut mixed = people(30, "y.example");
    mixed.extend(people(30, "z.example"));
    let mut mixed = Spec::new(2, mixed);
    mixed.mixed = true;
    mixed.rejected = vec![5];
    let mixed = mixed.submit(store, T0).await?;
    let leased = node.lease(store, T0, MIXED, 40).await?;
    let mut facts = Vec::new();
    for (at, fact) in outcomes(&leased, AttemptResult::Delivered, T0)
        .into_iter()
        .enumerate()
    {
        let deferred = later(T0 + secs(600));
        facts.push(if at % 2 == 0 {
            with(fact, |of| of.result = deferred)
        } else {
            fact
        });
    }
    node.report(store, facts, T0).await?;
    for range in &leased {
        node.finish(store, range.range, T0).await?;
    }
    let coming = promised(store).await?;
    let suppression = Suppression {
        email: "gone@x.example".into(),
        account: "acme".into(),
        list: Some("news".into()),
        reason: SuppressionReason::Unsubscribed,
        source: "api".into(),
        created_at: T0,
    };
    store.suppress(vec![suppression], T0).await?;
    let mode = Some(TrackingMode::Aggregate);
    for email in ["n1@x.example", "n9@x.example"] {
        store.set_consent("acme", email, mode, T0).await?;
    }
    let mut erase = Erase {
        account: "acme".into(),
        email: "n9@x.example".into(),
        after: None,
    };
    loop {
        erase.after = store.erase(erase.clone(), T0).await?.next;
        if erase.after.is_none() {
            break;
        }
    }
    let note = Note {
        kind: "limit".into(),
        key: "a".into(),
        value: [1, 0, 255].into(),
        expires_at: Some(T0 + secs(90_000)),
    };
    store.put_notes(vec![note], T0).await?;
    let person = |n: u16| Note {
        kind: format!("{PEOPLE}acme").into(),
        key: format!("p-{n}").into(),
        value: n.to_le_bytes().into(),
        expires_at: None,
    };
    store
        .put_notes((0..1_200).map(person).collect(), T0)
        .await?;
    let suspension = Suspension {
        destination: "slow.example".into(),
        until: None,
        reason: "by hand".into(),
        by: "ops".into(),
        since: T0,
    };
    store.suspend(suspension, T0).await?;
    assert_eq!(store.setting("key", "value").await?, "value");
    Ok(vec![ended, mixed, coming])
}

/// What people let be kept came along, and holds for mail that was sent by the old store.
async fn consents_moved(old: &dyn Store, new: &dyn Store, batch: BatchId) -> Result<()> {
    for (email, noted) in [("n1", true), ("n9", true), ("n8", false)] {
        let email = format!("{email}@x.example");
        let was = old.consent("acme", &email).await?;
        assert_eq!(was.is_some(), noted, "{email}");
        assert_eq!(new.consent("acme", &email).await?, was, "{email}");
    }
    let told = all_events(new).await?.len();
    let click = vec![hit(batch, 1, HitKind::Click, Actor::Human, T0)];
    Node::new(7).report(new, click, T0).await?;
    assert_eq!(all_events(new).await?.len(), told, "counted, and no event");
    Ok(())
}

/// A store that was moved has every batch, status, fact, event and suppression; it starts paused, who
/// was held is in doubt, and nobody gets anything twice.
pub async fn a_store_moves(from: &dyn Fixture, to: &dyn Fixture) -> Result<()> {
    let old = from.mta().await;
    let mut node = Node::new(1);
    let batches = filled(&*old, &mut node).await?;
    // A node that sends while the store is given away.
    let flying = Spec::new(4, neighbours(&*old, 200, "w.example"))
        .submit(&*old, T0)
        .await?;
    let held = node.lease(&*old, T0, "w.example", 100).await?;
    assert_eq!(
        held.iter().map(|range| range.items.len()).sum::<usize>(),
        100
    );
    let file = exported(&*old, T0).await?;
    let told = all_events(&*old).await?;

    let new = to.mta().await;
    imported(&*new, &file, T0).await?;
    let twice = imported(&*new, &file, T0).await;
    assert!(matches!(twice, Err(StoreError::Refused(_))), "{twice:?}");
    for &batch in batches.iter().chain([&flying]) {
        let (was, is) = (checked(&*old, batch).await?, checked(&*new, batch).await?);
        assert_eq!((&is.head, is.counters), (&was.head, was.counters));
        let open = is.counters.open() > 0;
        assert_eq!(is.state == BatchState::Paused, open, "{is:?}");
        assert_eq!(all_rows(&*new, batch).await?, all_rows(&*old, batch).await?);
        assert_eq!(new.content(batch).await?, old.content(batch).await?);
    }
    assert_eq!(ids_of(&all_events(&*new).await?), ids_of(&told));
    let of = |email: &'static str| {
        let (old, new) = (&old, &new);
        async move {
            let was = old.address("acme", email).await?.suppressions;
            Ok::<_, StoreError>((was, new.address("acme", email).await?.suppressions))
        }
    };
    for email in ["gone@x.example", "n9@x.example", "n8@x.example"] {
        let (was, is) = of(email).await?;
        assert_eq!(is, was, "{email}");
    }
    consents_moved(&*old, &*new, batches[0]).await?;
    assert_eq!(new.setting("key", "other").await?, "value");
    assert_eq!(new.notes("limit", T0).await?, old.notes("limit", T0).await?);
    let people = format!("{PEOPLE}acme");
    let known = new.notes(&people, T0).await?;
    assert_eq!(known.len(), 1_200);
    assert_eq!(known, old.notes(&people, T0).await?);
    assert_eq!(new.suspensions(T0).await?, old.suspensions(T0).await?);
    assert_eq!(
        new.high_water(node.journal).await?,
        old.high_water(node.journal).await?
    );

    // Who calls again because an answer was lost gets the answer, and sends nothing twice.
    let again = new.begin_call(called(id(99)), T0, TTL).await?;
    assert_eq!(again, Begun::Done(b"202".as_slice().into()));

    // Nothing leaves before somebody says so.
    let next = Node::new(2);
    let at = T0 + secs(900);
    for queue in ["w.example", MIXED, "y.example", "z.example"] {
        assert_eq!(next.lease(&*new, at, queue, 500).await?, []);
    }
    for batch in [batches[1], flying] {
        new.change_batch(batch, BatchChange::Resume, at).await?;
    }
    let leased = next.lease(&*new, at, "w.example", 500).await?;
    let items: Vec<_> = leased.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len(), 200);
    let windows: usize = held.iter().map(|range| range.window as usize).sum();
    let in_doubt: BTreeSet<_> = items
        .iter()
        .filter(|item| item.maybe_started)
        .map(|item| item.row.index)
        .collect();
    let held_ones: BTreeSet<_> = held
        .iter()
        .flat_map(|range| range.items.iter().take(range.window as usize))
        .map(|item| item.row.index)
        .collect();
    assert_eq!(held_ones.len(), windows);
    assert_eq!(in_doubt, held_ones);
    // Those who wait for another attempt come in their own queues, with the attempts they had.
    let mut again = Vec::new();
    for queue in [MIXED, "y.example", "z.example"] {
        again.extend(next.lease(&*new, at, queue, 500).await?);
    }
    let items: Vec<_> = again.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len(), 40, "20 deferred and 20 untouched");
    assert_eq!(items.iter().filter(|item| item.attempts == 1).count(), 20);
    // The node's journal comes later: each fact counts once.
    let late = outcomes(&held, AttemptResult::Delivered, at);
    let late = node.write(late);
    for _ in 0..2 {
        new.ship(node.shipment(late.clone(), at)).await?;
    }
    assert_eq!(checked(&*new, flying).await?.counters.delivered, 100);
    Ok(())
}

/// An import that was cut off leaves a store that nobody opens.
pub async fn half_an_import_is_no_store(from: &dyn Fixture, to: &dyn Fixture) -> Result<()> {
    let old = from.mta().await;
    filled(&*old, &mut Node::new(1)).await?;
    let file = exported(&*old, T0).await?;
    let new = to.mta().await;
    let mut reader = BackupReader::new(file.as_slice())?;
    while let Some(piece) = reader.next_piece()? {
        if matches!(piece, Piece::Batch(_)) {
            break;
        }
        new.import(piece, T0).await?;
    }
    Ok(())
}

/// What is given away while a node sends: everybody is in it once, as they were at some moment since
/// it was begun, and whom the node had taken before is delivered or in doubt.
pub async fn a_store_moves_while_it_sends(from: &dyn Fixture, to: &dyn Fixture) -> Result<()> {
    let old = from.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(3_000, "x.example"))
        .submit(&*old, T0)
        .await?;
    let step = async |node: &mut Node| -> Result<Vec<u32>> {
        let leased = node.lease(&*old, T0, "x.example", 40).await?;
        let indices = leased
            .iter()
            .flat_map(|range| &range.items)
            .map(|item| item.row.index);
        let indices = indices.collect();
        node.report(&*old, outcomes(&leased, AttemptResult::Delivered, T0), T0)
            .await?;
        for range in &leased {
            node.finish(&*old, range.range, T0).await?;
        }
        Ok(indices)
    };
    let before: BTreeSet<u32> = step(&mut node).await?.into_iter().collect();
    let held = node.lease(&*old, T0, "x.example", 30).await?;
    let ended = AtomicBool::new(false);
    let sending = async {
        let mut sent = 0;
        while !ended.load(Ordering::Relaxed) {
            sent += step(&mut node).await?.len();
        }
        Ok::<_, StoreError>(sent)
    };
    let giving = async {
        let file = exported(&*old, T0).await;
        ended.store(true, Ordering::Relaxed);
        file
    };
    let (file, sent) = tokio::join!(giving, sending);
    assert!(sent? > 0, "nothing was sent meanwhile");
    let new = to.mta().await;
    imported(&*new, &file?, T0).await?;
    let found = checked(&*new, batch).await?;
    assert_eq!(
        (found.counters.accepted, found.state),
        (3_000, BatchState::Paused)
    );
    let rows = all_rows(&*new, batch).await?;
    let there: BTreeSet<u32> = rows.iter().map(|row| row.row.index).collect();
    assert_eq!(there.len(), 3_000);
    let delivered: BTreeSet<u32> = rows
        .iter()
        .filter(|row| row.status == model::Status::Delivered)
        .map(|row| row.row.index)
        .collect();
    assert!(delivered.is_superset(&before));
    new.change_batch(batch, BatchChange::Resume, T0).await?;
    let leased = Node::new(2).lease(&*new, T0, "x.example", 3_000).await?;
    let items: Vec<_> = leased.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len() + delivered.len(), 3_000);
    let certain: BTreeSet<u32> = items
        .iter()
        .filter(|item| !item.maybe_started)
        .map(|item| item.row.index)
        .collect();
    // Who was never looked at is in no doubt: that may be taken for delivered.
    let in_doubt = items.len() - certain.len();
    eprintln!("{in_doubt} of {} in doubt", items.len());
    assert!(in_doubt < 1_000, "{in_doubt} of {}", items.len());
    let taken = held
        .iter()
        .flat_map(|range| &range.items)
        .map(|item| item.row.index);
    assert!(taken.into_iter().all(|index| !certain.contains(&index)));
    Ok(())
}
