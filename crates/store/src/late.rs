//! A store that was away when the process started: it is opened when it comes.
//!
//! Owns the waiting. Until the store is there every call is refused as unavailable, which is what
//! everybody has to live with anyway; once it is there it is as if it had been opened at the start.

use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::{FeedPlace, Layer, Result, Store, StoreError};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What the configuration says of a store that nobody has seen yet.
#[derive(Debug, Clone, Copy)]
pub struct Assumed {
    /// For [`Store::partitions`]; the store may have been made with others.
    pub partitions: u16,
    /// For [`Store::is_shared`].
    pub is_shared: bool,
}

/// A store, and what is left to do until it is there.
#[must_use = "what is left has to be waited for somewhere"]
pub struct Opened {
    /// The store, or what stands for it until it comes.
    pub store: Arc<dyn Store>,
    /// Ends when the store is there; `None`: it is. To be run as a task. Cancel-safe.
    pub waiting: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Opens a store by `open`, now or, when it is not available now, as soon as it is.
///
/// # Errors
/// When it is damaged or refuses: what a person has to mend is told at once.
pub async fn open_now_or_later<F, Opening>(assumed: Assumed, open: F) -> Result<Opened>
where
    F: Fn() -> Opening + Send + Sync + 'static,
    Opening: Future<Output = Result<Arc<dyn Store>>> + Send + 'static,
{
    match open().await {
        Ok(store) => Ok(Opened {
            store,
            waiting: None,
        }),
        Err(error @ StoreError::Unavailable(_)) => {
            tracing::error!(%error, "starting without the store; it is opened when it comes");
            let late = Arc::new(Late {
                opened: OnceLock::new(),
                assumed,
                why: Mutex::new(error),
            });
            Ok(Opened {
                store: late.clone(),
                waiting: Some(Box::pin(late.keep_opening(open))),
            })
        }
        Err(error) => Err(error),
    }
}

/// Stands for a store until it is there, and in front of it from then on.
struct Late {
    opened: OnceLock<Arc<dyn Store>>,
    assumed: Assumed,
    /// Why it is not open yet.
    why: Mutex<StoreError>,
}

impl Late {
    async fn keep_opening<F, Opening>(self: Arc<Self>, open: F)
    where
        F: Fn() -> Opening + Send + Sync,
        Opening: Future<Output = Result<Arc<dyn Store>>> + Send + 'static,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            // Jitter: processes that started without the store together do not ask it together.
            tokio::time::sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            match open().await {
                Ok(store) => {
                    tracing::info!("the store is there");
                    let is_first = self.opened.set(store).is_ok();
                    debug_assert!(is_first, "nobody else opens it");
                    return;
                }
                Err(StoreError::Unavailable(why)) => {
                    tracing::debug!(%why, "the store is still away");
                    self.note(StoreError::Unavailable(why));
                }
                Err(error) => {
                    // It came, and is not what it should be. Ending now would break what is served
                    // without it; whoever mends it does not have to start anything again.
                    tracing::error!(%error, "the store has come and cannot be used");
                    self.note(error);
                }
            }
        }
    }

    fn note(&self, error: StoreError) {
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// Every error is one that passes: the store may be mended while this process runs.
    fn refusal(&self) -> StoreError {
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        match &*why {
            StoreError::Unavailable(why) => StoreError::Unavailable(why.clone()),
            other => StoreError::Unavailable(other.to_string()),
        }
    }
}

#[async_trait]
impl Layer for Late {
    /// Before the store is there it is this one, whose `before` refuses.
    fn inner(&self) -> &dyn Store {
        self.opened.get().map_or(self, |store| &**store)
    }

    fn partitions_known(&self) -> u16 {
        let opened = self.opened.get();
        opened.map_or(self.assumed.partitions, |store| store.partitions())
    }

    fn is_shared_known(&self) -> bool {
        let opened = self.opened.get();
        opened.map_or(self.assumed.is_shared, |store| store.is_shared())
    }

    fn shipment_size_known(&self) -> usize {
        let opened = self.opened.get();
        opened.map_or(crate::SHIPMENT, |store| store.shipment_size())
    }

    fn is_open_now(&self) -> bool {
        self.opened.get().is_some()
    }

    fn caveat_known(&self) -> Option<String> {
        self.opened.get()?.caveat()
    }

    async fn before(&self, _call: &'static str) -> Result<()> {
        match self.opened.get() {
            Some(_) => Ok(()),
            None => Err(self.refusal()),
        }
    }

    async fn until_changed(&self, after: FeedPlace<'_>, at_most: Duration) {
        match self.opened.get() {
            Some(store) => store.changed(after, at_most).await,
            None => tokio::time::sleep(at_most).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::{Role, SqliteOptions, SqliteStore};
    use std::sync::atomic::{AtomicU32, Ordering};

    const ASSUMED: Assumed = Assumed {
        partitions: 1,
        is_shared: true,
    };

    async fn real(dir: &std::path::Path) -> Result<Arc<dyn Store>> {
        let options = SqliteOptions {
            path: dir.join("hikyaku.db"),
            partitions: 4,
            role: Role::Tracker,
        };
        Ok(Arc::new(SqliteStore::open(options).await?))
    }

    #[tokio::test]
    async fn what_is_away_is_refused_until_it_comes_and_then_is_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_owned();
        let tries = Arc::new(AtomicU32::new(0));
        let opened = open_now_or_later(ASSUMED, move || {
            let (path, number) = (path.clone(), tries.fetch_add(1, Ordering::Relaxed));
            async move {
                match number {
                    0 => Err(StoreError::Unavailable("nobody listens".into())),
                    1 => Err(StoreError::Refused("it forgets".into())),
                    _ => real(&path).await,
                }
            }
        });
        let Opened { store, waiting } = opened.await.expect("later");
        assert!(!store.is_open() && store.is_shared() && store.caveat().is_none());
        assert_eq!(store.partitions(), 1);
        let refused = StoreError::Unavailable("nobody listens".into());
        assert_eq!(store.check().await, Err(refused));
        let setting = store.setting("key", "value").await;
        assert!(setting.is_err(), "every call is refused");

        waiting.expect("something is left to do").await;
        assert!(store.is_open() && !store.is_shared());
        assert_eq!(store.partitions(), 4);
        assert_eq!(store.check().await, Ok(()));
        assert_eq!(store.setting("key", "value").await, Ok("value".to_owned()));
    }

    #[tokio::test]
    async fn a_mistake_is_told_at_once() {
        let refused = || async { Err(StoreError::Refused("it forgets".into())) };
        let opened = open_now_or_later(ASSUMED, refused).await;
        assert!(matches!(opened.err(), Some(StoreError::Refused(_))));
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().to_owned();
        let there = move || {
            let path = path.clone();
            async move { real(&path).await }
        };
        let opened = open_now_or_later(ASSUMED, there).await.expect("opened");
        assert!(opened.waiting.is_none() && opened.store.is_open());
    }
}
