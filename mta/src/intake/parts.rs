//! A held batch is filled by many callers, part by part, then started.
//!
//! Owns the order of parts: each takes its turn, so that indices follow each other without holes
//! and an address is found wherever it came before. A part that is refused, or whose caller went
//! away, leaves nothing, not even a gap. Must not release anything.

use std::collections::HashMap;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use axum::body::Body;
use content::Content;
use model::{BatchId, LotNumber};
use serde::Serialize;
use service::tasks::Stage;
use store::{
    Batch, CallKey, EndedCall, EndedPart, LotHashes, NewLot, NewPart, PartEnd, PartTurn, WAVES,
    address_hash,
};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::fields::{Mistakes, Strict};
use super::quota;
use super::receive::{Media, Received};
use super::recipients::{Judge, Sorted, check, malformed, reason};
use super::row::Rejection;
use super::splitter::Head;
use super::spool::SpoolReader;
use super::submit::{Intake, Submitted, Submitter, blocking, caller_gone};
use crate::abtest::layout::Dealing;
use crate::admin::problem::{Answer, Code, Refusal};
use crate::intake::fields::Fields;
use crate::released::Released;

/// How long a turn outlives a node that dies.
const TURN: Duration = Duration::from_secs(60);
/// How long a part waits for its turn, and how often it asks.
const PATIENCE: Duration = Duration::from_secs(120);
const ASKED: Duration = Duration::from_millis(20);
/// How often a part whose turn was lost is tried anew.
const TRIES: u32 = 3;
/// Batches whose addresses are remembered.
const REMEMBERED: usize = 8;
/// The fewest recipients of a lot that was sealed before its time, for how many lots a part may
/// need.
const LOT_LEAST: u32 = 16;

/// The answer to a part (contract, section 3).
#[derive(Debug, Serialize)]
struct Added {
    first_index: u32,
    accepted: u64,
    rejected: Vec<Rejection>,
    rejected_count: u64,
}

/// Where the addresses of a batch are: the lot of each hash.
#[derive(Debug, Default)]
pub(crate) struct Known {
    first: HashMap<u32, LotNumber>,
    /// Lots with a hash that another lot has too.
    more: HashMap<u32, Vec<LotNumber>>,
    /// The running number from which on lots are not known.
    next: u32,
}

impl Known {
    fn add(&mut self, lots: Vec<LotHashes>) {
        for LotHashes { lot, hashes } in lots {
            self.next = self.next.max((lot.0 & 0x00ff_ffff) + 1);
            for hash in hashes {
                if self.first.get(&hash).is_some_and(|first| *first != lot) {
                    self.more.entry(hash).or_default().push(lot);
                } else {
                    self.first.insert(hash, lot);
                }
            }
        }
    }

    /// The lots in which an address may be.
    fn lots(&self, address: &str) -> Vec<LotNumber> {
        let hash = address_hash(address);
        let more = self.more.get(&hash).into_iter().flatten();
        self.first
            .get(&hash)
            .into_iter()
            .chain(more)
            .copied()
            .collect()
    }
}

/// Open batches that are being filled by this process: one part of each at a time, and the
/// addresses that came before, eight bytes or so for each.
#[derive(Debug, Default)]
pub(crate) struct Filling(StdMutex<HashMap<BatchId, Arc<Mutex<Known>>>>);

impl Filling {
    fn of(&self, batch: BatchId) -> Arc<Mutex<Known>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED && !all.contains_key(&batch) {
            // Those in use stay: whoever waits must wait at the same place.
            all.retain(|_, known| Arc::strong_count(known) > 1);
        }
        Arc::clone(all.entry(batch).or_default())
    }
}

/// A part that has arrived.
struct Part {
    batch: Batch,
    contents: Vec<Content>,
    dealing: Option<Arc<Dealing>>,
    allow_duplicates: bool,
    rows: u32,
    call: Option<CallKey>,
}

/// What a part needs for its turn, and has back when that was lost.
struct Turn {
    id: BatchId,
    part: Arc<Part>,
    spool: SpoolReader,
    known: Known,
}

impl Intake {
    /// Adds a part to an open batch: when this returns `Ok`, it is durable.
    ///
    /// # Errors
    /// The refusal; then nothing of the part is there.
    pub(crate) async fn add_part(
        self: &Arc<Self>,
        batch: Batch,
        body: Body,
        by: Submitter,
    ) -> Answer<Submitted> {
        let received = self.receive(body, &by).await?;
        let gone = CancellationToken::new();
        let _gone_on_drop = gone.clone().drop_guard();
        let (intake, hold) = (Arc::clone(self), self.shutdown.hold(Stage::Intake));
        let task = self.tasks.spawn("intake", async move {
            let added = intake.add_once(batch, received, by, &gone).await;
            drop(hold);
            added
        });
        task.join()
            .await
            .unwrap_or_else(|error| Err(Refusal::internal("intake", &error)))
    }

    async fn add_once(
        self: Arc<Self>,
        batch: Batch,
        received: Received,
        by: Submitter,
        gone: &CancellationToken,
    ) -> Answer<Submitted> {
        let id = self.new_id()?;
        let fingerprint = received.fingerprint.map(|of| with_batch(of, batch.head.id));
        let (call, media) = (by.call(fingerprint), by.form.media);
        let add = |key| Arc::clone(&self).add(id, batch, received, media, key, gone);
        self.once(id, call, add).await
    }

    async fn add(
        self: Arc<Self>,
        id: BatchId,
        batch: Batch,
        received: Received,
        media: Media,
        call: Option<CallKey>,
        gone: &CancellationToken,
    ) -> Answer<Arc<[u8]>> {
        let Received {
            head,
            spool,
            permits,
            fingerprint: _,
        } = received;
        let stored = self.store.content(batch.head.id).await?;
        let stored = stored.ok_or_else(|| Refusal::not_found("batch"))?;
        let read = move || {
            only_recipients(&head, media)?;
            let released = Released::from_bytes(&stored)
                .map_err(|error| Refusal::internal("content", &error))?;
            let specs = released.specs();
            let contents: Result<Vec<_>, _> = specs.iter().map(Content::compile).collect();
            let contents =
                contents.map_err(|errors| Refusal::internal("content", &format!("{errors:?}")))?;
            let dealing =
                Dealing::of(&released).map_err(|error| Refusal::internal("content", &error))?;
            let mut spool = spool.read().map_err(|error| Refusal::disk(&error))?;
            // What a table becomes has no field that does not exist.
            if media != Media::PartCsv {
                check(&mut spool)?;
            }
            let made = (contents, dealing.map(Arc::new));
            Ok((made, released.allow_duplicates, spool))
        };
        let ((contents, dealing), allow_duplicates, spool) = blocking(read).await?;
        let part = Arc::new(Part {
            batch,
            contents,
            dealing,
            allow_duplicates,
            rows: spool.rows(),
            call,
        });
        let (account, now) = (self.account(&part.batch.head.account), self.clock.now());
        let count = u64::from(part.rows);
        if let Some(account) = &account {
            quota::take(&*self.store, account, count, now).await?;
        }
        let added = Arc::clone(&self).add_in_turn(id, part, spool, gone).await;
        drop(permits);
        if let (Some(account), Err(_)) = (&account, &added) {
            quota::give_back(&*self.store, account, count, now).await;
        }
        added
    }

    /// Waits until no other part of this process is being added, then adds this one.
    async fn add_in_turn(
        self: Arc<Self>,
        id: BatchId,
        part: Arc<Part>,
        mut spool: SpoolReader,
        gone: &CancellationToken,
    ) -> Answer<Arc<[u8]>> {
        let filling = self.filling.of(part.batch.head.id);
        let mut known = filling.lock().await;
        for _ in 0..TRIES {
            let turn = Turn {
                id,
                part: Arc::clone(&part),
                spool,
                known: std::mem::take(&mut known),
            };
            let (answer, turn) = Arc::clone(&self).take_turn(turn, gone).await?;
            *known = turn.known;
            if let Some(answer) = answer {
                return Ok(answer);
            }
            spool = turn.spool;
        }
        Err(busy())
    }

    /// One turn; no answer when it was lost.
    async fn take_turn(
        self: Arc<Self>,
        turn: Turn,
        gone: &CancellationToken,
    ) -> Answer<(Option<Arc<[u8]>>, Turn)> {
        // Each partition may have one lot that is not full, each time that memory is short.
        let mut lots = turn.part.rows / LOT_LEAST + 1 + u32::from(self.store.partitions());
        if turn.part.batch.head.window.is_some() {
            // And one for each of the time zones, of which there are hundreds.
            lots = turn.part.rows;
        }
        lots = lots.min(turn.part.rows.max(1)).max(1);
        if turn.part.dealing.is_some() {
            // From a number on that is a multiple of theirs.
            lots = (lots + 1).saturating_mul(WAVES);
        }
        let new = NewPart {
            batch: turn.part.batch.head.id,
            part: turn.id,
            lots,
        };
        let first = self.turn(new, gone).await?;
        let done = Arc::clone(&self).take_part(new, first, turn, gone).await;
        if !matches!(done, Ok((Some(_), _)))
            && let Err(error) = self.store.drop_part(new, self.clock.now()).await
        {
            // It runs out, and the next part throws away what this one left.
            tracing::warn!(batch = %new.batch, %error, "a part that came to nothing keeps its turn for a while");
        }
        done
    }

    async fn take_part(
        self: Arc<Self>,
        new: NewPart,
        first: (u32, u32),
        turn: Turn,
        gone: &CancellationToken,
    ) -> Answer<(Option<Arc<[u8]>>, Turn)> {
        let (sorted, turn) = Arc::clone(&self).sort_part(new, first, turn, gone).await?;
        let Some(sorted) = sorted else {
            return Ok((None, turn));
        };
        let answer = self.end_part(new, first.0, &turn.part, sorted).await?;
        Ok((answer, turn))
    }

    /// Waits for the turn: the first index, and the running number of the first lot.
    async fn turn(&self, new: NewPart, gone: &CancellationToken) -> Answer<(u32, u32)> {
        let begins = self.clock.instant();
        loop {
            let turn = self.store.begin_part(new, self.clock.now(), TURN).await?;
            match turn {
                PartTurn::Begun {
                    first_index,
                    first_lot,
                } => return Ok((first_index, first_lot)),
                PartTurn::Impossible(state) => return Err(impossible(state)),
                PartTurn::Unknown => return Err(Refusal::not_found("batch")),
                PartTurn::Busy if gone.is_cancelled() => return Err(caller_gone()),
                PartTurn::Busy if self.clock.instant() - begins > PATIENCE => return Err(busy()),
                PartTurn::Busy => tokio::time::sleep(ASKED).await,
            }
        }
    }

    /// Judges and stages; `None`: the turn was lost.
    async fn sort_part(
        self: Arc<Self>,
        new: NewPart,
        first: (u32, u32),
        mut turn: Turn,
        gone: &CancellationToken,
    ) -> Answer<(Option<Sorted>, Turn)> {
        if !turn.part.allow_duplicates {
            let known = &mut turn.known;
            known.add(self.store.part_hashes(new.batch, known.next).await?);
        }
        let (out, mut groups) = mpsc::channel(1);
        let (intake, handle) = (Arc::clone(&self), Handle::current());
        let sorting = blocking(move || {
            let Turn {
                part, known, spool, ..
            } = &mut turn;
            let earlier = |address: &str| {
                for lot in known.lots(address) {
                    let rows = handle.block_on(intake.store.lot_rows(new.batch, lot))?;
                    if rows.iter().any(|row| row.email.normalised() == address) {
                        return Ok(true);
                    }
                }
                Ok(false)
            };
            let account = part.batch.head.account.as_str();
            let partitions = intake.store.partitions();
            let judge = Judge::new(&part.contents, account, partitions, part.allow_duplicates)
                .of(&part.batch.head)
                .dealing(part.dealing.clone())
                .after(first, &earlier);
            spool.rewind().map_err(|error| Refusal::disk(&error))?;
            let sorted = judge.sort(spool, Some(&out))?;
            Ok((sorted, turn))
        });
        let (sorted, staged) = tokio::join!(sorting, self.stage_part(new, &mut groups, gone));
        // A store that failed is the cause; that the sorting was then stopped follows from it.
        match (staged?, sorted) {
            (true, sorted) => sorted.map(|(sorted, turn)| (Some(sorted), turn)),
            (false, Ok((_, turn))) => Ok((None, turn)),
            // Stopped in the middle: the caller comes again.
            (false, Err(_)) => Err(busy()),
        }
    }

    /// Stages groups of lots as they come; false when the turn was lost.
    async fn stage_part(
        &self,
        new: NewPart,
        groups: &mut mpsc::Receiver<Vec<NewLot>>,
        gone: &CancellationToken,
    ) -> Answer<bool> {
        let staged = async {
            while let Some(lots) = groups.recv().await {
                if gone.is_cancelled() {
                    return Err(caller_gone());
                }
                let timer = self.metrics.store_seconds("stage_part").start_timer();
                let now = self.clock.now();
                let kept = self.store.stage_part(new, lots, now, TURN).await?;
                timer.observe_duration();
                if !kept {
                    return Ok(false);
                }
            }
            if gone.is_cancelled() {
                return Err(caller_gone());
            }
            Ok(true)
        };
        let staged = staged.await;
        // Whoever sorts must not wait for a place in a channel that nobody empties.
        groups.close();
        while groups.try_recv().is_ok() {}
        staged
    }

    /// Makes the part durable and tells what became of it; `None`: the turn was lost.
    async fn end_part(
        &self,
        new: NewPart,
        first_index: u32,
        part: &Part,
        sorted: Sorted,
    ) -> Answer<Option<Arc<[u8]>>> {
        let (accepted, rejected) = (sorted.accepted, sorted.rejected_count);
        let answer = serde_json::to_vec(&Added {
            first_index,
            accepted,
            rejected: sorted.rejected,
            rejected_count: rejected,
        });
        let answer: Arc<[u8]> = answer
            .map_err(|error| Refusal::internal("answer", &error))?
            .into();
        let ended = EndedPart {
            batch: new.batch,
            part: new.part,
            accepted,
            rejected,
            call: part.call.clone().map(|key| EndedCall {
                key,
                attempt: new.part,
                answer: Arc::clone(&answer),
            }),
        };
        let timer = self.metrics.store_seconds("commit_part").start_timer();
        let end = self.store.commit_part(ended, self.clock.now()).await?;
        timer.observe_duration();
        match end {
            PartEnd::Lost => Ok(None),
            PartEnd::Impossible(state) => Err(impossible(state)),
            PartEnd::Done => {
                self.metrics
                    .recipients_accepted(&part.batch.head.account)
                    .inc_by(accepted);
                tracing::info!(batch = %new.batch, first_index, accepted, rejected, "part accepted");
                Ok(Some(answer))
            }
        }
    }
}

/// The document of a part has one field.
fn only_recipients(head: &Head, media: Media) -> Answer<()> {
    if media != Media::Part {
        return Ok(());
    }
    let parsed: Result<Strict, _> = serde_json::from_slice(&head.json);
    let Strict(document) =
        parsed.map_err(|error| malformed("", head.position(&error), &reason(&error)))?;
    let mut mistakes = Mistakes::default();
    let mut fields = Fields::of(String::new(), document, &mut mistakes);
    fields.required("recipients", |value| match value {
        serde_json::Value::Array(_) => Ok(()),
        other => Err(super::fields::expected(&other, "an array")),
    });
    fields.finish();
    if mistakes.is_empty() {
        Ok(())
    } else {
        Err(Refusal::of_mistakes(mistakes.into_vec()))
    }
}

/// The same part of another batch is another call.
fn with_batch(fingerprint: [u8; 32], batch: BatchId) -> [u8; 32] {
    let both = [&fingerprint[..], &batch.to_bytes()].concat();
    let digest = digest::digest(&digest::SHA256, &both);
    let mut bytes = [0; 32];
    for (to, from) in bytes.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    bytes
}

fn impossible(state: model::BatchState) -> Refusal {
    let detail = format!("the batch takes no parts: it is {state}");
    Refusal::new(Code::InvalidState, detail)
}

fn busy() -> Refusal {
    Refusal::new(
        Code::Unavailable,
        "too many parts of this batch are being added at the moment",
    )
}
