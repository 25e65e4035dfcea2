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
use super::news::{News, Texts};
use super::record::Version;
use crate::{Control, Result, StoreError};
use ::redis::{Cmd, ErrorKind, Pipeline, Script, ServerErrorKind, Value};
use model::{Partition, Timestamp};
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

    pub(super) const fn code(&self) -> &'static str {
        self.code
    }

    pub(super) fn hash(&self) -> &str {
        self.script.get_hash()
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
    pub(super) undo: Lua,
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
            undo: Lua::new(include_str!("undo.lua")),
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
    news: Option<News>,
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
            news: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.news.is_none()
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

    /// Events, in order, the last thing that it does; their numbers are above `floor`. `time`: the
    /// server's in microseconds when the step began to read, 0 when that is not known. From there they
    /// are numbered, and taken as they are unless somebody's events have come in between: then the
    /// script puts each text together anew, which costs as much as adding the event.
    pub(super) fn events(&mut self, events: Texts, floor: u64, time: u64) -> Result<()> {
        let texts = events.finish()?;
        if texts.is_empty() {
            return Ok(());
        }
        let p = self.partition;
        let names = [keys::events(p), keys::event_counter(p)];
        let numbers = (self.key(names[0].clone()), self.key(names[1].clone()));
        self.news = Some(News::new(names, numbers, texts, floor, time));
        Ok(())
    }

    /// The number that the last event is to have; 0: there is none, or the script decides it.
    pub(super) fn last_event(&self) -> u64 {
        self.news.as_ref().map_or(0, News::last)
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

    /// The call of the script; `beside`: events are added behind it.
    pub(super) fn command(&self, how: (&str, &str), inner: &Inner, beside: bool) -> Cmd {
        let apart = self.news.as_ref().filter(|_| beside);
        let mut run = Cmd::new();
        run.arg(how.0)
            .arg(how.1)
            .arg(self.keys.len())
            .arg(&self.keys);
        run.arg(inner.past.generation().as_bytes());
        run.arg(self.checked + usize::from(apart.is_some()));
        run.arg(&self.checks);
        if let Some(news) = apart {
            news.check(&mut run);
        }
        run.arg(&self.writes);
        match (&self.news, apart) {
            (_, Some(news)) => news.count(&mut run),
            (Some(news), None) => news.within(&mut run),
            (None, None) => {}
        }
        run
    }

    /// Does it. `safe`: with replicas, one of them has it when this returns.
    pub(super) async fn run(self, inner: &Inner, safe: bool) -> Result<Outcome> {
        if self.is_empty() {
            return Ok(Outcome::Done {
                seq: 0,
                open: Vec::new(),
            });
        }
        let safe = safe && inner.past.has_replicas(self.partition);
        let many = self.news.as_ref().filter(|news| news.go_beside());
        if let Some(news) = many.filter(|_| inner.beside && !safe) {
            let said = inner.run_beside(&self, news).await?;
            if let Some(mut outcome) = self.outcome(inner, said)? {
                if let Outcome::Done { seq, .. } = &mut outcome {
                    *seq = news.last();
                }
                return Ok(outcome);
            }
        }
        let call = |how: (&str, &str)| in_time(self.command(how, inner, false), safe);
        let said = inner.run_script(&inner.scripts.commit, call).await?;
        Ok(self.outcome(inner, said)?.unwrap_or(Outcome::Conflict))
    }

    /// What the script said; none: it wants to number the events itself.
    fn outcome(&self, inner: &Inner, said: Value) -> Result<Option<Outcome>> {
        let mut parts = answer::list(said).into_iter();
        Ok(Some(match parts.next().map(answer::number) {
            Some(1) => {
                let seq = parts.next().map_or(0, answer::number);
                Outcome::Done {
                    seq: u64::try_from(seq).unwrap_or(0),
                    open: parts.map(answer::number).collect(),
                }
            }
            Some(2) => return Err(inner.past.is_another(self.partition)),
            Some(3) => {
                let left = parts.next().map_or(0, answer::number);
                Outcome::Quiet(u64::try_from(left).unwrap_or(0))
            }
            Some(4) => return Ok(None),
            _ => Outcome::Conflict,
        }))
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
        let call = |(command, script): (&str, &str)| {
            let mut run = Cmd::new();
            run.arg(command).arg(script).arg(keys.len()).arg(keys);
            run.arg(arguments);
            in_time(run, safe)
        };
        self.run_script(script, call).await
    }

    /// Runs a script by its hash, or by its text where the server does not know it.
    async fn run_script(
        &self,
        script: &Lua,
        call: impl Fn((&str, &str)) -> Pipeline,
    ) -> Result<Value> {
        let by_hash = call(("EVALSHA", script.hash()));
        let answers = match self.link.bulk_raw(&by_hash).await? {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                // A server that was started or became the primary since.
                self.link.bulk(&call(("EVAL", script.code()))).await?
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

/// A command; `safe`: and then the number of replicas that have what it wrote.
fn in_time(command: Cmd, safe: bool) -> Pipeline {
    let mut pipeline = Pipeline::new();
    pipeline.add_command(command);
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
