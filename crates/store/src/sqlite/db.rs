//! Opening the file: pragmas, the schema and its version, the lock, and what an error means.
//!
//! Must not know a table.

use super::{Role, SqliteOptions};
use crate::erased::{self, Eraser};
use crate::{Result, StoreError};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The version of the schema, in `user_version`.
const SCHEMA: i64 = 6;
/// What each version adds to the one before.
const CHANGES: [&str; 6] = [
    include_str!("schema.sql"),
    include_str!("schema-2.sql"),
    include_str!("schema-3.sql"),
    include_str!("schema-4.sql"),
    include_str!("schema-5.sql"),
    include_str!("schema-6.sql"),
];
/// How long a writer waits for the other process; its steps are short, a checkpoint is not.
const BUSY: Duration = Duration::from_secs(15);
/// Statements kept prepared per connection: more than there are.
const STATEMENTS: usize = 128;

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use ErrorCode::{
            CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, FileLockingProtocolFailed,
            OperationInterrupted, OutOfMemory, PermissionDenied, ReadOnly, SystemIoFailure,
        };
        match error.sqlite_error_code() {
            Some(
                DiskFull
                | SystemIoFailure
                | DatabaseBusy
                | DatabaseLocked
                | CannotOpen
                | ReadOnly
                | OutOfMemory
                | OperationInterrupted
                | FileLockingProtocolFailed
                | PermissionDenied,
            ) => Self::Unavailable(format!("sqlite: {error}")),
            _ => Self::Damaged(format!("sqlite: {error}")),
        }
    }
}

/// A file beside the database, locked while an MTA has it open.
pub(super) fn lock(options: &SqliteOptions) -> Result<Option<File>> {
    if options.role != Role::Mta {
        return Ok(None);
    }
    let path = lock_path(&options.path);
    let refused =
        |error: &dyn std::fmt::Display| StoreError::Refused(format!("{}: {error}", path.display()));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| refused(&error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(refused(&"another MTA has this store open")),
        Err(TryLockError::Error(error)) => Err(refused(&error)),
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".mta-lock");
    name.into()
}

/// The connection that writes; makes the store when there is none.
pub(super) fn open_writer(options: &SqliteOptions) -> Result<Connection> {
    let mut connection = Connection::open_with_flags(
        &options.path,
        OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
    .map_err(|error| StoreError::Refused(format!("{}: {error}", options.path.display())))?;
    keep_prepared(&connection)?;
    // Checkpoints come when the writer says so, after it has answered; the limit lets the log
    // shrink again after a storm.
    connection.execute_batch(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=0;
         PRAGMA journal_size_limit=67108864; PRAGMA cache_size=-16384; PRAGMA temp_store=MEMORY;",
    )?;
    make(&mut connection, options)?;
    Ok(connection)
}

/// Waits for the other process, and plans each statement once. Without the guarantee of stable plans
/// sqlite looks at the values that are bound and plans anew each time one of them could matter: a
/// third of what leases cost.
fn keep_prepared(connection: &Connection) -> Result<()> {
    connection.busy_timeout(BUSY)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

fn make(connection: &mut Connection, options: &SqliteOptions) -> Result<()> {
    let step = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let version: i64 = step.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let Some(missing) = usize::try_from(version)
        .ok()
        .and_then(|done| CHANGES.get(done..))
    else {
        return Err(StoreError::Damaged(format!(
            "schema version {version}, this program knows {SCHEMA}"
        )));
    };
    for change in missing {
        step.execute_batch(change)?;
    }
    if version == 0 {
        step.execute(
            "INSERT INTO meta VALUES ('partitions', ?1), ('token', 0)",
            [options.partitions],
        )?;
    }
    step.execute(
        "INSERT OR IGNORE INTO setting VALUES (?1, ?2)",
        [erased::SETTING, &Eraser::new_key()?],
    )?;
    if version != SCHEMA {
        step.pragma_update(None, "user_version", SCHEMA)?;
    }
    step.commit()?;
    Ok(())
}

/// How many partitions the store was made with.
pub(super) fn partitions(connection: &Connection) -> Result<u16> {
    let stored: Option<u16> = connection
        .query_row("SELECT value FROM meta WHERE key='partitions'", [], |row| {
            row.get(0)
        })
        .optional()?;
    stored
        .filter(|count| (1..=256).contains(count))
        .ok_or_else(|| StoreError::Damaged("it does not know its partitions".into()))
}

/// A connection that only reads.
pub(super) fn open_reader(path: &Path) -> Result<Connection> {
    // Read-write as a file, so that it can attach to the shared memory of the log after a crash;
    // `query_only` keeps it from writing.
    let connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    keep_prepared(&connection)?;
    connection.execute_batch(
        "PRAGMA query_only=ON; PRAGMA cache_size=-4096; PRAGMA wal_autocheckpoint=0;",
    )?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::StatementStatus;

    #[test]
    fn a_statement_is_planned_once_whatever_is_bound() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let connection = open_writer(&SqliteOptions {
            path: dir.path().join("store.sqlite"),
            role: Role::Mta,
            partitions: 4,
        })?;
        let mut sql = connection.prepare(
            "SELECT id FROM work WHERE queue=?1 AND rank=?2 AND batch=?3 AND due_at<=?4 AND expires<=?4
             ORDER BY due_at LIMIT 1",
        )?;
        for (rank, batch) in [(0, 1), (1, 1), (1, 70_000)] {
            let values = rusqlite::params!["a.example", rank, batch, 12];
            let found: Option<i64> = sql.query_row(values, |row| row.get(0)).optional()?;
            assert_eq!(found, None);
        }
        assert_eq!(sql.get_status(StatementStatus::RePrepare), 0);
        Ok(())
    }
}
