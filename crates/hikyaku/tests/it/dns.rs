//! A real name server: Knot DNS, with MX, null MX and DKIM records in a zone file.

use crate::harness::{FROM_DOMAIN, Site, until};
use crate::postfix::dkim_records;
use crate::sink::Sink;
use anyhow::{Result, ensure};
use serde_json::json;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use testkit::port::free_port;

pub(crate) struct Knot {
    child: Child,
    dir: tempfile::TempDir,
    pub(crate) port: u16,
}

impl Knot {
    /// Serves `example.` from these records.
    async fn start(zone: &str) -> Result<Self> {
        Self::at(free_port()?, zone).await
    }

    /// The same on this port.
    pub(crate) async fn at(port: u16, zone: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hikyaku-knot-").tempdir()?;
        let root = dir.path().display();
        let config = dir.path().join("knot.conf");
        std::fs::write(
            &config,
            format!(
                "server:\n    rundir: {root}\n    listen: 127.0.0.1@{port}\n\
                 log:\n  - target: stderr\n    any: info\n\
                 database:\n    storage: {root}\n\
                 zone:\n  - domain: example.\n    file: {root}/example.zone\n    journal-content: none\n    zonefile-sync: -1\n"
            ),
        )?;
        let knot = Self::spawn(&config, dir, port, zone)?;
        until("Knot listening", async || {
            Ok(tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
                .then_some(()))
        })
        .await?;
        Ok(knot)
    }

    fn spawn(config: &Path, dir: tempfile::TempDir, port: u16, zone: &str) -> Result<Self> {
        let head = "$ORIGIN example.\n$TTL 60\n@ SOA ns.example. hostmaster.example. 1 60 60 600 30\n@ NS ns.example.\nns A 127.0.0.1\n";
        std::fs::write(dir.path().join("example.zone"), format!("{head}{zone}"))?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let child = Command::new("/usr/sbin/knotd")
            .arg("-c")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Self { child, dir, port })
    }
}

impl Drop for Knot {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        // The folder must outlive the process that writes into it.
        let _kept_until_here = self.dir.path();
    }
}

/// A TXT record in presentation format, in strings of at most 255 octets.
pub(crate) fn txt(name: &str, value: &str) -> String {
    let strings: Vec<String> = value
        .as_bytes()
        .chunks(200)
        .map(|chunk| format!("\"{}\"", String::from_utf8_lossy(chunk).replace(';', "\\;")))
        .collect();
    format!("{name}. TXT {}\n", strings.join(" "))
}

#[tokio::test(flavor = "multi_thread")]
async fn mail_finds_its_way_by_a_real_name_server() -> Result<()> {
    let sink = Sink::start().await?;
    let smtp_port = sink
        .address()
        .rsplit(':')
        .next()
        .unwrap_or_default()
        .to_owned();
    let dns_port = free_port()?;
    let more = format!("[dns]\nnameservers = [\"127.0.0.1:{dns_port}\"]\n");
    let site = Site::with(Site::quick_shaping(), &more)?;
    site.edit(|config| config.replace("[smtp]\n", &format!("[smtp]\nport = {smtp_port}\n")))?;
    let mut zone = String::from(
        "mx A 127.0.0.1\nwith-mx MX 10 mx\nbroken-first MX 5 nobody.example.\nbroken-first MX 10 mx\n\
         implicit A 127.0.0.1\nalias CNAME with-mx\nno-mail MX 0 .\n",
    );
    for (name, value) in dkim_records(&site)? {
        zone.write_str(&txt(&name, &value))?;
    }
    let knot = Knot::start(&zone).await?;
    site.edit(|config| {
        config.replace(
            &format!("127.0.0.1:{dns_port}"),
            &format!("127.0.0.1:{}", knot.port),
        )
    })?;

    let (status, text) = site.hikyaku(&["dkim", "check", FROM_DOMAIN])?;
    ensure!(status.success(), "{text}");

    let service = site.up().await?;
    let recipient = |domain: &str| json!({"email": format!("a@{domain}.example")});
    let id = service
        .submit(&json!({
            "from": {"email": format!("news@{FROM_DOMAIN}")}, "subject": "Way", "text": "Found.",
            "recipients": (["with-mx", "broken-first", "implicit", "alias", "no-mail", "not-there"].map(recipient)),
        }))
        .await?;
    service.completed(&id).await?;
    let rows: serde_json::Value = service
        .client
        .get(&format!("/v1/batches/{id}/recipients"))
        .await?
        .ok()?
        .json()?;
    let ends: Vec<_> = rows["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| {
            (
                row["status"].as_str(),
                row["class"].as_str(),
                row["blame"].as_str(),
            )
        })
        .collect();
    let delivered = (Some("delivered"), None, None);
    let expected = [
        delivered,
        delivered,
        delivered,
        delivered,
        (Some("failed"), Some("no_mx"), Some("recipient")),
        (Some("failed"), Some("bad_domain"), Some("recipient")),
    ];
    assert_eq!(ends, expected, "{rows}");
    Ok(())
}
