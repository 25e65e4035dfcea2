//! What a caller is told when a call is refused.
//!
//! Owns the step from a [`Problem`] to an HTTP answer, and from our own failures to a problem. The
//! text is for strangers: what went wrong inside is logged, never sent.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
pub(crate) use service::http::ProblemCode as Code;
use service::http::{PROBLEM_TYPE, Problem, ProblemError};
use store::StoreError;

/// The most errors that one answer lists.
pub(crate) const ERRORS_MAX: usize = 100;

/// A call that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal(pub(crate) Problem);

/// What a call comes to.
pub(crate) type Answer<T> = Result<T, Refusal>;

/// A mistake of `code` at the JSON pointer `path`.
pub(crate) fn mistake(
    path: impl Into<String>,
    code: Code,
    detail: impl Into<String>,
) -> ProblemError {
    ProblemError {
        path: path.into(),
        line: None,
        code: code.as_str(),
        detail: detail.into(),
    }
}

impl Refusal {
    pub(crate) fn new(code: Code, detail: impl Into<String>) -> Self {
        let problem = Problem::new(code, detail);
        Self(match code {
            // A full disk or a store away does not pass within a second.
            Code::Unavailable => problem.retry_after(5),
            _ => problem,
        })
    }

    /// One mistake, at `path`.
    pub(crate) fn at(code: Code, path: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::of_mistakes(vec![mistake(path, code, detail)])
    }

    /// Mistakes in a body or query, of which the first names the code; lists at most
    /// [`ERRORS_MAX`].
    pub(crate) fn of_mistakes(mistakes: Vec<ProblemError>) -> Self {
        let first = mistakes.first().map_or("", |error| error.code);
        let code = Code::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == first);
        let detail = match mistakes.as_slice() {
            [] => String::new(),
            [one] => format!("{} {}", one.path, one.detail),
            [one, rest @ ..] => format!("{} {} (and {} more)", one.path, one.detail, rest.len()),
        };
        let problem = Problem::new(code.unwrap_or(Code::InvalidField), detail);
        Self(
            mistakes
                .into_iter()
                .take(ERRORS_MAX)
                .fold(problem, Problem::with),
        )
    }

    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(Code::NotFound, format!("there is no such {what}"))
    }

    /// Our fault; the log has the reason.
    pub(crate) fn internal(what: &'static str, error: &dyn std::fmt::Display) -> Self {
        tracing::error!(what, %error, "a call failed by a fault of this service");
        Self::new(
            Code::Internal,
            "this should not have happened; the log of the service has the reason",
        )
    }

    /// A disk of ours cannot take more.
    pub(crate) fn disk(error: &std::io::Error) -> Self {
        tracing::error!(%error, "a call was refused because the disk failed");
        Self::new(
            Code::Unavailable,
            "the service cannot use its disk; nothing was accepted",
        )
    }
}

/// A refusal of the store where the one thing that only it can judge is the cursor in `path`.
pub(crate) fn of_cursor(path: &'static str) -> impl Fn(StoreError) -> Refusal {
    move |error| match error {
        StoreError::Refused(detail) => Refusal::at(Code::InvalidField, path, detail),
        StoreError::Unavailable(_) | StoreError::Damaged(_) => error.into(),
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(reason) => {
                tracing::warn!(%reason, "a call was refused because the store is not available");
                Self::new(
                    Code::Unavailable,
                    "the store is not available; nothing was changed",
                )
            }
            StoreError::Damaged(_) | StoreError::Refused(_) => Self::internal("store", &error),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self(problem) = self;
        let status =
            StatusCode::from_u16(problem.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, problem.to_bytes()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_TYPE));
        if let Some(seconds) = problem.retry_after_seconds() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
