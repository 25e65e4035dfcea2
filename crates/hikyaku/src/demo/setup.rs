//! The folder of one demo: configuration, keys and data, made anew each time.

use crate::demo::sandbox::Sandbox;
use anyhow::{Context, Result};
use content::dkim::{self, Algorithm, Key};
use service::config::{Config, Environment};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The domain that the demo sends from.
pub(crate) const DOMAIN: &str = "hikyaku-demo.example";

const KEYS: [(&str, Algorithm); 2] = [("rsa", Algorithm::Rsa2048), ("ed", Algorithm::Ed25519)];

/// A folder that goes away when this is dropped.
pub(crate) struct Setup {
    dir: TempDir,
    environment: Environment,
    records: Vec<(String, String)>,
}

impl Setup {
    /// Makes the folder and the DKIM keys in it.
    pub(crate) fn make(environment: &Environment) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hikyaku-demo-")
            .tempdir()
            .context("a folder for the demo")?;
        let keys = dir.path().join("dkim-keys").join(DOMAIN);
        std::fs::create_dir_all(&keys)?;
        let mut records = Vec::new();
        for (selector, algorithm) in KEYS {
            let pem = dkim::generate(algorithm)?;
            records.push((
                format!("{selector}._domainkey.{DOMAIN}"),
                Key::from_pem(selector, &pem)?.public_record()?,
            ));
            std::fs::write(keys.join(format!("{selector}.pem")), pem)?;
        }
        Ok(Self {
            dir,
            environment: environment.clone(),
            records,
        })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn key_file(&self) -> PathBuf {
        self.dir().join("data/api-key")
    }

    /// The DNS records of the keys: name and text.
    pub(crate) fn dkim_records(&self) -> Vec<(String, String)> {
        self.records.clone()
    }

    /// Writes the configuration that sends to `sandbox`, and reads it as any other.
    pub(crate) fn config(&self, sandbox: &Sandbox) -> Result<Config> {
        let path = self.dir().join("hikyaku.toml");
        let (api, tracker, admin) = (port(8025)?, port(8026)?, port(8027)?);
        let text = format!(
            "# What `hikyaku demo` runs with.\n\
             data_dir = {data:?}\n\n\
             [api]\nlisten = \"127.0.0.1:{api}\"\n\n\
             [[accounts]]\nid = \"default\"\nfrom_domains = [\"{DOMAIN}\"]\n\
             [accounts.tracking]\nbase_url = \"http://127.0.0.1:{tracker}\"\n\n\
             [tracker]\nlisten = \"127.0.0.1:{tracker}\"\nadmin_listen = \"127.0.0.1:{admin}\"\n\n\
             [smtp]\nehlo = \"mta.{DOMAIN}\"\nport = {port}\n\
             # The sandbox is on loopback, where no real MX may point.\n\
             allow_private_mx = [\"127.0.0.0/8\"]\n\n\
             [dns]\nnameservers = [\"{dns}\"]\n\n\
             [dkim]\ndir = \"dkim-keys\"\n",
            data = self.dir().join("data"),
            port = sandbox.port(),
            dns = sandbox.dns(),
        );
        std::fs::write(&path, text)?;
        std::fs::write(self.dir().join("shaping.toml"), SHAPING)?;
        Ok(Config::load(Some(&path), &self.environment)?)
    }
}

const SHAPING: &str = "# A sandbox is in no hurry to be polite to; retries come within seconds.\n\
    [default]\nconnections = 5\nrate = \"100/s\"\nretry = [\"1s\", \"2s\", \"4s\"]\n";

/// The usual port when it is free, or else any.
fn port(usual: u16) -> Result<u16> {
    let listener =
        TcpListener::bind(("127.0.0.1", usual)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    Ok(listener.local_addr()?.port())
}
