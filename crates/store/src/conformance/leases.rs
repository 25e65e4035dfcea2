//! Rules of leases: ranges, windows, fencing, and what comes back.

use super::Fixture;
use super::support::*;
use crate::{LeasedRange, MIXED, Release, Result, Want};
use model::{AttemptResult, Priority, Status};
use std::time::Duration;

/// What is wanted is what is leased, from as many lots as it takes, and never twice.
pub async fn a_range_is_split_as_wanted(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (one, two) = (Node::new(1), Node::new(2));
    let spec = Spec::new(1, people(700, "x.example"));
    spec.submit(&*store, T0).await?;
    let first = one.lease(&*store, T0, "x.example", 30).await?;
    assert_eq!(emails(&first).len(), 30);
    let second = two.lease(&*store, T0, "x.example", 600).await?;
    assert_eq!(emails(&second).len(), 600);
    assert_eq!(store.backlog(T0, None, 10).await?[0].due, 70);
    let rest = one.lease(&*store, T0, "x.example", 600).await?;
    for range in first.iter().chain(&second).chain(&rest) {
        assert_eq!(range.expires_at, T0 + TTL);
        assert_eq!(
            range.window,
            crate::WINDOW.min(u32::try_from(range.items.len()).unwrap_or(0))
        );
        for (at, item) in (0..).zip(&range.items) {
            assert_eq!(
                (item.offset, item.attempts, item.maybe_started),
                (at, 0, false)
            );
        }
    }
    let all = [emails(&first), emails(&second), emails(&rest)].concat();
    assert_eq!(sorted(all), sorted(spec.emails));
    assert_eq!(one.lease(&*store, T0, "x.example", 10).await?, []);
    assert_eq!(store.backlog(T0, None, 10).await?, []);
    Ok(())
}

/// A queue serves transactional mail first; then no batch waits for another to end.
pub async fn transactional_mail_goes_first_and_batches_take_turns(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let giant = Spec::new(1, people(3_000, "x.example"))
        .submit(&*store, T0)
        .await?;
    let small = Spec::new(2, people(20, "x.example"))
        .submit(&*store, T0)
        .await?;
    let mut urgent = Spec::new(3, people(1, "x.example"));
    urgent.head.priority = Priority::Transactional;
    let urgent = urgent.submit(&*store, T0).await?;
    assert!(store.backlog(T0, None, 10).await?[0].transactional);

    let leased = node.lease(&*store, T0, "x.example", 101).await?;
    assert_eq!(leased[0].batch.id, urgent);
    let of = |batch, leased: &[LeasedRange]| {
        leased
            .iter()
            .filter(|range| range.batch.id == batch)
            .map(|range| range.items.len())
            .sum::<usize>()
    };
    assert_eq!((of(small, &leased), of(giant, &leased)), (20, 80));

    // Small wishes reach everyone as well, one after the other.
    let other = Spec::new(4, people(40, "x.example"))
        .submit(&*store, T0)
        .await?;
    let mut served = [0, 0];
    for _ in 0..4 {
        let leased = node.lease(&*store, T0, "x.example", 5).await?;
        served[0] += of(giant, &leased);
        served[1] += of(other, &leased);
    }
    assert_eq!(served, [10, 10]);
    Ok(())
}

/// However many batches stand in a queue, the one that is urgent is first and each has its turn.
pub async fn no_batch_is_lost_among_many(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let count = 300_u128;
    for number in 0..count {
        let spec = Spec::new(number, people(2, "x.example"));
        spec.submit(&*store, T0).await?;
    }
    let mut urgent = Spec::new(count, people(1, "x.example"));
    urgent.head.priority = Priority::Transactional;
    let urgent = urgent.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 1).await?;
    assert_eq!(leased[0].batch.id, urgent);
    let mut served = std::collections::BTreeSet::new();
    for _ in 0..count {
        let leased = node.lease(&*store, T0, "x.example", 1).await?;
        served.extend(leased.iter().map(|range| range.batch.id));
    }
    assert_eq!(served.len() as u128, count);
    let rest = node.lease(&*store, T0, "x.example", 1_000).await?;
    assert_eq!(emails(&rest).len() as u128, count);
    Ok(())
}

/// A wish says how much of each batch, how large a range, and whether only what is transactional.
pub async fn a_want_bounds_batches_ranges_and_ranks(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let giant = Spec::new(1, people(900, "x.example"))
        .submit(&*store, T0)
        .await?;
    let small = Spec::new(2, people(20, "x.example"))
        .submit(&*store, T0)
        .await?;
    let third = Spec::new(3, people(300, "x.example"))
        .submit(&*store, T0)
        .await?;
    let of = |batch, leased: &[LeasedRange]| {
        let own = leased.iter().filter(|range| range.batch.id == batch);
        own.map(|range| range.items.len()).collect::<Vec<_>>()
    };
    let want = Want {
        per_batch: 50,
        of: vec![(giant, 0), (third, 100)],
        largest: 40,
        ..Want::of("x.example", 1_000)
    };
    let leased = node.lease_want(&*store, T0, want).await?;
    assert_eq!(of(giant, &leased), [0; 0]);
    assert_eq!(of(small, &leased).iter().sum::<usize>(), 20);
    let ranges = of(third, &leased);
    assert_eq!(ranges.iter().sum::<usize>(), 100);
    assert!(ranges.iter().all(|rows| *rows <= 40), "{ranges:?}");
    let urgent_only = Want {
        urgent_only: true,
        ..Want::of("x.example", 10)
    };
    let none = node.lease_want(&*store, T0, urgent_only.clone()).await?;
    assert_eq!(none, []);
    let mut urgent = Spec::new(4, people(30, "x.example"));
    urgent.head.priority = Priority::Transactional;
    let urgent = urgent.submit(&*store, T0).await?;
    let leased = node.lease_want(&*store, T0, urgent_only).await?;
    assert_eq!(of(urgent, &leased).iter().sum::<usize>(), 10);
    assert_eq!(emails(&leased).len(), 10);
    Ok(())
}

/// The backlog names the batches whose bulk work is due, so that a node can tell whether somebody
/// new has come.
pub async fn a_backlog_names_whose_work_it_is(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    let one = Spec::new(1, people(3, "x.example"))
        .submit(&*store, T0)
        .await?;
    let two = Spec::new(2, people(3, "x.example"))
        .submit(&*store, T0)
        .await?;
    let mut urgent = Spec::new(3, people(3, "x.example"));
    urgent.head.priority = Priority::Transactional;
    urgent.submit(&*store, T0).await?;
    let named = async |store: &dyn crate::Store| -> Result<_> {
        let backlog = store.backlog(T0, None, 10).await?;
        Ok(backlog
            .into_iter()
            .next()
            .map(|queue| {
                let batches: std::collections::BTreeSet<_> = queue.batches.into_iter().collect();
                (batches, queue.transactional)
            })
            .unwrap_or_default())
    };
    assert_eq!(named(&*store).await?, ([one, two].into(), true));
    let want = Want {
        of: vec![(two, 0)],
        ..Want::of("x.example", 100)
    };
    node.lease_want(&*store, T0, want).await?;
    assert_eq!(named(&*store).await?, ([two].into(), false));
    node.lease(&*store, T0, "x.example", 100).await?;
    assert_eq!(named(&*store).await?, ([].into(), false));
    Ok(())
}

/// A successor learns which recipients a dead holder may have started: the unreported ones of its
/// window. Everything beyond is untouched, what was reported is not handed out again.
pub async fn a_dead_holder_leaves_only_its_window_in_doubt(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut dead, heir) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 100, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = dead.lease(&*store, T0, "x.example", 100).await?;
    let items = &leased[0].items;
    let reported = [&items[3], &items[40]];
    let facts = reported.map(|item| outcome(batch, item, AttemptResult::Delivered, T0));
    dead.report(&*store, facts.into(), T0).await?;

    let almost = T0 + TTL - Duration::from_millis(1);
    assert_eq!(heir.lease(&*store, almost, "x.example", 100).await?, []);
    let taken = heir.lease(&*store, T0 + TTL, "x.example", 100).await?;
    let again: Vec<_> = taken.iter().flat_map(|range| &range.items).collect();
    assert_eq!(again.len(), 98);
    for item in again {
        let before = items
            .iter()
            .find(|old| old.row == item.row)
            .map(|old| old.offset);
        let in_window = before.is_some_and(|offset| offset < crate::WINDOW);
        assert_eq!(item.maybe_started, in_window, "offset {before:?}");
    }
    assert!(taken[0].range.token > leased[0].range.token);
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 2);
    Ok(())
}

/// Who may have been started is not forgotten when the second holder dies before it, or hands back.
pub async fn doubt_outlives_a_second_holder(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (one, two, three) = (Node::new(1), Node::new(2), Node::new(3));
    Spec::new(1, neighbours(&*store, 10, "x.example"))
        .submit(&*store, T0)
        .await?;
    one.lease(&*store, T0, "x.example", 10).await?;
    // The second takes a part only.
    let part = two.lease(&*store, T0 + TTL, "x.example", 4).await?;
    assert!(part[0].items.iter().all(|item| item.maybe_started));
    let release = Release {
        range: part[0].range,
        due_at: None,
        requeue: Vec::new(),
    };
    store.release(vec![release], T0 + TTL).await?;
    let all = three.lease(&*store, T0 + TTL, "x.example", 10).await?;
    let items: Vec<_> = all.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len(), 10);
    assert!(items.iter().all(|item| item.maybe_started));
    Ok(())
}

/// A holder that slept through its lease cannot extend it or move its window, but what it did is
/// taken.
pub async fn a_holder_that_slept_is_fenced_but_its_outcomes_are_taken(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let (mut sleeper, mut heir) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 3, "x.example"))
        .submit(&*store, T0)
        .await?;
    let old = sleeper.lease(&*store, T0, "x.example", 3).await?;
    let late = T0 + TTL + secs(1);
    assert_eq!(store.renew(sleeper.journal, late, TTL).await?, []);
    let shipped = sleeper.advance(&*store, old[0].range, 3, late).await?;
    assert_eq!(shipped.lost, [old[0].range]);

    let new = heir.lease(&*store, late, "x.example", 3).await?;
    assert_eq!(
        sleeper.advance(&*store, old[0].range, 3, late).await?.lost,
        [old[0].range]
    );
    assert_eq!(
        sleeper.finish(&*store, old[0].range, late).await?.lost,
        [old[0].range]
    );
    let release = Release {
        range: old[0].range,
        due_at: Some(late + secs(900)),
        requeue: Vec::new(),
    };
    store.release(vec![release], late).await?;
    assert_eq!(store.renew(heir.journal, late, TTL).await?, [new[0].range]);

    // The sleeper delivered the first, the heir defers it: delivered it stays.
    let first = outcome(batch, &old[0].items[0], AttemptResult::Delivered, T0);
    assert_eq!(
        sleeper.report(&*store, vec![first], late).await?.duplicates,
        []
    );
    let deferred = outcome(batch, &new[0].items[0], later(late + secs(60)), late);
    heir.report(&*store, vec![deferred], late).await?;
    let row = &all_rows(&*store, batch).await?[0];
    assert_eq!(row.status, Status::Delivered);
    checked(&*store, batch).await?;
    Ok(())
}

/// The window is what its holder says, for as long as it holds the range.
pub async fn a_window_moves_with_its_holder(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut one, two) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 200, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = one.lease(&*store, T0, "x.example", 200).await?;
    let done: Vec<_> = leased[0].items.iter().take(50).collect();
    let facts = done
        .iter()
        .map(|item| outcome(batch, item, AttemptResult::Delivered, T0))
        .collect();
    let facts = one.write(facts);
    let mut shipment = one.shipment(facts, T0);
    shipment.windows.push((leased[0].range, 114));
    assert_eq!(store.ship(shipment).await?.lost, []);
    // It never goes back.
    assert_eq!(
        one.advance(&*store, leased[0].range, 10, T0).await?.lost,
        []
    );
    let taken = two.lease(&*store, T0 + TTL, "x.example", 200).await?;
    let items: Vec<_> = taken.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len(), 150);
    assert_eq!(items.iter().filter(|item| item.maybe_started).count(), 64);
    Ok(())
}

/// A range goes when everything in it is reported; until then it stays leased.
pub async fn a_finished_range_is_gone_and_an_unfinished_one_stays(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 3, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 3).await?;
    let mut facts = outcomes(&leased, AttemptResult::Delivered, T0);
    let last = facts.pop().into_iter().collect();
    node.report(&*store, facts, T0).await?;
    assert_eq!(node.finish(&*store, leased[0].range, T0).await?.lost, []);
    assert_eq!(store.renew(node.journal, T0, TTL).await?, [leased[0].range]);
    node.report(&*store, last, T0).await?;
    assert_eq!(node.finish(&*store, leased[0].range, T0).await?.lost, []);
    assert_eq!(store.renew(node.journal, T0, TTL).await?, []);
    assert_eq!(node.lease(&*store, T0 + TTL, "x.example", 3).await?, []);
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 3);
    Ok(())
}

/// What is handed back is free at once, and nobody need fear for it.
pub async fn a_range_handed_back_is_untouched(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (mut one, two) = (Node::new(1), Node::new(2));
    let batch = Spec::new(1, neighbours(&*store, 20, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = one.lease(&*store, T0, "x.example", 20).await?;
    let facts =
        [0, 7].map(|at: usize| outcome(batch, &leased[0].items[at], AttemptResult::Delivered, T0));
    one.report(&*store, facts.into(), T0).await?;
    let release = Release {
        range: leased[0].range,
        due_at: None,
        requeue: Vec::new(),
    };
    store.release(vec![release], T0).await?;
    assert_eq!(store.renew(one.journal, T0, TTL).await?, []);
    let taken = two.lease(&*store, T0, "x.example", 20).await?;
    let items: Vec<_> = taken.iter().flat_map(|range| &range.items).collect();
    assert_eq!(items.len(), 18);
    assert!(items.iter().all(|item| !item.maybe_started));
    Ok(())
}

/// Handed back with a time, it comes due then.
pub async fn a_range_handed_back_waits_until_it_is_due(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    Spec::new(1, neighbours(&*store, 2, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 2).await?;
    let due = T0 + secs(90);
    let release = Release {
        range: leased[0].range,
        due_at: Some(due),
        requeue: Vec::new(),
    };
    store.release(vec![release], T0).await?;
    assert_eq!(
        node.lease(&*store, due - Duration::from_millis(1), "x.example", 2)
            .await?,
        []
    );
    let backlog = store.backlog(T0, None, 10).await?;
    assert_eq!((backlog[0].due, backlog[0].next_due), (0, Some(due)));
    assert_eq!(
        emails(&node.lease(&*store, due, "x.example", 2).await?).len(),
        2
    );
    Ok(())
}

/// Recipients leave a mixed lot for queues of their own; the rest stays.
pub async fn recipients_move_out_of_a_mixed_lot(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let emails_in: Vec<_> = ["a", "b", "c"]
        .iter()
        .flat_map(|name| neighbours(&*store, 4, &format!("{name}.example")))
        .collect();
    let mut spec = Spec::new(1, emails_in);
    spec.mixed = true;
    let batch = spec.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, MIXED, 12).await?;
    assert_eq!(&*leased[0].queue, MIXED);
    let of_b = leased[0]
        .items
        .iter()
        .filter(|item| item.row.email.domain() == "b.example");
    let requeue: Vec<_> = of_b.map(|item| (item.place, "b.example".into())).collect();
    let done = outcome(batch, &leased[0].items[0], AttemptResult::Delivered, T0);
    node.report(&*store, vec![done], T0).await?;
    let release = Release {
        range: leased[0].range,
        due_at: None,
        requeue,
    };
    store.release(vec![release], T0).await?;

    let backlog = store.backlog(T0, None, 10).await?;
    let due: Vec<_> = backlog.iter().map(|of| (&*of.queue, of.due)).collect();
    assert_eq!(due, [(MIXED, 7), ("b.example", 4)]);
    let moved = node.lease(&*store, T0, "b.example", 10).await?;
    assert_eq!(
        sorted(emails(&moved)),
        sorted(neighbours(&*store, 4, "b.example"))
    );
    node.report(&*store, outcomes(&moved, AttemptResult::Delivered, T0), T0)
        .await?;
    // A retry of a mixed lot waits in the queue of its domain.
    let rest = node.lease(&*store, T0, MIXED, 10).await?;
    let deferred = outcome(batch, &rest[0].items[6], later(T0 + secs(600)), T0);
    node.report(&*store, vec![deferred], T0).await?;
    assert_eq!(
        &*store.backlog(T0, None, 10).await?[0].queue,
        rest[0].items[6].row.email.domain()
    );
    assert_eq!(checked(&*store, batch).await?.counters.delivered, 5);
    Ok(())
}

/// A node that comes back has its ranges at once, those of its window in doubt, the rest not.
pub async fn a_restarted_node_has_its_own_back_at_once(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, neighbours(&*store, 100, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 100).await?;
    let done = outcome(batch, &leased[0].items[1], AttemptResult::Delivered, T0);
    node.report(&*store, vec![done], T0).await?;
    drop(store);

    let store = fixture.mta().await;
    let soon = T0 + secs(5);
    assert_eq!(
        Node::new(2).lease(&*store, soon, "x.example", 100).await?,
        []
    );
    assert_eq!(store.reclaim(Node::new(2).journal, soon, TTL).await?, []);
    let back = store.reclaim(node.journal, soon, TTL).await?;
    assert_eq!(back.len(), 1);
    assert_eq!((back[0].items.len(), back[0].expires_at), (99, soon + TTL));
    assert!(back[0].range.token > leased[0].range.token);
    let doubtful = back[0]
        .items
        .iter()
        .filter(|item| item.maybe_started)
        .count();
    assert_eq!(doubtful, 63);
    assert_eq!(store.high_water(node.journal).await?, 1);
    // It knows what it had not started: handed back, that is untouched.
    let release = Release {
        range: back[0].range,
        due_at: None,
        requeue: Vec::new(),
    };
    store.release(vec![release], soon).await?;
    let again = node.lease(&*store, soon, "x.example", 100).await?;
    assert!(
        again
            .iter()
            .flat_map(|range| &range.items)
            .all(|item| !item.maybe_started)
    );
    Ok(())
}

/// A renewal extends what has not expired, and tells what is held.
pub async fn leases_are_renewed_only_while_they_last(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (one, two) = (Node::new(1), Node::new(2));
    Spec::new(1, neighbours(&*store, 20, "x.example"))
        .submit(&*store, T0)
        .await?;
    let early = one.lease(&*store, T0, "x.example", 10).await?;
    let renewed = store.renew(one.journal, T0 + secs(30), TTL).await?;
    assert_eq!(renewed, [early[0].range]);
    assert_eq!(
        emails(&two.lease(&*store, T0 + secs(60), "x.example", 20).await?).len(),
        10
    );
    assert_eq!(store.renew(one.journal, T0 + secs(76), TTL).await?, []);
    assert_eq!(
        emails(&two.lease(&*store, T0 + secs(76), "x.example", 20).await?).len(),
        10
    );
    Ok(())
}

/// Whose hours have not come wait until they come, each in the own time zone; a retry does, too.
pub async fn a_shut_window_keeps_its_recipients_waiting(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    // It is 08:00 in UTC and 17:00 in Tokyo.
    let mut spec = Spec::new(1, neighbours(&*store, 300, "x.example"));
    spec.head.window = Some(hours());
    spec.zones = (0..300)
        .step_by(3)
        .map(|at| (at, "Asia/Tokyo".to_owned()))
        .collect();
    let batch = spec.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 1_000).await?;
    let tokyo = |emails: &[String]| -> Vec<String> { emails.iter().step_by(3).cloned().collect() };
    assert_eq!(sorted(emails(&leased)), sorted(tokyo(&spec.emails)));
    let opens_at = T0 + secs(3_600);
    let backlog = store.backlog(T0, None, 10).await?;
    assert_eq!((backlog[0].due, backlog[0].next_due), (0, Some(opens_at)));
    assert_eq!(checked(&*store, batch).await?.counters.queued, 300);

    // 13:00 UTC is 22:00 in Tokyo, which wakes up eleven hours later.
    let night = T0 + secs(5 * 3_600);
    node.report(&*store, outcomes(&leased, later(night), T0), T0)
        .await?;
    for range in &leased {
        node.finish(&*store, range.range, T0).await?;
    }
    let almost = opens_at - Duration::from_millis(1);
    assert_eq!(node.lease(&*store, almost, "x.example", 1_000).await?, []);
    let others = node.lease(&*store, opens_at, "x.example", 1_000).await?;
    assert_eq!(emails(&others).len(), 200);
    node.report(
        &*store,
        outcomes(&others, AttemptResult::Delivered, opens_at),
        opens_at,
    )
    .await?;
    assert_eq!(
        node.lease(&*store, night + secs(60), "x.example", 1_000)
            .await?,
        []
    );
    let morning = T0 + secs(16 * 3_600);
    let backlog = store.backlog(night + secs(60), None, 10).await?;
    assert_eq!((backlog[0].due, backlog[0].next_due), (0, Some(morning)));
    let leased = node.lease(&*store, morning, "x.example", 1_000).await?;
    assert_eq!(sorted(emails(&leased)), sorted(tokyo(&spec.emails)));
    Ok(())
}

/// The end of a batch does not wait for a window, nor does the doubt about what a dead holder did.
pub async fn a_shut_window_keeps_nobody_from_an_end(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (dead, heir) = (Node::new(1), Node::new(2));
    let mut spec = Spec::new(1, neighbours(&*store, 100, "x.example"));
    spec.head.window = Some(hours());
    spec.head.expires_at = Some(T0 + secs(60));
    spec.submit(&*store, T0).await?;
    assert_eq!(heir.lease(&*store, T0, "x.example", 100).await?, []);
    let over = heir.lease(&*store, T0 + secs(60), "x.example", 100).await?;
    assert_eq!(emails(&over).len(), 100);

    let mut spec = Spec::new(2, neighbours(&*store, 100, "y.example"));
    spec.head.window = Some(hours());
    spec.submit(&*store, T0).await?;
    let almost = T0 + secs(13 * 3_600) - TTL + secs(1);
    let leased = dead.lease(&*store, almost, "y.example", 100).await?;
    assert_eq!(emails(&leased).len(), 100);
    let taken = heir.lease(&*store, almost + TTL, "y.example", 100).await?;
    let taken: Vec<_> = taken.iter().flat_map(|range| &range.items).collect();
    assert!(taken.iter().all(|item| item.maybe_started));
    assert_eq!(taken.len(), usize::try_from(crate::WINDOW).unwrap_or(0));
    let backlog = store.backlog(almost + TTL, None, 10).await?;
    let rest = backlog
        .iter()
        .find(|of| &*of.queue == "y.example")
        .expect("the rest");
    assert_eq!((rest.due, rest.next_due), (0, Some(T0 + secs(25 * 3_600))));
    Ok(())
}

/// From 09:00 to 21:00 of the recipient's day.
fn hours() -> model::SendWindow {
    model::SendWindow {
        from: 9 * 60,
        to: 21 * 60,
        time_zone: None,
    }
}
