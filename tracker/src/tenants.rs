//! What the tracker knows of the store's: accounts made over the API, and archived batches.
//!
//! Owns what is read in the background, every second, and forgotten by nobody when the store is
//! away: the last that was read holds. Nothing that is answered waits for it.

use crate::http::page::Origins;
use crate::keys::Hosts;
use arc_swap::ArcSwap;
use model::{BatchId, Domain};
use serde::Deserialize;
use service::clock::SharedClock;
use service::config::{Account, https_host};
use service::tasks::Shutdown;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use store::{BatchQuery, Control, ControlCursor, Store, StoreError};

/// The notes of the store that are accounts; the MTA writes them.
const ACCOUNTS: &str = "account";
const EVERY: Duration = Duration::from_secs(1);
/// Batches read at once when all are looked at.
const PAGE: u32 = 1_000;
/// A full page of the control feed.
const CONTROLS: usize = 1_000;
/// Archived batches that are remembered, at 16 bytes; beyond, some get a cookie, and their hits
/// are dropped by the store all the same.
const MOST_ARCHIVED: usize = 1_000_000;

/// An account as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    id: String,
    base_url: String,
    page_origins: Vec<String>,
}

/// The same as the MTA notes it; it has more fields.
#[derive(Deserialize)]
struct Noted {
    id: String,
    tracking: NotedTracking,
}

#[derive(Deserialize)]
struct NotedTracking {
    base_url: String,
    page_origins: Vec<String>,
}

/// What follows from all accounts.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) hosts: Hosts,
    pub(crate) origins: Origins,
    /// Names under which accounts that were made over the API are reached by https.
    pub(crate) added_https: Vec<Domain>,
}

/// What is known now.
#[derive(Debug)]
pub(crate) struct Tenants {
    configured: Vec<Known>,
    view: ArcSwap<View>,
    archived: ArcSwap<HashSet<BatchId>>,
}

impl Tenants {
    /// Those of the configuration; the others are read by [`Tenants::follow`].
    pub(crate) fn new(accounts: &[Account]) -> Self {
        let known = accounts.iter().map(|account| Known {
            id: account.id.clone(),
            base_url: account.tracking.base_url.clone(),
            page_origins: account.tracking.page_origins.clone(),
        });
        let configured: Vec<Known> = known.collect();
        Self {
            view: ArcSwap::from_pointee(View::of(&configured, &[])),
            configured,
            archived: ArcSwap::default(),
        }
    }

    /// What follows from the accounts.
    pub(crate) fn view(&self) -> arc_swap::Guard<Arc<View>> {
        self.view.load()
    }

    /// Whether tracking of a batch was switched off after it was sent.
    pub(crate) fn is_archived(&self, batch: BatchId) -> bool {
        self.archived.load().contains(&batch)
    }

    /// Reads what changes, until the process ends.
    pub(crate) async fn follow(
        self: Arc<Self>,
        store: Arc<dyn Store>,
        clock: SharedClock,
        shutdown: Shutdown,
    ) {
        let following = async {
            let mut cursor = None;
            let mut seen = Vec::new();
            loop {
                if let Err(error) = self.read(&*store, &clock, &mut seen, &mut cursor).await {
                    tracing::debug!(%error, "accounts and archived batches are as they were when last read");
                }
                tokio::time::sleep(EVERY).await;
            }
        };
        tokio::select! {
            () = shutdown.begun() => {}
            () = following => {}
        }
    }

    async fn read(
        &self,
        store: &dyn Store,
        clock: &SharedClock,
        seen: &mut Vec<Known>,
        cursor: &mut Option<ControlCursor>,
    ) -> Result<(), StoreError> {
        let notes = store.notes(ACCOUNTS, clock.now()).await?;
        let added: Vec<Known> = notes
            .iter()
            .filter_map(|note| serde_json::from_slice::<Noted>(&note.value).ok())
            .filter(|noted| self.configured.iter().all(|known| known.id != noted.id))
            .map(|noted| Known {
                id: noted.id,
                base_url: noted.tracking.base_url,
                page_origins: noted.tracking.page_origins,
            })
            .collect();
        if added != *seen {
            self.view
                .store(Arc::new(View::of(&self.configured, &added)));
            *seen = added;
        }
        *cursor = Some(match cursor.clone() {
            Some(after) => match self.read_on(store, after).await? {
                Some(next) => next,
                None => self.read_all(store).await?,
            },
            None => self.read_all(store).await?,
        });
        Ok(())
    }

    /// Looks at every batch. The feed first: what changes meanwhile comes with it.
    async fn read_all(&self, store: &dyn Store) -> Result<ControlCursor, StoreError> {
        let next = store.control(None).await?.next;
        let mut archived = HashSet::new();
        let mut after = None;
        loop {
            let page = store
                .batches(BatchQuery {
                    account: None,
                    state: None,
                    campaign: None,
                    after,
                    limit: PAGE,
                })
                .await?;
            let ids = page.items.iter().filter(|batch| batch.archived);
            archived.extend(ids.map(|batch| batch.head.id).take(MOST_ARCHIVED));
            after = page.items.last().map(|batch| batch.head.id);
            if page.next.is_none() || after.is_none() {
                break;
            }
        }
        self.archived.store(Arc::new(archived));
        Ok(next)
    }

    /// Reads on in the feed; `None`: it does not reach back so far.
    async fn read_on(
        &self,
        store: &dyn Store,
        mut after: ControlCursor,
    ) -> Result<Option<ControlCursor>, StoreError> {
        loop {
            let page = store.control(Some(after)).await?;
            if page.reset {
                return Ok(None);
            }
            let changes = page.items.iter().filter_map(|item| match item {
                Control::Archived(batch) => Some((*batch, true)),
                Control::Unarchived(batch) => Some((*batch, false)),
                _ => None,
            });
            let changes: Vec<_> = changes.collect();
            if !changes.is_empty() {
                let mut archived = HashSet::clone(&self.archived.load());
                for (batch, is) in changes {
                    match is {
                        true if archived.len() < MOST_ARCHIVED => archived.insert(batch),
                        true => false,
                        false => archived.remove(&batch),
                    };
                }
                self.archived.store(Arc::new(archived));
            }
            after = page.next;
            if page.items.len() < CONTROLS {
                return Ok(Some(after));
            }
        }
    }
}

impl View {
    fn of(configured: &[Known], added: &[Known]) -> Self {
        let all = || configured.iter().chain(added);
        let origins = all().flat_map(|account| {
            let origins = account.page_origins.iter();
            origins.map(|origin| (origin.as_str(), account.id.as_str()))
        });
        let https = added
            .iter()
            .filter_map(|account| https_host(&account.base_url));
        Self {
            hosts: Hosts::of(all().map(|account| account.base_url.as_str())),
            origins: Origins::of(origins),
            added_https: https.collect(),
        }
    }
}
