//! Sqlite stores in a directory of their own.

use std::path::PathBuf;
use std::sync::Arc;
use store::Store;
use store::conformance::Fixture;
use store::sqlite::{Role, SqliteOptions, SqliteStore};

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
