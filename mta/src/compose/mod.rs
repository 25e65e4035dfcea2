//! From a recipient to the bytes of a message: content compiled once per batch, rendered and
//! signed per message, on threads of their own.
//!
//! Owns compiled contents (bounded) and the signing threads. Must not decide who gets a message,
//! and must not block a connection: RSA takes most of a millisecond of CPU.

mod contents;
mod keys;
mod threads;

pub use contents::{Contents, LoadError};
pub use keys::{KeysError, domain_selectors, load_keys};
pub use threads::{Composer, Request, Threads};

use std::sync::Arc;

use bytes::Bytes;
use content::dkim::Algorithm;
use content::{Content, RenderContext};
use model::MessageId;
use service::metrics::{Metrics, SignatureAlgorithm, SignatureResult};
use smtp::{Body, Envelope};

use crate::queue::job::Job;

/// What the server takes that a message is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// The message as it is.
    Eight,
    /// Seven bits only: it offers no 8BITMIME (RFC 6152 §3).
    Seven,
}

/// What the messages of one batch are made of.
pub struct Prepared {
    context: RenderContext,
    /// One, or one for each variant of the batch.
    variants: Vec<Variant>,
}

/// One content and what signs it.
struct Variant {
    content: Content,
    keys: Arc<[content::dkim::Key]>,
    from_domain: Box<str>,
    /// Domain of the reverse-path.
    bounce_domain: Box<str>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared")
            .field("batch", &self.context.batch)
            .finish_non_exhaustive()
    }
}

/// A message ready to be sent.
#[derive(Debug)]
pub struct Composed {
    /// What it is for.
    pub job: Job,
    /// The reverse-path, without angle brackets.
    pub reverse_path: String,
    /// Headers and body.
    pub body: Body,
    /// Its headers need SMTPUTF8 (RFC 6531).
    pub smtp_utf8: bool,
}

impl Composed {
    /// From whom to whom; `recipient` is the row's address.
    pub fn envelope<'a>(&'a self, recipient: &'a [&'a str]) -> Envelope<'a> {
        Envelope {
            reverse_path: &self.reverse_path,
            recipients: recipient,
            smtp_utf8: self.smtp_utf8,
        }
    }
}

impl Prepared {
    /// Makes the message of a job: its reverse-path, its content, and whether that needs SMTPUTF8.
    /// The same bytes whenever it is called with the same `bits`.
    ///
    /// # Errors
    /// The reason, for people: this recipient cannot get this content.
    pub fn compose(
        &self,
        job: &Job,
        bits: Bits,
        metrics: &Metrics,
    ) -> Result<(String, Body, bool), String> {
        // Variants are counted from 1; 0 has whoever is in a batch without them.
        let place = usize::from(job.item.variant.saturating_sub(1));
        let of = self.variants.get(place);
        let of = of.ok_or_else(|| format!("the batch has no variant {place}"))?;
        // The waves of a batch with variants are released each at its own time.
        let own = (job.item.variant > 0).then(|| RenderContext {
            released_at: job.item.release_at(),
            ..self.context.clone()
        });
        let context = own.as_ref().unwrap_or(&self.context);
        let mut message = of
            .content
            .render(&job.item.row, context)
            .map_err(|error| error.to_string())?;
        if bits == Bits::Seven {
            let narrowed = message.into_seven_bit();
            message = narrowed.map_err(|error| error.to_string())?;
        }
        let signed = message.sign(&of.from_domain, &of.keys, context.released_at);
        for key in of.keys.iter() {
            let algorithm = match key.algorithm() {
                Algorithm::Rsa2048 => SignatureAlgorithm::RsaSha256,
                Algorithm::Ed25519 => SignatureAlgorithm::Ed25519Sha256,
            };
            let result = if signed.is_ok() {
                SignatureResult::Ok
            } else {
                SignatureResult::Failed
            };
            metrics.dkim_signatures.at(algorithm, result).inc();
        }
        signed.map_err(|error| error.to_string())?;
        let smtp_utf8 = !message.is_ascii();
        let parts = message.into_parts().map(Bytes::from);
        let body = Body::new(parts.into()).map_err(|error| error.to_string())?;
        Ok((
            reverse_path(job.item.message(), &of.bounce_domain),
            body,
            smtp_utf8,
        ))
    }
}

/// The reverse-path of a message: a bounce to it names the message (VERP).
fn reverse_path(message: MessageId, domain: &str) -> String {
    format!("bounce+{message}@{domain}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::BatchId;

    #[test]
    fn a_reverse_path_is_an_address_and_names_the_message() {
        let message = MessageId {
            batch: BatchId::from_bytes([255; 16]),
            index: u32::MAX,
        };
        let path: model::EmailAddress = reverse_path(message, "brand.example")
            .parse()
            .expect("an address");
        assert!(path.local_part().ends_with(&message.to_string()));
    }
}
