//! Recipients between the end of their parsing and the end of the document.
//!
//! Owns the raw JSON of each recipient until the head, which may come last, is known: in memory up
//! to [`MEMORY`], then in an unlinked file under the data directory, so nothing is left behind by a
//! crash. Must not interpret a row. [`Spool::must_write`] and [`Spool::write`] are apart, since
//! writing blocks.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, Write as _};
use std::path::{Path, PathBuf};

use super::splitter::{Position, Rows};

/// Up to here a spool needs no file; beyond, as much is written at a time.
pub(crate) const MEMORY: usize = 1 << 20;

/// The largest recipient, in bytes of JSON. A larger one keeps its index and nothing else.
pub(crate) const ROW_MAX: usize = 64 << 10;

/// Length, offset and line before each row.
const HEADER: usize = 4 + 8 + 4;
const TOO_LARGE: u32 = u32::MAX;

/// Bytes read at a time.
const PIECE: u64 = 256 << 10;

/// The recipients of one document, in order.
#[derive(Debug)]
pub(crate) struct Spool {
    dir: PathBuf,
    file: Option<File>,
    pending: Vec<u8>,
    /// Where in `pending` the unfinished row's header stands.
    open: Option<usize>,
    oversize: bool,
    rows: u32,
}

impl Spool {
    /// An empty spool that would make its file in `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            file: None,
            pending: Vec::new(),
            open: None,
            oversize: false,
            rows: 0,
        }
    }

    /// Recipients so far, the unfinished one included.
    pub(crate) fn rows(&self) -> u32 {
        self.rows
    }

    /// Whether [`Spool::write`] is due.
    pub(crate) fn must_write(&self) -> bool {
        self.pending.len() >= MEMORY
    }

    /// Writes the finished rows to the file. Blocks.
    ///
    /// # Errors
    /// When the file cannot be made or written: the disk is full, mostly.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.dir)?),
        };
        let end = self.open.unwrap_or(self.pending.len());
        file.write_all(self.pending.get(..end).unwrap_or_default())?;
        self.pending.drain(..end);
        self.open = self.open.map(|_| 0);
        Ok(())
    }

    /// Goes back to the first recipient. Blocks.
    ///
    /// # Errors
    /// When the file cannot be written or read.
    pub(crate) fn read(mut self) -> io::Result<SpoolReader> {
        if self.file.is_some() {
            self.write()?;
        }
        let from: Box<dyn ReadAgain> = match self.file {
            None => Box::new(Cursor::new(self.pending)),
            Some(mut file) => {
                file.rewind()?;
                Box::new(file)
            }
        };
        Ok(SpoolReader {
            from,
            buffer: Vec::new(),
            read: 0,
            left: self.rows,
            rows: self.rows,
        })
    }

    fn patch_length(&mut self, at: usize, length: u32) {
        if let Some(header) = self.pending.get_mut(at..at + 4) {
            header.copy_from_slice(&length.to_le_bytes());
        }
    }
}

impl Rows for Spool {
    fn begin(&mut self, at: Position) {
        self.open = Some(self.pending.len());
        self.oversize = false;
        self.rows = self.rows.saturating_add(1);
        self.pending.extend_from_slice(&[0; 4]);
        self.pending.extend_from_slice(&at.offset.to_le_bytes());
        self.pending.extend_from_slice(&at.line.to_le_bytes());
    }

    fn push(&mut self, bytes: &[u8]) {
        let Some(open) = self.open else { return };
        let length = self.pending.len() - open - HEADER;
        if self.oversize || length + bytes.len() > ROW_MAX {
            self.oversize = true;
            self.pending.truncate(open + HEADER);
        } else {
            self.pending.extend_from_slice(bytes);
        }
    }

    fn end(&mut self) {
        let Some(open) = self.open.take() else { return };
        let length = self.pending.len() - open - HEADER;
        let length = if self.oversize {
            TOO_LARGE
        } else {
            u32::try_from(length).unwrap_or(TOO_LARGE)
        };
        self.patch_length(open, length);
    }
}

/// What can be read from its beginning as often as is wanted.
trait ReadAgain: Read + Seek + Send {}

impl<T: Read + Seek + Send> ReadAgain for T {}

/// Reads a spool.
pub(crate) struct SpoolReader {
    from: Box<dyn ReadAgain>,
    /// What was read and, from `read` on, not yet asked for.
    buffer: Vec<u8>,
    read: usize,
    left: u32,
    rows: u32,
}

impl std::fmt::Debug for SpoolReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpoolReader")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

/// One recipient as it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpooledRow<'s> {
    /// Where it began in the document.
    pub(crate) at: Position,
    /// Its JSON; none when it was larger than [`ROW_MAX`].
    pub(crate) json: Option<&'s [u8]>,
}

impl SpoolReader {
    /// How many recipients there are.
    pub(crate) fn rows(&self) -> u32 {
        self.rows
    }

    /// Goes back to the first recipient. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn rewind(&mut self) -> io::Result<()> {
        self.left = self.rows;
        self.buffer.clear();
        self.read = 0;
        self.from.rewind()
    }

    /// The next recipient. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn next_row(&mut self) -> io::Result<Option<SpooledRow<'_>>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        self.have(HEADER)?;
        let (length, at) = header(self.rest()).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.read += HEADER;
        if length == TOO_LARGE {
            return Ok(Some(SpooledRow { at, json: None }));
        }
        let length = usize::try_from(length).unwrap_or(ROW_MAX);
        self.have(length)?;
        let from = self.read;
        self.read += length;
        Ok(Some(SpooledRow {
            at,
            json: self.buffer.get(from..self.read),
        }))
    }

    fn rest(&self) -> &[u8] {
        self.buffer.get(self.read..).unwrap_or_default()
    }

    /// Reads on until there are so many bytes that were not asked for.
    fn have(&mut self, bytes: usize) -> io::Result<()> {
        if self.rest().len() >= bytes {
            return Ok(());
        }
        self.buffer.drain(..self.read);
        self.read = 0;
        while self.buffer.len() < bytes {
            let more = Read::take(&mut self.from, PIECE).read_to_end(&mut self.buffer)?;
            if more == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

/// Length and place, of the bytes before a row.
fn header(bytes: &[u8]) -> Option<(u32, Position)> {
    let (length, rest) = bytes.split_first_chunk()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let line = rest.first_chunk()?;
    let at = Position {
        offset: u64::from_le_bytes(*offset),
        line: u32::from_le_bytes(*line),
    };
    Some((u32::from_le_bytes(*length), at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(spool: &mut Spool, rows: u32) {
        for n in 0..rows {
            spool.begin(Position {
                offset: u64::from(n),
                line: n,
            });
            spool.push(format!("row {n} ").as_bytes());
            // In the middle of a row: only the finished ones may leave.
            if spool.must_write() {
                spool.write().expect("room");
            }
            if n % 1000 == 7 {
                spool.push(&vec![b'x'; ROW_MAX]);
            }
            spool.push(b"end");
            spool.end();
        }
    }

    fn check(spool: Spool, rows: u32) {
        let mut reader = spool.read().expect("rewound");
        for n in 0..rows {
            let row = reader.next_row().expect("readable").expect("there");
            assert_eq!(
                row.at,
                Position {
                    offset: u64::from(n),
                    line: n
                }
            );
            let expected = format!("row {n} end");
            assert_eq!(row.json, (n % 1000 != 7).then_some(expected.as_bytes()));
        }
        assert_eq!(reader.next_row().expect("readable"), None);
    }

    #[test]
    fn few_rows_stay_in_memory_and_many_go_to_a_file_that_has_no_name() {
        let dir = tempfile::tempdir().expect("a directory");
        for rows in [0, 10, 100_000] {
            let mut spool = Spool::new(dir.path());
            fill(&mut spool, rows);
            assert!(spool.pending.len() <= MEMORY + ROW_MAX + HEADER);
            assert_eq!(spool.file.is_some(), rows == 100_000);
            assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0);
            check(spool, rows);
        }
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_an_error_not_a_loss() {
        let mut spool = Spool::new(Path::new("/nonexistent"));
        fill(&mut spool, 10);
        assert!(spool.write().is_err());
    }
}
