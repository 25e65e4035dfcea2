//! Bytes that were synced and are not what they were.

use crate::{KINDS, filled, open, replay, segments, seqs};
use anyhow::{Context as _, Result};
use journal::fault::FaultDisk;
use journal::{OpenError, Record, RecordKind};
use proptest::prelude::*;

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

type Index = prop::sample::Index;

/// A journal of every kind of record, damaged as told, is opened, read and used again.
fn survive(flips: &[(Index, Index)], cut: Option<(Index, Index)>) -> Result<()> {
    let disk = FaultDisk::new(1);
    let mount = disk.mount();
    let journal = open(&mount)?;
    for n in 0..150_usize {
        journal.append(KINDS[n % 5], &vec![b'x'; n])?;
        if n % 7 == 0 {
            journal.write()?;
        }
    }
    journal.sync()?;
    let before = replay(&journal)?;
    let files = segments(&mount, &journal)?;
    drop(journal);
    for (file, byte) in flips {
        let path = file.get(&files);
        let size = usize::try_from(mount.open(path, false)?.size()?)?;
        disk.damage(path, byte.index(size));
    }
    if let Some((file, size)) = cut {
        let file = mount.open(&files[file.index(files.len())], true)?;
        let size = size.index(usize::try_from(file.size()?)? + 1);
        file.set_size(size as u64)?;
    }
    let known = |record: &Record| before.contains(record);
    let journal = open(&mount)?;
    let left = replay(&journal)?;
    anyhow::ensure!(left.iter().all(known) && left.is_sorted_by_key(|record| record.seq));
    let last = left.last().map_or(0, |record| record.seq);
    let next = journal.append(RecordKind::Outcome, b"next")?;
    anyhow::ensure!(next > last);
    drop(journal);
    let again = seqs(&replay(&open(&mount)?)?);
    anyhow::ensure!(again == [seqs(&left), vec![next]].concat());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_damage_is_survived(flips: Vec<(Index, Index)>, cut: Option<(Index, Index)>) {
        if let Err(error) = survive(&flips, cut) {
            prop_assert!(false, "{error:?}");
        }
    }
}
