//! Rules of what is kept, and for how long: retention and erasure.

use super::Fixture;
use super::support::*;
use crate::{
    Control, EVENT_CURSORS, Erase, EventQuery, LeasedRange, Note, Result, Retire, Retired, Store,
    Suppression, SuppressionQuery,
};
use model::{
    Actor, AttemptResult, BatchId, BatchState, Event, EventKind, HitKind, MessageId, Status,
    SuppressionReason, Timestamp,
};

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

/// The person who is erased, as they were written and as they are compared.
const WRITTEN: &str = "Jo.Do@X.example";
const PERSON: &str = "jo.do@x.example";

/// Runs an erasure to its end; how many recipients.
async fn erase_all(store: &dyn Store, now: Timestamp) -> Result<u64> {
    let mut of = Erase {
        account: "acme".into(),
        email: PERSON.into(),
        after: None,
    };
    let mut recipients = 0;
    for step in 0.. {
        assert!(step < 1_000, "it comes to no end");
        let one = store.erase(of.clone(), now).await?;
        recipients += one.recipients;
        of.after = one.next;
        if of.after.is_none() {
            break;
        }
    }
    Ok(recipients)
}

fn names_the_person(what: &impl std::fmt::Debug) -> bool {
    format!("{what:?}").to_lowercase().contains("jo.do")
}

/// A batch with the person as its last recipient.
fn with_person(number: u128) -> Spec {
    let mut emails = people(40, "x.example");
    emails.push(WRITTEN.into());
    Spec::new(number, emails)
}

/// The batches in which the person was.
struct Lived {
    delivered: BatchId,
    deferred: BatchId,
    coming: BatchId,
    /// Of another account.
    foreign: BatchId,
    flying: BatchId,
    /// What a node holds of it.
    in_flight: Vec<LeasedRange>,
}

/// Writes of the person whatever there is to be written.
async fn lived(store: &dyn Store, node: &mut Node) -> Result<Lived> {
    // Delivered, opened and clicked; the rows are in the caches of both.
    let delivered = with_person(1).submit(store, T0).await?;
    let leased = node.lease(store, T0, "x.example", 100).await?;
    let facts = outcomes(&leased, AttemptResult::Delivered, T0);
    node.report(store, facts, T0).await?;
    for kind in [HitKind::Open, HitKind::Click] {
        let of_person = hit(delivered, 40, kind, Actor::Human, T0);
        let of_other = hit(delivered, 3, kind, Actor::Human, T0);
        node.report(store, vec![of_person, of_other], T0).await?;
    }
    // Deferred, scheduled, held by a node, and of another account.
    let mut mixed = with_person(2);
    mixed.mixed = true;
    let deferred = mixed.submit(store, T0).await?;
    let leased = node.lease(store, T0, crate::MIXED, 100).await?;
    let facts = outcomes(&leased, later(T0 + secs(3_600)), T0);
    node.report(store, facts, T0).await?;
    let mut coming = with_person(3);
    coming.head.release_at = T0 + secs(1_000_000);
    let coming = coming.submit(store, T0).await?;
    let mut foreign = with_person(4);
    foreign.head.account = "other".into();
    foreign.head.release_at = T0 + secs(1_000_000);
    let foreign = foreign.submit(store, T0).await?;
    let flying = with_person(5).submit(store, T0).await?;
    let in_flight = node.lease(store, T0, "x.example", 100).await?;
    let left = Suppression {
        email: PERSON.into(),
        account: "acme".into(),
        list: Some("weekly".into()),
        reason: SuppressionReason::Unsubscribed,
        source: "api".into(),
        created_at: T0,
    };
    store.suppress(vec![left], T0).await?;
    Ok(Lived {
        delivered,
        deferred,
        coming,
        foreign,
        flying,
        in_flight,
    })
}

/// Events that do not name the person.
fn others(mut events: Vec<Event>) -> Vec<Event> {
    events.retain(|event| event.account != "acme" || !names_the_person(event));
    events
}

/// Nothing that is read says who it was.
async fn is_forgotten(store: &dyn Store, lived: &Lived, told: &[Event]) -> Result<()> {
    let story = store.address("acme", WRITTEN).await?;
    assert_eq!(story.messages, []);
    let kept: Vec<_> = story
        .suppressions
        .iter()
        .map(|of| (of.reason, &of.list))
        .collect();
    assert_eq!(kept, [(SuppressionReason::Erased, &None)]);
    let query = SuppressionQuery {
        account: "acme".into(),
        limit: 100,
        ..SuppressionQuery::default()
    };
    let listed = store.suppressions(query).await?.items;
    assert!(
        listed.len() == 1 && !names_the_person(&listed),
        "{listed:?}"
    );
    let events = all_events(store).await?;
    assert_eq!(events, others(told.to_vec()));
    for batch in [lived.delivered, lived.deferred, lived.coming, lived.flying] {
        let rows = all_rows(store, batch).await?;
        assert_eq!(rows.len(), 41);
        assert!(!names_the_person(&rows));
        assert_eq!(
            (&rows[40].row.prospect_id, &rows[40].row.vars),
            (&None, &None)
        );
    }
    let message = MessageId {
        batch: lived.delivered,
        index: 40,
    };
    let story = store.message(message).await?.expect("it keeps its place");
    assert!(!names_the_person(&story) && story.attempts.is_empty() && story.hits.is_empty());
    assert_eq!(story.recipient.status, Status::Delivered);
    assert_eq!(store.address("other", PERSON).await?.messages.len(), 1);
    Ok(())
}

/// Of a person who is erased nothing is left but a suppression under a name; counters and statuses
/// keep their place, what comes later is counted, and nobody else is touched.
pub async fn an_erased_person_leaves_only_a_suppression(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let mut node = Node::new(1);
    let of = lived(&*store, &mut node).await?;
    // Now the rows are in the caches of both.
    assert!(names_the_person(
        &all_rows(&*elsewhere, of.delivered).await?
    ));
    let told = all_events(&*store).await?;
    let cursor = store.control(None).await?.next;

    assert_eq!(erase_all(&*store, T0).await?, 4);
    assert_eq!(erase_all(&*store, T0).await?, 0);
    let heard = store.control(Some(cursor)).await?;
    let stops = |item: &Control| matches!(item, Control::Suppressed(of) if of.email == PERSON);
    assert!(heard.items.iter().any(stops), "{heard:?}");

    for store in [&store, &elsewhere] {
        is_forgotten(&**store, &of, &told).await?;
    }
    assert_eq!(
        checked(&*store, of.delivered)
            .await?
            .counters
            .clicked_unique,
        2
    );
    for batch in [of.deferred, of.coming, of.flying] {
        assert_eq!(checked(&*store, batch).await?.counters.suppressed, 1);
    }
    assert_eq!(checked(&*store, of.foreign).await?.counters.scheduled, 41);

    // What a journal still had is counted, and brings nobody back.
    let facts = outcomes(&of.in_flight, AttemptResult::Delivered, T0);
    let leave = hit(of.delivered, 40, HitKind::Unsubscribe, Actor::Human, T0);
    node.report(&*store, [facts, vec![leave]].concat(), T0)
        .await?;
    let counters = checked(&*store, of.flying).await?.counters;
    assert_eq!((counters.delivered, counters.suppressed), (41, 0));
    assert_eq!(
        checked(&*store, of.delivered).await?.counters.unsubscribed,
        1
    );
    let mut new = all_events(&*store).await?.split_off(others(told).len());
    new.retain(|event| event.account == "acme");
    assert!(!names_the_person(&new));
    assert_eq!(store.address("acme", PERSON).await?.suppressions.len(), 1);

    // A later submission ends suppressed.
    let again = with_person(6).submit(&*store, T0).await?;
    let leased = node.lease(&*elsewhere, T0, "x.example", 100).await?;
    assert_eq!(
        leased.iter().map(|range| range.items.len()).sum::<usize>(),
        40
    );
    assert_eq!(checked(&*store, again).await?.counters.suppressed, 1);

    // When every node has heard of it, the control feed forgets it too; so does all else.
    let after = T0 + secs(3_600);
    assert_eq!(erase_all(&*store, after).await?, 1);
    assert!(!names_the_person(&others(all_events(&*store).await?)));
    // And it may be lifted.
    assert_eq!(store.unsuppress("acme", PERSON, None, after).await?, 1);
    assert_eq!(store.address("acme", PERSON).await?.suppressions, []);
    Ok(())
}
