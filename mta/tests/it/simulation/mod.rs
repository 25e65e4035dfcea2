//! Sending as a whole, in worlds made from seeds, in virtual time: `docs/simulation.md`.
//!
//! The real queue, limits, sessions, connections, composing, journal, shipping and embedded store
//! of one to three nodes, in one thread, against hosts, a network, a DNS, a disk and a clock that
//! are made up. At each step it is checked that nothing is sent that must not be, and at the end
//! that nobody is missing and nobody was written to twice without a cause.

mod chance;
mod isolation;
mod network;
mod node;
mod peers;
mod plan;
mod store;
mod watch;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once};

use tokio::runtime::Builder;

use plan::Plan;
use world::{Summary, World};

/// Worlds in an ordinary run, and with `HIKYAKU_TEST_FULL`.
const WORLDS: u64 = 6;
const WORLDS_FULL: u64 = 1_000;

/// Seeds that found something, each with what it was.
const REGRESSIONS: [(u64, &str); 0] = [];

/// Lets the world of a seed live.
fn live(seed: u64) -> Result<Summary, String> {
    live_plan(Plan::of(seed)).map_err(|why| {
        format!(
            "seed {seed}: {why}\n\nexactly this again:\n  HIKYAKU_SIMULATION_SEED={seed} \
             cargo nextest run -p mta --test it simulation::worlds_from_seeds\n"
        )
    })
}

/// Lets a world live, on a thread of its own: the keys of its hash maps, and with them the order of
/// everything, are those of a new thread.
fn live_plan(plan: Plan) -> Result<Summary, String> {
    // What a process makes once (patterns, tables) makes hash maps too: the first world is to be
    // as any other.
    static WARM: Once = Once::new();
    WARM.call_once(|| drop(run(Plan::small())));
    run(plan)
}

fn run(plan: Plan) -> Result<Summary, String> {
    let seed = plan.seed;
    let told = plan.clone();
    let thread = std::thread::Builder::new()
        .name(format!("world {seed}"))
        .spawn(move || {
            fastrand::seed(seed);
            let aside = Builder::new_current_thread()
                .enable_time()
                .max_blocking_threads(1)
                .build()
                .expect("a runtime");
            store::set_aside(aside.handle());
            let runtime = Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build();
            runtime.expect("a runtime").block_on(World::live(plan))
        });
    let lived = thread.expect("a thread").join();
    let lived = lived.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| "a panic".to_owned()))
    });
    lived.map_err(|why| format!("{why}\n{told:#?}"))
}

/// The seeds of this run: one by hand, else many.
fn seeds() -> (u64, u64) {
    if let Ok(seed) = std::env::var("HIKYAKU_SIMULATION_SEED") {
        let seed = seed.parse().expect("a number in HIKYAKU_SIMULATION_SEED");
        return (seed, seed + 1);
    }
    match std::env::var_os("HIKYAKU_TEST_FULL") {
        Some(_) => (0, WORLDS_FULL),
        None => (0, WORLDS),
    }
}

#[test]
fn worlds_from_seeds() {
    let (first, end) = seeds();
    let next = AtomicU64::new(first);
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new((0_u64, 0_usize, 0_usize));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || failures.lock().expect("sane").len() >= 3 {
                        return;
                    }
                    match live(seed) {
                        Ok(summary) => {
                            let mut totals = totals.lock().expect("sane");
                            totals.0 += summary.transactions;
                            totals.1 += summary.recipients;
                            totals.2 += summary.extra_copies;
                        }
                        Err(why) => failures.lock().expect("sane").push(why),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("sane");
    println!("{:?}", totals.into_inner().expect("sane"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn seeds_that_found_something_stay_well() {
    for (seed, what) in REGRESSIONS {
        live(seed).unwrap_or_else(|why| panic!("again: {what}\n{why}"));
    }
}

#[test]
fn a_world_is_the_same_each_time() {
    let lived = || live_plan(Plan::small()).unwrap_or_else(|why| panic!("{why}"));
    let (once, again) = (lived(), lived());
    let lines = once.story.iter().zip(&again.story).enumerate();
    for (at, (line, other)) in lines {
        let before = once.story.get(at.saturating_sub(20)..at);
        assert_eq!(line, other, "line {at}, after {before:#?}");
    }
    assert_eq!(once, again);
}
