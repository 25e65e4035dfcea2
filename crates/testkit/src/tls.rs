//! Certificates for peers in tests and the sandbox, made on the spot.
//!
//! Every call makes a new key, signed by itself: nothing here is a secret and nothing may be
//! trusted outside the test that made it.

use std::sync::Arc;

use anyhow::Context as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// A certificate that is its own issuer, and what both ends need of it.
#[derive(Debug, Clone)]
pub struct SelfSigned {
    certificate: CertificateDer<'static>,
    pem: String,
    server: Arc<ServerConfig>,
}

impl SelfSigned {
    /// For these names: DNS names or IP addresses.
    ///
    /// # Errors
    /// When a name is neither.
    pub fn new(names: &[&str]) -> anyhow::Result<Self> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let made = rcgen::generate_simple_self_signed(names).context("making a certificate")?;
        let certificate = made.cert.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let server = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)?;
        let pem = made.cert.pem();
        Ok(Self {
            certificate,
            pem,
            server: Arc::new(server),
        })
    }

    /// What a server needs.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// A client that trusts this certificate and no other.
    ///
    /// # Errors
    /// When rustls refuses the certificate as a root.
    pub fn trusting_client_config(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::new(config))
    }

    /// The certificate in PEM, for a CA file.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
