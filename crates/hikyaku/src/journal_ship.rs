//! `hikyaku journal ship`: hands in what a node that is lost had seen and not told the store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use journal::{Disk as _, RealDisk, read_foreign};
use model::Fact;
use mta::ship::Recovered;
use service::clock::{Clock as _, SystemClock};
use service::config::Config;
use store::sqlite::Role;
use store::{Shipment, Store};

use crate::cli::{Failure, Terminal};
use crate::up::runtime;

/// Facts of one shipment.
const FACTS: usize = 1_000;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Hand in the journal of a node that is lost; may be repeated
    Ship(Args),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory of the journal, named ROLE-ID
    dir: PathBuf,
    /// The configuration; config/hikyaku.toml if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What a journal had.
#[derive(Debug, Default)]
struct Count {
    new: u64,
    known: u64,
    unknown: u64,
    unreadable: u64,
    duplicates: usize,
    in_flight: usize,
}

pub(crate) fn run(command: &Command, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let Command::Ship(arguments) = command;
    let config = Config::load(arguments.config.as_deref(), &terminal.environment)?;
    let count = runtime()?.block_on(async {
        let store = mta::daemon::open_store_as(&config.store, Role::Tool).await?;
        ship(&store, &arguments.dir).await
    })?;
    let Count {
        new,
        known,
        unknown,
        unreadable,
        duplicates,
        in_flight,
    } = count;
    writeln!(
        terminal.out,
        "{new} facts handed in, {known} were known already, {unknown} are about nobody the store knows, {unreadable} could not be read"
    )?;
    if duplicates > 0 {
        writeln!(
            terminal.out,
            "{duplicates} messages were delivered by another node too"
        )?;
    }
    if in_flight > 0 {
        writeln!(
            terminal.out,
            "{in_flight} messages were under way when it ended: they are retried as ambiguous"
        )?;
    }
    Ok(())
}

async fn ship(store: &Arc<dyn Store>, dir: &Path) -> anyhow::Result<Count> {
    let path = dir.to_owned();
    let opening = move || -> anyhow::Result<_> {
        let disk = Arc::new(RealDisk);
        let lock = disk
            .try_lock(&path.join("lock"))
            .with_context(|| path.display().to_string())?;
        let lock = lock.context("a process has this journal open: it ships it itself")?;
        Ok((lock, read_foreign(&path, disk)?))
    };
    let (_lock, foreign) = tokio::task::spawn_blocking(opening).await??;
    let mut records = foreign.records;
    let mut count = Count::default();
    let mut in_flight = Recovered::default();
    loop {
        let reading = tokio::task::spawn_blocking(move || {
            let some: Result<Vec<_>, _> = records.by_ref().take(FACTS).collect();
            (records, some)
        });
        let some;
        (records, some) = reading.await?;
        let some = some.context("the journal cannot be read")?;
        let Some(last) = some.last() else {
            break;
        };
        let through = last.seq;
        let mut facts = Vec::new();
        for record in &some {
            in_flight.learn(record);
            if record.kind == journal::RecordKind::Start {
                continue;
            }
            match Fact::from_bytes(&record.payload) {
                Ok(fact) => facts.push((record.seq, fact)),
                Err(_) => count.unreadable += 1,
            }
        }
        let handed = u64::try_from(facts.len()).unwrap_or(u64::MAX);
        let shipped = store
            .ship(Shipment {
                journal: foreign.id,
                facts,
                through,
                windows: Vec::new(),
                finished: Vec::new(),
                now: SystemClock.now(),
            })
            .await?;
        count.known += shipped.repeated;
        count.unknown += shipped.unknown;
        count.new += handed.saturating_sub(shipped.repeated + shipped.unknown);
        count.duplicates += shipped.duplicates.len();
    }
    count.in_flight = in_flight.len();
    Ok(count)
}
