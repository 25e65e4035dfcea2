//! A batch before its recipients: head, account, From, keys, templates.
//!
//! Owns the question whether a batch may be sent at all, and answers it with every reason at once.
//! Reads the key directory, so it blocks.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::rand;
use content::{Content, ContentError, ContentSpec, LinkReport, Mailbox, TrackingSpec};
use engagement::abtest::{Metric, Mode};
use model::{BatchId, Domain, Timestamp, TrackingMode};
use serde_json::Value;
use service::config::{Account, DkimPolicy, Pool};
use store::{BatchHead, Variants};

use super::fields::{Mistakes, Strict, pointer_step};
use super::head::{self, BatchRequest};
use super::recipients::{malformed, reason};
use super::splitter::Head;
use super::variants::{Promise, VariantRequest};
use crate::abtest::layout::{Dealing, Layout};
use crate::admin::problem::{Answer, Code, Refusal, mistake};
use crate::compose::{domain_selectors, load_keys};
use crate::released::{Released, Test, Variant};

/// A batch that may be sent, as far as its head goes.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) head: BatchHead,
    pub(crate) released: Released,
    /// One, or one for each variant.
    pub(crate) contents: Vec<Content>,
    /// In a batch with variants.
    pub(crate) dealing: Option<Arc<Dealing>>,
    pub(crate) allow_duplicates: bool,
    pub(crate) warnings: Vec<String>,
}

impl Prepared {
    /// What became of the links; of a batch with variants those of the first.
    pub(crate) fn links(&self) -> LinkReport {
        let first = self.contents.first();
        first.map(|of| of.links().clone()).unwrap_or_default()
    }

    /// What its test can show with so many recipients.
    pub(crate) fn promise(&self, recipients: u64) -> Option<Promise> {
        let (test, variants) = (&self.released.test, &self.released.variants);
        Promise::of(test.as_ref(), variants.len(), recipients)
    }

    /// What to warn of, with what the list looks like.
    pub(crate) fn warnings(&self, advice: Vec<String>, promise: Option<&Promise>) -> Vec<String> {
        let mut all = self.warnings.clone();
        if let (Some(promise), Some(test)) = (promise, &self.released.test) {
            all.extend(promise.warning());
            all.extend(test.metric.caveat().map(str::to_owned));
        }
        all.extend(advice);
        all
    }
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
    measurable(&request, account, &mut mistakes);
    let mut released = released(&request, account, against.tracking_key);
    let contents = compile(&released, &mut mistakes);
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    let warnings = sign(&request, account, against.dkim_dir, &mut released)?;
    let mut batch = batch_head(&request, id, now, account);
    spread(&mut batch, &mut released, now);
    if let Some(test) = &mut released.test {
        rand::fill(&mut test.seed).map_err(|error| Refusal::internal("random", &error))?;
    }
    let dealing = Dealing::of(&released).map_err(|error| Refusal::internal("dealing", &error))?;
    Ok(Prepared {
        head: batch,
        dealing: dealing.map(Arc::new),
        released,
        contents,
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
        return Err(foreign(&request.from, allowed, "/from/email"));
    }
    Ok(account)
}

/// The refusal of a sender that is not of the account.
fn foreign(from: &Mailbox, allowed: Option<&[Domain]>, path: &str) -> Refusal {
    /// Names told.
    const SOME: usize = 5;
    let own = allowed.unwrap_or_default().iter().map(Domain::as_str);
    let mut own: Vec<&str> = own.take(SOME + 1).collect();
    if own.len() > SOME {
        own[SOME] = "…";
    }
    let detail = format!(
        "the account does not send from {}, but from {}",
        from.email.domain(),
        own.join(", ")
    );
    Refusal::at(Code::ForbiddenFrom, path, detail)
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

fn released(request: &BatchRequest, account: &Account, tracking_key: u16) -> Released {
    let variant = |of: &VariantRequest| Variant {
        name: of.name.clone(),
        from: of.from(&request.from),
        subject: of.subject.clone(),
        html: of.html.clone(),
        text: of.text.clone(),
        dkim_selectors: Vec::new(),
        send_at: of.send_at,
    };
    let test = request.test.as_ref().map(|of| Test {
        mode: of.mode,
        fraction: of.fraction,
        metric: of.metric,
        wait_ms: u64::try_from(of.wait.as_millis()).unwrap_or(u64::MAX),
        min_confidence: of.min_confidence,
        fallback: of.fallback,
        seed: [0; 32],
    });
    Released {
        form: match test {
            Some(_) => Released::WITH_VARIANTS,
            None => Released::FORM,
        },
        spec: spec_of(request, account),
        dkim_selectors: Vec::new(),
        tracker_base_url: account.tracking.base_url.clone(),
        tracking_key,
        allow_duplicates: request.allow_duplicates,
        proof: false,
        variants: request.variants.iter().map(variant).collect(),
        test,
    }
}

/// Compiles every content. What is wrong is told where the caller wrote it: with the variant, or
/// once with the batch.
fn compile(released: &Released, mistakes: &mut Mistakes) -> Vec<Content> {
    let mut contents = Vec::new();
    let mut told: HashSet<String> = HashSet::new();
    for (place, spec) in released.specs().iter().enumerate() {
        match Content::compile(spec) {
            Ok(content) => contents.push(content),
            Err(errors) => {
                for error in errors {
                    let own = released.variants.get(place);
                    let own = own.is_some_and(|of| of.says(&error.field));
                    let mut mistake = content_mistake(error);
                    if own {
                        mistake.path = format!("/variants/{place}{}", mistake.path);
                    }
                    if told.insert(format!("{} {}", mistake.path, mistake.detail)) {
                        mistakes.push(mistake);
                    }
                }
            }
        }
    }
    contents
}

/// A test needs what it is decided by.
fn measurable(request: &BatchRequest, account: &Account, mistakes: &mut Mistakes) {
    let Some(test) = request.test.as_ref().filter(|of| of.mode != Mode::Split) else {
        return;
    };
    let mut missing = |what: &str| {
        let path = "/ab_test/metric".to_owned();
        mistakes.add(
            path,
            Code::InvalidField,
            format!("cannot be measured {what}"),
        );
    };
    let clicks = matches!(test.metric, Metric::Clicks | Metric::ClickToOpen);
    let opens = matches!(test.metric, Metric::Opens | Metric::ClickToOpen);
    if clicks && !request.tracking.clicks {
        missing("without tracking.clicks");
    }
    if opens && !request.tracking.opens {
        missing("without tracking.opens");
    }
    let mode = account.tracking.mode;
    let mode = request.tracking.mode.map_or(mode, |own| own.min(mode));
    if (clicks || opens) && mode != TrackingMode::Individual {
        missing("unless tracking.mode, and that of the account, is individual");
    }
}

/// Names the waves of a batch with variants; its mail may leave when the first of them does.
fn spread(batch: &mut BatchHead, released: &mut Released, now: Timestamp) {
    let (asked, variants) = (batch.release_at, &mut released.variants);
    if variants.iter().any(|of| of.send_at.is_some()) {
        for variant in variants.iter_mut() {
            variant.send_at = Some(variant.send_at.unwrap_or(asked).max(now));
        }
        let first = variants.iter().filter_map(|of| of.send_at).min();
        batch.release_at = first.unwrap_or(asked);
    }
    let names = variants.iter().map(|of| of.name.clone()).collect();
    batch.variants = Layout::of(released).map(|layout| {
        Box::new(Variants {
            names,
            waves: (0..layout.waves()).map(|_| None).collect(),
        })
    });
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

/// Notes the keys that sign, of the batch and of each variant; what to warn of.
fn sign(
    request: &BatchRequest,
    account: &Account,
    dir: &Path,
    released: &mut Released,
) -> Answer<Vec<String>> {
    let allowed = account.from_domains.as_deref();
    let (selectors, mut warnings) = signing(&request.from, account, dir, "/from/email")?;
    for (place, variant) in released.variants.iter_mut().enumerate() {
        variant.dkim_selectors.clone_from(&selectors);
        let Some(from) = &variant.from else { continue };
        let path = format!("/variants/{place}/from/email");
        if !head::domain_is_allowed(&from.email, allowed) {
            return Err(foreign(from, allowed, &path));
        }
        let (own, more) = signing(from, account, dir, &path)?;
        variant.dkim_selectors = own;
        warnings.extend(more);
    }
    warnings.dedup();
    released.dkim_selectors = selectors;
    Ok(warnings)
}

/// The selectors of the keys that sign for a sender, and what to warn of.
fn signing(
    from: &Mailbox,
    account: &Account,
    dir: &Path,
    path: &str,
) -> Answer<(Vec<String>, Vec<String>)> {
    let domain = from.email.domain();
    let refuse = |detail: String| Err(Refusal::at(Code::NoDkimKey, path, detail));
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
        variants: None,
    }
}
