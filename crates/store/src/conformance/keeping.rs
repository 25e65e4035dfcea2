//! Rules of what is kept and for how long: retention.

use super::Fixture;
use super::support::*;
use crate::{EVENT_CURSORS, EventQuery, Note, Result, Retire, Retired, Store};
use model::{Actor, AttemptResult, BatchState, EventKind, HitKind, MessageId, Timestamp};

/// Runs retention to its end.
async fn retire_all(
    store: &dyn Store,
    events_before: Timestamp,
    batches_before: Timestamp,
    now: Timestamp,
) -> Result<Retired> {
    let mut of = Retire {
        events_before,
        batches_before,
        after: None,
    };
    let mut all = Retired::default();
    for step in 0.. {
        assert!(step < 1_000, "it comes to no end");
        let one = store.retire(of.clone(), now).await?;
        all.events += one.events;
        all.recipients += one.recipients;
        all.batches += one.batches;
        of.after = one.next;
        if of.after.is_none() {
            break;
        }
    }
    Ok(all)
}

/// Says how far somebody has read.
async fn follow(store: &dyn Store, cursor: &str, now: Timestamp) -> Result<()> {
    let note = Note {
        kind: EVENT_CURSORS.into(),
        key: "webhook one".into(),
        value: cursor.as_bytes().into(),
        expires_at: None,
    };
    store.put_notes(vec![note], now).await
}

/// Old events go once everybody has read them, rows and statuses of a batch that ended long ago too;
/// its counters stay, and nothing else is touched.
pub async fn what_is_old_goes_and_counters_stay(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let ended = Spec::new(1, people(700, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 700).await?;
    let facts = outcomes(&leased, AttemptResult::Delivered, T0);
    node.report(&*store, facts, T0).await?;
    let click = hit(ended, 3, HitKind::Click, Actor::Human, T0);
    node.report(&*store, vec![click.clone()], T0).await?;
    let lasting = Spec::new(2, people(5, "y.example"))
        .submit(&*store, T0)
        .await?;
    let before = checked(&*store, ended).await?;
    assert_eq!(before.state, BatchState::Completed);
    let told = all_events(&*store).await?;

    // Nothing is old yet.
    let never = Timestamp::from_millis(0);
    assert_eq!(
        retire_all(&*store, never, never, T0).await?,
        Retired::default()
    );
    // Somebody has read ten events: those after them stay.
    let some = EventQuery {
        limit: 10,
        ..EventQuery::default()
    };
    let page = store.events(some).await?;
    follow(&*store, &page.next, T0).await?;
    let later = T0 + secs(100 * 86_400);
    retire_all(&*store, later, never, later).await?;
    let rest = EventQuery {
        after: Some(page.next),
        limit: 1_000,
        ..EventQuery::default()
    };
    assert_eq!(events_of(&*store, rest.clone()).await?, told[10..]);
    // A cursor that nobody can read keeps everything.
    follow(&*store, "somewhere", later).await?;
    let kept = all_events(&*store).await?;
    assert_eq!(
        retire_all(&*store, later, never, later).await?,
        Retired::default()
    );
    assert_eq!(all_events(&*store).await?, kept);

    // All have read all, and the batch ended long ago.
    let mut end = rest;
    let end = loop {
        let page = store.events(end.clone()).await?;
        if page.events.is_empty() {
            break page.next;
        }
        end.after = Some(page.next);
    };
    follow(&*store, &end, later).await?;
    let retired = retire_all(&*store, later, later, later).await?;
    assert_eq!((retired.recipients, retired.batches), (700, 1));
    assert!(retired.events > 0);
    assert_eq!(all_events(&*store).await?, []);
    let after = store.batch(ended).await?.expect("it stays");
    assert_eq!(after, before);
    assert_eq!(all_rows(&*store, ended).await?, []);
    let index = 3;
    let message = MessageId {
        batch: ended,
        index,
    };
    assert_eq!(store.message(message).await?, None);
    assert_eq!(store.content(ended).await?, None);
    let story = store.address("acme", "n3@x.example").await?;
    assert_eq!(story.messages, []);
    // A late click is about nobody.
    let late = node.report(&*store, vec![click], later).await?;
    assert_eq!(late.unknown, 1);
    assert_eq!(store.batch(ended).await?, Some(before));
    assert_eq!(
        retire_all(&*store, later, later, later).await?,
        Retired::default()
    );

    // What is not ended goes on.
    let reopened = fixture.another().await;
    assert_eq!(all_rows(&*reopened, ended).await?, []);
    assert_eq!(checked(&*reopened, lasting).await?.counters.queued, 5);
    let leased = node.lease(&*store, later, "y.example", 9).await?;
    let facts = outcomes(&leased, AttemptResult::Delivered, later);
    let shipped = node.report(&*store, facts, later).await?;
    assert_eq!(shipped.completed, [lasting]);
    let told = kinds(&all_events(&*store).await?);
    let delivered = EventKind::EmailDelivered.as_str();
    assert_eq!(told.iter().filter(|kind| **kind == delivered).count(), 5);
    Ok(())
}
