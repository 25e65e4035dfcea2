//! A daemon of one's own, and calls to it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use content::dkim::{Algorithm, generate};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mta::{Deps, Mta};
use serde_json::{Value, json};
use service::clock::SystemClock;
use service::config::{Config, Environment};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Tasks};

/// The key that the configuration names.
pub(crate) const KEY: &str = "hk_test_key";

/// For how long something is waited for that has to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// The domain that has a DKIM key.
pub(crate) const BRAND: &str = "brand.example";

/// What stands in the configuration beside what every test needs.
const ACCOUNTS: &str = r#"
    [[api.keys]]
    name = "all"
    key_env = "TEST_KEY"
    scopes = ["submit", "read"]
    [[api.keys]]
    name = "reader"
    key_env = "READ_KEY"
    scopes = ["read"]
    [[api.keys]]
    name = "other"
    key_env = "OTHER_KEY"
    account = "other"
    scopes = ["submit", "read"]
    [[accounts]]
    id = "default"
    from_domains = ["brand.example", "keyless.example"]
    [[accounts]]
    id = "other"
    dkim = "optional"
"#;

/// Where a daemon lives.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    /// A directory with a DKIM key for [`BRAND`] and a configuration.
    pub(crate) fn new(api: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let keys = dir.path().join("keys").join(BRAND);
        std::fs::create_dir_all(&keys).expect("a directory for keys");
        let pem = generate(Algorithm::Ed25519).expect("a key");
        std::fs::write(keys.join("s1.pem"), pem).expect("written");
        // Where nobody listens: what is not about delivery must not wait for the network.
        let shaping = "[mx]\n\"*\" = \"127.0.0.1:1\"\n";
        std::fs::write(dir.path().join("shaping.toml"), shaping).expect("written");
        let home = Self { dir };
        let text = format!(
            "data_dir = {data:?}\n[api]\nlisten = \"127.0.0.1:0\"\n{api}\n{ACCOUNTS}\n\
             [store]\nurl = \"sqlite:{db}\"\n[dkim]\ndir = \"keys\"\n[dns]\nnameservers = [\"127.0.0.1:9\"]\n",
            data = home.data_dir(),
            db = home.store_file().display(),
        );
        std::fs::write(home.config_file(), text).expect("written");
        home
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.dir.path().join("hikyaku.toml")
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Beside the data directory, so that a test can take the one away and keep the other.
    pub(crate) fn store_file(&self) -> PathBuf {
        self.dir.path().join("hikyaku.db")
    }

    pub(crate) fn environment() -> [(&'static str, &'static str); 3] {
        [
            ("TEST_KEY", KEY),
            ("READ_KEY", "hk_read"),
            ("OTHER_KEY", "hk_other"),
        ]
    }

    fn config(&self) -> Config {
        let environment: Environment = Self::environment().into_iter().collect();
        Config::load(Some(&self.config_file()), &environment).expect("a good configuration")
    }
}

/// A running daemon.
pub(crate) struct Service {
    pub(crate) home: Home,
    pub(crate) api: Caller,
    tasks: Tasks,
    shutdown: Shutdown,
    _mta: Mta,
}

impl Service {
    pub(crate) async fn start() -> Self {
        Self::at(Home::new("")).await
    }

    /// With these lines in `[api]`.
    pub(crate) async fn with_api(lines: &str) -> Self {
        Self::at(Home::new(lines)).await
    }

    pub(crate) async fn at(home: Home) -> Self {
        let config = home.config();
        let store = mta::daemon::open_store(&config.store)
            .await
            .expect("a store");
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        let deps = Deps {
            store,
            metrics: Arc::new(Metrics::new()),
            clock: SystemClock::shared(),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        let mta = mta::start(&config, deps).await.expect("started");
        let api = Caller::new(format!("http://{}", mta.addr()), KEY);
        Self {
            home,
            api,
            tasks,
            shutdown,
            _mta: mta,
        }
    }

    /// The page of metrics.
    pub(crate) async fn metrics(&self) -> String {
        let page = self.api.get("/metrics").await.bytes;
        String::from_utf8(page.to_vec()).expect("text")
    }

    /// Returns when the store was asked for events this often.
    pub(crate) async fn asked_for_events(&self, times: u64) {
        let name = "hikyaku_store_seconds_count{op=\"events\"} ";
        loop {
            let page = self.metrics().await;
            let count = page
                .lines()
                .find_map(|line| line.strip_prefix(name)?.parse().ok());
            if count.is_some_and(|count: u64| count >= times) {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Ends it and hands back its directory.
    pub(crate) async fn stop(self) -> Home {
        self.shutdown
            .drain(Duration::from_secs(30))
            .await
            .expect("drained");
        self.tasks.join().await.expect("no task was lost");
        self.home
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>;

/// Someone who calls the API.
#[derive(Clone)]
pub(crate) struct Caller {
    base: String,
    key: String,
    client: Client<hyper_util::client::legacy::connect::HttpConnector, Body>,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) bytes: Bytes,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Status, code, and `path code` of every error.
    pub(crate) fn problem(&self) -> (u16, String, Vec<String>) {
        let json = self.json();
        assert_eq!(
            self.headers["content-type"], "application/problem+json",
            "{json}"
        );
        assert_eq!(json["status"], self.status.as_u16(), "{json}");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let errors = json["errors"].as_array().expect("errors").iter();
        let errors =
            errors.map(|error| format!("{} {}", text(&error["path"]), text(&error["code"])));
        (self.status.as_u16(), text(&json["code"]), errors.collect())
    }
}

impl Caller {
    pub(crate) fn new(base: String, key: &str) -> Self {
        Self {
            base,
            key: key.to_owned(),
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    /// The same service with another key.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self {
            key: key.to_owned(),
            ..self.clone()
        }
    }

    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Reply {
        let body = Full::new(body)
            .map_err(|never| match never {})
            .boxed_unsync();
        self.send(method, path, headers, body)
            .await
            .expect("an answer")
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> anyhow::Result<Reply> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        if !self.key.is_empty() {
            request = request.header("authorization", format!("Bearer {}", self.key));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = self.client.request(request.body(body)?).await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let bytes = answer.into_body().collect().await?.to_bytes();
        Ok(Reply {
            status,
            headers,
            bytes,
        })
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.call(Method::GET, path, &[], Bytes::new()).await
    }

    /// The answer at `path` once it is there and `enough` says so.
    pub(crate) async fn until(&self, path: &str, enough: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let reached = async {
            loop {
                let reply = self.get(path).await;
                last = reply.json();
                if reply.status == StatusCode::OK && enough(&last) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, reached).await;
        assert!(in_time.is_ok(), "{path} never came so far: {last}");
        last
    }

    /// Calls with a document: the status and the answer.
    pub(crate) async fn with_json(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let headers = [("content-type", "application/json")];
        let body = Bytes::from(body.to_string());
        let reply = self.call(method, path, &headers, body).await;
        (reply.status.as_u16(), reply.json())
    }

    pub(crate) async fn post(&self, path: &str) -> Reply {
        self.call(Method::POST, path, &[], Bytes::new()).await
    }

    pub(crate) async fn submit_bytes(&self, body: impl Into<Bytes>) -> Reply {
        self.call(
            Method::POST,
            "/v1/batches",
            &[("content-type", "application/json")],
            body.into(),
        )
        .await
    }

    pub(crate) async fn submit(&self, batch: &Value) -> Reply {
        self.submit_bytes(batch.to_string()).await
    }

    /// Submits what is made while it is sent.
    pub(crate) async fn submit_stream(
        &self,
        chunks: impl Iterator<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> anyhow::Result<Reply> {
        let frames = futures_util::stream::iter(chunks.map(|chunk| chunk.map(Frame::data)));
        let body = StreamBody::new(frames).boxed_unsync();
        self.send(
            Method::POST,
            "/v1/batches",
            &[("content-type", "application/json")],
            body,
        )
        .await
    }

    /// No batch is there.
    pub(crate) async fn assert_nothing_accepted(&self) {
        let batches = self.get("/v1/batches").await.json();
        assert_eq!(batches, json!({"items": [], "next_cursor": null}));
    }
}

/// A batch that is good, to these.
pub(crate) fn batch(recipients: &Value) -> Value {
    json!({
        "campaign": "spring", "from": {"email": "news@brand.example", "name": "Brand"},
        "subject": "Hello {{ name | default('you') }}", "html": "<p>Hi</p><a href=\"https://shop.example/\">shop</a>",
        "recipients": recipients,
    })
}

/// `count` recipients over `domains` domains.
pub(crate) fn recipients(count: usize, domains: usize) -> Value {
    (0..count)
        .map(|n| json!({"email": format!("a{n}@d{}.example", n % domains)}))
        .collect()
}
