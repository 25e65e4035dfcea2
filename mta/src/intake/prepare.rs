//! A batch before its recipients: head, account, From, keys, templates.
//!
//! Owns the question whether a batch may be sent at all, and answers it with every reason at once.
//! Reads the key directory, so it blocks.

use std::path::Path;

use content::{Content, ContentError, ContentSpec, TrackingSpec};
use model::{BatchId, Timestamp, TrackingMode};
use serde_json::Value;
use service::config::{Account, DkimPolicy, Pool};
use store::BatchHead;

use super::fields::{Mistakes, Strict, pointer_step};
use super::head::{self, BatchRequest};
use super::recipients::{malformed, reason};
use super::splitter::Head;
use crate::admin::problem::{Answer, Code, Refusal, mistake};
use crate::compose::{domain_selectors, load_keys};
use crate::released::Released;

/// A batch that may be sent, as far as its head goes.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) head: BatchHead,
    pub(crate) released: Released,
    pub(crate) content: Content,
    pub(crate) allow_duplicates: bool,
    pub(crate) warnings: Vec<String>,
}

/// For whom a batch is submitted, and with what it is judged.
pub(crate) struct Against<'a> {
    pub(crate) account: &'a str,
    /// The caller may name another account.
    pub(crate) any_account: bool,
    pub(crate) accounts: &'a [Account],
    pub(crate) pools: &'a [Pool],
    pub(crate) dkim_dir: &'a Path,
    /// The id of the key that signs links now.
    pub(crate) tracking_key: u16,
}

/// Reads and judges the head. Blocks.
///
/// # Errors
/// The refusal of the call, with every mistake in it.
pub(crate) fn prepare(
    head: &Head,
    recipient_count: u32,
    id: BatchId,
    now: Timestamp,
    against: &Against<'_>,
) -> Answer<Prepared> {
    let mut mistakes = Mistakes::default();
    let document = document(head, &mut mistakes)?;
    let request = head::read(document, recipient_count, now, &mut mistakes);
    let Some(request) = request else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let account = account(&request, against, &mut mistakes)?;
    pool(&request, against, &mut mistakes);
    let spec = spec_of(&request, account);
    let compiled = Content::compile(&spec).map_err(|errors| {
        for error in errors {
            mistakes.push(content_mistake(error));
        }
    });
    let (true, Ok(content)) = (mistakes.is_empty(), compiled) else {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    };
    let (dkim_selectors, warnings) = signing(&request, account, against.dkim_dir)?;
    let batch = batch_head(&request, id, now, account);
    Ok(Prepared {
        head: batch,
        released: Released {
            form: Released::FORM,
            spec,
            dkim_selectors,
            tracker_base_url: account.tracking.base_url.clone(),
            tracking_key: against.tracking_key,
            allow_duplicates: request.allow_duplicates,
            proof: false,
        },
        content,
        allow_duplicates: request.allow_duplicates,
        warnings,
    })
}

fn document(head: &Head, mistakes: &mut Mistakes) -> Answer<Value> {
    let parsed: Result<Strict, _> = serde_json::from_slice(&head.json);
    let Strict(mut document) =
        parsed.map_err(|error| malformed("", head.position(&error), &reason(&error)))?;
    if let (true, Value::Object(fields)) = (head.is_apart, &mut document) {
        let own = fields.insert("recipients".to_owned(), Value::Array(Vec::new()));
        if own.is_some() {
            let detail = "is in the first line; recipients are the lines after it";
            mistakes.add("/recipients".to_owned(), Code::InvalidField, detail);
        }
    }
    Ok(document)
}

/// The account of the batch: the caller's own, or the one it names and may use.
fn account<'a>(
    request: &BatchRequest,
    against: &Against<'a>,
    mistakes: &mut Mistakes,
) -> Answer<&'a Account> {
    let id = request.account.as_deref().unwrap_or(against.account);
    if id != against.account && !against.any_account {
        let detail = "the key acts for another account";
        return Err(Refusal::at(Code::ForbiddenScope, "/account", detail));
    }
    let Some(account) = against.accounts.iter().find(|account| account.id == id) else {
        mistakes.add(
            "/account".to_owned(),
            Code::InvalidField,
            "there is no such account",
        );
        return Err(Refusal::of_mistakes(std::mem::take(mistakes).into_vec()));
    };
    let allowed = account.from_domains.as_deref();
    if !head::domain_is_allowed(&request.from.email, allowed) {
        let detail = format!(
            "the account does not send from {}",
            request.from.email.domain()
        );
        return Err(Refusal::at(Code::ForbiddenFrom, "/from/email", detail));
    }
    Ok(account)
}

/// The pool of the batch has to be one of the configuration's.
fn pool(request: &BatchRequest, against: &Against<'_>, mistakes: &mut Mistakes) {
    let Some(name) = &request.pool else { return };
    if against.pools.iter().all(|pool| pool.name != *name) {
        let path = "/pool".to_owned();
        mistakes.add(path, Code::InvalidField, "there is no such pool");
    }
}

fn spec_of(request: &BatchRequest, account: &Account) -> ContentSpec {
    ContentSpec {
        from: request.from.clone(),
        reply_to: request.reply_to.clone(),
        subject: request.subject.clone(),
        html: request.html.clone(),
        text: request.text.clone(),
        headers: request.headers.clone(),
        vars: request.vars.clone(),
        tracking: TrackingSpec {
            opens: request.tracking.opens && request.raw.is_none(),
            clicks: request.tracking.clicks && request.raw.is_none(),
            text_links: request.tracking.text_links,
            utm: request.tracking.utm.clone(),
            allowed_targets: account.tracking.allowed_targets.clone(),
            base_url: account.tracking.base_url.clone(),
        },
        list_unsubscribe: request.list_unsubscribe && request.raw.is_none(),
        feedback_id: Some(feedback_id(request, account)),
        attachments: request.attachments.clone(),
        raw: request.raw.clone(),
        report: None,
    }
}

/// `campaign:list:account:hikyaku`: what a mailbox provider groups complaints by.
fn feedback_id(request: &BatchRequest, account: &Account) -> String {
    let part = |text: &str| -> String {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        };
        text.chars().take(40).map(plain).collect()
    };
    let campaign = request
        .campaign
        .as_deref()
        .map_or_else(|| "none".to_owned(), part);
    format!(
        "{campaign}:{}:{}:hikyaku",
        part(&request.list),
        part(&account.id)
    )
}

fn content_mistake(error: ContentError) -> service::http::ProblemError {
    let path = match error.field.split_once('.') {
        None => format!("/{}", pointer_step(&error.field)),
        Some(("attachments", rest)) => format!("/attachments/{}", rest.replace('.', "/")),
        Some((field, rest)) => format!("/{}/{}", pointer_step(field), pointer_step(rest)),
    };
    let code = if error.template {
        Code::TemplateError
    } else {
        Code::InvalidField
    };
    let mut mistake = mistake(path, code, error.detail);
    mistake.line = error.line.and_then(|line| u64::try_from(line).ok());
    mistake
}

/// The selectors of the keys that sign, and what to warn of.
fn signing(
    request: &BatchRequest,
    account: &Account,
    dir: &Path,
) -> Answer<(Vec<String>, Vec<String>)> {
    let domain = request.from.email.domain();
    let refuse = |detail: String| Err(Refusal::at(Code::NoDkimKey, "/from/email", detail));
    // Read, and not only found: what is accepted must be possible to sign.
    let found = domain_selectors(dir, domain).and_then(|selectors| {
        load_keys(dir, domain, &selectors)?;
        Ok(selectors)
    });
    match (found, account.dkim) {
        (Ok(selectors), _) if !selectors.is_empty() => Ok((selectors, Vec::new())),
        (Ok(none), DkimPolicy::Optional) => {
            let warning = format!("{domain} has no DKIM key: the mail leaves unsigned");
            Ok((none, vec![warning]))
        }
        (Ok(_), DkimPolicy::Required) => refuse(format!(
            "{domain} has no DKIM key; hikyaku dkim generate {domain} makes one"
        )),
        (Err(error), _) => {
            let error: &dyn std::error::Error = &error;
            tracing::error!(
                error,
                "a batch was refused because its DKIM keys cannot be used"
            );
            refuse(format!(
                "the DKIM keys of {domain} cannot be used; the log of the service says why"
            ))
        }
    }
}

fn batch_head(request: &BatchRequest, id: BatchId, now: Timestamp, account: &Account) -> BatchHead {
    let mode = account.tracking.mode;
    BatchHead {
        id,
        account: account.id.clone(),
        campaign: request.campaign.clone(),
        list: request.list.clone(),
        priority: request.priority,
        pool: request.pool.clone(),
        rate: request.rate,
        created_at: now,
        release_at: request.send_at.map_or(now, |at| at.max(now)),
        expires_at: request.expires_at,
        // The most restrictive wins, and it is the least.
        tracking: match (&request.raw, request.tracking.mode) {
            (Some(_), _) => TrackingMode::Off,
            (None, own) => own.map_or(mode, |own| own.min(mode)),
        },
        metadata: request.metadata.clone(),
        held: request.hold,
        window: request.window.clone(),
        guardrails: request.guardrails,
    }
}
