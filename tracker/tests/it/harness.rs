//! A tracker with its store, links signed for it, and a client that speaks HTTP by hand.

use links::{Flags, KeyRing, Kind, Token};
use model::{BatchId, Counters, Hit, MessageId, Priority, Row, Timestamp, TrackingMode};
use service::clock::SystemClock;
use service::config::{Config, Environment};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Tasks};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{BatchHead, LOT_ROWS, MIXED, NewBatch, NewLot, Store};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tracker::{Deps, Tracker};

pub(crate) const HOST: &str = "t.brand.example";
/// The site that may send page views.
pub(crate) const SITE: &str = "https://shop.example";
pub(crate) const TARGET: &str = "https://shop.example/spring?utm_source=mail&x=%20#top";
pub(crate) const CHROME: &str = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36";
const SECRET: [u8; 32] = [42; 32];
/// The longest that a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn ring() -> KeyRing {
    KeyRing::parse(&KeyRing::file_text(&SECRET)).expect("a ring")
}

pub(crate) fn batch_id() -> BatchId {
    BatchId::new(Timestamp::from_millis(1_763_769_600_000), 7)
}

/// A token for recipient `index`, signed for [`HOST`].
pub(crate) fn token(kind: Kind, index: u32) -> String {
    signed(
        kind,
        index,
        Flags {
            mode: TrackingMode::Individual,
            proof: false,
        },
    )
}

pub(crate) fn signed(kind: Kind, index: u32, flags: Flags) -> String {
    let token = Token {
        kind,
        flags,
        batch: batch_id(),
        index,
        link: 3,
        target: if kind == Kind::Click { TARGET } else { "" },
    };
    sign(&ring(), HOST, &token)
}

pub(crate) fn sign(ring: &KeyRing, host: &str, token: &Token<'_>) -> String {
    let mut text = String::new();
    let signer = ring.signer(host, None).expect("a signer");
    signer.sign(token, &mut text).expect("signed");
    text
}

/// A data directory with keys, a configuration and a store that has one batch.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) config: Config,
    pub(crate) store: Arc<dyn Store>,
}

impl Place {
    pub(crate) async fn new(recipients: u32) -> Self {
        Self::with(recipients, "").await
    }

    /// `tracker` is added to the section of that name.
    pub(crate) async fn with(recipients: u32, tracker: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("data");
        std::fs::create_dir(&data).expect("made");
        std::fs::write(data.join("tracking.key"), KeyRing::file_text(&SECRET)).expect("written");
        let text = format!(
            "data_dir = {data:?}\n[tracker]\nlisten = \"127.0.0.1:0\"\nadmin_listen = \"127.0.0.1:0\"\n{tracker}\n\
             [[accounts]]\nid = \"default\"\nfrom_domains = [\"*\"]\n[accounts.tracking]\nbase_url = \"http://{HOST}\"\npage_origins = [\"{SITE}\"]\n"
        );
        let file = dir.path().join("hikyaku.toml");
        std::fs::write(&file, text).expect("written");
        let config = Config::load(Some(&file), &Environment::default()).expect("a configuration");
        let store = open_store(&data).await;
        commit_batch(&*store, recipients).await;
        Self { dir, config, store }
    }

    pub(crate) fn config_file(&self) -> std::path::PathBuf {
        self.dir.path().join("hikyaku.toml")
    }

    pub(crate) async fn start(&self) -> Running {
        self.start_with(self.store.clone()).await
    }

    pub(crate) async fn start_with(&self, store: Arc<dyn Store>) -> Running {
        let deps = Deps {
            store,
            metrics: Arc::new(Metrics::new()),
            clock: SystemClock::shared(),
            tasks: Tasks::new(),
            shutdown: Shutdown::new(),
        };
        let tracker = tracker::start(&self.config, deps.clone())
            .await
            .expect("starts");
        Running { tracker, deps }
    }

    /// The batch's counters once `enough` says so.
    pub(crate) async fn counters(&self, enough: impl Fn(&Counters) -> bool) -> Counters {
        let mut last = Counters::default();
        let reached = async {
            loop {
                let batch = self.store.batch(batch_id()).await.expect("a store");
                last = batch.expect("the batch").counters;
                if enough(&last) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, reached).await;
        assert!(in_time.is_ok(), "counters never came so far: {last:?}");
        last
    }

    /// What the store has of the hits on one message.
    pub(crate) async fn hits(&self, index: u32) -> Vec<Hit> {
        let id = MessageId {
            batch: batch_id(),
            index,
        };
        let story = self.store.message(id).await.expect("a store");
        let hits = story.expect("the message").hits.into_iter();
        hits.map(|kept| kept.hit).collect()
    }
}

async fn open_store(data: &Path) -> Arc<dyn Store> {
    let options = SqliteOptions {
        path: data.join("hikyaku.db"),
        partitions: 1,
        role: Role::Tracker,
    };
    Arc::new(SqliteStore::open(options).await.expect("opens"))
}

async fn commit_batch(store: &dyn Store, recipients: u32) {
    let id = batch_id();
    let rows: Vec<Row> = (0..recipients)
        .map(|index| Row {
            prospect_id: Some(format!("p-{index}").into()),
            ..Row::new(
                index,
                format!("r{index}@x.example").parse().expect("an address"),
            )
        })
        .collect();
    let lots = rows.chunks(LOT_ROWS).zip(0..).map(|(rows, number)| NewLot {
        number: model::LotNumber::new(model::Partition(0), number).expect("few lots"),
        queue: MIXED.into(),
        rows: rows.to_vec(),
        variants: Vec::new(),
    });
    store.stage_lots(id, lots.collect()).await.expect("staged");
    let now = SystemClock::shared().now();
    let head = BatchHead {
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
    };
    let batch = NewBatch {
        head,
        content: Arc::from(&b"{}"[..]),
        accepted: recipients.into(),
        rejected: 0,
        call: None,
    };
    store.commit_batch(batch, now).await.expect("committed");
}

/// A tracker in this process.
pub(crate) struct Running {
    pub(crate) tracker: Tracker,
    pub(crate) deps: Deps,
}

impl Running {
    pub(crate) async fn get(&self, path: &str) -> Response {
        self.ask("GET", path, &[("User-Agent", CHROME)], b"").await
    }

    pub(crate) async fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        ask(self.tracker.addr(), method, path, headers, body)
            .await
            .expect("an answer")
    }

    pub(crate) async fn admin(&self, path: &str) -> Response {
        let answer = ask(self.tracker.admin_addr(), "GET", path, &[], b"").await;
        answer.expect("an answer")
    }

    /// Ends it as SIGTERM does.
    pub(crate) async fn drain(self) {
        self.deps.shutdown.drain(PATIENCE).await.expect("drains");
        self.deps.tasks.join().await.expect("no task panicked");
    }
}

/// An answer as it came.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(given, _)| given == name);
        let value = found.next().map(|(_, value)| value.as_str());
        assert!(found.next().is_none(), "{name} stands there twice");
        value
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// What a browser would send back.
    pub(crate) fn cookie(&self) -> Option<String> {
        let set = self.header("set-cookie")?;
        set.split(';').next().map(str::to_owned)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = std::str::from_utf8(bytes.get(..end)?).ok()?;
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        Some(Self {
            status,
            headers: lines.filter_map(header).collect(),
            body: bytes.get(end + 4..)?.to_vec(),
        })
    }
}

/// One request on a connection of its own. `Host` is [`HOST`] unless `headers` name another.
pub(crate) async fn ask(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Response> {
    let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if headers.iter().all(|(name, _)| *name != "Host") {
        request.push_str(&format!("Host: {HOST}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() || method == "POST" {
        request.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    request.push_str("\r\n");
    let bytes = raw(addr, &[request.as_bytes(), body].concat()).await?;
    Response::parse(&bytes).ok_or_else(|| std::io::Error::other("no whole answer"))
}

/// Sends bytes and reads until the other side closes.
pub(crate) async fn raw(addr: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await??;
    Ok(answer)
}

/// Waits until `condition` holds, looking again with each turn of the loop.
pub(crate) async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let reached = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, reached).await;
    assert!(in_time.is_ok(), "never came: {what}");
}
