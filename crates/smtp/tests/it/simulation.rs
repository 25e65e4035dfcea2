//! A seeded simulation of a client session and a server session.
//!
//! Bytes travel in random portions, answers come late, are refused at random,
//! the server says 421 or the wire is cut at any point. Whatever happens, what
//! the server accepted must be what the client reports as delivered or
//! ambiguous, byte for byte, and every reply must reach its own transaction.
//!
//! `SMTP_SIM_SEED=n` repeats one run, `SMTP_SIM_RUNS=n` makes more of them.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use fastrand::Rng;
use smtp::client::{Auth, Event, Interruption, Sasl, SaslStart, StartTls};
use smtp::{
    Body, ClientSession, Envelope, Outcome, Reply, ServerConfig, ServerEvent, ServerSession, TxId,
};

/// A bound on the steps of one run; one that does not end is stuck.
const STEPS_MAX: u32 = 200_000;

/// Prints the seed when a run fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the simulation failed: repeat it with SMTP_SIM_SEED={}",
                self.0
            );
        }
    }
}

#[test]
fn client_and_server_agree_about_every_message() {
    let env = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u64>().ok())
    };
    let (first, runs) = match env("SMTP_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (0, env("SMTP_SIM_RUNS").unwrap_or(3_000)),
    };
    let mut seen = Seen::default();
    for seed in first..first + runs {
        let _seed = Seed(seed);
        World::new(seed).run(&mut seen);
    }
    if runs >= 1_000 {
        seen.check();
    }
}

/// What the runs covered, so that a simulation that no longer reaches a case fails.
#[derive(Debug, Default)]
struct Seen {
    delivered: u64,
    refused: BTreeMap<String, u64>,
    ambiguous_accepted: u64,
    ambiguous_lost: u64,
    not_started: u64,
    partly_refused: u64,
    quit: u64,
    let_in: u64,
    kept_out: u64,
    exhausted: u64,
}

impl Seen {
    fn check(&self) {
        for stage in ["Mail", "Rcpt", "Data", "FinalDot"] {
            assert!(self.refused.contains_key(stage), "{self:?}");
        }
        let counts = [
            self.delivered,
            self.ambiguous_accepted,
            self.ambiguous_lost,
            self.not_started,
            self.partly_refused,
            self.quit,
            self.let_in,
            self.kept_out,
            self.exhausted,
        ];
        assert!(counts.iter().all(|&count| count > 10), "{self:?}");
    }
}

/// Says who it is by PLAIN or LOGIN.
#[derive(Debug)]
struct Login {
    mechanism: &'static str,
    answers: Vec<&'static str>,
}

impl Login {
    fn new(rng: &mut Rng) -> Self {
        let password = *rng.choice(&["pw", "pw", "pw", "wrong"]).expect("not empty");
        let (mechanism, answers) = match rng.bool() {
            true => ("PLAIN", Vec::new()),
            false => ("LOGIN", vec![password, "us"]),
        };
        let answers = match (mechanism, password) {
            ("PLAIN", "pw") => vec!["\0us\0pw"],
            ("PLAIN", _) => vec!["\0us\0wrong"],
            _ => answers,
        };
        Self { mechanism, answers }
    }
}

impl Sasl for Login {
    fn start(&mut self, offered: &[String]) -> Option<SaslStart> {
        let mechanism = self.mechanism;
        let initial = (mechanism == "PLAIN").then(|| self.answers.pop()).flatten();
        offered
            .iter()
            .any(|name| name == mechanism)
            .then_some(SaslStart {
                mechanism,
                initial: initial.map(|text| text.as_bytes().to_vec()),
            })
    }

    fn respond(&mut self, _: &[u8]) -> Option<Vec<u8>> {
        self.answers.pop().map(|text| text.as_bytes().to_vec())
    }
}

/// A message as the client knows it.
struct Sent {
    recipients: Vec<String>,
    bytes: Vec<u8>,
}

/// A message as the server took it.
#[derive(Debug)]
struct Taken {
    recipients: Vec<String>,
    bytes: Vec<u8>,
}

struct World {
    rng: Rng,
    client: ClientSession,
    server: ServerSession,
    to_server: VecDeque<u8>,
    to_client: VecDeque<u8>,
    asked: Option<ServerEvent>,
    due: Vec<TxId>,
    sent: BTreeMap<u64, Sent>,
    taken: BTreeMap<u64, Taken>,
    outcomes: BTreeMap<u64, (Outcome, Vec<(usize, Reply)>)>,
    next: u64,
    total: u64,
    /// What the server announced.
    mails_max: Option<u32>,
    wants_login: bool,
    /// In a thousand.
    refusals: u32,
    closings: u32,
    cut_at: Option<u32>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let ehlo = rng.u32(..10) > 0;
        let config = ServerConfig {
            pipelining: ehlo && rng.u32(..4) > 0,
            chunking: rng.bool(),
            data_without_recipients: rng.bool(),
            login: (ehlo && rng.u32(..4) == 0).then(|| ("us".to_owned(), "pw".to_owned())),
            mails_max: (rng.u32(..4) == 0).then(|| rng.u32(1..6)),
            ehlo,
            ..ServerConfig::default()
        };
        let mut client = ClientSession::new("us.example", StartTls::Never).refusing_itself();
        if config.login.is_some() {
            client = client.with_auth(Auth::new(Box::new(Login::new(&mut rng)), true));
        }
        Self {
            client,
            mails_max: config.mails_max.filter(|_| ehlo),
            wants_login: config.login.is_some(),
            server: ServerSession::new(Arc::new(config)),
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            asked: None,
            due: Vec::new(),
            sent: BTreeMap::new(),
            taken: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            next: 0,
            total: rng.u64(1..12),
            refusals: *rng.choice(&[0, 50, 300]).expect("not empty"),
            closings: *rng.choice(&[0, 0, 20]).expect("not empty"),
            cut_at: rng.bool().then(|| rng.u32(1..600)),
            rng,
        }
    }

    fn run(&mut self, seen: &mut Seen) {
        for step in 0.. {
            assert!(
                step < STEPS_MAX,
                "stuck, waiting for {:?}",
                self.client.waiting_for()
            );
            if self.cut_at == Some(step) {
                self.cut();
            }
            match self.rng.u32(..6) {
                0 => self.client_app(),
                1 => self.client_writes(),
                2 => self.server_reads(),
                3 => self.server_answers(),
                4 => self.client_reads(),
                _ => self.client_events(),
            }
            if self.client.is_closed() {
                break;
            }
            let drained = self.to_client.is_empty() && self.server.output().is_empty();
            if self.server.is_closing() && drained {
                self.client.interrupted(Interruption::Disconnected);
            }
        }
        self.client_events();
        self.check(seen);
    }

    fn client_app(&mut self) {
        if self.client.is_exhausted() {
            return self.client.quit();
        }
        if !self.client.can_begin() {
            return;
        }
        if self.next == self.total {
            return self.client.quit();
        }
        let id = self.next;
        self.next += 1;
        let extra = if self.rng.u32(..4) == 0 {
            self.rng.usize(1..4)
        } else {
            0
        };
        let recipients: Vec<String> = (0..=extra)
            .map(|n| format!("r{id}.{n}@x.example"))
            .collect();
        let bytes = self.content(id);
        let slices = if bytes.is_empty() {
            Vec::new()
        } else {
            self.sliced(&bytes)
        };
        let body = Body::new(slices).expect("clean content");
        let borrowed: Vec<&str> = recipients.iter().map(String::as_str).collect();
        let reverse_path = format!("b{id}@us.example");
        let envelope = Envelope {
            reverse_path: &reverse_path,
            recipients: &borrowed,
            smtp_utf8: false,
        };
        self.client
            .begin(TxId(id), &envelope, body)
            .expect("there is room");
        self.sent.insert(id, Sent { recipients, bytes });
    }

    /// Lines with dots in all places, sometimes without an end of line.
    fn content(&mut self, id: u64) -> Vec<u8> {
        let mut text = format!("Message-ID: {id}\r\n");
        for _ in 0..self.rng.usize(..12) {
            text += self
                .rng
                .choice(["", ".", "..", ".x", "QUIT", "x.", "MAIL FROM:<evil@x>"])
                .expect("not empty");
            text += "\r\n";
        }
        text += self.rng.choice(["", ".", "end"]).expect("not empty");
        text.into_bytes()
    }

    fn sliced(&mut self, bytes: &[u8]) -> Vec<Bytes> {
        let (head, tail) = bytes.split_at(self.rng.usize(..=bytes.len()));
        vec![Bytes::copy_from_slice(head), Bytes::copy_from_slice(tail)]
    }

    fn client_events(&mut self) {
        while let Some(event) = self.client.poll_event() {
            match event {
                Event::ChallengeDue => self.client.answer_challenge(),
                Event::HandshakeDue => unreachable!("no TLS here"),
                Event::Ready | Event::Closed(_) => {}
                Event::BodyDue(id) => self.due.push(id),
                Event::TransactionDone {
                    id,
                    outcome,
                    refused,
                } => {
                    let before = self.outcomes.insert(id.0, (outcome, refused));
                    assert!(before.is_none(), "{id:?} ended twice");
                }
            }
        }
        if self.rng.bool() {
            for id in std::mem::take(&mut self.due) {
                let released = self.client.release(id);
                assert!(released || self.outcomes.contains_key(&id.0) || self.client.is_closed());
            }
        }
    }

    fn client_writes(&mut self) {
        let mut slices = [IoSlice::new(b""); 3];
        let filled = self.client.transmit(&mut slices);
        let bytes: Vec<u8> = slices
            .iter()
            .take(filled)
            .flat_map(|slice| slice.iter().copied())
            .collect();
        let count = self.portion(bytes.len());
        self.to_server.extend(bytes.iter().take(count));
        self.client.advance(count);
    }

    fn portion(&mut self, all: usize) -> usize {
        if self.rng.bool() {
            all
        } else {
            self.rng.usize(..=all)
        }
    }

    fn server_reads(&mut self) {
        let count = self.portion(self.to_server.len());
        let bytes: Vec<u8> = self.to_server.drain(..count).collect();
        self.server.receive(&bytes);
        self.server_polls();
    }

    fn server_polls(&mut self) {
        if self.asked.is_none() {
            self.asked = self.server.poll_event();
        }
        let waiting = self.server.output().len();
        let count = self.portion(waiting);
        let bytes = self.server.output().copy_to_bytes(count);
        self.to_client.extend(bytes);
    }

    fn server_answers(&mut self) {
        if let Some(event) = self.asked.take() {
            let transaction = transaction_of(self.server.reverse_path());
            let (code, text) = self.decide(event);
            if event == ServerEvent::Message && (200..300).contains(&code) {
                let id = transaction.expect("a transaction");
                let taken = Taken {
                    recipients: self.server.recipients().to_vec(),
                    bytes: self.server.message().to_vec(),
                };
                assert!(
                    self.taken.insert(id, taken).is_none(),
                    "the server took {id} twice"
                );
            }
            let tag = transaction.map_or_else(String::new, |id| format!(" t{id}"));
            self.server.answer(code, &format!("{text}{tag}"));
        } else if self.rng.u32(..20_000) < self.closings {
            self.server.answer(421, "4.3.2 shutting down");
        }
        self.server_polls();
    }

    fn decide(&mut self, event: ServerEvent) -> (u16, &'static str) {
        if self.rng.u32(..1_000) < self.closings {
            return (421, "4.3.2 closing");
        }
        let refuse = self.rng.u32(..1_000) < self.refusals;
        match event {
            ServerEvent::Connected => (220, "mx"),
            ServerEvent::Hello => (250, "mx"),
            ServerEvent::StartTls => unreachable!("not offered"),
            ServerEvent::Quit => (221, "bye"),
            ServerEvent::Mail if refuse => (451, "4.7.1 mail"),
            ServerEvent::Rcpt if refuse => (550, "5.1.1\nrcpt"),
            ServerEvent::Data if refuse => (452, "4.3.1 data"),
            ServerEvent::Message if refuse => (554, "5.7.1 dot"),
            ServerEvent::Mail | ServerEvent::Rcpt | ServerEvent::Message => (250, "2.0.0 ok"),
            ServerEvent::Data => (354, "go"),
        }
    }

    fn client_reads(&mut self) {
        let count = self.portion(self.to_client.len());
        let bytes: Vec<u8> = self.to_client.drain(..count).collect();
        if !bytes.is_empty() {
            self.client.receive(&bytes);
        }
    }

    /// The wire breaks: a part of what is under way still arrives, on both sides.
    fn cut(&mut self) {
        self.server_reads();
        for _ in 0..self.rng.u32(..10) {
            self.server_answers();
        }
        self.client_reads();
        self.client
            .interrupted(Interruption::Io(std::io::ErrorKind::ConnectionReset));
    }

    fn check(&self, seen: &mut Seen) {
        assert_eq!(
            self.outcomes.len(),
            self.sent.len(),
            "every transaction is reported"
        );
        let mut ambiguous = 0;
        for (id, (outcome, refused)) in &self.outcomes {
            let taken = self.taken.get(id);
            match outcome {
                Outcome::Delivered(reply) => {
                    assert!(taken.is_some(), "{id} was not taken");
                    check_tag(reply, *id);
                    seen.delivered += 1;
                }
                Outcome::Refused { stage, reply } => {
                    assert!(
                        taken.is_none(),
                        "{id} was taken, reported refused at {stage:?}: {reply}"
                    );
                    check_tag(reply, *id);
                    *seen.refused.entry(format!("{stage:?}")).or_default() += 1;
                }
                Outcome::Ambiguous(_) => {
                    ambiguous += 1;
                    *(if taken.is_some() {
                        &mut seen.ambiguous_accepted
                    } else {
                        &mut seen.ambiguous_lost
                    }) += 1;
                }
                Outcome::NotStarted(error) => {
                    assert!(
                        taken.is_none(),
                        "{id} was taken, reported not started: {error}"
                    );
                    seen.not_started += 1;
                }
            }
            refused.iter().for_each(|(_, reply)| check_tag(reply, *id));
            if let Some(taken) = taken {
                seen.partly_refused += u64::from(!refused.is_empty());
                self.check_taken(
                    *id,
                    taken,
                    refused,
                    matches!(outcome, Outcome::Delivered(_)),
                );
            }
        }
        assert!(ambiguous <= 1, "one message at a time may be in doubt");
        assert!(self.taken.keys().all(|id| self.sent.contains_key(id)));
        assert_eq!(
            self.server.sent_ahead(),
            0,
            "commands sent ahead without licence"
        );
        let begun = self.sent.len() as u64;
        let max = self.mails_max.map_or(u64::MAX, u64::from);
        assert!(
            begun <= max,
            "{begun} transactions, where {max} were allowed"
        );
        seen.exhausted += u64::from(begun == max && begun < self.total);
        let is_let_in = self.server.user().is_some();
        assert!(self.taken.is_empty() || is_let_in == self.wants_login);
        seen.let_in += u64::from(is_let_in);
        seen.kept_out += u64::from(self.wants_login && !is_let_in && begun == 0);
        seen.quit +=
            u64::from(self.outcomes.len() as u64 == self.total && self.server.is_closing());
    }

    fn check_taken(&self, id: u64, taken: &Taken, refused: &[(usize, Reply)], delivered: bool) {
        let sent = &self.sent[&id];
        let mut bytes = sent.bytes.clone();
        if !bytes.ends_with(b"\r\n") {
            bytes.extend(b"\r\n");
        }
        assert_eq!(
            String::from_utf8_lossy(&taken.bytes),
            String::from_utf8_lossy(&bytes),
            "content of {id}"
        );
        let known = sent
            .recipients
            .iter()
            .enumerate()
            .filter(|(n, _)| !refused.iter().any(|(r, _)| r == n));
        let expected: Vec<&String> = known.map(|(_, recipient)| recipient).collect();
        let got: Vec<&String> = taken.recipients.iter().collect();
        if delivered {
            assert_eq!(got, expected, "recipients of {id}");
        } else {
            // A cut may have swallowed the replies that refused some of them.
            assert!(
                got.iter().all(|recipient| expected.contains(recipient)),
                "recipients of {id}"
            );
        }
    }
}

fn transaction_of(reverse_path: &str) -> Option<u64> {
    reverse_path
        .strip_prefix('b')?
        .strip_suffix("@us.example")?
        .parse()
        .ok()
}

/// Every answer names its transaction: a reply that went astray shows. (A 421
/// out of the blue names none.)
fn check_tag(reply: &Reply, id: u64) {
    let tag = format!("t{id}");
    assert!(
        reply.code == 421 || reply.text().ends_with(&tag),
        "{id} was given the reply {reply}"
    );
}
