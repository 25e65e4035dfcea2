//! The batch that is submitted: made while it is sent, so that memory does not grow with it.

use crate::intake::Form;
use anyhow::{Result, ensure};
use bytes::Bytes;
use content::{ContentSpec, Mailbox, TrackingSpec};
use hyper::body::{Body, Frame};
use model::Row;
use serde_json::json;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Bytes handed over at a time.
const CHUNK: usize = 64 * 1024;

/// Nothing of it is sent before.
const FAR_AWAY: &str = "2099-01-01T00:00:00Z";
const FROM_NAME: &str = "Load Test";
const SUBJECT: &str = "Hello {{ name }}, news of today";
const FILLER: &str = "The courier runs by day and by night, over the pass and along the shore, \
    and every letter that was given into his hand comes to the door that is written on it.\n";

/// Below what all domains are below, those whose recipients may stand before the others: see
/// [`Shape::beside`].
pub const BESIDE: [&str; 3] = ["tarpit", "mute", "cut"];

/// What a batch is made of.
#[derive(Debug, Clone, clap::Args)]
pub struct Shape {
    /// Recipients in all
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub recipients: u64,
    /// Domains that they are at, in turn
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub domains: u64,
    /// So many recipients of a domain follow each other
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub in_a_row: u64,
    /// What the domains are below, as d0.example
    #[arg(long, default_value = "example")]
    pub below: String,
    /// Of the recipients, the first are at [`BESIDE`] in turn, so many at each.
    #[arg(skip)]
    pub beside: u64,
    /// Variables of each recipient, all used in the content
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub vars: u64,
    /// Tracked links in the HTML
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=500))]
    pub links: u64,
    /// Size of HTML and text as submitted, as "10KiB"
    #[arg(long, default_value = "10KiB", value_parser = parse_size)]
    pub size: usize,
    /// Address in From
    #[arg(long, default_value = "news@brand.example")]
    pub from: String,
}

/// For clap: a size as in the configuration, of at most 16 MiB.
fn parse_size(text: &str) -> Result<usize> {
    let size = model::units::parse_size(text)?;
    ensure!(size <= 16 << 20, "more than 16MiB");
    Ok(usize::try_from(size)?)
}

impl Shape {
    /// The body of one call with the recipients `first..end`; numbers go on from call to call.
    ///
    /// # Errors
    /// When the size has no room for variables and links.
    pub fn body(&self, first: u64, end: u64) -> Result<Generated> {
        let mut head = self.head(json!({}))?;
        // The recipients come last, as the one key that is not held in memory.
        head.truncate(head.len().saturating_sub(1));
        head.push_str(",\"recipients\":[");
        Ok(Generated {
            shape: self.clone(),
            first,
            next: first,
            end,
            pending: head,
            closed: false,
        })
    }

    /// The whole body of one call in a form, in pieces; its mail waits for a time that is far away.
    ///
    /// # Errors
    /// As [`Self::body`].
    pub fn written(&self, form: Form) -> Result<Vec<Bytes>> {
        let mut head = self.head(json!({"send_at": FAR_AWAY}))?;
        let mut pieces = Vec::new();
        let mut piece = match form {
            Form::Json => {
                head.truncate(head.len().saturating_sub(1));
                head + ",\"recipients\":[\n"
            }
            Form::Ndjson => head + "\n",
            Form::Csv => {
                let vars = (0..self.vars).map(|var| format!(",v{var}"));
                format!("email,name,prospect_id{}\n", vars.collect::<String>())
            }
        };
        for n in 0..self.recipients {
            match form {
                Form::Json if n > 0 => piece.push(','),
                Form::Json | Form::Ndjson | Form::Csv => {}
            }
            match form {
                Form::Json | Form::Ndjson => self.line(&mut piece, n),
                Form::Csv => self.record(&mut piece, n),
            }
            if piece.len() >= CHUNK {
                pieces.push(std::mem::take(&mut piece).into());
            }
        }
        if form == Form::Json {
            piece.push_str("]}");
        }
        pieces.push(piece.into());
        Ok(pieces)
    }

    /// A batch that is to be filled in parts.
    ///
    /// # Errors
    /// As [`Self::body`].
    pub fn held(&self) -> Result<Bytes> {
        Ok(self.head(json!({"hold": true}))?.into())
    }

    /// The batch without recipients, and with these fields.
    fn head(&self, more: serde_json::Value) -> Result<String> {
        let mut head = json!({
            "campaign": "loadtest",
            "from": {"email": self.from, "name": FROM_NAME},
            "subject": SUBJECT,
            "html": self.html()?,
            "text": self.text(),
        });
        if let (Some(head), serde_json::Value::Object(more)) = (head.as_object_mut(), more) {
            head.extend(more);
        }
        Ok(head.to_string())
    }

    /// Recipient `n` as JSON, on a line of its own.
    fn line(&self, out: &mut String, n: u64) {
        let (email, name, prospect) = (self.email(n), name(n), prospect(n));
        let vars = vars(n, self.vars);
        // Writing to a string cannot fail.
        writeln!(
            out,
            "{{\"email\":\"{email}\",\"name\":\"{name}\",\"prospect_id\":\"{prospect}\",\"vars\":{vars}}}"
        )
        .ok();
    }

    /// Recipient `n` in a table.
    fn record(&self, out: &mut String, n: u64) {
        write!(out, "{},{},{}", self.email(n), name(n), prospect(n)).ok();
        for var in 0..self.vars {
            write!(out, ",{n} of {var}").ok();
        }
        out.push('\n');
    }

    /// The content as the service compiles it, for whoever makes the messages without it.
    ///
    /// # Errors
    /// As [`Self::body`].
    pub fn spec(&self) -> Result<ContentSpec> {
        Ok(ContentSpec {
            from: Mailbox {
                email: self.from.parse()?,
                name: Some(FROM_NAME.to_owned()),
            },
            reply_to: None,
            subject: SUBJECT.to_owned(),
            html: Some(self.html()?),
            text: Some(self.text()),
            headers: BTreeMap::new(),
            vars: serde_json::Map::new(),
            tracking: TrackingSpec::default(),
            list_unsubscribe: true,
            feedback_id: None,
            attachments: Vec::new(),
            raw: None,
            report: None,
        })
    }

    /// Recipient `n`, as in [`Self::body`].
    ///
    /// # Errors
    /// When there are more than a batch can have.
    pub fn row(&self, n: u64) -> Result<Row> {
        Ok(Row {
            name: Some(name(n).into()),
            prospect_id: Some(prospect(n).into()),
            vars: Some(vars(n, self.vars).into()),
            ..Row::new(u32::try_from(n)?, self.email(n).parse()?)
        })
    }

    /// The domains of all recipients.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.domains).map(|domain| format!("d{domain}.{}", self.below))
    }

    fn email(&self, n: u64) -> String {
        let beside = self.beside * BESIDE.len() as u64;
        let turn = usize::try_from(n % BESIDE.len() as u64).unwrap_or_default();
        if let Some(name) = BESIDE.get(turn).filter(|_| n < beside) {
            return format!("person{n}@{name}.{}", self.below);
        }
        let domain = (n - beside) / self.in_a_row % self.domains;
        format!("person{n}@d{domain}.{}", self.below)
    }

    fn text(&self) -> String {
        let mut text = String::from("Dear {{ name }},\n\n");
        self.uses(&mut text, "", "\n");
        text
    }

    fn html(&self) -> Result<String> {
        let mut html = String::from("<html><body>\n<h1>Dear {{ name }}</h1>\n");
        self.uses(&mut html, "<p>", "</p>\n");
        for link in 0..self.links {
            // Writing to a string cannot fail.
            writeln!(
                html,
                "<p><a href=\"https://shop.example/offer/{link}?from=mail\">Offer {link}</a></p>"
            )
            .ok();
        }
        let tail = "</body></html>\n";
        let bare = html.len() + tail.len() + self.text().len();
        ensure!(
            bare <= self.size,
            "{} variables and {} links do not fit into {} bytes: it takes {bare} at least",
            self.vars,
            self.links,
            self.size
        );
        html.extend(FILLER.chars().cycle().take(self.size - bare));
        html.push_str(tail);
        Ok(html)
    }

    fn uses(&self, out: &mut String, before: &str, after: &str) {
        for var in 0..self.vars {
            write!(out, "{before}Your number {var} is {{{{ v{var} }}}}.{after}").ok();
        }
    }
}

/// A JSON document that is written as it is read.
#[derive(Debug)]
pub struct Generated {
    shape: Shape,
    first: u64,
    next: u64,
    end: u64,
    pending: String,
    closed: bool,
}

impl Generated {
    /// The next piece, until there is none.
    pub fn piece(&mut self) -> Option<Bytes> {
        while self.pending.len() < CHUNK && self.next < self.end {
            self.recipient();
        }
        if self.next >= self.end && !self.closed {
            self.pending.push_str("]}");
            self.closed = true;
        }
        let piece = std::mem::take(&mut self.pending);
        (!piece.is_empty()).then(|| piece.into())
    }

    fn recipient(&mut self) {
        if self.next != self.first {
            self.pending.push(',');
        }
        self.shape.line(&mut self.pending, self.next);
        self.next += 1;
    }
}

fn name(n: u64) -> String {
    format!("Person {n}")
}

fn prospect(n: u64) -> String {
    format!("p-{n}")
}

/// A JSON object.
fn vars(n: u64, vars: u64) -> String {
    let mut json = String::from("{");
    for var in 0..vars {
        let comma = if var == 0 { "" } else { "," };
        // Writing to a string cannot fail.
        write!(json, "{comma}\"v{var}\":\"{n} of {var}\"").ok();
    }
    json.push('}');
    json
}

impl Body for Generated {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.piece().map(|piece| Ok(Frame::data(piece))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn shape() -> Shape {
        Shape {
            recipients: 3_000,
            domains: 7,
            in_a_row: 1,
            below: "example".to_owned(),
            beside: 0,
            vars: 5,
            links: 10,
            size: 10 * 1024,
            from: "a\"b@brand.example".to_owned(),
        }
    }

    fn whole(mut body: Generated) -> Value {
        let mut text = Vec::new();
        while let Some(piece) = body.piece() {
            assert!(piece.len() < 2 * CHUNK, "pieces are bounded");
            text.extend_from_slice(&piece);
        }
        serde_json::from_slice(&text).expect("JSON")
    }

    #[test]
    fn a_batch_has_the_shape_that_was_asked_for() {
        let batch = whole(shape().body(0, 3_000).expect("a body"));
        let recipients = batch["recipients"].as_array().expect("recipients");
        assert_eq!(recipients.len(), 3_000);
        assert_eq!(recipients[8]["email"], "person8@d1.example");
        assert_eq!(recipients[8]["vars"].as_object().expect("vars").len(), 5);
        assert_eq!(batch["from"]["email"], "a\"b@brand.example");
        let html = batch["html"].as_str().expect("HTML");
        let text = batch["text"].as_str().expect("text");
        assert_eq!(html.len() + text.len(), 10 * 1024);
        assert_eq!(html.matches("<a href=").count(), 10);
        for var in 0..5 {
            let used = format!("{{{{ v{var} }}}}");
            assert!(html.contains(&used) && text.contains(&used), "{used}");
        }
    }

    #[test]
    fn parts_go_on_where_the_one_before_ended() {
        let batch = whole(shape().body(10, 12).expect("a body"));
        let recipients = batch["recipients"].as_array().expect("recipients");
        let emails: Vec<&Value> = recipients.iter().map(|one| &one["email"]).collect();
        assert_eq!(emails, ["person10@d3.example", "person11@d4.example"]);
    }

    #[test]
    fn recipients_of_a_domain_may_follow_each_other() {
        let shape = Shape {
            in_a_row: 2,
            below: "slow.example".to_owned(),
            ..shape()
        };
        let domains: Vec<_> = (12..16)
            .map(|n| shape.row(n).expect("a row").email.domain().to_owned())
            .collect();
        let [first, next] = ["d6.slow.example", "d0.slow.example"];
        assert_eq!(domains, [first, first, next, next]);
    }

    #[test]
    fn those_at_bad_hosts_come_first() {
        let shape = Shape {
            beside: 2,
            ..shape()
        };
        let domains: Vec<_> = (4..8)
            .map(|n| shape.row(n).expect("a row").email.domain().to_owned())
            .collect();
        assert_eq!(
            domains,
            ["mute.example", "cut.example", "d0.example", "d1.example"]
        );
    }

    #[test]
    fn a_row_is_the_recipient_that_is_submitted() {
        let batch = whole(shape().body(8, 9).expect("a body"));
        let (row, given) = (shape().row(8).expect("a row"), &batch["recipients"][0]);
        assert_eq!(row.email.as_str(), given["email"]);
        assert_eq!(row.name.as_deref(), given["name"].as_str());
        assert_eq!(row.prospect_id.as_deref(), given["prospect_id"].as_str());
        let vars: Value = serde_json::from_str(row.vars.as_deref().expect("vars")).expect("JSON");
        assert_eq!(vars, given["vars"]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let small = Shape {
            size: 500,
            ..shape()
        };
        let error = small.body(0, 1).expect_err("too small").to_string();
        assert!(error.contains("do not fit into 500 bytes"), "{error}");
        assert!(parse_size("17MiB").is_err());
        assert_eq!(parse_size("10KiB").expect("a size"), 10 * 1024);
    }
}
