//! Compiled content: what is done once per batch, and what is left to do per recipient.

use crate::attach::Attached;
use crate::jinja::Tags;
use crate::raw::Raw;
use crate::rewrite::{LinkReport, Rewriter};
use crate::scope::{LinkTable, Scope, Tracked};
use crate::spec::{ContentError, ContentSpec, Mailbox, RecipientError, RenderContext, ReportPart};
use crate::template::{FieldIndex, Glimpse, Templates};
use crate::url::Rules;
use crate::{NotEncodable, dkim, header, mime, seven_bit};
use links::{Flags, Kind};
use minijinja::Value;
use model::{EmailAddress, MessageId, Row, Timestamp};
use std::sync::Arc;

/// Fields that are ours, or belong to the path of the message, in lower case.
const OURS: [&str; 16] = [
    "from",
    "to",
    "cc",
    "bcc",
    "subject",
    "date",
    "reply-to",
    "sender",
    "message-id",
    "mime-version",
    "dkim-signature",
    "return-path",
    "received",
    "authentication-results",
    "delivered-to",
    "x-hikyaku",
];
const OUR_PREFIXES: [&str; 3] = ["content-", "resent-", "arc-"];
const UNSUBSCRIBE_FIELDS: [&str; 2] = ["list-unsubscribe", "list-unsubscribe-post"];
/// Between the header and the body (RFC 5322 §2.1).
const EMPTY_LINE: &[u8] = b"\r\n";
const LONGEST_FIELD_NAME: usize = 60;
/// In bytes: far beyond any name, and still a header that every server takes.
const LONGEST_NAME: usize = 1000;

/// The content of a batch, ready to be rendered for each recipient. Cheap to share in an `Arc`.
pub struct Content {
    templates: Templates,
    from: Mailbox,
    reply_to: Option<EmailAddress>,
    subject: FieldIndex,
    html: Option<FieldIndex>,
    text: Option<FieldIndex>,
    headers: Vec<(String, FieldIndex)>,
    feedback_id: Option<String>,
    list_unsubscribe: bool,
    defaults: Value,
    table: Arc<LinkTable>,
    report: LinkReport,
    attached: Option<ReportPart>,
    files: Attached,
    raw: Option<Raw>,
}

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content")
            .field("from", &self.from)
            .field("links", &self.report)
            .finish_non_exhaustive()
    }
}

impl Content {
    /// Checks and compiles `spec`.
    ///
    /// # Errors
    /// Everything that is wrong with it, at once.
    pub fn compile(spec: &ContentSpec) -> Result<Self, Vec<ContentError>> {
        let mut compiler = Compiler::default();
        let content = compiler.compile(spec);
        match content {
            Some(content) if compiler.errors.is_empty() => Ok(content),
            _ => Err(compiler.errors),
        }
    }

    /// What became of the links.
    pub fn links(&self) -> &LinkReport {
        &self.report
    }

    /// The numbered links, with the number that their tokens carry: URL, or its template.
    pub fn numbered_links(&self) -> impl Iterator<Item = (usize, &str)> {
        self.table
            .links
            .iter()
            .map(crate::rewrite::Link::shown)
            .enumerate()
    }

    /// The sender.
    pub fn from(&self) -> &Mailbox {
        &self.from
    }

    /// Says whether the recipient has all that the templates need. Renders only templates with
    /// statements or arguments; otherwise it looks at the variables.
    ///
    /// # Errors
    /// The rejection.
    pub fn check(&self, row: &Row) -> Result<(), RecipientError> {
        self.templates.check(&Arc::new(self.scope(row, None)?))
    }

    /// As [`Content::check`], of a row whose variables are known to be valid, by what `glimpse`
    /// says of each by its name. It has to be sure of what it says; what cannot be told by that is
    /// read.
    ///
    /// # Errors
    /// The rejection.
    pub fn check_by(
        &self,
        row: &Row,
        glimpse: impl Fn(&str) -> Glimpse,
    ) -> Result<(), RecipientError> {
        let short = |name: &str| name.len() <= LONGEST_NAME;
        let is_short = row.name.as_deref().is_none_or(short);
        if is_short && self.templates.is_enough(&self.defaults, glimpse) {
            return Ok(());
        }
        self.check(row)
    }

    /// Makes the message for `row`: the same bytes for the same arguments, always.
    ///
    /// # Errors
    /// As [`Content::check`], which the recipient passed at intake: an error here means that the
    /// content or the program has changed since.
    pub fn render(&self, row: &Row, context: &RenderContext) -> Result<Message, RecipientError> {
        let message = MessageId {
            batch: context.batch,
            index: row.index,
        };
        if let Some(raw) = &self.raw {
            return Ok(raw_message(raw, context, message, self.from.email.domain()));
        }
        let mode = row
            .tracking
            .map_or(context.mode, |own| own.min(context.mode));
        let flags = Flags {
            mode,
            proof: context.proof,
        };
        let tracked = Tracked {
            tracker: Arc::clone(&context.tracker),
            message,
            flags,
        };
        let unsubscribe = if self.list_unsubscribe {
            tracked.url(Kind::Unsubscribe, 0, "")
        } else {
            None
        };
        let scope = Value::from_object(self.scope(row, Some(tracked))?);

        let html = self
            .html
            .map(|field| self.templates.render(field, &scope))
            .transpose()?;
        let text = self
            .text
            .map(|field| self.templates.render(field, &scope))
            .transpose()?;
        let mut headers = Vec::with_capacity(1024);
        self.write_headers(&mut headers, row, context, &scope, message)?;
        if let Some(url) = unsubscribe {
            header::plain(&mut headers, "List-Unsubscribe", &format!("<{url}>"));
            header::plain(
                &mut headers,
                "List-Unsubscribe-Post",
                "List-Unsubscribe=One-Click",
            );
        }
        let mut body = Vec::with_capacity(
            1024 + [&html, &text]
                .into_iter()
                .flatten()
                .map(|p| p.len() * 5 / 4)
                .sum::<usize>(),
        );
        let text = text.as_ref().map(|text| mime::Part {
            media_type: "text/plain",
            text,
        });
        let html = html.as_ref().map(|text| mime::Part {
            media_type: "text/html",
            text,
        });
        let id = message.to_string();
        if let (Some(report), Some(text)) = (&self.attached, &text) {
            mime::write_report(&mut headers, &mut body, &id, text, report);
            return Ok(Message {
                signatures: Vec::new(),
                headers,
                body,
            });
        }
        if !self.files.is_empty() {
            let parts: Vec<mime::Part<'_>> = text.into_iter().chain(html).collect();
            self.files.write(&mut headers, &mut body, &id, &parts);
            return Ok(Message {
                signatures: Vec::new(),
                headers,
                body,
            });
        }
        match (text, html) {
            (Some(text), Some(html)) => mime::write(&mut headers, &mut body, &id, &[text, html]),
            (Some(part), None) | (None, Some(part)) => {
                mime::write(&mut headers, &mut body, &id, &[part])
            }
            (None, None) => {}
        }
        Ok(Message {
            signatures: Vec::new(),
            headers,
            body,
        })
    }

    fn write_headers(
        &self,
        out: &mut Vec<u8>,
        row: &Row,
        context: &RenderContext,
        scope: &Value,
        message: MessageId,
    ) -> Result<(), RecipientError> {
        header::plain(out, "Date", &context.released_at.rfc5322());
        header::mailbox(out, "From", self.from.name.as_deref(), &self.from.email);
        header::mailbox(out, "To", row.name.as_deref(), &row.email);
        if let Some(reply_to) = &self.reply_to {
            header::mailbox(out, "Reply-To", None, reply_to);
        }
        header::text(out, "Subject", &self.header_text(self.subject, scope)?);
        header::plain(
            out,
            "Message-ID",
            &format!("<{message}@{}>", self.from.email.domain()),
        );
        for (name, field) in &self.headers {
            header::text(out, name, &self.header_text(*field, scope)?);
        }
        if let Some(feedback_id) = &self.feedback_id {
            header::text(out, "Feedback-ID", feedback_id);
        }
        Ok(())
    }

    fn header_text(&self, field: FieldIndex, scope: &Value) -> Result<String, RecipientError> {
        let bytes = self.templates.render(field, scope)?;
        // MiniJinja puts out strings, and line ends are ASCII.
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn scope(&self, row: &Row, tracked: Option<Tracked>) -> Result<Scope, RecipientError> {
        if row
            .name
            .as_ref()
            .is_some_and(|name| name.len() > LONGEST_NAME)
        {
            let detail = format!("name: longer than {LONGEST_NAME} bytes");
            return Err(RecipientError::InvalidVars { detail });
        }
        let optional =
            |text: &Option<Box<str>>| text.as_deref().map_or(Value::UNDEFINED, Value::from);
        Ok(Scope {
            vars: row
                .vars
                .as_deref()
                .map_or(Ok(Value::UNDEFINED), parse_vars)?,
            defaults: self.defaults.clone(),
            email: Value::from(row.email.as_str()),
            name: optional(&row.name),
            prospect_id: optional(&row.prospect_id),
            table: Arc::clone(&self.table),
            tracked,
        })
    }
}

/// A message that is complete: what it lacks is put before it.
fn raw_message(raw: &Raw, context: &RenderContext, message: MessageId, domain: &str) -> Message {
    let mut headers = Vec::with_capacity(raw.headers.len() + 128);
    if !raw.has_date {
        header::plain(&mut headers, "Date", &context.released_at.rfc5322());
    }
    if !raw.has_message_id {
        header::plain(&mut headers, "Message-ID", &format!("<{message}@{domain}>"));
    }
    headers.extend_from_slice(&raw.headers);
    Message {
        signatures: Vec::new(),
        headers,
        body: raw.body.clone(),
    }
}

fn parse_vars(json: &str) -> Result<Value, RecipientError> {
    let invalid = |detail: String| RecipientError::InvalidVars { detail };
    if !json.trim_ascii_start().starts_with('{') {
        return Err(invalid("vars: not a JSON object".to_owned()));
    }
    serde_json::from_str(json).map_err(|error| invalid(format!("vars: {error}")))
}

/// A message, not yet or already signed. The parts are complete lines ending in CRLF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    signatures: Vec<u8>,
    headers: Vec<u8>,
    body: Vec<u8>,
}

impl Message {
    /// Signs with each key for `domain`, the domain of From. RSA costs most of a millisecond of
    /// CPU: keep it off the threads that serve connections.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn sign(
        &mut self,
        domain: &str,
        keys: &[dkim::Key],
        signed_at: Timestamp,
    ) -> Result<(), dkim::SignError> {
        self.signatures.clear();
        dkim::sign(
            &mut self.signatures,
            &self.headers,
            &self.body,
            domain,
            keys,
            signed_at,
        )
    }

    /// The same in seven bits, for a server without 8BITMIME; not signed. What is composed here is so
    /// from the start, but for a header with an address beyond ASCII.
    ///
    /// # Errors
    /// When that would break it.
    pub fn into_seven_bit(self) -> Result<Self, NotEncodable> {
        let (headers, body) = seven_bit::encode(&self.headers, &self.body)?;
        Ok(Self {
            signatures: Vec::new(),
            headers,
            body,
        })
    }

    /// Whether no byte of the header is above 127: otherwise it needs SMTPUTF8 (RFC 6531).
    pub fn is_ascii(&self) -> bool {
        self.headers.is_ascii()
    }

    /// The size on the wire, for SIZE (RFC 1870): before dot-stuffing, without the final dot.
    pub fn size(&self) -> usize {
        self.signatures.len() + self.headers.len() + EMPTY_LINE.len() + self.body.len()
    }

    /// The whole message, in one piece.
    pub fn into_bytes(self) -> Vec<u8> {
        let [mut head, body] = self.into_parts();
        head.extend_from_slice(&body);
        head
    }

    /// The header with the empty line, then the body: the message in two pieces, without a copy of
    /// the larger.
    pub fn into_parts(mut self) -> [Vec<u8>; 2] {
        let mut head =
            Vec::with_capacity(self.signatures.len() + self.headers.len() + EMPTY_LINE.len());
        head.append(&mut self.signatures);
        head.append(&mut self.headers);
        head.extend_from_slice(EMPTY_LINE);
        [head, self.body]
    }
}

#[derive(Default)]
struct Compiler {
    errors: Vec<ContentError>,
}

impl Compiler {
    fn invalid(&mut self, field: &str, detail: &str) {
        let (field, detail) = (field.to_owned(), detail.to_owned());
        self.errors.push(ContentError {
            field,
            line: None,
            template: false,
            detail,
        });
    }

    fn compile(&mut self, spec: &ContentSpec) -> Option<Content> {
        if spec.html.is_none() && spec.text.is_none() && spec.raw.is_none() {
            self.invalid("html", "html or text is needed");
        }
        for (field, value) in [
            ("from.name", &spec.from.name),
            ("feedback_id", &spec.feedback_id),
        ] {
            if value
                .as_ref()
                .is_some_and(|value| value.len() > LONGEST_NAME)
            {
                self.invalid(field, &format!("longer than {LONGEST_NAME} bytes"));
            }
        }
        self.utm(spec);
        let raw = spec.raw.as_deref().map(Raw::read).transpose();
        let raw = raw.unwrap_or_else(|detail| {
            self.invalid("raw", &detail);
            None
        });
        if raw
            .as_ref()
            .is_some_and(|raw| raw.from.normalised() != spec.from.email.normalised())
        {
            self.invalid("from.email", "is not the address in the From of raw");
        }
        let files = Attached::read(&spec.attachments, |number, field, detail| {
            self.invalid(&format!("attachments.{number}.{field}"), &detail);
        });
        let mut templates = Templates::new();
        let mut rewriter = rewriter(spec);
        let track = &spec.tracking;
        let subject = self.add(&mut templates, "subject", &spec.subject, str::to_owned);
        // HTML first: what it opts out is opted out in the text too.
        let html = self.add_optional(&mut templates, "html", spec.html.as_deref(), |s| {
            rewriter.html(s, track.opens)
        });
        let text = self.add_optional(&mut templates, "text", spec.text.as_deref(), |s| {
            if track.text_links {
                rewriter.text(s)
            } else {
                s.to_owned()
            }
        });
        let headers = self.headers(&mut templates, spec);
        let own_feedback_id = headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("feedback-id"));
        let defaults = Value::from(minijinja::value::Serde(&spec.vars));
        if self.errors.is_empty() {
            self.errors = templates.trial(&defaults);
        }
        let Rewriter {
            rules,
            clicks,
            links,
            report,
            ..
        } = rewriter;
        Some(Content {
            templates,
            from: spec.from.clone(),
            reply_to: spec.reply_to.clone(),
            subject: subject?,
            html,
            text,
            headers,
            feedback_id: spec.feedback_id.clone().filter(|_| !own_feedback_id),
            list_unsubscribe: spec.list_unsubscribe,
            defaults,
            table: Arc::new(LinkTable {
                links,
                rules,
                clicks,
            }),
            report,
            attached: spec.report.clone(),
            files,
            raw,
        })
    }

    /// What is different for each recipient has no place in the statistics of a site.
    fn utm(&mut self, spec: &ContentSpec) {
        for (name, value) in &spec.tracking.utm {
            if name.is_empty() {
                self.invalid("tracking.utm", "a parameter without a name");
            }
            let has_tags = |text: &String| !Tags::scan(text).is_empty();
            if has_tags(name) || has_tags(value) {
                let detail = format!(
                    "{name}: parameters are taken literally; template tags belong into the URLs"
                );
                self.invalid("tracking.utm", &detail);
            }
        }
    }

    fn add(
        &mut self,
        templates: &mut Templates,
        field: &str,
        source: &str,
        rewrite: impl FnOnce(&str) -> String,
    ) -> Option<FieldIndex> {
        templates
            .add(field, source, rewrite)
            .map_err(|error| self.errors.push(error))
            .ok()
    }

    fn add_optional(
        &mut self,
        templates: &mut Templates,
        field: &str,
        source: Option<&str>,
        rewrite: impl FnOnce(&str) -> String,
    ) -> Option<FieldIndex> {
        source.and_then(|source| self.add(templates, field, source, rewrite))
    }

    fn headers(
        &mut self,
        templates: &mut Templates,
        spec: &ContentSpec,
    ) -> Vec<(String, FieldIndex)> {
        let mut seen: Vec<String> = Vec::new();
        let mut headers = Vec::new();
        for (name, value) in &spec.headers {
            let field = format!("headers.{name}");
            let lower = name.to_ascii_lowercase();
            // RFC 5322 §3.6.8, less the characters that only trouble parsers.
            let token = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            if name.is_empty() || name.len() > LONGEST_FIELD_NAME || !name.bytes().all(token) {
                self.invalid(
                    &field,
                    "not a header name of at most 60 letters, digits, - and _",
                );
            } else if OURS.contains(&lower.as_str())
                || OUR_PREFIXES.iter().any(|prefix| lower.starts_with(prefix))
                || (spec.list_unsubscribe && UNSUBSCRIBE_FIELDS.contains(&lower.as_str()))
            {
                self.invalid(&field, "this header is set by the service");
            } else if seen.contains(&lower) {
                self.invalid(&field, "this header is there twice");
            } else if let Some(index) = self.add(templates, &field, value, str::to_owned) {
                seen.push(lower);
                headers.push((name.clone(), index));
            }
        }
        headers
    }
}

fn rewriter(spec: &ContentSpec) -> Rewriter {
    let utm = spec
        .tracking
        .utm
        .iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let rules = Rules {
        utm,
        allowed_targets: spec.tracking.allowed_targets.clone(),
        base_url: spec.tracking.base_url.clone(),
    };
    Rewriter::new(rules, spec.tracking.clicks)
}
