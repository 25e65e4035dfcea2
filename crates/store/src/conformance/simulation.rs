//! A seeded storm of everything at once, compared at every step with a model of the rules that is
//! too simple to be wrong.
//!
//! `HIKYAKU_SEED` repeats a run; a failure prints its seed.

use super::Fixture;
use super::support::*;
use crate::{BatchChange, ChangeOutcome, LeasedRange, Release, Result, Store, Suppression};
use model::{
    AttemptResult, BatchId, BatchState, Counters, Fact, MessageId, Seq, Status, SuppressionReason,
    Timestamp,
};
use std::collections::{BTreeMap, BTreeSet};

const STEPS: u32 = 400;
const NODES: u128 = 3;
const DOMAINS: [&str; 3] = ["x.example", "y.example", "z.example"];

/// What the model knows of a recipient.
#[derive(Debug, Clone)]
struct Person {
    email: String,
    status: Status,
    attempts: u8,
    delivered: bool,
    /// Not before this.
    due_at: Timestamp,
    /// Somebody may have started it and never said what came of it.
    doubtful: bool,
}

/// A range that a node believes to hold.
struct Holding {
    node: usize,
    range: LeasedRange,
    until: Timestamp,
    window: u32,
    reported: BTreeSet<u32>,
}

struct Storm {
    rng: fastrand::Rng,
    now: Timestamp,
    nodes: Vec<Node>,
    /// What each node wrote and not yet shipped, and what it shipped.
    unshipped: Vec<Vec<(Seq, Fact)>>,
    shipped: Vec<Vec<(Seq, Fact)>>,
    holdings: Vec<Holding>,
    people: BTreeMap<MessageId, Person>,
    batches: BTreeMap<BatchId, BatchState>,
    suppressed: BTreeSet<String>,
    /// Nodes of which leases have run out: what these would have back depends on who came first.
    lapsed: BTreeSet<usize>,
    duplicates: usize,
}

/// Thousands of random steps; after each the counters are the model's.
pub async fn a_storm_agrees_with_a_simple_model(fixture: &dyn Fixture) -> Result<()> {
    let seed = std::env::var("HIKYAKU_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("HIKYAKU_SEED={seed}");
    let mut store = fixture.mta().await;
    let mut storm = Storm::new(seed);
    for step in 0..STEPS {
        if step % 97 == 96 {
            drop(store);
            store = fixture.mta().await;
        }
        storm.step(&*store).await?;
        storm.compare(&*store, step % 20 == 19).await?;
    }
    storm.settle(&*store).await
}

impl Storm {
    fn new(seed: u64) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            now: T0,
            nodes: (0..NODES).map(Node::new).collect(),
            unshipped: (0..NODES).map(|_| Vec::new()).collect(),
            shipped: (0..NODES).map(|_| Vec::new()).collect(),
            holdings: Vec::new(),
            people: BTreeMap::new(),
            batches: BTreeMap::new(),
            suppressed: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            duplicates: 0,
        }
    }

    fn some_node(&mut self) -> usize {
        self.rng.usize(..self.nodes.len())
    }

    async fn step(&mut self, store: &dyn Store) -> Result<()> {
        match self.rng.u8(..32) {
            0..=2 => self.submit(store).await,
            3..=9 => self.lease(store).await,
            10..=17 => {
                self.write();
                Ok(())
            }
            18..=22 => self.ship(store).await,
            23 => self.ship_again(store).await,
            24 => self.give_up(store).await,
            26 => self.hand_back(store).await,
            27 => self.renew(store).await,
            28 => self.change(store).await,
            29 => self.suppress(store).await,
            25 | 30 => self.restart(store).await,
            _ => {
                let by = secs(self.rng.u64(1..60));
                self.pass(by);
                Ok(())
            }
        }
    }

    /// Time goes by; whoever did not renew has lost what it held.
    fn pass(&mut self, by: std::time::Duration) {
        self.now = self.now + by;
    }

    async fn submit(&mut self, store: &dyn Store) -> Result<()> {
        if self.batches.len() >= 12 {
            return Ok(());
        }
        let number = self.batches.len() as u128;
        let count = self.rng.usize(1..60);
        let emails: BTreeSet<String> = (0..count)
            .map(|_| {
                format!(
                    "n{}@{}",
                    self.rng.u8(..40),
                    self.rng.choice(DOMAINS).unwrap_or("x.example")
                )
            })
            .collect();
        let mut spec = Spec::new(number, emails.into_iter().collect());
        spec.mixed = self.rng.u8(..4) == 0;
        let batch = spec.submit(store, self.now).await?;
        self.batches.insert(batch, BatchState::InProgress);
        for (index, email) in (0..).zip(&spec.emails) {
            let person = Person {
                email: email.clone(),
                status: Status::Queued,
                attempts: 0,
                delivered: false,
                due_at: T0,
                doubtful: false,
            };
            self.people.insert(MessageId { batch, index }, person);
        }
        Ok(())
    }

    fn queue(&mut self) -> &'static str {
        match self.rng.usize(..4) {
            3 => crate::MIXED,
            at => DOMAINS[at],
        }
    }

    async fn lease(&mut self, store: &dyn Store) -> Result<()> {
        let (node, queue, rows) = (self.some_node(), self.queue(), self.rng.u32(1..120));
        let leased = self.nodes[node].lease(store, self.now, queue, rows).await?;
        self.receive(store, node, leased, false).await
    }

    /// A node takes ranges over; what it is handed must be right.
    async fn receive(
        &mut self,
        store: &dyn Store,
        node: usize,
        leased: Vec<LeasedRange>,
        own: bool,
    ) -> Result<()> {
        self.expire();
        for range in leased {
            let state = self.batches[&range.batch.id];
            assert!(
                own || state == BatchState::InProgress,
                "{state} is not to be sent"
            );
            for item in &range.items {
                let message = MessageId {
                    batch: range.batch.id,
                    index: item.row.index,
                };
                let person = &self.people[&message];
                // Whom a former holder reported since is no longer its present holder's to send,
                // though that one cannot know yet.
                let held = |holding: &Holding| holding.open(message, person.attempts);
                assert!(!self.holdings.iter().any(held), "{message} is held already");
                assert!(!person.status.is_final(), "{message} is {}", person.status);
                assert_eq!(person.attempts, item.attempts, "{message}");
                assert!(own || person.due_at <= self.now, "{message} is not due");
                assert_eq!(person.doubtful, item.maybe_started, "{message}");
                assert!(
                    !self.suppressed.contains(&person.email),
                    "{message} is suppressed"
                );
            }
            self.holdings.push(Holding {
                node,
                until: range.expires_at,
                window: range.window,
                reported: BTreeSet::new(),
                range,
            });
        }
        self.see_suppressed(store).await
    }

    /// Who was ended at a lease had to be suppressed.
    async fn see_suppressed(&mut self, store: &dyn Store) -> Result<()> {
        for &batch in self.batches.keys() {
            let query = crate::RecipientQuery {
                status: Some(Status::Suppressed),
                ..query(batch)
            };
            for row in rows_of(store, query).await? {
                let Some(person) = self.people.get_mut(&MessageId {
                    batch,
                    index: row.row.index,
                }) else {
                    continue;
                };
                if person.status != Status::Suppressed {
                    assert!(self.suppressed.contains(&person.email) && !person.status.is_final());
                    person.status = Status::Suppressed;
                }
            }
        }
        self.complete();
        Ok(())
    }

    /// Leases that have run out: what their windows held unreported is in doubt.
    fn expire(&mut self) {
        let now = self.now;
        let (lost, kept) = std::mem::take(&mut self.holdings)
            .into_iter()
            .partition(|holding| holding.until <= now);
        self.holdings = kept;
        let lost: Vec<Holding> = lost;
        for holding in lost {
            self.lapsed.insert(holding.node);
            self.doubt(&holding);
        }
    }

    fn doubt(&mut self, holding: &Holding) {
        for item in holding
            .range
            .items
            .iter()
            .take(usize::try_from(holding.window).unwrap_or(0))
        {
            let message = MessageId {
                batch: holding.range.batch.id,
                index: item.row.index,
            };
            if let Some(person) = self.people.get_mut(&message)
                && !person.status.is_final()
                && person.attempts == item.attempts
            {
                person.doubtful = true;
            }
        }
    }

    /// A node reports something of what it holds, or held: to its journal first.
    fn write(&mut self) {
        if self.holdings.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.holdings.len());
        let count = self.rng.usize(1..30);
        let (now, rng) = (self.now, &mut self.rng);
        let holding = &mut self.holdings[at];
        let window = usize::try_from(holding.window).unwrap_or(0);
        let mut facts = Vec::new();
        for item in holding.range.items.iter().take(window) {
            if facts.len() >= count || !holding.reported.insert(item.offset) {
                continue;
            }
            let result = match rng.u8(..10) {
                0..=4 => AttemptResult::Delivered,
                5..=7 => later(now + secs(rng.u64(1..200))),
                8 => AttemptResult::Bounce,
                _ => AttemptResult::Failed,
            };
            facts.push(outcome(holding.range.batch.id, item, result, now));
        }
        let facts = self.nodes[holding.node].write(facts);
        self.unshipped[holding.node].extend(facts);
    }

    async fn ship(&mut self, store: &dyn Store) -> Result<()> {
        let node = self.some_node();
        self.ship_of(store, node).await
    }

    async fn ship_of(&mut self, store: &dyn Store, node: usize) -> Result<()> {
        self.expire();
        let facts = std::mem::take(&mut self.unshipped[node]);
        let mut shipment = self.nodes[node].shipment(facts.clone(), self.now);
        let mut done = Vec::new();
        for holding in self
            .holdings
            .iter_mut()
            .filter(|holding| holding.node == node)
        {
            let count = u32::try_from(holding.range.items.len()).unwrap_or(0);
            let reported = u32::try_from(holding.reported.len()).unwrap_or(0);
            holding.window = holding.window.max((reported + crate::WINDOW).min(count));
            shipment.windows.push((holding.range.range, holding.window));
            if reported == count {
                shipment.finished.push(holding.range.range);
                done.push(holding.range.range);
            }
        }
        let shipped = store.ship(shipment).await?;
        assert_eq!((shipped.unknown, shipped.repeated), (0, 0));
        self.duplicates = 0;
        for (_, fact) in &facts {
            self.apply(fact);
        }
        assert_eq!(shipped.duplicates.len(), self.duplicates);
        self.holdings
            .retain(|holding| !done.contains(&holding.range.range));
        self.shipped[node].extend(facts);
        self.complete();
        Ok(())
    }

    /// A journal comes once more, from some place on.
    async fn ship_again(&mut self, store: &dyn Store) -> Result<()> {
        let node = self.some_node();
        let all = &self.shipped[node];
        let from = self.rng.usize(..=all.len());
        let facts = all[from..].to_vec();
        let count = facts.len() as u64;
        let shipped = store
            .ship(self.nodes[node].shipment(facts, self.now))
            .await?;
        assert_eq!((shipped.repeated, shipped.duplicates.len()), (count, 0));
        Ok(())
    }

    /// The rules, as a person would say them.
    fn apply(&mut self, fact: &Fact) {
        let Fact::Attempt(attempt) = fact else { return };
        let cancelled = self.batches[&attempt.message.batch] == BatchState::Cancelled;
        let Some(person) = self.people.get_mut(&attempt.message) else {
            return;
        };
        let news = !person.status.is_final() && attempt.number > person.attempts;
        match attempt.result {
            AttemptResult::Delivered if person.delivered => self.duplicates += 1,
            AttemptResult::Delivered => {
                person.delivered = true;
                person.status = Status::Delivered;
            }
            AttemptResult::TemporaryError { retry_at, .. } if news => {
                person.status = if cancelled {
                    Status::Cancelled
                } else {
                    Status::TemporaryError
                };
                person.due_at = retry_at;
                person.doubtful = false;
            }
            AttemptResult::Bounce if news => person.status = Status::Bounce,
            AttemptResult::Failed if news => person.status = Status::Failed,
            _ => {}
        }
        person.attempts = person.attempts.max(attempt.number);
    }

    fn complete(&mut self) {
        for (&batch, state) in &mut self.batches {
            let of_batch = |(message, _): &(&MessageId, &Person)| message.batch == batch;
            let open = self
                .people
                .iter()
                .filter(of_batch)
                .any(|(_, person)| !person.status.is_final());
            if !open && *state != BatchState::Cancelled {
                *state = BatchState::Completed;
            }
        }
    }

    /// A node stops caring for a range: its lease runs out.
    async fn give_up(&mut self, store: &dyn Store) -> Result<()> {
        self.pass(TTL + secs(1));
        self.expire();
        self.lease(store).await
    }

    async fn hand_back(&mut self, store: &dyn Store) -> Result<()> {
        if self.holdings.is_empty() {
            return Ok(());
        }
        let at = self.rng.usize(..self.holdings.len());
        let node = self.holdings[at].node;
        // Facts first: that is the rule for whoever hands back.
        let range = self.holdings[at].range.range;
        self.ship_of(store, node).await?;
        let Some(at) = self
            .holdings
            .iter()
            .position(|holding| holding.range.range == range)
        else {
            return Ok(());
        };
        self.holdings.swap_remove(at);
        let release = Release {
            range,
            due_at: None,
            requeue: Vec::new(),
        };
        store.release(vec![release], self.now).await?;
        self.see_cancelled(store, None).await
    }

    async fn renew(&mut self, store: &dyn Store) -> Result<()> {
        self.expire();
        let node = self.some_node();
        let held: BTreeSet<_> = store
            .renew(self.nodes[node].journal, self.now, TTL)
            .await?
            .into_iter()
            .collect();
        let (now, mut known) = (self.now, BTreeSet::new());
        for holding in self
            .holdings
            .iter_mut()
            .filter(|holding| holding.node == node)
        {
            known.insert(holding.range.range);
            holding.until = now + TTL;
        }
        assert!(
            held.is_subset(&known),
            "a lease that its holder does not know"
        );
        // What was cancelled may be gone from the store.
        self.holdings
            .retain(|holding| holding.node != node || held.contains(&holding.range.range));
        Ok(())
    }

    async fn change(&mut self, store: &dyn Store) -> Result<()> {
        let batches: Vec<BatchId> = self.batches.keys().copied().collect();
        let Some(&batch) = batches.get(self.rng.usize(..=batches.len())) else {
            return Ok(());
        };
        self.expire();
        let state = self.batches[&batch];
        let ended = matches!(state, BatchState::Completed | BatchState::Cancelled);
        let (what, after) = match self.rng.u8(..6) {
            0..=1 => (BatchChange::Pause, BatchState::Paused),
            2..=4 => (BatchChange::Resume, BatchState::InProgress),
            _ => (BatchChange::Cancel, BatchState::Cancelled),
        };
        match store.change_batch(batch, what, self.now).await? {
            ChangeOutcome::Impossible(found) => assert!(ended && found == state),
            ChangeOutcome::Unknown => panic!("{batch} is unknown"),
            ChangeOutcome::Done { cancelled, .. } => {
                assert!(!ended || state == after);
                self.batches.insert(batch, after);
                let before = self.of_status(batch, Status::Cancelled);
                self.see_cancelled(store, (what == BatchChange::Cancel).then_some(batch))
                    .await?;
                assert_eq!(self.of_status(batch, Status::Cancelled) - before, cancelled);
            }
        }
        Ok(())
    }

    fn of_status(&self, batch: BatchId, status: Status) -> u64 {
        let of = self
            .people
            .iter()
            .filter(|(message, person)| message.batch == batch && person.status == status);
        of.count() as u64
    }

    /// Who was cancelled had to be in a cancelled batch, and in nobody's window; of `all_of` everybody
    /// else is.
    async fn see_cancelled(&mut self, store: &dyn Store, all_of: Option<BatchId>) -> Result<()> {
        for (&batch, &state) in &self.batches {
            if state != BatchState::Cancelled {
                continue;
            }
            for row in all_rows(store, batch).await? {
                let message = MessageId {
                    batch,
                    index: row.row.index,
                };
                let Some(person) = self.people.get_mut(&message) else {
                    continue;
                };
                let windowed = self
                    .holdings
                    .iter()
                    .any(|holding| holding.in_window(message, person.attempts));
                if person.status.is_final() {
                    continue;
                }
                assert!(
                    row.status != Status::Cancelled || !windowed,
                    "{message} may be on its way"
                );
                let ended = windowed || row.status == Status::Cancelled;
                assert!(ended || all_of != Some(batch), "{message} is left");
                if row.status == Status::Cancelled {
                    person.status = Status::Cancelled;
                }
            }
        }
        Ok(())
    }

    async fn suppress(&mut self, store: &dyn Store) -> Result<()> {
        let email = format!(
            "n{}@{}",
            self.rng.u8(..40),
            self.rng.choice(DOMAINS).unwrap_or("x.example")
        );
        let entry = Suppression {
            email: email.clone(),
            account: "acme".into(),
            list: None,
            reason: SuppressionReason::Manual,
            source: "api".into(),
            created_at: self.now,
        };
        store.suppress(vec![entry], self.now).await?;
        self.suppressed.insert(email);
        Ok(())
    }

    /// A node ends without a word and comes back: its journal first, then its leases.
    async fn restart(&mut self, store: &dyn Store) -> Result<()> {
        let node = self.some_node();
        self.ship_of(store, node).await?;
        if self.lapsed.contains(&node) {
            return Ok(());
        }
        let (own, others) = std::mem::take(&mut self.holdings)
            .into_iter()
            .partition(|holding| holding.node == node);
        self.holdings = others;
        let own: Vec<Holding> = own;
        let before = self.people.clone();
        for holding in &own {
            self.doubt(holding);
        }
        let back = store
            .reclaim(self.nodes[node].journal, self.now, TTL)
            .await?;
        self.see_cancelled(store, None).await?;
        self.receive(store, node, back, true).await?;
        // It knows what it had not started, so nobody else need doubt it when it hands back now.
        for (message, person) in &mut self.people {
            if let Some(old) = before.get(message) {
                person.doubtful = old.doubtful && !person.status.is_final();
            }
        }
        Ok(())
    }

    /// The store says of every batch what the model says.
    async fn compare(&mut self, store: &dyn Store, rows_too: bool) -> Result<()> {
        for (&batch, &state) in &self.batches {
            let found = if rows_too {
                Some(checked(store, batch).await?)
            } else {
                store.batch(batch).await?
            };
            let found = found.expect("the batch is there");
            let mut counters = Counters::default();
            for (_, person) in self
                .people
                .iter()
                .filter(|(message, _)| message.batch == batch)
            {
                counters.accepted += 1;
                *counters.of(person.status) += 1;
            }
            assert_eq!((found.counters, found.state), (counters, state), "{batch}");
        }
        Ok(())
    }

    /// Everybody recovers, and everything ends.
    async fn settle(&mut self, store: &dyn Store) -> Result<()> {
        for node in 0..self.nodes.len() {
            self.ship_of(store, node).await?;
        }
        let paused: Vec<BatchId> = self
            .batches
            .iter()
            .filter(|(_, state)| **state == BatchState::Paused)
            .map(|(id, _)| *id)
            .collect();
        for batch in paused {
            store
                .change_batch(batch, BatchChange::Resume, self.now)
                .await?;
            self.batches.insert(batch, BatchState::InProgress);
        }
        for _ in 0..4 {
            self.pass(TTL + secs(300));
            self.expire();
            store.backlog(self.now, None, 100).await?;
            self.see_cancelled(store, None).await?;
            for queue in DOMAINS.into_iter().chain([crate::MIXED]) {
                let leased = self.nodes[0].lease(store, self.now, queue, 10_000).await?;
                let facts = outcomes(&leased, AttemptResult::Delivered, self.now);
                self.receive(store, 0, leased, false).await?;
                let facts = self.nodes[0].write(facts);
                self.unshipped[0].extend(facts);
                self.ship_of(store, 0).await?;
            }
        }
        self.compare(store, true).await?;
        let open: u64 = [Status::Queued, Status::TemporaryError]
            .iter()
            .flat_map(|&status| self.batches.keys().map(move |&batch| (batch, status)))
            .map(|(batch, status)| self.of_status(batch, status))
            .sum();
        assert_eq!(open, 0, "somebody was forgotten");
        Ok(())
    }
}

impl Holding {
    fn find(&self, message: MessageId) -> Option<&crate::LeasedRecipient> {
        let items = (self.range.batch.id == message.batch).then_some(&self.range.items)?;
        items.iter().find(|item| item.row.index == message.index)
    }

    /// Whether it holds the recipient for the attempt after `attempts`, and has not reported it.
    fn open(&self, message: MessageId, attempts: u8) -> bool {
        let open = |item: &crate::LeasedRecipient| {
            item.attempts == attempts && !self.reported.contains(&item.offset)
        };
        self.find(message).is_some_and(open)
    }

    fn in_window(&self, message: MessageId, attempts: u8) -> bool {
        self.find(message)
            .is_some_and(|item| item.attempts == attempts && item.offset < self.window)
    }
}
