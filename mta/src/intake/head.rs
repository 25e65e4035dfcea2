//! The head of a batch: everything but its recipients.
//!
//! Owns which fields a batch has, and what each may be, as far as that can be said without the
//! account, the keys or the templates. Pure.

use std::collections::BTreeMap;

use content::{Attachment, Mailbox};
use model::units::Rate;
use model::{EmailAddress, Guardrails, Priority, SendWindow, Timestamp, TrackingMode};
use serde_json::{Map, Value};

use super::fields::{Fields, Mistakes, expected, no_control, string};
use super::row::METADATA_MAX;
use super::variants::{self, TestRequest, VariantRequest};

/// The list that an unsubscribe leaves when the batch names none (contract, section 6).
pub(crate) const DEFAULT_LIST: &str = "default";
/// The pool of a batch that names none.
const DEFAULT_POOL: &str = "default";
const LABEL_MAX: usize = 128;
const NAME_MAX: usize = 256;

/// What a caller wants sent, apart from to whom.
#[derive(Debug)]
pub(crate) struct BatchRequest {
    pub(crate) account: Option<String>,
    pub(crate) campaign: Option<String>,
    pub(crate) list: String,
    pub(crate) from: Mailbox,
    pub(crate) reply_to: Option<EmailAddress>,
    pub(crate) subject: String,
    pub(crate) html: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) vars: Map<String, Value>,
    pub(crate) tracking: TrackingRequest,
    pub(crate) list_unsubscribe: bool,
    pub(crate) send_at: Option<Timestamp>,
    pub(crate) expires_at: Option<Timestamp>,
    pub(crate) window: Option<SendWindow>,
    pub(crate) priority: Priority,
    /// By name; none: the default.
    pub(crate) pool: Option<String>,
    pub(crate) rate: Rate,
    pub(crate) metadata: Value,
    pub(crate) allow_duplicates: bool,
    /// Parts follow.
    pub(crate) hold: bool,
    /// A complete message in base64, in place of the content.
    pub(crate) raw: Option<String>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) guardrails: Option<Guardrails>,
    pub(crate) variants: Vec<VariantRequest>,
    /// Is there when variants are.
    pub(crate) test: Option<TestRequest>,
}

/// `tracking`
#[derive(Debug)]
pub(crate) struct TrackingRequest {
    pub(crate) opens: bool,
    pub(crate) clicks: bool,
    pub(crate) text_links: bool,
    pub(crate) utm: BTreeMap<String, String>,
    pub(crate) mode: Option<TrackingMode>,
}

impl Default for TrackingRequest {
    fn default() -> Self {
        Self {
            opens: true,
            clicks: true,
            text_links: false,
            utm: BTreeMap::new(),
            mode: None,
        }
    }
}

/// Reads the head; what is wrong stands among the mistakes, and then it is of no use.
pub(crate) fn read(
    document: Value,
    recipient_count: u32,
    now: Timestamp,
    mistakes: &mut Mistakes,
) -> Option<BatchRequest> {
    let mut fields = Fields::of(String::new(), document, mistakes);
    let raw = fields.string("raw");
    let from = sender(&mut fields, raw.as_deref());
    if raw.is_some() {
        beside_raw(&mut fields);
    }
    let (variants, test) = variants::read(&mut fields);
    // What every variant has, the batch need not have.
    let all = |has: fn(&VariantRequest) -> bool| !variants.is_empty() && variants.iter().all(has);
    let subject = if raw.is_some() || (!fields.has("subject") && all(|of| of.subject.is_some())) {
        fields.take("subject");
        Some(String::new())
    } else {
        fields.required("subject", string)
    };
    let has_bodies = all(|of| of.html.is_some() || of.text.is_some());
    let (html, text) = bodies(&mut fields, raw.is_some() || has_bodies);
    let attachments = fields
        .converted("attachments", attachments)
        .unwrap_or_default();
    let guardrails = fields.within("guardrails", guardrails).flatten();
    let hold = fields.flag("hold", false);
    recipients(&mut fields, recipient_count, hold);
    let send_at = fields.time("send_at");
    let decided = variants::over(&variants, test.as_ref(), send_at.unwrap_or(now).max(now));
    let expires_at = expires_at(&mut fields, decided);
    let window = fields.within("window", window).flatten();
    let account = fields.label("account", LABEL_MAX);
    let campaign = fields.label("campaign", LABEL_MAX);
    let list = fields.label("list", LABEL_MAX);
    let reply_to = fields.parsed("reply_to");
    let headers = texts(&mut fields, "headers");
    let vars = fields.object("vars").unwrap_or_default();
    let tracking = fields.within("tracking", tracking).unwrap_or_default();
    let list_unsubscribe = fields.flag("list_unsubscribe", true);
    let priority = fields.parsed("priority").unwrap_or(Priority::Bulk);
    let rate = fields.parsed("rate").unwrap_or_default();
    let pool = fields.label("pool", LABEL_MAX);
    let metadata = metadata(&mut fields);
    let allow_duplicates = fields.flag("allow_duplicates", false);
    if allow_duplicates && !variants.is_empty() {
        let detail = "is not possible with variants: nobody may get two of them";
        fields.mistake("allow_duplicates", detail);
    }
    fields.finish();
    Some(BatchRequest {
        account,
        campaign,
        list: list.unwrap_or_else(|| DEFAULT_LIST.to_owned()),
        from: from?,
        reply_to,
        subject: subject?,
        html,
        text,
        headers,
        vars,
        tracking,
        list_unsubscribe,
        send_at,
        expires_at,
        window,
        priority,
        pool: pool.filter(|name| name != DEFAULT_POOL),
        rate,
        metadata,
        allow_duplicates,
        hold,
        raw,
        attachments,
        guardrails,
        variants,
        test,
    })
}

fn sender(fields: &mut Fields<'_>, raw: Option<&str>) -> Option<Mailbox> {
    if let (Some(raw), false) = (raw, fields.has("from")) {
        fields.take("from");
        // What is wrong with the message, its compilation says.
        return match content::from_of_raw(raw) {
            Ok(email) => Some(Mailbox { email, name: None }),
            Err(detail) => {
                fields.mistake("raw", detail);
                None
            }
        };
    }
    if !fields.has("from") {
        fields.mistake("from", "is missing");
        return None;
    }
    fields.within("from", |from| {
        let email = from.required("email", |value| {
            string(value)?
                .parse()
                .map_err(|error: model::AddressError| error.to_string())
        });
        let name = from.converted("name", display_name);
        Some(Mailbox {
            email: email?,
            name: name.filter(|name| !name.is_empty()),
        })
    })?
}

/// The name beside an address.
pub(super) fn display_name(value: Value) -> Result<String, String> {
    let name = string(value)?;
    if name.len() > NAME_MAX {
        return Err(format!("is longer than {NAME_MAX} bytes"));
    }
    no_control(&name).map(|()| name)
}

/// A message that is complete has no other content.
fn beside_raw(fields: &mut Fields<'_>) {
    for key in [
        "subject",
        "html",
        "text",
        "headers",
        "attachments",
        "reply_to",
        "vars",
        "variants",
        "ab_test",
    ] {
        if fields.has(key) {
            fields.take(key);
            fields.mistake(key, "stands beside raw, which is the whole message");
        }
    }
}

/// The most files of a batch.
const ATTACHMENTS_MAX: usize = 100;

fn attachments(value: Value) -> Result<Vec<Attachment>, String> {
    let Value::Array(items) = value else {
        return Err(expected(&value, "an array"));
    };
    if items.len() > ATTACHMENTS_MAX {
        return Err(format!("has more than {ATTACHMENTS_MAX} files"));
    }
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        filename: String,
        #[serde(rename = "type")]
        media_type: Option<String>,
        content: String,
        content_id: Option<String>,
    }
    let read = |(number, item): (usize, Value)| {
        let file: File =
            serde_json::from_value(item).map_err(|error| format!("file {number}: {error}"))?;
        Ok(Attachment {
            filename: file.filename,
            media_type: file
                .media_type
                .unwrap_or_else(|| "application/octet-stream".to_owned()),
            content: file.content,
            content_id: file.content_id,
        })
    };
    items.into_iter().enumerate().map(read).collect()
}

/// Fewer say nothing about a batch, unless the caller says so.
const MIN_DELIVERED: u64 = 500;

fn guardrails(fields: &mut Fields<'_>) -> Option<Guardrails> {
    let share = |value: Value| {
        let share = value.as_f64().filter(|share| (0.0..=1.0).contains(share));
        share.ok_or_else(|| expected(&value, "a share between 0 and 1"))
    };
    let of = Guardrails {
        bounce_rate: fields.converted("bounce_rate", share),
        complaint_rate: fields.converted("complaint_rate", share),
        min_delivered: fields
            .converted("min_delivered", |value| {
                let number = value.as_u64();
                number.ok_or_else(|| expected(&value, "a number of recipients"))
            })
            .unwrap_or(MIN_DELIVERED),
    };
    (of.bounce_rate.is_some() || of.complaint_rate.is_some()).then_some(of)
}

/// `{"from": "09:00", "to": "21:00"}`, with the time zone of those who have none.
fn window(fields: &mut Fields<'_>) -> Option<SendWindow> {
    let from = fields.required("from", |value| minute_of_day(&value, 23 * 60 + 59));
    let to = fields.required("to", |value| minute_of_day(&value, 24 * 60));
    let time_zone = fields.converted("time_zone", |value| {
        let name = string(value)?;
        let known = model::time_zone(&name);
        known.ok_or_else(|| "is no time zone of the IANA database, as Asia/Tokyo is".to_owned())
    });
    let (from, to) = (from?, to?);
    if from == to {
        fields.mistake(
            "to",
            "is the same time as from: leave out a window that is always open",
        );
    }
    Some(SendWindow {
        from,
        to: if to == 0 { 24 * 60 } else { to },
        time_zone,
    })
}

/// `HH:MM`, up to `last`.
fn minute_of_day(value: &Value, last: u16) -> Result<u16, String> {
    let digits = |text: &str| {
        let two = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        two.then(|| text.parse::<u16>().ok()).flatten()
    };
    let read = |text: &str| {
        let (hours, minutes) = text.split_once(':')?;
        let (hours, minutes) = (digits(hours)?, digits(minutes).filter(|of| *of < 60)?);
        Some(hours * 60 + minutes).filter(|minute| *minute <= last)
    };
    let minute = value.as_str().and_then(read);
    minute.ok_or_else(|| expected(value, "a time of day such as \"09:00\""))
}

fn bodies(fields: &mut Fields<'_>, has_others: bool) -> (Option<String>, Option<String>) {
    let missing = !fields.has("html") && !fields.has("text") && !has_others;
    if missing {
        fields.mistake("html", "is missing: a batch needs html or text");
    }
    (fields.string("html"), fields.string("text"))
}

/// The splitter left an empty array where recipients were taken out.
fn recipients(fields: &mut Fields<'_>, count: u32, hold: bool) {
    // Where they were found, this is left in its place; who is not there needs no mail.
    let followed = fields.take("recipients_from");
    if followed
        .as_ref()
        .is_some_and(|mark| *mark != Value::Bool(true))
    {
        fields.mistake("recipients_from", "is for batches alone");
    }
    let elsewhere = followed.is_some() || hold;
    match fields.take("recipients") {
        Some(Value::Array(_)) if count > 0 || elsewhere => {}
        Some(Value::Array(_)) => fields.mistake("recipients", "is empty"),
        Some(other) => fields.mistake("recipients", expected(&other, "an array")),
        None if elsewhere => {}
        None => fields.mistake("recipients", "is missing"),
    }
}

fn expires_at(fields: &mut Fields<'_>, release: Timestamp) -> Option<Timestamp> {
    let expires_at = fields.time("expires_at")?;
    if expires_at <= release {
        fields.mistake(
            "expires_at",
            "is not after the time at which the last of the batch is released",
        );
    }
    Some(expires_at)
}

fn tracking(fields: &mut Fields<'_>) -> TrackingRequest {
    let default = TrackingRequest::default();
    TrackingRequest {
        opens: fields.flag("opens", default.opens),
        clicks: fields.flag("clicks", default.clicks),
        text_links: fields.flag("text_links", default.text_links),
        utm: texts(fields, "utm"),
        mode: fields.parsed("mode"),
    }
}

/// An object whose values are text.
fn texts(fields: &mut Fields<'_>, key: &str) -> BTreeMap<String, String> {
    let read = fields.within(key, |inner| {
        let keys = inner.keys();
        let mut pair = |key: String| Some((inner.required(&key, string)?, key));
        keys.into_iter()
            .filter_map(&mut pair)
            .map(|(value, key)| (key, value))
            .collect()
    });
    read.unwrap_or_default()
}

fn metadata(fields: &mut Fields<'_>) -> Value {
    let metadata = fields.object("metadata").unwrap_or_default();
    let metadata = Value::Object(metadata);
    if metadata.to_string().len() > METADATA_MAX {
        fields.mistake("metadata", format!("is larger than {METADATA_MAX} bytes"));
    }
    metadata
}

/// Mistakes that only show against the account: its name, and its From domains.
pub(crate) fn domain_is_allowed(from: &EmailAddress, allowed: Option<&[model::Domain]>) -> bool {
    allowed.is_none_or(|domains| {
        domains
            .iter()
            .any(|domain| domain.as_str() == from.domain())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp::from_millis(1_763_712_300_000);

    fn minimal() -> Value {
        json!({"from": {"email": "news@brand.example"}, "subject": "s", "text": "t", "recipients": []})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut document = minimal();
        document[key] = value;
        document
    }

    fn mistakes_of(document: Value) -> Vec<String> {
        let mut mistakes = Mistakes::default();
        read(document, 1, NOW, &mut mistakes);
        mistakes
            .into_vec()
            .into_iter()
            .map(|error| format!("{} {}", error.path, error.code))
            .collect()
    }

    #[test]
    fn a_minimal_batch_has_the_defaults_of_the_contract() {
        let mut mistakes = Mistakes::default();
        let request = read(minimal(), 1, NOW, &mut mistakes).expect("read");
        assert!(mistakes.is_empty());
        assert_eq!(request.list, "default");
        assert_eq!(request.priority, Priority::Bulk);
        assert!(request.list_unsubscribe && request.tracking.opens && request.tracking.clicks);
        assert!(!request.tracking.text_links && !request.allow_duplicates);
        assert_eq!(request.metadata, json!({}));
        assert_eq!((request.pool, request.rate), (None, Rate::Unlimited));
    }

    #[test]
    fn null_and_whatever_asks_for_nothing_is_as_if_it_were_absent() {
        let mut document = minimal();
        for (key, value) in [
            ("html", Value::Null),
            ("send_at", Value::Null),
            ("attachments", json!([])),
            ("variants", json!([])),
            ("hold", json!(false)),
            ("pool", json!("default")),
            ("window", Value::Null),
            ("raw", Value::Null),
        ] {
            document[key] = value;
        }
        assert_eq!(mistakes_of(document), Vec::<String>::new());
    }

    #[test]
    fn a_window_has_two_times_of_day_and_perhaps_a_zone() {
        let read = |window: Value| {
            let mut mistakes = Mistakes::default();
            let head = read(with("window", window), 1, NOW, &mut mistakes);
            let paths: Vec<_> = mistakes.into_vec().into_iter().map(|of| of.path).collect();
            (head.and_then(|head| head.window), paths)
        };
        let window = |from, to, zone: Option<&str>| SendWindow {
            from,
            to,
            time_zone: zone.map(Box::from),
        };
        for (json, good) in [
            (
                json!({"from": "09:00", "to": "21:00"}),
                window(540, 1_260, None),
            ),
            (
                json!({"from": "21:00", "to": "06:30"}),
                window(1_260, 390, None),
            ),
            (
                json!({"from": "00:00", "to": "24:00"}),
                window(0, 1_440, None),
            ),
            (
                json!({"from": "18:00", "to": "00:00"}),
                window(1_080, 1_440, None),
            ),
            (
                json!({"from": "09:00", "to": "21:00", "time_zone": "asia/tokyo"}),
                window(540, 1_260, Some("Asia/Tokyo")),
            ),
        ] {
            assert_eq!(read(json), (Some(good), vec![]));
        }
        for (json, wrong) in [
            (json!({"from": "9:00", "to": "21:00"}), "/window/from"),
            (json!({"from": "24:00", "to": "21:00"}), "/window/from"),
            (json!({"from": "09:60", "to": "21:00"}), "/window/from"),
            (json!({"from": "09:00", "to": "24:01"}), "/window/to"),
            (json!({"from": "09:00", "to": 21}), "/window/to"),
            (json!({"from": "09:00"}), "/window/to"),
            (json!({"from": "09:00", "to": "09:00"}), "/window/to"),
            (
                json!({"from": "09:00", "to": "21:00", "time_zone": "Asia/Tokio"}),
                "/window/time_zone",
            ),
            (
                json!({"from": "09:00", "to": "21:00", "days": []}),
                "/window/days",
            ),
            (json!("09:00-21:00"), "/window"),
        ] {
            assert!(read(json.clone()).1.contains(&wrong.to_owned()), "{json}");
        }
    }

    #[test]
    fn every_mistake_is_named_with_its_path() {
        let document = json!({
            "from": {"email": "news", "nme": "x"}, "html": 7, "recipients": {}, "subjct": "s",
            "headers": {"X-A": 1}, "tracking": {"opens": "yes", "mode": "all", "utm": {"a": []}},
            "priority": "high", "send_at": "tomorrow", "metadata": [], "list": "", "ab_test": {"mode": "winner"}, "a/b": 1,
        });
        let mut found = mistakes_of(document);
        found.sort_unstable();
        assert_eq!(
            found,
            [
                "/ab_test invalid_field",
                "/a~1b unknown_field",
                "/from/email invalid_field",
                "/from/nme unknown_field",
                "/headers/X-A invalid_field",
                "/html invalid_field",
                "/list invalid_field",
                "/metadata invalid_field",
                "/priority invalid_field",
                "/recipients invalid_field",
                "/send_at invalid_field",
                "/subjct unknown_field",
                "/subject invalid_field",
                "/tracking/mode invalid_field",
                "/tracking/opens invalid_field",
                "/tracking/utm/a invalid_field",
            ]
        );
        let mut mistakes = Mistakes::default();
        read(minimal(), 0, NOW, &mut mistakes);
        assert_eq!(mistakes.into_vec()[0].path, "/recipients");
        assert_eq!(
            mistakes_of(json!([])).first().map(String::as_str),
            Some(" invalid_field")
        );
    }

    #[test]
    fn values_are_bounded() {
        for (key, value, path) in [
            (
                "from",
                json!({"email": "a@x.example", "name": "a
Bcc: b@x.example"}),
                "/from/name",
            ),
            ("metadata", json!({"a": "x".repeat(1024)}), "/metadata"),
            ("campaign", json!("x".repeat(129)), "/campaign"),
            (
                "campaign",
                json!(
                    "a
b"
                ),
                "/campaign",
            ),
            ("expires_at", json!("2020-01-01T00:00:00Z"), "/expires_at"),
            ("reply_to", json!("help"), "/reply_to"),
            ("rate", json!("0/s"), "/rate"),
            ("rate", json!(5), "/rate"),
            ("pool", json!(""), "/pool"),
        ] {
            assert_eq!(
                mistakes_of(with(key, value)),
                [format!("{path} invalid_field")],
                "{key}"
            );
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "\\PC{0,8}".prop_map(Value::from),
            "[a-z.]{1,4}@[a-z]{1,3}\\.example".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            let key = prop::sample::select(vec!["email", "name", "mode", "opens", "utm", "x/~"]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::vec((key.prop_map(str::to_owned), inner), 0..4)
                    .prop_map(Value::from_iter),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_field_is_read_or_named(key in prop::sample::select(FIELDS.to_vec()), value in any_value()) {
            let pointer = format!("/{key}");
            // Either body may be missing, not both.
            let mut document = minimal();
            document["html"] = json!("h");
            if key == "raw" && value.is_string() {
                // It is the whole message: what has a place in it may not stand beside it.
                for part in ["subject", "html", "text"] {
                    document.as_object_mut().and_then(|fields| fields.remove(part));
                }
            }
            document[key] = value;
            for mistake in mistakes_of(document) {
                prop_assert!(mistake.starts_with(&pointer), "{mistake} is not about {pointer}");
            }
        }
    }

    const FIELDS: [&str; 28] = [
        "campaign",
        "account",
        "list",
        "from",
        "reply_to",
        "subject",
        "html",
        "text",
        "headers",
        "attachments",
        "vars",
        "tracking",
        "list_unsubscribe",
        "send_at",
        "expires_at",
        "window",
        "priority",
        "rate",
        "pool",
        "metadata",
        "guardrails",
        "hold",
        "allow_duplicates",
        "variants",
        "ab_test",
        "recipients",
        "raw",
        "recipients_from",
    ];

    #[test]
    fn every_field_of_the_contract_is_known() {
        for key in FIELDS {
            let unknown = format!("/{key} unknown_field");
            assert!(
                !mistakes_of(with(key, json!(7))).contains(&unknown),
                "{key}"
            );
        }
    }

    #[test]
    fn a_from_domain_is_compared_whole() {
        let from: EmailAddress = "a@Brand.example".parse().expect("an address");
        let domains: Vec<model::Domain> = vec!["brand.example".parse().expect("a domain")];
        assert!(domain_is_allowed(&from, None) && domain_is_allowed(&from, Some(&domains)));
        let other: EmailAddress = "a@sub.brand.example".parse().expect("an address");
        assert!(!domain_is_allowed(&other, Some(&domains)));
    }
}
