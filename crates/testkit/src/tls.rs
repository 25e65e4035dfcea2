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
    key_pem: String,
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
            key_pem: made.signing_key.serialize_pem(),
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

    /// The key in PEM.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }
}

/// A certificate authority of a test's own.
#[derive(Debug)]
pub struct Issuer {
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Issuer {
    /// With a new key and this name.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let mut params = rcgen::CertificateParams::new(Vec::new())?;
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name = named(name);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let key = rcgen::KeyPair::generate()?;
        let made = params.self_signed(&key)?;
        Ok(Self {
            certificate: made.der().clone(),
            pem: made.pem(),
            issuer: rcgen::Issuer::new(params, key),
        })
    }

    /// Its own certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its own certificate in PEM, for a CA file.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// By which Chromium can be told to trust what it signed: the SHA-256 of its public key
    /// (`SubjectPublicKeyInfo`) in base64.
    pub fn pin(&self) -> String {
        use base64::Engine as _;
        use rcgen::PublicKeyData as _;
        let key = self.issuer.key().subject_public_key_info();
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &key);
        base64::engine::general_purpose::STANDARD.encode(digest)
    }

    /// A server's certificate for these names: DNS names or IP addresses.
    ///
    /// # Errors
    /// When a name is neither.
    pub fn issue(&self, names: &[&str]) -> anyhow::Result<Issued> {
        self.issue_with(names, |_| {})
    }

    /// One that is over since 2001.
    ///
    /// # Errors
    /// When a name is neither a DNS name nor an IP address.
    pub fn issue_expired(&self, names: &[&str]) -> anyhow::Result<Issued> {
        self.issue_with(names, |params| {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        })
    }

    fn issue_with(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut rcgen::CertificateParams),
    ) -> anyhow::Result<Issued> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = rcgen::CertificateParams::new(names)?;
        params.distinguished_name = named("server");
        change(&mut params);
        let key = rcgen::KeyPair::generate()?;
        let made = params.signed_by(&key, &self.issuer)?;
        Ok(Issued {
            chain: vec![made.der().clone(), self.certificate.clone()],
            chain_pem: format!("{}{}", made.pem(), self.pem),
            key_der: key.serialize_der(),
            key_pem: key.serialize_pem(),
        })
    }
}

fn named(name: &str) -> rcgen::DistinguishedName {
    let mut distinguished = rcgen::DistinguishedName::new();
    distinguished.push(rcgen::DnType::CommonName, name);
    distinguished
}

/// A server's certificate, with its key and that of its issuer behind it.
#[derive(Debug, Clone)]
pub struct Issued {
    chain: Vec<CertificateDer<'static>>,
    chain_pem: String,
    key_der: Vec<u8>,
    key_pem: String,
}

impl Issued {
    /// The certificate, then its issuer's.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The same in PEM.
    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    /// The key in PEM.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// What a server needs.
    ///
    /// # Errors
    /// When rustls refuses the pair.
    pub fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        self.server_config_with(rustls::DEFAULT_VERSIONS)
    }

    /// What a server needs that speaks these versions of TLS alone.
    ///
    /// # Errors
    /// When rustls refuses the pair.
    pub fn server_config_with(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> anyhow::Result<Arc<ServerConfig>> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_der.clone()));
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)?;
        Ok(Arc::new(server))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
