//! The daemon: a process that is an MTA and nothing else.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use service::clock::SystemClock;
use service::config::{self, Config, Environment, StoreUrl};
use service::metrics::Metrics;
use service::tasks::{Shutdown, Signals, Tasks, supervise};
use store::Store;
use store::late::{self, Assumed};
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
        store: open_store_or_wait(&config.store, &tasks, &shutdown).await?,
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

/// Opens the store that the configuration names; one that is away is opened when it comes, by a
/// task, and is unavailable until then.
///
/// # Errors
/// When it cannot be used: [`store::StoreError`] says why.
pub async fn open_store_or_wait(
    config: &config::Store,
    tasks: &Tasks,
    shutdown: &Shutdown,
) -> anyhow::Result<Arc<dyn Store>> {
    let StoreUrl::Redis(redis) = &config.url else {
        // A file is there or not; waiting would not bring it.
        return open_store(config).await;
    };
    let options = redis_options(config, redis, Role::Mta)?;
    let assumed = Assumed {
        partitions: config.partitions,
        is_shared: true,
    };
    let opened = late::open_now_or_later(assumed, move || open_redis(options.clone())).await?;
    if let Some(waiting) = opened.waiting {
        let shutdown = shutdown.clone();
        drop(tasks.spawn("store-open", async move {
            tokio::select! {
                () = waiting => {}
                () = shutdown.begun() => {}
            }
        }));
    }
    Ok(opened.store)
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
            let options = redis_options(config, redis, role)?;
            // On the heap: a deep future, which makes those of all callers deep.
            Ok(Box::pin(open_redis(options)).await?)
        }
    }
}

async fn open_redis(options: RedisOptions) -> store::Result<Arc<dyn Store>> {
    Ok(Arc::new(RedisStore::open(options).await?))
}

fn redis_options(
    config: &config::Store,
    redis: &config::Redis,
    role: Role,
) -> store::Result<RedisOptions> {
    let mut url = RedisUrl::parse(redis.url.reveal())?;
    if let Some(file) = &config.ca_file {
        url.believe(file)?;
    }
    url.sentinel_user.clone_from(&config.sentinel_username);
    let password = config.sentinel_password.as_ref();
    url.sentinel_password = password.map(|text| text.reveal().to_owned());
    Ok(RedisOptions {
        url,
        partitions: config.partitions,
        role,
        require_durable: config.require_durable,
        clock: Clock::Server,
    })
}
