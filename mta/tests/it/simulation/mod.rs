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
const WORLDS: u64 = 8;
const WORLDS_FULL: u64 = 1_000;
/// Little ones, likewise.
const LITTLE: u64 = 200;
const LITTLE_FULL: u64 = 5_000;
/// By hand, instead of all others, a seed of either kind.
const SEED: &str = "HIKYAKU_SIMULATION_SEED";

/// What a seed stands for: a world, or a little one.
type Kind = fn(u64) -> Plan;

/// Seeds that found something, each with what it was.
const REGRESSIONS: [(Kind, u64, &str); 3] = [
    (
        Plan::little,
        3813,
        "a restarted node went on with a batch that had been paused",
    ),
    (
        Plan::little,
        4204,
        "what a node had begun of a cancelled batch when it died was called unsent",
    ),
    (
        Plan::of,
        58,
        "a message was begun behind another, and sent when its lease was long over",
    ),
];

/// Lets the world of a seed live; `test` is the one that does it again.
fn live(kind: Kind, seed: u64, test: &str) -> Result<Summary, String> {
    live_plan(kind(seed)).map_err(|why| {
        format!(
            "seed {seed}: {why}\n\nexactly this again:\n  {SEED}={seed} \
             cargo nextest run -p mta --test it simulation::{test}\n"
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
    let told = plan.clone();
    in_a_thread(plan.seed, move || World::live(plan)).map_err(|why| format!("{why}\n{told:#?}"))
}

/// What happens in a world, on a thread and in a time of its own.
fn in_a_thread<T, F>(seed: u64, happens: impl FnOnce() -> F + Send + 'static) -> Result<T, String>
where
    T: Send + 'static,
    F: Future<Output = Result<T, String>>,
{
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
            runtime.expect("a runtime").block_on(happens())
        });
    let lived = thread.expect("a thread").join();
    lived.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.unwrap_or_else(|| "a panic".to_owned()))
    })
}

/// The end of the seeds in this run, or one by hand.
fn seeds(ordinary: u64, full: u64) -> std::ops::Range<u64> {
    if let Ok(seed) = std::env::var(SEED) {
        let seed = seed
            .parse()
            .unwrap_or_else(|_| panic!("a number in {SEED}"));
        return seed..seed + 1;
    }
    match std::env::var_os("HIKYAKU_TEST_FULL") {
        Some(_) => 0..full,
        None => 0..ordinary,
    }
}

/// Lets all of them live, as many at a time as there are processors; tells how many transactions,
/// recipients and copies too many there were.
fn all_live(kind: Kind, seeds: std::ops::Range<u64>, test: &str) -> (u64, usize, usize) {
    let next = AtomicU64::new(seeds.start);
    let failures = Mutex::new(Vec::new());
    let totals = Mutex::new((0_u64, 0_usize, 0_usize));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || failures.lock().expect("sane").len() >= 3 {
                        return;
                    }
                    match live(kind, seed, test) {
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
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    totals.into_inner().expect("sane")
}

#[test]
fn worlds_from_seeds() {
    let seeds = seeds(WORLDS, WORLDS_FULL);
    println!("{:?}", all_live(Plan::of, seeds, "worlds_from_seeds"));
}

#[test]
fn little_worlds_from_seeds() {
    let seeds = seeds(LITTLE, LITTLE_FULL);
    println!(
        "{:?}",
        all_live(Plan::little, seeds, "little_worlds_from_seeds")
    );
}

#[test]
fn seeds_that_found_something_stay_well() {
    for (kind, seed, what) in REGRESSIONS {
        let lived = live(kind, seed, "seeds_that_found_something_stay_well");
        lived.unwrap_or_else(|why| panic!("again: {what}\n{why}"));
    }
}

#[test]
fn a_world_is_the_same_each_time() {
    // Without trouble; and two in which nodes stand still, are killed and lose their store.
    for plan in [Plan::small(), Plan::of(1), Plan::of(8)] {
        let lived = || live_plan(plan.clone()).unwrap_or_else(|why| panic!("{why}"));
        let (once, again) = (lived(), lived());
        let lines = once.story.iter().zip(&again.story).enumerate();
        for (at, (line, other)) in lines {
            let before = once.story.get(at.saturating_sub(20)..at);
            assert_eq!(line, other, "line {at}, after {before:#?}");
        }
        assert_eq!(once, again);
    }
}
