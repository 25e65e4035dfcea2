//! The mechanisms by which a smarthost learns who we are: PLAIN (RFC 4616), LOGIN, CRAM-MD5
//! (RFC 2195).
//!
//! Owns what is answered to a challenge. When it may be said is the session's affair: never in
//! plaintext, unless the operator has a relay on loopback.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mail_send::Credentials;
use service::config::{Secret, Smarthost, TlsPolicy};
use smtp::client::{Auth, Sasl, SaslStart};
use smtp_proto::AUTH_CRAM_MD5;

/// What `smarthost` is shown.
pub(super) fn auth(smarthost: &Smarthost) -> Auth {
    let login = Login {
        username: smarthost.username.clone(),
        password: smarthost.password.clone(),
        step: Step::Over,
    };
    Auth::new(Box::new(login), smarthost.tls == TlsPolicy::None)
}

#[derive(Debug)]
struct Login {
    username: String,
    password: Secret,
    step: Step,
}

/// What the next challenge asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// LOGIN asks for the user, whatever its words.
    User,
    /// LOGIN asks for the password.
    Password,
    /// CRAM-MD5 has its one challenge.
    Cram,
    /// Nothing is asked any more.
    Over,
}

impl Sasl for Login {
    /// PLAIN first: inside TLS nothing is gained by a digest, and servers that store passwords well
    /// cannot check one.
    fn start(&mut self, offered: &[String]) -> Option<SaslStart> {
        let known = ["PLAIN", "LOGIN", "CRAM-MD5"];
        let mechanism = known
            .into_iter()
            .find(|name| offered.iter().any(|offer| offer == name))?;
        let (step, initial) = match mechanism {
            "PLAIN" => {
                let message = format!("\0{}\0{}", self.username, self.password.reveal());
                (Step::Over, Some(message.into_bytes()))
            }
            "LOGIN" => (Step::User, None),
            _ => (Step::Cram, None),
        };
        self.step = step;
        Some(SaslStart { mechanism, initial })
    }

    fn respond(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        match std::mem::replace(&mut self.step, Step::Over) {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialogue(offered: &[&str], challenges: &[&str]) -> (String, Vec<Option<String>>) {
        let mut login = Login {
            username: "tim".into(),
            password: Secret::new("tanstaaftanstaaf"),
            step: Step::Over,
        };
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
        };
        let mut login = Login {
            username: String::new(),
            password: Secret::new(""),
            step: Step::Over,
        };
        assert_eq!(login.start(&["GSSAPI".to_owned()]), None);
        assert!(!format!("{:?}", auth(&smarthost)).contains("geheim"));
    }
}
