//! Shipping: what is trimmed when, what is kept for a store that forgets.

use crate::{config, now, open, replay, segments, seqs};
use anyhow::Result;
use journal::fault::FaultDisk;
use journal::{Journal, JournalConfig, RecordKind};
use std::time::Duration;

fn fill(journal: &Journal, count: u64) -> Result<()> {
    for n in 0..count {
        journal.append(RecordKind::Outcome, &[b'x'; 83])?;
        if n % 10 == 9 {
            journal.write()?;
        }
    }
    Ok(journal.sync()?)
}

#[test]
fn shipped_segments_go_whole_and_the_newest_stays() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, 100)?;
    let before = segments(&disk.mount(), &journal)?.len();
    journal.shipped(55, now());
    assert_eq!(journal.pending_records(), 45);
    let left = seqs(&replay(&journal)?);
    assert!(left[0] > 1 && left[0] <= 56, "{}", left[0]);
    assert_eq!(journal.oldest(), left[0]);
    journal.shipped(100, now());
    assert_eq!(segments(&disk.mount(), &journal)?.len(), 1);
    assert!(before > 5);
    drop(journal);
    // Everything was shipped, and the numbers still go on.
    disk.power_cut();
    assert_eq!(open(&disk.mount())?.append(RecordKind::Outcome, b"")?, 101);
    Ok(())
}

#[test]
fn shipped_records_are_kept_for_the_time_asked_and_can_be_shipped_again() -> Result<()> {
    let disk = FaultDisk::new(1);
    let retain = Duration::from_mins(10);
    let journal = Journal::open(&JournalConfig { retain, ..config() }, disk.mount())?;
    let start = now();
    fill(&journal, 100)?;
    journal.shipped(50, start);
    journal.shipped(100, start + Duration::from_mins(5));
    assert_eq!(
        (replay(&journal)?.len(), journal.pending_records()),
        (100, 0)
    );

    // The store went back to what it knew at 30.
    journal.rewind(30);
    assert_eq!(journal.pending_records(), 70);
    let again = journal.read_pending(30, 1000)?;
    assert_eq!(seqs(&again.records), (31..=100).collect::<Vec<_>>());
    journal.shipped(again.through, start + Duration::from_mins(6));

    journal.shipped(100, start + Duration::from_mins(15));
    assert_eq!(replay(&journal)?.len(), 100, "shipped again 9 minutes ago");
    journal.shipped(100, start + Duration::from_mins(16));
    assert_eq!(segments(&disk.mount(), &journal)?.len(), 1);
    Ok(())
}

#[test]
fn numbers_of_dropped_records_do_not_stop_the_shipping() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    for n in 0..2000 {
        journal.append(RecordKind::Open, &[b'x'; 83])?;
        if n % 10 == 9 {
            journal.write()?;
        }
    }
    journal.sync()?;
    assert!(journal.dropped(RecordKind::Open) > 1000);
    let mut after = 0;
    let mut found = 0;
    while after < journal.synced_through() {
        let pending = journal.read_pending(after, 64)?;
        assert!(pending.through > after);
        found += pending.records.len() as u64;
        after = pending.through;
        journal.shipped(after, now());
    }
    assert_eq!(found, 2000 - journal.dropped(RecordKind::Open));
    assert_eq!(journal.pending_records(), 0);
    Ok(())
}

#[test]
fn numbers_go_on_when_the_power_goes_between_a_new_segment_and_its_sync() -> Result<()> {
    for seed in 0..20 {
        let disk = FaultDisk::new(seed);
        let journal = open(&disk.mount())?;
        journal.append(RecordKind::Outcome, &[b'x'; 1000])?;
        journal.sync()?;
        // Goes to the next segment, which a power cut may take away again.
        let next = journal.append(RecordKind::Outcome, &[b'x'; 1000])?;
        journal.write()?;
        assert_eq!(segments(&disk.mount(), &journal)?.len(), 2);
        journal.shipped(1, now());
        disk.power_cut();
        let journal = open(&disk.mount())?;
        assert!(
            journal.append(RecordKind::Outcome, b"")? >= next,
            "seed {seed}"
        );
    }
    Ok(())
}
