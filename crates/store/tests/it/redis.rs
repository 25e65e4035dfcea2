//! What is particular to the Redis engine: servers that end, fail over, are full or forget; nodes
//! that work at once; clocks.

use crate::fixture::Redis;
use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, BatchState, EventKind, Fact, JournalId,
    LotNumber, MessageId, Partition, Priority, Row, Timestamp, TrackingMode,
};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use store::redis::{Clock, RedisOptions, RedisStore, RedisUrl};
use store::sqlite::Role;
use store::{
    BatchHead, LeaseRequest, LeasedRange, NewBatch, NewLot, Note, PEOPLE, Retire, Share,
    ShareClaim, ShareRequest, Shipment, Store, StoreError, Want, clock_offset,
};
use testkit::redis::{RedisSentinels, RedisServer};
use testkit::tls::Issuer;

pub(crate) const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const QUEUE: &str = "x.example";
const PATIENCE: Duration = Duration::from_secs(60);

fn options(url: &str) -> RedisOptions {
    RedisOptions {
        url: RedisUrl::parse(url).expect("an address"),
        partitions: 1,
        role: Role::Mta,
        require_durable: false,
        clock: Clock::Server,
    }
}

async fn open(url: &str) -> store::Result<RedisStore> {
    RedisStore::open(options(url)).await
}

/// Asks again until there is an answer that is wanted.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, asking).await;
    found.unwrap_or_else(|_| panic!("{what} did not happen"))
}

pub(crate) async fn submit(store: &dyn Store, number: u128, rows: u32) -> store::Result<BatchId> {
    let id = BatchId::new(T0, number);
    let row = |index| {
        Row::new(
            index,
            format!("n{index}@x.example").parse().expect("an address"),
        )
    };
    let all: Vec<Row> = (0..rows).map(row).collect();
    let lots = all
        .chunks(store::LOT_ROWS)
        .zip(0..)
        .map(|(rows, number)| NewLot {
            number: LotNumber::new(Partition(0), number).expect("few lots"),
            queue: QUEUE.into(),
            rows: rows.to_vec(),
            variants: Vec::new(),
        });
    store.stage_lots(id, lots.collect()).await?;
    let head = BatchHead {
        id,
        account: "acme".into(),
        campaign: None,
        list: "news".into(),
        priority: Priority::Bulk,
        created_at: T0,
        release_at: T0,
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::json!({}),
        held: false,
        window: None,
        guardrails: None,
        variants: None,
        pool: None,
        rate: model::units::Rate::Unlimited,
    };
    let batch = NewBatch {
        head,
        content: b"content".as_slice().into(),
        accepted: u64::from(rows),
        rejected: 0,
        call: None,
    };
    store.commit_batch(batch, T0).await?;
    Ok(id)
}

pub(crate) async fn lease(
    store: &dyn Store,
    node: u128,
    rows: u32,
    ttl: Duration,
) -> store::Result<Vec<LeasedRange>> {
    let want = Want::of(QUEUE, rows);
    let request = LeaseRequest {
        node: JournalId::new(T0, node),
        now: T0,
        ttl,
        wants: vec![want],
    };
    store.lease(request).await
}

pub(crate) fn delivered(node: u128, seq: &mut u64, leased: &[LeasedRange]) -> Shipment {
    let mut facts = Vec::new();
    for range in leased {
        for item in &range.items {
            *seq += 1;
            let attempt = Attempt {
                message: MessageId {
                    batch: range.batch.id,
                    index: item.row.index,
                },
                place: item.place,
                number: item.attempts + 1,
                at: T0,
                dot_at: None,
                result: AttemptResult::Delivered,
                detail: AttemptDetail::default(),
                suppress: None,
            };
            facts.push((*seq, Fact::Attempt(Box::new(attempt))));
        }
    }
    Shipment {
        journal: JournalId::new(T0, node),
        facts,
        through: *seq,
        windows: Vec::new(),
        finished: leased.iter().map(|range| range.range).collect(),
        now: T0,
    }
}

const MINUTE: Duration = Duration::from_mins(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_work_at_once_send_nobody_twice_and_forget_nobody() {
    const ROWS: u32 = 3_000;
    const NODES: u128 = 4;
    let server = Redis::single(1);
    let first: Arc<dyn Store> = Arc::new(server.open(Role::Mta).await.expect("it opens"));
    let batch = submit(&*first, 1, ROWS).await.expect("submitted");
    let mut nodes = tokio::task::JoinSet::new();
    for node in 0..NODES {
        let store: Arc<dyn Store> = Arc::new(server.open(Role::Mta).await.expect("it opens"));
        nodes.spawn(async move {
            let (mut sent, mut seq) = (Vec::new(), 0);
            loop {
                let leased = lease(&*store, node, 40, MINUTE).await.expect("a lease");
                if leased.is_empty() {
                    return sent;
                }
                for range in &leased {
                    sent.extend(range.items.iter().map(|item| item.row.index));
                }
                let shipment = delivered(node, &mut seq, &leased);
                let shipped = store.ship(shipment).await.expect("shipped");
                assert_eq!((shipped.duplicates.len(), shipped.lost.len()), (0, 0));
            }
        });
    }
    let mut all = Vec::new();
    while let Some(sent) = nodes.join_next().await {
        all.extend(sent.expect("a node"));
    }
    assert_eq!(all.len(), usize::try_from(ROWS).expect("a number"));
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    let found = first.batch(batch).await.expect("a batch").expect("there");
    assert_eq!(found.state, BatchState::Completed);
    assert_eq!(found.counters.delivered, u64::from(ROWS));
    assert_eq!(found.counters.statuses(), found.counters.accepted);
    // Whatever came between whose numbers, each is told once.
    let told = told_delivered(&*first).await;
    assert_eq!(told.len(), all.len());
    assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), all.len());
}

/// Whom the events say delivered, in their order.
async fn told_delivered(store: &dyn Store) -> Vec<MessageId> {
    let (mut told, mut after) = (Vec::new(), None);
    loop {
        let query = store::EventQuery {
            after,
            kinds: vec![EventKind::EmailDelivered],
            limit: 1_000,
            ..store::EventQuery::default()
        };
        let page = store.events(query).await.expect("events");
        if page.events.is_empty() {
            return told;
        }
        told.extend(page.events.into_iter().filter_map(|event| event.message_id));
        after = Some(page.next);
    }
}

/// How often the server was asked for something.
fn calls_of(server: &RedisServer, command: &str) -> u64 {
    let stats = server.ask(&["INFO", "commandstats"]).expect("an answer");
    let line = format!("cmdstat_{command}:calls=");
    let rest = stats.split(&line).nth(1).unwrap_or("0,");
    let number = rest
        .split(',')
        .next()
        .and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("{stats}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_events_are_added_beside_the_script_and_none_of_a_step_that_is_not_done() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    submit(&store, 1, 90).await.expect("submitted");
    let leased = lease(&store, 1, 30, MINUTE).await.expect("a lease");
    let mut seq = 0;
    let shipment = delivered(1, &mut seq, &leased);
    let begun = calls_of(&server, "multi");
    store.ship(shipment.clone()).await.expect("shipped");
    assert_eq!(calls_of(&server, "multi"), begun + 1);
    assert_eq!(told_delivered(&store).await.len(), 30);

    // Not as it is when the server does not know the script any more …
    let leased = lease(&store, 1, 30, MINUTE).await.expect("a lease");
    server.ask(&["SCRIPT", "FLUSH"]).expect("flushed");
    let shipment = delivered(1, &mut seq, &leased);
    store.ship(shipment).await.expect("shipped");
    assert_eq!(calls_of(&server, "multi"), begun + 3);
    assert_eq!(told_delivered(&store).await.len(), 60);
    assert_eq!(calls_of(&server, "xdel"), 30);

    // … nor on another store than the one that was opened; and the stream goes on.
    let leased = lease(&store, 1, 30, MINUTE).await.expect("a lease");
    let generation = "hikyaku:{0}:gen";
    let before = server.ask(&["GET", generation]).expect("an answer");
    server.ask(&["SET", generation, "another"]).expect("set");
    let shipment = delivered(1, &mut seq, &leased);
    store.ship(shipment.clone()).await.expect_err("another");
    assert_eq!(calls_of(&server, "xdel"), 60);
    server
        .ask(&["SET", generation, before.trim()])
        .expect("set");
    store.ship(shipment).await.expect("shipped");
    let told = told_delivered(&store).await;
    assert_eq!(told.len(), 90);
    assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), 90);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_run_out_by_the_servers_clock() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    submit(&store, 1, 10).await.expect("submitted");
    let second = Duration::from_secs(1);
    // Whatever its own clock says, a node has what it asked for.
    let held = lease(&store, 1, 10, second).await.expect("a lease");
    assert_eq!(held.len(), 1);
    assert_eq!(lease(&store, 2, 10, second).await, Ok(Vec::new()));
    let node = JournalId::new(T0, 1);
    let later = T0 + Duration::from_hours(1);
    assert_eq!(
        store.renew(node, later, second).await,
        Ok(vec![held[0].range])
    );
    let taken = until("the end of a lease", async || {
        let leased = lease(&store, 2, 10, second).await.expect("a lease");
        (!leased.is_empty()).then_some(leased)
    })
    .await;
    assert!(taken[0].items.iter().all(|item| item.maybe_started));
    assert!(taken[0].range.token > held[0].range.token);
    assert_eq!(store.renew(node, later, second).await, Ok(Vec::new()));
}

#[expect(clippy::disallowed_methods, reason = "the server reads the same clock")]
fn this_machine() -> Timestamp {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let millis = now.expect("a clock that is set").as_millis();
    Timestamp::from_millis(i64::try_from(millis).expect("this century"))
}

#[tokio::test]
async fn a_node_knows_how_far_its_clock_is_from_the_servers() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    let before = this_machine();
    let told = store.clock().await.expect("an answer").expect("a clock");
    assert!((before..=this_machine()).contains(&told), "{told}");
    let hour = Duration::from_hours(1);
    let ahead = clock_offset(&store, || this_machine() + hour).await;
    // True to half of the time that the answer took.
    let (ahead, took) = (ahead.expect("an answer"), PATIENCE.as_secs_f64());
    assert!((ahead - hour.as_secs_f64()).abs() < took, "{ahead}");
}

#[tokio::test]
async fn a_server_that_forgets_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let durable = || RedisOptions {
        require_durable: true,
        ..options(&server.url())
    };
    let refused = RedisStore::open(durable()).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("appendonly")),
        "{refused:?}"
    );
    server
        .ask(&["CONFIG", "SET", "appendonly", "yes"])
        .expect("set");
    let store = RedisStore::open(durable()).await.expect("it opens");
    assert!(store.caveat().expect("a caveat").contains("everysec"));
    server
        .ask(&["CONFIG", "SET", "appendfsync", "always"])
        .expect("set");
    store.check().await.expect("a check");
    assert_eq!(store.caveat(), None);
    server
        .ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"])
        .expect("set");
    let refused = RedisStore::open(durable()).await;
    assert!(
        matches!(&refused, Err(StoreError::Refused(why)) if why.contains("noeviction")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_form_of_a_store_rises_and_a_later_one_is_refused() {
    const META: &str = "hikyaku:{0}:meta";
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    drop(open(&server.url()).await.expect("it opens"));
    let newest = server.ask(&["HGET", META, "form"]).expect("an answer");
    server.ask(&["HSET", META, "form", "1"]).expect("written");
    let store = open(&server.url()).await.expect("an earlier one opens");
    assert!(submit(&store, 1, 3).await.is_ok());
    assert_eq!(
        server.ask(&["HGET", META, "form"]).expect("an answer"),
        newest
    );
    server.ask(&["HSET", META, "form", "99"]).expect("written");
    match open(&server.url()).await {
        Err(StoreError::Damaged(why)) => assert!(why.contains("form is 99"), "{why}"),
        other => panic!("{other:?}"),
    }
}

fn unavailable<T: std::fmt::Debug>(outcome: store::Result<T>) -> String {
    match outcome {
        Err(StoreError::Unavailable(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_server_is_told_and_it_recovers() {
    let directory = tempfile::tempdir().expect("a directory");
    let durable = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut server = RedisServer::start(directory.path().to_owned(), &durable).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    let batch = submit(&store, 1, 700).await.expect("submitted");
    // Full: nothing is done in part.
    server
        .ask(&["CONFIG", "SET", "maxmemory", "1"])
        .expect("set");
    let full = unavailable(submit(&store, 2, 10).await);
    assert!(full.contains("OOM") || full.contains("maxmemory"), "{full}");
    unavailable(store.check().await);
    let found = store.batch(batch).await.expect("a reading").expect("there");
    assert_eq!(found.counters.queued, 700);
    server
        .ask(&["CONFIG", "SET", "maxmemory", "0"])
        .expect("set");
    store.check().await.expect("a check");
    submit(&store, 2, 10).await.expect("submitted");
    // Demoted: a replica takes no writes.
    server.ask(&["REPLICAOF", "127.0.0.1", "1"]).expect("set");
    assert!(
        unavailable(store.check().await)
            .to_uppercase()
            .contains("READ")
    );
    server.ask(&["REPLICAOF", "NO", "ONE"]).expect("set");
    store.check().await.expect("a check");
    // Gone, and back with everything that was answered.
    server.kill();
    unavailable(store.check().await);
    unavailable(lease(&store, 1, 10, MINUTE).await);
    server.restart().expect("it starts again");
    until("the store to be back", async || store.check().await.ok()).await;
    // Nobody gets what another may still hold by the word of the one before.
    let short = Duration::from_secs(4);
    assert_eq!(lease(&store, 1, 10, short).await, Ok(Vec::new()));
    store.check().await.expect("a check");
    let said = store.caveat().expect("a caveat");
    assert!(said.contains("nothing is leased"), "{said}");
    let leased = until("the end of the silence", async || {
        let leased = lease(&store, 1, 1_000, MINUTE).await.expect("a lease");
        (!leased.is_empty()).then_some(leased)
    })
    .await;
    assert_eq!(store.upheavals().await, Ok(2));
    let count: usize = leased.iter().map(|range| range.items.len()).sum();
    assert_eq!(count, 710);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_behind_sentinels_loses_nothing_that_was_answered() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut servers = RedisSentinels::start(directory.path()).expect("sentinels");
    let store = open(&servers.url()).await.expect("it opens");
    let before = store.standing();
    assert_eq!(before.replicas, 1);
    let batch = submit(&store, 1, 100).await.expect("submitted");
    let leased = lease(&store, 1, 100, MINUTE).await.expect("a lease");
    assert_eq!(leased.len(), 1);
    if let Some(primary) = servers.servers.first_mut() {
        primary.kill();
    }
    until("the failover", async || store.check().await.ok()).await;
    let found = store.batch(batch).await.expect("a reading").expect("there");
    assert_eq!(found.counters.queued, 100);
    // The lease was on the replica too: nobody else has it, and its holder goes on.
    assert_eq!(lease(&store, 2, 100, MINUTE).await, Ok(Vec::new()));
    let shipped = until("a shipment", async || {
        store.ship(delivered(1, &mut 0, &leased)).await.ok()
    })
    .await;
    assert_eq!((shipped.completed, shipped.lost), (vec![batch], Vec::new()));
    assert_ne!(store.standing().histories, before.histories);
}

/// One node's claim on a limit of so many connections and permits.
async fn claim(
    store: &dyn Store,
    node: u128,
    at: Timestamp,
    (of, permits): (u32, u32),
    wanted: bool,
) -> Share {
    let request = ShareRequest {
        node: JournalId::new(T0, node),
        now: at,
        ttl: MINUTE,
        claims: vec![ShareClaim {
            key: "mx.example one".into(),
            connections: of,
            permits,
            wanted,
        }],
    };
    let shares = store.shares(request).await.expect("an answer");
    assert_eq!(shares.len(), 1);
    shares[0]
}

#[tokio::test]
async fn a_limit_is_shared_out_and_never_twice() {
    let server = Redis::single(1);
    let store = server.open(Role::Mta).await.expect("it opens");
    assert!(store.is_shared());
    let ask = async |node, of, wanted| {
        let share = claim(&store, node, T0, (of, 0), wanted).await;
        ((share.rate * 1_000.0).round(), share.connections)
    };
    assert_eq!(ask(1, 5, true).await, (1_000.0, 5));
    // Whoever comes has nothing until the other is content with less.
    assert_eq!(ask(2, 5, true).await, (0.0, 0));
    assert_eq!(ask(1, 5, true).await, (500.0, 3));
    assert_eq!(ask(2, 5, true).await, (500.0, 2));
    assert_eq!(ask(3, 5, true).await, (0.0, 0));
    assert_eq!(ask(1, 5, true).await, (333.0, 2));
    assert_eq!(ask(2, 5, true).await, (333.0, 2));
    assert_eq!(ask(3, 5, true).await, (333.0, 1));
    assert_eq!(ask(2, 5, false).await, (0.0, 0));
    assert_eq!(ask(1, 5, true).await, (500.0, 3));
    assert_eq!(ask(3, 5, true).await, (500.0, 2));
    // Fewer connections than nodes: the first have them, and all of the rate.
    assert_eq!(ask(3, 1, true).await, (0.0, 0));
    assert_eq!(ask(1, 1, true).await, (1_000.0, 1));
    // Who is heard of no more has nothing after its time.
    let later = claim(&store, 3, T0 + MINUTE, (1, 0), true).await;
    assert_eq!((later.rate, later.connections, later.nodes), (1.0, 1, 1));
}

#[tokio::test]
async fn a_rate_is_shared_out_in_whole_permits() {
    let server = Redis::single(1);
    let store = server.open(Role::Mta).await.expect("it opens");
    let ask = async |node, permits| {
        let share = claim(&store, node, T0, (9, permits), true).await;
        ((share.rate * f64::from(permits)).round(), share.connections)
    };
    assert_eq!(ask(1, 50).await, (50.0, 9));
    for round in 0..2 {
        let all = [ask(1, 50).await, ask(2, 50).await, ask(3, 50).await];
        if round == 1 {
            assert_eq!(all, [(17.0, 3), (17.0, 3), (16.0, 3)]);
        }
    }
    // Fewer permits than nodes: the first have one each.
    for _ in 0..2 {
        ask(3, 2).await;
        ask(2, 2).await;
        ask(1, 2).await;
    }
    let all = [ask(1, 2).await, ask(2, 2).await, ask(3, 2).await];
    assert_eq!(all, [(1.0, 5), (1.0, 4), (0.0, 0)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_nodes_ask_their_shares_are_no_more_than_all() {
    let server = Redis::single(1);
    let store = server.open(Role::Mta).await.expect("it opens");
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut chance = fastrand::Rng::with_seed(seed);
    let mut held = std::collections::BTreeMap::new();
    for _ in 0..500 {
        let (node, wanted) = (chance.u128(1..6), chance.u8(..) > 60);
        let permits = [0, 0, 2, 7, 50][chance.usize(..5)];
        let share = claim(&store, node, T0, (3, permits), wanted).await;
        held.insert(node, share);
        let rate: f64 = held.values().map(|share| share.rate).sum();
        let connections: u32 = held.values().map(|share| share.connections).sum();
        assert!(rate <= 1.000_001 && connections <= 3, "{held:?}");
    }
}

/// Restarts the server with what it had when `copy` was made of its append-only file.
fn bring_back(server: &mut RedisServer, copy: Option<&std::path::Path>) {
    server.kill();
    let kept = server.directory().join("appendonlydir");
    std::fs::remove_dir_all(&kept).expect("removed");
    if let Some(copy) = copy {
        copy_all(copy, &kept);
    }
    server.restart().expect("it starts again");
}

fn copy_all(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lost_facts_asks_for_them_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let durable = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut server = RedisServer::start(directory.path().to_owned(), &durable).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    let batch = submit(&store, 1, 60).await.expect("submitted");
    let short = Duration::from_millis(500);
    let leased = lease(&store, 1, 20, MINUTE).await.expect("a lease");
    let first = delivered(1, &mut 0, &leased);
    store.ship(first.clone()).await.expect("shipped");
    let copy = directory.path().join("copy");
    copy_all(&server.directory().join("appendonlydir"), &copy);
    let more = lease(&store, 1, 20, MINUTE).await.expect("a lease");
    let second = delivered(1, &mut 20, &more);
    store.ship(second.clone()).await.expect("shipped");
    assert_eq!(store.upheavals().await, Ok(0));

    // Older: it lacks the second shipment, and the lease before it.
    bring_back(&mut server, Some(&copy));
    let seen = until("an upheaval", async || store.upheavals().await.ok()).await;
    assert_eq!(seen, 1);
    let mut third = delivered(1, &mut 40, &[]);
    third.through = 41;
    let behind = store.ship(third).await.expect("an answer");
    assert_eq!(behind.behind, Some(20), "{behind:?}");
    let node = JournalId::new(T0, 1);
    assert_eq!(store.high_water(node).await, Ok(20));
    // All of it again: what is known is skipped, what was forgotten is taken.
    let mut all = first.clone();
    all.facts.extend(second.facts);
    all.through = second.through;
    let again = store.ship(all).await.expect("shipped");
    assert_eq!((again.behind, again.repeated), (None, 20), "{again:?}");
    let found = store.batch(batch).await.expect("a reading").expect("there");
    assert_eq!(found.counters.delivered, 40);
    assert_eq!(found.counters.statuses(), found.counters.accepted);
    // The forgotten lease is not given to another before it would have run out.
    assert_eq!(lease(&store, 2, 60, short).await, Ok(Vec::new()));
    let rest = until("the end of the silence", async || {
        let leased = lease(&store, 2, 60, short).await.expect("a lease");
        (!leased.is_empty()).then_some(leased)
    })
    .await;
    let count: usize = rest.iter().map(|range| range.items.len()).sum();
    assert_eq!(count, 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_came_back_empty_is_not_taken_for_the_store() {
    let directory = tempfile::tempdir().expect("a directory");
    let durable = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut server = RedisServer::start(directory.path().to_owned(), &durable).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    let batch = submit(&store, 1, 10).await.expect("submitted");
    let leased = lease(&store, 1, 10, MINUTE).await.expect("a lease");
    let copy = directory.path().join("copy");
    copy_all(&server.directory().join("appendonlydir"), &copy);

    bring_back(&mut server, None);
    let refused = until("an answer", async || match store.check().await {
        Err(StoreError::Damaged(why)) => Some(why),
        Ok(()) => panic!("an empty server was taken for the store"),
        Err(_) => None,
    })
    .await;
    assert!(refused.contains("came back empty"), "{refused}");
    assert!(store.upheavals().await.is_ok_and(|seen| seen >= 1));
    // No fact is taken for known, and no mail.
    let shipment = delivered(1, &mut 0, &leased);
    for outcome in [
        store.ship(shipment.clone()).await.map(drop),
        submit(&store, 2, 10).await.map(drop),
    ] {
        assert!(
            matches!(outcome, Err(StoreError::Damaged(_))),
            "{outcome:?}"
        );
    }
    // With what it had it is the store again.
    bring_back(&mut server, Some(&copy));
    until("the store to be back", async || store.check().await.ok()).await;
    let shipped = store.ship(shipment).await.expect("shipped");
    assert_eq!((shipped.completed, shipped.behind), (vec![batch], None));

    // A node that is started anew takes an empty one as it is.
    bring_back(&mut server, None);
    let anew = open(&server.url()).await.expect("it opens");
    submit(&anew, 3, 10).await.expect("submitted");
    until("the other to refuse it", async || {
        matches!(store.check().await, Err(StoreError::Damaged(_))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_user_needs_its_password_and_rights() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let rights = "+@read +@write +@scripting +@connection +wait +info +config|get +time +multi +exec -@dangerous +info +config|get";
    // An earlier version did without transactions: its users may go on as they are.
    for (name, left_out) in [("mail", None), ("former", Some(["-multi", "-exec"]))] {
        let mut user = vec!["ACL", "SETUSER", name, "on", ">s3cret", "~hikyaku:*"];
        user.extend(rights.split(' '));
        user.extend(left_out.into_iter().flatten());
        server.ask(&user).expect("a user");
    }
    server
        .ask(&["ACL", "SETUSER", "default", "off"])
        .expect("set");
    let at = format!("127.0.0.1:{}", server.port());
    let store = open(&format!("redis://mail:s3cret@{at}"))
        .await
        .expect("it opens");
    submit(&store, 1, 20).await.expect("submitted");
    let former = format!("redis://former:s3cret@{at}");
    let former = open(&former).await.expect("it opens");
    for (node, store) in [(1, &store), (2, &former)] {
        let leased = lease(store, node, 10, MINUTE).await.expect("a lease");
        let shipment = delivered(node, &mut 0, &leased);
        store.ship(shipment).await.expect("shipped");
    }
    assert_eq!(told_delivered(&store).await.len(), 20);
    let wrong = open(&format!("redis://mail:wr0ng@{at}")).await;
    let text = format!("{:?}", wrong.expect_err("a wrong password"));
    assert!(!text.contains("wr0ng"), "{text}");
}

async fn retire_all(store: &dyn Store) -> store::Result<u64> {
    let far = T0 + Duration::from_secs(1_000 * 86_400);
    let mut of = Retire {
        events_before: far,
        batches_before: Timestamp::from_millis(0),
        after: None,
    };
    let mut events = 0;
    loop {
        let step = store.retire(of.clone(), T0).await?;
        events += step.events;
        of.after = step.next;
        if of.after.is_none() {
            return Ok(events);
        }
    }
}

/// Retention removes no event that a consumer group has not read and acknowledged, whoever is slowest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_waits_for_the_slowest_consumer_group() {
    const STREAM: &str = "hikyaku:events:{0}";
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    for number in 0..3 {
        submit(&store, number, 5).await.expect("committed");
    }
    let ids = || {
        let all = server.ask(&["XRANGE", STREAM, "-", "+"]).expect("entries");
        let is_id = |line: &&str| {
            line.strip_suffix("-0")
                .is_some_and(|number| number.parse::<u64>().is_ok())
        };
        all.lines()
            .filter(is_id)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let all = ids();
    assert_eq!(all.len(), 6, "accepted and started, of each");
    let ask = |command: &[&str]| server.ask(command).expect("an answer");
    for (group, count) in [("fast", "6"), ("slow", "4")] {
        ask(&["XGROUP", "CREATE", STREAM, group, "0"]);
        ask(&[
            "XREADGROUP",
            "GROUP",
            group,
            "one",
            "COUNT",
            count,
            "STREAMS",
            STREAM,
            ">",
        ]);
    }
    // Read is not done: all of it may be asked for again.
    assert_eq!(retire_all(&store).await, Ok(0));
    for id in &all {
        ask(&["XACK", STREAM, "fast", id]);
    }
    assert_eq!(retire_all(&store).await, Ok(0));
    for id in &all[..3] {
        ask(&["XACK", STREAM, "slow", id]);
    }
    assert_eq!(retire_all(&store).await, Ok(3));
    assert_eq!(ids(), all[3..]);
    ask(&["XACK", STREAM, "slow", &all[3]]);
    assert_eq!(retire_all(&store).await, Ok(1));
    ask(&["XGROUP", "DESTROY", STREAM, "slow"]);
    assert_eq!(retire_all(&store).await, Ok(2));
    assert_eq!(ids(), Vec::<String>::new());
}

/// Campaign systems that read the documented streams themselves (contract, section 5): each consumer
/// group gets everything once, over its consumers, from the first event on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_groups_read_the_streams_of_every_partition() {
    const ROWS: u32 = 300;
    const PARTITIONS: u16 = 3;
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = RedisStore::open(RedisOptions {
        partitions: PARTITIONS,
        ..options(&server.url())
    });
    let store = store.await.expect("it opens");
    let key = |p: u16| format!("hikyaku:events:{{{p}}}");
    for p in 0..PARTITIONS {
        let made = server.ask(&["XGROUP", "CREATE", &key(p), "crm", "0", "MKSTREAM"]);
        assert_eq!(made.expect("an answer"), "OK");
    }
    let newest = Timestamp::from_millis(i64::MAX);
    let begin = store.event_cursor(newest).await.expect("a cursor");
    submit(&store, 1, ROWS).await.expect("submitted");
    for n in 0..ROWS {
        let entry = store::Suppression {
            email: format!("n{n}@x.example"),
            account: "acme".into(),
            list: None,
            reason: model::SuppressionReason::Manual,
            source: "test".into(),
            created_at: T0,
        };
        store.suppress(vec![entry], T0).await.expect("suppressed");
    }
    let mut read = BTreeSet::new();
    for (p, consumer) in (0..PARTITIONS).zip(["one", "two"].into_iter().cycle()) {
        loop {
            let ask = [
                "XREADGROUP",
                "GROUP",
                "crm",
                consumer,
                "COUNT",
                "50",
                "STREAMS",
                &key(p),
                ">",
            ];
            let some = events_in(&server.ask(&ask).expect("an answer"));
            if some.is_empty() {
                break;
            }
            let numbers: Vec<u64> = some.iter().map(|event| event.seq).collect();
            assert!(numbers.is_sorted(), "{numbers:?}");
            for event in some {
                let id = format!("{}-0", event.seq);
                let taken = server
                    .ask(&["XACK", &key(p), "crm", &id])
                    .expect("an answer");
                assert_eq!(taken.trim(), "1", "the number is the id of the entry");
                assert!(read.insert(event.id), "once");
            }
        }
    }
    let query = store::EventQuery {
        after: Some(begin),
        limit: 1_000,
        ..store::EventQuery::default()
    };
    let all = store.events(query).await.expect("events").events;
    assert!(all.len() >= ROWS as usize);
    assert_eq!(read, all.iter().map(|event| event.id).collect());
    // A time between two events has its cursor.
    let (before, after) = all.split_at(all.len() / 2);
    let at = Timestamp::from_millis(i64::try_from(after[0].seq / 1_000).expect("a time"));
    let query = store::EventQuery {
        after: Some(store.event_cursor(at).await.expect("a cursor")),
        limit: 1_000,
        ..store::EventQuery::default()
    };
    let rest = store.events(query).await.expect("events").events;
    assert!(rest.ends_with(after), "nothing of it is missing");
    assert!(
        rest.len() < after.len() + before.len(),
        "what is older is not told"
    );
}

/// The events in what Redis answered, whatever stands around them.
fn events_in(answer: &str) -> Vec<model::Event> {
    let starts = answer.match_indices("{\"id\":\"").map(|(at, _)| at);
    let parse = |at: usize| {
        let rest = answer.get(at..).unwrap_or_default();
        let mut all = serde_json::Deserializer::from_str(rest).into_iter();
        all.next().expect("JSON").expect("an event")
    };
    starts.map(parse).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_believed_by_the_roots_that_were_given() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let authority = Issuer::new("roots of our own").expect("an authority");
    let issued = authority.issue(&["127.0.0.1"]).expect("a certificate");
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("a path").to_owned()
    };
    let roots = file("roots.pem", authority.pem());
    let port = testkit::port::free_port().expect("a port").to_string();
    let wanted = [
        ("tls-cert-file", file("cert.pem", issued.chain_pem())),
        ("tls-key-file", file("key.pem", issued.key_pem())),
        ("tls-ca-cert-file", roots.clone()),
        ("tls-auth-clients", "no".to_owned()),
        ("tls-port", port.clone()),
    ];
    let set = ["CONFIG", "SET"];
    let pairs = wanted
        .iter()
        .flat_map(|(key, value)| [*key, value.as_str()]);
    let command: Vec<&str> = set.into_iter().chain(pairs).collect();
    server.ask(&command).expect("TLS");

    let mut over_tls = options(&format!("rediss://127.0.0.1:{port}"));
    let believe = |options: &mut RedisOptions, file: &str| options.url.believe(file.as_ref());
    believe(&mut over_tls, &roots).expect("roots");
    let store = RedisStore::open(over_tls.clone()).await.expect("it opens");
    submit(&store, 1, 30).await.expect("submitted");
    let leased = lease(&store, 1, 30, MINUTE).await.expect("a lease");
    let shipped = store.ship(delivered(1, &mut 0, &leased)).await;
    shipped.expect("shipped");

    let stranger = Issuer::new("somebody else's").expect("an authority");
    let others = file("others.pem", stranger.pem());
    believe(&mut over_tls, &others).expect("roots");
    unavailable(RedisStore::open(over_tls.clone()).await);
    let missing = believe(&mut over_tls, "/nowhere/roots.pem");
    assert!(
        matches!(missing, Err(StoreError::Refused(_))),
        "{missing:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_may_want_a_login_of_their_own() {
    let directory = tempfile::tempdir().expect("a directory");
    let servers = RedisSentinels::start(directory.path()).expect("sentinels");
    for sentinel in &servers.sentinels {
        let user = ["ACL", "SETUSER", "asker", "on", ">for sentinels", "+@all"];
        sentinel.ask(&user).expect("a user");
        sentinel
            .ask(&["ACL", "SETUSER", "default", "off"])
            .expect("off");
    }
    let mut options = options(&servers.url());
    assert!(RedisStore::open(options.clone()).await.is_err());
    options.url.sentinel_user = Some("asker".to_owned());
    options.url.sentinel_password = Some("for sentinels".to_owned());
    let store = RedisStore::open(options).await.expect("it opens");
    submit(&store, 1, 10).await.expect("submitted");
}

#[tokio::test]
async fn notes_of_many_people_are_few_commands() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
    let store = open(&server.url()).await.expect("it opens");
    let note = |number: usize| Note {
        kind: "person".into(),
        key: format!("p-{number}").into(),
        value: Box::from([1, 2, 3]),
        expires_at: number.is_multiple_of(2).then_some(T0 + MINUTE * 10_000_000),
    };
    server.ask(&["CONFIG", "RESETSTAT"]).expect("reset");
    let notes = (0..500).map(note).collect();
    store.put_notes(notes, T0).await.expect("written");
    let stats = server.ask(&["INFO", "commandstats"]).expect("an answer");
    for written in ["hset:calls=1,", "zadd:calls=2,", "zrem:calls=1,"] {
        let line = format!("cmdstat_{written}");
        assert!(stats.contains(&line), "{line} is not in {stats}");
    }
    // Of a key that is written twice in one step the last counts.
    let gone = Note {
        value: Box::default(),
        ..note(7)
    };
    store
        .put_notes(vec![note(7), gone], T0)
        .await
        .expect("written");
    assert_eq!(store.notes("person", T0).await.expect("notes").len(), 499);
}

/// Where the notes of the people of `acme` stand, by partition.
fn people_of(server: &RedisServer, partitions: u16) -> Vec<usize> {
    let count = |p: u16| {
        let key = format!("hikyaku:{{{p}}}:n:{PEOPLE}acme");
        let count = server.ask(&["HLEN", &key]).expect("an answer");
        count.parse().expect("a number")
    };
    (0..partitions).map(count).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_are_spread_over_partitions_and_found_where_an_earlier_version_put_them() {
    const META: &str = "hikyaku:{0}:meta";
    let directory = tempfile::tempdir().expect("a directory");
    let kind = format!("{PEOPLE}acme");
    let person = |number: usize| Note {
        kind: kind.as_str().into(),
        key: format!("p-{number}").into(),
        value: Box::from([1, 2, 3]),
        expires_at: None,
    };
    let several = |server: &RedisServer| RedisOptions {
        partitions: 4,
        ..options(&server.url())
    };
    let start = || RedisServer::start(directory.path().to_owned(), &[]).expect("a server");

    let server = start();
    let store = RedisStore::open(several(&server)).await.expect("it opens");
    let people = (0..400).map(person).collect();
    store.put_notes(people, T0).await.expect("written");
    let places = people_of(&server, 4);
    assert_eq!(places.iter().sum::<usize>(), 400);
    assert!(places.iter().all(|count| *count > 50), "{places:?}");
    // Programs that would look for them elsewhere stay out.
    let form = server.ask(&["HGET", META, "form"]).expect("an answer");
    assert_eq!(form, "3");

    // As the version before made it, which nodes of that version may still use.
    let server = start();
    drop(RedisStore::open(several(&server)).await.expect("it opens"));
    server.ask(&["HSET", META, "form", "2"]).expect("written");
    let store = RedisStore::open(several(&server)).await.expect("it opens");
    let people = (0..400).map(person).collect();
    store.put_notes(people, T0).await.expect("written");
    assert_eq!(people_of(&server, 4), [400, 0, 0, 0]);
    assert_eq!(store.notes(&kind, T0).await.expect("notes").len(), 400);
    let one = store.note(&kind, "p-7", T0).await.expect("an answer");
    assert_eq!(one, Some(person(7)));
    let form = server.ask(&["HGET", META, "form"]).expect("an answer");
    assert_eq!(form, "2");
}
