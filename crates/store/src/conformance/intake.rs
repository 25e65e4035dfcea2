//! Rules of intake: staging, the commit, release.

use super::Fixture;
use super::support::*;
use crate::{
    BatchChange, BatchQuery, Begun, CALL_KEPT, CallKey, Control, EndedCall, NewBatch, NewCall,
    Result, StoreError,
};
use model::{BatchId, BatchState, MessageId, Timestamp};
use std::time::Duration;

/// What is staged is no batch, no work and no event until it is committed; it can be abandoned.
pub async fn nothing_is_visible_before_the_commit(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(600, "x.example"));
    store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await?;
    assert_eq!(store.batch(spec.head.id).await?, None);
    assert_eq!(store.content(spec.head.id).await?, None);
    let query = BatchQuery {
        limit: 10,
        ..BatchQuery::default()
    };
    assert_eq!(store.batches(query).await?.items, []);
    assert_eq!(store.backlog(T0, None, 10).await?, []);
    assert_eq!(Node::new(1).lease(&*store, T0, "x.example", 10).await?, []);
    assert_eq!(all_rows(&*store, spec.head.id).await?, []);
    assert_eq!(all_events(&*store).await?, []);
    assert_eq!(store.totals(T0).await?.queued, 0);
    let gone = store.address("acme", "n1@x.example").await?;
    assert_eq!(gone.messages, []);

    store.abandon_batch(spec.head.id).await?;
    spec.submit(&*store, T0).await?;
    assert_eq!(checked(&*store, spec.head.id).await?.counters.queued, 600);
    Ok(())
}

/// A process that ended before its commit leaves nothing.
pub async fn what_was_left_staged_is_thrown_away(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(3, "x.example"));
    store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await?;
    drop(store);
    let store = fixture.mta().await;
    spec.submit(&*store, T0).await?;
    assert_eq!(checked(&*store, spec.head.id).await?.counters.accepted, 3);
    assert_eq!(
        Node::new(1)
            .lease(&*store, T0, "x.example", 10)
            .await?
            .iter()
            .map(|r| r.items.len())
            .sum::<usize>(),
        3
    );
    Ok(())
}

/// With the commit there are the batch, its rows by index, its events and its work; another
/// process sees them too.
pub async fn a_commit_shows_everything_at_once(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let cursor = store.control(None).await?.next;
    let mut emails = people(1_200, "x.example");
    emails.extend(people(300, "Y.example"));
    let mut spec = Spec::new(1, emails.clone());
    spec.rejected = vec![0, 5, 1_030];
    let batch = spec.submit(&*store, T0).await?;
    for store in [store.clone(), fixture.another().await] {
        let found = checked(&*store, batch).await?;
        assert_eq!(found.head, spec.head);
        assert_eq!(
            (found.state, found.archived),
            (BatchState::InProgress, false)
        );
        assert_eq!((found.started_at, found.completed_at), (Some(T0), None));
        assert_eq!(found.counters.queued, 1_500);
        assert_eq!(
            store.content(batch).await?.as_deref(),
            Some(&*spec.committed().content)
        );
        let rows = all_rows(&*store, batch).await?;
        let indices: Vec<u32> = (0..1_503)
            .filter(|index| !spec.rejected.contains(index))
            .collect();
        assert_eq!(
            rows.iter().map(|row| row.row.index).collect::<Vec<_>>(),
            indices
        );
        assert_eq!(rows[1_499].row.email.as_str(), "n299@y.example");
        assert_eq!(store.message(MessageId { batch, index: 5 }).await?, None);
        assert_eq!(
            store
                .message(MessageId {
                    batch,
                    index: 1_503
                })
                .await?,
            None
        );
        let events = all_events(&*store).await?;
        assert_eq!(kinds(&events), ["batch.accepted", "batch.started"]);
        assert_eq!(
            events[0].data,
            serde_json::json!({"first_index": 0, "count": 1_500, "rejected_count": 3})
        );
        let backlog = store.backlog(T0, None, 10).await?;
        let due: Vec<_> = backlog.iter().map(|of| (&*of.queue, of.due)).collect();
        assert_eq!(due, [("x.example", 1_200), ("y.example", 300)]);
        assert_eq!(store.backlog(T0, Some("x.example"), 10).await?.len(), 1);
        assert_eq!(store.backlog(T0, None, 1).await?.len(), 1);
    }
    assert_eq!(store.control(Some(cursor)).await?.items, [Control::Work]);
    Ok(())
}

/// Whoever did not hear the answer may commit again.
pub async fn a_commit_can_be_repeated(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(3, "x.example"));
    spec.submit(&*store, T0).await?;
    store.commit_batch(spec.committed(), T0 + secs(1)).await?;
    assert_eq!(checked(&*store, spec.head.id).await?.counters.accepted, 3);
    assert_eq!(all_events(&*store).await?.len(), 2);
    let again = store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await;
    assert!(matches!(again, Err(StoreError::Refused(_))), "{again:?}");
    Ok(())
}

/// Whoever got no answer stages again; the same lot is there once, and another is not taken for it.
pub async fn staging_can_be_repeated(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(600, "x.example"));
    let lots = spec.lots(store.partitions());
    let first = lots.iter().take(1).cloned().collect();
    store.stage_lots(spec.head.id, first).await?;
    for _ in 0..2 {
        store.stage_lots(spec.head.id, lots.clone()).await?;
    }
    let mut others = lots;
    for lot in &mut others {
        lot.rows.reverse();
    }
    let other = store.stage_lots(spec.head.id, others).await;
    assert!(matches!(other, Err(StoreError::Refused(_))), "{other:?}");
    store.commit_batch(spec.committed(), T0).await?;
    assert_eq!(checked(&*store, spec.head.id).await?.counters.queued, 600);
    let leased = Node::new(1).lease(&*store, T0, "x.example", 1_000).await?;
    assert_eq!(sorted(emails(&leased)), sorted(spec.emails));
    Ok(())
}

/// `accepted` is the sum of the rows staged, or nothing is committed.
pub async fn a_commit_that_does_not_add_up_is_refused(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(3, "x.example"));
    store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await?;
    let mut wrong = spec.committed();
    wrong.accepted = 4;
    assert!(matches!(
        store.commit_batch(wrong, T0).await,
        Err(StoreError::Refused(_))
    ));
    assert_eq!(store.batch(spec.head.id).await?, None);
    store.commit_batch(spec.committed(), T0).await?;
    assert_eq!(checked(&*store, spec.head.id).await?.counters.queued, 3);
    Ok(())
}

/// A batch of which nothing was accepted is a batch all the same.
pub async fn all_rejected_is_completed_at_once(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut spec = Spec::new(1, Vec::new());
    spec.rejected = vec![0, 1];
    spec.submit(&*store, T0).await?;
    let batch = checked(&*store, spec.head.id).await?;
    assert_eq!(
        (batch.state, batch.completed_at),
        (BatchState::Completed, Some(T0))
    );
    assert_eq!(
        kinds(&all_events(&*store).await?),
        ["batch.accepted", "batch.completed"]
    );
    Ok(())
}

/// Before its release time a batch is `scheduled`, and so are its recipients; then both start.
pub async fn mail_waits_for_its_release_time(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let mut spec = Spec::new(1, people(3, "x.example"));
    spec.head.release_at = T0 + secs(3_600);
    let batch = spec.submit(&*store, T0).await?;
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.counters.scheduled, found.started_at),
        (BatchState::Scheduled, 3, None)
    );
    let early = T0 + secs(3_599);
    assert_eq!(node.lease(&*store, early, "x.example", 10).await?, []);
    let backlog = store.backlog(early, None, 10).await?;
    assert_eq!(
        (backlog[0].due, backlog[0].next_due),
        (0, Some(spec.head.release_at))
    );
    assert_eq!(store.totals(early).await?.oldest_due, None);

    let backlog = store.backlog(spec.head.release_at, None, 10).await?;
    assert_eq!(backlog.iter().map(|of| of.due).sum::<u64>(), 3);
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.counters.queued),
        (BatchState::InProgress, 3)
    );
    assert_eq!(found.started_at, Some(spec.head.release_at));
    let leased = node
        .lease(&*store, spec.head.release_at, "x.example", 10)
        .await?;
    assert_eq!(emails(&leased).len(), 3);
    assert_eq!(
        kinds(&all_events(&*store).await?),
        ["batch.accepted", "batch.started"]
    );
    Ok(())
}

const RUNNING: Duration = Duration::from_secs(60);

fn call(account: &str, fingerprint: u8, attempt: BatchId) -> NewCall {
    NewCall {
        key: CallKey {
            account: account.to_owned(),
            key: "order-7".to_owned(),
        },
        fingerprint: [fingerprint; 32],
        attempt,
    }
}

/// The commit of `spec` as the end of `call`.
fn ending(spec: &Spec, call: &NewCall) -> NewBatch {
    NewBatch {
        call: Some(EndedCall {
            key: call.key.clone(),
            attempt: call.attempt,
            answer: b"202".as_slice().into(),
        }),
        ..spec.committed()
    }
}

/// Whoever calls again while the first is at it waits; afterwards they get its answer, from every
/// process; the same name for something else is refused. Names belong to an account.
pub async fn a_call_takes_effect_once(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (spec, other) = (
        Spec::new(1, people(3, "x.example")),
        Spec::new(2, people(3, "x.example")),
    );
    let first = call("acme", 7, spec.head.id);
    let second = call("acme", 7, other.head.id);
    assert_eq!(
        store.begin_call(first.clone(), T0, RUNNING).await?,
        Begun::Fresh
    );
    assert_eq!(
        store.begin_call(second.clone(), T0, RUNNING).await?,
        Begun::Running
    );
    let elsewhere = call("other", 7, other.head.id);
    assert_eq!(
        store.begin_call(elsewhere, T0, RUNNING).await?,
        Begun::Fresh
    );

    store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await?;
    store.commit_batch(ending(&spec, &first), T0).await?;
    // Whoever got no answer asks again.
    store.commit_batch(ending(&spec, &first), T0).await?;
    let done = Begun::Done(b"202".as_slice().into());
    assert_eq!(store.begin_call(second.clone(), T0, RUNNING).await?, done);
    assert_eq!(
        store
            .begin_call(call("acme", 8, other.head.id), T0, RUNNING)
            .await?,
        Begun::Conflict
    );
    drop(store);
    let store = fixture.mta().await;
    assert_eq!(store.begin_call(second, T0, RUNNING).await?, done);
    Ok(())
}

/// An answer is kept for a day, and longer while its batch is at work.
pub async fn a_call_is_kept_until_its_batch_has_ended(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let spec = Spec::new(1, people(3, "x.example"));
    let first = call("acme", 7, spec.head.id);
    store.begin_call(first.clone(), T0, RUNNING).await?;
    store
        .stage_lots(spec.head.id, spec.lots(store.partitions()))
        .await?;
    store.commit_batch(ending(&spec, &first), T0).await?;
    let again = |at: Timestamp| store.begin_call(call("acme", 7, BatchId::new(T0, 9)), at, RUNNING);
    let done = Begun::Done(b"202".as_slice().into());
    assert_eq!(again(T0 + CALL_KEPT + RUNNING).await?, done);
    store
        .change_batch(spec.head.id, BatchChange::Cancel, T0)
        .await?;
    assert_eq!(again(T0 + CALL_KEPT - RUNNING).await?, done);
    assert_eq!(again(T0 + CALL_KEPT + RUNNING).await?, Begun::Fresh);
    Ok(())
}

/// A try that is refused, or that takes too long, or whose process is gone, blocks nobody; and a
/// try that was overtaken commits nothing.
pub async fn a_call_that_ends_in_nothing_makes_room(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (spec, other) = (
        Spec::new(1, people(3, "x.example")),
        Spec::new(2, people(3, "x.example")),
    );
    let (first, second) = (
        call("acme", 7, spec.head.id),
        call("acme", 7, other.head.id),
    );
    store.begin_call(first.clone(), T0, RUNNING).await?;
    store.drop_call(first.key.clone(), other.head.id).await?;
    assert_eq!(
        store.begin_call(second.clone(), T0, RUNNING).await?,
        Begun::Running
    );
    store.drop_call(first.key.clone(), spec.head.id).await?;
    assert_eq!(
        store.begin_call(second.clone(), T0, RUNNING).await?,
        Begun::Fresh
    );

    // The second renews, and the first takes over only when that has run out.
    let (renewed, late) = (T0 + RUNNING / 2, T0 + RUNNING * 2);
    assert_eq!(
        store.begin_call(second.clone(), renewed, RUNNING).await?,
        Begun::Fresh
    );
    assert_eq!(
        store
            .begin_call(first.clone(), T0 + RUNNING, RUNNING)
            .await?,
        Begun::Running
    );
    assert_eq!(
        store.begin_call(first.clone(), late, RUNNING).await?,
        Begun::Fresh
    );
    for spec in [&spec, &other] {
        store
            .stage_lots(spec.head.id, spec.lots(store.partitions()))
            .await?;
    }
    let overtaken = store.commit_batch(ending(&other, &second), late).await;
    assert!(
        matches!(overtaken, Err(StoreError::Unavailable(_))),
        "{overtaken:?}"
    );
    assert_eq!(store.batch(other.head.id).await?, None);
    store.commit_batch(ending(&spec, &first), late).await?;
    Ok(())
}
