//! What a caller hands in: the content of a batch, and what makes a message of it.

use links::Signer;
use model::{BatchId, EmailAddress, Timestamp, TrackingMode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A From address with its display name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mailbox {
    /// The address; its domain signs.
    pub email: EmailAddress,
    /// The display name; taken literally, never as a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// The content of a batch, or of one variant of it: what the store keeps and every node compiles.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContentSpec {
    /// The sender.
    pub from: Mailbox,
    /// Where answers go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<EmailAddress>,
    /// Template of the subject.
    pub subject: String,
    /// Template of the HTML part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub html: Option<String>,
    /// Template of the plain text part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// More header fields; the values are templates.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Variables for recipients that do not have them.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub vars: serde_json::Map<String, serde_json::Value>,
    /// Links and pixel.
    #[serde(default)]
    pub tracking: TrackingSpec,
    /// Whether `List-Unsubscribe` is added.
    #[serde(default)]
    pub list_unsubscribe: bool,
    /// The value of `Feedback-ID`, unless `headers` has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback_id: Option<String>,
    /// Makes the message a `multipart/report`: the text for people, then this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<ReportPart>,
    /// Files, the same for all recipients.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<Attachment>,
    /// A complete message in base64, in place of everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<String>,
}

/// A file in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// What the recipient sees it called.
    pub filename: String,
    /// Its media type.
    pub media_type: String,
    /// The file in base64.
    pub content: String,
    /// By which the HTML shows it (`cid:`); none: it stands beside the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
}

/// A report for machines (RFC 6522), the same for all recipients. Only for mail that the service
/// writes itself: its words go into headers as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportPart {
    /// The `report-type`: `tlsrpt`.
    pub report_type: String,
    /// The part's media type: `application/tlsrpt+gzip`.
    pub media_type: String,
    /// The part's file name.
    pub file_name: String,
    /// The part in base64, without line breaks.
    pub data: String,
}

/// What is rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrackingSpec {
    /// A pixel in the HTML part.
    pub opens: bool,
    /// Links of the HTML part lead over the tracker.
    pub clicks: bool,
    /// URLs of the text part too.
    pub text_links: bool,
    /// Parameters appended to every http link that does not have them, tracked or not.
    pub utm: BTreeMap<String, String>,
    /// Hosts that tracked links may lead to: a name, or `*.name` for all below it. Empty: any.
    pub allowed_targets: Vec<String>,
    /// The base URL of the tracker: what is below it is ours already. Empty: only what is known
    /// when a message is made counts.
    pub base_url: String,
}

impl Default for TrackingSpec {
    /// As the contract says of a batch without `tracking`.
    fn default() -> Self {
        Self {
            opens: true,
            clicks: true,
            text_links: false,
            utm: BTreeMap::new(),
            allowed_targets: Vec::new(),
            base_url: String::new(),
        }
    }
}

/// What is wrong with a content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct ContentError {
    /// The field: `subject`, `html`, `text`, `headers.X-Any` …
    pub field: String,
    /// The line of a template, from 1.
    pub line: Option<usize>,
    /// Whether a template is at fault (`template_error`), or the field itself (`invalid_field`).
    pub template: bool,
    /// The reason, for the caller.
    pub detail: String,
}

/// Why a recipient cannot get this content. The texts are for the caller of the API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecipientError {
    /// `missing_variable`: a template needs what neither the recipient nor the batch has.
    #[error("`{name}` is missing")]
    MissingVariable {
        /// The variable, with its path.
        name: String,
    },
    /// `invalid_vars`: not a JSON object, or a template cannot be rendered with them.
    #[error("{detail}")]
    InvalidVars {
        /// The reason.
        detail: String,
    },
}

/// Where links of a message point to.
#[derive(Debug, Clone)]
pub struct Tracker {
    base_url: Box<str>,
    signer: Signer,
}

/// A base URL that links cannot be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not an http or https URL of printable ASCII, without query, fragment, quotes, angle brackets or &, and of at most 200 characters"
)]
pub struct BaseUrlError;

impl Tracker {
    /// `base_url` as configured (`https://t.brand.example`); `signer` was made for
    /// [`Tracker::host`] of it.
    ///
    /// # Errors
    /// [`BaseUrlError`].
    pub fn new(base_url: &str, signer: Signer) -> Result<Self, BaseUrlError> {
        let base_url = base_url.trim_end_matches('/');
        // It stands in attributes and headers as it is.
        let printable = base_url
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"\"'<>&?#`\\{}".contains(&b));
        if links::check_target(base_url).is_err() || !printable || base_url.len() > 200 {
            return Err(BaseUrlError);
        }
        Ok(Self {
            base_url: base_url.into(),
            signer,
        })
    }

    /// The host that tokens are bound to, as a browser names it: with its port, unless its scheme
    /// implies that one (443 and 80, as the tracker takes them).
    pub fn host(base_url: &str) -> &str {
        let rest = base_url
            .split_once("://")
            .map_or(base_url, |(_, rest)| rest);
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        let implied = [":443", ":80"];
        let bare = implied.iter().find_map(|port| host.strip_suffix(port));
        bare.unwrap_or(host)
    }

    pub(crate) fn base_url(&self) -> &str {
        &self.base_url
    }

    pub(crate) fn signer(&self) -> &Signer {
        &self.signer
    }
}

/// What is the same for all messages of a batch, or of a part of it.
#[derive(Debug, Clone)]
pub struct RenderContext {
    /// The batch.
    pub batch: BatchId,
    /// `Date`: the release time, so that every attempt has the same bytes.
    pub released_at: Timestamp,
    /// The tracker of the account.
    pub tracker: Arc<Tracker>,
    /// The tracking mode of account and batch, whichever is more restrictive; a recipient's own
    /// counts beside it.
    pub mode: TrackingMode,
    /// A proof: works, outside all counters.
    pub proof: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_bound_to_the_host_that_browsers_name() {
        for (base_url, host) in [
            ("https://t.example", "t.example"),
            ("https://t.example:443/x", "t.example"),
            ("http://t.example:80", "t.example"),
            ("http://127.0.0.1:8026", "127.0.0.1:8026"),
            ("https://t.example:8443/", "t.example:8443"),
            ("https://[::1]:443", "[::1]"),
        ] {
            assert_eq!(Tracker::host(base_url), host, "{base_url}");
        }
    }
}
