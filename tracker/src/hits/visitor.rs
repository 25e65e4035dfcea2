//! The visitor cookie: one browser, named by us.
//!
//! Owns the cookie's text. Its MAC keeps strangers from writing ids of their own into our facts; a
//! forged one is ignored and replaced. Whose browser it is, is none of this room's business.

use aws_lc_rs::{constant_time, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::HeaderMap;
use hyper::header::COOKIE;
use links::KeyRing;
use model::{Timestamp, VisitorId};
use std::cell::RefCell;
use std::fmt;

/// The cookie's name (contract, section 7).
pub(crate) const NAME: &str = "hk_vid";
/// 400 days, the longest that browsers keep a cookie.
const LASTS: &str = "; Max-Age=34560000; Path=/";
/// Room for one without allocating twice.
const USUAL_COOKIE: usize = 160;
const ID_BYTES: usize = 16;
const MAC_BYTES: usize = 12;
/// The length of a value: its bytes in base64 without padding.
const VALUE_CHARS: usize = ((ID_BYTES + MAC_BYTES) * 4).div_ceil(3);
/// How many cookies of our name are looked at: browsers send one per domain and path.
const MOST_COOKIES: usize = 8;

/// Random bytes that a thread keeps ready, a multiple of what a visitor takes.
const RANDOM_BYTES: usize = 64 * ID_BYTES;

/// Reads and writes visitor cookies.
pub(crate) struct Visitors {
    /// The first signs, all verify.
    keys: Vec<hmac::Key>,
    domain: Option<String>,
}

impl fmt::Debug for Visitors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Visitors")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

impl Visitors {
    /// Cookies for the host alone, or for all of `domain`, where the host lies in it.
    pub(crate) fn new(ring: &KeyRing, domain: Option<String>) -> Self {
        let secrets = ring.derive("visitor cookie");
        let keys = secrets
            .iter()
            .map(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret))
            .collect();
        Self { keys, domain }
    }

    /// The visitor that the request names, if we named it so.
    pub(crate) fn read(&self, headers: &HeaderMap) -> Option<VisitorId> {
        let lists = headers.get_all(COOKIE).iter();
        lists
            .filter_map(|list| list.to_str().ok())
            .flat_map(|list| list.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .filter(|(name, _)| *name == NAME)
            .take(MOST_COOKIES)
            .find_map(|(_, value)| self.check(value))
    }

    fn check(&self, value: &str) -> Option<VisitorId> {
        if value.len() != VALUE_CHARS {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(value).ok()?;
        let (id, mac) = bytes.split_first_chunk::<ID_BYTES>()?;
        let ours = self
            .keys
            .iter()
            .any(|key| constant_time::verify_slices_are_equal(&sign(key, id), mac).is_ok());
        ours.then(|| VisitorId::from_bytes(*id))
    }

    /// A visitor that was not there before; `None` when the system gives no random bytes.
    pub(crate) fn fresh(now: Timestamp) -> Option<VisitorId> {
        let random = RANDOM.with_borrow_mut(Random::take)?;
        Some(VisitorId::new(now, u128::from_be_bytes(random)))
    }

    /// The `Set-Cookie` value that names the browser. `host` is the client's, without a port
    /// or with one.
    pub(crate) fn cookie(&self, visitor: VisitorId, host: &str, https: bool) -> String {
        let id = visitor.to_bytes();
        let mut bytes = [0; ID_BYTES + MAC_BYTES];
        let (named, signed) = bytes.split_at_mut(ID_BYTES);
        named.copy_from_slice(&id);
        if let Some(key) = self.keys.first() {
            signed.copy_from_slice(&sign(key, &id));
        }
        let mut cookie = String::with_capacity(USUAL_COOKIE);
        cookie.push_str(NAME);
        cookie.push('=');
        URL_SAFE_NO_PAD.encode_string(bytes, &mut cookie);
        cookie.push_str(LASTS);
        if let Some(domain) = self
            .domain
            .as_deref()
            .filter(|domain| is_within(host, domain))
        {
            cookie.push_str("; Domain=");
            cookie.push_str(domain);
        }
        if https {
            cookie.push_str("; Secure");
        }
        cookie.push_str("; HttpOnly; SameSite=Lax");
        cookie
    }
}

thread_local! {
    static RANDOM: RefCell<Random> = const { RefCell::new(Random { bytes: [0; RANDOM_BYTES], left: 0 }) };
}

/// Random bytes of the system, taken for many visitors at once: each call reseeds its generator.
struct Random {
    bytes: [u8; RANDOM_BYTES],
    left: usize,
}

impl Random {
    fn take(&mut self) -> Option<[u8; ID_BYTES]> {
        if self.left == 0 {
            aws_lc_rs::rand::fill(&mut self.bytes).ok()?;
            self.left = RANDOM_BYTES;
        }
        let taken = self
            .bytes
            .get(self.left - ID_BYTES..)?
            .first_chunk()
            .copied()?;
        self.left -= ID_BYTES;
        Some(taken)
    }
}

fn sign(key: &hmac::Key, id: &[u8; ID_BYTES]) -> [u8; MAC_BYTES] {
    let tag = hmac::sign(key, id);
    let mut mac = [0; MAC_BYTES];
    mac.iter_mut()
        .zip(tag.as_ref())
        .for_each(|(to, from)| *to = *from);
    mac
}

/// A browser refuses a cookie for a domain that the host is not in.
fn is_within(host: &str, domain: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == domain
        || name
            .strip_suffix(domain)
            .is_some_and(|rest| rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use proptest::prelude::*;

    fn visitors(keys: &str, domain: Option<&str>) -> Visitors {
        let ring = KeyRing::parse(keys).expect("a ring");
        Visitors::new(&ring, domain.map(str::to_owned))
    }

    fn key(byte: u8) -> String {
        KeyRing::file_text(&[byte; 32])
    }

    fn sent(cookies: &str) -> HeaderMap {
        let value = HeaderValue::from_str(cookies).expect("a header value");
        [(COOKIE, value)].into_iter().collect()
    }

    fn value(cookie: &str) -> &str {
        cookie.split(';').next().expect("a value")
    }

    #[test]
    fn a_cookie_comes_back_also_after_a_rotation() {
        let id = VisitorId::from_bytes([9; 16]);
        let old = visitors(&key(1), None);
        let rotated = visitors(&format!("{}{}", key(2), key(1)), None);
        let cookie = old.cookie(id, "t.example", false);
        let headers = sent(&format!("a=b; {}; c", value(&cookie)));
        assert_eq!(old.read(&headers), Some(id));
        assert_eq!(rotated.read(&headers), Some(id));
        assert_eq!(visitors(&key(2), None).read(&headers), None);
        let both = sent(&format!("hk_vid=forged; {}", value(&cookie)));
        assert_eq!(old.read(&both), Some(id));
        assert_eq!(old.read(&sent("hk_vid=; hk_vid; x=y")), None);
        assert_eq!(old.read(&HeaderMap::new()), None);
    }

    #[test]
    fn attributes_are_those_of_the_contract() {
        let id = VisitorId::from_bytes([9; 16]);
        let tail = |visitors: &Visitors, host, https| {
            let cookie = visitors.cookie(id, host, https);
            cookie.split_once("; ").expect("attributes").1.to_owned()
        };
        let host_only = visitors(&key(1), None);
        assert_eq!(
            tail(&host_only, "t.example", false),
            "Max-Age=34560000; Path=/; HttpOnly; SameSite=Lax"
        );
        assert_eq!(
            tail(&host_only, "t.example", true),
            "Max-Age=34560000; Path=/; Secure; HttpOnly; SameSite=Lax"
        );
        let domain = visitors(&key(1), Some("brand.example"));
        for (host, given) in [
            ("t.brand.example:8026", true),
            ("brand.example", true),
            ("notbrand.example", false),
            ("t.other.example", false),
        ] {
            let has = tail(&domain, host, false).contains("Domain=brand.example");
            assert_eq!(has, given, "{host}");
        }
    }

    proptest! {
        #[test]
        fn a_changed_cookie_is_nobodys(id: [u8; 16], at: proptest::sample::Index, to in "[A-Za-z0-9_=-]") {
            let visitors = visitors(&key(1), None);
            let cookie = visitors.cookie(VisitorId::from_bytes(id), "t.example", true);
            let mut changed: Vec<char> = value(&cookie).chars().collect();
            let place = NAME.len() + 1 + at.index(VALUE_CHARS);
            let to = to.chars().next().expect("one");
            prop_assume!(changed[place] != to);
            changed[place] = to;
            let changed: String = changed.into_iter().collect();
            prop_assert_eq!(visitors.read(&sent(&changed)), None);
        }

        #[test]
        fn any_cookie_header_is_read(text in "[ -~]{0,200}") {
            prop_assert_eq!(visitors(&key(1), None).read(&sent(&text)), None);
        }
    }
}
