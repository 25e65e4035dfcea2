//! A batch to the recipients of another (`recipients_from`): the follow-up of those who read it, the
//! reminder of those who did not.
//!
//! Owns the choice, and copies who is chosen into the spool as if the caller had sent them: page by
//! page, so that memory does not grow with the batch.

use memchr::memmem;
use model::{BatchId, Row, Status, TrackingMode};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use store::{RecipientQuery, RecipientRow};

use super::fields::{Fields, Mistakes, Strict};
use super::receive::{Media, Received};
use super::recipients::{malformed, reason};
use super::splitter::{Head, Position, Rows as _};
use super::spool::Spool;
use super::submit::{Intake, Submitter};
use crate::admin::problem::{Answer, Refusal};

const FIELD: &str = "recipients_from";
const PAGE: u32 = 1_000;

/// Who is chosen.
struct Choice {
    batch: BatchId,
    status: Option<Status>,
    opened: Option<bool>,
    clicked: Option<bool>,
    replied: Option<bool>,
}

/// A recipient as a caller would write it.
#[derive(Serialize)]
struct Copied<'r> {
    email: &'r str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prospect_id: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vars: Option<&'r RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<&'r RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_zone: Option<&'r str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracking: Option<CopiedTracking>,
}

#[derive(Serialize)]
struct CopiedTracking {
    mode: TrackingMode,
}

impl Intake {
    /// Puts the recipients into the spool that the document takes from another batch, if it does.
    ///
    /// # Errors
    /// When what it says of them cannot be.
    pub(super) async fn followed(
        &self,
        mut received: Received,
        by: &Submitter,
    ) -> Answer<Received> {
        let named = memmem::find(&received.head.json, FIELD.as_bytes()).is_some();
        if !named || by.form.media == Media::Message {
            return Ok(received);
        }
        let parsed: Result<Strict, _> = serde_json::from_slice(&received.head.json);
        let Strict(mut document) = parsed.map_err(|error| {
            let at = received.head.position(&error);
            malformed("", at, &reason(&error))
        })?;
        let asked = document
            .get_mut(FIELD)
            .map(|field| std::mem::replace(field, Value::Bool(true)));
        let Some(asked) = asked.filter(|value| !value.is_null()) else {
            return Ok(received);
        };
        let choice = self.choice(asked, &received, &document, by).await?;
        received.spool = self.copy(choice, received.spool).await?;
        if let Some(fields) = document.as_object_mut() {
            fields.remove("recipients");
        }
        let json = serde_json::to_vec(&document)
            .map_err(|error| Refusal::internal("recipients_from", &error))?;
        received.head = Head::apart(json, Position { offset: 0, line: 1 });
        Ok(received)
    }

    async fn choice(
        &self,
        asked: Value,
        received: &Received,
        document: &Value,
        by: &Submitter,
    ) -> Answer<Choice> {
        let mut mistakes = Mistakes::default();
        let mut fields = Fields::of(format!("/{FIELD}"), asked, &mut mistakes);
        let batch: Option<BatchId> = fields.required("batch", |value| {
            super::fields::string(value)?
                .parse()
                .map_err(|error: model::IdError| error.to_string())
        });
        let found = match batch {
            Some(id) => self.store.batch(id).await?,
            None => None,
        };
        let sees = |account: &str| by.any_account || account == by.account;
        if batch.is_some() && !found.is_some_and(|found| sees(&found.head.account)) {
            fields.mistake("batch", "there is no such batch");
        }
        let chosen = fields.within("where", |of| {
            let flag = |of: &mut Fields<'_>, key: &str| {
                of.converted(key, |value| {
                    value
                        .as_bool()
                        .ok_or_else(|| super::fields::expected(&value, "true or false"))
                })
            };
            (
                of.parsed("status"),
                flag(of, "opened"),
                flag(of, "clicked"),
                flag(of, "replied"),
            )
        });
        fields.finish();
        let own = document.get("recipients").and_then(Value::as_array);
        if received.spool.rows() > 0 || own.is_some_and(|own| !own.is_empty()) {
            let detail = "stands beside recipients: write one of them";
            mistakes.add(
                format!("/{FIELD}"),
                crate::admin::problem::Code::InvalidField,
                detail,
            );
        }
        let (Some(batch), true) = (batch, mistakes.is_empty()) else {
            return Err(Refusal::of_mistakes(mistakes.into_vec()));
        };
        let (status, opened, clicked, replied) = chosen.unwrap_or_default();
        Ok(Choice {
            batch,
            status,
            opened,
            clicked,
            replied,
        })
    }

    async fn copy(&self, choice: Choice, mut spool: Spool) -> Answer<Spool> {
        let mut from_index = 0;
        loop {
            let page = self
                .store
                .recipients(RecipientQuery {
                    batch: choice.batch,
                    from_index,
                    limit: PAGE,
                    status: choice.status,
                    opened: choice.opened,
                    clicked: choice.clicked,
                    domain: None,
                    with_variant: false,
                })
                .await?;
            let wanted = |found: &&RecipientRow| {
                choice
                    .replied
                    .is_none_or(|replied| found.replied_at.is_some() == replied)
            };
            for found in page.items.iter().filter(wanted) {
                let line = copied(&found.row)?;
                spool.begin(Position { offset: 0, line: 1 });
                spool.push(&line);
                spool.end();
            }
            if spool.must_write() {
                spool = super::submit::blocking(move || {
                    spool.write().map_err(|error| Refusal::disk(&error))?;
                    Ok(spool)
                })
                .await?;
            }
            let next = page.next.and_then(|cursor| cursor.parse().ok());
            match next.filter(|next| *next > from_index) {
                Some(next) => from_index = next,
                None => return Ok(spool),
            }
        }
    }
}

fn copied(row: &Row) -> Answer<Vec<u8>> {
    let failed = |error: serde_json::Error| Refusal::internal("recipients_from", &error);
    let line = Copied {
        email: row.email.as_str(),
        name: row.name.as_deref(),
        prospect_id: row.prospect_id.as_deref(),
        vars: raw(row.vars.as_deref()).map_err(failed)?,
        metadata: raw(row.metadata.as_deref()).map_err(failed)?,
        time_zone: row.time_zone.as_deref(),
        tracking: row.tracking.map(|mode| CopiedTracking { mode }),
    };
    serde_json::to_vec(&line).map_err(failed)
}

/// JSON that is passed on as it is.
fn raw(text: Option<&str>) -> serde_json::Result<Option<&RawValue>> {
    text.map(serde_json::from_str).transpose()
}
