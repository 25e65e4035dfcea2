//! Starts the real executables as a user would, each in a folder of its own on free ports.

use anyhow::{Context, Result, bail, ensure};
use hikyaku::client::Client;
use serde_json::{Value, json};
use std::fmt::{Display, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testkit::port::free_port;

/// How long anything that must happen may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// The domain of From in these tests.
pub(crate) const FROM_DOMAIN: &str = "brand.example";

/// The executable of the nodes: what was built with the tests, unless `HIKYAKU_TEST_PROGRAM` names
/// another.
pub(crate) fn program() -> PathBuf {
    let other = std::env::var_os("HIKYAKU_TEST_PROGRAM");
    other.map_or_else(|| env!("CARGO_BIN_EXE_hikyaku").into(), PathBuf::from)
}

/// Asks `probe` again and again until it gives a value.
pub(crate) async fn until<T>(
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let mut last = None;
    while start.elapsed() < PATIENCE {
        match probe().await {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    bail!("{what} did not happen within {PATIENCE:?} (last error: {last:?})")
}

/// A shaping file with these limits and retries within a second; all mail goes to `smtp`
/// (`host:port`).
pub(crate) fn shaping(connections: usize, rate: &str, smtp: impl Display) -> String {
    let limits =
        format!("connections = {connections}\nmessages_per_connection = 200\nrate = \"{rate}\"");
    format!("[default]\n{limits}\nretry = [\"1s\"]\n[mx]\n\"*\" = \"{smtp}\"\n")
}

/// A folder with a configuration, in which a service can be started, killed and started again.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    pub(crate) api_port: u16,
    pub(crate) tracker_port: u16,
    admin_port: u16,
}

impl Site {
    /// A site whose mail for any domain goes to `smtp` (`host:port`), without limits, retried
    /// within a second, signed with both algorithms.
    pub(crate) fn new(smtp: &str) -> Result<Self> {
        Self::with(&shaping(8, "unlimited", smtp), "")
    }

    /// The same, but unsigned mail may leave and there is no key.
    pub(crate) fn unsigned(smtp: &str) -> Result<Self> {
        let site = Self::new(smtp)?;
        std::fs::remove_dir_all(site.dir.path().join("dkim-keys"))?;
        site.edit(|config| {
            config.replace(
                "from_domains = [\"*\"]",
                "from_domains = [\"*\"]\ndkim = \"optional\"",
            )
        })?;
        Ok(site)
    }

    /// Changes the configuration file.
    pub(crate) fn edit(&self, change: impl FnOnce(String) -> String) -> Result<()> {
        let config = std::fs::read_to_string(self.config())?;
        Ok(std::fs::write(self.config(), change(config))?)
    }

    /// `[default]` without limits and with retries within a second.
    pub(crate) fn quick_shaping() -> &'static str {
        "[default]\nconnections = 8\nmessages_per_connection = 200\nrate = \"unlimited\"\nretry = [\"1s\"]\n"
    }

    /// A site with this shaping file and further top-level or section lines of configuration.
    pub(crate) fn with(shaping: &str, more: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hikyaku-test-").tempdir()?;
        let (api_port, tracker_port, admin_port) = (free_port()?, free_port()?, free_port()?);
        let mut config = String::new();
        writeln!(config, "data_dir = {:?}", dir.path().join("data"))?;
        writeln!(config, "[api]\nlisten = \"127.0.0.1:{api_port}\"")?;
        writeln!(
            config,
            "[[accounts]]\nid = \"default\"\nfrom_domains = [\"*\"]"
        )?;
        writeln!(
            config,
            "[accounts.tracking]\nbase_url = \"http://127.0.0.1:{tracker_port}\""
        )?;
        writeln!(
            config,
            "[tracker]\nlisten = \"127.0.0.1:{tracker_port}\"\nadmin_listen = \"127.0.0.1:{admin_port}\""
        )?;
        writeln!(
            config,
            "[smtp]\nehlo = \"mta.brand.example\"\nambiguous_after = \"1s\"\nallow_private_mx = [\"127.0.0.0/8\"]"
        )?;
        writeln!(
            config,
            "[dkim]\ndir = \"dkim-keys\"\n[shaping]\nfile = \"shaping.toml\"\n{more}"
        )?;
        std::fs::write(dir.path().join("hikyaku.toml"), config)?;
        std::fs::write(dir.path().join("shaping.toml"), shaping)?;
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config/bounce-rules.toml");
        std::fs::copy(rules, dir.path().join("bounce-rules.toml"))?;
        let site = Self {
            dir,
            api_port,
            tracker_port,
            admin_port,
        };
        for algorithm in ["rsa2048", "ed25519"] {
            let made = site.hikyaku(&[
                "dkim",
                "generate",
                FROM_DOMAIN,
                "--selector",
                algorithm,
                "--algorithm",
                algorithm,
            ])?;
            ensure!(made.0.success(), "dkim generate: {}", made.1);
        }
        Ok(site)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("hikyaku.toml")
    }

    /// Runs a `hikyaku` command with this site's configuration to its end; both outputs in one.
    pub(crate) fn hikyaku(&self, arguments: &[&str]) -> Result<(ExitStatus, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_hikyaku"))
            .args(arguments)
            .arg("--config")
            .arg(self.config())
            .output()?;
        Ok((
            output.status,
            String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        ))
    }

    /// Starts `hikyaku up` and waits until it is ready.
    pub(crate) async fn up(&self) -> Result<Service> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
        command.arg("up").arg("--config").arg(self.config());
        self.start(command).await
    }

    /// Starts a command that runs the service, and waits until it is ready.
    pub(crate) async fn start(&self, command: Command) -> Result<Service> {
        let mut service = self.spawn(command)?;
        service.ready().await?;
        // As the process sees it: its data may lie on a disk of its own.
        let mut key = PathBuf::from(format!("/proc/{}/root", service.pid()));
        key.push(self.dir.path().join("data/api-key").strip_prefix("/")?);
        let key = std::fs::read_to_string(key)?;
        key.trim().clone_into(&mut service.key);
        service.client = Client::new(self.api(), Some(service.key.clone()));
        Ok(service)
    }

    /// Starts a command that runs the service, ready or not; its key is that of an earlier start.
    pub(crate) fn spawn(&self, mut command: Command) -> Result<Service> {
        let log_path = self.dir.path().join("log");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let key = std::fs::read_to_string(self.dir.path().join("data/api-key")).ok();
        let key = key.map(|key| key.trim().to_owned());
        Ok(Service {
            child,
            log: log_path,
            client: Client::new(self.api(), key.clone()),
            key: key.unwrap_or_default(),
        })
    }

    pub(crate) fn api(&self) -> String {
        format!("http://127.0.0.1:{}", self.api_port)
    }

    pub(crate) fn tracker(&self) -> String {
        format!("http://127.0.0.1:{}", self.tracker_port)
    }

    pub(crate) fn tracker_admin(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }
}

/// A running service; killed when dropped.
pub(crate) struct Service {
    child: Child,
    log: PathBuf,
    pub(crate) client: Client,
    /// The key that `client` shows.
    pub(crate) key: String,
}

impl Service {
    /// Waits until it says that it is ready.
    pub(crate) async fn ready(&mut self) -> Result<()> {
        let ready = until("ready", async || {
            if let Some(status) = self.child.try_wait()? {
                bail!("the service ended with {status}:\n{}", self.log());
            }
            let answer = self.client.get("/readyz").await?;
            Ok(answer.status.is_success().then_some(()))
        })
        .await;
        ready.with_context(|| self.log())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// `SIGTERM`, and waits for the end: what it came to. What it said last is shown unless it ended well.
    pub(crate) async fn terminate(mut self) -> Result<ExitStatus> {
        signal(self.pid(), "TERM")?;
        let ended = until("the end after SIGTERM", async || {
            Ok(self.child.try_wait()?)
        })
        .await;
        if !ended.as_ref().is_ok_and(ExitStatus::success) {
            self.show_last_lines();
        }
        ended
    }

    /// Prints the end of its log.
    fn show_last_lines(&self) {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.len().saturating_sub(40);
        eprintln!("{}:\n{}", self.log.display(), lines[last..].join("\n"));
    }

    /// Submits a batch that must be accepted; its id.
    pub(crate) async fn submit(&self, batch: &Value) -> Result<String> {
        let answer = self.client.post("/v1/batches", batch).await?;
        ensure!(
            answer.status == 202,
            "HTTP {}: {}",
            answer.status,
            answer.text()
        );
        let answer: Value = answer.json()?;
        answer["id"].as_str().map(str::to_owned).context("no id")
    }

    /// The batch now. Panics when the accounting identity does not hold.
    pub(crate) async fn batch(&self, id: &str) -> Result<Value> {
        let batch: Value = self
            .client
            .get(&format!("/v1/batches/{id}"))
            .await?
            .ok()?
            .json()?;
        let counters = &batch["counters"];
        let sum: u64 = [
            "scheduled",
            "queued",
            "temporary_error",
            "delivered",
            "bounce",
            "failed",
            "suppressed",
            "cancelled",
        ]
        .iter()
        .map(|name| counters[name].as_u64().unwrap())
        .sum();
        assert_eq!(
            counters["accepted"], sum,
            "the accounting identity: {counters}"
        );
        Ok(batch)
    }

    /// Waits until the batch is completed; the batch then.
    pub(crate) async fn completed(&self, id: &str) -> Result<Value> {
        self.ended(id, "completed").await
    }

    /// Waits until every recipient of the batch has an end, in this state; the batch then.
    pub(crate) async fn ended(&self, id: &str, state: &str) -> Result<Value> {
        let is_over = |batch: &Value| batch["state"] == state && !batch["completed_at"].is_null();
        let done = until("the end of a batch", async || {
            Ok(Some(self.batch(id).await?).filter(is_over))
        })
        .await;
        done.with_context(|| self.log())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_last_lines();
        }
        // Already gone, or about to be: there is nobody to tell.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// `hikyaku tracker` beside the MTA; killed when dropped.
pub(crate) struct TrackerProcess(Child);

impl TrackerProcess {
    pub(crate) async fn start(site: &Site) -> Result<Self> {
        let tracker = Self::spawn(site)?;
        tracker.ready(site).await?;
        Ok(tracker)
    }

    /// Waits until it says that it is ready.
    pub(crate) async fn ready(&self, site: &Site) -> Result<()> {
        let client = Client::new(site.tracker_admin(), None);
        until("the tracker", async || {
            let answer = client.get("/readyz").await?;
            Ok(answer.status.is_success().then_some(()))
        })
        .await
    }

    /// Starts it, ready or not.
    pub(crate) fn spawn(site: &Site) -> Result<Self> {
        let log = std::fs::File::create(site.dir.path().join("tracker-log"))?;
        let mut command = Command::new(program());
        command.arg("tracker").arg("--config").arg(site.config());
        command.stdin(Stdio::null()).stdout(log.try_clone()?);
        Ok(Self(command.stderr(log).spawn()?))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for TrackerProcess {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The most memory that a process ever had resident.
pub(crate) fn peak_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Sends a signal by name to a process that a test started.
pub(crate) fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status()?;
    ensure!(status.success(), "kill -{name} {pid}: {status}");
    Ok(())
}

/// A small newsletter to `count` people of `domains` domains.
pub(crate) fn newsletter(count: usize, domains: usize) -> Value {
    let recipients: Vec<Value> = (0..count)
        .map(|i| {
            json!({"email": format!("user{i}@d{}.example", i % domains), "name": format!("Person {i}"),
                   "prospect_id": format!("p-{i}"), "vars": {"points": i}})
        })
        .collect();
    json!({
        "campaign": "spring", "from": {"email": format!("news@{FROM_DOMAIN}"), "name": "Brand"},
        "subject": "Hello {{ name }}",
        "html": "<html><body><p>Dear {{ name }}, you have {{ points }} points.</p><a href=\"https://shop.example/?a=1&amp;b=2\">Shop</a></body></html>",
        "text": "Dear {{ name }}, you have {{ points }} points. https://shop.example/",
        "recipients": recipients,
    })
}
