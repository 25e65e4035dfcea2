//! Answers by name, each with its end; one question in flight per name.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use futures_util::FutureExt as _;
use futures_util::future::Shared;

type Asking<T> = Shared<Pin<Box<dyn Future<Output = (T, Instant)> + Send>>>;

/// The memory; see the module.
pub(crate) struct Cache<T: Clone> {
    names_max: usize,
    names: Mutex<HashMap<Box<str>, Asking<T>>>,
}

impl<T: Clone + Send + Sync + 'static> Cache<T> {
    pub(crate) fn new(names_max: usize) -> Self {
        Self {
            names_max,
            names: Mutex::new(HashMap::new()),
        }
    }

    /// What is known of `name` at `now`; if nothing is, `ask` is polled by whoever waits for it.
    pub(crate) async fn get<F>(
        &self,
        name: &str,
        now: Instant,
        ask: impl FnOnce() -> F,
    ) -> (T, Instant)
    where
        F: Future<Output = (T, Instant)> + Send + 'static,
    {
        let asking = self.entry(name, now, ask);
        asking.await
    }

    /// What was last known of `name`, without asking: it may be over, and none says nothing.
    pub(super) fn peek(&self, name: &str) -> Option<T> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.get(name)?.peek().map(|(answer, _)| answer.clone())
    }

    fn entry<F>(&self, name: &str, now: Instant, ask: impl FnOnce() -> F) -> Asking<T>
    where
        F: Future<Output = (T, Instant)> + Send + 'static,
    {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(name).filter(|known| !is_over(known, now)) {
            return known.clone();
        }
        if names.len() >= self.names_max {
            names.retain(|_, known| !is_over(known, now));
        }
        if names.len() >= self.names_max {
            // All of it is fresh: forget some, whichever. They are asked for again when needed.
            let some: Vec<_> = names
                .keys()
                .take(self.names_max / 10 + 1)
                .cloned()
                .collect();
            for name in some {
                names.remove(&name);
            }
        }
        let asking = (Box::pin(ask()) as Pin<Box<dyn Future<Output = _> + Send>>).shared();
        names.insert(name.into(), asking.clone());
        asking
    }
}

fn is_over<T: Clone>(known: &Asking<T>, now: Instant) -> bool {
    known.peek().is_some_and(|(_, until)| *until <= now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    #[tokio::test]
    async fn one_question_per_name_and_life() {
        let cache = Cache::new(10);
        let asked = Arc::new(AtomicU32::new(0));
        let start = SystemClock.instant();
        let ask = || {
            let asked = Arc::clone(&asked);
            async move {
                tokio::task::yield_now().await;
                (
                    asked.fetch_add(1, Ordering::Relaxed),
                    start + Duration::from_secs(1),
                )
            }
        };
        let both = tokio::join!(cache.get("a", start, ask), cache.get("a", start, ask));
        assert_eq!((both.0.0, both.1.0), (0, 0));
        assert_eq!(
            cache
                .get("a", start + Duration::from_millis(999), ask)
                .await
                .0,
            0
        );
        assert_eq!(
            cache.get("a", start + Duration::from_secs(1), ask).await.0,
            1
        );
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let cache = Cache::new(10);
        let start = SystemClock.instant();
        for n in 0..100 {
            cache
                .get(&n.to_string(), start, || async move {
                    ((), start + Duration::from_secs(1))
                })
                .await;
        }
        assert!(cache.names.lock().expect("unpoisoned").len() <= 10);
    }
}
