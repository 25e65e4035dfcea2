//! One atomic step in one partition, as one script.
//!
//! What a step means is decided in Rust, by the same rules for every engine, on what was read
//! before; the script checks that nothing of it has changed since and then writes everything. So
//! there is one copy of the rules and one small script; two steps at once on the same recipients
//! cost a second try, which is rare: nodes hold different ranges. What everybody changes at once
//! (counters, feeds, event numbers) is never checked but moved by the script itself. Must not
//! decide what is written.

use super::Inner;
use super::keys;
use super::link::answer;
use super::record::Version;
use crate::{Control, Result, StoreError};
use ::redis::{Cmd, ErrorKind, Pipeline, Script, ServerErrorKind, Value};
use model::{Event, Partition, Timestamp};
use std::collections::HashMap;
use std::time::Duration;

/// How long control items are kept, in milliseconds: a node that was away longer starts anew.
const CONTROL_KEPT: i64 = 24 * 60 * 60 * 1000;
/// Arguments of one command within a script: what fits Lua's stack with room to spare.
const ARGUMENTS: usize = 2_000;
/// How long a replica may take to have a write.
const REPLICATED_MS: u32 = 2_000;

/// A script by its text; the server knows it by its hash.
pub(super) struct Lua {
    code: &'static str,
    script: Script,
}

impl Lua {
    fn new(code: &'static str) -> Self {
        Self {
            code,
            script: Script::new(code),
        }
    }
}

/// The scripts of this engine.
pub(super) struct Scripts {
    pub(super) commit: Lua,
    pub(super) look: Lua,
    pub(super) find: Lua,
    pub(super) survey: Lua,
    pub(super) trim: Lua,
    pub(super) erase: Lua,
    pub(super) patch: Lua,
    pub(super) scan: Lua,
    pub(super) past: Lua,
    pub(super) share: Lua,
    pub(super) swap: Lua,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            commit: Lua::new(include_str!("commit.lua")),
            look: Lua::new(include_str!("look.lua")),
            find: Lua::new(include_str!("find.lua")),
            survey: Lua::new(include_str!("survey.lua")),
            trim: Lua::new(include_str!("trim.lua")),
            erase: Lua::new(include_str!("erase.lua")),
            patch: Lua::new(include_str!("patch.lua")),
            scan: Lua::new(include_str!("scan.lua")),
            past: Lua::new(include_str!("past.lua")),
            share: Lua::new(include_str!("share.lua")),
            swap: Lua::new(include_str!("swap.lua")),
        }
    }
}

/// What became of a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done: the number of its last event (0: it had none), and how many recipients each
    /// count that asked left open.
    Done { seq: u64, open: Vec<i64> },
    /// Something that it had read was changed meanwhile: nothing was done.
    Conflict,
    /// The primary has changed: nothing is leased for so many milliseconds.
    Quiet(u64),
}

/// A step being put together.
pub(super) struct Commit {
    pub(super) partition: Partition,
    keys: Vec<String>,
    numbers: HashMap<String, usize>,
    checks: Vec<Vec<u8>>,
    checked: usize,
    writes: Vec<Vec<u8>>,
}

fn text(number: impl ToString) -> Vec<u8> {
    number.to_string().into_bytes()
}

impl Commit {
    pub(super) fn new(partition: Partition) -> Self {
        Self {
            partition,
            keys: vec![keys::generation(partition)],
            numbers: HashMap::new(),
            checks: Vec::new(),
            checked: 0,
            writes: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    fn key(&mut self, key: String) -> Vec<u8> {
        let known = self.numbers.get(&key).copied();
        let number = known.unwrap_or_else(|| {
            self.keys.push(key.clone());
            self.numbers.insert(key, self.keys.len());
            self.keys.len()
        });
        text(number)
    }

    /// The key still has this version; none: it is still not there.
    pub(super) fn check(&mut self, key: String, version: Option<Version>) {
        let key = self.key(key);
        let version = version.map_or(Vec::new(), |version| version.to_vec());
        self.checks.extend([b"V".to_vec(), key, version]);
        self.checked += 1;
    }

    /// The primary has not changed, or so long ago that every lease has run out since. Leases of
    /// this length are given: another node keeps quiet as long when it finds another primary.
    pub(super) fn check_quiet(&mut self, lasts: Duration) {
        let key = self.key(keys::history(self.partition));
        self.checks
            .extend([b"P".to_vec(), key, text(lasts.as_millis())]);
        self.checked += 1;
    }

    /// The value still has these bytes from `at` on.
    pub(super) fn check_bytes(&mut self, key: String, at: usize, bytes: &[u8]) {
        let key = self.key(key);
        self.checks
            .extend([b"B".to_vec(), key, text(at), bytes.to_vec()]);
        self.checked += 1;
    }

    /// The field still has this value; none: it is still not there.
    pub(super) fn check_field(&mut self, key: String, field: &[u8], value: Option<&[u8]>) {
        let key = self.key(key);
        let value = value.unwrap_or_default().to_vec();
        self.checks
            .extend([b"H".to_vec(), key, field.to_vec(), value]);
        self.checked += 1;
    }

    /// A command on a key.
    pub(super) fn write<A: AsRef<[u8]>>(
        &mut self,
        command: &str,
        key: String,
        arguments: impl IntoIterator<Item = A>,
    ) {
        let key = self.key(key);
        let arguments: Vec<Vec<u8>> = arguments
            .into_iter()
            .map(|of| of.as_ref().to_vec())
            .collect();
        self.writes.extend([
            b"R".to_vec(),
            key,
            command.as_bytes().to_vec(),
            text(arguments.len()),
        ]);
        self.writes.extend(arguments);
    }

    /// A command that takes any number of arguments after `first`, in groups of `group`.
    pub(super) fn write_many(&mut self, command: &str, key: &str, all: &[Vec<u8>], group: usize) {
        for some in all.chunks(ARGUMENTS / group * group) {
            self.write(command, key.to_owned(), some);
        }
    }

    /// Events, in order; their numbers are above `floor`. `time`: the server's in microseconds when
    /// the step began to read, 0 when that is not known. From there they are numbered, and the script
    /// takes them as they are unless somebody's events have come in between: putting each text
    /// together anew costs it as much as adding the event.
    pub(super) fn events(&mut self, events: Vec<Event>, floor: u64, time: u64) -> Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        let stream = self.key(keys::events(self.partition));
        let counter = self.key(keys::event_counter(self.partition));
        let first = if fits(time) { time } else { 0 };
        self.writes.extend([
            b"E".to_vec(),
            stream,
            counter,
            text(floor),
            text(first),
            text(events.len()),
        ]);
        for (seq, event) in (first.max(NUMBERED_FROM)..).zip(events) {
            self.writes.push(numbered(Event { seq, ..event })?);
        }
        Ok(())
    }

    /// Items of the control feed, in order.
    pub(super) fn control(&mut self, items: &[Control], now: Timestamp) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let feed = self.key(keys::control(self.partition));
        let counter = self.key(keys::control_counter(self.partition));
        self.writes.extend([
            b"C".to_vec(),
            feed,
            counter,
            text(now.millis()),
            text(now.millis() - CONTROL_KEPT),
            text(items.len()),
        ]);
        for item in items {
            let item = serde_json::to_vec(item)
                .map_err(|error| StoreError::Damaged(format!("a control item: {error}")))?;
            self.writes.push(item);
        }
        Ok(())
    }

    /// Lists the queue if something stands in it, after the writes before.
    pub(super) fn list_queue(&mut self, rank: u8, queue: &str) {
        let key = self.key(keys::queue(self.partition, rank, queue));
        let list = self.key(keys::queues(self.partition));
        let name = keys::queue_name(rank, queue);
        self.writes.extend([b"Q".to_vec(), key, list, name]);
    }

    /// Moves counters; whether to tell what is open after it.
    pub(super) fn count(&mut self, key: String, moves: &[(&'static str, i64)], tell: bool) {
        let key = self.key(key);
        self.writes
            .extend([b"K".to_vec(), key, text(u8::from(tell)), text(moves.len())]);
        for (field, by) in moves {
            self.writes.extend([field.as_bytes().to_vec(), text(by)]);
        }
    }

    /// What was scheduled is queued.
    pub(super) fn release_counters(&mut self, key: String) {
        let key = self.key(key);
        self.writes.extend([b"S".to_vec(), key]);
    }

    /// Does it. `safe`: with replicas, one of them has it when this returns.
    pub(super) async fn run(self, inner: &Inner, safe: bool) -> Result<Outcome> {
        if self.is_empty() {
            return Ok(Outcome::Done {
                seq: 0,
                open: Vec::new(),
            });
        }
        let generation = inner.past.generation().as_bytes().to_vec();
        let mut arguments = vec![generation, text(self.checked)];
        arguments.extend(self.checks);
        arguments.extend(self.writes);
        let answer = inner
            .script(
                &inner.scripts.commit,
                self.partition,
                &self.keys,
                &arguments,
                safe,
            )
            .await?;
        let mut parts = answer::list(answer).into_iter();
        match parts.next().map(answer::number) {
            Some(1) => {}
            Some(2) => return Err(inner.past.is_another(self.partition)),
            Some(3) => {
                let left = parts.next().map_or(0, answer::number);
                return Ok(Outcome::Quiet(u64::try_from(left).unwrap_or(0)));
            }
            _ => return Ok(Outcome::Conflict),
        }
        let seq = parts.next().map_or(0, answer::number);
        Ok(Outcome::Done {
            seq: u64::try_from(seq).unwrap_or(0),
            open: parts.map(answer::number).collect(),
        })
    }
}

/// Numbers of events have 16 digits, so that one can be put in place of another.
const NUMBERED_FROM: u64 = 1_000_000_000_000_000;

/// Whether a step's events can be numbered from here on.
fn fits(first: u64) -> bool {
    (NUMBERED_FROM..9 * NUMBERED_FROM).contains(&first)
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
    /// Runs a script; `safe`: with replicas, one of them has what it wrote when this returns.
    pub(super) async fn script(
        &self,
        script: &Lua,
        partition: Partition,
        keys: &[String],
        arguments: &[Vec<u8>],
        safe: bool,
    ) -> Result<Value> {
        let safe = safe && self.past.has_replicas(partition);
        let by_hash = pipeline("EVALSHA", script.script.get_hash(), keys, arguments, safe);
        let answers = match self.link.bulk_raw(&by_hash).await? {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                // A server that was started or became the primary since.
                let whole = pipeline("EVAL", script.code, keys, arguments, safe);
                self.link.bulk(&whole).await?
            }
            answers => answers?,
        };
        let mut answers = answers.into_iter();
        let answer = answers.next().unwrap_or(Value::Nil);
        if let Some(replicas) = answers.next().map(answer::number)
            && replicas == 0
        {
            return Err(not_replicated());
        }
        Ok(answer)
    }
}

fn pipeline(
    command: &str,
    script: &str,
    keys: &[String],
    arguments: &[Vec<u8>],
    safe: bool,
) -> Pipeline {
    let mut run = Cmd::new();
    run.arg(command).arg(script).arg(keys.len()).arg(keys);
    for argument in arguments {
        run.arg(argument);
    }
    let mut pipeline = Pipeline::new();
    pipeline.add_command(run);
    if safe {
        wait(&mut pipeline);
    }
    pipeline
}

/// Asks for the number of replicas that have what was written, one at least if that can be.
pub(super) fn wait(pipeline: &mut Pipeline) {
    pipeline.cmd("WAIT").arg(1).arg(REPLICATED_MS);
}

/// No replica had a write in time.
pub(super) fn not_replicated() -> StoreError {
    StoreError::Unavailable(format!(
        "redis: no replica had a write within {REPLICATED_MS} ms"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

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
