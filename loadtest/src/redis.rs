//! A `redis-server` for one measurement, and what it used: its one thread is what all nodes share.

use crate::process;
use anyhow::{Context as _, Result};
use std::path::Path;
use std::time::Duration;
use testkit::redis::RedisServer;

/// The name of the thread that takes every command.
const MAIN: &str = "redis-server";

/// What `docs/operations.md` advises: an append-only file that is synced every second, and not written
/// anew before it is worth it.
pub(crate) const SETTINGS: &[&str] = &[
    "--appendonly",
    "yes",
    "--appendfsync",
    "everysec",
    "--auto-aof-rewrite-min-size",
    "8gb",
];

/// A running server with these settings.
#[derive(Debug)]
pub struct Redis(RedisServer);

/// What it has used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// CPU time of the thread that takes commands.
    pub main: Duration,
    /// CPU time of all its threads.
    pub all: Duration,
    /// Commands, those within scripts included.
    pub commands: u64,
}

impl Used {
    /// What was used since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            main: self.main.saturating_sub(before.main),
            all: self.all.saturating_sub(before.all),
            commands: self.commands.saturating_sub(before.commands),
        }
    }
}

impl Redis {
    /// Starts one that keeps its file in a folder under `dir`.
    ///
    /// # Errors
    /// When there is none, or it does not answer.
    pub fn start(dir: &Path) -> Result<Self> {
        Ok(Self(RedisServer::start(dir.to_owned(), SETTINGS)?))
    }

    /// Its address, as in the configuration.
    pub fn url(&self) -> String {
        self.0.url()
    }

    /// What it has used so far.
    ///
    /// # Errors
    /// When it is gone.
    pub fn used(&self) -> Result<Used> {
        let usage = process::usage(self.0.pid().context("redis-server has ended")?)?;
        let stats = self.0.ask(&["INFO", "commandstats"])?;
        Ok(Used {
            main: usage.threads.get(MAIN).map_or(usage.cpu(), |of| of.cpu),
            all: usage.cpu(),
            commands: commands(&stats),
        })
    }
}

/// The sum of the calls in `INFO commandstats`.
fn commands(stats: &str) -> u64 {
    let calls = stats.lines().filter_map(|line| {
        let (_, values) = line.strip_prefix("cmdstat_")?.split_once(':')?;
        let calls = values.split(',').find_map(|one| one.strip_prefix("calls="));
        calls?.parse::<u64>().ok()
    });
    calls.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_added_up() {
        let stats = "# Commandstats\r\ncmdstat_eval:calls=3,usec=9,usec_per_call=3.00\r\n\
                     cmdstat_config|get:calls=4,usec=1\r\nnonsense\r\n";
        assert_eq!(commands(stats), 7);
    }
}
