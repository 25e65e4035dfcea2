//! Waiting for a write or a sync from tasks.

use crate::{config, open};
use anyhow::Result;
use journal::fault::{Fault, FaultDisk};
use journal::{Journal, JournalConfig, RecordKind, WriteError};
use std::time::Duration;

#[tokio::test]
async fn one_write_serves_a_whole_turn_of_the_loop() -> Result<()> {
    let disk = FaultDisk::new(1);
    let large = JournalConfig {
        segment_bytes: 1 << 20,
        ..config()
    };
    let journal = Journal::open(&large, disk.mount())?;
    journal.append(RecordKind::Outcome, b"the file is made")?;
    journal.sync()?;
    let before = disk.operations();
    let mut turn = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let journal = journal.clone();
        turn.spawn(async move {
            let seq = journal
                .append(RecordKind::Outcome, b"")
                .map_err(anyhow::Error::from)?;
            journal.written(seq).await?;
            anyhow::ensure!(journal.written_through() >= seq);
            Ok(())
        });
    }
    for task in turn.join_all().await {
        task?;
    }
    assert_eq!(disk.operations() - before, 1);
    Ok(())
}

/// The system may put a thread aside in the middle of its write: whoever waits for it goes on with
/// other work, and is told when it has ended.
#[tokio::test]
async fn while_another_thread_writes_this_one_goes_on() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    let first = journal.append(RecordKind::Click, b"first")?;
    disk.hold_writes(true);
    let other = std::thread::spawn({
        let journal = journal.clone();
        move || journal.write()
    });
    disk.wait_for_held_write();
    let second = journal.append(RecordKind::Click, b"second")?;
    let mut waiting = tokio::task::JoinSet::new();
    for seq in [first, second] {
        let journal = journal.clone();
        waiting.spawn(async move { journal.written(seq).await.map(|()| seq) });
    }
    // Were this thread to sleep for the other, nobody would let that one go on.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert!(waiting.try_join_next().is_none());
    assert_eq!(journal.written_through(), 0);
    disk.hold_writes(false);
    let mut written = Vec::new();
    while let Some(done) = waiting.join_next().await {
        written.push(done??);
    }
    written.sort_unstable();
    assert_eq!(written, [first, second]);
    assert_eq!(journal.written_through(), second);
    other.join().expect("writes")?;
    Ok(())
}

#[tokio::test]
async fn waiting_for_a_sync_asks_for_it() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    let seq = journal.append(RecordKind::Unsubscribe, b"")?;
    journal.synced(seq).await?;
    assert_eq!(journal.synced_through(), seq);
    disk.power_cut();
    assert_eq!(open(&disk.mount())?.synced_through(), seq);
    Ok(())
}

#[tokio::test]
async fn what_nobody_waits_for_is_synced_by_itself() -> Result<()> {
    let interval = Some(Duration::from_millis(1));
    let disk = FaultDisk::new(1);
    let journal = Journal::open(
        &JournalConfig {
            sync_interval: interval,
            ..config()
        },
        disk.mount(),
    )?;
    for seq in 1..=20 {
        assert_eq!(journal.append(RecordKind::Open, b"")?, seq);
        journal.readable(seq - 1).await?;
        assert!(journal.synced_through() >= seq);
        assert_eq!(journal.pending(seq - 1, 10).await?.records.len(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn room_on_a_full_disk_is_found_without_being_asked() -> Result<()> {
    let interval = Some(Duration::from_millis(1));
    let disk = FaultDisk::new(1);
    let journal = Journal::open(
        &JournalConfig {
            sync_interval: interval,
            ..config()
        },
        disk.mount(),
    )?;
    disk.set_capacity(0);
    let seq = journal.append(RecordKind::Outcome, b"")?;
    assert!(matches!(
        journal.written(seq).await,
        Err(WriteError::NoSpace)
    ));
    assert!(matches!(
        journal.synced(seq).await,
        Err(WriteError::NoSpace)
    ));
    disk.set_capacity(u64::MAX);
    journal.readable(seq - 1).await?;
    assert!(journal.has_room());
    Ok(())
}

#[tokio::test]
async fn a_failed_sync_wakes_everybody_who_waits() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    let seq = journal.append(RecordKind::Unsubscribe, b"")?;
    journal.write()?;
    disk.fail_at(1, Fault::Io, false);
    let (asking, shipping) = tokio::join!(journal.synced(seq), journal.readable(0));
    assert!(matches!(asking, Err(WriteError::Poisoned(_))));
    assert!(shipping.is_err());
    assert_eq!(journal.synced_through(), 0);
    Ok(())
}

#[tokio::test]
async fn the_backlog_is_read_from_disk_on_another_thread() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    for _ in 0..400 {
        journal.append(RecordKind::Click, &[0; 60])?;
    }
    journal.sync()?;
    let (mut after, mut found) = (0, 0);
    while after < 400 {
        let pending = journal.pending(after, 33).await?;
        found += pending.records.len();
        after = pending.through;
    }
    assert_eq!(found, 400);
    Ok(())
}

#[tokio::test]
async fn waiting_for_a_record_that_is_dropped_ends() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    while journal.append(RecordKind::Outcome, &[b'x'; 500]).is_ok() {}
    journal.sync()?;
    let last = journal.synced_through();
    let open = journal.append(RecordKind::Open, &[b'x'; 500])?;
    journal.synced(open).await?;
    assert_eq!(journal.dropped(RecordKind::Open), 1);
    // Its number is on no disk: nobody may build on it before a later one is.
    assert_eq!(journal.synced_through(), last);
    assert_eq!(journal.pending_records(), last);
    Ok(())
}
