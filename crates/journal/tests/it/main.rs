//! Crash tests of the journal, from outside.

mod basics;
mod crash;
mod damage;
mod full;
mod kill;
mod ship;
mod waiting;

use anyhow::Result;
use journal::fault::FaultDisk;
use journal::{Disk, Journal, JournalConfig, Record, RecordKind};
use model::JournalId;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Small bounds, so that segments follow each other; no sync that is not asked for, so that runs
/// repeat themselves.
fn config() -> JournalConfig {
    JournalConfig {
        sync_interval: None,
        max_bytes: 64 << 10,
        segment_bytes: 1 << 10,
        tail_bytes: 2 << 10,
        ..JournalConfig::new("/data/journal", "mta", JournalId::from_bytes([5; 16]))
    }
}

fn open(disk: &Arc<dyn Disk>) -> Result<Journal> {
    Ok(Journal::open(&config(), Arc::clone(disk))?)
}

fn replay(journal: &Journal) -> Result<Vec<Record>> {
    Ok(journal.replay(0).collect::<std::io::Result<_>>()?)
}

fn seqs(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.seq).collect()
}

/// The segments of a journal, oldest first within each class.
fn segments(disk: &Arc<dyn Disk>, journal: &Journal) -> Result<Vec<PathBuf>> {
    let mut names = disk.list(journal.dir())?;
    names.retain(|name| Path::new(name).extension().is_some_and(|ext| ext == "seg"));
    names.sort();
    Ok(names.iter().map(|name| journal.dir().join(name)).collect())
}

/// Ninety outcomes in several segments.
fn filled(disk: &FaultDisk) -> Result<Journal> {
    let journal = open(&disk.mount())?;
    for n in 0..90_u32 {
        journal.append(RecordKind::Outcome, &[b'x'; 40])?;
        if n % 10 == 9 {
            journal.write()?;
        }
    }
    journal.sync()?;
    Ok(journal)
}

const KINDS: [RecordKind; 5] = RecordKind::ALL;

#[expect(
    clippy::disallowed_methods,
    reason = "an origin for times that only the tests move"
)]
fn now() -> Instant {
    Instant::now()
}
