//! The receiving hosts, each in its manner, and what they really took.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::MessageId;
use smtp::ServerEvent;
use testkit::smtp_peer::{Answer, Keep, Question, Temper};
use tokio::time::Instant;

use super::plan::Manner;
use super::watch::Watch;

/// What a host remembers.
#[derive(Debug)]
struct Memory {
    random: fastrand::Rng,
    first: HashMap<String, Instant>,
    mails: VecDeque<Instant>,
}

/// A host of this manner, which tells what it takes.
pub(super) fn temper(manner: Manner, seed: u64, watch: &Arc<Watch>) -> Temper {
    let memory = Mutex::new(Memory {
        random: fastrand::Rng::with_seed(seed),
        first: HashMap::new(),
        mails: VecDeque::new(),
    });
    let watch = Arc::clone(watch);
    let rule = move |question: &Question<'_>| {
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = memory.answer(manner, question);
        tell(&watch, question, answer.as_ref());
        answer
    };
    let temper = Temper::accepting().keeping(Keep::Nothing).rule(rule);
    match manner {
        Manner::Old => temper.without_pipelining().without_chunking(),
        Manner::Tarpit(delay) => temper.slow_commands(delay),
        Manner::Slow(delay) => temper.slow_messages(delay),
        Manner::Plain
        | Manner::Grey(_)
        | Manner::Mute
        | Manner::Cutting(_)
        | Manner::Rude(_)
        | Manner::Picky
        | Manner::Throttling(_) => temper,
    }
}

fn tell(watch: &Watch, question: &Question<'_>, answer: Option<&Answer>) {
    let message = question.reverse_path.strip_prefix("bounce+");
    let message = message.and_then(|rest| rest.split_once('@'));
    let message: Option<MessageId> = message.and_then(|(id, _)| id.parse().ok());
    let Some(message) = message else {
        return;
    };
    match answer {
        Some(Answer::Reply(500.., _)) => watch.refused(message),
        Some(Answer::Reply(..300, _) | Answer::AcceptAndReset) | None
            if question.event == ServerEvent::Message =>
        {
            watch.copy(message, question.content);
        }
        Some(_) | None => {}
    }
}

impl Memory {
    fn answer(&mut self, manner: Manner, question: &Question<'_>) -> Option<Answer> {
        match manner {
            Manner::Plain | Manner::Old | Manner::Tarpit(_) | Manner::Slow(_) => None,
            Manner::Mute => Some(Answer::Silence),
            Manner::Grey(delay) => self.greylist(question, delay),
            Manner::Cutting(percent) => {
                let cuts = question.event == ServerEvent::Message;
                (cuts && self.random.u8(..100) < percent).then(|| {
                    let ways = [Answer::AcceptAndReset, Answer::Reset, Answer::Disconnect];
                    ways[self.random.usize(..3)].clone()
                })
            }
            Manner::Rude(percent) => (self.random.u8(..100) < percent).then(|| {
                let ways = [
                    Answer::reply(421, "4.3.2 not now"),
                    Answer::Disconnect,
                    Answer::Reset,
                    Answer::reply(451, "4.3.0 later"),
                ];
                ways[self.random.usize(..4)].clone()
            }),
            Manner::Picky => self.pick(question),
            Manner::Throttling(rate) => self.throttle(question, rate),
        }
    }

    fn greylist(&mut self, question: &Question<'_>, delay: Duration) -> Option<Answer> {
        if question.event != ServerEvent::Rcpt {
            return None;
        }
        let now = Instant::now();
        let first = self.first.entry(question.recipient.to_owned());
        let first = *first.or_insert(now);
        (now - first < delay).then(|| Answer::reply(451, "4.7.1 greylisted, come again"))
    }

    /// Every seventh is unknown, every fifth has no room at first.
    fn pick(&mut self, question: &Question<'_>) -> Option<Answer> {
        if question.event != ServerEvent::Rcpt {
            return None;
        }
        let number = question.recipient.trim_start_matches('u').split('@').next();
        let number: u32 = number.and_then(|number| number.parse().ok()).unwrap_or(0);
        if number % 7 == 3 {
            return Some(Answer::reply(550, "5.1.1 user unknown"));
        }
        let is_new = self
            .first
            .insert(question.recipient.to_owned(), Instant::now())
            .is_none();
        (is_new && number % 5 == 2).then(|| Answer::reply(452, "4.2.2 mailbox full"))
    }

    fn throttle(&mut self, question: &Question<'_>, rate: usize) -> Option<Answer> {
        if question.event != ServerEvent::Mail {
            return None;
        }
        let now = Instant::now();
        while self
            .mails
            .front()
            .is_some_and(|first| now - *first >= Duration::from_secs(1))
        {
            self.mails.pop_front();
        }
        self.mails.push_back(now);
        (self.mails.len() > rate).then(|| Answer::reply(421, "4.7.0 too many messages, slow down"))
    }
}
