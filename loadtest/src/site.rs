//! A service of its own for one measurement: folder, configuration, keys, process.
//!
//! What is written here is what an operator would write; nothing is tuned that the report does not
//! say.

use crate::client::Client;
use crate::process::Guarded;
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use service::clock::{Clock as _, SystemClock};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// For the service to get ready, and to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the service's log, shown when something went wrong.
const LOG_LINES: usize = 10;

/// How mail is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dkim {
    /// Not at all
    None,
    /// With an RSA key of 2,048 bits
    Rsa2048,
    /// With RSA-2048 and Ed25519
    Both,
}

impl Dkim {
    /// As in a heading.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "no DKIM",
            Self::Rsa2048 => "RSA-2048",
            Self::Both => "RSA-2048 + Ed25519",
        }
    }

    fn algorithms(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::Rsa2048 => &["rsa2048"],
            Self::Both => &["rsa2048", "ed25519"],
        }
    }
}

/// What a service is configured for.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where all mail goes.
    pub sink: SocketAddr,
    /// The domain of From.
    pub from_domain: String,
    /// How it signs.
    pub dkim: Dkim,
    /// The store's address; none: the embedded one.
    pub store: Option<String>,
    /// What another node of the same store signs links with.
    pub tracking_keys: Option<String>,
    /// `dN.example` is a destination of its own for N below this; the others are one, but for what
    /// `dns` says.
    pub destinations: u64,
    /// `dN.slow.example`, for N below this, is one that takes a message an hour.
    pub slow: u64,
    /// Domains whose mail goes elsewhere, each a destination of its own.
    pub routes: Vec<(String, SocketAddr)>,
    /// Where mail goes is asked of this server; else there is a static route to the sink.
    pub dns: Option<SocketAddr>,
    /// Per destination.
    pub connections: u32,
    /// On each connection.
    pub messages_per_connection: u32,
    /// Where to make the folder.
    pub dir: PathBuf,
    /// The executable.
    pub program: PathBuf,
}

/// The executable of this name beside ours.
///
/// # Errors
/// When there is none.
pub fn beside_us(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(
        path.is_file(),
        "{} is missing: build it first",
        path.display()
    );
    Ok(path)
}

/// A service that runs; killed when this is dropped, and its folder removed.
#[derive(Debug)]
pub struct Site {
    // Before the folder, so that it is dead before that goes.
    process: Guarded,
    dir: TempDir,
    tracker: SocketAddr,
    admin: SocketAddr,
    client: Client,
    program: PathBuf,
    api: String,
}

impl Site {
    /// Makes the folder, starts `hikyaku up` in it and waits until it is ready. Under
    /// `strace -c` if a file for its table is given.
    ///
    /// # Errors
    /// When it does not start; the message has the end of its log.
    pub async fn start(setup: &Setup, strace: Option<&Path>) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-loadtest-")
            .tempdir_in(&setup.dir)
            .with_context(|| format!("cannot make a folder in {}", setup.dir.display()))?;
        let ports = [free_port()?, free_port()?, free_port()?];
        let config = dir.path().join("hikyaku.toml");
        fs::write(&config, setup.config(dir.path(), ports))?;
        fs::write(dir.path().join("shaping.toml"), setup.shaping())?;
        let rules = include_str!("../../config/bounce-rules.toml");
        fs::write(dir.path().join("bounce-rules.toml"), rules)?;
        if let Some(keys) = &setup.tracking_keys {
            fs::create_dir(dir.path().join("data"))?;
            fs::write(dir.path().join("data/tracking.key"), keys)?;
        }
        for algorithm in setup.dkim.algorithms() {
            setup.make_key(&config, algorithm)?;
        }
        let api = format!("http://127.0.0.1:{}", ports[0]);
        let process = launch(&setup.program, dir.path(), strace, &api).await;
        let process = with_log(process, dir.path())?;
        let key = fs::read_to_string(dir.path().join("data/api-key")).context("no API key")?;
        Ok(Self {
            process,
            tracker: SocketAddr::from(([127, 0, 0, 1], ports[1])),
            admin: SocketAddr::from(([127, 0, 0, 1], ports[2])),
            client: Client::new(&api, key.trim()),
            program: setup.program.clone(),
            api,
            dir,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A client with its key.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Where its tracker listens.
    pub fn tracker(&self) -> SocketAddr {
        self.tracker
    }

    /// A gauge of its metrics.
    ///
    /// # Errors
    /// When it does not answer, or has no such gauge.
    pub async fn gauge(&self, name: &str) -> Result<f64> {
        let page = Client::new(format!("http://{}", self.admin), "")
            .metrics()
            .await?;
        let mut values = page
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        values
            .next()
            .with_context(|| format!("no {name} among its metrics"))
    }

    /// The text of its tracking key file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tracking_keys(&self) -> Result<String> {
        let path = self.dir.path().join("data/tracking.key");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// What went wrong, with the last lines of its log.
    ///
    /// # Errors
    /// As `result`.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        with_log(result, self.dir.path())
    }

    /// Keeps its log in `dir` under this name.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn keep_log(&self, dir: &Path, name: &str) -> Result<()> {
        fs::copy(self.dir.path().join("log"), dir.join(name)).context("cannot keep the log")?;
        Ok(())
    }

    /// Kills it (SIGKILL) and starts it again; tells how long it took to get ready.
    ///
    /// # Errors
    /// When it does not start again.
    pub async fn crash(&mut self) -> Result<Duration> {
        signal(self.pid(), "KILL")?;
        // By the signal, which is no good end.
        drop(self.process.ended(PATIENCE).await);
        let start = SystemClock.instant();
        let again = launch(&self.program, self.dir.path(), None, &self.api).await;
        self.process = self.explain(again)?;
        Ok(SystemClock.instant().duration_since(start))
    }

    /// Ends it in order (SIGTERM), and waits.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub async fn stop(mut self) -> Result<()> {
        signal(self.pid(), "TERM")?;
        let ended = self.process.ended(PATIENCE).await;
        self.explain(ended)
    }
}

impl Setup {
    fn config(&self, dir: &Path, [api, tracker, admin]: [u16; 3]) -> String {
        let dkim = if self.dkim == Dkim::None {
            "optional"
        } else {
            "required"
        };
        let dns = self.dns.map_or_else(String::new, |server| {
            format!(
                "port = {}\nallow_private_mx = [\"127.0.0.0/8\"]\n[dns]\nnameservers = [\"{server}\"]\n",
                self.sink.port()
            )
        });
        let store = self.store.as_ref();
        let store = store.map_or_else(String::new, |url| format!("[store]\nurl = \"{url}\"\n"));
        format!(
            "data_dir = {data:?}\n{store}\
             [api]\nlisten = \"127.0.0.1:{api}\"\nmax_body = \"4GiB\"\n\
             [[accounts]]\nid = \"default\"\nfrom_domains = [\"*\"]\ndkim = \"{dkim}\"\n\
             [accounts.tracking]\nbase_url = \"http://127.0.0.1:{tracker}\"\n\
             [tracker]\nlisten = \"127.0.0.1:{tracker}\"\nadmin_listen = \"127.0.0.1:{admin}\"\n\
             [smtp]\nehlo = \"mta.{from}\"\n{dns}\
             [dkim]\ndir = \"dkim-keys\"\n\
             [shaping]\nfile = \"shaping.toml\"\n",
            data = dir.join("data"),
            from = self.from_domain,
        )
    }

    fn shaping(&self) -> String {
        let mut text = format!(
            "[default]\nconnections = {}\nmessages_per_connection = {}\nrate = \"unlimited\"\n\
             tls = \"none\"\nretry = [\"1s\"]\n",
            self.connections, self.messages_per_connection
        );
        // Writing to a string cannot fail.
        text.push_str("[mx]\n");
        if self.dns.is_none() {
            writeln!(text, "\"*\" = \"{}\"", self.sink).ok();
        }
        for (domain, address) in &self.routes {
            writeln!(text, "{domain:?} = \"{address}\"").ok();
        }
        for (domain, _) in &self.routes {
            writeln!(text, "[domain.{domain:?}]").ok();
        }
        for domain in 0..self.destinations {
            writeln!(text, "[domain.\"d{domain}.example\"]").ok();
        }
        for domain in 0..self.slow {
            writeln!(
                text,
                "[domain.\"d{domain}.slow.example\"]\nrate = \"1/h\"\nmax_rate = \"1/h\""
            )
            .ok();
        }
        text
    }

    fn make_key(&self, config: &Path, algorithm: &str) -> Result<()> {
        let made = Command::new(&self.program)
            .args(["dkim", "generate", &self.from_domain])
            .args([
                "--selector",
                algorithm,
                "--algorithm",
                algorithm,
                "--config",
            ])
            .arg(config)
            .output()
            .context("cannot run hikyaku dkim generate")?;
        if made.status.success() {
            return Ok(());
        }
        bail!(
            "hikyaku dkim generate: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        )
    }
}

/// Starts the service in its folder and waits until it is ready.
async fn launch(program: &Path, dir: &Path, strace: Option<&Path>, api: &str) -> Result<Guarded> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))?;
    let mut command = match strace {
        None => Command::new(program),
        Some(table) => {
            let mut strace = Command::new("strace");
            // -D: the child is the service itself, and takes our signals.
            strace.args(["-D", "-f", "-c", "-o"]).arg(table);
            strace.arg(program);
            strace
        }
    };
    command
        .arg("up")
        .arg("--config")
        .arg(dir.join("hikyaku.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let child = command.spawn().context("cannot start the service")?;
    let mut process = Guarded::new("the service", child);
    ready(&mut process, &Client::new(api, "")).await?;
    Ok(process)
}

async fn ready(process: &mut Guarded, client: &Client) -> Result<()> {
    let ready = async {
        loop {
            process.check()?;
            if client.is_ready().await {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ready)
        .await
        .with_context(|| format!("the service was not ready within {PATIENCE:?}"))?
}

/// The cause comes first: a log may have lines about anything.
fn with_log<T>(result: Result<T>, dir: &Path) -> Result<T> {
    result.map_err(|error| {
        let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.len().saturating_sub(LOG_LINES);
        let end = lines.get(last..).unwrap_or_default().join("\n");
        anyhow!("{error:#}; the end of the service's log:\n{end}")
    })
}

/// A port of 127.0.0.1 that was free a moment ago.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Sends a signal by name to a process that we started. The shell's `kill` is there wherever a
/// shell is.
///
/// # Errors
/// When the process is gone.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    let mut kill = Command::new("sh");
    kill.arg("-c").arg(format!("kill -{name} {pid}"));
    ensure!(kill.status()?.success(), "cannot signal process {pid}");
    Ok(())
}

/// The type of the filesystem that `dir` is on, as far as the kernel tells.
pub fn filesystem(dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    filesystem_of(&mounts, &dir).unwrap_or("unknown").to_owned()
}

/// Of the mounts whose place `dir` is in, the deepest, and of those the last.
fn filesystem_of<'a>(mounts: &'a str, dir: &Path) -> Option<&'a str> {
    let mount = |line: &'a str| {
        let mut fields = line.split(' ').skip(1);
        let place = Path::new(fields.next()?);
        let depth = place.components().count();
        dir.starts_with(place).then_some((depth, fields.next()?))
    };
    let deepest = mounts
        .lines()
        .filter_map(mount)
        .max_by_key(|(depth, _)| *depth);
    deepest.map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(dkim: Dkim) -> Setup {
        Setup {
            sink: SocketAddr::from(([127, 0, 0, 1], 2525)),
            from_domain: "brand.example".to_owned(),
            dkim,
            store: None,
            tracking_keys: None,
            destinations: 2,
            slow: 2,
            routes: vec![(
                "tarpit.example".to_owned(),
                SocketAddr::from(([127, 0, 0, 1], 2526)),
            )],
            dns: None,
            connections: 8,
            messages_per_connection: 50,
            dir: PathBuf::from("/tmp"),
            program: PathBuf::from("hikyaku"),
        }
    }

    /// The service itself reads what is written: the format has one owner.
    #[test]
    fn the_configuration_is_one_that_the_service_takes() {
        let dir = tempfile::tempdir().expect("a folder");
        let server = SocketAddr::from(([127, 0, 0, 1], 53));
        for (dkim, dns) in [(Dkim::None, None), (Dkim::Rsa2048, Some(server))] {
            let store = dns.map(|_| "redis://127.0.0.1:6379".to_owned());
            let setup = Setup {
                dns,
                store,
                ..setup(dkim)
            };
            let config = dir.path().join("hikyaku.toml");
            fs::write(&config, setup.config(dir.path(), [1025, 1026, 1027])).expect("written");
            fs::write(dir.path().join("shaping.toml"), setup.shaping()).expect("written");
            fs::write(dir.path().join("bounce-rules.toml"), "").expect("written");
            let environment = service::config::Environment::default();
            let read = service::config::Config::check(Some(&config), &environment, &[]);
            read.map_err(|mistakes| mistakes.to_string())
                .expect("no mistakes");
        }
    }

    #[test]
    fn the_deepest_mount_counts() {
        let mounts =
            "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/x /tmp/disk xfs rw 0 0\n";
        for (dir, expected) in [
            ("/home/a", Some("ext4")),
            ("/tmp/b", Some("tmpfs")),
            ("/tmp/disk/c", Some("xfs")),
            ("/tmpfoo", Some("ext4")),
        ] {
            assert_eq!(filesystem_of(mounts, Path::new(dir)), expected, "{dir}");
        }
        assert_eq!(filesystem_of("nonsense", Path::new("/")), None);
    }
}
