//! Webhooks over nodes: who serves what, and what becomes of it when a node dies.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::deliver::TlsConfigs;
use crate::resolve::{Resolver, SystemDns};
use model::{EventKind, Timestamp};
use service::clock::{Clock as _, Manual};
use service::config::shaping::Routes;
use service::metrics::WebhookResult;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{Announcement, Store};
use testkit::webhook::{HookReceiver, Mood};

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const PATIENCE: Duration = Duration::from_secs(60);
const HOOKS: usize = 8;

/// A place where nodes share a store and a clock that moves only when told.
struct World {
    directory: tempfile::TempDir,
    clock: Manual,
    store: Arc<dyn Store>,
    registry: Registry,
}

/// A node on a runtime of its own, so that it can die.
struct Node {
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    tasks: Tasks,
    runtime: tokio::runtime::Runtime,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let clock = Manual::at(T0);
        let store = open(directory.path(), Role::Mta).await;
        Self {
            registry: Registry::new(Arc::clone(&store), Arc::new(clock.clone())),
            directory,
            clock,
            store,
        }
    }

    fn node(&self, number: u128) -> Node {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads");
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        let metrics = Arc::new(Metrics::new());
        let path = self.directory.path().to_owned();
        let (clock, counted) = (self.clock.clone(), Arc::clone(&metrics));
        let (of, until) = (tasks.clone(), shutdown.clone());
        let run = async move {
            let store = open(&path, Role::Tracker).await;
            let clock: SharedClock = Arc::new(clock);
            let nobody = ["127.0.0.1:9".parse().expect("an address")];
            let dns = Arc::new(SystemDns::new(&nobody, false).expect("DNS"));
            let resolver = Resolver::new(dns, clock.clone(), Routes::default(), 25, Vec::new());
            let tls = TlsConfigs::new(None).expect("TLS").https().expect("TLS");
            let deps = WebhooksDeps {
                registry: Arc::new(Registry::new(Arc::clone(&store), clock.clone())),
                store,
                http: Arc::new(HttpClient::new(Arc::new(resolver), tls)),
                allow_private: ["127.0.0.0/8".parse().expect("a network")].into(),
                clock,
                metrics: counted,
                node: JournalId::new(T0, number),
                tasks: of.clone(),
            };
            Webhooks::new(deps).run(until).await;
        };
        {
            let _entered = runtime.enter();
            drop(tasks.spawn("node", run));
        }
        Node {
            metrics,
            shutdown,
            tasks,
            runtime,
        }
    }

    async fn tell(&self, numbers: std::ops::Range<u64>) {
        let news = numbers.map(|number| Announcement {
            kind: EventKind::DestinationLimitChanged,
            account: "default".into(),
            data: serde_json::json!({ "n": number }).into(),
            about: model::About::default(),
        });
        self.store
            .announce(news.collect(), self.clock.now())
            .await
            .expect("announced");
    }
}

async fn open(directory: &std::path::Path, role: Role) -> Arc<dyn Store> {
    let options = SqliteOptions {
        path: directory.join("store.db"),
        partitions: 1,
        role,
    };
    Arc::new(SqliteStore::open(options).await.expect("a store"))
}

impl Node {
    fn delivered(&self) -> u64 {
        self.metrics
            .webhook_deliveries
            .at(WebhookResult::Delivered)
            .get()
    }

    /// As `kill -9`.
    fn die(self) {
        self.runtime.shutdown_background();
    }

    /// As SIGTERM.
    async fn end(self) {
        self.shutdown.drain(PATIENCE).await.expect("drained");
        self.tasks.join().await.expect("no panic");
        self.runtime.shutdown_background();
    }
}

fn new_hook(receiver: &HookReceiver, path: &str) -> NewHook {
    NewHook {
        account: "default".into(),
        url: receiver.url(path),
        types: Vec::new(),
        secret: Secret::generate().expect("random bytes"),
        enabled: true,
    }
}

/// The numbers that each path has taken, the first time of each.
fn numbers(receiver: &HookReceiver) -> BTreeMap<String, Vec<u64>> {
    let mut of = BTreeMap::<String, Vec<u64>>::new();
    for delivery in receiver.got().iter().filter(|one| one.is_taken) {
        let body: serde_json::Value = serde_json::from_slice(&delivery.body).expect("JSON");
        let list = of.entry(delivery.path.clone()).or_default();
        for event in body["events"].as_array().expect("events") {
            let number = event["data"]["n"].as_u64().expect("a number");
            if !list.contains(&number) {
                list.push(number);
            }
        }
    }
    of
}

/// Waits until every webhook has taken all numbers up to this one, in order; time passes meanwhile.
async fn taken(world: &World, receiver: &HookReceiver, through: u64) {
    let all: Vec<u64> = (0..through).collect();
    let everywhere = async {
        loop {
            let of = numbers(receiver);
            if of.len() == HOOKS && of.values().all(|list| *list == all) {
                return;
            }
            world.clock.advance(Duration::from_millis(100));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, everywhere).await.is_err() {
        panic!("up to {through}: {:?}", numbers(receiver));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_share_webhooks_and_one_goes_on_where_another_died() {
    let world = World::new().await;
    let receiver = HookReceiver::start().await.expect("a receiver");
    let mut hooks = Vec::new();
    for number in 0..HOOKS {
        let made = world
            .registry
            .create(new_hook(&receiver, &format!("/{number}")));
        hooks.push(made.await.expect("made").expect("room").id);
    }
    // One beside which each of the two has a share: chance would not do.
    let name = |number| JournalId::new(T0, number).to_string();
    let shares = |number: &u128| {
        let both = [name(1), name(*number)];
        let of =
            |id: &WebhookId| server(both.iter().map(String::as_str), *id) == Some(both[0].as_str());
        let first = hooks.iter().filter(|id| of(id)).count();
        (1..HOOKS).contains(&first)
    };
    let beside = (2..1_000).find(shares).expect("a node");
    let first = world.node(1);
    world.tell(0..3).await;
    taken(&world, &receiver, 3).await;
    // A second node gets its share, without a word to anyone.
    let second = world.node(beside);
    let mut told = 3;
    let shared = async {
        while second.delivered() == 0 {
            world.tell(told..told + 1).await;
            told += 1;
            taken(&world, &receiver, told).await;
        }
    };
    tokio::time::timeout(PATIENCE, shared)
        .await
        .expect("the second node has a share");
    let before = first.delivered();
    world.tell(told..told + 1).await;
    told += 1;
    taken(&world, &receiver, told).await;
    assert!(first.delivered() > before, "the first has kept some");
    // It dies in the middle of its deliveries, and its leases run out.
    receiver.mood(Mood::Hang);
    world.tell(told..told + 1).await;
    told += 1;
    receiver.open(HOOKS).await;
    first.die();
    receiver.mood(Mood::Take);
    world.clock.advance(Duration::from_secs(61));
    taken(&world, &receiver, told).await;
    // Who ends properly lets go at once.
    let third = world.node(0);
    second.end().await;
    world.tell(told..told + 1).await;
    told += 1;
    taken(&world, &receiver, told).await;
    third.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_at_once_are_all_kept() {
    let world = World::new().await;
    let receiver = HookReceiver::start().await.expect("a receiver");
    let hook = world.registry.create(new_hook(&receiver, "/"));
    let hook = hook.await.expect("made").expect("room");
    let change = |change: Change| world.registry.change(hook.id, change);
    let (one, two, three) = tokio::join!(
        change(Change {
            enabled: Some(false),
            ..Change::default()
        }),
        change(Change {
            types: Some(vec![EventKind::EmailOpened]),
            ..Change::default()
        }),
        change(Change {
            url: Some("https://x.example/".into()),
            ..Change::default()
        }),
    );
    let editions: BTreeSet<u64> = [one, two, three]
        .into_iter()
        .map(|changed| changed.expect("an answer").expect("it is there").edition)
        .collect();
    assert_eq!(editions, BTreeSet::from([2, 3, 4]));
    let now = world.registry.one(hook.id).await.expect("an answer");
    let now = now.expect("it is there");
    assert_eq!(
        (now.enabled, now.types, now.url.as_str()),
        (false, vec![EventKind::EmailOpened], "https://x.example/")
    );
    // What a node wrote of it after it was deleted goes, too.
    let progress = world.registry.progress(&hook).await.expect("progress");
    assert!(world.registry.remove(hook.id).await.expect("removed"));
    assert!(!world.registry.remove(hook.id).await.expect("an answer"));
    world
        .registry
        .save(hook.id, &progress)
        .await
        .expect("saved");
    world.registry.sweep().await.expect("swept");
    assert!(
        world
            .registry
            .all_progress()
            .await
            .expect("read")
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_has_so_many_webhooks_and_no_more() {
    let world = World::new().await;
    let receiver = HookReceiver::start().await.expect("a receiver");
    let make = async |account: &str| {
        let new = NewHook {
            account: account.into(),
            ..new_hook(&receiver, "/")
        };
        world.registry.create(new).await.expect("an answer")
    };
    for _ in 0..HOOKS_MAX {
        assert!(make("default").await.is_some());
    }
    assert!(make("default").await.is_none());
    assert!(make("other").await.is_some());
}
