//! The threads that render and sign.

use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use service::metrics::Metrics;
use service::tasks::Tasks;
use tokio::sync::mpsc;

use super::{Composed, Contents};
use crate::queue::Event;
use crate::queue::job::{Fate, Job, Returned};

/// Requests that wait for a thread; the queue hands out no more than its connections can take.
const WAITING_MAX: usize = 4_096;

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
    requests: SyncSender<Request>,
}

impl Composer {
    /// Starts as many threads as there are processors. What cannot be composed is reported to
    /// `queue`.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn start(
        tasks: &Tasks,
        contents: &Arc<Contents>,
        metrics: &Arc<Metrics>,
        queue: &mpsc::Sender<Event>,
    ) -> std::io::Result<Self> {
        let (requests, waiting) = sync_channel(WAITING_MAX);
        let waiting = Arc::new(Mutex::new(waiting));
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        for _ in 0..threads {
            let (waiting, contents, metrics, queue) = (
                Arc::clone(&waiting),
                Arc::clone(contents),
                Arc::clone(metrics),
                queue.clone(),
            );
            tasks.thread("compose", move || {
                while let Some(request) = next(&waiting) {
                    compose(request, &contents, &metrics, &queue);
                }
            })?;
        }
        Ok(Self { requests })
    }

    /// Queues a message for composing; gives it back when too many wait, or the threads are gone.
    ///
    /// # Errors
    /// The request.
    pub fn send(&self, request: Request) -> Result<(), Box<Request>> {
        self.requests
            .try_send(request)
            .map_err(|error| match error {
                TrySendError::Full(request) | TrySendError::Disconnected(request) => {
                    Box::new(request)
                }
            })
    }
}

fn next(waiting: &Mutex<Receiver<Request>>) -> Option<Request> {
    waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .recv()
        .ok()
}

fn compose(request: Request, contents: &Contents, metrics: &Metrics, queue: &mpsc::Sender<Event>) {
    let Request { job, to } = request;
    let id = job.id;
    let fate = match contents.get(job.item.batch.id) {
        None => Fate::Returned(Returned::ContentGone),
        Some(prepared) => match prepared.compose(&job, metrics) {
            Err(reason) => Fate::Unmade(reason),
            Ok((reverse_path, body, smtp_utf8)) => match to.try_send(Composed {
                job,
                reverse_path,
                body,
                smtp_utf8,
            }) {
                Ok(()) => return,
                // It closed meanwhile.
                Err(_) => Fate::Returned(Returned::Closed),
            },
        },
    };
    // Fails only when the queue is gone, and everything with it.
    let reported = queue.blocking_send(Event::Report(id, fate));
    debug_assert!(reported.is_ok() || queue.is_closed());
}
