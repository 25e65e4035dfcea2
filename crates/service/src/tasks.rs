//! Named tasks and threads, and the order in which a process ends.
//!
//! Owns the only call of `tokio::spawn`: every task has a name in its log lines, is joined at the
//! end, and cannot die unnoticed. A panic is logged and reported to whoever supervises the process.
//! Knows nothing of what the tasks do; the drain order is that of `Stage`.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{Instrument as _, Span};

use crate::power::Power;

/// A task ended by a panic; its state is lost, so the process has to end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("task {name} panicked: {message}")]
pub struct TaskPanicked {
    /// The task's name.
    pub name: &'static str,
    /// The panic's message, where it had one.
    pub message: String,
}

/// All tasks and threads of a process. Clones share them.
#[derive(Debug, Clone)]
pub struct Tasks {
    tracker: TaskTracker,
    failure: Arc<watch::Sender<Option<TaskPanicked>>>,
    /// Only simulated processes have one.
    power: Option<Power>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// No tasks yet.
    pub fn new() -> Self {
        Self {
            tracker: TaskTracker::new(),
            failure: Arc::new(watch::Sender::new(None)),
            power: None,
        }
    }

    /// No tasks yet; those to come run while `power` is on.
    pub fn powered(power: &Power) -> Self {
        Self {
            power: Some(power.clone()),
            ..Self::new()
        }
    }

    /// Starts a task; every log line of it carries `task=name`. Dropping what is returned detaches
    /// the task, which is joined at the end all the same.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.start(name, tracing::info_span!("task", task = name), future)
    }

    /// Starts a task of which there are thousands, each woken for every request: like
    /// [`Self::spawn`], but its log lines carry its name only where `debug` is logged, since entering
    /// the span costs as much as reading a token.
    pub fn spawn_small<F>(&self, name: &'static str, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.start(name, tracing::debug_span!("task", task = name), future)
    }

    #[expect(clippy::disallowed_methods, reason = "this is where tasks start")]
    fn start<F>(&self, name: &'static str, span: Span, future: F) -> Task<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let failure = self.failure.clone();
        let guarded = async move {
            let caught = AssertUnwindSafe(future).catch_unwind().await;
            caught.map_err(|panic| report(&failure, name, &*panic))
        };
        let tracked = self.tracker.track_future(guarded.instrument(span));
        let handle = match self.power.clone() {
            None => tokio::spawn(tracked),
            Some(power) => tokio::spawn(async move {
                let killed = || TaskPanicked {
                    name,
                    message: "killed".to_owned(),
                };
                power.run(tracked).await.unwrap_or_else(|| Err(killed()))
            }),
        };
        Task { name, handle }
    }

    /// Starts an operating system thread of that name, for what blocks or computes for long
    /// (a store's writer, signing). It is waited for at the end, so it must end by itself.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn thread<F>(&self, name: &'static str, run: F) -> std::io::Result<()>
    where
        F: FnOnce() + Send + 'static,
    {
        let failure = self.failure.clone();
        let token = self.tracker.token();
        let guarded = move || {
            let _span = tracing::info_span!("thread", task = name).entered();
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(run)) {
                report(&failure, name, &*panic);
            }
            drop(token);
        };
        // Joined through the token: a handle would have to be awaited by someone.
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(guarded)
            .map(drop)
    }

    /// Resolves when the first task panics, and at once if one already has. Cancel-safe.
    pub async fn failed(&self) -> TaskPanicked {
        let mut failure = self.failure.subscribe();
        loop {
            if let Some(panicked) = failure.borrow_and_update().clone() {
                return panicked;
            }
            if failure.changed().await.is_err() {
                // The sender is ours and lives as long as `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until every task and thread has ended. Cancel-safe.
    ///
    /// # Errors
    /// The first panic of any of them, ever.
    pub async fn join(&self) -> Result<(), TaskPanicked> {
        self.tracker.close();
        self.tracker.wait().await;
        match self.failure.borrow().clone() {
            Some(panicked) => Err(panicked),
            None => Ok(()),
        }
    }

    /// How many tasks and threads are running.
    pub fn running(&self) -> usize {
        self.tracker.len()
    }
}

/// Runs what blocks the thread that it is on. In a runtime of several threads that is one of those
/// kept for such work. In one of a single thread it is this one: another would make the order of
/// events depend on how fast it is, and such runtimes are those of tests and simulations. Not
/// cancel-safe: what was begun goes on.
///
/// # Errors
/// When it panicked.
pub async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TaskPanicked> {
    if Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        return Ok(run());
    }
    let ended = tokio::task::spawn_blocking(run).await;
    ended.map_err(|error| TaskPanicked {
        name: "blocking",
        message: error.to_string(),
    })
}

fn report(
    failure: &watch::Sender<Option<TaskPanicked>>,
    name: &'static str,
    panic: &(dyn Any + Send),
) -> TaskPanicked {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    let panicked = TaskPanicked {
        name,
        message: text.unwrap_or_else(|| "no message".to_owned()),
    };
    tracing::error!(task = name, message = %panicked.message, "task panicked");
    failure.send_if_modified(|first| {
        let is_first = first.is_none();
        first.get_or_insert_with(|| panicked.clone());
        is_first
    });
    panicked
}

/// A running task.
#[derive(Debug)]
pub struct Task<T> {
    name: &'static str,
    handle: JoinHandle<Result<T, TaskPanicked>>,
}

impl<T> Task<T> {
    /// Waits for its end. Not cancel-safe: dropping the wait detaches the task.
    ///
    /// # Errors
    /// When it panicked, or was aborted.
    pub async fn join(self) -> Result<T, TaskPanicked> {
        let name = self.name;
        self.handle.await.unwrap_or_else(|_| {
            Err(TaskPanicked {
                name,
                message: "aborted".to_owned(),
            })
        })
    }

    /// Ends the task at its next await; for what holds no state worth keeping.
    pub fn abort(&self) {
        self.handle.abort();
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}

/// The steps in which a process ends; each begins when the one before is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// No new work: listeners stop accepting, nothing more is leased or started.
    Intake,
    /// What was started runs to its end and is recorded.
    Transactions,
    /// The journal hands its facts to the store.
    Journal,
    /// Stores and journals close.
    Close,
}

impl Stage {
    /// In the order in which they happen.
    pub const ALL: [Self; 4] = [Self::Intake, Self::Transactions, Self::Journal, Self::Close];

    fn index(self) -> usize {
        match self {
            Self::Intake => 0,
            Self::Transactions => 1,
            Self::Journal => 2,
            Self::Close => 3,
        }
    }
}

/// The end of the process: who asks for it, who waits for it, who holds it up. Clones share it.
///
/// A task that has work in a stage takes a `hold` for that stage when it starts and drops it when
/// that work is done; `drain` goes to the next stage when nobody holds the present one.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// `None` while nobody has asked for the end.
    stage: watch::Sender<Option<Stage>>,
    holds: [TaskTracker; Stage::ALL.len()],
}

/// As long as this lives, the stage it was taken for is not over.
#[derive(Debug)]
#[must_use = "dropping it lets the stage end"]
pub struct Hold {
    _token: TaskTrackerToken,
}

/// A stage outlasted the patience it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{holds} still at work in stage {stage:?} when patience ended")]
pub struct DrainTimedOut {
    /// The stage that did not end.
    pub stage: Stage,
    /// How many held it.
    pub holds: usize,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A process that runs.
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            stage: watch::Sender::new(None),
            holds: std::array::from_fn(|_| TaskTracker::new()),
        }))
    }

    /// Asks for the end: the stage `Intake` begins. Asking again changes nothing.
    pub fn begin(&self) {
        self.advance(Stage::Intake);
    }

    /// Whether the end was asked for.
    pub fn has_begun(&self) -> bool {
        self.0.stage.borrow().is_some()
    }

    /// Resolves when the end is asked for, and at once if it already was. Cancel-safe.
    pub async fn begun(&self) {
        self.reached(Stage::Intake).await;
    }

    /// Resolves when `stage` has begun, and at once if it already has. Cancel-safe.
    pub async fn reached(&self, stage: Stage) {
        let mut now = self.0.stage.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let waited = now.wait_for(|now| *now >= Some(stage)).await;
        debug_assert!(waited.is_ok(), "the sender is held by self");
    }

    /// Keeps `stage` from ending until what is returned is dropped.
    pub fn hold(&self, stage: Stage) -> Hold {
        Hold {
            _token: self.holds(stage).token(),
        }
    }

    /// Goes through all stages in order, each at most `patience` long; an overdue stage is logged
    /// and left behind, since what comes after it (shipping the journal) matters more.
    ///
    /// # Errors
    /// The first stage that did not end in time.
    pub async fn drain(&self, patience: Duration) -> Result<(), DrainTimedOut> {
        let mut overdue = None;
        for stage in Stage::ALL {
            self.advance(stage);
            let holds = self.holds(stage);
            holds.close();
            if tokio::time::timeout(patience, holds.wait()).await.is_err() {
                let timed_out = DrainTimedOut {
                    stage,
                    holds: holds.len(),
                };
                tracing::error!(?stage, holds = timed_out.holds, "drain stage overdue");
                overdue.get_or_insert(timed_out);
            }
        }
        overdue.map_or(Ok(()), Err)
    }

    fn holds(&self, stage: Stage) -> &TaskTracker {
        &self.0.holds[stage.index()]
    }

    fn advance(&self, stage: Stage) {
        self.0.stage.send_if_modified(|now| {
            let moves = *now < Some(stage);
            if moves {
                *now = Some(stage);
            }
            moves
        });
    }
}

/// What the operating system asks of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM or SIGINT: drain and exit.
    Terminate,
    /// SIGHUP: read shaping, rules and keys again.
    Reload,
}

/// The signals of this process. Two SIGHUPs in quick succession may come as one.
#[derive(Debug)]
pub struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    /// Takes over SIGTERM, SIGINT and SIGHUP for the rest of the process's life. Inside a runtime.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn install() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal. Cancel-safe.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Terminate,
            _ = self.hangup.recv() => Signal::Reload,
        }
    }
}

/// How a process came to its end.
#[derive(Debug, thiserror::Error)]
pub enum EndedBadly {
    /// A task panicked: what it owned is lost; the process ended without it.
    #[error(transparent)]
    Panicked(#[from] TaskPanicked),
    /// Not everything was finished in time.
    #[error(transparent)]
    TimedOut(#[from] DrainTimedOut),
}

/// Runs until a signal, a panic or `shutdown.begin()` ends the process, then drains, each stage
/// within `patience`, and joins all tasks. `reload` is called for each SIGHUP.
///
/// # Errors
/// When a task panicked, or a stage or the tasks themselves did not end in time: exit code 1.
pub async fn supervise(
    tasks: &Tasks,
    shutdown: &Shutdown,
    signals: &mut Signals,
    patience: Duration,
    mut reload: impl FnMut(),
) -> Result<(), EndedBadly> {
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Reload => reload(),
                Signal::Terminate => {
                    tracing::info!("asked to end, draining");
                    break;
                }
            },
            panicked = tasks.failed() => {
                tracing::error!(task = panicked.name, "ending, since a task is lost");
                break;
            }
            () = shutdown.begun() => break,
        }
    }
    let drained = shutdown.drain(patience).await;
    match tokio::time::timeout(patience, tasks.join()).await {
        Ok(joined) => joined?,
        Err(_) => {
            return Err(EndedBadly::TimedOut(DrainTimedOut {
                stage: Stage::Close,
                holds: tasks.running(),
            }));
        }
    }
    Ok(drained?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_reaches_the_supervisor_even_when_nobody_joins_the_task() {
        let tasks = Tasks::new();
        drop(tasks.spawn("careless", async { panic!("dropped the parcel") }));
        let panicked = tasks.failed().await;
        assert_eq!(panicked.name, "careless");
        assert_eq!(panicked.message, "dropped the parcel");
        assert_eq!(tasks.join().await, Err(panicked));
    }

    #[tokio::test]
    async fn a_thread_is_joined_and_its_panic_noticed() {
        let tasks = Tasks::new();
        let (tell, told) = std::sync::mpsc::sync_channel::<()>(0);
        tasks
            .thread("writer", move || {
                told.recv().ok();
                panic!("{} left", 1);
            })
            .expect("a thread");
        assert_eq!(tasks.running(), 1);
        drop(tell);
        assert_eq!(
            tasks.join().await,
            Err(TaskPanicked {
                name: "writer",
                message: "1 left".to_owned()
            })
        );
    }

    #[tokio::test]
    async fn a_task_gives_back_what_it_made() {
        let tasks = Tasks::new();
        let task = tasks.spawn("sum", async { 1 + 1 });
        assert_eq!(task.join().await, Ok(2));
        let stuck = tasks.spawn("stuck", std::future::pending::<()>());
        stuck.abort();
        assert!(stuck.join().await.is_err());
        assert_eq!(tasks.join().await, Ok(()));
    }

    #[tokio::test]
    async fn stages_come_in_order_and_wait_for_their_holds() {
        let shutdown = Shutdown::new();
        let tasks = Tasks::new();
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        for (stage, name) in [
            (Stage::Journal, "ship"),
            (Stage::Transactions, "deliver"),
            (Stage::Intake, "listen"),
        ] {
            let (hold, shutdown, order) = (shutdown.hold(stage), shutdown.clone(), order.clone());
            drop(tasks.spawn(name, async move {
                shutdown.reached(stage).await;
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                order.lock().expect("not poisoned").push(name);
                drop(hold);
            }));
        }
        assert!(!shutdown.has_begun());
        assert_eq!(shutdown.drain(Duration::from_secs(10)).await, Ok(()));
        assert_eq!(tasks.join().await, Ok(()));
        assert_eq!(
            *order.lock().expect("not poisoned"),
            ["listen", "deliver", "ship"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_overdue_stage_is_named_and_the_later_ones_still_happen() {
        let shutdown = Shutdown::new();
        let stuck = shutdown.hold(Stage::Transactions);
        let drained = shutdown.drain(Duration::from_secs(5)).await;
        let expected = DrainTimedOut {
            stage: Stage::Transactions,
            holds: 1,
        };
        assert_eq!(drained, Err(expected));
        shutdown.reached(Stage::Close).await;
        drop(stuck);
    }

    #[tokio::test]
    async fn supervision_ends_with_an_error_after_a_panic() {
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        let mut signals = Signals::install().expect("signal handlers");
        let waiting = shutdown.clone();
        drop(tasks.spawn("patient", async move { waiting.begun().await }));
        drop(tasks.spawn("careless", async { panic!("lost") }));
        let ended = supervise(
            &tasks,
            &shutdown,
            &mut signals,
            Duration::from_secs(10),
            || {},
        );
        assert!(matches!(ended.await, Err(EndedBadly::Panicked(_))));
    }
}
