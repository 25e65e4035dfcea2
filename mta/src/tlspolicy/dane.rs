//! DANE (RFC 6698, RFC 7671, RFC 7672): whether a server's certificates match TLSA records.
//!
//! Owns what records mean; whether they were validated by DNSSEC is known where they were asked
//! for. Reads no DNS.

use aws_lc_rs::digest::{SHA256, SHA512, digest};
use rustls::client::verify_server_cert_signed_by_trust_anchor as verify_chain;
use rustls::client::verify_server_name;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};

/// Records of one host that are looked at.
const RECORDS_MAX: usize = 64;

/// A TLSA record as it stands in DNS (RFC 6698 §2.1).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tlsa {
    /// 2: DANE-TA, 3: DANE-EE; others are not for SMTP (RFC 7672 §3.1.3).
    pub usage: u8,
    /// 0: the certificate, 1: its public key.
    pub selector: u8,
    /// 0: as it is, 1: SHA-256, 2: SHA-512.
    pub matching: u8,
    /// What is to be matched.
    pub data: Box<[u8]>,
}

impl Tlsa {
    /// Whether it can be matched at all (RFC 7672 §3.1).
    fn is_usable(&self) -> bool {
        let length_fits = match self.matching {
            0 => !self.data.is_empty(),
            1 => self.data.len() == 32,
            2 => self.data.len() == 64,
            _ => false,
        };
        matches!(self.usage, 2 | 3) && self.selector <= 1 && length_fits
    }

    fn matches(&self, certificate: &CertificateDer<'_>) -> bool {
        let selected: &[u8] = match self.selector {
            0 => certificate,
            // A certificate that cannot be read has no key to compare.
            _ => match ParsedCertificate::try_from(certificate) {
                Ok(parsed) => return self.is_of(&parsed.subject_public_key_info()),
                Err(_) => return false,
            },
        };
        self.is_of(selected)
    }

    fn is_of(&self, selected: &[u8]) -> bool {
        match self.matching {
            0 => selected == &*self.data,
            1 => digest(&SHA256, selected).as_ref() == &*self.data,
            2 => digest(&SHA512, selected).as_ref() == &*self.data,
            _ => false,
        }
    }
}

/// What the TLSA records of a host ask of its certificate. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TlsaSet {
    records: Vec<Tlsa>,
    /// Names of which the certificate must have one, with usage 2 (RFC 7672 §3.2.2).
    names: Vec<String>,
}

impl TlsaSet {
    /// Those of `records` that can be used, for a host that goes by these `names`; `None`: none
    /// can, so that TLS is a must and any certificate will do (RFC 7672 §2.2).
    pub fn of(records: &[Tlsa], names: &[&str]) -> Option<Self> {
        let mut usable: Vec<Tlsa> = records
            .iter()
            .filter(|record| record.is_usable())
            .take(RECORDS_MAX)
            .cloned()
            .collect();
        // The same set in any order is the same set: sessions are resumed within it.
        usable.sort();
        usable.dedup();
        let all = usable.clone();
        // Of several digests of a kind only the strongest counts (RFC 7671 §9).
        usable.retain(|one| {
            let stronger = |other: &Tlsa| {
                (other.usage, other.selector) == (one.usage, one.selector)
                    && one.matching == 1
                    && other.matching == 2
            };
            !all.iter().any(stronger)
        });
        let names = names.iter().map(ToString::to_string).collect();
        (!usable.is_empty()).then_some(Self {
            records: usable,
            names,
        })
    }

    /// The records, as they stand in a zone file and in a report.
    pub(crate) fn lines(&self) -> Vec<Box<str>> {
        let line = |record: &Tlsa| {
            let data: String = record
                .data
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            format!(
                "{} {} {} {data}",
                record.usage, record.selector, record.matching
            )
            .into()
        };
        // A whole certificate is too long to be told.
        let short = |record: &&Tlsa| record.matching != 0;
        self.records.iter().filter(short).map(line).collect()
    }

    /// Whether what the server showed matches a record.
    ///
    /// # Errors
    /// Why not, as a failure of the handshake.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Error> {
        // Neither names nor dates count with DANE-EE (RFC 7671 §5.1).
        let of_leaf = |record: &&Tlsa| record.usage == 3;
        if self.records.iter().filter(of_leaf).any(|r| r.matches(leaf)) {
            return Ok(());
        }
        let mut why = None;
        for record in self.records.iter().filter(|record| record.usage == 2) {
            for anchor in anchors(record, rest) {
                match self.verify_below(&anchor, leaf, rest, now, algorithms) {
                    Ok(()) => return Ok(()),
                    Err(error) => why = Some(error),
                }
            }
        }
        Err(why.unwrap_or(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        )))
    }

    fn verify_below(
        &self,
        anchor: &CertificateDer<'_>,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Error> {
        let mut roots = RootCertStore::empty();
        roots.add(anchor.clone().into_owned())?;
        let leaf = ParsedCertificate::try_from(leaf)?;
        verify_chain(&leaf, &roots, rest, now, algorithms.all)?;
        let mut why = Error::InvalidCertificate(CertificateError::NotValidForName);
        for name in &self.names {
            let name = ServerName::try_from(name.as_str())
                .map_err(|error| Error::General(error.to_string()))?;
            match verify_server_name(&leaf, &name) {
                Ok(()) => return Ok(()),
                Err(error) => why = error,
            }
        }
        Err(why)
    }
}

/// The certificates that a DANE-TA record stands for: those shown that match it, or the one that it
/// holds itself.
fn anchors<'a>(record: &'a Tlsa, shown: &'a [CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    let mut found: Vec<_> = shown
        .iter()
        .filter(|certificate| record.matches(certificate))
        .map(|certificate| CertificateDer::from(certificate.as_ref()))
        .collect();
    if (record.selector, record.matching) == (0, 0) && found.is_empty() {
        found.push(CertificateDer::from(&*record.data));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use testkit::tls::Issuer;

    fn verify(
        records: &[Tlsa],
        name: &str,
        chain: &[CertificateDer<'static>],
    ) -> Result<(), String> {
        let set = TlsaSet::of(records, &[name]).ok_or("unusable")?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let (leaf, rest) = chain.split_first().expect("a leaf");
        set.verify(
            leaf,
            rest,
            UnixTime::now(),
            &provider.signature_verification_algorithms,
        )
        .map_err(|error| error.to_string())
    }

    fn record(usage: u8, selector: u8, matching: u8, of: &CertificateDer<'_>) -> Tlsa {
        let parsed = ParsedCertificate::try_from(of).expect("a certificate");
        let key = parsed.subject_public_key_info();
        let selected: &[u8] = if selector == 0 { of } else { &key };
        let data = match matching {
            0 => selected.to_vec(),
            1 => digest(&SHA256, selected).as_ref().to_vec(),
            _ => digest(&SHA512, selected).as_ref().to_vec(),
        };
        Tlsa {
            usage,
            selector,
            matching,
            data: data.into(),
        }
    }

    #[test]
    fn every_usage_selector_and_matching_type() {
        let issuer = Issuer::new("Root").expect("an issuer");
        let other = Issuer::new("Other").expect("an issuer");
        let server = issuer.issue(&["mx.x.example"]).expect("a certificate");
        let chain = server.chain();
        let (leaf, root) = (&chain[0], &chain[1]);
        for selector in [0, 1] {
            for matching in [0, 1, 2] {
                let case = format!("{selector} {matching}");
                let ee = [record(3, selector, matching, leaf)];
                assert_eq!(verify(&ee, "mx.x.example", chain), Ok(()), "3 {case}");
                // A domain-issued certificate need not have the name.
                assert_eq!(verify(&ee, "other.example", chain), Ok(()), "3 {case}");
                let ta = [record(2, selector, matching, root)];
                assert_eq!(verify(&ta, "mx.x.example", chain), Ok(()), "2 {case}");
                assert!(verify(&ta, "other.example", chain).is_err(), "2 {case}");
                for usage in [2, 3] {
                    let wrong = [record(usage, selector, matching, other.certificate())];
                    assert!(
                        verify(&wrong, "mx.x.example", chain).is_err(),
                        "{usage} {case}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_trust_anchor_need_not_be_shown_when_dns_has_it_whole() {
        let issuer = Issuer::new("Root").expect("an issuer");
        let server = issuer.issue(&["mx.x.example"]).expect("a certificate");
        let alone = &server.chain()[..1];
        let root = issuer.certificate();
        assert_eq!(
            verify(&[record(2, 0, 0, root)], "mx.x.example", alone),
            Ok(())
        );
        assert!(verify(&[record(2, 0, 1, root)], "mx.x.example", alone).is_err());
        // The leaf is no anchor of its own.
        assert!(verify(&[record(2, 0, 1, &alone[0])], "mx.x.example", alone).is_err());
    }

    #[test]
    fn records_that_cannot_be_used() {
        let issuer = Issuer::new("Root").expect("an issuer");
        let leaf = issuer.certificate();
        let change = |change: fn(&mut Tlsa)| {
            let mut record = record(3, 1, 1, leaf);
            change(&mut record);
            TlsaSet::of(&[record], &[])
        };
        assert!(change(|_| {}).is_some());
        assert_eq!(change(|r| r.usage = 0), None);
        assert_eq!(change(|r| r.usage = 1), None);
        assert_eq!(change(|r| r.usage = 255), None);
        assert_eq!(change(|r| r.selector = 2), None);
        assert_eq!(change(|r| r.matching = 3), None);
        assert_eq!(change(|r| r.matching = 2), None, "not 64 bytes");
        assert_eq!(change(|r| r.data = Box::default()), None);
    }

    #[test]
    fn the_strongest_digest_of_a_kind_decides() {
        let issuer = Issuer::new("Root").expect("an issuer");
        let server = issuer.issue(&["mx.x.example"]).expect("a certificate");
        let leaf = &server.chain()[0];
        let mut strong = record(3, 1, 2, leaf);
        strong.data[0] ^= 1;
        let both = [record(3, 1, 1, leaf), strong];
        assert!(verify(&both, "mx.x.example", server.chain()).is_err());
        // Another selector is another kind.
        let apart = [record(3, 0, 1, leaf), both[1].clone()];
        assert_eq!(verify(&apart, "mx.x.example", server.chain()), Ok(()));
    }

    proptest! {
        #[test]
        fn any_records_and_certificates_are_taken_or_refused(
            records in prop::collection::vec((2_u8..4, 0_u8..2, 0_u8..3, prop::collection::vec(any::<u8>(), 0..70)), 0..4),
            chain in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..4),
        ) {
            let records: Vec<_> = records.into_iter().map(|(usage, selector, matching, data)| Tlsa { usage, selector, matching, data: data.into() }).collect();
            let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
            let result = verify(&records, "mx.x.example", &chain);
            let named = |record: &Tlsa| record.usage == 3 && (record.selector, record.matching) == (0, 0) && *record.data == *chain[0];
            prop_assert!(result.is_err() || records.iter().any(named));
        }
    }
}
