//! What is a trackable URL, and the small changes made to one.

use links::{TargetError, check_target};
use std::borrow::Cow;

/// Why a link is left as it is. `as_str` is what a submission's answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Not http or https: `mailto:`, `tel:`, `cid:`, `javascript:` …
    Scheme,
    /// A place in the same document.
    Fragment,
    /// Without a host, so it leads nowhere from a mail.
    Relative,
    /// Nothing there.
    Empty,
    /// An attribute asks not to track it.
    OptedOut,
    /// A link of our own, such as `unsubscribe_url`.
    Own,
    /// Longer than a token can carry.
    TooLong,
    /// An http URL without a host, or with control characters.
    Invalid,
    /// Leads to a host that the account does not allow as a target.
    TargetHost,
    /// Cut through by a statement of the template language.
    Template,
    /// More links than are numbered.
    TooMany,
}

impl SkipReason {
    /// The name in answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scheme => "scheme",
            Self::Fragment => "fragment",
            Self::Relative => "relative",
            Self::Empty => "empty",
            Self::OptedOut => "opted_out",
            Self::Own => "own",
            Self::TooLong => "too_long",
            Self::Invalid => "invalid",
            Self::TargetHost => "target_host",
            Self::Template => "template",
            Self::TooMany => "too_many",
        }
    }
}

/// The rules by which links are tracked, the same for constant and for rendered URLs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    pub(crate) utm: Vec<(String, String)>,
    pub(crate) allowed_targets: Vec<String>,
    /// What our own URLs begin with; empty: there are none.
    pub(crate) base_url: String,
}

impl Rules {
    /// The target for `url` as a browser would read it (entities decoded already), with UTM
    /// parameters.
    pub(crate) fn target(&self, url: &str) -> Result<String, SkipReason> {
        let url = clean(url);
        if let Some(reason) = not_http(&url) {
            return Err(reason);
        }
        if is_below(&url, &self.base_url) {
            return Err(SkipReason::Own);
        }
        if !self.allows(host(&url)) {
            return Err(SkipReason::TargetHost);
        }
        let target = self.with_utm(&url);
        match check_target(&target) {
            Ok(()) => Ok(target),
            Err(TargetError::TooLong) => Err(SkipReason::TooLong),
            Err(TargetError::Scheme | TargetError::Host | TargetError::Control) => {
                Err(SkipReason::Invalid)
            }
        }
    }

    /// An entry is a host, or `*.example.com` for all below it.
    fn allows(&self, host: &str) -> bool {
        let fits = |entry: &String| match entry.strip_prefix("*.") {
            Some(parent) => {
                let at = host.len().checked_sub(parent.len() + 1);
                at.and_then(|at| host.get(at..)).is_some_and(|tail| {
                    tail.strip_prefix('.')
                        .is_some_and(|tail| tail.eq_ignore_ascii_case(parent))
                })
            }
            None => entry.eq_ignore_ascii_case(host),
        };
        self.allowed_targets.is_empty() || self.allowed_targets.iter().any(fits)
    }

    /// Appends the parameters that the URL does not have, before its fragment.
    fn with_utm(&self, url: &str) -> String {
        let (base, fragment) = url.find('#').map_or((url, ""), |at| url.split_at(at));
        let mut out = String::with_capacity(url.len() + 32 * self.utm.len());
        out.push_str(base);
        let query = base.split_once('?').map(|(_, query)| query);
        let mut separator = match query {
            None => "?",
            Some(query) if query.is_empty() || query.ends_with('&') => "",
            Some(_) => "&",
        };
        for (name, value) in &self.utm {
            let has = |q: &str| {
                q.split('&')
                    .any(|pair| pair.split('=').next() == Some(name.as_str()))
            };
            if query.is_some_and(has) {
                continue;
            }
            out.push_str(separator);
            percent_encode(&mut out, name);
            out.push('=');
            percent_encode(&mut out, value);
            separator = "&";
        }
        out.push_str(fragment);
        out
    }
}

/// Whether `url` is `base` or a place below it. Nothing is below an empty base.
pub(crate) fn is_below(url: &str, base: &str) -> bool {
    let base = base.trim_end_matches('/');
    let Some((head, rest)) = url.split_at_checked(base.len()) else {
        return false;
    };
    let ends = rest.is_empty() || rest.starts_with(['/', '?', '#']);
    !base.is_empty() && ends && head.eq_ignore_ascii_case(base)
}

/// What a browser does to an attribute before it reads the URL (WHATWG URL, basic URL parser).
fn clean(url: &str) -> Cow<'_, str> {
    let url = url.trim_matches(|c: char| c <= ' ');
    if url.contains(['\t', '\r', '\n']) {
        Cow::Owned(
            url.chars()
                .filter(|c| !matches!(c, '\t' | '\r' | '\n'))
                .collect(),
        )
    } else {
        Cow::Borrowed(url)
    }
}

/// Why `url` cannot be an absolute http URL, if it cannot.
fn not_http(url: &str) -> Option<SkipReason> {
    match url.bytes().next() {
        None => return Some(SkipReason::Empty),
        Some(b'#') => return Some(SkipReason::Fragment),
        Some(_) => {}
    }
    match scheme(url) {
        Some(scheme)
            if scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https") =>
        {
            None
        }
        Some(_) => Some(SkipReason::Scheme),
        None => Some(SkipReason::Relative),
    }
}

fn scheme(url: &str) -> Option<&str> {
    let (scheme, _) = url.split_once(':')?;
    let mut bytes = scheme.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic());
    (first && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'.' | b'-')))
        .then_some(scheme)
}

/// What the literal start of a URL with template tags says already; `None`: all is open.
pub(crate) fn skip_by_prefix(prefix: &str) -> Option<SkipReason> {
    let prefix = clean(prefix);
    match prefix.bytes().next()? {
        b'#' => Some(SkipReason::Fragment),
        b'/' | b'?' | b'.' => Some(SkipReason::Relative),
        _ => scheme(&prefix).and_then(|_| not_http(&prefix)),
    }
}

/// The host of an absolute URL, without user and port.
fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#', '\\']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    match host.strip_prefix('[') {
        Some(_) => host.split_inclusive(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    }
}

fn percent_encode(out: &mut String, text: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

/// Reads an attribute value as a browser does.
pub(crate) fn decode_attribute(value: &str) -> Cow<'_, str> {
    htmlize::unescape_attribute(value)
}

/// Writes text so that it is itself again in an attribute, quoted or not, and in text.
pub(crate) fn escape_html(out: &mut impl std::fmt::Write, text: &str) -> std::fmt::Result {
    let mut start = 0;
    for (at, byte) in text.bytes().enumerate() {
        let entity = match byte {
            b'&' => "&amp;",
            b'<' => "&lt;",
            b'>' => "&gt;",
            b'"' => "&quot;",
            b'\'' => "&#39;",
            _ => continue,
        };
        out.write_str(text.get(start..at).unwrap_or_default())?;
        out.write_str(entity)?;
        start = at + 1;
    }
    out.write_str(text.get(start..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn utm() -> Rules {
        let utm = vec![
            ("utm_source".to_owned(), "mail".to_owned()),
            ("utm_id".to_owned(), "a b&c".to_owned()),
        ];
        Rules {
            utm,
            ..Rules::default()
        }
    }

    #[test]
    fn only_absolute_http_is_tracked() {
        let rules = Rules::default();
        for url in [
            "https://a.example/x?y=1&z#f",
            "HTTP://A",
            "https://a.example/é 日",
            "http://u:p@a:1/",
        ] {
            assert_eq!(rules.target(url).as_deref(), Ok(url));
        }
        assert_eq!(
            rules.target(" \n https://a.ex\tample/ ").as_deref(),
            Ok("https://a.example/")
        );
        for (url, reason) in [
            ("mailto:a@b.example", SkipReason::Scheme),
            ("java\nscript:alert(1)", SkipReason::Scheme),
            ("cid:1", SkipReason::Scheme),
            ("#top", SkipReason::Fragment),
            ("/x", SkipReason::Relative),
            ("//a.example/", SkipReason::Relative),
            ("x/y:z", SkipReason::Relative),
            ("  ", SkipReason::Empty),
            ("https://", SkipReason::Invalid),
            ("https://a/\u{7f}", SkipReason::Invalid),
        ] {
            assert_eq!(rules.target(url), Err(reason), "{url:?}");
        }
        assert_eq!(
            rules.target(&format!("https://a/{}", "x".repeat(5000))),
            Err(SkipReason::TooLong)
        );
    }

    #[test]
    fn utm_parameters_are_added_once() {
        for (url, with) in [
            ("https://a", "https://a?utm_source=mail&utm_id=a%20b%26c"),
            ("https://a/?", "https://a/?utm_source=mail&utm_id=a%20b%26c"),
            (
                "https://a/?x=1#f?g",
                "https://a/?x=1&utm_source=mail&utm_id=a%20b%26c#f?g",
            ),
            (
                "https://a/?utm_source=web&",
                "https://a/?utm_source=web&utm_id=a%20b%26c",
            ),
            (
                "https://a/?utm_id&utm_source=",
                "https://a/?utm_id&utm_source=",
            ),
        ] {
            assert_eq!(utm().target(url).as_deref(), Ok(with));
            assert_eq!(utm().target(with).as_deref(), Ok(with));
        }
    }

    #[test]
    fn targets_can_be_limited_to_hosts() {
        let allowed_targets = vec!["Shop.example".to_owned(), "*.cdn.example".to_owned()];
        let rules = Rules {
            allowed_targets,
            ..Rules::default()
        };
        for url in [
            "https://shop.EXAMPLE/",
            "https://shop.example:8443?x",
            "https://u@a.cdn.example#f",
        ] {
            assert!(rules.target(url).is_ok(), "{url}");
        }
        for url in [
            "https://shop.example.evil.example/",
            "https://shop.example@evil.example/",
            "https://evil.example\\@shop.example/",
            "https://cdn.example/",
            "https://xcdn.example/",
            "https://[::1]/",
        ] {
            assert_eq!(rules.target(url), Err(SkipReason::TargetHost), "{url}");
        }
    }

    #[test]
    fn our_own_urls_are_not_tracked_again() {
        let rules = Rules {
            base_url: "https://t.example/x/".to_owned(),
            ..Rules::default()
        };
        for url in [
            "https://t.example/x",
            "HTTPS://T.example/x/u/abc",
            "https://t.example/x?y",
        ] {
            assert_eq!(rules.target(url), Err(SkipReason::Own), "{url}");
        }
        for url in [
            "https://t.example/xy",
            "https://t.example/",
            "https://t.example.x/x/",
        ] {
            assert!(rules.target(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn the_start_of_a_url_may_say_enough() {
        for (prefix, reason) in [
            ("mailto:", Some(SkipReason::Scheme)),
            ("#a", Some(SkipReason::Fragment)),
            ("/a", Some(SkipReason::Relative)),
            ("https://a/?x=", None),
            ("", None),
            ("ht", None),
        ] {
            assert_eq!(skip_by_prefix(prefix), reason, "{prefix}");
        }
    }

    #[test]
    fn entities_are_decoded_as_browsers_do() {
        for (value, text) in [
            ("?a=1&amp;b=2", "?a=1&b=2"),
            ("?a=1&copy=2", "?a=1&copy=2"),
            ("&#x2f;&sol;", "//"),
        ] {
            assert_eq!(decode_attribute(value), text);
        }
        let mut out = String::new();
        escape_html(&mut out, "é<a href='x'>\"&amp;").expect("a String takes all");
        assert_eq!(out, "é&lt;a href=&#39;x&#39;&gt;&quot;&amp;amp;");
        assert_eq!(decode_attribute(&out), "é<a href='x'>\"&amp;");
    }
}
