//! What the store keeps as the content of a batch: written by intake when the batch is accepted,
//! read by `compose` on every node that sends it.
//!
//! Everything on which the bytes of a message depend, beside its row, is in here or in the batch's
//! head, so that each attempt, on any node, makes the same message: the content as submitted, and
//! the keys that were in use at release. Must not hold secrets: keys are named, not contained.

use content::ContentSpec;
use serde::{Deserialize, Serialize};

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
    /// The form that this program writes.
    pub const FORM: u16 = 1;

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
        if form != Self::FORM {
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
        }
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
            .replace("\"form\":1", "\"form\":2,\"more\":0");
        assert!(matches!(
            Released::from_bytes(newer.as_bytes()),
            Err(ReleasedError::Form(2))
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
