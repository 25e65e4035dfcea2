//! How many links the mail of a batch has: who follows all of them reads no mail.
//!
//! Learned from the content, once for each batch that is clicked in while it is remembered.

use std::collections::{HashMap, VecDeque};

use content::Content;
use model::BatchId;
use service::tasks::blocking;
use store::{Store, StoreError};

use crate::released::Released;

/// Batches that are remembered.
const BATCHES: usize = 512;

/// What is known of batches.
#[derive(Debug, Default)]
pub(super) struct Links {
    by_batch: HashMap<BatchId, Option<u16>>,
    /// Oldest first.
    order: VecDeque<BatchId>,
}

impl Links {
    /// How many links each mail of the batch has; `None`: that is not known, or not the same for
    /// all.
    pub(super) fn of(&self, batch: BatchId) -> Option<u16> {
        self.by_batch.get(&batch).copied().flatten()
    }

    /// Reads the content of a batch unless it is known.
    ///
    /// # Errors
    /// When the store does not answer.
    pub(super) async fn learn(
        &mut self,
        store: &dyn Store,
        batch: BatchId,
    ) -> Result<(), StoreError> {
        if self.by_batch.contains_key(&batch) {
            return Ok(());
        }
        // Retention may have taken it; then nobody knows any more.
        let stored = store.content(batch).await?;
        // Compiling takes milliseconds.
        let counted = blocking(move || stored.and_then(|bytes| count(&bytes))).await;
        if self.order.len() >= BATCHES
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_batch.remove(&oldest);
        }
        self.order.push_back(batch);
        self.by_batch.insert(batch, counted.ok().flatten());
        Ok(())
    }
}

/// The same number for every variant, or none.
fn count(stored: &[u8]) -> Option<u16> {
    let specs = Released::from_bytes(stored).ok()?.specs();
    let mut counts = specs
        .iter()
        .map(|spec| Some(Content::compile(spec).ok()?.links().tracked));
    let first = counts.next()??;
    counts.all(|count| count == Some(first)).then_some(())?;
    u16::try_from(first).ok()
}
