//! What a record costs: appends in turns of the event loop, one write per turn.
//!
//! `cargo run --release -p journal --example cost [DIR]`

#![expect(clippy::print_stdout, reason = "the numbers are what it is for")]
#![expect(clippy::disallowed_methods, reason = "it measures time")]

use journal::{Journal, JournalConfig, RealDisk, RecordKind};
use model::JournalId;
use std::sync::Arc;
use std::time::{Duration, Instant};

const RECORDS: u32 = 1_000_000;

fn main() -> anyhow::Result<()> {
    let given = std::env::args_os().nth(1);
    let temporary = tempfile::tempdir()?;
    let dir = given.map_or_else(|| temporary.path().to_owned(), std::path::PathBuf::from);
    let id = JournalId::from_bytes([1; 16]);
    for (turn, size) in [(1, 120), (16, 120), (64, 120), (64, 400)] {
        let mut config = JournalConfig::new(&dir, "mta", id);
        config.max_bytes = 8 << 30;
        let journal = Journal::open(&config, Arc::new(RealDisk))?;
        let payload = vec![b'x'; size];
        let (mut appending, mut writing) = (Duration::ZERO, Duration::ZERO);
        let mut slowest = Duration::ZERO;
        let records = if turn == 1 { RECORDS / 10 } else { RECORDS };
        for _ in 0..records / turn {
            let start = Instant::now();
            for _ in 0..turn {
                journal.append(RecordKind::Outcome, &payload)?;
            }
            let appended = Instant::now();
            journal.write()?;
            let written = Instant::now();
            appending += appended - start;
            writing += written - appended;
            slowest = slowest.max(written - start);
        }
        println!(
            "{turn:>3} records of {size} bytes a turn: append {:?} and write {:?} a record, write {:?} a turn, slowest turn {slowest:?}",
            appending / records,
            writing / records,
            writing / (records / turn),
        );
        let start = Instant::now();
        journal.sync()?;
        let mut read = 0_u32;
        let mut after = journal.synced_through() - u64::from(records);
        let first = after;
        while after < journal.synced_through() {
            let pending = journal.read_pending(after, 1000)?;
            read += u32::try_from(pending.records.len())?;
            after = pending.through;
        }
        println!(
            "    synced and read {read} back in {:?}, from {first}",
            start.elapsed()
        );
        journal.shipped(after, Instant::now());
    }
    Ok(())
}
