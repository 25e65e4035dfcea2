//! The job that moves tests on: one node at a time, under a lease.
//!
//! Owns when it looks. Whatever it does may be repeated by whoever comes after it, from any point.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engagement::abtest::{Mode, Record};
use model::{BatchId, BatchState, JournalId, Timestamp};
use service::clock::SharedClock;
use service::metrics::Metrics;
use service::tasks::Shutdown;
use store::{Batch, Store, Wave};

use crate::jobs::JobLease;

use super::kept::{self, Kept, Round};
use super::layout::ROUNDS;
use super::{Plan, carry_out, conclude, measure, released_at, write_decision};

/// The name of the job.
const JOB: &str = "abtest";
/// How long it is one node's.
const LEASE: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// Between tries to get the job, and after the store failed.
const PAUSE: Duration = Duration::from_secs(2);
/// Between two looks at the rates of a test that runs; longer where a look takes long.
const RATES: Duration = Duration::from_secs(30);
/// What was entered and never committed is let go after this.
const LEFT: Duration = Duration::from_secs(3_600);

/// What the job needs of the process.
pub(crate) struct TestingDeps {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) node: JournalId,
}

/// The job; see the module.
pub(crate) struct Testing {
    deps: TestingDeps,
    lease: JobLease,
    plans: HashMap<BatchId, Arc<Plan>>,
    /// Waves of which nothing is held back any more.
    released: HashSet<(BatchId, u32)>,
    /// When the rates of a test are looked at next.
    rates: HashMap<BatchId, Instant>,
}

impl Testing {
    pub(crate) fn new(deps: TestingDeps) -> Self {
        let lease = JobLease::new(JOB, LEASE, deps.node, &deps.store, &deps.clock);
        Self {
            deps,
            lease,
            plans: HashMap::new(),
            released: HashSet::new(),
            rates: HashMap::new(),
        }
    }

    /// Runs until the end begins.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let keep = async {
            loop {
                let pause = match self.once().await {
                    Ok(true) => LOOK,
                    Ok(false) => PAUSE,
                    Err(error) => {
                        tracing::warn!(%error, "tests were not looked at");
                        PAUSE
                    }
                };
                tokio::time::sleep(pause).await;
            }
        };
        tokio::select! {
            // Ended in the middle, it is repeated by whoever comes next.
            () = keep => {}
            () = shutdown.begun() => {}
        }
        self.lease.give_up().await;
    }

    /// Moves every test on that can be; false: another node does.
    ///
    /// # Errors
    /// As the store gives them.
    pub(crate) async fn once(&mut self) -> store::Result<bool> {
        let Some(fence) = self.lease.keep().await? else {
            // Another may have done anything meanwhile.
            self.released.clear();
            return Ok(false);
        };
        let mut after: Option<String> = None;
        loop {
            let now = self.deps.clock.now();
            let page = kept::running(&*self.deps.store, after.as_deref(), now).await?;
            for (batch, since) in page.items {
                if self.lease.keep().await? != Some(fence) {
                    return Ok(false);
                }
                if let Err(error) = self.advance(batch, since, fence).await {
                    // The others do not wait for it.
                    tracing::warn!(%batch, %error, "a test was not moved on");
                }
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(true),
            }
        }
    }

    async fn advance(&mut self, id: BatchId, since: Timestamp, fence: u64) -> store::Result<()> {
        let (store, now) = (Arc::clone(&self.deps.store), self.deps.clock.now());
        let Some(batch) = store.batch(id).await? else {
            return match now.since(since) > LEFT {
                true => self.end(id, now).await,
                false => Ok(()),
            };
        };
        let plan = match self.plans.get(&id) {
            Some(plan) => Some(Arc::clone(plan)),
            None => Plan::load(&*store, id).await?.map(Arc::new),
        };
        let Some(plan) = plan.filter(|_| batch.state != BatchState::Cancelled) else {
            return self.end(id, now).await;
        };
        self.plans.insert(id, Arc::clone(&plan));
        if batch.started_at.is_none() {
            let nobody = batch.state == BatchState::Completed;
            return if nobody {
                self.end(id, now).await
            } else {
                Ok(())
            };
        }
        let all_left = self.release_test(&plan, &batch, now).await?;
        if !plan.decides() {
            return if all_left {
                self.end(id, now).await
            } else {
                Ok(())
            };
        }
        let (kept, _) = Kept::load(&*store, id, now).await?;
        let is_over = kept.is_over();
        if is_over || kept.told < kept.decisions.len() {
            carry_out(&*store, &plan, &batch, now).await?;
        }
        if is_over || (!kept.decisions.is_empty() && batch.state == BatchState::Completed) {
            return self.end(id, now).await;
        }
        if kept.decisions.is_empty() && batch.state != BatchState::Paused {
            self.by_the_clock(&plan, &batch, fence).await?;
        }
        Ok(())
    }

    /// Releases the parts of the test whose time has come; whether that are all.
    async fn release_test(
        &mut self,
        plan: &Plan,
        batch: &Batch,
        now: Timestamp,
    ) -> store::Result<bool> {
        let mut all_left = true;
        for (wave, at) in plan.layout.starts(released_at(batch)) {
            if at > now {
                all_left = false;
                continue;
            }
            let how = Wave {
                at,
                shares: plan.all_get(None),
            };
            self.release(plan.batch, wave, how, now).await?;
        }
        Ok(all_left)
    }

    async fn release(
        &mut self,
        batch: BatchId,
        wave: u32,
        how: Wave,
        now: Timestamp,
    ) -> store::Result<()> {
        if self.released.contains(&(batch, wave)) {
            return Ok(());
        }
        self.deps.store.release_wave(batch, wave, how, now).await?;
        self.released.insert((batch, wave));
        Ok(())
    }

    /// Decides what is due, and looks at the rates of what is not.
    async fn by_the_clock(&mut self, plan: &Plan, batch: &Batch, fence: u64) -> store::Result<()> {
        let (store, now) = (Arc::clone(&self.deps.store), self.deps.clock.now());
        let (mut kept, before) = Kept::load(&*store, plan.batch, now).await?;
        for wave in plan.layout.rest.clone() {
            let Some(how) = kept.round_of(plan, wave) else {
                break;
            };
            self.release(plan.batch, wave, how, now).await?;
        }
        let round = u32::try_from(kept.rounds.len()).unwrap_or(u32::MAX);
        let due = plan
            .decide_at(batch, round, now)
            .is_some_and(|at| at <= now);
        if !due {
            return self.look_at_rates(plan, batch, now).await;
        }
        let look = measure::look(&*store, plan, batch, now).await?;
        // The look may have taken long: whoever has the job now decides.
        if self.lease.keep().await? != Some(fence) {
            return Ok(());
        }
        let is_last = plan.rounds() <= round + 1;
        if plan.test.mode == Mode::Bandit && plan.rounds() == ROUNDS {
            let record = Record::conclude(look.inputs.clone());
            kept.rounds.push(Round {
                at: now,
                shares: record.next_shares,
            });
        }
        if is_last {
            let decided = conclude(look, now, fence);
            write_decision(&*store, plan, (&mut kept, before), decided, now).await?;
            carry_out(&*store, plan, batch, now).await
        } else {
            kept.swap(&*store, plan.batch, before, now).await.map(drop)
        }
    }

    /// Sets the rates of a test that runs, now and then.
    async fn look_at_rates(
        &mut self,
        plan: &Plan,
        batch: &Batch,
        now: Timestamp,
    ) -> store::Result<()> {
        let begins = self.deps.clock.instant();
        if self.rates.get(&plan.batch).is_some_and(|at| *at > begins) {
            return Ok(());
        }
        let look = measure::look(&*self.deps.store, plan, batch, now).await?;
        let name = plan.batch.to_string();
        for variant in &look.inputs.variants {
            let (did, of) = (variant.human.successes, variant.human.trials);
            let rate = did as f64 / of.max(1) as f64;
            self.deps.metrics.abtest_rate(&name, &variant.name, rate);
        }
        let took = self.deps.clock.instant() - begins;
        self.rates.insert(plan.batch, begins + RATES.max(took * 50));
        Ok(())
    }

    /// The test is over: nothing more is to be done for it.
    async fn end(&mut self, batch: BatchId, now: Timestamp) -> store::Result<()> {
        self.plans.remove(&batch);
        self.rates.remove(&batch);
        self.released.retain(|(of, _)| *of != batch);
        self.deps.metrics.forget_abtest(&batch.to_string());
        kept::forget(&*self.deps.store, batch, now).await
    }
}
