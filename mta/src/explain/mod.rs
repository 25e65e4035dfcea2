//! Why mail moves or does not: what holds it, who said so, when it next moves.
//!
//! Owns the judgement (`judge`: pure, from a picture of the queue and rows of the store to an
//! explanation) and the asking (`ask`). Must not change anything, must not stand on the way of
//! a message, and says so when it does not know.

pub(crate) mod ask;
pub(crate) mod facts;
pub(crate) mod judge;
pub(crate) mod mask;
#[cfg(test)]
mod tests;
pub mod troubles;

use std::cmp::Ordering;

use model::{Blame, Class, Timestamp};
use serde::Serialize;

/// Why a thing does or does not move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Explanation {
    pub(crate) subject: Subject,
    pub(crate) state: State,
    /// What holds it; of several what ends last. None: nothing does.
    pub(crate) constraint: Option<Constraint>,
    /// When that ends, or the next attempt is due; none: nobody can tell, or somebody has to act.
    pub(crate) next_at: Option<Timestamp>,
    /// When the rest is done at the present limits, if every attempt is taken.
    pub(crate) eta: Option<Timestamp>,
    /// What the ETA is reckoned with.
    pub(crate) eta_basis: Option<String>,
    /// Everything that holds now, the binding one first.
    pub(crate) chain: Vec<Constraint>,
    /// Recipients that are not finished, where more than one is asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) recipients: Option<Recipients>,
    /// Where they go, the most first, for a batch.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) destinations: Vec<Part>,
    /// What this answer could not take into account.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) unknown: Vec<String>,
}

/// What is asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Subject {
    pub(crate) kind: SubjectKind,
    pub(crate) id: String,
    /// Its destination; none: not known (yet), or several.
    pub(crate) destination: Option<String>,
    /// Status of a message, state of a batch.
    pub(crate) status: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SubjectKind {
    Message,
    Batch,
    Domain,
}

/// Whether it moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Mail leaves; a constraint sets the pace.
    Moving,
    /// Nothing leaves now.
    Waiting,
    /// There is nothing to send.
    Idle,
    /// It has its final status.
    Finished,
    /// This service cannot tell.
    Unknown,
}

/// The part of a batch that goes to one destination.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Part {
    pub(crate) destination: String,
    pub(crate) state: State,
    pub(crate) recipients: u64,
    pub(crate) constraint: Option<Constraint>,
    pub(crate) next_at: Option<Timestamp>,
    pub(crate) eta: Option<Timestamp>,
}

/// Unfinished recipients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Recipients {
    /// Their time has come and nobody holds them.
    pub(crate) due: u64,
    /// They wait for their next attempt.
    pub(crate) deferred: u64,
    /// Of batches that are paused, held or scheduled.
    pub(crate) stopped: u64,
    /// Held by this node, not at a connection.
    pub(crate) leased: u64,
    /// Being sent by this node.
    pub(crate) in_flight: u64,
    /// Held by other nodes.
    pub(crate) elsewhere: u64,
}

/// One thing that holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Constraint {
    pub(crate) kind: Kind,
    /// For people: one sentence.
    pub(crate) detail: String,
    /// Who or what said so.
    pub(crate) source: Option<Source>,
    pub(crate) until: Option<Timestamp>,
    /// How it ends; orders constraints.
    #[serde(skip)]
    pub(crate) end: End,
}

/// How a constraint ends, the soonest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// It lets mail through all the time.
    Flowing,
    /// By itself, within a moment.
    Moment,
    /// Then.
    At(Timestamp),
    /// By itself, nobody knows when.
    Sometime,
    /// When somebody does something.
    ByHand,
}

impl Constraint {
    pub(crate) fn new(kind: Kind, end: End, source: Option<Source>, detail: String) -> Self {
        let until = match end {
            End::At(at) => Some(at),
            End::Flowing | End::Moment | End::Sometime | End::ByHand => None,
        };
        Self {
            kind,
            detail,
            source,
            until,
            end,
        }
    }

    /// The binding one first: what ends last; of equals what stands first in [`Kind`].
    pub(crate) fn binding_first(&self, other: &Self) -> Ordering {
        other.end.cmp(&self.end).then(self.kind.cmp(&other.kind))
    }
}

/// What holds. Of those that end together, the first here is told first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// Delivered.
    Delivered,
    /// Refused for good.
    Bounce,
    /// Ended without a refusal.
    Failed,
    /// Not sent: the recipient must not be written to.
    Suppressed,
    /// Not sent: its batch was cancelled.
    Cancelled,
    /// Its time was over.
    Expired,
    /// Every recipient has a final status.
    Completed,
    /// The batch is paused.
    Paused,
    /// The batch was not started.
    Held,
    /// The time of the batch has not come.
    Scheduled,
    /// An operator keeps mail from the destination.
    Suspension,
    /// The destination said that it does not want us now.
    Block,
    /// The store does not answer.
    StoreAway,
    /// The journal has no room.
    JournalFull,
    /// The process ends.
    Draining,
    /// The destination could not be reached, and is left alone.
    Backoff,
    /// DNS gives no answer.
    Dns,
    /// The receiver asked to come again later, as a test of the sender.
    Greylisted,
    /// Nobody knows whether the last attempt arrived.
    Ambiguous,
    /// The last attempt was put off; the next is due then.
    RetryWait,
    /// The hours in which its recipient wants mail have not come.
    SendWindow,
    /// Another node holds it.
    LeasedElsewhere,
    /// The content of the batch cannot be composed yet.
    Content,
    /// Its lease ends; it is handed back and leased again.
    Lease,
    /// Where the domain's mail goes is being looked up.
    Resolving,
    /// All connections of the process are in use.
    ProcessConnections,
    /// Sessions broke; the next connection waits.
    Reconnect,
    /// Others wait for the same destination, and each gets its turns.
    Shared,
    /// The sources are new to the destination, and the budget of the day is spread over it.
    WarmUp,
    /// The rate of the destination.
    Rate,
    /// The connections that the destination gets.
    Connections,
    /// Others of the same destination go before it.
    Turn,
    /// Outcomes before it are on their way to the store.
    Window,
    /// It is on the wire.
    InFlight,
}

/// Who or what said so.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Source {
    /// Whoever submitted the batch.
    Caller,
    /// An operator.
    Operator {
        by: String,
        reason: String,
        since: Timestamp,
    },
    /// A line of a file, or a default.
    File {
        file: String,
        line: Option<u32>,
        section: String,
    },
    /// The receiving side.
    Peer {
        host: Option<String>,
        reply: Option<String>,
        class: Option<Class>,
        blame: Option<Blame>,
        rule: Option<String>,
        at: Timestamp,
    },
    /// This service itself.
    Service,
}
