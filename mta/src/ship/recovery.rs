//! After a restart: what the journal knows of transactions that were in flight.

use std::collections::HashMap;
use std::io;

use journal::{Journal, Record, RecordKind};
use model::{Fact, MessageId, Seq};

use super::StartRecord;

/// What was begun and has no outcome: its final dot may have left.
#[derive(Debug, Default)]
pub struct Recovered {
    started: HashMap<(MessageId, u8), Seq>,
}

/// Reads all that the journal has on disk. Blocks.
///
/// # Errors
/// As the disk gives them: without the whole journal it is not known what was in flight.
pub fn recover(journal: &Journal) -> io::Result<Recovered> {
    let mut recovered = Recovered::default();
    for record in journal.replay(0) {
        recovered.learn(&record?);
    }
    Ok(recovered)
}

impl Recovered {
    /// Takes a record, in order.
    pub fn learn(&mut self, record: &Record) {
        match record.kind {
            RecordKind::Start => match StartRecord::from_bytes(&record.payload) {
                Some(StartRecord::Start {
                    message, number, ..
                }) => {
                    self.started.insert((message, number), record.seq);
                }
                Some(StartRecord::Void { message, number }) => {
                    self.started.remove(&(message, number));
                }
                None => tracing::warn!(seq = record.seq, "a start record cannot be read"),
            },
            RecordKind::Outcome => {
                if let Ok(Fact::Attempt(attempt)) = Fact::from_bytes(&record.payload) {
                    self.started.remove(&(attempt.message, attempt.number));
                }
            }
            RecordKind::Unsubscribe | RecordKind::Click | RecordKind::Open => {}
        }
    }

    /// Whether the attempt may have been under way.
    pub fn was_in_flight(&self, message: MessageId, number: u8) -> bool {
        self.started.contains_key(&(message, number))
    }

    /// The oldest start that has no outcome: the journal keeps it and all behind it.
    pub(super) fn oldest(&self) -> Option<Seq> {
        self.started.values().min().copied()
    }

    /// Forgets starts that nobody will report: another node has their recipients.
    pub fn keep_only(&mut self, mut is_ours: impl FnMut(MessageId, u8) -> bool) {
        self.started
            .retain(|(message, number), _| is_ours(*message, *number));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.started.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.started.is_empty()
    }
}
