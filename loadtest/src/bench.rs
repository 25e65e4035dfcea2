//! What every measurement is told of itself: where it keeps its folder, what it starts, how it prints.

use crate::site;
use anyhow::Result;
use std::path::PathBuf;

/// Where and with what; see the module.
#[derive(Debug, Clone, clap::Args)]
pub struct Bench {
    /// Make the service's folder in here: on a real disk, or syncs cost nothing [default: the
    /// system's place for temporary files]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// The executable [default: hikyaku, beside this one]
    #[arg(long)]
    pub program: Option<PathBuf>,
    /// Print tables as Markdown
    #[arg(long)]
    pub markdown: bool,
}

impl Bench {
    /// The folder above that of the service.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(std::env::temp_dir)
    }

    /// The executable.
    ///
    /// # Errors
    /// When none is named and there is none beside this one.
    pub fn program(&self) -> Result<PathBuf> {
        match &self.program {
            Some(program) => Ok(program.clone()),
            None => site::beside_us("hikyaku"),
        }
    }
}
