//! Calls that must take effect once: who is at it, and what was answered.
//!
//! Must not know what is asked for.

use super::Inner;
use super::commit::{Commit, Outcome};
use super::keys::{self, HOME};
use super::link::answer;
use super::record::{Version, new_version};
use crate::backup::CallPiece;
use crate::{Begun, CALL_KEPT, CallKey, EndedCall, NewCall, Result, StoreError};
use ::redis::Cmd;
use model::{BatchId, BatchState, Timestamp};
use std::time::Duration;

/// Kept answers that are forgotten with each call that begins.
const FORGOTTEN: u32 = 16;

/// What is known of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    version: Version,
    fingerprint: [u8; 32],
    /// The try; with an answer the batch, which has the same id.
    attempt: BatchId,
    until: i64,
    batch: BatchId,
    answer: Option<Vec<u8>>,
}

impl Known {
    fn write(&self, version: Version) -> Vec<u8> {
        let mut to = version.to_vec();
        to.extend(self.fingerprint);
        to.extend(self.attempt.to_bytes());
        to.extend(self.until.to_le_bytes());
        to.extend(self.batch.to_bytes());
        if let Some(answer) = &self.answer {
            to.push(1);
            to.extend(answer);
        }
        to
    }

    fn read(stored: &[u8]) -> Option<Self> {
        let (version, rest) = stored.split_first_chunk()?;
        let (fingerprint, rest) = rest.split_first_chunk()?;
        let (attempt, rest) = rest.split_first_chunk()?;
        let (until, rest) = rest.split_first_chunk()?;
        let (batch, rest) = rest.split_first_chunk()?;
        Some(Self {
            version: *version,
            fingerprint: *fingerprint,
            attempt: BatchId::from_bytes(*attempt),
            until: i64::from_le_bytes(*until),
            batch: BatchId::from_bytes(*batch),
            answer: rest.split_first().map(|(_, answer)| answer.to_vec()),
        })
    }
}

/// The member of a call among those that are to be forgotten.
fn name(key: &CallKey) -> Vec<u8> {
    format!("{}\0{}", key.account, key.key).into_bytes()
}

impl Inner {
    async fn call(&self, key: &CallKey) -> Result<Option<Known>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(keys::call(HOME, &key.account, &key.key));
        let stored = answer::bytes(self.link.short(&get).await?);
        let damaged = || StoreError::Damaged("a call is not readable".into());
        stored
            .map(|stored| Known::read(&stored).ok_or_else(damaged))
            .transpose()
    }

    /// Begins or renews a call.
    pub(super) async fn begin_call(
        &self,
        call: NewCall,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Begun> {
        self.forget_calls(now).await?;
        let mut tries = self.tries();
        while tries.again().await? {
            let known = self.call(&call.key).await?;
            match &known {
                Some(of) if of.answer.is_some() && !self.is_over(of, now).await? => {
                    let answer = of.answer.clone().unwrap_or_default();
                    return Ok(if of.fingerprint == call.fingerprint {
                        Begun::Done(answer.into())
                    } else {
                        Begun::Conflict
                    });
                }
                Some(of)
                    if of.answer.is_none()
                        && of.until > now.millis()
                        && of.attempt != call.attempt =>
                {
                    return Ok(Begun::Running);
                }
                Some(_) | None => {}
            }
            let begun = Known {
                version: [0; 8],
                fingerprint: call.fingerprint,
                attempt: call.attempt,
                until: (now + ttl).millis(),
                batch: call.attempt,
                answer: None,
            };
            let mut commit = Commit::new(HOME);
            put(&mut commit, &call.key, known.as_ref(), &begun);
            if commit.run(self, true).await? != Outcome::Conflict {
                return Ok(Begun::Fresh);
            }
        }
        Ok(Begun::Running)
    }

    /// Whether an answer need not be kept any longer.
    async fn is_over(&self, of: &Known, now: Timestamp) -> Result<bool> {
        if of.until > now.millis() {
            return Ok(false);
        }
        let state = self.home(of.batch).await?.map(|batch| batch.state);
        Ok(matches!(
            state,
            None | Some(BatchState::Completed | BatchState::Cancelled)
        ))
    }

    /// Forgets some calls whose time is over.
    async fn forget_calls(&self, now: Timestamp) -> Result<()> {
        let mut find = Cmd::new();
        find.arg("ZRANGEBYSCORE")
            .arg(keys::calls(HOME))
            .arg("-inf")
            .arg(now.millis())
            .arg("LIMIT")
            .arg(0)
            .arg(FORGOTTEN);
        for member in answer::list(self.link.short(&find).await?) {
            let member = answer::bytes(member).unwrap_or_default();
            let text = String::from_utf8_lossy(&member).into_owned();
            let Some((account, key)) = text.split_once('\0') else {
                continue;
            };
            let key = CallKey {
                account: account.to_owned(),
                key: key.to_owned(),
            };
            if let Some(of) = self.call(&key).await?
                && (of.answer.is_none() || self.is_over(&of, now).await?)
            {
                self.forget_call(&key, &of).await?;
            }
        }
        Ok(())
    }

    /// Forgets a call, unless it was changed meanwhile.
    async fn forget_call(&self, key: &CallKey, of: &Known) -> Result<()> {
        let mut commit = Commit::new(HOME);
        let stored = keys::call(HOME, &key.account, &key.key);
        commit.check(stored.clone(), Some(of.version));
        commit.write::<&[u8]>("DEL", stored, []);
        commit.write("ZREM", keys::calls(HOME), [name(key)]);
        commit.run(self, false).await.map(drop)
    }

    /// The answers that are kept, of those after `from` in the order of their time; how many were
    /// looked at.
    pub(super) async fn kept_calls(
        &self,
        from: usize,
        limit: usize,
    ) -> Result<(usize, Vec<CallPiece>)> {
        let mut page = Cmd::new();
        page.arg("ZRANGE")
            .arg(keys::calls(HOME))
            .arg(from)
            .arg(from + limit - 1);
        let members = answer::list(self.link.short(&page).await?);
        let looked = members.len();
        let mut found = Vec::new();
        for member in members {
            let member = answer::bytes(member).unwrap_or_default();
            let text = String::from_utf8_lossy(&member).into_owned();
            let Some((account, key)) = text.split_once('\0') else {
                continue;
            };
            let key = CallKey {
                account: account.to_owned(),
                key: key.to_owned(),
            };
            let known = self.call(&key).await?;
            let piece = known.and_then(|of| {
                Some(CallPiece {
                    account: key.account,
                    key: key.key,
                    fingerprint: of.fingerprint,
                    attempt: of.attempt,
                    until: Timestamp::from_millis(of.until),
                    batch: of.batch,
                    answer: of.answer?,
                })
            });
            found.extend(piece);
        }
        Ok((looked, found))
    }

    /// Keeps an answer of another store.
    pub(super) async fn restore_call(&self, of: CallPiece) -> Result<()> {
        let key = CallKey {
            account: of.account,
            key: of.key,
        };
        let known = Known {
            version: [0; 8],
            fingerprint: of.fingerprint,
            attempt: of.attempt,
            until: of.until.millis(),
            batch: of.batch,
            answer: Some(of.answer),
        };
        let mut commit = Commit::new(HOME);
        put(&mut commit, &key, None, &known);
        commit.run(self, false).await.map(drop)
    }

    /// Makes room for another try.
    pub(super) async fn drop_call(&self, key: CallKey, attempt: BatchId) -> Result<()> {
        match self.call(&key).await? {
            Some(of) if of.attempt == attempt && of.answer.is_none() => {
                self.forget_call(&key, &of).await
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Keeps the answer of a call in the step in which it takes effect on `batch`.
    pub(super) async fn end_call(
        &self,
        commit: &mut Commit,
        call: &EndedCall,
        batch: BatchId,
        now: Timestamp,
    ) -> Result<()> {
        let known = self.call(&call.key).await?;
        let own = known.filter(|of| of.attempt == call.attempt && of.answer.is_none());
        let Some(known) = own else {
            return Err(StoreError::Unavailable(
                "another try of the same call has taken over".to_owned(),
            ));
        };
        let ended = Known {
            until: (now + CALL_KEPT).millis(),
            batch,
            answer: Some(call.answer.to_vec()),
            ..known.clone()
        };
        put(commit, &call.key, Some(&known), &ended);
        Ok(())
    }
}

fn put(commit: &mut Commit, key: &CallKey, before: Option<&Known>, after: &Known) {
    let stored = keys::call(HOME, &key.account, &key.key);
    commit.check(stored.clone(), before.map(|of| of.version));
    commit.write("SET", stored, [after.write(new_version())]);
    let until = after.until.to_string().into_bytes();
    commit.write("ZADD", keys::calls(HOME), [until, name(key)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn calls_read_back(version: [u8; 8], fingerprint: [u8; 32], id: [u8; 16], until: i64, answer: Option<Vec<u8>>) {
            let id = BatchId::from_bytes(id);
            let known = Known { version, fingerprint, attempt: id, until, batch: id, answer };
            prop_assert_eq!(Known::read(&known.write(version)), Some(known));
        }

        #[test]
        fn any_bytes_are_a_call_or_none(bytes: Vec<u8>) {
            let _read = Known::read(&bytes);
        }
    }
}
