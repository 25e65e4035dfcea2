//! What every test needs: a spec, a recipient, a tracker.

use content::{Content, ContentSpec, Mailbox, RenderContext, Tracker, TrackingSpec};
use links::{KeyRing, VerifiedToken};
use model::{BatchId, Row, Timestamp, TrackingMode};
use std::sync::Arc;

pub(crate) const BASE: &str = "https://t.brand.example";

pub(crate) fn spec() -> ContentSpec {
    ContentSpec {
        from: Mailbox {
            email: "news@brand.example".parse().expect("an address"),
            name: Some("Brand".into()),
        },
        reply_to: None,
        subject: "Hello {{ name }}".into(),
        html: None,
        text: None,
        headers: std::collections::BTreeMap::new(),
        vars: serde_json::Map::new(),
        tracking: TrackingSpec::default(),
        list_unsubscribe: true,
        feedback_id: None,
        attachments: Vec::new(),
        raw: None,
        report: None,
    }
}

pub(crate) fn html(html: &str) -> ContentSpec {
    ContentSpec {
        html: Some(html.into()),
        ..spec()
    }
}

pub(crate) fn row(vars: &str) -> Row {
    Row {
        name: Some("Ann".into()),
        prospect_id: Some("p-1".into()),
        vars: Some(vars.into()),
        ..Row::new(41, "ann@x.example".parse().expect("an address"))
    }
}

pub(crate) fn keys() -> KeyRing {
    KeyRing::parse(&KeyRing::file_text(&[7; 32])).expect("a key")
}

pub(crate) fn context() -> RenderContext {
    let signer = keys().signer(Tracker::host(BASE), None).expect("a signer");
    RenderContext {
        batch: BatchId::from_bytes([1; 16]),
        released_at: Timestamp::from_millis(1_763_712_300_007),
        tracker: Arc::new(Tracker::new(BASE, signer).expect("a base URL")),
        mode: TrackingMode::Individual,
        proof: false,
    }
}

pub(crate) fn compile(spec: &ContentSpec) -> Content {
    Content::compile(spec).unwrap_or_else(|errors| panic!("{errors:?}"))
}

/// The message as it goes over the wire.
pub(crate) fn wire(spec: &ContentSpec, row: &Row, context: &RenderContext) -> String {
    let message = compile(spec).render(row, context).expect("renders");
    String::from_utf8(message.into_bytes()).expect("UTF-8")
}

/// The decoded HTML part, with LF line ends.
pub(crate) fn html_of(wire: &str) -> String {
    let parsed = mail_parser::MessageParser::new()
        .parse(wire.as_bytes())
        .expect("a message");
    let part = parsed.html_part(0).expect("an HTML part");
    part.text_contents().expect("text").replace("\r\n", "\n")
}

/// The rendered HTML part of a template.
pub(crate) fn rendered(template: &str, vars: &str) -> String {
    html_of(&wire(&html(template), &row(vars), &context()))
}

/// The token of a tracker URL.
pub(crate) fn token(url: &str) -> VerifiedToken {
    let rest = url.strip_prefix(BASE).expect("a tracker URL");
    let text = rest.get(3..).expect("/c/TOKEN").trim_end_matches(".gif");
    keys()
        .verify(text, Tracker::host(BASE))
        .expect("a good token")
}

/// The values of all attributes `name="…"` in `html`.
pub(crate) fn attributes<'a>(html: &'a str, name: &str) -> Vec<&'a str> {
    html.split(&format!("{name}=\""))
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .collect()
}
