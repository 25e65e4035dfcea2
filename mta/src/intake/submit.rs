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
use content::{LinkReport, RenderContext, Tracker};
use links::KeyRing;
use model::{BatchId, BatchState, Row, Timestamp};
use serde::Serialize;
use service::clock::SharedClock;
use service::config::{Account, Pool};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Stage, Tasks};
use store::{NewBatch, NewLot, Store};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::prepare::{Against, Prepared, prepare};
use super::receive::{Form, Limits, Received, Receiver, Sizes};
use super::recipients::{Judge, Sorted};
use super::row::Rejection;
use crate::admin::problem::{Answer, Code, Refusal};

/// What intake needs of the process.
pub(crate) struct Intake {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) tasks: Tasks,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) accounts: Vec<Account>,
    pub(crate) pools: Vec<Pool>,
    pub(crate) dkim_dir: PathBuf,
    pub(crate) tracking: Arc<ArcSwap<KeyRing>>,
    /// Where spools lie while a body arrives.
    pub(crate) data_dir: PathBuf,
    pub(crate) sizes: Sizes,
    pub(crate) limits: Limits,
}

/// Who submits.
#[derive(Debug, Clone)]
pub(crate) struct Submitter {
    pub(crate) account: String,
    pub(crate) any_account: bool,
    /// Sent `Expect: 100-continue`.
    pub(crate) waits: bool,
    pub(crate) form: Form,
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
}

/// The answer to a dry run.
#[derive(Debug, Serialize)]
pub(crate) struct Checked {
    accepted: u64,
    rejected: Vec<Rejection>,
    rejected_count: u64,
    links: LinkReport,
    warnings: Vec<String>,
    /// Of the first good recipient.
    rendered: Option<Rendered>,
}

/// A message as it would leave, unsigned, with links that lead nowhere.
#[derive(Debug, Serialize)]
pub(crate) struct Rendered {
    email: String,
    message: String,
}

/// Renders with a tracking key that nobody has: a dry run must not make links that work.
fn render(prepared: &Prepared, row: &Row, account: &Account) -> Answer<Rendered> {
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
    let message = prepared
        .content
        .render(row, &context)
        .map_err(|error| failed(&error))?;
    Ok(Rendered {
        email: row.email.to_string(),
        message: String::from_utf8_lossy(&message.into_bytes()).into_owned(),
    })
}

impl Intake {
    /// Judges a batch, accepts nothing, and renders the message of its first good recipient.
    ///
    /// # Errors
    /// The refusal that a submission would get.
    pub(crate) async fn dry_run(self: &Arc<Self>, body: Body, by: Submitter) -> Answer<Checked> {
        let received = self.receive(body, &by).await?;
        let (id, now) = (self.new_id()?, self.clock.now());
        let (intake, count) = (Arc::clone(self), received.spool.rows());
        blocking(move || {
            let prepared = prepare(&received.head, count, id, now, &intake.against(&by))?;
            let judge = intake.judge(&prepared);
            let spool = received
                .spool
                .read()
                .map_err(|error| Refusal::disk(&error))?;
            let sorted = judge.sort(spool, None)?;
            let account = intake.account(&prepared.head.account);
            let first = sorted.first.as_ref().zip(account);
            let rendered = first
                .map(|(row, account)| render(&prepared, row, account))
                .transpose()?;
            Ok(Checked {
                accepted: sorted.accepted,
                rejected: sorted.rejected,
                rejected_count: sorted.rejected_count,
                links: prepared.content.links().clone(),
                warnings: prepared.warnings,
                rendered,
            })
        })
        .await
    }

    /// Takes in one batch: when this returns `Ok`, it is durable. Dropping the future before that
    /// leaves nothing, unless the commit was already under way.
    ///
    /// # Errors
    /// The refusal; then nothing of the batch is there.
    pub(crate) async fn submit(self: &Arc<Self>, body: Body, by: Submitter) -> Answer<Accepted> {
        let received = self.receive(body, &by).await?;
        let gone = CancellationToken::new();
        let _gone_on_drop = gone.clone().drop_guard();
        let (intake, hold) = (Arc::clone(self), self.shutdown.hold(Stage::Intake));
        let task = self.tasks.spawn("intake", async move {
            let accepted = intake.accept(received, by, &gone).await;
            drop(hold);
            accepted
        });
        task.join()
            .await
            .unwrap_or_else(|error| Err(Refusal::internal("intake", &error)))
    }

    async fn receive(&self, body: Body, by: &Submitter) -> Answer<Received> {
        let receiver = Receiver {
            limits: &self.limits,
            clock: &self.clock,
            dir: &self.data_dir,
            sizes: self.sizes,
            form: by.form,
            waits: by.waits,
        };
        receiver.receive(body).await
    }

    fn against<'a>(&'a self, by: &'a Submitter) -> Against<'a> {
        Against {
            account: &by.account,
            any_account: by.any_account,
            accounts: &self.accounts,
            pools: &self.pools,
            dkim_dir: &self.dkim_dir,
            // A ring has at least one key.
            tracking_key: self.tracking.load().ids().next().unwrap_or_default(),
        }
    }

    fn account(&self, id: &str) -> Option<&Account> {
        self.accounts.iter().find(|account| account.id == id)
    }

    fn judge<'p>(&self, prepared: &'p Prepared) -> Judge<'p> {
        let (account, partitions) = (prepared.head.account.as_str(), self.store.partitions());
        Judge::new(
            &prepared.content,
            account,
            partitions,
            prepared.allow_duplicates,
        )
    }

    async fn accept(
        self: Arc<Self>,
        received: Received,
        by: Submitter,
        gone: &CancellationToken,
    ) -> Answer<Accepted> {
        let (id, now) = (self.new_id()?, self.clock.now());
        let Received {
            head,
            spool,
            permits,
        } = received;
        let (intake, count) = (Arc::clone(&self), spool.rows());
        let prepared = blocking(move || prepare(&head, count, id, now, &intake.against(&by)));
        let prepared = Arc::new(prepared.await?);
        let (out, mut groups) = mpsc::channel(1);
        let (intake, judged) = (Arc::clone(&self), Arc::clone(&prepared));
        let sorting = blocking(move || {
            let spool = spool.read().map_err(|error| Refusal::disk(&error))?;
            intake.judge(&judged).sort(spool, Some(&out))
        });
        let (sorted, staged) = tokio::join!(sorting, self.stage(id, &mut groups, gone));
        // A store that failed is the cause; that the sorting was then stopped follows from it.
        let done = match staged.and(sorted) {
            Ok(sorted) => self.commit(&prepared, &sorted, now).await.map(|()| sorted),
            Err(refusal) => Err(refusal),
        };
        drop(permits);
        match done {
            Ok(sorted) => Ok(self.answer(&prepared, sorted, now)),
            Err(refusal) => {
                self.abandon(id).await;
                Err(refusal)
            }
        }
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

    async fn commit(&self, prepared: &Prepared, sorted: &Sorted, now: Timestamp) -> Answer<()> {
        let content = prepared
            .released
            .to_bytes()
            .map_err(|error| Refusal::internal("content", &error))?;
        let batch = NewBatch {
            head: prepared.head.clone(),
            content: content.into(),
            accepted: sorted.accepted,
            rejected: sorted.rejected_count,
        };
        let timer = self.metrics.store_seconds("commit_batch").start_timer();
        self.store.commit_batch(batch, now).await?;
        timer.observe_duration();
        Ok(())
    }

    async fn abandon(&self, id: BatchId) {
        if let Err(error) = self.store.abandon_batch(id).await {
            // Nobody sees it, and the next start removes it.
            tracing::warn!(batch = %id, %error, "what was staged of a refused batch stays for now");
        }
    }

    fn answer(&self, prepared: &Prepared, sorted: Sorted, now: Timestamp) -> Accepted {
        let head = &prepared.head;
        self.metrics
            .recipients_accepted(&head.account)
            .inc_by(sorted.accepted);
        tracing::info!(
            batch = %head.id,
            account = %head.account,
            accepted = sorted.accepted,
            rejected = sorted.rejected_count,
            "batch accepted"
        );
        let state = if sorted.accepted == 0 {
            BatchState::Completed
        } else if head.release_at > now {
            BatchState::Scheduled
        } else {
            BatchState::InProgress
        };
        Accepted {
            id: head.id,
            state,
            accepted: sorted.accepted,
            rejected: sorted.rejected,
            rejected_count: sorted.rejected_count,
            links: prepared.content.links().clone(),
            warnings: prepared.warnings.clone(),
        }
    }

    fn new_id(&self) -> Answer<BatchId> {
        let mut random = [0_u8; 16];
        rand::fill(&mut random).map_err(|error| Refusal::internal("random", &error))?;
        Ok(BatchId::new(self.clock.now(), u128::from_be_bytes(random)))
    }
}

fn caller_gone() -> Refusal {
    Refusal::new(
        Code::RequestTimeout,
        "the caller went away before the commit",
    )
}

/// Runs what blocks or computes for long beside the threads that serve connections.
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Answer<T> + Send + 'static,
) -> Answer<T> {
    let ran = tokio::task::spawn_blocking(run).await;
    ran.unwrap_or_else(|error| Err(Refusal::internal("intake", &error)))
}
