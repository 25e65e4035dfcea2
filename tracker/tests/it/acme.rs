//! Certificates from a real ACME server: Let's Encrypt's Pebble (Debian package `pebble`).

use crate::client::{connect, http1_on, leaf, trusting, trusting_anybody};
use crate::harness::{Place, ask, until};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use testkit::dns::{DnsServer, Zone};
use testkit::port::free_port;
use testkit::tls::Issuer;

const HOST: &str = "links.brand.example";

/// A running Pebble; ended when dropped.
struct Pebble {
    process: Child,
    dir: tempfile::TempDir,
    port: u16,
    management: u16,
    issuer: Issuer,
}

impl Pebble {
    /// Whose certificates last so many seconds, and who looks for hosts at this port and at the
    /// addresses that `dns` tells.
    fn start(http_port: u16, dns: SocketAddr, seconds: u32) -> Result<Self> {
        let (port, management) = (free_port()?, free_port()?);
        let dir = tempfile::tempdir()?;
        let issuer = Issuer::new("who signs for the authority's own server")?;
        let own = issuer.issue(&["127.0.0.1"])?;
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("ca.pem"), issuer.pem())?;
        std::fs::write(path("own.pem"), own.chain_pem())?;
        std::fs::write(path("own.key"), own.key_pem())?;
        let config = serde_json::json!({"pebble": {
            "listenAddress": format!("127.0.0.1:{port}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": path("own.pem"), "privateKey": path("own.key"),
            "httpPort": http_port, "tlsPort": http_port, "ocspResponderURL": "",
            "externalAccountBindingRequired": false, "certificateValidityPeriod": seconds,
        }});
        std::fs::write(path("pebble.json"), config.to_string())?;
        let process = Command::new("pebble")
            .arg("-config")
            .arg(path("pebble.json"))
            .args(["-dnsserver", &dns.to_string()])
            // Without waiting at random; it still refuses one good nonce in twenty, as it may.
            .env("PEBBLE_VA_NOSLEEP", "1")
            .env("PEBBLE_AUTHZREUSE", "0")
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(path("log"))?)
            .stderr(Stdio::null())
            .spawn()
            .context("pebble (test.sh installs it)")?;
        Ok(Self {
            process,
            dir,
            port,
            management,
            issuer,
        })
    }

    /// The root that its certificates lead to, once it is up.
    async fn root(&self) -> CertificateDer<'static> {
        let client = trusting(self.issuer.certificate(), &[]);
        let addr = SocketAddr::from(([127, 0, 0, 1], self.management));
        let mut root = None;
        let asked = async || {
            let stream = connect(addr, "127.0.0.1", &client).await?;
            let request = Request::get("/roots/0").header("host", "127.0.0.1");
            http1_on(stream, request.body(Full::<Bytes>::default())?).await
        };
        while root.is_none() {
            root = match asked().await {
                Ok(answer) => Some(CertificateDer::from_pem_slice(answer.body())),
                Err(_) => {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    None
                }
            };
        }
        root.and_then(Result::ok).expect("a certificate in PEM")
    }
}

impl Drop for Pebble {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_fetched_kept_and_fetched_again() -> Result<()> {
    let dns = DnsServer::start(Zone::new().a(HOST, Ipv4Addr::LOCALHOST)).await?;
    let http_port = free_port()?;
    let pebble = Pebble::start(http_port, dns.addr(), 9)?;
    let root = pebble.root().await;
    let config = format!(
        "[tracker.tls]\nlisten = \"127.0.0.1:0\"\n[tracker.acme]\n\
         directory = \"https://127.0.0.1:{}/dir\"\ncontact = \"postmaster@brand.example\"\n\
         ca_file = {:?}\nhosts = [\"{HOST}\"]\n",
        pebble.port,
        pebble.dir.path().join("ca.pem"),
    );
    let mut place = Place::with(1, &config).await;
    place.config.tracker.listen = SocketAddr::from(([127, 0, 0, 1], http_port));
    let running = place.start().await;
    let addr = running.tracker.tls_addr().context("TLS")?;

    // It leads to the authority's root and is for the host: an ordinary client takes it.
    let client = trusting(&root, &[]);
    until("the certificate", async || {
        leaf(addr, HOST, &client).await.is_ok()
    })
    .await;
    let first = leaf(addr, HOST, &trusting_anybody()).await?;
    let dir = place.dir.path().join("data/acme");
    let mut kept: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(&dir)? {
        let entry = entry?;
        assert_eq!(entry.metadata()?.permissions().mode() & 0o777, 0o600);
        kept.push(entry.file_name().to_string_lossy().into_owned());
    }
    kept.sort();
    assert_eq!(kept, ["account.json", &format!("{HOST}.pem")]);
    let account = std::fs::read(dir.join("account.json"))?;
    // A challenge is answered while there is one, and nobody else's ever.
    let path = "/.well-known/acme-challenge/evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA";
    assert_eq!(
        ask(running.tracker.addr(), "GET", path, &[], b"")
            .await?
            .status,
        404
    );

    // Two thirds of nine seconds later.
    let shown = async || {
        leaf(addr, HOST, &trusting_anybody())
            .await
            .expect("a certificate")
    };
    until("a new certificate", async || shown().await != first).await;
    let second = shown().await;
    running.drain().await;

    // A process that starts shows what was kept, though the authority is away.
    drop(pebble);
    place.config.tracker.listen.set_port(0);
    let running = place.start().await;
    let addr = running.tracker.tls_addr().context("TLS")?;
    until("what was kept", async || {
        leaf(addr, HOST, &trusting_anybody()).await.is_ok()
    })
    .await;
    assert!(
        leaf(addr, HOST, &trusting_anybody()).await? == second,
        "what was fetched last"
    );
    assert_eq!(std::fs::read(dir.join("account.json"))?, account);
    running.drain().await;
    Ok(())
}
