//! What the store keeps as the content of a batch: written by intake when the batch is accepted,
//! read by `compose` on every node that sends it.
//!
//! Everything on which the bytes of a message depend, beside its row, is in here or in the batch's
//! head, so that each attempt, on any node, makes the same message: the content as submitted, and
//! the keys that were in use at release. Must not hold secrets: keys are named, not contained.

use content::{ContentSpec, Mailbox};
use engagement::abtest::{Fallback, Metric, Mode};
use model::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The content of a released batch and the names of what signs it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Released {
    /// The version of this document; readers refuse what is newer.
    pub form: u16,
    /// What was submitted.
    pub spec: ContentSpec,
    /// Selectors of the From domain's DKIM keys at release, lower case, sorted; each signs. Empty:
    /// the mail leaves unsigned, as the account allows.
    #[serde(default)]
    pub dkim_selectors: Vec<String>,
    /// What links and pixels point to: the account's `tracking.base_url` at release.
    pub tracker_base_url: String,
    /// The tracking key that signs links, by its id at release.
    pub tracking_key: u16,
    /// An address may be there twice: what parts that follow are judged by.
    #[serde(default)]
    pub allow_duplicates: bool,
    /// Shown to others than its recipients: what they do with it does not count.
    #[serde(default)]
    pub proof: bool,
    /// What is different for each variant; empty: there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<Variant>,
    /// What is done with the variants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test: Option<Test>,
}

/// A variant of the content: what is not here is the batch's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// Its name.
    pub name: String,
    /// The sender, when it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Mailbox>,
    /// Template of the subject.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Template of the HTML part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub html: Option<String>,
    /// Template of the plain text part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Selectors of its From domain's DKIM keys.
    #[serde(default)]
    pub dkim_selectors: Vec<String>,
    /// When its part of the test leaves; none: with the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_at: Option<Timestamp>,
}

impl Variant {
    /// Whether this field of the content is its own, and not the batch's.
    pub fn says(&self, field: &str) -> bool {
        match field {
            "from" | "from.email" | "from.name" => self.from.is_some(),
            "subject" => self.subject.is_some(),
            "html" => self.html.is_some(),
            "text" => self.text.is_some(),
            _ => false,
        }
    }
}

/// What is done with variants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Test {
    /// Whether a winner is sought, and how.
    pub mode: Mode,
    /// The part of the recipients who are in the test.
    pub fraction: f64,
    /// What the variants are judged by.
    pub metric: Metric,
    /// For how long it runs, or a round of it, in milliseconds.
    pub wait_ms: u64,
    /// The P(best) from which on a decision is `confident`.
    pub min_confidence: f64,
    /// What is done otherwise.
    pub fallback: Fallback,
    /// What the dealing of recipients is keyed with, drawn once.
    pub seed: [u8; 32],
}

impl Test {
    /// For how long it runs, or a round of it.
    pub const fn wait(&self) -> Duration {
        Duration::from_millis(self.wait_ms)
    }
}

/// Why stored bytes are not a content that can be sent.
#[derive(Debug, thiserror::Error)]
pub enum ReleasedError {
    /// Not what was written.
    #[error("the stored content of the batch is damaged")]
    Damaged(#[source] serde_json::Error),
    /// Written by a later version of the program.
    #[error("the stored content of the batch has form {0}, which this version does not know")]
    Form(u16),
}

impl Released {
    /// The form of a content without variants.
    pub const FORM: u16 = 1;
    /// The form of one with variants, which programs before them must not take for the other.
    pub const WITH_VARIANTS: u16 = 2;

    /// The contents that recipients get: one, or one for each variant, in their order.
    pub fn specs(&self) -> Vec<ContentSpec> {
        if self.variants.is_empty() {
            return vec![self.spec.clone()];
        }
        let of = |variant: &Variant| {
            let mut spec = self.spec.clone();
            if let Some(from) = &variant.from {
                spec.from = from.clone();
            }
            if let Some(subject) = &variant.subject {
                spec.subject.clone_from(subject);
            }
            spec.html = variant.html.clone().or(spec.html);
            spec.text = variant.text.clone().or(spec.text);
            spec
        };
        self.variants.iter().map(of).collect()
    }

    /// The selectors of the keys that sign each of [`Released::specs`].
    pub fn selectors(&self) -> Vec<&[String]> {
        if self.variants.is_empty() {
            return vec![&self.dkim_selectors];
        }
        let each = self.variants.iter();
        each.map(|variant| variant.dkim_selectors.as_slice())
            .collect()
    }

    /// The stored form.
    ///
    /// # Errors
    /// Never for what a batch can hold; the type is that of the serializer.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// Reads a stored form.
    ///
    /// # Errors
    /// When the bytes are damaged or of a later form.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ReleasedError> {
        #[derive(Deserialize)]
        struct Form {
            form: u16,
        }
        // The form first: a later one has fields that this version cannot name.
        let Form { form } = serde_json::from_slice(bytes).map_err(ReleasedError::Damaged)?;
        if ![Self::FORM, Self::WITH_VARIANTS].contains(&form) {
            return Err(ReleasedError::Form(form));
        }
        serde_json::from_slice(bytes).map_err(ReleasedError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn released() -> Released {
        let spec = serde_json::json!({"from": {"email": "news@brand.example"}, "subject": "Hello", "text": "Hi"});
        Released {
            form: Released::FORM,
            spec: serde_json::from_value(spec).expect("a content"),
            dkim_selectors: vec!["s1".into()],
            tracker_base_url: "http://127.0.0.1:8026".into(),
            tracking_key: 1,
            allow_duplicates: false,
            proof: false,
            variants: Vec::new(),
            test: None,
        }
    }

    #[test]
    fn a_variant_has_what_it_does_not_say_from_the_batch() {
        let variant = |name: &str| Variant {
            name: name.to_owned(),
            from: None,
            subject: None,
            html: None,
            text: None,
            dkim_selectors: vec![name.to_lowercase()],
            send_at: None,
        };
        let of = Released {
            form: Released::WITH_VARIANTS,
            variants: vec![
                Variant {
                    subject: Some("Hey".to_owned()),
                    ..variant("A")
                },
                Variant {
                    html: Some("<p>".to_owned()),
                    ..variant("B")
                },
            ],
            ..released()
        };
        let read = Released::from_bytes(&of.to_bytes().expect("bytes")).expect("reads back");
        let specs = read.specs();
        let text = Some("Hi".to_owned());
        assert_eq!((&*specs[0].subject, &specs[0].html), ("Hey", &None));
        assert_eq!((&*specs[1].subject, &specs[1].text), ("Hello", &text));
        assert_eq!(read.selectors(), [&["a".to_owned()][..], &["b".to_owned()]]);
    }

    #[test]
    fn reads_back_and_refuses_what_is_newer() {
        let bytes = released().to_bytes().expect("bytes");
        assert_eq!(
            Released::from_bytes(&bytes).expect("reads back"),
            released()
        );
        let newer = String::from_utf8(bytes)
            .expect("JSON")
            .replace("\"form\":1", "\"form\":3,\"more\":0");
        assert!(matches!(
            Released::from_bytes(newer.as_bytes()),
            Err(ReleasedError::Form(3))
        ));
        assert!(matches!(
            Released::from_bytes(b"{}"),
            Err(ReleasedError::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _read = Released::from_bytes(&bytes);
        }
    }
}
