//! The task that ships.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::{Journal, RecordKind};
use model::{Attempt, BatchId, Fact, MessageId, Place, Seq};
use service::clock::SharedClock;
use service::metrics::{DuplicateCause, Label as _, Metrics, Portion};
use service::tasks::{Shutdown, Stage, blocking};
use store::{LeasedRange, RangeRef, Release, Shipment, Shipped, Store, StoreError};
use tokio::sync::mpsc;

use super::Recovered;
use super::ledger::{Ledger, Moves};
use crate::queue::Event;

/// Records in one shipment: as many starts as outcomes.
const RECORDS_MAX: usize = 8_000;
/// Between looks at what there is to ship.
const PACE: Duration = Duration::from_millis(20);
/// Between shipments, unless the queue asks for one. A shipment costs a commit, and each lot that
/// it touches its cells and a log entry, however few facts they have; what comes after a pause
/// waits for nothing. The longer the last took the longer is this, at least and at most so long.
const COMPANY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));
/// One part in so many of the time at most goes into shipments, as far as [`COMPANY`] lets it.
const SHIPPING_PART: u32 = 100;
/// When nothing has come for so long nobody's company is waited for beyond the least: what is there is
/// the last for a while.
const QUIET: Duration = Duration::from_millis(100);
/// Waits after the store did not answer.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Releases in one call.
const RELEASES_MAX: usize = 200;
/// How often what needs no new fact is looked after.
const IDLE: Duration = Duration::from_secs(1);

/// After the store was seen to forget, what it forgot comes again for as long as journals keep what
/// they have shipped.
const FORGETFUL: Duration = Duration::from_secs(600);

/// How often it is asked whether the store may have forgotten something.
const LOOK_BACK: Duration = Duration::from_secs(2);

/// What the queue asks of shipping.
#[derive(Debug)]
pub enum ShipCommand {
    /// A range was leased.
    Register {
        /// Which.
        range: RangeRef,
        /// Of which batch.
        batch: BatchId,
        /// Its recipients, with their offsets.
        places: Vec<(Place, u32)>,
        /// What may be started already.
        window: u32,
    },
    /// A range is to be handed back behind the facts that are in the journal now.
    Release(Release),
    /// Half of a window has reported: ship soon, so that it moves before it is used up.
    Hurry,
    /// Nothing more will come: end when everything is shipped.
    Finish,
}

/// What shipping is made of.
#[derive(Debug)]
pub struct ShipDeps<S: ?Sized> {
    /// Where facts come from.
    pub journal: Journal,
    /// Where they go.
    pub store: Arc<S>,
    /// The time.
    pub clock: SharedClock,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What the queue asks.
    pub commands: mpsc::Receiver<ShipCommand>,
    /// What the queue is told.
    pub queue: mpsc::Sender<Event>,
    /// The end of the process.
    pub shutdown: Shutdown,
}

/// The task; see the module.
pub struct Shipper {
    deps: ShipDeps<dyn Store>,
    /// What the gauge has of this journal; that of hits has its own.
    pending: Portion,
    ledger: Ledger,
    /// Everything through here is in the store.
    shipped: Seq,
    starts: Recovered,
    /// The ledger has the reports through here.
    reported: Seq,
    /// As many upheavals of the store are dealt with.
    upheavals: u64,
    /// Until then a second delivery is put down to what the store forgot.
    forgetful_until: Option<Instant>,
    /// Attempts of which a former one may have been lost with the machine's power.
    unsynced: HashSet<(MessageId, u8)>,
    looked_back: Option<Instant>,
    releases: Vec<(Seq, Release)>,
    backoff: Duration,
    /// When the last shipment began.
    began: Option<Instant>,
    /// How long after that the next waits for company.
    company: Duration,
    /// The next is not to wait for company.
    hurry: bool,
    finishing: bool,
    store_is_up: bool,
}

impl std::fmt::Debug for Shipper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shipper")
            .field("shipped", &self.shipped)
            .finish_non_exhaustive()
    }
}

impl Shipper {
    /// A shipper that goes on after `mark`, the store's high-water mark for this journal.
    /// `starts` is what the journal knows of transactions in flight.
    pub fn new(deps: ShipDeps<dyn Store>, mark: Seq, starts: Recovered) -> Self {
        note_lost(&deps.journal, &deps.metrics, mark);
        deps.journal.resume(mark, deps.clock.instant());
        Self {
            pending: Portion::of(&deps.metrics.journal_pending_records),
            deps,
            ledger: Ledger::default(),
            shipped: mark,
            starts,
            reported: mark,
            upheavals: 0,
            forgetful_until: None,
            unsynced: HashSet::new(),
            looked_back: None,
            releases: Vec::new(),
            backoff: BACKOFF.0,
            began: None,
            company: COMPANY.0,
            hurry: false,
            finishing: false,
            store_is_up: true,
        }
    }

    /// Ships what a former run of this node left, then takes its leases back, as far as the store
    /// still has them for it. Recipients that the journal has no start of are untouched.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub async fn catch_up(
        &mut self,
        lease: Duration,
    ) -> std::io::Result<(Vec<LeasedRange>, Instant)> {
        let through = self.deps.journal.synced_through();
        while self.shipped < through {
            self.ship_some(false).await?;
        }
        let (mut ranges, asked_at) = loop {
            let node = self.deps.journal.id();
            let asked_at = self.deps.clock.instant();
            match self
                .deps
                .store
                .reclaim(node, self.deps.clock.now(), lease)
                .await
            {
                Ok(ranges) => break (ranges, asked_at),
                Err(error) => self.store_failed("reclaim", &error).await,
            }
        };
        let mut ours = HashSet::new();
        for range in &mut ranges {
            for item in &mut range.items {
                let message = MessageId {
                    batch: range.batch.id,
                    index: item.row.index,
                };
                let number = item.attempts.saturating_add(1);
                let in_window = item.maybe_started;
                item.maybe_started = self.starts.was_in_flight(message, number);
                if in_window && !item.maybe_started && self.deps.journal.rebooted() {
                    self.unsynced.insert((message, number));
                }
                ours.insert((message, number));
            }
        }
        self.starts
            .keep_only(|message, number| ours.contains(&(message, number)));
        if !ranges.is_empty() {
            tracing::info!(
                ranges = ranges.len(),
                in_doubt = self.starts.len(),
                maybe_unsynced = self.unsynced.len(),
                "took back the leases of the last run"
            );
        }
        Ok((ranges, asked_at))
    }

    /// Ships until told to finish, or until the process closes its store.
    pub async fn run(mut self) {
        let hold = self.deps.shutdown.hold(Stage::Journal);
        loop {
            self.take_commands();
            if self.finishing && self.is_done() {
                break;
            }
            self.look_back().await;
            if let Err(error) = self.ship_some(true).await {
                tracing::error!(%error, "the journal cannot be read, nothing is shipped");
                tokio::time::sleep(BACKOFF.1).await;
            }
            self.release_due().await;
            self.pending.set(self.deps.journal.pending_records());
            let closing = self.deps.shutdown.clone().reached_close();
            tokio::select! {
                biased;
                () = closing => break,
                () = self.something_to_do() => {}
            }
        }
        if !self.is_done() {
            tracing::warn!(
                pending = self.deps.journal.pending_records(),
                "facts stay in the journal for the next start"
            );
        }
        drop(hold);
    }

    fn is_done(&self) -> bool {
        self.releases.is_empty() && self.shipped >= self.deps.journal.written_through()
    }

    async fn something_to_do(&mut self) {
        if self.finishing {
            // The sync thread may be idle: ask.
            let journal = self.deps.journal.clone();
            let synced = blocking(move || journal.sync()).await;
            if !matches!(synced, Ok(Ok(()))) {
                tokio::time::sleep(PACE).await;
            }
            return;
        }
        let mut written = (
            self.deps.journal.written_through(),
            self.deps.clock.instant(),
        );
        loop {
            tokio::time::sleep(PACE).await;
            let now = self.deps.clock.instant();
            let through = self.deps.journal.written_through();
            if through != written.0 {
                written = (through, now);
            }
            let is_quiet = now >= written.1 + QUIET;
            let company = if is_quiet { COMPANY.0 } else { self.company };
            if self.began.is_none_or(|began| now >= began + company)
                || self.deps.journal.pending_records() >= RECORDS_MAX as u64
                || self.hurry
                || !self.deps.commands.is_empty()
            {
                break;
            }
        }
        tokio::select! {
            biased;
            readable = self.deps.journal.readable(self.shipped) => if readable.is_err() {
                tokio::time::sleep(IDLE).await;
            },
            command = self.deps.commands.recv() => self.command(command.unwrap_or(ShipCommand::Finish)),
            () = tokio::time::sleep(IDLE) => {}
        }
    }

    fn take_commands(&mut self) {
        loop {
            match self.deps.commands.try_recv() {
                Ok(command) => self.command(command),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.finishing = true;
                    return;
                }
            }
        }
    }

    fn command(&mut self, command: ShipCommand) {
        match command {
            ShipCommand::Register {
                range,
                batch,
                places,
                window,
            } => self.ledger.register(range, batch, places, window),
            ShipCommand::Release(release) => {
                // Everything about the range has been appended; after a write its end is known.
                if let Err(error) = self.deps.journal.write() {
                    tracing::warn!(%error, "journal not written before a range is handed back");
                }
                self.releases
                    .push((self.deps.journal.written_through(), release));
            }
            ShipCommand::Hurry => self.hurry = true,
            ShipCommand::Finish => self.finishing = true,
        }
    }

    /// Ships the next records, if any, and tries until the store has them.
    async fn ship_some(&mut self, tells_queue: bool) -> std::io::Result<()> {
        let pending = self.deps.journal.pending(self.shipped, RECORDS_MAX).await?;
        if pending.through <= self.shipped {
            self.deps
                .journal
                .shipped(self.trimmable(), self.deps.clock.instant());
            return Ok(());
        }
        // Whose facts these are was said before anything of it was sent, perhaps just now: a report
        // of a range that is not known yet would be lost, and its window would stand still.
        self.take_commands();
        let facts = self.read(&pending.records);
        let moves = self.ledger.moves();
        let shipment = Shipment {
            journal: self.deps.journal.id(),
            facts,
            through: pending.through,
            windows: moves.windows.clone(),
            finished: moves.finished.clone(),
            now: self.deps.clock.now(),
        };
        let started = self.deps.clock.instant();
        (self.began, self.hurry) = (Some(started), false);
        let shipped = loop {
            match self.deps.store.ship(shipment.clone()).await {
                Ok(shipped) => break shipped,
                Err(error) => {
                    // Commands go on being taken, so that the queue never waits for the store.
                    self.take_commands();
                    self.store_failed("ship", &error).await;
                    if self.deps.shutdown.is_closing() {
                        return Ok(());
                    }
                }
            }
        };
        let took = self.deps.clock.instant().saturating_duration_since(started);
        self.company = took
            .saturating_mul(SHIPPING_PART)
            .clamp(COMPANY.0, COMPANY.1);
        self.deps
            .metrics
            .store_seconds("ship")
            .observe(took.as_secs_f64());
        if let Some(mark) = shipped.behind {
            self.rewind(mark);
            return Ok(());
        }
        self.arrived(pending.through, &moves, shipped, tells_queue)
            .await;
        Ok(())
    }

    fn read(&mut self, records: &[journal::Record]) -> Vec<(Seq, Fact)> {
        let mut facts = Vec::with_capacity(records.len());
        for record in records {
            self.starts.learn(record);
            if record.kind == RecordKind::Start {
                continue;
            }
            match Fact::from_bytes(&record.payload) {
                Ok(fact) => {
                    // What is shipped again may be about a recipient that was leased anew since.
                    if let Fact::Attempt(attempt) = &fact
                        && record.seq > self.reported
                    {
                        self.ledger.report(attempt.message.batch, attempt.place);
                        self.count_unsynced(attempt);
                    }
                    facts.push((record.seq, fact));
                }
                Err(error) => {
                    tracing::error!(seq = record.seq, %error, "a fact in the journal cannot be read and is not shipped")
                }
            }
        }
        let last = records.last().map_or(0, |record| record.seq);
        self.reported = self.reported.max(last);
        facts
    }

    /// Counts a second copy that somebody may have got because the first was lost with the power.
    fn count_unsynced(&mut self, attempt: &Attempt) {
        let was_in_doubt = self.unsynced.remove(&(attempt.message, attempt.number));
        if was_in_doubt && attempt.result.may_have_arrived() {
            let causes = &self.deps.metrics.duplicates;
            causes.at(DuplicateCause::UnsyncedJournal).inc();
        }
    }

    /// Finds out whether the store may have forgotten what it acknowledged, and ships it again.
    async fn look_back(&mut self) {
        let now = self.deps.clock.instant();
        if self.looked_back.is_some_and(|at| now < at + LOOK_BACK) {
            return;
        }
        self.looked_back = Some(now);
        self.compare_clocks().await;
        let seen = match self.deps.store.upheavals().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::debug!(%error, "the store does not tell its past");
                return;
            }
        };
        let gauge = i64::try_from(seen).unwrap_or(i64::MAX);
        self.deps.metrics.store_upheavals.set(gauge);
        if seen == self.upheavals {
            return;
        }
        match self.deps.store.high_water(self.deps.journal.id()).await {
            Ok(mark) => {
                self.upheavals = seen;
                self.expect_repeats();
                if mark < self.shipped {
                    self.rewind(mark);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "the store does not tell how far it has the journal")
            }
        }
    }

    async fn compare_clocks(&self) {
        let clock = &self.deps.clock;
        match store::clock_offset(&*self.deps.store, || clock.now()).await {
            Ok(offset) => self.deps.metrics.clock_offset_seconds.set(offset),
            Err(error) => tracing::debug!(%error, "the store does not tell its time"),
        }
    }

    /// The store has this journal only through `mark`: what came after goes once more.
    fn rewind(&mut self, mark: Seq) {
        let again = self.shipped.saturating_sub(mark);
        tracing::error!(
            mark,
            shipped = self.shipped,
            "the store has forgotten facts: they are shipped again"
        );
        self.deps.metrics.facts_shipped_again.inc_by(again);
        note_lost(&self.deps.journal, &self.deps.metrics, mark);
        self.deps.journal.rewind(mark);
        self.shipped = mark;
        self.expect_repeats();
    }

    /// The store may have forgotten what it had acknowledged to any node.
    fn expect_repeats(&mut self) {
        self.forgetful_until = Some(self.deps.clock.instant() + FORGETFUL);
        self.ledger.repeat();
    }

    /// Why a message was delivered again of which the store learns now.
    fn cause_of_repeat(&self) -> DuplicateCause {
        let now = self.deps.clock.instant();
        match self.forgetful_until {
            Some(until) if now < until => DuplicateCause::StoreFailover,
            _ => DuplicateCause::LostNode,
        }
    }

    async fn arrived(&mut self, through: Seq, moves: &Moves, shipped: Shipped, tells_queue: bool) {
        self.shipped = through;
        self.backoff = BACKOFF.0;
        if !self.store_is_up {
            tracing::info!("the store is back");
        }
        self.store_is_up = true;
        self.deps.metrics.store_up.set(1);
        self.deps
            .journal
            .shipped(self.trimmable(), self.deps.clock.instant());
        self.ledger.arrived(moves);
        for range in &shipped.lost {
            self.ledger.forget(*range);
        }
        let cause = self.cause_of_repeat();
        for message in &shipped.duplicates {
            tracing::warn!(message_id = %message, cause = cause.text(), "delivered twice: a former holder's outcome came late");
            self.deps.metrics.duplicates.at(cause).inc();
        }
        if shipped.unknown > 0 {
            tracing::info!(
                count = shipped.unknown,
                "facts about messages that the store does not know"
            );
        }
        for batch in &shipped.completed {
            tracing::info!(%batch, "batch completed");
        }
        let windows: Vec<_> = moves
            .windows
            .iter()
            .filter(|(range, _)| !shipped.lost.contains(range))
            .copied()
            .collect();
        if tells_queue && !(windows.is_empty() && shipped.lost.is_empty()) {
            let lost = shipped.lost;
            self.tell(Event::Shipped { windows, lost }).await;
        }
    }

    async fn tell(&self, event: Event) {
        if self.deps.queue.send(event).await.is_err() {
            tracing::debug!("the queue has ended before shipping");
        }
    }

    /// What the journal may forget: not the start of what is in flight.
    fn trimmable(&self) -> Seq {
        let open = self
            .starts
            .oldest()
            .map_or(Seq::MAX, |seq| seq.saturating_sub(1));
        self.shipped.min(open)
    }

    async fn release_due(&mut self) {
        let (due, later): (Vec<_>, Vec<_>) = self
            .releases
            .drain(..)
            .partition(|(after, _)| *after <= self.shipped);
        self.releases = later;
        for some in due.chunks(RELEASES_MAX) {
            let releases: Vec<Release> = some.iter().map(|(_, release)| release.clone()).collect();
            match self
                .deps
                .store
                .release(releases, self.deps.clock.now())
                .await
            {
                Ok(()) => {
                    let ranges: Vec<_> = some.iter().map(|(_, release)| release.range).collect();
                    ranges.iter().for_each(|range| self.ledger.forget(*range));
                    self.tell(Event::HandedBack(ranges)).await;
                }
                Err(error) => {
                    self.releases.extend_from_slice(some);
                    self.store_failed("release", &error).await;
                    return;
                }
            }
        }
    }

    async fn store_failed(&mut self, doing: &'static str, error: &StoreError) {
        if self.store_is_up {
            tracing::error!(%error, doing, "the store does not answer, facts wait in the journal");
        }
        self.store_is_up = false;
        self.deps.metrics.store_up.set(0);
        tokio::time::sleep(self.backoff).await;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
    }
}

/// Tells what a store that has a journal only through `mark` has lost for good.
fn note_lost(journal: &Journal, metrics: &Metrics, mark: Seq) {
    let lost = journal.missing_after(mark);
    if lost > 0 {
        tracing::error!(
            lost,
            mark,
            "THE STORE LACKS FACTS THAT IT HAD ACKNOWLEDGED, and the journal no longer has them: \
             is it an older copy, or has it lost data?"
        );
        metrics.facts_lost.inc_by(lost);
    }
}

/// What the end of the process means here.
trait Closing {
    async fn reached_close(self);
    fn is_closing(&self) -> bool;
}

impl Closing for Shutdown {
    async fn reached_close(self) {
        self.reached(Stage::Close).await;
    }

    fn is_closing(&self) -> bool {
        use futures_util::FutureExt as _;
        self.reached(Stage::Close).now_or_never().is_some()
    }
}
