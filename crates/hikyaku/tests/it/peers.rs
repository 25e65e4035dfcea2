//! Real mail servers in front of the real service: Exim, OpenSMTPD and Postfix, each in plaintext
//! and with TLS, each with greylisting, unknown users, a size limit and a limit per connection.
//!
//! Their packages exclude one another, so two of them are only unpacked (`tests/unpack-peers.sh`)
//! and run in a mount namespace of their own, where the users and folders exist that they insist
//! on. What they say is also what the samples of `bounce-rules.toml` call captured.

use crate::harness::{FROM_DOMAIN, Service, Site, until};
use crate::postfix::Postfix;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use testkit::port::free_port;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// What the peers take at most, in bytes.
const SIZE_MAX: usize = 60_000;
/// Messages that the peers take on one connection.
const PER_CONNECTION: usize = 5;

/// A server of our own in one folder; killed when dropped.
struct Peer {
    dir: tempfile::TempDir,
    port: u16,
    child: Child,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both daemons end their children when they are asked to end.
        let asked = crate::harness::signal(self.child.id(), "TERM");
        let start = std::time::Instant::now();
        while asked.is_ok() && start.elapsed() < Duration::from_secs(5) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Peer {
    /// Starts `command` as root of a mount namespace in which the packages' users exist.
    /// `mounts` are shell commands that prepare it.
    async fn start(
        dir: tempfile::TempDir,
        port: u16,
        mounts: &str,
        command: &[&str],
    ) -> Result<Self> {
        let root = dir.path();
        let users = ["Debian-exim", "opensmtpd", "opensmtpq"];
        for (file, more) in [
            ("passwd", "::/nonexistent:/usr/sbin/nologin"),
            ("group", ""),
        ] {
            let mut text = std::fs::read_to_string(Path::new("/etc").join(file))?;
            for (id, user) in (64_901..).zip(users) {
                let id = match file {
                    "passwd" => format!("{id}:{id}"),
                    _ => id.to_string(),
                };
                text.push_str(&format!("{user}:x:{id}:{more}\n").replace(":::/", "::/"));
            }
            std::fs::write(root.join(file), text)?;
        }
        let script = format!(
            "mount --bind {root}/passwd /etc/passwd && mount --bind {root}/group /etc/group && {mounts} exec \"$@\"",
            root = root.display()
        );
        let log = std::fs::File::create(root.join("log"))?;
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-c", &script, "sh"])
            .args(command)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("unshare")?;
        let mut peer = Self { dir, port, child };
        let listening = until("a peer listening", async || {
            if let Some(status) = peer.child.try_wait()? {
                return Ok(Some(Err(status)));
            }
            Ok(TcpStream::connect(("127.0.0.1", port))
                .await
                .ok()
                .map(|_| Ok(())))
        });
        let listening = listening.await?;
        ensure!(listening.is_ok(), "{listening:?}: {}", peer.log());
        Ok(peer)
    }

    fn log(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name));
        ["log", "mainlog", "paniclog"]
            .map(|name| read(name).unwrap_or_default())
            .concat()
    }
}

/// A folder that a server which drops its rights can reach, with a mail folder of nobody's and,
/// for TLS, a certificate.
fn folder(name: &str, tls: bool) -> Result<tempfile::TempDir> {
    let prefix = format!("hikyaku-{name}-");
    let dir = tempfile::Builder::new().prefix(&prefix).tempdir()?;
    let run = |program: &str, words: &[&str]| -> Result<()> {
        let status = Command::new(program).args(words).arg(dir.path()).status()?;
        ensure!(status.success(), "{program}: {status}");
        Ok(())
    };
    for folder in ["mail", "spool", "grey"] {
        std::fs::create_dir(dir.path().join(folder))?;
    }
    if tls {
        make_certificate(dir.path())?;
    }
    run("chown", &["-R", "nobody:nogroup"])?;
    run("chmod", &["755"])?;
    if tls {
        let status = Command::new("chmod")
            .arg("600")
            .arg(dir.path().join("key.pem"))
            .status()?;
        ensure!(status.success(), "chmod: {status}");
    }
    Ok(dir)
}

/// An RSA key and a certificate for it.
fn make_certificate(dir: &Path) -> Result<()> {
    let output = Command::new("/usr/bin/openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=mx.test.example", "-keyout"])
        .arg(dir.join("key.pem"))
        .arg("-out")
        .arg(dir.join("cert.pem"))
        .output()?;
    ensure!(output.status.success(), "openssl: {output:?}");
    Ok(())
}

/// The unpacked package `name`, unpacked now when nobody has.
fn package(name: &str, file: &str) -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = manifest.join("../../target/test-peers").join(name);
    if !root.join(file).exists() {
        let status = Command::new(manifest.join("tests/unpack-peers.sh")).status()?;
        ensure!(status.success(), "unpack-peers.sh: {status}");
    }
    root.canonicalize()
        .with_context(|| format!("{name}: run ./test.sh"))
}

// ---- Exim ---------------------------------------------------------------------------------------

async fn exim(tls: bool) -> Result<Peer> {
    let dir = folder("exim", tls)?;
    let port = free_port()?;
    let program = package("exim4-daemon-light", "usr/sbin/exim4")?.join("usr/sbin/exim4");
    let config = dir.path().join("exim.conf");
    let lines = exim_conf(dir.path(), port, tls);
    let itself = format!("exim_path = {}\n", program.display());
    std::fs::write(&config, itself + &lines)?;
    let (program, config) = (program.display().to_string(), config.display().to_string());
    Peer::start(dir, port, "", &[&program, "-C", &config, "-bdf"]).await
}

fn exim_conf(root: &Path, port: u16, tls: bool) -> String {
    let root = root.display();
    let tls = if tls {
        format!(
            "tls_advertise_hosts = *\ntls_certificate = {root}/cert.pem\ntls_privatekey = {root}/key.pem\n"
        )
    } else {
        "tls_advertise_hosts =\n".to_owned()
    };
    format!(
        r#"primary_hostname = mx.test.example
daemon_smtp_ports = {port}
local_interfaces = 127.0.0.1
spool_directory = {root}/spool
log_file_path = {root}/%slog
pid_file_path = {root}/pid
exim_user = nobody
exim_group = nogroup
never_users =
deliver_drop_privilege = true
host_lookup =
rfc1413_query_timeout = 0s
keep_environment =
message_size_limit = {SIZE_MAX}
smtp_accept_max_per_connection = {PER_CONNECTION}
smtp_accept_max_per_host = 2
acl_smtp_rcpt = acl_rcpt
acl_smtp_data = acl_data
{tls}
begin acl
acl_rcpt:
  # Greylisting as its own wiki shows it, with a file in place of a database.
  defer local_parts = grey
        condition = ${{if !exists{{{root}/grey/seen}}}}
        set acl_m0 = ${{run{{/usr/bin/touch {root}/grey/seen}}}}
        message = greylisted, please try again later
  require message = relay not permitted
          domains = x.example
  require verify = recipient
  accept
acl_data:
  accept
begin routers
known:
  driver = accept
  domains = x.example
  local_parts = grey : big : ^user[0-9]+\$
  transport = maildir
begin transports
maildir:
  driver = appendfile
  maildir_format
  directory = {root}/mail
  user = nobody
"#
    )
}

// ---- OpenSMTPD ----------------------------------------------------------------------------------

async fn opensmtpd(tls: bool) -> Result<Peer> {
    let dir = folder("opensmtpd", tls)?;
    let port = free_port()?;
    let root = dir.path().display().to_string();
    let config = dir.path().join("smtpd.conf");
    std::fs::write(&config, opensmtpd_conf(&root, port, tls))?;
    std::fs::write(dir.path().join("grey.py"), GREY_FILTER)?;
    let users: String = (0..20).map(|n| format!("user{n} nobody\n")).collect();
    std::fs::write(
        dir.path().join("users"),
        format!("{users}grey nobody\nbig nobody\n"),
    )?;
    // It insists on who owns what it reads.
    for file in ["smtpd.conf", "users", "grey.py", "key.pem", "cert.pem"] {
        let file = dir.path().join(file);
        if file.exists() {
            let status = Command::new("chown").arg("root:root").arg(&file).status()?;
            ensure!(status.success(), "chown {}: {status}", file.display());
        }
    }
    let package = package("opensmtpd", "usr/sbin/smtpd")?;
    let mounts = format!(
        "mount -t tmpfs none /run && mount -t tmpfs none /var/spool && mkdir -m 711 /var/spool/smtpd && \
         mount -t tmpfs none /var/lib && mkdir -p /var/lib/opensmtpd/empty && \
         mount --bind {}/usr/libexec /usr/libexec &&",
        package.display()
    );
    let program = package.join("usr/sbin/smtpd").display().to_string();
    let config = config.display().to_string();
    Peer::start(dir, port, &mounts, &[&program, "-d", "-f", &config]).await
}

fn opensmtpd_conf(root: &str, port: u16, tls: bool) -> String {
    let (pki, tls) = if tls {
        let pki = format!(
            "pki mx.test.example cert \"{root}/cert.pem\"\npki mx.test.example key \"{root}/key.pem\"\n"
        );
        (pki, "tls pki mx.test.example")
    } else {
        (String::new(), "")
    };
    format!(
        "{pki}table users file:{root}/users\n\
         filter grey proc-exec \"/usr/bin/python3 {root}/grey.py\"\n\
         smtp max-message-size {SIZE_MAX}\nsmtp limit max-mails {PER_CONNECTION}\n\
         listen on 127.0.0.1 port {port} {tls} hostname mx.test.example filter grey\n\
         action keep maildir \"{root}/mail\" virtual <users>\n\
         match from any for domain x.example action keep\n"
    )
}

/// A filter process of OpenSMTPD (smtpd-filters(7)): the first RCPT for `grey` is put off.
const GREY_FILTER: &str = r#"
import sys
seen = False
for line in sys.stdin:
    field = line.rstrip('\n').split('|')
    if field[:2] == ['config', 'ready']:
        print('register|filter|smtp-in|rcpt-to\nregister|ready', flush=True)
    elif field[0] == 'filter' and field[4] == 'rcpt-to':
        session, token, put_off = field[5], field[6], field[7].startswith('grey@') and not seen
        seen = seen or put_off
        answer = 'reject|451 4.7.1 Greylisted, please try again later' if put_off else 'proceed'
        print(f'filter-result|{session}|{token}|{answer}', flush=True)
"#;

// ---- Postfix ------------------------------------------------------------------------------------

/// A policy service (postfix.org/SMTPD_POLICY_README.html) that greylists the first RCPT for
/// `grey`, in the words of Postgrey.
async fn greylisting_policy() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let seen = Arc::new(AtomicBool::new(false));
    tokio::spawn(async move {
        // Each process of Postfix keeps its connection.
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer_policy(stream, Arc::clone(&seen)));
        }
    });
    Ok(port)
}

async fn answer_policy(stream: TcpStream, seen: Arc<AtomicBool>) {
    let (from, mut to) = stream.into_split();
    let mut lines = BufReader::new(from.take(1 << 20)).lines();
    let mut is_grey = false;
    while let Ok(Some(line)) = lines.next_line().await {
        is_grey |= line.starts_with("recipient=grey@");
        if !line.is_empty() {
            continue;
        }
        let put_off = std::mem::take(&mut is_grey) && !seen.swap(true, Ordering::Relaxed);
        let action = if put_off {
            "action=defer_if_permit Greylisted, see http://postgrey.schweikert.ch/help/x.example.html\n\n"
        } else {
            "action=DUNNO\n\n"
        };
        if to.write_all(action.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// With the folder of everybody's mail.
async fn postfix(tls: bool) -> Result<(Postfix, PathBuf)> {
    let policy = greylisting_policy().await?;
    let dir = folder("postfix-files", tls)?;
    let root = dir.path().display();
    let users = (0..20).map(|n| format!("user{n}"));
    let users: Vec<_> = users
        .chain(["grey".to_owned(), "big".to_owned()])
        .map(|user| format!("{user}@x.example={root}/mail/"))
        .collect();
    let tls = if tls {
        format!(
            "smtpd_tls_security_level = may\nsmtpd_tls_cert_file = {root}/cert.pem\nsmtpd_tls_key_file = {root}/key.pem\n"
        )
    } else {
        String::new()
    };
    let more = format!(
        "virtual_mailbox_domains = x.example\nvirtual_mailbox_maps = inline:{{ {users} }}\n\
         message_size_limit = {SIZE_MAX}\nsmtpd_client_message_rate_limit = {PER_CONNECTION}\n\
         anvil_rate_time_unit = 1s\nsmtpd_client_event_limit_exceptions =\n\
         smtpd_recipient_restrictions = reject_unauth_destination, reject_unlisted_recipient, check_policy_service inet:127.0.0.1:{policy}\n\
         {tls}",
        users = users.join(", ")
    );
    let mail = dir.path().join("mail");
    Ok((Postfix::with(&more, Some(dir)).await?, mail))
}

// ---- what each of them must see -----------------------------------------------------------------

/// What a peer is expected to say, by the rule that reads it.
struct Expected {
    greylisted: &'static str,
    unknown: &'static str,
    tls: Tls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Absent,
    Works,
    /// Offered, but the handshake may fail on their side: plaintext then, on a new connection.
    MayFail,
}

async fn receives(port: u16, mail: &Path, expected: &Expected) -> Result<()> {
    let site = Site::new(&format!("127.0.0.1:{port}"))?;
    let service = site.up().await?;
    let known = 12;
    let recipients: Vec<_> = (0..known)
        .map(|n| format!("user{n}@x.example"))
        .chain(["nobody@x.example".to_owned(), "grey@x.example".to_owned()])
        .map(|email| json!({ "email": email }))
        .collect();
    let id = service.submit(&batch("Hello", &recipients)).await?;
    let huge = "A line of text that fills a message.\n".repeat(SIZE_MAX / 30);
    let too_large = service
        .submit(&batch(&huge, &[json!({"email": "big@x.example"})]))
        .await?;

    let done = service.completed(&id).await?;
    let counters = (&done["counters"]["delivered"], &done["counters"]["bounce"]);
    assert_eq!(counters, (&json!(known + 1), &json!(1)), "{done}");
    let unknown = story(&service, &id, known).await?;
    // Before it they may have been put off for the limit.
    let attempts = unknown["timeline"].as_array();
    let attempt = attempts.and_then(|all| all.last()).context("an attempt")?;
    assert_eq!(attempt["class"], "invalid_mailbox", "{unknown}");
    assert_eq!(attempt["rule"], expected.unknown, "{unknown}");
    assert_eq!(
        attempt["rules_version"].as_str().map(str::len),
        Some(16),
        "{unknown}"
    );
    let grey = story(&service, &id, known + 1).await?;
    let attempts = grey["timeline"].as_array().context("timeline")?;
    let put_off = attempts.iter().find(|one| one["class"] == "greylisted");
    let rule = put_off.map(|one| &one["rule"]);
    assert_eq!(rule, Some(&json!(expected.greylisted)), "{grey}");
    let last = attempts.last().context("an attempt")?;
    assert_eq!(last["status"], "delivered", "{grey}");
    let encrypted = last["tls"]
        .as_str()
        .is_some_and(|tls| tls.starts_with("TLS"));
    let log = service.log();
    match expected.tls {
        Tls::Absent => assert!(!encrypted, "{grey}"),
        Tls::Works => assert!(encrypted, "{grey}\n{log}"),
        Tls::MayFail => assert!(
            encrypted || log.contains("going on in plaintext"),
            "{grey}\n{log}"
        ),
    }

    service.completed(&too_large).await?;
    let big = story(&service, &too_large, 0).await?;
    assert_eq!(
        (&big["status"], &big["class"]),
        (&json!("failed"), &json!("too_large")),
        "{big}"
    );
    until("all messages in the mailbox", async || {
        let new = mail.join("new");
        let count = if new.exists() {
            std::fs::read_dir(new)?.count()
        } else {
            0
        };
        Ok((count == known + 1).then_some(()))
    })
    .await?;
    let status = service.terminate().await?;
    assert!(status.success(), "{status}");
    Ok(())
}

fn batch(text: &str, recipients: &[Value]) -> Value {
    json!({
        "from": {"email": format!("news@{FROM_DOMAIN}"), "name": "Brand"},
        "subject": "Hello", "text": text, "recipients": recipients,
    })
}

async fn story(service: &Service, batch: &str, index: usize) -> Result<Value> {
    let message = format!("/v1/messages/{batch}.{index}");
    service.client.get(&message).await?.ok()?.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_exim_takes_a_batch() -> Result<()> {
    for tls in [false, true] {
        let peer = exim(tls).await?;
        let expected = Expected {
            greylisted: "greylisted",
            unknown: "exim-no-such-user",
            tls: if tls { Tls::Works } else { Tls::Absent },
        };
        let seen = receives(peer.port, &peer.dir.path().join("mail"), &expected).await;
        seen.with_context(|| peer.log())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_opensmtpd_takes_a_batch() -> Result<()> {
    for tls in [false, true] {
        let peer = opensmtpd(tls).await?;
        let expected = Expected {
            greylisted: "greylisted",
            unknown: "opensmtpd-no-such-user",
            // That of Debian 12 cannot sign with OpenSSL 3: "EVP lib".
            tls: if tls { Tls::MayFail } else { Tls::Absent },
        };
        let seen = receives(peer.port, &peer.dir.path().join("mail"), &expected).await;
        seen.with_context(|| peer.log())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_postfix_with_limits_takes_a_batch() -> Result<()> {
    for tls in [false, true] {
        let (peer, mail) = postfix(tls).await?;
        let expected = Expected {
            greylisted: "greylisted",
            unknown: "postfix-no-such-user",
            tls: if tls { Tls::Works } else { Tls::Absent },
        };
        receives(peer.port(), &mail, &expected).await?;
    }
    Ok(())
}
