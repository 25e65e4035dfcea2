//! The verdict on hits together: what only several of them, and the moment of delivery, tell.
//!
//! A [`Judge`] is fed with what happened, in the order in which the store learned it. A hit waits
//! `settle` for company, then gets its verdict; later facts may revise it while its message is
//! remembered. The verdict only ever moves towards the machine: what a request by itself gave away
//! stays.
//!
//! | what is seen | reason |
//! |---|---|
//! | a fetch well before the final dot, or before the reply to it, or of a message that is still deferred | `before_delivery` |
//! | two different links of a message at the same moment, or many within seconds | `burst` |
//! | every link of a message within a minute | `all_links` |
//! | neighbouring links one after the other | `link_order` |
//! | one network and user agent at many recipients at once, right after their delivery | `many_recipients` |
//! | the client that did one of these to the message, again | `same_client` |
//!
//! Memory is bounded: messages, and hits per message, beyond it are judged without company.

use crate::rules::{Rules, is_private};
use model::{Actor, FactId, HitKind, MessageId, Timestamp, Verdict};
use rustc_hash::FxHashMap;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Messages remembered.
const MESSAGES: usize = 200_000;
/// Hits remembered per message …
const HITS: usize = 64;
/// … and in all.
const ALL_HITS: usize = 200_000;
/// How long a message without hits is remembered; one with hits, as long as `same_client` says.
const QUIET: Duration = Duration::from_secs(120);
/// Clients remembered for `many_recipients`.
const CLIENTS: usize = 50_000;

/// Network and user agent.
type Client = (Arc<str>, Arc<str>);

/// One hit, as its event tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Its fact.
    pub id: FactId,
    /// Its event.
    pub event_id: Uuid,
    /// On which message.
    pub message: MessageId,
    /// An open or a click.
    pub kind: HitKind,
    /// When it was answered.
    pub at: Timestamp,
    /// When the store learned of it: from then on it waits.
    pub recorded_at: Timestamp,
    /// Which link, for a click.
    pub link: Option<u16>,
    /// The client's.
    pub user_agent: Arc<str>,
    /// The client's, truncated.
    pub network: Arc<str>,
    /// The verdict so far: on the request by itself, or of an earlier judge.
    pub verdict: Verdict,
}

/// A hit with its verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The hit.
    pub trace: Trace,
    /// The verdict before.
    pub was: Actor,
    /// The verdict that holds now.
    pub verdict: Verdict,
    /// Whether it had been settled before: now it is revised.
    pub again: bool,
}

/// A hit that waits for company.
#[derive(Debug)]
struct Waiting {
    id: FactId,
    message: MessageId,
    recorded_at: Timestamp,
    /// The hit, where its message has no room for another: it is judged by itself.
    alone: Option<Box<Trace>>,
}

/// A hit in memory.
#[derive(Debug)]
struct Kept {
    trace: Trace,
    settled: bool,
    /// Why a machine, as far as several hits tell.
    reason: Option<&'static str>,
}

/// What is remembered of a message.
#[derive(Debug, Default)]
struct Mail {
    dot_at: Option<Timestamp>,
    delivered_at: Option<Timestamp>,
    deferred: bool,
    /// How many links it has, where that is known.
    links: Option<u16>,
    hits: Vec<Kept>,
    touched: Option<Timestamp>,
}

/// Settles hits.
#[derive(Debug)]
pub struct Judge {
    settle: Duration,
    /// By names that we gave: nobody can choose them so that they collide.
    mails: FxHashMap<MessageId, Mail>,
    /// How many hits these have in all.
    hits: usize,
    /// When messages were touched, oldest first.
    touched: VecDeque<(Timestamp, MessageId)>,
    /// Hits that wait, oldest first.
    waiting: VecDeque<Waiting>,
    /// Fresh hits of a client: network and user agent.
    clients: HashMap<Client, VecDeque<(Timestamp, MessageId)>>,
}

impl Judge {
    /// A judge who remembers nothing yet; a hit waits `settle` for company.
    pub fn new(settle: Duration) -> Self {
        Self {
            settle,
            mails: FxHashMap::default(),
            hits: 0,
            touched: VecDeque::new(),
            waiting: VecDeque::new(),
            clients: HashMap::new(),
        }
    }

    /// An attempt failed for now.
    pub fn deferred(&mut self, message: MessageId, now: Timestamp) {
        self.touch(message, now).deferred = true;
    }

    /// The message was delivered: when its final dot was sent, and when the reply was read.
    pub fn delivered(
        &mut self,
        message: MessageId,
        dot_at: Option<Timestamp>,
        at: Timestamp,
        now: Timestamp,
    ) {
        let mail = self.touch(message, now);
        mail.dot_at = dot_at;
        mail.delivered_at = Some(at);
    }

    /// How many links the messages' content has.
    pub fn links(&mut self, message: MessageId, links: u16) {
        if let Some(mail) = self.mails.get_mut(&message) {
            mail.links = Some(links);
        }
    }

    /// A hit came. `settled`: its verdict was given before, it is company only.
    pub fn hit(&mut self, trace: Trace, settled: bool) {
        let (id, message, recorded_at) = (trace.id, trace.message, trace.recorded_at);
        let mail = self.touch(message, recorded_at);
        let before = mail.hits.len();
        if before >= HITS
            && let Some(old) = mail.hits.iter().position(|kept| kept.settled)
        {
            mail.hits.remove(old);
        }
        let mut alone = None;
        if mail.hits.len() < HITS {
            mail.hits.push(Kept {
                trace,
                settled,
                reason: None,
            });
        } else {
            alone = Some(Box::new(trace));
        }
        self.hits += mail.hits.len() - before;
        if !settled {
            self.waiting.push_back(Waiting {
                id,
                message,
                recorded_at,
                alone,
            });
        }
    }

    /// When the next hit is due.
    pub fn next_due(&self) -> Option<Timestamp> {
        let first = self.waiting.front()?;
        Some(first.recorded_at + self.settle)
    }

    /// Whether the time of a hit has come.
    pub fn is_due(&self, now: Timestamp) -> bool {
        self.next_due().is_some_and(|due| due <= now)
    }

    /// Hits that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The verdicts on hits whose time has come, and what they revise: message by message, in the
    /// order in which the first hit of each came.
    pub fn due(&mut self, rules: &Rules, now: Timestamp) -> Vec<Judged> {
        self.some_due(rules, now, usize::MAX)
    }

    /// The same for the hits on at most so many messages: as many people are held in memory at once.
    /// [`Judge::is_due`] says whether there are more.
    pub fn some_due(&mut self, rules: &Rules, now: Timestamp, messages: usize) -> Vec<Judged> {
        let mut order = Vec::new();
        let mut due: FxHashMap<MessageId, Vec<Waiting>> = FxHashMap::default();
        let waiting = self.waiting.len();
        while let Some(hit) = self.next_due_of(now, &due, messages) {
            let message = hit.message;
            let of = due.entry(message).or_insert_with(|| {
                order.push(message);
                Vec::new()
            });
            of.push(hit);
        }
        let mut judged = Vec::with_capacity(waiting - self.waiting.len());
        for message in order {
            let hits = due.remove(&message).unwrap_or_default();
            self.judge(rules, message, hits, &mut judged);
        }
        self.forget(rules, now);
        judged
    }

    /// The oldest hit, if its time has come, and it is on one of these messages or they may be more.
    fn next_due_of(
        &mut self,
        now: Timestamp,
        of: &FxHashMap<MessageId, Vec<Waiting>>,
        messages: usize,
    ) -> Option<Waiting> {
        let first = self.waiting.front().filter(|_| self.is_due(now))?;
        if of.len() >= messages && !of.contains_key(&first.message) {
            return None;
        }
        self.waiting.pop_front()
    }

    fn touch(&mut self, message: MessageId, now: Timestamp) -> &mut Mail {
        let mail = self.mails.entry(message).or_default();
        if mail.touched.is_none() {
            self.touched.push_back((now, message));
        }
        mail.touched = Some(now);
        mail
    }

    fn judge(
        &mut self,
        rules: &Rules,
        message: MessageId,
        hits: Vec<Waiting>,
        judged: &mut Vec<Judged>,
    ) {
        let due: Due = hits.iter().map(|hit| hit.id).collect();
        let alone = hits.into_iter().filter_map(|hit| hit.alone);
        judged.extend(alone.map(|trace| Judged {
            was: trace.verdict.actor,
            verdict: trace.verdict.clone(),
            trace: *trace,
            again: false,
        }));
        let Some(mail) = self.mails.get_mut(&message) else {
            return;
        };
        let delivered_at = mail.delivered_at;
        let fresh = mail
            .hits
            .iter_mut()
            .filter(|kept| due.contains(&kept.trace.id));
        for kept in fresh {
            if many_recipients(&mut self.clients, rules, delivered_at, &kept.trace) {
                kept.reason = Some("many_recipients");
            }
        }
        read_together(rules, mail);
        for kept in &mut mail.hits {
            let now_due = due.contains(&kept.trace.id);
            if !now_due && !kept.settled {
                continue;
            }
            let was = kept.trace.verdict.actor;
            let verdict = verdict_of(rules, kept);
            if now_due || verdict.actor != was {
                kept.trace.verdict = verdict.clone();
                judged.push(Judged {
                    trace: kept.trace.clone(),
                    was,
                    verdict,
                    again: !now_due,
                });
            }
            kept.settled = true;
        }
    }

    /// Forgets what is old, and the oldest where there is too much.
    fn forget(&mut self, rules: &Rules, now: Timestamp) {
        let long = rules.behaviour.same_client + self.settle;
        while let Some(&(at, message)) = self.touched.front() {
            let crowded = self.mails.len() > MESSAGES || self.hits > ALL_HITS;
            if at + QUIET > now && !crowded {
                break;
            }
            self.touched.pop_front();
            let Some(mail) = self.mails.get(&message) else {
                continue;
            };
            let kept = if mail.hits.is_empty() { QUIET } else { long };
            let until = mail.touched.unwrap_or(at) + kept;
            let waits = mail.hits.iter().any(|kept| !kept.settled);
            if waits || (until > now && !crowded) {
                self.touched.push_back((now, message));
                if crowded {
                    break;
                }
            } else if let Some(mail) = self.mails.remove(&message) {
                self.hits -= mail.hits.len();
            }
        }
        if self.clients.len() > CLIENTS {
            self.clients.clear();
        }
    }
}

/// The names of hits that are judged now.
struct Due(Vec<FactId>);

impl Due {
    fn contains(&self, id: &FactId) -> bool {
        self.0.binary_search(id).is_ok()
    }
}

impl FromIterator<FactId> for Due {
    fn from_iter<I: IntoIterator<Item = FactId>>(ids: I) -> Self {
        let mut ids: Vec<FactId> = ids.into_iter().collect();
        ids.sort_unstable();
        Self(ids)
    }
}

/// Whether the client of a hit came to many recipients at once, each right after its delivery.
fn many_recipients(
    clients: &mut HashMap<Client, VecDeque<(Timestamp, MessageId)>>,
    rules: &Rules,
    delivered_at: Option<Timestamp>,
    trace: &Trace,
) -> bool {
    let behaviour = &rules.behaviour;
    let fresh = delivered_at.is_some_and(|at| trace.at <= at + behaviour.recipients_fresh);
    // Image proxies are one client for everybody; and a private network is what a proxy of ours
    // leaves of all clients when nobody told us to trust it.
    if !fresh || trace.verdict.actor != Actor::Human || !is_public(&trace.network) {
        return false;
    }
    let client = (trace.network.clone(), trace.user_agent.clone());
    let seen = clients.entry(client).or_default();
    while let Some((at, _)) = seen.front() {
        if *at + behaviour.recipients_within >= trace.at {
            break;
        }
        seen.pop_front();
    }
    if seen.len() < behaviour.recipients * 4 {
        seen.push_back((trace.at, trace.message));
    }
    let messages: HashSet<MessageId> = seen.iter().map(|(_, message)| *message).collect();
    messages.len() >= behaviour.recipients
}

/// A network as it is kept: `203.0.113.0/24`.
fn is_public(network: &str) -> bool {
    let address = network.split('/').next().unwrap_or_default().parse();
    address.is_ok_and(|address| !is_private(address))
}

/// Finds what the hits on one message tell together.
fn read_together(rules: &Rules, mail: &mut Mail) {
    let behaviour = &rules.behaviour;
    let mut clicks: Vec<(Timestamp, u16)> = mail
        .hits
        .iter()
        .filter(|kept| kept.trace.kind == HitKind::Click)
        .filter_map(|kept| Some((kept.trace.at, kept.trace.link?)))
        .collect();
    clicks.sort();
    let (dot_at, delivered_at, deferred) = (mail.dot_at, mail.delivered_at, mail.deferred);
    let early = |at: Timestamp| {
        let before = |moment: Timestamp| at + behaviour.before_delivery < moment;
        dot_at.is_some_and(before)
            || delivered_at.is_some_and(before)
            || (delivered_at.is_none() && deferred)
    };
    let all = mail.links.filter(|links| *links >= 3).is_some_and(|links| {
        let first = clicks.iter().map(|(at, _)| *at).min();
        let seen: HashSet<u16> = clicks
            .iter()
            .filter(|(at, _)| first.is_some_and(|first| *at <= first + behaviour.order))
            .map(|(_, link)| *link)
            .collect();
        seen.len() >= usize::from(links)
    });
    let first = clicks.first().map(|(_, link)| *link);
    let (mut burst, mut ordered) = (HashSet::new(), HashSet::new());
    // Most people follow one link of a message, however often.
    if clicks.iter().any(|(_, link)| Some(*link) != first) {
        burst = crowded(&clicks, 2, behaviour.same_moment);
        burst.extend(crowded(&clicks, behaviour.burst_links, behaviour.burst));
        ordered = in_order(&clicks, behaviour.order_links, behaviour.order);
    }
    for kept in &mut mail.hits {
        let trace = &kept.trace;
        let reason = if early(trace.at) {
            Some("before_delivery")
        } else if let (HitKind::Click, Some(link)) = (trace.kind, trace.link) {
            if burst.contains(&(trace.at, link)) {
                Some("burst")
            } else if ordered.contains(&(trace.at, link)) {
                Some("link_order")
            } else if all {
                Some("all_links")
            } else {
                None
            }
        } else {
            None
        };
        kept.reason = kept.reason.or(reason);
    }
    let machines: Vec<(Timestamp, Arc<str>, Arc<str>)> = mail
        .hits
        .iter()
        .filter(|kept| kept.reason.is_some() && is_public(&kept.trace.network))
        .map(|kept| {
            let trace = &kept.trace;
            (trace.at, trace.network.clone(), trace.user_agent.clone())
        })
        .collect();
    for kept in mail.hits.iter_mut().filter(|kept| kept.reason.is_none()) {
        let trace = &kept.trace;
        let same = machines.iter().any(|(at, network, agent)| {
            apart(*at, trace.at) <= behaviour.same_client
                && (network, agent) == (&trace.network, &trace.user_agent)
        });
        if same {
            kept.reason = Some("same_client");
        }
    }
}

fn apart(a: Timestamp, b: Timestamp) -> Duration {
    Duration::from_millis(a.millis().abs_diff(b.millis()))
}

/// The clicks among which `many` different links were followed within a span of this length.
fn crowded(sorted: &[(Timestamp, u16)], many: usize, span: Duration) -> HashSet<(Timestamp, u16)> {
    let mut found = HashSet::new();
    let mut counts: HashMap<u16, usize> = HashMap::new();
    // Behind `marked` everything is found already.
    let (mut first, mut marked) = (0, 0);
    for (at, click) in sorted.iter().enumerate() {
        *counts.entry(click.1).or_default() += 1;
        while let Some(oldest) = sorted.get(first).filter(|old| apart(old.0, click.0) > span) {
            if let Some(count) = counts.get_mut(&oldest.1) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&oldest.1);
                }
            }
            first += 1;
        }
        if counts.len() >= many {
            let new = sorted.get(first.max(marked)..=at).unwrap_or_default();
            found.extend(new.iter().copied());
            marked = at + 1;
        }
    }
    found
}

/// The clicks that follow neighbouring links one after the other, so many within this time.
fn in_order(sorted: &[(Timestamp, u16)], many: usize, span: Duration) -> HashSet<(Timestamp, u16)> {
    let mut found = HashSet::new();
    let mut run: Vec<(Timestamp, u16)> = Vec::new();
    for &click in sorted {
        match run.last() {
            Some((_, last)) if click.1 == *last => continue,
            Some((_, last)) if last.checked_add(1) == Some(click.1) => {}
            Some(_) | None => run.clear(),
        }
        run.push(click);
        let within = run
            .len()
            .checked_sub(many)
            .and_then(|at| run.get(at))
            .is_some_and(|first| apart(first.0, click.0) <= span);
        if within {
            found.extend(run.iter().rev().take(many).copied());
        }
    }
    found
}

/// The verdict on a hit: its own if that is a machine's, else what the others tell.
fn verdict_of(rules: &Rules, kept: &Kept) -> Verdict {
    match (kept.trace.verdict.actor, kept.reason) {
        (Actor::Machine, _) | (_, None) => kept.trace.verdict.clone(),
        (Actor::Human | Actor::Unknown, Some(reason)) => Verdict {
            actor: Actor::Machine,
            machine_reasons: vec![reason.into()],
            rules: rules.version,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{BatchId, JournalId};
    use proptest::prelude::*;

    const PERSON: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0";

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(1_763_769_600_000 + millis)
    }

    fn message(index: u32) -> MessageId {
        MessageId {
            batch: BatchId::from_bytes([1; 16]),
            index,
        }
    }

    fn click(seq: u64, index: u32, millis: i64, link: u16) -> Trace {
        Trace {
            id: FactId {
                journal: JournalId::from_bytes([2; 16]),
                seq,
            },
            event_id: Uuid::from_u128(seq.into()),
            message: message(index),
            kind: HitKind::Click,
            at: at(millis),
            recorded_at: at(millis + 50),
            link: Some(link),
            user_agent: PERSON.into(),
            network: "203.0.113.0/24".into(),
            verdict: Verdict {
                actor: Actor::Human,
                machine_reasons: Vec::new(),
                rules: 2,
            },
        }
    }

    fn settled(judge: &mut Judge, millis: i64) -> Vec<(u64, Actor, String, bool)> {
        let judged = judge.due(&Rules::shipped(), at(millis));
        let short = |of: Judged| {
            let reason = of.verdict.machine_reasons.first();
            let reason = reason.map(ToString::to_string).unwrap_or_default();
            (of.trace.id.seq, of.verdict.actor, reason, of.again)
        };
        judged.into_iter().map(short).collect()
    }

    const SETTLE: Duration = Duration::from_secs(15);

    #[test]
    fn a_hit_waits_for_company_and_a_lone_one_is_a_persons() {
        let mut judge = Judge::new(SETTLE);
        judge.hit(click(1, 0, 0, 3), false);
        assert_eq!(judge.next_due(), Some(at(15_050)));
        assert_eq!(settled(&mut judge, 15_049), []);
        let expected = [(1, Actor::Human, String::new(), false)];
        assert_eq!(settled(&mut judge, 15_050), expected);
        assert_eq!(settled(&mut judge, 20_000), []);
    }

    #[test]
    fn what_comes_later_revises_what_was_settled() {
        let mut judge = Judge::new(Duration::from_secs(1));
        judge.hit(click(1, 0, 0, 0), false);
        assert_eq!(settled(&mut judge, 1_050)[0].1, Actor::Human);
        // The message had been deferred, and was delivered after that click.
        judge.delivered(message(0), Some(at(60_000)), at(60_100), at(60_100));
        judge.hit(click(2, 0, 70_000, 4), false);
        let revised = (1, Actor::Machine, "before_delivery".to_owned(), true);
        let given = settled(&mut judge, 71_050);
        assert_eq!(given[0], revised);
        // From the same network and agent, within minutes: the gateway again.
        assert_eq!((given[1].0, given[1].2.as_str()), (2, "same_client"));
    }

    #[test]
    fn what_is_due_comes_by_so_many_messages() {
        let mut judge = Judge::new(Duration::from_secs(15));
        for (seq, index) in [(1, 0), (2, 0), (3, 1), (4, 0), (5, 1), (6, 2)] {
            judge.hit(click(seq, index, 0, 1), false);
        }
        let rules = Rules::shipped();
        assert!(!judge.is_due(at(14_999)) && judge.some_due(&rules, at(14_999), 1).is_empty());
        let mut some = || {
            let judged = judge.some_due(&rules, at(15_050), 2);
            let seqs: Vec<u64> = judged.iter().map(|of| of.trace.id.seq).collect();
            (seqs, judge.is_due(at(15_050)))
        };
        assert_eq!(some(), (vec![1, 2, 4, 3, 5], true));
        assert_eq!(some(), (vec![6], false));
        assert_eq!(some(), (vec![], false));
    }

    #[test]
    fn memory_is_bounded() {
        let mut judge = Judge::new(Duration::ZERO);
        for index in 0..10 {
            judge.delivered(message(index), None, at(0), at(0));
        }
        let hits = u64::try_from(HITS).expect("small");
        for seq in 0..hits * 2 {
            judge.hit(click(seq, 0, 0, 3), false);
        }
        assert!(judge.mails[&message(0)].hits.len() <= HITS);
        // Those that there was no room for are judged, too.
        let judged = judge.due(&Rules::shipped(), at(200_000));
        assert_eq!(judged.len(), HITS * 2);
        assert_eq!(judge.mails.len(), 1);
        judge.due(&Rules::shipped(), at(2_000_000));
        judge.due(&Rules::shipped(), at(4_000_000));
        assert!(judge.mails.is_empty());
        assert_eq!(judge.hits, 0);
    }

    proptest! {
        #[test]
        fn every_hit_is_settled_once_and_only_machines_have_reasons(
            list in prop::collection::vec((0_u32..3, 0_i64..40_000, 0_u16..6), 0..40),
        ) {
            let mut judge = Judge::new(SETTLE);
            let count = list.len();
            for (seq, (index, millis, link)) in (0_u64..).zip(list) {
                judge.hit(click(seq, index, millis, link), false);
            }
            let judged = judge.due(&Rules::shipped(), at(1_000_000));
            prop_assert_eq!(judged.iter().filter(|of| !of.again).count(), count);
            for of in &judged {
                let machine = of.verdict.actor == Actor::Machine;
                prop_assert_eq!(machine, !of.verdict.machine_reasons.is_empty());
            }
            prop_assert_eq!(judge.waiting(), 0);
        }
    }
}
