//! The public listener: pixels, redirects, unsubscribes.
//!
//! Owns what each path answers (contract, section 7). A redirect needs a key and nothing else: if
//! the hit cannot be recorded, the person still gets where the link leads, and the loss is logged
//! and counted. Only an unsubscribe waits for the disk, and says so when it was in vain. Must not
//! touch the store, but for the challenge of a certificate authority that another node began.

pub(crate) mod admin;
pub(crate) mod page;
mod pages;
pub(crate) mod route;
pub(crate) mod server;

use crate::acme::challenges::Challenges;
use crate::hits::client::Said;
use crate::hits::visitor::Visitors;
use crate::hits::{Method as Way, NotRecorded, Recorder, Seen};
use crate::tenants::Tenants;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, LOCATION, REFERRER_POLICY,
    RETRY_AFTER, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use ipnet::IpNet;
use links::{KeyRing, Kind, VerifiedToken};
use model::{HitKind, Seq, TrackingMode};
use pages::{Page, ROBOTS};
use route::Route;
use server::Client;
use service::clock::SharedClock;
use service::metrics::{Metrics, TrackerKind, TrackerResult};
use std::borrow::Cow;
use std::error::Error as StdError;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// One transparent dot.
const GIF: &[u8; 43] = b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff\
!\xf9\x04\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;";
/// The body of a one-click POST is 26 bytes, as multipart/form-data some 200.
const MAX_BODY: usize = 16 * 1024;
/// How long a body may take.
const BODY_TIME: Duration = Duration::from_secs(10);
/// What RFC 8058 section 3.1 has the mail client send.
const ONE_CLICK: &[u8] = b"List-Unsubscribe=One-Click";

/// Fields of a redirect, with the cookie and those that hyper adds: room for all at once.
const REDIRECT_HEADERS: usize = 8;

pub(crate) type Answer = Response<Full<Bytes>>;

/// What follows from the key file; replaced as a whole when it is read again.
#[derive(Debug)]
pub(crate) struct Keyed {
    pub(crate) ring: KeyRing,
    pub(crate) visitors: Visitors,
}

/// What every request needs.
#[derive(Debug)]
pub(crate) struct Public {
    pub(crate) keyed: ArcSwap<Keyed>,
    pub(crate) tenants: Arc<Tenants>,
    /// `None`: certificates are not fetched.
    pub(crate) challenges: Option<Arc<Challenges>>,
    pub(crate) recorder: Recorder,
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
}

/// The number of a hit in the journal; none: nothing is kept of it.
type Recorded = Result<Option<Seq>, NotRecorded>;

/// An answer and how it is counted.
struct Counted {
    answer: Answer,
    kind: TrackerKind,
    result: TrackerResult,
}

/// A request with what was found out about its client.
struct Asked<'a> {
    parts: &'a Parts,
    peer: IpAddr,
    said: Said<'a>,
    authority: Cow<'a, str>,
    https: bool,
}

impl Asked<'_> {
    fn seen(&self) -> Seen<'_> {
        Seen {
            peer: self.peer,
            said: self.said,
        }
    }
}

impl Public {
    /// Answers one request. Cancel-safe: a hit once begun is kept.
    pub(crate) async fn answer<B>(&self, request: Request<B>, client: Client) -> Answer
    where
        B: Body + Send,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let began = self.clock.instant();
        let counted = self.dispatch(request, client).await;
        let took = self.clock.instant().saturating_duration_since(began);
        let metrics = &self.metrics;
        metrics
            .tracker_requests
            .at(counted.kind, counted.result)
            .inc();
        metrics
            .tracker_seconds
            .at(counted.kind)
            .observe(took.as_secs_f64());
        counted.answer
    }

    async fn dispatch<B>(&self, request: Request<B>, client: Client) -> Counted
    where
        B: Body + Send,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let (parts, body) = request.into_parts();
        let (counted, recorded) = {
            let asked = self.asked(&parts, client);
            match route::route(parts.uri.path()) {
                Route::Open(token) => self.open(&asked, token),
                Route::Click(token) => self.click(&asked, token),
                route => return self.others(&asked, route, body).await,
            }
        };
        // Nothing of the request is held while its answer waits: hyper uses the memory again, instead
        // of taking more for what may come next.
        drop((parts, body));
        let written = match recorded {
            Ok(seq) => self.recorder.written(seq).await,
            Err(error) => Err(error),
        };
        note(written);
        counted
    }

    /// Finds out who asks.
    fn asked<'a>(&self, parts: &'a Parts, client: Client) -> Asked<'a> {
        let peer = client.address;
        let from_proxy = route::is_trusted(peer.to_canonical(), &self.trusted_proxies);
        let said = Said::of(&parts.headers);
        let authority = route::authority(&parts.uri, &said, from_proxy);
        Asked {
            https: client.tls
                || self.tenants.view().hosts.is_https(&authority)
                || route::forwarded_https(&said, from_proxy),
            parts,
            peer,
            said,
            authority,
        }
    }

    /// Answers what is asked for less often, or waits for more than the journal's write.
    async fn others<B>(&self, asked: &Asked<'_>, route: Route<'_>, body: B) -> Counted
    where
        B: Body + Send,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        match route {
            Route::Unsubscribe(token) => self.unsubscribe(asked, token, body).await,
            Route::Challenge(token) => self.challenge(token).await,
            Route::Tag => page::tag(asked),
            Route::Page => page::view(self, asked, body).await,
            Route::Open(_) | Route::Click(_) | Route::Unknown => Counted {
                answer: Page::NotFound.answer(),
                kind: TrackerKind::Other,
                result: TrackerResult::BadRequest,
            },
        }
    }

    /// What a certificate authority is answered.
    async fn challenge(&self, token: &str) -> Counted {
        let answer = match &self.challenges {
            Some(challenges) => challenges.answer(token).await,
            None => None,
        };
        let (answer, result) = match answer {
            Some(text) => (plain(text), TrackerResult::Ok),
            None => (Page::NotFound.answer(), TrackerResult::BadRequest),
        };
        Counted {
            answer,
            kind: TrackerKind::Other,
            result,
        }
    }

    fn verify(&self, asked: &Asked<'_>, token: &str, kind: Kind) -> Option<VerifiedToken> {
        let keyed = self.keyed.load();
        let verified = self
            .tenants
            .view()
            .hosts
            .verify(&keyed.ring, token, &asked.authority, kind);
        if let Err(error) = &verified {
            tracing::debug!(%error, ?kind, "token refused");
        }
        verified.ok()
    }

    fn open(&self, asked: &Asked<'_>, token: &str) -> (Counted, Recorded) {
        let (hit, kind) = match asked.parts.method {
            Method::GET => (HitKind::Open, TrackerKind::Open),
            Method::HEAD => (HitKind::Probe, TrackerKind::Probe),
            _ => return (not_allowed(TrackerKind::Open, "GET, HEAD"), Ok(None)),
        };
        let verified = self.verify(asked, token, Kind::Open);
        let recorded = match &verified {
            Some(verified) => {
                let token = verified.token();
                self.recorder.hit(hit, &token, asked.seen(), None)
            }
            None => Ok(None),
        };
        let counted = Counted {
            answer: pixel(),
            kind,
            result: result_of(verified.is_some()),
        };
        (counted, recorded)
    }

    fn click(&self, asked: &Asked<'_>, token: &str) -> (Counted, Recorded) {
        let (hit, kind) = match asked.parts.method {
            Method::GET => (HitKind::Click, TrackerKind::Click),
            Method::HEAD => (HitKind::Probe, TrackerKind::Probe),
            _ => return (not_allowed(TrackerKind::Click, "GET, HEAD"), Ok(None)),
        };
        let Some(verified) = self.verify(asked, token, Kind::Click) else {
            let refused = Counted {
                answer: Page::NotFound.answer(),
                kind,
                result: TrackerResult::BadToken,
            };
            return (refused, Ok(None));
        };
        let token = verified.token();
        let mut answer = redirect(token.target, hit == HitKind::Probe);
        let individual = token.flags.mode == TrackingMode::Individual && !token.flags.proof;
        // The store drops the hits of an archived batch; here it leaves nothing in the browser.
        let individual = individual && !self.tenants.is_archived(token.batch);
        let mut visitor = None;
        // Who objects gets no name; what is recorded is counted, no more.
        if hit == HitKind::Click && individual && !asked.said.objects {
            let keyed = self.keyed.load();
            let known = keyed.visitors.read(&asked.parts.headers);
            visitor = known.or_else(|| Visitors::fresh(self.clock.now()));
            // Also for a known one: its time to live begins anew with each click.
            let cookie = visitor.map(|id| keyed.visitors.cookie(id, &asked.authority, asked.https));
            let cookie = cookie.and_then(|cookie| HeaderValue::from_str(&cookie).ok());
            if let Some(cookie) = cookie {
                answer.headers_mut().insert(SET_COOKIE, cookie);
            }
        }
        let recorded = self.recorder.hit(hit, &token, asked.seen(), visitor);
        let counted = Counted {
            answer,
            kind,
            result: TrackerResult::Ok,
        };
        (counted, recorded)
    }

    async fn unsubscribe<B>(&self, asked: &Asked<'_>, token: &str, body: B) -> Counted
    where
        B: Body + Send,
        B::Data: Send,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let counted = |page: Page, result| Counted {
            answer: page.answer(),
            kind: TrackerKind::Unsubscribe,
            result,
        };
        let acts = match asked.parts.method {
            Method::GET | Method::HEAD => false,
            Method::POST => true,
            _ => return not_allowed(TrackerKind::Unsubscribe, "GET, HEAD, POST"),
        };
        let Some(verified) = self.verify(asked, token, Kind::Unsubscribe) else {
            return counted(Page::NotFound, TrackerResult::BadToken);
        };
        if !acts {
            return counted(Page::Ask, TrackerResult::Ok);
        }
        let way = match read(body).await {
            Ok(body) => way_of(&body),
            Err(status) => return counted(Page::BadRequest(status), TrackerResult::BadRequest),
        };
        let token = verified.token();
        match self.recorder.unsubscribe(&token, asked.seen(), way).await {
            Ok(()) => counted(Page::Done, TrackerResult::Ok),
            Err(error) => {
                tracing::error!(%error, batch = %token.batch, index = token.index, "unsubscribe was not recorded");
                let mut counted = counted(Page::Unavailable, TrackerResult::Error);
                let headers = counted.answer.headers_mut();
                headers.insert(RETRY_AFTER, HeaderValue::from_static("60"));
                counted
            }
        }
    }
}

fn result_of(good_token: bool) -> TrackerResult {
    if good_token {
        TrackerResult::Ok
    } else {
        TrackerResult::BadToken
    }
}

/// A hit that could not be kept does not keep the person from the page.
fn note(recorded: Result<(), NotRecorded>) {
    if let Err(error) = recorded {
        tracing::warn!(%error, "hit was not recorded");
    }
}

/// The whole body, within bounds of size and time.
async fn read<B>(body: B) -> Result<Bytes, StatusCode>
where
    B: Body + Send,
    B::Data: Send,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let whole = Limited::new(body, MAX_BODY).collect();
    match tokio::time::timeout(BODY_TIME, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(StatusCode::PAYLOAD_TOO_LARGE),
        Ok(Err(_)) => Err(StatusCode::BAD_REQUEST),
        Err(_) => Err(StatusCode::REQUEST_TIMEOUT),
    }
}

/// A POST unsubscribes whatever it says, since refusing someone who wants out is the worse mistake;
/// what it says only tells the ways apart. RFC 8058 allows a form in either encoding.
fn way_of(body: &[u8]) -> Way {
    let urlencoded = body.starts_with(ONE_CLICK);
    let multipart = || {
        let has = |part: &[u8]| body.windows(part.len()).any(|window| window == part);
        has(b"name=\"List-Unsubscribe\"") && has(b"One-Click")
    };
    if urlencoded || multipart() {
        Way::OneClick
    } else {
        Way::Page
    }
}

fn pixel() -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from_static(GIF)));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("image/gif"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// What a machine is answered.
fn plain(text: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    let headers = answer.headers_mut();
    let media = HeaderValue::from_static("application/octet-stream");
    headers.insert(CONTENT_TYPE, media);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

fn redirect(target: &str, is_head: bool) -> Answer {
    let Ok(location) = HeaderValue::from_str(&route::location(target)) else {
        // `location` gives visible ASCII only.
        return Page::NotFound.answer();
    };
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::FOUND;
    let headers = answer.headers_mut();
    *headers = HeaderMap::with_capacity(REDIRECT_HEADERS);
    headers.insert(LOCATION, location);
    if is_head {
        // hyper leaves an empty body's length out; both methods answer with the same headers.
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // The browsers' own default, said aloud: the site learns at most where the person came from.
    let referrer = HeaderValue::from_static("strict-origin-when-cross-origin");
    headers.insert(REFERRER_POLICY, referrer);
    headers.insert(ROBOTS, HeaderValue::from_static("noindex"));
    answer
}

fn not_allowed(kind: TrackerKind, allowed: &'static str) -> Counted {
    let mut answer = Page::MethodNotAllowed.answer();
    let headers = answer.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static(allowed));
    Counted {
        answer,
        kind,
        result: TrackerResult::BadRequest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_unsubscribe_are_told_apart() {
        let multipart = b"--x\r\nContent-Disposition: form-data; name=\"List-Unsubscribe\"\r\n\r\nOne-Click\r\n--x--\r\n";
        for (body, way) in [
            (&b"List-Unsubscribe=One-Click"[..], Way::OneClick),
            (multipart, Way::OneClick),
            (b"unsubscribe=page", Way::Page),
            (b"", Way::Page),
            (&[0xff; 40], Way::Page),
        ] {
            assert_eq!(way_of(body), way);
        }
    }
}
