//! The last trouble of each destination, for people who ask.
//!
//! Written when a peer refuses or cannot be reached, which is not the way of a message that is
//! taken. Bounded; what is forgotten is told by the next refusal.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use model::{Attempt, Blame, Class, Timestamp};

use crate::queue::decide::bounded;
use crate::queue::job::Trouble;
use crate::shaping::Destination;

/// Destinations remembered; beyond, a tenth is forgotten, whichever.
const DESTINATIONS_MAX: usize = 10_000;

/// Why a message was not tried whose destination had no trouble: others, or a limit, held it.
const NO_TURN: &str = "its time was over before its turn came";

/// What went wrong last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Noted {
    /// When.
    pub at: Timestamp,
    /// What it means.
    pub class: Option<Class>,
    /// Whose trouble it is.
    pub blame: Option<Blame>,
    /// The peer's words or ours; bounded and printable.
    pub reply: Box<str>,
    /// The host and address; empty: none was reached.
    pub host: Box<str>,
    /// The rule that read it.
    pub rule: Option<Box<str>>,
}

/// The memory; see the module.
#[derive(Debug, Default)]
pub struct Troubles(Mutex<HashMap<Destination, Noted>>);

impl Troubles {
    /// The last of a destination.
    pub fn of(&self, destination: &Destination) -> Option<Noted> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(destination).cloned()
    }

    /// Takes an attempt that was not taken, unless it says something of its recipient only.
    pub fn refused(&self, destination: &Destination, attempt: &Attempt) {
        let detail = &attempt.detail;
        if detail.class.is_none() || detail.blame == Some(Blame::Recipient) {
            return;
        }
        let noted = Noted {
            at: attempt.at,
            class: detail.class,
            blame: detail.blame,
            reply: detail.reply.clone(),
            host: detail.host.clone(),
            rule: detail.rule.as_ref().map(|rule| rule.name().into()),
        };
        self.note(destination, noted);
    }

    /// The destination could not be reached.
    pub fn unreachable(&self, destination: &Destination, trouble: &Trouble, at: Timestamp) {
        let text = trouble.reply.as_ref().map(ToString::to_string);
        let noted = Noted {
            at,
            class: Some(trouble.class),
            blame: Some(trouble.blame),
            reply: bounded(text.as_deref().unwrap_or(&trouble.text)),
            host: trouble.host.clone(),
            rule: None,
        };
        self.note(destination, noted);
    }

    /// Tells why a message whose time was over was not tried (again): what went wrong last at its
    /// destination since it was released. Others stay as they are.
    pub fn account_for(&self, attempt: &mut Attempt, released_at: Timestamp) {
        let detail = &mut attempt.detail;
        if detail.class != Some(Class::Expired) || !detail.reply.is_empty() {
            return;
        }
        let noted = self.of(&Destination::named(&detail.destination));
        match noted.filter(|noted| noted.at >= released_at) {
            Some(noted) => {
                detail.blame = noted.blame.or(detail.blame);
                (detail.reply, detail.host) = (noted.reply, noted.host);
            }
            None => detail.reply = NO_TURN.into(),
        }
    }

    fn note(&self, destination: &Destination, noted: Noted) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= DESTINATIONS_MAX && !known.contains_key(destination) {
            let some: Vec<_> = known.keys().take(DESTINATIONS_MAX / 10).cloned().collect();
            for old in some {
                known.remove(&old);
            }
        }
        known.insert(destination.clone(), noted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::decide::{Finding, decide};
    use crate::queue::fixtures::{item, policy};

    fn trouble(text: &str) -> Trouble {
        Trouble {
            class: Class::ConnectFailure,
            blame: Blame::Destination,
            text: text.to_owned(),
            reply: None,
            host: "mx (192.0.2.1)".into(),
            is_final: false,
        }
    }

    #[test]
    fn the_last_is_kept_and_the_memory_is_bounded() {
        let troubles = Troubles::default();
        let at = Timestamp::from_millis(1);
        for n in 0..2 * DESTINATIONS_MAX {
            troubles.unreachable(&Destination::named(&format!("d{n}")), &trouble("x"), at);
        }
        let kept = troubles.0.lock().expect("unpoisoned").len();
        assert!(kept <= DESTINATIONS_MAX, "{kept}");
        let last = Destination::named(&format!("d{}", 2 * DESTINATIONS_MAX - 1));
        troubles.unreachable(&last, &trouble("refused\r\nthere"), at);
        let noted = troubles.of(&last).expect("noted");
        assert_eq!(&*noted.reply, "refused  there");
        assert_eq!(&*noted.host, "mx (192.0.2.1)");
    }

    #[test]
    fn what_was_not_tried_in_time_says_what_went_wrong_meanwhile() {
        let troubles = Troubles::default();
        let (item, policy) = (item(1), policy());
        let at = |seconds| Timestamp::from_millis(seconds * 1_000);
        let expired = |released_at| {
            let mut attempt = decide(Finding::TooLate(None), &item, &policy, at(100), 0.5);
            troubles.account_for(&mut attempt, released_at);
            (attempt.detail.reply, attempt.detail.blame)
        };
        let no_turn = (NO_TURN.into(), Some(Blame::Destination));
        assert_eq!(expired(at(1)), no_turn);
        let ours = Trouble {
            blame: Blame::Us,
            ..trouble("421 4.7.0 too fast")
        };
        troubles.unreachable(&policy.destination, &ours, at(50));
        let told = ("421 4.7.0 too fast".into(), Some(Blame::Us));
        assert_eq!(expired(at(50)), told);
        assert_eq!(expired(at(51)), no_turn, "that was before it was there");
        let mut tried = decide(
            Finding::Unreachable(trouble("refused")),
            &item,
            &policy,
            at(i64::MAX / 2_000),
            0.5,
        );
        troubles.account_for(&mut tried, at(1));
        assert_eq!(tried.detail.class, Some(Class::Expired));
        assert_eq!(&*tried.detail.reply, "refused");
    }
}
