//! What a journal does while nothing fails, and what it takes up again.

use crate::{config, open, replay, segments, seqs};
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

#[test]
fn damage_before_the_last_segment_costs_the_rest_of_its_segment_only() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = filled(&disk)?;
    let files = segments(&disk.mount(), &journal)?;
    assert!(files.len() > 3);
    drop(journal);
    disk.damage(&files[1], 44 + 57 * 2 + 30);
    let journal = open(&disk.mount())?;
    let found = seqs(&replay(&journal)?);
    assert!(found.len() < 90 && found.len() > 70, "{}", found.len());
    assert!(found.contains(&1) && found.contains(&90));
    assert_eq!(journal.pending_records(), found.len() as u64);
    // What cannot be read is kept for somebody who can do more.
    journal.shipped(90, crate::now());
    assert!(
        disk.mount()
            .open(&files[1].with_extension("damaged"), false)
            .is_ok()
    );
    assert_eq!(journal.pending_records(), 0);
    Ok(())
}

#[test]
fn damage_in_the_last_segment_is_cut() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = filled(&disk)?;
    let last = segments(&disk.mount(), &journal)?
        .pop()
        .context("a segment")?;
    drop(journal);
    disk.damage(&last, 44 + 57 + 3);
    let journal = open(&disk.mount())?;
    let found = seqs(&replay(&journal)?);
    let end = *found.last().context("records")?;
    assert_eq!(found, (1..=end).collect::<Vec<_>>());
    journal.append(RecordKind::Outcome, b"after")?;
    journal.sync()?;
    assert_eq!(replay(&journal)?.len(), found.len() + 1);
    Ok(())
}

#[test]
fn a_lost_header_costs_its_segment_and_no_number() -> Result<()> {
    for which in [0, 2, usize::MAX] {
        let disk = FaultDisk::new(1);
        let journal = filled(&disk)?;
        let files = segments(&disk.mount(), &journal)?;
        let file = files.get(which).or(files.last()).context("a segment")?;
        drop(journal);
        disk.damage(file, 9);
        let journal = open(&disk.mount())?;
        let found = seqs(&replay(&journal)?);
        assert!(found.len() < 90 && found.len() > 60, "{}", found.len());
        let first_lost: u64 = file
            .to_str()
            .and_then(|name| name.get(name.len() - 24..name.len() - 4))
            .context("a name")?
            .parse()?;
        assert!(journal.append(RecordKind::Outcome, b"next")? >= first_lost);
        assert!(
            disk.mount()
                .open(&file.with_extension("damaged"), false)
                .is_ok()
        );
        drop(journal);
        assert_eq!(replay(&open(&disk.mount())?)?.len(), found.len() + 1);
    }
    Ok(())
}

#[test]
fn a_segment_of_a_later_version_stops_the_start_and_stays_as_it_is() -> Result<()> {
    let disk = FaultDisk::new(1);
    let mount = disk.mount();
    let journal = filled(&disk)?;
    let last = segments(&mount, &journal)?.pop().context("a segment")?;
    drop(journal);
    let file = mount.open(&last, true)?;
    let mut header = [0; 44];
    file.read_at(&mut header, 0)?;
    header[4] = 9;
    let crc = crc32fast::hash(&header[..40]);
    header[40..].copy_from_slice(&crc.to_le_bytes());
    file.write_at(&header, 0)?;
    let opened = open(&mount)
        .err()
        .and_then(|error| error.downcast::<OpenError>().ok());
    assert!(matches!(
        opened,
        Some(OpenError::Version { version: 9, .. })
    ));
    file.read_at(&mut header[..8], 0)?;
    assert_eq!(header[4], 9);
    Ok(())
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
