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
use crate::{Result, StoreError};
use ::redis::{Cmd, Pipeline, ServerErrorKind, Value};
use model::Event;

/// From as many events on they are added beside the script: the transaction and the script that may
/// take them back cost as much as so many strings.
const MANY: usize = 8;

/// Numbers of events have 16 digits, so that one can be put in place of another.
const NUMBERED_FROM: u64 = 1_000_000_000_000_000;

/// Whether a step's events can be numbered from here on.
fn fits(first: u64) -> bool {
    (NUMBERED_FROM..9 * NUMBERED_FROM).contains(&first)
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
    /// `events`, with numbers above `floor`. `time`: the server's in microseconds when the step began
    /// to read, 0 when that is not known.
    pub(super) fn new(
        names: [String; 2],
        (stream, counter): (Vec<u8>, Vec<u8>),
        events: Vec<Event>,
        floor: u64,
        time: u64,
    ) -> Result<Self> {
        let first = if fits(time) { time } else { 0 };
        let number = |(seq, event)| numbered(Event { seq, ..event });
        let texts = (first.max(NUMBERED_FROM)..).zip(events).map(number);
        Ok(Self {
            stream,
            counter,
            names,
            floor,
            first,
            texts: texts.collect::<Result<_>>()?,
        })
    }

    /// The number of the last.
    pub(super) fn last(&self) -> u64 {
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

/// An event whose number stands where the script looks for it: behind an id of a known length.
fn numbered(event: Event) -> Result<Vec<u8>> {
    const NUMBER: &[u8] = b",\"seq\":";
    const ID: usize = 44;
    let text = serde_json::to_vec(&event)
        .map_err(|error| StoreError::Damaged(format!("an event: {error}")))?;
    match text.get(ID..) {
        Some(rest) if fits(event.seq) && rest.starts_with(NUMBER) => Ok(text),
        _ => Err(StoreError::Damaged("an event without an id".into())),
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
        let told = crate::tell::Told {
            kind: model::EventKind::BatchStarted,
            occurred_at: Timestamp::from_millis(5),
            identity: "x".into(),
            data: serde_json::json!({ "seq": 0 }),
        };
        let seq = 1_763_712_300_007_123;
        let event = crate::tell::bare(told, seq, Timestamp::from_millis(6), "acme".into());
        let written = numbered(event.clone()).unwrap();
        assert_eq!(serde_json::from_slice::<Event>(&written).unwrap(), event);
        // As the script counts, from 1: up to 51, and from 68 on.
        assert_eq!(&written[51..67], seq.to_string().as_bytes());
        assert!(written[..51].ends_with(b",\"seq\":") && written[67..].starts_with(b","));
        assert!(numbered(Event { seq: 7, ..event }).is_err());
        assert!(!fits(0));
    }
}
