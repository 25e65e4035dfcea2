//! A hit while it waits for its verdict: what people, browsers and bindings are made of then.
//!
//! Owns the words that many hits share, each kept once. Must not judge.

use std::collections::HashSet;
use std::sync::Arc;

use ::engagement::settle::Trace;
use model::{EventKind, FactId, HitKind, MessageId, Timestamp, VisitorId};
use serde_json::Value;
use store::{Happened, HitSign, MailSign};
use uuid::Uuid;

use super::docs::person_named;
use super::people::short;

/// Words kept; beyond, they are gathered anew.
const WORDS: usize = 20_000;

/// Texts that come again and again: user agents, networks, links, names of accounts and campaigns.
#[derive(Debug, Default)]
pub(super) struct Words(HashSet<Arc<str>>);

impl Words {
    fn one(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        if self.0.len() >= WORDS {
            self.0.clear();
        }
        let word: Arc<str> = text.into();
        self.0.insert(word.clone());
        word
    }
}

/// A hit that waits.
#[derive(Debug)]
pub(super) struct Hit {
    pub(super) event_id: Uuid,
    pub(super) kind: HitKind,
    pub(super) at: Timestamp,
    pub(super) account: Arc<str>,
    /// Empty: none.
    pub(super) campaign: Arc<str>,
    pub(super) message: MessageId,
    pub(super) email: Box<str>,
    /// Whose it is: [`person_named`].
    pub(super) person: Arc<str>,
    pub(super) prospect_id: Option<Box<str>>,
    /// Where the click led, shortened; empty: nowhere.
    pub(super) url: Arc<str>,
    pub(super) visitor: Option<VisitorId>,
    pub(super) variant: Option<Box<str>>,
    pub(super) metadata: Value,
}

impl Hit {
    /// The hit that a sign tells of; what is none is given back.
    pub(super) fn of(mail: MailSign, words: &mut Words) -> Result<(FactId, Self), Box<MailSign>> {
        let of = match mail.what {
            Happened::Hit(of) => of,
            what => return Err(Box::new(MailSign { what, ..mail })),
        };
        let target = of.hit.target.as_deref().unwrap_or_default();
        let hit = Self {
            event_id: mail.event_id,
            kind: of.hit.kind,
            at: mail.at,
            account: words.one(&mail.account),
            campaign: words.one(mail.campaign.as_deref().unwrap_or_default()),
            message: mail.message,
            person: person_named(mail.prospect_id.as_deref(), &mail.email).into(),
            email: mail.email,
            prospect_id: mail.prospect_id,
            url: words.one(short(target)),
            visitor: of.hit.visitor,
            variant: of.variant,
            metadata: of.metadata,
        };
        Ok((of.id, hit))
    }

    /// The type of its event.
    pub(super) fn event_kind(&self) -> EventKind {
        match self.kind {
            HitKind::Click => EventKind::EmailClicked,
            HitKind::Open | HitKind::Probe => EventKind::EmailOpened,
            HitKind::Unsubscribe => EventKind::EmailUnsubscribed,
        }
    }
}

/// A hit as it is shown to the judge.
pub(super) fn trace(mail: &MailSign, of: &HitSign, words: &mut Words) -> Trace {
    Trace {
        id: of.id,
        event_id: mail.event_id,
        message: mail.message,
        kind: of.hit.kind,
        at: mail.at,
        recorded_at: mail.recorded_at,
        link: of.hit.link,
        user_agent: words.one(&of.hit.user_agent),
        network: words.one(&of.hit.network),
        verdict: of.hit.verdict.clone(),
    }
}
