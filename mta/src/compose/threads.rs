//! The threads that render and sign.
//!
//! When much is waiting a thread takes several requests in one turn. All of them leave together at
//! its end, over one task: if the thread itself gave each to its connection, each would wake a
//! worker, which would take the processor from it before the next. When little is waiting it takes
//! one, so that nothing waits for company. What is transactional goes first, and in turns of its
//! own.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use service::metrics::Metrics;
use service::tasks::Tasks;
use tokio::sync::{Notify, mpsc};

use super::{Bits, Composed, Contents};
use crate::queue::Event;
use crate::queue::job::{Fate, Job, JobId, Returned};
use model::Priority;

/// Requests that wait for a thread; the queue hands out no more than its connections can take.
const WAITING_MAX: usize = 4_096;
/// Messages composed in one turn: with RSA some 50 ms. The more there are, the fewer times the
/// threads take the processors from each other: 0.85 times for a message with 32, 0.60 with 128.
const TURN: usize = 128;

/// Turns that wait to be handed over; threads wait when it is full.
const TURNS_MAX: usize = 64;

/// On which threads messages are composed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// On none of their own, but in a task among the others: for a simulation, in which the order
    /// of events must not hang on how fast a thread is.
    None,
    /// On as many as there are processors.
    Processors,
}

/// A message to be composed.
#[derive(Debug)]
pub struct Request {
    /// For whom.
    pub job: Job,
    /// The connection that will carry it.
    pub to: mpsc::Sender<Composed>,
}

/// The signing threads; they end when this is dropped.
#[derive(Debug)]
pub struct Composer {
    desk: Arc<Desk>,
}

/// Where requests wait.
#[derive(Debug)]
struct Desk {
    threads: usize,
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    /// Wakes the task that composes in place, where there is one.
    called: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    urgent: VecDeque<Request>,
    bulk: VecDeque<Request>,
    /// Threads that sleep.
    idle: usize,
    closed: bool,
}

impl Composer {
    /// Starts so many threads. What cannot be composed is reported to `queue`.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn start(
        threads: Threads,
        tasks: &Tasks,
        contents: &Arc<Contents>,
        metrics: &Arc<Metrics>,
        queue: &mpsc::Sender<Event>,
    ) -> std::io::Result<Self> {
        let count = match threads {
            Threads::None => 0,
            Threads::Processors => {
                std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
            }
        };
        let desk = Arc::new(Desk {
            threads: count.max(1),
            waiting: Mutex::default(),
            arrived: Condvar::new(),
            called: Notify::new(),
        });
        let composer = Self {
            desk: Arc::clone(&desk),
        };
        let (turns, made) = mpsc::channel(TURNS_MAX);
        tasks.spawn("hand-over", hand_over(made, queue.clone()));
        if threads == Threads::None {
            let (contents, metrics) = (Arc::clone(contents), Arc::clone(metrics));
            tasks.spawn("compose", compose_in_place(desk, contents, metrics, turns));
            return Ok(composer);
        }
        for _ in 0..count {
            let (desk, contents, metrics, turns) = (
                Arc::clone(&desk),
                Arc::clone(contents),
                Arc::clone(metrics),
                turns.clone(),
            );
            tasks.thread("compose", move || {
                while let Some(requests) = desk.take() {
                    let made = Made::all(requests, &contents, &metrics);
                    // Fails only at the end of the process, when nobody waits for any of them.
                    if turns.blocking_send(made).is_err() {
                        return;
                    }
                }
            })?;
        }
        Ok(composer)
    }

    /// Queues messages for composing; those for which there is no room come back.
    pub fn send(&self, requests: impl IntoIterator<Item = Request>) -> Vec<Request> {
        let mut requests = requests.into_iter();
        let mut waiting = self.desk.lock();
        let room = WAITING_MAX.saturating_sub(waiting.len());
        for request in requests.by_ref().take(room) {
            match request.job.item.batch.priority {
                Priority::Transactional => waiting.urgent.push_back(request),
                Priority::Bulk => waiting.bulk.push_back(request),
            }
        }
        let wake = waiting.idle.min(waiting.len());
        drop(waiting);
        for _ in 0..wake {
            self.desk.arrived.notify_one();
        }
        self.desk.called.notify_one();
        requests.collect()
    }
}

impl Drop for Composer {
    fn drop(&mut self) {
        self.desk.lock().closed = true;
        self.desk.arrived.notify_all();
        self.desk.called.notify_one();
    }
}

impl Desk {
    /// The requests of the next turn, where the caller is the only one who takes any; none when
    /// there will be no more.
    async fn taken(&self) -> Option<Vec<Request>> {
        loop {
            {
                let mut waiting = self.lock();
                if waiting.len() > 0 {
                    let Waiting { urgent, bulk, .. } = &mut *waiting;
                    return Some(urgent.drain(..).chain(bulk.drain(..)).collect());
                }
                if waiting.closed {
                    return None;
                }
            }
            self.called.notified().await;
        }
    }

    /// The requests of the next turn, once there are any; none when there will be no more.
    fn take(&self) -> Option<Vec<Request>> {
        let mut waiting = self.lock();
        while waiting.len() == 0 {
            if waiting.closed {
                return None;
            }
            waiting.idle += 1;
            waiting = self
                .arrived
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
            waiting.idle -= 1;
        }
        let Waiting { urgent, bulk, .. } = &mut *waiting;
        let next = if urgent.is_empty() { bulk } else { urgent };
        // Half of a fair share: the others are not left without work.
        let share = next.len() / (2 * self.threads);
        Some(next.drain(..share.clamp(1, TURN)).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn len(&self) -> usize {
        self.urgent.len() + self.bulk.len()
    }
}

/// What came of a request.
struct Made {
    job: JobId,
    to: mpsc::Sender<Composed>,
    made: Result<Composed, Fate>,
}

impl Made {
    fn all(requests: Vec<Request>, contents: &Contents, metrics: &Metrics) -> Vec<Self> {
        let made = requests.into_iter();
        made.map(|request| Self::of(request, contents, metrics))
            .collect()
    }

    fn of(Request { job, to }: Request, contents: &Contents, metrics: &Metrics) -> Self {
        Self {
            job: job.id,
            to,
            made: compose(job, contents, metrics),
        }
    }
}

fn compose(job: Job, contents: &Contents, metrics: &Metrics) -> Result<Composed, Fate> {
    let prepared = contents
        .get(job.item.batch.id)
        .ok_or(Fate::Returned(Returned::ContentGone))?;
    let made = prepared.compose(&job, Bits::Eight, metrics);
    let (reverse_path, body, smtp_utf8) = made.map_err(Fate::Unmade)?;
    Ok(Composed {
        job,
        reverse_path,
        body,
        smtp_utf8,
    })
}

async fn compose_in_place(
    desk: Arc<Desk>,
    contents: Arc<Contents>,
    metrics: Arc<Metrics>,
    turns: mpsc::Sender<Vec<Made>>,
) {
    while let Some(requests) = desk.taken().await {
        let made = Made::all(requests, &contents, &metrics);
        if turns.send(made).await.is_err() {
            return;
        }
    }
}

/// Gives the messages of each turn to their connections, which then run together: their start
/// records leave in one write, and the queue hears of their outcomes at once.
async fn hand_over(mut turns: mpsc::Receiver<Vec<Made>>, queue: mpsc::Sender<Event>) {
    while let Some(turn) = turns.recv().await {
        for Made { job, to, made } in turn {
            let fate = match made {
                Ok(composed) => match to.try_send(composed) {
                    Ok(()) => continue,
                    // It closed meanwhile.
                    Err(_) => Fate::Returned(Returned::Closed),
                },
                Err(fate) => fate,
            };
            if queue.send(Event::Report(job, fate)).await.is_err() {
                tracing::debug!("the queue has ended before what was composed for it");
            }
        }
    }
}
