//! Real `redis-server` processes on loopback ports of their own, in directories of their own:
//! single, with replicas and sentinels, and Clusters. Killed, stopped and started again at will.
//!
//! Speaks just enough of the protocol to set them up. Must not be used but by tests.

use crate::port::free_port;
use anyhow::{Context as _, Result, bail};
use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The executable: that of the Debian package, or another one such as `valkey-server`.
const PROGRAM: &str = "HIKYAKU_TEST_REDIS_SERVER";
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A server process. Dropping it kills it.
#[derive(Debug)]
pub struct RedisServer {
    child: Option<Child>,
    port: u16,
    directory: PathBuf,
    arguments: Vec<String>,
}

impl RedisServer {
    /// Starts one in a new directory under `directory`, with these arguments beside the usual:
    /// loopback, nothing saved but what is asked for.
    ///
    /// # Errors
    /// When it cannot be started or does not answer.
    pub fn start(directory: PathBuf, arguments: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut server = Self {
            child: None,
            port,
            directory: directory.join(port.to_string()),
            arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
        };
        std::fs::create_dir_all(&server.directory)?;
        server.restart()?;
        Ok(server)
    }

    /// Starts it again, on its port, with what it kept.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        let program = std::env::var(PROGRAM).unwrap_or_else(|_| "redis-server".to_owned());
        let child = Command::new(program)
            .args(["--port", &self.port.to_string()])
            .args(["--bind", "127.0.0.1", "--save", "", "--daemonize", "no"])
            .arg("--dir")
            .arg(&self.directory)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("redis-server (test.sh installs it)")?;
        self.child = Some(child);
        self.wait("it to answer", |server| {
            server.ask(&["PING"]).is_ok_and(|answer| answer == "PONG")
        })
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _killed = child.kill();
            let _ended = child.wait();
        }
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Where it listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it keeps what it keeps.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// Its address as a store's.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Asks a command on a connection of its own; a list comes line by line.
    ///
    /// # Errors
    /// When it cannot be reached, or answers with an error.
    pub fn ask(&self, command: &[&str]) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = format!("*{}\r\n", command.len());
        for part in command {
            text.push_str(&format!("${}\r\n{part}\r\n", part.len()));
        }
        stream.write_all(text.as_bytes())?;
        read_answer(&mut BufReader::new(stream))
    }

    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> Result<()> {
        let tries = PATIENCE.as_millis() / LOOK.as_millis();
        for _ in 0..tries {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                self.child = None;
                bail!("the server on port {} ended: {status}", self.port);
            }
            if done(self) {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
        bail!("waited in vain for {what}")
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads one answer of the protocol as text.
fn read_answer(from: &mut impl std::io::BufRead) -> Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    let line = line.trim_end();
    let (kind, rest) = line.split_at_checked(1).context("no answer")?;
    match kind {
        "+" | ":" => Ok(rest.to_owned()),
        "-" => bail!("{rest}"),
        "$" => {
            let Ok(length) = rest.parse::<usize>() else {
                return Ok(String::new());
            };
            let mut bytes = vec![0; length + 2];
            from.read_exact(&mut bytes)?;
            bytes.truncate(length);
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        "*" => {
            let count = rest.parse::<usize>().unwrap_or(0);
            let parts: Result<Vec<String>> = (0..count).map(|_| read_answer(from)).collect();
            Ok(parts?.join("\n"))
        }
        _ => bail!("an answer that is none: {line}"),
    }
}

/// A Cluster of primaries, each with as many replicas.
#[derive(Debug)]
pub struct RedisCluster {
    /// The primaries as they were made, then the replicas.
    pub nodes: Vec<RedisServer>,
}

const SLOTS: usize = 16_384;

impl RedisCluster {
    /// Starts one.
    ///
    /// # Errors
    /// When a server cannot be started or the Cluster does not come about.
    pub fn start(directory: &std::path::Path, primaries: usize, replicas: usize) -> Result<Self> {
        let arguments = [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "2000",
            "--appendonly",
            "yes",
            "--repl-diskless-sync-delay",
            "0",
        ];
        let count = primaries * (1 + replicas);
        let nodes = (0..count)
            .map(|_| RedisServer::start(directory.to_owned(), &arguments))
            .collect::<Result<Vec<_>>>()?;
        let mut cluster = Self { nodes };
        cluster.connect(primaries)?;
        Ok(cluster)
    }

    fn connect(&mut self, primaries: usize) -> Result<()> {
        let first = self.nodes.first().context("no nodes")?.port().to_string();
        for (at, node) in self.nodes.iter().enumerate() {
            // Before it knows anybody, so that nobody has to yield to anybody.
            node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()])?;
        }
        for (at, node) in self.nodes.iter().enumerate() {
            node.ask(&["CLUSTER", "MEET", "127.0.0.1", &first])?;
            if at < primaries {
                let (from, until) = (at * SLOTS / primaries, (at + 1) * SLOTS / primaries - 1);
                let range = [from.to_string(), until.to_string()];
                let [from, until] = &range;
                node.ask(&["CLUSTER", "ADDSLOTSRANGE", from, until])?;
            }
        }
        let count = self.nodes.len();
        self.wait("everybody to know everybody", |node| {
            let known = node.ask(&["CLUSTER", "NODES"]).unwrap_or_default();
            known
                .lines()
                .filter(|line| !line.contains("handshake"))
                .count()
                == count
        })?;
        for at in primaries..count {
            let (Some(primary), Some(node)) = (self.nodes.get(at % primaries), self.nodes.get(at))
            else {
                continue;
            };
            let id = primary.ask(&["CLUSTER", "MYID"])?;
            node.ask(&["CLUSTER", "REPLICATE", &id])?;
        }
        self.wait("the Cluster to be whole", |node| {
            let info = node.ask(&["CLUSTER", "INFO"]).unwrap_or_default();
            let replica = node.ask(&["INFO", "replication"]).unwrap_or_default();
            let linked =
                !replica.contains("role:slave") || replica.contains("master_link_status:up");
            info.contains("cluster_state:ok") && linked
        })
    }

    fn wait(&mut self, what: &str, done: impl Fn(&RedisServer) -> bool) -> Result<()> {
        for node in &mut self.nodes {
            node.wait(what, &done)?;
        }
        Ok(())
    }

    /// Its address as a store's.
    pub fn url(&self) -> String {
        let hosts: Vec<String> = self
            .nodes
            .iter()
            .map(|node| format!("127.0.0.1:{}", node.port()))
            .collect();
        format!("redis+cluster://{}", hosts.join(","))
    }
}

/// A primary with a replica, and three sentinels that watch them under the name `mail`.
#[derive(Debug)]
pub struct RedisSentinels {
    /// The primary as it was made, then the replica.
    pub servers: Vec<RedisServer>,
    /// The sentinels.
    pub sentinels: Vec<RedisServer>,
}

impl RedisSentinels {
    /// Starts them.
    ///
    /// # Errors
    /// When one cannot be started, or they do not find each other.
    pub fn start(directory: &std::path::Path) -> Result<Self> {
        let usual = ["--appendonly", "yes", "--repl-diskless-sync-delay", "0"];
        let primary = RedisServer::start(directory.to_owned(), &usual)?;
        let port = primary.port().to_string();
        let of_primary = ["--replicaof", &format!("127.0.0.1 {port}")];
        let mut replica =
            RedisServer::start(directory.to_owned(), &[&usual[..], &of_primary].concat())?;
        replica.wait("the replica to follow", |server| {
            let info = server.ask(&["INFO", "replication"]).unwrap_or_default();
            info.contains("master_link_status:up")
        })?;
        let mut sentinels = Vec::new();
        for number in 0..3 {
            // A sentinel rewrites its own file.
            let file = directory.join(format!("sentinel-{number}.conf"));
            std::fs::write(
                &file,
                format!(
                    "sentinel monitor mail 127.0.0.1 {port} 2\nsentinel down-after-milliseconds mail 1000\n\
                     sentinel failover-timeout mail 5000\nsentinel parallel-syncs mail 1\n"
                ),
            )?;
            sentinels.push(Self::start_sentinel(&file)?);
        }
        for sentinel in &mut sentinels {
            sentinel.wait("the sentinels to find each other", |server| {
                let info = server.ask(&["INFO", "sentinel"]).unwrap_or_default();
                info.contains("slaves=1,sentinels=3")
            })?;
        }
        Ok(Self {
            servers: vec![primary, replica],
            sentinels,
        })
    }

    fn start_sentinel(file: &std::path::Path) -> Result<RedisServer> {
        let port = free_port()?;
        let program = std::env::var(PROGRAM).unwrap_or_else(|_| "redis-server".to_owned());
        let child = Command::new(program)
            .arg(file)
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--sentinel",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("redis-server --sentinel")?;
        let mut sentinel = RedisServer {
            child: Some(child),
            port,
            directory: file.to_owned(),
            arguments: Vec::new(),
        };
        sentinel.wait("a sentinel to answer", |server| {
            server.ask(&["PING"]).is_ok_and(|answer| answer == "PONG")
        })?;
        Ok(sentinel)
    }

    /// Their address as a store's.
    pub fn url(&self) -> String {
        let hosts: Vec<String> = self
            .sentinels
            .iter()
            .map(|node| format!("127.0.0.1:{}", node.port()))
            .collect();
        format!("redis+sentinel://{}/mail", hosts.join(","))
    }
}
