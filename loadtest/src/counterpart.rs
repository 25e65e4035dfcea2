//! A part of the load test in a process of its own, so that its CPU time is not ours.
//!
//! Such a child prints where it listens as its first line of JSON, ends when its standard input
//! does, and prints its totals as the last line. So it does not outlive us, however we end.

use crate::process::Guarded;
use crate::sink::{Line, Manner, Total};
use anyhow::{Context as _, Result, bail};
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// A running child.
#[derive(Debug)]
pub struct Counterpart {
    process: Guarded,
    output: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Counterpart {
    /// Starts this program's `COMMAND` on any port.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start(command: &'static str) -> Result<Self> {
        Self::start_of(&std::env::current_exe()?, command, &[]).await
    }

    /// Starts this program's sink on any port.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn sink(manner: &Manner) -> Result<Self> {
        Self::start_of(&std::env::current_exe()?, "sink", &manner.arguments()).await
    }

    /// The same; it ends of itself after so many messages.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn sink_of(manner: &Manner, messages: u64) -> Result<Self> {
        let mut arguments = manner.arguments();
        arguments.extend(["--messages".to_owned(), messages.to_string()]);
        Self::start_of(&std::env::current_exe()?, "sink", &arguments).await
    }

    /// Starts `PROGRAM COMMAND MORE` on any port.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_of(program: &Path, command: &'static str, more: &[String]) -> Result<Self> {
        let child = Command::new(program)
            .args([
                command,
                "--listen",
                "127.0.0.1:0",
                "--json",
                "--until-stdin-ends",
            ])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start loadtest {command}"))?;
        let mut process = Guarded::new(command, child);
        let output = process.child().stdout.take().context("no pipe")?;
        let first = tokio::time::timeout(PATIENCE, next_line(BufReader::new(output)));
        let (output, line) = first.await.context("a child says nothing")??;
        let Line::Listening(addresses) = line else {
            bail!("loadtest {command} began with {line:?}");
        };
        let address = *addresses.first().context("no address")?;
        Ok(Self {
            process,
            output,
            address,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it, and gives what it counted.
    ///
    /// # Errors
    /// When it does not end well.
    pub async fn stop(mut self) -> Result<Total> {
        drop(self.process.child().stdin.take());
        let total = tokio::time::timeout(PATIENCE, self.total());
        total.await.context("a child does not end")?
    }

    /// What it counted, once it has ended of itself: for one that was told how much is enough.
    ///
    /// # Errors
    /// When it does not end well.
    pub async fn total(mut self) -> Result<Total> {
        let (_, line) = next_line(self.output).await?;
        self.process.ended(PATIENCE).await?;
        match line {
            Line::Total(total) => Ok(total),
            Line::Listening(_) | Line::Second(_) => bail!("no totals but {line:?}"),
        }
    }
}

/// The next line, read where it may block.
async fn next_line(mut from: BufReader<ChildStdout>) -> Result<(BufReader<ChildStdout>, Line)> {
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        from.read_line(&mut text).map(|_| (from, text))
    });
    let (from, text) = read.await.context("the reader died")??;
    let line = serde_json::from_str(&text).with_context(|| format!("a child said {text:?}"))?;
    Ok((from, line))
}
