//! Forgets a person whom an account erased: the prospect and whose browsers were theirs.
//!
//! Owns the way through prospects and bindings, some at a time. What the events and rows say is
//! erased by the store itself; must not know how that is done.

use ::engagement::identity::Binding;
use ::engagement::prospect::Prospect;
use model::{Timestamp, VisitorId};
use store::{Note, Store, StoreError};

use super::docs::{BINDINGS, Docs, PROSPECTS, kind_of, normalised};

/// Notes looked at in one step.
const SOME: u32 = 500;

/// Takes one step: what is known of `email` among some prospects or bindings of the account goes.
/// Where the next begins; `None`: nothing is left to look at. `after`: where this one does, none
/// for the first.
pub(crate) async fn forget(
    store: &dyn Store,
    account: &str,
    email: &str,
    after: Option<&str>,
    now: Timestamp,
) -> Result<Option<String>, StoreError> {
    let (kind, from) = match after.map(|after| after.split_once(' ').unwrap_or((after, ""))) {
        Some((BINDINGS, from)) => (BINDINGS, from),
        Some((_, from)) => (PROSPECTS, from),
        None => (PROSPECTS, ""),
    };
    let from = (!from.is_empty()).then_some(from);
    let page = store
        .notes_after(&kind_of(kind, account), from, SOME, now)
        .await?;
    let mut forgetting = Forgetting {
        docs: Docs::new(store, now),
        account,
        email: normalised(email),
    };
    for note in &page.items {
        if kind == BINDINGS {
            forgetting.binding(note).await?;
        } else {
            forgetting.prospect(note).await?;
        }
    }
    forgetting.docs.write(None).await?;
    Ok(match page.next {
        Some(next) => Some(format!("{kind} {next}")),
        None => (kind == PROSPECTS).then(|| BINDINGS.to_owned()),
    })
}

struct Forgetting<'a> {
    docs: Docs<'a>,
    account: &'a str,
    email: Box<str>,
}

impl Forgetting<'_> {
    async fn prospect(&mut self, note: &Note) -> Result<(), StoreError> {
        let Some(person) = Prospect::from_bytes(&note.value) else {
            return Ok(());
        };
        // Who has no name of the caller's is named by the address.
        if note.key != self.email && normalised(&person.email) != self.email {
            return Ok(());
        }
        for seen in &person.visitors {
            let binding = self.docs.binding(self.account, seen.binding).await?;
            if let Some(cookie) = binding.map(|of| of.cookie) {
                self.unbind(&seen.binding.to_string(), cookie).await?;
            }
        }
        self.remove(PROSPECTS, &note.key);
        Ok(())
    }

    async fn binding(&mut self, note: &Note) -> Result<(), StoreError> {
        match Binding::from_bytes(&note.value) {
            Some(of) if of.prospect == self.email || normalised(&of.email) == self.email => {
                self.unbind(&note.key, of.cookie).await
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The browser is nobody's, or whose it was before.
    async fn unbind(&mut self, id: &str, cookie: VisitorId) -> Result<(), StoreError> {
        let browser = self.docs.browser(self.account, cookie).await?;
        let _owner = browser.revoke(id);
        self.remove(BINDINGS, id);
        Ok(())
    }

    fn remove(&mut self, kind: &str, key: &str) {
        self.docs.note(Note {
            kind: kind_of(kind, self.account),
            key: key.into(),
            value: Vec::new().into(),
            expires_at: None,
        });
    }
}
