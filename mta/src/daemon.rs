//! The daemon: a process that is an MTA and nothing else.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use service::clock::SystemClock;
use service::config::{self, Config, Environment, StoreUrl};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Signals, Tasks, supervise};
use store::Store;
use store::redis::{Clock, RedisOptions, RedisStore, RedisUrl};
use store::sqlite::{Role, SqliteOptions, SqliteStore};

use crate::{Deps, start};

/// How long each step of ending may take. The reply to a final dot may come late, and its outcome
/// is worth more than a quick end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the MTA until SIGTERM or SIGINT, then drains. SIGHUP reads shaping, rules and keys again.
///
/// # Errors
/// When it does not start, a task is lost, or the end takes too long: exit code 1.
pub fn run(config: &Config, environment: &Environment) -> anyhow::Result<()> {
    let _lines = service::logging::init(environment)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no threads")?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    let mut signals = Signals::install()?;
    config.make_data_dir()?;
    let (tasks, shutdown) = (Tasks::new(), Shutdown::new());
    let deps = Deps {
        store: open_store(&config.store).await?,
        metrics: Arc::new(Metrics::new()),
        clock: SystemClock::shared(),
        tasks: tasks.clone(),
        shutdown: shutdown.clone(),
    };
    let mta = start(config, deps).await?;
    supervise(&tasks, &shutdown, &mut signals, PATIENCE, || mta.reload()).await?;
    tracing::info!("the MTA has ended");
    Ok(())
}

/// Opens the store that the configuration names.
///
/// # Errors
/// When it cannot be opened: [`store::StoreError`] says why.
pub async fn open_store(config: &config::Store) -> anyhow::Result<Arc<dyn Store>> {
    open_store_as(config, Role::Mta).await
}

/// Opens the store that the configuration names, for a tool or in the place of an MTA.
///
/// # Errors
/// As [`open_store`].
pub async fn open_store_as(config: &config::Store, role: Role) -> anyhow::Result<Arc<dyn Store>> {
    match &config.url {
        StoreUrl::Sqlite(path) => {
            let options = SqliteOptions {
                path: path.clone(),
                partitions: config.partitions,
                role,
            };
            let store = SqliteStore::open(options)
                .await
                .with_context(|| format!("store {}", path.display()))?;
            Ok(Arc::new(store))
        }
        StoreUrl::Redis(redis) => {
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
                role,
                require_durable: config.require_durable,
                clock: Clock::Server,
            };
            Ok(Arc::new(RedisStore::open(options).await?))
        }
    }
}
