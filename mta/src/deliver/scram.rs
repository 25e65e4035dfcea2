//! SCRAM-SHA-256 (RFC 5802, RFC 7677): a password is proven and not shown, and the server proves that
//! it knows it, too.
//!
//! Owns the client's side, without channel binding. Computing may take a second of CPU: it is done
//! where nobody waits for the thread, and once for all connections.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::{digest, hmac, pbkdf2, rand};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use service::config::Secret;

/// The mechanism.
pub(super) const NAME: &str = "SCRAM-SHA-256";
/// At least what RFC 7677 §4 asks for: fewer would make the proof easy to guess the password from.
/// And no more than a second of work, whatever a server says.
const ITERATIONS: RangeInclusive<u32> = 4_096..=1_000_000;
/// Random bytes of a nonce; in base64 it has no comma.
const NONCE: usize = 18;
/// The header that says that the client knows no channel binding, in base64.
const NO_BINDING: &str = "biws";

/// A password with the salt of a server, kept for the next connection to it.
#[derive(Default)]
pub(super) struct Kept(Mutex<Option<Salted>>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

#[derive(Clone)]
struct Salted {
    salt: Vec<u8>,
    iterations: NonZeroU32,
    password: [u8; digest::SHA256_OUTPUT_LEN],
}

/// One dialogue.
pub(super) struct Scram {
    password: Secret,
    kept: Arc<Kept>,
    step: Step,
}

enum Step {
    /// The server has salt and nonce to say to this `client-first-message-bare`.
    Salt {
        bare: String,
        nonce: String,
    },
    /// The server has to show this signature.
    Signature([u8; digest::SHA256_OUTPUT_LEN]),
    Proven,
    Failed,
}

impl std::fmt::Debug for Scram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scram")
    }
}

impl Scram {
    /// The dialogue, and what it begins with. `None`: such a user or password would have to be
    /// prepared with tables (RFC 4013); what is printable ASCII stays as it is.
    pub(super) fn begin(
        username: &str,
        password: &Secret,
        kept: &Arc<Kept>,
    ) -> Option<(Self, Vec<u8>)> {
        let mut random = [0; NONCE];
        rand::fill(&mut random).ok()?;
        Self::begin_with(username, password, kept, STANDARD.encode(random))
    }

    fn begin_with(
        username: &str,
        password: &Secret,
        kept: &Arc<Kept>,
        nonce: String,
    ) -> Option<(Self, Vec<u8>)> {
        if !is_printable(username) || !is_printable(password.reveal()) {
            return None;
        }
        let username = username.replace('=', "=3D").replace(',', "=2C");
        let bare = format!("n={username},r={nonce}");
        let first = format!("n,,{bare}").into_bytes();
        let dialogue = Self {
            password: password.clone(),
            kept: Arc::clone(kept),
            step: Step::Salt { bare, nonce },
        };
        Some((dialogue, first))
    }

    /// Answers the server; `None`: it said what it must not say.
    pub(super) fn respond(&mut self, challenge: &[u8]) -> Option<Vec<u8>> {
        match std::mem::replace(&mut self.step, Step::Failed) {
            Step::Salt { bare, nonce } => {
                let first = std::str::from_utf8(challenge).ok()?;
                let (signature, last) = self.prove(&bare, &nonce, first)?;
                self.step = Step::Signature(signature);
                Some(last.into_bytes())
            }
            Step::Signature(signature) => {
                let shown = STANDARD.decode(challenge.strip_prefix(b"v=")?).ok()?;
                aws_lc_rs::constant_time::verify_slices_are_equal(&signature, &shown).ok()?;
                self.step = Step::Proven;
                Some(Vec::new())
            }
            Step::Proven | Step::Failed => None,
        }
    }

    /// Whether the server has shown that it knows the password.
    pub(super) fn is_proven(&self) -> bool {
        matches!(self.step, Step::Proven)
    }

    /// The signature that the server has to show, and the `client-final-message`.
    fn prove(
        &self,
        bare: &str,
        own_nonce: &str,
        server_first: &str,
    ) -> Option<([u8; digest::SHA256_OUTPUT_LEN], String)> {
        let mut fields = server_first.split(',');
        let nonce = fields.next()?.strip_prefix("r=")?;
        let salt = STANDARD.decode(fields.next()?.strip_prefix("s=")?).ok()?;
        let iterations: NonZeroU32 = fields.next()?.strip_prefix("i=")?.parse().ok()?;
        let is_sound = nonce.len() > own_nonce.len()
            && nonce.starts_with(own_nonce)
            && !salt.is_empty()
            && ITERATIONS.contains(&iterations.get());
        if !is_sound {
            return None;
        }
        let salted = self.salted(salt, iterations);
        let client_key = mac(&salted, b"Client Key");
        let stored_key = digest::digest(&digest::SHA256, &client_key);
        let unproven = format!("c={NO_BINDING},r={nonce}");
        let said = format!("{bare},{server_first},{unproven}");
        let mut proof = mac(stored_key.as_ref(), said.as_bytes());
        for (byte, key) in proof.iter_mut().zip(client_key) {
            *byte ^= key;
        }
        let server_key = mac(&salted, b"Server Key");
        let last = format!("{unproven},p={}", STANDARD.encode(proof));
        Some((mac(&server_key, said.as_bytes()), last))
    }

    fn salted(&self, salt: Vec<u8>, iterations: NonZeroU32) -> [u8; digest::SHA256_OUTPUT_LEN] {
        let known = |kept: &Salted| kept.salt == salt && kept.iterations == iterations;
        let mut kept = self.kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.as_ref().filter(|kept| known(kept)) {
            return kept.password;
        }
        let mut password = [0; digest::SHA256_OUTPUT_LEN];
        let secret = self.password.reveal().as_bytes();
        // Under the lock: connections that are made together compute it once.
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            iterations,
            &salt,
            secret,
            &mut password,
        );
        *kept = Some(Salted {
            salt,
            iterations,
            password,
        });
        password
    }
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

fn mac(key: &[u8], message: &[u8]) -> [u8; digest::SHA256_OUTPUT_LEN] {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message);
    let mut bytes = [0; digest::SHA256_OUTPUT_LEN];
    // A tag is as long as the digest.
    for (byte, of) in bytes.iter_mut().zip(tag.as_ref()) {
        *byte = *of;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The example of RFC 7677 §3.
    const NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
    const FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const LAST: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn dialogue(username: &str, password: &str) -> Option<(Scram, Vec<u8>)> {
        let password = Secret::new(password);
        Scram::begin_with(username, &password, &Arc::default(), NONCE.to_owned())
    }

    fn example() -> Scram {
        dialogue("user", "pencil").expect("a dialogue").0
    }

    #[test]
    fn the_example_of_the_rfc() {
        let (mut scram, first) = dialogue("user", "pencil").expect("a dialogue");
        assert_eq!(first, b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let proof = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!(scram.respond(FIRST.as_bytes()), Some(proof.into()));
        assert!(!scram.is_proven());
        assert_eq!(scram.respond(LAST.as_bytes()), Some(Vec::new()));
        assert!(scram.is_proven());
        assert_eq!(scram.respond(b""), None);
    }

    #[test]
    fn a_server_that_proves_nothing_is_not_believed() {
        let wrong = LAST.replace('6', "7");
        for last in [&wrong, "v=", "v=?", "e=invalid-proof", ""] {
            let mut scram = example();
            assert!(scram.respond(FIRST.as_bytes()).is_some());
            assert_eq!(scram.respond(last.as_bytes()), None, "{last}");
            assert!(!scram.is_proven());
        }
        // Nonces that are not ours, salt that is none, more or less work than is right.
        for first in [
            FIRST.replacen('r', "m=x,r", 1),
            FIRST.replace("rOpr", "rOpp"),
            format!("r={NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"),
            FIRST.replace("s=W22ZaJ0SNY7soEsUEjb6gQ==", "s="),
            FIRST.replace("4096", "4095"),
            FIRST.replace("4096", "1000001"),
            FIRST.replace("4096", "99999999999999999999"),
            FIRST.replace(",i=4096", ""),
        ] {
            assert_eq!(example().respond(first.as_bytes()), None, "{first}");
        }
    }

    #[test]
    fn what_a_name_may_hold() {
        let (_, first) = dialogue("a=b,c", "x").expect("a dialogue");
        assert!(first.starts_with(b"n,,n=a=3Db=2Cc,r="));
        assert!(dialogue("ü", "x").is_none() && dialogue("u", "ü").is_none());
        let nonces = [(); 2].map(|()| Scram::begin("u", &Secret::new("x"), &Arc::default()));
        let [first, second] = nonces.map(|begun| begun.expect("a dialogue").1);
        assert_ne!(first, second);
    }

    proptest! {
        #[test]
        fn any_challenges_are_answered_or_not(
            challenges in proptest::collection::vec(prop_oneof![
                any::<Vec<u8>>(),
                "r=rOprNGfwEbeRWgbNEkqO[ -~]{0,9},s=[A-Za-z=]{0,8},i=[0-9]{0,4}(,.*)?".prop_map(String::into_bytes),
            ], 0..4),
        ) {
            let mut scram = example();
            for challenge in challenges {
                scram.respond(&challenge);
            }
            prop_assert!(!scram.is_proven());
        }
    }
}
