//! What people let be kept of them at most, under the names that stand for their addresses: a hash
//! in the partition of each address.
//!
//! Must not say what follows from it: shipments and leases do.

use super::Inner;
use super::books::Books;
use super::commit::Commit;
use super::keys;
use super::link::answer;
use crate::backup::ConsentPiece;
use crate::{Consent, Result, StoreError};
use ::redis::{Cmd, Pipeline, Value};
use model::{Partition, Timestamp, TrackingMode};
use std::collections::BTreeMap;

/// Fields asked for in one command.
const AT_ONCE: usize = 1_000;

fn field(account: &str, name: &str) -> Vec<u8> {
    // Neither has a zero in it.
    format!("{account}\0{name}").into_bytes()
}

fn write(of: Consent) -> [u8; 9] {
    let mut bytes = [of.mode.code(); 9];
    bytes
        .iter_mut()
        .skip(1)
        .zip(of.since.millis().to_be_bytes())
        .for_each(|(to, from)| *to = from);
    bytes
}

fn read(bytes: &[u8]) -> Option<Consent> {
    let (mode, since) = bytes.split_first()?;
    Some(Consent {
        mode: TrackingMode::from_code(*mode)?,
        since: Timestamp::from_millis(i64::from_be_bytes(since.try_into().ok()?)),
    })
}

fn read_value(value: Value) -> Result<Option<Consent>> {
    let found = answer::bytes(value);
    let consent = found.map(|bytes| {
        read(&bytes).ok_or_else(|| StoreError::Damaged("what a person consented to".into()))
    });
    consent.transpose()
}

/// Asks what these people (account and address) said; [`read_asked`] reads the answers.
pub(super) fn ask(pipeline: &mut Pipeline, of: &Inner, p: Partition, people: &[(String, String)]) {
    let eraser = of.eraser();
    for some in people.chunks(AT_ONCE) {
        let ask = pipeline.cmd("HMGET").arg(keys::consents(p));
        for (account, email) in some {
            ask.arg(field(account, &eraser.name(account, email)));
        }
    }
}

/// Reads the answers to [`ask`] into the books.
pub(super) fn read_asked(
    books: &mut Books<'_>,
    people: Vec<(String, String)>,
    mut next: impl FnMut() -> Value,
) -> Result<()> {
    let mut answers = Vec::new();
    for person in people {
        if answers.is_empty() {
            answers = answer::list(next());
            answers.reverse();
        }
        let found = read_value(answers.pop().unwrap_or_default())?;
        books.consents.insert(person, found);
    }
    Ok(())
}

impl Inner {
    /// What each of these people said.
    pub(super) async fn consents(
        &self,
        account: &str,
        emails: &[String],
    ) -> Result<Vec<Option<Consent>>> {
        let mut parts: BTreeMap<Partition, Vec<(usize, &String)>> = BTreeMap::new();
        for (at, email) in emails.iter().enumerate() {
            let p = Partition::of(account, email, self.partitions);
            parts.entry(p).or_default().push((at, email));
        }
        let mut found = vec![None; emails.len()];
        let eraser = self.eraser();
        for (p, people) in parts {
            for some in people.chunks(AT_ONCE) {
                let mut ask = Cmd::new();
                ask.arg("HMGET").arg(keys::consents(p));
                for (_, email) in some {
                    ask.arg(field(account, &eraser.name(account, email)));
                }
                let answers = answer::list(self.link.short(&ask).await?);
                for ((at, _), value) in some.iter().zip(answers) {
                    if let Some(of) = found.get_mut(*at) {
                        *of = read_value(value)?;
                    }
                }
            }
        }
        Ok(found)
    }

    /// Notes what a person says, or that it no longer holds. Whether something was said before.
    pub(super) async fn set_consent(
        &self,
        account: &str,
        email: &str,
        mode: Option<TrackingMode>,
        now: Timestamp,
    ) -> Result<bool> {
        let before = self.consents(account, &[email.to_owned()]).await?;
        let p = Partition::of(account, email, self.partitions);
        let name = field(account, &self.eraser().name(account, email));
        let mut commit = Commit::new(p);
        match mode {
            Some(mode) => {
                let consent = write(Consent { mode, since: now });
                commit.write("HSET", keys::consents(p), [name, consent.to_vec()]);
            }
            None => commit.write("HDEL", keys::consents(p), [name]),
        }
        commit.run(self, true).await?;
        Ok(before.iter().any(Option::is_some))
    }

    /// Writes what another store has noted.
    pub(super) async fn restore_consent(&self, of: &ConsentPiece) -> Result<()> {
        let mode = TrackingMode::from_code(of.mode)
            .ok_or_else(|| StoreError::Damaged(format!("tracking mode {} of a person", of.mode)))?;
        let consent = Consent {
            mode,
            since: of.since,
        };
        let mut commit = Commit::new(of.partition);
        let value = [field(&of.account, &of.name), write(consent).to_vec()];
        commit.write("HSET", keys::consents(of.partition), value);
        commit.run(self, false).await.map(drop)
    }

    /// What was said in a partition: pairs as they are in the hash.
    pub(super) fn read_consents(
        partition: Partition,
        pairs: Vec<(Vec<u8>, Vec<u8>)>,
    ) -> impl Iterator<Item = Result<ConsentPiece>> {
        let damaged = || StoreError::Damaged("what a person consented to".into());
        pairs.into_iter().map(move |(field, value)| {
            let field = String::from_utf8(field).map_err(|_| damaged())?;
            let (account, name) = field.split_once('\0').ok_or_else(damaged)?;
            let consent = read(&value).ok_or_else(damaged)?;
            Ok(ConsentPiece {
                partition,
                account: account.to_owned(),
                name: name.to_owned(),
                mode: consent.mode.code(),
                since: consent.since,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_reads_back(code in 0_u8..4, at in 0_i64..1 << 50) {
            let consent = Consent {
                mode: TrackingMode::ALL[usize::from(code)],
                since: Timestamp::from_millis(at),
            };
            prop_assert_eq!(read(&write(consent)), Some(consent));
        }

        #[test]
        fn any_bytes_are_read_or_none(bytes: Vec<u8>) {
            let _read = read(&bytes);
        }
    }
}
