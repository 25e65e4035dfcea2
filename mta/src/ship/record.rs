//! Facts on their way into the journal: outcomes, and the starts before them.

use std::sync::Arc;

use journal::{AppendError, Journal, RecordKind, WriteError};
use model::{Attempt, AttemptResult, Fact, MessageId, Place, Seq, Status, Timestamp};
use serde::{Deserialize, Serialize};
use service::metrics::{DuplicateCause, Label as _, Metrics};
use tokio_util::sync::CancellationToken;

use crate::queue::job::Item;

/// The first byte of a stored start record.
const FORM: u8 = 1;

/// What the journal keeps of a transaction before its final dot leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartRecord {
    /// The dot is about to leave.
    Start {
        /// Of which message.
        message: MessageId,
        /// Where its recipient stands.
        place: Place,
        /// Which attempt.
        number: u8,
    },
    /// It did not: the connection was lost before.
    Void {
        /// Of which message.
        message: MessageId,
        /// Which attempt.
        number: u8,
    },
}

impl StartRecord {
    fn to_bytes(self) -> Vec<u8> {
        // A Vec grows and these types have no failing serializer: there is no error to have.
        postcard::to_extend(&self, vec![FORM]).unwrap_or_default()
    }

    /// Reads a stored record; `None` when it is damaged or of another form.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first() {
            Some((&FORM, rest)) => postcard::from_bytes(rest).ok(),
            Some(_) | None => None,
        }
    }
}

/// Appends facts to the journal, counts and logs them: one place for all three.
#[derive(Debug)]
pub struct Recorder {
    journal: Journal,
    metrics: Arc<Metrics>,
    fatal: CancellationToken,
}

impl Recorder {
    /// A recorder into `journal`. `fatal` is cancelled when an outcome could not be kept, after
    /// which nothing more may be sent.
    pub fn new(journal: Journal, metrics: Arc<Metrics>, fatal: CancellationToken) -> Self {
        Self {
            journal,
            metrics,
            fatal,
        }
    }

    /// Notes that the final dot of a message is about to leave.
    ///
    /// # Errors
    /// The journal has no room, or failed: do not send.
    pub fn start(&self, item: &Item) -> Result<Seq, AppendError> {
        let record = StartRecord::Start {
            message: item.message(),
            place: item.place,
            number: item.attempt,
        };
        self.journal.append(RecordKind::Start, &record.to_bytes())
    }

    /// Takes a start back: the dot did not leave.
    pub fn void(&self, item: &Item) {
        let record = StartRecord::Void {
            message: item.message(),
            number: item.attempt,
        };
        // Lost, it only makes a later start more careful.
        if let Err(error) = self.journal.append(RecordKind::Start, &record.to_bytes()) {
            tracing::debug!(%error, message_id = %item.message(), "start not taken back");
        }
    }

    /// Keeps what an attempt came to.
    pub fn outcome(&self, attempt: Attempt, released_at: Timestamp) {
        self.measure(&attempt, released_at);
        let bytes = Fact::Attempt(Box::new(attempt)).write_to(Vec::with_capacity(256));
        if let Err(error) = self.journal.append(RecordKind::Outcome, &bytes) {
            tracing::error!(%error, "an outcome could not be kept, sending ends");
            self.fatal.cancel();
        }
    }

    /// A message of which a former copy may have arrived was delivered, or may have been.
    pub fn maybe_duplicate(&self, message: MessageId) {
        let cause = DuplicateCause::ReplyLost;
        tracing::warn!(message_id = %message, cause = cause.text(), "may be delivered twice: a former copy may have arrived");
        self.metrics.duplicates.at(cause).inc();
    }

    /// Whether the journal has room for what a transaction leaves.
    pub fn has_room(&self) -> bool {
        self.journal.has_room()
    }

    /// Returns when everything through `seq` is with the operating system.
    ///
    /// # Errors
    /// See [`WriteError`]; do not send.
    pub async fn written(&self, seq: Seq) -> Result<(), WriteError> {
        self.journal.written(seq).await
    }

    fn measure(&self, attempt: &Attempt, released_at: Timestamp) {
        let detail = &attempt.detail;
        let outcome = outcome_of(attempt.result);
        let class = detail.class.map_or("", |class| class.as_str());
        let destination = self.metrics.destination(&detail.destination);
        self.metrics
            .outcomes(outcome.as_str(), class, &destination)
            .inc();
        if attempt.result == AttemptResult::Delivered {
            self.metrics
                .delivery_age_seconds
                .observe(attempt.at.since(released_at).as_secs_f64());
        }
        tracing::debug!(
            message_id = %attempt.message, batch = %attempt.message.batch, attempt = attempt.number, outcome = outcome.as_str(), class,
            destination = %detail.destination, host = %detail.host, reply = %detail.reply, "attempt"
        );
    }
}

fn outcome_of(result: AttemptResult) -> Status {
    match result {
        AttemptResult::Delivered => Status::Delivered,
        AttemptResult::TemporaryError { .. } => Status::TemporaryError,
        AttemptResult::Bounce => Status::Bounce,
        AttemptResult::Failed => Status::Failed,
        AttemptResult::Suppressed(_) => Status::Suppressed,
        AttemptResult::Cancelled => Status::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{BatchId, LotNumber};
    use proptest::prelude::*;

    #[test]
    fn a_start_reads_back() {
        let message = MessageId {
            batch: BatchId::from_bytes([3; 16]),
            index: 7,
        };
        let start = StartRecord::Start {
            message,
            place: Place {
                lot: LotNumber(1),
                position: 2,
            },
            number: 3,
        };
        for record in [start, StartRecord::Void { message, number: 3 }] {
            assert_eq!(StartRecord::from_bytes(&record.to_bytes()), Some(record));
        }
        assert_eq!(StartRecord::from_bytes(&[9, 1]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _read = StartRecord::from_bytes(&bytes);
            let _read = StartRecord::from_bytes(&[&[FORM], bytes.as_slice()].concat());
        }
    }
}
