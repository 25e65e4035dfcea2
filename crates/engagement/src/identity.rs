//! Whose browser it is: cookies bound to prospects, reversibly.
//!
//! A cookie names a browser. The clicks of a person bind it to a prospect; a cookie that belongs to
//! another prospect starts a new visitor from that click on, and leaves history and score where
//! they were. Nothing is merged: a binding is one record, and revoking it gives back what was.
//!
//! | the cookie is | a person's click on a mail of P |
//! |---|---|
//! | nobody's | bound to P; pages of the last 30 days become P's |
//! | P's | stays |
//! | another's | `identity.conflict`: a new visitor, bound to P |
//! | another's, and P's own browser had clicked in this very mail | `identity.conflict`, `forwarded`: nothing is bound |
//! | nobody's, and another browser had clicked in this very mail | bound with `forward_suspected`, confidence `low` |

use model::{MessageId, Timestamp, VisitorId};
use serde::{Deserialize, Serialize};

/// Pages kept of a browser that is nobody's.
const PAGES: usize = 50;
/// Prospects that a browser is remembered to have had.
const OWNERS: usize = 20;
/// How long pages of an unknown browser may become somebody's.
pub const BACKFILL_DAYS: i64 = 30;
const DAY: i64 = 86_400_000;

/// The form of [`Browser`] and [`Binding`] as they are stored.
const FORM: u8 = 1;
/// Most are not longer, in bytes.
const MOSTLY: usize = 256;

/// A page that a browser saw while it was nobody's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// The event.
    pub event_id: Box<str>,
    /// When.
    pub at: Timestamp,
    /// Which, at most 200 bytes.
    pub url: Box<str>,
    /// By a person, as far as the request tells.
    pub human: bool,
}

/// Whose a browser is, from one click on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The prospect.
    pub prospect: Box<str>,
    /// The visitor that stands for this browser in the prospect's hands.
    pub visitor: VisitorId,
    /// The binding.
    pub binding: Box<str>,
}

/// One cookie.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Browser {
    /// Whose it was, the newest last.
    pub owners: Vec<Owner>,
    /// What it saw while it was nobody's.
    pub pages: Vec<Page>,
}

/// One binding: append-only, revocable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The cookie.
    pub cookie: VisitorId,
    /// The visitor.
    pub visitor: VisitorId,
    /// The prospect.
    pub prospect: Box<str>,
    /// Its address at that time.
    pub email: Box<str>,
    /// Since when.
    pub at: Timestamp,
    /// The click that proves it.
    pub message: MessageId,
    /// Its event.
    pub event_id: Box<str>,
    /// Another browser had clicked in the same mail.
    pub forward_suspected: bool,
    /// Since when it no longer holds.
    pub revoked_at: Option<Timestamp>,
}

/// A person's click.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Click {
    /// The recipient's prospect.
    pub prospect: Box<str>,
    /// The name of the binding, should there be one; the same for the same click.
    pub binding: Box<str>,
    /// The visitor that a conflict starts; the same for the same click.
    pub fresh: VisitorId,
    /// The browser that clicked in this mail first, if it was another.
    pub clicked_before: Option<VisitorId>,
    /// When.
    pub at: Timestamp,
}

/// What a click says about a browser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// It was this prospect's already.
    Same,
    /// It is this prospect's from now on.
    Bound {
        /// The visitor.
        visitor: VisitorId,
        /// The prospect that it leaves, if it was somebody's.
        from: Option<Owner>,
        /// Another browser had clicked in the same mail.
        forward_suspected: bool,
        /// Pages that become the prospect's.
        pages: Vec<Page>,
    },
    /// The mail was passed on: the browser stays its owner's.
    Forwarded {
        /// Whose it is.
        owner: Owner,
    },
}

impl Browser {
    /// Whose it is now.
    pub fn owner(&self) -> Option<&Owner> {
        self.owners.last()
    }

    /// A person clicked with the cookie `cookie`.
    pub fn click(&mut self, cookie: VisitorId, click: Click) -> Found {
        let forward_suspected = click.clicked_before.is_some();
        let from = match self.owner() {
            Some(owner) if owner.prospect == click.prospect => return Found::Same,
            Some(owner) if forward_suspected => {
                return Found::Forwarded {
                    owner: owner.clone(),
                };
            }
            other => other.cloned(),
        };
        let visitor = if from.is_some() { click.fresh } else { cookie };
        self.owners.push(Owner {
            prospect: click.prospect,
            visitor,
            binding: click.binding,
        });
        if self.owners.len() > OWNERS {
            self.owners.remove(0);
        }
        let since = click.at.millis() - BACKFILL_DAYS * DAY;
        let mut pages = std::mem::take(&mut self.pages);
        pages.retain(|page| page.at.millis() >= since);
        Found::Bound {
            visitor,
            from,
            forward_suspected,
            pages,
        }
    }

    /// Keeps a page of a browser that is nobody's.
    pub fn see(&mut self, page: Page) {
        if self
            .pages
            .iter()
            .any(|known| known.event_id == page.event_id)
        {
            return;
        }
        self.pages.push(page);
        if self.pages.len() > PAGES {
            self.pages.remove(0);
        }
    }

    /// Undoes a binding: whoever had it before has it again. Whose it was by that binding.
    pub fn revoke(&mut self, binding: &str) -> Option<Owner> {
        let at = self.owners.iter().position(|of| *of.binding == *binding)?;
        Some(self.owners.remove(at))
    }

    /// As it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        write(self)
    }

    /// Reads what is stored; `None` when it is of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        read(bytes)
    }
}

impl Binding {
    /// As it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        write(self)
    }

    /// Reads what is stored; `None` when it is of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        read(bytes)
    }
}

pub(crate) fn write(of: &impl Serialize) -> Vec<u8> {
    // A Vec grows and these types have no failing serializer: there is no error to have.
    let mut bytes = Vec::with_capacity(MOSTLY);
    bytes.push(FORM);
    postcard::to_extend(of, bytes).unwrap_or_default()
}

pub(crate) fn read<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    match bytes.split_first() {
        Some((&FORM, rest)) => postcard::from_bytes(rest).ok(),
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn visitor(byte: u8) -> VisitorId {
        VisitorId::from_bytes([byte; 16])
    }

    fn click(prospect: &str, binding: &str) -> Click {
        Click {
            prospect: prospect.into(),
            binding: binding.into(),
            fresh: visitor(9),
            clicked_before: None,
            at: Timestamp::from_millis(40 * DAY),
        }
    }

    fn page(id: &str, day: i64) -> Page {
        Page {
            event_id: id.into(),
            at: Timestamp::from_millis(day * DAY),
            url: "https://shop.example/".into(),
            human: true,
        }
    }

    #[test]
    fn an_unknown_browser_is_bound_with_the_pages_of_thirty_days() {
        let mut browser = Browser::default();
        for (id, day) in [("old", 9), ("new", 12), ("new", 12)] {
            browser.see(page(id, day));
        }
        let found = browser.click(visitor(1), click("a", "b1"));
        let Found::Bound {
            visitor: v,
            from,
            forward_suspected,
            pages,
        } = found
        else {
            panic!("{found:?}")
        };
        assert_eq!((v, from, forward_suspected), (visitor(1), None, false));
        assert_eq!(pages, [page("new", 12)]);
        assert_eq!(browser.click(visitor(1), click("a", "b2")), Found::Same);
    }

    #[test]
    fn anothers_browser_starts_a_new_visitor_and_a_revoked_binding_gives_back_what_was() {
        let mut browser = Browser::default();
        browser.click(visitor(1), click("a", "b1"));
        let found = browser.click(visitor(1), click("b", "b2"));
        let Found::Bound {
            visitor: v, from, ..
        } = found
        else {
            panic!("{found:?}")
        };
        assert_eq!(v, visitor(9));
        assert_eq!(from.expect("an owner").visitor, visitor(1));
        assert_eq!(browser.owner().map(|of| &*of.prospect), Some("b"));
        let revoked = browser.revoke("b2").expect("it was there");
        assert_eq!(&*revoked.prospect, "b");
        assert_eq!(browser.owner().map(|of| &*of.prospect), Some("a"));
        assert_eq!(browser.revoke("b2"), None);
    }

    #[test]
    fn a_forwarded_mail_moves_nobody() {
        let passed_on = |prospect: &str| Click {
            clicked_before: Some(visitor(3)),
            ..click(prospect, "b2")
        };
        let mut stranger = Browser::default();
        let found = stranger.click(visitor(1), passed_on("a"));
        assert!(matches!(
            found,
            Found::Bound {
                forward_suspected: true,
                ..
            }
        ));
        let mut colleague = Browser::default();
        colleague.click(visitor(2), click("b", "b1"));
        let found = colleague.click(visitor(2), passed_on("a"));
        assert!(matches!(found, Found::Forwarded { .. }));
        assert_eq!(colleague.owner().map(|of| &*of.prospect), Some("b"));
    }

    #[test]
    fn a_browser_is_bounded() {
        let mut browser = Browser::default();
        for number in 0..200_i64 {
            browser.see(page(&number.to_string(), 1));
            let name = number.to_string();
            browser.click(visitor(1), click(&name, &name));
            browser.see(page(&number.to_string(), 1));
        }
        assert!(browser.owners.len() <= OWNERS && browser.pages.len() <= PAGES);
        assert_eq!(Browser::from_bytes(&browser.to_bytes()), Some(browser));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _read = Browser::from_bytes(&bytes);
            let _read = Binding::from_bytes(&[&[FORM], bytes.as_slice()].concat());
        }
    }
}
