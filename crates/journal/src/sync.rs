//! The thread that writes and syncs what nobody asked for, and what somebody waits for.
//!
//! It sleeps while nothing was appended. One sync serves everybody who waited for it.

use crate::journal::{Shared, WriteError};
use crate::lock;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a full disk is tried again.
const RETRY: Duration = Duration::from_millis(250);

/// Says when to sync.
#[derive(Debug)]
pub(crate) struct Pacer {
    interval: Option<Duration>,
    /// A cheap look at `Asked::dirty` for `append`.
    dirty: AtomicBool,
    asked: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Asked {
    dirty: bool,
    urgent: bool,
    stop: bool,
}

impl Pacer {
    pub(crate) fn new(interval: Option<Duration>) -> Self {
        let asked = Mutex::default();
        Self {
            interval,
            dirty: AtomicBool::new(false),
            asked,
            changed: Condvar::new(),
        }
    }

    /// Something was appended: sync after the interval.
    pub(crate) fn appended(&self) {
        // Looked at before it is set: mostly it is set, and threads that append would take the line
        // of memory from each other. What the sync did not see was appended after it cleared this.
        if self.interval.is_some()
            && !self.dirty.load(Ordering::Acquire)
            && !self.dirty.swap(true, Ordering::AcqRel)
        {
            lock(&self.asked).dirty = true;
            self.changed.notify_one();
        }
    }

    /// Somebody waits: sync now.
    pub(crate) fn urge(&self) {
        lock(&self.asked).urgent = true;
        self.changed.notify_one();
    }

    fn stop(&self) {
        lock(&self.asked).stop = true;
        self.changed.notify_one();
    }

    /// Waits until a sync is due; false when it is time to end.
    fn due(&self, wait: Duration) -> bool {
        let idle = |asked: &mut Asked| !(asked.dirty || asked.urgent || asked.stop);
        let calm = |asked: &mut Asked| !(asked.urgent || asked.stop);
        let asked = self.changed.wait_while(lock(&self.asked), idle);
        let asked = asked.unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(asked, wait, calm);
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // Cleared before the sync looks at what there is: what is appended from now on asks anew.
        asked.dirty = false;
        asked.urgent = false;
        self.dirty.store(false, Ordering::Release);
        !asked.stop
    }
}

/// The running thread; the last handle of a journal ends it.
#[derive(Debug)]
pub(crate) struct Syncer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    pub(crate) fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let theirs = Arc::clone(shared);
        let thread = std::thread::Builder::new()
            .name("journal-sync".to_owned())
            .spawn(move || run(&theirs))?;
        Ok(Self {
            shared: Arc::clone(shared),
            thread: Some(thread),
        })
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.shared.pacer.stop();
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the journal's sync thread has panicked");
        }
        // Whoever stops in order has called `sync` before and knows; this is for the others.
        if let Err(error) = self.shared.sync() {
            tracing::error!(%error, "journal could not be synced at its end");
        }
    }
}

fn run(shared: &Shared) {
    let interval = shared.pacer.interval.unwrap_or(Duration::ZERO);
    let mut wait = interval;
    while shared.pacer.due(wait) {
        wait = match shared.sync() {
            Ok(()) => interval,
            Err(WriteError::NoSpace) => {
                shared.pacer.appended();
                interval.max(RETRY)
            }
            // Said to everybody who asks; there is nothing to do until the next start.
            Err(WriteError::Poisoned(_)) => interval.max(RETRY),
        };
    }
}
