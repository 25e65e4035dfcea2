//! Who may use the service: API, keys, accounts.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use model::units::Rate;
use model::{Domain, TrackingMode};

use super::{name, unique};
use crate::config::Environment;
use crate::config::document::{Item, Value};
use crate::config::reader::{Meant, Section};
use crate::config::values::{ByteSize, DkimPolicy, Scope, Secret, StatusProfile};

/// `[api]`
#[derive(Debug, Clone)]
pub struct Api {
    /// API, console, metrics, health.
    pub listen: SocketAddr,
    /// Bytes of a JSON document, decompressed.
    pub max_body: u64,
    /// Bytes of an NDJSON or CSV stream, decompressed.
    pub max_stream: u64,
    /// Empty: one with every scope is made at first start.
    pub keys: Vec<ApiKey>,
}

/// One of `[[api.keys]]`
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// For logs and lists.
    pub name: String,
    /// What a caller's key is compared with.
    pub material: KeyMaterial,
    /// The account that it acts for.
    pub account: String,
    /// What it may do; never empty.
    pub scopes: Vec<Scope>,
}

/// What is known of a key.
#[derive(Clone, PartialEq, Eq)]
pub enum KeyMaterial {
    /// The key itself.
    Plain(Secret),
    /// Its SHA-256.
    Sha256([u8; 32]),
}

impl std::fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain(…)",
            Self::Sha256(_) => "Sha256(…)",
        })
    }
}

/// One of `[[accounts]]`
#[derive(Debug, Clone)]
pub struct Account {
    /// Unique.
    pub id: String,
    /// Whose addresses may stand in From; `None`: any.
    pub from_domains: Option<Vec<Domain>>,
    /// Whether unsigned mail may leave.
    pub dkim: DkimPolicy,
    /// What a delivery status means for further mail.
    pub status_profile: StatusProfile,
    /// Share of a contended destination; at least 1.
    pub weight: u32,
    /// Recipients that it may submit; `Unlimited` for "none".
    pub quota: Rate,
    /// Links and pixels.
    pub tracking: Tracking,
}

/// `[accounts.tracking]`
#[derive(Debug, Clone)]
pub struct Tracking {
    /// What links and pixels point to: http or https, no final slash.
    pub base_url: String,
    /// How much is recorded of a person.
    pub mode: TrackingMode,
    /// Hosts that links may lead to, lower case, without port; empty: any.
    pub allowed_targets: Vec<String>,
    /// Origins of sites that may send page views, `https://shop.example`.
    pub page_origins: Vec<String>,
}

pub(super) fn api(
    section: &mut Section<'_>,
    accounts: &[Account],
    environment: &Environment,
) -> Api {
    let api = Api {
        listen: section.value("listen", SocketAddr::from(([127, 0, 0, 1], 8025))),
        max_body: section.value("max_body", ByteSize(64 << 20)).0,
        max_stream: section.value("max_stream", ByteSize(4 << 30)).0,
        keys: section.tables("keys", |key| api_key(key, accounts, environment)),
    };
    unique(
        api.keys.iter().map(|key| key.name.as_str()),
        |index, detail| {
            section.mistake(&format!("keys[{index}].name"), detail);
        },
    );
    api
}

fn api_key(section: &mut Section<'_>, accounts: &[Account], environment: &Environment) -> ApiKey {
    let account = section.checked("account", |id: &String| {
        let known = accounts.iter().any(|account| account.id == *id);
        known
            .then_some(())
            .ok_or_else(|| format!("there is no account {id:?}"))
    });
    let scopes = section.list("scopes");
    if scopes.as_ref().is_some_and(Vec::is_empty) {
        section.mistake("scopes", "is empty, so the key could do nothing".to_owned());
    }
    ApiKey {
        name: section.required("name", String::new()),
        material: key_material(section, environment),
        account: account.unwrap_or_else(|| "default".to_owned()),
        // What steers other tenants has to be said.
        scopes: scopes.unwrap_or_else(|| vec![Scope::Submit, Scope::Read]),
    }
}

fn key_material(section: &mut Section<'_>, environment: &Environment) -> KeyMaterial {
    let directory = section.directory();
    let from_file = section.converted("key_file", |file: String| secret_in(&directory.join(file)));
    let from_variable = section.converted("key_env", |variable: String| {
        secret_of(environment, &variable)
    });
    let hash = section.converted("key_sha256", |hex: String| sha256_of_hex(&hex));
    let ways = ["key_file", "key_env", "key_sha256"];
    if ways.iter().filter(|way| section.has(way)).count() != 1 {
        section.mistake(
            "key_file",
            "write one of key_file, key_env and key_sha256".to_owned(),
        );
    }
    let plain = from_file.or(from_variable).map(KeyMaterial::Plain);
    plain.unwrap_or_else(|| KeyMaterial::Sha256(hash.unwrap_or_default()))
}

/// The secret in an environment variable.
pub(super) fn secret_of(environment: &Environment, variable: &str) -> Result<Secret, String> {
    let value = environment
        .var(variable)
        .map(str::trim)
        .filter(|text| !text.is_empty());
    value
        .map(Secret::new)
        .ok_or_else(|| format!("the variable {variable} is not set"))
}

/// The secret that a file holds, alone.
pub(super) fn secret_in(file: &Path) -> Result<Secret, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
    match text.trim() {
        "" => Err(format!("{} is empty", file.display())),
        key => Ok(Secret::new(key)),
    }
}

/// The text is not repeated: somebody may have put the key itself here.
fn sha256_of_hex(hex: &str) -> Result<[u8; 32], String> {
    let wrong = || "is not a SHA-256: 64 hexadecimal digits".to_owned();
    let mut hash = [0; 32];
    if hex.len() != 2 * hash.len() || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    for (byte, digits) in hash.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
    }
    Ok(hash)
}

pub(super) fn accounts(root: &mut Section<'_>) -> Vec<Account> {
    let mut accounts = root.tables("accounts", account);
    unique(
        accounts.iter().map(|account| account.id.as_str()),
        |index, detail| {
            root.mistake(&format!("accounts[{index}].id"), detail);
        },
    );
    if accounts.is_empty() {
        accounts.push(Account::implied());
    }
    accounts
}

impl Account {
    /// The one there is when the file names none: every default.
    pub fn implied() -> Self {
        Self {
            id: "default".to_owned(),
            from_domains: None,
            dkim: DkimPolicy::Required,
            status_profile: StatusProfile::Default,
            weight: 1,
            quota: Rate::Unlimited,
            tracking: Tracking {
                base_url: "http://127.0.0.1:8026".to_owned(),
                mode: TrackingMode::Individual,
                allowed_targets: Vec::new(),
                page_origins: Vec::new(),
            },
        }
    }
}

/// A domain, or `*` for any.
struct FromDomain(Option<Domain>);

impl Meant for FromDomain {
    fn meant(item: &Item) -> Result<Self, String> {
        match &item.value {
            Value::String(text) if text == "*" => Ok(Self(None)),
            _ => Domain::meant(item).map(|domain| Self(Some(domain))),
        }
    }
}

/// A rate, or `none`.
struct Quota(Rate);

impl Meant for Quota {
    fn meant(item: &Item) -> Result<Self, String> {
        match &item.value {
            Value::String(text) if text == "none" => Ok(Self(Rate::Unlimited)),
            _ => Rate::meant(item)
                .map(Self)
                .map_err(|detail| format!("{detail}, or \"none\"")),
        }
    }
}

fn account(section: &mut Section<'_>) -> Account {
    let default = Account::implied();
    let from_domains = section
        .list::<FromDomain>("from_domains")
        .unwrap_or_default();
    let any = from_domains.is_empty() || from_domains.iter().any(|domain| domain.0.is_none());
    let named = from_domains
        .into_iter()
        .filter_map(|domain| domain.0)
        .collect();
    if any && section.has("from_domains") && section.is_empty_list("from_domains") {
        section.mistake(
            "from_domains",
            "is empty: write [\"*\"] for any domain".to_owned(),
        );
    }
    Account {
        id: section.checked("id", name).unwrap_or(default.id),
        from_domains: (!any).then_some(named),
        dkim: section.value("dkim", default.dkim),
        status_profile: section.value("status_profile", default.status_profile),
        weight: section
            .checked("weight", |weight| match weight {
                0 => Err("0 would starve the account: at least 1".to_owned()),
                _ => Ok(()),
            })
            .unwrap_or(default.weight),
        quota: section.value("quota", Quota(default.quota)).0,
        tracking: section.table("tracking", |section| tracking(section, default.tracking)),
    }
}

fn tracking(section: &mut Section<'_>, default: Tracking) -> Tracking {
    Tracking {
        base_url: section
            .converted("base_url", |url: String| base_url(&url))
            .unwrap_or(default.base_url),
        mode: section.value("mode", default.mode),
        allowed_targets: texts(section.list("allowed_targets"), |Target(host)| host),
        page_origins: texts(section.list("page_origins"), |Origin(origin)| origin),
    }
}

fn texts<T>(typed: Option<Vec<T>>, text: impl FnMut(T) -> String) -> Vec<String> {
    typed.unwrap_or_default().into_iter().map(text).collect()
}

/// A host that a link may lead to: a domain or an IP address.
struct Target(String);

impl Meant for Target {
    fn meant(item: &Item) -> Result<Self, String> {
        link_target(&String::meant(item)?).map(Self)
    }
}

/// Checks a host that a link may lead to: a domain or an IP address.
///
/// # Errors
/// Why it is none, for people.
pub fn link_target(text: &str) -> Result<String, String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    let domain = text.parse::<Domain>();
    domain.map(|domain| domain.to_string()).map_err(|_| {
        format!(
            "{text:?} is not a host: write a domain or an IP address alone, without scheme or port"
        )
    })
}

/// Scheme, host and port, as a browser sends it.
struct Origin(String);

impl Meant for Origin {
    fn meant(item: &Item) -> Result<Self, String> {
        page_origin(&String::meant(item)?).map(Self)
    }
}

/// Checks the origin of a site: scheme, host and port, as a browser sends it.
///
/// # Errors
/// Why it is none, for people.
pub fn page_origin(url: &str) -> Result<String, String> {
    let origin = base_url(url)?;
    match origin.matches('/').count() {
        2 => Ok(origin),
        _ => Err(format!(
            "{url:?} has a path: an origin ends after the host and port"
        )),
    }
}

/// Checks that a path can be appended, and takes a final slash off.
///
/// # Errors
/// Why it cannot, for people.
pub fn base_url(url: &str) -> Result<String, String> {
    let wrong = |why: &str| format!("{url:?} {why}: write http(s)://HOST[:PORT][/PATH]");
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    let rest = rest.ok_or_else(|| wrong("is not a web address"))?;
    if rest.contains(['?', '#', '@']) {
        return Err(wrong("has a query, a fragment or a user"));
    }
    let strange = |c: char| !c.is_ascii_graphic() || matches!(c, '"' | '\'' | '<' | '>' | '\\');
    if rest.contains(strange) {
        return Err(wrong("has a character that no link can carry"));
    }
    match rest.split('/').next() {
        None | Some("") => Err(wrong("has no host")),
        Some(_) => Ok(url.trim_end_matches('/').to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_can_be_appended_to() {
        let meant = |url| base_url(url).expect(url);
        assert_eq!(meant("http://127.0.0.1:8026"), "http://127.0.0.1:8026");
        assert_eq!(
            meant("https://t.brand.example/x/"),
            "https://t.brand.example/x"
        );
        for wrong in [
            "t.brand.example",
            "https://",
            "https:///x",
            "ftp://a",
            "http://a?b",
            "http://a b",
        ] {
            assert!(base_url(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn key_material_is_never_shown() {
        let plain = KeyMaterial::Plain(Secret::new("hk_live_1"));
        let hash = sha256_of_hex(&"ab".repeat(32)).map(KeyMaterial::Sha256);
        assert_eq!(format!("{plain:?} {hash:?}"), "Plain(…) Ok(Sha256(…))");
        assert!(sha256_of_hex("hk_live_1").is_err_and(|detail| !detail.contains("hk_live_1")));
    }
}
