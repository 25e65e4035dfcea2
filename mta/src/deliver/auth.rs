//! The mechanisms by which a smarthost learns who we are: PLAIN (RFC 4616), LOGIN, SCRAM-SHA-256
//! (RFC 7677), CRAM-MD5 (RFC 2195).
//!
//! Owns what is answered to a challenge. When it may be said is the session's affair: never in
//! plaintext, unless the operator has a relay on loopback.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mail_send::Credentials;
use service::config::{Secret, Smarthost, TlsPolicy};
use smtp::client::{Auth, Sasl, SaslStart};
use smtp_proto::AUTH_CRAM_MD5;

use super::scram::{self, Kept, Scram};

/// A smarthost, and what its connections share.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) config: Smarthost,
    kept: Arc<Kept>,
}

impl Relay {
    pub(super) fn new(config: Smarthost) -> Self {
        Self {
            config,
            kept: Arc::default(),
        }
    }

    /// Encrypted from the first byte, without STARTTLS.
    pub(super) fn is_implicit(&self) -> bool {
        self.config.implicit_tls
    }

    /// What it is shown.
    pub(super) fn auth(&self) -> Auth {
        let login = Login {
            username: self.config.username.clone(),
            password: self.config.password.clone(),
            is_verified: self.config.tls == TlsPolicy::RequireVerified,
            kept: Arc::clone(&self.kept),
            step: Step::Over,
        };
        Auth::new(Box::new(login), self.config.tls == TlsPolicy::None)
    }
}

#[derive(Debug)]
struct Login {
    username: String,
    password: Secret,
    /// A certificate says who reads the password.
    is_verified: bool,
    kept: Arc<Kept>,
    step: Step,
}

/// What the next challenge asks for.
#[derive(Debug)]
enum Step {
    /// SCRAM has a dialogue of its own.
    Scram(Scram),
    /// LOGIN asks for the user, whatever its words.
    User,
    /// LOGIN asks for the password.
    Password,
    /// CRAM-MD5 has its one challenge.
    Cram,
    /// Nothing is asked any more.
    Over,
}

impl Login {
    /// What comes first in a mechanism; `None` if this login cannot use it.
    fn begin(&self, mechanism: &str) -> Option<(Step, Option<Vec<u8>>)> {
        Some(match mechanism {
            scram::NAME => {
                let (scram, first) = Scram::begin(&self.username, &self.password, &self.kept)?;
                (Step::Scram(scram), Some(first))
            }
            "PLAIN" => {
                let message = format!("\0{}\0{}", self.username, self.password.reveal());
                (Step::Over, Some(message.into_bytes()))
            }
            "LOGIN" => (Step::User, None),
            _ => (Step::Cram, None),
        })
    }
}

impl Sasl for Login {
    /// PLAIN first where the certificate is verified: nothing is gained by hiding the password from
    /// who checks it, and servers offer SCRAM (Cyrus does unasked) though they keep what only PLAIN
    /// can be checked with. Without that anybody may be at the other end: SCRAM first, which shows
    /// the password to nobody and has the server prove that it knows it.
    fn start(&mut self, offered: &[String]) -> Option<SaslStart> {
        let known = match self.is_verified {
            true => ["PLAIN", "LOGIN", scram::NAME, "CRAM-MD5"],
            false => [scram::NAME, "PLAIN", "LOGIN", "CRAM-MD5"],
        };
        let mut usable = known
            .into_iter()
            .filter(|name| offered.iter().any(|offer| offer == name));
        let (mechanism, step, initial) = usable.find_map(|mechanism| {
            let (step, initial) = self.begin(mechanism)?;
            Some((mechanism, step, initial))
        })?;
        self.step = step;
        Some(SaslStart { mechanism, initial })
    }

    fn respond(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        match std::mem::replace(&mut self.step, Step::Over) {
            Step::Scram(mut scram) => {
                let response = scram.respond(challenge);
                self.step = Step::Scram(scram);
                response
            }
            Step::User => {
                self.step = Step::Password;
                Some(self.username.clone().into_bytes())
            }
            Step::Password => Some(self.password.reveal().as_bytes().to_vec()),
            Step::Cram => {
                let credentials = Credentials::new(self.username.as_str(), self.password.reveal());
                let response = credentials.encode(AUTH_CRAM_MD5, &STANDARD.encode(challenge));
                STANDARD.decode(response.ok()?).ok()
            }
            Step::Over => None,
        }
    }

    fn is_proven(&self) -> bool {
        match &self.step {
            Step::Scram(scram) => scram.is_proven(),
            Step::User | Step::Password | Step::Cram | Step::Over => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(username: &str, is_verified: bool) -> Login {
        Login {
            username: username.into(),
            password: Secret::new("tanstaaftanstaaf"),
            is_verified,
            kept: Arc::default(),
            step: Step::Over,
        }
    }

    fn dialogue(offered: &[&str], challenges: &[&str]) -> (String, Vec<Option<String>>) {
        let mut login = login("tim", true);
        let offered: Vec<String> = offered.iter().map(|name| (*name).to_owned()).collect();
        let start = login.start(&offered).expect("a mechanism");
        let mut said: Vec<_> = start
            .initial
            .into_iter()
            .map(|bytes| String::from_utf8(bytes).ok())
            .collect();
        for challenge in challenges {
            let response = login.respond(challenge.as_bytes());
            said.push(response.map(|bytes| String::from_utf8(bytes).expect("text")));
        }
        (start.mechanism.to_owned(), said)
    }

    #[test]
    fn dialogues() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            dialogue(&["LOGIN", "PLAIN"], &["more?"]),
            ("PLAIN".into(), vec![some("\0tim\0tanstaaftanstaaf"), None])
        );
        assert_eq!(
            dialogue(&["CRAM-MD5", "LOGIN"], &["Benutzer:", "", "?"]),
            (
                "LOGIN".into(),
                vec![some("tim"), some("tanstaaftanstaaf"), None]
            )
        );
        // The example of RFC 2195 §2.
        let challenge = "<1896.697170952@postoffice.reston.mci.net>";
        let digest = "tim b913a602c7eda7a495b4e6e7334d3890";
        assert_eq!(
            dialogue(&["CRAM-MD5"], &[challenge, challenge]),
            ("CRAM-MD5".into(), vec![some(digest), None])
        );
    }

    #[test]
    fn what_is_not_known_is_not_tried() {
        let smarthost = Smarthost {
            host: "relay.example".into(),
            port: 587,
            username: "u".into(),
            password: Secret::new("geheim"),
            tls: TlsPolicy::Require,
            implicit_tls: false,
        };
        assert_eq!(login("", true).start(&["GSSAPI".to_owned()]), None);
        assert!(!format!("{:?}", Relay::new(smarthost).auth()).contains("geheim"));
    }

    #[test]
    fn a_password_is_shown_to_who_is_verified_or_to_nobody_if_there_is_a_choice() {
        let chosen = |username, is_verified, offered: &[&str]| {
            let offered: Vec<String> = offered.iter().map(|name| (*name).to_owned()).collect();
            let start = login(username, is_verified).start(&offered)?;
            Some(start.mechanism)
        };
        let both = ["PLAIN", "SCRAM-SHA-256", "CRAM-MD5"];
        assert_eq!(chosen("tim", true, &both), Some("PLAIN"));
        assert_eq!(chosen("tim", false, &both), Some("SCRAM-SHA-256"));
        assert_eq!(chosen("tim", true, &both[1..]), Some("SCRAM-SHA-256"));
        assert_eq!(chosen("tím", false, &both), Some("PLAIN"));
        assert_eq!(chosen("tím", false, &both[1..2]), None);
        let mut scram = login("tim", false);
        assert!(scram.is_proven());
        assert!(scram.start(&["SCRAM-SHA-256".to_owned()]).is_some());
        assert!(!scram.is_proven());
        assert_eq!(scram.respond(b"v=x"), None);
        assert!(!scram.is_proven());
    }
}
