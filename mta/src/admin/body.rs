//! Small JSON bodies, read whole.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;

use super::problem::{Answer, Code, Refusal};
use crate::intake::fields::{Fields, Mistakes, Strict};

/// The object in a small body; an empty body is an empty object.
pub(super) fn object(
    body: Result<Bytes, BytesRejection>,
    mistakes: &mut Mistakes,
) -> Answer<Fields<'_>> {
    let body = body.map_err(|error| Refusal::new(Code::BodyTooLarge, error.body_text()))?;
    let document = match body.as_ref() {
        b"" => serde_json::json!({}),
        json => {
            let parsed: Result<Strict, _> = serde_json::from_slice(json);
            parsed
                .map_err(|error| Refusal::new(Code::MalformedBody, error.to_string()))?
                .0
        }
    };
    Ok(Fields::of(String::new(), document, mistakes))
}

/// Nothing is said in this body. Who asks there for what only the query takes, such as `dry_run`, would
/// otherwise have done what they only wanted to see.
pub(super) fn nothing(body: Result<Bytes, BytesRejection>) -> Answer<()> {
    let mut mistakes = Mistakes::default();
    object(body, &mut mistakes)?.finish();
    if mistakes.is_empty() {
        Ok(())
    } else {
        Err(Refusal::of_mistakes(mistakes.into_vec()))
    }
}
