//! Every operation of the disk fails once, and for good; then the process is killed or the power
//! goes; and every record that was claimed is accounted for.

use crate::{KINDS, config, now, open};
use anyhow::{Context as _, Result, ensure};
use journal::fault::{Fault, FaultDisk};
use journal::{AppendError, Journal, JournalConfig, RecordKind, WriteError};
use std::collections::BTreeMap;
use std::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crash {
    Kill,
    PowerCut,
}

/// What was claimed of a journal, over all its lives.
#[derive(Debug)]
struct Witness {
    disk: FaultDisk,
    /// What it appends: everything, or with an odd seed what the MTA does.
    kinds: &'static [RecordKind],
    rng: fastrand::Rng,
    now: Instant,
    truth: BTreeMap<u64, (RecordKind, Vec<u8>)>,
    written: u64,
    synced: u64,
    /// The last record that was given out for shipping.
    given: u64,
    shipped: u64,
    dropped: u64,
}

impl Witness {
    fn new(seed: u64) -> Self {
        Self {
            disk: FaultDisk::new(seed),
            kinds: if seed.is_multiple_of(2) {
                &KINDS
            } else {
                &KINDS[..2]
            },
            rng: fastrand::Rng::with_seed(seed),
            now: now(),
            truth: BTreeMap::new(),
            written: 0,
            synced: 0,
            given: 0,
            shipped: 0,
            dropped: 0,
        }
    }

    /// Uses the journal for a while, noting what it claims; ends early when it fails.
    fn live(&mut self, journal: &Journal, steps: usize) -> Result<()> {
        for _ in 0..steps {
            let going_on = match self.rng.u8(..22) {
                0..12 => self.append(journal)?,
                12..16 => !matches!(journal.write(), Err(WriteError::Poisoned(_))),
                16..18 => !matches!(journal.sync(), Err(WriteError::Poisoned(_))),
                18..20 => self.read(journal)?,
                _ => {
                    // Mostly all that was given, as the one who ships does.
                    if self.rng.u8(..4) > 0 {
                        self.shipped = self.given.max(self.shipped);
                    } else {
                        self.shipped = self.rng.u64(self.shipped..=self.given.max(self.shipped));
                    }
                    journal.shipped(self.shipped, self.now);
                    true
                }
            };
            self.note(journal);
            if !going_on {
                return self.is_poisoned(journal);
            }
        }
        Ok(())
    }

    fn note(&mut self, journal: &Journal) {
        self.written = journal.written_through();
        self.synced = journal.synced_through();
        let unshipped = self.truth.range(self.shipped..).count() as u64;
        assert!(
            journal.pending_records() <= unshipped + 100,
            "{} of {unshipped}",
            journal.pending_records()
        );
        self.dropped = KINDS.iter().map(|kind| journal.dropped(*kind)).sum();
    }

    fn append(&mut self, journal: &Journal) -> Result<bool> {
        for _ in 0..self.rng.usize(1..4) {
            let kind = self.kinds[self.rng.usize(..self.kinds.len())];
            let size = self.rng.usize(..200);
            let payload: Vec<u8> = std::iter::repeat_with(|| self.rng.u8(..))
                .take(size)
                .collect();
            match journal.append(kind, &payload) {
                Ok(seq) => {
                    ensure!(
                        seq > self.synced.max(self.given).max(self.shipped),
                        "{seq} twice"
                    );
                    self.truth.insert(seq, (kind, payload));
                }
                Err(AppendError::Full) => {}
                Err(AppendError::Poisoned(_)) => return Ok(false),
                Err(error @ AppendError::TooLarge) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn read(&mut self, journal: &Journal) -> Result<bool> {
        // The disk may fail to read; that poisons nothing.
        if let Ok(pending) = journal.read_pending(self.given.max(self.shipped), 20) {
            for record in &pending.records {
                ensure!(
                    record.seq <= self.synced,
                    "{} was given unsynced",
                    record.seq
                );
                self.recognise(record)?;
            }
            self.given = self.given.max(pending.through);
        }
        Ok(true)
    }

    fn recognise(&self, record: &journal::Record) -> Result<()> {
        let (kind, payload) = self
            .truth
            .get(&record.seq)
            .with_context(|| format!("{} is unknown", record.seq))?;
        ensure!(
            *kind == record.kind && *payload == record.payload,
            "{} differs",
            record.seq
        );
        Ok(())
    }

    fn is_poisoned(&self, journal: &Journal) -> Result<()> {
        ensure!(matches!(
            journal.append(RecordKind::Open, b"x"),
            Err(AppendError::Poisoned(_))
        ));
        ensure!(matches!(journal.write(), Err(WriteError::Poisoned(_))));
        ensure!(matches!(journal.sync(), Err(WriteError::Poisoned(_))));
        ensure!(
            journal.synced_through() == self.synced,
            "synced after a failure"
        );
        ensure!(!journal.has_room());
        Ok(())
    }

    fn crash(&mut self, crash: Crash) {
        match crash {
            Crash::Kill => self.disk.kill(),
            Crash::PowerCut => self.disk.power_cut(),
        }
    }

    /// Checks that a journal opened after `crash` has all that was claimed.
    fn account(&mut self, journal: &Journal, crash: Crash) -> Result<()> {
        let claimed = if crash == Crash::Kill {
            self.written
        } else {
            self.synced
        };
        let mut last = 0;
        let mut found = BTreeMap::new();
        for record in journal.replay(0) {
            let record = record?;
            ensure!(record.seq > last, "{} after {last}", record.seq);
            last = record.seq;
            self.recognise(&record)?;
            found.insert(record.seq, (record.kind, record.payload.to_vec()));
        }
        let mut missing = 0;
        for (seq, (kind, _)) in self.truth.range(..=claimed) {
            if *seq > self.shipped && !found.contains_key(seq) {
                missing += 1;
                ensure!(
                    matches!(kind, RecordKind::Open | RecordKind::Click),
                    "{kind} {seq} lost"
                );
            }
        }
        ensure!(
            missing <= self.dropped,
            "{missing} lost, {} dropped",
            self.dropped
        );
        ensure!(journal.synced_through() >= claimed, "numbers go back");
        // What was lost unclaimed may have its number used again; what was shed is gone for good.
        self.truth
            .retain(|seq, _| *seq <= self.shipped || found.contains_key(seq));
        (self.written, self.synced) = (journal.written_through(), journal.synced_through());
        journal.resume(self.shipped, self.now);
        Ok(())
    }
}

/// One life in which operation `n` fails, a crash, and the reckoning. Says whether it came to the
/// failure.
fn one(seed: u64, n: u64, fault: Fault, for_good: bool, crash: Crash) -> Result<bool> {
    let mut witness = Witness::new(seed);
    witness.disk.fail_at(n, fault, for_good);
    let mount = witness.disk.mount();
    let came;
    match open(&mount) {
        Ok(journal) => {
            witness.live(&journal, 60)?;
            came = witness.disk.heal();
            witness.crash(crash);
        }
        Err(_) => {
            came = witness.disk.heal();
            witness.crash(crash);
        }
    }
    let journal = open(&witness.disk.mount()).context("after the crash")?;
    witness
        .account(&journal, crash)
        .context("after the crash")?;
    // And it works on.
    witness.live(&journal, 20)?;
    journal.sync()?;
    witness.note(&journal);
    witness.crash(Crash::PowerCut);
    drop(journal);
    let journal = open(&witness.disk.mount())?;
    witness
        .account(&journal, Crash::PowerCut)
        .context("after another crash")?;
    Ok(came)
}

#[test]
fn each_operation_fails_in_turn_and_nothing_claimed_is_lost() -> Result<()> {
    for crash in [Crash::Kill, Crash::PowerCut] {
        for for_good in [false, true] {
            for fault in [Fault::Io, Fault::NoSpace] {
                for seed in 0..3 {
                    let mut n = 1;
                    let what = |n: u64| {
                        format!("{crash:?} {fault:?} for_good={for_good} seed={seed} n={n}")
                    };
                    while one(seed, n, fault, for_good, crash).with_context(|| what(n))? {
                        n += 1;
                    }
                    assert!(
                        n > 40,
                        "the life is too short to mean anything: {}",
                        what(n)
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn each_operation_of_the_recovery_fails_in_turn() -> Result<()> {
    for crash in [Crash::Kill, Crash::PowerCut] {
        for seed in 0..5 {
            let mut n = 1;
            loop {
                let mut witness = Witness::new(seed);
                witness.live(&open(&witness.disk.mount())?, 150)?;
                witness.crash(crash);
                witness.disk.fail_at(n, Fault::Io, false);
                drop(open(&witness.disk.mount()));
                if !witness.disk.heal() {
                    break;
                }
                // The recovery was cut short as well: what had survived the first crash still has.
                witness.crash(Crash::PowerCut);
                let what = || format!("{crash:?} seed={seed} n={n}");
                let journal = open(&witness.disk.mount()).with_context(what)?;
                // Bytes that only survived a kill are lost to a power cut before they are synced.
                witness
                    .account(&journal, Crash::PowerCut)
                    .with_context(what)?;
                n += 1;
            }
            assert!(n > 10, "seed {seed}: only {n} operations");
        }
    }
    Ok(())
}

#[test]
fn many_lives_with_faults_and_crashes_at_random() -> Result<()> {
    for seed in 100..160 {
        let mut witness = Witness::new(seed);
        for life in 0..12 {
            let crash = if witness.rng.bool() {
                Crash::Kill
            } else {
                Crash::PowerCut
            };
            let what = || format!("seed {seed}, life {life}, {crash:?}");
            let journal = open(&witness.disk.mount()).with_context(what)?;
            if witness.rng.bool() {
                let fault = if witness.rng.bool() {
                    Fault::Io
                } else {
                    Fault::NoSpace
                };
                let (n, for_good) = (witness.rng.u64(1..80), witness.rng.bool());
                witness.disk.fail_at(n, fault, for_good);
            }
            let steps = witness.rng.usize(..150);
            witness.live(&journal, steps).with_context(what)?;
            witness.crash(crash);
            drop(journal);
            let journal = open(&witness.disk.mount()).with_context(what)?;
            witness.account(&journal, crash).with_context(what)?;
            witness.crash(Crash::Kill);
        }
    }
    Ok(())
}

#[test]
fn a_failed_sync_is_not_believed_after_a_restart_either() -> Result<()> {
    let disk = FaultDisk::new(1);
    let journal = open(&disk.mount())?;
    journal.append(RecordKind::Outcome, b"first")?;
    journal.sync()?;
    journal.append(RecordKind::Outcome, b"second")?;
    journal.write()?;
    disk.fail_at(1, Fault::Io, false);
    assert!(journal.sync().is_err());
    disk.kill();
    // The bytes are in the page cache, marked clean. The new process reads and believes them, so
    // it must have made them dirty again before its sync.
    let journal = open(&disk.mount())?;
    assert_eq!(journal.synced_through(), 2);
    disk.power_cut();
    let journal = open(&disk.mount())?;
    assert_eq!(crate::replay(&journal)?.len(), 2);
    Ok(())
}

#[test]
fn a_new_file_counts_only_with_its_name() -> Result<()> {
    for seed in 0..50 {
        let disk = FaultDisk::new(seed);
        let journal = Journal::open(
            &JournalConfig {
                segment_bytes: 1,
                ..config()
            },
            disk.mount(),
        )?;
        for _ in 0..5 {
            journal.append(RecordKind::Outcome, b"each in a file of its own")?;
            journal.sync()?;
        }
        disk.power_cut();
        assert_eq!(
            crate::replay(&open(&disk.mount())?)?.len(),
            5,
            "seed {seed}"
        );
    }
    Ok(())
}
