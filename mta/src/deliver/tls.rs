//! TLS towards MX hosts: any certificate where TLS is a bonus, a verified one where policy wants it.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

/// Configurations by how much is asked of the peer; sessions are resumed within each.
#[derive(Debug, Clone)]
pub struct TlsConfigs {
    /// Any certificate (RFC 3207 §4.1: better than plaintext).
    pub(super) any: Arc<ClientConfig>,
    /// One that chains to a root and names the host.
    pub(super) verified: Arc<ClientConfig>,
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
    /// Both configurations; `ca_file` adds roots to the system's.
    ///
    /// # Errors
    /// See [`TlsSetupError`].
    pub fn new(ca_file: Option<&std::path::Path>) -> Result<Self, TlsSetupError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = || {
            ClientConfig::builder_with_provider(Arc::clone(&provider))
                .with_safe_default_protocol_versions()
        };
        let any = builder()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(Arc::clone(&provider))))
            .with_no_client_auth();
        let roots = ca_file.map(read_roots).transpose()?.unwrap_or_default();
        let verifier =
            rustls_platform_verifier::Verifier::new_with_extra_roots(roots, Arc::clone(&provider))?;
        let verified = builder()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        Ok(Self {
            any: Arc::new(any),
            verified: Arc::new(verified),
        })
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

/// Takes any certificate. The handshake's signature is checked all the same: the peer must hold
/// the key of what it shows.
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
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
