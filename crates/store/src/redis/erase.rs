//! Erasing a person: their rows, what happened to them, and what was told of them.
//!
//! In bounded steps, each of which may be taken again: first the suppression that stays, then the lots
//! that may have the address, then the events, then the control feed. A recipient who was erased says
//! so in its cell: rows that another node still has in its cache are not believed, and no fact that
//! comes later brings the person back. Must not decide who.

use super::Inner;
use super::books::{Books, Needs};
use super::cache::LotKey;
use super::commit::Outcome;
use super::feeds;
use super::keys;
use super::link::answer;
use super::record::{Lot, write_lot};
use super::stage::short_hash;
use super::suppress;
use crate::erased;
use crate::form::{self, LogBlock, Packer};
use crate::transition;
use crate::{Control, Erase, Erased, MIXED, Result, Suppression};
use ::redis::{Cmd, Pipeline};
use model::{Partition, Status, SuppressionReason, Timestamp};
use std::time::Duration;

/// Lots looked through in one step.
const LOTS: usize = 1_024;
const LOTS_AT_ONCE: usize = 256;
/// Events looked through in one step.
const EVENTS: u32 = 1_000;
/// Control items looked through at once.
const ITEMS: u32 = 1_000;
/// Every node has read a control item of that age.
const HEARD: Duration = Duration::from_secs(600);

/// Where an erasure is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    Suppression,
    /// In the lots of the address's own queue or in mixed ones, below this one.
    Lots {
        mixed: bool,
        below: Option<LotKey>,
    },
    /// In the events of this partition, after this id.
    Events {
        partition: u8,
        after: String,
    },
    Control,
}

impl Stage {
    fn read(text: Option<&str>) -> Self {
        Self::parse(text.unwrap_or_default()).unwrap_or(Self::Suppression)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        Some(match parts.next()? {
            "lots" => Self::Lots {
                mixed: parts.next()? == "1",
                below: match (parts.next(), parts.next()) {
                    (Some(batch), Some(lot)) => {
                        Some((batch.parse().ok()?, model::LotNumber(lot.parse().ok()?)))
                    }
                    _ => None,
                },
            },
            "events" => Self::Events {
                partition: parts.next()?.parse().ok()?,
                after: parts.next()?.to_owned(),
            },
            "control" => Self::Control,
            _ => return None,
        })
    }

    fn write(&self) -> String {
        match self {
            Self::Suppression => "suppression".to_owned(),
            Self::Lots { mixed, below } => {
                let below =
                    below.map_or(String::new(), |(batch, lot)| format!(" {batch} {}", lot.0));
                format!("lots {}{below}", u8::from(*mixed))
            }
            Self::Events { partition, after } => format!("events {partition} {after}"),
            Self::Control => "control".to_owned(),
        }
    }

    const fn first_events() -> Self {
        Self::Events {
            partition: 0,
            after: String::new(),
        }
    }
}

impl Inner {
    /// Takes one step.
    pub(super) async fn erase(&self, of: &Erase, now: Timestamp) -> Result<Erased> {
        let (recipients, next) = match Stage::read(of.after.as_deref()) {
            Stage::Suppression => {
                self.keep_suppression(of, now).await?;
                let (mixed, below) = (false, None);
                (0, Some(Stage::Lots { mixed, below }))
            }
            Stage::Lots { mixed, below } => self.erase_lots(of, mixed, below, now).await?,
            Stage::Events { partition, after } => {
                (0, Some(self.erase_events(of, partition, &after).await?))
            }
            Stage::Control => {
                for p in self.all_partitions() {
                    self.erase_control(p, of, now).await?;
                }
                (0, None)
            }
        };
        Ok(Erased {
            recipients,
            next: next.map(|stage| stage.write()),
        })
    }

    /// The one suppression that stays, in place of all others.
    async fn keep_suppression(&self, of: &Erase, now: Timestamp) -> Result<()> {
        let p = Partition::of(&of.account, &of.email, self.partitions);
        let person = (of.account.clone(), of.email.clone());
        let needs = Needs {
            addresses: [person.clone()].into(),
            ..Needs::default()
        };
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = Books::open(self, p, now);
            books.load(&needs).await?;
            let known = books.known.get(&person).cloned().unwrap_or_default();
            let (kept, gone): (Vec<_>, Vec<_>) = known
                .into_iter()
                .partition(|old| old.reason == SuppressionReason::Erased);
            for old in &gone {
                suppress::forget(&mut books, old);
            }
            if kept.is_empty() {
                books.known.insert(person.clone(), Vec::new());
                let entry = Suppression {
                    email: of.email.clone(),
                    account: of.account.clone(),
                    list: None,
                    reason: SuppressionReason::Erased,
                    source: "erasure".into(),
                    created_at: now,
                };
                suppress::add(&mut books, entry, false);
            }
            let (commit, _) = books.close(None, 0)?;
            if commit.run(self, true).await? != Outcome::Conflict {
                break;
            }
        }
        self.wrote();
        Ok(())
    }

    // ---- lots ---------------------------------------------------------------------------

    async fn erase_lots(
        &self,
        of: &Erase,
        mixed: bool,
        below: Option<LotKey>,
        now: Timestamp,
    ) -> Result<(u64, Option<Stage>)> {
        let p = Partition::of(&of.account, &of.email, self.partitions);
        let domain = of.email.rsplit_once('@').map_or("", |(_, domain)| domain);
        let from = below.map_or(b"+".to_vec(), |(batch, lot)| {
            [&b"("[..], &keys::lot_member(batch, lot)].concat()
        });
        let mut list = Cmd::new();
        list.arg("ZREVRANGEBYLEX")
            .arg(keys::lots_of(p, if mixed { MIXED } else { domain }))
            .arg(from)
            .arg("-")
            .arg("LIMIT")
            .arg(0)
            .arg(LOTS);
        let members = answer::list(self.link.short(&list).await?);
        let read = |member| keys::read_lot_member(&answer::bytes(member)?);
        let lots: Vec<LotKey> = members.into_iter().filter_map(read).collect();
        let mut recipients = 0;
        for some in lots.chunks(LOTS_AT_ONCE) {
            for key in self.lots_with(p, some, &of.email).await? {
                recipients += self.erase_in(p, of, key, now).await?;
            }
        }
        let next = match (lots.last(), mixed) {
            (Some(last), _) if lots.len() == LOTS => Stage::Lots {
                mixed,
                below: Some(*last),
            },
            (_, false) => Stage::Lots {
                mixed: true,
                below: None,
            },
            (_, true) => Stage::first_events(),
        };
        Ok((recipients, Some(next)))
    }

    /// Erases the person in a lot, if it is there and of the account; how many recipients.
    async fn erase_in(&self, p: Partition, of: &Erase, key: LotKey, now: Timestamp) -> Result<u64> {
        let mut tries = self.tries();
        while tries.again().await? {
            let mut books = Books::open(self, p, now);
            let needs = Needs {
                cells: [key].into(),
                batches: [key.0].into(),
                ..Needs::default()
            };
            books.load(&needs).await?;
            let released = match books.batch(key.0) {
                Some(record) if record.has_rows() => record.released,
                // Not committed, or going.
                _ => return Ok(0),
            };
            if books.head(key.0)?.account != of.account {
                return Ok(0);
            }
            let Some(stored) = self.bytes_of(&keys::lot(p, key.0, key.1.0)).await? else {
                return Ok(0);
            };
            let (rewritten, positions) = without(&stored, of)?;
            if positions.is_empty() {
                return Ok(0);
            }
            for &position in &positions {
                let Some(mut cell) = books.cell(key, position)? else {
                    continue;
                };
                books.count(key.0, |counters| {
                    transition::end_unsent(&mut cell, counters, released, Status::Suppressed)
                });
                cell.erase();
                books.set_cell(key, position, cell);
            }
            let lot = keys::lot(p, key.0, key.1.0);
            books.commit.check_bytes(lot.clone(), 0, &stored);
            books.commit.write("SET", lot, [rewritten]);
            self.erase_facts(&mut books, key, &positions).await?;
            let (commit, told) = books.close(None, 0)?;
            if let Outcome::Done { seq, open } = commit.run(self, true).await? {
                self.cache.forget_lot(&key);
                self.completions(&told, &open, now, seq).await?;
                return Ok(u64::try_from(positions.len()).unwrap_or(0));
            }
        }
        Ok(0)
    }

    async fn bytes_of(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let mut get = Cmd::new();
        get.arg("GET").arg(key);
        Ok(answer::bytes(self.link.short(&get).await?))
    }

    /// Rewrites the blocks of facts that have some of the person. Shipments add at the end only.
    async fn erase_facts(
        &self,
        books: &mut Books<'_>,
        key: LotKey,
        positions: &[u16],
    ) -> Result<()> {
        let facts = keys::facts(books.partition, key.0, key.1.0);
        let mut list = Cmd::new();
        list.arg("LRANGE").arg(&facts).arg(0).arg(-1);
        let mut packer = Packer::new()?;
        for (at, packed) in answer::list(self.link.short(&list).await?)
            .into_iter()
            .enumerate()
        {
            let packed = answer::bytes(packed).unwrap_or_default();
            let mut block: LogBlock = form::unpack_log(&packed)?;
            let mut theirs = block
                .entries
                .iter_mut()
                .filter(|entry| positions.contains(&entry.position))
                .peekable();
            if theirs.peek().is_none() {
                continue;
            }
            theirs.for_each(erased::blank);
            let packed = packer.pack_log(&block)?;
            books
                .commit
                .write("LSET", facts.clone(), [at.to_string().into_bytes(), packed]);
        }
        Ok(())
    }

    // ---- what was told ------------------------------------------------------------------

    async fn erase_events(&self, of: &Erase, partition: u8, after: &str) -> Result<Stage> {
        let (account, email) = (json_text(&of.account), json_text(&of.email));
        let arguments = [
            if after.is_empty() { "0-0" } else { after }
                .as_bytes()
                .to_vec(),
            EVENTS.to_string().into_bytes(),
            format!("\"account\":{account}").into_bytes(),
            format!("\"recipient\":{{\"email\":{email}").into_bytes(),
        ];
        let keys = [keys::events(Partition(partition))];
        let answer = self
            .script(
                &self.scripts.erase,
                Partition(partition),
                &keys,
                &arguments,
                false,
            )
            .await?;
        let last = answer::list(answer)
            .into_iter()
            .next()
            .and_then(answer::bytes);
        let last = last
            .and_then(|id| String::from_utf8(id).ok())
            .unwrap_or_default();
        if !last.is_empty() {
            let after = last;
            return Ok(Stage::Events { partition, after });
        }
        match partition.checked_add(1) {
            Some(partition) if u16::from(partition) < self.partitions => Ok(Stage::Events {
                partition,
                after: String::new(),
            }),
            _ => Ok(Stage::Control),
        }
    }

    /// Items that every node has read go; whoever slept longer finds a gap, and starts anew.
    async fn erase_control(&self, p: Partition, of: &Erase, now: Timestamp) -> Result<()> {
        let mut from = "-".to_owned();
        loop {
            let mut range = Cmd::new();
            range
                .arg("XRANGE")
                .arg(keys::control(p))
                .arg(&from)
                .arg("+")
                .arg("COUNT")
                .arg(ITEMS);
            let entries = answer::list(self.link.short(&range).await?);
            let mut gone = Pipeline::new();
            let mut last = None;
            for entry in entries {
                let Some((number, fields)) = feeds::read_entry(entry) else {
                    continue;
                };
                last = Some(number);
                let at = String::from_utf8(feeds::field(&fields, b"t")).ok();
                let old = at
                    .and_then(|at| at.parse::<i64>().ok())
                    .is_none_or(|at| at < (now - HEARD).millis());
                let item = serde_json::from_slice::<Control>(&feeds::field(&fields, b"i"));
                if old && item.is_ok_and(|item| item.is_about(&of.account, &of.email)) {
                    gone.cmd("XDEL")
                        .arg(keys::control(p))
                        .arg(format!("{number}-0"));
                }
            }
            if !gone.is_empty() {
                self.link.bulk(&gone).await?;
            }
            let Some(last) = last else {
                return Ok(());
            };
            from = format!("({last}-0");
        }
    }
}

/// The bytes of a lot without the person, and where they stood.
fn without(stored: &[u8], of: &Erase) -> Result<(Vec<u8>, Vec<u16>)> {
    let Lot {
        queue,
        overrides,
        mut rows,
    } = Lot::read(stored)?;
    let mut positions = Vec::new();
    let mut hashes = Vec::with_capacity(rows.len());
    for (position, row) in (0_u16..).zip(&mut rows) {
        if row.email.normalised() == of.email {
            *row = erased::row(row);
            positions.push(position);
        }
        let email = row.email.normalised();
        hashes.push(if erased::is_name(&email) {
            0
        } else {
            short_hash(&email)
        });
    }
    let rewritten = write_lot(&queue, overrides, &hashes, &form::pack_rows(&rows)?);
    Ok((rewritten, positions))
}

/// A text as it stands in the JSON of an event.
fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::BatchId;
    use proptest::prelude::*;

    #[test]
    fn a_stage_reads_back() {
        let key = (BatchId::from_bytes([3; 16]), model::LotNumber(77));
        let after = "1800000000000000-0".to_owned();
        let partition = 3;
        for stage in [
            Stage::Suppression,
            Stage::Lots {
                mixed: false,
                below: None,
            },
            Stage::Lots {
                mixed: true,
                below: Some(key),
            },
            Stage::first_events(),
            Stage::Events { partition, after },
            Stage::Control,
        ] {
            assert_eq!(Stage::read(Some(&stage.write())), stage);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_stage_or_the_beginning(text: String) {
            let _stage = Stage::read(Some(&text));
        }
    }
}
