//! Rules of consent: the most that a person lets be kept.

use super::Fixture;
use super::support::*;
use crate::{Consent, Erase, EventQuery, Result};
use model::{Actor, EventKind, Fact, HitKind, MessageId, Timestamp, TrackingMode};

/// What a person lets be kept holds for mail that was sent before, in this account and until it is
/// lifted, whatever batch and recipient said; whoever wants to leave may leave.
pub async fn what_a_person_lets_be_kept_binds_mail_already_sent(
    fixture: &dyn Fixture,
) -> Result<()> {
    let store = fixture.mta().await;
    let mut tracker = Node::new(1);
    let names = ["off", "counted", "Dated", "all", "strict"];
    let emails: Vec<String> = names
        .iter()
        .map(|name| format!("{name}@x.example"))
        .collect();
    let mut spec = Spec::new(1, emails.clone());
    spec.modes = [(4, TrackingMode::Off)].into();
    let batch = spec.submit(&*store, T0).await?;
    let mut other = Spec::new(2, emails.clone());
    other.head.account = "other".into();
    let other = other.submit(&*store, T0).await?;
    assert_eq!(store.consent("acme", "off@x.example").await?, None);
    let modes = [
        TrackingMode::Off,
        TrackingMode::Aggregate,
        TrackingMode::LastDate,
        TrackingMode::Individual,
        TrackingMode::Individual,
    ];
    for (email, mode) in emails.iter().zip(modes) {
        let email = email.to_lowercase();
        let before = store.set_consent("acme", &email, Some(mode), T0).await?;
        assert!(!before, "{email}");
        let noted = Some(Consent { mode, since: T0 });
        assert_eq!(store.consent("acme", &email).await?, noted);
    }
    let clicks = |batch| {
        (0..5).map(move |index| hit(batch, index, HitKind::Click, Actor::Human, T0 + secs(5)))
    };
    let mut facts: Vec<Fact> = clicks(batch).chain(clicks(other)).collect();
    facts.push(hit(batch, 0, HitKind::Unsubscribe, Actor::Human, T0));
    let shipped = tracker.report(&*store, facts, T0).await?;
    assert_eq!(shipped.unknown, 0);
    let counters = checked(&*store, batch).await?.counters;
    assert_eq!((counters.clicked_total, counters.unsubscribed), (3, 1));
    assert_eq!(checked(&*store, other).await?.counters.clicked_total, 5);
    let rows = all_rows(&*store, batch).await?;
    let day = Timestamp::from_millis(T0.millis() / 86_400_000 * 86_400_000);
    let clicked: Vec<_> = rows.iter().map(|row| row.clicked_at).collect();
    let at = T0 + secs(5);
    assert_eq!(clicked, [None, None, Some(day), Some(at), None]);
    let clicks = EventQuery {
        batch: Some(batch),
        limit: 100,
        ..EventQuery::default()
    };
    let told = events_of(&*store, clicks).await?;
    let told: Vec<_> = told
        .iter()
        .filter(|event| event.kind == EventKind::EmailClicked)
        .filter_map(|event| event.message_id)
        .collect();
    assert_eq!(told, [MessageId { batch, index: 3 }]);
    // Narrowed and lifted again.
    let (dated, all) = ("dated@x.example", "all@x.example");
    let off = Some(TrackingMode::Off);
    assert!(store.set_consent("acme", all, off, T0 + secs(9)).await?);
    assert!(store.set_consent("acme", dated, None, T0 + secs(9)).await?);
    assert!(!store.set_consent("acme", dated, None, T0 + secs(9)).await?);
    assert_eq!(store.consent("acme", dated).await?, None);
    let open = |index| hit(batch, index, HitKind::Open, Actor::Human, at);
    tracker.report(&*store, vec![open(2), open(3)], T0).await?;
    let opened: Vec<_> = all_rows(&*store, batch).await?;
    let opened: Vec<_> = opened.iter().map(|row| row.opened_at).collect();
    assert_eq!(opened, [None, None, Some(at), None, None]);
    Ok(())
}

/// What a person lets be kept is what their mail is made with, and outlives their erasure.
pub async fn what_a_person_lets_be_kept_binds_mail_to_come(fixture: &dyn Fixture) -> Result<()> {
    let store = fixture.mta().await;
    let node = Node::new(1);
    for (at, mode) in [(0, TrackingMode::Aggregate), (1, TrackingMode::LastDate)] {
        let email = format!("n{at}@x.example");
        store.set_consent("acme", &email, Some(mode), T0).await?;
    }
    let mut spec = Spec::new(1, people(4, "x.example"));
    spec.modes = [(1, TrackingMode::Off), (2, TrackingMode::LastDate)].into();
    spec.submit(&*store, T0).await?;
    let leased = node.lease(&*store, T0, "x.example", 4).await?;
    let items = leased.iter().flat_map(|range| &range.items);
    let mut modes: Vec<_> = items
        .map(|item| (item.row.index, item.row.tracking))
        .collect();
    modes.sort_unstable_by_key(|(index, _)| *index);
    let expected = [
        Some(TrackingMode::Aggregate),
        Some(TrackingMode::Off),
        Some(TrackingMode::LastDate),
        None,
    ];
    assert_eq!(modes, (0..).zip(expected).collect::<Vec<_>>());

    let mut erase = Erase {
        account: "acme".into(),
        email: "n0@x.example".into(),
        after: None,
    };
    loop {
        erase.after = store.erase(erase.clone(), T0).await?.next;
        if erase.after.is_none() {
            break;
        }
    }
    let kept = store.consent("acme", "n0@x.example").await?;
    assert_eq!(kept.map(|of| of.mode), Some(TrackingMode::Aggregate));
    Ok(())
}
