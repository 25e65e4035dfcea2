//! The events of a step: by the script of the step, or, where they are many, beside it.
//!
//! A script is handed strings of its own, each of which the server copies and hashes byte for byte;
//! for an event that costs as much as adding it to the stream. So many events are added by commands
//! behind the script, in one transaction with it. Commands behind a script do not know what it said:
//! where it did nothing a last, small script (`undo.lua`) takes the events back before anybody sees
//! them. Must not decide what a step writes.

use super::Inner;
use super::commit::{Commit, Lua};
use super::keys::{self, HOME};
use super::link::Link;
use crate::line::text_of;
use crate::tell::Line;
use crate::{Result, StoreError};
use ::redis::{Cmd, Pipeline, ServerErrorKind, Value};
use model::Event;

/// From as many events on they are added beside the script: the transaction and the script that may
/// take them back cost as much as so many strings.
pub(super) const MANY: usize = 8;

/// Numbers of events have 16 digits, so that one can be put in place of another.
const NUMBERED_FROM: u64 = 1_000_000_000_000_000;

/// Whether a step's events can be numbered from here on.
fn fits(first: u64) -> bool {
    (NUMBERED_FROM..9 * NUMBERED_FROM).contains(&first)
}

/// Where the number of an event stands in its text: behind an id of a known length.
const NUMBER: std::ops::Range<usize> = 51..67;

/// What a text of an event takes at first: it is seldom put elsewhere while it grows.
const TEXT_BYTES: usize = 768;

/// Events of a step that is being put together, in order, as texts without their numbers.
#[derive(Default)]
pub(super) struct Texts {
    all: Vec<Vec<u8>>,
    damaged: Option<StoreError>,
}

impl Texts {
    pub(super) fn push(&mut self, mut line: Line<'_>) {
        line.seq = NUMBERED_FROM;
        self.keep(text_of(&line, TEXT_BYTES));
    }

    /// One that was told before, by another store.
    pub(super) fn push_again(&mut self, mut event: Event) {
        event.seq = NUMBERED_FROM;
        match serde_json::to_vec(&event) {
            Ok(text) => self.keep(text),
            Err(error) => self.damaged = Some(StoreError::Damaged(format!("an event: {error}"))),
        }
    }

    /// Keeps a text whose number has as many digits as its own will have.
    fn keep(&mut self, text: Vec<u8>) {
        const NAME: &[u8] = b",\"seq\":";
        match text.get(..NUMBER.start) {
            Some(before) if before.ends_with(NAME) => self.all.push(text),
            _ => self.damaged = Some(StoreError::Damaged("an event without an id".into())),
        }
    }

    /// The texts, if all could be written.
    pub(super) fn finish(self) -> Result<Vec<Vec<u8>>> {
        self.damaged.map_or(Ok(self.all), Err)
    }
}

/// Events of one step, in order.
pub(super) struct News {
    /// The stream, and the counter of its numbers, as the script knows them.
    stream: Vec<u8>,
    counter: Vec<u8>,
    names: [String; 2],
    /// Their numbers are above this.
    floor: u64,
    /// The number of the first; 0: the script gives them theirs.
    first: u64,
    texts: Vec<Vec<u8>>,
}

impl News {
    /// Events with numbers above `floor`. `time`: the server's in microseconds when the step began to
    /// read, 0 when that is not known.
    pub(super) fn new(
        names: [String; 2],
        (stream, counter): (Vec<u8>, Vec<u8>),
        mut texts: Vec<Vec<u8>>,
        floor: u64,
        time: u64,
    ) -> Self {
        let first = if fits(time) { time } else { 0 };
        for (seq, text) in (first.max(NUMBERED_FROM)..).zip(&mut texts) {
            number(text, seq);
        }
        Self {
            stream,
            counter,
            names,
            floor,
            first,
            texts,
        }
    }

    /// The number of the last; 0: the script gives them theirs.
    pub(super) fn last(&self) -> u64 {
        if self.first == 0 {
            return 0;
        }
        let count = u64::try_from(self.texts.len()).unwrap_or(u64::MAX);
        (self.first + count).saturating_sub(1)
    }

    /// Whether they are worth a transaction, and numbered.
    pub(super) fn go_beside(&self) -> bool {
        self.first > 0 && self.texts.len() >= MANY
    }

    /// As the script adds them itself.
    pub(super) fn within(&self, run: &mut Cmd) {
        run.arg(b"E")
            .arg(&self.stream)
            .arg(&self.counter)
            .arg(self.floor)
            .arg(self.first)
            .arg(self.texts.len())
            .arg(&self.texts);
    }

    /// What the script checks where they are added beside it: no other event came in between.
    pub(super) fn check(&self, run: &mut Cmd) {
        run.arg(b"N")
            .arg(&self.counter)
            .arg(self.floor)
            .arg(self.first);
    }

    /// … and what it writes.
    pub(super) fn count(&self, run: &mut Cmd) {
        run.arg(b"R")
            .arg(&self.counter)
            .arg("SET")
            .arg(1)
            .arg(self.last());
    }

    fn add(&self, pipeline: &mut Pipeline) {
        let [stream, _] = &self.names;
        for (number, event) in (self.first..).zip(&self.texts) {
            let mut add = Cmd::with_capacity(5, event.len() + 128);
            add.arg("XADD")
                .arg(stream)
                .arg(format!("{number}-0"))
                .arg("e")
                .arg(event);
            pipeline.add_command(add);
        }
    }

    fn undo(&self, pipeline: &mut Pipeline, undo: &Lua) {
        // Not by its hash: a server that did not know it would leave the events.
        pipeline
            .cmd("EVAL")
            .arg(undo.code())
            .arg(self.names.len())
            .arg(&self.names)
            .arg(self.first)
            .arg(self.last());
    }
}

/// Puts in an event's number, of 16 digits.
fn number(text: &mut [u8], seq: u64) {
    if let Some(place) = text.get_mut(NUMBER) {
        let digits = seq.to_string();
        debug_assert_eq!(digits.len(), place.len(), "{seq}");
        place.copy_from_slice(digits.as_bytes());
    }
}

impl Inner {
    /// Does a step with its events beside its script; what the script said.
    pub(super) async fn run_beside(&self, step: &Commit, news: &News) -> Result<Value> {
        let script = &self.scripts.commit;
        let mut said = self
            .try_beside(step, news, ("EVALSHA", script.hash()))
            .await?;
        if let Value::ServerError(error) = &said
            && error.kind() == Some(ServerErrorKind::NoScript)
        {
            // A server that was started or became the primary since.
            said = self.try_beside(step, news, ("EVAL", script.code())).await?;
        }
        Ok(said.extract_error()?)
    }

    async fn try_beside(&self, step: &Commit, news: &News, how: (&str, &str)) -> Result<Value> {
        let mut pipeline = Pipeline::new();
        pipeline.atomic().ignore_errors();
        pipeline.add_command(step.command(how, self, true));
        news.add(&mut pipeline);
        news.undo(&mut pipeline, &self.scripts.undo);
        let answers = self.link.bulk(&pipeline).await?;
        Ok(answers.into_iter().next().unwrap_or(Value::Nil))
    }
}

/// Whether this user may ask for transactions: an earlier version did without. `EXEC` comes first,
/// alone: a user who may only begin one would leave the connection in it.
pub(super) async fn may_go_beside(link: &Link) -> Result<bool> {
    for commands in [&["EXEC"][..], &["MULTI", "EXEC"]] {
        let mut pipeline = Pipeline::new();
        // Names the node of a Cluster.
        pipeline
            .ignore_errors()
            .cmd("EXISTS")
            .arg(keys::generation(HOME));
        for command in commands {
            pipeline.cmd(command);
        }
        let refused = |answer: &Value| {
            matches!(answer, Value::ServerError(error)
                if error.kind() == Some(ServerErrorKind::NoPerm))
        };
        if link.bulk(&pipeline).await?.iter().any(refused) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Timestamp;

    #[test]
    fn the_script_finds_the_number_of_an_event_in_its_place() {
        let line = || {
            let told = crate::tell::Told {
                kind: model::EventKind::BatchStarted,
                occurred_at: Timestamp::from_millis(5),
                identity: "x".into(),
                data: serde_json::json!({ "seq": 0 }).into(),
            };
            crate::tell::bare(told, 7, Timestamp::from_millis(6), "acme")
        };
        let seq = 1_763_712_300_007_123;
        let mut texts = Texts::default();
        texts.push(line());
        let mut text = texts.finish().unwrap().remove(0);
        number(&mut text, seq);
        let event = Event {
            seq,
            ..Event::from(line())
        };
        assert_eq!(serde_json::from_slice::<Event>(&text).unwrap(), event);
        // As the script counts, from 1: up to 51, and from 68 on.
        assert!(text[..51].ends_with(b",\"seq\":") && text[67..].starts_with(b","));
        assert!(!fits(0) && fits(NUMBERED_FROM) && fits(9 * NUMBERED_FROM - 1));
    }
}
