//! A network in memory, in virtual time: connections that delay, split, join, stall and break.
//!
//! Owns the bytes between two ends. Time is the runtime's, which a simulation has paused; chance
//! comes in. Must not know who speaks.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::smtp_peer::PeerStream;
use crate::smtp_peer::lock;

/// Bytes under way in one direction; a writer waits beyond.
const WINDOW: usize = 1 << 20;
/// Further than any simulation goes.
const NEVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How a connection carries bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carriage {
    /// From one end to the other.
    pub delay: Duration,
    /// More than that, at most, for each segment; segments do not overtake each other.
    pub jitter: Duration,
    /// Reads end anywhere, also within a line.
    pub splits: bool,
}

/// Makes a connection; `seed` decides what chance decides.
pub fn strand(carriage: Carriage, seed: u64) -> (End, End, Strand) {
    let shared = Arc::new(Mutex::new(Shared {
        carriage,
        random: fastrand::Rng::with_seed(seed),
        ways: [Way::default(), Way::default()],
        is_reset: false,
        stalled_until: None,
    }));
    let end = |side| End {
        shared: Arc::clone(&shared),
        side,
        timer: None,
    };
    (end(0), end(1), Strand(Arc::clone(&shared)))
}

/// A connection, for whoever disturbs it.
#[derive(Debug, Clone)]
pub struct Strand(Arc<Mutex<Shared>>);

/// One end; dropping it closes it.
#[derive(Debug)]
pub struct End {
    shared: Arc<Mutex<Shared>>,
    side: usize,
    timer: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
struct Shared {
    carriage: Carriage,
    random: fastrand::Rng,
    /// By the side that reads.
    ways: [Way; 2],
    is_reset: bool,
    stalled_until: Option<Instant>,
}

/// Bytes in one direction.
#[derive(Debug, Default)]
struct Way {
    segments: VecDeque<(Instant, VecDeque<u8>)>,
    bytes: usize,
    /// When the last of it arrives.
    last_at: Option<Instant>,
    /// When the reader learns that nothing more comes.
    closed_at: Option<Instant>,
    /// Nobody reads any more.
    is_deaf: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Strand {
    /// Breaks it: both ends see a reset at once, and what was under way is gone.
    pub fn reset(&self) {
        lock(&self.0).reset();
    }

    /// Carries nothing for so long, either way; none: ever again.
    pub fn stall(&self, how_long: Option<Duration>) {
        let mut shared = lock(&self.0);
        let until = Instant::now() + how_long.unwrap_or(NEVER);
        shared.stalled_until = Some(until);
        for way in &mut shared.ways {
            for (at, _) in &mut way.segments {
                *at = (*at).max(until);
            }
            way.last_at = way.last_at.map(|at| at.max(until));
            way.closed_at = way.closed_at.map(|at| at.max(until));
        }
    }

    /// Whether both ends are gone, or it was reset.
    pub fn is_over(&self) -> bool {
        let shared = lock(&self.0);
        shared.is_reset || shared.ways.iter().all(|way| way.is_deaf)
    }
}

impl Shared {
    fn reset(&mut self) {
        self.is_reset = true;
        for way in &mut self.ways {
            way.segments.clear();
            way.wake();
        }
    }

    /// When what is sent now arrives.
    fn arrival(&mut self, reader: usize) -> Instant {
        let now = Instant::now();
        let jitter = self
            .random
            .u64(..=u64::try_from(self.carriage.jitter.as_micros()).unwrap_or(u64::MAX));
        let at = now + self.carriage.delay + Duration::from_micros(jitter);
        let at = at.max(self.stalled_until.unwrap_or(at));
        let at = at.max(self.ways[reader].last_at.unwrap_or(at));
        self.ways[reader].last_at = Some(at);
        at
    }
}

impl Way {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()] {
            waker.into_iter().for_each(Waker::wake);
        }
    }
}

/// What an end sees without reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glance {
    /// Nothing has come.
    Nothing,
    /// Bytes are there.
    Bytes,
    /// The other end has closed, or the connection is lost.
    Over,
}

impl End {
    /// What has arrived by now.
    pub fn glance(&self) -> Glance {
        let shared = lock(&self.shared);
        let (way, now) = (&shared.ways[self.side], Instant::now());
        if shared.is_reset {
            return Glance::Over;
        }
        match way.segments.front() {
            Some((at, _)) if *at <= now => Glance::Bytes,
            Some(_) => Glance::Nothing,
            None if way.closed_at.is_some_and(|at| at <= now) => Glance::Over,
            None => Glance::Nothing,
        }
    }

    /// Breaks the connection from this end.
    pub fn reset(&self) {
        lock(&self.shared).reset();
    }

    fn close(&self) {
        let mut shared = lock(&self.shared);
        let reader = 1 - self.side;
        if shared.ways[reader].closed_at.is_none() {
            let at = shared.arrival(reader);
            let way = &mut shared.ways[reader];
            way.closed_at = Some(at);
            way.wake();
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.close();
        let mut shared = lock(&self.shared);
        let way = &mut shared.ways[self.side];
        way.is_deaf = true;
        way.segments.clear();
        way.wake();
    }
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let due = {
                let mut shared = lock(&this.shared);
                if shared.is_reset {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                let now = Instant::now();
                match shared.take(this.side, now, buffer) {
                    Taken::Some | Taken::End => return Poll::Ready(Ok(())),
                    Taken::Later(due) => {
                        shared.ways[this.side].reader = Some(cx.waker().clone());
                        due
                    }
                }
            };
            let Some(due) = due else {
                this.timer = None;
                return Poll::Pending;
            };
            let timer = this
                .timer
                .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            this.timer = None;
        }
    }
}

impl PeerStream for End {
    fn reset(&mut self) -> io::Result<()> {
        End::reset(self);
        Ok(())
    }
}

enum Taken {
    Some,
    End,
    /// When something arrives, if anything is under way.
    Later(Option<Instant>),
}

impl Shared {
    fn take(&mut self, side: usize, now: Instant, buffer: &mut ReadBuf<'_>) -> Taken {
        let Self {
            ways,
            random,
            carriage,
            ..
        } = self;
        let way = &mut ways[side];
        let arrived = |way: &Way| way.segments.front().is_some_and(|(at, _)| *at <= now);
        if !arrived(way) {
            let closes = way.closed_at.filter(|_| way.segments.is_empty());
            if closes.is_some_and(|at| at <= now) {
                return Taken::End;
            }
            return Taken::Later(way.segments.front().map(|(at, _)| *at).or(closes));
        }
        let mut room = buffer.remaining();
        if carriage.splits && random.u8(..4) == 0 {
            room = random.usize(1..=room.clamp(1, 64));
        }
        while room > 0 && arrived(way) {
            let Some((at, mut bytes)) = way.segments.pop_front() else {
                break;
            };
            let (first, _) = bytes.as_slices();
            let some = first.len().min(room);
            buffer.put_slice(first.get(..some).unwrap_or_default());
            bytes.drain(..some);
            (room, way.bytes) = (room - some, way.bytes - some);
            if !bytes.is_empty() {
                way.segments.push_front((at, bytes));
            }
        }
        way.writer.take().into_iter().for_each(Waker::wake);
        Taken::Some
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut shared = lock(&self.shared);
        let reader = 1 - self.side;
        if shared.is_reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if shared.ways[reader].is_deaf {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = WINDOW.saturating_sub(shared.ways[reader].bytes);
        if room == 0 {
            shared.ways[reader].writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let some = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        if !some.is_empty() {
            let at = shared.arrival(reader);
            let way = &mut shared.ways[reader];
            way.bytes += some.len();
            way.segments.push_back((at, some.iter().copied().collect()));
            way.reader.take().into_iter().for_each(Waker::wake);
        }
        Poll::Ready(Ok(some.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const STRAIGHT: Carriage = Carriage {
        delay: Duration::from_millis(50),
        jitter: Duration::ZERO,
        splits: false,
    };

    #[tokio::test(start_paused = true)]
    async fn bytes_arrive_later_in_order_and_then_the_end() {
        let shaken = Carriage {
            jitter: Duration::from_millis(40),
            splits: true,
            ..STRAIGHT
        };
        let (mut here, mut there, _) = strand(shaken, 7);
        let start = Instant::now();
        for part in ["one ", "two ", "three"] {
            here.write_all(part.as_bytes()).await.expect("written");
        }
        assert_eq!(there.glance(), Glance::Nothing);
        drop(here);
        let mut all = String::new();
        there.read_to_string(&mut all).await.expect("read");
        assert_eq!(all, "one two three");
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert_eq!(there.glance(), Glance::Over);
        assert!(there.write_all(b"x").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_holds_everything_and_a_reset_ends_it() {
        let (mut here, mut there, strand) = strand(STRAIGHT, 7);
        let start = Instant::now();
        here.write_all(b"early").await.expect("written");
        strand.stall(Some(Duration::from_secs(30)));
        here.write_all(b" late").await.expect("written");
        let mut bytes = [0; 10];
        there.read_exact(&mut bytes).await.expect("read");
        assert_eq!(&bytes, b"early late");
        assert!(start.elapsed() >= Duration::from_secs(30));
        strand.reset();
        let kind = here.read(&mut bytes).await.map_err(|error| error.kind());
        assert_eq!(kind, Err(io::ErrorKind::ConnectionReset));
        assert!(strand.is_over());
    }
}
