//! Accounts and API keys: those of the configuration file, and those that were added over the API.
//!
//! Owns how the latter are kept: as notes of the store, which every node reads twice a second, so
//! that a change is in force everywhere within one. A key is kept as its SHA-256 alone. What stands
//! in the file is not changed here.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use model::units::Rate;
use model::{Timestamp, TrackingMode};
use serde::{Deserialize, Serialize};
use service::clock::SharedClock;
use service::config::{Account, DkimPolicy, Scope, StatusProfile, Tracking};
use service::tasks::{Shutdown, Tasks};
use store::{Note, Store};
use tokio::sync::watch;

use crate::admin::auth::{Key, Keys};

/// Notes of accounts, and of keys.
const ACCOUNTS: &str = "account";
const KEYS: &str = "api-key";
/// How often they are read.
const READ_EVERY: Duration = Duration::from_millis(450);

/// An account as it is kept and shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AccountDoc {
    pub(crate) id: String,
    /// `["*"]`: any.
    pub(crate) from_domains: Vec<String>,
    pub(crate) dkim: String,
    pub(crate) status_profile: String,
    pub(crate) weight: u32,
    /// `"none"`, or a rate.
    pub(crate) quota: String,
    pub(crate) tracking: TrackingDoc,
}

/// Its `tracking`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrackingDoc {
    pub(crate) base_url: String,
    pub(crate) mode: TrackingMode,
    pub(crate) allowed_targets: Vec<String>,
    pub(crate) page_origins: Vec<String>,
}

/// A key as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct KeyDoc {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) account: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) sha256: String,
    pub(crate) created_at: Timestamp,
}

impl AccountDoc {
    pub(crate) fn of(account: &Account) -> Self {
        let domains = account.from_domains.as_ref();
        let quota = match account.quota {
            Rate::Unlimited => "none".to_owned(),
            limited @ Rate::Limited { .. } => limited.to_string(),
        };
        Self {
            id: account.id.clone(),
            from_domains: domains.map_or_else(
                || vec!["*".to_owned()],
                |domains| domains.iter().map(ToString::to_string).collect(),
            ),
            dkim: account.dkim.as_str().to_owned(),
            status_profile: account.status_profile.as_str().to_owned(),
            weight: account.weight,
            quota,
            tracking: TrackingDoc {
                base_url: account.tracking.base_url.clone(),
                mode: account.tracking.mode,
                allowed_targets: account.tracking.allowed_targets.clone(),
                page_origins: account.tracking.page_origins.clone(),
            },
        }
    }

    /// What it means; `None`: a later version wrote it.
    fn meant(self) -> Option<Account> {
        let any = self.from_domains.iter().any(|domain| domain == "*");
        let domains: Result<Vec<_>, _> = match any {
            true => Ok(Vec::new()),
            false => self.from_domains.iter().map(|name| name.parse()).collect(),
        };
        let word = |known: &&DkimPolicy| known.as_str() == self.dkim;
        let profile = |known: &&StatusProfile| known.as_str() == self.status_profile;
        Some(Account {
            from_domains: (!any).then_some(domains.ok()?),
            dkim: *DkimPolicy::ALL.iter().find(word)?,
            status_profile: *StatusProfile::ALL.iter().find(profile)?,
            weight: self.weight.max(1),
            quota: match self.quota.as_str() {
                "none" => Rate::Unlimited,
                rate => rate.parse().ok()?,
            },
            tracking: Tracking {
                base_url: self.tracking.base_url,
                mode: self.tracking.mode,
                allowed_targets: self.tracking.allowed_targets,
                page_origins: self.tracking.page_origins,
            },
            id: self.id,
        })
    }
}

impl KeyDoc {
    /// What the key may do; words of a later version mean nothing.
    pub(crate) fn scopes(&self) -> Vec<Scope> {
        let of = |word: &String| {
            Scope::ALL
                .iter()
                .copied()
                .find(|known| known.as_str() == word)
        };
        self.scopes.iter().filter_map(of).collect()
    }
}

/// Everyone who may use the service.
pub(crate) struct Tenants {
    store: Arc<dyn Store>,
    clock: SharedClock,
    keys: Arc<Keys>,
    configured: ArcSwap<Vec<Account>>,
    /// Those of the file, then those added.
    accounts: ArcSwap<Vec<Account>>,
    /// Told of each change of them.
    changes: watch::Sender<()>,
}

impl Tenants {
    /// Those of the file; the others come with the first [`Tenants::read`].
    pub(crate) fn new(
        store: Arc<dyn Store>,
        clock: SharedClock,
        keys: Arc<Keys>,
        configured: Vec<Account>,
    ) -> Self {
        Self {
            store,
            clock,
            keys,
            accounts: ArcSwap::from_pointee(configured.clone()),
            configured: ArcSwap::from_pointee(configured),
            changes: watch::Sender::new(()),
        }
    }

    /// All accounts, those of the file first.
    pub(crate) fn accounts(&self) -> Arc<Vec<Account>> {
        self.accounts.load_full()
    }

    /// Whether the account stands in the file.
    pub(crate) fn is_configured(&self, id: &str) -> bool {
        self.configured
            .load()
            .iter()
            .any(|account| account.id == id)
    }

    /// Reads what was added, on whichever node.
    pub(crate) async fn read(&self) -> store::Result<()> {
        let now = self.clock.now();
        let added = self.store.notes(ACCOUNTS, now).await?;
        let added = added.iter().filter_map(|note| {
            let doc: AccountDoc = serde_json::from_slice(&note.value).ok()?;
            doc.meant()
                .filter(|account| !self.is_configured(&account.id))
        });
        let configured = self.configured.load();
        self.set(configured.iter().cloned().chain(added).collect());
        let docs = self.key_docs().await?;
        self.keys
            .set_added(docs.iter().filter_map(Key::added).collect());
        Ok(())
    }

    fn set(&self, all: Vec<Account>) {
        let docs = |of: &[Account]| of.iter().map(AccountDoc::of).collect::<Vec<_>>();
        let before = self.accounts.swap(Arc::new(all));
        if docs(&before) != docs(&self.accounts.load()) {
            self.changes.send_replace(());
        }
    }

    /// Takes the weights and status profiles of a file that was read again; what else stands there
    /// holds from the next start on.
    pub(crate) fn configure(&self, read: &[Account]) {
        let again = |known: &Account| {
            let found = read.iter().find(|of| of.id == known.id);
            let mut account = known.clone();
            if let (true, Some(found)) = (self.is_configured(&known.id), found) {
                account.weight = found.weight;
                account.status_profile = found.status_profile;
            }
            account
        };
        let configured = self.configured.load().iter().map(again).collect();
        let all = self.accounts().iter().map(again).collect();
        self.configured.store(Arc::new(configured));
        self.set(all);
    }

    /// Changes of accounts, from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Reads now and again until the process ends.
    pub(crate) fn keep_reading(self: &Arc<Self>, tasks: &Tasks, shutdown: &Shutdown) {
        let (tenants, shutdown) = (Arc::clone(self), shutdown.clone());
        drop(tasks.spawn("tenants", async move {
            loop {
                tokio::select! {
                    () = shutdown.begun() => return,
                    () = tokio::time::sleep(READ_EVERY) => {}
                }
                if let Err(error) = tenants.read().await {
                    tracing::debug!(%error, "accounts and keys are as they were when last read");
                }
            }
        }));
    }

    /// Keeps an account.
    pub(crate) async fn put_account(&self, account: &Account) -> store::Result<()> {
        let doc = serde_json::to_vec(&AccountDoc::of(account)).unwrap_or_default();
        self.put(ACCOUNTS, &account.id, doc).await
    }

    /// Forgets an account.
    pub(crate) async fn remove_account(&self, id: &str) -> store::Result<()> {
        self.put(ACCOUNTS, id, Vec::new()).await
    }

    /// The keys that were added.
    pub(crate) async fn key_docs(&self) -> store::Result<Vec<KeyDoc>> {
        let notes = self.store.notes(KEYS, self.clock.now()).await?;
        let docs = notes.iter();
        Ok(docs
            .filter_map(|note| serde_json::from_slice(&note.value).ok())
            .collect())
    }

    /// Keeps a key.
    pub(crate) async fn put_key(&self, key: &KeyDoc) -> store::Result<()> {
        let doc = serde_json::to_vec(key).unwrap_or_default();
        self.put(KEYS, &key.id, doc).await
    }

    /// Forgets a key.
    pub(crate) async fn remove_key(&self, id: &str) -> store::Result<()> {
        self.put(KEYS, id, Vec::new()).await
    }

    async fn put(&self, kind: &str, key: &str, value: Vec<u8>) -> store::Result<()> {
        let note = Note {
            kind: kind.into(),
            key: key.into(),
            value: value.into(),
            expires_at: None,
        };
        self.store.put_notes(vec![note], self.clock.now()).await?;
        self.read().await
    }
}
