//! How TLS with recipient domains went, by day: what TLS reports are made of (RFC 8460 §4).
//!
//! Only domains that want reports are counted. A node counts for itself and notes its sums every
//! few minutes; whoever sends the reports adds the notes of all nodes up.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mail_auth::report::tlsrpt::ResultType;
use model::{JournalId, Timestamp};
use serde::{Deserialize, Serialize};
use store::{NOTE_BYTES, Note};

/// Notes of this kind hold sums; their keys are `DAY/NODE/DOMAIN`.
pub(crate) const KIND: &str = "tls-report";
/// Domains of one day that are counted.
const DOMAINS_MAX: usize = 20_000;
/// Policies of a domain in one day, and kinds of failure of each. What is beyond is not told apart.
const POLICIES_MAX: usize = 4;
const FAILURES_MAX: usize = 50;
/// Hosts and lines of a policy that are reported.
const LINES_MAX: usize = 20;
/// A reason, in bytes.
const REASON_MAX: usize = 128;
/// Sums that nobody reported are dropped then.
const KEPT: Duration = Duration::from_secs(3 * 86_400);

/// A day of UTC, counted from 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Day(pub(crate) u32);

impl Day {
    /// Its length.
    pub(crate) const SECONDS: u32 = 86_400;

    /// The day of a moment.
    pub(crate) fn of(at: Timestamp) -> Self {
        let days = at.millis().div_euclid(i64::from(Self::SECONDS) * 1_000);
        Self(u32::try_from(days).unwrap_or(0))
    }

    /// The day before.
    pub(crate) fn before(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }

    /// Its first second, since 1970.
    pub(crate) fn begins(self) -> i64 {
        i64::from(self.0) * i64::from(Self::SECONDS)
    }
}

/// By what a session was bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum PolicyKind {
    Tlsa,
    Sts,
    NoPolicy,
}

/// A policy as a report names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Policy {
    pub(crate) kind: PolicyKind,
    /// Its lines, or TLSA records.
    pub(crate) lines: Vec<Box<str>>,
    /// The MX patterns of an MTA-STS policy, or the host that has the TLSA records.
    pub(crate) hosts: Vec<Box<str>>,
}

impl Policy {
    /// As much of it as is reported.
    pub(crate) fn new(
        kind: PolicyKind,
        mut lines: Vec<Box<str>>,
        mut hosts: Vec<Box<str>>,
    ) -> Self {
        lines.truncate(LINES_MAX);
        hosts.truncate(LINES_MAX);
        Self { kind, lines, hosts }
    }
}

/// What went wrong with a session (RFC 8460 §4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Flaw {
    NoStarttls,
    HostMismatch,
    Expired,
    NotTrusted,
    Other,
    DnssecInvalid,
    StsFetch,
    StsInvalid,
    StsWebpki,
}

impl Flaw {
    /// What a failed handshake shows.
    pub(crate) fn of(error: &rustls::Error) -> Self {
        use rustls::CertificateError as Certificate;
        match error {
            rustls::Error::InvalidCertificate(why) => match why {
                Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                    Self::HostMismatch
                }
                Certificate::Expired
                | Certificate::ExpiredContext { .. }
                | Certificate::NotValidYet
                | Certificate::NotValidYetContext { .. } => Self::Expired,
                _ => Self::NotTrusted,
            },
            _ => Self::Other,
        }
    }

    /// Its name in a report.
    pub(crate) fn result(self) -> ResultType {
        match self {
            Self::NoStarttls => ResultType::StartTlsNotSupported,
            Self::HostMismatch => ResultType::CertificateHostMismatch,
            Self::Expired => ResultType::CertificateExpired,
            Self::NotTrusted => ResultType::CertificateNotTrusted,
            Self::Other => ResultType::ValidationFailure,
            Self::DnssecInvalid => ResultType::DnssecInvalid,
            Self::StsFetch => ResultType::StsPolicyFetchError,
            Self::StsInvalid => ResultType::StsPolicyInvalid,
            Self::StsWebpki => ResultType::StsWebpkiInvalid,
        }
    }
}

/// One kind of failure; equal ones are counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) flaw: Flaw,
    pub(crate) host: Box<str>,
    pub(crate) address: Option<IpAddr>,
    /// For people: at most 128 bytes, printable.
    pub(crate) reason: Box<str>,
}

impl Failure {
    /// With as much of `reason` as is told.
    pub(crate) fn new(flaw: Flaw, host: &str, address: Option<IpAddr>, reason: &str) -> Self {
        let mut kept = String::new();
        for c in reason.chars().filter(|c| !c.is_control()) {
            if kept.len() + c.len_utf8() > REASON_MAX {
                break;
            }
            kept.push(c);
        }
        Self {
            flaw,
            host: host.into(),
            address,
            reason: kept.into(),
        }
    }
}

/// The sums of one policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sums {
    pub(crate) good: u32,
    pub(crate) failed: BTreeMap<Failure, u32>,
}

/// The sums of a domain in one day.
pub(crate) type Sheet = BTreeMap<Policy, Sums>;

/// Adds `from` to `to`, within the bounds.
pub(crate) fn add(to: &mut Sheet, from: Sheet) {
    for (policy, sums) in from {
        if to.len() >= POLICIES_MAX && !to.contains_key(&policy) {
            continue;
        }
        let entry = to.entry(policy).or_default();
        entry.good = entry.good.saturating_add(sums.good);
        for (failure, count) in sums.failed {
            fail(entry, failure, count);
        }
    }
}

fn fail(sums: &mut Sums, failure: Failure, count: u32) {
    let is_full = sums.failed.len() >= FAILURES_MAX && !sums.failed.contains_key(&failure);
    let failure = match is_full {
        true => Failure::new(Flaw::Other, "", None, "more failures than are told apart"),
        false => failure,
    };
    let entry = sums.failed.entry(failure).or_default();
    *entry = entry.saturating_add(count);
}

/// This node's sums.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<BTreeMap<(Day, Box<str>), Counted>>);

#[derive(Debug, Default)]
struct Counted {
    sheet: Sheet,
    is_new: bool,
}

impl Tally {
    /// Counts a session that was as its policy wants it.
    pub(crate) fn good(&self, domain: &str, policy: Policy, now: Timestamp) {
        self.count(domain, policy, now, |sums| {
            sums.good = sums.good.saturating_add(1)
        });
    }

    /// Counts a session that was not.
    pub(crate) fn failed(&self, domain: &str, policy: Policy, failure: Failure, now: Timestamp) {
        self.count(domain, policy, now, |sums| fail(sums, failure, 1));
    }

    fn count(&self, domain: &str, policy: Policy, now: Timestamp, act: impl FnOnce(&mut Sums)) {
        let mut days = self.lock();
        let key = (Day::of(now), domain.into());
        if days.len() >= DOMAINS_MAX && !days.contains_key(&key) {
            return;
        }
        let counted = days.entry(key).or_default();
        if counted.sheet.len() >= POLICIES_MAX && !counted.sheet.contains_key(&policy) {
            return;
        }
        act(counted.sheet.entry(policy).or_default());
        counted.is_new = true;
    }

    /// The sums that changed since the last call, as notes of `node`; past days are forgotten.
    pub(crate) fn notes(&self, node: JournalId, now: Timestamp) -> Vec<Note> {
        let mut days = self.lock();
        let today = Day::of(now);
        let mut notes = Vec::new();
        for ((day, domain), counted) in days.iter_mut().filter(|(_, counted)| counted.is_new) {
            counted.is_new = false;
            notes.extend(note(*day, node, domain, &counted.sheet, now));
        }
        days.retain(|(day, _), _| *day >= today);
        notes
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Day, Box<str>), Counted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn note(day: Day, node: JournalId, domain: &str, sheet: &Sheet, now: Timestamp) -> Option<Note> {
    let value = postcard::to_allocvec(sheet).ok()?;
    if value.len() > NOTE_BYTES {
        tracing::warn!(domain, "a day's TLS failures are too many to be noted");
        return None;
    }
    Some(Note {
        kind: KIND.into(),
        key: format!("{}/{node}/{domain}", day.0).into(),
        value: value.into(),
        expires_at: Some(now + KEPT),
    })
}

/// Reads a note: day, domain, sums. `None`: it is not one of ours.
pub(crate) fn read(note: &Note) -> Option<(Day, Box<str>, Sheet)> {
    let (day, rest) = note.key.split_once('/')?;
    let (_, domain) = rest.split_once('/')?;
    let sheet = postcard::from_bytes(&note.value).ok()?;
    Some((Day(day.parse().ok()?), domain.into(), sheet))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(kind: PolicyKind) -> Policy {
        Policy::new(
            kind,
            vec!["version: STSv1".into()],
            vec!["mx.x.example".into()],
        )
    }

    fn node(n: u8) -> JournalId {
        JournalId::new(Timestamp::from_millis(1), u128::from(n))
    }

    #[test]
    fn sums_of_all_nodes_add_up_by_day() {
        let (one, two) = (Tally::default(), Tally::default());
        let day = |n: i64| Timestamp::from_millis(n * 86_400_000 + 5);
        for _ in 0..3 {
            one.good("x.example", policy(PolicyKind::Sts), day(9));
        }
        let failure = || Failure::new(Flaw::Expired, "mx.x.example", None, "over\r\nnow");
        one.failed("x.example", policy(PolicyKind::Sts), failure(), day(9));
        two.failed("x.example", policy(PolicyKind::Sts), failure(), day(9));
        two.good("x.example", policy(PolicyKind::Sts), day(10));
        let mut notes = one.notes(node(1), day(9));
        assert!(one.notes(node(1), day(9)).is_empty(), "nothing new");
        notes.extend(two.notes(node(2), day(10)));
        let mut days = BTreeMap::<(Day, Box<str>), Sheet>::new();
        for (day, domain, sheet) in notes.iter().filter_map(read) {
            add(days.entry((day, domain)).or_default(), sheet);
        }
        let sums = &days[&(Day(9), "x.example".into())][&policy(PolicyKind::Sts)];
        assert_eq!((sums.good, sums.failed[&failure()]), (3, 2));
        let sums = &days[&(Day(10), "x.example".into())][&policy(PolicyKind::Sts)];
        assert_eq!((sums.good, sums.failed.len()), (1, 0));
        assert_eq!(&*failure().reason, "overnow");
    }

    #[test]
    fn what_a_stranger_can_make_us_keep_is_bounded() {
        let tally = Tally::default();
        let now = Timestamp::from_millis(5);
        let long = "x".repeat(253);
        for n in 0..500 {
            let hosts = vec![long.as_str().into(); 100];
            let policy = Policy::new(PolicyKind::Sts, hosts.clone(), hosts);
            let host = format!("{n}{long}");
            let failure = Failure::new(Flaw::Other, &host, None, &long);
            tally.failed("x.example", policy, failure, now);
            tally.failed(
                "x.example",
                policy_of(n),
                Failure::new(Flaw::Other, &host, None, &long),
                now,
            );
        }
        let notes = tally.notes(node(1), now);
        assert_eq!(notes.len(), 1, "not too large to be noted");
        let (_, _, sheet) = read(&notes[0]).expect("a note");
        assert_eq!(sheet.len(), POLICIES_MAX);
        let count: u32 = sheet.values().flat_map(|sums| sums.failed.values()).sum();
        assert_eq!(count, 503, "one policy of 500, three of one");
    }

    fn policy_of(n: usize) -> Policy {
        Policy::new(PolicyKind::Tlsa, vec![format!("{n}").into()], Vec::new())
    }

    #[test]
    fn handshakes_show_what_was_wrong() {
        use rustls::{CertificateError as Certificate, Error};
        for (error, flaw) in [
            (
                Error::InvalidCertificate(Certificate::NotValidForName),
                Flaw::HostMismatch,
            ),
            (
                Error::InvalidCertificate(Certificate::Expired),
                Flaw::Expired,
            ),
            (
                Error::InvalidCertificate(Certificate::UnknownIssuer),
                Flaw::NotTrusted,
            ),
            (Error::HandshakeNotComplete, Flaw::Other),
        ] {
            assert_eq!(Flaw::of(&error), flaw);
        }
    }

    proptest! {
        #[test]
        fn any_note_is_read_or_refused(key: String, value: Vec<u8>) {
            read(&Note { kind: KIND.into(), key: key.into(), value: value.into(), expires_at: None });
        }
    }
}
