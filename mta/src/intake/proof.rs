//! Proofs: the real message of a batch to other people, before or while it is sent.
//!
//! A proof is a small batch of its own with the content, keys and headers of the first, whose links
//! say that they are a proof: neither the counters of the batch nor its tests see it.

use std::sync::Arc;

use content::Content;
use model::{BatchId, EmailAddress, MessageId, Partition, Priority, Row};
use serde::Serialize;
use store::{Batch, NewBatch, RecipientQuery};

use super::lots::{Bounds, LotBuilder};
use super::submit::Intake;
use crate::admin::problem::{Answer, Code, Refusal};
use crate::released::Released;

/// The most addresses of one proof.
pub(crate) const PROOFS_MAX: usize = 50;

/// What a proof comes to.
#[derive(Debug, Serialize)]
pub(crate) struct Proof {
    /// The batch that the proofs are.
    id: BatchId,
    /// The batch that they show.
    proof_of: BatchId,
    messages: Vec<ProofMessage>,
}

#[derive(Debug, Serialize)]
struct ProofMessage {
    email: String,
    message_id: MessageId,
}

impl Intake {
    /// Sends the message of a recipient of `batch` to these.
    ///
    /// # Errors
    /// When there is no such recipient.
    pub(crate) async fn proof(
        &self,
        batch: Batch,
        to: Vec<EmailAddress>,
        as_recipient: Option<u32>,
    ) -> Answer<Proof> {
        let (shown, variant) = self.shown(batch.head.id, as_recipient).await?;
        let stored = self.store.content(batch.head.id).await?;
        let stored = stored.ok_or_else(|| Refusal::not_found("batch"))?;
        let mut released =
            Released::from_bytes(&stored).map_err(|error| Refusal::internal("content", &error))?;
        // Whose variant is not decided is shown the first.
        let place = released
            .variants
            .iter()
            .position(|of| Some(&of.name) == variant.as_ref());
        let place = place.unwrap_or(0);
        let selectors = released.selectors().get(place).map(|of| of.to_vec());
        let spec = released.specs().into_iter().nth(place);
        released.spec = spec.unwrap_or(released.spec);
        released.dkim_selectors = selectors.unwrap_or_default();
        (released.form, released.test) = (Released::FORM, None);
        released.variants.clear();
        let content = Content::compile(&released.spec)
            .map_err(|errors| Refusal::internal("content", &format!("{errors:?}")))?;
        released.proof = true;
        let (id, now) = (self.new_id()?, self.clock.now());
        let rows = (0_u32..).zip(&to).map(|(index, email)| Row {
            index,
            email: email.clone(),
            ..shown.clone()
        });
        let mut lots = LotBuilder::new(Bounds::default(), 0);
        for row in rows {
            content.check(&row).map_err(|error| {
                Refusal::at(Code::InvalidField, "/as_recipient", error.to_string())
            })?;
            let address = row.email.normalised();
            let p = Partition::of(&batch.head.account, &address, self.store.partitions());
            lots.push(p, row)
                .map_err(|error| Refusal::internal("proof", &error))?;
        }
        let lots = lots
            .finish()
            .map_err(|error| Refusal::internal("proof", &error))?;
        let mut head = batch.head.clone();
        (head.id, head.created_at, head.release_at) = (id, now, now);
        (head.held, head.expires_at, head.window, head.guardrails) = (false, None, None, None);
        head.variants = None;
        head.priority = Priority::Transactional;
        head.metadata = serde_json::json!({ "proof_of": batch.head.id });
        let content = released
            .to_bytes()
            .map_err(|error| Refusal::internal("content", &error))?;
        let new = NewBatch {
            head,
            content: Arc::from(content),
            accepted: to.len() as u64,
            rejected: 0,
            call: None,
        };
        self.store.stage_lots(id, lots).await?;
        self.store.commit_batch(new, now).await?;
        let messages = (0_u32..).zip(to).map(|(index, email)| ProofMessage {
            email: email.to_string(),
            message_id: MessageId { batch: id, index },
        });
        Ok(Proof {
            id,
            proof_of: batch.head.id,
            messages: messages.collect(),
        })
    }

    /// The recipient whose message is shown, and the variant: this one, or the first.
    async fn shown(&self, batch: BatchId, index: Option<u32>) -> Answer<(Row, Option<String>)> {
        let found = match index {
            Some(index) => {
                let story = self.store.message(MessageId { batch, index }).await?;
                story.map(|story| story.recipient)
            }
            None => {
                let first = self.store.recipients(RecipientQuery {
                    batch,
                    from_index: 0,
                    limit: 1,
                    status: None,
                    opened: None,
                    clicked: None,
                    domain: None,
                    with_variant: false,
                });
                first.await?.items.pop()
            }
        };
        let found = found.map(|found| (found.row, found.variant.map(String::from)));
        found.ok_or_else(|| {
            let detail = "there is no such recipient in the batch";
            Refusal::at(Code::InvalidField, "/as_recipient", detail)
        })
    }
}
