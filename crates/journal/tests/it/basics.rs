//! What a journal does while nothing fails.

use anyhow::Result;
use journal::fault::FaultDisk;
use journal::{Disk, Journal, JournalConfig, RecordKind};
use model::JournalId;
use std::sync::Arc;

pub(crate) fn config() -> JournalConfig {
    JournalConfig {
        sync_interval: None,
        ..JournalConfig::new("/data/journal", "mta", JournalId::from_bytes([5; 16]))
    }
}

pub(crate) fn open(disk: &Arc<dyn Disk>) -> Result<Journal> {
    Ok(Journal::open(&config(), Arc::clone(disk))?)
}

#[test]
fn what_was_synced_is_replayed_in_order_and_numbers_go_on() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    let kinds = [
        RecordKind::Start,
        RecordKind::Open,
        RecordKind::Click,
        RecordKind::Outcome,
    ];
    for n in 0..100_u64 {
        let kind = kinds[usize::try_from(n % 4)?];
        assert_eq!(journal.append(kind, &n.to_be_bytes())?, n + 1);
    }
    assert_eq!(
        (journal.written_through(), journal.synced_through()),
        (0, 0)
    );
    journal.write()?;
    assert_eq!(
        (journal.written_through(), journal.synced_through()),
        (100, 0)
    );
    assert!(journal.read_pending(0, 9)?.records.is_empty());
    journal.sync()?;
    assert_eq!(journal.synced_through(), 100);
    let from_memory = journal.read_pending(0, 1000)?;
    assert_eq!((from_memory.records.len(), from_memory.through), (100, 100));
    assert_eq!(journal.pending_records(), 100);
    let id = journal.id();
    drop(journal);

    let journal = open(&disk.mount())?;
    assert_eq!(journal.id(), id);
    let replayed = journal.replay(0).collect::<std::io::Result<Vec<_>>>()?;
    assert_eq!(replayed, from_memory.records);
    assert_eq!(
        journal.read_pending(40, 7)?.records,
        from_memory.records[40..47]
    );
    assert_eq!(
        journal.read_pending(47, 7)?.records,
        from_memory.records[47..54]
    );
    assert_eq!(journal.append(RecordKind::Open, b"")?, 101);
    Ok(())
}
