//! Whose turn it is at a destination: what is transactional first, then accounts by weight, then
//! the batches of an account, each by virtual time.
//!
//! Owns the shares, not the messages: of each batch it knows at which domains it waits. Start-time
//! fair queueing: a turn moves the taker's tag on by its cost, the smallest tag is next, and whoever
//! comes (back) starts at the present, so that nobody saves up turns by being away. Pure; reads no
//! clock of the world.

use std::collections::{BTreeMap, HashSet, VecDeque};

use model::{BatchId, Priority};

use super::lane::IN_A_ROW;
use super::snapshot::Share;

/// What a turn costs at weight 1.
const COST: u64 = 1 << 20;
/// Turns that somebody who could not go may catch up with. A batch whose window was full for a
/// moment loses nothing; one that was held by its own rate for an hour does not take the next.
const ARREARS: u64 = 64 * COST;

/// The batches that wait for a destination, and the domains at which they do.
#[derive(Debug, Default)]
pub(super) struct Turns {
    urgent: Class,
    bulk: Class,
}

/// Those of one priority.
#[derive(Debug, Default)]
struct Class {
    /// The start tag of the latest turn.
    now: u64,
    /// Domains at which batches wait: every destination is asked at each tick whether there are any.
    waiting: usize,
    accounts: BTreeMap<Box<str>, Account>,
}

#[derive(Debug)]
struct Account {
    weight: u32,
    tag: u64,
    now: u64,
    batches: BTreeMap<BatchId, Batch>,
}

#[derive(Debug, Default)]
struct Batch {
    tag: u64,
    /// In turn; each once.
    domains: VecDeque<Box<str>>,
    /// Messages that went to the first of them since its turn began.
    in_a_row: usize,
    members: HashSet<Box<str>>,
}

/// Who takes a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) priority: Priority,
    account: Box<str>,
    pub(super) batch: BatchId,
}

impl Turns {
    /// A batch waits (also) at this domain.
    pub(super) fn add(
        &mut self,
        priority: Priority,
        account: (&str, u32),
        batch: BatchId,
        domain: &str,
    ) {
        let class = self.class(priority);
        let (name, weight) = account;
        if !class.accounts.contains_key(name) {
            let fresh = Account {
                weight: 1,
                tag: class.now,
                now: 0,
                batches: BTreeMap::new(),
            };
            class.accounts.insert(name.into(), fresh);
        }
        let now = class.now;
        let Some(account) = class.accounts.get_mut(name) else {
            return;
        };
        account.weight = weight.max(1);
        if account.is_idle() {
            account.tag = account.tag.max(now);
        }
        let now = account.now;
        let batch = account.batches.entry(batch).or_default();
        if batch.domains.is_empty() {
            batch.tag = batch.tag.max(now);
        }
        if batch.members.insert(domain.into()) {
            batch.domains.push_back(domain.into());
            class.waiting += 1;
        }
    }

    /// All that wait, in the order of their turns.
    pub(super) fn order(&self) -> Vec<Turn> {
        let mut order = Vec::new();
        for priority in [Priority::Transactional, Priority::Bulk] {
            let mut class: Vec<_> = self.of(priority).waiting().collect();
            class.sort_unstable_by_key(|(tags, ..)| *tags);
            order.extend(class.into_iter().map(|(_, account, batch)| Turn {
                priority,
                account: account.into(),
                batch,
            }));
        }
        order
    }

    /// Who is next: the first of [`Turns::order`].
    pub(super) fn next(&self) -> Option<Turn> {
        [Priority::Transactional, Priority::Bulk]
            .into_iter()
            .find_map(|priority| {
                let waiting = self.of(priority).waiting();
                let (_, account, batch) = waiting.min_by_key(|(tags, ..)| *tags)?;
                Some(Turn {
                    priority,
                    account: account.into(),
                    batch,
                })
            })
    }

    /// The domain that is next in a batch's turn.
    pub(super) fn next_domain(&self, turn: &Turn) -> Option<Box<str>> {
        self.domains_of(turn).next().map(Box::from)
    }

    /// Nothing of a batch can go to the domain that is next: the others are before it.
    pub(super) fn passed(&mut self, turn: &Turn) {
        if let Some(batch) = self.batch(turn) {
            batch.end_turn();
        }
    }

    /// A batch no longer waits at this domain.
    pub(super) fn remove(&mut self, turn: &Turn, domain: &str) {
        if let Some(batch) = self.batch(turn)
            && batch.members.remove(domain)
        {
            if batch
                .domains
                .front()
                .is_some_and(|first| **first == *domain)
            {
                batch.in_a_row = 0;
            }
            batch.domains.retain(|other| **other != *domain);
            let class = self.class(turn.priority);
            class.waiting = class.waiting.saturating_sub(1);
        }
    }

    /// A message of the batch went, to the domain that is next: after [`IN_A_ROW`] the others are
    /// before it.
    pub(super) fn served(&mut self, turn: &Turn) {
        let class = self.class(turn.priority);
        let Some(account) = class.accounts.get_mut(&turn.account) else {
            return;
        };
        (class.now, account.tag) = charge(class.now, account.tag, COST / u64::from(account.weight));
        if let Some(batch) = account.batches.get_mut(&turn.batch) {
            (account.now, batch.tag) = charge(account.now, batch.tag, COST);
            batch.in_a_row += 1;
            if batch.in_a_row >= IN_A_ROW {
                batch.end_turn();
            }
        }
    }

    /// The domains at which anybody waits, in the order of the turns.
    pub(super) fn names(&self) -> Vec<Box<str>> {
        let mut seen = HashSet::new();
        let mut names = Vec::new();
        for turn in self.order() {
            for name in self.domains_of(&turn) {
                if seen.insert(name) {
                    names.push(name.into());
                }
            }
        }
        names
    }

    /// Whoever waits, with each domain at which it does, in no order.
    pub(super) fn each(&self) -> impl Iterator<Item = (BatchId, &str)> {
        let classes = [&self.urgent, &self.bulk].into_iter();
        let accounts = classes.flat_map(|class| class.accounts.values());
        accounts.flat_map(Account::waiting).flat_map(|(id, batch)| {
            let domains = batch.domains.iter();
            domains.map(move |name| (*id, &**name))
        })
    }

    /// The domains of a batch, in the order of their turns.
    pub(super) fn domains_of(&self, turn: &Turn) -> impl Iterator<Item = &str> {
        let account = self.of(turn.priority).accounts.get(&turn.account);
        let batch = account.and_then(|account| account.batches.get(&turn.batch));
        batch
            .into_iter()
            .flat_map(|batch| batch.domains.iter().map(|name| &**name))
    }

    /// Keeps only the domains at which a batch still waits, and forgets whom nothing is to be
    /// remembered of.
    pub(super) fn retain(&mut self, mut waits: impl FnMut(BatchId, &str) -> bool) {
        for class in [&mut self.urgent, &mut self.bulk] {
            for account in class.accounts.values_mut() {
                for (id, batch) in &mut account.batches {
                    let Batch {
                        domains, members, ..
                    } = batch;
                    domains.retain(|domain| {
                        let stays = waits(*id, domain);
                        if !stays {
                            members.remove(domain);
                        }
                        stays
                    });
                }
                let now = account.now;
                account
                    .batches
                    .retain(|_, batch| !batch.domains.is_empty() || batch.tag > now);
            }
            let now = class.now;
            class
                .accounts
                .retain(|_, account| !account.is_idle() || account.tag > now);
            class.waiting = class.accounts.values().map(Account::waits).sum();
        }
    }

    /// Whether nobody waits. What was withdrawn meanwhile counts until [`Turns::retain`].
    pub(super) fn is_empty(&self) -> bool {
        self.urgent.is_idle() && self.bulk.is_idle()
    }

    /// What of the turns a batch gets; none when it does not wait.
    pub(super) fn share_of(&self, batch: BatchId) -> Option<Share> {
        let is_urgent = self.urgent.waiting().any(|(.., id)| id == batch);
        let class = match is_urgent {
            true => &self.urgent,
            false => &self.bulk,
        };
        let waiting = |account: &Account| account.waiting().count();
        let busy = || class.accounts.values().filter(|account| !account.is_idle());
        let own = busy().find(|account| account.waiting().any(|(id, _)| *id == batch))?;
        let weights: u64 = busy().map(|account| u64::from(account.weight)).sum();
        let batches = waiting(own);
        #[expect(clippy::cast_precision_loss, reason = "few, and for people")]
        let part = f64::from(own.weight) / weights.max(1) as f64 / batches.max(1) as f64;
        Some(Share {
            batches: busy().map(waiting).sum(),
            accounts: busy().count(),
            part,
            behind_urgent: !is_urgent && self.has_urgent(),
        })
    }

    /// Whether anybody waits with something transactional.
    pub(super) fn has_urgent(&self) -> bool {
        !self.urgent.is_idle()
    }

    /// Forgets at which domains anybody waits, not how far each is.
    pub(super) fn clear(&mut self) {
        self.retain(|_, _| false);
    }

    fn of(&self, priority: Priority) -> &Class {
        match priority {
            Priority::Transactional => &self.urgent,
            Priority::Bulk => &self.bulk,
        }
    }

    fn class(&mut self, priority: Priority) -> &mut Class {
        match priority {
            Priority::Transactional => &mut self.urgent,
            Priority::Bulk => &mut self.bulk,
        }
    }

    fn batch(&mut self, turn: &Turn) -> Option<&mut Batch> {
        let class = self.class(turn.priority);
        let account = class.accounts.get_mut(&turn.account)?;
        account.batches.get_mut(&turn.batch)
    }
}

impl Class {
    fn is_idle(&self) -> bool {
        self.waiting == 0
    }

    /// Those that wait: their tags, account and batch.
    fn waiting(&self) -> impl Iterator<Item = ((u64, u64), &str, BatchId)> {
        self.accounts.iter().flat_map(|(name, account)| {
            let waiting = account.waiting();
            waiting.map(|(id, batch)| ((account.tag, batch.tag), &**name, *id))
        })
    }
}

impl Batch {
    /// The turn of the first domain is over.
    fn end_turn(&mut self) {
        self.in_a_row = 0;
        if let Some(first) = self.domains.pop_front() {
            self.domains.push_back(first);
        }
    }
}

impl Account {
    fn waiting(&self) -> impl Iterator<Item = (&BatchId, &Batch)> {
        let all = self.batches.iter();
        all.filter(|(_, batch)| !batch.domains.is_empty())
    }

    fn is_idle(&self) -> bool {
        self.batches.values().all(|batch| batch.domains.is_empty())
    }

    /// Domains at which its batches wait.
    fn waits(&self) -> usize {
        self.batches.values().map(|batch| batch.domains.len()).sum()
    }
}

/// The present and the tag after a turn of who has `tag`.
fn charge(now: u64, tag: u64, cost: u64) -> (u64, u64) {
    let start = tag.max(now.saturating_sub(ARREARS));
    (now.max(start), start + cost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const X: &str = "x.example";

    fn id(batch: u8) -> BatchId {
        BatchId::from_bytes([batch; 16])
    }

    /// Everybody always has something; how many of `turns` each batch gets.
    fn shares(turns: &mut Turns, count: usize) -> HashMap<BatchId, usize> {
        let mut got = HashMap::new();
        for _ in 0..count {
            let turn = turns.next().expect("somebody waits");
            turns.served(&turn);
            *got.entry(turn.batch).or_default() += 1;
        }
        got
    }

    #[test]
    fn accounts_share_by_weight_and_their_batches_alike() {
        let mut turns = Turns::default();
        turns.add(Priority::Bulk, ("a", 3), id(1), X);
        turns.add(Priority::Bulk, ("b", 1), id(2), X);
        turns.add(Priority::Bulk, ("b", 1), id(3), X);
        let got = shares(&mut turns, 800);
        let near = |batch, wanted: usize| got[&id(batch)].abs_diff(wanted) <= 2;
        assert!(near(1, 600) && near(2, 100) && near(3, 100), "{got:?}");
    }

    #[test]
    fn what_is_told_of_a_share_is_what_it_gets() {
        let mut turns = Turns::default();
        turns.add(Priority::Bulk, ("a", 3), id(1), X);
        turns.add(Priority::Bulk, ("b", 1), id(2), X);
        turns.add(Priority::Bulk, ("b", 1), id(3), X);
        let got = shares(&mut turns, 800);
        for batch in [1, 2, 3] {
            let told = turns.share_of(id(batch)).expect("it waits");
            assert_eq!((told.batches, told.accounts), (3, 2));
            assert!(!told.behind_urgent);
            let turns = u32::try_from(got[&id(batch)]).expect("800 at most");
            assert!(
                (told.part * 800.0 - f64::from(turns)).abs() <= 2.0,
                "{batch}: {told:?}"
            );
        }
        assert_eq!(turns.share_of(id(4)), None);
        turns.add(Priority::Transactional, ("b", 1), id(4), X);
        let urgent = turns.share_of(id(4)).expect("it waits");
        assert_eq!((urgent.batches, urgent.part), (1, 1.0));
        assert!(!urgent.behind_urgent && turns.share_of(id(1)).is_some_and(|of| of.behind_urgent));
    }

    #[test]
    fn what_is_transactional_goes_first_and_costs_the_others_nothing() {
        let mut turns = Turns::default();
        turns.add(Priority::Bulk, ("a", 1), id(1), X);
        turns.add(Priority::Bulk, ("b", 1), id(2), X);
        shares(&mut turns, 10);
        turns.add(Priority::Transactional, ("a", 1), id(3), X);
        let urgent = turns.next().expect("one");
        assert_eq!(urgent.batch, id(3));
        turns.served(&urgent);
        turns.remove(&urgent, X);
        let got = shares(&mut turns, 100);
        assert_eq!((got[&id(1)], got[&id(2)]), (50, 50));
        assert_eq!(got.get(&id(3)), None);
    }

    #[test]
    fn whoever_comes_late_gets_a_share_from_then_on() {
        let mut turns = Turns::default();
        turns.add(Priority::Bulk, ("a", 1), id(1), X);
        shares(&mut turns, 100_000);
        turns.add(Priority::Bulk, ("b", 1), id(2), X);
        let got = shares(&mut turns, 100);
        assert!((49..=51).contains(&got[&id(2)]), "{got:?}");
    }

    #[test]
    fn coming_one_at_a_time_wins_nothing() {
        let mut turns = Turns::default();
        for other in 1..=9 {
            turns.add(Priority::Bulk, ("a", 1), id(other), X);
        }
        let mut got = 0;
        for _ in 0..1_000 {
            turns.add(Priority::Bulk, ("a", 1), id(10), X);
            let turn = turns.next().expect("one");
            turns.served(&turn);
            if turn.batch == id(10) {
                got += 1;
                turns.remove(&turn, X);
                turns.retain(|batch, _| batch != id(10));
            }
        }
        assert!((95..=105).contains(&got), "{got} of 1000");
    }

    #[test]
    fn whoever_cannot_go_is_passed_and_does_not_take_everything_afterwards() {
        let mut turns = Turns::default();
        turns.add(Priority::Bulk, ("a", 1), id(1), X);
        turns.add(Priority::Bulk, ("b", 1), id(2), X);
        for _ in 0..10_000 {
            let turn = turns.order().into_iter().find(|turn| turn.batch == id(2));
            turns.served(&turn.expect("it waits"));
        }
        let got = shares(&mut turns, 1_000);
        assert!(got[&id(1)] <= 540, "{got:?}");
    }

    #[test]
    fn domains_of_a_batch_take_turns() {
        let mut turns = Turns::default();
        for domain in ["x", "y", "x"] {
            turns.add(Priority::Bulk, ("a", 1), id(1), domain);
        }
        let turn = turns.next().expect("one");
        assert_eq!(turns.domains_of(&turn).count(), 2);
        let served = |turns: &mut Turns| {
            let next = turns.next_domain(&turn).expect("a domain");
            turns.served(&turn);
            String::from(next)
        };
        for domain in ["x", "y", "x"] {
            let row: Vec<_> = (0..IN_A_ROW).map(|_| served(&mut turns)).collect();
            assert_eq!(row, vec![domain; IN_A_ROW]);
        }
        assert_eq!(served(&mut turns), "y");
        turns.passed(&turn);
        assert_eq!(served(&mut turns), "x");
        turns.remove(&turn, "x");
        assert_eq!(turns.next_domain(&turn).as_deref(), Some("y"));
        turns.clear();
        assert!(turns.is_empty() && turns.next().is_none());
    }

    proptest! {
        #[test]
        fn nobody_waits_when_nobody_is_in_order(
            steps in proptest::collection::vec((0_u8..4, 0_u8..3, 0_u8..3, any::<bool>()), 0..60),
        ) {
            let mut turns = Turns::default();
            for (what, batch, domain, is_urgent) in steps {
                let priority = if is_urgent { Priority::Transactional } else { Priority::Bulk };
                let (batch, domain) = (id(batch), format!("{domain}.example"));
                match what {
                    0 | 1 => turns.add(priority, ("a", 1), batch, &domain),
                    2 => {
                        let turn = Turn { priority, account: "a".into(), batch };
                        turns.remove(&turn, &domain);
                    }
                    _ => turns.retain(|other, name| other != batch || name != domain),
                }
                prop_assert_eq!(turns.is_empty(), turns.order().is_empty());
                prop_assert_eq!(turns.has_urgent(), turns.order().iter().any(|turn| turn.priority == Priority::Transactional));
            }
        }

        /// With any weights, nobody who always waits is more than a few turns from the own share.
        #[test]
        fn shares_are_weights(weights in proptest::collection::vec(1_u32..20, 1..8), turns_taken in 100_usize..2_000) {
            let mut turns = Turns::default();
            for (n, weight) in weights.iter().enumerate() {
                let batch = id(u8::try_from(n).expect("few"));
                turns.add(Priority::Bulk, (&format!("account{n}"), *weight), batch, X);
            }
            let got = shares(&mut turns, turns_taken);
            let total: u32 = weights.iter().sum();
            for (n, weight) in weights.iter().enumerate() {
                let batch = id(u8::try_from(n).expect("few"));
                let fair = turns_taken as f64 * f64::from(*weight) / f64::from(total);
                let own = got.get(&batch).copied().unwrap_or(0) as f64;
                prop_assert!((own - fair).abs() <= weights.len() as f64 + 1.0, "{own} for {fair}");
            }
        }
    }
}
