//! A disk that fails: the Nth write or sync of the store's process, for N = 1, 2, … until none does.
//!
//! The faults are the kernel's, put in by strace, so that all of sqlite is in the test. The process
//! goes on after each, without a restart; then the store is opened anew and every answer it gave is
//! looked up. A power cut is played by dropping what of the log was written after the last sync.

use crate::crash::{T0, deliver, journal, submit};
use crate::fixture::Sqlite;
use model::BatchId;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{Store as _, StoreError};

const PATH: &str = "HIKYAKU_TEST_DISK_STORE";
const CUT: &str = "HIKYAKU_TEST_DISK_CUT";
const BATCHES: u128 = 3;
const ROUNDS: usize = 3;
/// Faults of one kind that are tried, spread over all, unless everything is wanted.
const TRIED: usize = 10;

/// What the child was told is done.
#[derive(Debug, Default)]
struct Told {
    batches: BTreeSet<BatchId>,
    through: u64,
    done: bool,
}

/// Runs the child on a new store under strace; what it told, and the trace.
fn run(store: &Path, trace: &Path, inject: Option<&str>) -> (Told, String) {
    let mut command = Command::new("/usr/bin/strace");
    command.args([
        "-f",
        "-y",
        "-qq",
        "--seccomp-bpf",
        "-e",
        "trace=pwrite64,fdatasync,fsync,ftruncate,unlink",
        "-o",
    ]);
    command.arg(trace);
    if let Some(inject) = inject {
        command.args(["-e", &format!("inject={inject}")]);
    }
    let output = command
        .arg(std::env::current_exe().expect("this program"))
        .args(["disk::child", "--exact", "--nocapture", "--test-threads=1"])
        .env(PATH, store)
        .envs(
            inject
                .filter(|fault| fault.ends_with('+'))
                .map(|_| (CUT, "1")),
        )
        .output()
        .expect("strace runs");
    let mut told = Told::default();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        match line
            .split_once("told: ")
            .and_then(|(_, told)| told.split_once(' '))
        {
            Some(("batch", id)) => drop(told.batches.insert(id.parse().expect("an id"))),
            Some(("facts", seq)) => told.through = seq.parse().expect("a number"),
            Some(("done", _)) => told.done = true,
            _ => {}
        }
    }
    (told, std::fs::read_to_string(trace).expect("a trace"))
}

/// How often the busiest thread made a call: strace counts for each.
fn most(trace: &str, call: &str) -> usize {
    let mut counts = BTreeMap::<&str, usize>::new();
    for line in trace
        .lines()
        .filter(|line| line.contains(&format!("{call}(")))
    {
        let thread = line.split_whitespace().next().unwrap_or_default();
        *counts.entry(thread).or_default() += 1;
    }
    counts.into_values().max().unwrap_or(0)
}

/// Everything that was told is there, and adds up.
async fn account(fixture: &Sqlite, told: &Told, what: &str) {
    let store = fixture.open(Role::Mta).await.expect(what);
    let mark = store.high_water(journal()).await.expect(what);
    assert!(mark >= told.through, "{what}: {mark} of {told:?}");
    let query = store::BatchQuery {
        limit: 1_000,
        ..store::BatchQuery::default()
    };
    let batches = store.batches(query).await.expect(what).items;
    let there: BTreeSet<BatchId> = batches.iter().map(|batch| batch.head.id).collect();
    assert!(
        there.is_superset(&told.batches),
        "{what}: {there:?} of {told:?}"
    );
    for batch in &batches {
        assert_eq!(batch.counters.statuses(), batch.counters.accepted, "{what}");
    }
    let delivered: u64 = batches.iter().map(|batch| batch.counters.delivered).sum();
    assert_eq!(
        delivered, mark,
        "{what}: a fact is counted if its journal is through it"
    );
}

#[tokio::test]
async fn every_write_and_sync_may_fail_once_and_nothing_is_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let trace = directory.path().join("trace");
    let fixture = Sqlite::new(1);
    let (told, calm) = run(&fixture.path(), &trace, None);
    assert!(told.done && told.batches.len() == 3, "{told:?}");
    account(&fixture, &told, "no fault").await;
    let full = std::env::var_os("HIKYAKU_TEST_FULL").is_some();
    for (call, error) in [
        ("fsync", "EIO"),
        ("pwrite64", "EIO"),
        ("pwrite64", "ENOSPC"),
    ] {
        let all = most(&calm, call);
        assert!(all > 5, "{all} of {call}");
        let step = if full { 1 } else { all.div_ceil(TRIED) };
        let mut failed = 0;
        // One more than there are shows that none was left out.
        for nth in (1..=all).step_by(step).chain([all + 1]) {
            let fixture = Sqlite::new(1);
            let what = format!("{error} at {call} {nth} of {all}");
            let fault = format!("{call}:error={error}:when={nth}");
            let (told, trace) = run(&fixture.path(), &trace, Some(&fault));
            failed += usize::from(trace.contains("(INJECTED)"));
            // A store that could not be opened is opened by whoever starts it again.
            assert!(told.done || told.batches.is_empty(), "{what}: {told:?}");
            account(&fixture, &told, &what).await;
        }
        assert!(failed >= all.div_ceil(step), "{failed} faults of {call}");
    }
}

/// How much of a file was written and synced, by the trace of a process that never carried the log
/// over; `None`: it was. Only one thread writes it.
fn synced(trace: &str, file: &Path) -> Option<u64> {
    let name = format!("<{}>", file.display());
    let (mut written, mut synced) = (0, 0);
    // The thread whose sync has not come back.
    let mut syncing = None;
    for line in trace.lines() {
        let thread = line.split_whitespace().next()?;
        let well = line.trim_end().ends_with("= 0");
        if line.contains("fsync resumed") && syncing == Some(thread) {
            syncing = None;
            synced = if well { written } else { synced };
        }
        if !line.contains(&name) {
            continue;
        }
        if line.contains("fsync(") {
            syncing = line.contains("<unfinished").then_some(thread);
            synced = if well { written } else { synced };
        } else if line.contains("pwrite64(") {
            let call = line.split(" <unfinished").next()?;
            let call = call.rsplit_once(") = ").map_or(call, |(call, _)| call);
            let mut numbers = call.rsplit(", ").map(|number| number.trim().parse::<u64>());
            let (at, length) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
            written = written.max(at + length);
        } else {
            return None;
        }
    }
    Some(synced)
}

#[tokio::test]
async fn a_power_cut_takes_nothing_that_was_answered() {
    let directory = tempfile::tempdir().expect("a directory");
    let trace = directory.path().join("trace");
    let (_, calm) = run(&Sqlite::new(1).path(), &trace, None);
    let all = most(&calm, "fsync");
    // It ends in the middle: at a sync that does not happen.
    let mut cut = 0;
    for nth in [all / 8, all / 4, all / 2, all - 2] {
        let fixture = Sqlite::new(1);
        drop(fixture.open(Role::Mta).await.expect("it is made"));
        let mut log = fixture.path().into_os_string();
        log.push("-wal");
        let log = Path::new(&log);
        let end = format!("fsync:error=EIO:when={nth}+");
        let (told, trace) = run(&fixture.path(), &trace, Some(&end));
        let what = format!("cut at sync {nth} of {all}");
        assert!(!told.done, "{what}: it was to end");
        let length = std::fs::metadata(log).expect("a log").len();
        let kept = synced(&trace, log).expect("the log is not carried over in so short a run");
        let file = std::fs::File::options().write(true).open(log);
        let file = file.expect("a log");
        file.set_len(kept.min(length)).expect("cut off");
        cut += u64::from(kept < length);
        account(&fixture, &told, &what).await;
    }
    assert!(cut > 0, "nothing was ever unsynced");
}

fn tell(line: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "told: {line}")
        .and_then(|()| out.flush())
        .expect("a parent");
}

/// Tries again until the disk is well: each fault comes once.
async fn again<T>(mut step: impl AsyncFnMut() -> store::Result<T>) -> T {
    for _ in 0..20 {
        match step().await {
            Ok(done) => return done,
            // The power is gone: nothing is put in order, as closing the store would.
            Err(_) if std::env::var_os(CUT).is_some() => std::process::abort(),
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(other) => panic!("{other}"),
        }
    }
    panic!("it does not recover");
}

/// Not a test: what the tests above run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(path) = std::env::var_os(PATH) else {
        return;
    };
    let options = SqliteOptions {
        path: path.into(),
        partitions: 1,
        role: Role::Mta,
    };
    let Ok(store) = SqliteStore::open(options).await else {
        return;
    };
    let mut seq = again(async || store.high_water(journal()).await).await;
    for number in 0..BATCHES {
        let id = BatchId::new(T0, u128::from(seq) << 32 | number);
        again(async || submit(&store, id).await).await;
        tell(&format!("batch {id}"));
        for _ in 0..ROUNDS {
            seq = again(async || deliver(&store, seq).await).await;
            tell(&format!("facts {seq}"));
        }
    }
    tell("done all");
}
