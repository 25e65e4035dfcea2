//! Hits: what was answered becomes a fact in the journal.
//!
//! Owns what is kept of a request and for how long the answer waits: until the record is with the
//! operating system, for an unsubscribe until it is on disk. Must not know HTTP answers, nor the
//! store: shipping is `ship`'s.
//!
//! What is kept depends on the tracking mode that the token carries: `off` keeps nothing,
//! `aggregate` and `last_date` nothing about the client; nor is anything kept about a client that
//! sends `Sec-GPC: 1`, which is only counted. A proof keeps nothing.

pub(crate) mod client;
pub(crate) mod visitor;

use arc_swap::ArcSwap;
use client::Said;
use engagement::{Observed, Rules};
use ipnet::IpNet;
use journal::{AppendError, Journal, RecordKind, WriteError};
use links::Token;
use model::{Fact, Hit, HitKind, MessageId, PageView, Seq, TrackingMode, VisitorId};
use service::clock::SharedClock;
use service::metrics::Metrics;
use std::net::IpAddr;
use std::sync::Arc;

/// The longest target that is kept with a click, in bytes.
const MAX_TARGET: usize = 2048;
/// The longest title of a page that is kept, in bytes.
const MAX_TITLE: usize = 256;

/// Why a hit is not in the journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotRecorded {
    #[error(transparent)]
    Append(#[from] AppendError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// How an unsubscribe came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// RFC 8058, mostly by the mail provider.
    OneClick,
    /// The button of our page.
    Page,
}

impl Method {
    const fn as_str(self) -> &'static str {
        match self {
            Self::OneClick => "one_click",
            Self::Page => "page",
        }
    }
}

/// A request as far as hits are concerned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) peer: IpAddr,
    pub(crate) said: Said<'a>,
}

/// Writes hits to the journal.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) journal: Journal,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// Replaced as a whole when they are read again.
    pub(crate) rules: Arc<ArcSwap<Rules>>,
}

/// A page view as it was told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Viewed {
    pub(crate) url: String,
    pub(crate) referrer: String,
    pub(crate) title: String,
}

impl Recorder {
    /// Takes an open, a click or a probe of one into the journal; its number there is to be waited
    /// for with [`Self::written`] before the answer goes out. `None`: nothing is kept of it.
    pub(crate) fn hit(
        &self,
        kind: HitKind,
        token: &Token<'_>,
        seen: Seen<'_>,
        visitor: Option<VisitorId>,
    ) -> Result<Option<Seq>, NotRecorded> {
        if token.flags.proof || token.flags.mode == TrackingMode::Off {
            return Ok(None);
        }
        let hit = self.describe(kind, token, seen, visitor);
        let worth = match kind {
            HitKind::Click => RecordKind::Click,
            HitKind::Unsubscribe => RecordKind::Unsubscribe,
            HitKind::Open | HitKind::Probe => RecordKind::Open,
        };
        Ok(Some(self.append(worth, hit)?))
    }

    /// Returns when a hit is written. Cancel-safe: the hit is kept all the same.
    pub(crate) async fn written(&self, seq: Option<Seq>) -> Result<(), NotRecorded> {
        match seq {
            Some(seq) => Ok(self.journal.written(seq).await?),
            None => Ok(()),
        }
    }

    /// Records that the person unsubscribed, whatever the tracking mode; returns when it is on
    /// disk. Cancel-safe: once begun, it is kept.
    pub(crate) async fn unsubscribe(
        &self,
        token: &Token<'_>,
        seen: Seen<'_>,
        method: Method,
    ) -> Result<(), NotRecorded> {
        if token.flags.proof {
            return Ok(());
        }
        let mut hit = self.describe(HitKind::Unsubscribe, token, seen, None);
        hit.method = Some(method.as_str().into());
        let seq = self.append(RecordKind::Unsubscribe, hit)?;
        Ok(self.journal.synced(seq).await?)
    }

    /// Records a page view; returns when it is written. Cancel-safe: once begun, it is kept.
    pub(crate) async fn page(
        &self,
        account: &str,
        visitor: VisitorId,
        viewed: &Viewed,
        seen: Seen<'_>,
    ) -> Result<(), NotRecorded> {
        let user_agent = client::user_agent(&seen.said);
        let address = client::address(seen.peer, &seen.said, &self.trusted_proxies);
        let verdict = self.rules.load().judge(&Observed {
            // Someone who is on a page got there as by a click.
            kind: HitKind::Click,
            user_agent: &user_agent,
            prefetch: seen.said.prefetch,
            fetch_dest: None,
            address: Some(address),
        });
        let printable = |text: &str, bytes| {
            let text: String = text.chars().filter(|c| !c.is_control()).collect();
            Box::from(cut(&text, bytes))
        };
        let page = PageView {
            account: account.into(),
            at: self.clock.now(),
            visitor,
            url: printable(&viewed.url, MAX_TARGET),
            referrer: printable(&viewed.referrer, MAX_TARGET),
            title: printable(&viewed.title, MAX_TITLE),
            user_agent: user_agent.into(),
            network: client::network(address),
            verdict,
        };
        let fact = Fact::Page(Box::new(page)).write_to(Vec::with_capacity(256));
        let seq = self.journal.append(RecordKind::Open, &fact)?;
        Ok(self.journal.written(seq).await?)
    }

    fn describe(
        &self,
        kind: HitKind,
        token: &Token<'_>,
        seen: Seen<'_>,
        visitor: Option<VisitorId>,
    ) -> Hit {
        let said = &seen.said;
        let user_agent = client::user_agent(said);
        let address = client::address(seen.peer, said, &self.trusted_proxies);
        let verdict = self.rules.load().judge(&Observed {
            kind,
            user_agent: &user_agent,
            prefetch: said.prefetch,
            fetch_dest: said.fetch_dest,
            address: Some(address),
        });
        let is_click = !token.target.is_empty();
        let unsubscribe = kind == HitKind::Unsubscribe;
        let objected = !unsubscribe && said.objects;
        let individual = token.flags.mode == TrackingMode::Individual && !objected;
        Hit {
            kind,
            message: MessageId {
                batch: token.batch,
                index: token.index,
            },
            at: self.clock.now(),
            link: is_click.then_some(token.link),
            target: is_click.then(|| cut(token.target, MAX_TARGET).into()),
            user_agent: if individual {
                user_agent.into()
            } else {
                "".into()
            },
            network: if individual {
                client::network(address)
            } else {
                "".into()
            },
            visitor: visitor.filter(|_| individual),
            method: objected.then(|| Hit::OBJECTED.into()),
            verdict,
        }
    }

    fn append(&self, worth: RecordKind, hit: Hit) -> Result<Seq, AppendError> {
        let (kind, actor) = (hit.kind, hit.verdict.actor);
        let fact = Fact::Hit(Box::new(hit)).write_to(Vec::with_capacity(256));
        let seq = self.journal.append(worth, &fact)?;
        self.metrics.engagement.at(kind, actor).inc();
        Ok(seq)
    }
}

/// As much of `text` as fits into `bytes`, whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::HeaderMap;
    use journal::{JournalConfig, RealDisk};
    use links::{Flags, Kind};
    use model::{BatchId, JournalId, Timestamp};
    use service::clock::Manual;

    #[tokio::test]
    async fn a_click_is_written_and_an_unsubscribe_on_disk_when_the_answer_goes_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = JournalConfig {
            // Nothing is synced unless somebody asks.
            sync_interval: None,
            ..JournalConfig::new(dir.path(), "tracker", JournalId::from_bytes([1; 16]))
        };
        let journal = Journal::open(&config, Arc::new(RealDisk)).expect("opens");
        let recorder = Recorder {
            journal: journal.clone(),
            clock: Arc::new(Manual::at(Timestamp::from_millis(1))),
            metrics: Arc::new(Metrics::new()),
            trusted_proxies: Vec::new(),
            rules: Arc::new(ArcSwap::from_pointee(Rules::shipped())),
        };
        let headers = HeaderMap::new();
        let seen = Seen {
            peer: IpAddr::from([192, 0, 2, 7]),
            said: Said::of(&headers),
        };
        let mut token = Token {
            kind: Kind::Click,
            flags: Flags {
                mode: TrackingMode::Individual,
                proof: false,
            },
            batch: BatchId::from_bytes([2; 16]),
            index: 5,
            link: 1,
            target: "https://x.example/",
        };
        let clicked = recorder.hit(HitKind::Click, &token, seen, None);
        let seq = clicked.expect("taken");
        recorder.written(seq).await.expect("recorded");
        assert_eq!(
            (journal.written_through(), journal.synced_through()),
            (1, 0)
        );
        (token.kind, token.target) = (Kind::Unsubscribe, "");
        let unsubscribed = recorder.unsubscribe(&token, seen, Method::OneClick).await;
        unsubscribed.expect("recorded");
        assert_eq!(journal.synced_through(), 2);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("é", 0), "");
    }
}
