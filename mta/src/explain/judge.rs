//! From facts to an explanation: what holds, which of it ends last, and when the rest is done.
//!
//! Pure; each kind of constraint is a row of the table in `tests`.

use model::units::format_duration;
use model::{BatchState, Class, Status, Timestamp};
use std::time::Duration;

use super::facts::{
    BatchFacts, DestinationFacts, HeldBack, LastAttempt, MessageFacts, NodeFacts, SourceLimits,
    Stock,
};
use super::troubles::Noted;
use super::{
    Constraint, End, Explanation, Kind, Part, Recipients, Source, State, Subject, SubjectKind,
};
use crate::queue::snapshot::{Block, ContentView, DestinationView, Whereabouts};
use crate::shaping::Reason;

/// Destinations told of a batch.
const PARTS_MAX: usize = 20;
/// How far ahead messages are handed to connections: a permit within it holds nobody up.
const SOON: Duration = Duration::from_millis(500);
/// The word for a pace that a warm-up sets.
const WARM_UP: &str = Reason::WarmUp.as_str();
/// An ETA beyond this says nothing.
const ETA_MAX: Duration = Duration::from_secs(400 * 86_400);

/// Why mail for a domain does or does not move.
pub(crate) fn of_domain(
    domain: &str,
    destination: &DestinationFacts,
    stock: &Stock,
    node: &NodeFacts,
) -> Explanation {
    let group = group(destination, stock, node);
    Explanation {
        subject: Subject {
            kind: SubjectKind::Domain,
            id: domain.to_owned(),
            destination: Some(destination.name.clone()),
            status: None,
        },
        state: group.state,
        constraint: group.chain.first().cloned(),
        next_at: group.next_at,
        eta: group.eta,
        eta_basis: group.eta_basis,
        recipients: Some(group.recipients),
        chain: group.chain,
        destinations: Vec::new(),
        unknown: unknown(node),
    }
}

/// Nothing is known to hold it, so far.
fn unexplained(subject: Subject, node: &NodeFacts) -> Explanation {
    Explanation {
        subject,
        state: State::Waiting,
        constraint: None,
        next_at: None,
        eta: None,
        eta_basis: None,
        chain: Vec::new(),
        recipients: None,
        destinations: Vec::new(),
        unknown: unknown(node),
    }
}

fn finished(mut explanation: Explanation, end: Constraint) -> Explanation {
    explanation.state = State::Finished;
    explanation.constraint = Some(end.clone());
    explanation.chain.push(end);
    explanation
}

/// Why a batch does or does not move.
pub(crate) fn of_batch(facts: &BatchFacts, node: &NodeFacts) -> Explanation {
    let subject = Subject {
        kind: SubjectKind::Batch,
        id: facts.id.clone(),
        destination: None,
        status: Some(facts.state.to_string()),
    };
    let mut explanation = unexplained(subject, node);
    if let Some(end) = batch_end(facts) {
        return finished(explanation, end);
    }
    let mut chain: Vec<_> = batch_stop(facts.state, facts.release_at, facts.held_back)
        .into_iter()
        .collect();
    chain.extend(node_constraints(node));
    let groups: Vec<_> = facts
        .parts
        .iter()
        .map(|(destination, stock)| (destination, group(destination, stock, node)))
        .collect();
    let mut recipients = Recipients::default();
    for (_, group) in &groups {
        recipients.add(&group.recipients);
    }
    recipients.add(&counted(&facts.mixed));
    if chain.is_empty() {
        whole_of(&mut explanation, &groups);
        chain.extend(content(facts.view.map(|view| view.content)));
        chain.extend(explanation.constraint.take());
    }
    let has_parts = groups.iter().any(|(_, group)| group.recipients.all() > 0);
    let mixed = &facts.mixed;
    if chain.is_empty() && !has_parts && mixed.later > 0 && mixed.later == mixed.unfinished() {
        explanation.state = State::Waiting;
        explanation.next_at = mixed.next_due;
        chain.extend(absent(mixed));
    }
    if mixed.unfinished() > 0 {
        let of_several = "recipients in lots of several small domains go to destinations that are not known before their turn";
        explanation
            .unknown
            .push(format!("{} {of_several}", facts.mixed.unfinished()));
    }
    chain.sort_by(Constraint::binding_first);
    settle(&mut explanation, chain);
    explanation.recipients = Some(recipients);
    let parts = groups.into_iter().map(|(destination, group)| Part {
        destination: destination.name.clone(),
        state: group.state,
        recipients: group.recipients.all(),
        constraint: group.chain.into_iter().next(),
        next_at: group.next_at,
        eta: group.eta,
    });
    explanation.destinations = parts.take(PARTS_MAX).collect();
    explanation
}

/// What the batch waits for longest, and when something of it moves next.
fn whole_of(explanation: &mut Explanation, groups: &[(&DestinationFacts, Group)]) {
    // Without an ETA nobody knows, which is longer than any.
    let last = |group: &Group| (group.eta.is_none(), group.eta);
    let unfinished = || {
        groups
            .iter()
            .filter(|(_, group)| group.recipients.all() > 0)
    };
    let slowest = unfinished().max_by_key(|(_, group)| last(group));
    let moving = unfinished().any(|(_, group)| group.state == State::Moving);
    explanation.state = match (moving, slowest) {
        (true, _) => State::Moving,
        (false, Some(_)) => State::Waiting,
        (false, None) => State::Unknown,
    };
    explanation.next_at = unfinished().filter_map(|(_, group)| group.next_at).min();
    if let Some((destination, group)) = slowest {
        explanation.eta = group.eta;
        explanation.eta_basis = group
            .eta_basis
            .as_ref()
            .map(|basis| format!("{}: {basis}", destination.name));
        explanation.constraint = group.chain.first().cloned();
        explanation.subject.destination = Some(destination.name.clone());
    }
}

fn batch_end(facts: &BatchFacts) -> Option<Constraint> {
    let (kind, detail) = match facts.state {
        BatchState::Completed => (
            Kind::Completed,
            match facts.completed_at {
                Some(at) => format!("every recipient has a final status since {at}"),
                None => "every recipient has a final status".to_owned(),
            },
        ),
        BatchState::Cancelled => (Kind::Cancelled, "the batch was cancelled".to_owned()),
        BatchState::Open | BatchState::Scheduled | BatchState::InProgress | BatchState::Paused => {
            return None;
        }
    };
    Some(Constraint::new(kind, End::ByHand, None, detail))
}

/// What the state of a batch keeps from leaving.
fn batch_stop(
    state: BatchState,
    release_at: Timestamp,
    held_back: Option<HeldBack>,
) -> Option<Constraint> {
    let caller = Some(Source::Caller);
    match state {
        BatchState::Open => Some(Constraint::new(
            Kind::Held,
            End::ByHand,
            caller,
            "the batch was submitted with hold and not started".to_owned(),
        )),
        BatchState::Paused => Some(Constraint::new(
            Kind::Paused,
            End::ByHand,
            caller,
            "the batch is paused until it is resumed".to_owned(),
        )),
        BatchState::Scheduled => Some(Constraint::new(
            Kind::Scheduled,
            End::At(release_at),
            caller,
            "the time of the batch has not come".to_owned(),
        )),
        BatchState::InProgress => held_back.map(|of| {
            let (end, detail) = match of {
                HeldBack::Variant(at) => (End::At(at), "the time of its variant has not come"),
                HeldBack::Test(at) => {
                    let detail = "held back for the A/B test of the batch, which is decided then";
                    (End::At(at), detail)
                }
                HeldBack::Person => {
                    let detail = "held back: the A/B test of the batch found no winner and is to be decided by hand";
                    (End::ByHand, detail)
                }
            };
            Constraint::new(Kind::Scheduled, end, caller, detail.to_owned())
        }),
        BatchState::Completed | BatchState::Cancelled => None,
    }
}

/// Why a message does or does not move.
pub(crate) fn of_message(facts: &MessageFacts, node: &NodeFacts) -> Explanation {
    let subject = Subject {
        kind: SubjectKind::Message,
        id: facts.id.clone(),
        destination: Some(facts.destination.name.clone()),
        status: Some(facts.status.to_string()),
    };
    let mut explanation = unexplained(subject, node);
    if let Some(end) = message_end(facts) {
        return finished(explanation, end);
    }
    if facts.place == Whereabouts::InFlight {
        let detail = "it is at a connection, being sent or next in line there".to_owned();
        let sent = Constraint::new(Kind::InFlight, End::Flowing, Some(Source::Service), detail);
        explanation.state = State::Moving;
        settle(&mut explanation, vec![sent]);
        return explanation;
    }
    let mut chain: Vec<_> = batch_stop(facts.batch_state, facts.release_at, facts.held_back)
        .into_iter()
        .collect();
    let retry_at = facts.next_attempt_at.filter(|at| *at > node.now);
    chain.extend(retry_at.map(|at| retry(at, facts.last.as_ref())));
    let shut_until = facts.shut_until.filter(|at| *at > node.now);
    chain.extend(shut_until.map(send_window));
    chain.extend(node_constraints(node));
    chain.extend(stops(&facts.destination, node.now));
    let is_due = chain.is_empty();
    chain.extend(in_turn(facts, node, is_due));
    chain.sort_by(Constraint::binding_first);
    explanation.state = state_of(&chain, &facts.destination);
    if chain.is_empty() {
        explanation.state = State::Unknown;
        explanation.unknown.push(NOT_SEEN.to_owned());
    }
    message_eta(&mut explanation, facts, &chain, node);
    settle(&mut explanation, chain);
    expiry(&mut explanation, facts.expires_at);
    explanation
}

const NOT_SEEN: &str = "it is due, and neither this node nor, as far as the store tells, another holds it: it should be leased within a second";

fn message_end(facts: &MessageFacts) -> Option<Constraint> {
    let last = facts.last.as_ref();
    let source = last.map(peer);
    let attempts = last.map_or(0, |last| last.number);
    let (kind, detail) = match facts.status {
        Status::Delivered => (
            Kind::Delivered,
            match facts.delivered_at {
                Some(at) => format!("at {at}, with attempt {attempts}"),
                None => "the receiver took it".to_owned(),
            },
        ),
        Status::Bounce => (
            Kind::Bounce,
            "the receiving side refused it for good".to_owned(),
        ),
        Status::Failed if last.is_some_and(|last| last.class == Some(Class::Expired)) => (
            Kind::Expired,
            format!("its time was over at {}", facts.expires_at),
        ),
        Status::Failed => (Kind::Failed, "it ended without a refusal".to_owned()),
        Status::Suppressed => (
            Kind::Suppressed,
            match facts.suppressed_for {
                Some(reason) => format!("not sent: the address is suppressed ({reason})"),
                None => "not sent: the address is suppressed".to_owned(),
            },
        ),
        Status::Cancelled => (
            Kind::Cancelled,
            "not sent: its batch was cancelled".to_owned(),
        ),
        Status::Scheduled | Status::Queued | Status::TemporaryError => return None,
    };
    Some(Constraint::new(kind, End::ByHand, source, detail))
}

/// The wait before the next attempt, and what was said at the last.
fn retry(at: Timestamp, last: Option<&LastAttempt>) -> Constraint {
    let Some(last) = last else {
        let detail = "its next attempt is due then".to_owned();
        return Constraint::new(Kind::RetryWait, End::At(at), None, detail);
    };
    let number = last.number;
    let (kind, detail) = match last.class {
        _ if last.ambiguous => (
            Kind::Ambiguous,
            format!(
                "attempt {number} got no reply after its end, so it may be there already; it is repeated once"
            ),
        ),
        Some(Class::Greylisted) => (
            Kind::Greylisted,
            format!("attempt {number} was greylisted: the receiver wants to see it come again"),
        ),
        Some(Class::DnsFailure) => (
            Kind::Dns,
            format!("attempt {number} found no way: DNS gave no answer"),
        ),
        Some(class) => (
            Kind::RetryWait,
            format!("attempt {number} was put off ({class}); the next is due then"),
        ),
        None => (
            Kind::RetryWait,
            format!("attempt {number} was put off; the next is due then"),
        ),
    };
    Constraint::new(kind, End::At(at), Some(peer(last)), detail)
}

fn send_window(opens_at: Timestamp) -> Constraint {
    let detail = format!("the send window of its batch opens for its recipient at {opens_at}");
    Constraint::new(
        Kind::SendWindow,
        End::At(opens_at),
        Some(Source::Caller),
        detail,
    )
}

fn peer(last: &LastAttempt) -> Source {
    let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Source::Peer {
        host: text(&last.host),
        reply: text(&last.reply),
        class: last.class,
        blame: last.blame,
        rule: last.rule.clone(),
        at: last.at,
    }
}

/// What holds a message whose time has come, or nearly.
fn in_turn(facts: &MessageFacts, node: &NodeFacts, is_due: bool) -> Vec<Constraint> {
    let service = || Some(Source::Service);
    match facts.place {
        Whereabouts::Waiting { ahead, blocked } => {
            let mut found = Vec::new();
            match blocked {
                Some(Block::Content) => {
                    found.extend(content(facts.batch_view.map(|view| view.content)));
                }
                Some(Block::Route) => {
                    let detail = "DNS is asked where mail for its domain goes".to_owned();
                    found.push(Constraint::new(
                        Kind::Resolving,
                        End::Sometime,
                        service(),
                        detail,
                    ));
                }
                Some(Block::Window) => found.push(window()),
                Some(Block::Lease) => found.push(lease()),
                None => {}
            }
            found.extend(in_flow(&facts.destination, node.now));
            if found.is_empty() {
                let detail = match ahead {
                    0 => "it is next for its domain".to_owned(),
                    _ => format!("{ahead} for its domain go first"),
                };
                found.push(Constraint::new(Kind::Turn, End::Flowing, service(), detail));
            }
            found
        }
        Whereabouts::InFlight => Vec::new(),
        Whereabouts::Absent if !is_due => Vec::new(),
        Whereabouts::Absent => not_here(facts),
    }
}

/// Why a due message is not in this process.
fn not_here(facts: &MessageFacts) -> Vec<Constraint> {
    let stock = &facts.stock;
    if stock.due == 0
        && let Some(held) = stock.elsewhere.first()
    {
        let detail = format!(
            "node {} has leased it; its own /v1/why tells more",
            held.node
        );
        let end = End::At(held.until);
        return vec![Constraint::new(
            Kind::LeasedElsewhere,
            end,
            Some(Source::Service),
            detail,
        )];
    }
    let busy = facts
        .destination
        .view
        .as_ref()
        .map_or(0, |view| view.waiting + view.in_flight);
    if stock.due > 0 && busy > 0 {
        let detail = format!(
            "{} of its batch for this domain are due, and no more is leased than can start within half a minute",
            stock.due
        );
        return vec![Constraint::new(
            Kind::Turn,
            End::Flowing,
            Some(Source::Service),
            detail,
        )];
    }
    Vec::new()
}

fn content(view: Option<ContentView>) -> Option<Constraint> {
    let service = Some(Source::Service);
    match view? {
        ContentView::Ready => None,
        ContentView::Loading => Some(Constraint::new(
            Kind::Content,
            End::Moment,
            service,
            "the content of the batch is being read and compiled".to_owned(),
        )),
        ContentView::Failed(again) => Some(Constraint::new(
            Kind::Content,
            End::Sometime,
            service,
            format!(
                "the content of the batch or its keys cannot be read; tried again at {again}, the log has the reason"
            ),
        )),
    }
}

fn window() -> Constraint {
    let detail = "as many as may be in doubt after a crash are sent; their outcomes are on the way to the store".to_owned();
    Constraint::new(Kind::Window, End::Flowing, Some(Source::Service), detail)
}

fn lease() -> Constraint {
    let detail = "its lease ends; it is handed back and leased again".to_owned();
    Constraint::new(Kind::Lease, End::Sometime, Some(Source::Service), detail)
}

/// What holds the whole node.
fn node_constraints(node: &NodeFacts) -> Vec<Constraint> {
    let mut found = Vec::new();
    let mut add = |kind, end, detail: String| {
        found.push(Constraint::new(kind, end, Some(Source::Service), detail));
    };
    if let Some(why) = &node.store_away {
        let detail = format!("{why}; what is under way is finished and kept, nothing new begins");
        add(Kind::StoreAway, End::Sometime, detail);
    }
    let paused = node.process.and_then(|process| process.paused_until);
    if node.journal_full || paused.is_some() {
        let detail = "the journal has no room for outcomes that the store has not taken".to_owned();
        add(Kind::JournalFull, End::Sometime, detail);
    }
    if node.process.is_some_and(|process| process.draining) {
        add(Kind::Draining, End::ByHand, "this process ends".to_owned());
    }
    found
}

fn unknown(node: &NodeFacts) -> Vec<String> {
    let silent = node.process.is_none();
    let text = "the queue of this node did not answer in time, so what it holds is not counted in";
    silent.then(|| text.to_owned()).into_iter().collect()
}

/// What keeps everything from a destination.
fn stops(destination: &DestinationFacts, now: Timestamp) -> Vec<Constraint> {
    let mut found = Vec::new();
    if let Some(suspension) = &destination.suspension
        && suspension.until.is_none_or(|until| until > now)
    {
        let source = Source::Operator {
            by: suspension.by.clone(),
            reason: suspension.reason.clone(),
            since: suspension.since,
        };
        let detail = format!("{} is suspended", destination.name);
        let end = suspension.until.map_or(End::ByHand, End::At);
        found.push(Constraint::new(Kind::Suspension, end, Some(source), detail));
    }
    // Mail goes on from those sources that are not blocked.
    let blocked: Option<Vec<_>> = destination
        .limits
        .iter()
        .map(|limits| limits.blocked_until.filter(|until| *until > now))
        .collect();
    if let Some(until) = blocked.and_then(|until| until.into_iter().min()) {
        let detail = format!("{} does not want mail from us now", destination.name);
        found.push(Constraint::new(
            Kind::Block,
            End::At(until),
            said(destination),
            detail,
        ));
    }
    if let Some(view) = &destination.view
        && let Some(until) = view.held_until.filter(|until| *until > now)
    {
        let detail = match view.failures {
            0 | 1 => format!("{} could not be reached", destination.name),
            times => format!(
                "{} could not be reached {times} times in a row",
                destination.name
            ),
        };
        found.push(Constraint::new(
            Kind::Backoff,
            End::At(until),
            said(destination),
            detail,
        ));
    }
    if let Some(why) = &destination.dns {
        found.push(Constraint::new(
            Kind::Dns,
            End::Sometime,
            Some(Source::Service),
            why.clone(),
        ));
    }
    found
}

/// The destination's last trouble.
fn said(destination: &DestinationFacts) -> Option<Source> {
    destination.trouble.as_ref().map(noted)
}

fn noted(trouble: &Noted) -> Source {
    let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Source::Peer {
        host: text(&trouble.host),
        reply: text(&super::mask::without_addresses(&trouble.reply)),
        class: trouble.class,
        blame: trouble.blame,
        rule: trouble.rule.as_deref().map(str::to_owned),
        at: trouble.at,
    }
}

/// What sets the pace of mail that may leave.
fn in_flow(destination: &DestinationFacts, now: Timestamp) -> Vec<Constraint> {
    let flow = flow(destination, now);
    let limits = [
        Kind::ProcessConnections,
        Kind::WarmUp,
        Kind::Rate,
        Kind::Connections,
    ];
    let is_limit = |flow: &Constraint| limits.contains(&flow.kind);
    // It ends no sooner than what they share: alone, the batch would have all of that.
    let end = flow.as_ref().map_or(End::Flowing, |flow| flow.end);
    let others = shared(destination, end).filter(|_| flow.as_ref().is_none_or(is_limit));
    others.into_iter().chain(flow).collect()
}

/// Others that wait for the same destination.
fn shared(destination: &DestinationFacts, end: End) -> Option<Constraint> {
    let view = destination.view.as_ref().filter(|view| view.waiting > 0)?;
    let share = view.share?;
    let others = match (share.batches.saturating_sub(1), share.behind_urgent) {
        (0, false) => return None,
        (0, true) => "what is transactional goes first".to_owned(),
        (others, urgent) => {
            let batches = if others == 1 { "batch" } else { "batches" };
            let accounts = match share.accounts {
                1 => "of its account".to_owned(),
                accounts => format!("({accounts} accounts in all)"),
            };
            let first = if urgent {
                ", behind what is transactional"
            } else {
                ""
            };
            let part = 100.0 * share.part;
            format!(
                "{others} other {batches} {accounts} wait for the destination, so it has {part:.0} % of the turns{first}"
            )
        }
    };
    Some(Constraint::new(
        Kind::Shared,
        end,
        Some(Source::Service),
        others,
    ))
}

/// The limit that what waits for the destination meets.
fn flow(destination: &DestinationFacts, now: Timestamp) -> Option<Constraint> {
    let view = destination.view.as_ref().filter(|view| view.waiting > 0)?;
    if view.starved {
        let detail =
            "all connections of the process are in use; one becomes free when a message is done"
                .to_owned();
        return Some(Constraint::new(
            Kind::ProcessConnections,
            End::Flowing,
            Some(Source::Service),
            detail,
        ));
    }
    let permit = view
        .sources
        .iter()
        .map(|source| source.next_permit_at)
        .min();
    if let Some(at) = permit.filter(|at| at.since(now) >= SOON) {
        return Some(rate(destination, End::At(at)));
    }
    let ready: usize = view.sources.iter().map(|source| source.ready).sum();
    if ready == 0 {
        let wait = view
            .sources
            .iter()
            .filter_map(|source| source.open_after)
            .min();
        if let Some(at) = wait.filter(|at| *at > now) {
            let detail = "sessions broke, so the next connection waits a little".to_owned();
            return Some(Constraint::new(
                Kind::Reconnect,
                End::At(at),
                said(destination),
                detail,
            ));
        }
        if view.blocked.by_content >= view.waiting {
            return content(Some(ContentView::Loading));
        }
        let opening: usize = view.sources.iter().map(|source| source.opening).sum();
        let detail = match opening {
            0 => "a connection is about to be opened".to_owned(),
            _ => "a connection is being opened".to_owned(),
        };
        let service = Some(Source::Service);
        return Some(Constraint::new(
            Kind::Connections,
            End::Flowing,
            service,
            detail,
        ));
    }
    let full: usize = view.sources.iter().map(|source| source.full).sum();
    if full >= ready && full > 0 && at_most_connections(destination, view) {
        return Some(connections(destination, ready));
    }
    if view.blocked.by_window >= view.waiting {
        return Some(window());
    }
    // Paced, and the next permit is near: the rate is what holds the rest.
    destination
        .limits
        .iter()
        .all(|limits| limits.rate.in_force.is_finite())
        .then(|| rate(destination, End::Flowing))
}

/// Every source has as many connections as it may.
fn at_most_connections(destination: &DestinationFacts, view: &DestinationView) -> bool {
    view.sources.iter().all(|source| {
        let limit = destination
            .limits
            .get(source.source)
            .or(destination.limits.first());
        limit.is_none_or(|limit| {
            source.ready + source.opening >= limit.connections.in_force as usize
        })
    })
}

fn rate(destination: &DestinationFacts, end: End) -> Constraint {
    let each: Vec<_> = destination.limits.iter().map(told).collect();
    let line = destination.limits.first().and_then(|of| of.rate.line);
    let in_file = || Some(at_line(&destination.configured, line));
    let mut reasons = destination.limits.iter().map(reason);
    if !destination.limits.is_empty() && reasons.all(|reason| reason == Some(WARM_UP)) {
        let detail = format!(
            "all sources are new to {}, which gets {} from us on this day of the warm-up",
            destination.name,
            each.join(", ")
        );
        return Constraint::new(Kind::WarmUp, end, in_file(), detail);
    }
    let detail = format!("{} takes {} from us", destination.name, each.join(", "));
    let mut reasons = destination.limits.iter().filter_map(reason);
    let adapted = reasons.any(|reason| reason != WARM_UP);
    let source = if adapted { said(destination) } else { None };
    Constraint::new(Kind::Rate, end, source.or_else(in_file), detail)
}

/// Why the rate of a source is not as configured, in a word.
fn reason(limits: &SourceLimits) -> Option<&str> {
    limits.rate.reason.as_deref()
}

/// The place of one limit in the file of all.
fn at_line(configured: &Source, of: Option<u32>) -> Source {
    let mut source = configured.clone();
    if let Source::File { line, .. } = &mut source {
        *line = of.or(*line);
    }
    source
}

fn told(limits: &SourceLimits) -> String {
    let rate = rate_text(limits.rate.in_force);
    let base = rate_text(limits.rate.base);
    match &limits.rate.reason {
        Some(reason) => format!("{rate} (configured {base}; {reason}) by {}", limits.source),
        None => format!("{rate} by {}", limits.source),
    }
}

fn connections(destination: &DestinationFacts, open: usize) -> Constraint {
    let detail = format!(
        "all {open} connections that {} gets are busy",
        destination.name
    );
    let line = destination
        .limits
        .first()
        .and_then(|of| of.connections.line);
    let source = Some(at_line(&destination.configured, line));
    Constraint::new(Kind::Connections, End::Flowing, source, detail)
}

/// `5/s`, `12/m`, `3/h`, `unlimited`: the largest unit in which it is at least one.
pub(crate) fn rate_text(per_second: f64) -> String {
    if per_second.is_infinite() {
        return "unlimited".to_owned();
    }
    if per_second <= 0.0 {
        return "nothing".to_owned();
    }
    let units = [(1.0, "s"), (60.0, "m"), (3_600.0, "h")];
    let fit = units
        .iter()
        .find(|(seconds, _)| per_second * seconds >= 0.999);
    let (seconds, unit) = fit.copied().unwrap_or((86_400.0, "d"));
    let count = per_second * seconds;
    if (count - count.round()).abs() < 0.05 {
        format!("{count:.0}/{unit}")
    } else {
        format!("{count:.1}/{unit}")
    }
}

// ---- groups -----------------------------------------------------------------------------

/// What is found out about recipients who go to one destination.
pub(crate) struct Group {
    pub(crate) state: State,
    pub(crate) chain: Vec<Constraint>,
    pub(crate) next_at: Option<Timestamp>,
    pub(crate) eta: Option<Timestamp>,
    pub(crate) eta_basis: Option<String>,
    pub(crate) recipients: Recipients,
}

/// Judges recipients who go to one destination.
pub(crate) fn group(destination: &DestinationFacts, stock: &Stock, node: &NodeFacts) -> Group {
    let recipients = counted(stock);
    let mut chain = node_constraints(node);
    chain.extend(stops(destination, node.now));
    let present = recipients.due + recipients.leased + recipients.in_flight;
    if present > 0 {
        chain.extend(in_flow(destination, node.now));
    } else {
        chain.extend(absent(stock));
    }
    chain.sort_by(Constraint::binding_first);
    let state = match recipients.all() {
        0 => State::Idle,
        _ => state_of(&chain, destination),
    };
    let work = (present > 0).then_some(present);
    let view = destination.view.as_ref();
    let part = view.and_then(|view| view.share).map_or(1.0, |of| of.part);
    let (eta, eta_basis) = eta((destination, part), work, stock, &chain, node.now);
    let next_at = chain.first().and_then(|first| first.until);
    Group {
        state,
        next_at,
        eta,
        eta_basis,
        recipients,
        chain,
    }
}

/// What holds when nothing is due here.
fn absent(stock: &Stock) -> Vec<Constraint> {
    let mut found = Vec::new();
    if let (Some(at), 1..) = (stock.next_due, stock.later) {
        let (kind, why) = match stock.has_window {
            true => (
                Kind::SendWindow,
                "wait for the send window or their next attempt",
            ),
            false => (Kind::RetryWait, "put off"),
        };
        let detail = format!("{} {why}, the first is due then", stock.later);
        found.push(Constraint::new(kind, End::At(at), None, detail));
    }
    if let Some(held) = stock.elsewhere.first() {
        let detail = format!("node {} has leased {}", held.node, stock.held_elsewhere());
        let end = End::At(held.until);
        found.push(Constraint::new(
            Kind::LeasedElsewhere,
            end,
            Some(Source::Service),
            detail,
        ));
    }
    if found.is_empty()
        && let Some((state, at)) = stock.stopped_by
    {
        found.extend(batch_stop(state, at, None));
    }
    found
}

fn counted(stock: &Stock) -> Recipients {
    Recipients {
        due: stock.due,
        deferred: stock.later,
        stopped: stock.stopped,
        leased: stock.leased,
        in_flight: stock.in_flight,
        elsewhere: stock.held_elsewhere(),
    }
}

impl Recipients {
    /// All of them.
    pub(crate) fn all(&self) -> u64 {
        self.due + self.deferred + self.stopped + self.leased + self.in_flight + self.elsewhere
    }

    fn add(&mut self, other: &Self) {
        self.due += other.due;
        self.deferred += other.deferred;
        self.stopped += other.stopped;
        self.leased += other.leased;
        self.in_flight += other.in_flight;
        self.elsewhere += other.elsewhere;
    }
}

fn state_of(chain: &[Constraint], destination: &DestinationFacts) -> State {
    let held = chain.iter().any(|of| {
        // A permit that comes within seconds is the pace, not a stop.
        of.end != End::Flowing && !matches!(of.kind, Kind::Rate | Kind::Shared | Kind::Window)
    });
    let busy = destination
        .view
        .as_ref()
        .is_some_and(|view| view.in_flight > 0 || view.waiting > 0);
    match (held, chain.is_empty()) {
        (true, _) => State::Waiting,
        (false, true) if !busy => State::Waiting,
        (false, _) => State::Moving,
    }
}

// ---- when -------------------------------------------------------------------------------

/// How many go to the destination in a second, and where that number is from.
pub(crate) fn throughput(destination: &DestinationFacts) -> Option<(f64, String)> {
    let allowed: f64 = destination
        .limits
        .iter()
        .map(|limits| limits.rate.in_force)
        .sum();
    let view = destination.view.as_ref();
    let pace = view.map_or(0.0, |view| view.pace);
    let busy = view.is_some_and(|view| view.waiting > 0 && view.in_flight > 0);
    if pace > 0.0 && (allowed.is_infinite() || busy && pace < 0.8 * allowed) {
        return Some((
            pace,
            format!("the pace of the last minute, {}", rate_text(pace)),
        ));
    }
    let sources = destination.limits.len();
    (allowed.is_finite() && allowed > 0.0).then(|| {
        let by = match sources {
            1 => String::new(),
            _ => format!(" over {sources} sources"),
        };
        (
            allowed,
            format!("the rate in force, {}{by}", rate_text(allowed)),
        )
    })
}

/// When `work` recipients and those put off are done, with this part of a destination's turns.
fn eta(
    (destination, part): (&DestinationFacts, f64),
    work: Option<u64>,
    stock: &Stock,
    chain: &[Constraint],
    now: Timestamp,
) -> (Option<Timestamp>, Option<String>) {
    let start = match chain.first().map(|binding| binding.end) {
        Some(End::ByHand | End::Sometime) => return (None, None),
        Some(End::At(at)) => at.max(now),
        Some(End::Flowing | End::Moment) | None => now,
    };
    if stock.stopped > 0 || (work.is_none() && stock.later == 0) {
        return (None, None);
    }
    let Some((whole, mut basis)) = throughput(destination) else {
        return (None, None);
    };
    if part < 1.0 {
        basis += &format!(", {:.0} % of it", 100.0 * part);
    }
    let per_second = part * whole;
    let now_done = work.and_then(|work| after(start, work, per_second));
    let later_done = stock
        .next_due
        .filter(|_| stock.later > 0)
        .and_then(|due| after(due.max(start), stock.later, per_second));
    (now_done.max(later_done), Some(basis))
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn after(start: Timestamp, work: u64, per_second: f64) -> Option<Timestamp> {
    let seconds = work as f64 / per_second;
    (seconds < ETA_MAX.as_secs_f64()).then(|| start + Duration::from_secs_f64(seconds))
}

fn message_eta(
    explanation: &mut Explanation,
    facts: &MessageFacts,
    chain: &[Constraint],
    node: &NodeFacts,
) {
    let ahead = match facts.place {
        Whereabouts::Waiting { ahead, .. } => ahead as u64 + 1,
        // At the latest, behind all that is due of its batch for its domain.
        Whereabouts::Absent => {
            let here = facts
                .destination
                .view
                .as_ref()
                .map_or(0, |view| view.waiting as u64);
            facts.stock.due + here + 1
        }
        Whereabouts::InFlight => return,
    };
    let retry_only = facts.next_attempt_at.is_some_and(|at| at > node.now);
    let stock = Stock::default();
    let work = if retry_only { 1 } else { ahead };
    (explanation.eta, explanation.eta_basis) = eta(
        (&facts.destination, 1.0),
        Some(work),
        &stock,
        chain,
        node.now,
    );
}

/// The binding constraint and its end out of the whole chain.
fn settle(explanation: &mut Explanation, chain: Vec<Constraint>) {
    if let Some(binding) = chain.first() {
        explanation.constraint = Some(binding.clone());
        match binding.end {
            End::At(at) => explanation.next_at = Some(at),
            End::ByHand | End::Sometime => (explanation.next_at, explanation.eta) = (None, None),
            End::Flowing | End::Moment => {}
        }
        if matches!(binding.end, End::ByHand | End::Sometime | End::At(_))
            && explanation.state == State::Moving
            && !matches!(binding.kind, Kind::Rate | Kind::Shared | Kind::Window)
        {
            explanation.state = State::Waiting;
        }
    }
    explanation.chain = chain;
}

/// A message that cannot move before its time is over is given up then.
fn expiry(explanation: &mut Explanation, expires_at: Timestamp) {
    let never = explanation
        .constraint
        .as_ref()
        .is_some_and(|binding| binding.end == End::ByHand);
    if never || explanation.next_at.is_none_or(|next| next < expires_at) {
        return;
    }
    let left = explanation
        .next_at
        .map(|next| format_duration(Duration::from_secs(next.since(expires_at).as_secs())));
    let detail = format!(
        "its time is over {} before that: it is given up then",
        left.unwrap_or_default()
    );
    let over = Constraint::new(
        Kind::Expired,
        End::At(expires_at),
        Some(Source::Caller),
        detail,
    );
    explanation.chain.push(over);
    (explanation.next_at, explanation.eta) = (Some(expires_at), None);
}
