//! What a journal does while nothing fails, and what it takes up again.

use crate::{config, filled, open, replay, segments, seqs};
use anyhow::{Context as _, Result};
use journal::fault::FaultDisk;
use journal::{AppendError, Journal, JournalConfig, MAX_RECORD_BYTES, OpenError, RecordKind};
use model::JournalId;
use std::path::Path;
use std::sync::Arc;

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
    // What a power cut could take back is not shipped.
    assert!(journal.read_pending(0, 9)?.records.is_empty());
    journal.sync()?;
    assert_eq!(journal.synced_through(), 100);
    let all = journal.read_pending(0, 1000)?;
    assert_eq!((all.records.len(), all.through), (100, 100));
    assert_eq!(journal.pending_records(), 100);
    assert_eq!(journal.bytes(), disk.used());
    let id = journal.id();
    drop(journal);

    let journal = open(&disk.mount())?;
    assert_eq!(journal.id(), id);
    assert_eq!(replay(&journal)?, all.records);
    assert_eq!(journal.pending_records(), 100);
    assert_eq!(journal.append(RecordKind::Open, b"")?, 101);
    Ok(())
}

#[test]
fn reading_in_portions_gives_everything_once_from_memory_and_from_disk() -> Result<()> {
    let disk = FaultDisk::new(1);
    let mut journal = open(&disk.mount())?;
    for n in 0..500_usize {
        journal.append(crate::KINDS[n % 5], &vec![b'x'; n % 50])?;
        if n % 60 == 0 {
            journal.write()?;
        }
    }
    journal.sync()?;
    assert!(
        segments(&disk.mount(), &journal)?.len() > 6,
        "the test wants several segments"
    );
    for _ in 0..2 {
        for portion in [1, 7, 100, 1000] {
            let (mut after, mut found) = (0, Vec::new());
            while after < journal.synced_through() {
                let pending = journal.read_pending(after, portion)?;
                assert!(pending.records.len() <= portion && pending.through > after);
                found.extend(seqs(&pending.records));
                after = pending.through;
            }
            assert_eq!(
                found,
                (1..=500).collect::<Vec<_>>(),
                "in portions of {portion}"
            );
        }
        // Once more with nothing in memory.
        drop(journal);
        journal = open(&disk.mount())?;
    }
    Ok(())
}

#[test]
fn records_beyond_the_bound_are_refused_and_the_largest_is_taken() -> Result<()> {
    let journal = Journal::open(
        &JournalConfig {
            max_bytes: 1 << 20,
            ..config()
        },
        FaultDisk::new(1).mount(),
    )?;
    let large = vec![7; MAX_RECORD_BYTES + 1];
    let refused = journal.append(RecordKind::Outcome, &large);
    assert!(matches!(refused, Err(AppendError::TooLarge)));
    journal.append(RecordKind::Outcome, &large[1..])?;
    journal.sync()?;
    assert_eq!(replay(&journal)?[0].payload, large[1..]);
    Ok(())
}

#[test]
fn a_journal_in_use_is_left_alone_and_a_free_one_taken_up() -> Result<()> {
    let disk = FaultDisk::new(1);
    let mount = disk.mount();
    let first = open(&mount)?;
    let second = open(&mount)?;
    let tracker = Journal::open(
        &JournalConfig {
            role: "tracker".to_owned(),
            ..config()
        },
        Arc::clone(&mount),
    )?;
    assert_ne!(first.id(), second.id());
    assert!(tracker.dir().ends_with(format!("tracker-{}", tracker.id())));
    let (first_id, second_id) = (first.id(), second.id());
    first.append(RecordKind::Outcome, b"mine")?;
    drop(first);
    let third = open(&mount)?;
    assert_eq!(third.id(), first_id);
    assert_eq!(replay(&third)?.len(), 1);
    drop(second);
    drop(third);
    let again = [open(&mount)?, open(&mount)?].map(|journal| journal.id());
    assert_eq!(again, [first_id.min(second_id), first_id.max(second_id)]);
    Ok(())
}

#[test]
fn a_start_of_the_machine_in_between_is_noticed_once() -> Result<()> {
    let disk = FaultDisk::new(1);
    let rebooted = |boot: Option<&str>| -> Result<bool> {
        let config = JournalConfig {
            boot: boot.map(str::to_owned),
            ..config()
        };
        Ok(Journal::open(&config, disk.mount())?.rebooted())
    };
    assert!(!rebooted(Some("one"))?, "a new journal");
    assert!(!rebooted(Some("one"))?, "the process was started again");
    disk.power_cut();
    assert!(rebooted(Some("two"))?);
    assert!(!rebooted(Some("two"))?, "told once");
    assert!(!rebooted(None)?, "nobody knows");
    assert!(rebooted(Some("one"))?);
    Ok(())
}

#[test]
fn a_role_that_is_no_name_is_refused() {
    for role in ["", "MTA", "a-b", "../x"] {
        let config = JournalConfig {
            role: role.to_owned(),
            ..config()
        };
        let opened = Journal::open(&config, FaultDisk::new(1).mount());
        assert!(matches!(opened, Err(OpenError::Role(_))), "{role}");
    }
}

#[test]
fn the_journal_of_a_lost_node_is_read_without_changing_it() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = filled(&disk)?;
    let (dir, id) = (journal.dir().to_owned(), journal.id());
    // Read while it is in use, and with a torn tail.
    let last = segments(&disk.mount(), &journal)?
        .pop()
        .context("a segment")?;
    let file = disk.mount().open(&last, true)?;
    let size = file.size()?;
    file.write_at(&[1, 2, 3], size)?;
    let foreign = journal::read_foreign(&dir, disk.mount())?;
    assert_eq!((foreign.role.as_str(), foreign.id), ("mta", id));
    let records = foreign.records.collect::<std::io::Result<Vec<_>>>()?;
    assert_eq!(seqs(&records), (1..=90).collect::<Vec<_>>());
    assert_eq!(file.size()?, size + 3);
    let none = journal::read_foreign(Path::new("/data/journal"), disk.mount());
    assert!(matches!(none, Err(OpenError::NotAJournal(_))));
    Ok(())
}

#[test]
fn an_old_copy_of_a_journal_gives_no_number_twice() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = filled(&disk)?;
    journal.resume(1000, crate::now());
    assert_eq!(journal.pending_records(), 0);
    assert_eq!(journal.append(RecordKind::Outcome, b"new")?, 1001);
    journal.sync()?;
    assert_eq!(journal.pending_records(), 1);
    assert_eq!(seqs(&journal.read_pending(1000, 9)?.records), [1001]);
    drop(journal);
    let journal = open(&disk.mount())?;
    assert_eq!(journal.append(RecordKind::Outcome, b"")?, 1002);
    Ok(())
}

#[test]
fn the_identity_is_the_one_given_and_then_the_one_kept() -> Result<()> {
    let disk = FaultDisk::new(1);
    let id = |fresh: u8| -> Result<JournalId> {
        let fresh_id = JournalId::from_bytes([fresh; 16]);
        Ok(Journal::open(
            &JournalConfig {
                fresh_id,
                ..config()
            },
            disk.mount(),
        )?
        .id())
    };
    assert_eq!(id(9)?, JournalId::from_bytes([9; 16]));
    assert_eq!(id(3)?, JournalId::from_bytes([9; 16]));
    disk.power_cut();
    assert_eq!(id(4)?, JournalId::from_bytes([9; 16]));
    Ok(())
}
