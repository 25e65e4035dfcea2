//! A journal under every fact: local files to which a process appends what happened, and from
//! which it is shipped to the store.
//!
//! Owns the files of `journal/ROLE-ID/`, their recovery, their bounds, and the identity of the
//! node, which lives with them. Must not interpret records: they are opaque bytes with a
//! [`RecordKind`], which only says what may be dropped first. Reads no clock: the one timer is the
//! wait of the thread that syncs.
//!
//! # What a caller may believe
//!
//! - [`Journal::append`] costs a lock and a copy. Nothing is promised yet.
//! - [`Journal::written`]: the record is with the operating system. Killing the process does not
//!   lose it; a power cut may.
//! - [`Journal::synced`]: the record, the size of its file and the name of its file are on disk.
//!   Without being asked this happens `sync_interval` after the first append.
//! - [`Journal::read_pending`] gives only synced records. So the store never holds a sequence
//!   number that a power cut could take back and the next start give to another fact.
//! - After an error of a write or a sync nothing is believed any more: every later call answers
//!   that error until the journal is opened anew. (The kernel forgets the pages of a failed sync
//!   and the next one succeeds without them, so trying again would be a lie.) A full disk is not
//!   such an error: see [`WriteError::NoSpace`].
//!
//! # Shedding
//!
//! Records live in three chains of segment files, by what they are worth: never dropped (starts,
//! outcomes, unsubscribes), clicks, opens. A full journal unlinks whole segments: first those that
//! were shipped and are only kept for a failover, then the oldest opens, then the oldest clicks.
//! So shedding costs one unlink, needs no free space and rewrites nothing. The price is one
//! `write` per chain in use (the MTA uses one, the tracker mostly two) and a merge by sequence
//! number when reading. The file format is in [`mod@format`].
#![forbid(unsafe_code)]

mod append;
mod claim;
mod config;
mod disk;
#[cfg(any(test, feature = "fault"))]
pub mod fault;
mod files;
pub mod format;
mod journal;
mod records;
mod recovery;
mod segment;
mod ship;
mod sync;
mod tail;

pub use config::{JournalConfig, OpenError};
pub use disk::{Disk, DiskFile, DiskLock, RealDisk};
pub use format::{MAX_RECORD_BYTES, RecordKind};
pub use journal::{AppendError, Journal, Poisoned, WriteError};
pub use records::{Foreign, Pending, Record, Records, read_foreign};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex` even when a thread panicked with it: every change under our locks is complete
/// before anything that can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
