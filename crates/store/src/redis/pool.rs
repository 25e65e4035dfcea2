//! Connections for bulk steps on one server.
//!
//! One that was answered a moment ago is handed out as it is. Asking first whether it is still there,
//! as pools do, costs every step another round trip, which is felt where the server is far. What a
//! connection that died meanwhile does to the step is what one that dies in the middle of it does: the
//! step fails as in any outage. From then on no connection is believed that was not answered since.
//! Must not know a key, nor send anything twice.

use crate::{Result, StoreError};
use ::redis::aio::MultiplexedConnection;
use ::redis::{Pipeline, RedisError, RedisResult, Value};
use deadpool::managed::{self, Metrics, Object, PoolError, QueueMode, RecycleResult};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Connections on one server: they take turns on its one thread anyway.
const CONNECTIONS: usize = 8;
/// For how long a connection that was answered is believed to be there.
const BELIEVED: Duration = Duration::from_secs(5);

/// The connections.
pub(super) type Pool = managed::Pool<Manager>;

/// Makes connections, and tests those of which nobody knows whether they are still there.
pub(super) struct Manager {
    makes: deadpool_redis::Manager,
    /// Counts what showed that a connection to this server was gone.
    losses: AtomicU64,
}

/// A connection.
pub(super) struct Connection {
    connection: MultiplexedConnection,
    /// The losses known when the step began that was answered last; none while one is under way,
    /// and when it was given up.
    answered: Option<u64>,
}

impl Manager {
    fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    /// A connection to this server was lost: the others are tested before they are used.
    pub(super) fn note_loss(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }
}

impl managed::Manager for Manager {
    type Type = Connection;
    type Error = RedisError;

    async fn create(&self) -> RedisResult<Connection> {
        let connection = self.makes.create().await?;
        Ok(Connection {
            connection,
            answered: None,
        })
    }

    async fn recycle(&self, of: &mut Connection, metrics: &Metrics) -> RecycleResult<RedisError> {
        let answered = of.answered.take();
        if answered == Some(self.losses()) && metrics.last_used() < BELIEVED {
            return Ok(());
        }
        self.makes.recycle(&mut of.connection, metrics).await
    }
}

/// No connection yet.
pub(super) fn build(makes: deadpool_redis::Manager) -> Result<Pool> {
    let manager = Manager {
        makes,
        losses: AtomicU64::new(0),
    };
    let pool = Pool::builder(manager)
        .max_size(CONNECTIONS)
        // The one used last is the one that needs no test.
        .queue_mode(QueueMode::Lifo)
        .build();
    pool.map_err(|error| StoreError::Refused(error.to_string()))
}

/// Asks several things in one round trip. `lost`: whether an answer says that the connection is of no
/// more use.
pub(super) async fn ask(
    pool: &Pool,
    pipeline: &Pipeline,
    lost: impl Fn(&RedisError) -> bool,
) -> Result<RedisResult<Vec<Value>>> {
    let mut connection = pool.get().await.map_err(|error| match error {
        PoolError::Backend(error) => error.into(),
        other => StoreError::Unavailable(format!("redis: {other}")),
    })?;
    let losses = pool.manager().losses();
    let answered = pipeline.query_async(&mut connection.connection).await;
    match &answered {
        Err(error) if lost(error) => drop(Object::take(connection)),
        Ok(_) | Err(_) => connection.answered = Some(losses),
    }
    Ok(answered)
}
