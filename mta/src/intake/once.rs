//! Calls that take effect once, however often they are made (`Idempotency-Key`).
//!
//! Owns what a second call with the same key is told, and keeps the first one's claim alive while
//! it works. The answer itself is kept by the store in the step in which the call takes effect, so
//! no crash can come between the two.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use model::BatchId;
use service::clock::SharedClock;
use store::{Begun, CallKey, NewCall, Store};

use super::submit::{Intake, Submitted};
use crate::admin::problem::{Answer, Code, Refusal};

/// The header.
pub(crate) const HEADER: &str = "idempotency-key";
/// Of an answer that was given before.
pub(crate) const REPLAYED: &str = "idempotent-replayed";
const KEY_MAX: usize = 255;
/// How long a claim outlives a node that dies, and how often it is renewed.
const RUNNING: Duration = Duration::from_secs(60);
const RENEWED: Duration = Duration::from_secs(15);

/// The key of a call, if it has one.
///
/// # Errors
/// When it is not `[A-Za-z0-9._-]{1,255}`, or there are several.
pub(crate) fn key(headers: &HeaderMap) -> Answer<Option<String>> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let bytes = value.as_bytes();
    let fits = (1..=KEY_MAX).contains(&bytes.len()) && bytes.iter().all(plain);
    match value.to_str() {
        Ok(key) if fits && values.next().is_none() => Ok(Some(key.to_owned())),
        Ok(_) | Err(_) => {
            let detail =
                "is not one key of 1 to 255 letters, digits, dots, underscores and hyphens";
            Err(Refusal::at(Code::InvalidField, "Idempotency-Key", detail))
        }
    }
}

impl Intake {
    /// Does `work`, once for a `call` (its key, and what it asks for); one that took effect before
    /// has the answer of then. `work` gets the key, to end the call in the step in which it takes
    /// effect.
    ///
    /// # Errors
    /// The refusal of `work`, which then took no effect, or of a call that cannot be made now.
    pub(super) async fn once<W>(
        &self,
        attempt: BatchId,
        call: Option<(CallKey, [u8; 32])>,
        work: impl FnOnce(Option<CallKey>) -> W,
    ) -> Answer<Submitted>
    where
        W: Future<Output = Answer<Arc<[u8]>>>,
    {
        let Some((key, fingerprint)) = call else {
            return work(None).await.map(Submitted::now);
        };
        let call = Call {
            store: &*self.store,
            clock: &self.clock,
            new: NewCall {
                key: key.clone(),
                fingerprint,
                attempt,
            },
        };
        if let Some(answer) = call.begin().await? {
            return Ok(Submitted {
                answer,
                is_replayed: true,
            });
        }
        let done = call.renewed_while(work(Some(key))).await;
        if done.is_err() {
            call.drop_it().await;
        }
        done.map(Submitted::now)
    }
}

/// A call with a key, as it is made.
struct Call<'c> {
    store: &'c dyn Store,
    clock: &'c SharedClock,
    new: NewCall,
}

impl Call<'_> {
    /// Claims the key. The answer, if the call took effect before.
    ///
    /// # Errors
    /// Another call with the key is at work, or asked for something else.
    async fn begin(&self) -> Answer<Option<Arc<[u8]>>> {
        let begun = self
            .store
            .begin_call(self.new.clone(), self.clock.now(), RUNNING)
            .await?;
        match begun {
            Begun::Fresh => Ok(None),
            Begun::Done(answer) => Ok(Some(answer)),
            Begun::Running => Err(Refusal::new(
                Code::IdempotencyInProgress,
                "a call with this Idempotency-Key is being worked on",
            )),
            Begun::Conflict => Err(Refusal::new(
                Code::IdempotencyConflict,
                "this Idempotency-Key was used with another body",
            )),
        }
    }

    /// Renews the claim until `work` is done.
    async fn renewed_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = work.as_mut() => return done,
                () = tokio::time::sleep(RENEWED) => {
                    // If it is lost, the commit says so.
                    if let Err(refusal) = self.begin().await {
                        tracing::warn!(detail = refusal.0.detail(), "a claim on an idempotency key was not renewed");
                    }
                }
            }
        }
    }

    /// Makes room for another try, as this one took no effect.
    async fn drop_it(&self) {
        let NewCall { key, attempt, .. } = &self.new;
        if let Err(error) = self.store.drop_call(key.clone(), *attempt).await {
            // It runs out by itself.
            tracing::warn!(%error, "an idempotency key stays claimed for a moment");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(values: &[&[u8]]) -> HeaderMap {
        values
            .iter()
            .map(|value| {
                let value = HeaderValue::from_bytes(value).expect("a header value");
                (HEADER.parse().expect("a header name"), value)
            })
            .collect()
    }

    #[test]
    fn a_key_is_plain_text_of_bounded_length() {
        let longest = "k".repeat(255);
        for good in ["a", "order-7_of.2026", longest.as_str()] {
            let found = key(&headers(&[good.as_bytes()])).expect("a key");
            assert_eq!(found.as_deref(), Some(good));
        }
        assert_eq!(key(&HeaderMap::new()).expect("no key"), None);
        let too_long = "k".repeat(256);
        for bad in [
            &[b"".as_slice()][..],
            &[b"a b"],
            &[b"a,b"],
            &["é".as_bytes()],
            &[too_long.as_bytes()],
            &[b"a", b"a"],
        ] {
            let refusal = key(&headers(bad)).expect_err("refused");
            assert_eq!(refusal.0.code(), Code::InvalidField, "{bad:?}");
        }
    }
}
