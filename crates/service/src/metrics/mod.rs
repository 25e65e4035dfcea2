//! Every metric that the project emits, as typed handles; nothing else may name one.
//!
//! Owns names, labels and buckets (contract, section 8). Values of a closed list are resolved once,
//! at start, so that a hot path pays one atomic addition; `destination`, which strangers choose,
//! goes through [`Destinations`], which keeps it bounded. Must not decide what is worth counting.

mod destinations;
mod labels;

use std::collections::HashMap;

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use model::{Actor, HitKind};

pub use destinations::{Destination, Destinations, MOST_DESTINATIONS};
pub use labels::{
    DroppedKind, DuplicateCause, Label, LimitKind, QueueState, Resolved, Resolved2,
    SignatureAlgorithm, SignatureResult, SmtpStage, ThrottleReason, TlsResult, TrackerKind,
    TrackerResult,
};

/// The media type of [`Metrics::render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All metrics of a process; both listeners of `up` serve the same ones.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    names: Vec<&'static str>,
    destinations: Destinations,
    recipients_accepted: IntCounterVec,
    outcomes: IntCounterVec,
    smtp_connections: IntGaugeVec,
    destination_limit: GaugeVec,
    destination_limit_base: GaugeVec,
    throttled: IntCounterVec,
    store_seconds: HistogramVec,
    /// `hikyaku_duplicates_total[cause]`
    pub duplicates: Resolved<DuplicateCause, IntCounter>,
    /// `hikyaku_queue_recipients[state]`
    pub queue_recipients: Resolved<QueueState, IntGauge>,
    /// `hikyaku_queue_oldest_seconds`: the longest that a due recipient has been waiting.
    pub queue_oldest_seconds: Gauge,
    /// `hikyaku_delivery_age_seconds`: from release to delivered.
    pub delivery_age_seconds: Histogram,
    /// `hikyaku_smtp_stage_seconds[stage]`
    pub smtp_stage_seconds: Resolved<SmtpStage, Histogram>,
    /// `hikyaku_tls_total[result]`
    pub tls: Resolved<TlsResult, IntCounter>,
    /// `hikyaku_dkim_signatures_total[algorithm,result]`
    pub dkim_signatures: Resolved2<SignatureAlgorithm, SignatureResult, IntCounter>,
    /// `hikyaku_journal_pending_records`: written here, not yet in the store.
    pub journal_pending_records: IntGauge,
    /// `hikyaku_journal_dropped_total[kind]`
    pub journal_dropped: Resolved<DroppedKind, IntCounter>,
    /// `hikyaku_store_up`: 1 while the store answers.
    pub store_up: IntGauge,
    /// `hikyaku_tracker_requests_total[kind,result]`
    pub tracker_requests: Resolved2<TrackerKind, TrackerResult, IntCounter>,
    /// `hikyaku_tracker_seconds[kind]`
    pub tracker_seconds: Resolved<TrackerKind, Histogram>,
    /// `hikyaku_engagement_total[kind,actor]`
    pub engagement: Resolved2<HitKind, Actor, IntCounter>,
}

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

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics at zero, in a registry of their own, with those of the process.
    pub fn new() -> Self {
        let mut r = Registration::default();
        r.process();
        Self {
            destinations: Destinations::default(),
            recipients_accepted: r.counters(
                "hikyaku_recipients_accepted_total",
                "Recipients accepted",
                &["account"],
            ),
            outcomes: r.counters(
                "hikyaku_outcomes_total",
                "Outcomes of attempts and of recipients that ended without one",
                &["outcome", "class", "destination"],
            ),
            smtp_connections: r.gauges(
                "hikyaku_smtp_connections",
                "Open SMTP connections",
                &["destination"],
            ),
            destination_limit: r.float_gauges(
                "hikyaku_destination_limit",
                "Limits in force",
                &["destination", "kind"],
            ),
            destination_limit_base: r.float_gauges(
                "hikyaku_destination_limit_base",
                "Limits as configured",
                &["destination", "kind"],
            ),
            throttled: r.counters(
                "hikyaku_throttled_total",
                "Times that a destination's queue was held back",
                &["destination", "reason"],
            ),
            store_seconds: r.histograms(
                "hikyaku_store_seconds",
                "Time of store operations",
                &["op"],
                STORE_BUCKETS,
            ),
            duplicates: Resolved::of(&r.counters(
                "hikyaku_duplicates_total",
                "Messages that somebody may have got twice",
                &["cause"],
            )),
            queue_recipients: Resolved::of(&r.gauges(
                "hikyaku_queue_recipients",
                "Recipients that are not finished",
                &["state"],
            )),
            queue_oldest_seconds: r.gauge(
                "hikyaku_queue_oldest_seconds",
                "How long the oldest due recipient has been waiting",
            ),
            delivery_age_seconds: r.histogram(
                "hikyaku_delivery_age_seconds",
                "Time from release to delivered",
                AGE_BUCKETS,
            ),
            smtp_stage_seconds: Resolved::of(&r.histograms(
                "hikyaku_smtp_stage_seconds",
                "Time of the steps of delivery",
                &["stage"],
                STAGE_BUCKETS,
            )),
            tls: Resolved::of(&r.counters(
                "hikyaku_tls_total",
                "Connections by how they came to their security",
                &["result"],
            )),
            dkim_signatures: Resolved2::of(&r.counters(
                "hikyaku_dkim_signatures_total",
                "DKIM signatures",
                &["algorithm", "result"],
            )),
            journal_pending_records: r.int_gauge(
                "hikyaku_journal_pending_records",
                "Facts in the journal that are not yet in the store",
            ),
            journal_dropped: Resolved::of(&r.counters(
                "hikyaku_journal_dropped_total",
                "Facts that a full journal dropped",
                &["kind"],
            )),
            store_up: r.int_gauge("hikyaku_store_up", "1 while the store answers"),
            tracker_requests: Resolved2::of(&r.counters(
                "hikyaku_tracker_requests_total",
                "Requests to the tracker",
                &["kind", "result"],
            )),
            tracker_seconds: Resolved::of(&r.histograms(
                "hikyaku_tracker_seconds",
                "Time to answer a request to the tracker",
                &["kind"],
                TRACKER_BUCKETS,
            )),
            engagement: Resolved2::of(&r.counters(
                "hikyaku_engagement_total",
                "Hits by who caused them",
                &["kind", "actor"],
            )),
            registry: r.registry,
            names: r.names,
        }
    }

    /// The names of all families, in the order in which they were made; histograms without their
    /// `_bucket`, `_sum` and `_count`.
    pub fn names(&self) -> &[&'static str] {
        &self.names
    }

    /// The page of `/metrics`. Each rendering also elects which destinations have a label.
    pub fn render(&self) -> String {
        for name in self.destinations.elect() {
            self.forget(&name);
        }
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            // Encoding fails only for a family without metrics, which `gather` leaves out.
            .unwrap_or_default()
    }

    /// The label of a destination; counts one use of it. Not for keeping: see [`Destination`].
    pub fn destination(&self, name: &str) -> Destination {
        self.destinations.label(name)
    }

    /// `hikyaku_recipients_accepted_total`; accounts are the operator's, so their number is bounded.
    pub fn recipients_accepted(&self, account: &str) -> IntCounter {
        self.recipients_accepted.with_label_values(&[account])
    }

    /// `hikyaku_outcomes_total`; `outcome` is a status, `class` empty for a delivery.
    pub fn outcomes(&self, outcome: &str, class: &str, destination: &Destination) -> IntCounter {
        let values = [outcome, class, destination.as_str()];
        self.outcomes.with_label_values(&values)
    }

    /// Counts an open connection in `hikyaku_smtp_connections` until what is returned is dropped.
    pub fn connection(&self, destination: &Destination) -> OpenConnection {
        let gauge = self
            .smtp_connections
            .with_label_values(&[destination.as_str()]);
        gauge.inc();
        OpenConnection(gauge)
    }

    /// Sets both limits of a destination, in force and as configured: a count, or MAIL commands in
    /// a second. Without a label of its own nothing is set: `other` has no limit.
    pub fn limit(&self, destination: &Destination, kind: LimitKind, in_force: f64, base: f64) {
        if destination.is_other() {
            return;
        }
        let values = [destination.as_str(), kind.text()];
        self.destination_limit
            .with_label_values(&values)
            .set(in_force);
        self.destination_limit_base
            .with_label_values(&values)
            .set(base);
    }

    /// `hikyaku_throttled_total`
    pub fn throttled(&self, destination: &Destination, reason: ThrottleReason) -> IntCounter {
        let values = [destination.as_str(), reason.text()];
        self.throttled.with_label_values(&values)
    }

    /// `hikyaku_store_seconds`; `op` is a name in our code, never data.
    pub fn store_seconds(&self, op: &'static str) -> Histogram {
        self.store_seconds.with_label_values(&[op])
    }

    fn forget(&self, destination: &str) {
        forget_in(&self.outcomes, destination);
        forget_in(&self.smtp_connections, destination);
        forget_in(&self.destination_limit, destination);
        forget_in(&self.destination_limit_base, destination);
        forget_in(&self.throttled, destination);
    }
}

/// Removes every series of a destination that lost its label. What it counted is not added to
/// `other`: there it would look like a burst.
fn forget_in<B: MetricVecBuilder>(family: &MetricVec<B>, destination: &str)
where
    MetricVec<B>: Collector,
{
    let collected = family.collect();
    let series = collected.iter().flat_map(|family| family.get_metric());
    for metric in series {
        let labels = metric.get_label().iter();
        let values: HashMap<&str, &str> = labels.map(|pair| (pair.name(), pair.value())).collect();
        if values.get("destination") == Some(&destination) {
            // Gone already if two renderings meet, which is as good.
            family.remove(&values).ok();
        }
    }
}

/// An open SMTP connection, counted while this lives.
#[derive(Debug)]
#[must_use = "the connection is counted only while this lives"]
pub struct OpenConnection(IntGauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Makes families and enters them in the registry and the list of names.
#[derive(Default)]
struct Registration {
    registry: Registry,
    names: Vec<&'static str>,
}

/// Names and labels are constants, and the tests make all of them.
const CONSTANT: &str = "metric names are valid and each is made once";

impl Registration {
    fn enter<C: Collector + Clone + 'static>(&mut self, name: &'static str, family: &C) {
        self.registry
            .register(Box::new(family.clone()))
            .expect(CONSTANT);
        self.names.push(name);
    }

    fn process(&mut self) {
        let process = ProcessCollector::for_self();
        self.registry.register(Box::new(process)).expect(CONSTANT);
        self.names.extend(PROCESS_NAMES);
    }

    fn counters(&mut self, name: &'static str, help: &str, labels: &[&str]) -> IntCounterVec {
        let family = IntCounterVec::new(Opts::new(name, help), labels).expect(CONSTANT);
        self.enter(name, &family);
        family
    }

    fn gauges(&mut self, name: &'static str, help: &str, labels: &[&str]) -> IntGaugeVec {
        let family = IntGaugeVec::new(Opts::new(name, help), labels).expect(CONSTANT);
        self.enter(name, &family);
        family
    }

    fn float_gauges(&mut self, name: &'static str, help: &str, labels: &[&str]) -> GaugeVec {
        let family = GaugeVec::new(Opts::new(name, help), labels).expect(CONSTANT);
        self.enter(name, &family);
        family
    }

    fn gauge(&mut self, name: &'static str, help: &str) -> Gauge {
        let gauge = Gauge::new(name, help).expect(CONSTANT);
        self.enter(name, &gauge);
        gauge
    }

    fn int_gauge(&mut self, name: &'static str, help: &str) -> IntGauge {
        let gauge = IntGauge::new(name, help).expect(CONSTANT);
        self.enter(name, &gauge);
        gauge
    }

    fn histogram(&mut self, name: &'static str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let histogram = Histogram::with_opts(options).expect(CONSTANT);
        self.enter(name, &histogram);
        histogram
    }

    fn histograms(
        &mut self,
        name: &'static str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        let family = HistogramVec::new(options, labels).expect(CONSTANT);
        self.enter(name, &family);
        family
    }
}

/// What the process collector adds.
const PROCESS_NAMES: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_max_fds",
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn line(page: &str, start: &str) -> Option<String> {
        page.lines()
            .find(|line| line.starts_with(start))
            .map(str::to_owned)
    }

    #[test]
    fn every_family_appears_under_its_name_and_no_other_does() {
        let metrics = Metrics::new();
        let there = metrics.destination("x.example");
        metrics.recipients_accepted("default").inc();
        metrics.outcomes("delivered", "", &there).inc();
        metrics.limit(&there, LimitKind::Rate, 5.0, 10.0);
        metrics.throttled(&there, ThrottleReason::Rate).inc();
        metrics.store_seconds("lease").observe(0.001);
        let open = metrics.connection(&there);
        let page = metrics.render();
        let typed: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        let mut named = metrics.names().to_vec();
        named.sort_unstable();
        assert_eq!(typed, named);
        let connections = "hikyaku_smtp_connections{destination=\"x.example\"}";
        assert_eq!(line(&page, connections), Some(format!("{connections} 1")));
        drop(open);
        let page = metrics.render();
        assert_eq!(line(&page, connections), Some(format!("{connections} 0")));
    }

    #[test]
    fn closed_lists_stand_at_zero_from_the_start() {
        let metrics = Metrics::new();
        metrics.duplicates.at(DuplicateCause::ReplyLost).inc();
        metrics
            .engagement
            .at(HitKind::Click, Actor::Human)
            .inc_by(2);
        let page = metrics.render();
        for expected in [
            "hikyaku_duplicates_total{cause=\"reply_lost\"} 1",
            "hikyaku_duplicates_total{cause=\"lost_node\"} 0",
            "hikyaku_engagement_total{actor=\"human\",kind=\"click\"} 2",
            "hikyaku_engagement_total{actor=\"machine\",kind=\"open\"} 0",
            "hikyaku_queue_recipients{state=\"queued\"} 0",
            "hikyaku_tracker_requests_total{kind=\"open\",result=\"bad_token\"} 0",
        ] {
            assert!(
                page.lines().any(|line| line == expected),
                "{expected}\n{page}"
            );
        }
    }

    #[test]
    fn a_destination_that_loses_its_label_takes_its_series_along() {
        let metrics = Metrics::new();
        for number in 0..MOST_DESTINATIONS {
            let there = metrics.destination(&format!("d{number}.example"));
            metrics.outcomes("delivered", "", &there).inc();
            metrics.limit(&there, LimitKind::Connections, 5.0, 5.0);
        }
        for _ in 0..50 {
            let there = metrics.destination("busy.example");
            metrics.outcomes("delivered", "", &there).inc();
            metrics.limit(&there, LimitKind::Connections, 5.0, 5.0);
        }
        let page = metrics.render();
        let series = |name: &str| page.lines().filter(|line| line.starts_with(name)).count();
        assert_eq!(series("hikyaku_outcomes_total{"), MOST_DESTINATIONS);
        assert_eq!(series("hikyaku_destination_limit{"), MOST_DESTINATIONS - 1);
        let there = metrics.destination("busy.example");
        assert_eq!(there.as_str(), "busy.example");
    }
}
