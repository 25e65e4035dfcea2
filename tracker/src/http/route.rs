//! What a request asks for: path, host, target. Pure.

use crate::hits::client::Said;
use crate::keys::Hosts;
use hyper::http::Uri;
use ipnet::IpNet;
use std::borrow::Cow;
use std::net::IpAddr;

/// A path that may carry a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route<'a> {
    /// `/o/TOKEN.gif`
    Open(&'a str),
    /// `/c/TOKEN`
    Click(&'a str),
    /// `/u/TOKEN`
    Unsubscribe(&'a str),
    /// `/t.js`
    Tag,
    /// `/p`
    Page,
    /// `/.well-known/acme-challenge/TOKEN`, at the root of the host alone (RFC 8555 section 8.3)
    Challenge(&'a str),
    /// Nothing of ours.
    Unknown,
}

/// Reads a path by its last two segments: a base URL may have a path of its own, and the proxy
/// before us may or may not take it off.
pub(crate) fn route(path: &str) -> Route<'_> {
    if let Some(token) = path.strip_prefix("/.well-known/acme-challenge/") {
        return Route::Challenge(token);
    }
    let mut from_the_end = path.rsplit('/');
    let last = from_the_end.next().unwrap_or_default();
    match (from_the_end.next(), last) {
        // A token may be anything, "p" too.
        (Some("o"), token) => Route::Open(token.strip_suffix(".gif").unwrap_or(token)),
        (Some("c"), token) => Route::Click(token),
        (Some("u"), token) => Route::Unsubscribe(token),
        (Some(_), "t.js") => Route::Tag,
        (Some(_), "p") => Route::Page,
        _ => Route::Unknown,
    }
}

/// The host and port that the client meant, in lower case, without the port that its scheme has
/// anyway; empty when it said none. A trusted proxy speaks for the client.
pub(crate) fn authority<'a>(uri: &'a Uri, said: &Said<'a>, from_proxy: bool) -> Cow<'a, str> {
    let forwarded = said
        .forwarded_host
        .filter(|_| from_proxy)
        .and_then(|hosts| hosts.split(',').next());
    let named = forwarded
        // RFC 9112 section 3.2.2: an absolute target goes before the Host header.
        .or_else(|| uri.authority().map(hyper::http::uri::Authority::as_str))
        .or(said.host)
        .unwrap_or_default();
    Hosts::normalised(named)
}

/// Whether the client came by https, as far as a trusted proxy says so.
pub(crate) fn forwarded_https(said: &Said<'_>, from_proxy: bool) -> bool {
    let proto = said.forwarded_proto;
    from_proxy && proto.is_some_and(|proto| proto.trim().eq_ignore_ascii_case("https"))
}

/// Whether `address` is one of the proxies that the operator trusts.
pub(crate) fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&address))
}

/// A link's target as a `Location` header may carry it: ASCII, without blanks. What is ASCII
/// already comes out byte for byte; the host gets its ASCII form, other characters are
/// percent-encoded (RFC 3987 section 3.1).
pub(crate) fn location(target: &str) -> Cow<'_, str> {
    let safe = |byte: u8| byte.is_ascii_graphic();
    if target.bytes().all(safe) {
        return Cow::Borrowed(target);
    }
    let (scheme, rest) = target.split_once("://").unwrap_or(("http", target));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (format!("{user}@"), host),
        None => (String::new(), authority),
    };
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !name.starts_with('[') => (name, format!(":{port}")),
        Some(_) | None => (host, String::new()),
    };
    let name = idna::domain_to_ascii(name).unwrap_or_else(|_| name.to_owned());
    let mut out = String::with_capacity(target.len() * 2);
    for byte in format!("{scheme}://{user}{name}{port}{rest}").bytes() {
        if safe(byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::HeaderMap;
    use hyper::header::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            let value = HeaderValue::from_str(value).expect("a header value");
            (HeaderName::from_static(name), value)
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn paths() {
        for (path, expected) in [
            ("/o/abc.gif", Route::Open("abc")),
            ("/o/abc", Route::Open("abc")),
            ("/c/abc", Route::Click("abc")),
            ("/c/", Route::Click("")),
            ("/_t/news/u/abc", Route::Unsubscribe("abc")),
            ("/c/abc/", Route::Unknown),
            ("/c", Route::Unknown),
            ("/C/abc", Route::Unknown),
            ("/t.js", Route::Tag),
            ("/_t/t.js", Route::Tag),
            ("/p", Route::Page),
            ("/.well-known/acme-challenge/abc", Route::Challenge("abc")),
            ("/x/.well-known/acme-challenge/abc", Route::Unknown),
            ("/c/p", Route::Click("p")),
            ("/u/t.js", Route::Unsubscribe("t.js")),
            ("/", Route::Unknown),
            ("*", Route::Unknown),
            ("", Route::Unknown),
        ] {
            assert_eq!(route(path), expected, "{path}");
        }
    }

    #[test]
    fn hosts() {
        let of = |uri: &str, pairs: &[(&'static str, &str)], from_proxy| {
            let uri = uri.parse().expect("a target");
            let headers = headers(pairs);
            authority(&uri, &Said::of(&headers), from_proxy).into_owned()
        };
        let host = ("host", "T.Example:8026");
        let forwarded = ("x-forwarded-host", "Real.example, inner.example");
        assert_eq!(of("/x", &[host], false), "t.example:8026");
        assert_eq!(of("http://abs.example/x", &[host], false), "abs.example");
        assert_eq!(of("/x", &[host, forwarded], false), "t.example:8026");
        assert_eq!(of("/x", &[host, forwarded], true), "real.example");
        assert_eq!(of("/x", &[], true), "");
    }

    #[test]
    fn targets() {
        for (target, expected) in [
            (
                "https://x.example/a?b=%20&c#d",
                "https://x.example/a?b=%20&c#d",
            ),
            ("https://x.example/a b", "https://x.example/a%20b"),
            (
                "https://例え.jp:8080/道?q=値",
                "https://xn--r8jz45g.jp:8080/%E9%81%93?q=%E5%80%A4",
            ),
            ("http://a@例え.jp", "http://a@xn--r8jz45g.jp"),
            ("http://[::1]:80/é", "http://[::1]:80/%C3%A9"),
        ] {
            assert_eq!(location(target), expected);
        }
    }

    proptest! {
        #[test]
        fn any_target_fits_into_a_header(target: String) {
            let location = location(&target);
            prop_assert!(location.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert!(HeaderValue::from_str(&location).is_ok());
        }

        #[test]
        fn ascii_targets_stay_as_they_are(target in "https?://[!-~]{0,60}") {
            prop_assert_eq!(&*location(&target), target.as_str());
        }

        #[test]
        fn any_path_is_read(path: String) {
            let _read = route(&path);
        }
    }
}
