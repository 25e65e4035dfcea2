//! `hikyaku store export` and `import`: a store as a file, to move it to another engine or to keep it.
//!
//! Owns the file: it gets its name when it is whole and synced. Must not know what is in it.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use service::clock::{Clock as _, SystemClock};
use service::config::Config;
use store::backup::{BackupReader, BackupWriter};
use store::sqlite::Role;
use store::{Piece, Store};
use tokio::sync::mpsc;

use crate::cli::{Failure, Terminal};
use crate::up::runtime;

/// Pieces on their way between store and file.
const PIECES: usize = 16;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Write the whole store into a file, while the service runs
    Export(Args),
    /// Fill an empty store from a file; what was not finished comes back paused
    Import(Args),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file
    file: PathBuf,
    /// The configuration; config/hikyaku.toml if it exists
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What went into a file or came out of it.
#[derive(Debug, Default, PartialEq)]
struct Count {
    batches: u64,
    recipients: u64,
    open: u64,
    events: usize,
}

impl Count {
    fn add(&mut self, piece: &Piece) {
        match piece {
            Piece::Batch(batch) => {
                self.batches += 1;
                self.recipients += batch.accepted;
                self.open += u64::from(batch.completed_at.is_none());
            }
            Piece::Events(events) => self.events += events.len(),
            Piece::Begin { .. }
            | Piece::Setting { .. }
            | Piece::Journal { .. }
            | Piece::Suppression(_)
            | Piece::Consent(_)
            | Piece::Suspension(_)
            | Piece::Note { .. }
            | Piece::Lot(_)
            | Piece::Call(_)
            | Piece::End { .. } => {}
        }
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            batches,
            recipients,
            open,
            events,
        } = self;
        write!(
            f,
            "{batches} batches of {recipients} recipients ({open} not finished), {events} events"
        )
    }
}

pub(crate) fn run(command: &Command, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let (Command::Export(arguments) | Command::Import(arguments)) = command;
    let config = Config::load(arguments.config.as_deref(), &terminal.environment)?;
    let runtime = runtime()?;
    let file = &arguments.file;
    match command {
        Command::Export(_) => {
            let count = runtime.block_on(export(&config, file))?;
            writeln!(terminal.out, "{}: {count}", file.display())?;
        }
        Command::Import(_) => {
            let count = runtime.block_on(import(&config, file))?;
            writeln!(terminal.out, "{count}")?;
            if count.open > 0 {
                writeln!(
                    terminal.out,
                    "What is not finished is paused: `POST /v1/batches/ID/resume` when nothing else sends it any more."
                )?;
            }
        }
    }
    Ok(())
}

async fn export(config: &Config, file: &Path) -> anyhow::Result<Count> {
    anyhow::ensure!(!file.exists(), "{} is there already", file.display());
    let store = mta::daemon::open_store_as(&config.store, Role::Tool).await?;
    let (to, pieces) = mpsc::channel(PIECES);
    let partial = partial(file);
    let at = partial.clone();
    let writing = tokio::task::spawn_blocking(move || write(&at, pieces));
    let given = store.export(to, SystemClock.now()).await;
    let written = writing.await.context("the file")?;
    let count = match given.map_err(anyhow::Error::from).and(written) {
        Ok(count) => count,
        Err(error) => {
            std::fs::remove_file(&partial).ok();
            return Err(error);
        }
    };
    let named = file.to_owned();
    let naming = move || -> std::io::Result<()> {
        std::fs::rename(&partial, &named)?;
        let directory = named.parent().filter(|of| !of.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    tokio::task::spawn_blocking(naming)
        .await?
        .with_context(|| file.display().to_string())?;
    Ok(count)
}

fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

fn write(path: &Path, mut pieces: mpsc::Receiver<Piece>) -> anyhow::Result<Count> {
    let file = private(path).with_context(|| path.display().to_string())?;
    let mut writer = BackupWriter::new(BufWriter::new(file))?;
    let mut count = Count::default();
    while let Some(piece) = pieces.blocking_recv() {
        count.add(&piece);
        writer.write(&piece)?;
    }
    let mut file = writer.finish()?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(count)
}

/// A new file that only its owner reads: everybody's address is in it.
fn private(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)
}

async fn import(config: &Config, file: &Path) -> anyhow::Result<Count> {
    let (to, mut pieces) = mpsc::channel(PIECES);
    let path = file.to_owned();
    let reading = tokio::task::spawn_blocking(move || read(&path, &to));
    let Some(begin) = pieces.recv().await else {
        reading.await??;
        anyhow::bail!("{} has nothing in it", file.display());
    };
    if let Piece::Begin { partitions, .. } = &begin {
        let configured = config.store.partitions;
        anyhow::ensure!(
            *partitions == configured,
            "it has {partitions} partitions: set store.partitions = {partitions} (now {configured})"
        );
    }
    config.make_data_dir()?;
    let store: Arc<dyn Store> = mta::daemon::open_store_as(&config.store, Role::Mta).await?;
    let mut count = Count::default();
    let mut next = Some(begin);
    while let Some(piece) = next {
        count.add(&piece);
        store.import(piece, SystemClock.now()).await?;
        next = pieces.recv().await;
    }
    reading.await??;
    Ok(count)
}

fn read(path: &Path, to: &mpsc::Sender<Piece>) -> anyhow::Result<()> {
    let named = || path.display().to_string();
    let file = File::open(path).with_context(named)?;
    let mut reader = BackupReader::new(BufReader::new(file)).with_context(named)?;
    // The last piece is given on when the file is known to be whole.
    let mut last = None;
    while let Some(piece) = reader.next_piece().with_context(named)? {
        if let Some(before) = last.replace(piece)
            && to.blocking_send(before).is_err()
        {
            // Whoever takes them says why.
            return Ok(());
        }
    }
    if let Some(last) = last {
        to.blocking_send(last).ok();
    }
    Ok(())
}
