//! The index map: where each index of a batch stands, in chunks.
//!
//! Must not write: `stage` does, once.

use super::ids::{self, BatchNo, MAP_CHUNK, MAP_ENTRY};
use crate::Result;
use model::{LotNumber, Place};
use rusqlite::{Connection, OptionalExtension as _};

/// Where an index stands; `None` when it was rejected or never given.
pub(super) fn place_of(
    connection: &Connection,
    batch: BatchNo,
    index: u32,
) -> Result<Option<Place>> {
    let found = chunk(connection, ids::map_id(batch, index))?;
    Ok(found.and_then(|chunk| place_in(&chunk, index)))
}

/// A chunk of the map.
pub(super) fn chunk(connection: &Connection, id: i64) -> Result<Option<Vec<u8>>> {
    let mut sql = connection.prepare_cached("SELECT data FROM index_map WHERE id=?1")?;
    Ok(sql.query_row([id], |row| row.get(0)).optional()?)
}

/// Where an index stands, in its chunk.
pub(super) fn place_in(chunk: &[u8], index: u32) -> Option<Place> {
    let at = usize::try_from(index % MAP_CHUNK).ok()? * MAP_ENTRY;
    read_place(chunk.get(at..at + MAP_ENTRY)?)
}

/// Reads an entry of the index map.
pub(super) fn read_place(entry: &[u8]) -> Option<Place> {
    match *entry {
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => None,
        [a, b, c, d, e, f] => Some(Place {
            lot: LotNumber(u32::from_le_bytes([a, b, c, d])),
            position: u16::from_le_bytes([e, f]),
        }),
        _ => None,
    }
}
