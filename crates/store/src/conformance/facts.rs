//! Rules of facts: statuses, journals, retries, hits.

use super::Fixture;
use super::support::*;
use crate::{Result, SuppressionQuery};
use model::{
    Actor, AttemptResult, BatchState, Class, Complaint, EventKind, Fact, FactId, HitKind,
    LotNumber, MessageId, PageView, Reply, Revision, Status, SuppressionReason, Timestamp,
    TrackingMode, Verdict, VisitorId,
};
use std::time::Duration;

/// Outcomes move status, counters and event together; what is told twice is one.
pub async fn a_delivery_is_counted_once_wherever_it_is_told(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(3, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 3).await?;
    let facts = node.write(outcomes(&leased, AttemptResult::Delivered, T0));
    let first = store.ship(node.shipment(facts.clone(), T0)).await?;
    assert_eq!(
        (first.repeated, first.unknown, first.completed),
        (0, 0, vec![batch])
    );
    for store in [&store, &elsewhere] {
        let again = store
            .ship(node.shipment(facts.clone(), T0 + secs(1)))
            .await?;
        assert_eq!(
            (again.repeated, again.duplicates, again.completed),
            (3, vec![], vec![])
        );
        assert_eq!(store.high_water(node.journal).await?, 3);
        assert_eq!(checked(&**store, batch).await?.counters.delivered, 3);
    }
    let told = kinds(&all_events(&*store).await?)
        .iter()
        .filter(|kind| **kind == "email.delivered")
        .count();
    assert_eq!(told, 3);
    Ok(())
}

/// Two nodes delivered the same message: it is counted once, and named.
pub async fn a_second_delivery_is_a_duplicate(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut sleeper, mut heir) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    let old = sleeper.lease(&*store, T0, "x.example", 1).await?;
    let new = heir.lease(&*store, T0 + TTL, "x.example", 1).await?;
    heir.report(
        &*store,
        outcomes(&new, AttemptResult::Delivered, T0 + TTL),
        T0 + TTL,
    )
    .await?;
    let late = sleeper
        .report(
            &*store,
            outcomes(&old, AttemptResult::Delivered, T0),
            T0 + TTL,
        )
        .await?;
    assert_eq!(late.duplicates, [MessageId { batch, index: 0 }]);
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 1);
    let events = all_events(&*store).await?;
    assert_eq!(
        kinds(&events),
        [
            "batch.accepted",
            "batch.started",
            "email.delivered",
            "batch.completed"
        ]
    );
    // Its story keeps both.
    let story = store
        .message(MessageId { batch, index: 0 })
        .await?
        .expect("a story");
    assert_eq!(story.attempts.len(), 2);
    Ok(())
}

/// A delivery is the truth, whatever was thought before.
pub async fn a_late_delivery_is_taken_over_any_end(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut one, mut two) = (Node::new(1), Node::new(2));
    let ends = [
        AttemptResult::Bounce,
        AttemptResult::Failed,
        AttemptResult::Suppressed(SuppressionReason::Manual),
        AttemptResult::Cancelled,
        later(T0 + secs(600)),
    ];
    let batch = Spec::new(1, neighbours(&*store, ends.len(), "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = one.lease(&*store, T0, "x.example", 10).await?;
    let items = &leased[0].items;
    let facts = items
        .iter()
        .zip(ends)
        .map(|(item, end)| outcome(batch, item, end, T0))
        .collect();
    one.report(&*store, facts, T0).await?;
    assert_eq!(checked(&*store, batch).await?.counters.bounce, 1);
    let delivered = items
        .iter()
        .map(|item| outcome(batch, item, AttemptResult::Delivered, T0))
        .collect();
    let shipped = two.report(&*store, delivered, T0).await?;
    assert_eq!(
        (shipped.duplicates, shipped.completed),
        (vec![], vec![batch])
    );
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.counters.delivered, found.state),
        (5, BatchState::Completed)
    );
    // And a refusal after it changes nothing.
    let refused = items
        .iter()
        .map(|item| outcome(batch, item, AttemptResult::Bounce, T0))
        .collect();
    two.report(&*store, refused, T0).await?;
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 5);
    Ok(())
}

/// A journal may be shipped twice, in part, again from its beginning, and after a restart.
pub async fn a_journal_is_taken_once_however_often_it_is_shipped(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(10, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 10).await?;
    let facts = node.write(outcomes(&leased, AttemptResult::Delivered, T0));
    store.ship(node.shipment(facts[..4].to_vec(), T0)).await?;
    assert_eq!(store.high_water(node.journal).await?, 4);
    drop(store);
    let store = fixture.mta().await;
    let part = store.ship(node.shipment(facts[2..7].to_vec(), T0)).await?;
    assert_eq!(part.repeated, 2);
    let whole = store.ship(node.shipment(facts, T0)).await?;
    assert_eq!((whole.repeated, whole.completed), (7, vec![batch]));
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 10);
    // What was shed moves the mark without a fact.
    let mut shed = node.shipment(Vec::new(), T0);
    shed.through = 12;
    store.ship(shed).await?;
    assert_eq!(store.high_water(node.journal).await?, 12);
    assert_eq!(store.high_water(Node::new(9).journal).await?, 0);
    Ok(())
}

/// More hits than go in one step, of two trackers at the same time and on the same people: each is
/// counted once and told once, in the order of its journal, with what leaving a list brings with it.
pub async fn many_hits_are_taken_step_by_step(fixture: &dyn Fixture) -> Result<()> {
    const PEOPLE: u32 = 40;
    const HITS: u32 = 9_000;
    let (store, elsewhere) = (fixture.mta().await, fixture.another().await);
    let everybody = people(usize::try_from(PEOPLE).unwrap_or(0), "x.example");
    let batch = Spec::new(1, everybody).submit(&*store, T0).await?;
    let facts = |n: u32| match n {
        3_000 | 7_000 => hit(batch, n % PEOPLE, HitKind::Unsubscribe, Actor::Human, T0),
        _ => hit(batch, n % PEOPLE, HitKind::Click, Actor::Human, T0),
    };
    let (mut one, mut two) = (Node::new(1), Node::new(2));
    let ships = [&mut one, &mut two].map(|node| {
        let facts = node.write((0..HITS).map(facts).collect());
        node.shipment(facts, T0)
    });
    let [first, second] = ships.clone();
    let (first, second) = tokio::try_join!(store.ship(first), elsewhere.ship(second))?;
    assert_eq!((first.repeated, second.repeated), (0, 0));
    // Once more, of which most is there, and a little that is new.
    let [mut again, _] = ships;
    again.facts.extend(one.write(vec![facts(1)]));
    again.through += 1;
    let again = store.ship(again).await?;
    assert_eq!((again.repeated, again.unknown), (u64::from(HITS), 0));
    let marks = [one.journal, two.journal].map(|journal| store.high_water(journal));
    let marks = futures_util::future::try_join_all(marks).await?;
    assert_eq!(marks, [u64::from(HITS) + 1, u64::from(HITS)]);
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!(counters.clicked_total, 2 * u64::from(HITS - 2) + 1);
    assert_eq!(counters.clicked_unique, u64::from(PEOPLE));
    assert_eq!(counters.unsubscribed, 1, "both are of one person");
    let events = all_events(&*store).await?;
    for node in [&one, &two] {
        let whose = format!("{}-", node.journal);
        let mut told = std::collections::BTreeMap::<MessageId, Vec<u64>>::new();
        for event in &events {
            let number = event.data["hit"]
                .as_str()
                .and_then(|hit| hit.strip_prefix(&whose));
            if let (Some(number), Some(message)) = (number, event.message_id) {
                told.entry(message)
                    .or_default()
                    .push(number.parse().expect("a number"));
            }
        }
        assert!(told.values().all(|of_one| of_one.is_sorted()), "{whose}");
        let mut told: Vec<u64> = told.into_values().flatten().collect();
        told.sort_unstable();
        let clicks = (1..=node.written()).filter(|seq| ![3_001, 7_001].contains(seq));
        assert!(
            told.iter().copied().eq(clicks),
            "{whose}: {} told",
            told.len()
        );
    }
    Ok(())
}

/// The second attempt is known before the first: the first moves nothing, and is kept.
pub async fn a_fact_out_of_order_moves_nothing_back(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut one, mut two) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = one.lease(&*store, T0, "x.example", 1).await?;
    let item = &leased[0].items[0];
    let retry = T0 + secs(1_200);
    let second = with(
        outcome(batch, item, later(retry), T0 + secs(600)),
        |attempt| attempt.number = 2,
    );
    two.report(&*store, vec![second], T0 + secs(600)).await?;
    let first = outcome(batch, item, AttemptResult::Bounce, T0);
    let shipped = one.report(&*store, vec![first], T0 + secs(601)).await?;
    assert_eq!(
        (shipped.repeated, shipped.unknown, shipped.completed),
        (0, 0, vec![])
    );
    let row = &all_rows(&*store, batch).await?[0];
    assert_eq!((row.status, row.attempts), (Status::TemporaryError, 2));
    assert_eq!(row.next_attempt_at, Some(retry));
    let story = store
        .message(MessageId { batch, index: 0 })
        .await?
        .expect("a story");
    assert_eq!(
        story
            .attempts
            .iter()
            .map(|attempt| attempt.number)
            .collect::<Vec<_>>(),
        [1, 2]
    );
    let told = kinds(&all_events(&*store).await?);
    assert_eq!(
        told,
        ["batch.accepted", "batch.started", "email.temporary_error"]
    );
    checked(&*store, batch).await?;
    Ok(())
}

/// A retry is leased at its minute, never before its time, with its attempts counted on.
pub async fn retries_come_when_they_are_due_and_not_before(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(1_300, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 2_000).await?;
    let retry = T0 + Duration::from_millis(300_500);
    node.report(&*store, outcomes(&leased, later(retry), T0), T0)
        .await?;
    for range in &leased {
        assert_eq!(node.finish(&*store, range.range, T0).await?.lost, []);
    }
    assert_eq!(
        checked(&*store, batch).await?.counters.temporary_error,
        1_300
    );
    let before = retry - Duration::from_millis(1);
    assert_eq!(node.lease(&*store, before, "x.example", 2_000).await?, []);
    let backlog = store.backlog(before, None, 10).await?;
    let next = backlog[0].next_due.expect("more comes due");
    assert!(next >= retry && next < retry + secs(60), "{next}");
    assert_eq!(store.totals(next).await?.oldest_due, Some(next));

    let again = node.lease(&*store, next, "x.example", 2_000).await?;
    assert_eq!(sorted(emails(&again)), sorted(emails(&leased)));
    assert!(
        again
            .iter()
            .all(|range| range.items.len() <= crate::LOT_ROWS)
    );
    assert!(
        again
            .iter()
            .flat_map(|range| &range.items)
            .all(|item| item.attempts == 1 && !item.maybe_started)
    );
    // A soon one does not wait for its minute.
    let soon = next + secs(2);
    node.report(&*store, outcomes(&again[..1], later(soon), next), next)
        .await?;
    let soon = node
        .lease(&*store, soon + secs(1), "x.example", 2_000)
        .await?;
    assert_eq!(sorted(emails(&soon)), sorted(emails(&again[..1])));
    assert!(
        soon.iter()
            .flat_map(|range| &range.items)
            .all(|item| item.attempts == 2)
    );
    Ok(())
}

/// A retry of which the outcome is known by now is not handed out.
pub async fn a_retry_that_was_overtaken_is_not_sent(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut one, mut two) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 2, "x.example"))
        .submit(&*store, T0)
        .await?;
    let old = one.lease(&*store, T0, "x.example", 2).await?;
    let new = two.lease(&*store, T0 + TTL, "x.example", 2).await?;
    let retry = T0 + secs(300);
    two.report(&*store, outcomes(&new, later(retry), T0 + TTL), T0 + TTL)
        .await?;
    let late = outcome(batch, &old[0].items[0], AttemptResult::Delivered, T0);
    one.report(&*store, vec![late], T0 + TTL).await?;
    let due = T0 + secs(360);
    let again = two.lease(&*store, due, "x.example", 2).await?;
    assert_eq!(emails(&again), [old[0].items[1].row.email.to_string()]);
    // The same deferral told by the other: the retry is filed once.
    let also = outcome(batch, &old[0].items[1], later(retry), T0);
    one.report(&*store, vec![also], due).await?;
    assert_eq!(two.lease(&*store, due, "x.example", 2).await?, []);
    assert_eq!(checked(&*store, batch).await?.counters.temporary_error, 1);
    Ok(())
}

/// Facts about what the store does not know hold up nothing.
pub async fn unknown_facts_are_dropped_and_counted(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let mut spec = Spec::new(1, people(2, "x.example"));
    spec.rejected = vec![0];
    let batch = spec.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 2).await?;
    let item = &leased[0].items[0];
    let at = |change: fn(&mut model::Attempt)| {
        with(outcome(batch, item, AttemptResult::Delivered, T0), change)
    };
    let facts = vec![
        at(|attempt| attempt.message.batch = id(99)),
        at(|attempt| attempt.place.lot = LotNumber(attempt.place.lot.0 + 77)),
        at(|attempt| attempt.place.position = 400),
        hit(batch, 0, HitKind::Open, Actor::Human, T0),
        hit(batch, 4_000_000_000, HitKind::Open, Actor::Human, T0),
        hit(id(99), 1, HitKind::Unsubscribe, Actor::Human, T0),
        at(|_| ()),
    ];
    let shipped = node.report(&*store, facts, T0).await?;
    assert_eq!((shipped.unknown, shipped.repeated), (6, 0));
    assert_eq!(store.high_water(node.journal).await?, 7);
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!((counters.delivered, counters.opened_total), (1, 0));
    Ok(())
}

/// The last final status completes the batch, in the step that brings it.
pub async fn a_batch_completes_with_its_last_recipient(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(40, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 40).await?;
    let mut facts = outcomes(&leased, AttemptResult::Delivered, T0);
    let last = facts.pop().into_iter().collect();
    let done = T0 + secs(3);
    assert_eq!(node.report(&*store, facts, T0).await?.completed, []);
    assert_eq!(checked(&*store, batch).await?.completed_at, None);
    assert_eq!(node.report(&*store, last, done).await?.completed, [batch]);
    let found = checked(&*store, batch).await?;
    assert_eq!(
        (found.state, found.completed_at),
        (BatchState::Completed, Some(done))
    );
    let events = all_events(&*store).await?;
    assert_eq!(kinds(&events).last(), Some(&"batch.completed"));
    assert_eq!(events.last().map(|event| event.occurred_at), Some(done));
    Ok(())
}

/// Totals count requests, uniques recipients; both also of people alone.
pub async fn totals_and_uniques_are_counted_apart(fixture: &dyn Fixture) -> Result<()> {
    use Actor::{Human, Machine, Unknown};
    use HitKind::{Click, Open, Probe};
    let store = fixture.another().await;
    let mta = fixture.mta().await;
    let mut tracker = Node::new(1);
    let batch = Spec::new(1, people(3, "x.example"))
        .submit(&*mta, T0)
        .await?;
    let hits = [
        (0, Open, Machine),
        (0, Open, Human),
        (0, Open, Human),
        (1, Open, Unknown),
        (1, Probe, Human),
        (2, Click, Human),
        (2, Click, Machine),
        (1, Click, Machine),
    ];
    let facts = hits
        .map(|(index, kind, actor)| hit(batch, index, kind, actor, T0))
        .into();
    tracker.report(&*store, facts, T0).await?;
    let counters = checked(&*store, batch).await?.counters;
    let opened = [
        counters.opened_total,
        counters.opened_unique,
        counters.opened_total_human,
        counters.opened_unique_human,
    ];
    let clicked = [
        counters.clicked_total,
        counters.clicked_unique,
        counters.clicked_total_human,
        counters.clicked_unique_human,
    ];
    assert_eq!((opened, clicked), ([4, 2, 2, 1], [3, 2, 1, 1]));
    assert_eq!(kinds(&all_events(&*store).await?).len(), 2 + 7);
    let rows = all_rows(&*store, batch).await?;
    assert_eq!(
        rows.iter()
            .map(|row| row.opened_at.is_some())
            .collect::<Vec<_>>(),
        [true, true, false]
    );
    assert_eq!(
        rows.iter()
            .map(|row| row.clicked_at.is_some())
            .collect::<Vec<_>>(),
        [false, true, true]
    );
    Ok(())
}

/// A verdict is revised: totals and uniques of people follow, the story shows the new one, and one
/// event tells of it; a confirmation tells nothing.
pub async fn a_revision_moves_the_counters_of_people(fixture: &dyn Fixture) -> Result<()> {
    use Actor::{Human, Machine};
    use HitKind::{Click, Open};
    let store = fixture.another().await;
    let mta = fixture.mta().await;
    let mut tracker = Node::new(1);
    let mut judge = Node::new(2);
    let batch = Spec::new(1, people(2, "x.example"))
        .submit(&*mta, T0)
        .await?;
    let hits = [(0, Click, Human), (0, Click, Human), (1, Open, Machine)]
        .map(|(index, kind, actor)| hit(batch, index, kind, actor, T0))
        .into();
    tracker.report(&*store, hits, T0).await?;
    let revision = |seq, index, kind, was, actor, others| {
        Fact::Revision(Box::new(Revision {
            message: MessageId { batch, index },
            at: T0 + secs(15),
            hit: FactId {
                journal: tracker.journal,
                seq,
            },
            hit_at: T0,
            kind,
            was,
            verdict: Verdict {
                actor,
                machine_reasons: vec!["burst".into()],
                rules: 9,
            },
            others,
        }))
    };
    let steps = [
        (revision(1, 0, Click, Human, Machine, true), [1, 1, 0, 0]),
        (revision(2, 0, Click, Human, Machine, false), [0, 0, 0, 0]),
        // A person's click that came between: confirmed, its bit is there again.
        (revision(2, 0, Click, Human, Human, false), [0, 1, 0, 0]),
        (revision(3, 1, Open, Machine, Human, false), [0, 1, 1, 1]),
    ];
    for (fact, expected) in steps {
        judge.report(&*store, vec![fact], T0 + secs(15)).await?;
        let counters = checked(&*store, batch).await?.counters;
        let people = [
            counters.clicked_total_human,
            counters.clicked_unique_human,
            counters.opened_total_human,
            counters.opened_unique_human,
        ];
        assert_eq!(people, expected);
        assert_eq!((counters.clicked_total, counters.clicked_unique), (2, 1));
    }
    let story = store.message(MessageId { batch, index: 1 }).await?;
    let story = story.expect("the message");
    assert_eq!(story.hits[0].hit.verdict.actor, Human);
    assert_eq!(story.hits[0].id.journal, tracker.journal);
    let events = all_events(&*store).await?;
    let clicked = events
        .iter()
        .find(|event| event.kind == EventKind::EmailClicked);
    let revised: Vec<_> = events
        .iter()
        .filter(|event| event.kind == EventKind::EngagementReclassified)
        .collect();
    assert_eq!(revised.len(), 3);
    let clicked = clicked.expect("a click");
    assert_eq!(revised[0].data["event_id"], clicked.id.to_string());
    assert_eq!(revised[0].data["actor"], "machine");
    assert_eq!(revised[0].message_id, clicked.message_id);
    Ok(())
}

/// A page view belongs to no message and is an event all the same; a reply is one of its message.
pub async fn page_views_and_replies_are_facts(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let batch = Spec::new(1, people(2, "x.example"))
        .submit(&*store, T0)
        .await?;
    let visitor = VisitorId::from_bytes([5; 16]);
    let page = Fact::Page(Box::new(PageView {
        account: "acme".into(),
        at: T0 + secs(1),
        visitor,
        url: "https://shop.example/".into(),
        referrer: "".into(),
        title: "Shop".into(),
        user_agent: "agent".into(),
        network: "192.0.2.0/24".into(),
        verdict: Verdict {
            actor: Actor::Human,
            machine_reasons: Vec::new(),
            rules: 1,
        },
    }));
    let reply = Fact::Reply(Box::new(Reply {
        message: MessageId { batch, index: 1 },
        at: T0 + secs(2),
        data: r#"{"text":"yes"}"#.into(),
    }));
    let facts = vec![page, reply.clone(), reply];
    let shipped = tracker.report(&*store, facts, T0 + secs(3)).await?;
    assert_eq!(shipped.unknown, 0);
    assert_eq!(checked(&*store, batch).await?.counters.replied, 1);
    let rows = all_rows(&*store, batch).await?;
    let replied: Vec<_> = rows.iter().map(|row| row.replied_at).collect();
    assert_eq!(replied, [None, Some(T0 + secs(2))]);
    let events = all_events(&*fixture.another().await).await?;
    let page = events
        .iter()
        .find(|event| event.kind == EventKind::PageViewed);
    let page = page.expect("a page view");
    assert_eq!(page.occurred_at, T0 + secs(1));
    assert_eq!(page.data["visitor"], visitor.to_string());
    assert_eq!(page.data["url"], "https://shop.example/");
    let replies = events
        .iter()
        .filter(|event| event.kind == EventKind::EmailReplied);
    assert_eq!(
        replies.map(|event| &event.data["text"]).next(),
        Some(&"yes".into())
    );
    Ok(())
}

/// One step: flag, counter, suppression of the list, both events, the control item.
pub async fn an_unsubscribe_leaves_the_list_in_the_same_step(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let batch = Spec::new(1, vec!["Jo@x.example".into()])
        .submit(&*store, T0)
        .await?;
    let cursor = store.control(None).await?.next;
    let at = T0 + secs(60);
    let leave = || hit(batch, 0, HitKind::Unsubscribe, Actor::Human, at);
    tracker.report(&*store, vec![leave()], at).await?;
    // Pressing the button again is nothing new.
    tracker.report(&*store, vec![leave()], at + secs(1)).await?;
    assert_eq!(checked(&*store, batch).await?.counters.unsubscribed, 1);
    assert_eq!(all_rows(&*store, batch).await?[0].unsubscribed_at, Some(at));
    let known = store.address("acme", "JO@x.example").await?.suppressions;
    assert_eq!(known.len(), 1);
    assert_eq!(
        (known[0].email.as_str(), known[0].list.as_deref()),
        ("jo@x.example", Some("news"))
    );
    assert_eq!(
        (known[0].reason, known[0].created_at),
        (SuppressionReason::Unsubscribed, at)
    );
    assert_eq!(
        store.control(Some(cursor)).await?.items,
        [crate::Control::Suppressed(known[0].clone())]
    );
    let events = all_events(&*store).await?;
    assert_eq!(
        kinds(&events)[2..],
        ["email.unsubscribed", "suppression.added"]
    );
    assert_eq!(
        events[2].data,
        serde_json::json!({"list": "news", "method": "one_click"})
    );
    assert_eq!(events[3].data["reason"], "unsubscribed");
    Ok(())
}

/// One step: flag, counter, event, suppression of all bulk mail; who complains twice did so once.
pub async fn a_complaint_counts_once_and_stops_bulk_mail(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let spec = Spec::new(1, people(2, "x.example"));
    let batch = spec.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 2).await?;
    node.report(&*store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    let complaint = |after| {
        Fact::Complaint(Box::new(Complaint {
            message: MessageId { batch, index: 1 },
            at: T0 + secs(after),
            data: r#"{"provider":"x"}"#.into(),
        }))
    };
    let facts = vec![complaint(60), complaint(90)];
    let shipped = node.report(&*store, facts, T0 + secs(90)).await?;
    assert_eq!(shipped.unknown, 0);
    assert_eq!(checked(&*store, batch).await?.counters.complained, 1);
    let rows = all_rows(&*store, batch).await?;
    let at: Vec<_> = rows.iter().map(|row| row.complained_at).collect();
    assert_eq!(at, [None, Some(T0 + secs(60))]);
    let events = all_events(&*store).await?;
    let told: Vec<_> = events
        .iter()
        .filter(|event| event.kind == EventKind::EmailComplained)
        .collect();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].message_id, Some(MessageId { batch, index: 1 }));
    assert_eq!(told[0].data["provider"], "x");
    let known = store.address("acme", "n1@x.example").await?.suppressions;
    let known: Vec<_> = known
        .iter()
        .map(|of| (of.reason, of.list.as_deref(), of.source.as_str()))
        .collect();
    assert_eq!(known, [(SuppressionReason::Complaint, None, "complaint")]);
    // The next of any list does not leave; what a person waits for does.
    let next = Spec::new(2, people(2, "x.example"));
    let next = next.submit(&*store, T0 + secs(99)).await?;
    let mut urgent = Spec::new(3, people(2, "x.example"));
    urgent.head.priority = model::Priority::Transactional;
    urgent.submit(&*store, T0 + secs(99)).await?;
    let leased = node.lease(&*store, T0 + secs(99), "x.example", 9).await?;
    let count = leased.iter().map(|range| range.items.len()).sum::<usize>();
    assert_eq!(count, 3);
    assert_eq!(checked(&*store, next).await?.counters.suppressed, 1);
    Ok(())
}

/// The more restrictive of the batch's and the recipient's mode says how much is kept.
pub async fn tracking_modes_are_kept(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let modes = [
        TrackingMode::Off,
        TrackingMode::Aggregate,
        TrackingMode::LastDate,
        TrackingMode::Individual,
    ];
    let mut spec = Spec::new(1, people(4, "x.example"));
    spec.modes = modes.into_iter().enumerate().collect();
    let batch = spec.submit(&*store, T0).await?;
    let facts = (0..4)
        .map(|index| hit(batch, index, HitKind::Open, Actor::Human, T0 + secs(5)))
        .collect();
    tracker.report(&*store, facts, T0).await?;
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!(
        (counters.opened_total, counters.opened_unique_human),
        (3, 3)
    );
    let rows = all_rows(&*store, batch).await?;
    let day = Timestamp::from_millis(T0.millis() / 86_400_000 * 86_400_000);
    let opened: Vec<_> = rows.iter().map(|row| row.opened_at).collect();
    assert_eq!(opened, [None, None, Some(day), Some(T0 + secs(5))]);
    let events = all_events(&*store).await?;
    assert_eq!(kinds(&events)[2..], ["email.opened"]);
    assert_eq!(events[2].message_id, Some(MessageId { batch, index: 3 }));

    let mut counted = Spec::new(2, people(1, "x.example"));
    counted.head.tracking = TrackingMode::Aggregate;
    let counted = counted.submit(&*store, T0).await?;
    tracker
        .report(
            &*store,
            vec![hit(counted, 0, HitKind::Open, Actor::Human, T0)],
            T0,
        )
        .await?;
    let opened = crate::RecipientQuery {
        opened: Some(true),
        ..query(counted)
    };
    assert_eq!(rows_of(&*store, opened).await?, []);
    assert_eq!(checked(&*store, counted).await?.counters.opened_unique, 1);
    Ok(())
}

/// Archived: opens and clicks leave nothing but the mark; whoever wants to leave may leave.
pub async fn an_archived_batch_leaves_no_trace_of_opens(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let batch = Spec::new(1, people(2, "x.example"))
        .submit(&*store, T0)
        .await?;
    store
        .change_batch(batch, crate::BatchChange::Archive, T0)
        .await?;
    let facts = vec![
        hit(batch, 0, HitKind::Open, Actor::Human, T0),
        hit(batch, 0, HitKind::Click, Actor::Human, T0),
        hit(batch, 1, HitKind::Unsubscribe, Actor::Human, T0),
    ];
    let shipped = tracker.report(&*store, facts, T0).await?;
    assert_eq!(shipped.unknown, 0);
    assert_eq!(store.high_water(tracker.journal).await?, 3);
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!(
        (
            counters.opened_total,
            counters.clicked_total,
            counters.unsubscribed
        ),
        (0, 0, 1)
    );
    assert_eq!(
        store
            .message(MessageId { batch, index: 0 })
            .await?
            .map(|story| story
                .hits
                .into_iter()
                .map(|kept| kept.hit)
                .collect::<Vec<_>>()),
        Some(vec![])
    );
    store
        .change_batch(batch, crate::BatchChange::Unarchive, T0)
        .await?;
    tracker
        .report(
            &*store,
            vec![hit(batch, 0, HitKind::Open, Actor::Human, T0)],
            T0,
        )
        .await?;
    assert_eq!(checked(&*store, batch).await?.counters.opened_total, 1);
    Ok(())
}

/// A refusal that condemns the address suppresses it for the account, in the same step.
pub async fn a_dead_address_is_suppressed_with_its_fact(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let emails_in = vec!["a@x.example".to_owned(), "B@x.example".to_owned()];
    let batch = Spec::new(1, emails_in.clone()).submit(&*store, T0).await?;
    let cursor = store.control(None).await?.next;
    let leased = node.lease(&*store, T0, "x.example", 2).await?;
    let facts: Vec<Fact> = outcomes(&leased, AttemptResult::Bounce, T0)
        .into_iter()
        .map(|fact| {
            with(fact, |attempt| {
                attempt.detail.class = Some(Class::InvalidMailbox)
            })
        })
        .map(|fact| suppressing(fact, SuppressionReason::InvalidAddress))
        .collect();
    node.report(&*store, facts, T0).await?;
    let query = SuppressionQuery {
        account: "acme".into(),
        limit: 10,
        ..SuppressionQuery::default()
    };
    let listed = store.suppressions(query).await?.items;
    let named: Vec<_> = listed
        .iter()
        .map(|entry| (entry.email.as_str(), entry.list.as_deref()))
        .collect();
    assert_eq!(named, [("a@x.example", None), ("b@x.example", None)]);
    assert_eq!(listed[0].source, "bounce");
    let told = store.control(Some(cursor)).await?.items;
    assert_eq!(told.len(), 2);
    assert_eq!(
        kinds(&all_events(&*store).await?)
            .iter()
            .filter(|kind| **kind == "suppression.added")
            .count(),
        2
    );
    assert_eq!(
        all_rows(&*store, batch).await?[0].class,
        Some(Class::InvalidMailbox)
    );
    // The next batch does not write to them.
    let next = Spec::new(2, emails_in).submit(&*store, T0).await?;
    assert_eq!(node.lease(&*store, T0, "x.example", 2).await?, []);
    let found = checked(&*store, next).await?;
    assert_eq!(
        (found.state, found.counters.suppressed),
        (BatchState::Completed, 2)
    );
    Ok(())
}
