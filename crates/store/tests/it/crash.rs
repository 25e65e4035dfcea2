//! A process that is killed in the middle of its work: what it was told is done is there.

use crate::fixture::Sqlite;
use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, BatchState, Fact, JournalId, LotNumber,
    MessageId, Partition, Priority, Row, Timestamp, TrackingMode,
};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{BatchHead, LeaseRequest, NewBatch, NewLot, Shipment, Store as _, Want};

pub(crate) const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const ROUNDS: usize = 6;
const ROWS: u32 = 150;
const DIRECTORY: &str = "HIKYAKU_TEST_CRASH_DIRECTORY";
const ROUND: &str = "HIKYAKU_TEST_CRASH_ROUND";

pub(crate) fn journal() -> JournalId {
    JournalId::new(T0, 7)
}

/// What the child was told, as it tells it: `batch ID` or `facts THROUGH`.
#[tokio::test]
async fn what_was_acknowledged_survives_a_kill() {
    let fixture = Sqlite::new(1);
    let (mut batches, mut through) = (Vec::<BatchId>::new(), 0);
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for round in 0..ROUNDS {
        let lines = run_and_kill(fixture.path(), round, rng.usize(5..60));
        for line in lines {
            match line.split_once(' ') {
                Some(("batch", id)) => batches.push(id.parse().expect("an id")),
                Some(("facts", seq)) => through = seq.parse().expect("a number"),
                _ => panic!("{line}"),
            }
        }
        let store = fixture
            .open(Role::Mta)
            .await
            .expect("it opens after a kill");
        let mark = store.high_water(journal()).await.expect("a mark");
        assert!(
            mark >= through,
            "facts through {through} were acknowledged, {mark} are there"
        );
        let mut delivered = 0;
        for &batch in &batches {
            let found = store.batch(batch).await.expect("a reading");
            let found = found.expect("an acknowledged batch is there");
            assert_eq!(found.counters.accepted, u64::from(ROWS));
            assert_eq!(found.counters.statuses(), u64::from(ROWS));
            assert!(matches!(
                found.state,
                BatchState::InProgress | BatchState::Completed
            ));
        }
        let query = store::BatchQuery {
            limit: 1_000,
            ..store::BatchQuery::default()
        };
        let all = store.batches(query).await.expect("a list").items;
        for batch in &all {
            delivered += batch.counters.delivered;
        }
        assert_eq!(
            delivered, mark,
            "a fact is counted if and only if its journal is through it"
        );
        through = mark;
    }
    assert!(!batches.is_empty() && through > 0, "nothing was tried");
}

/// Runs the child until it has told `count` lines, then kills it.
fn run_and_kill(path: PathBuf, round: usize, count: usize) -> Vec<String> {
    let program = std::env::current_exe().expect("this program");
    let mut child = Command::new(program)
        .args(["crash::child", "--exact", "--nocapture", "--test-threads=1"])
        .env(DIRECTORY, path)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let told = output.lines().map_while(Result::ok).filter_map(|line| {
        // The test harness writes on the same stream.
        line.split_once("told: ").map(|(_, told)| told.to_owned())
    });
    let lines: Vec<String> = told.take(count).collect();
    child.kill().expect("a kill");
    child.wait().expect("its end");
    assert_eq!(lines.len(), count, "the child ended by itself");
    lines
}

fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "told: {line}")
        .and_then(|()| out.flush())
        .expect("a parent");
}

/// Not a test: what the test above runs and kills.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(path) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let round: u128 = std::env::var(ROUND)
        .ok()
        .and_then(|round| round.parse().ok())
        .expect("a round");
    let options = SqliteOptions {
        path: path.into(),
        partitions: 1,
        role: Role::Mta,
    };
    let store = SqliteStore::open(options).await.expect("it opens");
    let mut seq = store.high_water(journal()).await.expect("a mark");
    let mut names = BTreeMap::new();
    for number in 0.. {
        let batch = BatchId::new(T0, round << 32 | number);
        submit(&store, batch).await.expect("committed");
        names.insert(number, batch);
        tell(&format!("batch {batch}"));
        for _ in 0..4 {
            seq = deliver(&store, seq).await.expect("shipped");
            tell(&format!("facts {seq}"));
        }
    }
}

/// Submits a batch; may be repeated.
pub(crate) async fn submit(store: &SqliteStore, id: BatchId) -> store::Result<()> {
    let row = |index| {
        Row::new(
            index,
            format!("n{index}@x.example").parse().expect("an address"),
        )
    };
    let lot = NewLot {
        number: LotNumber::new(Partition(0), 0).expect("a number"),
        queue: "x.example".into(),
        rows: (0..ROWS).map(row).collect(),
        variants: Vec::new(),
    };
    store.stage_lots(id, vec![lot]).await?;
    let head = BatchHead {
        id,
        account: "acme".into(),
        campaign: None,
        list: "news".into(),
        priority: Priority::Bulk,
        pool: None,
        rate: model::units::Rate::Unlimited,
        created_at: T0,
        release_at: T0,
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::json!({}),
        held: false,
        window: None,
        guardrails: None,
        variants: None,
    };
    let batch = NewBatch {
        head,
        content: b"content".as_slice().into(),
        accepted: u64::from(ROWS),
        rejected: 0,
        call: None,
    };
    store.commit_batch(batch, T0).await
}

/// Leases some, and reports all of them delivered.
pub(crate) async fn deliver(store: &SqliteStore, mut seq: u64) -> store::Result<u64> {
    let want = Want::of("x.example", 30);
    let request = LeaseRequest {
        node: journal(),
        now: T0,
        ttl: std::time::Duration::from_secs(45),
        wants: vec![want],
    };
    let leased = store.lease(request).await?;
    let mut facts = Vec::new();
    for range in &leased {
        for item in &range.items {
            seq += 1;
            let attempt = Attempt {
                message: MessageId {
                    batch: range.batch.id,
                    index: item.row.index,
                },
                place: item.place,
                number: 1,
                at: T0,
                dot_at: None,
                result: AttemptResult::Delivered,
                detail: AttemptDetail::default(),
                suppress: None,
            };
            facts.push((seq, Fact::Attempt(Box::new(attempt))));
        }
    }
    let shipment = Shipment {
        journal: journal(),
        facts,
        through: seq,
        windows: Vec::new(),
        finished: leased.iter().map(|range| range.range).collect(),
        now: T0,
    };
    store.ship(shipment).await?;
    Ok(seq)
}
