//! What the rules are written with: batches, nodes, journals, and a check of the accounts.

use crate::{
    Batch, BatchHead, EventQuery, LeaseRequest, LeasedRange, LeasedRecipient, MIXED, NewBatch,
    NewLot, RangeRef, RecipientQuery, RecipientRow, Result, Shipment, Shipped, Store, Want,
};
use model::{
    Actor, Attempt, AttemptDetail, AttemptResult, BatchId, Counters, Event, Fact, Hit, HitKind,
    JournalId, LotNumber, MessageId, Partition, Priority, Row, Seq, SuppressionReason, Timestamp,
    TrackingMode, Verdict,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// The time at which every rule begins.
pub(super) const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
/// How long leases last.
pub(super) const TTL: Duration = Duration::from_secs(45);

pub(super) fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

pub(super) fn id(number: u128) -> BatchId {
    BatchId::new(T0, number)
}

/// A batch to submit.
pub(super) struct Spec {
    pub(super) head: BatchHead,
    pub(super) emails: Vec<String>,
    /// Indices that are rejected: no address has them.
    pub(super) rejected: Vec<u32>,
    /// All in mixed lots.
    pub(super) mixed: bool,
    /// A recipient's own mode, by place among the addresses.
    pub(super) modes: BTreeMap<usize, TrackingMode>,
    /// A recipient's time zone, likewise.
    pub(super) zones: BTreeMap<usize, String>,
}

impl Spec {
    pub(super) fn new(number: u128, emails: Vec<String>) -> Self {
        Self {
            head: BatchHead {
                id: id(number),
                account: "acme".into(),
                campaign: Some("spring".into()),
                list: "news".into(),
                priority: Priority::Bulk,
                pool: None,
                rate: model::units::Rate::Unlimited,
                created_at: T0,
                release_at: T0,
                expires_at: None,
                tracking: TrackingMode::Individual,
                metadata: serde_json::json!({ "of": "batch", "n": number.to_string() }),
                held: false,
                window: None,
                guardrails: None,
                variants: None,
            },
            emails,
            rejected: Vec::new(),
            mixed: false,
            modes: BTreeMap::new(),
            zones: BTreeMap::new(),
        }
    }

    /// Addresses with their indices: rejected indices are left out.
    fn rows(&self) -> Vec<Row> {
        let mut index = 0;
        let mut rows = Vec::new();
        for (at, email) in self.emails.iter().enumerate() {
            while self.rejected.contains(&index) {
                index += 1;
            }
            rows.push(Row {
                index,
                email: email.parse().expect("an address"),
                name: None,
                prospect_id: Some(format!("p{index}").into()),
                vars: Some("{\"a\":1}".into()),
                metadata: Some(format!("{{\"row\":{index}}}").into()),
                tracking: self.modes.get(&at).copied(),
                time_zone: self.zones.get(&at).map(|zone| zone.as_str().into()),
            });
            index += 1;
        }
        rows
    }

    /// Its lots: by partition and domain, numbered as intake does.
    pub(super) fn lots(&self, partitions: u16) -> Vec<NewLot> {
        let mut groups: BTreeMap<(Partition, String), Vec<Row>> = BTreeMap::new();
        for row in self.rows() {
            let of = Partition::of(&self.head.account, &row.email.normalised(), partitions);
            let queue = if self.mixed {
                MIXED
            } else {
                row.email.domain()
            };
            groups.entry((of, queue.to_owned())).or_default().push(row);
        }
        let mut running = 0..;
        let mut lots = Vec::new();
        for ((partition, queue), rows) in groups {
            for rows in rows.chunks(crate::LOT_ROWS) {
                let number = running
                    .next()
                    .and_then(|number| LotNumber::new(partition, number));
                lots.push(NewLot {
                    number: number.expect("few lots"),
                    queue: queue.clone().into(),
                    rows: rows.to_vec(),
                    variants: Vec::new(),
                });
            }
        }
        lots
    }

    pub(super) fn committed(&self) -> NewBatch {
        NewBatch {
            head: self.head.clone(),
            content: format!("content of {}", self.head.id).into_bytes().into(),
            accepted: self.emails.len() as u64,
            rejected: self.rejected.len() as u64,
            call: None,
        }
    }

    /// Stages and commits it.
    pub(super) async fn submit(&self, store: &dyn Store, now: Timestamp) -> Result<BatchId> {
        for lot in self.lots(store.partitions()) {
            store.stage_lots(self.head.id, vec![lot]).await?;
        }
        store.commit_batch(self.committed(), now).await?;
        Ok(self.head.id)
    }
}

/// Addresses `n0@domain`, `n1@domain` ….
pub(super) fn people(count: usize, domain: &str) -> Vec<String> {
    (0..count).map(|n| format!("n{n}@{domain}")).collect()
}

/// As [`people`], all in partition 0, so that up to 500 make one lot.
pub(super) fn neighbours(store: &dyn Store, count: usize, domain: &str) -> Vec<String> {
    (0..)
        .map(|n| format!("m{n}@{domain}"))
        .filter(|email| Partition::of("acme", email, store.partitions()) == Partition(0))
        .take(count)
        .collect()
}

/// A process with a journal.
pub(super) struct Node {
    pub(super) journal: JournalId,
    seq: Seq,
}

impl Node {
    pub(super) fn new(number: u128) -> Self {
        Self {
            journal: JournalId::new(T0, number),
            seq: 0,
        }
    }

    pub(super) async fn lease(
        &self,
        store: &dyn Store,
        now: Timestamp,
        queue: &str,
        rows: u32,
    ) -> Result<Vec<LeasedRange>> {
        self.lease_want(store, now, Want::of(queue, rows)).await
    }

    pub(super) async fn lease_want(
        &self,
        store: &dyn Store,
        now: Timestamp,
        want: Want,
    ) -> Result<Vec<LeasedRange>> {
        let request = LeaseRequest {
            node: self.journal,
            now,
            ttl: TTL,
            wants: vec![want],
        };
        store.lease(request).await
    }

    /// Numbers facts as the journal does.
    pub(super) fn write(&mut self, facts: Vec<Fact>) -> Vec<(Seq, Fact)> {
        facts
            .into_iter()
            .map(|fact| {
                self.seq += 1;
                (self.seq, fact)
            })
            .collect()
    }

    /// How many facts it has numbered.
    pub(super) fn written(&self) -> Seq {
        self.seq
    }

    pub(super) fn shipment(&self, facts: Vec<(Seq, Fact)>, now: Timestamp) -> Shipment {
        Shipment {
            journal: self.journal,
            through: facts.last().map_or(0, |(seq, _)| *seq),
            facts,
            windows: Vec::new(),
            finished: Vec::new(),
            now,
        }
    }

    /// Writes facts and ships them.
    pub(super) async fn report(
        &mut self,
        store: &dyn Store,
        facts: Vec<Fact>,
        now: Timestamp,
    ) -> Result<Shipped> {
        let facts = self.write(facts);
        store.ship(self.shipment(facts, now)).await
    }

    /// Says that it is done with a range.
    pub(super) async fn finish(
        &self,
        store: &dyn Store,
        range: RangeRef,
        now: Timestamp,
    ) -> Result<Shipped> {
        let mut shipment = self.shipment(Vec::new(), now);
        shipment.finished.push(range);
        store.ship(shipment).await
    }

    /// Moves a window.
    pub(super) async fn advance(
        &self,
        store: &dyn Store,
        range: RangeRef,
        window: u32,
        now: Timestamp,
    ) -> Result<Shipped> {
        let mut shipment = self.shipment(Vec::new(), now);
        shipment.windows.push((range, window));
        store.ship(shipment).await
    }
}

/// The outcome of the next attempt at a leased recipient.
pub(super) fn outcome(
    batch: BatchId,
    item: &LeasedRecipient,
    result: AttemptResult,
    at: Timestamp,
) -> Fact {
    let plain = AttemptDetail {
        smtp_code: Some(if result == AttemptResult::Delivered {
            250
        } else {
            451
        }),
        reply: format!("reply to {}", item.row.email).into(),
        host: "mx.x.example (192.0.2.1)".into(),
        destination: "x.example".into(),
        source: "default".into(),
        ..AttemptDetail::default()
    };
    Fact::Attempt(Box::new(Attempt {
        message: MessageId {
            batch,
            index: item.row.index,
        },
        place: item.place,
        number: item.attempts + 1,
        at,
        dot_at: Some(at),
        result,
        detail: plain,
        suppress: None,
    }))
}

/// Changes an attempt.
pub(super) fn with(fact: Fact, change: impl FnOnce(&mut Attempt)) -> Fact {
    match fact {
        Fact::Attempt(mut attempt) => {
            change(&mut attempt);
            Fact::Attempt(attempt)
        }
        other @ (Fact::Hit(_)
        | Fact::Page(_)
        | Fact::Revision(_)
        | Fact::Reply(_)
        | Fact::Complaint(_)) => other,
    }
}

pub(super) fn suppressing(fact: Fact, reason: SuppressionReason) -> Fact {
    with(fact, |attempt| attempt.suppress = Some(reason))
}

pub(super) fn later(retry_at: Timestamp) -> AttemptResult {
    AttemptResult::TemporaryError {
        retry_at,
        ambiguous: false,
    }
}

/// Outcomes of all items of ranges.
pub(super) fn outcomes(ranges: &[LeasedRange], result: AttemptResult, at: Timestamp) -> Vec<Fact> {
    let of = |range: &LeasedRange| {
        let batch = range.batch.id;
        range
            .items
            .iter()
            .map(move |item| outcome(batch, item, result, at))
            .collect::<Vec<_>>()
    };
    ranges.iter().flat_map(of).collect()
}

pub(super) fn hit(batch: BatchId, index: u32, kind: HitKind, actor: Actor, at: Timestamp) -> Fact {
    Fact::Hit(Box::new(Hit {
        kind,
        message: MessageId { batch, index },
        at,
        link: (kind == HitKind::Click).then_some(2),
        target: (kind == HitKind::Click).then(|| "https://x.example/".into()),
        user_agent: "agent".into(),
        network: "192.0.2.0/24".into(),
        visitor: None,
        method: (kind == HitKind::Unsubscribe).then(|| "one_click".into()),
        verdict: Verdict {
            actor,
            machine_reasons: Vec::new(),
            rules: 1,
        },
    }))
}

/// The addresses in ranges, in order.
pub(super) fn emails(ranges: &[LeasedRange]) -> Vec<String> {
    let items = ranges.iter().flat_map(|range| &range.items);
    items.map(|item| item.row.email.to_string()).collect()
}

pub(super) fn sorted(mut list: Vec<String>) -> Vec<String> {
    list.sort();
    list
}

/// The batch, its accounts checked: `accepted` is the sum of the statuses, and the rows say the same.
pub(super) async fn checked(store: &dyn Store, batch: BatchId) -> Result<Batch> {
    let found = store.batch(batch).await?.expect("the batch is there");
    let counters = found.counters;
    assert_eq!(
        counters.statuses(),
        counters.accepted,
        "the identity: {counters:?}"
    );
    let mut from_rows = Counters {
        accepted: counters.accepted,
        ..Counters::default()
    };
    for row in all_rows(store, batch).await? {
        *from_rows.of(row.status) += 1;
    }
    assert_eq!(from_rows.statuses(), from_rows.accepted, "rows of {batch}");
    for &status in model::Status::ALL {
        let (mut a, mut b) = (counters, from_rows);
        assert_eq!(a.of(status), b.of(status), "{status} in {counters:?}");
    }
    Ok(found)
}

pub(super) fn query(batch: BatchId) -> RecipientQuery {
    RecipientQuery {
        batch,
        from_index: 0,
        limit: 1_000,
        status: None,
        opened: None,
        clicked: None,
        domain: None,
        with_variant: false,
    }
}

/// All recipients that a query finds, page by page.
pub(super) async fn rows_of(
    store: &dyn Store,
    mut query: RecipientQuery,
) -> Result<Vec<RecipientRow>> {
    let mut rows = Vec::new();
    loop {
        let page = store.recipients(query.clone()).await?;
        rows.extend(page.items);
        match page.next {
            Some(next) => query.from_index = next.parse().expect("an index"),
            None => return Ok(rows),
        }
    }
}

pub(super) async fn all_rows(store: &dyn Store, batch: BatchId) -> Result<Vec<RecipientRow>> {
    rows_of(store, query(batch)).await
}

/// All events that a query finds, `limit` at a time.
pub(super) async fn events_of(store: &dyn Store, mut query: EventQuery) -> Result<Vec<Event>> {
    let mut events = Vec::new();
    loop {
        let page = store.events(query.clone()).await?;
        let ended = page.events.is_empty();
        events.extend(page.events);
        query.after = Some(page.next);
        if ended {
            return Ok(events);
        }
    }
}

pub(super) async fn all_events(store: &dyn Store) -> Result<Vec<Event>> {
    let query = EventQuery {
        limit: 1_000,
        ..EventQuery::default()
    };
    events_of(store, query).await
}

/// The types of events, as words.
pub(super) fn kinds(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.kind.as_str()).collect()
}
