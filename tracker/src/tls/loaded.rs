//! A certificate with its key, checked: they belong together, and to the host.
//!
//! Owns the reading of PEM and of the one thing that rustls does not tell, for how long a
//! certificate is good. Pure but for the files.

use model::Timestamp;
use rustls::client::verify_server_name;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use service::config::Certificate;
use std::path::Path;
use std::sync::Arc;

/// The largest file that is read: chains have a few certificates of 1 to 2 KiB.
const MAX_FILE: u64 = 256 * 1024;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It has no certificate, or no key, in PEM.
    #[error("{what}: {detail}")]
    Pem {
        /// Which file, or whose.
        what: String,
        /// Why.
        detail: String,
    },
    /// It is for another host, or its key is another's.
    #[error("the certificate for {host} cannot be used: {detail}")]
    Unfit {
        /// The host.
        host: String,
        /// Why.
        detail: String,
    },
}

/// For how long a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) from: Timestamp,
    pub(crate) until: Timestamp,
}

/// A certificate that can be used.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) validity: Validity,
}

impl Loaded {
    /// Reads what the configuration names. Blocks.
    pub(crate) fn of_files(of: &Certificate) -> Result<Self, CertificateError> {
        let (chain, key) = (text(&of.cert_file)?, text(&of.key_file)?);
        let (chain_name, key_name) = (name(&of.cert_file), name(&of.key_file));
        Self::of_pem(of.host.as_str(), (&chain_name, &chain), (&key_name, &key))
    }

    /// Of PEM texts; each comes with what it is called in an error.
    pub(crate) fn of_pem(
        host: &str,
        (chain_name, chain): (&str, &[u8]),
        (key_name, key): (&str, &[u8]),
    ) -> Result<Self, CertificateError> {
        let pem = |what: &str, detail: &dyn std::fmt::Display| CertificateError::Pem {
            what: what.to_owned(),
            detail: detail.to_string(),
        };
        let unfit = |detail: &dyn std::fmt::Display| CertificateError::Unfit {
            host: host.to_owned(),
            detail: detail.to_string(),
        };
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| pem(chain_name, &error))?;
        let leaf = chain
            .first()
            .ok_or_else(|| pem(chain_name, &"has no certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| pem(key_name, &error))?;
        let validity = validity(leaf).ok_or_else(|| pem(chain_name, &"is no X.509 certificate"))?;
        let parsed = ParsedCertificate::try_from(leaf).map_err(|error| unfit(&error))?;
        let server = ServerName::try_from(host).map_err(|error| unfit(&error))?;
        verify_server_name(&parsed, &server).map_err(|error| unfit(&error))?;
        let provider = aws_lc_rs::default_provider();
        let key = CertifiedKey::from_der(chain, key, &provider).map_err(|error| unfit(&error))?;
        Ok(Self {
            key: Arc::new(key),
            validity,
        })
    }
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn text(path: &Path) -> Result<Vec<u8>, CertificateError> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let read =
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
    read.map_err(|source| CertificateError::File {
        path: name(path),
        source,
    })?;
    Ok(bytes)
}

/// `notBefore` and `notAfter` (RFC 5280 section 4.1.2.5); `None`: this is no certificate.
pub(crate) fn validity(certificate: &[u8]) -> Option<Validity> {
    const INTEGER: u8 = 0x02;
    const SEQUENCE: u8 = 0x30;
    const VERSION: u8 = 0xa0;
    let (certificate, _) = tagged(certificate, SEQUENCE)?;
    let (signed, _) = tagged(certificate, SEQUENCE)?;
    // Version 1 does not say its version.
    let rest = tagged(signed, VERSION).map_or(signed, |(_, rest)| rest);
    let (_serial, rest) = tagged(rest, INTEGER)?;
    let (_algorithm, rest) = tagged(rest, SEQUENCE)?;
    let (_issuer, rest) = tagged(rest, SEQUENCE)?;
    let (validity, _) = tagged(rest, SEQUENCE)?;
    let (from, rest) = moment(validity)?;
    let (until, _) = moment(rest)?;
    Some(Validity { from, until })
}

/// The contents of the element of this tag, and what follows it.
fn tagged(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, contents, rest) = element(bytes)?;
    (found == tag).then_some((contents, rest))
}

/// One element of DER (X.690 section 8.1): tag, contents, what follows.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        // More than three bytes would be more than the file has.
        0x81..=0x83 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let length = digits
                .iter()
                .fold(0, |length, digit| length << 8 | usize::from(*digit));
            (length, rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(length)?;
    Some((tag, contents, rest))
}

/// `UTCTime` or `GeneralizedTime` as RFC 5280 allows them: to the second, in UTC.
fn moment(bytes: &[u8]) -> Option<(Timestamp, &[u8])> {
    const UTC_TIME: u8 = 0x17;
    const GENERALIZED_TIME: u8 = 0x18;
    let (tag, contents, rest) = element(bytes)?;
    let text = std::str::from_utf8(contents).ok()?;
    let full = match tag {
        // Two digits of a year mean 1950 to 2049.
        UTC_TIME if text.get(..2)? < "50" => format!("20{text}"),
        UTC_TIME => format!("19{text}"),
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let digits = full.strip_suffix('Z')?;
    if digits.len() != 14 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let part = |from: usize, to: usize| digits.get(from..to).unwrap_or_default();
    let text = format!(
        "{}-{}-{}T{}:{}:{}Z",
        part(0, 4),
        part(4, 6),
        part(6, 8),
        part(8, 10),
        part(10, 12),
        part(12, 14)
    );
    Some((Timestamp::parse(&text).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use testkit::tls::{Issuer, SelfSigned};

    fn loaded(host: &str, chain: &str, key: &str) -> Result<Loaded, CertificateError> {
        Loaded::of_pem(host, ("c.pem", chain.as_bytes()), ("k.pem", key.as_bytes()))
    }

    #[test]
    fn only_what_belongs_together_is_taken() {
        let ours = SelfSigned::new(&["t.brand.example"]).expect("made");
        let other = SelfSigned::new(&["t.other.example"]).expect("made");
        let good = loaded("t.brand.example", ours.pem(), ours.key_pem()).expect("good");
        assert!(good.validity.from < good.validity.until);
        for (host, chain, key, said) in [
            (
                "t.other.example",
                ours.pem(),
                ours.key_pem(),
                "t.other.example",
            ),
            (
                "t.brand.example",
                ours.pem(),
                other.key_pem(),
                "t.brand.example",
            ),
            ("t.brand.example", "", ours.key_pem(), "c.pem"),
            ("t.brand.example", ours.pem(), "", "k.pem"),
            ("t.brand.example", ours.key_pem(), ours.key_pem(), "c.pem"),
        ] {
            let error = loaded(host, chain, key).expect_err("refused").to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn the_times_are_those_of_the_certificate() {
        let issuer = Issuer::new("a test's authority").expect("an authority");
        let old = issuer.issue_expired(&["t.brand.example"]).expect("issued");
        let found = old.chain().first().and_then(|leaf| validity(leaf));
        let found = found.expect("a certificate");
        assert_eq!(found.from.to_string(), "2000-01-01T00:00:00.000Z");
        assert_eq!(found.until.to_string(), "2001-01-01T00:00:00.000Z");
        // So far away that it is a GeneralizedTime, which is what rcgen writes by default.
        let far = validity(issuer.certificate()).expect("a certificate");
        assert_eq!(far.until.to_string(), "4096-01-01T00:00:00.000Z");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _read = validity(&bytes);
        }

        #[test]
        fn a_damaged_certificate_is_read_or_refused(at in 0_usize..600, byte: u8, cut in 0_usize..600) {
            let made = SelfSigned::new(&["t.brand.example"]).expect("made");
            let mut bytes = made.certificate().to_vec();
            let length = bytes.len();
            bytes[at % length] = byte;
            bytes.truncate(length - cut % length);
            let _read = validity(&bytes);
        }
    }
}
