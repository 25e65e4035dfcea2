//! Rules of suppressions, of changes of a batch, and of the control feed.

use super::Fixture;
use super::support::*;
use crate::{
    BatchChange, ChangeOutcome, Control, ControlCursor, EventQuery, FeedPlace, Release, Result,
    Store, Suppression,
};
use model::{
    AttemptResult, BatchId, BatchState, EventKind, Priority, Status, SuppressionReason, Timestamp,
};
use std::time::Duration;

fn entry(email: &str, list: Option<&str>, reason: SuppressionReason) -> Suppression {
    Suppression {
        email: email.into(),
        account: "acme".into(),
        list: list.map(str::to_owned),
        reason,
        source: "api".into(),
        created_at: T0,
    }
}

async fn change(
    store: &dyn Store,
    batch: BatchId,
    change: BatchChange,
    now: Timestamp,
) -> Result<(u64, u64)> {
    match store.change_batch(batch, change, now).await? {
        ChangeOutcome::Done {
            cancelled,
            in_flight,
            batch: after,
        } => {
            assert_eq!(*after, checked(store, batch).await?);
            Ok((cancelled, in_flight))
        }
        other => panic!("{change:?}: {other:?}"),
    }
}

/// Whom a suppression stops is ended in the step that leases, with the reason.
pub async fn the_suppressed_are_ended_at_the_lease(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let reasons = [
        ("manual@x.example", None, SuppressionReason::Manual),
        (
            "other@x.example",
            Some("offers"),
            SuppressionReason::Unsubscribed,
        ),
        (
            "left@x.example",
            Some("news"),
            SuppressionReason::Unsubscribed,
        ),
        ("spam@x.example", None, SuppressionReason::Complaint),
    ];
    store
        .suppress(
            reasons
                .map(|(email, list, reason)| entry(email, list, reason))
                .into(),
            T0,
        )
        .await?;
    let emails_in: Vec<String> = [
        "Manual@x.example",
        "other@x.example",
        "left@x.example",
        "spam@x.example",
        "free@x.example",
    ]
    .map(str::to_owned)
    .into();
    let bulk = Spec::new(1, emails_in.clone()).submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 10).await?;
    assert_eq!(
        sorted(emails(&leased)),
        ["free@x.example", "other@x.example"]
    );
    let statuses: Vec<_> = all_rows(&*store, bulk)
        .await?
        .iter()
        .map(|row| row.status)
        .collect();
    use Status::{Queued, Suppressed};
    assert_eq!(
        statuses,
        [Suppressed, Queued, Suppressed, Suppressed, Queued]
    );
    checked(&*store, bulk).await?;
    let events = all_events(&*store).await?;
    let of_left = events.iter().find(|event| {
        event.kind.as_str() == "email.suppressed"
            && event
                .recipient
                .as_ref()
                .is_some_and(|recipient| recipient.email == "left@x.example")
    });
    assert_eq!(
        of_left.map(|event| event.data.clone()),
        Some(serde_json::json!({"reason": "unsubscribed"}))
    );

    // An unsubscribe and a complaint never stop transactional mail; another account stops nobody.
    let mut urgent = Spec::new(2, emails_in.clone());
    urgent.head.priority = Priority::Transactional;
    urgent.submit(&*store, T0).await?;
    assert_eq!(
        emails(&node.lease(&*store, T0, "x.example", 10).await?).len(),
        4
    );
    let mut foreign = Spec::new(3, emails_in);
    foreign.head.account = "other".into();
    foreign.submit(&*store, T0).await?;
    assert_eq!(
        emails(&node.lease(&*store, T0, "x.example", 10).await?).len(),
        5
    );
    Ok(())
}

/// What is lifted stops nothing more, and everyone is told.
pub async fn a_lifted_suppression_stops_nothing(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let cursor = store.control(None).await?.next;
    let both = vec![
        entry("a@x.example", None, SuppressionReason::Manual),
        entry("a@x.example", Some("news"), SuppressionReason::Unsubscribed),
    ];
    store.suppress(both.clone(), T0).await?;
    assert_eq!(
        store
            .unsuppress("acme", "a@x.example", Some("nope"), T0)
            .await?,
        0
    );
    assert_eq!(
        store
            .unsuppress("acme", "a@x.example", Some("news"), T0)
            .await?,
        1
    );
    Spec::new(1, vec!["a@x.example".into()])
        .submit(&*store, T0)
        .await?;
    store.suppress(both[1..].to_vec(), T0).await?;
    assert_eq!(store.unsuppress("acme", "a@x.example", None, T0).await?, 2);
    assert_eq!(
        emails(&Node::new(1).lease(&*store, T0, "x.example", 1).await?),
        ["a@x.example"]
    );
    let told = store.control(Some(cursor)).await?.items;
    let lifted = |list: Option<&str>| Control::Unsuppressed {
        account: "acme".into(),
        email: "a@x.example".into(),
        list: list.map(str::to_owned),
    };
    let all = [
        Control::Suppressed(both[0].clone()),
        Control::Suppressed(both[1].clone()),
        lifted(Some("news")),
        Control::Work,
        Control::Suppressed(both[1].clone()),
        lifted(None),
    ];
    assert_eq!(
        in_any_order(&*store, told),
        in_any_order(&*store, all.into())
    );
    let removed = kinds(&all_events(&*store).await?)
        .iter()
        .filter(|kind| **kind == "suppression.removed")
        .count();
    assert_eq!(removed, 3);
    Ok(())
}

/// By hand the newest entry holds; a fact does not weaken what is there.
pub async fn a_weaker_suppression_does_not_replace_a_stronger(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let batch = Spec::new(1, vec!["a@x.example".into()])
        .submit(&*store, T0)
        .await?;
    store
        .suppress(
            vec![entry(
                "a@x.example",
                Some("news"),
                SuppressionReason::Manual,
            )],
            T0,
        )
        .await?;
    let leave = hit(
        batch,
        0,
        model::HitKind::Unsubscribe,
        model::Actor::Human,
        T0,
    );
    tracker.report(&*store, vec![leave], T0).await?;
    let reason =
        |known: Vec<Suppression>| known.iter().map(|entry| entry.reason).collect::<Vec<_>>();
    let known = store.address("acme", "a@x.example").await?.suppressions;
    assert_eq!(reason(known), [SuppressionReason::Manual]);
    store
        .suppress(
            vec![entry(
                "a@x.example",
                Some("news"),
                SuppressionReason::Complaint,
            )],
            T0,
        )
        .await?;
    let known = store.address("acme", "a@x.example").await?.suppressions;
    assert_eq!(reason(known), [SuppressionReason::Complaint]);
    Ok(())
}

/// Paused, nothing of a batch is leased; what is leased stays with its holder.
pub async fn a_paused_batch_is_not_leased(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 10, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 4).await?;
    change(&*store, batch, BatchChange::Pause, T0).await?;
    change(&*store, batch, BatchChange::Pause, T0).await?;
    assert_eq!(node.lease(&*store, T0, "x.example", 10).await?, []);
    assert_eq!(store.backlog(T0, None, 10).await?, []);
    assert_eq!(checked(&*store, batch).await?.state, BatchState::Paused);
    node.report(&*store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    change(&*store, batch, BatchChange::Resume, T0).await?;
    change(&*store, batch, BatchChange::Resume, T0).await?;
    assert_eq!(
        emails(&node.lease(&*store, T0, "x.example", 10).await?).len(),
        6
    );
    let told: Vec<_> = kinds(&all_events(&*store).await?)
        .into_iter()
        .filter(|kind| kind.starts_with("batch."))
        .collect();
    assert_eq!(
        told,
        [
            "batch.accepted",
            "batch.started",
            "batch.paused",
            "batch.resumed"
        ]
    );

    // Paused before its time, it goes on as what it would be.
    let mut waiting = Spec::new(2, people(2, "y.example"));
    waiting.head.release_at = T0 + secs(60);
    let waiting = waiting.submit(&*store, T0).await?;
    change(&*store, waiting, BatchChange::Pause, T0).await?;
    assert_eq!(
        node.lease(&*store, T0 + secs(61), "y.example", 10).await?,
        []
    );
    change(&*store, waiting, BatchChange::Resume, T0 + secs(30)).await?;
    assert_eq!(
        checked(&*store, waiting).await?.state,
        BatchState::Scheduled
    );
    change(&*store, waiting, BatchChange::Pause, T0).await?;
    change(&*store, waiting, BatchChange::Resume, T0 + secs(61)).await?;
    assert_eq!(checked(&*store, waiting).await?.counters.queued, 2);
    Ok(())
}

/// A cancel ends everything but what a holder may have started.
pub async fn a_cancel_ends_what_no_window_holds(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 300, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 100).await?;
    let done = outcome(batch, &leased[0].items[0], AttemptResult::Delivered, T0);
    node.report(&*store, vec![done], T0).await?;
    let (cancelled, in_flight) = change(&*store, batch, BatchChange::Cancel, T0).await?;
    assert_eq!((cancelled, in_flight), (236, 63));
    assert_eq!(
        change(&*store, batch, BatchChange::Cancel, T0).await?,
        (0, 63)
    );
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.completed_at, found.counters.queued),
        (BatchState::Cancelled, None, 63)
    );
    assert_eq!(node.lease(&*store, T0, "x.example", 300).await?, []);
    // Its holder tells the rest: some were on their way, some not.
    let rest = &leased[0].items[1..64];
    let facts = rest.iter().enumerate().map(|(at, item)| {
        let result = if at < 10 {
            AttemptResult::Delivered
        } else {
            AttemptResult::Cancelled
        };
        outcome(batch, item, result, T0)
    });
    let shipped = node.report(&*store, facts.collect(), T0 + secs(2)).await?;
    assert_eq!(shipped.completed, []);
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.counters.delivered, found.counters.cancelled),
        (11, 289)
    );
    assert_eq!(
        (found.state, found.completed_at),
        (BatchState::Cancelled, Some(T0 + secs(2)))
    );
    let told = kinds(&all_events(&*store).await?);
    assert_eq!(
        told.iter()
            .filter(|kind| **kind == "email.cancelled")
            .count(),
        289
    );
    assert_eq!(
        told.iter()
            .filter(|kind| kind.starts_with("batch."))
            .count(),
        3
    );

    let mut waiting = Spec::new(2, people(5, "x.example"));
    waiting.head.release_at = T0 + secs(60);
    let waiting = waiting.submit(&*store, T0).await?;
    assert_eq!(
        change(&*store, waiting, BatchChange::Cancel, T0).await?,
        (5, 0)
    );
    Ok(())
}

/// A node that died in a cancelled batch and is back has what may have been begun, to tell of it.
pub async fn a_restarted_node_tells_what_it_had_begun_of_a_cancelled_batch(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 100, "x.example"))
        .submit(&*store, T0)
        .await?;
    node.lease(&*store, T0, "x.example", 100).await?;
    assert_eq!(
        change(&*store, batch, BatchChange::Cancel, T0).await?,
        (36, 64)
    );
    let back = store.reclaim(node.journal, T0, TTL).await?;
    let items = &back[0].items;
    assert_eq!((back.len(), items.len()), (1, 64));
    assert!(items.iter().all(|item| item.maybe_started));
    let facts = items.iter().enumerate().map(|(at, item)| {
        let result = match at {
            0 => AttemptResult::TemporaryError {
                retry_at: T0 + secs(300),
                ambiguous: true,
            },
            _ => AttemptResult::Cancelled,
        };
        outcome(batch, item, result, T0)
    });
    node.report(&*store, facts.collect(), T0).await?;
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.counters.cancelled, found.completed_at.is_some()),
        (100, true)
    );
    let told = kinds(&all_events(&*store).await?);
    let tried = told.iter().filter(|kind| **kind == "email.temporary_error");
    assert_eq!(tried.count(), 1);
    assert_eq!(store.reclaim(node.journal, T0, TTL).await?, []);
    Ok(())
}

/// Who is suppressed while the node is away that may have written to them ends as nobody knows.
pub async fn a_suppression_of_whom_a_dead_node_may_have_written_to_says_so(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 100, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 100).await?;
    let (windowed, beyond) = (&leased[0].items[5].row, &leased[0].items[99].row);
    let entries = [windowed, beyond].map(|row| {
        let email = row.email.to_string();
        entry(&email, None, SuppressionReason::Manual)
    });
    store.suppress(entries.to_vec(), T0).await?;
    let back = store.reclaim(node.journal, T0, TTL).await?;
    assert_eq!(back[0].items.len(), 98);
    let events = all_events(&*store).await?;
    let ended = events
        .iter()
        .filter(|event| event.kind == EventKind::EmailSuppressed)
        .map(|event| (event.message_id, event.data["ambiguous"] == true));
    let mut ended: Vec<_> = ended.collect();
    ended.sort();
    let message = |row: &model::Row| {
        let index = row.index;
        Some(model::MessageId { batch, index })
    };
    let mut expected = [(message(windowed), true), (message(beyond), false)];
    expected.sort();
    assert_eq!(ended, expected);
    Ok(())
}

/// Nobody waits for a holder that died: what it held of a cancelled batch is cancelled, and of whom
/// it may have written to it is said that nobody knows.
pub async fn a_cancelled_batch_is_swept_when_its_holder_dies(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (dead, other) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 70, "x.example"))
        .submit(&*store, T0)
        .await?;
    let back = Spec::new(2, neighbours(&*store, 5, "y.example"))
        .submit(&*store, T0)
        .await?;
    dead.lease(&*store, T0, "x.example", 70).await?;
    let held = other.lease(&*store, T0, "y.example", 5).await?;
    assert_eq!(
        change(&*store, batch, BatchChange::Cancel, T0).await?,
        (6, 64)
    );
    assert_eq!(
        change(&*store, back, BatchChange::Cancel, T0).await?,
        (0, 5)
    );
    // One hands back what it had not started.
    let release = Release {
        range: held[0].range,
        due_at: None,
        requeue: Vec::new(),
    };
    store.release(vec![release], T0).await?;
    assert_eq!(checked(&*store, back).await?.counters.cancelled, 5);
    // The other is gone: looking for work finds its leavings.
    assert_eq!(store.backlog(T0 + TTL, None, 10).await?, []);
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.counters.cancelled, found.completed_at.is_some()),
        (70, true)
    );
    let events = all_events(&*store).await?;
    let doubted = events
        .iter()
        .filter(|event| event.data["ambiguous"] == true)
        .map(|event| (event.batch_id, event.kind));
    assert_eq!(
        doubted.collect::<Vec<_>>(),
        vec![(Some(batch), EventKind::EmailCancelled); 64]
    );
    Ok(())
}

/// A deferral that comes after the cancel is the end.
pub async fn a_retry_of_a_cancelled_batch_is_cancelled(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 1).await?;
    change(&*store, batch, BatchChange::Cancel, T0).await?;
    node.report(&*store, outcomes(&leased, later(T0 + secs(300)), T0), T0)
        .await?;
    let row = &all_rows(&*store, batch).await?[0];
    assert_eq!((row.status, row.attempts), (Status::Cancelled, 1));
    assert_eq!(
        node.lease(&*store, T0 + secs(600), "x.example", 1).await?,
        []
    );
    let told = kinds(&all_events(&*store).await?);
    assert_eq!(
        told[2..],
        [
            "batch.cancelled",
            "email.temporary_error",
            "email.cancelled"
        ]
    );
    checked(&*store, batch).await?;
    Ok(())
}

/// What is over can be archived and nothing else; what is not there cannot be changed.
pub async fn changes_that_make_no_sense_are_impossible(fixture: &dyn Fixture) -> Result<()> {
    use BatchChange::{Archive, Cancel, Pause, Resume, Unarchive};
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    assert_eq!(
        store.change_batch(id(9), Pause, T0).await?,
        ChangeOutcome::Unknown
    );
    let done = Spec::new(1, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 1).await?;
    node.report(&*store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    let gone = Spec::new(2, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    change(&*store, gone, Cancel, T0).await?;
    for (batch, state, impossible) in [
        (done, BatchState::Completed, &[Pause, Resume, Cancel][..]),
        (gone, BatchState::Cancelled, &[Pause, Resume]),
    ] {
        for &what in impossible {
            assert_eq!(
                store.change_batch(batch, what, T0).await?,
                ChangeOutcome::Impossible(state)
            );
        }
        change(&*store, batch, Archive, T0).await?;
        assert!(checked(&*store, batch).await?.archived);
        change(&*store, batch, Unarchive, T0).await?;
        let found = checked(&*store, batch).await?;
        assert_eq!((found.archived, found.state), (false, state));
    }
    Ok(())
}

/// Every change is in the feed, once, in order, for every process, after a restart too.
pub async fn the_control_feed_tells_everything_in_order(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let start = store.control(None).await?;
    assert_eq!(start.items, []);
    let batch = Spec::new(1, people(2, "x.example"))
        .submit(&*store, T0)
        .await?;
    for what in [
        BatchChange::Pause,
        BatchChange::Resume,
        BatchChange::Archive,
    ] {
        change(&*store, batch, what, T0).await?;
    }
    let middle = elsewhere.control(Some(start.next.clone())).await?;
    use Control::{Archived, Cancelled, Paused, Resumed, Unarchived, Work};
    assert_eq!(
        middle.items,
        [Work, Paused(batch), Resumed(batch), Archived(batch)]
    );
    change(&*store, batch, BatchChange::Unarchive, T0).await?;
    change(&*store, batch, BatchChange::Cancel, T0).await?;
    drop(store);
    let store = fixture.mta().await;
    let rest = store.control(Some(middle.next)).await?;
    assert_eq!(rest.items, [Unarchived(batch), Cancelled(batch)]);
    assert_eq!(store.control(Some(rest.next.clone())).await?.items, []);
    assert_eq!(store.control(None).await?.next, rest.next);

    // More than a page: nothing is lost between pages.
    let many: Vec<_> = (0..1_500)
        .map(|n| entry(&format!("n{n}@x.example"), None, SuppressionReason::Manual))
        .collect();
    store.suppress(many.clone(), T0).await?;
    let (mut told, mut cursor) = (Vec::new(), rest.next);
    while told.len() < many.len() {
        let page = store.control(Some(cursor)).await?;
        assert!(!page.items.is_empty() && page.items.len() <= 1_000);
        told.extend(page.items);
        cursor = page.next;
    }
    let many = many.into_iter().map(Control::Suppressed).collect();
    assert_eq!(in_any_order(&*store, told), in_any_order(&*store, many));
    Ok(())
}

/// Items about different recipients, which may live in several partitions: these keep their order
/// within each.
fn in_any_order(store: &dyn Store, mut items: Vec<Control>) -> Vec<Control> {
    if store.partitions() > 1 {
        items.sort_by_key(|item| format!("{item:?}"));
    }
    items
}

/// The place after every event.
async fn newest_event(store: &dyn Store) -> Result<String> {
    let mut query = EventQuery {
        limit: 1_000,
        ..EventQuery::default()
    };
    loop {
        let page = store.events(query.clone()).await?;
        if page.events.is_empty() {
            return Ok(page.next);
        }
        query.after = Some(page.next);
    }
}

/// Whoever waits at a place is woken by what comes after it, of this process and of another one;
/// also when it came before the waiting began.
pub async fn a_change_wakes_whoever_waits(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let batch = Spec::new(1, people(2, "x.example"))
        .submit(&*store, T0)
        .await?;
    let long = Duration::from_secs(30);
    let soon = Duration::from_secs(10);
    let woken = async |waiting: &dyn Store, place: FeedPlace<'_>| {
        tokio::time::timeout(soon, waiting.changed(place, long))
            .await
            .unwrap_or_else(|_| panic!("not woken at {place:?}"));
    };
    for waiting in [&*store, &*elsewhere] {
        let control = waiting.control(None).await?.next;
        let events = newest_event(waiting).await?;
        // What came before the waiting.
        change(&*store, batch, BatchChange::Pause, T0).await?;
        woken(waiting, FeedPlace::Control(&control)).await;
        woken(waiting, FeedPlace::Events(&events)).await;
        // What comes while it waits: whether it waits already, nobody can say, and it is the same.
        let page = waiting.control(Some(control)).await?;
        let (resumed, ()) = tokio::join!(
            change(&*store, batch, BatchChange::Resume, T0),
            woken(waiting, FeedPlace::Control(&page.next))
        );
        resumed?;
    }
    // Nothing comes: it does not wait for ever, and it is not woken by the other feed.
    let control = store.control(None).await?.next;
    let waiting = store.changed(FeedPlace::Control(&control), Duration::from_millis(300));
    let began = tokio::time::Instant::now();
    tokio::time::timeout(long, waiting)
        .await
        .expect("it does not wait for ever");
    assert!(began.elapsed() >= Duration::from_millis(250));
    // A place that is none is told by reading, so nobody waits there.
    for nowhere in ["", "nowhere", "e1-9000000000000"] {
        woken(&*store, FeedPlace::Events(nowhere)).await;
    }
    Ok(())
}

/// Whoever followed the control feed up to a place that it no longer reaches back to is told so,
/// and goes on from now.
pub async fn a_feed_that_was_trimmed_says_so(fixture: &dyn Fixture) -> Result<()> {
    const DAY: Duration = Duration::from_hours(24);
    let store = fixture.mta().await;
    let start = store.control(None).await?.next;
    let some = |first: u32, count: u32| -> Vec<_> {
        (first..first + count)
            .map(|n| entry(&format!("n{n}@x.example"), None, SuppressionReason::Manual))
            .collect()
    };
    store.suppress(some(0, 10), T0).await?;
    let followed = store.control(Some(start.clone())).await?;
    assert_eq!((followed.reset, followed.items.len()), (false, 10));
    // A node whose clock is behind does not make a hole.
    store.suppress(some(10, 300), T0 + DAY).await?;
    store.suppress(some(310, 10), T0 + DAY / 2).await?;
    store.suppress(some(320, 300), T0 + DAY * 2).await?;
    store.suppress(some(620, 300), T0 + DAY * 3).await?;
    for place in [start, followed.next] {
        let page = store.control(Some(place)).await?;
        assert_eq!((page.reset, page.items.len()), (true, 0));
        let next = store.control(Some(page.next)).await?;
        assert_eq!((next.reset, next.items.len()), (false, 0));
    }
    let now = store.control(None).await?.next;
    store.suppress(some(920, 1), T0 + DAY * 3).await?;
    let page = store.control(Some(now)).await?;
    assert_eq!((page.reset, page.items.len()), (false, 1));
    // A place of another store.
    let beyond = ControlCursor(page.next.0.iter().map(|place| place + 1_000).collect());
    for foreign in [beyond, ControlCursor(Vec::new())] {
        let page = store.control(Some(foreign)).await?;
        assert_eq!((page.reset, page.items.len()), (true, 0));
    }
    Ok(())
}
