//! The table of judgements: facts in, the binding constraint and when it ends out.

use std::sync::Arc;
use std::time::Duration;

use model::{BatchState, Blame, Class, JournalId, Status, SuppressionReason, Timestamp};
use proptest::prelude::*;
use store::Held;

use super::facts::*;
use super::judge::{of_batch, of_domain, of_message, rate_text};
use super::troubles::Noted;
use super::*;
use crate::queue::fixtures::policy;
use crate::queue::snapshot::{
    BatchView, Block, Blocked, ContentView, DestinationView, ProcessView, Share, SourceView,
    Whereabouts,
};

const NOW: Timestamp = Timestamp::from_millis(1_000_000_000);

fn at(seconds: u64) -> Timestamp {
    NOW + Duration::from_secs(seconds)
}

fn node() -> NodeFacts {
    NodeFacts {
        now: NOW,
        process: Some(ProcessView::default()),
        journal_full: false,
        store_away: None,
    }
}

fn limit<T: Copy>(value: T) -> Limit<T> {
    Limit {
        in_force: value,
        base: value,
        reason: None,
        until: None,
        line: None,
    }
}

fn destination() -> DestinationFacts {
    DestinationFacts {
        name: "x.example".into(),
        configured: Source::File {
            file: "shaping.toml".into(),
            line: Some(12),
            section: "[default]".into(),
        },
        limits: vec![SourceLimits {
            source: "default".into(),
            rate: limit(5.0),
            connections: limit(2),
            messages_per_connection: limit(50),
            blocked_until: None,
        }],
        view: None,
        suspension: None,
        trouble: None,
        dns: None,
    }
}

/// Two connections at work, one permit free.
fn busy() -> DestinationView {
    DestinationView {
        policy: Arc::new(policy()),
        domains: vec![("x.example".into(), 40)],
        domain_count: 1,
        waiting: 40,
        blocked: Blocked::default(),
        in_flight: 2,
        held_until: None,
        failures: 0,
        starved: false,
        pace: 4.9,
        sources: vec![source()],
        limits: Vec::new(),
        share: None,
    }
}

fn source() -> SourceView {
    SourceView {
        source: 0,
        ready: 2,
        opening: 0,
        full: 0,
        in_flight: 2,
        next_permit_at: NOW,
        open_after: None,
    }
}

fn with(change: impl FnOnce(&mut DestinationFacts, &mut DestinationView)) -> DestinationFacts {
    let (mut facts, mut view) = (destination(), busy());
    change(&mut facts, &mut view);
    facts.view = Some(view);
    facts
}

fn trouble() -> Noted {
    Noted {
        at: NOW,
        class: Some(Class::ConnectFailure),
        blame: Some(Blame::Destination),
        reply: "refused for <a@x.example>".into(),
        host: "mx (192.0.2.1)".into(),
        rule: None,
    }
}

fn held() -> Held {
    Held {
        node: JournalId::from_bytes([7; 16]),
        recipients: 30,
        until: at(40),
    }
}

fn message() -> MessageFacts {
    MessageFacts {
        id: "B.0".into(),
        status: Status::Queued,
        next_attempt_at: None,
        shut_until: None,
        expires_at: at(86_400),
        last: None,
        suppressed_for: None,
        delivered_at: None,
        batch_state: BatchState::InProgress,
        release_at: NOW,
        batch_view: None,
        place: Whereabouts::Absent,
        destination: destination(),
        stock: Stock::default(),
        held_back: None,
    }
}

fn last(class: Class) -> LastAttempt {
    LastAttempt {
        number: 2,
        at: NOW,
        ambiguous: false,
        class: Some(class),
        blame: Some(Blame::Destination),
        reply: "451 4.7.1 later".into(),
        host: "mx (192.0.2.1)".into(),
        rule: Some("r1".into()),
    }
}

/// A message after this change, and what is said of it: state, kind, when it moves.
fn judged(change: impl FnOnce(&mut MessageFacts)) -> (State, Option<Kind>, Option<Timestamp>) {
    let mut facts = message();
    change(&mut facts);
    told(&of_message(&facts, &node()))
}

fn told(explanation: &Explanation) -> (State, Option<Kind>, Option<Timestamp>) {
    let constraint = explanation.constraint.as_ref();
    assert_eq!(explanation.chain.first(), constraint);
    (
        explanation.state,
        constraint.map(|of| of.kind),
        explanation.next_at,
    )
}

fn waits(ahead: usize, blocked: Option<Block>) -> Whereabouts {
    Whereabouts::Waiting { ahead, blocked }
}

#[test]
fn a_final_status_is_the_end_of_the_story() {
    for (status, class, kind) in [
        (Status::Delivered, None, Kind::Delivered),
        (Status::Bounce, Some(Class::InvalidMailbox), Kind::Bounce),
        (Status::Failed, Some(Class::Expired), Kind::Expired),
        (Status::Failed, Some(Class::NoMx), Kind::Failed),
        (Status::Suppressed, None, Kind::Suppressed),
        (Status::Cancelled, None, Kind::Cancelled),
    ] {
        let found = judged(|of| {
            of.status = status;
            of.last = class.map(last);
            // Whatever else holds has no meaning for it.
            of.batch_state = BatchState::Paused;
        });
        assert_eq!(
            found,
            (State::Finished, Some(kind), None),
            "{status} {class:?}"
        );
    }
    let mut facts = message();
    (facts.status, facts.suppressed_for) = (Status::Suppressed, Some(SuppressionReason::Complaint));
    let explanation = of_message(&facts, &node());
    let detail = explanation.constraint.expect("it ended").detail;
    assert!(detail.contains("complaint"), "{detail}");
}

#[test]
fn what_the_batch_is_holds_its_messages() {
    for (state, kind, next) in [
        (BatchState::Open, Kind::Held, None),
        (BatchState::Paused, Kind::Paused, None),
        (BatchState::Scheduled, Kind::Scheduled, Some(at(600))),
    ] {
        let found = judged(|of| (of.batch_state, of.release_at) = (state, at(600)));
        assert_eq!(found, (State::Waiting, Some(kind), next), "{state}");
    }
}

#[test]
fn what_a_test_holds_back_says_when_it_is_decided() {
    for (held_back, next, says) in [
        (HeldBack::Test(at(300)), Some(at(300)), "A/B test"),
        (HeldBack::Variant(at(200)), Some(at(200)), "variant"),
        (HeldBack::Person, None, "by hand"),
    ] {
        let mut facts = message();
        facts.held_back = Some(held_back);
        let found = of_message(&facts, &node());
        let bound = found.constraint.expect("it waits");
        assert_eq!((bound.kind, bound.until), (Kind::Scheduled, next));
        assert!(bound.detail.contains(says), "{}", bound.detail);
        let mut facts = batch(BatchState::InProgress, Vec::new());
        facts.held_back = Some(held_back);
        assert_eq!(of_batch(&facts, &node()).constraint, Some(bound));
    }
}

#[test]
fn the_last_attempt_says_what_is_waited_for() {
    for (class, ambiguous, kind) in [
        (Class::Greylisted, false, Kind::Greylisted),
        (Class::DnsFailure, false, Kind::Dns),
        (Class::RateLimited, false, Kind::RetryWait),
        (Class::ConnectFailure, true, Kind::Ambiguous),
    ] {
        let found = judged(|of| {
            (of.status, of.next_attempt_at) = (Status::TemporaryError, Some(at(300)));
            of.last = Some(LastAttempt {
                ambiguous,
                ..last(class)
            });
        });
        assert_eq!(
            found,
            (State::Waiting, Some(kind), Some(at(300))),
            "{class}"
        );
    }
    let mut facts = message();
    (facts.status, facts.next_attempt_at) = (Status::TemporaryError, Some(at(300)));
    facts.last = Some(last(Class::Greylisted));
    let explanation = of_message(&facts, &node());
    let Some(Source::Peer { reply, rule, .. }) = explanation.constraint.and_then(|of| of.source)
    else {
        panic!("the reply is the source");
    };
    assert_eq!(
        (reply.as_deref(), rule.as_deref()),
        (Some("451 4.7.1 later"), Some("r1"))
    );
    assert_eq!(explanation.eta, Some(at(300) + Duration::from_millis(200)));
}

#[test]
fn where_a_message_is_says_what_holds_it() {
    let rate = with(|_, view| view.sources[0].next_permit_at = at(3));
    let full = with(|_, view| view.sources[0].full = 2);
    let table = [
        (
            Whereabouts::InFlight,
            destination(),
            State::Moving,
            Some(Kind::InFlight),
            None,
        ),
        (
            waits(3, None),
            rate,
            State::Moving,
            Some(Kind::Rate),
            Some(at(3)),
        ),
        (
            waits(3, None),
            full,
            State::Moving,
            Some(Kind::Connections),
            None,
        ),
        (
            waits(3, Some(Block::Window)),
            with(|of, _| of.limits[0].rate = limit(f64::INFINITY)),
            State::Moving,
            Some(Kind::Window),
            None,
        ),
        (
            waits(3, Some(Block::Route)),
            destination(),
            State::Waiting,
            Some(Kind::Resolving),
            None,
        ),
        (
            waits(3, Some(Block::Lease)),
            with(|_, _| ()),
            State::Waiting,
            Some(Kind::Lease),
            None,
        ),
        (
            Whereabouts::Absent,
            destination(),
            State::Unknown,
            None,
            None,
        ),
    ];
    for (place, destination, state, kind, next) in table {
        let found = judged(|of| (of.place, of.destination) = (place, destination));
        assert_eq!(found, (state, kind, next), "{place:?}");
    }
    for (content, kind) in [
        (ContentView::Loading, Kind::Content),
        (ContentView::Failed(at(1)), Kind::Content),
    ] {
        let view = BatchView {
            waiting: 1,
            in_flight: 0,
            content,
        };
        let found = judged(|of| {
            of.place = waits(0, Some(Block::Content));
            of.batch_view = Some(view);
        });
        assert_eq!((found.0, found.1), (State::Waiting, Some(kind)));
    }
}

#[test]
fn others_that_wait_for_the_same_destination_hold_a_batch() {
    let among = |batches, behind_urgent| {
        let share = Share {
            batches,
            accounts: 2,
            part: 0.25,
            behind_urgent,
        };
        with(|_, view| {
            view.sources[0].next_permit_at = at(3);
            view.share = Some(share);
        })
    };
    let stock = || Stock {
        due: 10,
        ..Stock::default()
    };
    let told_of = |destination| {
        let facts = batch(BatchState::InProgress, vec![(destination, stock())]);
        of_batch(&facts, &node())
    };
    let shared = told_of(among(4, false));
    let binding = (State::Moving, Some(Kind::Shared), Some(at(3)));
    assert_eq!(told(&shared), binding);
    let parts = shared.destinations.iter();
    let kinds: Vec<_> = parts
        .map(|of| of.constraint.as_ref().map(|of| of.kind))
        .collect();
    assert_eq!(kinds, [Some(Kind::Shared)]);
    let detail = shared.constraint.map(|of| of.detail).unwrap_or_default();
    assert!(
        detail.contains("3 other batches") && detail.contains("25 %"),
        "{detail}"
    );
    // 5/s, of which a quarter is its own.
    assert_eq!(shared.eta, Some(at(3 + 8)));
    let basis = shared.eta_basis.unwrap_or_default();
    assert!(basis.contains("25 %"), "{basis}");
    let found = judged(|of| (of.place, of.destination) = (waits(3, None), among(2, false)));
    assert_eq!(found, binding);
    assert_eq!(
        told(&told_of(among(1, true))),
        binding,
        "what is transactional"
    );
    let alone = told(&told_of(among(1, false)));
    assert_eq!(alone, (State::Moving, Some(Kind::Rate), Some(at(3))));
}

#[test]
fn a_message_that_is_due_elsewhere_says_where() {
    let elsewhere = Stock {
        elsewhere: vec![held()],
        ..Stock::default()
    };
    let found = judged(|of| of.stock = elsewhere.clone());
    assert_eq!(
        found,
        (State::Waiting, Some(Kind::LeasedElsewhere), Some(at(40)))
    );
    // Many are due here, and half a minute of them is leased.
    let mut facts = message();
    facts.destination = with(|_, _| ());
    facts.stock = Stock {
        due: 1_000,
        ..Stock::default()
    };
    let explanation = of_message(&facts, &node());
    assert_eq!(told(&explanation), (State::Moving, Some(Kind::Turn), None));
    // 1,041 at five in a second.
    let eta = explanation.eta.expect("an ETA").since(NOW).as_secs();
    assert_eq!(eta, 208);
}

#[test]
fn the_hand_of_an_operator_and_the_word_of_the_peer_hold_a_destination() {
    let suspended = |until| Suspended {
        by: "ops".into(),
        reason: "complaints".into(),
        since: NOW,
        until,
    };
    let table: [(DestinationFacts, Kind, Option<Timestamp>); 7] = [
        (
            with(|of, _| of.suspension = Some(suspended(None))),
            Kind::Suspension,
            None,
        ),
        (
            with(|of, _| of.suspension = Some(suspended(Some(at(60))))),
            Kind::Suspension,
            Some(at(60)),
        ),
        (
            with(|of, _| of.limits[0].blocked_until = Some(at(90))),
            Kind::Block,
            Some(at(90)),
        ),
        (
            with(|of, view| (of.trouble, view.held_until) = (Some(trouble()), Some(at(30)))),
            Kind::Backoff,
            Some(at(30)),
        ),
        (
            with(|of, _| of.dns = Some("no answer".into())),
            Kind::Dns,
            None,
        ),
        (
            with(|of, view| {
                of.limits[0].rate.reason = Some("warm_up".to_owned());
                view.sources[0].next_permit_at = at(90);
            }),
            Kind::WarmUp,
            Some(at(90)),
        ),
        // What is over holds nothing.
        (
            with(|of, view| {
                of.suspension = Some(suspended(Some(NOW)));
                view.sources[0].next_permit_at = at(2);
            }),
            Kind::Rate,
            Some(at(2)),
        ),
    ];
    for (destination, kind, next) in table {
        let stock = Stock {
            due: 10,
            ..Stock::default()
        };
        let explanation = of_domain("x.example", &destination, &stock, &node());
        let (_, found, found_next) = told(&explanation);
        assert_eq!((found, found_next), (Some(kind), next));
        if !matches!(kind, Kind::Rate | Kind::WarmUp) {
            assert_eq!(explanation.state, State::Waiting, "{kind:?}");
        }
    }
}

#[test]
fn an_address_in_a_reply_about_a_destination_is_not_told() {
    let destination =
        with(|of, view| (of.trouble, view.held_until) = (Some(trouble()), Some(at(30))));
    let explanation = of_domain(
        "x.example",
        &destination,
        &Stock {
            due: 1,
            ..Stock::default()
        },
        &node(),
    );
    let shown = serde_json::to_string(&explanation).expect("JSON");
    assert!(shown.contains("refused for <***@x.example>"), "{shown}");
}

#[test]
fn what_ends_last_binds_and_the_rest_is_told_too() {
    let mut facts = message();
    facts.batch_state = BatchState::Paused;
    (facts.status, facts.next_attempt_at) = (Status::TemporaryError, Some(at(300)));
    facts.last = Some(last(Class::Greylisted));
    facts.destination = with(|_, view| view.held_until = Some(at(600)));
    let explanation = of_message(&facts, &node());
    let kinds: Vec<_> = explanation.chain.iter().map(|of| of.kind).collect();
    assert_eq!(kinds, [Kind::Paused, Kind::Backoff, Kind::Greylisted]);
    assert_eq!((explanation.next_at, explanation.eta), (None, None));
    facts.batch_state = BatchState::InProgress;
    let (_, kind, next) = told(&of_message(&facts, &node()));
    assert_eq!((kind, next), (Some(Kind::Backoff), Some(at(600))));
}

#[test]
fn a_message_that_cannot_move_in_its_time_is_given_up() {
    let mut facts = message();
    (facts.status, facts.next_attempt_at) = (Status::TemporaryError, Some(at(300)));
    facts.last = Some(last(Class::Greylisted));
    facts.expires_at = at(200);
    let explanation = of_message(&facts, &node());
    assert_eq!(explanation.next_at, Some(at(200)));
    let last = explanation.chain.last().expect("a chain");
    assert_eq!((last.kind, last.until), (Kind::Expired, Some(at(200))));
    assert!(last.detail.contains("100s"), "{}", last.detail);
}

#[test]
fn the_node_itself_can_hold_everything() {
    let stock = Stock {
        due: 10,
        ..Stock::default()
    };
    let process = |change: fn(&mut ProcessView)| {
        let mut process = ProcessView::default();
        change(&mut process);
        Some(process)
    };
    let table = [
        (
            NodeFacts {
                store_away: Some("gone".into()),
                ..node()
            },
            Kind::StoreAway,
        ),
        (
            NodeFacts {
                journal_full: true,
                ..node()
            },
            Kind::JournalFull,
        ),
        (
            NodeFacts {
                process: process(|of| of.paused_until = Some(at(1))),
                ..node()
            },
            Kind::JournalFull,
        ),
        (
            NodeFacts {
                process: process(|of| of.draining = true),
                ..node()
            },
            Kind::Draining,
        ),
    ];
    for (node, kind) in table {
        let explanation = of_domain("x.example", &destination(), &stock, &node);
        assert_eq!(told(&explanation), (State::Waiting, Some(kind), None));
    }
    let silent = NodeFacts {
        process: None,
        ..node()
    };
    let explanation = of_domain("x.example", &destination(), &stock, &silent);
    assert_eq!(explanation.unknown.len(), 1);
}

#[test]
fn a_domain_without_mail_is_idle_and_one_with_mail_has_an_eta() {
    let explanation = of_domain("x.example", &destination(), &Stock::default(), &node());
    assert_eq!(
        (explanation.state, explanation.constraint),
        (State::Idle, None)
    );
    let stock = Stock {
        due: 100,
        leased: 40,
        in_flight: 2,
        ..Stock::default()
    };
    let explanation = of_domain("x.example", &with(|_, _| ()), &stock, &node());
    assert_eq!(told(&explanation), (State::Moving, Some(Kind::Rate), None));
    assert_eq!(
        explanation.eta.map(|eta| eta.since(NOW).as_millis()),
        Some(28_400)
    );
    assert_eq!(
        explanation.eta_basis.as_deref(),
        Some("the rate in force, 5/s")
    );
    // Twice as slow as its limit says: then that is the pace.
    let slow = with(|_, view| view.pace = 2.0);
    let explanation = of_domain("x.example", &slow, &stock, &node());
    assert_eq!(
        explanation.eta.map(|eta| eta.since(NOW).as_secs()),
        Some(71)
    );
    // Without a limit only the pace tells, and before there is one nothing does.
    let free = with(|of, view| (of.limits[0].rate, view.pace) = (limit(f64::INFINITY), 0.0));
    assert_eq!(of_domain("x.example", &free, &stock, &node()).eta, None);
}

#[test]
fn a_send_window_says_when_it_opens() {
    let mut facts = message();
    facts.shut_until = Some(at(3_600));
    let explanation = of_message(&facts, &node());
    assert_eq!(
        told(&explanation),
        (State::Waiting, Some(Kind::SendWindow), Some(at(3_600)))
    );
    let detail = explanation.constraint.expect("a constraint").detail;
    assert!(detail.contains(&at(3_600).to_string()), "{detail}");
    facts.shut_until = Some(NOW);
    let explanation = of_message(&facts, &node());
    assert_ne!(told(&explanation).1, Some(Kind::SendWindow));
    let stock = Stock {
        later: 5,
        next_due: Some(at(120)),
        has_window: true,
        ..Stock::default()
    };
    let explanation = of_domain("x.example", &destination(), &stock, &node());
    assert_eq!(
        told(&explanation),
        (State::Waiting, Some(Kind::SendWindow), Some(at(120)))
    );
}

#[test]
fn what_is_put_off_or_stopped_is_told_when_nothing_else_is_there() {
    let put_off = Stock {
        later: 5,
        next_due: Some(at(120)),
        ..Stock::default()
    };
    let explanation = of_domain("x.example", &destination(), &put_off, &node());
    assert_eq!(
        told(&explanation),
        (State::Waiting, Some(Kind::RetryWait), Some(at(120)))
    );
    assert_eq!(explanation.eta, Some(at(121)));
    let paused = Stock {
        stopped: 5,
        stopped_by: Some((BatchState::Paused, NOW)),
        ..Stock::default()
    };
    let explanation = of_domain("x.example", &destination(), &paused, &node());
    assert_eq!(
        told(&explanation),
        (State::Waiting, Some(Kind::Paused), None)
    );
    let elsewhere = Stock {
        elsewhere: vec![held()],
        ..Stock::default()
    };
    let explanation = of_domain("x.example", &destination(), &elsewhere, &node());
    assert_eq!(
        told(&explanation),
        (State::Waiting, Some(Kind::LeasedElsewhere), Some(at(40)))
    );
}

fn batch(state: BatchState, parts: Vec<(DestinationFacts, Stock)>) -> BatchFacts {
    BatchFacts {
        id: "B".into(),
        state,
        release_at: at(600),
        completed_at: None,
        view: None,
        parts,
        mixed: Stock::default(),
        held_back: None,
    }
}

#[test]
fn a_batch_waits_for_its_slowest_destination() {
    let fast = (
        with(|of, _| of.name = "fast".into()),
        Stock {
            due: 10,
            ..Stock::default()
        },
    );
    let slow = (
        with(|of, view| {
            of.name = "slow".into();
            of.limits[0].rate = limit(0.1);
            view.sources[0].next_permit_at = at(7);
        }),
        Stock {
            due: 100,
            ..Stock::default()
        },
    );
    let facts = batch(BatchState::InProgress, vec![fast, slow]);
    let explanation = of_batch(&facts, &node());
    assert_eq!(
        (
            explanation.state,
            explanation.subject.destination.as_deref()
        ),
        (State::Moving, Some("slow"))
    );
    assert_eq!(
        explanation.constraint.as_ref().map(|of| of.kind),
        Some(Kind::Rate)
    );
    assert_eq!(explanation.eta, Some(at(1_007)));
    assert_eq!(explanation.destinations.len(), 2);
    assert_eq!(explanation.recipients.map(|of| of.due), Some(110));
}

#[test]
fn the_state_of_a_batch_goes_before_its_destinations() {
    let part = || {
        vec![(
            with(|_, _| ()),
            Stock {
                stopped: 10,
                ..Stock::default()
            },
        )]
    };
    for (state, expected, kind, next) in [
        (BatchState::Open, State::Waiting, Kind::Held, None),
        (BatchState::Paused, State::Waiting, Kind::Paused, None),
        (
            BatchState::Scheduled,
            State::Waiting,
            Kind::Scheduled,
            Some(at(600)),
        ),
        (
            BatchState::Completed,
            State::Finished,
            Kind::Completed,
            None,
        ),
        (
            BatchState::Cancelled,
            State::Finished,
            Kind::Cancelled,
            None,
        ),
    ] {
        let explanation = of_batch(&batch(state, part()), &node());
        assert_eq!(told(&explanation), (expected, Some(kind), next), "{state}");
    }
    let explanation = of_batch(&batch(BatchState::InProgress, Vec::new()), &node());
    assert_eq!(explanation.state, State::Unknown);
}

#[test]
fn rates_are_written_in_a_unit_that_people_read() {
    for (per_second, text) in [
        (f64::INFINITY, "unlimited"),
        (5.0, "5/s"),
        (4.5, "4.5/s"),
        (1.0, "1/s"),
        (0.1, "6/m"),
        (1.0 / 60.0, "1/m"),
        (0.0125, "45/h"),
        (0.0001, "8.6/d"),
    ] {
        assert_eq!(rate_text(per_second), text);
    }
}

proptest! {
    /// Whatever holds together: the first of the chain ends last, and nothing is promised that
    /// somebody has to do by hand.
    #[test]
    fn the_binding_constraint_ends_last(
        paused: bool, retry in proptest::option::of(1_u64..1_000), hold in proptest::option::of(1_u64..1_000),
        suspension in proptest::option::of(proptest::option::of(1_u64..1_000)), away: bool,
        permit in 0_u64..100, due in 0_u64..10_000, expires in 0_u64..2_000,
    ) {
        let mut facts = message();
        if paused {
            facts.batch_state = BatchState::Paused;
        }
        facts.next_attempt_at = retry.map(at);
        facts.last = retry.map(|_| last(Class::RateLimited));
        facts.stock.due = due;
        facts.expires_at = at(expires);
        facts.destination = with(|of, view| {
            view.held_until = hold.map(at);
            view.sources[0].next_permit_at = at(permit);
            of.suspension = suspension.map(|until| Suspended {
                by: "ops".into(), reason: String::new(), since: NOW, until: until.map(at),
            });
        });
        facts.place = waits(3, None);
        let node = NodeFacts { store_away: away.then(|| "gone".to_owned()), ..node() };
        let explanation = of_message(&facts, &node);
        let holding: Vec<_> = explanation.chain.iter().filter(|of| of.kind != Kind::Expired).collect();
        prop_assert!(holding.windows(2).all(|pair| pair[0].end >= pair[1].end));
        let last = holding.first().map(|of| of.end);
        if matches!(last, Some(End::ByHand | End::Sometime)) {
            prop_assert_eq!((explanation.next_at, explanation.eta), (None, None));
        }
        if let Some(next) = explanation.next_at {
            prop_assert!(next <= facts.expires_at.max(NOW) || next <= at(1_000));
        }
        if let (Some(next), Some(eta)) = (explanation.next_at, explanation.eta) {
            prop_assert!(eta >= next);
        }
    }
}
