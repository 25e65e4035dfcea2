//! Real processes on a real file system.

use anyhow::{Context as _, Result, ensure};
use journal::{Journal, JournalConfig, RealDisk, RecordKind};
use model::JournalId;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

const DIR: &str = "HIKYAKU_TEST_JOURNAL_DIR";

fn open(dir: &Path) -> Result<Journal> {
    let config = JournalConfig {
        segment_bytes: 64 << 10,
        ..JournalConfig::new(dir, "mta", JournalId::from_bytes([8; 16]))
    };
    Ok(Journal::open(&config, Arc::new(RealDisk))?)
}

fn payload(seq: u64) -> Vec<u8> {
    seq.to_be_bytes()
        .repeat(1 + usize::try_from(seq % 40).unwrap_or(0))
}

/// Not a test: the process that the tests kill. Says the number of each record after it is
/// written.
#[test]
fn child() -> Result<()> {
    let Some(dir) = std::env::var_os(DIR) else {
        return Ok(());
    };
    let journal = open(&PathBuf::from(dir))?;
    let mut stdout = std::io::stdout().lock();
    // The number of the next record is known, as nobody else appends.
    let mut seq = journal.synced_through();
    writeln!(stdout, "open {}", journal.id())?;
    loop {
        for _ in 0..=seq % 5 {
            seq += 1;
            let kind = if seq.is_multiple_of(3) {
                RecordKind::Click
            } else {
                RecordKind::Outcome
            };
            ensure!(journal.append(kind, &payload(seq))? == seq);
        }
        journal.write()?;
        writeln!(stdout, "written {seq}")?;
        stdout.flush()?;
    }
}

fn start(dir: &Path) -> Result<Child> {
    let me = std::env::current_exe()?;
    Command::new(me)
        .args(["--exact", "kill::child", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the child")
}

#[test]
fn a_killed_process_loses_nothing_that_it_said_was_written() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut rng = fastrand::Rng::with_seed(3);
    let (mut said, mut gaps) = (0, BTreeSet::new());
    for life in 0..8 {
        let mut child = start(dir.path())?;
        let lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
        let enough = said + rng.u64(1..3000);
        let mut killed = false;
        for line in lines {
            // The last line may be cut by the kill.
            let Some(seq) = line?
                .strip_prefix("written ")
                .and_then(|seq| seq.parse::<u64>().ok())
            else {
                continue;
            };
            said = seq;
            if said >= enough && !killed {
                child.kill()?;
                killed = true;
            }
        }
        child.wait()?;
        ensure!(killed, "the child ended by itself");
        let journal = open(dir.path())?;
        let mut found = BTreeMap::new();
        for record in journal.replay(0) {
            let record = record?;
            ensure!(
                record.payload == payload(record.seq),
                "life {life}: {} differs",
                record.seq
            );
            found.insert(record.seq, record.kind);
        }
        // The kill may fall between the writes to two chains. What such a gap held was not said
        // to be written.
        for seq in (1..=journal.synced_through()).filter(|seq| !found.contains_key(seq)) {
            ensure!(
                seq > said || gaps.contains(&seq),
                "life {life}: {seq} of {said} is lost"
            );
            gaps.insert(seq);
        }
        ensure!(
            journal.synced_through() >= said,
            "life {life}: lost what was written"
        );
    }
    Ok(())
}

#[test]
fn another_process_takes_another_journal() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ours = open(dir.path())?;
    let mut child = start(dir.path())?;
    let mut lines = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    let theirs = loop {
        let line = lines.next().context("a line")??;
        if let Some(id) = line.split("open ").nth(1) {
            break id.parse::<JournalId>()?;
        }
    };
    child.kill()?;
    child.wait()?;
    ensure!(ours.id() != theirs);
    // The kernel freed the lock of the dead process.
    drop(ours);
    let ids = [open(dir.path())?, open(dir.path())?].map(|journal| journal.id());
    ensure!(ids.len() == 2 && ids.contains(&theirs), "{ids:?}");
    Ok(())
}

#[test]
fn files_are_for_their_owner_alone() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir()?;
    let journal = open(dir.path())?;
    journal.append(RecordKind::Outcome, b"someone@example.com")?;
    journal.sync()?;
    let mut seen = 0;
    for entry in std::fs::read_dir(journal.dir())? {
        let mode = entry?.metadata()?.permissions().mode();
        ensure!(mode & 0o077 == 0, "{mode:o}");
        seen += 1;
    }
    ensure!(seen == 2, "a lock and a segment");
    Ok(())
}
