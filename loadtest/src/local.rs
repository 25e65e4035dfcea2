//! Loads stay on this machine.

use anyhow::{Context as _, Result, bail};
use hyper::Uri;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Reads `IP:PORT` of loopback.
///
/// # Errors
/// When it is something else.
pub fn address(text: &str) -> Result<SocketAddr> {
    let address: SocketAddr = text
        .parse()
        .with_context(|| format!("{text:?} is not IP:PORT"))?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    bail!("{address} is not on this machine: loads go to loopback only")
}

/// Where the service at `http://HOST:PORT` listens. HOST is a loopback address or `localhost`, of
/// which 127.0.0.1 is taken, whatever a resolver says.
///
/// # Errors
/// When it is something else.
pub fn url(text: &str) -> Result<SocketAddr> {
    let uri: Uri = text
        .parse()
        .with_context(|| format!("{text:?} is not a URL"))?;
    if uri.scheme_str() != Some("http") {
        bail!("{text:?} does not begin with http://");
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        bail!("{text:?} has more than http://HOST:PORT");
    }
    let host = uri.host().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let ip = match bare.parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => ip,
        Err(_) if bare.eq_ignore_ascii_case("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Ok(_) | Err(_) => bail!("{text:?} is not on this machine: loads go to loopback only"),
    };
    Ok(SocketAddr::new(ip, uri.port_u16().unwrap_or(80)))
}

/// For clap: [`url`], kept as `http://IP:PORT`.
///
/// # Errors
/// As [`url`].
pub fn parse_url(text: &str) -> Result<String> {
    Ok(format!("http://{}", url(text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_stay_on_this_machine() {
        for (text, expected) in [
            ("http://127.0.0.1:8025", Some("http://127.0.0.1:8025")),
            ("http://127.3.2.1:1/", Some("http://127.3.2.1:1")),
            ("http://localhost:8025", Some("http://127.0.0.1:8025")),
            ("http://[::1]:8025", Some("http://[::1]:8025")),
            ("http://127.0.0.1", Some("http://127.0.0.1:80")),
            ("https://127.0.0.1:8025", None),
            ("http://127.0.0.1:8025/v1", None),
            ("http://192.0.2.1:8025", None),
            ("http://0.0.0.0:8025", None),
            ("http://localhost.brand.example:8025", None),
            ("127.0.0.1:8025", None),
            ("", None),
        ] {
            assert_eq!(parse_url(text).ok().as_deref(), expected, "{text}");
        }
        assert!(address("127.0.0.1:0").is_ok());
        assert!(address("[::1]:2525").is_ok());
        for elsewhere in ["0.0.0.0:2525", "192.0.2.1:2525", "[::]:25", "localhost:25"] {
            assert!(address(elsewhere).is_err(), "{elsewhere}");
        }
    }
}
