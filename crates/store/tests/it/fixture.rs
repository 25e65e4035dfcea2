//! Stores of every engine, each in a directory of its own.

use std::path::PathBuf;
use std::sync::Arc;
use store::Store;
use store::conformance::Fixture;
use store::redis::{Clock, RedisOptions, RedisStore, RedisUrl};
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use testkit::redis::{RedisCluster, RedisServer};

/// A directory with one store.
pub(crate) struct Sqlite {
    directory: tempfile::TempDir,
    partitions: u16,
}

impl Sqlite {
    pub(crate) fn new(partitions: u16) -> Self {
        Self {
            directory: tempfile::tempdir().expect("a directory"),
            partitions,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("store.db")
    }

    pub(crate) async fn open(&self, role: Role) -> store::Result<SqliteStore> {
        let options = SqliteOptions {
            path: self.path(),
            partitions: self.partitions,
            role,
        };
        SqliteStore::open(options).await
    }
}

#[async_trait::async_trait]
impl Fixture for Sqlite {
    async fn mta(&self) -> Arc<dyn Store> {
        Arc::new(self.open(Role::Mta).await.expect("it opens"))
    }

    async fn another(&self) -> Arc<dyn Store> {
        Arc::new(self.open(Role::Tracker).await.expect("it opens"))
    }
}

/// A server, or some, with one store.
pub(crate) struct Redis {
    url: RedisUrl,
    partitions: u16,
    /// None on a Cluster, which outlives the store.
    server: Option<RedisServer>,
    _directory: tempfile::TempDir,
}

impl Redis {
    pub(crate) fn single(partitions: u16) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = RedisServer::start(directory.path().to_owned(), &[]).expect("a server");
        Self {
            url: RedisUrl::parse(&server.url()).expect("an address"),
            partitions,
            server: Some(server),
            _directory: directory,
        }
    }

    /// An empty store on a Cluster.
    pub(crate) fn on(cluster: &RedisCluster, partitions: u16) -> Self {
        for node in &cluster.nodes {
            // A replica has what its primary has.
            let flushed = node.ask(&["FLUSHALL"]);
            let readonly = |error: &anyhow::Error| error.to_string().contains("READONLY");
            assert!(
                !flushed.is_err_and(|error| !readonly(&error)),
                "not flushed"
            );
        }
        Self {
            url: RedisUrl::parse(&cluster.url()).expect("an address"),
            partitions,
            server: None,
            _directory: tempfile::tempdir().expect("a directory"),
        }
    }

    /// The server, if it is one alone.
    pub(crate) fn server(&self) -> Option<&RedisServer> {
        self.server.as_ref()
    }

    pub(crate) async fn open(&self, role: Role) -> store::Result<RedisStore> {
        let options = RedisOptions {
            url: self.url.clone(),
            partitions: self.partitions,
            role,
            require_durable: false,
            clock: Clock::Caller,
        };
        RedisStore::open(options).await
    }
}

#[async_trait::async_trait]
impl Fixture for Redis {
    async fn mta(&self) -> Arc<dyn Store> {
        Arc::new(self.open(Role::Mta).await.expect("it opens"))
    }

    async fn another(&self) -> Arc<dyn Store> {
        Arc::new(self.open(Role::Tracker).await.expect("it opens"))
    }
}
