//! What is kept of the client: its network, its user agent; and what its headers say about whether
//! a person asked. Pure; nothing of it is believed beyond that.

use crate::http::route::is_trusted;
use hyper::HeaderMap;
use hyper::header::HeaderValue;
use ipnet::IpNet;
use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};

/// The longest user agent that is kept, in bytes.
const MAX_USER_AGENT: usize = 256;
/// How many proxies may stand one behind the other.
const MAX_FORWARDED: usize = 32;

/// What the headers of a request say about its client, read in one pass: looking each name up costs
/// more than going over the dozen that there are. Of a header that is there twice, the first counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Said<'a> {
    all: &'a HeaderMap,
    pub(crate) host: Option<&'a str>,
    pub(crate) forwarded_host: Option<&'a str>,
    pub(crate) forwarded_proto: Option<&'a str>,
    user_agent: Option<&'a HeaderValue>,
    is_forwarded: bool,
    /// What the browser fetches it for (W3C Fetch Metadata).
    pub(crate) fetch_dest: Option<&'a str>,
    /// Nobody has asked for it yet.
    pub(crate) prefetch: bool,
    /// The browser says that its person does not want to be followed (Global Privacy Control).
    pub(crate) objects: bool,
}

impl<'a> Said<'a> {
    /// Reads them.
    pub(crate) fn of(headers: &'a HeaderMap) -> Self {
        let mut said = Self {
            all: headers,
            host: None,
            forwarded_host: None,
            forwarded_proto: None,
            user_agent: None,
            is_forwarded: false,
            fetch_dest: None,
            prefetch: false,
            objects: false,
        };
        let mut gpc = None;
        for (name, value) in headers {
            let text = || value.to_str().ok();
            match name.as_str() {
                "host" => said.host = said.host.or_else(text),
                "user-agent" => said.user_agent = said.user_agent.or(Some(value)),
                "x-forwarded-for" => said.is_forwarded = true,
                "x-forwarded-host" => said.forwarded_host = said.forwarded_host.or_else(text),
                "x-forwarded-proto" => said.forwarded_proto = said.forwarded_proto.or_else(text),
                "sec-fetch-dest" => said.fetch_dest = said.fetch_dest.or_else(text),
                "sec-gpc" => gpc = gpc.or_else(text),
                "sec-purpose" | "purpose" | "x-purpose" | "x-moz" => {
                    said.prefetch |= text().is_some_and(says_prefetch);
                }
                _ => {}
            }
        }
        said.objects = gpc.is_some_and(|value| value.trim() == "1");
        said
    }
}

fn says_prefetch(purpose: &str) -> bool {
    let purpose = purpose.to_ascii_lowercase();
    purpose.contains("prefetch") || purpose.contains("preview")
}

/// The address of the client: the peer's, or where trusted proxies say that they took it from.
///
/// `X-Forwarded-For` is read from its end, where the nearest proxy wrote: each address is believed
/// only because a trusted one wrote it, and the first that is not trusted is the client.
pub(crate) fn address(peer: IpAddr, said: &Said<'_>, trusted: &[IpNet]) -> IpAddr {
    let mut client = peer.to_canonical();
    if !said.is_forwarded {
        return client;
    }
    let forwarded = said.all.get_all("x-forwarded-for").iter().rev();
    let entries = forwarded
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.rsplit(','));
    for entry in entries.take(MAX_FORWARDED) {
        if !is_trusted(client, trusted) {
            break;
        }
        let Some(next) = parse_address(entry.trim()) else {
            break;
        };
        client = next;
    }
    client
}

/// An address as proxies write it: bare, or with a port, IPv6 perhaps in brackets.
fn parse_address(entry: &str) -> Option<IpAddr> {
    let bare = entry.parse::<IpAddr>().ok();
    let with_port = || {
        entry
            .parse()
            .ok()
            .map(|socket: std::net::SocketAddr| socket.ip())
    };
    let bracketed = || {
        let inner = entry.strip_prefix('[')?.strip_suffix(']')?;
        inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
    };
    bare.or_else(with_port)
        .or_else(bracketed)
        .map(|ip| ip.to_canonical())
}

/// The network that is kept in place of an address: IPv4 /24, IPv6 /48.
pub(crate) fn network(address: IpAddr) -> Box<str> {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let digits = |octet: u8| 1 + usize::from(octet > 9) + usize::from(octet > 99);
            // As long as it is: every hit has one, and nothing is to be moved.
            let length = digits(a) + digits(b) + digits(c) + "...0/24".len();
            let mut text = String::with_capacity(length);
            // A String takes whatever there is memory for.
            let _always = write!(text, "{a}.{b}.{c}.0/24");
            text.into()
        }
        IpAddr::V6(v6) => {
            let [a, b, c, ..] = v6.segments();
            format!("{}/48", Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0)).into()
        }
    }
}

/// The user agent, printable and at most 256 bytes; empty when there is none.
pub(crate) fn user_agent<'a>(said: &Said<'a>) -> Cow<'a, str> {
    let bytes = said.user_agent.map(HeaderValue::as_bytes);
    let bytes = bytes.unwrap_or_default();
    // All but a few: nothing has to be looked at character by character. Without an early end, so that
    // many bytes are looked at at once.
    let printable_ascii = |all: bool, byte: &u8| all & matches!(byte, b' '..=b'~');
    if bytes.iter().fold(true, printable_ascii)
        && let Ok(text) = str::from_utf8(bytes.get(..MAX_USER_AGENT).unwrap_or(bytes))
    {
        return Cow::Borrowed(text);
    }
    let text = String::from_utf8_lossy(bytes);
    let printable = text.chars().map(|c| {
        let invisible = c.is_control() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if invisible { ' ' } else { c }
    });
    let mut kept = String::new();
    for c in printable {
        if kept.len() + c.len_utf8() > MAX_USER_AGENT {
            break;
        }
        kept.push(c);
    }
    Cow::Owned(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::USER_AGENT;
    use proptest::prelude::*;

    fn forwarded(lists: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for list in lists {
            let value = HeaderValue::from_str(list).expect("a header value");
            headers.append("x-forwarded-for", value);
        }
        headers
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let trusted: Vec<IpNet> = ["127.0.0.0/8", "10.0.0.0/8", "fd00::/8"]
            .iter()
            .map(|net| net.parse().expect("a network"))
            .collect();
        for (peer, lists, expected) in [
            ("203.0.113.9", &["198.51.100.1"][..], "203.0.113.9"),
            ("127.0.0.1", &[], "127.0.0.1"),
            ("127.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            // What the client wrote itself stands before what our proxy saw.
            (
                "127.0.0.1",
                &["8.8.8.8, 198.51.100.1, 10.0.0.2"],
                "198.51.100.1",
            ),
            (
                "127.0.0.1",
                &["8.8.8.8", "198.51.100.1", "10.0.0.2"],
                "198.51.100.1",
            ),
            ("127.0.0.1", &["8.8.8.8, rubbish, 10.0.0.2"], "10.0.0.2"),
            ("127.0.0.1", &["198.51.100.1:4711"], "198.51.100.1"),
            ("127.0.0.1", &["[2001:db8::1]:4711"], "2001:db8::1"),
            ("127.0.0.1", &["[2001:db8::1]"], "2001:db8::1"),
            ("127.0.0.1", &["::ffff:198.51.100.1"], "198.51.100.1"),
            ("::ffff:127.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("fd00::1", &["2001:db8::1"], "2001:db8::1"),
        ] {
            let peer = peer.parse().expect("an address");
            let headers = forwarded(lists);
            let client = address(peer, &Said::of(&headers), &trusted);
            assert_eq!(client.to_string(), expected, "{peer} {lists:?}");
        }
    }

    #[test]
    fn networks_are_cut() {
        for (address, expected) in [
            ("203.0.113.77", "203.0.113.0/24"),
            ("1.22.3.77", "1.22.3.0/24"),
            ("2001:db8:1:2:3::4", "2001:db8:1::/48"),
            ("::ffff:203.0.113.77", "203.0.113.0/24"),
        ] {
            assert_eq!(&*network(address.parse().expect("an address")), expected);
        }
    }

    #[test]
    fn prefetches_show() {
        for (name, value, expected) in [
            ("sec-purpose", "prefetch;prerender", true),
            ("purpose", "Prefetch", true),
            ("x-moz", "prefetch", true),
            ("x-purpose", "preview", true),
            ("sec-purpose", "", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            let said = Said::of(&headers);
            assert_eq!(said.prefetch, expected, "{name}: {value}");
        }
    }

    proptest! {
        #[test]
        fn any_forwarded_list_is_read(lists in proptest::collection::vec("[ -~]{0,40}", 0..4), peer: u32) {
            let lists: Vec<&str> = lists.iter().map(String::as_str).collect();
            let peer = IpAddr::V4(peer.into());
            let any: Vec<IpNet> = vec!["0.0.0.0/0".parse().expect("a network")];
            let headers = forwarded(&lists);
            let said = Said::of(&headers);
            let _believed = address(peer, &said, &any);
            prop_assert_eq!(address(peer, &said, &[]), peer);
        }

        #[test]
        fn any_user_agent_is_made_printable(bytes in proptest::collection::vec(32_u8..=255, 0..600)) {
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
            let mut headers = HeaderMap::new();
            headers.insert(USER_AGENT, value);
            let kept = user_agent(&Said::of(&headers));
            prop_assert!(kept.len() <= MAX_USER_AGENT);
            prop_assert!(!kept.chars().any(char::is_control));
        }
    }
}
