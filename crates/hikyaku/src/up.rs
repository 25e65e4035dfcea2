//! `hikyaku up`: MTA and tracker in one process, sharing store, metrics, clock and the end.
//!
//! Owns the wiring. Must not contain mail logic.

use crate::cli::{Failure, Terminal};
use anyhow::{Context, Result};
use service::clock::SystemClock;
use service::config::Config;
use service::metrics::Metrics;
use service::tasks::{Shutdown, Signal, Signals, Tasks, supervise};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long each stage of a drain may take: a final dot may be answered late, and then the
/// outcome is worth more than a quick end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(60);

/// Arguments of `up`, `mta` and `tracker`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration; config/hikyaku.toml if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Args {
    fn load(&self, terminal: &Terminal<'_>) -> Result<Config, Failure> {
        Ok(Config::load(self.config.as_deref(), &terminal.environment)?)
    }
}

/// `hikyaku up`: runs both until a signal.
///
/// # Errors
/// When the configuration has mistakes, something does not start, or the end is not a clean one.
pub(crate) fn run(arguments: &Args, terminal: &Terminal<'_>) -> Result<(), Failure> {
    let config = arguments.load(terminal)?;
    let _lines = service::logging::init(&terminal.environment).map_err(anyhow::Error::from)?;
    runtime()?.block_on(async {
        let mut signals = Signals::install()?;
        let running = Running::start(&config).await?;
        Ok(running.supervise(&mut signals).await?)
    })
}

/// `hikyaku mta`: the sending daemon alone.
///
/// # Errors
/// As [`run`].
pub(crate) fn mta(arguments: &Args, terminal: &Terminal<'_>) -> Result<(), Failure> {
    let config = arguments.load(terminal)?;
    Ok(mta::daemon::run(&config, &terminal.environment)?)
}

/// `hikyaku tracker`: the tracker alone.
///
/// # Errors
/// As [`run`].
pub(crate) fn tracker(arguments: &Args, terminal: &Terminal<'_>) -> Result<(), Failure> {
    let config = arguments.load(terminal)?;
    Ok(tracker::daemon::run(&config, &terminal.environment).map_err(anyhow::Error::from)?)
}

/// The runtime of a daemon.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no runtime")
}

/// A running service.
pub(crate) struct Running {
    tasks: Tasks,
    shutdown: Shutdown,
    mta: mta::Mta,
    tracker: tracker::Tracker,
}

impl Running {
    /// Starts both.
    pub(crate) async fn start(config: &Config) -> Result<Self> {
        let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
        config.make_data_dir()?;
        let (store, metrics) = (
            mta::daemon::open_store_or_wait(&config.store, &tasks, &shutdown).await?,
            Arc::new(Metrics::new()),
        );
        let clock = SystemClock::shared();
        let mta = mta::Deps {
            store: store.clone(),
            metrics: metrics.clone(),
            clock: clock.clone(),
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        let mta = mta::start(config, mta).await?;
        let tracker = tracker::Deps {
            store,
            metrics,
            clock,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        let tracker = tracker::start(config, tracker).await?;
        Ok(Self {
            tasks,
            shutdown,
            mta,
            tracker,
        })
    }

    /// Where the API listens.
    pub(crate) fn api(&self) -> SocketAddr {
        self.mta.addr()
    }

    /// Where the tracker listens for the public.
    pub(crate) fn tracker(&self) -> SocketAddr {
        self.tracker.addr()
    }

    /// Runs until a signal or a lost task, then drains.
    async fn supervise(self, signals: &mut Signals) -> Result<()> {
        let Self {
            tasks,
            shutdown,
            mta,
            tracker,
        } = self;
        let reload = || reload(&mta, &tracker);
        Ok(supervise(&tasks, &shutdown, signals, DRAIN_PATIENCE, reload).await?)
    }

    /// Waits for SIGINT or SIGTERM; SIGHUP reads shaping, rules and keys again.
    pub(crate) async fn stopped(&self) -> Result<()> {
        let mut signals = Signals::install()?;
        loop {
            match signals.next().await {
                Signal::Terminate => return Ok(()),
                Signal::Reload => reload(&self.mta, &self.tracker),
            }
        }
    }

    /// Ends it: no new work, what is open is finished, everything is recorded.
    pub(crate) async fn drain(self) -> Result<()> {
        self.shutdown.begin();
        self.supervise(&mut Signals::install()?).await
    }
}

/// What SIGHUP asks for.
fn reload(mta: &mta::Mta, tracker: &tracker::Tracker) {
    mta.reload();
    tracker.reload();
}
