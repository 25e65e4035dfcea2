//! Templates, link rewriting, MIME and DKIM.
//!
//! Owns the way from a batch's content and one recipient to the bytes of a message. Content is
//! compiled once per batch ([`Content::compile`]) and rendered per recipient
//! ([`Content::render`]); the same arguments give the same bytes, always. Pure: must not do I/O or
//! read a clock or a random source. Nothing that a caller or a recipient supplies may panic or
//! bring a line break into a header, and templates are bounded in steps and output.
#![forbid(unsafe_code)]

mod attach;
mod content;
pub mod dkim;
mod header;
mod jinja;
mod mime;
mod raw;
mod rewrite;
mod scope;
mod seven_bit;
mod sink;
mod spec;
mod template;
mod url;

pub use content::{Content, Message};
pub use raw::from_of_raw;
pub use rewrite::{LinkReport, SkippedLink};
pub use seven_bit::NotEncodable;
pub use spec::{
    Attachment, BaseUrlError, ContentError, ContentSpec, Mailbox, RecipientError, RenderContext,
    ReportPart, Tracker, TrackingSpec,
};
pub use template::Glimpse;
pub use url::SkipReason;
