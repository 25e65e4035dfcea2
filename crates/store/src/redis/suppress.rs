//! Suppressions: by account in order of address and list, and the hash of every address in a set
//! that a lease asks.
//!
//! Must not decide whom to suppress.

use super::Inner;
use super::books::{Books, Needs};
use super::commit::{Commit, Outcome};
use super::keys;
use super::link::answer;
use super::record::new_version;
use crate::erased;
use crate::{Control, Page, Result, StoreError, Suppression, SuppressionQuery};
use ::redis::{Cmd, Pipeline, Value};
use model::{EventKind, Partition, Priority, SuppressionReason, Timestamp};
use serde_json::json;
use std::collections::BTreeMap;

/// Entries written in one step.
const STEP: usize = 256;

/// Address, list and the rest, in this order, with a zero between: the order of a page.
fn member(of: &Suppression, name: &str) -> Vec<u8> {
    let list = of.list.as_deref().unwrap_or_default();
    let mut member = format!("{name}\0{list}\0").into_bytes();
    member.push(of.reason.code());
    member.extend(of.created_at.millis().to_be_bytes());
    member.extend(of.source.as_bytes());
    member
}

fn read(account: &str, member: &[u8]) -> Option<Suppression> {
    let mut parts = member.splitn(3, |byte| *byte == 0);
    let text = |part: &[u8]| std::str::from_utf8(part).ok().map(str::to_owned);
    let (email, list, rest) = (text(parts.next()?)?, text(parts.next()?)?, parts.next()?);
    let (reason, rest) = rest.split_first()?;
    let (at, source) = rest.split_first_chunk::<8>()?;
    Some(Suppression {
        email,
        account: account.to_owned(),
        list: (!list.is_empty()).then_some(list),
        reason: SuppressionReason::from_code(*reason)?,
        source: text(source)?,
        created_at: Timestamp::from_millis(i64::from_be_bytes(*at)),
    })
}

/// How many answers [`ask`] brings.
pub(super) const ANSWERS: usize = 2;

/// Asks for all suppressions of an address: those under the address, and what is left of an erasure.
pub(super) fn ask(pipeline: &mut Pipeline, of: &Inner, p: Partition, account: &str, email: &str) {
    for name in [email, &of.eraser().name(account, email)] {
        pipeline
            .cmd("ZRANGEBYLEX")
            .arg(keys::suppressions(p, account))
            .arg(format!("[{name}\0"))
            .arg(format!("({name}\u{1}"));
    }
}

/// Reads the answers to [`ask`].
pub(super) fn read_asked(
    account: &str,
    email: &str,
    answers: [Value; ANSWERS],
) -> Vec<Suppression> {
    let found = answers.into_iter().flat_map(|of| read_all(account, of));
    let named = |entry| Suppression {
        email: email.to_owned(),
        ..entry
    };
    found.map(named).collect()
}

/// Reads a list of entries.
pub(super) fn read_all(account: &str, value: Value) -> Vec<Suppression> {
    answer::list(value)
        .into_iter()
        .filter_map(answer::bytes)
        .filter_map(|member| read(account, &member))
        .collect()
}

/// Adds a suppression with its event and control item. One that stops less than what is there
/// for the same account, address and list changes nothing when `only_stronger`.
pub(super) fn add(books: &mut Books<'_>, entry: Suppression, only_stronger: bool) {
    let key = (entry.account.clone(), entry.email.clone());
    let list = entry.list.clone().unwrap_or_default();
    let known = books.known.get(&key).cloned().unwrap_or_default();
    let stops = |of: &Suppression| of.stops(&list, Priority::Transactional);
    let weaker = |old: &Suppression| {
        old.list == entry.list && (old.reason == entry.reason || stops(old) && !stops(&entry))
    };
    if only_stronger && known.iter().any(weaker) {
        return;
    }
    let p = books.partition;
    let name = books.inner.eraser().kept_under(&entry);
    let kept_under = |old: &Suppression| books.inner.eraser().kept_under(old);
    let kept = |old: &Suppression| old.list != entry.list || kept_under(old) != name;
    for old in known.iter().filter(|old| !kept(old)) {
        let index = keys::suppressions(p, &entry.account);
        books.commit.write("ZREM", index, [member(old, &name)]);
    }
    let index = keys::suppressions(p, &entry.account);
    books
        .commit
        .write("ZADD", index, [b"0".to_vec(), member(&entry, &name)]);
    let hash = keys::address_hash(&entry.account, &name);
    books.commit.write("SADD", keys::suppressed(p), [hash]);
    books.touch_suppressions();
    if entry.reason != SuppressionReason::Erased {
        let data =
            json!({ "reason": entry.reason.as_str(), "list": entry.list, "source": entry.source });
        books.address_event(
            EventKind::SuppressionAdded,
            &entry.account,
            &entry.email,
            data,
        );
    }
    let mut now: Vec<Suppression> = known.into_iter().filter(kept).collect();
    now.push(entry.clone());
    books.known.insert(key, now);
    books.tell(Control::Suppressed(entry));
}

/// Removes an entry that was read, and the hash under which its address is known. Of the entries of an
/// address that stay, the hash must be added again.
pub(super) fn forget(books: &mut Books<'_>, entry: &Suppression) {
    let p = books.partition;
    let name = books.inner.eraser().kept_under(entry);
    let index = keys::suppressions(p, &entry.account);
    books.commit.write("ZREM", index, [member(entry, &name)]);
    let hash = keys::address_hash(&entry.account, &name);
    books.commit.write("SREM", keys::suppressed(p), [hash]);
    books.touch_suppressions();
}

impl Inner {
    /// Adds suppressions by hand: each replaces what is there.
    pub(super) async fn suppress(&self, entries: Vec<Suppression>, now: Timestamp) -> Result<()> {
        let mut parts: BTreeMap<Partition, Vec<Suppression>> = BTreeMap::new();
        for entry in entries {
            let of = Partition::of(&entry.account, &entry.email, self.partitions);
            parts.entry(of).or_default().push(entry);
        }
        for (p, entries) in parts {
            for some in entries.chunks(STEP) {
                self.suppress_some(p, some, now).await?;
            }
        }
        Ok(())
    }

    async fn suppress_some(
        &self,
        p: Partition,
        some: &[Suppression],
        now: Timestamp,
    ) -> Result<()> {
        let address = |of: &Suppression| (of.account.clone(), of.email.clone());
        let needs = Needs {
            addresses: some.iter().map(address).collect(),
            ..Needs::default()
        };
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = Books::open(self, p, now);
            books.load(&needs).await?;
            for entry in some {
                add(&mut books, entry.clone(), false);
            }
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, true).await? != Outcome::Conflict {
                break;
            }
        }
        self.wrote();
        Ok(())
    }

    /// Writes a suppression of another store as it was kept there; nobody is told.
    pub(super) async fn restore_suppression(&self, entry: &Suppression) -> Result<()> {
        let own = Partition::of(&entry.account, &entry.email, self.partitions);
        for p in self.all_partitions() {
            // Whose address a name stands for nobody knows, so it is known wherever it may be.
            if p != own && !erased::is_name(&entry.email) {
                continue;
            }
            let mut commit = Commit::new(p);
            let index = keys::suppressions(p, &entry.account);
            commit.write("ZADD", index, [b"0".to_vec(), member(entry, &entry.email)]);
            let hash = keys::address_hash(&entry.account, &entry.email);
            commit.write("SADD", keys::suppressed(p), [hash]);
            commit.write("SET", keys::suppressions_version(p), [new_version()]);
            commit.run(self, false).await?;
        }
        Ok(())
    }

    /// Removes those of an address: of one list, or all.
    pub(super) async fn unsuppress(
        &self,
        account: &str,
        email: &str,
        list: Option<&str>,
        now: Timestamp,
    ) -> Result<u32> {
        let p = Partition::of(account, email, self.partitions);
        let address = (account.to_owned(), email.to_owned());
        let needs = Needs {
            addresses: [address.clone()].into(),
            ..Needs::default()
        };
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = Books::open(self, p, now);
            books.load(&needs).await?;
            let known = books.known.get(&address).cloned().unwrap_or_default();
            let (gone, kept): (Vec<_>, Vec<_>) = known
                .into_iter()
                .partition(|entry| list.is_none() || entry.list.as_deref() == list);
            if gone.is_empty() {
                return Ok(0);
            }
            for entry in &gone {
                forget(&mut books, entry);
                let data = json!({ "reason": entry.reason.as_str(), "list": entry.list, "source": entry.source });
                books.address_event(EventKind::SuppressionRemoved, account, email, data);
            }
            for entry in &kept {
                let name = self.eraser().kept_under(entry);
                let hash = keys::address_hash(account, &name);
                books.commit.write("SADD", keys::suppressed(p), [hash]);
            }
            books.tell(Control::Unsuppressed {
                account: account.to_owned(),
                email: email.to_owned(),
                list: list.map(str::to_owned),
            });
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, true).await? != Outcome::Conflict {
                self.wrote();
                return Ok(u32::try_from(gone.len()).unwrap_or(u32::MAX));
            }
        }
        Ok(0)
    }

    /// All suppressions of an address.
    pub(super) async fn suppressions_of(
        &self,
        account: &str,
        email: &str,
    ) -> Result<Vec<Suppression>> {
        let p = Partition::of(account, email, self.partitions);
        let mut pipeline = Pipeline::new();
        ask(&mut pipeline, self, p, account, email);
        let mut found = self.link.bulk(&pipeline).await?.into_iter();
        let answers = std::array::from_fn(|_| found.next().unwrap_or_default());
        Ok(read_asked(account, email, answers))
    }

    /// Suppressions of an account in order of address and list.
    pub(super) async fn suppression_page(
        &self,
        query: &SuppressionQuery,
    ) -> Result<Page<Suppression>> {
        if let Some(email) = &query.email {
            let items = self.suppressions_of(&query.account, email).await?;
            return Ok(Page { items, next: None });
        }
        // The cursor is the last address and its list; neither has a space.
        let from = match query.after.as_deref() {
            None => "-".to_owned(),
            Some(cursor) => cursor
                .split_once(' ')
                .filter(|(email, _)| email.contains('@'))
                .map(|(email, list)| format!("({email}\0{list}\u{1}"))
                .ok_or_else(|| StoreError::Refused("is no cursor of suppressions".into()))?,
        };
        let limit = query.limit.clamp(1, 1_000);
        let mut items = Vec::new();
        for p in self.all_partitions() {
            let mut page = Cmd::new();
            page.arg("ZRANGEBYLEX")
                .arg(keys::suppressions(p, &query.account))
                .arg(&from)
                .arg("+")
                .arg("LIMIT")
                .arg(0)
                .arg(limit);
            items.extend(read_all(&query.account, self.link.short(&page).await?));
        }
        items.sort_by(|a, b| (&a.email, &a.list).cmp(&(&b.email, &b.list)));
        // What came from another store may stand in several partitions.
        items.dedup_by(|a, b| (&a.email, &a.list) == (&b.email, &b.list));
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        items.truncate(limit);
        let next = items.last().filter(|_| items.len() == limit).map(|last| {
            format!(
                "{} {}",
                last.email,
                last.list.as_deref().unwrap_or_default()
            )
        });
        Ok(Page { items, next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_read_back(email in "[a-z]{1,9}@x", list in "[a-z]{0,5}", source in "[a-z]{0,5}", at in 0_i64..1 << 50) {
            let entry = Suppression {
                email,
                account: "acme".into(),
                list: (!list.is_empty()).then_some(list),
                reason: SuppressionReason::Complaint,
                source,
                created_at: Timestamp::from_millis(at),
            };
            prop_assert_eq!(read("acme", &member(&entry, &entry.email)), Some(entry));
        }

        #[test]
        fn any_bytes_are_an_entry_or_none(bytes: Vec<u8>) {
            let _read = read("acme", &bytes);
        }
    }
}
