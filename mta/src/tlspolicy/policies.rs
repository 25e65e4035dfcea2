//! Finds out what a domain asks, and keeps what was found.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use hyper::Method;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use model::{Domain, JournalId};
use service::clock::SharedClock;
use service::config::DanePolicy;
use service::metrics::Metrics;
use service::tasks::Shutdown;
use store::{Note, Store};
use tokio::sync::watch;

use super::Asked;
use super::report::{self, Destination};
use super::shelf::{Fetched, KIND, Shelf};
use super::sts::{Mode, PolicyError, StsPolicy, id_of};
use super::tally::{Failure, Flaw, Policy, PolicyKind, Tally};
use crate::http::{Call, HttpClient, HttpError, Reach};
use crate::resolve::{Cache, Dns, DnsError, Route};

/// Domains of which is remembered what they announce.
const DOMAINS_MAX: usize = 100_000;
/// What a domain asks is looked up again after this, and not before.
const AGAIN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3_600));
/// A policy that could not be fetched is not asked for again before this (RFC 8461 §3.3).
const FETCH_PAUSE: Duration = Duration::from_secs(300);
/// Between looks at whether the name servers validate: as long as they do not, and then.
const TEST: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// Between writing down what is new, and between taking in what other nodes learnt.
const NOTES: Duration = Duration::from_secs(10);
const ROUND: Duration = Duration::from_secs(3_600);
/// Policies that are fetched again in one round, and at a time.
const REFRESH_MAX: usize = 5_000;
const REFRESH_AT_ONCE: usize = 8;

/// What finding out needs.
pub struct PoliciesDeps {
    /// The names.
    pub dns: Arc<dyn Dns>,
    /// The policy hosts.
    pub http: Arc<HttpClient>,
    /// What nodes share.
    pub store: Arc<dyn Store>,
    /// Who we are among them.
    pub node: JournalId,
    /// The time.
    pub clock: SharedClock,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Whether TLSA records are kept to.
    pub dane: DanePolicy,
    /// A name that has to come validated.
    pub dane_test: String,
    /// Whether MTA-STS policies are kept to.
    pub mta_sts: bool,
    /// Where policy hosts listen.
    pub mta_sts_port: u16,
    /// Whether TLS reports are made.
    pub reports: bool,
}

/// What recipient domains ask. Shared by reference.
pub struct Policies(Arc<Inner>);

struct Inner {
    deps: PoliciesDeps,
    sts: Cache<Option<Arc<StsPolicy>>>,
    shelf: Shelf,
    /// Where domains want reports.
    wanted: Cache<Arc<[Destination]>>,
    tally: Tally,
    /// Whether DANE can be used; none until that was tried, and the notes were read, once.
    validates: watch::Sender<Option<bool>>,
}

/// Why a policy was announced and is not there.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error("the policy host answered with {0:?} instead of text/plain")]
    MediaType(String),
}

impl std::fmt::Debug for Policies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policies").finish_non_exhaustive()
    }
}

impl Policies {
    /// Knows nothing yet; [`Policies::run`] has to run beside.
    pub fn new(deps: PoliciesDeps) -> Self {
        Self(Arc::new(Inner {
            deps,
            sts: Cache::new(DOMAINS_MAX),
            shelf: Shelf::default(),
            wanted: Cache::new(DOMAINS_MAX),
            tally: Tally::default(),
            validates: watch::Sender::new(None),
        }))
    }

    /// `route` with what `domain` asks of connections to it. A static route is the operator's word
    /// in this too.
    pub async fn judge(&self, domain: &Domain, route: Arc<Route>) -> Arc<Route> {
        if route.is_static() {
            return route;
        }
        // Before the first look at them, nothing is known of earlier policies either.
        let mut tested = self.0.validates.subscribe();
        let validates = tested.wait_for(Option::is_some).await;
        let validates = validates.is_ok_and(|validates| *validates == Some(true));
        let (sts, wanted) = tokio::join!(self.sts(domain), self.0.wanted(domain.as_str()));
        let asked = Asked {
            dane: validates && route.is_secure(),
            sts,
        };
        if asked == Asked::default() && wanted.is_empty() {
            return route;
        }
        let judged = Route::clone(&route).asking(asked);
        Arc::new(match wanted.is_empty() {
            true => judged,
            false => judged.reported_for(domain.as_str()),
        })
    }

    /// Where `domain` wants TLS reports; empty also when none are made here.
    pub(crate) async fn wanted(&self, domain: &str) -> Arc<[Destination]> {
        self.0.wanted(domain).await
    }

    /// One report to one HTTPS destination (RFC 8460 §5.4).
    ///
    /// # Errors
    /// Why it was not taken.
    pub(crate) async fn hand_in(
        &self,
        (host, port, path): (&str, u16, &str),
        gzip: Vec<u8>,
    ) -> Result<(), HttpError> {
        let call = Call {
            is_tls: true,
            host,
            port,
            method: Method::POST,
            path,
            headers: HeaderMap::from_iter([(
                CONTENT_TYPE,
                HeaderValue::from_static(report::MEDIA_TYPE),
            )]),
            body: gzip.into(),
            reach: Reach::AsMail,
        };
        self.0.deps.http.call(call).await.map(|_| ())
    }

    /// Counts a session with who wants reports on `route`: `None`, and it was as it should be.
    pub(crate) fn count(&self, route: &Route, policy: Policy, failure: Option<Failure>) {
        let (Some(domain), now) = (route.reports_to(), self.0.deps.clock.now()) else {
            return;
        };
        match failure {
            None => self.0.tally.good(domain, policy, now),
            Some(failure) => self.0.tally.failed(domain, policy, failure, now),
        }
    }

    /// Writes down what this node counted since the last call.
    pub(crate) async fn note_counts(&self) {
        let (deps, now) = (&self.0.deps, self.0.deps.clock.now());
        let notes = self.0.tally.notes(deps.node, now);
        if notes.is_empty() {
            return;
        }
        if let Err(error) = deps.store.put_notes(notes, now).await {
            // They are noted again with the next session, unless the day ends before.
            tracing::warn!(%error, "counts for TLS reports could not be noted");
        }
    }

    async fn sts(&self, domain: &Domain) -> Option<Arc<StsPolicy>> {
        if !self.0.deps.mta_sts {
            return None;
        }
        let now = self.0.deps.clock.instant();
        let ask = || {
            let (inner, domain) = (Arc::clone(&self.0), domain.as_str().to_owned());
            async move { inner.find(&domain).await }
        };
        let (policy, _) = self.0.sts.get(domain.as_str(), now, ask).await;
        policy.filter(|policy| policy.mode != Mode::None)
    }

    /// Keeps what it knows fresh and shared until the end begins.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        tokio::select! {
            biased;
            () = self.keep() => {}
            () = shutdown.begun() => {}
        }
        self.0.write_notes().await;
    }

    async fn keep(&self) {
        let inner = &self.0;
        inner.read_notes().await;
        let clock = &inner.deps.clock;
        let (mut test_at, mut round_at) = (clock.instant(), clock.instant() + ROUND);
        loop {
            if clock.instant() >= test_at {
                test_at = clock.instant() + inner.test().await;
            }
            if clock.instant() >= round_at {
                inner.read_notes().await;
                inner.refresh().await;
                round_at = clock.instant() + ROUND;
            }
            inner.write_notes().await;
            tokio::time::sleep(NOTES).await;
        }
    }
}

impl Inner {
    /// Whether the name servers validate; how long to wait before asking again.
    async fn test(&self) -> Duration {
        let deps = &self.deps;
        if deps.dane == DanePolicy::Off {
            self.validates.send_replace(Some(false));
            return TEST.1;
        }
        let before = *self.validates.borrow();
        let (now, why) = match deps.dns.validates(&deps.dane_test).await {
            Ok(true) => (true, String::new()),
            Ok(false) => (
                false,
                "no name server that is believed says that it validated".to_owned(),
            ),
            // One bad moment changes nothing.
            Err(error) => (before == Some(true), format!("{error:?}")),
        };
        if before != Some(now) {
            let name = &deps.dane_test;
            match now {
                true => tracing::info!(%name, "the name servers validate: DANE is used"),
                false if before.is_some() => tracing::warn!(%name, %why, "DANE is no longer used"),
                false => tracing::info!(%name, %why, "DANE is not used (docs/tls.md)"),
            }
        }
        deps.metrics.dane_available.set(i64::from(now));
        self.validates.send_replace(Some(now));
        if now { TEST.1 } else { TEST.0 }
    }

    /// The policy of a domain, and until when that is known (RFC 8461 §3.1, §5.1). A policy that
    /// was fetched once holds until it ends, whatever DNS and the policy host say.
    async fn find(&self, domain: &str) -> (Option<Arc<StsPolicy>>, Instant) {
        let known = self.shelf.of(domain, self.deps.clock.now());
        let announced = self.deps.dns.txt(&format!("_mta-sts.{domain}")).await;
        let now = self.deps.clock.instant();
        let bounded = |ttl: Duration| now + ttl.clamp(AGAIN.0, AGAIN.1);
        let (id, until) = match announced {
            Ok(answer) => (id_of(&answer.records), bounded(answer.ttl)),
            Err(DnsError::NoDomain(ttl) | DnsError::NoRecords(ttl)) => (None, bounded(ttl)),
            Err(DnsError::Temporary(_)) => (None, now + AGAIN.0),
        };
        let policy = |fetched: Fetched| fetched.policy;
        match id {
            Some(id) if known.as_ref().is_none_or(|known| known.id != id) => {
                match self.fetch(domain, id).await {
                    Ok(fetched) => (Some(fetched), until),
                    Err(error) => {
                        tracing::warn!(domain, %error, "an MTA-STS policy cannot be had");
                        self.count_fetch(domain, &error).await;
                        let again = self.deps.clock.instant() + FETCH_PAUSE;
                        (known.map(policy), again)
                    }
                }
            }
            Some(_) | None => (known.map(policy), until),
        }
    }

    /// Where `domain` wants TLS reports.
    async fn wanted(&self, domain: &str) -> Arc<[Destination]> {
        if !self.deps.reports {
            return Arc::default();
        }
        let (dns, clock) = (Arc::clone(&self.deps.dns), self.deps.clock.clone());
        let name = format!("_smtp._tls.{domain}");
        let ask = || async move {
            let answer = dns.txt(&name).await;
            let now = clock.instant();
            match answer {
                Ok(answer) => {
                    let until = now + answer.ttl.clamp(AGAIN.0, AGAIN.1);
                    (report::destinations(&answer.records).into(), until)
                }
                Err(DnsError::NoDomain(ttl) | DnsError::NoRecords(ttl)) => {
                    (Arc::default(), now + ttl.clamp(AGAIN.0, AGAIN.1))
                }
                Err(DnsError::Temporary(_)) => (Arc::default(), now + AGAIN.0),
            }
        };
        let now = self.deps.clock.instant();
        self.wanted.get(domain, now, ask).await.0
    }

    /// A policy that is not there is worth a report (RFC 8460 §4.3.2.2).
    async fn count_fetch(&self, domain: &str, error: &FetchError) {
        if self.wanted(domain).await.is_empty() {
            return;
        }
        let flaw = match error {
            FetchError::Http(HttpError::Tls(_)) => Flaw::StsWebpki,
            FetchError::Http(_) | FetchError::MediaType(_) => Flaw::StsFetch,
            FetchError::Policy(_) => Flaw::StsInvalid,
        };
        let failure = Failure::new(flaw, "", None, &error.to_string());
        let policy = Policy::new(PolicyKind::Sts, Vec::new(), Vec::new());
        let now = self.deps.clock.now();
        self.tally.failed(domain, policy, failure, now);
    }

    async fn fetch(&self, domain: &str, id: Box<str>) -> Result<Arc<StsPolicy>, FetchError> {
        let host = format!("mta-sts.{domain}");
        let call = Call {
            is_tls: true,
            host: &host,
            port: self.deps.mta_sts_port,
            method: Method::GET,
            path: "/.well-known/mta-sts.txt",
            headers: HeaderMap::new(),
            body: bytes::Bytes::new(),
            reach: Reach::AsMail,
        };
        let answer = self.deps.http.call(call).await?;
        // Servers that let anybody put up pages rarely let them put up plain text (§3.3).
        if answer.media_type != "text/plain" {
            return Err(FetchError::MediaType(answer.media_type));
        }
        let policy = Arc::new(StsPolicy::parse(&answer.body)?);
        let at = self.deps.clock.now();
        let fetched = Fetched {
            id,
            policy: Arc::clone(&policy),
            at,
        };
        self.shelf.put(domain, fetched, at);
        Ok(policy)
    }

    /// Fetches again what grows old; one node does it for all (RFC 8461 §3.3: at least daily).
    async fn refresh(&self) {
        let deps = &self.deps;
        let lease = deps
            .store
            .job_lease("mta-sts", deps.node, deps.clock.now(), ROUND * 2);
        if !matches!(lease.await, Ok(Some(_))) {
            return;
        }
        let old = self.shelf.old(deps.clock.now(), REFRESH_MAX);
        let fetches = futures_util::stream::iter(old).map(async |domain| {
            let Some(known) = self.shelf.of(&domain, deps.clock.now()) else {
                return;
            };
            if let Err(error) = self.fetch(&domain, known.id).await {
                tracing::info!(%domain, %error, "an MTA-STS policy cannot be had again");
            }
        });
        fetches.buffer_unordered(REFRESH_AT_ONCE).count().await;
    }

    async fn read_notes(&self) {
        let now = self.deps.clock.now();
        match self.deps.store.notes(KIND, now).await {
            Ok(notes) => self.shelf.learn(&notes, now),
            Err(error) => tracing::warn!(%error, "known MTA-STS policies cannot be read"),
        }
    }

    async fn write_notes(&self) {
        let notes: Vec<Note> = self.shelf.news();
        if notes.is_empty() {
            return;
        }
        let now = self.deps.clock.now();
        if let Err(error) = self.deps.store.put_notes(notes.clone(), now).await {
            tracing::debug!(%error, "MTA-STS policies are noted later");
            self.shelf.not_noted(notes);
        }
    }
}
