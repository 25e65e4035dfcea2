//! The real embedded store, as a node reaches it over a simulated network.

use std::any::Any;
use std::cell::OnceCell;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_trait::async_trait;
use store::sqlite::SqliteStore;
use store::{FeedPlace, Layer, LeasedRange, RangeRef, Result, Store, StoreError};
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::watch::Watch;

/// How the store is reached now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Up,
    /// Answers after so long at most.
    Slow(Duration),
    /// Refuses.
    Down,
}

/// What all nodes share.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) reach: Mutex<Reach>,
    pub(super) random: Mutex<fastrand::Rng>,
}

/// The store of one node.
pub(super) struct NodeStore {
    pub(super) node: usize,
    pub(super) inner: Arc<SqliteStore>,
    pub(super) line: Arc<Line>,
    pub(super) watch: Arc<Watch>,
    /// When calls that are under way began.
    pub(super) began: Mutex<HashMap<&'static str, Instant>>,
}

impl NodeStore {
    fn delay(&self) -> Result<Duration> {
        let mut random = self
            .line
            .random
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let millis = match *self
            .line
            .reach
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
        {
            Reach::Up => random.u64(1..=8),
            Reach::Slow(most) => random.u64(1..=u64::try_from(most.as_millis()).expect("short")),
            Reach::Down => {
                self.watch.troubled(self.node);
                return Err(StoreError::Unavailable("cut off".to_owned()));
            }
        };
        let delay = Duration::from_millis(millis);
        if millis > 200 {
            self.watch.troubled_for(self.node, delay);
        }
        Ok(delay)
    }

    fn begin(&self, call: &'static str) {
        let mut began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        began.insert(call, Instant::now());
    }

    fn learn(&self, call: &'static str, answer: &dyn Any) {
        let began = self.began.lock().unwrap_or_else(PoisonError::into_inner);
        let began = began.get(call).copied();
        let asked_at = began.unwrap_or_else(Instant::now);
        if let Some(Ok(ranges)) = answer.downcast_ref::<Result<Vec<LeasedRange>>>() {
            self.watch.leased(self.node, ranges, asked_at);
        }
        if let Some(Ok(ranges)) = answer.downcast_ref::<Result<Vec<RangeRef>>>() {
            self.watch.renewed(self.node, ranges, asked_at);
        }
    }
}

#[async_trait]
impl Layer for NodeStore {
    fn inner(&self) -> &dyn Store {
        &*self.inner
    }

    async fn before(&self, call: &'static str) -> Result<()> {
        self.begin(call);
        let delay = self.delay()?;
        tokio::time::sleep(delay).await;
        Ok(())
    }

    async fn wait<'a, T: Send + 'static>(
        &'a self,
        call: &'static str,
        asked: Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>,
    ) -> Result<T> {
        let answer = in_place(asked);
        self.learn(call, &answer);
        let delay = self.delay().unwrap_or_default();
        tokio::time::sleep(delay).await;
        answer
    }

    /// A poll, as of a store that tells nothing by itself.
    async fn until_changed(&self, _after: FeedPlace<'_>, at_most: Duration) {
        tokio::time::sleep(at_most).await;
    }
}

thread_local! {
    /// Where the store of this thread's world has its threads: those of the world's own runtime
    /// would keep its clock from moving until they are quite done, which is a matter of luck.
    static ASIDE: OnceCell<Handle> = const { OnceCell::new() };
}

/// The store's threads are those of `aside`, for the world that begins on this thread.
pub(super) fn set_aside(aside: &Handle) {
    ASIDE.with(|cell| cell.set(aside.clone()).expect("a new thread"));
}

/// Waits for what other threads do, while virtual time and everybody in it stand still: so the
/// answer comes at the same place in every run.
pub(super) fn in_place<F: Future>(asked: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let aside = ASIDE.with(|cell| cell.get().cloned()).expect("set before");
    let _entered = aside.enter();
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    // Without a budget, which is given back only to tasks that yield.
    let mut asked = std::pin::pin!(tokio::task::unconstrained(asked));
    loop {
        match asked.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => return answer,
            Poll::Pending => std::thread::park(),
        }
    }
}
