//! A Postfix of our own, as Debian ships it, for comparison: an instance in a folder, on loopback,
//! that relays everything to the sink, with opendkim where mail is signed.
//!
//! The configuration is the default but for where mail goes, and for what would slow Postfix down
//! here without being its fault: DNS for names that do not exist, and the pause of `in_flow_delay`.

use crate::process::{self, Guarded, Usage};
use crate::site::{self, Dkim, Setup};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
const POSTFIX: &str = "/usr/sbin/postfix";
const OPENDKIM: &str = "/usr/sbin/opendkim";

/// A running Postfix; stopped when this is dropped, and its folder removed.
#[derive(Debug)]
pub struct Postfix {
    // Before the folder, so that it is dead before that goes.
    opendkim: Option<Guarded>,
    address: SocketAddr,
    master: u32,
    dir: TempDir,
}

impl Postfix {
    /// Starts it, and opendkim where `setup` signs. Needs the rights of root, as Postfix does.
    ///
    /// # Errors
    /// When one of them is not installed or does not start.
    pub async fn start(setup: &Setup) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-postfix-")
            .tempdir_in(&setup.dir)
            .with_context(|| format!("cannot make a folder in {}", setup.dir.display()))?;
        let root = dir.path();
        for folder in ["etc", "queue", "data"] {
            fs::create_dir(root.join(folder))?;
        }
        // Postfix drops its rights: its users must reach the folder.
        run(Command::new("chmod").arg("755").arg(root))?;
        run(Command::new("chown").arg("postfix:").arg(root.join("data")))?;
        let milter = match setup.dkim {
            Dkim::None => None,
            Dkim::Rsa2048 => Some(site::free_port()?),
            Dkim::Both => bail!("opendkim signs with RSA alone"),
        };
        let opendkim = milter.map(|port| opendkim(root, setup, port)).transpose()?;
        let port = site::free_port()?;
        fs::write(root.join("etc/main.cf"), main_cf(root, setup, milter))?;
        fs::write(root.join("etc/master.cf"), master_cf(port))?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        run(Command::new(POSTFIX)
            .arg("-c")
            .arg(root.join("etc"))
            .arg("start"))?;
        let mut postfix = Self {
            opendkim,
            address,
            master: 0,
            dir,
        };
        postfix.master = postfix.ready(milter).await?;
        Ok(postfix)
    }

    /// Where it takes mail.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// CPU time of all its processes so far, those that have ended and opendkim included.
    ///
    /// # Errors
    /// When it is gone.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = process::family(self.master)?;
        if let Some(opendkim) = &self.opendkim {
            usage.add(&process::family(opendkim.pid())?);
        }
        Ok(usage)
    }

    /// Returns when its queue is empty.
    ///
    /// # Errors
    /// When it is not within a minute.
    pub async fn idle(&self) -> Result<()> {
        let queue = self.dir.path().join("queue");
        patiently("an empty queue", async || {
            let busy = ["maildrop", "incoming", "active", "deferred"];
            Ok(busy.iter().all(|name| is_empty(&queue.join(name))))
        })
        .await
    }

    /// The process id of `master`, once it serves.
    async fn ready(&mut self, milter: Option<u16>) -> Result<u32> {
        for port in milter.into_iter().chain([self.address.port()]) {
            let opendkim = &mut self.opendkim;
            patiently("Postfix and opendkim listening", async || {
                opendkim.as_mut().map_or(Ok(()), Guarded::check)?;
                Ok(TcpStream::connect(("127.0.0.1", port)).await.is_ok())
            })
            .await?;
        }
        let file = self.dir.path().join("queue/pid/master.pid");
        let pid = fs::read_to_string(&file).context("Postfix wrote no process id")?;
        Ok(pid.trim().parse()?)
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        let etc = self.dir.path().join("etc");
        // Already gone, perhaps: there is nobody to tell.
        run(Command::new(POSTFIX).arg("-c").arg(etc).arg("stop")).ok();
    }
}

async fn patiently(what: &str, mut so: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let reached = async {
        while !so().await? {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    };
    let waited = tokio::time::timeout(PATIENCE, reached).await;
    waited.with_context(|| format!("waited in vain for {what}"))?
}

/// No file in a folder and those below it; one that is not there has none.
fn is_empty(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else {
        return true;
    };
    entries.flatten().all(|entry| {
        let path = entry.path();
        path.is_dir() && is_empty(&path)
    })
}

fn main_cf(root: &Path, setup: &Setup, milter: Option<u16>) -> String {
    let (root, sink) = (root.display(), setup.sink);
    let milter = milter.map_or_else(String::new, |port| {
        format!("smtpd_milters = inet:127.0.0.1:{port}\nmilter_default_action = tempfail\n")
    });
    format!(
        "compatibility_level = 3.6\nqueue_directory = {root}/queue\ndata_directory = {root}/data\n\
         command_directory = /usr/sbin\ndaemon_directory = /usr/lib/postfix/sbin\n\
         maillog_file = {root}/queue/maillog\nmaillog_file_prefixes = {root}\n\
         inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nmyhostname = mta.{from}\n\
         mydestination =\nmynetworks = 127.0.0.0/8\nrelayhost = [{ip}]:{port}\n\
         smtpd_peername_lookup = no\nsmtp_dns_support_level = disabled\nin_flow_delay = 0\n{milter}",
        from = setup.from_domain,
        ip = sink.ip(),
        port = sink.port(),
    )
}

/// Debian's, with another port and without `chroot`, which would need a copy of the system.
fn master_cf(port: u16) -> String {
    format!(
        "127.0.0.1:{port} inet n - n - - smtpd\npickup unix n - n 60 1 pickup\n\
         cleanup unix n - n - 0 cleanup\nqmgr unix n - n 300 1 qmgr\n\
         rewrite unix - - n - - trivial-rewrite\nbounce unix - - n - 0 bounce\n\
         defer unix - - n - 0 bounce\ntrace unix - - n - 0 bounce\nverify unix - - n - 1 verify\n\
         flush unix n - n 1000? 0 flush\nproxymap unix - - n - - proxymap\n\
         smtp unix - - n - - smtp\nrelay unix - - n - - smtp\nerror unix - - n - - error\n\
         retry unix - - n - - error\nanvil unix - - n - 1 anvil\nscache unix - - n - 1 scache\n\
         postlog unix-dgram n - n - 1 postlogd\n"
    )
}

fn opendkim(root: &Path, setup: &Setup, port: u16) -> Result<Guarded> {
    let key = root.join("etc/key.pem");
    fs::write(
        &key,
        content::dkim::generate(content::dkim::Algorithm::Rsa2048)?,
    )?;
    run(Command::new("chmod").arg("600").arg(&key))?;
    let conf = root.join("etc/opendkim.conf");
    let text = format!(
        "Mode s\nDomain {from}\nSelector rsa2048\nKeyFile {key}\nSocket inet:{port}@127.0.0.1\n\
         Canonicalization relaxed/relaxed\nOversignHeaders From\nInternalHosts 127.0.0.0/8\n\
         Background no\nSyslog no\nRequireSafeKeys no\n",
        from = setup.from_domain,
        key = key.display(),
    );
    fs::write(&conf, text)?;
    let child = Command::new(OPENDKIM)
        .args(["-f", "-x"])
        .arg(&conf)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start opendkim")?;
    Ok(Guarded::new("opendkim", child))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {text}",
        output.status
    );
    Ok(())
}
