//! TLS: which certificate is shown to whom.
//!
//! Owns the certificates in use, by host, and how they are replaced: those of files when the files
//! change, those that are fetched when `acme` brings them. One that cannot be used changes nothing.
//! Must not know HTTP.

pub(crate) mod loaded;

use arc_swap::ArcSwap;
use loaded::{CertificateError, Loaded};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use service::clock::SharedClock;
use service::config::Certificate;
use service::metrics::{CertificateOrigin, CertificateResult, Metrics};
use service::tasks::{Shutdown, blocking};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// How often it is looked whether files have changed.
const LOOK: Duration = Duration::from_secs(5);

type ByHost = HashMap<Box<str>, Loaded>;

/// The certificates in use.
pub(crate) struct Certificates {
    files: Vec<Certificate>,
    /// Those of files go before those that were fetched.
    from_files: ArcSwap<ByHost>,
    fetched: ArcSwap<ByHost>,
    /// How the files looked when they were read last.
    stamps: Mutex<Vec<Stamps>>,
    clock: SharedClock,
    metrics: Arc<Metrics>,
}

/// When and how large a certificate's two files are; `None`: there is none.
type Stamps = [Option<(SystemTime, u64)>; 2];

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

impl Certificates {
    /// Reads the certificates of the configuration. Blocks.
    ///
    /// # Errors
    /// When one cannot be used: who deploys it learns of it at once.
    pub(crate) fn read(
        files: Vec<Certificate>,
        clock: SharedClock,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, CertificateError> {
        let stamps = files.iter().map(stamps).collect();
        let read = files
            .iter()
            .map(|of| Ok((of.host.as_str().into(), Loaded::of_files(of)?)))
            .collect::<Result<ByHost, CertificateError>>()?;
        let certificates = Self {
            files,
            from_files: ArcSwap::from_pointee(read),
            fetched: ArcSwap::default(),
            stamps: Mutex::new(stamps),
            clock,
            metrics,
        };
        for (host, loaded) in certificates.from_files.load().iter() {
            certificates.note(host, loaded, CertificateOrigin::File);
        }
        Ok(Arc::new(certificates))
    }

    /// Takes a fetched certificate into use.
    pub(crate) fn take(&self, host: &str, loaded: Loaded) {
        self.note(host, &loaded, CertificateOrigin::Acme);
        self.fetched.rcu(|before| {
            let mut after = ByHost::clone(before);
            after.insert(host.into(), loaded.clone());
            after
        });
    }

    /// Reads the files again (SIGHUP). One that cannot be used changes nothing, and the log says
    /// why. Blocks.
    pub(crate) fn reload(&self) {
        self.reload_where(|_| true);
    }

    /// Reads the files that have changed since they were read, every few seconds until the end.
    pub(crate) async fn watch(self: Arc<Self>, shutdown: Shutdown) {
        loop {
            tokio::select! {
                () = shutdown.begun() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let certificates = self.clone();
            let looked = blocking(move || certificates.reload_changed()).await;
            if let Err(error) = looked {
                tracing::error!(%error, "certificate files were not looked at");
            }
        }
    }

    fn reload_changed(&self) {
        let before = self.lock().clone();
        let now: Vec<_> = self.files.iter().map(stamps).collect();
        self.reload_where(|index| before.get(index) != now.get(index));
    }

    fn reload_where(&self, wanted: impl Fn(usize) -> bool) {
        for (index, file) in self.files.iter().enumerate().filter(|(at, _)| wanted(*at)) {
            // Before reading: what is written meanwhile is seen the next time.
            let looked = stamps(file);
            if let Some(stamps) = self.lock().get_mut(index) {
                *stamps = looked;
            }
            let host = file.host.as_str();
            match Loaded::of_files(file) {
                Ok(loaded) => {
                    self.note(host, &loaded, CertificateOrigin::File);
                    tracing::info!(host, until = %loaded.validity.until, "certificate was read");
                    self.from_files.rcu(|before| {
                        let mut after = ByHost::clone(before);
                        after.insert(host.into(), loaded.clone());
                        after
                    });
                }
                Err(error) => {
                    let counters = self.metrics.certificates(host, CertificateOrigin::File);
                    counters.at(CertificateResult::Failed).inc();
                    tracing::error!(%error, host, "certificate stays as it was");
                }
            }
        }
    }

    fn note(&self, host: &str, loaded: &Loaded, origin: CertificateOrigin) {
        let until = loaded.validity.until;
        self.metrics.certificate_expiry(host, until.seconds());
        let counters = self.metrics.certificates(host, origin);
        counters.at(CertificateResult::Ok).inc();
        if until < self.clock.now() {
            // Shown all the same: a warning in the browser is more than a dead connection.
            tracing::error!(host, %until, "THE CERTIFICATE HAS ENDED");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Stamps>> {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamps(of: &Certificate) -> Stamps {
    let stamp = |path: &Path| {
        let seen = std::fs::metadata(path).ok()?;
        Some((seen.modified().ok()?, seen.len()))
    };
    [stamp(&of.cert_file), stamp(&of.key_file)]
}

impl ResolvesServerCert for Certificates {
    /// By the name that the client asks for; nobody is shown the certificate of another host.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name()?;
        // rustls gives it in lower case.
        let of = |hosts: &ByHost| Some(hosts.get(name)?.key.clone());
        of(&self.from_files.load()).or_else(|| of(&self.fetched.load()))
    }
}

/// How TLS is served: HTTP/2 for who offers it, tickets so that who comes back saves a round trip.
///
/// # Errors
/// When the library refuses.
pub(crate) fn server_config(
    certificates: Arc<Certificates>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    Ok(config)
}
