//! How a peer behaves: what it offers, keeps, refuses, delays and breaks.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smtp::{ServerConfig, ServerEvent};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Keep, Received, lock};
use crate::tls::SelfSigned;

/// Recipients a greylist remembers; beyond, it starts over, as one of finite memory does.
const GREYLIST_MAX: usize = 1_000_000;

/// Messages kept when nothing else is said.
const KEEP_DEFAULT: usize = 100_000;

/// What a peer does at one point of the dialogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A reply: code and text, which may begin with an enhanced status code. 421 closes.
    Reply(u16, Cow<'static, str>),
    /// Closes the connection without a reply.
    Disconnect,
    /// Resets the connection (RST) without a reply.
    Reset,
    /// Accepts as if all were well, and resets before the reply leaves.
    AcceptAndReset,
    /// Says nothing, ever, and keeps the connection open.
    Silence,
}

impl Answer {
    /// A reply.
    pub fn reply(code: u16, text: impl Into<Cow<'static, str>>) -> Self {
        Self::Reply(code, text.into())
    }

    /// Whether the message or command is accepted, whatever the client gets to know.
    pub(super) fn accepts(&self) -> bool {
        match self {
            Self::Reply(code, _) => (200..400).contains(code),
            Self::AcceptAndReset => true,
            Self::Disconnect | Self::Reset | Self::Silence => false,
        }
    }
}

/// What a peer is asked, and where in its life.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The point of the dialogue.
    pub event: ServerEvent,
    /// Of the transaction; empty outside, and for the null one.
    pub reverse_path: &'a str,
    /// At [`ServerEvent::Rcpt`]: whom.
    pub recipient: &'a str,
    /// Accepted so far; at [`ServerEvent::Message`]: of the message.
    pub recipients: &'a [String],
    /// At [`ServerEvent::Message`]: the message.
    pub content: &'a [u8],
    /// Which connection of the peer, counted from 1.
    pub connection: u64,
    /// Messages accepted on this connection so far.
    pub messages: u64,
}

type Rule = Arc<dyn Fn(&Question<'_>) -> Option<Answer> + Send + Sync>;

/// How a peer behaves. Built by adding to [`Temper::accepting`]; of several rules the first that
/// has an answer gives it, and without any the answer is yes.
#[derive(Clone)]
pub struct Temper {
    /// What the server offers and takes.
    pub server: ServerConfig,
    /// What it keeps; as of the start.
    pub keep: Keep,
    pub(super) tls: Option<Arc<rustls::ServerConfig>>,
    pub(super) greeting_delay: Duration,
    pub(super) command_delay: Duration,
    pub(super) message_delay: Duration,
    pub(super) forward: Option<mpsc::Sender<Received>>,
    rules: Vec<Rule>,
}

impl fmt::Debug for Temper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Temper")
            .field("server", &self.server)
            .field("keep", &self.keep)
            .field("tls", &self.tls.is_some())
            .field("rules", &self.rules.len())
            .finish_non_exhaustive()
    }
}

impl Default for Temper {
    fn default() -> Self {
        Self::accepting()
    }
}

impl Temper {
    /// Takes everything, offers everything but STARTTLS, keeps the first 100,000 messages.
    pub fn accepting() -> Self {
        Self {
            server: ServerConfig::default(),
            keep: Keep::Messages(KEEP_DEFAULT),
            tls: None,
            greeting_delay: Duration::ZERO,
            command_delay: Duration::ZERO,
            message_delay: Duration::ZERO,
            forward: None,
            rules: Vec::new(),
        }
    }

    /// Takes everything and only counts: the load test's sink.
    pub fn counting() -> Self {
        Self::accepting().keeping(Keep::Nothing)
    }

    /// Accepts these recipients (compared without case) and refuses all others: 550 5.1.1.
    #[must_use]
    pub fn knowing<S: AsRef<str>>(self, users: impl IntoIterator<Item = S>) -> Self {
        let users: HashSet<String> = users
            .into_iter()
            .map(|user| user.as_ref().to_ascii_lowercase())
            .collect();
        self.refusing_recipients(Answer::reply(550, "5.1.1 user unknown"), move |recipient| {
            !users.contains(&recipient.to_ascii_lowercase())
        })
    }

    /// Gives this answer to RCPT for recipients that are so: unknown users, full mailboxes.
    #[must_use]
    pub fn refusing_recipients(
        self,
        answer: Answer,
        so: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.rule(move |question| {
            let asked = question.event == ServerEvent::Rcpt && so(question.recipient);
            asked.then(|| answer.clone())
        })
    }

    /// Mailboxes that are so are full: 452 4.2.2 for now, or 552 5.2.2 for good.
    #[must_use]
    pub fn full_mailboxes(
        self,
        permanent: bool,
        so: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Self {
        let answer = if permanent {
            Answer::reply(552, "5.2.2 mailbox full")
        } else {
            Answer::reply(452, "4.2.2 mailbox full")
        };
        self.refusing_recipients(answer, so)
    }

    /// Refuses each recipient with 451 4.7.1 until this long after the first time.
    #[must_use]
    pub fn greylisting(self, delay: Duration) -> Self {
        let seen: Mutex<HashMap<String, Instant>> = Mutex::default();
        self.rule(move |question| {
            if question.event != ServerEvent::Rcpt {
                return None;
            }
            let now = Instant::now();
            let mut seen = lock(&seen);
            match seen.get(question.recipient) {
                Some(first) if now.duration_since(*first) >= delay => None,
                Some(_) => Some(Answer::reply(451, "4.7.1 greylisted, come again")),
                None => {
                    if seen.len() >= GREYLIST_MAX {
                        seen.clear();
                    }
                    seen.insert(question.recipient.to_owned(), now);
                    Some(Answer::reply(451, "4.7.1 greylisted, come again"))
                }
            }
        })
    }

    /// Takes so many messages on a connection and answers the next MAIL with 421.
    #[must_use]
    pub fn closing_after(self, messages: u64) -> Self {
        self.rule(move |question| {
            let over = question.event == ServerEvent::Mail && question.messages >= messages;
            over.then(|| Answer::reply(421, "4.7.0 enough for one connection"))
        })
    }

    /// Gives this answer at one point of the dialogue, always.
    #[must_use]
    pub fn answering(self, at: ServerEvent, answer: Answer) -> Self {
        self.rule(move |question| (question.event == at).then(|| answer.clone()))
    }

    /// Gives this answer the first `times` that the dialogue comes to this point, over all
    /// connections.
    #[must_use]
    pub fn answering_times(self, at: ServerEvent, times: u64, answer: Answer) -> Self {
        let left = Mutex::new(times);
        self.rule(move |question| {
            let mut left = lock(&left);
            if question.event != at || *left == 0 {
                return None;
            }
            *left -= 1;
            Some(answer.clone())
        })
    }

    /// Connects and says nothing.
    #[must_use]
    pub fn never_greeting(self) -> Self {
        self.answering(ServerEvent::Connected, Answer::Silence)
    }

    /// Resets when the final dot has come: with the message accepted, so that a second attempt is a
    /// second copy, or not.
    #[must_use]
    pub fn resetting_after_dot(self, accepted: bool) -> Self {
        let answer = if accepted {
            Answer::AcceptAndReset
        } else {
            Answer::Reset
        };
        self.answering(ServerEvent::Message, answer)
    }

    /// A rule of one's own; `None` leaves the question to the next.
    #[must_use]
    pub fn rule(
        mut self,
        rule: impl Fn(&Question<'_>) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        self.rules.push(Arc::new(rule));
        self
    }

    /// Waits so long before the greeting.
    #[must_use]
    pub fn slow_greeting(mut self, delay: Duration) -> Self {
        self.greeting_delay = delay;
        self
    }

    /// Waits so long before the reply to each command.
    #[must_use]
    pub fn slow_commands(mut self, delay: Duration) -> Self {
        self.command_delay = delay;
        self
    }

    /// Waits so long before the reply to each message.
    #[must_use]
    pub fn slow_messages(mut self, delay: Duration) -> Self {
        self.message_delay = delay;
        self
    }

    /// Offers STARTTLS with this certificate.
    #[must_use]
    pub fn with_tls(mut self, certificate: &SelfSigned) -> Self {
        self.server.starttls = true;
        self.tls = Some(certificate.server_config());
        self
    }

    /// Offers STARTTLS as `config` says.
    #[must_use]
    pub fn with_tls_config(mut self, config: Arc<rustls::ServerConfig>) -> Self {
        self.server.starttls = true;
        self.tls = Some(config);
        self
    }

    /// Its name in greeting and EHLO.
    #[must_use]
    pub fn named(mut self, host: &str) -> Self {
        host.clone_into(&mut self.server.host);
        self
    }

    /// Does not offer PIPELINING.
    #[must_use]
    pub fn without_pipelining(mut self) -> Self {
        self.server.pipelining = false;
        self
    }

    /// Does not offer CHUNKING.
    #[must_use]
    pub fn without_chunking(mut self) -> Self {
        self.server.chunking = false;
        self
    }

    /// Does not offer 8BITMIME and SMTPUTF8.
    #[must_use]
    pub fn without_eight_bit(mut self) -> Self {
        self.server.eight_bit_mime = false;
        self.server.smtp_utf8 = false;
        self
    }

    /// Keeps so much of what it receives.
    #[must_use]
    pub fn keeping(mut self, keep: Keep) -> Self {
        self.keep = keep;
        self
    }

    /// Sends each accepted message here too, waiting for room before it replies; once the receiver
    /// is gone, messages are refused with 451 rather than lost.
    #[must_use]
    pub fn forwarding(mut self, to: mpsc::Sender<Received>) -> Self {
        self.forward = Some(to);
        self
    }

    pub(super) fn decide(&self, question: &Question<'_>) -> Answer {
        let ruled = self.rules.iter().find_map(|rule| rule(question));
        ruled.unwrap_or_else(|| match question.event {
            ServerEvent::Connected => {
                Answer::Reply(220, format!("{} ESMTP", self.server.host).into())
            }
            ServerEvent::Hello => Answer::Reply(250, self.server.host.clone().into()),
            ServerEvent::StartTls => Answer::reply(220, "2.0.0 go ahead"),
            ServerEvent::Mail => Answer::reply(250, "2.1.0 ok"),
            ServerEvent::Rcpt => Answer::reply(250, "2.1.5 ok"),
            ServerEvent::Data => Answer::reply(354, "go ahead"),
            ServerEvent::Message => Answer::reply(250, "2.0.0 accepted"),
            ServerEvent::Quit => Answer::reply(221, "2.0.0 bye"),
        })
    }

    pub(super) fn delay(&self, event: ServerEvent) -> Duration {
        match event {
            ServerEvent::Connected => self.greeting_delay,
            ServerEvent::Message => self.message_delay,
            ServerEvent::Hello
            | ServerEvent::StartTls
            | ServerEvent::Mail
            | ServerEvent::Rcpt
            | ServerEvent::Data
            | ServerEvent::Quit => self.command_delay,
        }
    }
}
