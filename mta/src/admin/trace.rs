//! `GET /v1/trace`: the live transcript of a destination or a message, as NDJSON.
//!
//! Ends after `for`, with the process, or when whoever listens is gone. Bounded: a slow reader
//! misses lines and is told so.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use model::MessageId;
use model::units::parse_duration;
use service::config::Scope;

use super::Api;
use super::auth::{Caller, CanRead};
use super::params::Params;
use super::problem::{Answer, Code, Refusal};
use crate::shaping::Destination;
use crate::trace::{Heard, Line, Listener, Voice};

/// How long it is listened, when the caller does not say, and at most.
const TIMES: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(3_600));
/// How often a stream without lines shows that it is alive.
const BEAT: Duration = Duration::from_secs(10);
/// Connections of which the beginning is kept until they carry the message, and lines of each.
const BEGINNINGS: (usize, usize) = (256, 40);

/// Lines after the message's own that are told too when nobody knows whose they are: replies on a
/// connection that was joined in the middle.
const FOLLOWING: usize = 8;

/// What of it all a listener wants.
struct Wanted {
    destination: Destination,
    message: Option<MessageId>,
    /// How connections began, for a message that they may carry later.
    beginnings: HashMap<u64, VecDeque<Arc<Line>>>,
    /// The connection that carries it, and how many lines of nobody's may follow.
    carrier: Option<(u64, usize)>,
}

struct Following {
    api: Arc<Api>,
    listener: Listener,
    wanted: Wanted,
    until: Instant,
}

pub(super) async fn trace(
    State(api): State<Arc<Api>>,
    CanRead(caller): CanRead,
    mut params: Params,
) -> Answer<Response> {
    let domain = params.filled("domain");
    let message = params.filled("message");
    let length = params.read("for", |text| {
        let length = parse_duration(text).map_err(|error| error.to_string())?;
        let fits = !length.is_zero() && length <= TIMES.1;
        fits.then_some(length)
            .ok_or_else(|| "is not between 1ms and 1h".to_owned())
    });
    params.finish()?;
    let wanted = match (domain, message) {
        (Some(name), None) => of_domain(&api, &caller, &name).await?,
        (None, Some(id)) => of_message(&api, &caller, &id).await?,
        _ => {
            let detail = "name one of domain and message";
            return Err(Refusal::new(Code::InvalidField, detail));
        }
    };
    let listener = api.explainer.sending.traces().listen();
    let full = || Refusal::new(Code::Unavailable, "too many are listening already");
    let following = Following {
        listener: listener.ok_or_else(full)?,
        wanted,
        until: api.clock.instant() + length.unwrap_or(TIMES.0),
        api,
    };
    // An empty line says that it is listened from now on.
    let first = stream::once(async { Ok::<_, io::Error>(Bytes::from_static(b"\n")) });
    let lines = stream::unfold(following, |mut following| async {
        let bytes = following.next().await?;
        Some((Ok::<_, io::Error>(bytes), following))
    });
    let all = futures_util::StreamExt::chain(first, lines);
    let mut response = Body::from_stream(all).into_response();
    let headers = response.headers_mut();
    let ndjson = HeaderValue::from_static("application/x-ndjson");
    headers.insert(header::CONTENT_TYPE, ndjson);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A destination carries everybody's mail.
async fn of_domain(api: &Api, caller: &Caller, name: &str) -> Answer<Wanted> {
    if !caller.may(Scope::Admin) {
        let detail = "the key lacks the scope admin, which a destination needs";
        return Err(Refusal::new(Code::ForbiddenScope, detail));
    }
    let resolved = api.explainer.resolve(name, &[]).await;
    let resolved = resolved.ok_or_else(|| Refusal::not_found("domain or destination"))?;
    Ok(Wanted::new(resolved.destination, None))
}

async fn of_message(api: &Api, caller: &Caller, id: &str) -> Answer<Wanted> {
    let unknown = || Refusal::not_found("message");
    let id: MessageId = id.parse().map_err(|_| unknown())?;
    let story = api.store.message(id).await?;
    let story = story.filter(|story| caller.sees(&story.batch.account));
    let story = story.ok_or_else(unknown)?;
    let domain = story.recipient.row.email.domain();
    let resolved = api.explainer.resolve(domain, &[]).await;
    let resolved = resolved.ok_or_else(unknown)?;
    Ok(Wanted::new(resolved.destination, Some(id)))
}

impl Following {
    /// The next bytes; none: it is over.
    async fn next(&mut self) -> Option<Bytes> {
        let until = self.until.min(self.api.clock.instant() + BEAT);
        loop {
            if self.api.clock.instant() >= self.until {
                return None;
            }
            tokio::select! {
                heard = self.listener.next() => {
                    let lines = match heard? {
                        Heard::Line(line) => self.wanted.take(line),
                        Heard::Missed(count) => vec![missed(count, &self.wanted, &self.api)],
                    };
                    if !lines.is_empty() {
                        return Some(lines.iter().map(|line| ndjson(line)).collect::<String>().into());
                    }
                }
                () = tokio::time::sleep_until(until.into()) => return Some(Bytes::from_static(b"\n")),
                () = self.api.shutdown.begun() => return None,
            }
        }
    }
}

fn ndjson(line: &Line) -> String {
    // A line has no failing serializer.
    let mut text = serde_json::to_string(line).unwrap_or_default();
    text.push('\n');
    text
}

fn missed(count: u64, wanted: &Wanted, api: &Api) -> Arc<Line> {
    Arc::new(Line {
        at: api.clock.now(),
        connection: 0,
        destination: wanted.destination.clone(),
        source: "".into(),
        host: "".into(),
        from: Voice::Note,
        text: format!("{count} lines were missed: this listener is too slow"),
        message: None,
    })
}

impl Wanted {
    fn new(destination: Destination, message: Option<MessageId>) -> Self {
        Self {
            destination,
            message,
            beginnings: HashMap::new(),
            carrier: None,
        }
    }

    /// What is told because of this line.
    fn take(&mut self, line: Arc<Line>) -> Vec<Arc<Line>> {
        if line.destination != self.destination {
            return Vec::new();
        }
        let Some(message) = self.message else {
            return vec![line];
        };
        if line.message == Some(message) {
            self.carrier = Some((line.connection, FOLLOWING));
            let before = self.beginnings.remove(&line.connection);
            return before.into_iter().flatten().chain([line]).collect();
        }
        if line.message.is_none() {
            if let Some((connection, left @ 1..)) = self.carrier
                && connection == line.connection
            {
                self.carrier = Some((connection, left - 1));
                return vec![line];
            }
            self.keep(line);
        }
        Vec::new()
    }

    fn keep(&mut self, line: Arc<Line>) {
        let (connections, lines) = BEGINNINGS;
        if self.beginnings.len() >= connections && !self.beginnings.contains_key(&line.connection) {
            // The oldest connection is the least likely to carry it yet.
            let oldest = self.beginnings.keys().min().copied();
            oldest.map(|oldest| self.beginnings.remove(&oldest));
        }
        let kept = self.beginnings.entry(line.connection).or_default();
        // How it began is worth more than what came between.
        if kept.len() < lines {
            kept.push_back(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Timestamp;

    fn line(connection: u64, text: &str, message: Option<MessageId>) -> Arc<Line> {
        Arc::new(Line {
            at: Timestamp::from_millis(0),
            connection,
            destination: Destination::named("x.example"),
            source: "ip1".into(),
            host: "mx".into(),
            from: Voice::Us,
            text: text.to_owned(),
            message,
        })
    }

    fn texts(lines: &[Arc<Line>]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn a_message_is_told_with_how_its_connection_began() {
        let id = |index| MessageId {
            batch: model::BatchId::from_bytes([1; 16]),
            index,
        };
        let mut wanted = Wanted::new(Destination::named("x.example"), Some(id(1)));
        for (connection, text, message) in [
            (1, "EHLO", None),
            (2, "HELO", None),
            (1, "MAIL other", Some(id(2))),
        ] {
            assert!(wanted.take(line(connection, text, message)).is_empty());
        }
        let told = wanted.take(line(1, "MAIL", Some(id(1))));
        assert_eq!(texts(&told), ["EHLO", "MAIL"]);
        let told = wanted.take(line(1, "RCPT", Some(id(1))));
        assert_eq!(texts(&told), ["RCPT"]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut wanted = Wanted::new(
            Destination::named("x.example"),
            Some(MessageId {
                batch: model::BatchId::from_bytes([1; 16]),
                index: 0,
            }),
        );
        for connection in 0..1_000 {
            for _ in 0..100 {
                wanted.take(line(connection, "NOOP", None));
            }
        }
        let kept: usize = wanted.beginnings.values().map(VecDeque::len).sum();
        assert!(kept <= BEGINNINGS.0 * BEGINNINGS.1, "{kept}");
        let other = Wanted::new(Destination::named("y.example"), None).take(line(1, "x", None));
        assert!(other.is_empty());
    }
}
