//! What a recipient costs a Redis: memory while it waits and when it is delivered, commands and
//! round trips on its way. Figures that do not depend on how fast the machine is.
//!
//! 20,000 recipients here; `HIKYAKU_TEST_FULL=1` takes the million of which `docs/benchmarks.md`
//! speaks.

use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, Fact, JournalId, LotNumber, MessageId,
    Partition, Priority, Row, Timestamp, TrackingMode,
};
use std::collections::BTreeMap;
use std::time::Duration;
use store::redis::{Clock, RedisOptions, RedisStore, RedisUrl};
use store::sqlite::Role;
use store::{
    BatchHead, LOT_ROWS, LeaseRequest, LeasedRange, NewBatch, NewLot, Shipment, Store, WINDOW, Want,
};
use testkit::redis::RedisServer;

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const MINUTE: Duration = Duration::from_mins(1);
/// Destinations of a real list are few and large.
const DOMAINS: u32 = 40;
/// Facts in one shipment: what a node ships in a quarter of a second.
const SHIPPED: usize = 500;

fn people() -> u32 {
    match std::env::var_os("HIKYAKU_TEST_FULL") {
        Some(_) => 1_000_000,
        None => 20_000,
    }
}

/// A person with five variables, each of a different kind.
fn row(index: u32, chance: &mut fastrand::Rng) -> Row {
    const NAMES: [&str; 8] = [
        "Anna", "Björn", "Chen", "Daisuke", "Eva", "Farid", "Giulia", "Hanako",
    ];
    const CITIES: [&str; 6] = ["Kyoto", "Lyon", "Oslo", "Porto", "Quito", "Tokyo"];
    let name = NAMES[chance.usize(..NAMES.len())];
    let vars = serde_json::json!({
        "first": name,
        "city": CITIES[chance.usize(..CITIES.len())],
        "points": chance.u32(0..100_000),
        "since": format!("20{:02}-{:02}", chance.u32(10..26), chance.u32(1..13)),
        "coupon": format!("{:06X}", chance.u32(0..1 << 24)),
    });
    Row {
        index,
        email: format!(
            "{}.{index}@d{}.example",
            name.to_lowercase().replace('ö', "o"),
            index % DOMAINS
        )
        .parse()
        .expect("an address"),
        name: Some(name.into()),
        prospect_id: Some(format!("p-{index}").into()),
        vars: Some(vars.to_string().into()),
        metadata: None,
        tracking: None,
        time_zone: None,
    }
}

async fn submit(store: &dyn Store, people: u32) -> BatchId {
    let id = BatchId::new(T0, 1);
    let mut chance = fastrand::Rng::with_seed(7);
    let mut waiting: Vec<Vec<Row>> = vec![Vec::new(); usize::try_from(DOMAINS).expect("few")];
    let mut number = 0;
    let mut lots = Vec::new();
    for index in 0..=people {
        let last = index == people;
        if !last {
            let domain = usize::try_from(index % DOMAINS).expect("few");
            waiting[domain].push(row(index, &mut chance));
        }
        for (domain, rows) in waiting.iter_mut().enumerate() {
            if rows.len() == LOT_ROWS || (last && !rows.is_empty()) {
                lots.push(NewLot {
                    number: LotNumber::new(Partition(0), number).expect("few lots"),
                    queue: format!("d{domain}.example").into(),
                    rows: std::mem::take(rows),
                    variants: Vec::new(),
                });
                number += 1;
            }
        }
        if lots.len() >= 64 || last {
            let some = std::mem::take(&mut lots);
            store.stage_lots(id, some).await.expect("staged");
        }
    }
    let head = BatchHead {
        id,
        account: "acme".into(),
        campaign: Some("spring".into()),
        list: "news".into(),
        priority: Priority::Bulk,
        created_at: T0,
        release_at: T0,
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::json!({}),
        pool: None,
        rate: model::units::Rate::Unlimited,
        held: false,
        window: None,
        guardrails: None,
        variants: None,
    };
    let batch = NewBatch {
        head,
        content: vec![b'x'; 10_240].into(),
        accepted: u64::from(people),
        rejected: 0,
        call: None,
    };
    store.commit_batch(batch, T0).await.expect("committed");
    id
}

/// What a server said of the delivery, in the words of a large one.
fn outcome(range: &LeasedRange, at: usize, chance: &mut fastrand::Rng) -> Fact {
    let item = &range.items[at];
    let sent = T0 + Duration::from_millis(u64::from(item.row.index) + chance.u64(0..400));
    Fact::Attempt(Box::new(Attempt {
        message: MessageId {
            batch: range.batch.id,
            index: item.row.index,
        },
        place: item.place,
        number: item.attempts + 1,
        at: sent + Duration::from_millis(chance.u64(20..200)),
        dot_at: Some(sent),
        result: AttemptResult::Delivered,
        detail: AttemptDetail {
            smtp_code: Some(250),
            reply: format!("2.0.0 Ok: queued as {:010X}", chance.u64(0..1 << 40)).into(),
            host: "mx1.d.example (192.0.2.1)".into(),
            tls: Some("TLSv1.3 TLS_AES_256_GCM_SHA384".into()),
            destination: "mx1.d.example".into(),
            source: "default".into(),
            transaction_ms: chance.u32(20..200),
            ..AttemptDetail::default()
        },
        suppress: None,
    }))
}

/// What was asked of the server, by its own count.
#[derive(Debug, Clone, Copy)]
struct Asked {
    commands: u64,
    /// Answers that somebody waited for.
    trips: u64,
    micros: u64,
}

fn asked(server: &RedisServer) -> Asked {
    let stats = server.ask(&["INFO", "commandstats"]).expect("an answer");
    let mut all = Asked {
        commands: 0,
        trips: 0,
        micros: 0,
    };
    for line in stats.lines() {
        let Some((name, values)) = line
            .strip_prefix("cmdstat_")
            .and_then(|line| line.split_once(':'))
        else {
            continue;
        };
        let value = |of: &str| {
            let value = values.split(',').find_map(|pair| pair.strip_prefix(of));
            value.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
        };
        all.commands += value("calls=");
        if name.starts_with("eval") {
            // A step reads in one more, or is looked up for another.
            all.trips += 2 * value("calls=");
            all.micros += value("usec=");
        }
    }
    all
}

/// Memory by kind of key, the keys themselves and what the server needs to find them included.
const WEIGH: &str = "
local cursor, sizes = '0', {}
repeat
  local page = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = page[1]
  for _, key in ipairs(page[2]) do
    local kind = string.match(key, '^hikyaku:{%d+}:(%a+)') or string.match(key, '^hikyaku:events') or string.match(key, '}:(%a+)$') or key
    sizes[kind] = (sizes[kind] or 0) + redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0)
  end
until cursor == '0'
local answer = {}
for kind, size in pairs(sizes) do
  answer[#answer + 1] = kind
  answer[#answer + 1] = size
end
return answer";

/// Bytes by kind of key.
fn memory(server: &RedisServer) -> BTreeMap<String, u64> {
    let answer = server.ask(&["EVAL", WEIGH, "0"]).expect("an answer");
    let lines: Vec<&str> = answer.lines().collect();
    let pair = |two: &[&str]| (two[0].to_owned(), two[1].parse().expect("a size"));
    lines.chunks(2).map(pair).collect()
}

const EVENTS: &str = "hikyaku:events";

/// Of everything but events, for each of so many people; by kind, and in sum.
fn per_person(memory: &BTreeMap<String, u64>, people: u32) -> (BTreeMap<&str, f64>, f64) {
    let all = memory.iter().filter(|(kind, _)| *kind != EVENTS);
    let kinds: BTreeMap<&str, f64> = all
        .map(|(kind, size)| (kind.as_str(), (each(*size, people) * 10.0).round() / 10.0))
        .filter(|(_, size)| *size > 0.0)
        .collect();
    let sum = memory.iter().filter(|(kind, _)| *kind != EVENTS);
    (kinds, each(sum.map(|(_, size)| size).sum(), people))
}

async fn deliver_all(store: &dyn Store, people: u32) -> u64 {
    let node = JournalId::new(T0, 1);
    let mut chance = fastrand::Rng::with_seed(8);
    let (mut seq, mut done, mut shipments) = (0, 0, 0);
    while done < people {
        let wants = (0..DOMAINS).map(|domain| Want::of(&format!("d{domain}.example"), 150));
        let request = LeaseRequest {
            node,
            now: T0,
            ttl: MINUTE,
            wants: wants.collect(),
        };
        let leased = store.lease(request).await.expect("a lease");
        assert!(!leased.is_empty(), "{done} of {people}");
        let mut facts = Vec::new();
        let (mut finished, mut windows) = (Vec::new(), Vec::new());
        let ranges = leased.len();
        for (at_range, range) in leased.iter().enumerate() {
            for at in 0..range.items.len() {
                seq += 1;
                done += 1;
                facts.push((seq, outcome(range, at, &mut chance)));
                let ends = at + 1 == range.items.len();
                if ends {
                    finished.push(range.range);
                }
                if facts.len() >= SHIPPED || (ends && at_range + 1 == ranges) {
                    if !ends {
                        let reported = u32::try_from(at).expect("few");
                        windows.push((range.range, reported + 1 + WINDOW));
                    }
                    let shipment = Shipment {
                        journal: node,
                        facts: std::mem::take(&mut facts),
                        through: seq,
                        windows: std::mem::take(&mut windows),
                        finished: std::mem::take(&mut finished),
                        now: T0,
                    };
                    let shipped = store.ship(shipment).await.expect("shipped");
                    assert_eq!((shipped.unknown, shipped.lost.len()), (0, 0));
                    shipments += 1;
                }
            }
        }
    }
    shipments
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn each(of: u64, people: u32) -> f64 {
    of as f64 / f64::from(people)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recipient_costs_little() {
    let people = people();
    let directory = tempfile::tempdir().expect("a directory");
    let aof = ["--appendonly", "yes", "--appendfsync", "everysec"];
    let server = RedisServer::start(directory.path().to_owned(), &aof).expect("a server");
    let options = RedisOptions {
        url: RedisUrl::parse(&server.url()).expect("an address"),
        partitions: 1,
        role: Role::Mta,
        require_durable: true,
        clock: Clock::Caller,
    };
    let store = RedisStore::open(options).await.expect("it opens");
    let batch = submit(&store, people).await;
    let waiting = memory(&server);
    let (kinds, queued) = per_person(&waiting, people);
    println!("queued: {queued:.1} bytes each: {kinds:?}");

    server.ask(&["CONFIG", "RESETSTAT"]).expect("reset");
    let shipments = deliver_all(&store, people).await;
    let asked = asked(&server);
    let kept = memory(&server);
    let events = kept.get(EVENTS).copied().unwrap_or(0);
    let (kinds, kept) = per_person(&kept, people);
    let commands = each(asked.commands, people);
    let per_trip = f64::from(people) / each(asked.trips, 1);
    println!(
        "delivered: {kept:.1} bytes each ({kinds:?}) beside {:.0} of events; {commands:.2} commands each, \
         {per_trip:.0} messages to a step, {shipments} shipments; {:.1} µs each in steps",
        each(events, people),
        each(asked.micros, people),
    );
    let found = store.batch(batch).await.expect("a reading").expect("there");
    assert_eq!(found.counters.delivered, u64::from(people));
    assert!(queued <= 120.0, "{queued} bytes for each queued");
    assert!(commands <= 3.0, "{commands} commands for each delivered");
    assert!(per_trip >= 50.0, "{per_trip} messages to a round trip");
    assert!(kept <= 64.0, "{kept} bytes for each delivered");
}
