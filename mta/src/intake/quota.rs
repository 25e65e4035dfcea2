//! Quotas of accounts: how many recipients may be submitted in a time, counted in the store so that
//! all nodes count together.
//!
//! Owns the count: a window begins with the first recipient after the one before has ended. What a
//! refused call took is given back. Must not judge anything else.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use model::Timestamp;
use model::units::Rate;
use service::config::Account;
use store::{Note, Store};

use crate::admin::problem::{Answer, Code, Refusal};

/// The notes in which windows stand.
const KIND: &str = "quota";
/// How often a step that others were in the way of is tried.
const TRIES: u32 = 100;

/// How the quota of an account stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    limit: u64,
    per: Duration,
    used: u64,
    ends_at: Timestamp,
}

impl Standing {
    fn seconds_left(&self, now: Timestamp) -> u32 {
        let left = self.ends_at.millis().saturating_sub(now.millis());
        let seconds = u64::try_from(left).unwrap_or(0).div_ceil(1_000).max(1);
        u32::try_from(seconds).unwrap_or(u32::MAX)
    }

    /// The fields of draft-ietf-httpapi-ratelimit-headers, in the spelling of today and in that of
    /// its drafts up to 07, which more clients know.
    pub(crate) fn write(&self, headers: &mut HeaderMap, now: Timestamp) {
        let (left, reset) = (self.limit.saturating_sub(self.used), self.seconds_left(now));
        let (limit, window) = (self.limit, self.per.as_secs());
        let fields = [
            (
                "ratelimit-policy",
                format!("\"quota\";q={limit};w={window}"),
            ),
            ("ratelimit", format!("\"quota\";r={left};t={reset}")),
            ("ratelimit-limit", limit.to_string()),
            ("ratelimit-remaining", left.to_string()),
            ("ratelimit-reset", reset.to_string()),
        ];
        for (name, value) in fields {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    }
}

/// What is stored: when the window began, and what was used of it.
fn write(began: Timestamp, used: u64) -> Box<[u8]> {
    [began.millis().to_le_bytes(), used.to_le_bytes()]
        .concat()
        .into()
}

fn read(value: &[u8]) -> Option<(Timestamp, u64)> {
    let (began, rest) = value.split_first_chunk()?;
    let (used, _) = rest.split_first_chunk()?;
    Some((
        Timestamp::from_millis(i64::from_le_bytes(*began)),
        u64::from_le_bytes(*used),
    ))
}

/// How the quota of an account stands now; `None`: it has none.
///
/// # Errors
/// When the store does not answer.
pub(crate) async fn standing(
    store: &dyn Store,
    account: &Account,
    now: Timestamp,
) -> Answer<Option<Standing>> {
    let Rate::Limited { count, per } = account.quota else {
        return Ok(None);
    };
    let note = store.note(KIND, &account.id, now).await?;
    Ok(Some(of_note(note.as_ref(), u64::from(count), per, now).1))
}

/// When the window began, and how it stands.
fn of_note(
    note: Option<&Note>,
    limit: u64,
    per: Duration,
    now: Timestamp,
) -> (Timestamp, Standing) {
    let found = note.and_then(|note| read(&note.value));
    // A quota that was changed ends at another time.
    let (began, used) = found
        .filter(|(began, _)| *began + per > now)
        .unwrap_or((now, 0));
    let standing = Standing {
        limit,
        per,
        used,
        ends_at: began + per,
    };
    (began, standing)
}

/// Takes `count` recipients from the quota of an account.
///
/// # Errors
/// `quota_exceeded`, with the time at which there is more.
pub(crate) async fn take(
    store: &dyn Store,
    account: &Account,
    count: u64,
    now: Timestamp,
) -> Answer<()> {
    let taken = change(store, account, now, |standing| {
        let used = standing.used + count;
        (used <= standing.limit).then_some(used)
    });
    match taken.await? {
        None => Ok(()),
        Some(standing) => {
            let left = standing.limit.saturating_sub(standing.used);
            let detail = format!(
                "{count} recipients are more than the {left} that are left of the account's quota, {}",
                account.quota
            );
            let refusal = Refusal::new(Code::QuotaExceeded, detail);
            Err(Refusal(refusal.0.retry_after(standing.seconds_left(now))))
        }
    }
}

/// Gives back what was taken for nothing.
pub(crate) async fn give_back(store: &dyn Store, account: &Account, count: u64, now: Timestamp) {
    let given = change(store, account, now, |standing| {
        Some(standing.used.saturating_sub(count))
    });
    if let Err(refusal) = given.await {
        tracing::warn!(
            account = account.id,
            count,
            detail = refusal.0.detail(),
            "recipients that were refused stay taken from a quota"
        );
    }
}

/// Changes what is used; the standing, when `to` refuses.
async fn change(
    store: &dyn Store,
    account: &Account,
    now: Timestamp,
    to: impl Fn(&Standing) -> Option<u64>,
) -> Answer<Option<Standing>> {
    let Rate::Limited { count, per } = account.quota else {
        return Ok(None);
    };
    for _ in 0..TRIES {
        let note = store.note(KIND, &account.id, now).await?;
        let (began, standing) = of_note(note.as_ref(), u64::from(count), per, now);
        let Some(used) = to(&standing) else {
            return Ok(Some(standing));
        };
        let after = Note {
            kind: KIND.into(),
            key: account.id.as_str().into(),
            value: write(began, used),
            expires_at: Some(began + per),
        };
        let before = note.map(|note| note.value);
        if store.swap_note(after, before, now).await? {
            return Ok(None);
        }
    }
    Err(Refusal::new(
        Code::Unavailable,
        "the account's quota is being counted by too many calls at once",
    ))
}
