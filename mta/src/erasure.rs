//! Erasing a person at the caller's word (contract, section 6).
//!
//! The order is noted in the store before anything is done, so that it is carried out whoever ends in
//! the middle; it is carried out twice, the second time an hour later, for what was on its way. The
//! note, and with it the address, goes when that is done. Must not know where a person is written.

use std::time::Duration;

use model::Timestamp;
use serde::{Deserialize, Serialize};
use service::clock::SharedClock;
use store::{Erase, Note, Store, StoreError};

use crate::jobs::engagement::forget;

/// The kind of the notes of orders.
const KIND: &str = "erasure";
/// Between the first time and the second.
const AGAIN: Duration = Duration::from_secs(3_600);
/// Steps between two notes of how far it is.
const NOTED: u32 = 32;
/// After a step, so that nothing that sends waits.
const PAUSE: Duration = Duration::from_millis(5);

/// An order to erase a person.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Order {
    account: String,
    email: String,
    /// When it was given.
    pub(crate) since: Timestamp,
    /// It was carried out once.
    pub(crate) again: bool,
    /// Where the store is.
    after: Option<String>,
    /// What is made of events has its turn, from here on; empty: from the beginning.
    #[serde(default)]
    people: Option<String>,
}

impl Order {
    /// Notes an order; one that is there already begins anew.
    pub(crate) async fn give(
        store: &dyn Store,
        account: &str,
        email: &str,
        now: Timestamp,
    ) -> Result<Self, StoreError> {
        let order = Self {
            account: account.to_owned(),
            email: email.to_owned(),
            since: now,
            again: false,
            after: None,
            people: None,
        };
        order.save(store, now).await?;
        Ok(order)
    }

    /// The orders that are not carried out in full; what cannot be read is told in the log.
    pub(crate) async fn all(store: &dyn Store, now: Timestamp) -> Result<Vec<Self>, StoreError> {
        let notes = store.notes(KIND, now).await?;
        let read = |note: &Note| {
            let order = serde_json::from_slice(&note.value);
            order
                .inspect_err(
                    |error| tracing::error!(%error, "an order to erase somebody cannot be read"),
                )
                .ok()
        };
        Ok(notes.iter().filter_map(read).collect())
    }

    /// Whether there is something to do now.
    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        !self.again || now >= self.since + AGAIN
    }

    fn note(&self, value: Vec<u8>) -> Note {
        Note {
            kind: KIND.into(),
            key: format!("{} {}", self.account, self.email).into(),
            value: value.into(),
            expires_at: None,
        }
    }

    async fn save(&self, store: &dyn Store, now: Timestamp) -> Result<(), StoreError> {
        // Every field has a form in JSON.
        let value = serde_json::to_vec(self).unwrap_or_default();
        store.put_notes(vec![self.note(value)], now).await
    }

    /// Carries it out for at most this long; whether it came to the end of a time.
    pub(crate) async fn carry_out(
        &mut self,
        store: &dyn Store,
        clock: &SharedClock,
        at_most: Duration,
    ) -> Result<bool, StoreError> {
        let begun = clock.instant();
        for step in 1_u32.. {
            if self.step(store, clock.now()).await? {
                break;
            }
            let late = clock.instant() - begun >= at_most;
            if late || step % NOTED == 0 {
                self.save(store, clock.now()).await?;
            }
            if late {
                return Ok(false);
            }
            tokio::time::sleep(PAUSE).await;
        }
        if self.again {
            let gone = self.note(Vec::new());
            store.put_notes(vec![gone], clock.now()).await?;
        } else {
            self.again = true;
            self.save(store, clock.now()).await?;
        }
        Ok(true)
    }

    /// First the store erases, then the prospects and browsers made of its events go. Whether that
    /// was the last step.
    async fn step(&mut self, store: &dyn Store, now: Timestamp) -> Result<bool, StoreError> {
        if let Some(from) = self.people.take() {
            let from = (!from.is_empty()).then_some(from.as_str());
            self.people = forget(store, &self.account, &self.email, from, now).await?;
            return Ok(self.people.is_none());
        }
        let of = Erase {
            account: self.account.clone(),
            email: self.email.clone(),
            after: self.after.take(),
        };
        self.after = store.erase(of, now).await?.next;
        if self.after.is_none() {
            self.people = Some(String::new());
        }
        Ok(false)
    }
}
