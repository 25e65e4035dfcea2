//! No room: in the journal's own bound, and on the disk.

use crate::{config, now, open, replay, seqs};
use anyhow::Result;
use journal::fault::{Fault, FaultDisk};
use journal::{AppendError, Journal, JournalConfig, Record, RecordKind, WriteError};
use std::time::Duration;

const PAYLOAD: [u8; 103] = [b'x'; 103];

fn fill(journal: &Journal, kind: RecordKind, count: usize) -> Result<usize> {
    for n in 0..count {
        match journal.append(kind, &PAYLOAD) {
            Ok(_) => {}
            Err(AppendError::Full) => return Ok(n),
            Err(error) => return Err(error.into()),
        }
        if n % 10 == 9 {
            journal.write()?;
        }
    }
    journal.sync()?;
    Ok(count)
}

fn of(records: &[Record], kind: RecordKind) -> Vec<u64> {
    records
        .iter()
        .filter(|record| record.kind == kind)
        .map(|record| record.seq)
        .collect()
}

fn dropped(journal: &Journal) -> [u64; 5] {
    RecordKind::ALL.map(|kind| journal.dropped(kind))
}

#[test]
fn the_oldest_opens_go_first_then_clicks_and_outcomes_never() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, RecordKind::Click, 200)?;
    fill(&journal, RecordKind::Open, 200)?;
    assert_eq!(dropped(&journal), [0; 5]);
    fill(&journal, RecordKind::Unsubscribe, 100)?;
    fill(&journal, RecordKind::Outcome, 50)?;

    let left = replay(&journal)?;
    let opens = of(&left, RecordKind::Open);
    assert!(!opens.is_empty() && opens.len() < 200, "{}", opens.len());
    assert_eq!(
        opens,
        (400 - opens.len() as u64 + 1..=400).collect::<Vec<_>>(),
        "the oldest go"
    );
    assert_eq!(dropped(&journal), [0, 0, 0, 0, 200 - opens.len() as u64]);
    assert_eq!(of(&left, RecordKind::Click).len(), 200);
    assert_eq!(journal.pending_records(), left.len() as u64);

    fill(&journal, RecordKind::Outcome, 250)?;
    let left = replay(&journal)?;
    let clicks = of(&left, RecordKind::Click);
    assert_eq!(of(&left, RecordKind::Open), [0; 0]);
    assert_eq!(
        clicks,
        (200 - clicks.len() as u64 + 1..=200).collect::<Vec<_>>()
    );
    assert_eq!(dropped(&journal), [0, 0, 0, 200 - clicks.len() as u64, 200]);

    // Starts are refused while outcomes of what was started still find room.
    while journal.append(RecordKind::Start, &PAYLOAD).is_ok() {
        journal.write()?;
    }
    assert!(!journal.has_room());
    let reserve = fill(&journal, RecordKind::Outcome, 1000)?;
    assert!((40..80).contains(&reserve), "{reserve}");
    journal.sync()?;
    let left = replay(&journal)?;
    assert_eq!(of(&left, RecordKind::Unsubscribe).len(), 100);
    assert_eq!(of(&left, RecordKind::Outcome).len(), 300 + reserve);
    assert_eq!(dropped(&journal)[..3], [0; 3]);
    assert!(disk.used() <= (64 << 10) + 3 * 1024, "{}", disk.used());

    // Shipping makes room again.
    journal.shipped(journal.synced_through(), now());
    assert!(journal.has_room());
    assert_eq!(journal.pending_records(), 0);
    journal.append(RecordKind::Start, &PAYLOAD)?;
    Ok(())
}

#[test]
fn nothing_is_dropped_for_what_is_worth_less() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, RecordKind::Click, 700)?;
    assert!(
        journal.dropped(RecordKind::Click) > 0,
        "the test wants no room left"
    );
    let before = of(&replay(&journal)?, RecordKind::Click);
    fill(&journal, RecordKind::Open, 300)?;
    let left = replay(&journal)?;
    assert_eq!(of(&left, RecordKind::Click), before);
    let opens = of(&left, RecordKind::Open);
    assert_eq!(journal.dropped(RecordKind::Open), 300 - opens.len() as u64);
    Ok(())
}

#[test]
fn what_was_shipped_and_is_only_retained_goes_before_anything_else() -> Result<()> {
    let disk = FaultDisk::new(1);
    let config = JournalConfig {
        retain: Duration::from_mins(10),
        ..config()
    };
    let journal = Journal::open(&config, disk.mount())?;
    fill(&journal, RecordKind::Outcome, 300)?;
    journal.shipped(300, now());
    assert_eq!(replay(&journal)?.len(), 300);
    fill(&journal, RecordKind::Open, 400)?;
    let left = replay(&journal)?;
    assert!(of(&left, RecordKind::Outcome).len() < 200);
    assert_eq!(of(&left, RecordKind::Open).len(), 400);
    assert_eq!(dropped(&journal), [0; 5]);
    Ok(())
}

#[test]
fn shipped_records_of_a_dropped_segment_do_not_count_as_dropped() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, RecordKind::Open, 450)?;
    let before = seqs(&replay(&journal)?);
    // In the middle of the oldest segment.
    let shipped = before[3];
    journal.shipped(shipped, now());
    fill(&journal, RecordKind::Outcome, 150)?;
    let left = of(&replay(&journal)?, RecordKind::Open);
    let gone = before
        .iter()
        .filter(|seq| **seq > shipped && !left.contains(seq))
        .count();
    assert!(gone > 0);
    assert_eq!(journal.dropped(RecordKind::Open), gone as u64);
    Ok(())
}

#[test]
fn a_full_disk_is_waited_out() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, RecordKind::Outcome, 20)?;
    journal.append(RecordKind::Outcome, b"with room after it in its segment")?;
    journal.sync()?;
    disk.set_capacity(disk.used() + 50);
    let used = disk.used();
    let first = journal.append(RecordKind::Start, b"begun")?;
    let last = journal.append(RecordKind::Outcome, &PAYLOAD)?;
    assert!(matches!(journal.write(), Err(WriteError::NoSpace)));
    assert!(matches!(journal.sync(), Err(WriteError::NoSpace)));
    assert_eq!(
        (journal.written_through(), journal.synced_through()),
        (21, 21)
    );
    assert_eq!(disk.used(), used, "no half of a record stays in the file");
    // No new work, but what was begun is still recorded.
    assert!(!journal.has_room());
    assert!(matches!(
        journal.append(RecordKind::Start, b""),
        Err(AppendError::Full)
    ));
    assert_eq!(journal.append(RecordKind::Outcome, b"late")?, last + 1);
    disk.set_capacity(u64::MAX);
    journal.sync()?;
    assert_eq!(journal.synced_through(), last + 1);
    assert!(journal.has_room());
    disk.power_cut();
    let journal = open(&disk.mount())?;
    assert_eq!(seqs(&replay(&journal)?), (1..=last + 1).collect::<Vec<_>>());
    assert_eq!(first, 22);
    Ok(())
}

#[test]
fn on_a_full_disk_opens_make_room_for_outcomes() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    fill(&journal, RecordKind::Open, 100)?;
    disk.set_capacity(disk.used());
    fill(&journal, RecordKind::Outcome, 30)?;
    let left = replay(&journal)?;
    assert_eq!(of(&left, RecordKind::Outcome).len(), 30);
    let opens = of(&left, RecordKind::Open).len() as u64;
    assert!(opens > 0 && opens < 100, "{opens}");
    assert_eq!(journal.dropped(RecordKind::Open), 100 - opens);
    assert!(journal.has_room());
    Ok(())
}

#[test]
fn one_class_waits_for_room_while_another_is_written() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    // Operations of this write: create, header, records of one class; then create of the other.
    journal.append(RecordKind::Click, b"click")?;
    journal.append(RecordKind::Outcome, b"outcome")?;
    disk.fail_at(4, Fault::NoSpace, false);
    assert!(matches!(journal.write(), Err(WriteError::NoSpace)));
    assert!(disk.heal());
    assert_eq!(journal.written_through(), 0);
    journal.append(RecordKind::Click, b"click")?;
    journal.sync()?;
    assert_eq!(seqs(&journal.read_pending(0, 9)?.records), [1, 2, 3]);
    assert_eq!(seqs(&replay(&journal)?), [1, 2, 3]);
    Ok(())
}
