//! The verdict on one hit, by what the request itself shows.
//!
//! | what is seen | verdict | reason |
//! |---|---|---|
//! | HEAD | machine | `head` |
//! | a prefetch or preview header | machine | `prefetch` |
//! | an agent that says it acts alone | machine | `user_agent` |
//! | Apple's or Gmail's fetch ahead of the person | machine for an open, unknown for a click | `image_prefetch` |
//! | an image proxy (Gmail, Yahoo) | unknown for an open, machine for a click, as image proxies follow no links | `image_proxy` |
//! | the shape of a browser or mail program | human, unless `Sec-Fetch-*` says it was no navigation (click) or no image (open) | |
//! | a network of scanners | machine | `network` |
//! | anything else | unknown | |
//!
//! What this cannot see: a security scanner in the clothes of a browser counts as a person until
//! the rules that look at several hits revise it (`settle`). `human` therefore means "nothing speaks for a
//! machine", and `unknown` that the evidence is no evidence, not that it is weak.

use crate::agents::Agent;
use crate::rules::{NetworkKind, Rules};
use model::{Actor, HitKind, Verdict};
use std::net::IpAddr;

/// What a request shows.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    /// What was asked.
    pub kind: HitKind,
    /// The `User-Agent` header; empty when there was none.
    pub user_agent: &'a str,
    /// A header said that nobody has asked yet: `Sec-Purpose`, `Purpose`, `X-Purpose` or `X-Moz`
    /// with `prefetch` or `preview`.
    pub prefetch: bool,
    /// `Sec-Fetch-Dest`, which browsers send on https (W3C Fetch Metadata): `document` for a
    /// followed link, `image` for a picture.
    pub fetch_dest: Option<&'a str>,
    /// The client's address, which is not kept.
    pub address: Option<IpAddr>,
}

impl Rules {
    /// Judges one hit by itself.
    pub fn judge(&self, observed: &Observed<'_>) -> Verdict {
        let (actor, reason) = actor(self, observed);
        Verdict {
            actor,
            machine_reasons: reason.into_iter().map(Into::into).collect(),
            rules: self.version,
        }
    }
}

fn actor(rules: &Rules, observed: &Observed<'_>) -> (Actor, Option<&'static str>) {
    let is_open = match observed.kind {
        HitKind::Probe => return (Actor::Machine, Some("head")),
        HitKind::Open => true,
        HitKind::Click | HitKind::Unsubscribe => false,
    };
    if observed.prefetch {
        return (Actor::Machine, Some("prefetch"));
    }
    let network = observed.address.and_then(|address| rules.network(address));
    match (network, is_open) {
        (Some(NetworkKind::Scanner), _) => return (Actor::Machine, Some("network")),
        (Some(NetworkKind::Prefetcher), true) => return (Actor::Machine, Some("image_prefetch")),
        (Some(NetworkKind::ImageProxy), false) => return (Actor::Machine, Some("image_proxy")),
        (Some(NetworkKind::ImageProxy), true) => {
            let agent = rules.agents.read(observed.user_agent);
            if !matches!(agent, Agent::Automated | Agent::Prefetcher) {
                return (Actor::Unknown, None);
            }
        }
        (Some(NetworkKind::Prefetcher), false) | (None, _) => {}
    }
    match rules.agents.read(observed.user_agent) {
        Agent::Automated => (Actor::Machine, Some("user_agent")),
        Agent::Prefetcher if is_open => (Actor::Machine, Some("image_prefetch")),
        Agent::ImageProxy if !is_open => (Actor::Machine, Some("image_proxy")),
        Agent::Browser if fetched_as_expected(observed, is_open) => (Actor::Human, None),
        Agent::Prefetcher | Agent::ImageProxy | Agent::Browser | Agent::Other => {
            (Actor::Unknown, None)
        }
    }
}

/// Whether the browser fetched it for what it is: a page for a link, a picture for a pixel. An old
/// browser, or any on plain http, does not say.
fn fetched_as_expected(observed: &Observed<'_>, is_open: bool) -> bool {
    let expected = if is_open { "image" } else { "document" };
    observed.fetch_dest.is_none_or(|dest| dest == expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHROME: &str = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36";
    const GMAIL: &str =
        "Mozilla/5.0 (Windows NT 5.1; rv:11.0) Gecko Firefox/11.0 (via ggpht.com GoogleImageProxy)";

    fn rules() -> Rules {
        Rules::shipped()
    }

    fn seen(kind: HitKind, user_agent: &str) -> Observed<'_> {
        Observed {
            kind,
            user_agent,
            prefetch: false,
            fetch_dest: None,
            address: None,
        }
    }

    #[test]
    fn the_table_of_the_module() {
        use Actor::{Human, Machine, Unknown};
        use HitKind::{Click, Open, Probe, Unsubscribe};
        for (kind, user_agent, actor, reasons) in [
            (Probe, CHROME, Machine, &["head"][..]),
            (Click, CHROME, Human, &[]),
            (Open, CHROME, Human, &[]),
            (Unsubscribe, CHROME, Human, &[]),
            (Open, "Mozilla/5.0", Machine, &["image_prefetch"]),
            (Click, "Mozilla/5.0", Unknown, &[]),
            (Open, GMAIL, Unknown, &[]),
            (Click, GMAIL, Machine, &["image_proxy"]),
            (Click, "curl/8.5.0", Machine, &["user_agent"]),
            (Open, "", Unknown, &[]),
            (Click, "Dalvik/2.1.0 (Linux; U; Android 14)", Unknown, &[]),
        ] {
            let verdict = rules().judge(&seen(kind, user_agent));
            let given: Vec<&str> = verdict.machine_reasons.iter().map(AsRef::as_ref).collect();
            assert_eq!(
                (verdict.actor, given.as_slice()),
                (actor, reasons),
                "{kind} {user_agent}"
            );
            assert_eq!(verdict.rules, rules().version);
        }
    }

    #[test]
    fn headers_speak_against_a_browser() {
        let click = seen(HitKind::Click, CHROME);
        for (prefetch, fetch_dest, actor) in [
            (false, Some("document"), Actor::Human),
            (false, Some("empty"), Actor::Unknown),
            (false, Some("image"), Actor::Unknown),
            (true, Some("document"), Actor::Machine),
        ] {
            let observed = Observed {
                prefetch,
                fetch_dest,
                ..click
            };
            assert_eq!(rules().judge(&observed).actor, actor, "{observed:?}");
        }
        let open = Observed {
            fetch_dest: Some("image"),
            ..seen(HitKind::Open, CHROME)
        };
        assert_eq!(rules().judge(&open).actor, Actor::Human);
    }

    proptest! {
        #[test]
        fn only_a_machine_has_reasons(text: String, kind in 0_u8..4, prefetch: bool, dest: Option<String>) {
            let kind = HitKind::from_code(kind).expect("four kinds");
            let observed = Observed {
                kind,
                user_agent: &text,
                prefetch,
                fetch_dest: dest.as_deref(),
                address: None,
            };
            let verdict = rules().judge(&observed);
            prop_assert_eq!(verdict.actor == Actor::Machine, !verdict.machine_reasons.is_empty());
            prop_assert_eq!(&verdict, &rules().judge(&observed));
        }
    }
}
