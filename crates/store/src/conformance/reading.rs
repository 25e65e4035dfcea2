//! Rules of reading: events, recipients, stories, lists.

use super::Fixture;
use super::support::*;
use crate::{
    BatchQuery, EventQuery, RecipientQuery, Result, Sign, Store, Suppression, SuppressionQuery,
};
use model::{
    Actor, AttemptResult, BatchId, BatchState, Blame, Class, EnhancedCode, Event, EventKind,
    HitKind, MessageId, RuleRef, Status, SuppressionReason, Timestamp,
};
use std::collections::{BTreeMap, BTreeSet};

/// By cursor every event comes once, whatever the page size; later readings tell the same.
pub async fn events_are_told_once_each_and_never_change(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    assert_eq!(all_events(&*store).await?, []);
    let (batch, other) = two_accounts(&*store).await?;
    let all = all_events(&*store).await?;
    assert_eq!(all.len(), 3 + 30 + 2 + 5);
    assert_eq!(
        all.iter()
            .map(|event| event.id)
            .collect::<BTreeSet<_>>()
            .len(),
        all.len()
    );
    assert!(
        all.windows(2)
            .all(|pair| pair[0].seq < pair[1].seq || store.partitions() > 1)
    );
    for limit in [1, 3, 7, 1_000] {
        let paged = events_of(
            &*store,
            EventQuery {
                limit,
                ..EventQuery::default()
            },
        )
        .await?;
        assert_eq!(paged, all, "limit {limit}");
    }
    let of = |event: &&Event, batch| event.batch_id == Some(batch);
    let wanted = |query: EventQuery| events_of(&*store, EventQuery { limit: 4, ..query });
    let mine = wanted(EventQuery {
        batch: Some(batch),
        ..EventQuery::default()
    })
    .await?;
    assert_eq!(
        mine,
        all.iter()
            .filter(|event| of(event, batch))
            .cloned()
            .collect::<Vec<_>>()
    );
    let theirs = wanted(EventQuery {
        account: Some("other".into()),
        ..EventQuery::default()
    })
    .await?;
    assert_eq!(
        theirs,
        all.iter()
            .filter(|event| of(event, other))
            .cloned()
            .collect::<Vec<_>>()
    );
    let some = vec![EventKind::BatchCompleted, EventKind::EmailTemporaryError];
    let some = wanted(EventQuery {
        kinds: some,
        ..EventQuery::default()
    })
    .await?;
    assert_eq!(some.len(), 6);

    // A cursor taken at the end tells only what is new, also after a restart.
    let end = store
        .events(EventQuery {
            limit: 1_000,
            ..EventQuery::default()
        })
        .await?
        .next;
    drop(store);
    let store = fixture.mta().await;
    assert_eq!(all_events(&*store).await?, all);
    Spec::new(3, people(1, "x.example"))
        .submit(&*store, T0)
        .await?;
    let new = store
        .events(EventQuery {
            after: Some(end),
            limit: 10,
            ..EventQuery::default()
        })
        .await?;
    assert_eq!(kinds(&new.events), ["batch.accepted", "batch.started"]);
    Ok(())
}

/// Thirty delivered recipients of one account, five deferred ones of another.
async fn two_accounts(store: &dyn Store) -> Result<(BatchId, BatchId)> {
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(30, "x.example"))
        .submit(store, T0)
        .await?;
    let mut other = Spec::new(2, people(5, "y.example"));
    other.head.account = "other".into();
    let other = other.submit(store, T0).await?;
    let leased = node.lease(store, T0, "x.example", 30).await?;
    let facts = outcomes(&leased, AttemptResult::Delivered, T0);
    for some in facts.chunks(7) {
        node.report(store, some.to_vec(), T0 + secs(1)).await?;
    }
    let leased = node.lease(store, T0, "y.example", 5).await?;
    let deferred = outcomes(&leased, later(T0 + secs(60)), T0);
    node.report(store, deferred, T0 + secs(2)).await?;
    Ok((batch, other))
}

/// What happened to one recipient is told in the order in which the store learned it.
pub async fn events_of_a_recipient_keep_their_order(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(60, "x.example"))
        .submit(&*store, T0)
        .await?;
    let mut now = T0;
    for _ in 0..3 {
        let leased = node.lease(&*store, now, "x.example", 100).await?;
        assert_eq!(emails(&leased).len(), 60);
        now = now + secs(60);
        node.report(&*store, outcomes(&leased, later(now), now), now)
            .await?;
    }
    let leased = node.lease(&*store, now, "x.example", 100).await?;
    let mut facts = outcomes(&leased, AttemptResult::Delivered, now);
    facts.extend((0..60).map(|index| hit(batch, index, HitKind::Open, Actor::Human, now)));
    node.report(&*store, facts, now).await?;
    let mut by_message: BTreeMap<MessageId, Vec<(EventKind, u64)>> = BTreeMap::new();
    for event in all_events(&*store).await? {
        if let Some(message) = event.message_id {
            let attempt = event
                .data
                .get("attempt")
                .and_then(serde_json::Value::as_u64)
                .unwrap_or(0);
            by_message
                .entry(message)
                .or_default()
                .push((event.kind, attempt));
        }
    }
    assert_eq!(by_message.len(), 60);
    use EventKind::{EmailDelivered, EmailOpened, EmailTemporaryError as Later};
    for told in by_message.values() {
        assert_eq!(
            told,
            &[
                (Later, 1),
                (Later, 2),
                (Later, 3),
                (EmailDelivered, 4),
                (EmailOpened, 0)
            ]
        );
    }
    Ok(())
}

/// The envelope and the data of an event are those of the contract.
pub async fn events_say_what_the_contract_says(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, vec!["a@x.example".into()])
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 1).await?;
    let retry = T0 + secs(300);
    let at = T0 + secs(2);
    let deferred = with(
        outcome(batch, &leased[0].items[0], later(retry), at),
        |attempt| {
            attempt.detail.smtp_code = Some(451);
            attempt.detail.enhanced_code = Some(EnhancedCode(4, 7, 1));
            attempt.detail.class = Some(Class::Greylisted);
            attempt.detail.blame = Some(Blame::Destination);
            attempt.detail.rule = Some(RuleRef::new("greylist", "0f"));
            attempt.detail.tls = Some("TLSv1.3".into());
        },
    );
    let clicked = hit(batch, 0, HitKind::Click, Actor::Human, at);
    node.report(&*store, vec![deferred, clicked], T0 + secs(3))
        .await?;
    let events = all_events(&*store).await?;
    let told = &events[2];
    assert_eq!(told.id.get_version_num(), 7);
    assert_eq!((told.occurred_at, told.recorded_at), (at, T0 + secs(3)));
    assert_eq!(
        (told.account.as_str(), told.campaign.as_deref()),
        ("acme", Some("spring"))
    );
    assert_eq!(
        (told.batch_id, told.message_id),
        (Some(batch), Some(MessageId { batch, index: 0 }))
    );
    let recipient = told.recipient.as_ref().expect("a recipient");
    assert_eq!(
        (recipient.email.as_str(), recipient.prospect_id.as_deref()),
        ("a@x.example", Some("p0"))
    );
    assert_eq!(
        told.metadata,
        serde_json::json!({"of": "batch", "n": "1", "row": 0})
    );
    let data = serde_json::json!({
        "attempt": 1, "smtp_code": 451, "enhanced_code": "4.7.1", "class": "greylisted", "blame": "destination",
        "reply": "reply to a@x.example", "host": "mx.x.example (192.0.2.1)", "tls": "TLSv1.3",
        "destination": "x.example", "source": "default", "rule": "greylist", "rules_version": "0f", "ambiguous": false,
        "next_attempt_at": retry, "transaction_ms": 0, "dot_at": told.data["dot_at"],
    });
    assert_eq!(told.data, data);
    // When the final dot was sent: what machines are told from people by.
    assert!(told.data["dot_at"].is_string(), "{}", told.data);
    let data = serde_json::json!({
        "actor": "human", "machine_reasons": [], "link": 2, "url": "https://x.example/", "user_agent": "agent",
        "network": "192.0.2.0/24", "visitor": null, "rules": 1, "hit": events[3].data["hit"],
    });
    assert_eq!(events[3].data, data);
    let hit = events[3].data["hit"].as_str().expect("its fact");
    assert!(hit.parse::<model::FactId>().is_ok(), "{hit}");
    Ok(())
}

/// Signs are what is read of the same events, whatever the page size; stories of many messages are
/// those of each.
pub async fn signs_are_read_of_events(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let batch = Spec::new(1, people(40, "x.example"))
        .submit(&*store, T0)
        .await?;
    let leased = node.lease(&*store, T0, "x.example", 40).await?;
    let mut facts = outcomes(&leased, AttemptResult::Delivered, T0 + secs(1));
    facts.extend(
        [(3, HitKind::Click), (3, HitKind::Open), (9, HitKind::Click)]
            .map(|(index, kind)| hit(batch, index, kind, Actor::Human, T0 + secs(2))),
    );
    node.report(&*store, facts, T0 + secs(3)).await?;
    let hits = [3, 4].map(|index| hit(batch, index, HitKind::Click, Actor::Unknown, T0));
    node.report(&*store, hits.into(), T0 + secs(4)).await?;
    let every = [
        vec![],
        vec![EventKind::EmailDelivered],
        vec![EventKind::EmailClicked, EventKind::BatchAccepted],
    ];
    for (kinds, limit) in every
        .into_iter()
        .flat_map(|of| [(of.clone(), 7), (of, 5_000)])
    {
        let query = EventQuery {
            kinds,
            limit,
            ..EventQuery::default()
        };
        let events = events_of(&*store, query.clone()).await?;
        let expected: Vec<Sign> = events.into_iter().map(Sign::of).collect();
        let (mut signs, mut after) = (Vec::new(), None);
        loop {
            let page = store
                .signs(EventQuery {
                    after: after.clone(),
                    ..query.clone()
                })
                .await?;
            let ended = page.signs.is_empty();
            signs.extend(page.signs);
            after = Some(page.next);
            if ended {
                break;
            }
        }
        assert_eq!(signs, expected, "{:?}", query.kinds);
        let of_mail = |sign: &&Sign| matches!(sign, Sign::Mail(_));
        assert!(signs.iter().filter(of_mail).count() >= 4);
    }
    let beyond = EventQuery {
        after: Some("e1-7777777777777777".into()),
        ..EventQuery::default()
    };
    assert!(store.signs(beyond).await.is_err());
    let message = |index| MessageId { batch, index };
    let some = vec![message(9), message(3), message(77), message(4)];
    let mut stories = store.messages(some.clone()).await?;
    stories.sort_by_key(|story| story.recipient.row.index);
    let mut each = Vec::new();
    for index in [3, 4, 9] {
        each.extend(store.message(message(index)).await?);
    }
    assert_eq!((stories.len(), &stories), (3, &each));
    Ok(())
}

/// Recipients come in order of index, in pages, by status, engagement and domain.
pub async fn recipients_are_paged_and_filtered(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let mut emails_in = people(1_500, "x.example");
    emails_in.extend(people(700, "y.example"));
    let batch = Spec::new(1, emails_in.clone()).submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "y.example", 100).await?;
    let chosen = sorted(emails(&leased));
    node.report(&*store, outcomes(&leased, AttemptResult::Delivered, T0), T0)
        .await?;
    let hits = [3, 1_600, 2_199].map(|index| hit(batch, index, HitKind::Open, Actor::Unknown, T0));
    node.report(&*store, hits.into(), T0).await?;
    for limit in [1_000, 137] {
        let rows = rows_of(
            &*store,
            RecipientQuery {
                limit,
                ..query(batch)
            },
        )
        .await?;
        let found: Vec<_> = rows.iter().map(|row| row.row.email.to_string()).collect();
        assert_eq!(found, emails_in, "limit {limit}");
    }
    let delivered = RecipientQuery {
        status: Some(Status::Delivered),
        limit: 30,
        ..query(batch)
    };
    let rows = rows_of(&*store, delivered).await?;
    assert_eq!(
        sorted(rows.iter().map(|row| row.row.email.to_string()).collect()),
        chosen
    );
    let opened = RecipientQuery {
        opened: Some(true),
        ..query(batch)
    };
    let indices =
        |rows: Vec<crate::RecipientRow>| rows.iter().map(|row| row.row.index).collect::<Vec<_>>();
    assert_eq!(
        indices(rows_of(&*store, opened.clone()).await?),
        [3, 1_600, 2_199]
    );
    let late = RecipientQuery {
        from_index: 1_601,
        ..opened.clone()
    };
    assert_eq!(indices(rows_of(&*store, late).await?), [2_199]);
    let unopened = RecipientQuery {
        opened: Some(false),
        ..query(batch)
    };
    assert_eq!(rows_of(&*store, unopened).await?.len(), 2_197);
    let of_x = RecipientQuery {
        domain: Some("x.example".into()),
        ..opened
    };
    assert_eq!(indices(rows_of(&*store, of_x).await?), [3]);
    let of_y = RecipientQuery {
        domain: Some("y.example".into()),
        ..query(batch)
    };
    assert_eq!(rows_of(&*store, of_y).await?.len(), 700);
    let clicked = RecipientQuery {
        clicked: Some(true),
        ..query(batch)
    };
    assert_eq!(rows_of(&*store, clicked).await?, []);
    assert_eq!(rows_of(&*store, query(id(9))).await?, []);
    Ok(())
}

/// One message: its attempts and hits in order, and where it stands.
pub async fn a_message_tells_its_story(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let mut spec = Spec::new(1, people(5, "x.example"));
    spec.mixed = true;
    let batch = spec.submit(&*store, T0).await?;
    let message = MessageId { batch, index: 3 };
    let fresh = store.message(message).await?.expect("a story");
    assert_eq!(
        (fresh.recipient.status, fresh.attempts.len()),
        (Status::Queued, 0)
    );
    assert_eq!(fresh.recipient.accepted_at, T0);
    let leased = node.lease(&*store, T0, crate::MIXED, 5).await?;
    node.report(&*store, outcomes(&leased, later(T0 + secs(60)), T0), T0)
        .await?;
    let again = node.lease(&*store, T0 + secs(60), "x.example", 5).await?;
    let done = T0 + secs(70);
    node.report(
        &*store,
        outcomes(&again, AttemptResult::Delivered, done),
        done,
    )
    .await?;
    let opens =
        [done + secs(9), done + secs(5)].map(|at| hit(batch, 3, HitKind::Open, Actor::Human, at));
    node.report(&*store, opens.into(), done).await?;
    let story = store.message(message).await?.expect("a story");
    assert_eq!(story.batch.id, batch);
    let row = &story.recipient;
    assert_eq!(
        (row.status, row.attempts, row.next_attempt_at),
        (Status::Delivered, 2, None)
    );
    assert_eq!(
        (row.delivered_at, row.opened_at),
        (Some(done), Some(done + secs(5)))
    );
    assert_eq!(
        (row.smtp_code, row.host.as_deref()),
        (Some(250), Some("mx.x.example (192.0.2.1)"))
    );
    assert_eq!(
        story
            .attempts
            .iter()
            .map(|attempt| (attempt.number, attempt.at))
            .collect::<Vec<_>>(),
        [(1, T0), (2, done)]
    );
    assert_eq!(
        story
            .hits
            .iter()
            .map(|kept| kept.hit.at)
            .collect::<Vec<_>>(),
        [done + secs(5), done + secs(9)]
    );
    assert_eq!(all_rows(&*store, batch).await?[3], story.recipient);
    assert_eq!(
        store
            .message(MessageId {
                batch: id(9),
                index: 0
            })
            .await?,
        None
    );
    Ok(())
}

/// An address is found without its case, in its account alone, newest message first.
pub async fn an_address_is_found_in_its_account(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut emails_in = people(600, "x.example");
    emails_in.push("Jo.Do@X.example".into());
    for (number, account, mixed) in [(1, "acme", false), (2, "other", false), (3, "acme", true)] {
        let mut spec = Spec::new(number, emails_in.clone());
        spec.head.account = account.into();
        spec.mixed = mixed;
        spec.submit(&*store, T0).await?;
    }
    let story = store.address("acme", "jo.do@x.EXAMPLE").await?;
    let found: Vec<_> = story
        .messages
        .iter()
        .map(|(head, row)| (head.id, row.row.index))
        .collect();
    assert_eq!(found, [(id(3), 600), (id(1), 600)]);
    assert_eq!(story.messages[0].1.row.email.as_str(), "Jo.Do@x.example");
    assert_eq!(
        store.address("acme", "nobody@x.example").await?.messages,
        []
    );
    assert_eq!(store.address("acme", "").await?.messages, []);
    Ok(())
}

/// Suppressions of an account in order of address and list.
pub async fn suppressions_are_paged_by_address(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let entry = |email: String, list: Option<&str>| Suppression {
        email,
        account: "acme".into(),
        list: list.map(str::to_owned),
        reason: SuppressionReason::Manual,
        source: "api".into(),
        created_at: T0,
    };
    let mut all: Vec<_> = (0..25)
        .map(|n| entry(format!("n{n:02}@x.example"), None))
        .collect();
    all.insert(7, entry("n06@x.example".into(), Some("news")));
    let mut shuffled = all.clone();
    shuffled.reverse();
    store.suppress(shuffled, T0).await?;
    store
        .suppress(
            vec![Suppression {
                account: "other".into(),
                ..all[0].clone()
            }],
            T0,
        )
        .await?;
    let mut query = SuppressionQuery {
        account: "acme".into(),
        limit: 7,
        ..SuppressionQuery::default()
    };
    let mut found = Vec::new();
    loop {
        let page = store.suppressions(query.clone()).await?;
        found.extend(page.items);
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    assert_eq!(found, all);
    let one = SuppressionQuery {
        account: "acme".into(),
        email: Some("n06@x.example".into()),
        ..query
    };
    assert_eq!(store.suppressions(one).await?.items, all[6..8]);
    // The same again replaces.
    store
        .suppress(
            vec![Suppression {
                source: "import".into(),
                ..all[0].clone()
            }],
            T0,
        )
        .await?;
    let first = SuppressionQuery {
        account: "acme".into(),
        limit: 2,
        ..SuppressionQuery::default()
    };
    assert_eq!(store.suppressions(first).await?.items[0].source, "import");
    Ok(())
}

/// Batches, newest first, by account, state and campaign, in pages.
pub async fn batches_are_listed_newest_first(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    for number in 1..=7_u32 {
        let mut spec = Spec::new(u128::from(number), people(1, "x.example"));
        spec.head.account = if number % 2 == 0 {
            "even".into()
        } else {
            "odd".into()
        };
        spec.head.campaign = (number > 4).then(|| "late".into());
        if number == 3 {
            spec.head.release_at = T0 + secs(60);
        }
        spec.submit(&*store, T0).await?;
    }
    let list = async |query: BatchQuery| -> Result<Vec<BatchId>> {
        let (mut found, mut query) = (Vec::new(), query);
        loop {
            let page = store.batches(query.clone()).await?;
            found.extend(page.items.iter().map(|batch| batch.head.id));
            match page.next {
                Some(next) => query.after = next.parse().ok(),
                None => return Ok(found),
            }
        }
    };
    let base = BatchQuery {
        limit: 2,
        ..BatchQuery::default()
    };
    assert_eq!(list(base.clone()).await?, [7, 6, 5, 4, 3, 2, 1].map(id));
    let even = BatchQuery {
        account: Some("even".into()),
        ..base.clone()
    };
    assert_eq!(list(even).await?, [6, 4, 2].map(id));
    let late = BatchQuery {
        campaign: Some("late".into()),
        account: Some("odd".into()),
        ..base.clone()
    };
    assert_eq!(list(late).await?, [7, 5].map(id));
    let waiting = BatchQuery {
        state: Some(BatchState::Scheduled),
        ..base
    };
    assert_eq!(list(waiting).await?, [id(3)]);
    Ok(())
}

/// Recipients by state over all batches, and how long the oldest has been due.
pub async fn totals_and_the_oldest_due(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    assert_eq!(store.totals(T0).await?, crate::Totals::default());
    let mut waiting = Spec::new(1, people(3, "x.example"));
    waiting.head.release_at = T0 + secs(600);
    waiting.submit(&*store, T0).await?;
    Spec::new(2, people(5, "y.example"))
        .submit(&*store, T0 + secs(1))
        .await?;
    let totals = store.totals(T0 + secs(2)).await?;
    assert_eq!(
        (totals.scheduled, totals.queued, totals.temporary_error),
        (3, 5, 0)
    );
    assert_eq!(totals.oldest_due, Some(T0));
    let leased = node.lease(&*store, T0 + secs(2), "y.example", 5).await?;
    let mut facts = outcomes(&leased, AttemptResult::Delivered, T0);
    facts.truncate(4);
    node.report(&*store, facts, T0).await?;
    let last = leased
        .iter()
        .flat_map(|range| &range.items)
        .last()
        .expect("five items");
    node.report(
        &*store,
        vec![outcome(id(2), last, later(T0 + secs(60)), T0)],
        T0,
    )
    .await?;
    for range in &leased {
        node.finish(&*store, range.range, T0 + secs(2)).await?;
    }
    let totals = store.totals(T0 + secs(2)).await?;
    assert_eq!(
        (totals.scheduled, totals.queued, totals.temporary_error),
        (3, 0, 1)
    );
    assert_eq!(totals.oldest_due, None);
    let due = Timestamp::from_millis(T0.millis() + 60_000);
    assert_eq!(store.totals(T0 + secs(90)).await?.oldest_due, Some(due));
    store.check().await
}

/// Whoever sets it first is right for everyone.
pub async fn a_setting_has_one_first_writer(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let elsewhere = fixture.another().await;
    assert_eq!(store.setting("key", "one").await?, "one");
    assert_eq!(elsewhere.setting("key", "two").await?, "one");
    assert_eq!(elsewhere.setting("other", "two").await?, "two");
    drop(store);
    assert_eq!(fixture.mta().await.setting("key", "three").await?, "one");
    elsewhere.check().await
}

/// What is unfinished is told by queue and by batch: due, waiting for its time, or held and by whom.
pub async fn unfinished_work_says_who_holds_it(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let mut node = Node::new(1);
    let mut spec = Spec::new(1, people(9, "x.example"));
    spec.emails.extend(people(4, "y.example"));
    spec.submit(&*store, T0).await?;
    let mut scheduled = Spec::new(2, people(3, "x.example"));
    scheduled.head.release_at = T0 + secs(600);
    scheduled.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 5).await?;
    let first = leased.iter().flat_map(|range| &range.items).next();
    let retry_at = T0 + secs(120);
    let fact = outcome(id(1), first.expect("five items"), later(retry_at), T0);
    node.report(&*store, vec![fact], T0).await?;

    let of_batch = crate::WorkScope::Batch(id(1));
    let Some(work) = store.work(of_batch, T0 + secs(1), 10).await? else {
        // It cannot tell, and says so.
        return Ok(());
    };
    let queues: Vec<&str> = work.iter().map(|work| &*work.queue).collect();
    assert_eq!(queues, ["x.example", "y.example"], "the most first");
    let x = &work[0];
    let held: u64 = x.held.iter().map(|held| held.recipients).sum();
    // The reported one counts in its range until that is handed back, and in its retry lot.
    assert_eq!((x.due, x.later, held), (4, 1, 5));
    assert!(x.next_due.is_some_and(|due| due >= retry_at));
    assert!(x.held.iter().all(|held| held.node == node.journal));
    assert_eq!(x.held[0].until, T0 + TTL);
    assert_eq!((work[1].due, work[1].later), (4, 0));
    assert_eq!((&work[1].held, work[1].next_due), (&Vec::new(), None));

    let of_queue = crate::WorkScope::Queue("x.example".into());
    let work = store.work(of_queue, T0 + TTL + secs(1), 10).await?;
    let work = work.expect("it could tell a moment ago");
    let found: Vec<_> = work.iter().map(|work| (work.batch, work.state)).collect();
    let expected = [
        (id(1), BatchState::InProgress),
        (id(2), BatchState::Scheduled),
    ];
    assert_eq!(found, expected);
    assert_eq!(work[1].release_at, T0 + secs(600));
    assert_eq!(work[0].held, Vec::new(), "the lease ran out");
    assert_eq!(work[0].due, 9);
    Ok(())
}
