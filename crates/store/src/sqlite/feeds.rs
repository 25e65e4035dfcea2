//! Places in the feeds, and whether there is something after them.
//!
//! Must not read what is there: `control` and `events` do.

use super::writer::Written;
use super::{events, ids};
use crate::{FeedPlace, Result};
use rusqlite::Connection;

/// A place in a feed of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// After this item.
    Control(i64),
    /// After the event of this sequence number.
    Events(i64),
}

impl Place {
    /// The place in this file; `None` when there is no such place.
    pub(super) fn of(place: FeedPlace<'_>) -> Option<Self> {
        match place {
            FeedPlace::Control(cursor) => {
                let item = cursor.0.first()?;
                Some(Self::Control(ids::int(*item)))
            }
            FeedPlace::Events(cursor) => events::read_cursor(cursor).ok().map(Self::Events),
        }
    }

    /// Whether this process wrote to the feed meanwhile.
    pub(super) const fn moved(self, before: Written, now: Written) -> bool {
        match self {
            Self::Control(_) => now.control != before.control,
            Self::Events(_) => now.events != before.events,
        }
    }
}

/// Whether the feed does not end at the place. One that ends before it is of another time:
/// reading tells.
pub(super) fn is_ahead(connection: &Connection, place: Place) -> Result<bool> {
    Ok(match place {
        Place::Control(after) => last(connection, Feed::Control)? != after,
        Place::Events(after) => events::end(connection)? != after,
    })
}

/// The feeds, each a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feed {
    Control,
    Events,
}

/// The highest number ever given in a feed, 0 when there is none; trimming does not lower it.
pub(super) fn last(connection: &Connection, feed: Feed) -> Result<i64> {
    let table = match feed {
        Feed::Control => "control",
        Feed::Events => "event",
    };
    let mut sql = connection
        .prepare_cached("SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name=?1), 0)")?;
    Ok(sql.query_row([table], |row| row.get(0))?)
}
