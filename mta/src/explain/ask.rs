//! Gathers facts: from the queue's picture, the store's rows, the resolver's memory.
//!
//! Everything is bounded, and nobody on the way of a message waits for it. What one of them does
//! not answer is left out and said.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use journal::Journal;
use model::{AttemptResult, BatchState, Domain, Status, Timestamp};
use service::clock::SharedClock;
use service::config::shaping::{Limits, ShapingFile};
use service::metrics::LimitKind;
use store::{Backlog, Batch, MIXED, MessageStory, Store, StoreError, Suspension, Work, WorkScope};

use super::facts::{
    BatchFacts, DestinationFacts, HeldBack, LastAttempt, Limit, MessageFacts, NodeFacts,
    SourceLimits, Stock, Suspended,
};
use super::{Explanation, Source, judge};
use crate::abtest::Plan;
use crate::abtest::kept::Kept;
use crate::queue::snapshot::{DestinationView, LimitSight, Scope, Snapshot};
use crate::resolve::Route;
use crate::sending::SendingHandle;
use crate::shaping::{Destination, destination_of};

/// How long DNS may take for an answer to a person.
const LOOKUP: Duration = Duration::from_secs(5);
/// Lookups at a time, and in all, for one answer.
const LOOKUPS: (usize, usize) = (16, 200);
/// Queues of a batch, and batches of a queue, that are looked at.
const WORK_MAX: u32 = 1_000;
/// Queues in a page of the backlog, and pages looked through.
const BACKLOG: (u32, usize) = (1_000, 50);
/// Domains told of a destination.
const DOMAINS_MAX: usize = 100;

/// Who asks; see the module.
pub(crate) struct Explainer {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) sending: SendingHandle,
    pub(crate) journal: Journal,
    pub(crate) clock: SharedClock,
    /// Names of egress sources, by index.
    pub(crate) sources: Vec<String>,
    /// As the configuration names it.
    pub(crate) shaping_file: PathBuf,
}

/// Which destination a name means, and why.
#[derive(Debug, Clone)]
pub(crate) struct Resolved {
    /// None: the name is that of a destination.
    pub(crate) domain: Option<Domain>,
    pub(crate) destination: Destination,
    pub(crate) by: RolledUp,
    pub(crate) detail: String,
    pub(crate) hosts: Vec<String>,
    /// Why nobody knows where its mail goes.
    pub(crate) dns: Option<String>,
    pub(crate) limits: Limits,
    pub(crate) configured: Source,
}

/// Why a domain belongs to its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RolledUp {
    /// It has a section of its own.
    Domain,
    /// All its hosts are the provider's.
    Provider,
    /// It has these hosts.
    Hosts,
    /// Nobody knows its hosts (yet).
    Unresolved,
}

/// Everything about one destination.
pub(crate) struct Full {
    pub(crate) resolved: Resolved,
    pub(crate) facts: DestinationFacts,
    pub(crate) stock: Stock,
    /// Domains with something in the store or the queue.
    pub(crate) domains: Vec<String>,
    pub(crate) domain_count: usize,
    pub(crate) node: NodeFacts,
}

/// Due work of all queues, by name.
#[derive(Debug, Default)]
struct Piles {
    queues: HashMap<Box<str>, Backlog>,
    /// Not all queues were looked at.
    cut: bool,
    away: Option<String>,
}

impl Explainer {
    // ---- destinations -------------------------------------------------------------------

    /// Destinations with mail or trouble, the busiest first; whether the list is whole.
    pub(crate) async fn destinations(&self) -> (Vec<Full>, bool) {
        let snapshot = self.sending.snapshot(Scope::Busiest(usize::MAX)).await;
        let piles = self.piles().await;
        let suspensions = self.suspensions().await;
        let node = self.node(snapshot.as_ref(), piles.away.clone());
        let shaping = self.sending.shaping();
        let mut found: HashMap<Destination, (Option<DestinationView>, Stock, Vec<String>)> =
            HashMap::new();
        let whole = snapshot
            .as_ref()
            .is_some_and(|of| of.destinations.len() == of.destination_count);
        for view in snapshot.into_iter().flat_map(|of| of.destinations) {
            let stock = Stock {
                leased: view.waiting as u64,
                in_flight: view.in_flight as u64,
                ..Stock::default()
            };
            let domains = view.domains.iter().map(|(name, _)| name.to_string());
            let domains = domains.collect();
            found.insert(
                view.policy.destination.clone(),
                (Some(view), stock, domains),
            );
        }
        for (queue, pile) in piles.queues {
            let destination = self.known(&queue, &shaping);
            let (_, stock, domains) = found.entry(destination).or_default();
            add_pile(stock, &pile);
            if *queue != *MIXED && !domains.iter().any(|known| **known == *queue) {
                domains.push(queue.into());
            }
        }
        for suspension in &suspensions {
            found
                .entry(Destination::named(&suspension.destination))
                .or_default();
        }
        let mut all: Vec<_> = found
            .into_iter()
            .map(|(name, (view, stock, mut domains))| {
                let count = view
                    .as_ref()
                    .map_or(0, |view| view.domain_count)
                    .max(domains.len());
                domains.sort_unstable();
                domains.truncate(DOMAINS_MAX);
                let resolved = self.of_name(name, view.as_ref(), &domains, &shaping);
                let facts = self.facts(&resolved, view, &suspensions);
                Full {
                    resolved,
                    facts,
                    stock,
                    domains,
                    domain_count: count,
                    node: node.clone(),
                }
            })
            .collect();
        all.sort_by(|a, b| {
            let size = |of: &Full| std::cmp::Reverse(of.stock.unfinished());
            (size(a), &a.facts.name).cmp(&(size(b), &b.facts.name))
        });
        (all, whole && !piles.cut)
    }

    /// One destination, by its name or by a domain of it; none: there is no such thing.
    pub(crate) async fn destination(&self, name: &str) -> Option<Full> {
        let suspensions = self.suspensions().await;
        let resolved = self.resolve(name, &suspensions).await?;
        let key = resolved.destination.clone();
        let scope = match &resolved.domain {
            Some(domain) => Scope::Domain(domain.as_str().into(), key.clone()),
            None => Scope::Named(vec![key.clone()]),
        };
        let mut snapshot = self.sending.snapshot(scope).await;
        let view = snapshot.as_mut().and_then(|of| of.destinations.pop());
        let piles = self.piles().await;
        let node = self.node(snapshot.as_ref(), piles.away.clone());
        let shaping = self.sending.shaping();
        let mut stock = Stock {
            leased: view.as_ref().map_or(0, |view| view.waiting as u64),
            in_flight: view.as_ref().map_or(0, |view| view.in_flight as u64),
            ..Stock::default()
        };
        let of_view = view.iter().flat_map(|view| &view.domains);
        let mut domains: Vec<_> = of_view.map(|(name, _)| name.to_string()).collect();
        for (queue, pile) in piles.queues {
            let is_asked = resolved
                .domain
                .as_ref()
                .is_some_and(|of| *of.as_str() == *queue);
            if is_asked || (*queue != *MIXED && self.known(&queue, &shaping) == key) {
                add_pile(&mut stock, &pile);
                domains.push(queue.into());
            }
        }
        domains.sort_unstable();
        domains.dedup();
        let seen = view.as_ref().map_or(0, |view| view.domain_count);
        let domain_count = seen.max(domains.len());
        domains.truncate(DOMAINS_MAX);
        let facts = self.facts(&resolved, view, &suspensions);
        Some(Full {
            resolved,
            facts,
            stock,
            domains,
            domain_count,
            node,
        })
    }

    /// The queues of the store whose mail goes where `of` does, to be made due or counted; with the
    /// number of queues of which nobody knows where they go.
    pub(crate) async fn queues_of(
        &self,
        of: &Resolved,
    ) -> Result<(Vec<Box<str>>, usize), StoreError> {
        let piles = self.piles().await;
        if let Some(why) = piles.away {
            return Err(StoreError::Unavailable(why));
        }
        let names: Vec<_> = piles
            .queues
            .into_keys()
            .filter(|name| **name != *MIXED)
            .collect();
        let unseen: Vec<_> = names
            .iter()
            .filter_map(|name| name.parse::<Domain>().ok())
            .filter(|domain| self.sending.resolver().last_known(domain).is_none())
            .collect();
        let count = unseen.len();
        let asked = unseen.into_iter().take(LOOKUPS.1).collect();
        let answered = self.look_up(asked).await;
        let shaping = self.sending.shaping();
        let is_of = |name: &str| {
            of.domain
                .as_ref()
                .is_some_and(|domain| domain.as_str() == name)
                || self.known(name, &shaping) == of.destination
        };
        let queues = names.into_iter().filter(|name| is_of(name)).collect();
        Ok((queues, count - answered))
    }

    // ---- why ----------------------------------------------------------------------------

    /// Why mail for a domain moves or does not; none: there is no such name.
    pub(crate) async fn of_domain(&self, name: &str) -> Option<Explanation> {
        let suspensions = self.suspensions().await;
        let resolved = self.resolve(name, &suspensions).await?;
        let Some(domain) = resolved.domain.clone() else {
            let full = self.destination(name).await?;
            return Some(judge::of_domain(name, &full.facts, &full.stock, &full.node));
        };
        let queue: Box<str> = domain.as_str().into();
        let now = self.clock.now();
        let scope = Scope::Domain(queue.clone(), resolved.destination.clone());
        let mut snapshot = self.sending.snapshot(scope).await;
        let waiting = snapshot.as_ref().map_or(0, |of| of.domain_waiting as u64);
        let view = snapshot.as_mut().and_then(|of| of.destinations.pop());
        let mut stock = Stock {
            leased: waiting,
            in_flight: view.as_ref().map_or(0, |view| view.in_flight as u64),
            ..Stock::default()
        };
        let (mut away, mut coarse) = (None, false);
        match self
            .store
            .work(WorkScope::Queue(queue.clone()), now, WORK_MAX)
            .await
        {
            Ok(Some(work)) => work.iter().for_each(|of| self.add_work(&mut stock, of)),
            Ok(None) => {
                coarse = true;
                let piles = self.piles().await;
                away = piles.away;
                if let Some(pile) = piles.queues.get(&queue) {
                    add_pile(&mut stock, pile);
                }
            }
            Err(error) => away = Some(error.to_string()),
        }
        let node = self.node(snapshot.as_ref(), away);
        let facts = self.facts(&resolved, view, &suspensions);
        let mixed = self
            .store
            .work(WorkScope::Queue(MIXED.into()), now, WORK_MAX)
            .await;
        let mixed = mixed.ok().flatten().unwrap_or_default();
        let somewhere: u64 = mixed.iter().map(|of| of.due + of.later).sum();
        let mut explanation = judge::of_domain(domain.as_str(), &facts, &stock, &node);
        if somewhere > 0 {
            let which = "recipients wait in lots of several small domains; whether some are of this one is known in their turn";
            explanation.unknown.push(format!("{somewhere} {which}"));
        }
        if coarse {
            explanation.unknown.push(COARSE.to_owned());
        }
        Some(explanation)
    }

    /// Why a batch moves or does not.
    pub(crate) async fn of_batch(&self, batch: &Batch) -> Result<Explanation, StoreError> {
        let id = batch.head.id;
        let now = self.clock.now();
        let work = self.store.work(WorkScope::Batch(id), now, WORK_MAX).await?;
        let coarse = work.is_none();
        let has_window = batch.head.window.is_some();
        let mut mixed = Stock {
            has_window,
            ..Stock::default()
        };
        let mut queues = Vec::new();
        for of in work.unwrap_or_default() {
            match &*of.queue == MIXED {
                true => self.add_work(&mut mixed, &of),
                false => queues.push(of),
            }
        }
        if coarse {
            (mixed.due, mixed.later) = (batch.counters.queued, batch.counters.temporary_error);
        }
        let parts = self.parts(&queues).await;
        let names = parts
            .iter()
            .map(|(resolved, _, _)| resolved.destination.clone());
        let scope = Scope::Batch(id, names.collect());
        let snapshot = self.sending.snapshot(scope).await;
        let node = self.node(snapshot.as_ref(), None);
        let suspensions = self.suspensions().await;
        let views = snapshot.iter().flat_map(|of| &of.destinations);
        let mut views: HashMap<_, _> = views
            .map(|view| (view.policy.destination.clone(), view.clone()))
            .collect();
        let mut facts: Vec<_> = parts
            .into_iter()
            .map(|(resolved, mut stock, held)| {
                stock.has_window = has_window;
                let view = views.remove(&resolved.destination);
                if let Some(view) = &view {
                    stock.in_flight = held.min(view.in_flight as u64);
                    stock.leased = (held - stock.in_flight).min(view.waiting as u64);
                } else if snapshot.is_none() {
                    stock.leased = held;
                }
                (self.facts(&resolved, view, &suspensions), stock)
            })
            .collect();
        facts.sort_by_key(|(_, stock)| std::cmp::Reverse(stock.unfinished()));
        let facts = BatchFacts {
            id: id.to_string(),
            state: batch.state,
            release_at: batch.head.release_at,
            completed_at: batch.completed_at,
            view: snapshot.as_ref().and_then(|of| of.batch),
            parts: facts,
            mixed,
            held_back: self.all_held_back(batch).await?,
        };
        let mut explanation = judge::of_batch(&facts, &node);
        if coarse && explanation.recipients.is_some() {
            explanation.unknown.push(COARSE.to_owned());
        }
        Ok(explanation)
    }

    /// What holds the rest of a batch back, when only the rest is left.
    async fn all_held_back(&self, batch: &Batch) -> Result<Option<HeldBack>, StoreError> {
        let of = &batch.counters;
        if of.scheduled == 0 || of.queued + of.temporary_error > 0 {
            return Ok(None);
        }
        self.held_back(batch, None).await
    }

    /// What holds a recipient of a batch with variants back: one that has this variant already, or
    /// gets one when the test is decided.
    async fn held_back(
        &self,
        batch: &Batch,
        variant: Option<&str>,
    ) -> Result<Option<HeldBack>, StoreError> {
        if batch.head.variants.is_none() || batch.started_at.is_none() {
            return Ok(None);
        }
        let now = self.clock.now();
        let Some(plan) = Plan::load(&*self.store, batch.head.id).await? else {
            return Ok(None);
        };
        if let Some(at) = variant.and_then(|name| plan.variant_at(batch, name)) {
            return Ok(Some(HeldBack::Variant(at)));
        }
        let (kept, _) = Kept::load(&*self.store, batch.head.id, now).await?;
        let round = u32::try_from(kept.rounds.len()).unwrap_or(u32::MAX);
        let at = plan.decide_at(batch, round, now);
        Ok(Some(match at.filter(|_| kept.decisions.is_empty()) {
            Some(at) => HeldBack::Test(at),
            None => HeldBack::Person,
        }))
    }

    /// Work by destination, with what this node holds of it.
    async fn parts(&self, queues: &[Work]) -> Vec<(Resolved, Stock, u64)> {
        let unseen: Vec<_> = queues
            .iter()
            .filter_map(|of| of.queue.parse::<Domain>().ok())
            .filter(|domain| self.sending.resolver().last_known(domain).is_none())
            .take(LOOKUPS.1)
            .collect();
        self.look_up(unseen).await;
        let shaping = self.sending.shaping();
        let mut parts: Vec<(Resolved, Stock, u64)> = Vec::new();
        let mut places: HashMap<Destination, usize> = HashMap::new();
        for of in queues {
            let destination = self.known(&of.queue, &shaping);
            let at = *places.entry(destination.clone()).or_insert_with(|| {
                let domains = [of.queue.to_string()];
                let resolved = self.of_name(destination, None, &domains, &shaping);
                parts.push((resolved, Stock::default(), 0));
                parts.len() - 1
            });
            if let Some((_, stock, held)) = parts.get_mut(at) {
                self.add_work(stock, of);
                let here = of.held.iter().filter(|held| held.node == self.journal.id());
                *held += here.map(|held| held.recipients).sum::<u64>();
            }
        }
        parts
    }

    /// Why a message moves or does not; none: its address names no domain.
    pub(crate) async fn of_message(
        &self,
        story: &MessageStory,
        batch: &Batch,
    ) -> Result<Option<Explanation>, StoreError> {
        let row = &story.recipient;
        let id = model::MessageId {
            batch: story.batch.id,
            index: row.row.index,
        };
        let domain = row.row.email.domain();
        let suspensions = self.suspensions().await;
        let Some(resolved) = self.resolve_domain(domain).await else {
            return Ok(None);
        };
        let scope = Scope::Message(id, domain.into(), resolved.destination.clone());
        let mut snapshot = self.sending.snapshot(scope).await;
        let view = snapshot.as_mut().and_then(|of| of.destinations.pop());
        let now = self.clock.now();
        let mut stock = Stock::default();
        let work = self
            .store
            .work(WorkScope::Batch(id.batch), now, WORK_MAX)
            .await?;
        let coarse = work.is_none();
        let of_queue = |of: &&Work| *of.queue == *domain || &*of.queue == MIXED;
        for of in work.iter().flatten().filter(of_queue) {
            self.add_work(&mut stock, of);
        }
        let node = self.node(snapshot.as_ref(), None);
        let last = story.attempts.iter().max_by_key(|attempt| attempt.number);
        let expires_at = story.batch.expires_at;
        let facts = MessageFacts {
            id: id.to_string(),
            status: row.status,
            next_attempt_at: row.next_attempt_at,
            shut_until: story.batch.window.as_ref().map(|window| {
                window.opens_at(
                    row.row.time_zone.as_deref(),
                    now.max(story.batch.release_at),
                )
            }),
            expires_at: expires_at.unwrap_or(story.batch.release_at + resolved.limits.expire),
            last: last.map(last_attempt),
            suppressed_for: last.and_then(|attempt| match attempt.result {
                AttemptResult::Suppressed(reason) => Some(reason),
                _ => None,
            }),
            delivered_at: row.delivered_at,
            batch_state: batch.state,
            release_at: batch.head.release_at,
            batch_view: snapshot.as_ref().and_then(|of| of.batch),
            place: snapshot
                .as_ref()
                .map_or(crate::queue::snapshot::Whereabouts::Absent, |of| of.message),
            destination: self.facts(&resolved, view, &suspensions),
            stock,
            held_back: match row.status {
                Status::Scheduled => self.held_back(batch, row.variant.as_deref()).await?,
                _ => None,
            },
        };
        let mut explanation = judge::of_message(&facts, &node);
        if coarse && explanation.state == super::State::Unknown {
            explanation.unknown.push(COARSE.to_owned());
        }
        Ok(Some(explanation))
    }

    // ---- names --------------------------------------------------------------------------

    /// What a name means: a destination that the queue, the shaping file or a suspension knows by
    /// it, else a domain.
    pub(crate) async fn resolve(&self, name: &str, suspensions: &[Suspension]) -> Option<Resolved> {
        let shaping = self.sending.shaping();
        let lower = name.to_ascii_lowercase();
        let key = Destination::named(&lower);
        let is_provider = shaping
            .providers
            .iter()
            .any(|provider| provider.name == name);
        let own = lower.parse::<Domain>().ok();
        let has_section = own
            .as_ref()
            .is_some_and(|domain| shaping.domains.contains_key(domain));
        if is_provider && !has_section {
            let key = Destination::named(name);
            return Some(self.of_name(key, None, &[], &shaping));
        }
        if !has_section {
            let known = self.sending.snapshot(Scope::Named(vec![key.clone()])).await;
            let view = known.and_then(|mut of| of.destinations.pop());
            let suspended = suspensions.iter().any(|of| *of.destination == *lower);
            if view.is_some() || suspended && own.is_none() {
                return Some(self.of_name(key, view.as_ref(), &[], &shaping));
            }
        }
        self.resolve_domain(&lower).await
    }

    async fn resolve_domain(&self, name: &str) -> Option<Resolved> {
        let domain: Domain = name.parse().ok()?;
        let looked = tokio::time::timeout(LOOKUP, self.sending.resolver().route(&domain)).await;
        let (route, dns) = match looked {
            Ok(Ok((route, _))) => (Some(route), None),
            Ok(Err(trouble)) => (None, Some(trouble.text)),
            Err(_) => (
                None,
                Some(format!(
                    "DNS gave no answer about {domain} within {LOOKUP:?}"
                )),
            ),
        };
        let shaping = self.sending.shaping();
        let mut resolved = self.placed(&domain, route.as_deref(), &shaping);
        resolved.dns = dns;
        Some(resolved)
    }

    /// Where a domain belongs whose hosts are these.
    fn placed(&self, domain: &Domain, route: Option<&Route>, shaping: &ShapingFile) -> Resolved {
        let hosts: Vec<&str> = route
            .map(|route| route.names().collect())
            .unwrap_or_default();
        let (destination, limits) = destination_of(domain, &hosts, shaping);
        let provider = shaping
            .providers
            .iter()
            .find(|of| of.name == destination.as_str());
        let (by, detail, section) = if shaping.domains.contains_key(domain) {
            let section = format!("[domain.{:?}]", domain.as_str());
            (
                RolledUp::Domain,
                format!("{domain} has a section of its own"),
                section,
            )
        } else if let Some(provider) = provider {
            let detail = format!(
                "every mail host of {domain} belongs to the provider {}",
                provider.name
            );
            (RolledUp::Provider, detail, section_of(&provider.name))
        } else if hosts.is_empty() {
            let detail = format!("the mail hosts of {domain} are not known");
            (RolledUp::Unresolved, detail, DEFAULT.to_owned())
        } else if route.is_some_and(Route::is_static) {
            let detail =
                format!("[mx] in the shaping file sends mail for {domain} to {destination}");
            (RolledUp::Hosts, detail, DEFAULT.to_owned())
        } else {
            let detail =
                format!("domains with the same mail hosts as {domain} share a destination");
            (RolledUp::Hosts, detail, DEFAULT.to_owned())
        };
        Resolved {
            domain: Some(domain.clone()),
            destination,
            by,
            detail,
            hosts: hosts.into_iter().map(str::to_owned).collect(),
            dns: None,
            limits,
            configured: self.file(section),
        }
    }

    /// A destination by its own name, of which these are domains.
    fn of_name(
        &self,
        destination: Destination,
        view: Option<&DestinationView>,
        domains: &[String],
        shaping: &ShapingFile,
    ) -> Resolved {
        let name = destination.as_str();
        let own = name.parse::<Domain>().ok();
        if let Some(domain) = own.filter(|domain| shaping.domains.contains_key(domain)) {
            return self.placed(
                &domain,
                self.sending.resolver().last_known(&domain).as_deref(),
                shaping,
            );
        }
        let provider = shaping.providers.iter().find(|of| of.name == name);
        let (by, detail, section, limits) = match provider {
            Some(provider) => (
                RolledUp::Provider,
                "a provider of the shaping file".to_owned(),
                section_of(name),
                provider.limits.clone(),
            ),
            None => (
                RolledUp::Hosts,
                "all domains with these mail hosts".to_owned(),
                DEFAULT.to_owned(),
                shaping.default.clone(),
            ),
        };
        let first = domains.first().and_then(|name| name.parse::<Domain>().ok());
        let route = first.and_then(|domain| self.sending.resolver().last_known(&domain));
        let hosts = match &route {
            Some(route) => route.names().map(str::to_owned).collect(),
            None => Vec::new(),
        };
        let by = if route.is_none() && provider.is_none() && view.is_none() {
            RolledUp::Unresolved
        } else {
            by
        };
        Resolved {
            domain: None,
            limits: view.map_or(limits, |view| view.policy.limits.clone()),
            destination,
            by,
            detail,
            hosts,
            dns: None,
            configured: self.file(section),
        }
    }

    /// The destination of a queue, as far as that is known without asking anybody.
    fn known(&self, queue: &str, shaping: &ShapingFile) -> Destination {
        let Ok(domain) = queue.parse::<Domain>() else {
            return Destination::named(queue);
        };
        let route = self.sending.resolver().last_known(&domain);
        let hosts: Vec<&str> = route
            .as_deref()
            .map(|of| of.names().collect())
            .unwrap_or_default();
        destination_of(&domain, &hosts, shaping).0
    }

    /// Has the resolver ask for domains that it does not know; how many were answered in time.
    async fn look_up(&self, domains: Vec<Domain>) -> usize {
        let ask = |domain: Domain| {
            let resolver = Arc::clone(self.sending.resolver());
            async move { resolver.route(&domain).await.is_ok() }
        };
        let asking: Vec<_> = domains.into_iter().map(ask).collect();
        let mut answers = stream::iter(asking).buffer_unordered(LOOKUPS.0);
        let mut answered = 0;
        let all = async {
            while answers.next().await.is_some() {
                answered += 1;
            }
        };
        drop(tokio::time::timeout(LOOKUP, all).await);
        answered
    }

    fn file(&self, section: String) -> Source {
        Source::File {
            file: self.shaping_file.display().to_string(),
            line: None,
            section,
        }
    }

    // ---- facts --------------------------------------------------------------------------

    fn facts(
        &self,
        resolved: &Resolved,
        view: Option<DestinationView>,
        suspensions: &[Suspension],
    ) -> DestinationFacts {
        let name = resolved.destination.as_str();
        let suspension = suspensions.iter().find(|of| &*of.destination == name);
        DestinationFacts {
            name: name.to_owned(),
            configured: resolved.configured.clone(),
            limits: self.limits(&resolved.limits, view.as_ref()),
            suspension: suspension.map(|of| Suspended {
                by: of.by.to_string(),
                reason: of.reason.to_string(),
                since: of.since,
                until: of.until,
            }),
            trouble: self.sending.troubles().of(&resolved.destination),
            view,
            dns: resolved.dns.clone(),
        }
    }

    fn limits(&self, limits: &Limits, view: Option<&DestinationView>) -> Vec<SourceLimits> {
        let used: Vec<usize> = match view {
            Some(view) => view.sources.iter().map(|source| source.source).collect(),
            None => self.sending.pool(),
        };
        let name = |at: usize| self.sources.get(at).cloned().unwrap_or_default();
        let of_source = |at: usize| {
            let lines = &limits.lines;
            let mut of = SourceLimits {
                source: name(at),
                rate: configured(limits.rate.per_second(), lines.rate),
                connections: configured(limits.connections, lines.connections),
                messages_per_connection: configured(
                    limits.messages_per_connection,
                    lines.messages_per_connection,
                ),
                blocked_until: None,
            };
            let sights = view.iter().flat_map(|view| &view.limits);
            for sight in sights.filter(|sight| sight.source == at) {
                take(&mut of, sight);
            }
            of
        };
        used.into_iter().map(of_source).collect()
    }

    fn node(&self, snapshot: Option<&Snapshot>, store_away: Option<String>) -> NodeFacts {
        NodeFacts {
            now: self.clock.now(),
            process: snapshot.map(|of| of.process),
            journal_full: !self.journal.has_room(),
            store_away,
        }
    }

    /// A store that is away has none to tell; what is asked of it next says so.
    async fn suspensions(&self) -> Vec<Suspension> {
        let found = self.store.suspensions(self.clock.now()).await;
        found.unwrap_or_default()
    }

    fn add_work(&self, stock: &mut Stock, work: &Work) {
        let node = self.journal.id();
        let elsewhere = work.held.iter().filter(|held| held.node != node);
        stock.elsewhere.extend(elsewhere.copied());
        match work.state {
            BatchState::InProgress => {
                stock.due += work.due;
                stock.later += work.later;
                stock.next_due = soonest(stock.next_due, work.next_due);
            }
            BatchState::Open | BatchState::Scheduled | BatchState::Paused => {
                stock.stopped += work.due + work.later;
                stock
                    .stopped_by
                    .get_or_insert((work.state, work.release_at));
            }
            // Left only until their holder reports.
            BatchState::Completed | BatchState::Cancelled => {}
        }
    }

    /// Due work of all queues, page by page.
    async fn piles(&self) -> Piles {
        let (limit, pages) = BACKLOG;
        let mut piles = Piles::default();
        let mut after: Option<Box<str>> = None;
        for _ in 0..pages {
            let page = self
                .store
                .backlog(self.clock.now(), after.as_deref(), limit)
                .await;
            let page = match page {
                Ok(page) => page,
                Err(error) => {
                    piles.away = Some(error.to_string());
                    return piles;
                }
            };
            let is_last = page.len() < limit as usize;
            after = page.last().map(|pile| pile.queue.clone());
            piles
                .queues
                .extend(page.into_iter().map(|pile| (pile.queue.clone(), pile)));
            if is_last {
                return piles;
            }
        }
        piles.cut = true;
        piles
    }
}

const DEFAULT: &str = "[default]";
const COARSE: &str =
    "this store does not tell what other nodes hold, nor which of it waits for a later time";

fn section_of(provider: &str) -> String {
    format!("[[provider]] {provider}")
}

/// A limit as it stands, in place of the one that is configured.
fn take(of: &mut SourceLimits, sight: &LimitSight) {
    let reason = || {
        let rule = sight.rule.as_deref().map(|rule| format!(", rule {rule}"));
        sight
            .reason
            .map(|word| format!("{word}{}", rule.unwrap_or_default()))
    };
    match sight.kind {
        // A rate of nothing is a pause, and says until when.
        LimitKind::Rate if sight.in_force <= 0.0 => {
            (of.rate.in_force, of.rate.reason) = (0.0, reason());
            of.blocked_until = sight.until;
        }
        LimitKind::Rate => {
            (of.rate.in_force, of.rate.reason, of.rate.until) =
                (sight.in_force, reason(), sight.until);
        }
        LimitKind::Connections => adapt(&mut of.connections, sight, reason()),
        LimitKind::MessagesPerConnection => {
            adapt(&mut of.messages_per_connection, sight, reason());
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a small count, kept as a number that adapts"
)]
fn adapt(limit: &mut Limit<u32>, sight: &LimitSight, reason: Option<String>) {
    limit.in_force = sight.in_force.max(0.0).min(f64::from(u32::MAX)) as u32;
    (limit.reason, limit.until) = (reason, sight.until);
}

fn configured<T: Copy>(value: T, line: Option<u32>) -> Limit<T> {
    Limit {
        in_force: value,
        base: value,
        reason: None,
        until: None,
        line,
    }
}

fn soonest(a: Option<Timestamp>, b: Option<Timestamp>) -> Option<Timestamp> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn add_pile(stock: &mut Stock, pile: &Backlog) {
    stock.due += pile.due;
    stock.next_due = soonest(stock.next_due, pile.next_due);
}

fn last_attempt(attempt: &model::Attempt) -> LastAttempt {
    let detail = &attempt.detail;
    LastAttempt {
        number: attempt.number,
        at: attempt.at,
        ambiguous: matches!(
            attempt.result,
            AttemptResult::TemporaryError {
                ambiguous: true,
                ..
            }
        ),
        class: detail.class,
        blame: detail.blame,
        reply: detail.reply.to_string(),
        host: detail.host.to_string(),
        rule: detail.rule.as_ref().map(|rule| rule.name().to_owned()),
    }
}
