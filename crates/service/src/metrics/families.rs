//! The declaration of every family: name, help, labels, buckets.

use prometheus::{HistogramOpts, Opts};

/// Seconds of an SMTP step: from a reused cache to the ten minutes of the final dot.
const STAGE_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0,
];
/// Seconds from release to delivered: from at once to the 72 hours of expiry.
const AGE_BUCKETS: &[f64] = &[
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 43_200.0, 86_400.0, 259_200.0,
];
const STORE_BUCKETS: &[f64] = &[
    0.000_1, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0,
];
const TRACKER_BUCKETS: &[f64] = &[
    0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.025, 0.1, 1.0,
];

/// A family as it is declared; all of them stand below, once.
pub(super) struct Family {
    pub(super) name: &'static str,
    help: &'static str,
    pub(super) labels: &'static [&'static str],
    /// Seconds; empty but for histograms.
    buckets: &'static [f64],
}

const fn family(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Family {
    Family {
        name,
        help,
        labels,
        buckets: &[],
    }
}

const fn timed(
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    buckets: &'static [f64],
) -> Family {
    Family {
        name,
        help,
        labels,
        buckets,
    }
}

pub(super) const RECIPIENTS_ACCEPTED: Family = family(
    "hikyaku_recipients_accepted_total",
    "Recipients accepted",
    &["account"],
);
pub(super) const OUTCOMES: Family = family(
    "hikyaku_outcomes_total",
    "Outcomes of attempts and of recipients that ended without one",
    &["outcome", "class", "destination"],
);
pub(super) const SMTP_CONNECTIONS: Family = family(
    "hikyaku_smtp_connections",
    "Open SMTP connections",
    &["destination"],
);
pub(super) const DESTINATION_LIMIT: Family = family(
    "hikyaku_destination_limit",
    "Limits in force",
    &["destination", "kind"],
);
pub(super) const DESTINATION_LIMIT_BASE: Family = family(
    "hikyaku_destination_limit_base",
    "Limits as configured",
    &["destination", "kind"],
);
pub(super) const THROTTLED: Family = family(
    "hikyaku_throttled_total",
    "Times that a destination's queue was held back",
    &["destination", "reason"],
);
pub(super) const STORE_SECONDS: Family = timed(
    "hikyaku_store_seconds",
    "Time of store operations",
    &["op"],
    STORE_BUCKETS,
);
pub(super) const ABTEST_RATE: Family = family(
    "hikyaku_abtest_rate",
    "Rate of each variant of a test that runs, by its metric, of people, at equal age",
    &["batch", "variant"],
);
pub(super) const DUPLICATES: Family = family(
    "hikyaku_duplicates_total",
    "Messages that somebody may have got twice",
    &["cause"],
);
pub(super) const QUEUE_RECIPIENTS: Family = family(
    "hikyaku_queue_recipients",
    "Recipients that are not finished",
    &["state"],
);
pub(super) const QUEUE_OLDEST_SECONDS: Family = family(
    "hikyaku_queue_oldest_seconds",
    "How long the oldest due recipient has been waiting",
    &[],
);
pub(super) const DELIVERY_AGE_SECONDS: Family = timed(
    "hikyaku_delivery_age_seconds",
    "Time from release to delivered",
    &[],
    AGE_BUCKETS,
);
pub(super) const SMTP_STAGE_SECONDS: Family = timed(
    "hikyaku_smtp_stage_seconds",
    "Time of the steps of delivery",
    &["stage"],
    STAGE_BUCKETS,
);
pub(super) const TLS: Family = family(
    "hikyaku_tls_total",
    "Connections by how they came to their security",
    &["result"],
);
pub(super) const TLS_HANDSHAKES: Family = family(
    "hikyaku_tls_handshakes_total",
    "TLS handshakes with MX hosts",
    &["kind"],
);
pub(super) const DANE_AVAILABLE: Family = family(
    "hikyaku_dane_available",
    "1 while the name servers are believed and show that they validate",
    &[],
);
pub(super) const DKIM_SIGNATURES: Family = family(
    "hikyaku_dkim_signatures_total",
    "DKIM signatures",
    &["algorithm", "result"],
);
pub(super) const JOURNAL_PENDING_RECORDS: Family = family(
    "hikyaku_journal_pending_records",
    "Facts in the journal that are not yet in the store",
    &[],
);
pub(super) const JOURNAL_DROPPED: Family = family(
    "hikyaku_journal_dropped_total",
    "Facts that a full journal dropped",
    &["kind"],
);
pub(super) const STORE_UP: Family = family("hikyaku_store_up", "1 while the store answers", &[]);
pub(super) const CLOCK_OFFSET_SECONDS: Family = family(
    "hikyaku_clock_offset_seconds",
    "How far this machine's clock is ahead of the store's",
    &[],
);
pub(super) const RELOAD_OK: Family = family(
    "hikyaku_reload_ok",
    "1 while what SIGHUP asked to be read the last time is in force",
    &[],
);
pub(super) const EGRESS_SOURCE_UP: Family = family(
    "hikyaku_egress_source_up",
    "1 while connections can be made from an egress source",
    &["source"],
);
pub(super) const STORE_UNREADABLE_RANGES: Family = family(
    "hikyaku_store_unreadable_ranges",
    "Ranges of recipients that were to be sent to and could not be read, since the start",
    &[],
);
pub(super) const RETIRED: Family =
    family("hikyaku_retired_total", "What retention removed", &["kind"]);
pub(super) const ERASURE_OLDEST_SECONDS: Family = family(
    "hikyaku_erasure_oldest_seconds",
    "How long the oldest order to erase a person has been waiting",
    &[],
);
pub(super) const STORE_UPHEAVALS: Family = family(
    "hikyaku_store_upheavals",
    "How often the store was seen to change hands or to come back without what it had, since the start",
    &[],
);
pub(super) const FACTS_SHIPPED_AGAIN: Family = family(
    "hikyaku_facts_shipped_again_total",
    "Records shipped once more, to a store that had forgotten them",
    &[],
);
pub(super) const FACTS_LOST: Family = family(
    "hikyaku_facts_lost_total",
    "Records that the store has forgotten and the journal no longer keeps",
    &[],
);
pub(super) const TRACKER_REQUESTS: Family = family(
    "hikyaku_tracker_requests_total",
    "Requests to the tracker",
    &["kind", "result"],
);
pub(super) const TRACKER_SECONDS: Family = timed(
    "hikyaku_tracker_seconds",
    "Time to answer a request to the tracker",
    &["kind"],
    TRACKER_BUCKETS,
);
pub(super) const TRACKER_CERTIFICATE_EXPIRY: Family = family(
    "hikyaku_tracker_certificate_expiry_seconds",
    "When the certificate that the tracker shows for a host ends, in seconds since 1970",
    &["host"],
);
pub(super) const TRACKER_CERTIFICATES: Family = family(
    "hikyaku_tracker_certificates_total",
    "Certificates that were read or fetched, or were to be",
    &["host", "origin", "result"],
);
pub(super) const ENGAGEMENT: Family = family(
    "hikyaku_engagement_total",
    "Hits by who caused them",
    &["kind", "actor"],
);
pub(super) const ENGAGEMENT_LAG_SECONDS: Family = family(
    "hikyaku_engagement_lag_seconds",
    "Age of the oldest event that the judgement of hits has not read yet, on the node that does it",
    &[],
);
pub(super) const ENGAGEMENT_WAITING: Family = family(
    "hikyaku_engagement_waiting_hits",
    "Hits that wait for company before they are judged, on the node that does it",
    &[],
);
pub(super) const ENGAGEMENT_RECLASSIFIED: Family = family(
    "hikyaku_engagement_reclassified_total",
    "Verdicts that were revised, by what they are now",
    &["kind", "actor"],
);
pub(super) const WEBHOOK_DELIVERIES: Family = family(
    "hikyaku_webhook_deliveries_total",
    "Attempts to hand events to webhooks",
    &["result"],
);
pub(super) const WEBHOOK_LAG_SECONDS: Family = family(
    "hikyaku_webhook_lag_seconds",
    "Age of the oldest event that a webhook served here has not got yet; the parked do not count",
    &[],
);

impl Family {
    pub(super) fn options(&self) -> Opts {
        Opts::new(self.name, self.help)
    }

    pub(super) fn histogram_options(&self) -> HistogramOpts {
        HistogramOpts::new(self.name, self.help).buckets(self.buckets.to_vec())
    }
}

/// What the process collector adds.
pub(super) const PROCESS: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_max_fds",
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
];
