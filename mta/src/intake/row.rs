//! One recipient: from JSON to a [`Row`].
//!
//! Owns what a recipient may be. A value that is wrong (address, name, vars) is a [`Rejection`] by
//! index, and the rest of the batch goes on; what no recipient can have (a field that does not
//! exist, JSON that is broken) refuses the whole call. Pure; knows nothing of the other recipients.

use std::borrow::Cow;
use std::fmt;

use model::{EmailAddress, Row, TrackingMode};
use serde::Serialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::fields::{Mistakes, no_control, pointer_step};
use super::scan::{Plain, Vars, scan};
use crate::admin::problem::Code;

/// The largest `metadata`, in bytes of JSON.
pub(crate) const METADATA_MAX: usize = 1 << 10;
const NAME_MAX: usize = 256;
const PROSPECT_MAX: usize = 256;

/// Why a recipient was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RejectionCode {
    InvalidAddress,
    Duplicate,
    MissingVariable,
    InvalidVars,
}

/// A recipient that was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Rejection {
    pub(crate) index: u32,
    /// As it was given, as far as it was text; at most 254 characters.
    pub(crate) email: Option<String>,
    pub(crate) code: RejectionCode,
    pub(crate) detail: String,
}

/// What became of one recipient.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// Good as far as it can be judged alone, without the templates.
    Good(Row),
    Rejected(Rejection),
    /// What is wrong with the call stands among the mistakes.
    Refused,
}

const FIELDS: [&str; 7] = [
    "email",
    "name",
    "prospect_id",
    "time_zone",
    "vars",
    "metadata",
    "tracking",
];

/// Reads the recipient with this index; what a look at it said of its variables stands in `vars`.
///
/// # Errors
/// When it is not JSON.
pub(crate) fn parse(
    json: &[u8],
    index: u32,
    mistakes: &mut Mistakes,
    vars: &mut Vars,
) -> Result<Parsed, serde_json::Error> {
    if let Some(row) = scan(json, vars).and_then(|plain| plain_row(plain, index)) {
        return Ok(Parsed::Good(row));
    }
    vars.forget();
    read(json, index, mistakes)
}

/// Whether the recipient with this index refuses the call; what it is otherwise is of no interest.
///
/// # Errors
/// When it is not JSON.
pub(crate) fn check(
    json: &[u8],
    index: u32,
    mistakes: &mut Mistakes,
    vars: &mut Vars,
) -> Result<(), serde_json::Error> {
    if scan(json, vars).is_some() {
        return Ok(());
    }
    read(json, index, mistakes).map(drop)
}

/// The recipient, when nothing is wrong with its values.
fn plain_row(plain: Plain<'_>, index: u32) -> Option<Row> {
    // What is wrong is for the reader to say.
    let text = |text: Option<&str>, max: usize| match text {
        None | Some("") => Some(None),
        Some(text) => {
            let fits = text.len() <= max && no_control(text).is_ok();
            fits.then(|| Some(Box::from(text)))
        }
    };
    Some(Row {
        index,
        email: plain.email.parse().ok()?,
        name: text(plain.name, NAME_MAX)?,
        prospect_id: text(plain.prospect_id, PROSPECT_MAX)?,
        vars: plain.vars.filter(|json| *json != "{}").map(Box::from),
        metadata: plain.metadata.map(Box::from),
        tracking: None,
        time_zone: match plain.time_zone {
            None | Some("") => None,
            Some(name) => Some(model::time_zone(name)?),
        },
    })
}

/// Reads any recipient.
fn read(json: &[u8], index: u32, mistakes: &mut Mistakes) -> Result<Parsed, serde_json::Error> {
    let mut from = serde_json::Deserializer::from_slice(json);
    let raw = from.deserialize_any(RawRowVisitor)?;
    from.end()?;
    let Some(raw) = raw else {
        mistakes.add(
            format!("/recipients/{index}"),
            Code::InvalidField,
            "is not an object",
        );
        return Ok(Parsed::Refused);
    };
    Ok(raw.judge(index, mistakes))
}

/// A recipient larger than the spool keeps.
pub(crate) fn too_large(index: u32) -> Rejection {
    let detail = format!(
        "/recipients/{index} is larger than {} bytes",
        super::spool::ROW_MAX
    );
    Rejection {
        index,
        email: None,
        code: RejectionCode::InvalidVars,
        detail,
    }
}

/// The fields as they were sent, unread.
#[derive(Default)]
struct RawRow<'j> {
    values: [Option<&'j RawValue>; FIELDS.len()],
    /// Fields that do not exist, and those that were there twice.
    strange: Vec<(String, Code, &'static str)>,
}

struct RawRowVisitor;

impl<'j> Visitor<'j> for RawRowVisitor {
    type Value = Option<RawRow<'j>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a recipient")
    }

    fn visit_map<A: MapAccess<'j>>(self, mut from: A) -> Result<Self::Value, A::Error> {
        let mut row = RawRow::default();
        while let Some((key, value)) = from.next_entry::<Key<'j>, &RawValue>()? {
            match FIELDS.iter().position(|field| *field == key.0) {
                Some(at) if row.values[at].is_none() => row.values[at] = Some(value),
                _ if row.strange.len() >= 8 => {}
                Some(_) => {
                    row.strange
                        .push((key.0.into_owned(), Code::InvalidField, "is there twice"))
                }
                None => row.strange.push((
                    key.0.into_owned(),
                    Code::UnknownField,
                    "there is no such field",
                )),
            }
        }
        Ok(Some(row))
    }

    // Whatever else is JSON is read to its end, so that only the broken is called broken.
    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_seq<A: serde::de::SeqAccess<'j>>(self, mut from: A) -> Result<Self::Value, A::Error> {
        while from.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

/// A key, borrowed where it has no escape.
struct Key<'j>(Cow<'j, str>);

impl<'j> serde::Deserialize<'j> for Key<'j> {
    fn deserialize<D: Deserializer<'j>>(from: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'j> Visitor<'j> for KeyVisitor {
            type Value = Key<'j>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, key: &'j str) -> Result<Key<'j>, E> {
                Ok(Key(Cow::Borrowed(key)))
            }
            fn visit_str<E>(self, key: &str) -> Result<Key<'j>, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        from.deserialize_str(KeyVisitor)
    }
}

/// A wrong value of one recipient.
type Wrong = (RejectionCode, String);

impl RawRow<'_> {
    fn value(&self, field: &str) -> Option<&str> {
        let at = FIELDS.iter().position(|known| *known == field)?;
        self.values
            .get(at)
            .copied()
            .flatten()
            .map(RawValue::get)
            .filter(|json| *json != "null")
    }

    fn judge(&self, index: u32, mistakes: &mut Mistakes) -> Parsed {
        for (key, code, detail) in &self.strange {
            mistakes.add(
                format!("/recipients/{index}/{}", pointer_step(key)),
                *code,
                *detail,
            );
        }
        let structure = self.structure(index, mistakes);
        let Some((metadata, tracking)) = structure.filter(|_| self.strange.is_empty()) else {
            return Parsed::Refused;
        };
        match self.row(index) {
            Ok(row) => Parsed::Good(Row {
                metadata,
                tracking,
                ..row
            }),
            Err((code, detail)) => Parsed::Rejected(Rejection {
                index,
                email: self.email_as_given(),
                code,
                detail,
            }),
        }
    }

    fn email_as_given(&self) -> Option<String> {
        let text: String = serde_json::from_str(self.value("email")?).ok()?;
        Some(text.chars().take(254).collect())
    }

    /// What is not a value of a person: `metadata` and `tracking`. None: a mistake was noted.
    fn structure(
        &self,
        index: u32,
        mistakes: &mut Mistakes,
    ) -> Option<(Option<Box<str>>, Option<TrackingMode>)> {
        let metadata = self.value("metadata").map(metadata).transpose();
        let tracking = self.value("tracking").map(tracking_mode).transpose();
        for (field, detail) in [
            ("metadata", metadata.as_ref().err()),
            ("tracking", tracking.as_ref().err()),
        ] {
            if let Some(detail) = detail {
                mistakes.add(
                    format!("/recipients/{index}/{field}"),
                    Code::InvalidField,
                    detail.as_str(),
                );
            }
        }
        Some((metadata.ok()?, tracking.ok()?))
    }

    /// The values of a person.
    fn row(&self, index: u32) -> Result<Row, Wrong> {
        let email = self.email(index)?;
        let name = self.text("name", index, NAME_MAX)?;
        let prospect_id = self.text("prospect_id", index, PROSPECT_MAX)?;
        let time_zone = self.time_zone(index)?;
        let vars = self.value("vars");
        // The templates read it, and see then whether its numbers and escapes are any good.
        if vars.is_some_and(|json| !json.starts_with('{')) {
            let detail = format!("/recipients/{index}/vars is not an object");
            return Err((RejectionCode::InvalidVars, detail));
        }
        Ok(Row {
            index,
            email,
            name,
            prospect_id,
            vars: vars.filter(|json| *json != "{}").map(Box::from),
            metadata: None,
            tracking: None,
            time_zone,
        })
    }

    fn time_zone(&self, index: u32) -> Result<Option<Box<str>>, Wrong> {
        let Some(name) = self.text("time_zone", index, NAME_MAX)? else {
            return Ok(None);
        };
        let detail = || {
            format!(
                "/recipients/{index}/time_zone is no time zone of the IANA database, as Asia/Tokyo is"
            )
        };
        let known =
            model::time_zone(&name).ok_or_else(|| (RejectionCode::InvalidVars, detail()))?;
        Ok(Some(known))
    }

    fn email(&self, index: u32) -> Result<EmailAddress, Wrong> {
        let wrong = |detail: &dyn fmt::Display| {
            (
                RejectionCode::InvalidAddress,
                format!("/recipients/{index}/email {detail}"),
            )
        };
        let json = self.value("email").ok_or_else(|| wrong(&"is missing"))?;
        let text: Cow<'_, str> =
            serde_json::from_str(json).map_err(|_| wrong(&"is not a string"))?;
        text.parse().map_err(|error| wrong(&error))
    }

    fn text(&self, field: &str, index: u32, max: usize) -> Result<Option<Box<str>>, Wrong> {
        let Some(json) = self.value(field) else {
            return Ok(None);
        };
        let wrong = |detail: String| {
            (
                RejectionCode::InvalidVars,
                format!("/recipients/{index}/{field} {detail}"),
            )
        };
        let text: Box<str> =
            serde_json::from_str(json).map_err(|_| wrong("is not a string".to_owned()))?;
        no_control(&text).map_err(wrong)?;
        if text.len() > max {
            return Err(wrong(format!("is longer than {max} bytes")));
        }
        Ok(Some(text).filter(|text| !text.is_empty()))
    }
}

fn metadata(json: &str) -> Result<Box<str>, String> {
    if json.len() > METADATA_MAX {
        return Err(format!("is larger than {METADATA_MAX} bytes"));
    }
    let object: Result<Map<String, Value>, _> = serde_json::from_str(json);
    object
        .map(|_| json.into())
        .map_err(|_| "is not a JSON object".to_owned())
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RowTracking {
    mode: TrackingMode,
}

fn tracking_mode(json: &str) -> Result<TrackingMode, String> {
    let tracking: Result<RowTracking, _> = serde_json::from_str(json);
    tracking
        .map(|tracking| tracking.mode)
        .map_err(|_| "is not {\"mode\": \"off | aggregate | last_date | individual\"}".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use content::Glimpse;
    use proptest::prelude::*;

    fn read_one(
        json: &str,
    ) -> (
        Result<Parsed, serde_json::Error>,
        Vec<(String, &'static str)>,
    ) {
        let mut mistakes = Mistakes::default();
        let parsed = parse(json.as_bytes(), 3, &mut mistakes, &mut Vars::default());
        (
            parsed,
            mistakes
                .into_vec()
                .into_iter()
                .map(|error| (error.path, error.code))
                .collect(),
        )
    }

    #[test]
    fn a_full_recipient_is_kept() {
        let json = r#" {"email":"A@X.example","name":"山田","prospect_id":"p-1","time_zone":"Asia/Tokyo",
            "vars":{"points":3},"metadata":{"a":1},"tracking":{"mode":"off"}} "#;
        let (Ok(Parsed::Good(row)), mistakes) = read_one(json) else {
            panic!("a good recipient")
        };
        assert_eq!(mistakes, []);
        assert_eq!(row.email.as_str(), "A@x.example");
        assert_eq!(row.index, 3);
        assert_eq!(row.name.as_deref(), Some("山田"));
        assert_eq!(row.vars.as_deref(), Some("{\"points\":3}"));
        assert_eq!(row.metadata.as_deref(), Some("{\"a\":1}"));
        assert_eq!(row.tracking, Some(TrackingMode::Off));
        assert_eq!(row.time_zone.as_deref(), Some("Asia/Tokyo"));
    }

    #[test]
    fn a_wrong_value_rejects_the_recipient() {
        use RejectionCode::*;
        let long = format!(r#"{{"email":"a@x.example","name":"{}"}}"#, "n".repeat(257));
        for (json, code, names) in [
            ("{}", InvalidAddress, "/recipients/3/email is missing"),
            (r#"{"email":null}"#, InvalidAddress, "is missing"),
            (r#"{"email":7}"#, InvalidAddress, "is not a string"),
            (r#"{"email":"no-at-sign"}"#, InvalidAddress, "has no @"),
            (
                r#"{"email":"a@x.example\r\nDATA"}"#,
                InvalidAddress,
                "/recipients/3/email",
            ),
            (
                r#"{"email":"\ud800@x.example"}"#,
                InvalidAddress,
                "/recipients/3/email",
            ),
            (
                r#"{"email":"a@x.example","name":"x\r\nBcc: b@x.example"}"#,
                InvalidVars,
                "/recipients/3/name has a control character",
            ),
            (
                r#"{"email":"a@x.example","name":7}"#,
                InvalidVars,
                "/recipients/3/name is not a string",
            ),
            (
                r#"{"email":"a@x.example","prospect_id":{}}"#,
                InvalidVars,
                "/recipients/3/prospect_id",
            ),
            (
                r#"{"email":"a@x.example","vars":[1]}"#,
                InvalidVars,
                "/recipients/3/vars",
            ),
            (
                r#"{"email":"a@x.example","time_zone":"Asia/Tokio"}"#,
                InvalidVars,
                "/recipients/3/time_zone is no time zone",
            ),
            (
                r#"{"email":"a@x.example","time_zone":9}"#,
                InvalidVars,
                "/recipients/3/time_zone is not a string",
            ),
            (&long, InvalidVars, "longer than 256"),
        ] {
            let (Ok(Parsed::Rejected(rejection)), mistakes) = read_one(json) else {
                panic!("{json}")
            };
            assert_eq!((rejection.code, rejection.index), (code, 3), "{json}");
            assert!(
                rejection.detail.contains(names),
                "{json}: {}",
                rejection.detail
            );
            assert_eq!(mistakes, [], "{json}");
        }
    }

    #[test]
    fn what_no_recipient_can_have_refuses_the_call() {
        let large = format!(
            r#"{{"email":"a@x.example","metadata":{{"a":"{}"}}}}"#,
            "x".repeat(1024)
        );
        for (json, path, code) in [
            (
                r#"{"email":"a@x.example","mail/x":1}"#,
                "/recipients/3/mail~1x",
                "unknown_field",
            ),
            (
                r#"{"email":"a@x.example","name":"a","name":"b"}"#,
                "/recipients/3/name",
                "invalid_field",
            ),
            (
                r#"{"email":"a@x.example","tracking":{"mode":"x"}}"#,
                "/recipients/3/tracking",
                "invalid_field",
            ),
            (
                r#"{"email":"a@x.example","tracking":{"mode":"off","a":1}}"#,
                "/recipients/3/tracking",
                "invalid_field",
            ),
            (
                r#"{"email":"a@x.example","metadata":[]}"#,
                "/recipients/3/metadata",
                "invalid_field",
            ),
            (&large, "/recipients/3/metadata", "invalid_field"),
            (r#""a@x.example""#, "/recipients/3", "invalid_field"),
            ("[[1],2]", "/recipients/3", "invalid_field"),
            ("null", "/recipients/3", "invalid_field"),
        ] {
            let (Ok(Parsed::Refused), mistakes) = read_one(json) else {
                panic!("{json}")
            };
            assert_eq!(mistakes, [(path.to_owned(), code)], "{json}");
        }
    }

    #[test]
    fn what_is_not_json_is_broken() {
        for json in [
            "",
            "{",
            "{} {}",
            r#"{"email":}"#,
            "{\"email\":\"\n\"}",
            r#"{"vars":{"a":[}}"#,
        ] {
            assert!(read_one(json).0.is_err(), "{json}");
        }
        assert!(
            parse(
                b"{\"name\":\"\xff\"}",
                0,
                &mut Mistakes::default(),
                &mut Vars::default()
            )
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn broken_is_what_serde_json_calls_broken(bytes in prop_oneof![any::<Vec<u8>>(), "[{}\\[\\]\",:a0-9ntrue ]{0,24}".prop_map(String::into_bytes)]) {
            let ours = parse(&bytes, 0, &mut Mistakes::default(), &mut Vars::default()).is_ok();
            prop_assert_eq!(ours, serde_json::from_slice::<Value>(&bytes).is_ok());
        }

        #[test]
        fn a_look_says_what_the_reader_says(json in recipient()) {
            let mut vars = Vars::default();
            if let Some(plain) = scan(json.as_bytes(), &mut vars) {
                let (mut mistakes, mut none) = (Mistakes::default(), Vars::default());
                let read = read(json.as_bytes(), 5, &mut mistakes);
                prop_assert!(mistakes.is_empty() && read.is_ok(), "{json}");
                match (plain_row(plain, 5), read) {
                    (Some(row), Ok(Parsed::Good(other))) => prop_assert_eq!(row, other),
                    (None, Ok(Parsed::Good(_) | Parsed::Rejected(_))) => {}
                    other => prop_assert!(false, "{json}: {other:?}"),
                }
                prop_assert!(check(json.as_bytes(), 5, &mut mistakes, &mut none).is_ok());
                let map: Map<String, Value> = serde_json::from_str(plain.vars.unwrap_or("{}"))?;
                for name in ["a", "b", "v1"] {
                    let said = match map.get(name) {
                        None => Glimpse::Absent,
                        Some(Value::String(_)) => Glimpse::Text,
                        Some(_) => Glimpse::Other,
                    };
                    let glimpse = vars.glimpse(name);
                    prop_assert!(glimpse == said || glimpse == Glimpse::Unknown && said != Glimpse::Absent, "{json}");
                }
            }
        }
    }

    /// Something like a recipient, most of them good, and some damaged in one place.
    fn recipient() -> impl Strategy<Value = String> {
        let space = "[ \\n]{0,1}";
        let text = "\"[a-z0-9é\u{7f}\u{85} ]{0,6}(\\\\[nu\"d])?\"";
        let scalar = prop_oneof![
            text,
            "-?[0-9]{1,17}([.][0-9]{0,3})?(e[0-9])?",
            "true|false|null|nul",
            "\\[(1|\"a\"|null)(,[{][}])?\\]",
            "[{](\"a\":(1|\\[\\])(,\"b\":\"\")?)?[}]",
        ];
        let vars = prop::collection::vec(("a|b|v1|é", scalar.clone()), 0..4).prop_map(|vars| {
            let vars = vars
                .iter()
                .map(|(name, value)| format!("\"{name}\":{value}"));
            format!("{{{}}}", vars.collect::<Vec<_>>().join(","))
        });
        let field = prop_oneof![
            6 => ("\"name\"|\"prospect_id\"|\"time_zone\"", text.prop_map(String::from)),
            6 => ("\"vars\"|\"metadata\"", vars),
            2 => ("\"time_zone\"", "\"(Asia/Tokyo|Europe/Paris|)\"".prop_map(String::from)),
            1 => ("\"(name|vars|metadata|tracking|x)\"", scalar),
        ];
        let fields = prop::collection::vec((space, field, space), 0..4);
        let email = "(a|B.c|é)@(x.example|X.example|é.example|x)";
        (email, fields, any::<prop::sample::Index>(), 0_u8..8).prop_map(
            |(email, fields, at, damage)| {
                let mut json = format!("{{\"email\":\"{email}\"");
                for (before, (key, value), after) in fields {
                    json.push_str(&format!(",{before}{key}{after}:{before}{value}{after}"));
                }
                json.push('}');
                if damage == 0 {
                    let at = json.floor_char_boundary(at.index(json.len()));
                    json.remove(at);
                }
                json
            },
        )
    }
}
