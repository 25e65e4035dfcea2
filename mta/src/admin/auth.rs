//! Who calls, and what the call may do.
//!
//! Owns API keys in memory: only their SHA-256. Must not log a key or say whether one exists.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use arc_swap::ArcSwapOption;
use aws_lc_rs::{constant_time, digest, rand};
use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use service::config::{Account, ApiKey, KeyMaterial, Scope};

use super::Api;
use super::problem::{Answer, Code, Refusal};
use crate::tenants::KeyDoc;

/// The file in the data directory with the key that was made at first start.
const KEY_FILE: &str = "api-key";

/// The keys of the service.
pub(crate) struct Keys {
    /// Of the file, or the one made at first start.
    configured: Vec<Key>,
    /// Made over the API.
    /// `None`: they have not been read yet.
    added: ArcSwapOption<Vec<Key>>,
}

pub(crate) struct Key {
    hash: [u8; 32],
    caller: Caller,
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// The account that the key acts for.
    pub(crate) account: Arc<str>,
    /// What the key is called.
    pub(crate) name: Arc<str>,
    scopes: Arc<[Scope]>,
}

impl Caller {
    /// Whether the key has this scope.
    pub(crate) fn may(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// What the key may do.
    pub(crate) fn scopes(&self) -> &[Scope] {
        &self.scopes
    }

    /// Whether something of this account may be shown.
    pub(crate) fn sees(&self, account: &str) -> bool {
        *self.account == *account || self.may(Scope::Admin)
    }
}

impl Keys {
    /// The configured keys; when there are none, the one in `data_dir`, made at first start with
    /// every scope for the first account. Blocks.
    ///
    /// # Errors
    /// When that key can be neither read nor made.
    pub(crate) fn load(
        keys: &[ApiKey],
        accounts: &[Account],
        data_dir: &Path,
    ) -> anyhow::Result<Self> {
        if !keys.is_empty() {
            return Ok(Self::of(keys.iter().map(Key::configured).collect()));
        }
        let path = data_dir.join(KEY_FILE);
        let text =
            service::secrets::load_or_create(&path, fresh_key).context("the first API key")?;
        let text = text.trim();
        anyhow::ensure!(!text.is_empty(), "{} is empty", path.display());
        let account = accounts
            .first()
            .map_or("default", |account| account.id.as_str());
        let scopes = [Scope::Submit, Scope::Read, Scope::Admin];
        let caller = Caller {
            account: account.into(),
            name: KEY_FILE.into(),
            scopes: scopes.into(),
        };
        Ok(Self::of(vec![Key {
            hash: sha256(text),
            caller,
        }]))
    }

    fn of(configured: Vec<Key>) -> Self {
        Self {
            configured,
            added: ArcSwapOption::empty(),
        }
    }

    /// Whose keys stand in the file.
    pub(crate) fn configured(&self) -> impl Iterator<Item = &Caller> {
        self.configured.iter().map(|key| &key.caller)
    }

    /// Takes the keys made over the API, in place of those before.
    pub(crate) fn set_added(&self, added: Vec<Key>) {
        self.added.store(Some(Arc::new(added)));
    }

    /// Whether those made over the API are known.
    fn are_read(&self) -> bool {
        self.added.load().is_some()
    }

    /// Whose key it is. Takes the same time whichever it is.
    fn caller(&self, key: &str) -> Option<Caller> {
        let hash = sha256(key);
        let mut found = None;
        let added = self.added.load();
        for known in self
            .configured
            .iter()
            .chain(added.iter().flat_map(|added| added.iter()))
        {
            if constant_time::verify_slices_are_equal(&known.hash, &hash).is_ok() {
                found = Some(&known.caller);
            }
        }
        found.cloned()
    }
}

impl Key {
    /// A key made over the API; `None`: a later version wrote it.
    pub(crate) fn added(doc: &KeyDoc) -> Option<Self> {
        let mut hash = [0; 32];
        if doc.sha256.len() != 2 * hash.len() {
            return None;
        }
        for (byte, digits) in hash.iter_mut().zip(doc.sha256.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).ok()?;
            *byte = u8::from_str_radix(digits, 16).ok()?;
        }
        let caller = Caller {
            account: doc.account.as_str().into(),
            name: doc.name.as_str().into(),
            scopes: doc.scopes().into(),
        };
        Some(Self { hash, caller })
    }

    fn configured(key: &ApiKey) -> Self {
        let hash = match &key.material {
            KeyMaterial::Plain(secret) => sha256(secret.reveal()),
            KeyMaterial::Sha256(hash) => *hash,
        };
        let caller = Caller {
            account: key.account.as_str().into(),
            name: key.name.as_str().into(),
            scopes: key.scopes.as_slice().into(),
        };
        Self { hash, caller }
    }
}

fn sha256(text: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

/// The SHA-256 of a key, in hexadecimal digits.
pub(crate) fn sha256_hex(key: &str) -> String {
    sha256(key)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A new key.
///
/// # Errors
/// When the system has no random bytes.
pub(crate) fn fresh_key() -> std::io::Result<String> {
    let mut secret = [0_u8; 32];
    rand::fill(&mut secret).map_err(std::io::Error::other)?;
    Ok(format!("hk_{}", URL_SAFE_NO_PAD.encode(secret)))
}

/// A caller that may read.
pub(crate) struct CanRead(pub(crate) Caller);

/// A caller that may submit and steer.
pub(crate) struct CanSubmit(pub(crate) Caller);

impl FromRequestParts<Arc<Api>> for CanRead {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Answer<Self> {
        authorise(parts, &api.keys, Scope::Read).map(Self)
    }
}

impl FromRequestParts<Arc<Api>> for CanSubmit {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Answer<Self> {
        authorise(parts, &api.keys, Scope::Submit).map(Self)
    }
}

/// A caller that may do what concerns every account.
pub(crate) struct CanAdmin(pub(crate) Caller);

impl FromRequestParts<Arc<Api>> for CanAdmin {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Answer<Self> {
        authorise(parts, &api.keys, Scope::Admin).map(Self)
    }
}

fn authorise(parts: &Parts, keys: &Keys, scope: Scope) -> Answer<Caller> {
    let unauthorized = |detail: &str| Refusal::new(Code::Unauthorized, detail);
    let header = parts
        .headers
        .get(AUTHORIZATION)
        .ok_or_else(|| unauthorized("send the header Authorization: Bearer KEY"))?;
    let key = header
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim())
        .ok_or_else(|| unauthorized("the header Authorization is not of the form Bearer KEY"))?;
    let caller = keys.caller(key).ok_or_else(|| match keys.are_read() {
        true => unauthorized("the key is not known"),
        // It may be a good one, whose owner must not think that it was taken away.
        false => Refusal::new(
            Code::Unavailable,
            "keys have not been read from the store yet",
        ),
    })?;
    if !caller.may(scope) {
        let detail = format!("the key lacks the scope {}", scope.as_str());
        return Err(Refusal::new(Code::ForbiddenScope, detail));
    }
    Ok(caller)
}
