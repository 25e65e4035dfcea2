//! Connections: who is asked, how long an answer may take, and what an error means.
//!
//! On one server bulk steps go over a pool of connections as explicit pipelines and short
//! commands over one shared connection that comes back by itself; a checkout costs two commands,
//! so it must carry many (DEPENDENCIES, section 5). Behind sentinels one shared connection is
//! made anew, to whoever is the primary then, after every error of the connection. A Cluster's
//! connection has one to each node. Must not know a key.

use super::pool::{self, Pool};
use super::url::{RedisUrl, Topology};
use crate::{Result, StoreError};
use ::redis as driver;
use driver::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use driver::cluster_async::ClusterConnection;
use driver::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use driver::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, Pipeline, RedisError,
    ServerErrorKind, Value,
};
use std::time::Duration;
use tokio::sync::Mutex;

/// How long an answer may take: longer than a sync of the append-only file on a busy disk.
const ANSWER: Duration = Duration::from_secs(5);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a call may take, waiting for a connection included.
const CALL: Duration = Duration::from_secs(8);

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        let text = format!("redis: {error}");
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::NoPerm) | ErrorKind::InvalidClientConfig => {
                Self::Refused(text)
            }
            ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::CrossSlot)
            | ErrorKind::UnexpectedReturnType
            | ErrorKind::Parse => Self::Damaged(text),
            // Everything else passes: connections, fail-overs, loading, a full memory or disk.
            _ => match error.code() {
                Some("WRONGTYPE") => Self::Damaged(text),
                _ => Self::Unavailable(text),
            },
        }
    }
}

/// The way to a Redis.
pub(super) enum Link {
    Single {
        short: ConnectionManager,
        bulk: Pool,
    },
    Sentinel {
        client: Box<Mutex<SentinelClient>>,
        shared: Mutex<Option<MultiplexedConnection>>,
    },
    Cluster(ClusterConnection),
}

fn address(url: &RedisUrl, host: &(String, u16)) -> ConnectionAddr {
    let (host, port) = host.clone();
    if url.tls {
        ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            tls_params: None,
        }
    } else {
        ConnectionAddr::Tcp(host, port)
    }
}

/// What is believed in place of the system's roots.
fn certificates(url: &RedisUrl) -> Option<driver::TlsCertificates> {
    let roots = url.roots.clone().filter(|_| url.tls)?;
    Some(driver::TlsCertificates {
        client_tls: None,
        root_cert: Some(roots),
    })
}

fn client(url: &RedisUrl, info: driver::ConnectionInfo) -> Result<Client> {
    Ok(match certificates(url) {
        Some(certificates) => Client::build_with_tls(info, certificates)?,
        None => Client::open(info)?,
    })
}

fn settings(url: &RedisUrl) -> driver::RedisConnectionInfo {
    let mut of = driver::RedisConnectionInfo::default()
        .set_db(i64::from(url.database))
        .set_lib_name("hikyaku", env!("CARGO_PKG_VERSION"));
    if let Some(user) = &url.user {
        of = of.set_username(user);
    }
    if let Some(password) = &url.password {
        of = of.set_password(password);
    }
    of
}

fn infos(url: &RedisUrl) -> Result<Vec<driver::ConnectionInfo>> {
    use driver::IntoConnectionInfo as _;
    let info = |host| {
        Ok(address(url, host)
            .into_connection_info()?
            .set_redis_settings(settings(url)))
    };
    url.hosts.iter().map(info).collect()
}

impl Link {
    /// Connects.
    pub(super) async fn open(url: &RedisUrl) -> Result<Self> {
        let opened = tokio::time::timeout(CALL, Self::connect(url)).await;
        opened.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(
                "redis: no connection in time".into(),
            ))
        })
    }

    async fn connect(url: &RedisUrl) -> Result<Self> {
        match &url.topology {
            Topology::Single => {
                let info = infos(url)?.into_iter().next();
                let info = info.ok_or_else(|| StoreError::Refused("no host".into()))?;
                let config = ConnectionManagerConfig::new()
                    .set_response_timeout(Some(ANSWER))
                    .set_connection_timeout(Some(CONNECT))
                    .set_max_delay(Duration::from_millis(500));
                let client = client(url, info)?;
                let info = client.get_connection_info().clone();
                let short = ConnectionManager::new_with_config(client, config).await?;
                let manager = deadpool_redis::Manager::new_with_config(info, config_of())?;
                let bulk = pool::build(manager)?;
                Ok(Self::Single { short, bulk })
            }
            Topology::Sentinel { name } => {
                let client = sentinel(url, name)?;
                let link = Self::Sentinel {
                    client: Box::new(Mutex::new(client)),
                    shared: Mutex::new(None),
                };
                link.primary().await?;
                Ok(link)
            }
            Topology::Cluster => {
                let mut builder = driver::cluster::ClusterClient::builder(infos(url)?)
                    .response_timeout(ANSWER)
                    .connection_timeout(CONNECT)
                    .retries(8)
                    .max_retry_wait(400);
                if let Some(certificates) = certificates(url) {
                    builder = builder.certs(certificates);
                }
                let client = builder.build()?;
                Ok(Self::Cluster(client.get_async_connection().await?))
            }
        }
    }

    /// The connection to the primary that the sentinels name.
    async fn primary(&self) -> Result<MultiplexedConnection> {
        let Self::Sentinel { client, shared } = self else {
            return Err(StoreError::Refused("no sentinels".into()));
        };
        let mut shared = shared.lock().await;
        if let Some(known) = &*shared {
            return Ok(known.clone());
        }
        let config = config_of();
        let made = client
            .lock()
            .await
            .get_async_connection_with_config(&config)
            .await?;
        *shared = Some(made.clone());
        Ok(made)
    }

    /// Asks one thing.
    pub(super) async fn short(&self, command: &Cmd) -> Result<Value> {
        match self {
            Self::Single { short, bulk } => {
                let asked = in_time(command.query_async(&mut short.clone())).await;
                if is_gone(&asked) {
                    bulk.manager().note_loss();
                }
                Ok(asked??)
            }
            Self::Sentinel { .. } | Self::Cluster(_) => {
                let mut pipeline = Pipeline::new();
                pipeline.add_command(command.clone());
                let answers = self.bulk(&pipeline).await?;
                Ok(answers.into_iter().next().unwrap_or(Value::Nil))
            }
        }
    }

    /// Asks several things of one slot in one round trip.
    pub(super) async fn bulk(&self, pipeline: &Pipeline) -> Result<Vec<Value>> {
        Ok(self.bulk_raw(pipeline).await??)
    }

    /// As [`Link::bulk`], with what the server itself answered apart.
    pub(super) async fn bulk_raw(
        &self,
        pipeline: &Pipeline,
    ) -> Result<driver::RedisResult<Vec<Value>>> {
        let asked = async {
            Ok(match self {
                Self::Single { bulk, .. } => pool::ask(bulk, pipeline, lost).await?,
                Self::Sentinel { .. } => {
                    let mut connection = self.primary().await?;
                    pipeline.query_async(&mut connection).await
                }
                Self::Cluster(connection) => pipeline.query_async(&mut connection.clone()).await,
            })
        };
        let answered = tokio::time::timeout(CALL, asked).await;
        let answered = answered.unwrap_or_else(|_| Err(too_late()));
        if is_gone(&answered) {
            match self {
                Self::Single { bulk, .. } => bulk.manager().note_loss(),
                Self::Sentinel { shared, .. } => *shared.lock().await = None,
                Self::Cluster(_) => {}
            }
        }
        answered
    }

    /// Asks every primary.
    pub(super) async fn everywhere(&self, command: &Cmd) -> Result<Vec<Value>> {
        use driver::cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo};
        let Self::Cluster(connection) = self else {
            return Ok(vec![self.short(command).await?]);
        };
        let all = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None));
        let mut connection = connection.clone();
        let answers = tokio::time::timeout(CALL, connection.route_command(command.clone(), all));
        match answers.await.map_err(|_| too_late())?? {
            Value::Map(answers) => Ok(answers.into_iter().map(|(_, answer)| answer).collect()),
            Value::Array(answers) => Ok(answers),
            one => Ok(vec![one]),
        }
    }
}

/// Whether a new connection, perhaps to another server, is wanted after an error.
fn lost(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(
            error.kind(),
            ErrorKind::Server(
                ServerErrorKind::ReadOnly
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::BusyLoading
            )
        )
}

/// Whether an answer, or that there is none, says so.
fn is_gone<T>(answered: &Result<driver::RedisResult<T>>) -> bool {
    match answered {
        Ok(Err(error)) => lost(error),
        Ok(Ok(_)) => false,
        Err(_) => true,
    }
}

fn sentinel(url: &RedisUrl, name: &str) -> Result<SentinelClient> {
    let hosts = url.hosts.iter().map(|host| address(url, host));
    let mut builder = SentinelClientBuilder::new(hosts, name, SentinelServerType::Master)?;
    if url.tls {
        builder = builder
            .set_client_to_redis_tls_mode(driver::TlsMode::Secure)
            .set_client_to_sentinel_tls_mode(driver::TlsMode::Secure);
    }
    if let Some(certificates) = certificates(url) {
        builder = builder
            .set_client_to_redis_certificates(certificates.clone())
            .set_client_to_sentinel_certificates(certificates);
    }
    if let Some(user) = &url.sentinel_user {
        builder = builder.set_client_to_sentinel_username(user);
    }
    if let Some(password) = &url.sentinel_password {
        builder = builder.set_client_to_sentinel_password(password);
    }
    builder = builder.set_client_to_redis_db(i64::from(url.database));
    if let Some(user) = &url.user {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = &url.password {
        builder = builder.set_client_to_redis_password(password);
    }
    Ok(builder.build()?)
}

fn config_of() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_response_timeout(Some(ANSWER))
        .set_connection_timeout(Some(CONNECT))
}

fn too_late() -> StoreError {
    StoreError::Unavailable("redis: no answer in time".into())
}

async fn in_time<T>(
    asked: impl Future<Output = driver::RedisResult<T>>,
) -> Result<driver::RedisResult<T>> {
    let answered = tokio::time::timeout(CALL, asked).await;
    answered.map_err(|_| too_late())
}

/// What an answer has, taken apart.
pub(super) mod answer {
    use super::Value;

    /// Bytes; `None` where there is nothing.
    pub(in super::super) fn bytes(value: Value) -> Option<Vec<u8>> {
        match value {
            Value::BulkString(bytes) => Some(bytes),
            Value::SimpleString(text) => Some(text.into_bytes()),
            Value::Int(number) => Some(number.to_string().into_bytes()),
            _ => None,
        }
    }

    /// A number; 0 where there is none.
    pub(in super::super) fn number(value: Value) -> i64 {
        match value {
            Value::Int(number) => number,
            other => bytes(other)
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .and_then(|text| text.parse().ok())
                .unwrap_or(0),
        }
    }

    /// A list; empty where there is none.
    pub(in super::super) fn list(value: Value) -> Vec<Value> {
        match value {
            Value::Array(list) | Value::Set(list) => list,
            Value::Map(pairs) => pairs.into_iter().flat_map(<[Value; 2]>::from).collect(),
            _ => Vec::new(),
        }
    }

    /// Pairs of bytes.
    pub(in super::super) fn pairs(value: Value) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut rest = list(value).into_iter();
        let mut pairs = Vec::new();
        while let (Some(key), Some(value)) = (rest.next(), rest.next()) {
            pairs.extend(bytes(key).zip(bytes(value)));
        }
        pairs
    }
}
