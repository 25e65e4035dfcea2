//! One connection that takes messages: the session's events, the journal's order, the deadlines.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use model::{Blame, Class, Priority, Seq, Timestamp};
use service::config::Source;
use service::metrics::{OpenConnection, SmtpStage, ThrottleReason};
use service::tasks::blocking;
use smtp::client::{BeginError, Event as Spoken, Interruption, Outcome};
use smtp::{ClientSession, Reply, Stage, TxId};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::time::Sleep;

use super::dial::Established;
use super::io::Wire;
use super::network::Pulse;
use super::permit::{Held, Usual};
use super::{Deliver, Plan};
use crate::classify::{Action, Classification, Peer, Scope};
use crate::compose::{Bits, Composed};
use crate::queue::control::Permission;
use crate::queue::decide::{Finding, decide};
use crate::queue::job::{Fate, Job, Returned, Trouble};
use crate::queue::{ConnEnd, Event};
use crate::shaping::{Heard, Pacer, SharedPacer, Sign};
use crate::tlspolicy::Security;

/// How long a connection may be idle before it is looked at, not believed to be there.
const STALE: Duration = Duration::from_millis(50);
/// How long bytes that nobody asked for are waited for before that is left to the session.
const UNREAD: Duration = Duration::from_millis(100);

/// How serving a session ended.
pub(super) enum Served {
    /// The connection is over.
    Ended(ConnEnd),
    /// This host cannot take that message, and another one of the route may. Everything else is
    /// done or handed back.
    Unfit(Box<Unfit>),
}

/// A message for another host.
pub(super) struct Unfit {
    pub(super) composed: Composed,
    /// Why not this one.
    pub(super) why: Trouble,
    pub(super) host: Arc<str>,
    pub(super) security: Arc<Security>,
}

/// A message that was begun.
struct Begun {
    id: TxId,
    /// Until the reply to its MAIL.
    permit: Option<Held>,
    /// Its MAIL has been answered.
    answered: bool,
    /// Its MAIL travels behind content whose reply is awaited.
    is_behind: bool,
    job: Job,
    began: Instant,
    /// A start record is in the journal.
    started: bool,
    dot_at: Option<Timestamp>,
}

struct Connection<'a> {
    deliver: &'a Deliver,
    plan: &'a mut Plan,
    wire: Wire,
    session: ClientSession,
    name: Arc<str>,
    host: Box<str>,
    /// `mx1.x.example:25`.
    host_key: Box<str>,
    tls: Option<Box<str>>,
    source: &'a str,
    security: Arc<Security>,
    pacer: SharedPacer,
    usual: Usual,
    /// Composed, not begun.
    next: Option<Composed>,
    /// Behind it; bounded by the channel that they came by.
    ahead: VecDeque<Composed>,
    /// Keeps others from the next permit, while what is transactional waits for it.
    claim: Option<Claim>,
    begun: Vec<Begun>,
    /// Content that may go once its start record is written.
    due: Option<(TxId, Seq)>,
    /// A message for another host of the route.
    unfit: Option<(Composed, Trouble)>,
    messages: u32,
    /// No message after the next.
    is_last: bool,
    delivered: bool,
    quitting: bool,
    /// When a permit is free.
    permit_at: Option<Instant>,
    deadline: Deadline,
    /// Rings at the next moment to be looked at, or before: a timer is set a few times in a
    /// connection's life, not for each reply.
    alarm: Pin<Box<Sleep>>,
    _counted: OpenConnection,
}

/// When the present stage has taken too long.
struct Deadline {
    stage: Stage,
    progress: u64,
    since: Instant,
    at: Instant,
}

/// Carries messages over a session until it ends.
pub(super) async fn serve(
    deliver: &Deliver,
    plan: &mut Plan,
    established: Established,
    source: &Source,
) -> Served {
    let connection = connection(deliver, plan, established, source);
    let ready = Event::Ready(connection.plan.conn, Arc::clone(&connection.security));
    deliver.tell(ready).await;
    connection.run().await
}

/// Carries one message over a session that the queue does not know of.
pub(super) async fn carry_one(
    deliver: &Deliver,
    plan: &mut Plan,
    established: Established,
    source: &Source,
    composed: Composed,
) -> Served {
    let mut connection = connection(deliver, plan, established, source);
    connection.next = Some(composed);
    connection.is_last = true;
    connection.run().await
}

fn connection<'a>(
    deliver: &'a Deliver,
    plan: &'a mut Plan,
    established: Established,
    source: &'a Source,
) -> Connection<'a> {
    let label = deliver
        .metrics
        .destination(plan.policy.destination.as_str());
    let now = deliver.clock.instant();
    let deadline = Deadline {
        stage: Stage::Idle,
        progress: 0,
        since: now,
        at: now + deliver.deadline_at(Stage::Idle, &plan.policy),
    };
    let pacer = Arc::clone(&plan.permits);
    Connection {
        deliver,
        plan,
        wire: established.wire,
        session: established.session,
        name: established.name,
        host: established.host,
        host_key: established.host_key,
        tls: established.tls,
        source: &source.name,
        security: Arc::new(established.security),
        pacer,
        usual: Usual::new(established.connect, now),
        next: None,
        ahead: VecDeque::new(),
        claim: None,
        begun: Vec::with_capacity(2),
        due: None,
        unfit: None,
        messages: 0,
        is_last: false,
        delivered: false,
        quitting: false,
        permit_at: None,
        alarm: Box::pin(tokio::time::sleep_until(deadline.at.into())),
        deadline,
        _counted: deliver.metrics.connection(&label),
    }
}

impl Connection<'_> {
    async fn run(mut self) -> Served {
        let end = loop {
            if let Some(end) = self.hear().await {
                break end;
            }
            self.take_composed();
            self.begin_next().await;
            // With CHUNKING the content is due with the envelope, so that all is one flight.
            if let Some(end) = self.hear().await {
                break end;
            }
            if let Some(end) = self.release_due().await {
                break end;
            }
            // At once: what was just allowed is not allowed for ever.
            match self.wire.push(&mut self.session).await {
                Ok(false) => {}
                moved => {
                    self.moved(moved);
                    continue;
                }
            }
            // One that was turned away has left its place to the next; nobody else would wake us.
            if !self.ahead.is_empty() && self.next.is_none() && self.wants_message() {
                continue;
            }
            self.wait().await;
        };
        // First, or what is given back would be handed to this connection again.
        self.deliver.tell(Event::Closing(self.plan.conn)).await;
        self.claim = None;
        for composed in self.next.take().into_iter().chain(self.ahead.drain(..)) {
            let fate = Fate::Returned(Returned::Closed);
            let told = Event::Report(composed.job.id, fate);
            self.deliver.tell(told).await;
        }
        give_back(self.deliver, self.plan).await;
        self.wire.hang_up().await;
        match self.unfit {
            Some((composed, why)) => Served::Unfit(Box::new(Unfit {
                composed,
                why,
                host: self.name,
                security: self.security,
            })),
            None => Served::Ended(end),
        }
    }

    /// Takes the session's events; the end of the connection when it is over.
    async fn hear(&mut self) -> Option<ConnEnd> {
        self.note_answers();
        while let Some(spoken) = self.session.poll_event() {
            match spoken {
                Spoken::BodyDue(id) => self.body_due(id).await,
                Spoken::TransactionDone { id, outcome, .. } => {
                    self.transaction_done(id, outcome).await
                }
                Spoken::Closed(None) => return Some(ConnEnd::Planned),
                Spoken::Closed(Some(error)) => {
                    tracing::debug!(host = %self.host, %error, "session ended");
                    self.deliver
                        .notice(self.plan.conn, &error, self.peer())
                        .await;
                    // A peer may close when it likes; what matters is whether it takes anything.
                    return Some(if self.delivered {
                        ConnEnd::Planned
                    } else {
                        ConnEnd::Broken
                    });
                }
                // Once, before this loop.
                Spoken::Ready | Spoken::HandshakeDue | Spoken::ChallengeDue => {}
            }
        }
        None
    }

    /// Tells the pacer of each MAIL that has been answered when it was read.
    fn note_answers(&mut self) {
        if self.begun.iter().all(|begun| begun.answered) {
            return;
        }
        let now = self.deliver.clock.instant();
        for begun in self.begun.iter_mut().filter(|begun| !begun.answered) {
            if !self.session.is_mail_answered(begun.id) {
                continue;
            }
            begun.answered = true;
            // Behind content, it was read some time between.
            let took = if begun.is_behind {
                Duration::ZERO
            } else {
                let took = now.saturating_duration_since(begun.began);
                self.usual.note(took, now);
                self.usual.shortest()
            };
            if let Some(permit) = begun.permit.take() {
                permit.answered(now, took);
            }
        }
    }

    // ---- beginning ----------------------------------------------------------------------

    /// Takes messages once one can begin; until then they wait in the channel, and nobody is woken
    /// for them. What is transactional goes before the others, also before one that waits for its
    /// permit.
    fn take_composed(&mut self) {
        if self.quitting || self.is_last || !self.session.can_begin() {
            return;
        }
        loop {
            match self.plan.jobs.try_recv() {
                Ok(composed) => self.ahead.push_back(composed),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    if self.next.is_none() && self.ahead.is_empty() {
                        self.quit();
                    }
                    break;
                }
            }
        }
        let urgent = self.ahead.iter().position(is_urgent);
        if let Some(at) = urgent.filter(|_| !self.next.as_ref().is_some_and(is_urgent)) {
            let overtaken = self.next.take();
            self.next = self.ahead.remove(at);
            if let Some(overtaken) = overtaken {
                self.ahead.push_front(overtaken);
            }
        }
        if self.next.is_none() {
            self.next = self.ahead.pop_front();
        }
    }

    /// Whether a message that comes could be the next: one that waits for its permit may be
    /// overtaken.
    fn wants_message(&self) -> bool {
        let free = self.next.is_none() || self.permit_at.is_some();
        free && !self.quitting && !self.is_last && self.session.can_begin()
    }

    /// Begins the composed message if the session, the rate and the control feed allow it.
    async fn begin_next(&mut self) {
        self.permit_at = None;
        if self.quitting || self.next.is_none() || !self.session.can_begin() {
            return;
        }
        self.narrow().await;
        if self.next.is_none() {
            return;
        }
        if let Some(why) = self.misfit() {
            return self.turn_away(&why, why.to_string()).await;
        }
        if !self.is_alive().await || !self.session.can_begin() {
            return;
        }
        // Last: what is waited for after it could outlast the lease.
        if let Some(why) = self.stopped() {
            if let Some(composed) = self.next.take() {
                self.report(&composed.job, Fate::Returned(why)).await;
            }
            return;
        }
        let now = self.deliver.clock.instant();
        match self.permit(now) {
            Ok(permit) => {
                if let Some(composed) = self.next.take() {
                    self.begin(composed, permit, now).await;
                }
            }
            Err(at) => {
                let label = self
                    .deliver
                    .metrics
                    .destination(self.plan.policy.destination.as_str());
                self.deliver
                    .metrics
                    .throttled(&label, ThrottleReason::Rate)
                    .inc();
                self.permit_at = at;
            }
        }
    }

    /// A permit of the destination, and one of the batch where it asked for a rate, for MAIL to
    /// leave now; both or none. Else when to ask again, or never mind when: with the next reply.
    fn permit(&mut self, now: Instant) -> Result<Option<Held>, Option<Instant>> {
        let urgent = self.next.as_ref().is_some_and(is_urgent);
        let pace = self.next.as_ref().and_then(|next| next.job.pace.as_ref());
        let mut pace = pace.map(|pace| pace.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(pace) = &pace {
            // Behind content the destination reads it at an unknown time, and a batch's permits are
            // spread over many destinations: such a message waits until nothing is before it.
            if !self.begun.is_empty() {
                return Err(None);
            }
            let at = pace.free_at(now);
            if at > now {
                return Err(Some(at));
            }
        }
        let mut pacer = self.pacer.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = if self.begun.is_empty() {
            let begun = pacer.begin(now, urgent, self.usual.shortest());
            begun.map_err(Some)
        } else {
            pacer.begin_behind(now, urgent).ok_or(None)
        };
        if let (Ok(_), Some(pace)) = (&taken, &mut pace) {
            pace.reserve(now);
        }
        drop(pacer);
        let claims = taken.is_err() && urgent;
        if claims != self.claim.is_some() {
            self.claim = claims.then(|| Claim::on(&self.pacer));
        }
        let clock = &self.deliver.clock;
        taken.map(|permit| Held::new(permit, &self.pacer, clock))
    }

    /// Whether a connection that was idle for a while is still there. Without a look, a whole
    /// message could be sent into one that the peer has closed, and nobody would know what became
    /// of it.
    async fn is_alive(&mut self) -> bool {
        let now = self.deliver.clock.instant();
        let is_stale = self.deadline.stage == Stage::Idle
            && self.session.waiting_for() == Stage::Idle
            && now.saturating_duration_since(self.deadline.since) >= STALE;
        match if is_stale {
            self.wire.pulse()
        } else {
            Pulse::Quiet
        } {
            Pulse::Quiet => true,
            Pulse::Unread => {
                let turn = self.wire.turn(&mut self.session);
                // Else it was of TLS itself, and nothing for the session.
                if let Ok(moved) = tokio::time::timeout(UNREAD, turn).await {
                    self.moved(moved);
                }
                !self.session.is_closed()
            }
            Pulse::Gone => {
                self.session.interrupted(Interruption::Disconnected);
                false
            }
        }
    }

    fn moved(&mut self, moved: std::io::Result<bool>) {
        match moved {
            Ok(true) => {}
            Ok(false) => self.session.interrupted(Interruption::Disconnected),
            Err(error) => self.session.interrupted(Interruption::Io(error.kind())),
        }
    }

    /// Why this server cannot take the composed message, by what it offers.
    fn misfit(&self) -> Option<BeginError> {
        let composed = self.next.as_ref()?;
        let recipient = [composed.job.item.row.email.as_str()];
        let misfit = self
            .session
            .check(&composed.envelope(&recipient), &composed.body);
        misfit.err()
    }

    /// Makes the next message anew where this server takes only seven bits of its eight (RFC 6152
    /// §3), and signs it anew.
    async fn narrow(&mut self) {
        if self.misfit() != Some(BeginError::EightBit) {
            return;
        }
        let Some(mut composed) = self.next.take() else {
            return;
        };
        let Some(prepared) = self.deliver.contents.get(composed.job.item.batch.id) else {
            let gone = Fate::Returned(Returned::ContentGone);
            return self.report(&composed.job, gone).await;
        };
        let (job, metrics) = (composed.job.clone(), Arc::clone(&self.deliver.metrics));
        match blocking(move || prepared.compose(&job, Bits::Seven, &metrics)).await {
            Ok(Ok((_, body, _))) => {
                composed.body = body;
                self.next = Some(composed);
            }
            Ok(Err(why)) => {
                self.next = Some(composed);
                let text = format!("{}, and {why}", BeginError::EightBit);
                self.turn_away(&BeginError::EightBit, text).await;
            }
            Err(error) => {
                let fate = Fate::Unmade(error.to_string());
                self.report(&composed.job, fate).await;
            }
        }
    }

    /// Takes the message to another host of the route if there is one that may do, once this
    /// session's work is done; or tells that it cannot be sent.
    async fn turn_away(&mut self, why: &BeginError, text: String) {
        let Some(composed) = self.next.take() else {
            return;
        };
        let may_do_elsewhere = matches!(
            why,
            BeginError::TooLarge { .. } | BeginError::EightBit | BeginError::SmtpUtf8
        );
        let trouble = Trouble {
            text,
            ..unsendable(why, &self.host)
        };
        if may_do_elsewhere && self.plan.route.hosts().len() > 1 {
            self.unfit = Some((composed, trouble));
            self.quit();
        } else {
            let finding = Finding::Unreachable(trouble);
            self.record(&composed.job, finding, None, Duration::ZERO)
                .await;
        }
    }

    /// Why the composed message must not begin, if so.
    fn stopped(&self) -> Option<Returned> {
        let Composed { job, .. } = self.next.as_ref()?;
        if !job.lease.allows_start(self.deliver.clock.instant())
            || self.deliver.view.permission(&job.item, job.leased_at) != Permission::Go
            || job.item.is_shut(self.deliver.clock.now())
        {
            return Some(Returned::Stopped);
        }
        // Said here, the peer hears nothing of it; at the start record the session would be lost.
        (!self.deliver.recorder.has_room()).then_some(Returned::JournalFull)
    }

    async fn begin(&mut self, mut composed: Composed, permit: Option<Held>, now: Instant) {
        let id = TxId(composed.job.id.0);
        let body = std::mem::take(&mut composed.body);
        let recipient = [composed.job.item.row.email.as_str()];
        let begun = self.session.begin(id, &composed.envelope(&recipient), body);
        let job = composed.job;
        match begun {
            Ok(()) => {
                self.messages += 1;
                self.begun.push(Begun {
                    id,
                    permit,
                    answered: false,
                    is_behind: !self.begun.is_empty(),
                    job,
                    began: now,
                    started: false,
                    dot_at: None,
                });
                // The peer may have said how many it takes (MAILMAX).
                if self.messages >= self.plan.policy.limits.messages_per_connection
                    || self.session.is_exhausted()
                    || self.is_last
                {
                    self.quit();
                }
            }
            Err(BeginError::NotReady | BeginError::Busy) => {
                self.report(&job, Fate::Returned(Returned::Closed)).await
            }
            Err(BeginError::Exhausted) => {
                self.report(&job, Fate::Returned(Returned::Closed)).await;
                self.quit();
            }
            Err(error) => {
                let finding = Finding::Unreachable(unsendable(&error, &self.host));
                self.record(&job, finding, None, Duration::ZERO).await;
            }
        }
    }

    // ---- the content --------------------------------------------------------------------

    async fn body_due(&mut self, id: TxId) {
        let Some(begun) = self.begun.iter_mut().find(|begun| begun.id == id) else {
            return;
        };
        match self.deliver.recorder.start(&begun.job.item) {
            Ok(seq) => {
                begun.started = true;
                self.due = Some((id, seq));
            }
            Err(error) => {
                tracing::warn!(%error, "the journal takes no start, nothing is sent");
                self.abandon(&Returned::JournalFull).await;
            }
        }
    }

    /// Lets content go whose start record is written, and with it the outcome before. The end of
    /// the connection, when nothing may leave it any more: the journal cannot be written, or the
    /// process stood still until a lease was over.
    async fn release_due(&mut self) -> Option<ConnEnd> {
        let (id, seq) = self.due?;
        if let Err(error) = self.deliver.recorder.written(seq).await {
            tracing::warn!(%error, "the journal cannot be written, nothing is sent");
            self.abandon(&Returned::JournalFull).await;
            return Some(ConnEnd::Broken);
        }
        if !self.is_leased(id) {
            // Those whose dot is out have their replies first.
            if self.begun.iter().any(|begun| begun.dot_at.is_some()) {
                return None;
            }
            tracing::debug!(host = %self.host, "a lease ended before the content was sent");
            self.abandon(&Returned::Stopped).await;
            return Some(ConnEnd::Planned);
        }
        self.due = None;
        if self.session.release(id)
            && let Some(begun) = self.begun.iter_mut().find(|begun| begun.id == id)
        {
            begun.dot_at = Some(self.deliver.clock.now());
        }
        None
    }

    /// Whether a transaction's message is still this node's. Another may have it otherwise, and
    /// content that leaves now would be a second copy.
    fn is_leased(&self, id: TxId) -> bool {
        let begun = self.begun.iter().find(|begun| begun.id == id);
        begun.is_none_or(|begun| begun.job.lease.is_held(self.deliver.clock.instant()))
    }

    /// Gives up the connection before anything of the messages in it is out.
    async fn abandon(&mut self, why: &Returned) {
        self.due = None;
        for begun in std::mem::take(&mut self.begun) {
            // Without a dot on the wire it is as if it had not begun; with one it is in doubt.
            if begun.dot_at.is_some() {
                let finding = Finding::Ambiguous(
                    "the connection was given up after the final dot".to_owned(),
                );
                self.record(&begun.job, finding, begun.dot_at, self.since(begun.began))
                    .await;
            } else {
                if begun.started {
                    self.deliver.recorder.void(&begun.job.item);
                }
                self.report(&begun.job, Fate::Returned(why.clone())).await;
            }
        }
        self.session.interrupted(Interruption::Disconnected);
    }

    // ---- outcomes -----------------------------------------------------------------------

    async fn transaction_done(&mut self, id: TxId, outcome: Outcome) {
        if self.due.is_some_and(|(due, _)| due == id) {
            self.due = None;
        }
        let Some(at) = self.begun.iter().position(|begun| begun.id == id) else {
            return;
        };
        let begun = self.begun.swap_remove(at);
        let took = self.since(begun.began);
        let finding = match outcome {
            Outcome::Delivered(reply) => {
                self.delivered = true;
                Finding::Delivered(reply)
            }
            Outcome::Refused { reply, .. } => {
                let reading = self.deliver.rules.load().classify(&reply, self.peer());
                self.heed(&reading, &reply, begun.began).await;
                Finding::Refused(reply, reading)
            }
            Outcome::Ambiguous(error) => {
                Finding::Ambiguous(format!("no reply after the final dot: {error}"))
            }
            Outcome::NotStarted(error) => {
                if begun.started {
                    self.deliver.recorder.void(&begun.job.item);
                }
                let text = format!("{}: {error}", self.host);
                return self
                    .report(&begun.job, Fate::Returned(Returned::Broken(text)))
                    .await;
            }
        };
        self.deliver
            .metrics
            .smtp_stage_seconds
            .at(SmtpStage::Transaction)
            .observe(took.as_secs_f64());
        self.record(&begun.job, finding, begun.dot_at, took).await;
    }

    /// Acts on what a refusal says beyond its message: whoever adapts limits learns of it, and a
    /// connection that would only collect more of the same is given up.
    async fn heed(&mut self, reading: &Classification, reply: &Reply, began: Instant) {
        if let Some(notice) = reading.notice(reply) {
            let noticed = Event::Noticed(self.plan.conn, Box::new(notice), Some(began));
            self.deliver.tell(noticed).await;
        }
        if reading.scope == Scope::Host {
            self.deliver
                .hosts
                .went_down(&self.host_key, self.deliver.clock.instant());
        }
        if reading.ends_connection() {
            self.quit();
        }
    }

    /// Who speaks, as rules for replies know it.
    fn peer(&self) -> Peer<'_> {
        Peer {
            host: self.host_key.rsplit_once(':').map_or("", |(name, _)| name),
            destination: self.plan.policy.destination.as_str(),
        }
    }

    async fn record(&self, job: &Job, finding: Finding, dot_at: Option<Timestamp>, took: Duration) {
        let delivered = matches!(finding, Finding::Delivered(_));
        let may_have_come = delivered || matches!(finding, Finding::Ambiguous(_));
        if may_have_come && job.item.ambiguous_before {
            self.deliver.recorder.maybe_duplicate(job.item.message());
        }
        let heard = heard(&finding, self.deliver.clock.instant(), took);
        let mut attempt = decide(
            finding,
            &job.item,
            &job.policy,
            self.deliver.clock.now(),
            fastrand::f64(),
        );
        attempt.dot_at = dot_at;
        attempt.detail.host = self.host.clone();
        attempt.detail.tls = self.tls.clone();
        attempt.detail.source = self.source.into();
        attempt.detail.transaction_ms = u32::try_from(took.as_millis()).unwrap_or(u32::MAX);
        if !delivered {
            self.deliver
                .troubles
                .refused(&job.policy.destination, &attempt);
        }
        self.deliver
            .recorder
            .outcome(attempt, job.item.release_at());
        self.report(job, Fate::Recorded { delivered, heard }).await;
    }

    async fn report(&self, job: &Job, fate: Fate) {
        self.deliver.tell(Event::Report(job.id, fate)).await;
    }

    // ---- waiting and ending -------------------------------------------------------------

    /// Waits for bytes, a message, a permit, a deadline or the end, whichever is first.
    async fn wait(&mut self) {
        let deadline = self.deadline();
        let wake = self.permit_at.map_or(deadline, |at| at.min(deadline));
        let takes_job = self.wants_message();
        if self.alarm.is_elapsed() || self.alarm.deadline() > wake.into() {
            self.alarm.as_mut().reset(wake.into());
        }
        tokio::select! {
            biased;
            turn = self.wire.turn(&mut self.session) => self.moved(turn),
            composed = self.plan.jobs.recv(), if takes_job => match composed {
                Some(composed) => self.ahead.push_back(composed),
                None => self.quit(),
            },
            () = self.plan.quit.cancelled(), if !self.quitting => self.quit(),
            () = self.alarm.as_mut() => {
                if self.deliver.clock.instant() >= deadline {
                    self.late();
                }
            }
        }
    }

    /// The end of the present stage; starts anew with each sign of life.
    fn deadline(&mut self) -> Instant {
        let (stage, progress) = (self.session.waiting_for(), self.session.progress());
        if (stage, progress) != (self.deadline.stage, self.deadline.progress) {
            let now = self.deliver.clock.instant();
            self.deadline = Deadline {
                stage,
                progress,
                since: now,
                at: now + self.deliver.deadline_at(stage, &self.plan.policy),
            };
        }
        self.deadline.at
    }

    fn late(&mut self) {
        match self.session.waiting_for() {
            // A message waits for its permit: the connection has a reason to be.
            Stage::Idle if self.next.is_some() => {
                self.deadline.at = self.deliver.clock.instant()
                    + self.deliver.deadline_at(Stage::Idle, &self.plan.policy);
            }
            Stage::Idle => self.quit(),
            Stage::Connect
            | Stage::Greeting
            | Stage::Ehlo
            | Stage::StartTls
            | Stage::Auth
            | Stage::Mail
            | Stage::Rcpt
            | Stage::Data
            | Stage::DataBlock
            | Stage::FinalDot
            | Stage::Quit => self.session.interrupted(Interruption::TimedOut),
        }
    }

    /// No more messages; those begun are finished.
    fn quit(&mut self) {
        self.quitting = true;
        self.session.quit();
    }

    fn since(&self, began: Instant) -> Duration {
        self.deliver
            .clock
            .instant()
            .saturating_duration_since(began)
    }
}

/// Hands back what is in the channel of a connection that ends.
pub(super) async fn give_back(deliver: &Deliver, plan: &mut Plan) {
    plan.jobs.close();
    while let Ok(composed) = plan.jobs.try_recv() {
        let fate = Fate::Returned(Returned::Closed);
        deliver.tell(Event::Report(composed.job.id, fate)).await;
    }
}

/// What the answer to a message that took so long says about limits. What asks for less has been
/// told already, in its own words.
fn heard(finding: &Finding, now: Instant, took: Duration) -> Option<Heard> {
    let (sign, rule) = match finding {
        Finding::Delivered(_) => (Sign::Peace, None),
        Finding::Refused(_, reading) if reading.signal.is_some() => return None,
        Finding::Refused(_, reading) => (sign_of(reading), reading.rule.clone()),
        Finding::Ambiguous(_)
        | Finding::InFlight
        | Finding::Unreachable(_)
        | Finding::Unmade(_)
        | Finding::TooLate(_)
        | Finding::Suppressed(_)
        | Finding::Cancelled => return None,
    };
    Some(Heard {
        began: now.checked_sub(took).unwrap_or(now),
        sign,
        rule,
    })
}

/// Greylisting and what is wrong with a recipient say nothing about our pace.
fn sign_of(reading: &Classification) -> Sign {
    let is_put_off = reading.action == Action::Retry
        && reading.class != Class::Greylisted
        && reading.blame != Blame::Recipient;
    if is_put_off {
        Sign::Deferred
    } else {
        Sign::Peace
    }
}

/// The next permit is kept for what is transactional, until this is dropped.
struct Claim(SharedPacer);

impl Claim {
    fn on(pacer: &SharedPacer) -> Self {
        let claimed = Self(Arc::clone(pacer));
        claimed.change(Pacer::claim);
        claimed
    }

    fn change(&self, change: impl FnOnce(&mut Pacer)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.change(Pacer::unclaim);
    }
}

fn is_urgent(composed: &Composed) -> bool {
    composed.job.item.batch.priority == Priority::Transactional
}

/// A message that this server can never take, by what it offers.
fn unsendable(error: &BeginError, host: &str) -> Trouble {
    let (class, blame) = match error {
        BeginError::TooLarge { .. } => (Class::TooLarge, Blame::Content),
        BeginError::EightBit | BeginError::SmtpUtf8 => (Class::Protocol, Blame::Destination),
        BeginError::Envelope(_) | BeginError::TooManyRecipients { .. } => {
            (Class::Protocol, Blame::Us)
        }
        BeginError::NotReady | BeginError::Busy | BeginError::Exhausted => {
            (Class::Other, Blame::Us)
        }
    };
    Trouble {
        class,
        blame,
        text: error.to_string(),
        reply: None,
        host: host.into(),
        is_final: true,
    }
}
