//! Slow and dead destinations beside quiet ones, in the same batch.

use std::time::Duration;

use super::network::Zone;
use super::plan::{Manner, Place, Plan, Troubles};
use super::world::World;
use super::{in_a_thread, live_plan};

/// Quiet domains in an ordinary run, and with `HIKYAKU_TEST_FULL`.
const DOMAINS: usize = 100;
const DOMAINS_FULL: usize = 10_000;
/// Who wait for one host, likewise.
const GIANT: usize = 10_000;
const GIANT_FULL: usize = 1_000_000;

/// The number in this run.
fn of(ordinary: usize, full: usize) -> usize {
    match std::env::var_os("HIKYAKU_TEST_FULL") {
        Some(_) => full,
        None => ordinary,
    }
}

fn place(domain: String, manner: Manner, people: usize) -> Place {
    Place {
        domain,
        manner,
        zone: Zone::Good,
        is_limited: false,
        people,
    }
}

/// Mail for so many quiet domains, and for these.
fn plan(domains: usize, beside: &[Place]) -> Plan {
    let mut places: Vec<_> = (0..domains)
        .map(|number| {
            place(
                format!("quiet{number}.example"),
                Manner::Plain,
                1 + number % 3,
            )
        })
        .collect();
    places.extend_from_slice(beside);
    Plan {
        seed: 1,
        nodes: 1,
        batches: 1,
        places,
        troubles: Troubles::default(),
        trouble_for: Duration::ZERO,
    }
}

#[test]
fn quiet_destinations_are_not_held_up() {
    let domains = of(DOMAINS, DOMAINS_FULL);
    let slow = [
        place(
            "tarpit.example".to_owned(),
            Manner::Tarpit(Duration::from_secs(30)),
            100,
        ),
        place("mute.example".to_owned(), Manner::Mute, 100),
        place("cut.example".to_owned(), Manner::Cutting(100), 100),
    ];
    let done = |beside: &[Place]| {
        let summary = live_plan(plan(domains, beside));
        summary.unwrap_or_else(|why| panic!("{why}")).plain_done
    };
    let (alone, beside) = (done(&[]), done(&slow));
    println!("{domains} quiet domains are done after {alone:?} alone, {beside:?} beside slow ones");
    assert!(
        beside <= alone.mul_f64(1.05),
        "{beside:?} beside slow destinations, {alone:?} alone"
    );
}

#[test]
fn what_is_urgent_does_not_wait_behind_a_giant() {
    // 20 messages a second over three connections, ten on each, a second and a half apart.
    let giant = of(GIANT, GIANT_FULL);
    let plan = plan(
        0,
        &[place("giant.example".to_owned(), Manner::Plain, giant)],
    );
    let took = in_a_thread(plan.seed, move || World::urgent(plan, 20));
    let took = took.unwrap_or_else(|why| panic!("{why}"));
    println!("with {giant} before them: {took:?}");
    for one in took {
        assert!(one <= Duration::from_secs(1), "{one:?} behind {giant}");
    }
}
