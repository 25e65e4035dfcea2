//! A real Postfix receives our mail; two independent verifiers accept both signatures.

use crate::harness::{FROM_DOMAIN, Site, until};
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use testkit::port::free_port;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A Postfix of our own: its queue, configuration and mailbox in one folder, no system service.
pub(crate) struct Postfix {
    dir: tempfile::TempDir,
    port: u16,
    /// What its further configuration names.
    _files: Option<tempfile::TempDir>,
}

impl Postfix {
    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// With further lines of `main.cf`, which override the earlier, and the folder that they name.
    pub(crate) async fn with(more: &str, files: Option<tempfile::TempDir>) -> Result<Self> {
        Self::make(&[], more, files).await
    }

    /// With these files in its folder and these lines of `main.cf`, in which `{root}` is that folder.
    pub(crate) async fn with_files(files: &[(&str, &str)], more: &str) -> Result<Self> {
        Self::make(files, more, None).await
    }

    async fn make(
        own: &[(&str, &str)],
        more: &str,
        files: Option<tempfile::TempDir>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-postfix-")
            .tempdir()?;
        let port = free_port()?;
        let root = dir.path();
        for folder in ["etc", "etc/sasl", "queue", "data", "mail"] {
            std::fs::create_dir(root.join(folder))?;
        }
        // Postfix drops its rights: its users must reach the folder.
        run(Command::new("chmod").arg("755").arg(root))?;
        run(Command::new("chown")
            .args(["postfix:postfix"])
            .arg(root.join("data")))?;
        run(Command::new("chown")
            .args(["nobody:nogroup"])
            .arg(root.join("mail")))?;
        for (name, text) in own {
            std::fs::write(root.join(name), text)?;
        }
        let more = more.replace("{root}", &root.display().to_string());
        let lines = last_of_each(&(main_cf(root) + &more));
        std::fs::write(root.join("etc/main.cf"), lines)?;
        std::fs::write(root.join("etc/master.cf"), master_cf(port))?;
        run(Command::new("/usr/sbin/postfix")
            .arg("-c")
            .arg(root.join("etc"))
            .arg("start"))?;
        let postfix = Self {
            dir,
            port,
            _files: files,
        };
        until("Postfix listening", async || {
            Ok(tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
                .then_some(()))
        })
        .await?;
        Ok(postfix)
    }

    /// The messages of the one mailbox, each with the envelope fields that Postfix put before it.
    fn messages(&self) -> Result<Vec<PathBuf>> {
        let new = self.dir.path().join("mail/new");
        if !new.exists() {
            return Ok(Vec::new());
        }
        Ok(std::fs::read_dir(new)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?)
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        run(Command::new("/usr/sbin/postfix")
            .arg("-c")
            .arg(self.dir.path().join("etc"))
            .arg("stop"))
        .ok();
    }
}

/// Postfix takes the last line of each parameter too, but complains of the others so often that its
/// own log blocks.
fn last_of_each(lines: &str) -> String {
    let entries = lines.lines().filter_map(|line| line.split_once(" ="));
    let last: std::collections::BTreeMap<_, _> = entries.collect();
    last.iter()
        .map(|(name, value)| format!("{name} ={value}\n"))
        .collect()
}

fn main_cf(root: &Path) -> String {
    let root = root.display();
    format!(
        "compatibility_level = 3.6\nqueue_directory = {root}/queue\ndata_directory = {root}/data\n\
         mail_owner = postfix\nsetgid_group = postdrop\ncommand_directory = /usr/sbin\ndaemon_directory = /usr/lib/postfix/sbin\n\
         inet_interfaces = 127.0.0.1\ninet_protocols = ipv4\nmyhostname = mx.test.example\nmydestination =\n\
         virtual_mailbox_domains = static:all\nvirtual_mailbox_maps = static:all\nvirtual_mailbox_base = /\n\
         virtual_transport = virtual\nvirtual_uid_maps = static:65534\nvirtual_gid_maps = static:65534\nvirtual_minimum_uid = 100\n\
         virtual_mailbox_maps = static:{mail}/\nsmtpd_recipient_restrictions = permit\nsmtpd_relay_restrictions = reject_unauth_destination\n\
         smtputf8_enable = yes\nmaillog_file = {root}/queue/maillog\nmaillog_file_prefixes = {root}\nmessage_size_limit = 0\nmailbox_size_limit = 0\nvirtual_mailbox_limit = 0\n",
        mail = Path::new(&root.to_string()).join("mail").display(),
    )
}

fn master_cf(port: u16) -> String {
    format!(
        "127.0.0.1:{port} inet n - n - - smtpd\npickup unix n - n 60 1 pickup\ncleanup unix n - n - 0 cleanup\n\
         qmgr unix n - n 300 1 qmgr\nrewrite unix - - n - - trivial-rewrite\nbounce unix - - n - 0 bounce\n\
         defer unix - - n - 0 bounce\ntrace unix - - n - 0 bounce\nverify unix - - n - 1 verify\nflush unix n - n 1000? 0 flush\n\
         proxymap unix - - n - - proxymap\nproxywrite unix - - n - 1 proxymap\nsmtp unix - - n - - smtp\nerror unix - - n - - error\n\
         retry unix - - n - - error\nvirtual unix - n n - - virtual\nanvil unix - - n - 1 anvil\nscache unix - - n - 1 scache\ntlsmgr unix - - n 1000? 1 tlsmgr\npostlog unix-dgram n - n - 1 postlogd\n"
    )
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}: {text}",
        output.status
    );
    Ok(())
}

/// The DNS records of the site's keys, as `dkim generate` names them: (name, value).
pub(crate) fn dkim_records(site: &Site) -> Result<Vec<(String, String)>> {
    let dir = site.dir.path().join("dkim-keys").join(FROM_DOMAIN);
    let mut records = Vec::new();
    for selector in ["rsa2048", "ed25519"] {
        let pem = std::fs::read_to_string(dir.join(format!("{selector}.pem")))?;
        let key = content::dkim::Key::from_pem(selector, &pem)?;
        records.push((
            format!("{selector}._domainkey.{FROM_DOMAIN}"),
            key.public_record()?,
        ));
    }
    Ok(records)
}

#[tokio::test]
async fn a_real_postfix_takes_a_batch_and_both_signatures_verify() -> Result<()> {
    takes_a_batch("", "8bit\r\n\r\nGrüße\r\n").await
}

/// DATA instead of BDAT, and content that needs no more than seven bits, or is brought down to them:
/// the same batch, and signatures that hold.
#[tokio::test]
async fn a_real_postfix_without_8bitmime_and_chunking_takes_the_same() -> Result<()> {
    let encoded = "quoted-printable\r\n\r\nGr=C3=BC=C3=9Fe\r\n";
    takes_a_batch(
        "smtpd_discard_ehlo_keywords = 8bitmime, chunking\n",
        encoded,
    )
    .await
}

/// `raw_end` is how a complete message with 8-bit bytes arrives.
async fn takes_a_batch(more: &str, raw_end: &str) -> Result<()> {
    let postfix = Postfix::with(more, None).await?;
    let site = Site::new(&format!("127.0.0.1:{}", postfix.port))?;
    let service = site.up().await?;
    let names = [
        "山田 太郎",
        "Zoë Müller",
        "Plain Name",
        "Ελένη",
        "a,\"b\" (c)",
    ];
    let recipients: Vec<_> = (0..25)
        .map(|i| json!({"email": format!("user{i}@d{}.example", i % 3), "name": names[i % names.len()], "vars": {"n": i}}))
        .collect();
    let id = service
        .submit(&json!({
            "from": {"email": format!("news@{FROM_DOMAIN}"), "name": "飛脚ニュース"}, "reply_to": format!("help@{FROM_DOMAIN}"),
            "subject": "{{ name }}さん、春のお知らせ — no. {{ n }}",
            "html": "<html><body><p>こんにちは {{ name }} &amp; friends</p>\n.\n<a href='https://shop.example/?q=1&amp;r={{ n }}'>お店</a></body></html>",
            "text": "こんにちは {{ name }}\n.\n..two dots\nFrom here on\n \n\n",
            "recipients": recipients,
        }))
        .await?;
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 25, "{batch}");
    let raw = format!(
        "From: news@{FROM_DOMAIN}\r\nTo: you@d0.example\r\nSubject: raw\r\nMIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGrüße\r\n"
    );
    let raw =
        json!({"raw": STANDARD.encode(raw), "recipients": [{"email": "user-raw@d0.example"}]});
    service.completed(&service.submit(&raw).await?).await?;

    let messages = until("26 messages in the mailbox", async || {
        Ok(Some(postfix.messages()?).filter(|m| m.len() == 26))
    })
    .await?;
    let records = dkim_records(&site)?;
    for path in &messages {
        let message = std::fs::read(path)?;
        let (envelope, message) = split_delivery_headers(&message)?;
        assert!(envelope.contains("Delivered-To: user"), "{envelope}");
        if envelope.contains("Delivered-To: user-raw@") {
            assert!(message.ends_with(raw_end.as_bytes()), "{}", path.display());
        } else {
            assert!(message.is_ascii(), "{}", path.display());
        }
        verify_with_dkimpy(&message, &records).with_context(|| path.display().to_string())?;
    }
    verify_with_opendkim(&messages, &records)?;
    let status = service.terminate().await?;
    assert!(status.success(), "{status}");
    Ok(())
}

/// The password never leaves, and Postfix with Cyrus proves that it knows it.
#[tokio::test]
async fn a_real_postfix_lets_us_in_by_scram() -> Result<()> {
    let files = tempfile::Builder::new().prefix("hikyaku-sasl-").tempdir()?;
    let root = files.path().to_owned();
    let database = root.join("sasldb2");
    let conf = format!(
        "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nsasldb_path: {}\nmech_list: SCRAM-SHA-256 PLAIN\n",
        database.display()
    );
    std::fs::write(root.join("password"), "correct horse")?;
    let make = "saslpasswd2 -p -c -f \"$1\" -u test.example brand < \"$2\" && chmod 755 \"$3\" && chmod 644 \"$1\"";
    run(Command::new("sh").args(["-c", make, "sh"]).args([
        &database,
        &root.join("password"),
        &root,
    ]))?;
    let more = "smtpd_sasl_auth_enable = yes\nsmtpd_sasl_local_domain = test.example\n\
         smtpd_recipient_restrictions = permit_sasl_authenticated, reject\n";
    let own = [("etc/sasl/smtpd.conf", conf.as_str())];
    let postfix = Postfix::make(&own, more, Some(files)).await?;
    let smarthost = format!(
        "[[smtp.smarthosts]]\nhost = \"127.0.0.1\"\nport = {}\nusername = \"brand\"\npassword_file = {:?}\ntls = \"none\"\n",
        postfix.port,
        root.join("password")
    );
    let shaping = format!(
        "{}[mx]\n\"*\" = \"127.0.0.1:{}\"\n",
        Site::quick_shaping(),
        postfix.port
    );
    let site = Site::with(&shaping, &smarthost)?;
    let service = site.up().await?;
    let recipients: Vec<_> = (0..20)
        .map(|i| json!({"email": format!("user{i}@d0.example")}))
        .collect();
    let id = service
        .submit(&json!({
            "from": {"email": format!("news@{FROM_DOMAIN}")}, "subject": "Hello", "text": "Hello",
            "recipients": recipients,
        }))
        .await?;
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 20, "{batch}");
    let log = std::fs::read_to_string(postfix.dir.path().join("queue/maillog"))?;
    assert!(
        log.contains("sasl_method=SCRAM-SHA-256, sasl_username=brand@test.example"),
        "{log}"
    );
    assert!(!log.contains("sasl_method=PLAIN"), "{log}");
    Ok(())
}

/// What a forger would like to have taken for the end of a message, and for the next one.
const SMUGGLED: &str = "MAIL FROM:<evil@brand.example>{end}RCPT TO:<victim@d0.example>{end}\
     DATA{end}Subject: smuggled{end}{end}x{end}.{end}";

#[tokio::test]
async fn a_postfix_that_takes_a_bare_newline_sees_one_message_where_we_sent_one() -> Result<()> {
    // As it was before the world knew of SMTP smuggling (CVE-2023-51764).
    let postfix = Postfix::with(
        "smtpd_forbid_bare_newline = no\nsmtpd_forbid_unauth_pipelining = no\n",
        None,
    )
    .await?;
    // It does fall for it: one message is sent, two arrive.
    let forged = format!(
        "EHLO x\r\nMAIL FROM:<a@brand.example>\r\nRCPT TO:<control@d0.example>\r\nDATA\r\n\
         Subject: control\r\n\r\nx\n.\n{}\r\n.\r\nQUIT\r\n",
        SMUGGLED.replace("{end}", "\r\n")
    );
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", postfix.port)).await?;
    stream.write_all(forged.as_bytes()).await?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await?;
    until("two messages of one", async || {
        Ok((postfix.messages()?.len() == 2).then_some(()))
    })
    .await
    .context(said)?;

    let site = Site::new(&format!("127.0.0.1:{}", postfix.port))?;
    let service = site.up().await?;
    let ends = ["\n", "\r", "\r\n", "\n\r", "\r\r\n"];
    let recipients: Vec<_> = (0..10)
        .map(|i| {
            let end = ends[i % ends.len()];
            let evil = format!("x{end}.{end}{}", SMUGGLED.replace("{end}", end));
            let name = if i < ends.len() {
                evil.as_str()
            } else {
                "Plain"
            };
            json!({"email": format!("user{i}@d0.example"), "name": name, "vars": {"evil": evil}})
        })
        .collect();
    let evil: String = ends
        .iter()
        .map(|end| format!("x{end}.{end}{}", SMUGGLED.replace("{end}", end)))
        .collect();
    let id = service
        .submit(&json!({
            "from": {"email": format!("news@{FROM_DOMAIN}")},
            "subject": "Hello {{ evil }}",
            "html": format!("<html><body><p>{evil}{{{{ evil }}}}</p></body></html>"),
            "text": format!("{evil}{{{{ evil }}}}"),
            "headers": {"X-Evil": "{{ evil }}"},
            "recipients": recipients,
        }))
        .await?;
    let batch = service.completed(&id).await?;
    let delivered = batch["counters"]["delivered"].as_u64().context("a count")?;
    assert!(delivered >= 5, "{batch}");
    let messages = until("every message in the mailbox", async || {
        Ok(Some(postfix.messages()?).filter(|m| m.len() as u64 >= 2 + delivered))
    })
    .await?;
    assert_eq!(messages.len() as u64, 2 + delivered);
    let mut victims = 0;
    for path in &messages {
        let text = String::from_utf8_lossy(&std::fs::read(path)?).into_owned();
        victims += u32::from(text.contains("Delivered-To: victim@d0.example"));
    }
    assert_eq!(victims, 1, "but for our control, nothing was smuggled");
    service.terminate().await?;
    Ok(())
}

/// Postfix prepends `Return-Path`, `X-Original-To`, `Delivered-To` and `Received`; DKIM does not
/// mind, but the message has LF line ends in a maildir: back to CRLF.
fn split_delivery_headers(file: &[u8]) -> Result<(String, Vec<u8>)> {
    let text = String::from_utf8(file.to_vec())?.replace('\n', "\r\n");
    let start = text.find("DKIM-Signature:").context("no DKIM-Signature")?;
    let (envelope, message) = text.split_at(start);
    Ok((envelope.to_owned(), message.as_bytes().to_vec()))
}

const DKIMPY: &str = r#"
import json, sys, dkim
records, message = json.loads(sys.argv[1]), sys.stdin.buffer.read()
lookup = lambda name, timeout=5: records[name.decode().rstrip('.')].encode()
verifier = dkim.DKIM(message)
count = sum(1 for name, _ in verifier.headers if name.lower() == b'dkim-signature')
assert count == len(records), f'{count} signatures'
for index in range(count):
    assert verifier.verify(idx=index, dnsfunc=lookup), f'signature {index}'
"#;

fn verify_with_dkimpy(message: &[u8], records: &[(String, String)]) -> Result<()> {
    let records: serde_json::Map<_, _> = records
        .iter()
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("message");
    std::fs::write(&path, message)?;
    run_with_input(
        Command::new("/usr/bin/python3")
            .arg("-c")
            .arg(DKIMPY)
            .arg(serde_json::Value::Object(records).to_string()),
        &path,
    )
}

fn run_with_input(command: &mut Command, input: &Path) -> Result<()> {
    let output = command.stdin(std::fs::File::open(input)?).output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
    );
    Ok(())
}

/// opendkim in its test mode, with the keys from a file in place of DNS. It says what it found in
/// an Authentication-Results field, one result per signature.
fn verify_with_opendkim(messages: &[PathBuf], records: &[(String, String)]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let keys = dir.path().join("keys");
    let lines: String = records
        .iter()
        .map(|(name, value)| format!("{name} {value}\n"))
        .collect();
    std::fs::write(&keys, lines)?;
    let config = dir.path().join("opendkim.conf");
    std::fs::write(
        &config,
        format!(
            "Mode v\nTestPublicKeys {}\nAuthservID test\nAlwaysAddARHeader yes\nSyslog no\n",
            keys.display()
        ),
    )?;
    for (at, path) in messages.iter().enumerate() {
        let (_, message) = split_delivery_headers(&std::fs::read(path)?)?;
        let file = dir.path().join(format!("message-{at}"));
        std::fs::write(&file, message)?;
        let output = Command::new("/usr/sbin/opendkim")
            .arg("-x")
            .arg(&config)
            .arg("-vvv")
            .arg("-t")
            .arg(&file)
            .output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "{}: {text}", output.status);
        ensure!(text.matches("dkim=pass").count() == records.len(), "{text}");
    }
    Ok(())
}
