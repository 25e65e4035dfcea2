//! The tracking keys in use on all nodes: this node's own is told, the others' are followed.
//!
//! Every node does this for itself. Must not change a key, nor keep a node from sending: what is
//! missing shows in `/readyz`.

use std::sync::Arc;

use arc_swap::ArcSwap;
use links::KeyRing;
use model::JournalId;
use service::clock::SharedClock;
use service::tasks::Shutdown;
use store::{SIGNING_KEY_TOLD, Store, StoreError, signing_keys, tell_signing_key};

/// What is needed to tell and to follow.
pub(crate) struct SigningKeys {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) node: JournalId,
    pub(crate) clock: SharedClock,
    pub(crate) ring: Arc<ArcSwap<KeyRing>>,
    /// The ids of the keys that any node signs with, as last seen.
    pub(crate) in_use: Arc<ArcSwap<Vec<u16>>>,
}

impl SigningKeys {
    /// Until the process ends.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let follow = async {
            let mut is_told = false;
            loop {
                match self.once(is_told).await {
                    Ok(told) => is_told = told,
                    Err(error) => {
                        tracing::debug!(%error, "tracking keys in use are told later");
                    }
                }
                tokio::time::sleep(SIGNING_KEY_TOLD).await;
            }
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.begun() => {}
        }
    }

    /// Whether this node's key is told. A node that comes with a file of its own is the one that is
    /// wrong: as long as it lacks a key of the others, it does not make them lack its own.
    async fn once(&self, was_told: bool) -> Result<bool, StoreError> {
        let now = self.clock.now();
        let in_use = signing_keys(&*self.store, now).await?;
        let ring = self.ring.load();
        let trouble = ring.trouble(&in_use);
        if let Some(trouble) = &trouble {
            tracing::error!("{trouble}");
        }
        let is_told = was_told || trouble.is_none();
        if let Some(id) = ring.ids().next().filter(|_| is_told) {
            tell_signing_key(&*self.store, self.node, id, now).await?;
        }
        self.in_use.store(Arc::new(in_use));
        Ok(is_told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::SystemClock;
    use store::sqlite::{Role, SqliteOptions, SqliteStore};

    fn ring(secrets: &[u8]) -> Arc<ArcSwap<KeyRing>> {
        let text: String = secrets
            .iter()
            .map(|byte| KeyRing::file_text(&[*byte; 32]))
            .collect();
        Arc::new(ArcSwap::from_pointee(KeyRing::parse(&text).expect("keys")))
    }

    #[tokio::test]
    async fn a_node_with_a_file_of_its_own_is_the_one_that_is_wrong() {
        let directory = tempfile::tempdir().expect("a directory");
        let options = SqliteOptions {
            path: directory.path().join("store.db"),
            partitions: 1,
            role: Role::Mta,
        };
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(options).await.expect("a store"));
        let clock = SystemClock::shared();
        let node = |number: u128, secrets: &[u8]| SigningKeys {
            store: Arc::clone(&store),
            node: JournalId::new(clock.now(), number),
            clock: clock.clone(),
            ring: ring(secrets),
            in_use: Arc::default(),
        };
        let trouble = |node: &SigningKeys| node.ring.load().trouble(&node.in_use.load());
        let (first, second) = (node(1, &[7]), node(2, &[7]));
        assert_eq!(first.once(false).await, Ok(true));
        assert_eq!(second.once(false).await, Ok(true));
        let stranger = node(3, &[9]);
        assert_eq!(stranger.once(false).await, Ok(false));
        assert!(trouble(&stranger).is_some());
        assert_eq!(first.once(true).await, Ok(true));
        assert_eq!(trouble(&first), None, "it is not the others' trouble");

        // A rotation that begins with the signing key is one.
        first.ring.store(ring(&[8, 7]).load_full());
        assert_eq!(first.once(true).await, Ok(true));
        assert_eq!(second.once(true).await, Ok(true));
        assert!(trouble(&second).is_some());
        second.ring.store(ring(&[8, 7]).load_full());
        assert_eq!(trouble(&second), None);
        // Nobody signs with the old one any more.
        assert_eq!(second.once(true).await, Ok(true));
        second.ring.store(ring(&[8]).load_full());
        assert_eq!(second.once(true).await, Ok(true));
        assert_eq!(trouble(&second), None);
    }
}
