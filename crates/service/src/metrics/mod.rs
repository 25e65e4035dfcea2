//! Every metric that the project emits, as typed handles; nothing else may name one.
//!
//! Owns names, labels and buckets (contract, section 8). Values of a closed list are resolved once,
//! at start, so that a hot path pays one atomic addition; `destination`, which strangers choose,
//! goes through [`Destinations`], which keeps it bounded. Must not decide what is worth counting.

mod destinations;
mod families;
mod labels;
mod portion;

use std::collections::HashMap;

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Registry, TextEncoder,
};

use model::{Actor, HitKind};

pub use destinations::{Destination, Destinations, MOST_DESTINATIONS};
pub use labels::{
    CertificateOrigin, CertificateResult, DroppedKind, DuplicateCause, Kept, Label, LimitKind,
    QueueState, Resolved, Resolved2, SignatureAlgorithm, SignatureResult, SmtpStage,
    ThrottleReason, TlsHandshake, TlsResult, TrackerKind, TrackerResult, WebhookResult,
};
pub use portion::Portion;

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
    abtest_rate: GaugeVec,
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
    /// `hikyaku_tls_handshakes_total[kind]`
    pub tls_handshakes: Resolved<TlsHandshake, IntCounter>,
    /// `hikyaku_dane_available`: 1 while the name servers show that they validate.
    pub dane_available: IntGauge,
    /// `hikyaku_dkim_signatures_total[algorithm,result]`
    pub dkim_signatures: Resolved2<SignatureAlgorithm, SignatureResult, IntCounter>,
    /// `hikyaku_journal_pending_records`: written here, not yet in the store.
    pub journal_pending_records: IntGauge,
    /// `hikyaku_journal_dropped_total[kind]`
    pub journal_dropped: Resolved<DroppedKind, IntCounter>,
    /// `hikyaku_store_up`: 1 while the store answers.
    pub store_up: IntGauge,
    /// `hikyaku_clock_offset_seconds`: how far this machine's clock is ahead of the store's.
    pub clock_offset_seconds: Gauge,
    /// `hikyaku_reload_ok`: 0 after a reload that was refused, until one is taken.
    pub reload_ok: IntGauge,
    egress_source_up: IntGaugeVec,
    /// `hikyaku_store_unreadable_ranges`: ranges that were to be leased and could not be read.
    pub store_unreadable_ranges: IntGauge,
    /// `hikyaku_retired_total[kind]`: what retention removed.
    pub retired: Resolved<Kept, IntCounter>,
    /// `hikyaku_erasure_oldest_seconds`: how long somebody has been waiting to be erased.
    pub erasure_oldest_seconds: Gauge,
    /// `hikyaku_store_upheavals`: how often the store may have forgotten what it acknowledged.
    pub store_upheavals: IntGauge,
    /// `hikyaku_facts_shipped_again_total`
    pub facts_shipped_again: IntCounter,
    /// `hikyaku_facts_lost_total`
    pub facts_lost: IntCounter,
    /// `hikyaku_tracker_requests_total[kind,result]`
    pub tracker_requests: Resolved2<TrackerKind, TrackerResult, IntCounter>,
    /// `hikyaku_tracker_seconds[kind]`
    pub tracker_seconds: Resolved<TrackerKind, Histogram>,
    tracker_certificate_expiry: IntGaugeVec,
    tracker_certificates: IntCounterVec,
    /// `hikyaku_engagement_total[kind,actor]`
    pub engagement: Resolved2<HitKind, Actor, IntCounter>,
    /// `hikyaku_engagement_lag_seconds`
    pub engagement_lag_seconds: Gauge,
    /// `hikyaku_engagement_waiting_hits`
    pub engagement_waiting: Gauge,
    /// `hikyaku_engagement_reclassified_total[kind,actor]`
    pub engagement_reclassified: Resolved2<HitKind, Actor, IntCounter>,
    /// `hikyaku_webhook_deliveries_total[result]`: attempts, each with up to 500 events.
    pub webhook_deliveries: Resolved<WebhookResult, IntCounter>,
    /// `hikyaku_webhook_lag_seconds`: the age of the oldest event that a webhook of this node has not
    /// got yet.
    pub webhook_lag_seconds: Gauge,
}

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
            recipients_accepted: r.counters(&families::RECIPIENTS_ACCEPTED),
            outcomes: r.counters(&families::OUTCOMES),
            smtp_connections: r.gauges(&families::SMTP_CONNECTIONS),
            destination_limit: r.float_gauges(&families::DESTINATION_LIMIT),
            destination_limit_base: r.float_gauges(&families::DESTINATION_LIMIT_BASE),
            throttled: r.counters(&families::THROTTLED),
            store_seconds: r.histograms(&families::STORE_SECONDS),
            abtest_rate: r.float_gauges(&families::ABTEST_RATE),
            duplicates: Resolved::of(&r.counters(&families::DUPLICATES)),
            queue_recipients: Resolved::of(&r.gauges(&families::QUEUE_RECIPIENTS)),
            queue_oldest_seconds: r.gauge(&families::QUEUE_OLDEST_SECONDS),
            erasure_oldest_seconds: r.gauge(&families::ERASURE_OLDEST_SECONDS),
            delivery_age_seconds: r.histogram(&families::DELIVERY_AGE_SECONDS),
            smtp_stage_seconds: Resolved::of(&r.histograms(&families::SMTP_STAGE_SECONDS)),
            tls: Resolved::of(&r.counters(&families::TLS)),
            tls_handshakes: Resolved::of(&r.counters(&families::TLS_HANDSHAKES)),
            dane_available: r.int_gauge(&families::DANE_AVAILABLE),
            dkim_signatures: Resolved2::of(&r.counters(&families::DKIM_SIGNATURES)),
            journal_pending_records: r.int_gauge(&families::JOURNAL_PENDING_RECORDS),
            journal_dropped: Resolved::of(&r.counters(&families::JOURNAL_DROPPED)),
            store_up: r.int_gauge(&families::STORE_UP),
            clock_offset_seconds: r.gauge(&families::CLOCK_OFFSET_SECONDS),
            reload_ok: r.good(&families::RELOAD_OK),
            egress_source_up: r.gauges(&families::EGRESS_SOURCE_UP),
            store_unreadable_ranges: r.int_gauge(&families::STORE_UNREADABLE_RANGES),
            retired: Resolved::of(&r.counters(&families::RETIRED)),
            store_upheavals: r.int_gauge(&families::STORE_UPHEAVALS),
            facts_shipped_again: r.int_counter(&families::FACTS_SHIPPED_AGAIN),
            facts_lost: r.int_counter(&families::FACTS_LOST),
            tracker_requests: Resolved2::of(&r.counters(&families::TRACKER_REQUESTS)),
            tracker_seconds: Resolved::of(&r.histograms(&families::TRACKER_SECONDS)),
            tracker_certificate_expiry: r.gauges(&families::TRACKER_CERTIFICATE_EXPIRY),
            tracker_certificates: r.counters(&families::TRACKER_CERTIFICATES),
            engagement: Resolved2::of(&r.counters(&families::ENGAGEMENT)),
            engagement_lag_seconds: r.gauge(&families::ENGAGEMENT_LAG_SECONDS),
            engagement_waiting: r.gauge(&families::ENGAGEMENT_WAITING),
            engagement_reclassified: Resolved2::of(&r.counters(&families::ENGAGEMENT_RECLASSIFIED)),
            webhook_deliveries: Resolved::of(&r.counters(&families::WEBHOOK_DELIVERIES)),
            webhook_lag_seconds: r.gauge(&families::WEBHOOK_LAG_SECONDS),
            registry: r.registry,
            names: r.names,
        }
    }

    /// The names of all families; histograms without their `_bucket`, `_sum` and `_count`.
    pub fn names() -> Vec<&'static str> {
        Self::new().names
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

    /// `hikyaku_egress_source_up[source]`, by the name of the configuration.
    pub fn egress_source(&self, name: &str, is_up: bool) {
        let gauge = self.egress_source_up.with_label_values(&[name]);
        gauge.set(i64::from(is_up));
    }

    /// `hikyaku_tracker_certificate_expiry_seconds[host]`, a host of the configuration; seconds
    /// since 1970.
    pub fn certificate_expiry(&self, host: &str, seconds: i64) {
        let gauge = self.tracker_certificate_expiry.with_label_values(&[host]);
        gauge.set(seconds);
    }

    /// The counters `hikyaku_tracker_certificates_total[host,origin,result]` of a host of the
    /// configuration or of an account. They stand at zero once they were asked for, so that the
    /// first failure is seen to be one.
    pub fn certificates(
        &self,
        host: &str,
        origin: CertificateOrigin,
    ) -> Resolved<CertificateResult, IntCounter> {
        let of = |result: CertificateResult| {
            let labels = [host, origin.text(), result.text()];
            self.tracker_certificates.with_label_values(&labels)
        };
        Resolved::made(of)
    }

    /// `hikyaku_store_seconds`; `op` is a name in our code, never data.
    pub fn store_seconds(&self, op: &'static str) -> Histogram {
        self.store_seconds.with_label_values(&[op])
    }

    /// Sets `hikyaku_abtest_rate` of a variant, until [`Metrics::forget_abtest`].
    pub fn abtest_rate(&self, batch: &str, variant: &str, rate: f64) {
        let gauge = self.abtest_rate.with_label_values(&[batch, variant]);
        gauge.set(rate);
    }

    /// The test of a batch is over: it has no rates any more.
    pub fn forget_abtest(&self, batch: &str) {
        forget_in(&self.abtest_rate, "batch", batch);
    }

    fn forget(&self, destination: &str) {
        forget_in(&self.outcomes, "destination", destination);
        forget_in(&self.smtp_connections, "destination", destination);
        forget_in(&self.destination_limit, "destination", destination);
        forget_in(&self.destination_limit_base, "destination", destination);
        forget_in(&self.throttled, "destination", destination);
    }
}

/// Removes every series with this label: of a destination that lost its own, or of a test that is
/// over. What a destination counted is not added to `other`: there it would look like a burst.
fn forget_in<B: MetricVecBuilder>(family: &MetricVec<B>, label: &str, value: &str)
where
    MetricVec<B>: Collector,
{
    let collected = family.collect();
    let series = collected.iter().flat_map(|family| family.get_metric());
    for metric in series {
        let labels = metric.get_label().iter();
        let values: HashMap<&str, &str> = labels.map(|pair| (pair.name(), pair.value())).collect();
        if values.get(label) == Some(&value) {
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
        self.names.extend(families::PROCESS);
    }

    fn counters(&mut self, of: &families::Family) -> IntCounterVec {
        let counters = IntCounterVec::new(of.options(), of.labels).expect(CONSTANT);
        self.enter(of.name, &counters);
        counters
    }

    fn int_counter(&mut self, of: &families::Family) -> IntCounter {
        let counter = IntCounter::with_opts(of.options()).expect(CONSTANT);
        self.enter(of.name, &counter);
        counter
    }

    fn gauges(&mut self, of: &families::Family) -> IntGaugeVec {
        let gauges = IntGaugeVec::new(of.options(), of.labels).expect(CONSTANT);
        self.enter(of.name, &gauges);
        gauges
    }

    fn float_gauges(&mut self, of: &families::Family) -> GaugeVec {
        let gauges = GaugeVec::new(of.options(), of.labels).expect(CONSTANT);
        self.enter(of.name, &gauges);
        gauges
    }

    fn gauge(&mut self, of: &families::Family) -> Gauge {
        let gauge = Gauge::with_opts(of.options()).expect(CONSTANT);
        self.enter(of.name, &gauge);
        gauge
    }

    fn int_gauge(&mut self, of: &families::Family) -> IntGauge {
        let gauge = IntGauge::with_opts(of.options()).expect(CONSTANT);
        self.enter(of.name, &gauge);
        gauge
    }

    /// One that is 1 from the start.
    fn good(&mut self, of: &families::Family) -> IntGauge {
        let gauge = self.int_gauge(of);
        gauge.set(1);
        gauge
    }

    fn histogram(&mut self, of: &families::Family) -> Histogram {
        let histogram = Histogram::with_opts(of.histogram_options()).expect(CONSTANT);
        self.enter(of.name, &histogram);
        histogram
    }

    fn histograms(&mut self, of: &families::Family) -> HistogramVec {
        let histograms = HistogramVec::new(of.histogram_options(), of.labels).expect(CONSTANT);
        self.enter(of.name, &histograms);
        histograms
    }
}

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
        metrics.egress_source("ip1", true);
        metrics.abtest_rate("01JD", "A", 0.2);
        metrics.certificate_expiry("t.brand.example", 1);
        metrics.certificates("t.brand.example", CertificateOrigin::Acme);
        metrics.store_seconds("lease").observe(0.001);
        let open = metrics.connection(&there);
        let page = metrics.render();
        let typed: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        let mut named = Metrics::names();
        named.sort_unstable();
        assert_eq!(typed, named);
        let connections = "hikyaku_smtp_connections{destination=\"x.example\"}";
        assert_eq!(line(&page, connections), Some(format!("{connections} 1")));
        drop(open);
        metrics.forget_abtest("01JD");
        let page = metrics.render();
        assert_eq!(line(&page, "hikyaku_abtest_rate{"), None);
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
