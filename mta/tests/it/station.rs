//! Sending with a real store and journal in a directory of its own, towards one receiving server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use content::dkim::{Algorithm, generate};
use journal::{Journal, JournalConfig, RealDisk};
use links::KeyRing;
use model::{
    BatchId, Counters, JournalId, LotNumber, MessageId, Partition, Priority, Row,
    SuppressionReason, Timestamp, TrackingMode,
};
use mta::classify::Rules;
use mta::released::Released;
use mta::sending::{SendingDeps, SendingHandle, start};
use service::clock::{Clock, SharedClock, SystemClock};
use service::config::shaping::ShapingFile;
use service::config::{Config, Environment};
use service::metrics::Metrics;
use service::power::Power;
use service::tasks::{Shutdown, Tasks};
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchChange, BatchHead, ChangeOutcome, NewBatch, NewLot, RecipientQuery, RecipientRow, Store,
    Suppression, SuppressionQuery,
};
use testkit::smtp_peer::SmtpPeer;

/// How long a condition is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Retries within a second, no limits: what a test asks for beside stands before it.
const SHAPING: &str = r#"
    [default]
    rate = "unlimited"
    connections = 4
    messages_per_connection = 50
    retry = ["300ms", "600ms"]
    expire = "5s"
"#;

/// The addresses `u0@domain` to `u(n-1)@domain`.
pub(crate) fn people(domain: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("u{n}@{domain}")).collect()
}

/// A place to send from.
pub(crate) struct Station {
    dir: tempfile::TempDir,
    pub(crate) config: Config,
    shaping: ShapingFile,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) metrics: Arc<Metrics>,
    /// How long a lease holds.
    pub(crate) lease: Duration,
    /// The most that the journal takes; none: its default.
    pub(crate) journal_bytes: Option<u64>,
    /// How often the machine was started.
    pub(crate) boots: u32,
    /// What sending takes for the time.
    pub(crate) clock: SharedClock,
    ring: Arc<ArcSwap<KeyRing>>,
}

/// The machine's clock, so much ahead.
#[derive(Debug)]
pub(crate) struct Ahead(pub(crate) Duration);

impl Clock for Ahead {
    fn now(&self) -> Timestamp {
        SystemClock.now() + self.0
    }

    fn instant(&self) -> Instant {
        SystemClock.instant()
    }
}

/// Sending, as it runs.
pub(crate) struct Running {
    pub(crate) handle: SendingHandle,
    tasks: Tasks,
    power: Power,
    pub(crate) shutdown: Shutdown,
}

impl Station {
    /// Everything goes to `peer`.
    pub(crate) async fn new(peer: &SmtpPeer) -> Self {
        Self::with(
            &format!("{SHAPING}\n[mx]\n\"*\" = \"{}\"\n", peer.address()),
            "",
        )
        .await
    }

    /// Everything goes to `peer`, with these keys in `[default]` and these sections in the
    /// configuration.
    pub(crate) async fn towards(peer: &SmtpPeer, config: &str, default: &str) -> Self {
        let keys = |line: &&str| {
            !default.contains(line.split('=').next().unwrap_or_default().trim())
                || !line.contains('=')
        };
        let rest: Vec<_> = SHAPING.lines().filter(keys).collect();
        let shaping = format!(
            "{}\n{default}\n[mx]\n\"*\" = \"{}\"\n",
            rest.join("\n"),
            peer.address()
        );
        Self::with(&shaping, config).await
    }

    /// With this `shaping.toml` and these sections in the configuration.
    pub(crate) async fn with(shaping: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let keys = dir.path().join("keys/brand.example");
        std::fs::create_dir_all(&keys).expect("a directory");
        std::fs::write(
            keys.join("s1.pem"),
            generate(Algorithm::Ed25519).expect("a key"),
        )
        .expect("written");
        let file = dir.path().join("hikyaku.toml");
        std::fs::write(&file, format!("[dkim]\ndir = \"keys\"\n{config}")).expect("written");
        let environment: Environment = std::iter::empty::<(String, String)>().collect();
        let options = SqliteOptions {
            path: dir.path().join("test.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let config = Config::load(Some(&file), &environment).expect("a configuration");
        Self {
            lease: config.store.lease,
            journal_bytes: None,
            boots: 1,
            config,
            shaping: ShapingFile::parse(Path::new("shaping.toml"), shaping)
                .expect("a shaping file"),
            store: Arc::new(SqliteStore::open(options).await.expect("a store")),
            metrics: Arc::new(Metrics::new()),
            clock: SystemClock::shared(),
            ring: Arc::new(ArcSwap::from_pointee(
                KeyRing::parse(&KeyRing::file_text(&[7; 32])).expect("a ring"),
            )),
            dir,
        }
    }

    /// Commits a batch to these addresses, in lots by domain.
    pub(crate) async fn submit(&self, to: &[String]) -> BatchId {
        self.submit_as(to, |_| {}).await
    }

    /// Submits with another head.
    pub(crate) async fn submit_as(
        &self,
        to: &[String],
        change: impl FnOnce(&mut BatchHead),
    ) -> BatchId {
        let content = content(&self.ring, &["s1"]);
        self.submit_made(to, change, content).await
    }

    /// Submits a complete message.
    pub(crate) async fn submit_raw(&self, to: &[String], message: &[u8]) -> BatchId {
        let spec = serde_json::json!({
            "from": {"email": "news@brand.example"}, "subject": "", "raw": STANDARD.encode(message), "list_unsubscribe": false
        });
        let content = content_of(&self.ring, &["s1"], spec);
        self.submit_made(to, |_| {}, content).await
    }

    async fn submit_made(
        &self,
        to: &[String],
        change: impl FnOnce(&mut BatchHead),
        content: Vec<u8>,
    ) -> BatchId {
        let now = SystemClock.now();
        let id = BatchId::new(now, u128::from(fastrand::u64(..)));
        let lots = lots(to);
        self.store.stage_lots(id, lots).await.expect("staged");
        let mut head = head(id, now);
        change(&mut head);
        let batch = NewBatch {
            head,
            content: content.into(),
            accepted: to.len() as u64,
            rejected: 0,
            call: None,
        };
        self.store
            .commit_batch(batch, now)
            .await
            .expect("committed");
        id
    }

    /// Starts sending, with the journal that lies in the directory.
    pub(crate) async fn start(&self) -> Running {
        let power = Power::on();
        let (tasks, shutdown) = (Tasks::powered(&power), Shutdown::new());
        let handle = start(self.deps(&tasks, &shutdown)).await.expect("started");
        Running {
            handle,
            tasks,
            power,
            shutdown,
        }
    }

    fn deps(&self, tasks: &Tasks, shutdown: &Shutdown) -> SendingDeps {
        let fresh = JournalId::new(SystemClock.now(), u128::from(fastrand::u64(..)));
        let mut journal = JournalConfig::new(self.dir.path().join("journal"), "mta", fresh);
        journal.boot = Some(self.boots.to_string());
        journal.max_bytes = self.journal_bytes.unwrap_or(journal.max_bytes);
        SendingDeps {
            store: Arc::clone(&self.store),
            journal: Journal::open(&journal, Arc::new(RealDisk)).expect("a journal"),
            clock: Arc::clone(&self.clock),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
            metrics: Arc::clone(&self.metrics),
            smtp: self.config.smtp.clone(),
            dns: self.config.dns.clone(),
            accounts: self.config.accounts.clone(),
            tls_reports: self.config.tls_reports.clone(),
            pools: self.config.pools.clone(),
            shaping: Arc::new(self.shaping.clone()),
            rules: Arc::new(ArcSwap::from_pointee(Rules::shipped())),
            ring: Arc::clone(&self.ring),
            dkim_dir: self.config.dkim.dir.clone(),
            lease: self.lease,
        }
    }

    pub(crate) async fn counters(&self, batch: BatchId) -> Counters {
        let counters = self
            .store
            .batch(batch)
            .await
            .expect("an answer")
            .expect("a batch")
            .counters;
        assert_eq!(
            counters.accepted,
            counters.statuses(),
            "the sum of the statuses"
        );
        counters
    }

    /// The counters when every recipient has a final status.
    pub(crate) async fn finished(&self, batch: BatchId) -> Counters {
        self.until(batch, |counters| counters.open() == 0).await
    }

    /// The counters when they are `so`.
    pub(crate) async fn until(&self, batch: BatchId, so: impl Fn(&Counters) -> bool) -> Counters {
        let waiting = async {
            loop {
                let counters = self.counters(batch).await;
                if so(&counters) {
                    return counters;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(counters) => counters,
            Err(_) => panic!("still {:?}", self.counters(batch).await),
        }
    }

    pub(crate) async fn row(&self, batch: BatchId, index: u32) -> RecipientRow {
        let query = RecipientQuery {
            batch,
            from_index: index,
            limit: 1,
            status: None,
            opened: None,
            clicked: None,
            domain: None,
            with_variant: false,
        };
        let page = self.store.recipients(query).await.expect("an answer");
        page.items.into_iter().next().expect("a recipient")
    }

    /// The TLS of the last attempt; empty in plaintext.
    pub(crate) async fn tls_of(&self, batch: BatchId, index: u32) -> String {
        let story = self.store.message(MessageId { batch, index }).await;
        let story = story.expect("an answer").expect("a message");
        let last = story.attempts.into_iter().next_back();
        last.and_then(|attempt| attempt.detail.tls)
            .map_or(String::new(), String::from)
    }

    pub(crate) async fn change(&self, batch: BatchId, change: BatchChange) {
        let outcome = self
            .store
            .change_batch(batch, change, SystemClock.now())
            .await
            .expect("an answer");
        assert!(matches!(outcome, ChangeOutcome::Done { .. }), "{outcome:?}");
    }

    pub(crate) async fn suppress(&self, email: &str) {
        let entry = Suppression {
            email: email.to_owned(),
            account: "default".to_owned(),
            list: None,
            reason: SuppressionReason::Manual,
            source: "api".to_owned(),
            created_at: SystemClock.now(),
        };
        self.store
            .suppress(vec![entry], SystemClock.now())
            .await
            .expect("suppressed");
    }

    pub(crate) async fn suppressed(&self) -> Vec<String> {
        let query = SuppressionQuery {
            account: "default".into(),
            email: None,
            after: None,
            limit: 100,
        };
        let page = self.store.suppressions(query).await.expect("an answer");
        page.items.into_iter().map(|entry| entry.email).collect()
    }
}

impl Running {
    /// Ends it between any two steps, as a crash does.
    pub(crate) async fn crash(self) {
        let Self {
            handle,
            tasks,
            power,
            ..
        } = self;
        power.kill();
        drop(handle);
        tasks.join().await.expect("no panic");
    }

    /// As SIGTERM does.
    pub(crate) async fn drain(self) {
        self.shutdown
            .drain(PATIENCE)
            .await
            .expect("drained in time");
        self.tasks.join().await.expect("no panic");
        assert!(!self.handle.has_failed());
    }
}

/// Rows for these addresses, in lots by domain.
pub(crate) fn lots(to: &[String]) -> Vec<NewLot> {
    let rows = to
        .iter()
        .enumerate()
        .map(|(index, email)| row(u32::try_from(index).expect("few"), email));
    let mut by_domain = std::collections::BTreeMap::<String, Vec<Row>>::new();
    for row in rows {
        by_domain
            .entry(row.email.domain().to_owned())
            .or_default()
            .push(row);
    }
    let (single, mixed): (Vec<_>, Vec<_>) =
        by_domain.into_iter().partition(|(_, rows)| rows.len() > 1);
    let mixed: Vec<Row> = mixed.into_iter().flat_map(|(_, rows)| rows).collect();
    let queues = single
        .into_iter()
        .chain(std::iter::once((store::MIXED.to_owned(), mixed)));
    let mut lots = Vec::new();
    for (queue, rows) in queues {
        for some in rows.chunks(store::LOT_ROWS) {
            let number = LotNumber::new(Partition(0), u32::try_from(lots.len()).expect("few"))
                .expect("a lot number");
            lots.push(NewLot {
                number,
                queue: queue.as_str().into(),
                rows: some.to_vec(),
                variants: Vec::new(),
            });
        }
    }
    lots
}

/// A small content, signed with these keys of its From domain.
pub(crate) fn content(ring: &ArcSwap<KeyRing>, dkim_selectors: &[&str]) -> Vec<u8> {
    let spec = serde_json::json!({
        "from": {"email": "news@brand.example", "name": "Brand"}, "subject": "Hello",
        "html": "<p>Hello <a href=\"https://shop.example/\">shop</a></p>", "text": "Hello", "list_unsubscribe": true
    });
    content_of(ring, dkim_selectors, spec)
}

fn content_of(
    ring: &ArcSwap<KeyRing>,
    dkim_selectors: &[&str],
    spec: serde_json::Value,
) -> Vec<u8> {
    let released = Released {
        form: Released::FORM,
        spec: serde_json::from_value(spec).expect("a content"),
        dkim_selectors: dkim_selectors.iter().map(ToString::to_string).collect(),
        tracker_base_url: "http://127.0.0.1:8026".into(),
        tracking_key: ring.load().ids().next().expect("a key"),
        allow_duplicates: false,
        proof: false,
        variants: Vec::new(),
        test: None,
    };
    released.to_bytes().expect("bytes")
}

fn row(index: u32, email: &str) -> Row {
    Row::new(index, email.parse().expect("an address"))
}

/// The head of a batch released at `now`.
pub(crate) fn head(id: BatchId, now: Timestamp) -> BatchHead {
    BatchHead {
        id,
        account: "default".into(),
        campaign: None,
        list: "default".into(),
        priority: Priority::Bulk,
        pool: None,
        rate: model::units::Rate::Unlimited,
        created_at: now,
        release_at: now,
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::Value::Null,
        held: false,
        window: None,
        guardrails: None,
        variants: None,
    }
}
