//! What the HTTP surfaces of all daemons share: problems and health, as bytes.
//!
//! Owns the JSON of RFC 9457 problems with the codes of the contract (section 3). Knows no HTTP
//! library: a caller sets status, content type and body itself.

use serde::Serialize;

/// The media type of a problem.
pub const PROBLEM_TYPE: &str = "application/problem+json";

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $status:literal $word:literal $title:literal),+ $(,)?) => {
        /// Why a call was refused: the codes of the contract, and three that HTTP itself calls for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ProblemCode { $($(#[$doc])* $name),+ }

        impl ProblemCode {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The HTTP status.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status),+ }
            }

            /// The word of the contract.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// The same for every problem of this code.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),+ }
            }

            const fn uri(self) -> &'static str {
                match self { $(Self::$name => concat!("urn:hikyaku:problem:", $word)),+ }
            }
        }
    };
}

codes! {
    /// Not JSON, not UTF-8, cut off.
    MalformedBody = 400 "malformed_body" "The body cannot be read",
    /// No key, or one that does not exist.
    Unauthorized = 401 "unauthorized" "A valid key is needed",
    /// The key may not do this.
    ForbiddenScope = 403 "forbidden_scope" "The key may not do this",
    /// The From domain is outside the account.
    ForbiddenFrom = 403 "forbidden_from" "The account may not send from this domain",
    /// There is none.
    NotFound = 404 "not_found" "There is no such thing",
    /// The path exists, the method does not.
    MethodNotAllowed = 405 "method_not_allowed" "The path has no such method",
    /// The body did not arrive in time.
    RequestTimeout = 408 "request_timeout" "The body did not arrive in time",
    /// The same idempotency key with another body.
    IdempotencyConflict = 409 "idempotency_conflict" "The idempotency key was used with another body",
    /// The first call with this idempotency key is running.
    IdempotencyInProgress = 409 "idempotency_in_progress" "The first call with this key is still running",
    /// What exists is in no state for this.
    InvalidState = 409 "invalid_state" "The present state does not allow this",
    /// More bytes than the configuration takes.
    BodyTooLarge = 413 "body_too_large" "The body is too large",
    /// A content type or encoding that is not taken.
    UnsupportedMedia = 415 "unsupported_media" "This content type or encoding is not taken",
    /// A field has a value that it cannot have.
    InvalidField = 422 "invalid_field" "A field has a value that it cannot have",
    /// A field that does not exist.
    UnknownField = 422 "unknown_field" "A field does not exist",
    /// A template that does not parse or render.
    TemplateError = 422 "template_error" "The template has a mistake",
    /// The From domain has no DKIM key.
    NoDkimKey = 422 "no_dkim_key" "The From domain has no DKIM key",
    /// The account's quota is spent.
    QuotaExceeded = 429 "quota_exceeded" "The account's quota is spent",
    /// Our fault: an error that the log has.
    Internal = 500 "internal" "An error of this service",
    /// Store, disk or memory cannot take more now.
    Unavailable = 503 "unavailable" "The service cannot take this now",
}

/// One refusal, as `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    #[serde(rename = "type")]
    uri: &'static str,
    title: &'static str,
    status: u16,
    #[serde(serialize_with = "word")]
    code: ProblemCode,
    detail: String,
    errors: Vec<ProblemError>,
    #[serde(skip)]
    retry_after: Option<u32>,
}

/// One of the places that are wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProblemError {
    /// A JSON pointer: `/recipients/3/email`.
    pub path: String,
    /// Line of an NDJSON or CSV body, or of a template, from 1.
    pub line: Option<u64>,
    /// A word: one of the contract's codes or of its rejection codes.
    pub code: &'static str,
    /// For the person who has to mend it.
    pub detail: String,
}

fn word<S: serde::Serializer>(code: &ProblemCode, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(code.as_str())
}

impl Problem {
    /// A problem; `detail` is for the caller, so it tells nothing about our inside.
    pub fn new(code: ProblemCode, detail: impl Into<String>) -> Self {
        Self {
            uri: code.uri(),
            title: code.title(),
            status: code.status(),
            code,
            detail: detail.into(),
            errors: Vec::new(),
            retry_after: None,
        }
    }

    /// A problem of one field: its place is in `errors` too.
    pub fn at(code: ProblemCode, path: impl Into<String>, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let error = ProblemError {
            path: path.into(),
            line: None,
            code: code.as_str(),
            detail: detail.clone(),
        };
        Self::new(code, detail).with(error)
    }

    /// Adds a place that is wrong.
    #[must_use]
    pub fn with(mut self, error: ProblemError) -> Self {
        self.errors.push(error);
        self
    }

    /// Says when to try again: whole seconds, for the header `Retry-After`.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The code.
    pub fn code(&self) -> ProblemCode {
        self.code
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// For people.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The places that are wrong.
    pub fn errors(&self) -> &[ProblemError] {
        &self.errors
    }

    /// Whole seconds for the header `Retry-After`. Quota, unavailability and a running first call
    /// always have one.
    pub fn retry_after_seconds(&self) -> Option<u32> {
        let always = match self.code {
            ProblemCode::QuotaExceeded
            | ProblemCode::Unavailable
            | ProblemCode::IdempotencyInProgress => Some(1),
            ProblemCode::MalformedBody
            | ProblemCode::Unauthorized
            | ProblemCode::ForbiddenScope
            | ProblemCode::ForbiddenFrom
            | ProblemCode::NotFound
            | ProblemCode::MethodNotAllowed
            | ProblemCode::RequestTimeout
            | ProblemCode::Internal
            | ProblemCode::IdempotencyConflict
            | ProblemCode::InvalidState
            | ProblemCode::BodyTooLarge
            | ProblemCode::UnsupportedMedia
            | ProblemCode::InvalidField
            | ProblemCode::UnknownField
            | ProblemCode::TemplateError
            | ProblemCode::NoDkimKey => None,
        };
        self.retry_after.or(always)
    }

    /// The body.
    pub fn to_bytes(&self) -> Vec<u8> {
        json(self)
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.detail)
    }
}

impl std::error::Error for Problem {}

/// What `/healthz` and `/readyz` say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Whether all is well: status 200, else 503.
    pub ok: bool,
    /// What was looked at.
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Which.
    pub name: &'static str,
    /// Whether it is well.
    pub ok: bool,
    /// What the operator should know: why not, or at what price.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

impl Health {
    /// All is well when every check is; without checks, the process answers, and that is all.
    pub fn of(checks: Vec<Check>) -> Self {
        Self {
            ok: checks.iter().all(|check| check.ok),
            checks,
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        if self.ok { 200 } else { 503 }
    }

    /// The body, `application/json`.
    pub fn to_bytes(&self) -> Vec<u8> {
        json(self)
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // These types have string keys and no failing serializer: there is no error to have.
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_written_as_the_contract_says() {
        let problem = Problem::at(ProblemCode::InvalidField, "/recipients/3/email", "has no @");
        let expected = concat!(
            r#"{"type":"urn:hikyaku:problem:invalid_field","title":"A field has a value that it cannot have","#,
            r#""status":422,"code":"invalid_field","detail":"has no @","errors":[{"path":"/recipients/3/email","#,
            r#""line":null,"code":"invalid_field","detail":"has no @"}]}"#
        );
        assert_eq!(String::from_utf8_lossy(&problem.to_bytes()), expected);
    }

    #[test]
    fn the_codes_are_those_of_the_contract_and_of_http() {
        let codes: Vec<_> = ProblemCode::ALL
            .iter()
            .map(|code| format!("{} {}", code.status(), code.as_str()))
            .collect();
        let expected = [
            "400 malformed_body",
            "401 unauthorized",
            "403 forbidden_scope",
            "403 forbidden_from",
            "404 not_found",
            "405 method_not_allowed",
            "408 request_timeout",
            "409 idempotency_conflict",
            "409 idempotency_in_progress",
            "409 invalid_state",
            "413 body_too_large",
            "415 unsupported_media",
            "422 invalid_field",
            "422 unknown_field",
            "422 template_error",
            "422 no_dkim_key",
            "429 quota_exceeded",
            "500 internal",
            "503 unavailable",
        ];
        assert_eq!(codes, expected);
    }

    #[test]
    fn who_should_come_again_is_told_when() {
        let after = |code| Problem::new(code, "").retry_after_seconds();
        assert_eq!(after(ProblemCode::Unavailable), Some(1));
        assert_eq!(after(ProblemCode::IdempotencyInProgress), Some(1));
        assert_eq!(after(ProblemCode::NotFound), None);
        let quota = Problem::new(ProblemCode::QuotaExceeded, "").retry_after(90);
        assert_eq!(quota.retry_after_seconds(), Some(90));
    }

    #[test]
    fn one_bad_check_makes_the_whole_unwell() {
        let check = |ok, detail: &str| Check {
            name: "store",
            ok,
            detail: detail.to_owned(),
        };
        let health = Health::of(vec![check(true, ""), check(false, "does not answer")]);
        assert_eq!(health.status(), 503);
        let expected = r#"{"ok":false,"checks":[{"name":"store","ok":true},{"name":"store","ok":false,"detail":"does not answer"}]}"#;
        assert_eq!(String::from_utf8_lossy(&health.to_bytes()), expected);
        assert_eq!(Health::of(Vec::new()).status(), 200);
    }
}
