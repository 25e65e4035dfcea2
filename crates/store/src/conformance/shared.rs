//! Rules of what nodes share beside mail: notes, job leases, suspensions, announcements; and of
//! making deferred mail due.

use super::Fixture;
use super::support::*;
use crate::{
    Announcement, BatchChange, Control, DueScope, EventQuery, NOTE_BYTES, Note, PEOPLE, Result,
    Retire, StoreError, Suspension,
};
use model::{About, AttemptResult, EventKind, EventRecipient, JournalId, MessageId, Timestamp};
use std::time::Duration;

fn note(kind: &str, key: &str, value: &[u8], expires_at: Option<Timestamp>) -> Note {
    Note {
        kind: kind.into(),
        key: key.into(),
        value: value.into(),
        expires_at,
    }
}

/// What one node notes the others read: the last writer wins, until it expires or is removed.
pub async fn notes_are_shared_until_they_expire(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let until = T0 + secs(60);
    let first = vec![
        note("limit", "b", b"2", None),
        note("limit", "a", b"1", Some(until)),
        note("tls", "a", &[0, 255, 10], None),
    ];
    store.put_notes(first.clone(), T0).await?;
    let (a, b) = (first[1].clone(), first[0].clone());
    assert_eq!(elsewhere.notes("limit", T0).await?, [a.clone(), b.clone()]);
    assert_eq!(elsewhere.notes("none", T0).await?, []);
    assert_eq!(elsewhere.note("limit", "a", T0).await?, Some(a));
    assert_eq!(elsewhere.note("limit", "c", T0).await?, None);
    assert_eq!(store.note("limit", "a", until).await?, None);
    assert_eq!(store.notes("limit", until).await?, [b]);

    let newer = note("limit", "b", b"3", Some(until + secs(1)));
    elsewhere
        .put_notes(vec![newer.clone(), note("tls", "a", b"", None)], until)
        .await?;
    assert_eq!(store.notes("limit", until).await?, [newer]);
    assert_eq!(store.notes("tls", until).await?, []);
    assert_eq!(store.notes("limit", until + secs(1)).await?, []);

    let full = note("limit", "full", &vec![7; NOTE_BYTES], None);
    store.put_notes(vec![full.clone()], until).await?;
    assert_eq!(store.note("limit", "full", until).await?, Some(full));
    let over = note("limit", "over", &vec![7; NOTE_BYTES + 1], None);
    let refused = store.put_notes(vec![over], until).await;
    assert!(
        matches!(refused, Err(StoreError::Refused(_))),
        "{refused:?}"
    );
    Ok(())
}

/// Notes of people are as many as people, and may stand in several places: pages have every one of them
/// once and in order, whoever wrote them how.
pub async fn notes_of_people_are_found_wherever_they_stand(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let kind = format!("{PEOPLE}acme");
    let of = |n: u16| note(&kind, &format!("p-{n:03}"), &n.to_le_bytes(), None);
    let mut all: Vec<Note> = (0..300).map(of).collect();
    store.put_notes(all[..200].to_vec(), T0).await?;
    let mut derived = all[200..].to_vec();
    derived.push(note("binding/acme", "p-001", b"b", None));
    derived.push(note(&format!("{PEOPLE}other"), "p-001", b"o", None));
    store.derive(derived, Vec::new(), T0).await?;
    for limit in [1_000, 300, 64, 7] {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = elsewhere.notes_after(&kind, after.as_deref(), limit, T0);
            let page = page.await?;
            assert!(page.items.len() <= usize::try_from(limit).expect("few"));
            found.extend(page.items);
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(found, all, "in pages of {limit}");
    }
    assert_eq!(elsewhere.notes(&kind, T0).await?, all);
    let keys = (0..400).step_by(3).map(|n| format!("p-{n:03}").into());
    let mut some = elsewhere.notes_by_key(&kind, keys.collect(), T0).await?;
    some.sort_by(|a, b| a.key.cmp(&b.key));
    let third: Vec<Note> = all.iter().step_by(3).cloned().collect();
    assert_eq!(some, third);
    // One is swapped, some go.
    let newer = note(&kind, "p-007", b"newer", None);
    let before = Some(Box::from(all[7].value.as_ref()));
    assert!(store.swap_note(newer.clone(), before.clone(), T0).await?);
    assert!(!store.swap_note(newer.clone(), before, T0).await?);
    assert_eq!(
        elsewhere.note(&kind, "p-007", T0).await?,
        Some(newer.clone())
    );
    all[7] = newer;
    let gone = |n: u16| note(&kind, &format!("p-{n:03}"), b"", None);
    elsewhere
        .put_notes((100..150).map(gone).collect(), T0)
        .await?;
    store.derive(vec![gone(3)], Vec::new(), T0).await?;
    let left = |n: usize| n != 3 && !(100..150).contains(&n);
    let mut at = 0..;
    all.retain(|_| at.next().is_some_and(left));
    let late = T0 + secs(60);
    store.put_notes(vec![of(1)], late).await?;
    assert_eq!(elsewhere.notes(&kind, late).await?, all);
    // Too large, or not for ever, for one: none of them is written.
    for over in [
        note(&kind, "over", &vec![7; NOTE_BYTES + 1], None),
        note(&kind, "over", b"soon", Some(late + secs(60))),
    ] {
        let refused = store.put_notes(vec![of(900), over, of(901)], late).await;
        assert!(
            matches!(refused, Err(StoreError::Refused(_))),
            "{refused:?}"
        );
        assert_eq!(elsewhere.notes(&kind, late).await?, all);
    }
    Ok(())
}

/// Notes are paged by key; with events they change in one step, and an event says what it is about.
pub async fn what_is_derived_changes_with_what_it_tells(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let batch = model::BatchId::new(T0, 7);
    let about = About {
        id: Some(uuid::Uuid::from_u128(7)),
        occurred_at: Some(T0 - secs(5)),
        campaign: Some("spring".into()),
        batch_id: Some(batch),
        message_id: Some(MessageId { batch, index: 3 }),
        variant: None,
        recipient: Some(EventRecipient {
            email: "a@x.example".into(),
            prospect_id: Some("p-1".into()),
        }),
        metadata: serde_json::json!({"k": 1}),
    };
    let news = Announcement {
        kind: EventKind::IdentityBound,
        account: "acme".into(),
        data: serde_json::json!({"binding_id": "b"}).into(),
        about: about.clone(),
    };
    let mut notes: Vec<Note> = (0..5)
        .map(|n| note("prospect", &format!("p-{n}"), &[n], None))
        .collect();
    notes.push(note("prospect", "q", b"x", Some(T0 + secs(60))));
    notes.push(note("other", "p-9", b"x", None));
    store.derive(notes.clone(), vec![news], T0).await?;
    let first = elsewhere.notes_after("prospect", None, 4, T0).await?;
    assert_eq!(first.items, notes[..4]);
    let rest = elsewhere
        .notes_after("prospect", first.next.as_deref(), 4, T0)
        .await?;
    assert_eq!((rest.items, rest.next), (notes[4..6].to_vec(), None));
    let keys = vec!["p-2".into(), "none".into(), "q".into()];
    let mut some = elsewhere.notes_by_key("prospect", keys, T0).await?;
    some.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(some, [notes[2].clone(), notes[5].clone()]);
    store
        .derive(vec![note("prospect", "p-1", b"", None)], Vec::new(), T0)
        .await?;
    let late = T0 + secs(60);
    let left = elsewhere
        .notes_after("prospect", Some("p-0"), 9, late)
        .await?;
    assert_eq!(left.items, notes[2..5]);
    let events = all_events(&*elsewhere).await?;
    let [event] = events.as_slice() else {
        panic!("{events:?}")
    };
    assert_eq!(Some(event.id), about.id);
    assert_eq!(Some(event.occurred_at), about.occurred_at);
    assert_eq!((event.recorded_at, &*event.account), (T0, "acme"));
    assert_eq!(
        (event.batch_id, event.message_id),
        (Some(batch), about.message_id)
    );
    assert_eq!(event.recipient, about.recipient);
    assert_eq!(
        (&event.metadata, &event.data["binding_id"]),
        (&about.metadata, &"b".into())
    );
    let of_batch = EventQuery {
        batch: Some(batch),
        limit: 9,
        ..EventQuery::default()
    };
    // No batch of that id is there: what is asked of it is nothing.
    assert!(store.events(of_batch).await?.events.len() <= 1);
    Ok(())
}

/// However many are told at once, and by whom: each once, in order, with its note.
pub async fn much_is_told_at_once(fixture: &dyn Fixture) -> Result<()> {
    const MANY: u32 = 40;
    let (store, elsewhere) = (fixture.mta().await, fixture.another().await);
    let news = |who: &str, n: u32| Announcement {
        kind: EventKind::IdentityBound,
        account: who.into(),
        data: serde_json::json!({ "n": n }).into(),
        about: About::default(),
    };
    let tell = async |node: &dyn crate::Store, who: &str| -> Result<()> {
        for step in 0..5 {
            let numbers = step * MANY..(step + 1) * MANY;
            let notes = numbers
                .clone()
                .map(|n| note(who, &n.to_string(), b"x", None));
            let told = numbers.map(|n| news(who, n)).collect();
            node.derive(notes.collect(), told, T0).await?;
        }
        Ok(())
    };
    let announced = (0..MANY).map(|n| news("announced", n)).collect();
    tokio::try_join!(
        tell(&*store, "one"),
        tell(&*elsewhere, "two"),
        store.announce(announced, T0)
    )?;
    let all = all_events(&*elsewhere).await?;
    assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    for (who, count) in [("one", 5 * MANY), ("two", 5 * MANY), ("announced", MANY)] {
        let of_one = all.iter().filter(|event| event.account == who);
        let said: Vec<_> = of_one.map(|event| event.data["n"].as_u64()).collect();
        let expected: Vec<_> = (0..count).map(|n| Some(u64::from(n))).collect();
        assert_eq!(said, expected, "{who}");
    }
    for who in ["one", "two"] {
        let notes = store.notes(who, T0).await?;
        assert_eq!(notes.len(), usize::try_from(5 * MANY).unwrap_or(0), "{who}");
    }
    Ok(())
}

/// One node at a time has a job; its token is the same while it renews and higher for the next.
pub async fn a_job_is_one_nodes_at_a_time(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let (one, two) = (JournalId::new(T0, 1), JournalId::new(T0, 2));
    let token = store.job_lease("report", one, T0, TTL).await?;
    assert!(token.is_some());
    assert_eq!(elsewhere.job_lease("report", two, T0, TTL).await?, None);
    assert!(elsewhere.job_lease("decide", two, T0, TTL).await?.is_some());
    let renewed = T0 + secs(30);
    assert_eq!(store.job_lease("report", one, renewed, TTL).await?, token);
    let almost = renewed + TTL - Duration::from_millis(1);
    assert_eq!(store.job_lease("report", two, almost, TTL).await?, None);
    // Its time is over: another one has it, or the same one anew.
    let second = elsewhere
        .job_lease("report", two, renewed + TTL, TTL)
        .await?;
    assert!(second > token, "{second:?} after {token:?}");
    assert_eq!(
        store.job_lease("report", one, renewed + TTL, TTL).await?,
        None
    );
    let again = renewed + TTL + TTL;
    let third = store.job_lease("report", two, again, TTL).await?;
    assert!(third > second, "{third:?} after {second:?}");
    // Given up, it is free at once.
    let given = store
        .job_lease("report", two, again, Duration::ZERO)
        .await?;
    assert_eq!(given, third);
    let fourth = store.job_lease("report", one, again, TTL).await?;
    assert!(fourth > third, "{fourth:?} after {third:?}");
    Ok(())
}

/// A suspension holds until its time or until it is lifted, and every node hears of it.
pub async fn a_suspension_is_told_to_every_node(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    let cursor = elsewhere.control(None).await?.next;
    let of = |destination: &str, until: Option<Timestamp>, reason: &str| Suspension {
        destination: destination.into(),
        until,
        reason: reason.into(),
        by: "operator".into(),
        since: T0,
    };
    let (later, open) = (
        of("y.example", Some(T0 + secs(60)), "they asked"),
        of("x.example", None, "first"),
    );
    store.suspend(later.clone(), T0).await?;
    store.suspend(open.clone(), T0).await?;
    let newer = of("x.example", None, "second");
    elsewhere.suspend(newer.clone(), T0).await?;
    assert_eq!(store.suspensions(T0).await?, [newer.clone(), later.clone()]);
    assert_eq!(
        store.suspensions(T0 + secs(60)).await?,
        std::slice::from_ref(&newer)
    );
    assert!(elsewhere.resume("x.example", T0).await?);
    assert!(!store.resume("x.example", T0).await?);
    assert!(!store.resume("y.example", T0 + secs(60)).await?);
    assert_eq!(store.suspensions(T0).await?, []);
    let told = elsewhere.control(Some(cursor)).await?.items;
    assert_eq!(
        told,
        [
            Control::DestinationSuspended(later),
            Control::DestinationSuspended(open),
            Control::DestinationSuspended(newer),
            Control::DestinationResumed("x.example".into()),
        ]
    );
    Ok(())
}

/// What belongs to no recipient is an event of its account.
pub async fn announcements_are_events_of_their_account(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let news = |account: &str, n: u32| Announcement {
        kind: EventKind::DestinationLimitChanged,
        account: account.into(),
        data: serde_json::json!({ "n": n }).into(),
        about: About::default(),
    };
    store
        .announce(vec![news("acme", 1), news("other", 2), news("acme", 3)], T0)
        .await?;
    store.announce(Vec::new(), T0).await?;
    let all = all_events(&*store).await?;
    let said: Vec<_> = all.iter().map(|event| event.data["n"].as_u64()).collect();
    assert_eq!(said, [Some(1), Some(2), Some(3)]);
    assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert!(all.iter().all(|event| event.recorded_at == T0
        && event.kind == EventKind::DestinationLimitChanged
        && event.batch_id.is_none()
        && event.recipient.is_none()));
    assert_eq!(all_events(&*fixture.another().await).await?, all);
    let query = EventQuery {
        account: Some("other".into()),
        limit: 10,
        ..EventQuery::default()
    };
    assert_eq!(events_of(&*store, query).await?, all[1..2]);
    let query = EventQuery {
        batch: Some(id(1)),
        limit: 10,
        ..EventQuery::default()
    };
    assert_eq!(events_of(&*store, query).await?, []);
    Ok(())
}

/// Who has no cursor yet begins at the end of the stream, or at a time.
pub async fn a_time_has_its_cursor(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let (never, always) = (Timestamp::from_millis(i64::MAX), Timestamp::from_millis(0));
    let after = async |cursor: &str| {
        let query = EventQuery {
            after: Some(cursor.to_owned()),
            limit: 10,
            ..EventQuery::default()
        };
        events_of(&*store, query).await
    };
    let begin = store.event_cursor(never).await?;
    let news = |n: u32| Announcement {
        kind: EventKind::DestinationLimitChanged,
        account: "acme".into(),
        data: serde_json::json!({ "n": n }).into(),
        about: About::default(),
    };
    store.announce(vec![news(1), news(2)], T0).await?;
    let middle = store.event_cursor(never).await?;
    store.announce(vec![news(3)], T0 + secs(10)).await?;
    store.announce(vec![news(4)], T0 + secs(20)).await?;
    let all = all_events(&*store).await?;
    assert_eq!(all.len(), 4);
    assert_eq!(after(&begin).await?, all);
    assert_eq!(after(&middle).await?, all[2..]);
    assert_eq!(after(&store.event_cursor(always).await?).await?, all);
    assert_eq!(after(&store.event_cursor(never).await?).await?, []);
    Ok(())
}

/// Who was away for longer than events are kept goes on with the oldest that is there.
pub async fn a_cursor_older_than_what_is_kept_goes_on(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let news = |n: u32| Announcement {
        kind: EventKind::DestinationLimitChanged,
        account: "acme".into(),
        data: serde_json::json!({ "n": n }).into(),
        about: About::default(),
    };
    store.announce(vec![news(1)], T0).await?;
    let mut query = EventQuery {
        limit: 10,
        ..EventQuery::default()
    };
    query.after = Some(store.events(query.clone()).await?.next);
    store.announce(vec![news(2), news(3)], T0).await?;
    let old = Retire {
        events_before: T0 + secs(1_000_000_000),
        batches_before: Timestamp::from_millis(0),
        after: None,
    };
    let mut step = store.retire(old.clone(), T0).await?;
    while let Some(after) = step.next {
        let after = Some(after);
        step = store
            .retire(
                Retire {
                    after,
                    ..old.clone()
                },
                T0,
            )
            .await?;
    }
    assert_eq!(store.events(query.clone()).await?.events, []);
    store.announce(vec![news(4)], T0 + secs(1)).await?;
    let page = store.events(query).await?;
    let said: Vec<_> = page
        .events
        .iter()
        .map(|event| event.data["n"].as_u64())
        .collect();
    assert_eq!(said, [Some(4)]);
    Ok(())
}

/// Deferred mail of a batch or of domains is made due; what a node holds and what has ended is not.
pub async fn deferred_mail_is_made_due(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let mut emails_in = people(30, "x.example");
    emails_in.extend(people(20, "y.example"));
    let batch = Spec::new(1, emails_in.clone()).submit(&*store, T0).await?;
    let other = Spec::new(2, people(10, "x.example"))
        .submit(&*store, T0)
        .await?;
    for queue in ["x.example", "y.example"] {
        let leased = node.lease(&*store, T0, queue, 100).await?;
        let deferred = outcomes(&leased, later(T0 + secs(3_600)), T0);
        node.report(&*store, deferred, T0).await?;
        for range in leased {
            node.finish(&*store, range.range, T0).await?;
        }
    }
    let cursor = store.control(None).await?.next;
    let of_batch = DueScope::Batch(batch);
    let of_y = DueScope::Domains(vec!["y.example".into(), "nowhere.example".into()]);
    assert_eq!(store.make_due(of_batch.clone(), T0, true).await?, 50);
    assert_eq!(store.make_due(of_y.clone(), T0, true).await?, 20);
    assert_eq!(store.make_due(DueScope::Batch(id(9)), T0, false).await?, 0);
    assert_eq!(
        store
            .backlog(T0, None, 10)
            .await?
            .iter()
            .map(|of| of.due)
            .sum::<u64>(),
        0
    );
    assert_eq!(store.control(Some(cursor.clone())).await?.items, []);

    assert_eq!(store.make_due(of_y.clone(), T0, false).await?, 20);
    assert_eq!(store.make_due(of_y, T0, false).await?, 0);
    assert!(
        store
            .control(Some(cursor))
            .await?
            .items
            .contains(&Control::Work)
    );
    let held = node.lease(&*store, T0, "y.example", 100).await?;
    assert_eq!(emails(&held).len(), 20);
    assert!(
        held.iter()
            .flat_map(|range| &range.items)
            .all(|item| item.attempts == 1)
    );
    // The rest of the batch, and nothing of the other one.
    assert_eq!(store.make_due(of_batch.clone(), T0, false).await?, 30);
    let mut leased = node.lease(&*store, T0, "x.example", 100).await?;
    assert!(leased.iter().all(|range| range.batch.id == batch));
    assert_eq!(emails(&leased).len(), 30);
    leased.extend(held);
    node.report(&*store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    assert_eq!(store.make_due(of_batch, T0, false).await?, 0);
    store.change_batch(other, BatchChange::Cancel, T0).await?;
    assert_eq!(store.make_due(DueScope::Batch(other), T0, false).await?, 0);
    checked(&*store, batch).await?;
    checked(&*store, other).await?;
    Ok(())
}

/// Of two that read the same note, one writes it.
pub async fn a_note_is_swapped_once(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let note = |value: &[u8], expires_at| Note {
        kind: "k".into(),
        key: "a".into(),
        value: value.into(),
        expires_at,
    };
    let one = Some(b"1".as_slice().into());
    assert!(store.swap_note(note(b"1", None), None, T0).await?);
    assert!(!store.swap_note(note(b"2", None), None, T0).await?);
    assert!(
        store
            .swap_note(note(b"2", Some(T0 + secs(5))), one.clone(), T0)
            .await?
    );
    assert!(!store.swap_note(note(b"3", None), one, T0).await?);
    // What has expired is as if it were not there.
    let late = T0 + secs(6);
    assert!(store.swap_note(note(b"4", None), None, late).await?);
    let found = store.note("k", "a", late).await?;
    assert_eq!(found.map(|note| note.value), Some(b"4".as_slice().into()));
    Ok(())
}
