//! DANE from end to end: a zone that Knot signs, Unbound that validates it, a Postfix with a
//! certificate that TLSA records match, or do not.

use crate::harness::{FROM_DOMAIN, Site, until};
use crate::postfix::Postfix;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use testkit::port::free_port;
use testkit::tls::SelfSigned;

/// A name server process with its folder; killed when dropped.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl Server {
    async fn start(
        program: &str,
        arguments: &[&str],
        dir: tempfile::TempDir,
        port: u16,
    ) -> Result<Self> {
        let log = std::fs::File::create(dir.path().join("log"))?;
        let child = Command::new(program)
            .args(arguments)
            .arg("-c")
            .arg(dir.path().join("conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let server = Self { child, dir, port };
        until(&format!("{program} listening"), async || {
            Ok(tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
                .then_some(()))
        })
        .await
        .with_context(|| {
            std::fs::read_to_string(server.dir.path().join("log")).unwrap_or_default()
        })?;
        Ok(server)
    }

    /// Knot with `example.`, which it signs, and two zones below it which nobody signs.
    async fn knot(records: &str, below: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hikyaku-knot-").tempdir()?;
        let (port, root) = (free_port()?, dir.path().display().to_string());
        let zone = |name: &str, more: &str| {
            format!(
                "  - domain: {name}\n    file: {root}/{name}zone\n    journal-content: none\n    zonefile-sync: -1\n{more}"
            )
        };
        let signed = "    dnssec-signing: on\n";
        let zones = [
            zone("example.", signed),
            zone("unsigned.example.", ""),
            zone("bogus.example.", ""),
        ];
        let config = format!(
            "server:\n    rundir: {root}\n    listen: 127.0.0.1@{port}\nlog:\n  - target: stderr\n    any: info\n\
             database:\n    storage: {root}\nzone:\n{}",
            zones.concat()
        );
        std::fs::write(dir.path().join("conf"), config)?;
        let head =
            "$TTL 60\n@ SOA ns.example. hostmaster.example. 1 60 60 600 30\n@ NS ns.example.\n";
        std::fs::write(
            dir.path().join("example.zone"),
            format!("{head}ns A 127.0.0.1\n{records}"),
        )?;
        for name in ["unsigned", "bogus"] {
            std::fs::write(
                dir.path().join(format!("{name}.example.zone")),
                format!("{head}{below}"),
            )?;
        }
        Self::start("/usr/sbin/knotd", &[], dir, port).await
    }

    /// The DS records of the zone that it signs.
    async fn anchors(&self) -> Result<Vec<String>> {
        until("keys", async || {
            let output = Command::new("/usr/sbin/keymgr")
                .arg("-c")
                .arg(self.dir.path().join("conf"))
                .args(["example.", "ds"])
                .output()?;
            let text = String::from_utf8(output.stdout)?;
            let lines: Vec<_> = text
                .lines()
                .filter(|line| line.contains(" DS "))
                .map(str::to_owned)
                .collect();
            Ok((!lines.is_empty()).then_some(lines))
        })
        .await
    }

    /// Unbound that knows the way to Knot and trusts its key.
    async fn unbound(knot: &Self) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-unbound-")
            .tempdir()?;
        let port = free_port()?;
        let anchors: String = knot
            .anchors()
            .await?
            .iter()
            .map(|anchor| format!("    trust-anchor: \"{anchor}\"\n"))
            .collect();
        let config = format!(
            "server:\n    interface: 127.0.0.1@{port}\n    do-not-query-localhost: no\n    chroot: \"\"\n    username: \"\"\n\
             \x20   pidfile: \"\"\n    use-syslog: no\n    directory: {:?}\n    module-config: \"validator iterator\"\n    num-threads: 1\n\
             {anchors}stub-zone:\n    name: \"example.\"\n    stub-addr: 127.0.0.1@{}\nremote-control:\n    control-enable: no\n",
            dir.path(),
            knot.port,
        );
        std::fs::write(dir.path().join("conf"), config)?;
        Self::start("/usr/sbin/unbound", &["-d", "-p"], dir, port).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone, or about to be.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The zone: each domain has an MX host of its own, all of them the same Postfix.
fn records(port: u16, certificate: &[u8]) -> String {
    let (good, bad) = (hex(certificate), hex(&[7; 32]));
    let host = |name: &str| format!("{name} MX 10 mx.{name}\nmx.{name} A 127.0.0.1\n");
    let tlsa = |name: &str, matching: u8, data: &str| {
        format!("_{port}._tcp.mx.{name} TLSA 3 0 {matching} {data}\n")
    };
    [
        host("match"),
        tlsa("match", 0, &good),
        host("differ"),
        tlsa("differ", 1, &bad),
        host("none"),
        // The MX host is an alias; the record stands where it leads to.
        "alias MX 10 mx.alias\nmx.alias CNAME mx.match\n".to_owned(),
        "unsigned NS ns\nbogus NS ns\n".to_owned(),
        format!("bogus DS 4711 13 2 {bad}\n"),
    ]
    .concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn tlsa_records_of_a_signed_zone_decide_and_those_of_others_do_not() -> Result<()> {
    let own = SelfSigned::new(&["postfix.example"])?;
    let files = [("cert.pem", own.pem()), ("key.pem", own.key_pem())];
    let lines = "smtpd_tls_security_level = may\nsmtpd_tls_cert_file = {root}/cert.pem\nsmtpd_tls_key_file = {root}/key.pem\nsmtpd_tls_loglevel = 1\n";
    let postfix = Postfix::with_files(&files, lines).await?;
    let below = format!(
        "@ MX 10 mx\nmx A 127.0.0.1\n_{}._tcp.mx TLSA 3 0 1 {}\n",
        postfix.port(),
        hex(&[7; 32])
    );
    let knot = Server::knot(&records(postfix.port(), own.certificate()), &below).await?;
    let unbound = Server::unbound(&knot).await?;
    let more = format!(
        "[dns]\nnameservers = [\"127.0.0.1:{}\"]\ndane_test = \"example\"\n",
        unbound.port
    );
    let shaping = Site::quick_shaping().replace("1s", "1h");
    let site = Site::with(&shaping, &more)?;
    site.edit(|config| {
        config.replace("[smtp]\n", &format!("[smtp]\nport = {}\n", postfix.port()))
    })?;
    let service = site.up().await?;
    let names = ["match", "differ", "none", "alias", "unsigned", "bogus"];
    let recipients = names.map(|name| json!({"email": format!("a@{name}.example")}));
    let id = service
        .submit(&json!({
            "from": {"email": format!("news@{FROM_DOMAIN}")}, "subject": "Signed", "text": "Found.", "recipients": recipients,
        }))
        .await?;
    until("first attempts", async || {
        Ok((service.batch(&id).await?["counters"]["queued"] == 0).then_some(()))
    })
    .await
    .with_context(|| service.log())?;
    let rows: Value = service
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
                row["status"].as_str().unwrap_or_default(),
                row["class"].as_str(),
            )
        })
        .collect();
    let sent = ("delivered", None);
    let expected = [
        sent,
        ("temporary_error", Some("tls_failure")),
        sent,
        sent,
        sent,
        ("temporary_error", Some("dns_failure")),
    ];
    assert_eq!(ends, expected, "{rows}\n{}", service.log());
    for (index, how) in [
        (0, "DANE"),
        (2, "any certificate"),
        (3, "DANE"),
        (4, "any certificate"),
    ] {
        let story: Value = service
            .client
            .get(&format!("/v1/messages/{id}.{index}"))
            .await?
            .ok()?
            .json()?;
        let tls = story["timeline"][0]["tls"].as_str().unwrap_or_default();
        ensure!(
            tls.starts_with("TLSv1_3 ") && tls.ends_with(how),
            "{index}: {tls}"
        );
    }
    let metrics = service.client.get("/metrics").await?.ok()?.text();
    for line in [
        "hikyaku_dane_available 1",
        "hikyaku_tls_total{result=\"dane\"} 2",
    ] {
        ensure!(
            metrics.lines().any(|have| have == line),
            "{line} is not in\n{metrics}"
        );
    }
    let _folders: [&Path; 2] = [knot.dir.path(), unbound.dir.path()];
    Ok(())
}
