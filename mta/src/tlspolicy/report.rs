//! TLS reports (RFC 8460): who wants them, and what they say.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use mail_auth::report::tlsrpt::{
    DateRange, FailureDetails, Policy as ReportedPolicy, PolicyDetails, PolicyType, Summary,
    TlsReport,
};

use super::tally::{Day, PolicyKind, Sheet};

/// Destinations of one domain's reports.
const DESTINATIONS_MAX: usize = 10;
/// The media type of a report.
pub(crate) const MEDIA_TYPE: &str = "application/tlsrpt+gzip";

/// Where a domain wants its reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// An address.
    Mail(String),
    /// Host, port, path with query.
    Https(String, u16, String),
}

/// Reads the texts at `_smtp._tls.DOMAIN` (RFC 8460 §3): where reports go, if exactly one of them
/// says so. What cannot be used of it is passed over.
pub(crate) fn destinations(texts: &[Vec<u8>]) -> Vec<Destination> {
    let mut announced = texts.iter().filter(|text| is_announcement(text));
    let (Some(text), None) = (announced.next(), announced.next()) else {
        return Vec::new();
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return Vec::new();
    };
    let fields = text.split(';').filter_map(|field| field.split_once('='));
    let rua = fields
        .filter(|(key, _)| key.trim() == "rua")
        .map(|(_, value)| value);
    rua.take(1)
        .flat_map(|value| value.split(','))
        .filter_map(|uri| destination(uri.trim()))
        .take(DESTINATIONS_MAX)
        .collect()
}

fn is_announcement(text: &[u8]) -> bool {
    let rest = text.strip_prefix(b"v=TLSRPTv1");
    rest.is_some_and(|rest| rest.trim_ascii_start().first() == Some(&b';'))
}

fn destination(uri: &str) -> Option<Destination> {
    if let Some(rest) = uri.strip_prefix("mailto:") {
        let address = rest.split('?').next().unwrap_or_default();
        return (!address.is_empty()).then(|| Destination::Mail(address.to_owned()));
    }
    // Nothing that would need escaping: such a URI is not one.
    let is_plain = uri.bytes().all(|b| b.is_ascii_graphic());
    let rest = uri.strip_prefix("https://").filter(|_| is_plain)?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at_checked(end)?;
    let (host, port) = match authority.split_once(':') {
        Some((host, port)) => (host, port.parse().ok()?),
        None => (authority, 443),
    };
    let host_fits = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    let path = path.split('#').next().unwrap_or_default();
    let path = match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/{path}"),
    };
    (host_fits && !host.is_empty())
        .then(|| Destination::Https(host.to_ascii_lowercase(), port, path))
}

/// Who reports.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    pub(crate) organization: String,
    pub(crate) contact: String,
    /// The domain of From.
    pub(crate) domain: String,
}

/// A report, compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// The same each time it is made.
    pub(crate) id: String,
    pub(crate) file_name: String,
    pub(crate) gzip: Vec<u8>,
}

/// The report on `domain` for one day.
///
/// # Errors
/// When compressing fails, which memory alone can make it do.
pub(crate) fn report(
    by: &Reporter,
    domain: &str,
    day: Day,
    sheet: &Sheet,
) -> std::io::Result<Report> {
    let (begin, end) = (day.begins(), day.begins() + i64::from(Day::SECONDS) - 1);
    let id = format!("{}.{domain}@{}", day.0, by.domain);
    let policies = sheet.iter().map(|(policy, sums)| {
        let kind = match policy.kind {
            PolicyKind::Tlsa => PolicyType::Tlsa,
            PolicyKind::Sts => PolicyType::Sts,
            PolicyKind::NoPolicy => PolicyType::NoPolicyFound,
        };
        let mut details = PolicyDetails::new(kind, domain);
        details.policy_string = policy.lines.iter().map(ToString::to_string).collect();
        details.mx_host = policy.hosts.iter().map(ToString::to_string).collect();
        let failed = sums
            .failed
            .values()
            .fold(0_u32, |sum, n| sum.saturating_add(*n));
        ReportedPolicy {
            policy: details,
            summary: Summary {
                total_success: sums.good,
                total_failure: failed,
            },
            failure_details: sums
                .failed
                .iter()
                .map(|(failure, count)| FailureDetails {
                    result_type: failure.flaw.result(),
                    receiving_mx_hostname: text(&failure.host),
                    receiving_ip: failure.address,
                    failed_session_count: *count,
                    failure_reason_code: text(&failure.reason),
                    ..FailureDetails::default()
                })
                .collect(),
        }
    });
    let report = TlsReport {
        organization_name: Some(by.organization.clone()),
        date_range: DateRange::from_timestamps(begin, end),
        contact_info: Some(by.contact.clone()),
        report_id: id.clone(),
        policies: policies.collect(),
    };
    let mut document = serde_json::to_value(&report)?;
    leave_out_nulls(&mut document);
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(document.to_string().as_bytes())?;
    Ok(Report {
        id,
        file_name: format!("{}!{domain}!{begin}!{end}.json.gz", by.domain),
        gzip: gzip.finish()?,
    })
}

fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// What is not known is left out: `null` is not among the types that RFC 8460 names.
fn leave_out_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(leave_out_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(leave_out_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tlspolicy::tally::{Failure, Flaw, Policy, Sums};
    use mail_auth::report::tlsrpt::ResultType;
    use proptest::prelude::*;

    #[test]
    fn where_reports_go() {
        let of = |text: &str| destinations(&[text.as_bytes().to_vec()]);
        let mail = |address: &str| Destination::Mail(address.to_owned());
        assert_eq!(
            of("v=TLSRPTv1;rua=mailto:a@x.example"),
            [mail("a@x.example")]
        );
        assert_eq!(
            of("v=TLSRPTv1; rua=mailto:a@x.example?subject=y , https://R.x.example:8443/v1?a=b#c"),
            [
                mail("a@x.example"),
                Destination::Https("r.x.example".into(), 8443, "/v1?a=b".into())
            ]
        );
        assert_eq!(
            of("v=TLSRPTv1; rua=https://x.example"),
            [Destination::Https("x.example".into(), 443, "/".into())]
        );
        for none in [
            "v=TLSRPTv2;rua=mailto:a@x.example",
            "v=TLSRPTv1;",
            "v=TLSRPTv1;rua=http://x.example/,ftp://x,mailto:",
            "v=TLSRPTv1;rua=https:///x,https://a b/,https://x.example:99999/",
        ] {
            assert_eq!(of(none), [], "{none}");
        }
        let twice = vec![b"v=TLSRPTv1;rua=mailto:a@x.example".to_vec(); 2];
        assert_eq!(destinations(&twice), []);
    }

    #[test]
    fn another_reader_reads_what_was_reported() {
        let by = Reporter {
            organization: "Brand".into(),
            contact: "postmaster@brand.example".into(),
            domain: "brand.example".into(),
        };
        let policy = Policy::new(
            PolicyKind::Sts,
            vec!["mode: enforce".into()],
            vec!["mx.x.example".into()],
        );
        let failure = Failure::new(
            Flaw::Expired,
            "mx.x.example",
            Some([192, 0, 2, 1].into()),
            "over",
        );
        let sums = Sums {
            good: 7,
            failed: [(failure, 2)].into(),
        };
        let sheet = Sheet::from([(policy, sums)]);
        let made = report(&by, "x.example", Day(20_000), &sheet).expect("a report");
        assert_eq!(
            made.file_name,
            "brand.example!x.example!1728000000!1728086399.json.gz"
        );
        let mut json = String::new();
        let mut reader = flate2::read::GzDecoder::new(&*made.gzip);
        std::io::Read::read_to_string(&mut reader, &mut json).expect("gzip");
        assert!(!json.contains("null"), "{json}");
        let read = TlsReport::parse_json(json.as_bytes()).expect("a report");
        assert_eq!(read.report_id, made.id);
        assert_eq!(
            read.date_range.start_datetime.to_rfc3339(),
            "2024-10-04T00:00:00Z"
        );
        let [policy] = &*read.policies else {
            panic!("{read:?}")
        };
        assert_eq!(policy.policy.policy_type, PolicyType::Sts);
        assert_eq!(
            (policy.summary.total_success, policy.summary.total_failure),
            (7, 2)
        );
        assert_eq!(
            policy.failure_details[0].result_type,
            ResultType::CertificateExpired
        );
        assert_eq!(policy.failure_details[0].failed_session_count, 2);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(texts: Vec<Vec<u8>>, uris: String) {
            destinations(&texts);
            destinations(&[format!("v=TLSRPTv1;rua={uris}").into_bytes()]);
        }
    }
}
