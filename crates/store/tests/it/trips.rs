//! How often a call waits for a Redis, by the server's own count of what it read: what is felt where
//! the server is far, and no clock can tell here. And what a connection that died costs.

use crate::fixture::Redis;
use futures_util::future::join_all;
use model::JournalId;
use std::time::Duration;
use store::sqlite::Role;
use store::{EventQuery, Note, Release, Shipment, Store, StoreError};
use testkit::redis::RedisServer;

use crate::redis::{T0, delivered, lease, submit};

const MINUTE: Duration = Duration::from_mins(1);

/// A number of `INFO`.
fn told(info: &str, name: &str) -> u64 {
    let lines = info.lines();
    let found = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    found
        .filter_map(|number| number.trim().parse().ok())
        .next_back()
        .unwrap_or(0)
}

/// What the server had to do since it was asked last. It reads at most 16 KiB at once, so what is
/// asked here is small.
struct Watch<'a> {
    server: &'a RedisServer,
    reads: u64,
}

impl<'a> Watch<'a> {
    fn new(server: &'a RedisServer) -> Self {
        let mut watch = Self { server, reads: 0 };
        watch.reads();
        watch
    }

    fn reads(&mut self) -> u64 {
        let info = self.server.ask(&["INFO", "stats"]).expect("an answer");
        let before = std::mem::replace(&mut self.reads, told(&info, "total_reads_processed"));
        // This question, and the end of the connection of the one before.
        self.reads.saturating_sub(before).saturating_sub(2)
    }

    /// A call is answered in so many requests at most, each read at once however much it asks for.
    async fn at_most<T: std::fmt::Debug>(
        &mut self,
        what: &str,
        requests: u64,
        call: impl Future<Output = store::Result<T>>,
    ) -> T {
        self.reads();
        let answered = call.await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let reads = self.reads();
        assert!(
            reads <= requests,
            "{what}: {reads} requests, not {requests}"
        );
        assert!(reads > 0, "{what} was not asked of the server");
        answered
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_asks_seldom_and_nothing_but_what_it_wants_to_know() {
    let fixture = Redis::single(1);
    let server = fixture.server().expect("one server");
    let store = fixture.open(Role::Mta).await.expect("it opens");
    let batch = submit(&store, 1, 1_000).await.expect("submitted");
    // Rows and heads, which never change, are read once; so are the scripts.
    let first = lease(&store, 1, 600, MINUTE).await.expect("a lease");
    store
        .ship(delivered(1, &mut 0, &first))
        .await
        .expect("shipped");
    store.backlog(T0, None, 1).await.expect("a backlog");
    let cursor = store.control(None).await.expect("a cursor").next;
    let asked = || server.ask(&["INFO", "commandstats"]).expect("an answer");
    server.ask(&["CONFIG", "RESETSTAT"]).expect("reset");

    let mut watch = Watch::new(server);
    let node = JournalId::new(T0, 1);
    let backlog = store.backlog(T0, None, 100);
    assert_eq!(watch.at_most("backlog", 3, backlog).await.len(), 1);
    watch.at_most("totals", 2, store.totals(T0)).await;
    // Two of them at once: what has begun, and what there is.
    let leased = lease(&store, 1, 10, MINUTE);
    let leased = watch.at_most("a lease", 4, leased).await;
    assert_eq!(leased.len(), 1);
    let renewed = store.renew(node, T0, MINUTE);
    watch.at_most("a renewal", 3, renewed).await;
    let shipped = store.ship(delivered(1, &mut 600, &leased));
    watch.at_most("a shipment", 2, shipped).await;
    let back = lease(&store, 1, 50, MINUTE).await.expect("a lease");
    let back = back.iter().map(|of| Release {
        range: of.range,
        due_at: None,
        requeue: Vec::new(),
    });
    let released = store.release(back.collect(), T0);
    watch.at_most("handing back", 3, released).await;
    let idle = Shipment {
        journal: node,
        facts: Vec::new(),
        through: 611,
        windows: Vec::new(),
        finished: Vec::new(),
        now: T0,
    };
    watch.at_most("an idle shipment", 2, store.ship(idle)).await;
    let feed = store.control(Some(cursor));
    watch.at_most("the control feed", 1, feed).await;
    let query = EventQuery {
        limit: 100,
        ..EventQuery::default()
    };
    let page = watch.at_most("events", 2, store.events(query)).await;
    assert_eq!(page.events.len(), 100);
    let found = watch.at_most("a batch", 2, store.batch(batch)).await;
    assert_eq!(found.expect("there").counters.delivered, 610);
    let note = |key: usize| Note {
        kind: "person".into(),
        key: key.to_string().into(),
        value: Box::from([1]),
        expires_at: None,
    };
    let notes = (0..50).map(note).collect();
    watch.at_most("notes", 2, store.put_notes(notes, T0)).await;

    let stats = asked();
    for test in ["ping", "unwatch"] {
        assert!(!stats.contains(&format!("cmdstat_{test}:")), "{stats}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_died_fail_one_call_and_not_one_each() {
    let fixture = Redis::single(1);
    let server = fixture.server().expect("one server");
    let store = fixture.open(Role::Mta).await.expect("it opens");
    submit(&store, 1, 10).await.expect("submitted");
    let cursor = store.control(None).await.expect("a cursor").next;
    let read = || store.control(Some(cursor.clone()));
    for _ in 0..3 {
        // All of them are asked before any is answered: each needs a connection of its own.
        let pause = ["CLIENT", "PAUSE", "200"];
        server.ask(&pause).expect("a pause");
        for page in join_all((0..8).map(|_| read())).await {
            page.expect("a page");
        }
        // As a server does that ends; all of them were answered a moment ago.
        let killed = server.ask(&["CLIENT", "KILL", "TYPE", "normal"]);
        let killed: u32 = killed.expect("an answer").parse().expect("a number");
        assert!(killed >= 8, "{killed} connections");
        let mut failed = 0;
        for _ in 0..10 {
            match read().await {
                Ok(_) => {}
                Err(StoreError::Unavailable(_)) => failed += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(failed <= 1, "{failed} calls failed");
    }
    // What was written on one that had died was not written, or all of it.
    server
        .ask(&["CLIENT", "KILL", "TYPE", "normal"])
        .expect("killed");
    let leased = lease(&store, 1, 10, MINUTE).await.unwrap_or_default();
    let again = lease(&store, 2, 10, MINUTE).await.expect("a lease");
    let held = |of: &[store::LeasedRange]| of.iter().map(|of| of.items.len()).sum::<usize>();
    assert_eq!(held(&leased) + held(&again), 10);
}
