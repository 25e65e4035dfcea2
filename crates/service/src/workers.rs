//! Threads that each serve the connections they were given, and nobody else's.
//!
//! Owns which thread a connection is served on. A runtime of several threads moves tasks to whichever
//! thread is free, for which it is woken, and its caches filled anew; where answers are many and short, a
//! connection that stays on one thread costs less, and does not wait for what else the process does. What
//! blocks, blocks all connections of its worker. Must not know what is served.

use crate::tasks::{Shutdown, Stage, Tasks};
use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::runtime::{Builder, Handle};

/// The threads. Clones share them.
#[derive(Debug, Clone)]
pub struct Workers(Arc<[Worker]>);

/// One thread, with a runtime of its own.
#[derive(Debug, Clone)]
struct Worker {
    runtime: Handle,
    /// Tasks that it was given and that have not ended.
    given: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts as many as there are CPUs for this process; they end with the process, in
    /// [`Stage::Close`], together with what still runs on them.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn start(name: &'static str, tasks: &Tasks, shutdown: &Shutdown) -> io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, NonZero::get);
        let workers = (0..count).map(|_| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let worker = Worker {
                runtime: runtime.handle().clone(),
                given: Arc::default(),
            };
            let shutdown = shutdown.clone();
            tasks.thread(name, move || {
                runtime.block_on(shutdown.reached(Stage::Close));
            })?;
            Ok(worker)
        });
        workers.collect::<io::Result<_>>().map(Self)
    }

    /// Starts a small task (see [`Tasks::spawn_small`]) on the worker that has the fewest; what it starts
    /// stays there, too.
    pub fn spawn<F>(&self, tasks: &Tasks, name: &'static str, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let fewest = |worker: &&Worker| worker.given.load(Ordering::Relaxed);
        let Some(worker) = self.0.iter().min_by_key(fewest) else {
            return;
        };
        let given = Given::to(worker);
        let _entered = worker.runtime.enter();
        drop(tasks.spawn_small(name, async move {
            let _given = given;
            future.await;
        }));
    }
}

/// A task of a worker, until it ends or is dropped.
struct Given(Arc<AtomicUsize>);

impl Given {
    fn to(worker: &Worker) -> Self {
        worker.given.fetch_add(1, Ordering::Relaxed);
        Self(worker.given.clone())
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::thread::{self, ThreadId};
    use std::time::Duration;
    use tokio::sync::{mpsc, watch};

    #[tokio::test]
    async fn a_task_stays_where_it_began_and_goes_where_the_fewest_are() {
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        let workers = Workers::start("worker", &tasks, &shutdown).expect("threads");
        let (told, mut tells) = mpsc::channel(1_000);
        let (end, ends) = watch::channel(false);
        let each = 3;
        for _ in 0..workers.0.len() * each {
            let (told, mut ends, inner) = (told.clone(), ends.clone(), tasks.clone());
            workers.spawn(&tasks, "task", async move {
                let began = thread::current().id();
                ends.wait_for(|ends| *ends).await.expect("told to end");
                let of_its = inner.spawn("inner", async { thread::current().id() });
                let of_its = of_its.join().await.expect("ends");
                let seen = [began, thread::current().id(), of_its];
                told.send(seen).await.expect("heard");
            });
        }
        end.send_replace(true);
        let mut threads: HashMap<ThreadId, usize> = HashMap::new();
        for _ in 0..workers.0.len() * each {
            let seen = tells.recv().await.expect("told");
            assert_eq!(seen, [seen[0]; 3]);
            *threads.entry(seen[0]).or_default() += 1;
        }
        assert_eq!(threads.len(), workers.0.len());
        assert!(threads.values().all(|count| *count == each), "{threads:?}");
        assert!(!threads.contains_key(&thread::current().id()));
    }

    #[tokio::test]
    async fn they_end_with_the_process_and_take_with_them_what_does_not() {
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        let workers = Workers::start("worker", &tasks, &shutdown).expect("threads");
        workers.spawn(&tasks, "endless", std::future::pending());
        let patience = Duration::from_secs(20);
        shutdown.drain(patience).await.expect("nobody holds it up");
        let joined = tokio::time::timeout(patience, tasks.join()).await;
        joined.expect("they end").expect("without a panic");
        assert_eq!(workers.0[0].given.load(Ordering::Relaxed), 0);
    }
}
