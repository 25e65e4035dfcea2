//! What this node has of the limits that all nodes keep together, those of destinations and the
//! rates that batches asked for: asked for one by one, as long as there is work, and given up after
//! it.
//!
//! All that is due is asked for at once, one question at a time. Until the first answer nothing is
//! sent under a limit; without an answer what was last known holds. Must not be used where one
//! node is all there is.

use super::*;
use crate::queue::target::Target;
use crate::shaping::{Part, units};
use store::Share;

/// Between two questions about a limit whose shares move.
const PERIOD: Duration = Duration::from_millis(250);
/// Between two about one whose shares have not moved lately.
const CALM_PERIOD: Duration = Duration::from_secs(1);
/// So many answers alike are calm.
const CALM: u32 = 8;
/// A limit without work is given up after so long.
const LINGER: Duration = Duration::from_secs(2);
/// Claims in one question.
const CLAIMS_MAX: usize = 1_000;

/// Stands for connections where only a rate is shared: every node has some of so many.
const ANY_CONNECTIONS: u32 = 60_000;

/// A limit that all nodes keep together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Those of a destination as one egress source, by index, sees it.
    Destination(Destination, usize),
    /// The rate that a batch asked for.
    Batch(BatchId),
}

/// A wish for a share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Of which limit.
    pub limit: Limit,
    /// How many connections the limit allows.
    pub connections: u32,
    /// How many whole permits its rate is shared out in; 0: in parts of any size.
    pub permits: u32,
    /// False: it is given up.
    pub wanted: bool,
}

#[derive(Debug)]
struct Claimed {
    /// When it may be asked about again.
    next: Instant,
    /// When there was work last.
    worked: Instant,
    share: Option<Share>,
    /// Answers in a row that were alike.
    calm: u32,
}

/// The shares of this node.
#[derive(Debug)]
pub(super) struct LimitShares {
    claimed: HashMap<Limit, Claimed>,
    /// Asked, and not answered.
    asking: bool,
    next: Instant,
    /// How many nodes there were when that was last told.
    nodes: u32,
}

impl LimitShares {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            claimed: HashMap::new(),
            asking: false,
            next: now,
            nodes: 1,
        }
    }

    /// There is a limit that nothing is known of.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.next = now;
    }

    /// There is work under a limit: a share of it is asked for, if it is time to.
    fn want(&mut self, limit: Limit, whole: Whole, now: Instant, claims: &mut Vec<Claim>) {
        let claimed = self.claimed.entry(limit.clone()).or_insert(Claimed {
            next: now,
            worked: now,
            share: None,
            calm: 0,
        });
        claimed.worked = now;
        if claimed.next <= now && claims.len() < CLAIMS_MAX {
            claimed.next = now + claimed.period();
            claims.push(Claim {
                limit,
                connections: whole.connections,
                permits: units(whole.pace),
                wanted: true,
            });
        }
    }
}

/// What all nodes have of a limit together.
struct Whole {
    connections: u32,
    pace: crate::shaping::Pace,
}

/// What a limit begins with: all of it where nobody else sends, else what was last known.
pub(super) fn first_part(shares: Option<&LimitShares>, limit: &Limit) -> Part {
    let Some(shares) = shares else {
        return Part::ALL;
    };
    let claimed = shares.claimed.get(limit);
    claimed
        .and_then(|claimed| claimed.share)
        .map_or(Part::NONE, part)
}

fn part(share: Share) -> Part {
    Part {
        rate: share.rate,
        connections: share.connections,
    }
}

impl QueueState {
    /// Limits are kept together with other nodes from now on.
    pub fn share_limits(&mut self) {
        self.shares = Some(LimitShares::new(self.started));
    }

    /// Asks for shares when it is time to.
    pub(super) fn ask_shares(&mut self, now: Now, out: &mut Vec<Action>) {
        let now = now.instant;
        let Self {
            shares,
            dests,
            paces,
            batches,
            ..
        } = self;
        let Some(shares) = shares.as_mut().filter(|of| !of.asking && of.next <= now) else {
            return;
        };
        shares.next = now + PERIOD / 4;
        let mut claims = Vec::new();
        for (key, dest) in dests.iter() {
            let works = !dest.turns.is_empty();
            for target in &dest.targets {
                if !works && target.conns.is_empty() {
                    continue;
                }
                let whole = target.limiter.in_force();
                let whole = Whole {
                    connections: whole.connections,
                    pace: whole.pace,
                };
                let limit = Limit::Destination(key.clone(), target.source);
                shares.want(limit, whole, now, &mut claims);
            }
        }
        for (batch, pace) in paces.iter().filter(|(of, _)| batches.contains_key(of)) {
            let whole = Whole {
                connections: ANY_CONNECTIONS,
                pace: pace.rate.into(),
            };
            shares.want(Limit::Batch(*batch), whole, now, &mut claims);
        }
        let over = |claimed: &Claimed| claimed.worked + LINGER <= now;
        let left = CLAIMS_MAX.saturating_sub(claims.len());
        let given_up = shares.claimed.iter().filter(|(_, of)| over(of));
        claims.extend(given_up.take(left).map(|(limit, _)| Claim {
            limit: limit.clone(),
            connections: 0,
            permits: 0,
            wanted: false,
        }));
        if !claims.is_empty() {
            shares.asking = true;
            out.push(Action::Claim(claims));
        }
    }

    /// Takes what was answered; none: the store did not answer.
    pub(super) fn on_limit_shares(
        &mut self,
        claims: &[Claim],
        answers: Option<Vec<Share>>,
        now: Instant,
        out: &mut Vec<Action>,
    ) {
        let Some(shares) = self.shares.as_mut() else {
            return;
        };
        shares.asking = false;
        let mut moved = Vec::new();
        match answers {
            Some(answers) => {
                for (claim, share) in claims.iter().zip(answers) {
                    shares.nodes = share.nodes.max(1);
                    let limit = &claim.limit;
                    let Some(claimed) = shares.claimed.get_mut(limit) else {
                        continue;
                    };
                    if !claim.wanted {
                        shares.claimed.remove(limit);
                        moved.push((limit, Some(Part::NONE)));
                        continue;
                    }
                    if claimed.share == Some(share) {
                        claimed.calm += 1;
                        continue;
                    }
                    (claimed.share, claimed.calm) = (Some(share), 0);
                    moved.push((limit, Some(part(share))));
                }
            }
            None => {
                let unknown = claims.iter().filter(|claim| claim.wanted);
                for Claim { limit, .. } in unknown {
                    let claimed = shares.claimed.get(limit);
                    if claimed.is_some_and(|of| of.share.is_none()) {
                        moved.push((limit, None));
                    }
                }
            }
        }
        let nodes = shares.nodes;
        for (limit, part) in moved {
            match limit {
                Limit::Destination(key, source) => {
                    self.set_part(key, *source, part, (nodes, now), out);
                }
                Limit::Batch(batch) => self.set_part_of_batch(*batch, part, nodes, now),
            }
        }
    }

    /// The part of a batch's own rate that holds from now on; none: an equal one.
    fn set_part_of_batch(&mut self, batch: BatchId, part: Option<Part>, nodes: u32, now: Instant) {
        if let Some(pace) = self.paces.get_mut(&batch) {
            let part = part.unwrap_or_else(|| Part::equal(nodes, pace.whole()));
            pace.set_part(part, nodes, now);
            self.dirty.extend(self.dests.keys().cloned());
        }
    }

    /// The part of a limit that holds from now on; none: an equal one.
    fn set_part(
        &mut self,
        key: &Destination,
        source: usize,
        part: Option<Part>,
        (nodes, now): (u32, Instant),
        out: &mut Vec<Action>,
    ) {
        let Some(dest) = self.dests.get_mut(key) else {
            return;
        };
        let Some(at) = dest.targets.iter().position(|of| of.source == source) else {
            return;
        };
        if let Some(target) = dest.targets.get_mut(at) {
            let part = part.unwrap_or_else(|| Part::equal(nodes, target.limiter.in_force()));
            // What others had of it they may have used until just now.
            let was_theirs = nodes > 1 && target.part().is_none();
            target.set_part(part, was_theirs.then_some(now));
        }
        self.close_surplus(key, at, out);
        self.dirty.insert(key.clone());
    }

    /// Whether other nodes have all connections that a destination allows.
    pub(super) fn is_elsewhere(&self, destination: &Destination) -> bool {
        let Some(shares) = &self.shares else {
            return false;
        };
        let is_none = |target: &Target| {
            let limit = Limit::Destination(destination.clone(), target.source);
            let claimed = shares.claimed.get(&limit);
            target.part().is_none() && claimed.is_some_and(|of| of.share.is_some())
        };
        let dest = self.dests.get(destination);
        dest.is_some_and(|dest| dest.targets.iter().all(is_none))
    }
}

impl Claimed {
    fn period(&self) -> Duration {
        if self.calm >= CALM {
            CALM_PERIOD
        } else {
            PERIOD
        }
    }
}
