//! Facts from the journal into the store, and with them the windows of what is leased.
//!
//! Owns the order: a window moves in the same step as the outcomes that move it, a range is handed
//! back only after its facts, and the journal is trimmed only behind what the store has. Must not
//! judge a fact.

mod ledger;
mod record;
mod recovery;
mod shipper;

pub use record::{Recorder, StartRecord};
pub use recovery::{Recovered, recover};
pub use shipper::{ShipCommand, ShipDeps, Shipper};
