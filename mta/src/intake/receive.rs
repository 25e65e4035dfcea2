//! Takes in the body of a request.
//!
//! Owns the limits on what a stranger may send: bytes, time, memory for all callers together. Must
//! not judge what is in the body beyond splitting it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use service::clock::SharedClock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::recipients::malformed;
use super::splitter::{Head, SplitError, Splitter};
use super::spool::Spool;
use crate::admin::problem::{Answer, Code, Refusal};

/// The largest head: subject, templates, variables of a batch.
const HEAD_MAX: usize = 32 << 20;
/// Memory for the heads of all calls together, in pieces of [`PIECE`].
const HEADS_MEMORY: usize = 256 << 20;
const PIECE: usize = 1 << 20;
/// How many bodies are taken in at a time.
const CALLS_MAX: usize = 256;
/// Nothing may come for this long …
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// … and after it, no less than this on average: 64 MiB in an hour.
const BYTES_PER_SECOND_MIN: u64 = 16 << 10;
/// What is read and thrown away of a body that was refused, so that the caller, who is still
/// writing, comes to read why.
const DRAIN_MAX: u64 = 128 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// What all calls share.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    silence: Duration,
    calls: Arc<Semaphore>,
    memory: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: SILENCE_MAX,
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
            memory: Arc::new(Semaphore::new(HEADS_MEMORY / PIECE)),
        }
    }
}

/// A document that has arrived.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) head: Head,
    pub(crate) spool: Spool,
    /// Freed when the call is over.
    pub(crate) permits: Vec<OwnedSemaphorePermit>,
}

/// Where and how long a body may be.
pub(crate) struct Receiver<'r> {
    pub(crate) limits: &'r Limits,
    pub(crate) clock: &'r SharedClock,
    /// Where the spool's file may lie.
    pub(crate) dir: &'r Path,
    /// Bytes.
    pub(crate) max_body: u64,
    /// The caller waits for `100 Continue` before it writes: a refusal needs no draining.
    pub(crate) waits: bool,
}

impl Receiver<'_> {
    /// Takes in one JSON document. Cancel-safe: what is dropped leaves nothing.
    ///
    /// # Errors
    /// The refusal; the rest of the body was read by then as far as that is bearable.
    pub(crate) async fn receive(&self, mut body: Body) -> Answer<Received> {
        let announced = axum::body::HttpBody::size_hint(&body).lower();
        let mut intake = Intake {
            splitter: Splitter::new(HEAD_MAX),
            spool: Spool::new(self.dir),
            permits: Vec::new(),
            length: 0,
            began: self.clock.instant(),
        };
        let taken = if announced > self.max_body {
            Err(too_large(self.max_body))
        } else {
            self.take_all(&mut body, &mut intake).await
        };
        if let Err(refusal) = taken {
            drop(intake);
            let unread = self.waits && announced > self.max_body;
            if !unread && refusal.0.code() != Code::RequestTimeout {
                drain(body).await;
            }
            return Err(refusal);
        }
        let head = intake.splitter.finish().map_err(split_refusal)?;
        Ok(Received {
            head,
            spool: intake.spool,
            permits: intake.permits,
        })
    }

    async fn take_all(&self, body: &mut Body, intake: &mut Intake) -> Answer<()> {
        let permit = Arc::clone(&self.limits.calls).try_acquire_owned();
        intake.permits.push(permit.map_err(|_| busy())?);
        while let Some(bytes) = self.next(body, intake).await? {
            intake.length += bytes.len() as u64;
            if intake.length > self.max_body {
                return Err(too_large(self.max_body));
            }
            intake
                .splitter
                .push(&bytes, &mut intake.spool)
                .map_err(split_refusal)?;
            self.reserve(intake)?;
            if intake.spool.must_write() {
                self.write(intake).await?;
            }
        }
        Ok(())
    }

    async fn next(&self, body: &mut Body, intake: &Intake) -> Answer<Option<Bytes>> {
        let slow = || Refusal::new(Code::RequestTimeout, "the body did not arrive in time");
        loop {
            let frame = tokio::time::timeout(self.limits.silence, body.frame())
                .await
                .map_err(|_| slow())?;
            let elapsed = elapsed(intake.began, self.clock.instant());
            let due = elapsed.saturating_sub(self.limits.silence).as_secs() * BYTES_PER_SECOND_MIN;
            if intake.length < due {
                return Err(slow());
            }
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| {
                Refusal::new(Code::MalformedBody, format!("the body broke off: {error}"))
            })?;
            // Trailers are of no interest.
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }

    /// Holds as much of the shared memory as the head has grown to.
    fn reserve(&self, intake: &mut Intake) -> Answer<()> {
        // The first permit is that of the call.
        while intake.splitter.head_len() > (intake.permits.len() - 1) * PIECE {
            let permit = Arc::clone(&self.limits.memory).try_acquire_owned();
            intake.permits.push(permit.map_err(|_| busy())?);
        }
        Ok(())
    }

    async fn write(&self, intake: &mut Intake) -> Answer<()> {
        let mut spool = std::mem::replace(&mut intake.spool, Spool::new(self.dir));
        let written = tokio::task::spawn_blocking(move || spool.write().map(|()| spool)).await;
        match written {
            Ok(Ok(spool)) => {
                intake.spool = spool;
                Ok(())
            }
            Ok(Err(error)) => Err(Refusal::disk(&error)),
            Err(error) => Err(Refusal::internal("spool", &error)),
        }
    }
}

struct Intake {
    splitter: Splitter,
    spool: Spool,
    permits: Vec<OwnedSemaphorePermit>,
    length: u64,
    began: Instant,
}

fn elapsed(began: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(began)
}

fn too_large(limit: u64) -> Refusal {
    Refusal::new(
        Code::BodyTooLarge,
        format!("a body has at most {limit} bytes (api.max_body)"),
    )
}

fn busy() -> Refusal {
    Refusal::new(
        Code::Unavailable,
        "too many batches are being taken in at the moment",
    )
}

fn split_refusal(error: SplitError) -> Refusal {
    match error {
        SplitError::Syntax { detail, at } => malformed("", at, detail),
        SplitError::HeadTooLarge { .. } => Refusal::new(Code::BodyTooLarge, error.to_string()),
    }
}

/// Reads what is left of a body, within bounds, and forgets it.
pub(crate) async fn drain(mut body: Body) {
    let all = async {
        let mut length = 0;
        while let Some(Ok(frame)) = body.frame().await {
            length += frame.data_ref().map_or(0, |data| data.len() as u64);
            if length > DRAIN_MAX {
                return;
            }
        }
    };
    // Whether it came to its end or not, the caller gets the answer.
    tokio::time::timeout(DRAIN_TIME, all).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{StreamExt as _, stream};
    use service::clock::SystemClock;

    const GOOD: &[u8] = br#"{"recipients":[{},{}]}"#;

    async fn receive(limits: Limits, body: Body, waits: bool) -> Answer<Received> {
        let dir = tempfile::tempdir().expect("a directory");
        let receiver = Receiver {
            limits: &limits,
            clock: &SystemClock::shared(),
            dir: dir.path(),
            max_body: 1 << 10,
            waits,
        };
        receiver.receive(body).await
    }

    fn code(received: Answer<Received>) -> Code {
        received.expect_err("refused").0.code()
    }

    #[tokio::test]
    async fn a_body_is_taken_in_pieces() {
        let pieces = GOOD
            .chunks(3)
            .map(|piece| Ok::<_, std::io::Error>(Bytes::from_static(piece)));
        let received = receive(
            Limits::default(),
            Body::from_stream(stream::iter(pieces)),
            false,
        )
        .await;
        assert_eq!(received.expect("received").spool.rows(), 2);
    }

    #[tokio::test]
    async fn a_body_that_stops_coming_is_not_waited_for() {
        let first = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(GOOD))]);
        let body = Body::from_stream(first.chain(stream::pending()));
        let limits = Limits {
            silence: Duration::from_millis(20),
            ..Limits::default()
        };
        assert_eq!(
            code(receive(limits, body, false).await),
            Code::RequestTimeout
        );
    }

    #[tokio::test]
    async fn calls_beyond_what_memory_bears_are_sent_away() {
        for (calls, memory) in [(0, 1), (1, 0)] {
            let limits = Limits {
                calls: Arc::new(Semaphore::new(calls)),
                memory: Arc::new(Semaphore::new(memory)),
                ..Limits::default()
            };
            assert_eq!(
                code(receive(limits, Body::from(GOOD), false).await),
                Code::Unavailable
            );
        }
    }

    #[tokio::test]
    async fn what_is_announced_too_large_is_not_read_from_one_who_waits() {
        let body = Body::from(vec![b' '; 2 << 10]);
        assert_eq!(
            code(receive(Limits::default(), body, true).await),
            Code::BodyTooLarge
        );
    }
}
