//! How a command finds the service and its key: by arguments, the environment, the configuration.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use service::config::{Config, Environment, KeyMaterial, Scope};

use crate::cli::Failure;
use crate::client::{Answer, Client};

/// The file in the data directory with the key that the service made at its first start.
const KEY_FILE: &str = "api-key";
const URL: &str = "HIKYAKU_URL";
const KEY: &str = "HIKYAKU_API_KEY";

/// Where the service is. Without any of these and without `HIKYAKU_URL`, config/hikyaku.toml.
#[derive(Debug, clap::Args)]
pub(crate) struct Reach {
    /// The configuration of the service, which has its address and key
    #[arg(long, value_name = "FILE", conflicts_with_all = ["url", "key_file"])]
    config: Option<PathBuf>,
    /// Address of the service, such as http://127.0.0.1:8025 [env: HIKYAKU_URL]
    #[arg(long)]
    url: Option<String>,
    /// File with the API key and nothing else [env: HIKYAKU_API_KEY has the key itself]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
}

impl Reach {
    /// A client of the service, with a key that has `scope` where there is a choice.
    ///
    /// # Errors
    /// When the configuration has mistakes, or the key cannot be read.
    pub(crate) fn client(
        &self,
        environment: &Environment,
        scope: Scope,
    ) -> Result<Client, Failure> {
        let given = environment
            .var(KEY)
            .map(str::trim)
            .filter(|key| !key.is_empty());
        let key = match (&self.key_file, given) {
            (Some(file), _) => Some(read(file)?),
            (None, given) => given.map(str::to_owned),
        };
        let url = self.url.as_deref().or(match &self.config {
            Some(_) => None,
            None => environment.var(URL).filter(|url| !url.is_empty()),
        });
        if let Some(url) = url {
            if !url.starts_with("http://") {
                let what = "is not of the form http://HOST:PORT (for https, go through a tunnel)";
                return Err(anyhow::anyhow!("the address {url:?} {what}").into());
            }
            return Ok(Client::new(url, key));
        }
        let config = Config::load(self.config.as_deref(), environment)?;
        let key = match key {
            Some(key) => key,
            None => configured(&config, scope)?,
        };
        let url = format!("http://{}", reachable(config.api.listen));
        Ok(Client::new(url, Some(key)))
    }
}

/// The address under which a listener is reached from its own machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn configured(config: &Config, scope: Scope) -> Result<String> {
    if config.api.keys.is_empty() {
        let file = config.data_dir.join(KEY_FILE);
        return read(&file).context("the service makes this key when it starts for the first time");
    }
    let plain = config
        .api
        .keys
        .iter()
        .filter_map(|key| match &key.material {
            KeyMaterial::Plain(secret) => Some((key, secret)),
            KeyMaterial::Sha256(_) => None,
        });
    let able = plain.clone().find(|(key, _)| key.scopes.contains(&scope));
    let (_, secret) = able.or_else(|| plain.clone().next()).with_context(|| {
        format!(
            "the configuration has hashes of API keys only: set {KEY}, or name --url and --key-file"
        )
    })?;
    Ok(secret.reveal().to_owned())
}

fn read(file: &Path) -> Result<String> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("the API key in {}", file.display()))?;
    let key = text.trim();
    if key.is_empty() {
        bail!("{} is empty", file.display());
    }
    Ok(key.to_owned())
}

/// The JSON of an answer.
///
/// # Errors
/// What the service said was wrong, in its words.
pub(crate) fn told(answer: &Answer) -> Result<Value> {
    if answer.status.is_success() {
        return answer.json();
    }
    let problem: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    match (problem["detail"].as_str(), problem["code"].as_str()) {
        (Some(detail), Some(code)) => bail!("{detail} ({code})"),
        _ => bail!("the service answered HTTP {}", answer.status),
    }
}

/// A runtime for one command.
///
/// # Errors
/// When the system gives no more.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")
}

/// Text as part of a path or query (RFC 3986).
pub(crate) fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_listener_is_reached_on_loopback() {
        for (listen, reached) in [
            ("0.0.0.0:8025", "127.0.0.1:8025"),
            ("[::]:8025", "[::1]:8025"),
            ("192.0.2.1:80", "192.0.2.1:80"),
        ] {
            let listen = listen.parse().expect("an address");
            assert_eq!(reachable(listen).to_string(), reached);
        }
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(
            escaped("mx1.x,127.0.0.1:25/é"),
            "mx1.x%2C127.0.0.1%3A25%2F%C3%A9"
        );
    }
}
