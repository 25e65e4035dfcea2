//! Takes in the body of a request.
//!
//! Owns the limits on what a stranger may send: bytes, time, memory for all callers together. Must
//! not judge what is in the body beyond splitting it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use service::clock::SharedClock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::csv_rows::CsvRows;
use super::decode::Encoding;
use super::lines::Lines;
use super::recipients::malformed;
use super::splitter::{Head, SplitError, Splitter};
use super::spool::Spool;
use crate::admin::problem::{Answer, Code, Refusal};

/// The largest head: subject, templates, variables of a batch.
const HEAD_MAX: usize = 32 << 20;
/// The same of a part, which has no other field.
const PART_HEAD_MAX: usize = 64 << 10;
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
    /// Of all its bytes, decoded, and of its form; only when asked for.
    pub(crate) fingerprint: Option<[u8; 32]>,
    /// Freed when the call is over.
    pub(crate) permits: Vec<OwnedSemaphorePermit>,
}

/// What a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) media: Media,
    pub(crate) encoding: Encoding,
}

/// How a batch is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Media {
    /// One document with the recipients in it.
    Json,
    /// The document in the first line, each recipient in one more.
    Lines,
    /// One document with the one recipient in `to`.
    Message,
    /// A part of a batch: one document with `recipients` alone.
    Part,
    /// A part of a batch: each recipient in a line.
    PartLines,
    /// A part of a batch: a table whose first line names the columns.
    PartCsv,
}

impl Media {
    /// The beginning of a fingerprint: the same bytes mean another thing in another form.
    fn fingerprint(self) -> digest::Context {
        let mut context = digest::Context::new(&digest::SHA256);
        let form: &[u8] = match self {
            Self::Json => b"json ",
            Self::Lines => b"lines ",
            Self::Message => b"message ",
            Self::Part => b"part ",
            Self::PartLines => b"part lines ",
            Self::PartCsv => b"part csv ",
        };
        context.update(form);
        context
    }
}

fn finish(fingerprint: digest::Context) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (to, from) in bytes.iter_mut().zip(fingerprint.finish().as_ref()) {
        *to = *from;
    }
    bytes
}

/// Bytes that a body may have, decoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// `api.max_body`
    pub(crate) document: u64,
    /// `api.max_stream`
    pub(crate) stream: u64,
}

impl Sizes {
    /// The limit on a body of `media`, and the key that sets it.
    fn of(self, media: Media) -> (u64, &'static str) {
        match media {
            Media::Json | Media::Message | Media::Part => (self.document, "api.max_body"),
            Media::Lines | Media::PartLines | Media::PartCsv => (self.stream, "api.max_stream"),
        }
    }
}

/// Where and how long a body may be.
pub(crate) struct Receiver<'r> {
    pub(crate) limits: &'r Limits,
    pub(crate) clock: &'r SharedClock,
    /// Where the spool's file may lie.
    pub(crate) dir: &'r Path,
    pub(crate) sizes: Sizes,
    pub(crate) form: Form,
    /// Whether to tell the same body from another later.
    pub(crate) is_fingerprinted: bool,
    /// The caller waits for `100 Continue` before it writes: a refusal needs no draining.
    pub(crate) waits: bool,
}

impl Receiver<'_> {
    /// Takes in one batch. Cancel-safe: what is dropped leaves nothing.
    ///
    /// # Errors
    /// The refusal; the rest of the body was read by then as far as that is bearable.
    pub(crate) async fn receive(&self, body: Body) -> Answer<Received> {
        let announced = axum::body::HttpBody::size_hint(&body).lower();
        let mut body = self.form.encoding.decode(body);
        let mut intake = Intake {
            document: Document::new(self.form.media),
            spool: Spool::new(self.dir),
            fingerprint: self.is_fingerprinted.then(|| self.form.media.fingerprint()),
            permits: Vec::new(),
            length: 0,
            began: self.clock.instant(),
        };
        let (limit, key) = self.sizes.of(self.form.media);
        let taken = if announced > limit {
            Err(too_large(limit, key))
        } else {
            self.take_all(&mut body, &mut intake).await
        };
        if let Err(refusal) = taken {
            drop(intake);
            let unread = self.waits && announced > limit;
            if !unread && refusal.0.code() != Code::RequestTimeout {
                drain(body).await;
            }
            return Err(refusal);
        }
        let Intake {
            document,
            mut spool,
            fingerprint,
            permits,
            ..
        } = intake;
        let head = document.finish(&mut spool)?;
        Ok(Received {
            head,
            spool,
            fingerprint: fingerprint.map(finish),
            permits,
        })
    }

    async fn take_all(&self, body: &mut Body, intake: &mut Intake) -> Answer<()> {
        let permit = Arc::clone(&self.limits.calls).try_acquire_owned();
        intake.permits.push(permit.map_err(|_| busy())?);
        while let Some(bytes) = self.next(body, intake).await? {
            intake.length += bytes.len() as u64;
            let (limit, key) = self.sizes.of(self.form.media);
            if intake.length > limit {
                return Err(too_large(limit, key));
            }
            if let Some(fingerprint) = &mut intake.fingerprint {
                fingerprint.update(&bytes);
            }
            intake.document.push(&bytes, &mut intake.spool)?;
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
        while intake.document.head_len() > (intake.permits.len() - 1) * PIECE {
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

/// The splitter of a medium.
enum Document {
    Json(Splitter),
    Lines(Lines),
    Csv(Box<CsvRows>),
}

impl Document {
    fn new(media: Media) -> Self {
        match media {
            Media::Json | Media::Message => Self::Json(Splitter::new(HEAD_MAX)),
            Media::Part => Self::Json(Splitter::new(PART_HEAD_MAX)),
            Media::Lines => Self::Lines(Lines::new(HEAD_MAX)),
            Media::PartLines => Self::Lines(Lines::without_head()),
            Media::PartCsv => Self::Csv(Box::default()),
        }
    }

    fn head_len(&self) -> usize {
        match self {
            Self::Json(splitter) => splitter.head_len(),
            Self::Lines(lines) => lines.head_len(),
            Self::Csv(_) => 0,
        }
    }

    fn push(&mut self, bytes: &[u8], spool: &mut Spool) -> Answer<()> {
        match self {
            Self::Json(splitter) => splitter.push(bytes, spool).map_err(split_refusal),
            Self::Lines(lines) => lines.push(bytes, spool).map_err(split_refusal),
            Self::Csv(rows) => rows.push(bytes, spool),
        }
    }

    fn finish(self, spool: &mut Spool) -> Answer<Head> {
        match self {
            Self::Json(splitter) => splitter.finish().map_err(split_refusal),
            Self::Lines(lines) => Ok(lines.finish(spool)),
            Self::Csv(rows) => rows.finish(spool).map(|()| Head::default()),
        }
    }
}

struct Intake {
    document: Document,
    spool: Spool,
    fingerprint: Option<digest::Context>,
    permits: Vec<OwnedSemaphorePermit>,
    length: u64,
    began: Instant,
}

fn elapsed(began: Instant, now: Instant) -> Duration {
    now.saturating_duration_since(began)
}

fn too_large(limit: u64, key: &str) -> Refusal {
    Refusal::new(
        Code::BodyTooLarge,
        format!("a body of this type has at most {limit} bytes, decoded ({key})"),
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

    const JSON: Form = Form {
        media: Media::Json,
        encoding: Encoding::Identity,
    };

    async fn receive(limits: Limits, body: Body, waits: bool) -> Answer<Received> {
        receive_as(JSON, limits, body, waits).await
    }

    async fn receive_as(form: Form, limits: Limits, body: Body, waits: bool) -> Answer<Received> {
        let dir = tempfile::tempdir().expect("a directory");
        let receiver = Receiver {
            limits: &limits,
            clock: &SystemClock::shared(),
            dir: dir.path(),
            sizes: Sizes {
                document: 1 << 10,
                stream: 1 << 20,
            },
            form,
            is_fingerprinted: true,
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

    /// `plain`, compressed.
    async fn compressed(encoding: Encoding, plain: &[u8]) -> Vec<u8> {
        use async_compression::tokio::bufread::{GzipEncoder, ZstdEncoder};
        use tokio::io::AsyncReadExt as _;
        let mut packed = Vec::new();
        match encoding {
            Encoding::Identity => packed.extend_from_slice(plain),
            Encoding::Gzip => {
                let read = GzipEncoder::new(plain).read_to_end(&mut packed).await;
                read.expect("compressed");
            }
            Encoding::Zstd => {
                let read = ZstdEncoder::new(plain).read_to_end(&mut packed).await;
                read.expect("compressed");
            }
        }
        packed
    }

    #[tokio::test]
    async fn every_medium_comes_in_every_encoding() {
        let lines: &[u8] = b"{\"subject\":\"s\"}\n{}\n{}";
        for encoding in [Encoding::Identity, Encoding::Gzip, Encoding::Zstd] {
            for (media, plain) in [(Media::Json, GOOD), (Media::Lines, lines)] {
                let form = Form { media, encoding };
                let body = Body::from(compressed(encoding, plain).await);
                let received = receive_as(form, Limits::default(), body, false).await;
                assert_eq!(received.expect("received").spool.rows(), 2, "{form:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_bomb_is_stopped_where_the_limit_is() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let bomb = compressed(encoding, &vec![b' '; 1 << 22]).await;
            assert!(bomb.len() < 1 << 13, "{}", bomb.len());
            for media in [Media::Json, Media::Lines] {
                let form = Form { media, encoding };
                let body = Body::from(bomb.clone());
                let received = receive_as(form, Limits::default(), body, false).await;
                assert_eq!(code(received), Code::BodyTooLarge, "{form:?}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_not_in_its_encoding_is_malformed() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let whole = compressed(encoding, GOOD).await;
            let half = whole.get(..whole.len() / 2).expect("half").to_vec();
            for body in [GOOD.to_vec(), half, Vec::new()] {
                let form = Form { encoding, ..JSON };
                let received = receive_as(form, Limits::default(), Body::from(body), false).await;
                assert_eq!(code(received), Code::MalformedBody, "{encoding:?}");
            }
        }
    }
}
