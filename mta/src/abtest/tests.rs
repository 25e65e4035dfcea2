//! Tests moved on by nodes that die anywhere: the store decides what stands.

use super::layout::Dealing;
use super::*;
use crate::queue::fixtures::{head, row};
use crate::released::{Test, Variant};
use engagement::abtest::{Fallback, Metric};
use model::{
    Actor, Attempt, AttemptDetail, AttemptResult, Fact, Hit, HitKind, JournalId, LotNumber,
    MessageId, Partition, Row, Verdict,
};
use service::clock::Manual;
use service::metrics::Metrics;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchChange, EventQuery, Layer, LeaseRequest, NewBatch, NewLot, RecipientQuery, Shipment,
    StoreError, Variants, WAVES, Want,
};

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const WAIT: Duration = Duration::from_secs(3_600);
/// Longer than the lease of the job.
const LATER: Duration = Duration::from_secs(60);
const PEOPLE: u32 = 400;

/// A store whose answers end after some calls: the node died, before or after the call was done.
struct Dying {
    inner: Arc<SqliteStore>,
    left: AtomicI64,
    /// Whether the last call was done.
    done: bool,
    died: AtomicBool,
}

impl Dying {
    fn die(&self) -> store::Result<()> {
        self.died.store(true, Ordering::Relaxed);
        Err(StoreError::Unavailable("the node is dead".to_owned()))
    }
}

#[async_trait::async_trait]
impl Layer for Dying {
    fn inner(&self) -> &dyn Store {
        &*self.inner
    }

    async fn before(&self, _: &'static str) -> store::Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        let is_last = left == 1 && self.done;
        if left > 1 || is_last {
            Ok(())
        } else {
            self.die()
        }
    }

    async fn after(&self, _: &'static str) -> store::Result<()> {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            left if left > 1 => Ok(()),
            _ => self.die(),
        }
    }
}

fn released(mode: Mode, fraction: f64, fallback: Fallback) -> Released {
    let spec = serde_json::json!({"from": {"email": "news@brand.example"}, "subject": "Hello", "text": "Hi"});
    let variant = |name: &str| Variant {
        name: name.to_owned(),
        from: None,
        subject: Some(name.to_owned()),
        html: None,
        text: None,
        dkim_selectors: Vec::new(),
        send_at: None,
    };
    Released {
        form: Released::WITH_VARIANTS,
        spec: serde_json::from_value(spec).expect("a content"),
        dkim_selectors: Vec::new(),
        tracker_base_url: "http://127.0.0.1:8026".into(),
        tracking_key: 1,
        allow_duplicates: false,
        proof: false,
        variants: ["A", "B"].map(variant).into(),
        test: Some(Test {
            mode,
            fraction,
            metric: Metric::Clicks,
            wait_ms: u64::try_from(WAIT.as_millis()).expect("few"),
            min_confidence: 0.975,
            fallback,
            seed: [3; 32],
        }),
    }
}

/// A store with one batch under test, at a time of its own.
struct Lab {
    dir: tempfile::TempDir,
    store: Arc<SqliteStore>,
    clock: Manual,
    batch: BatchId,
    seq: u64,
}

impl Lab {
    async fn new(of: &Released) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let options = SqliteOptions {
            path: dir.path().join("test.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store = Arc::new(SqliteStore::open(options).await.expect("a store"));
        let mut head = head(7);
        (head.created_at, head.release_at) = (T0, T0);
        let layout = Layout::of(of).expect("variants");
        head.variants = Some(Box::new(Variants {
            names: of.variants.iter().map(|of| of.name.clone()).collect(),
            waves: (0..layout.waves()).map(|_| None).collect(),
        }));
        let dealing = Dealing::of(of).expect("shares").expect("variants");
        let rows: Vec<Row> = (0..PEOPLE)
            .map(|n| row(n, &format!("p{n}@x.example")))
            .collect();
        let dealt = rows.chunks(200).zip(0..).flat_map(|(rows, group)| {
            let dealt = dealing.deal(rows.to_vec(), false).into_iter();
            dealt.map(move |of| (group * WAVES, of))
        });
        let lots = dealt.map(|(base, of)| NewLot {
            number: LotNumber::new(Partition(0), base + of.wave).expect("few"),
            queue: "x.example".into(),
            rows: of.rows,
            variants: of.variants,
        });
        let batch = head.id;
        store
            .stage_lots(batch, lots.collect())
            .await
            .expect("staged");
        kept::register(&*store, batch, T0)
            .await
            .expect("registered");
        let new = NewBatch {
            head,
            content: of.to_bytes().expect("bytes").into(),
            accepted: u64::from(PEOPLE),
            rejected: 0,
            call: None,
        };
        store.commit_batch(new, T0).await.expect("committed");
        Self {
            dir,
            store,
            clock: Manual::at(T0),
            batch,
            seq: 0,
        }
    }

    fn node(&self, store: Arc<dyn Store>, number: u128) -> Testing {
        Testing::new(TestingDeps {
            store,
            clock: Arc::new(self.clock.clone()),
            metrics: Arc::new(Metrics::new()),
            node: JournalId::new(T0, number),
        })
    }

    fn alive(&self, number: u128) -> Testing {
        self.node(Arc::clone(&self.store) as Arc<dyn Store>, number)
    }

    async fn ship(&mut self, facts: Vec<Fact>) {
        let now = self.clock_now();
        let facts: Vec<_> = facts
            .into_iter()
            .map(|fact| {
                self.seq += 1;
                (self.seq, fact)
            })
            .collect();
        let shipment = Shipment {
            journal: JournalId::new(T0, 99),
            facts,
            through: self.seq,
            windows: Vec::new(),
            finished: Vec::new(),
            now,
        };
        self.store.ship(shipment).await.expect("shipped");
    }

    fn clock_now(&self) -> Timestamp {
        use service::clock::Clock as _;
        self.clock.now()
    }

    /// Delivers all that may leave; which variant and release time each got, by index.
    async fn send(&mut self) -> BTreeMap<u32, (u8, Timestamp)> {
        let now = self.clock_now();
        let request = LeaseRequest {
            node: JournalId::new(T0, 98),
            now,
            ttl: Duration::from_secs(45),
            wants: vec![Want::of("x.example", 10_000)],
        };
        let leased = self.store.lease(request).await.expect("leased");
        let (mut sent, mut facts) = (BTreeMap::new(), Vec::new());
        for range in &leased {
            for item in &range.items {
                let at = range.batch.release_of(item.place.lot);
                let again = sent.insert(item.row.index, (item.variant, at));
                assert_eq!(again, None, "{} twice", item.row.index);
                facts.push(Fact::Attempt(Box::new(Attempt {
                    message: MessageId {
                        batch: self.batch,
                        index: item.row.index,
                    },
                    place: item.place,
                    number: item.attempts + 1,
                    at: now,
                    dot_at: Some(now),
                    result: AttemptResult::Delivered,
                    detail: AttemptDetail::default(),
                    suppress: None,
                })));
            }
        }
        self.ship(facts).await;
        sent
    }

    /// A person, or a machine, clicks.
    async fn click(&mut self, index: u32, actor: Actor) {
        let hit = Hit {
            kind: HitKind::Click,
            message: MessageId {
                batch: self.batch,
                index,
            },
            at: self.clock_now() + Duration::from_secs(1),
            link: Some(0),
            target: None,
            user_agent: "agent".into(),
            network: "192.0.2.0/24".into(),
            visitor: None,
            method: None,
            verdict: Verdict {
                actor,
                machine_reasons: Vec::new(),
                rules: 1,
            },
        };
        self.ship(vec![Fact::Hit(Box::new(hit))]).await;
    }

    async fn kept(&self) -> Kept {
        let now = self.clock_now();
        Kept::load(&*self.store, self.batch, now)
            .await
            .expect("read")
            .0
    }

    async fn told(&self) -> Vec<model::Event> {
        let query = EventQuery {
            kinds: vec![EventKind::AbtestDecided],
            limit: 1_000,
            ..EventQuery::default()
        };
        self.store.events(query).await.expect("events").events
    }

    async fn held_back(&self) -> u64 {
        let batch = self.store.batch(self.batch).await.expect("read");
        batch.expect("a batch").counters.scheduled
    }
}

/// Sends the test; a tenth of A and three tenths of B click.
async fn tested(of: &Released) -> (Lab, BTreeMap<u32, (u8, Timestamp)>) {
    let mut lab = Lab::new(of).await;
    lab.alive(1).once().await.expect("looked");
    let test = lab.send().await;
    assert!(test.values().all(|(variant, at)| *variant > 0 && *at == T0));
    for (at, (index, (variant, _))) in test.iter().enumerate() {
        if at % 10 < 2 * usize::from(*variant) - 1 {
            lab.click(*index, Actor::Human).await;
        }
    }
    (lab, test)
}

/// Wherever the deciding node dies, one decision stands, the rest is sent once, with one variant
/// and one time, and one event tells of it.
#[tokio::test]
async fn the_rest_is_sent_once_wherever_the_deciding_node_dies() {
    let of = released(Mode::Winner, 0.5, Fallback::Leader);
    let (mut calls, mut survived) = (1, 0);
    while survived < 2 {
        survived = 0;
        for done in [false, true] {
            let (mut lab, test) = tested(&of).await;
            lab.clock.advance(WAIT);
            let dying = Arc::new(Dying {
                inner: Arc::clone(&lab.store),
                left: AtomicI64::new(calls),
                done,
                died: AtomicBool::new(false),
            });
            let mut first = lab.node(Arc::clone(&dying) as Arc<dyn Store>, 2);
            // What it says to that is the log's.
            drop(first.once().await);
            survived += i32::from(!dying.died.load(Ordering::Relaxed));
            // A part of the rest may be out before anybody takes over.
            let mut rest = lab.send().await;
            let decided = lab.kept().await.decisions;
            lab.clock.advance(LATER);
            let mut second = lab.alive(3);
            second.once().await.expect("looked");
            second.once().await.expect("looked");
            rest.extend(lab.send().await);
            let after = lab.kept().await.decisions;
            assert_eq!(after.len(), 1, "{calls} {done}");
            assert!(
                decided.is_empty() || decided == after,
                "a decision never changes"
            );
            assert_eq!(
                (&*after[0].decision, after[0].variant.as_deref()),
                ("confident", Some("B"))
            );
            assert_eq!(rest.len() + test.len(), PEOPLE as usize, "{calls} {done}");
            let whole = (2, after[0].at);
            assert!(
                rest.values().all(|of| *of == whole),
                "{calls} {done} {rest:?}"
            );
            let mut told = lab.told().await;
            told.dedup_by_key(|event| event.id);
            assert_eq!(told.len(), 1, "one id for one fact, after {calls} {done}");
            assert_eq!(lab.held_back().await, 0);
            // Nothing is left to do.
            let left = kept::running(&*lab.store, None, T0).await.expect("read");
            assert_eq!(left.items, []);
        }
        calls += 1;
        assert!(calls < 60, "a node that never ends");
    }
    assert!(calls > 6, "{calls}");
}

/// The variant of each is the same for every node, and after a restart.
#[tokio::test]
async fn three_nodes_and_a_restart_see_the_same_variants() {
    let of = released(Mode::Winner, 0.5, Fallback::Split);
    let mut lab = Lab::new(&of).await;
    // Nodes take turns, one lease after the other.
    for node in 1..=3 {
        lab.alive(node).once().await.expect("looked");
        lab.clock.advance(LATER);
    }
    let sent = lab.send().await;
    let read = async |store: &SqliteStore| {
        let query = RecipientQuery {
            batch: lab.batch,
            from_index: 0,
            limit: 1_000,
            status: None,
            opened: None,
            clicked: None,
            domain: None,
            with_variant: false,
        };
        let page = store.recipients(query).await.expect("read");
        let pairs = page
            .items
            .into_iter()
            .map(|row| (row.row.index, row.variant));
        pairs.collect::<BTreeMap<_, _>>()
    };
    let before = read(&lab.store).await;
    for (index, (variant, _)) in &sent {
        let name = ["A", "B"][usize::from(*variant) - 1];
        assert_eq!(before[index].as_deref(), Some(name));
    }
    // The same people dealt again anywhere.
    let dealing = Dealing::of(&of).expect("shares").expect("variants");
    for group in 0..2 {
        let rows = (group * 200..(group + 1) * 200).map(|n| row(n, &format!("p{n}@x.example")));
        for of in dealing.deal(rows.collect(), false) {
            for (row, variant) in of.rows.iter().zip(of.variants) {
                let known = sent.get(&row.index).map_or(0, |(variant, _)| *variant);
                assert_eq!(known, variant, "{}", row.email);
            }
        }
    }
    let path = lab.dir.path().join("test.db");
    let tracker = SqliteStore::open(SqliteOptions {
        path,
        partitions: 1,
        role: Role::Tracker,
    });
    assert_eq!(read(&tracker.await.expect("a store")).await, before);
}

/// Equal variants, half of the clicks by machines: the measure is that of the simulations.
#[tokio::test]
async fn what_is_wired_measures_as_the_statistics_do() {
    let of = released(Mode::Winner, 0.5, Fallback::Hold);
    let mut lab = Lab::new(&of).await;
    lab.alive(1).once().await.expect("looked");
    let test = lab.send().await;
    let (mut human, mut any) = ([0_u64; 2], [0_u64; 2]);
    for (at, (index, (variant, _))) in test.iter().enumerate() {
        let place = usize::from(*variant) - 1;
        if at % 4 == 0 {
            let actor = if at % 8 == 0 {
                Actor::Human
            } else {
                Actor::Machine
            };
            lab.click(*index, actor).await;
            human[place] += u64::from(actor == Actor::Human);
            any[place] += 1;
        }
    }
    lab.clock.advance(WAIT);
    // Too late to count.
    let late = *test.keys().next().expect("somebody");
    lab.click(late + 1, Actor::Human).await;
    let plan = Plan::load(&*lab.store, lab.batch)
        .await
        .expect("read")
        .expect("a test");
    let batch = lab
        .store
        .batch(lab.batch)
        .await
        .expect("read")
        .expect("a batch");
    let look = measure::look(&*lab.store, &plan, &batch, lab.clock_now())
        .await
        .expect("read");
    for (place, of) in look.inputs.variants.iter().enumerate() {
        assert_eq!(
            (of.human.successes, of.any.successes),
            (human[place], any[place])
        );
        assert_eq!(
            (of.human.trials, of.assigned),
            (of.delivered, look.seen[place].recipients)
        );
    }
    let expected = Record::conclude(look.inputs.clone());
    lab.alive(1).once().await.expect("looked");
    let decided = lab.kept().await.decisions.pop().expect("a decision");
    // Made again from what is kept of it.
    assert_eq!(Record::conclude(decided.record.inputs.clone()), expected);
    assert_eq!(
        (&*decided.decision, decided.variant.as_deref()),
        ("hold", None)
    );
    assert!(decided.record.machine_share > 0.4);
    // Held until a person says.
    let rest = PEOPLE as usize - test.len();
    assert_eq!(lab.held_back().await, rest as u64);
    let batch = lab
        .store
        .batch(lab.batch)
        .await
        .expect("read")
        .expect("a batch");
    let by_hand = by_hand(&*lab.store, (&plan, &batch), "B", "ops", lab.clock_now()).await;
    assert!(matches!(by_hand, Ok(ByHand::Done)));
    assert_eq!(lab.send().await.len(), rest);
    let kept = lab.kept().await;
    assert_eq!(kept.decisions.len(), 2);
    assert_eq!((&*kept.decisions[1].decision, kept.told), ("manual", 2));
    assert_eq!(lab.told().await.len(), 2);
}

/// A bandit shares out the rest in rounds, more and more to what is better.
#[tokio::test]
async fn a_bandit_goes_on_in_rounds() {
    let of = released(Mode::Bandit, 0.5, Fallback::Leader);
    let (mut lab, test) = tested(&of).await;
    let mut sent = test.len();
    for round in 1..=ROUNDS {
        lab.clock.advance(WAIT);
        lab.alive(1).once().await.expect("looked");
        lab.alive(1).once().await.expect("looked");
        let some = lab.send().await;
        assert!(
            (30..=50).contains(&some.len()),
            "round {round}: {}",
            some.len()
        );
        let least = if round == 1 { 8 } else { 5 };
        let better = some.values().filter(|(variant, _)| *variant == 2).count();
        assert!(
            better * 10 >= some.len() * least,
            "round {round}: {better} of {}",
            some.len()
        );
        sent += some.len();
    }
    assert_eq!(sent, PEOPLE as usize);
    let kept = lab.kept().await;
    assert_eq!((kept.rounds.len(), kept.decisions.len()), (5, 1));
    assert_eq!(lab.told().await.len(), 1);
}

/// Paused time does not count, and nothing is decided meanwhile.
#[tokio::test]
async fn a_pause_stops_the_clock() {
    let of = released(Mode::Winner, 0.5, Fallback::Leader);
    let (lab, _) = tested(&of).await;
    let change = async |what| {
        lab.store
            .change_batch(lab.batch, what, lab.clock_now())
            .await
    };
    lab.clock.advance(WAIT / 2);
    change(BatchChange::Pause).await.expect("paused");
    lab.clock.advance(WAIT);
    lab.alive(1).once().await.expect("looked");
    assert_eq!(lab.kept().await.decisions, []);
    change(BatchChange::Resume).await.expect("resumed");
    lab.clock.advance(WAIT / 2 - Duration::from_secs(1));
    lab.alive(1).once().await.expect("looked");
    assert_eq!(lab.kept().await.decisions, []);
    lab.clock.advance(Duration::from_secs(1));
    lab.alive(1).once().await.expect("looked");
    assert_eq!(lab.kept().await.decisions.len(), 1);
}
