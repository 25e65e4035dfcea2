//! AUTH PLAIN and LOGIN on the server side (RFC 4954, RFC 4616): one user, for tests and sinks.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use smtp_proto::{AUTH_LOGIN, AUTH_PLAIN};

use super::{Mode, ServerSession};

/// What the next line of the client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The whole response of PLAIN.
    Plain,
    /// LOGIN: the user.
    User,
    /// LOGIN: the password.
    Password,
}

impl ServerSession {
    pub(super) fn auth(&mut self, mechanism: u64, initial: &str) {
        if self.user.is_some() || self.mail {
            return self.refuse(503, "5.5.1 not now");
        }
        let step = match mechanism {
            AUTH_PLAIN => Step::Plain,
            AUTH_LOGIN => Step::User,
            _ => return self.refuse(504, "5.5.4 mechanism not offered"),
        };
        if initial.is_empty() {
            self.challenge(step);
        } else {
            self.take_response(step, initial);
        }
    }

    fn challenge(&mut self, step: Step) {
        self.mode = Mode::Auth(step);
        let prompt = match step {
            Step::Plain => "",
            Step::User => "Username:",
            Step::Password => "Password:",
        };
        self.reply(334, &STANDARD.encode(prompt));
    }

    pub(super) fn challenge_answered(&mut self, step: Step, line: &[u8]) {
        self.mode = Mode::Command;
        match std::str::from_utf8(line).map(str::trim_end) {
            Ok("*") => self.reply(501, "5.7.0 cancelled"),
            Ok(line) => self.take_response(step, line),
            Err(_) => self.refuse(501, "5.5.2 not base64"),
        }
    }

    fn take_response(&mut self, step: Step, response: &str) {
        let decoded = STANDARD.decode(response).ok();
        let Some(text) = decoded.and_then(|bytes| String::from_utf8(bytes).ok()) else {
            return self.refuse(501, "5.5.2 not base64");
        };
        match step {
            Step::Plain => {
                let mut parts = text.splitn(3, '\0').skip(1);
                let user = parts.next().unwrap_or_default().to_owned();
                self.shown(user, parts.next().unwrap_or_default());
            }
            Step::User => {
                self.claimed = text;
                self.challenge(Step::Password);
            }
            Step::Password => {
                let user = std::mem::take(&mut self.claimed);
                self.shown(user, &text);
            }
        }
    }

    fn shown(&mut self, user: String, password: &str) {
        let login = self.config.login.as_ref();
        if login.is_some_and(|(name, word)| (name.as_str(), word.as_str()) == (&user, password)) {
            self.user = Some(user);
            self.reply(235, "2.7.0 welcome");
        } else {
            self.refuse(535, "5.7.8 credentials refused");
        }
    }
}
