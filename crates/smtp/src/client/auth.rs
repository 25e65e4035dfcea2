//! The AUTH dialogue of a client session (RFC 4954), without the mechanisms.
//!
//! Owns the order and the bounds; what is answered to a challenge is the caller's [`Sasl`].

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::reply::Reply;

/// Challenges that are answered; the longest mechanism known has three.
const CHALLENGES_MAX: u32 = 8;

/// A side of a SASL dialogue (RFC 4422) that says who we are. One for each session.
pub trait Sasl: fmt::Debug + Send + Sync {
    /// Chooses among the mechanisms offered, which are in upper case; `None` if none will do.
    fn start(&mut self, offered: &[String]) -> Option<SaslStart>;

    /// Answers a challenge; `None` ends the dialogue: it is not one that this mechanism has. May
    /// compute for a second.
    fn respond(&mut self, challenge: &[u8]) -> Option<Vec<u8>>;

    /// Whether the server has proven all that this mechanism has it prove. A session into which it
    /// lets us without is given up.
    fn is_proven(&self) -> bool {
        true
    }
}

/// What stands in the AUTH command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaslStart {
    /// The mechanism's name.
    pub mechanism: &'static str,
    /// The initial response, where the mechanism begins with one.
    pub initial: Option<Vec<u8>>,
}

/// What a session needs to be let in.
#[derive(Debug)]
pub struct Auth {
    pub(super) sasl: Box<dyn Sasl>,
    pub(super) in_plaintext: bool,
    challenges: u32,
}

impl Auth {
    /// By `sasl`; without TLS only if `in_plaintext` says so.
    #[must_use]
    pub fn new(sasl: Box<dyn Sasl>, in_plaintext: bool) -> Self {
        Self {
            sasl,
            in_plaintext,
            challenges: 0,
        }
    }

    /// The line that answers a 334; `None` if there is nothing to say.
    pub(super) fn answer(&mut self, reply: &Reply) -> Option<String> {
        self.challenges += 1;
        if self.challenges > CHALLENGES_MAX {
            return None;
        }
        let text = reply.lines().next().unwrap_or_default();
        let challenge = STANDARD.decode(text.trim()).ok()?;
        self.sasl
            .respond(&challenge)
            .map(|response| STANDARD.encode(response))
    }
}

/// An initial response as it stands in the command: an empty one is `=` (RFC 4954 §4).
pub(super) fn encoded(initial: &[u8]) -> String {
    if initial.is_empty() {
        "=".to_owned()
    } else {
        STANDARD.encode(initial)
    }
}
