//! What is said on connections, live, for whoever listens.
//!
//! Owns the ring of lines and who listens. While nobody does, a connection looks at one number
//! before it writes or reads, and nothing else happens. A slow listener misses lines and is told
//! how many; it never holds up a connection. Nothing secret gets here: see [`Tap`].

mod tap;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use model::{MessageId, Timestamp};
use serde::Serialize;
use service::clock::SharedClock;
use tokio::sync::broadcast;

pub use tap::Tap;

use crate::shaping::Destination;

/// Lines that a listener may be behind.
const LINES: usize = 1_024;
/// Listeners at a time.
const LISTENERS_MAX: usize = 8;

/// One line of a transcript.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// When it was written or read.
    pub at: Timestamp,
    /// The queue's name for the connection.
    pub connection: u64,
    /// Whose limits it is under.
    #[serde(serialize_with = "text")]
    pub destination: Destination,
    /// The egress source.
    pub source: Arc<str>,
    /// The host and address; empty while there is none.
    pub host: Arc<str>,
    /// Who says it.
    pub from: Voice,
    /// Printable, bounded, without what is nobody's business.
    pub text: String,
    /// Whose transaction it is part of, as far as that can be told.
    #[serde(serialize_with = "id")]
    pub message: Option<MessageId>,
}

/// Who says a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Voice {
    /// This service.
    Us,
    /// The receiving side.
    Peer,
    /// Nobody: what happened.
    Note,
}

fn text<S: serde::Serializer>(of: &Destination, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(of.as_str())
}

fn id<S: serde::Serializer>(of: &Option<MessageId>, to: S) -> Result<S::Ok, S::Error> {
    match of {
        Some(id) => to.collect_str(id),
        None => to.serialize_none(),
    }
}

/// The ring; see the module.
pub struct Traces {
    listening: AtomicUsize,
    lines: broadcast::Sender<Arc<Line>>,
    clock: SharedClock,
}

impl std::fmt::Debug for Traces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Traces")
            .field("listening", &self.listening)
            .finish_non_exhaustive()
    }
}

impl Traces {
    /// Nobody listens yet.
    pub fn new(clock: SharedClock) -> Self {
        Self {
            listening: AtomicUsize::new(0),
            lines: broadcast::Sender::new(LINES),
            clock,
        }
    }

    /// Whether anybody does.
    pub fn are_heard(&self) -> bool {
        self.listening.load(Ordering::Relaxed) > 0
    }

    /// Listens from now on; none: too many do.
    pub fn listen(self: &Arc<Self>) -> Option<Listener> {
        let more = |count: usize| (count < LISTENERS_MAX).then_some(count + 1);
        self.listening
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(Listener {
            lines: self.lines.subscribe(),
            traces: Arc::clone(self),
        })
    }

    fn tell(&self, line: Line) {
        // Without a receiver it is nobody's: the last one has just left.
        drop(self.lines.send(Arc::new(line)));
    }
}

/// What a listener hears.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// A line.
    Line(Arc<Line>),
    /// It was too slow for this many.
    Missed(u64),
}

/// Someone who listens, until it is dropped.
#[derive(Debug)]
pub struct Listener {
    lines: broadcast::Receiver<Arc<Line>>,
    traces: Arc<Traces>,
}

impl Listener {
    /// The next line; none when the service ends. Cancel-safe.
    pub async fn next(&mut self) -> Option<Heard> {
        match self.lines.recv().await {
            Ok(line) => Some(Heard::Line(line)),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(Heard::Missed(count)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.traces.listening.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::SystemClock;

    #[test]
    fn listeners_are_counted_and_bounded() {
        let traces = Arc::new(Traces::new(SystemClock::shared()));
        assert!(!traces.are_heard());
        let all: Vec<_> = (0..LISTENERS_MAX).map_while(|_| traces.listen()).collect();
        assert_eq!(all.len(), LISTENERS_MAX);
        assert!(traces.listen().is_none() && traces.are_heard());
        drop(all);
        assert!(!traces.are_heard());
    }

    #[tokio::test]
    async fn who_is_slow_misses_lines_and_hears_how_many() {
        let traces = Arc::new(Traces::new(SystemClock::shared()));
        let mut listener = traces.listen().expect("room");
        let tap = Tap::new(&traces, 1, &Destination::named("x"), "ip1", "mx");
        for n in 0..LINES + 5 {
            tap.note(&format!("{n}"));
        }
        assert_eq!(listener.next().await, Some(Heard::Missed(5)));
        let Some(Heard::Line(line)) = listener.next().await else {
            panic!("a line");
        };
        assert_eq!((line.text.as_str(), line.from), ("5", Voice::Note));
    }
}
