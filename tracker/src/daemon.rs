//! The daemon: a process that is a tracker and nothing else.

use crate::{Deps, StartError, start};
use service::clock::SystemClock;
use service::config::{self, Config, Environment, StoreUrl};
use service::logging::{self, LoggingError};
use service::metrics::Metrics;
use service::tasks::{EndedBadly, Shutdown, Signals, Stage, Tasks, supervise};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use store::late::{self, Assumed};
use store::redis::{Clock, RedisOptions, RedisStore, RedisUrl};
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{Store, StoreError};

/// How long each step of ending may take: a request that was begun, the last shipment.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the daemon did not run, or ended badly. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The environment asks for impossible log lines.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// No threads, no signals, no directory.
    #[error("the system refuses")]
    System(#[from] io::Error),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The tracker did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A task was lost, or the end took too long.
    #[error(transparent)]
    Ended(#[from] EndedBadly),
}

/// Runs the tracker until SIGTERM or SIGINT, then drains. SIGHUP reads the key file again.
///
/// # Errors
/// See [`DaemonError`].
pub fn run(config: &Config, environment: &Environment) -> Result<(), DaemonError> {
    let _lines = logging::init(environment)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> Result<(), DaemonError> {
    let mut signals = Signals::install()?;
    config.make_data_dir()?;
    let tasks = Tasks::new();
    let shutdown = Shutdown::new();
    let deps = Deps {
        store: open_store(&config.store, &tasks, &shutdown).await?,
        metrics: Arc::new(Metrics::new()),
        clock: SystemClock::shared(),
        tasks: tasks.clone(),
        shutdown: shutdown.clone(),
    };
    let tracker = start(config, deps).await?;
    let reload = || tracker.reload();
    supervise(&tasks, &shutdown, &mut signals, PATIENCE, reload).await?;
    tracing::info!("tracker has ended");
    Ok(())
}

/// Opens the store; one that is away is opened when it comes, by a task. Links do not wait for it.
async fn open_store(
    config: &config::Store,
    tasks: &Tasks,
    shutdown: &Shutdown,
) -> Result<Arc<dyn Store>, StoreError> {
    let redis = match &config.url {
        StoreUrl::Redis(redis) => redis,
        StoreUrl::Sqlite(path) => {
            let options = SqliteOptions {
                path: path.clone(),
                partitions: config.partitions,
                role: Role::Tracker,
            };
            // A file is there or not; waiting would not bring it.
            return Ok(Arc::new(SqliteStore::open(options).await?));
        }
    };
    let mut url = RedisUrl::parse(redis.url.reveal())?;
    if let Some(file) = &config.ca_file {
        url.believe(file)?;
    }
    url.sentinel_user.clone_from(&config.sentinel_username);
    let password = config.sentinel_password.as_ref();
    url.sentinel_password = password.map(|text| text.reveal().to_owned());
    let options = RedisOptions {
        url,
        partitions: config.partitions,
        role: Role::Tracker,
        require_durable: config.require_durable,
        clock: Clock::Server,
    };
    let assumed = Assumed {
        partitions: config.partitions,
        is_shared: true,
    };
    let opened = late::open_now_or_later(assumed, move || {
        let options = options.clone();
        async move {
            let store: Arc<dyn Store> = Arc::new(RedisStore::open(options).await?);
            Ok(store)
        }
    });
    let opened = opened.await?;
    if let Some(waiting) = opened.waiting {
        let shutdown = shutdown.clone();
        drop(tasks.spawn("store-open", async move {
            tokio::select! {
                () = waiting => {}
                // To the last moment: what was answered is shipped at the end if the store comes.
                () = shutdown.reached(Stage::Close) => {}
            }
        }));
    }
    Ok(opened.store)
}
