//! Hits as a tracker hands them in, beside a running service.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use model::{Actor, Fact, Hit, HitKind, JournalId, MessageId, Timestamp, Verdict};
use service::clock::SystemClock;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{Shipment, Store as _};

use crate::harness::Service;

/// What a person's browser says.
pub(crate) const PERSON: &str =
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0";

/// The time, and never the same twice: what happens in one millisecond has no order.
pub(crate) fn now() -> Timestamp {
    static LAST: AtomicI64 = AtomicI64::new(0);
    let now = SystemClock::shared().now().millis();
    let after = |last: i64| Some(now.max(last + 1));
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after);
    Timestamp::from_millis(now.max(last.unwrap_or_else(|last| last) + 1))
}

/// Nothing speaks for a machine.
pub(crate) fn person() -> Verdict {
    Verdict {
        actor: Actor::Human,
        machine_reasons: Vec::new(),
        rules: 2,
    }
}

/// A person's click on the first link.
pub(crate) fn click(message: MessageId, at: Timestamp) -> Hit {
    Hit {
        kind: HitKind::Click,
        message,
        at,
        link: Some(0),
        target: Some("https://shop.example/".into()),
        user_agent: PERSON.into(),
        network: "203.0.113.0/24".into(),
        visitor: None,
        method: None,
        verdict: person(),
    }
}

/// A tracker's store and journal.
pub(crate) struct Tracker {
    store: SqliteStore,
    journal: JournalId,
    seq: AtomicU64,
}

impl Tracker {
    /// On the store of a service.
    pub(crate) async fn beside(service: &Service) -> Self {
        let options = SqliteOptions {
            path: service.home.store_file(),
            partitions: 1,
            role: Role::Tracker,
        };
        Self {
            store: SqliteStore::open(options).await.expect("a store"),
            journal: JournalId::new(now(), 7),
            seq: AtomicU64::new(0),
        }
    }

    /// Hands facts in, each of which the store knows.
    pub(crate) async fn ship(&self, facts: Vec<Fact>) {
        let number = |fact| (self.seq.fetch_add(1, Ordering::Relaxed) + 1, fact);
        let facts: Vec<_> = facts.into_iter().map(number).collect();
        let shipment = Shipment {
            journal: self.journal,
            through: self.seq.load(Ordering::Relaxed),
            facts,
            windows: Vec::new(),
            finished: Vec::new(),
            now: now(),
        };
        let shipped = self.store.ship(shipment).await.expect("shipped");
        assert_eq!(shipped.unknown, 0);
    }
}
