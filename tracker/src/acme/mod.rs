//! Certificates from an authority by ACME (RFC 8555), proven by HTTP-01.
//!
//! Owns when a certificate is fetched and where it is kept: account and certificates lie under
//! `data_dir/acme`, for their owner's eyes only; a new one is fetched after two thirds of the old
//! one's life, one node at a time where the store can say so. Nothing that is served waits for it.
//! Must not know TLS.

pub(crate) mod challenges;
mod https;

use crate::tenants::Tenants;
use crate::tls::Certificates;
use crate::tls::loaded::{CertificateError, Loaded, Validity};
use challenges::Challenges;
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, NewAccount,
    NewOrder, OrderStatus, RetryPolicy,
};
use model::{Domain, JournalId, Timestamp};
use serde::{Deserialize, Serialize};
use service::clock::SharedClock;
use service::config;
use service::metrics::{CertificateOrigin, CertificateResult, Metrics};
use service::secrets::{self, SecretError};
use service::tasks::{Shutdown, blocking};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::Store;

/// Who may fetch now.
const JOB: &str = "acme";
/// How long it may take to get one certificate, and how long others wait for that.
const ORDER_TIME: Duration = Duration::from_secs(150);
/// Asking the authority how it goes: 0.25 s after the first time, twice as long after each.
const POLLING: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(60));
/// After a failure: the authority counts those of a host (Let's Encrypt: five an hour).
const FIRST_PAUSE: Duration = Duration::from_mins(5);
const LONGEST_PAUSE: Duration = Duration::from_hours(12);
/// After the authority could not be reached, which nobody counts.
const AWAY_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_AWAY_PAUSE: Duration = Duration::from_mins(10);
/// How long it sleeps at most: accounts come over the API, and the wall clock may be set.
const LOOK: Duration = Duration::from_secs(10);

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AcmeError {
    /// It cannot be reached: nothing was counted against us.
    #[error("the authority cannot be reached: {0}")]
    Away(String),
    /// What the authority said.
    #[error("the authority refuses: {0}")]
    Refused(String),
    #[error("the authority took too long")]
    TooLong,
    #[error("what the authority gave is no use: {0}")]
    Unfit(#[from] CertificateError),
    #[error(transparent)]
    Disk(#[from] SecretError),
    #[error("TLS to the authority cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    #[error("{0}")]
    System(#[source] io::Error),
}

impl From<instant_acme::Error> for AcmeError {
    fn from(error: instant_acme::Error) -> Self {
        use instant_acme::Error;
        match error {
            Error::Other(other) => match other.downcast::<https::AwayError>() {
                Ok(away) => Self::Away(away.to_string()),
                Err(other) => Self::Refused(other.to_string()),
            },
            Error::Timeout(_) => Self::TooLong,
            other => Self::Refused(other.to_string()),
        }
    }
}

/// The task that fetches.
pub(crate) struct Acme {
    pub(crate) directory: String,
    pub(crate) config: config::Acme,
    /// Hosts with a certificate in files.
    pub(crate) in_files: Vec<Domain>,
    pub(crate) tenants: Arc<Tenants>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) challenges: Arc<Challenges>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) node: JournalId,
}

/// What is next for a host.
struct Host {
    name: String,
    due: Timestamp,
    failures: u32,
}

/// `account.json`
#[derive(Serialize, Deserialize)]
struct Kept {
    directory: String,
    credentials: AccountCredentials,
}

impl Acme {
    /// Fetches what is missing or old, until the process ends.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let fetching = async {
            let mut hosts: Vec<Host> = Vec::new();
            loop {
                let wanted = self.wanted();
                hosts.retain(|host| wanted.contains(&host.name));
                for name in wanted {
                    if hosts.iter().all(|host| host.name != name) {
                        hosts.push(self.known(&name).await);
                    }
                }
                let now = self.clock.now();
                for host in hosts.iter_mut().filter(|host| host.due <= now) {
                    self.turn(host).await;
                }
                let now = self.clock.now();
                let next = hosts.iter().map(|host| host.due.since(now)).min();
                tokio::time::sleep(next.unwrap_or(LOOK).min(LOOK)).await;
            }
        };
        tokio::select! {
            () = shutdown.begun() => {}
            () = fetching => {}
        }
    }

    /// For whom certificates are fetched: as the file says, and for accounts made over the API.
    fn wanted(&self) -> Vec<String> {
        let view = self.tenants.view();
        let added = view.added_https.iter();
        let added = added.filter(|host| !self.in_files.contains(host));
        let mut wanted: Vec<String> = Vec::new();
        for host in self.config.hosts.iter().chain(added) {
            if wanted.iter().all(|known| known != host.as_str()) {
                wanted.push(host.as_str().to_owned());
            }
        }
        wanted
    }

    /// Takes the certificate that was kept, if there is one.
    async fn known(&self, name: &str) -> Host {
        // There from the beginning, so that the first failure is seen to be one.
        self.metrics.certificates(name, CertificateOrigin::Acme);
        let mut host = Host {
            name: name.to_owned(),
            due: self.clock.now(),
            failures: 0,
        };
        let path = self.path(name);
        let read = blocking(move || std::fs::read(path)).await;
        let Ok(Ok(pem)) = read else {
            return host;
        };
        match Loaded::of_pem(name, (name, &pem), (name, &pem)) {
            Ok(loaded) => {
                host.due = renewal(loaded.validity);
                self.certificates.take(name, loaded);
            }
            Err(error) => tracing::error!(%error, host = name, "the kept certificate is no use"),
        }
        host
    }

    /// Chain and key of a host, in one file: they are replaced together.
    fn path(&self, name: &str) -> PathBuf {
        self.config.dir.join(format!("{name}.pem"))
    }

    /// Fetches the certificate of one host, if it is this node's turn.
    async fn turn(&self, host: &mut Host) {
        let now = self.clock.now();
        let lease = self.store.job_lease(JOB, self.node, now, ORDER_TIME).await;
        if let Ok(None) = lease {
            host.due = now + AWAY_PAUSE.mul_f64(1.0 + fastrand::f64());
            return;
        }
        // A store that is away must not let a certificate end: then every node is on its own.
        let ordered = tokio::time::timeout(ORDER_TIME, self.fetch(&host.name)).await;
        let fetched = ordered.unwrap_or(Err(AcmeError::TooLong));
        let now = self.clock.now();
        let ended = self.store.job_lease(JOB, self.node, now, Duration::ZERO);
        if let Err(error) = ended.await {
            tracing::debug!(%error, "others may have to wait for their turn");
        }
        match fetched {
            Ok(validity) => {
                host.failures = 0;
                host.due = renewal(validity);
                tracing::info!(host = host.name, until = %validity.until, "certificate was fetched");
            }
            Err(error) => {
                let of = self
                    .metrics
                    .certificates(&host.name, CertificateOrigin::Acme);
                of.at(CertificateResult::Failed).inc();
                let pause = pause(&error, host.failures);
                host.failures = host.failures.saturating_add(1);
                host.due = now + pause;
                tracing::error!(%error, host = host.name, again_in = ?pause, "no new certificate");
            }
        }
    }

    async fn fetch(&self, host: &str) -> Result<Validity, AcmeError> {
        let account = self.account().await?;
        let mut posted = Vec::new();
        let ordered = self.order(&account, host, &mut posted).await;
        for token in posted {
            self.challenges.remove(&token).await;
        }
        let pem = ordered?;
        let loaded = Loaded::of_pem(host, (host, pem.as_bytes()), (host, pem.as_bytes()))?;
        let validity = loaded.validity;
        let path = self.path(host);
        self.on_disk(move || secrets::replace(&path, &pem)).await?;
        self.certificates.take(host, loaded);
        Ok(validity)
    }

    /// The account that was kept, or a new one.
    async fn account(&self) -> Result<Account, AcmeError> {
        let path = self.config.dir.join("account.json");
        let kept = {
            let path = path.clone();
            let read = blocking(move || std::fs::read(path)).await;
            read.ok().and_then(Result::ok)
        };
        let kept = kept.and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let tls = self.config.ca_file.clone();
        let http = self
            .on_disk(move || https::Https::new(tls.as_deref()))
            .await?;
        let builder = Account::builder_with_http(Box::new(http));
        if let Some(kept) = kept.filter(|kept| kept.directory == self.directory) {
            return Ok(builder.from_credentials(kept.credentials).await?);
        }
        let contact: Vec<&str> = self.config.contact.iter().map(String::as_str).collect();
        let wanted = NewAccount {
            contact: &contact,
            terms_of_service_agreed: true,
            only_return_existing: false,
        };
        let made = builder.create(&wanted, self.directory.clone(), None).await;
        let (account, credentials) = made?;
        let kept = Kept {
            directory: self.directory.clone(),
            credentials,
        };
        let text = serde_json::to_string(&kept).unwrap_or_default();
        self.on_disk(move || secrets::replace(&path, &text)).await?;
        Ok(account)
    }

    /// Proves that the host is ours and gets a certificate for it: chain and key, in PEM. `posted`
    /// has the tokens that were answered meanwhile.
    async fn order(
        &self,
        account: &Account,
        host: &str,
        posted: &mut Vec<String>,
    ) -> Result<String, AcmeError> {
        let names = [Identifier::Dns(host.to_owned())];
        let mut order = account.new_order(&NewOrder::new(&names)).await?;
        let mut authorizations = order.authorizations();
        while let Some(next) = authorizations.next().await {
            let mut authorization = next?;
            match authorization.status {
                AuthorizationStatus::Valid => continue,
                AuthorizationStatus::Pending => {}
                other => return Err(AcmeError::Refused(format!("authorization is {other:?}"))),
            }
            let challenge = authorization.challenge(ChallengeType::Http01);
            let mut challenge =
                challenge.ok_or_else(|| AcmeError::Refused("it offers no HTTP-01".to_owned()))?;
            let answer = challenge.key_authorization();
            self.challenges.put(&challenge.token, answer.as_str()).await;
            posted.push(challenge.token.clone());
            challenge.set_ready().await?;
        }
        let status = order.poll_ready(&POLLING).await?;
        if status != OrderStatus::Ready {
            return Err(AcmeError::Refused(why_not(&mut order, status).await));
        }
        let key = order.finalize().await?;
        let chain = order.poll_certificate(&POLLING).await?;
        Ok(format!("{chain}\n{key}"))
    }

    async fn on_disk<T: Send + 'static, E: Into<AcmeError> + Send + 'static>(
        &self,
        act: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, AcmeError> {
        let done = blocking(act).await;
        let done = done.map_err(|error| AcmeError::System(io::Error::other(error)))?;
        done.map_err(Into::into)
    }
}

/// What the authority saw when it looked.
async fn why_not(order: &mut instant_acme::Order, status: OrderStatus) -> String {
    let mut said = vec![format!("the order is {status:?}")];
    let mut authorizations = order.authorizations();
    while let Some(Ok(authorization)) = authorizations.next().await {
        let problems = authorization.challenges.iter();
        let problems = problems.filter_map(|challenge| challenge.error.as_ref());
        said.extend(problems.map(ToString::to_string));
    }
    said.join("; ")
}

/// When two thirds of its life are over.
fn renewal(validity: Validity) -> Timestamp {
    validity.from + validity.until.since(validity.from).mul_f64(2.0 / 3.0)
}

/// How long to wait after the failure that follows so many others.
fn pause(error: &AcmeError, failures: u32) -> Duration {
    let (first, longest) = match error {
        AcmeError::Away(_) => (AWAY_PAUSE, LONGEST_AWAY_PAUSE),
        _ => (FIRST_PAUSE, LONGEST_PAUSE),
    };
    let doubled = first.saturating_mul(1 << failures.min(16));
    // Jitter: nodes that failed together do not come back together.
    doubled.min(longest).mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_fetched_again_after_two_thirds_of_its_life() {
        let at = |days: i64| Timestamp::from_millis(days * 86_400_000);
        let validity = Validity {
            from: at(10),
            until: at(100),
        };
        assert_eq!(renewal(validity), at(70));
    }

    #[test]
    fn what_the_authority_counts_is_tried_less_often() {
        let refused = AcmeError::Refused(String::new());
        let away = AcmeError::Away(String::new());
        // An hour's worth of failures: within what an authority allows.
        let spent: Duration = (0..5).map(|failures| pause(&refused, failures)).sum();
        assert!(spent > Duration::from_hours(1), "{spent:?}");
        assert!(pause(&refused, 60) <= LONGEST_PAUSE.mul_f64(1.25));
        assert!(pause(&away, 0) < Duration::from_secs(10));
        assert!(pause(&away, 60) <= LONGEST_AWAY_PAUSE.mul_f64(1.25));
    }
}
