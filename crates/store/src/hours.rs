//! Who of a batch may be written to at this hour of their day.
//!
//! Owns what becomes of those to whom the batch's window is shut: they wait in ranges of their own
//! until it opens. Must not know an engine, nor what a zone is: [`model::SendWindow`] does.

use crate::BatchHead;
use crate::form::Ref;
use crate::transition::Cell;
use model::{Row, Timestamp};
use std::collections::BTreeMap;

/// Recipients to whom the window is shut, in order, by the moment at which they are due again.
pub(crate) type Shut = BTreeMap<Timestamp, Vec<Ref>>;

/// When a recipient is due again that must not be written to now; none: it may be. Whose time is
/// over and who may have been written to already is let through, to be ended.
pub(crate) fn shut_until(
    head: &BatchHead,
    row: &Row,
    cell: Cell,
    now: Timestamp,
) -> Option<Timestamp> {
    let window = head.window.as_ref()?;
    if cell.maybe_started() || head.expires_at.is_some_and(|over| over <= now) {
        return None;
    }
    let opens_at = window.opens_at(row.time_zone.as_deref(), now);
    let due_at = head.expires_at.map_or(opens_at, |over| over.min(opens_at));
    (due_at > now).then_some(due_at)
}
