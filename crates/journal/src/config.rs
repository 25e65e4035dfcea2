//! What a journal is opened with, and why it may not open.

use model::JournalId;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How a journal is kept.
#[derive(Debug, Clone)]
pub struct JournalConfig {
    /// The directory that holds the journals of all nodes of this machine.
    pub dir: PathBuf,
    /// `mta` or `tracker`: lower-case letters, the first half of the directory's name.
    pub role: String,
    /// The identity to take if no journal of this role is free here. The caller makes it, as the
    /// journal has neither clock nor random source.
    pub fresh_id: JournalId,
    /// What names this run of the machine, other after each start of it; `None`: nobody knows.
    pub boot: Option<String>,
    /// The longest time from an append to the start of its sync; `None`: only when asked.
    pub sync_interval: Option<Duration>,
    /// The most that the segment files hold together, in bytes; at least 64 KiB is taken.
    pub max_bytes: u64,
    /// Size at which a segment file is followed by the next; at most a sixteenth of `max_bytes`
    /// is taken, so that shedding drops little at a time.
    pub segment_bytes: u64,
    /// How long records are kept after [`crate::Journal::shipped`], for a store that forgets.
    pub retain: Duration,
    /// The most memory for records that are written and not yet shipped, in bytes of payload; what
    /// is beyond is read from disk.
    pub tail_bytes: usize,
}

impl JournalConfig {
    /// The defaults: sync after 20 ms, 8 GiB in segments of 16 MiB, nothing retained, 8 MiB of
    /// memory.
    pub fn new(dir: impl Into<PathBuf>, role: impl Into<String>, fresh_id: JournalId) -> Self {
        Self {
            dir: dir.into(),
            role: role.into(),
            fresh_id,
            boot: None,
            sync_interval: Some(Duration::from_millis(20)),
            max_bytes: 8 << 30,
            segment_bytes: 16 << 20,
            retain: Duration::ZERO,
            tail_bytes: 8 << 20,
        }
    }

    pub(crate) fn max_bytes(&self) -> u64 {
        self.max_bytes.max(64 << 10)
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment_bytes.min(self.max_bytes() / 16)
    }
}

/// Why a journal did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The role is empty or has other characters than a to z.
    #[error("a journal's role is lower-case letters, not {0:?}")]
    Role(String),
    /// The disk refused something.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// A segment of a later version of this program. Nothing was changed.
    #[error("{path} has format version {version}, which this program does not know")]
    Version {
        /// The segment.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
    /// The directory is not named `ROLE-ID`.
    #[error("{0} is not a journal's directory")]
    NotAJournal(PathBuf),
}

/// Says in an error what was being done.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str, path: &std::path::Path) -> Result<T, OpenError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: &std::path::Path) -> Result<T, OpenError> {
        self.map_err(|source| OpenError::Io {
            doing,
            path: path.to_owned(),
            source,
        })
    }
}
