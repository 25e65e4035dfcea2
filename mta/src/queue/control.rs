//! What must not be sent (any more): pauses, cancels and suppressions learnt from the control feed.
//!
//! Written by the task that follows the feed, read by the queue before composing and by connections
//! before MAIL. Leasing has checked everything older, so only what is newer than a lease matters:
//! entries live for one to two generations, and whoever was leased before the oldest of them is to
//! be leased again. So the memory is bounded however many people unsubscribe.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use model::{BatchId, SuppressionReason};
use store::{Control, Suppression};

use super::job::Item;

/// A generation ends at this age …
const GENERATION_AGE: Duration = Duration::from_secs(1_800);
/// … or with this many entries.
const GENERATION_ENTRIES: usize = 100_000;

/// Whether a message may go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// It may.
    Go,
    /// Its batch is paused.
    Paused,
    /// Its batch is cancelled.
    Cancelled,
    /// The recipient must not be written to.
    Suppressed(SuppressionReason),
    /// It was leased too long ago for this view to know: lease it again.
    Stale,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Paused,
    Cancelled,
}

#[derive(Debug)]
struct Generation {
    since: Instant,
    batches: HashMap<BatchId, Stop>,
    people: HashMap<(String, String), Vec<Suppression>>,
}

impl Generation {
    fn new(since: Instant) -> Self {
        Self {
            since,
            batches: HashMap::new(),
            people: HashMap::new(),
        }
    }

    fn entries(&self) -> usize {
        self.batches.len() + self.people.len()
    }
}

/// The view; see the module.
#[derive(Debug)]
pub struct ControlView(RwLock<Generations>);

#[derive(Debug)]
struct Generations {
    old: Generation,
    new: Generation,
}

impl ControlView {
    /// An empty view: nothing is known of the time before `now`.
    pub fn new(now: Instant) -> Self {
        Self(RwLock::new(Generations {
            old: Generation::new(now),
            new: Generation::new(now),
        }))
    }

    /// Forgets everything: what was leased before `now` is to be leased again, since nobody can say
    /// what was changed meanwhile.
    pub fn forget(&self, now: Instant) {
        let mut both = self.0.write().unwrap_or_else(PoisonError::into_inner);
        (both.old, both.new) = (Generation::new(now), Generation::new(now));
    }

    /// Takes an entry of the feed.
    pub fn learn(&self, control: &Control, now: Instant) {
        let mut both = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if both.new.entries() >= GENERATION_ENTRIES
            || now.saturating_duration_since(both.new.since) >= GENERATION_AGE
        {
            let new = std::mem::replace(&mut both.new, Generation::new(now));
            both.old = new;
        }
        let Generations { old, new } = &mut *both;
        match control {
            Control::Paused(batch) => {
                new.batches.insert(*batch, Stop::Paused);
            }
            Control::Cancelled(batch) => {
                new.batches.insert(*batch, Stop::Cancelled);
            }
            Control::Resumed(batch) => {
                for generation in [old, new] {
                    if generation.batches.get(batch) == Some(&Stop::Paused) {
                        generation.batches.remove(batch);
                    }
                }
            }
            Control::Suppressed(entry) => {
                let key = (entry.account.clone(), entry.email.clone());
                new.people.entry(key).or_default().push(entry.clone());
            }
            Control::Unsuppressed {
                account,
                email,
                list,
            } => {
                let key = (account.clone(), email.clone());
                for generation in [old, new] {
                    if let Some(entries) = generation.people.get_mut(&key) {
                        entries.retain(|entry| list.is_some() && entry.list != *list);
                    }
                }
            }
            // Of no batch and no person.
            Control::Work
            | Control::Archived(_)
            | Control::Unarchived(_)
            | Control::DestinationSuspended(_)
            | Control::DestinationResumed(_) => {}
        }
    }

    /// Whether `item`, leased at `leased_at`, may go.
    pub fn permission(&self, item: &Item, leased_at: Instant) -> Permission {
        let both = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if leased_at < both.old.since {
            return Permission::Stale;
        }
        for generation in [&both.new, &both.old] {
            match generation.batches.get(&item.batch.id) {
                Some(Stop::Cancelled) => return Permission::Cancelled,
                Some(Stop::Paused) => return Permission::Paused,
                None => {}
            }
        }
        if both.new.people.is_empty() && both.old.people.is_empty() {
            return Permission::Go;
        }
        let key = (
            item.batch.account.clone(),
            item.row.email.normalised().into_owned(),
        );
        let entries = [&both.new, &both.old]
            .into_iter()
            .filter_map(|generation| generation.people.get(&key))
            .flatten();
        entries
            .filter(|entry| entry.stops(&item.batch.list, item.batch.priority))
            .map(|entry| Permission::Suppressed(entry.reason))
            .next()
            .unwrap_or(Permission::Go)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::fixtures::item;
    use model::Timestamp;
    use service::clock::{Clock as _, SystemClock};

    fn suppression(email: &str, reason: SuppressionReason) -> Suppression {
        Suppression {
            email: email.into(),
            account: "default".into(),
            list: None,
            reason,
            source: "api".into(),
            created_at: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn what_was_learnt_stops_and_goes_on() {
        let start = SystemClock.instant();
        let view = ControlView::new(start);
        let item = item(1);
        let batch = item.batch.id;
        let learn = |control| view.learn(&control, start);
        assert_eq!(view.permission(&item, start), Permission::Go);
        learn(Control::Paused(batch));
        assert_eq!(view.permission(&item, start), Permission::Paused);
        learn(Control::Resumed(batch));
        assert_eq!(view.permission(&item, start), Permission::Go);
        learn(Control::Suppressed(suppression(
            "a@x.example",
            SuppressionReason::Manual,
        )));
        assert_eq!(
            view.permission(&item, start),
            Permission::Suppressed(SuppressionReason::Manual)
        );
        learn(Control::Unsuppressed {
            account: "default".into(),
            email: "a@x.example".into(),
            list: None,
        });
        assert_eq!(view.permission(&item, start), Permission::Go);
        learn(Control::Cancelled(batch));
        learn(Control::Resumed(batch));
        assert_eq!(view.permission(&item, start), Permission::Cancelled);
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_forgotten_for_it() {
        let start = SystemClock.instant();
        let view = ControlView::new(start);
        let item = item(1);
        view.learn(
            &Control::Suppressed(suppression("a@x.example", SuppressionReason::Complaint)),
            start,
        );
        let mut now = start;
        for n in 0..2 * GENERATION_ENTRIES + 2 {
            now += Duration::from_millis(1);
            view.learn(
                &Control::Suppressed(suppression(
                    &format!("{n}@y.example"),
                    SuppressionReason::Manual,
                )),
                now,
            );
        }
        let both = view.0.read().expect("unpoisoned");
        assert!(both.new.entries() + both.old.entries() <= 2 * GENERATION_ENTRIES);
        drop(both);
        // The complaint is forgotten here, so who was leased before is not sent to.
        assert_eq!(view.permission(&item, start), Permission::Stale);
        assert_eq!(view.permission(&item, now), Permission::Go);
    }

    #[test]
    fn after_a_gap_in_the_feed_everything_is_leased_again() {
        let start = SystemClock.instant();
        let view = ControlView::new(start);
        let item = item(1);
        view.learn(&Control::Paused(item.batch.id), start);
        let now = start + Duration::from_secs(1);
        view.forget(now);
        assert_eq!(view.permission(&item, start), Permission::Stale);
        assert_eq!(view.permission(&item, now), Permission::Go);
    }
}
