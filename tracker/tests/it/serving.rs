//! TLS with a certificate for each host, HTTP/2 with and without it, and their ends.

use crate::client::{connect, http1_on, http2_on, leaf, trusting, whole};
use crate::harness::{HOST, Place, Running, TARGET, token, until};
use anyhow::Result;
use bytes::Bytes;
use http_body_util::{Full, StreamBody};
use hyper::body::Frame;
use hyper::{Method, Request, Version};
use links::Kind;
use rustls::ClientConfig;
use service::tasks::Stage;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use testkit::tls::Issuer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const OTHER: &str = "t.other.example";

/// Certificates in files, and who signed them.
struct Files {
    dir: tempfile::TempDir,
    issuer: Issuer,
}

impl Files {
    fn new() -> Result<Self> {
        let files = Self {
            dir: tempfile::tempdir()?,
            issuer: Issuer::new("a test's authority")?,
        };
        files.issue(HOST)?;
        files.issue(OTHER)?;
        Ok(files)
    }

    fn path(&self, host: &str, kind: &str) -> PathBuf {
        self.dir.path().join(format!("{host}.{kind}"))
    }

    /// Puts a new certificate for the host in its place.
    fn issue(&self, host: &str) -> Result<()> {
        let issued = self.issuer.issue(&[host])?;
        std::fs::write(self.path(host, "key"), issued.key_pem())?;
        Ok(std::fs::write(self.path(host, "pem"), issued.chain_pem())?)
    }

    fn config(&self) -> String {
        let mut text = "[tracker.tls]\nlisten = \"127.0.0.1:0\"\n".to_owned();
        for host in [HOST, OTHER] {
            let (pem, key) = (self.path(host, "pem"), self.path(host, "key"));
            text.push_str(&format!(
                "[[tracker.certificates]]\nhost = \"{host}\"\ncert_file = {pem:?}\nkey_file = {key:?}\n"
            ));
        }
        text
    }

    fn trusting(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        trusting(self.issuer.certificate(), alpn)
    }
}

fn get(uri: &str) -> Request<Full<Bytes>> {
    let path = uri.parse::<hyper::Uri>().expect("a URI");
    let host = path.authority().map(ToString::to_string);
    let request = Request::get(path).header("user-agent", crate::harness::CHROME);
    let request = match host {
        Some(_) => request,
        None => request.header("host", HOST),
    };
    request.body(Full::default()).expect("a request")
}

fn tls_addr(running: &Running) -> std::net::SocketAddr {
    running.tracker.tls_addr().expect("a listener for TLS")
}

#[tokio::test]
async fn https_is_served_in_both_versions_with_a_certificate_for_each_host() -> Result<()> {
    let files = Files::new()?;
    let place = Place::with(2, &files.config()).await;
    let running = place.start().await;
    let addr = tls_addr(&running);
    let path = format!("/c/{}", token(Kind::Click, 0));

    let stream = connect(addr, HOST, &files.trusting(&[])).await?;
    let old = http1_on(stream, get(&path)).await?;
    assert_eq!(
        (old.status(), old.version()),
        (302.try_into()?, Version::HTTP_11)
    );
    let stream = connect(addr, HOST, &files.trusting(&[b"h2", b"http/1.1"])).await?;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut sender = http2_on(stream).await?;
    let new = whole(
        sender
            .send_request(get(&format!("https://{HOST}{path}")))
            .await?,
    )
    .await?;
    assert_eq!(
        (new.status(), new.version()),
        (302.try_into()?, Version::HTTP_2)
    );
    for answer in [&old, &new] {
        assert_eq!(answer.headers()["location"], TARGET);
        // Our own TLS is https, whatever the configured address begins with.
        let cookie = answer.headers()["set-cookie"].to_str()?;
        assert!(cookie.contains("; Secure;"), "{cookie}");
    }
    // The cookie may come in a header of its own for each part (RFC 9113 section 8.2.3).
    let known = new.headers()["set-cookie"].to_str()?.split(';').next();
    let mut again = get(&format!("https://{HOST}{path}"));
    again.headers_mut().append("cookie", "a=b".parse()?);
    again
        .headers_mut()
        .append("cookie", known.unwrap_or_default().parse()?);
    whole(sender.send_request(again).await?).await?;
    place.counters(|counters| counters.clicked_total == 3).await;
    let hits = place.hits(0).await;
    assert_eq!(hits[1].visitor, hits[2].visitor);
    assert_ne!(hits[0].visitor, hits[1].visitor);

    // The other host's certificate is its own, and nobody else's is shown.
    assert!(leaf(addr, OTHER, &files.trusting(&[])).await.is_ok());
    assert!(
        leaf(addr, "t.third.example", &files.trusting(&[]))
            .await
            .is_err()
    );
    assert!(leaf(addr, "127.0.0.1", &files.trusting(&[])).await.is_err());
    // Who speaks no TLS is not served there.
    let mut plain = TcpStream::connect(addr).await?;
    plain
        .write_all(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).await.ok();
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let metrics = running.admin("/metrics").await.text();
    let expiry = format!("hikyaku_tracker_certificate_expiry_seconds{{host=\"{OTHER}\"}} ");
    assert!(metrics.contains(&expiry), "{metrics}");
    running.drain().await;
    Ok(())
}

#[tokio::test]
async fn changed_files_are_taken_and_bad_ones_change_nothing() -> Result<()> {
    let files = Files::new()?;
    let place = Place::with(1, &files.config()).await;
    let running = place.start().await;
    let (addr, client) = (tls_addr(&running), files.trusting(&[]));
    let shown = async || leaf(addr, HOST, &client).await.expect("a certificate");
    let first = shown().await;

    // The certificate alone has another key than the one that lies there.
    let other = files.issuer.issue(&[HOST])?;
    std::fs::write(files.path(HOST, "pem"), other.chain_pem())?;
    running.tracker.reload();
    assert_eq!(shown().await, first);
    std::fs::write(files.path(HOST, "pem"), "nonsense")?;
    running.tracker.reload();
    assert_eq!(shown().await, first);
    let other_host = files.issuer.issue(&[OTHER])?;
    std::fs::write(files.path(HOST, "pem"), other_host.chain_pem())?;
    std::fs::write(files.path(HOST, "key"), other_host.key_pem())?;
    running.tracker.reload();
    assert_eq!(shown().await, first);
    let metrics = running.admin("/metrics").await.text();
    let failures = |host: &str| {
        let of = format!(
            "hikyaku_tracker_certificates_total{{host=\"{host}\",origin=\"file\",result=\"failed\"}} "
        );
        let count = metrics.lines().find_map(|line| line.strip_prefix(&of));
        count.map(str::to_owned)
    };
    assert!(
        failures(HOST).is_some_and(|count| count != "0"),
        "{metrics}"
    );
    assert_eq!(failures(OTHER).as_deref(), Some("0"), "{metrics}");

    files.issue(HOST)?;
    running.tracker.reload();
    let second = shown().await;
    assert_ne!(second, first);
    // Without being told, too.
    files.issue(HOST)?;
    until("the new certificate", async || shown().await != second).await;
    running.drain().await;
    Ok(())
}

#[tokio::test]
async fn a_bad_certificate_is_told_at_the_start() -> Result<()> {
    let files = Files::new()?;
    std::fs::write(files.path(OTHER, "key"), "nonsense")?;
    let place = Place::with(1, &files.config()).await;
    let deps = tracker::Deps {
        store: place.store.clone(),
        metrics: Arc::new(service::metrics::Metrics::new()),
        clock: service::clock::SystemClock::shared(),
        tasks: service::tasks::Tasks::new(),
        shutdown: service::tasks::Shutdown::new(),
    };
    let error = tracker::start(&place.config, deps)
        .await
        .expect_err("refused");
    let said = error.to_string();
    assert!(
        said.contains(&*files.path(OTHER, "key").to_string_lossy()),
        "{said}"
    );
    assert!(Path::new(&files.path(OTHER, "pem")).exists());
    Ok(())
}

/// A POST whose body is not there yet.
type Slow = StreamBody<Frames>;
type Frames = futures_util::stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>;

#[tokio::test]
async fn http2_without_tls_ends_with_what_was_begun() -> Result<()> {
    let place = Place::new(40).await;
    let running = place.start().await;
    let addr = running.tracker.addr();
    let mut sender = http2_on(TcpStream::connect(addr).await?).await?;
    let mut answers = Vec::new();
    for index in 0..40 {
        let uri = format!("http://{HOST}/c/{}", token(Kind::Click, index));
        answers.push(sender.send_request(get(&uri)));
    }
    for answer in answers {
        assert_eq!(whole(answer.await?).await?.headers()["location"], TARGET);
    }
    place
        .counters(|counters| counters.clicked_unique == 40)
        .await;
    let mut probe = get(&format!("http://{HOST}/o/{}.gif", token(Kind::Open, 1)));
    *probe.method_mut() = Method::HEAD;
    let probe = whole(sender.send_request(probe).await?).await?;
    assert_eq!((probe.status(), probe.body().len()), (200.try_into()?, 0));
    assert_eq!(probe.headers()["content-length"], "43");

    // A request that is on its way when the process is asked to end is answered and recorded; a
    // new one finds the connection closed.
    let mut sender = http2_on::<_, Slow>(TcpStream::connect(addr).await?).await?;
    let (body, frames) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
    let frames = futures_util::stream::unfold(frames, async |mut frames| {
        Some((frames.recv().await?, frames))
    });
    let uri = format!("http://{HOST}/u/{}", token(Kind::Unsubscribe, 3));
    let slow = Request::post(uri).body(StreamBody::new(Box::pin(frames) as Frames))?;
    let begun = sender.send_request(slow);
    let first = Frame::data(Bytes::from_static(b"List-Unsub"));
    body.send(Ok(first)).await?;
    // What is asked later on the same connection is answered: so the server has what was before.
    let none: Frames = Box::pin(futures_util::stream::empty());
    let quick = Request::get(format!("http://{HOST}/t.js")).body(StreamBody::new(none))?;
    assert_eq!(
        whole(sender.send_request(quick).await?).await?.status(),
        200
    );
    let deps = running.deps.clone();
    deps.shutdown.begin();
    deps.shutdown.reached(Stage::Intake).await;
    body.send(Ok(Frame::data(Bytes::from_static(b"scribe=One-Click"))))
        .await?;
    drop(body);
    let answer = whole(begun.await?).await?;
    assert_eq!(answer.status(), 200);
    until("the end of the connection", async || sender.is_closed()).await;
    running.drain().await;
    place.counters(|counters| counters.unsubscribed == 1).await;
    Ok(())
}

/// A frame of HTTP/2 (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The error codes of the GOAWAY frames among these bytes.
fn goaways(mut bytes: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let Some((payload, rest)) = rest.split_at_checked(length) else {
            break;
        };
        if head[3] == 7
            && let Some(code) = payload.get(4..8)
        {
            found.push(u32::from_be_bytes(code.try_into().expect("four bytes")));
        }
        bytes = rest;
    }
    found
}

/// Sends these frames after the beginning of a connection; what came back until its end.
async fn flood(running: &Running, frames: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(running.tracker.addr()).await?;
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frames);
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    let writing = async {
        // It is cut short when the other side has enough.
        write.write_all(&bytes).await.ok();
    };
    let reading = async {
        read.read_to_end(&mut answer).await.ok();
    };
    tokio::join!(writing, reading);
    Ok(answer)
}

#[tokio::test]
async fn floods_of_http2_end_the_connection() -> Result<()> {
    const ENHANCE_YOUR_CALM: u32 = 0xb;
    let place = Place::new(1).await;
    let running = place.start().await;
    // GET / over http, from the static table of HPACK, and taken back at once (CVE-2023-44487).
    let resets: Vec<u8> = (0..20_000_u32)
        .flat_map(|at| {
            let stream = 2 * at + 1;
            [
                frame(1, 0x5, stream, &[0x82, 0x86, 0x84]),
                frame(3, 0, stream, &8_u32.to_be_bytes()),
            ]
        })
        .flatten()
        .collect();
    // A head that never ends (CVE-2024-27316).
    let mut head = frame(1, 0x1, 1, &[0x82, 0x86, 0x84]);
    for _ in 0..2_000 {
        // A literal field without indexing: a name of one letter, a value of 100.
        let field = [&[0x00, 0x01, b'x', 0x64][..], &[b'y'; 100]].concat();
        head.extend(frame(9, 0, 1, &field.repeat(10)));
    }
    for (what, frames) in [("resets", resets), ("continuations", head)] {
        let answer = flood(&running, &frames).await?;
        let codes = goaways(&answer);
        assert!(
            codes.contains(&ENHANCE_YOUR_CALM),
            "{what}: {codes:?}, {} bytes",
            answer.len()
        );
        let links = running.get(&format!("/c/{}", token(Kind::Click, 0))).await;
        assert_eq!(links.status, 302, "after {what}");
    }
    running.drain().await;
    Ok(())
}
