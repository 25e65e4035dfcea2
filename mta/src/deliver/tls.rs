//! TLS towards MX hosts: which certificates will do, and sessions that are resumed.
//!
//! A session is resumed only within the same source, the same demand on certificates and, for
//! DANE, the same TLSA records: resuming shows no certificate, so it must have been good enough.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::tlspolicy::dane::TlsaSet;

/// Hosts whose sessions are kept, of each source and demand.
const SESSIONS_MAX: usize = 256;
/// Configurations kept: two for each source, and one for each set of TLSA records. When full, all
/// are made anew as they are needed.
const CONFIGS_MAX: usize = 2_048;

/// Which certificates will do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Demand {
    /// Any (RFC 3207 §4.1: better than plaintext).
    Any,
    /// One that chains to a root and names the host.
    Verified,
    /// One that matches a TLSA record.
    Dane(Arc<TlsaSet>),
}

/// Who speaks, and what a connection has to show: what may share resumption tickets.
type Key = (Box<str>, Demand);

/// Configurations by egress source and demand.
#[derive(Debug)]
pub struct TlsConfigs {
    provider: Arc<CryptoProvider>,
    platform: Arc<rustls_platform_verifier::Verifier>,
    configs: Mutex<HashMap<Key, Arc<ClientConfig>>>,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    /// The library refused.
    #[error("TLS cannot be set up: {0}")]
    Library(#[from] Error),
    /// The file with extra roots.
    #[error("{path} has no certificates in PEM: {detail}")]
    Roots {
        /// Which file.
        path: String,
        /// Why.
        detail: String,
    },
}

impl TlsConfigs {
    /// Configurations that are made as they are needed; `ca_file` adds roots to the system's.
    ///
    /// # Errors
    /// See [`TlsSetupError`].
    pub fn new(ca_file: Option<&std::path::Path>) -> Result<Self, TlsSetupError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = ca_file.map(read_roots).transpose()?.unwrap_or_default();
        let platform =
            rustls_platform_verifier::Verifier::new_with_extra_roots(roots, Arc::clone(&provider))?;
        Ok(Self {
            provider,
            platform: Arc::new(platform),
            configs: Mutex::default(),
        })
    }

    /// A configuration for HTTPS: certificates are verified, HTTP/1.1 is spoken.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn https(&self) -> Result<Arc<ClientConfig>, TlsSetupError> {
        let mut config = self.with(Arc::clone(&self.platform) as _)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// The configuration for connections of `source` with this demand.
    pub(super) fn of(&self, source: &str, demand: &Demand) -> Result<Arc<ClientConfig>, Error> {
        let key = (source.into(), demand.clone());
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = configs.get(&key) {
            return Ok(Arc::clone(known));
        }
        if configs.len() >= CONFIGS_MAX {
            configs.clear();
        }
        let provider = Arc::clone(&self.provider);
        let (verifier, sessions): (Arc<dyn ServerCertVerifier>, _) = match demand {
            Demand::Any => (Arc::new(AnyCertificate(provider)), SESSIONS_MAX),
            Demand::Verified => (Arc::clone(&self.platform) as _, SESSIONS_MAX),
            Demand::Dane(records) => {
                let verifier = DaneCertificate {
                    provider,
                    records: Arc::clone(records),
                };
                (Arc::new(verifier), 1)
            }
        };
        let mut config = self.with(verifier)?;
        config.resumption = Resumption::in_memory_sessions(sessions);
        let config = Arc::new(config);
        configs.insert(key, Arc::clone(&config));
        Ok(config)
    }

    /// A configuration that takes any certificate, and tells afterwards what a verified connection
    /// would have said to it. Sessions are not resumed: they would show none.
    pub(super) fn observing(&self) -> Result<(Arc<ClientConfig>, Arc<Observer>), Error> {
        let observer = Arc::new(Observer {
            platform: Arc::clone(&self.platform),
            any: AnyCertificate(Arc::clone(&self.provider)),
            seen: OnceLock::new(),
        });
        let mut config = self.with(Arc::clone(&observer) as _)?;
        config.resumption = Resumption::disabled();
        Ok((Arc::new(config), observer))
    }

    fn with(&self, verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, Error> {
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()?;
        let dangerous = builder.dangerous();
        Ok(dangerous
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth())
    }
}

fn read_roots(path: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, TlsSetupError> {
    let wrong = |detail: String| TlsSetupError::Roots {
        path: path.display().to_string(),
        detail,
    };
    let found = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    let roots = found
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    if roots.is_empty() {
        Err(wrong("none found".to_owned()))
    } else {
        Ok(roots)
    }
}

/// Takes any certificate, also one that the library cannot read (X.509 version 1, small keys): who
/// can forge a signature of the handshake could show a certificate of their own instead, so
/// refusing it would leave only plaintext.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Takes what matches TLSA records.
#[derive(Debug)]
struct DaneCertificate {
    provider: Arc<CryptoProvider>,
    records: Arc<TlsaSet>,
}

impl ServerCertVerifier for DaneCertificate {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        self.records.verify(leaf, rest, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

/// Takes any certificate and notes whether it would have been verified: for policies that are
/// being tested.
#[derive(Debug)]
pub(super) struct Observer {
    platform: Arc<rustls_platform_verifier::Verifier>,
    any: AnyCertificate,
    seen: OnceLock<Result<(), Error>>,
}

impl Observer {
    /// Why the certificate would not have done; `None`: it would, or none was shown.
    pub(super) fn objection(&self) -> Option<&Error> {
        self.seen.get().and_then(|seen| seen.as_ref().err())
    }
}

impl ServerCertVerifier for Observer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let seen = self
            .platform
            .verify_server_cert(leaf, rest, name, ocsp, now);
        // One handshake, one certificate.
        self.seen.get_or_init(|| seen.map(|_| ()));
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.any.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.any.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.any.supported_verify_schemes()
    }
}
