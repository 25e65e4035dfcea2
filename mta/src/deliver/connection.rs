//! One connection that takes messages: the session's events, the journal's order, the deadlines.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::{Blame, Class, Seq, Timestamp};
use service::config::Source;
use service::metrics::{OpenConnection, SmtpStage, ThrottleReason};
use smtp::client::{BeginError, Event as Spoken, Interruption, Outcome};
use smtp::{ClientSession, Envelope, Reply, Stage, TxId};

use tokio::sync::mpsc::error::TryRecvError;

use super::dial::Established;
use super::io::Wire;
use super::{Deliver, Plan};
use crate::classify::{Classification, Peer, Scope};
use crate::compose::Composed;
use crate::queue::control::Permission;
use crate::queue::decide::{Finding, decide};
use crate::queue::job::{Fate, Job, Returned, Trouble};
use crate::queue::{ConnEnd, Event};
use crate::shaping::Pacer;

/// A message that was begun.
struct Begun {
    id: TxId,
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
    host: Box<str>,
    /// `mx1.x.example:25`.
    host_key: Box<str>,
    tls: Option<Box<str>>,
    source: &'a str,
    pacer: Arc<Mutex<Pacer>>,
    /// Composed, not begun.
    next: Option<Composed>,
    begun: Vec<Begun>,
    /// Content that may go once its start record is written.
    due: Option<(TxId, Seq)>,
    messages: u32,
    delivered: bool,
    quitting: bool,
    /// When a permit is free.
    permit_at: Option<Instant>,
    deadline: Deadline,
    _counted: OpenConnection,
}

/// When the present stage has taken too long.
struct Deadline {
    stage: Stage,
    progress: u64,
    at: Instant,
}

/// Carries messages over a session until it ends.
pub(super) async fn serve(
    deliver: &Deliver,
    plan: &mut Plan,
    established: Established,
    source: &Source,
) -> ConnEnd {
    let label = deliver
        .metrics
        .destination(plan.policy.destination.as_str());
    let now = deliver.clock.instant();
    let deadline = Deadline {
        stage: Stage::Idle,
        progress: 0,
        at: now + deliver.timeouts.idle,
    };
    let pacer = deliver.pacer(&plan.policy, plan.source);
    deliver
        .tell(Event::Ready(plan.conn, Arc::new(established.security)))
        .await;
    let connection = Connection {
        deliver,
        plan,
        wire: established.wire,
        session: established.session,
        host: established.host,
        host_key: established.host_key,
        tls: established.tls,
        source: &source.name,
        pacer,
        next: None,
        begun: Vec::with_capacity(2),
        due: None,
        messages: 0,
        delivered: false,
        quitting: false,
        permit_at: None,
        deadline,
        _counted: deliver.metrics.connection(&label),
    };
    connection.run().await
}

impl Connection<'_> {
    async fn run(mut self) -> ConnEnd {
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
            if !self.release_due().await {
                break ConnEnd::Broken;
            }
            self.wait().await;
        };
        // First, or what is given back would be handed to this connection again.
        self.deliver.tell(Event::Closing(self.plan.conn)).await;
        self.give_back().await;
        self.wire.hang_up().await;
        end
    }

    /// Takes the session's events; the end of the connection when it is over.
    async fn hear(&mut self) -> Option<ConnEnd> {
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
                Spoken::Ready | Spoken::HandshakeDue => {}
            }
        }
        None
    }

    // ---- beginning ----------------------------------------------------------------------

    /// Takes the next message once it can begin; until then it waits in the channel, and nobody is
    /// woken for it.
    fn take_composed(&mut self) {
        if self.wants_message() {
            match self.plan.jobs.try_recv() {
                Ok(composed) => self.next = Some(composed),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.quit(),
            }
        }
    }

    fn wants_message(&self) -> bool {
        self.next.is_none() && !self.quitting && self.session.can_begin()
    }

    /// Begins the composed message if the session, the rate and the control feed allow it.
    async fn begin_next(&mut self) {
        self.permit_at = None;
        if self.quitting || self.next.is_none() || !self.session.can_begin() {
            return;
        }
        if let Some(why) = self.stopped() {
            if let Some(composed) = self.next.take() {
                self.report(&composed.job, Fate::Returned(why)).await;
            }
            return;
        }
        let now = self.deliver.clock.instant();
        if let Err(at) = self.permit(now) {
            let label = self
                .deliver
                .metrics
                .destination(self.plan.policy.destination.as_str());
            self.deliver
                .metrics
                .throttled(&label, ThrottleReason::Rate)
                .inc();
            self.permit_at = Some(at);
            return;
        }
        if let Some(composed) = self.next.take() {
            self.begin(composed, now).await;
        }
    }

    /// A permit of the destination, and one of the batch where it asked for a rate; both or none.
    fn permit(&self, now: Instant) -> Result<(), Instant> {
        let pace = self.next.as_ref().and_then(|next| next.job.pace.as_ref());
        let mut pace = pace.map(|pace| pace.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(pace) = &pace {
            let at = pace.free_at(now);
            if at > now {
                return Err(at);
            }
        }
        let mut pacer = self.pacer.lock().unwrap_or_else(PoisonError::into_inner);
        pacer.take(now)?;
        if let Some(pace) = &mut pace {
            pace.reserve(now);
        }
        Ok(())
    }

    /// Why the composed message must not begin, if so.
    fn stopped(&self) -> Option<Returned> {
        let Composed { job, .. } = self.next.as_ref()?;
        if !job.lease.allows_start(self.deliver.clock.instant())
            || self.deliver.view.permission(&job.item, job.leased_at) != Permission::Go
        {
            return Some(Returned::Stopped);
        }
        // Said here, the peer hears nothing of it; at the start record the session would be lost.
        (!self.deliver.recorder.has_room()).then_some(Returned::JournalFull)
    }

    async fn begin(&mut self, composed: Composed, now: Instant) {
        let Composed {
            job,
            reverse_path,
            body,
            smtp_utf8,
        } = composed;
        let recipient = job.item.row.email.as_str();
        let envelope = Envelope {
            reverse_path: &reverse_path,
            recipients: &[recipient],
            smtp_utf8,
        };
        let id = TxId(job.id.0);
        match self.session.begin(id, &envelope, body) {
            Ok(()) => {
                self.messages += 1;
                self.begun.push(Begun {
                    id,
                    job,
                    began: now,
                    started: false,
                    dot_at: None,
                });
                if self.messages >= self.plan.policy.limits.messages_per_connection {
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
                self.abandon().await;
            }
        }
    }

    /// Lets content go whose start record is written, and with it the outcome before. False: the
    /// journal cannot be written, so nothing may leave.
    async fn release_due(&mut self) -> bool {
        let Some((id, seq)) = self.due.take() else {
            return true;
        };
        if let Err(error) = self.deliver.recorder.written(seq).await {
            tracing::warn!(%error, "the journal cannot be written, nothing is sent");
            self.abandon().await;
            return false;
        }
        if self.session.release(id)
            && let Some(begun) = self.begun.iter_mut().find(|begun| begun.id == id)
        {
            begun.dot_at = Some(self.deliver.clock.now());
        }
        true
    }

    /// Gives up the connection before anything of the messages in it is out.
    async fn abandon(&mut self) {
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
                self.report(&begun.job, Fate::Returned(Returned::JournalFull))
                    .await;
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
                if begun.job.item.ambiguous_before {
                    self.deliver.recorder.maybe_duplicate();
                }
                Finding::Delivered(reply)
            }
            Outcome::Refused { reply, .. } => {
                let reading = self.deliver.rules.load().classify(&reply, self.peer());
                self.heed(&reading, &reply).await;
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
    async fn heed(&mut self, reading: &Classification, reply: &Reply) {
        if let Some(notice) = reading.notice(reply) {
            let noticed = Event::Noticed(self.plan.conn, Box::new(notice));
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
        self.deliver
            .recorder
            .outcome(attempt, job.item.batch.release_at);
        self.report(job, Fate::Recorded { delivered }).await;
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
        tokio::select! {
            biased;
            turn = self.wire.turn(&mut self.session) => match turn {
                Ok(true) => {}
                Ok(false) => self.session.interrupted(Interruption::Disconnected),
                Err(error) => self.session.interrupted(Interruption::Io(error.kind())),
            },
            composed = self.plan.jobs.recv(), if takes_job => match composed {
                Some(composed) => self.next = Some(composed),
                None => self.quit(),
            },
            () = self.plan.quit.cancelled(), if !self.quitting => self.quit(),
            () = tokio::time::sleep_until(wake.into()) => {
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
            let at = self.deliver.clock.instant() + self.deliver.deadline(stage);
            self.deadline = Deadline {
                stage,
                progress,
                at,
            };
        }
        self.deadline.at
    }

    fn late(&mut self) {
        match self.session.waiting_for() {
            // A message waits for its permit: the connection has a reason to be.
            Stage::Idle if self.next.is_some() => {
                self.deadline.at =
                    self.deliver.clock.instant() + self.deliver.deadline(Stage::Idle);
            }
            Stage::Idle => self.quit(),
            Stage::Greeting
            | Stage::Ehlo
            | Stage::StartTls
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

    /// Hands back what was not begun.
    async fn give_back(&mut self) {
        self.plan.jobs.close();
        let mut left: Vec<_> = self.next.take().into_iter().collect();
        while let Ok(composed) = self.plan.jobs.try_recv() {
            left.push(composed);
        }
        for composed in left {
            self.report(&composed.job, Fate::Returned(Returned::Closed))
                .await;
        }
    }

    fn since(&self, began: Instant) -> Duration {
        self.deliver
            .clock
            .instant()
            .saturating_duration_since(began)
    }
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
