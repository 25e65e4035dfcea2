//! Wires the rooms of the daemon into one running service.
//!
//! Owns the order in which they start. Must not contain what they do.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use service::clock::SharedClock;
use service::config::Config;
use service::metrics::Metrics;
use service::tasks::{Shutdown, Tasks};
use store::Store;
use tokio::net::TcpListener;

pub use crate::admin::Probe;
pub use crate::admin::auth::KEY_FILE;
use crate::admin::auth::Keys;
use crate::admin::{Api, router, server};
use crate::intake::receive::Limits;
use crate::intake::submit::Intake;

/// What the daemon gets from whoever starts it; `up` shares it with the tracker.
#[derive(Clone)]
pub struct Deps {
    /// The shared state.
    pub store: Arc<dyn Store>,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
    /// What time it is.
    pub clock: SharedClock,
    /// All tasks of the process.
    pub tasks: Tasks,
    /// The end of the process.
    pub shutdown: Shutdown,
}

/// A running daemon. It ends when the `shutdown` it was given drains.
#[derive(Debug)]
pub struct Mta {
    /// Where the API listens; with port 0 in the configuration, the port that it got.
    pub addr: SocketAddr,
}

/// Starts the API. `probes` are asked by `/readyz`, besides the store.
///
/// # Errors
/// When the keys cannot be read or made, or the address is taken.
pub async fn start_api(config: &Config, deps: &Deps, probes: Vec<Probe>) -> anyhow::Result<Mta> {
    let data_dir = config.data_dir.clone();
    let (api, accounts) = (config.api.clone(), config.accounts.clone());
    let keys = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&data_dir)
            .with_context(|| format!("data_dir {}", data_dir.display()))?;
        Keys::load(&api.keys, &accounts, &data_dir)
    });
    let keys = keys.await.context("reading the keys")??;
    let intake = Arc::new(Intake {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        tasks: deps.tasks.clone(),
        shutdown: deps.shutdown.clone(),
        metrics: Arc::clone(&deps.metrics),
        accounts: config.accounts.clone(),
        dkim_dir: config.dkim.dir.clone(),
        data_dir: config.data_dir.clone(),
        max_body: config.api.max_body,
        limits: Limits::default(),
    });
    let api = Api {
        store: Arc::clone(&deps.store),
        clock: deps.clock.clone(),
        metrics: Arc::clone(&deps.metrics),
        shutdown: deps.shutdown.clone(),
        keys,
        intake,
        probes,
    };
    let asked = config.api.listen;
    let listener = TcpListener::bind(asked)
        .await
        .with_context(|| format!("api.listen {asked}"))?;
    let addr = server::address(&listener, asked);
    server::serve(listener, router(Arc::new(api)), &deps.tasks, &deps.shutdown);
    tracing::info!(%addr, "the API is open");
    Ok(Mta { addr })
}
