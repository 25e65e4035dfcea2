//! One batch from its body to its commit.
//!
//! Owns the order of things: judge the head, sort the recipients, stage lots, commit last, and give
//! back everything on any error. From the moment the body is complete the work belongs to a task of
//! its own, so that a caller who goes away cannot leave a batch half staged.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::rand;
use axum::body::Body;
use content::{Content, LinkReport, RenderContext, Tracker};
use links::KeyRing;
use model::{BatchId, BatchState, Domain, Row, Timestamp};
use serde::Serialize;
use service::clock::SharedClock;
use service::config::{Account, Pool};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Stage, Tasks};
use store::{CallKey, EndedCall, NewBatch, NewLot, Store, StoreError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::parts::Filling;
use super::prepare::{Against, Prepared, prepare};
use super::quota;
use super::receive::{Form, Limits, Media, Received, Receiver, Sizes};
use super::recipients::{Judge, Sorted};
use super::row::Rejection;
use super::single::{self, Taken};
use super::variants::Promise;
use crate::abtest;
use crate::admin::problem::{Answer, Code, Refusal};
use crate::tenants::Tenants;

/// What intake needs of the process.
pub(crate) struct Intake {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) tasks: Tasks,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tenants: Arc<Tenants>,
    pub(crate) pools: Vec<Pool>,
    pub(crate) dkim_dir: PathBuf,
    /// `smtp.bounce_domain`
    pub(crate) bounce_domain: Option<Domain>,
    pub(crate) tracking: Arc<ArcSwap<KeyRing>>,
    /// Where spools lie while a body arrives.
    pub(crate) data_dir: PathBuf,
    pub(crate) sizes: Sizes,
    pub(crate) limits: Limits,
    /// Open batches that are being filled.
    pub(crate) filling: Filling,
}

/// Who submits.
#[derive(Debug, Clone)]
pub(crate) struct Submitter {
    pub(crate) account: String,
    pub(crate) any_account: bool,
    /// Sent `Expect: 100-continue`.
    pub(crate) waits: bool,
    pub(crate) form: Form,
    /// `Idempotency-Key`: the call takes effect once, however often it is made.
    pub(crate) key: Option<String>,
}

impl Submitter {
    /// The call's name and what it asks for, when it must take effect once.
    pub(crate) fn call(&self, fingerprint: Option<[u8; 32]>) -> Option<(CallKey, [u8; 32])> {
        let key = CallKey {
            account: self.account.clone(),
            key: self.key.clone()?,
        };
        Some((key, fingerprint?))
    }
}

/// What a submission comes to.
#[derive(Debug)]
pub(crate) struct Submitted {
    /// An [`Accepted`] as JSON.
    pub(crate) answer: Arc<[u8]>,
    /// It took effect before, and this is what was answered then.
    pub(crate) is_replayed: bool,
}

/// The answer to a submission (contract, section 3).
#[derive(Debug, Serialize)]
pub(crate) struct Accepted {
    pub(crate) id: BatchId,
    pub(crate) state: BatchState,
    pub(crate) accepted: u64,
    pub(crate) rejected: Vec<Rejection>,
    pub(crate) rejected_count: u64,
    pub(crate) links: LinkReport,
    pub(crate) warnings: Vec<String>,
    /// What its test can show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ab_test: Option<Promise>,
}

/// The answer to a dry run.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    accepted: u64,
    rejected: Vec<Rejection>,
    rejected_count: u64,
    links: LinkReport,
    warnings: Vec<String>,
    /// Of the first good recipient; of a batch with variants the first of them.
    rendered: Option<Rendered>,
    /// The same recipient's message in each variant.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    variants: Vec<Rendered>,
    /// What its test can show.
    #[serde(skip_serializing_if = "Option::is_none")]
    ab_test: Option<Promise>,
    /// What receivers will find of DMARC (RFC 7489 §3.1).
    alignment: Alignment,
}

/// Which domains a message speaks for, and whether they are that of its From.
#[derive(Debug, Serialize)]
pub(crate) struct Alignment {
    from: String,
    dkim: Aligned,
    reverse_path: Aligned,
    /// One of them is enough.
    aligned: bool,
}

#[derive(Debug, Serialize)]
struct Aligned {
    /// None: the mail is not signed.
    domain: Option<String>,
    aligned: bool,
}

impl Alignment {
    fn of(prepared: &Prepared, bounce_domain: Option<&Domain>) -> Self {
        let from = prepared.released.spec.from.email.domain().to_owned();
        let signed = !prepared.released.dkim_selectors.is_empty();
        let bounces = bounce_domain
            .map_or(from.as_str(), Domain::as_str)
            .to_owned();
        // Relaxed, as far as that is known without the list of public suffixes.
        let below = |a: &str, b: &str| a.strip_suffix(b).is_some_and(|rest| rest.ends_with('.'));
        let spf = bounces == from || below(&bounces, &from) || below(&from, &bounces);
        Self {
            dkim: Aligned {
                domain: signed.then(|| from.clone()),
                aligned: signed,
            },
            reverse_path: Aligned {
                domain: Some(bounces),
                aligned: spf,
            },
            aligned: signed || spf,
            from,
        }
    }
}

/// A message as it would leave, unsigned, with links that lead nowhere.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rendered {
    #[serde(skip_serializing_if = "Option::is_none")]
    variant: Option<String>,
    email: String,
    message: String,
    /// Bytes on the wire, without the signatures.
    size: usize,
}

/// Renders with a tracking key that nobody has: a dry run must not make links that work.
fn render(
    prepared: &Prepared,
    (place, content): (usize, &Content),
    row: &Row,
    account: &Account,
) -> Answer<Rendered> {
    let failed = |error: &dyn std::fmt::Display| Refusal::internal("dry run", error);
    let mut secret = [0_u8; 32];
    rand::fill(&mut secret).map_err(|error| failed(&error))?;
    let ring = KeyRing::parse(&KeyRing::file_text(&secret)).map_err(|error| failed(&error))?;
    let base_url = account.tracking.base_url.as_str();
    let signer = ring
        .signer(Tracker::host(base_url), None)
        .ok_or_else(|| failed(&"no signer"))?;
    let context = RenderContext {
        batch: prepared.head.id,
        released_at: prepared.head.release_at,
        tracker: Arc::new(Tracker::new(base_url, signer).map_err(|error| failed(&error))?),
        mode: prepared.head.tracking,
        proof: false,
    };
    let message = content
        .render(row, &context)
        .map_err(|error| failed(&error))?;
    let variant = prepared.released.variants.get(place);
    Ok(Rendered {
        variant: variant.map(|of| of.name.clone()),
        email: row.email.to_string(),
        size: message.size(),
        message: String::from_utf8_lossy(&message.into_bytes()).into_owned(),
    })
}

impl Intake {
    /// Judges a batch, accepts nothing, and renders the message of its first good recipient.
    ///
    /// # Errors
    /// The refusal that a submission would get.
    pub(crate) async fn dry_run(self: &Arc<Self>, body: Body, by: Submitter) -> Answer<Checked> {
        self.must_be_open()?;
        let received = self.receive(body, &by).await?;
        let received = self.followed(received, &by).await?;
        let (id, now) = (self.new_id()?, self.clock.now());
        let (intake, count) = (Arc::clone(self), received.spool.rows());
        blocking(move || {
            let accounts = intake.tenants.accounts();
            let against = intake.against(&by, &accounts);
            let prepared = prepare(&received.head, count, id, now, &against)?;
            let judge = intake.judge(&prepared);
            let spool = received.spool.read();
            let mut spool = spool.map_err(|error| Refusal::disk(&error))?;
            let sorted = judge.sort(&mut spool, None)?;
            let account = intake.account(&prepared.head.account);
            let mut all = Vec::new();
            if let Some((row, account)) = sorted.first.as_ref().zip(account) {
                for of in prepared.contents.iter().enumerate() {
                    all.push(render(&prepared, of, row, &account)?);
                }
            }
            let is_one = prepared.released.variants.is_empty();
            let promise = prepared.promise(sorted.accepted);
            Ok(Checked {
                rendered: all.first().cloned(),
                variants: if is_one { Vec::new() } else { all },
                accepted: sorted.accepted,
                rejected: sorted.rejected,
                rejected_count: sorted.rejected_count,
                links: prepared.links(),
                alignment: Alignment::of(&prepared, intake.bounce_domain.as_ref()),
                warnings: prepared.warnings(sorted.advice.warnings(), promise.as_ref()),
                ab_test: promise,
            })
        })
        .await
    }

    /// Takes in one batch: when this returns `Ok`, it is durable. Dropping the future before that
    /// leaves nothing, unless the commit was already under way.
    ///
    /// # Errors
    /// The refusal; then nothing of the batch is there.
    pub(crate) async fn submit(self: &Arc<Self>, body: Body, by: Submitter) -> Answer<Submitted> {
        self.must_be_open()?;
        let mut received = self.receive(body, &by).await?;
        let media = by.form.media;
        if media == Media::Message {
            received = single::taken_apart(received)?;
        }
        let received = self.followed(received, &by).await?;
        let gone = CancellationToken::new();
        let _gone_on_drop = gone.clone().drop_guard();
        let (intake, hold) = (Arc::clone(self), self.shutdown.hold(Stage::Intake));
        let task = self.tasks.spawn("intake", async move {
            let submitted = intake.accept_once(received, by, &gone).await;
            drop(hold);
            submitted
        });
        let submitted = task
            .join()
            .await
            .unwrap_or_else(|error| Err(Refusal::internal("intake", &error)));
        match media {
            Media::Message => submitted.map_err(single::as_written),
            _ => submitted,
        }
    }

    /// A store that has not come yet says nothing about its partitions, by which lots are made.
    fn must_be_open(&self) -> Answer<()> {
        match self.store.is_open() {
            true => Ok(()),
            false => Err(StoreError::Unavailable("it has not come yet".to_owned()).into()),
        }
    }

    pub(crate) async fn receive(&self, body: Body, by: &Submitter) -> Answer<Received> {
        let receiver = Receiver {
            limits: &self.limits,
            clock: &self.clock,
            dir: &self.data_dir,
            sizes: self.sizes,
            form: by.form,
            is_fingerprinted: by.key.is_some(),
            waits: by.waits,
        };
        receiver.receive(body).await
    }

    fn against<'a>(&'a self, by: &'a Submitter, accounts: &'a [Account]) -> Against<'a> {
        Against {
            account: &by.account,
            any_account: by.any_account,
            accounts,
            pools: &self.pools,
            dkim_dir: &self.dkim_dir,
            // A ring has at least one key.
            tracking_key: self.tracking.load().ids().next().unwrap_or_default(),
        }
    }

    pub(super) fn account(&self, id: &str) -> Option<Account> {
        let all = self.tenants.accounts();
        all.iter().find(|account| account.id == id).cloned()
    }

    /// How the quota of an account stands, when it has one and the store answers.
    pub(crate) async fn quota_of(&self, account: &str) -> Option<quota::Standing> {
        let account = self.account(account)?;
        let standing = quota::standing(&*self.store, &account, self.clock.now()).await;
        standing.ok().flatten()
    }

    fn judge<'p>(&self, prepared: &'p Prepared) -> Judge<'p> {
        let (account, partitions) = (prepared.head.account.as_str(), self.store.partitions());
        Judge::new(
            &prepared.contents,
            account,
            partitions,
            prepared.allow_duplicates,
        )
        .of(&prepared.head)
        .dealing(prepared.dealing.clone())
    }

    /// Accepts a batch, unless the call took effect before.
    async fn accept_once(
        self: Arc<Self>,
        received: Received,
        by: Submitter,
        gone: &CancellationToken,
    ) -> Answer<Submitted> {
        let id = self.new_id()?;
        let call = by.call(received.fingerprint);
        let accept = |key| Arc::clone(&self).accept(id, received, by, key, gone);
        self.once(id, call, accept).await
    }

    async fn accept(
        self: Arc<Self>,
        id: BatchId,
        received: Received,
        by: Submitter,
        call: Option<CallKey>,
        gone: &CancellationToken,
    ) -> Answer<Arc<[u8]>> {
        let (now, media) = (self.clock.now(), by.form.media);
        let Received {
            head,
            spool,
            permits,
            fingerprint: _,
        } = received;
        let (intake, count) = (Arc::clone(&self), spool.rows());
        let prepared = blocking(move || {
            let accounts = intake.tenants.accounts();
            prepare(&head, count, id, now, &intake.against(&by, &accounts))
        });
        let prepared = Arc::new(prepared.await?);
        let account = self.account(&prepared.head.account);
        if let Some(account) = &account {
            quota::take(&*self.store, account, u64::from(count), now).await?;
        }
        let (out, mut groups) = mpsc::channel(1);
        let (intake, judged) = (Arc::clone(&self), Arc::clone(&prepared));
        let sorting = blocking(move || {
            let mut spool = spool.read().map_err(|error| Refusal::disk(&error))?;
            intake.judge(&judged).sort(&mut spool, Some(&out))
        });
        let (sorted, staged) = tokio::join!(sorting, self.stage(id, &mut groups, gone));
        // A store that failed is the cause; that the sorting was then stopped follows from it.
        let done = match staged.and(sorted) {
            Ok(sorted) => self.commit(&prepared, sorted, media, call, now).await,
            Err(refusal) => Err(refusal),
        };
        drop(permits);
        if done.is_err() {
            self.abandon(id).await;
            if let Some(account) = &account {
                quota::give_back(&*self.store, account, u64::from(count), now).await;
            }
        }
        done
    }

    /// Stages groups of lots as they come.
    async fn stage(
        &self,
        id: BatchId,
        groups: &mut mpsc::Receiver<Vec<NewLot>>,
        gone: &CancellationToken,
    ) -> Answer<()> {
        let staged = async {
            while let Some(lots) = groups.recv().await {
                if gone.is_cancelled() {
                    return Err(caller_gone());
                }
                let timer = self.metrics.store_seconds("stage_lots").start_timer();
                self.store.stage_lots(id, lots).await?;
                timer.observe_duration();
            }
            if gone.is_cancelled() {
                Err(caller_gone())
            } else {
                Ok(())
            }
        };
        let staged = staged.await;
        // Whoever sorts must not wait for a place in a channel that nobody empties.
        groups.close();
        while groups.try_recv().is_ok() {}
        staged
    }

    /// Makes the batch durable and tells what became of it.
    async fn commit(
        &self,
        prepared: &Prepared,
        sorted: Sorted,
        media: Media,
        call: Option<CallKey>,
        now: Timestamp,
    ) -> Answer<Arc<[u8]>> {
        let content = prepared
            .released
            .to_bytes()
            .map_err(|error| Refusal::internal("content", &error))?;
        let (accepted, rejected) = (sorted.accepted, sorted.rejected_count);
        let answer: Arc<[u8]> = answer(prepared, sorted, media, now)?.into();
        let head = &prepared.head;
        let batch = NewBatch {
            head: head.clone(),
            content: content.into(),
            accepted,
            rejected,
            call: call.map(|key| EndedCall {
                key,
                attempt: head.id,
                answer: Arc::clone(&answer),
            }),
        };
        if head.variants.is_some() {
            // Before the batch: what nobody knows of would never be decided.
            abtest::kept::register(&*self.store, head.id, now).await?;
        }
        let timer = self.metrics.store_seconds("commit_batch").start_timer();
        self.store.commit_batch(batch, now).await?;
        timer.observe_duration();
        self.metrics
            .recipients_accepted(&head.account)
            .inc_by(accepted);
        tracing::info!(batch = %head.id, account = %head.account, accepted, rejected, "batch accepted");
        Ok(answer)
    }

    async fn abandon(&self, id: BatchId) {
        if let Err(error) = self.store.abandon_batch(id).await {
            // Nobody sees it, and the next start removes it.
            tracing::warn!(batch = %id, %error, "what was staged of a refused batch stays for now");
        }
    }

    pub(super) fn new_id(&self) -> Answer<BatchId> {
        let mut random = [0_u8; 16];
        rand::fill(&mut random).map_err(|error| Refusal::internal("random", &error))?;
        Ok(BatchId::new(self.clock.now(), u128::from_be_bytes(random)))
    }
}

impl Submitted {
    pub(super) fn now(answer: Arc<[u8]>) -> Self {
        Self {
            answer,
            is_replayed: false,
        }
    }
}

/// The answer, as JSON, to what is about to be committed.
fn answer(prepared: &Prepared, sorted: Sorted, media: Media, now: Timestamp) -> Answer<Vec<u8>> {
    let id = prepared.head.id;
    let state = if prepared.head.held {
        BatchState::Open
    } else if sorted.accepted == 0 {
        BatchState::Completed
    } else if prepared.head.release_at > now {
        BatchState::Scheduled
    } else {
        BatchState::InProgress
    };
    let promise = prepared.promise(sorted.accepted);
    let json = match (media, sorted.rejected.first()) {
        (Media::Message, Some(rejection)) => return Err(single::rejected(rejection)),
        (Media::Message, None) => serde_json::to_vec(&Taken::new(id, state)),
        _ => serde_json::to_vec(&Accepted {
            id,
            state,
            accepted: sorted.accepted,
            rejected: sorted.rejected,
            rejected_count: sorted.rejected_count,
            links: prepared.links(),
            warnings: prepared.warnings(sorted.advice.warnings(), promise.as_ref()),
            ab_test: promise,
        }),
    };
    json.map_err(|error| Refusal::internal("answer", &error))
}

pub(super) fn caller_gone() -> Refusal {
    Refusal::new(
        Code::RequestTimeout,
        "the caller went away before the commit",
    )
}

/// Runs what blocks or computes for long beside the threads that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Answer<T> + Send + 'static,
) -> Answer<T> {
    let ran = tokio::task::spawn_blocking(run).await;
    ran.unwrap_or_else(|error| Err(Refusal::internal("intake", &error)))
}
