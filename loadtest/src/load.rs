//! HTTP/1.1 over kept connections, one request at a time on each: as little as a client can do, so
//! that the server is what is measured.

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use memchr::{memchr, memmem};
use service::clock::{Clock as _, SystemClock};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// The largest head of an answer.
const MAX_HEAD: usize = 64 * 1024;
/// The largest body of an answer: a redirect has none, a pixel 43 bytes.
const MAX_BODY: usize = 1 << 20;
/// After which an answer is missed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is asked, how hard and for how long.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who is asked.
    pub address: SocketAddr,
    /// Whole requests, asked in turn by each connection.
    pub requests: Arc<[Bytes]>,
    /// Connections, each with one request at a time.
    pub connections: usize,
    /// How long.
    pub time: Duration,
    /// How many requests at most.
    pub most: u64,
    /// The status that each answer must have.
    pub status: u16,
    /// Requests per second over all connections; `None`: as fast as they are answered.
    pub pace: Option<f64>,
    /// Ends it before its time.
    pub enough: Arc<AtomicBool>,
    /// The cookies that are kept; `None`: nobody keeps any.
    pub jar: Option<Arc<Jar>>,
}

/// Browsers that keep their cookie, one for each request of a [`Plan`]; the others ask once.
#[derive(Debug)]
pub struct Jar {
    /// Of 100 requests, how many come from the browser that keeps its cookie.
    share: u32,
    kept: Vec<OnceLock<Bytes>>,
}

impl Jar {
    /// For so many requests; `share` of 100 of them come from the browser that keeps its cookie.
    pub fn new(requests: usize, share: u32) -> Self {
        let kept = std::iter::repeat_with(OnceLock::new).take(requests);
        Self {
            share,
            kept: kept.collect(),
        }
    }

    /// The place of the browser that asks; `None`: one that does not come again.
    fn browser(&self, visit: u32, request: usize) -> Option<&OnceLock<Bytes>> {
        // Spread evenly over those that follow each other.
        let of_hundred = visit.wrapping_mul(37) % 100;
        self.kept.get(request).filter(|_| of_hundred < self.share)
    }
}

/// A request with a cookie.
fn with_cookie(request: &Bytes, cookie: &Bytes) -> Bytes {
    let head = request.strip_suffix(b"\r\n").unwrap_or(request);
    [head, b"Cookie: ", cookie, b"\r\n\r\n"].concat().into()
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Answered {
    /// How long each answer took.
    pub latency: Histogram,
    /// How long it all took.
    pub took: Duration,
}

impl Answered {
    /// Adds another round.
    pub fn add(&mut self, other: &Self) {
        self.latency.add(&other.latency);
        self.took += other.took;
    }
}

/// Asks as planned.
///
/// # Errors
/// When a connection fails, or an answer is another than it must be.
pub async fn run(plan: &Plan) -> Result<Answered> {
    ensure!(!plan.requests.is_empty(), "nothing to ask");
    let start = SystemClock.instant();
    let mut connections = JoinSet::new();
    for at in 0..plan.connections {
        connections.spawn(ask(plan.clone(), at));
    }
    let mut answered = Answered::default();
    while let Some(done) = connections.join_next().await {
        answered
            .latency
            .add(&done.context("a connection's task died")??);
    }
    answered.took = SystemClock.instant().duration_since(start);
    Ok(answered)
}

async fn ask(plan: Plan, at: usize) -> Result<Histogram> {
    let mut histogram = Histogram::default();
    let mut connection = Connection::open(plan.address).await?;
    let share = plan.most.div_ceil(plan.connections.max(1) as u64);
    let start = SystemClock.instant();
    // Connections begin at different places, so that they do not all ask the same.
    let first = at * plan.requests.len() / plan.connections.max(1);
    let requests = plan.requests.iter().enumerate().cycle().skip(first);
    let pace = plan.pace.map(|pace| Pace::of(pace, plan.connections, at));
    let requests = requests.take(usize::try_from(share).unwrap_or(usize::MAX));
    for (number, (which, request)) in (0_u32..).zip(requests) {
        let asked = match &pace {
            None => SystemClock.instant(),
            Some(pace) => pace.wait(start, number).await,
        };
        let over = asked.duration_since(start) >= plan.time;
        if over || plan.enough.load(Ordering::Relaxed) {
            break;
        }
        let browser = plan.jar.as_ref().and_then(|jar| jar.browser(number, which));
        let returning = browser
            .and_then(OnceLock::get)
            .map(|cookie| with_cookie(request, cookie));
        let asking = connection.ask(returning.as_ref().unwrap_or(request));
        let answer = tokio::time::timeout(PATIENCE, asking);
        let status = answer.await.context("no answer within 30 s")??;
        histogram.record(SystemClock.instant().duration_since(asked));
        if status != plan.status {
            bail!("answered {status} where {} was expected", plan.status);
        }
        if let (Some(browser), Some(cookie)) = (browser, connection.cookie.take()) {
            // The first that is given names the browser; it is given again with each answer.
            let _known = browser.set(cookie);
        }
        if connection.closing {
            connection = Connection::open(plan.address).await?;
        }
    }
    Ok(histogram)
}

/// When the requests of one connection are due.
struct Pace {
    first: Duration,
    between: Duration,
}

impl Pace {
    fn of(pace: f64, connections: usize, at: usize) -> Self {
        let connections = u32::try_from(connections.max(1)).unwrap_or(u32::MAX);
        let between = Duration::from_secs_f64(1.0 / pace.max(1.0)) * connections;
        let at = u32::try_from(at).unwrap_or(0);
        Self {
            first: between * at / connections,
            between,
        }
    }

    /// Waits until a request is due; from when its answer is waited for. One that was late, since
    /// the answer before it was, counts from when it was due: who waits does not ask when.
    async fn wait(&self, start: std::time::Instant, number: u32) -> std::time::Instant {
        let due = start + self.first + self.between * number;
        if SystemClock.instant() >= due {
            return due;
        }
        tokio::time::sleep_until(due.into()).await;
        SystemClock.instant()
    }
}

struct Connection {
    stream: TcpStream,
    input: BytesMut,
    closing: bool,
    /// The one of the last answer.
    cookie: Option<Bytes>,
}

/// The beginning of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    /// Bytes of it, the empty line included.
    len: usize,
    status: u16,
    body: usize,
    close: bool,
    /// Where the name and the value of a cookie stand that it sets.
    cookie: Option<Range<usize>>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await;
        let stream = stream.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            input: BytesMut::with_capacity(4096),
            closing: false,
            cookie: None,
        })
    }

    async fn ask(&mut self, request: &[u8]) -> Result<u16> {
        self.stream.write_all(request).await?;
        let head = loop {
            if let Some(head) = parse_head(&self.input)? {
                break head;
            }
            ensure!(
                self.input.len() < MAX_HEAD,
                "an answer without an end of its head"
            );
            self.read().await?;
        };
        let head_bytes = self.input.split_to(head.len).freeze();
        self.cookie = head.cookie.map(|place| head_bytes.slice(place));
        while self.input.len() < head.body {
            self.read().await?;
        }
        self.input.advance(head.body);
        self.closing = head.close;
        Ok(head.status)
    }

    async fn read(&mut self) -> Result<()> {
        self.input.reserve(1024);
        let read = self.stream.read_buf(&mut self.input).await?;
        ensure!(read > 0, "the connection ended before its answer");
        Ok(())
    }
}

/// The head at the beginning of `input`, if it is all there. The load source shares its machine with
/// whom it measures: what it spends on an answer with many fields would count against who gives it.
fn parse_head(input: &[u8]) -> Result<Option<Head>> {
    let Some(end) = memmem::find(input, b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = input.get(..end).unwrap_or_default();
    let mut lines = Lines { head, at: 0 };
    let status = lines
        .next()
        .and_then(|(_, line)| line.strip_prefix(b"HTTP/1.1 ")?.get(..3))
        .and_then(|status| str::from_utf8(status).ok()?.parse().ok())
        .context("not an HTTP/1.1 answer")?;
    let mut found = Head {
        len: end + 4,
        status,
        body: 0,
        close: false,
        cookie: None,
    };
    let mut has_length = false;
    for (start, line) in lines {
        let colon = memchr(b':', line).context("a header line without a colon")?;
        let (name, value) = line.split_at(colon);
        let value = value.get(1..).unwrap_or_default();
        // Few fields are as long as one that is looked for.
        match name.len() {
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                let length = str::from_utf8(value).ok();
                let length = length.and_then(|length| length.trim().parse().ok());
                found.body = length.context("a length that is no number")?;
                has_length = true;
            }
            10 if name.eq_ignore_ascii_case(b"set-cookie") => {
                let pair = value.split(|byte| *byte == b';').next().unwrap_or_default();
                let from = start + colon + 1;
                let blank = pair.len() - pair.trim_ascii_start().len();
                found.cookie = Some(from + blank..from + pair.len());
            }
            10 if name.eq_ignore_ascii_case(b"connection") => {
                found.close = value.trim_ascii().eq_ignore_ascii_case(b"close");
            }
            _ => {}
        }
    }
    ensure!(has_length, "an answer without Content-Length");
    ensure!(found.body <= MAX_BODY, "a body of {} bytes", found.body);
    Ok(Some(found))
}

/// The lines of a head, and where each begins.
struct Lines<'a> {
    head: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Lines<'a> {
    type Item = (usize, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.head.get(self.at..).filter(|rest| !rest.is_empty())?;
        let end = memmem::find(rest, b"\r\n").unwrap_or(rest.len());
        let start = self.at;
        self.at += end + 2;
        Some((start, rest.get(..end)?))
    }
}

/// Sub-buckets of each power of two: a value is known to 1/64.
const SUB: u64 = 64;
const BUCKETS: usize = 64 * 60;

/// Durations, each known to 1.6 %, in a fixed 30 KiB.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }
}

impl Histogram {
    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// Records one.
    pub fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(nanos)) {
            *count += 1;
            self.total += 1;
        }
    }

    /// Adds all of another.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// The duration that this share of all does not exceed, to 1.6 %; zero when there are none.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut left = crate::format::float(self.total) * share;
        for (at, count) in self.counts.iter().enumerate() {
            left -= crate::format::float(*count);
            if *count > 0 && left <= 0.0 {
                return Duration::from_nanos(upper(at));
            }
        }
        Duration::ZERO
    }
}

/// Below `2 * SUB` each value has its own; beyond, each power of two has `SUB`.
fn bucket(nanos: u64) -> usize {
    let shift = (64 - nanos.leading_zeros()).saturating_sub(SUB.ilog2() + 1);
    let at = u64::from(shift) * SUB + (nanos >> shift);
    usize::try_from(at).unwrap_or(usize::MAX)
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * SUB {
        return bucket;
    }
    let shift = bucket / SUB - 1;
    let low = u128::from(bucket - shift * SUB) << shift;
    u64::try_from(low + (1 << shift) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_of_answers() {
        let redirect =
            b"HTTP/1.1 302 Found\r\nlocation: https://x.example/\r\nContent-Length: 0\r\n\r\nHTTP";
        let head = parse_head(redirect).expect("an answer").expect("whole");
        assert_eq!((head.status, head.body, head.close), (302, 0, false));
        assert_eq!(redirect.get(head.len..), Some(b"HTTP".as_slice()));
        assert_eq!(head.cookie, None);
        let named = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nSet-Cookie: hk_vid=abc; Path=/\r\nX: y\r\n\r\n";
        let head = parse_head(named).expect("an answer").expect("whole");
        let cookie = head.cookie.and_then(|place| named.get(place));
        assert_eq!(cookie, Some(b"hk_vid=abc".as_slice()));
        let closing = b"HTTP/1.1 200 OK\r\ncontent-length: 43\r\nconnection: close\r\n\r\n";
        let head = parse_head(closing).expect("an answer").expect("whole");
        assert_eq!((head.status, head.body, head.close), (200, 43, true));
        assert_eq!(parse_head(b"HTTP/1.1 302 Found\r\n").expect("so far"), None);
        for bad in [
            "HTTP/1.1 302 Found\r\n\r\n",
            "SMTP\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\nno colon\r\n\r\n",
        ] {
            assert!(parse_head(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn so_many_come_from_a_browser_that_keeps_its_cookie() {
        for share in [0, 30, 100] {
            let jar = Jar::new(2, share);
            let theirs = (0..200).filter(|visit| jar.browser(*visit, 1).is_some());
            assert_eq!(theirs.count(), 2 * usize::try_from(share).expect("small"));
        }
        let request = Bytes::from_static(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
        let with = with_cookie(&request, &Bytes::from_static(b"a=b"));
        assert_eq!(
            with,
            &b"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\n\r\n"[..]
        );
    }

    #[test]
    fn quantiles() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        let near = |share, micros: f64| {
            let got = histogram.quantile(share).as_secs_f64() * 1e6;
            assert!((got - micros).abs() / micros < 0.02, "{share}: {got}");
        };
        near(0.5, 500.0);
        near(0.99, 990.0);
        near(1.0, 1000.0);
        assert_eq!(histogram.count(), 1000);
        assert_eq!(Histogram::default().quantile(0.5), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn a_bucket_holds_what_is_put_into_it(nanos: u64) {
            let at = bucket(nanos);
            prop_assert!(at < BUCKETS);
            prop_assert!(upper(at) >= nanos);
            prop_assert!(at == 0 || upper(at - 1) < nanos);
            prop_assert!(upper(at) - nanos <= nanos / SUB);
        }

        #[test]
        fn any_answer_is_read(bytes: Vec<u8>, text in "HTTP/1.1 [0-9]{3} [ -~]{0,20}(\r\n[ -~]{0,30}){0,4}\r\n\r\n") {
            let _read = (parse_head(&bytes), parse_head(text.as_bytes()));
        }
    }
}
