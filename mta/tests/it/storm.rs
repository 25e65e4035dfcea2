//! Everything at once through the API, while the daemon sends for real: at every reading the
//! counters add up, and in the end every recipient has one final status and got one copy at most.
//!
//! `HIKYAKU_SEED` repeats what is asked for, not how it interleaves; a failure prints its seed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use hyper::Method;
use serde_json::{Value, json};
use smtp::ServerEvent;
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

use crate::harness::{Caller, Home, Service, batch};

const CALLERS: u64 = 4;
/// Calls of each.
const CALLS: u32 = 50;
const PATIENCE: Duration = Duration::from_secs(60);

/// Suppressed before the storm and for good.
const NEVER: &str = "never@d0.example";
const STATUSES: [&str; 8] = [
    "scheduled",
    "queued",
    "temporary_error",
    "delivered",
    "bounce",
    "failed",
    "suppressed",
    "cancelled",
];

/// What a reading said of a batch.
struct Seen {
    state: String,
    counters: BTreeMap<String, u64>,
}

impl Seen {
    fn of(batch: &Value) -> Self {
        let counters = batch["counters"].as_object().expect("counters");
        let counters = counters
            .iter()
            .map(|(name, count)| (name.clone(), count.as_u64().expect("a count")))
            .collect();
        let state = batch["state"].as_str().expect("a state").to_owned();
        Self { state, counters }
    }

    fn count(&self, name: &str) -> u64 {
        self.counters[name]
    }

    fn open(&self) -> u64 {
        STATUSES[..3].iter().map(|name| self.count(name)).sum()
    }
}

/// What all callers know.
#[derive(Default)]
struct Known {
    /// Recipients submitted, and of the newest reading how many were open and delivered.
    batches: BTreeMap<String, (u64, u64, u64)>,
}

struct Storm {
    api: Caller,
    known: Mutex<Known>,
}

impl Storm {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The promises that hold at every reading. `asked` is what was known before it was asked for:
    /// readings of several callers may overtake one another.
    fn check(&self, batch: &Value, asked: Option<(u64, u64, u64)>) -> Seen {
        let seen = Seen::of(batch);
        let sum: u64 = STATUSES.iter().map(|name| seen.count(name)).sum();
        assert_eq!(seen.count("accepted"), sum, "{batch}");
        if seen.state == "completed" {
            assert_eq!(seen.open(), 0, "{batch}");
        }
        if let Some((submitted, open, delivered)) = asked {
            assert_eq!(sum, submitted, "{batch}");
            assert!(seen.open() <= open, "back to open: {batch}");
            assert!(seen.count("delivered") >= delivered, "undelivered: {batch}");
        }
        let id = batch["id"].as_str().expect("an id");
        if let Some(known) = self.known().batches.get_mut(id) {
            known.1 = known.1.min(seen.open());
            known.2 = known.2.max(seen.count("delivered"));
        }
        seen
    }

    fn some_batch(&self, rng: &mut fastrand::Rng) -> Option<(String, (u64, u64, u64))> {
        let known = self.known();
        let at = rng.usize(..known.batches.len().max(1));
        known
            .batches
            .iter()
            .nth(at)
            .map(|(id, known)| (id.clone(), *known))
    }

    async fn call(&self, rng: &mut fastrand::Rng) {
        match rng.u8(..20) {
            0..=3 => self.submit(rng).await,
            4..=6 => self.change(rng, "pause").await,
            7..=9 => self.change(rng, "resume").await,
            10 => self.change(rng, "cancel").await,
            11..=13 => self.suppress(rng).await,
            14..=17 => self.read(rng).await,
            _ => self.list().await,
        }
    }

    async fn submit(&self, rng: &mut fastrand::Rng) {
        let count = rng.usize(1..40);
        let mut people: BTreeSet<String> = (0..count).map(|_| somebody(rng)).collect();
        if rng.bool() {
            people.insert(NEVER.into());
        }
        let to: Value = people.iter().map(|email| json!({"email": email})).collect();
        let accepted = self.api.submit(&batch(&to)).await;
        assert_eq!(accepted.status, 202, "{accepted:?}");
        let accepted = accepted.json();
        let count = u64::try_from(people.len()).expect("few");
        assert_eq!(accepted["accepted"], count);
        let id = accepted["id"].as_str().expect("an id").to_owned();
        self.known().batches.insert(id, (count, count, 0));
    }

    async fn change(&self, rng: &mut fastrand::Rng, what: &str) {
        let Some((id, asked)) = self.some_batch(rng) else {
            return;
        };
        let answer = self.api.post(&format!("/v1/batches/{id}/{what}")).await;
        let batch = answer.json();
        match answer.status.as_u16() {
            200 => {
                let seen = self.check(&batch, Some(asked));
                if what == "cancel" {
                    assert_eq!(seen.state, "cancelled");
                    assert!(batch["in_flight"].is_u64() && batch["cancelled"].is_u64());
                }
            }
            409 => assert_eq!(batch["code"], "invalid_state"),
            other => panic!("{what}: {other} {batch}"),
        }
    }

    async fn suppress(&self, rng: &mut fastrand::Rng) {
        let path = format!("/v1/suppressions/{}", somebody(rng));
        let (method, status) = if rng.bool() {
            (Method::PUT, 200)
        } else {
            (Method::DELETE, 204)
        };
        let answer = self.api.call(method, &path, &[], Bytes::new()).await;
        assert_eq!(answer.status, status, "{answer:?}");
    }

    async fn read(&self, rng: &mut fastrand::Rng) {
        if let Some((id, asked)) = self.some_batch(rng) {
            let batch = self.api.get(&format!("/v1/batches/{id}")).await;
            assert_eq!(batch.status, 200);
            self.check(&batch.json(), Some(asked));
        }
    }

    async fn list(&self) {
        let page = self.api.get("/v1/batches?limit=1000").await.json();
        for batch in page["items"].as_array().expect("items") {
            self.check(batch, None);
        }
    }

    /// Lets everything go on, and returns when it has ended: what each batch came to.
    async fn settle(&self) -> BTreeMap<String, Seen> {
        let ids: Vec<_> = self.known().batches.keys().cloned().collect();
        let mut ended = BTreeMap::new();
        for id in ids {
            self.api.post(&format!("/v1/batches/{id}/resume")).await;
            loop {
                let batch = self.api.get(&format!("/v1/batches/{id}")).await.json();
                let asked = self.known().batches[&id];
                let seen = self.check(&batch, Some(asked));
                if seen.open() == 0 {
                    assert!(["completed", "cancelled"].contains(&seen.state.as_str()));
                    ended.insert(id, seen);
                    break;
                }
                // The next event tells of it, or another look does.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        ended
    }

    /// Every event there is.
    async fn events(&self) -> Vec<Value> {
        let (mut all, mut after) = (Vec::new(), String::new());
        loop {
            let page = self
                .api
                .get(&format!("/v1/events?limit=1000{after}"))
                .await
                .json();
            let events = page["events"].as_array().expect("events");
            if events.is_empty() {
                return all;
            }
            all.extend_from_slice(events);
            after = format!("&after={}", page["next"].as_str().expect("a cursor"));
        }
    }
}

fn somebody(rng: &mut fastrand::Rng) -> String {
    format!("u{}@d{}.example", rng.u8(..60), rng.u8(..5))
}

/// Some are unknown, some have to be asked twice.
fn temper() -> Temper {
    let asked = Mutex::new(BTreeSet::new());
    Temper::accepting().rule(move |question| {
        if question.event != ServerEvent::Rcpt {
            return None;
        }
        let first = || {
            let key = format!("{} {}", question.reverse_path, question.recipient);
            let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
            asked.insert(key)
        };
        match question.recipient {
            unknown if unknown.starts_with("u13@") => {
                Some(Answer::reply(550, "5.7.1 Not by your policy"))
            }
            slow if slow.starts_with("u2") && first() => Some(Answer::reply(451, "4.3.0 Not now")),
            _ => None,
        }
    })
}

async fn started(peer: &SmtpPeer) -> Service {
    let home = Home::new("");
    let shaping = format!(
        "[default]\nrate = \"unlimited\"\nconnections = 2\nretry = [\"200ms\"]\nexpire = \"60s\"\n\
         [mx]\n\"*\" = \"{}\"\n",
        peer.address()
    );
    std::fs::write(home.config_file().with_file_name("shaping.toml"), shaping).expect("written");
    Service::at(home).await
}

#[tokio::test]
async fn everything_at_once_and_every_reading_adds_up() {
    let seed = std::env::var("HIKYAKU_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("HIKYAKU_SEED={seed}");
    let peer = SmtpPeer::start(temper()).await.expect("a peer");
    let service = started(&peer).await;
    let storm = Storm {
        api: service.api.clone(),
        known: Mutex::default(),
    };
    let path = format!("/v1/suppressions/{NEVER}");
    let put = storm.api.call(Method::PUT, &path, &[], Bytes::new()).await;
    assert_eq!(put.status, 200);

    let callers = (0..CALLERS).map(async |caller| {
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(caller));
        storm.submit(&mut rng).await;
        for _ in 0..CALLS {
            storm.call(&mut rng).await;
        }
    });
    join_all(callers).await;
    let ended = tokio::time::timeout(PATIENCE, storm.settle())
        .await
        .expect("every recipient comes to an end");

    // Each message that the peer took is delivered, once; and nobody was written to who must not.
    let received: Vec<String> = peer
        .messages()
        .into_iter()
        .map(|message| {
            assert_ne!(message.recipients, [NEVER]);
            message.reverse_path
        })
        .collect();
    let distinct: BTreeSet<_> = received.iter().collect();
    let delivered: u64 = ended.values().map(|seen| seen.count("delivered")).sum();
    assert_eq!(received.len(), distinct.len(), "somebody got two copies");
    assert_eq!(u64::try_from(received.len()).expect("few"), delivered);
    assert!(delivered > 0);

    // The events tell the same.
    let mut told: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut final_events = BTreeSet::new();
    for event in storm.events().await {
        let (kind, batch) = (&event["type"], &event["batch_id"]);
        let (Some(kind), Some(batch)) = (kind.as_str(), batch.as_str()) else {
            continue;
        };
        *told.entry((batch.to_owned(), kind.to_owned())).or_default() += 1;
        if let (Some(message), true) = (
            event["message_id"].as_str(),
            kind != "email.temporary_error",
        ) {
            assert!(
                final_events.insert(message.to_owned()),
                "ended twice: {event}"
            );
        }
    }
    for (id, seen) in &ended {
        for (kind, counter) in [
            ("email.delivered", "delivered"),
            ("email.bounced", "bounce"),
            ("email.failed", "failed"),
            ("email.suppressed", "suppressed"),
            ("email.cancelled", "cancelled"),
        ] {
            let key = (id.clone(), kind.to_owned());
            let told = told.get(&key).copied().unwrap_or(0);
            assert_eq!(told, seen.count(counter), "{id} {kind}");
        }
    }
    service.stop().await;
    peer.shutdown().await;
}
