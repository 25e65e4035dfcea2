//! The recipients of a batch whose head is good: from the spool into lots.
//!
//! Owns the judgement of recipients against the content and against each other, the count of the
//! rejected, and the pace: lots go out in groups, and the next group waits until the one before was
//! taken. Runs on a thread that may block; must not talk to the store.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};
use std::sync::Arc;

use content::Content;
use model::{Partition, Row};
use siphasher::sip128::{Hasher128 as _, SipHasher13};
use store::{BatchHead, NewLot};
use tokio::sync::mpsc;

use super::advice::Advice;
use super::fields::Mistakes;
use super::lots::{Bounds, LotBuilder};
use super::row::{self, Parsed, Rejection, RejectionCode};
use super::scan::Vars;
use super::splitter::Position;
use super::spool::SpoolReader;
use crate::abtest::layout::Dealing;
use crate::admin::problem::{Answer, Code, Refusal};

/// The most rejections that an answer lists.
pub(crate) const REJECTIONS_MAX: usize = 1_000;

/// Complete lots go out when they have this many recipients together.
const GROUP_ROWS: usize = 4_000;

/// What became of the recipients.
#[derive(Debug, Default)]
pub(crate) struct Sorted {
    pub(crate) accepted: u64,
    /// The first [`REJECTIONS_MAX`].
    pub(crate) rejected: Vec<Rejection>,
    pub(crate) rejected_count: u64,
    /// The first that was accepted, for a dry run.
    pub(crate) first: Option<Row>,
    /// What the list looks like.
    pub(crate) advice: Advice,
}

/// Everything that recipients are judged by.
pub(crate) struct Judge<'c> {
    /// All that a recipient may get.
    contents: &'c [Content],
    dealing: Option<Arc<Dealing>>,
    account: &'c str,
    partitions: u16,
    seen: Option<Seen>,
    /// The addresses of the parts before, when this is one of several.
    earlier: Option<Earlier<'c>>,
    /// The batch, where that has a word to say.
    head: Option<&'c BatchHead>,
    /// Where the batch goes on: the first index, and the running number of the first lot.
    first: (u32, u32),
    sorted: Sorted,
}

/// Says whether an address belongs to the batch already. May block.
pub(crate) type Earlier<'c> = &'c (dyn Fn(&str) -> Answer<bool> + Send + Sync);

impl<'c> Judge<'c> {
    pub(crate) fn new(
        contents: &'c [Content],
        account: &'c str,
        partitions: u16,
        allow_duplicates: bool,
    ) -> Self {
        Self {
            contents,
            dealing: None,
            account,
            partitions,
            seen: (!allow_duplicates).then(Seen::default),
            earlier: None,
            head: None,
            first: (0, 0),
            sorted: Sorted::default(),
        }
    }

    /// For this batch.
    pub(crate) fn of(self, head: &'c BatchHead) -> Self {
        Self {
            head: Some(head),
            ..self
        }
    }

    /// Deals them to variants.
    pub(crate) fn dealing(self, dealing: Option<Arc<Dealing>>) -> Self {
        Self { dealing, ..self }
    }

    /// Goes on where the parts of the batch before ended.
    pub(crate) fn after(self, first: (u32, u32), earlier: Earlier<'c>) -> Self {
        Self {
            earlier: self.seen.is_some().then_some(earlier),
            first,
            ..self
        }
    }

    /// Sorts all recipients; lots go to `out`, unless there is none (a dry run). Blocks.
    ///
    /// # Errors
    /// The refusal of the whole call; lots that went out are for nothing then.
    pub(crate) fn sort(
        mut self,
        spool: &mut SpoolReader,
        out: Option<&mpsc::Sender<Vec<NewLot>>>,
    ) -> Answer<Sorted> {
        let mut mistakes = Mistakes::default();
        let has_window = self.head.is_some_and(|head| head.window.is_some());
        let mut lots = LotBuilder::new(Bounds::default(), self.first.1)
            .by_zone(has_window)
            .dealt(self.dealing.clone());
        let mut vars = Vars::default();
        if let Some(seen) = &mut self.seen {
            seen.expect(spool.rows());
        }
        let mut index = 0;
        while let Some(spooled) = spool.next_row().map_err(|error| Refusal::disk(&error))? {
            let parsed = match spooled.json {
                None => Parsed::Rejected(row::too_large(index)),
                Some(json) => row::parse(json, index, &mut mistakes, &mut vars)
                    .map_err(|error| broken(&error, spooled.at, index))?,
            };
            let accepted = self.judge(parsed, &vars)?;
            if mistakes.is_full() {
                break;
            }
            // With a mistake the call is lost: go on for the sake of the other mistakes only.
            if let (Some((partition, row)), true) = (accepted, mistakes.is_empty()) {
                if out.is_none() && self.sorted.first.is_none() {
                    self.sorted.first = Some(row.clone());
                }
                self.sorted.accepted += 1;
                self.sorted.advice.look(&row.email);
                if let Some(head) = self.head {
                    self.sorted.advice.look_at_hours(&row, head);
                }
                lots.push(partition, row)
                    .map_err(|error| too_many(&error))?;
                send_if(lots.sealed_rows() >= GROUP_ROWS, &mut lots, out)?;
            }
            index += 1;
        }
        if !mistakes.is_empty() {
            return Err(Refusal::of_mistakes(mistakes.into_vec()));
        }
        let last = lots.finish().map_err(|error| too_many(&error))?;
        send(last, out)?;
        Ok(self.sorted)
    }

    fn judge(&mut self, parsed: Parsed, vars: &Vars) -> Answer<Option<(Partition, Row)>> {
        match parsed {
            Parsed::Refused => Ok(None),
            Parsed::Rejected(rejection) => {
                self.reject(rejection);
                Ok(None)
            }
            Parsed::Good(row) => match self.against_others(&row, vars)? {
                Ok(partition) => Ok(Some((partition, self.placed(row)))),
                Err((code, detail)) => {
                    let detail = format!("/recipients/{}/{detail}", row.index);
                    let email = Some(row.email.to_string());
                    self.reject(Rejection {
                        index: row.index,
                        email,
                        code,
                        detail,
                    });
                    Ok(None)
                }
            },
        }
    }

    /// With its index in the batch in place of that in the document.
    fn placed(&self, row: Row) -> Row {
        Row {
            index: self.first.0.saturating_add(row.index),
            ..row
        }
    }

    fn against_others(
        &mut self,
        row: &Row,
        vars: &Vars,
    ) -> Answer<Result<Partition, (RejectionCode, String)>> {
        let address = row.email.normalised();
        let hash = self.seen.as_ref().map(|seen| seen.hash(&address));
        let is_new = match (&mut self.seen, hash) {
            (Some(seen), Some(hash)) => seen.hashes.insert(hash),
            _ => true,
        };
        let is_earlier = || self.earlier.map_or(Ok(false), |earlier| earlier(&address));
        if !is_new || is_earlier()? {
            let detail = "email is there already; allow_duplicates would take it".to_owned();
            return Ok(Err((RejectionCode::Duplicate, detail)));
        }
        if let Err(error) = self.against_contents(row, vars) {
            // Who is rejected may come again, and better.
            if let (Some(seen), Some(hash)) = (&mut self.seen, hash) {
                seen.hashes.remove(&hash);
            }
            let code = match error {
                content::RecipientError::MissingVariable { .. } => RejectionCode::MissingVariable,
                content::RecipientError::InvalidVars { .. } => RejectionCode::InvalidVars,
            };
            return Ok(Err((code, format!("vars {error}"))));
        }
        Ok(Ok(Partition::of(self.account, &address, self.partitions)))
    }

    fn against_contents(&self, row: &Row, vars: &Vars) -> Result<(), content::RecipientError> {
        self.contents
            .iter()
            .try_for_each(|content| match vars.are_known() {
                true => content.check_by(row, |name| vars.glimpse(name)),
                false => content.check(row),
            })
    }

    fn reject(&mut self, rejection: Rejection) {
        self.sorted.rejected_count += 1;
        if self.sorted.rejected.len() < REJECTIONS_MAX {
            self.sorted.rejected.push(Rejection {
                index: self.first.0.saturating_add(rejection.index),
                ..rejection
            });
        }
    }
}

/// Looks for what refuses a call as a whole, before anything is done about it: a part that is
/// refused must not have taken indices. Blocks.
///
/// # Errors
/// The refusal.
pub(crate) fn check(spool: &mut SpoolReader) -> Answer<()> {
    let (mut mistakes, mut vars) = (Mistakes::default(), Vars::default());
    let mut index = 0;
    while let Some(spooled) = spool.next_row().map_err(|error| Refusal::disk(&error))? {
        if let Some(json) = spooled.json {
            row::check(json, index, &mut mistakes, &mut vars)
                .map_err(|error| broken(&error, spooled.at, index))?;
        }
        if mistakes.is_full() {
            break;
        }
        index += 1;
    }
    if !mistakes.is_empty() {
        return Err(Refusal::of_mistakes(mistakes.into_vec()));
    }
    spool.rewind().map_err(|error| Refusal::disk(&error))
}

/// Addresses that room is made for before they come.
const EXPECTED_MAX: usize = 1 << 20;

/// Addresses of the batch, as 128 bits each: enough that no two are ever taken for one, and a
/// million take 35 MiB. Keyed by chance, so that nobody can make two collide.
#[derive(Debug, Default)]
struct Seen {
    key: Key,
    hashes: HashSet<u128, BuildHasherDefault<Hashed>>,
}

impl Seen {
    /// Makes room for so many.
    fn expect(&mut self, addresses: u32) {
        let addresses = usize::try_from(addresses).unwrap_or(EXPECTED_MAX);
        self.hashes.reserve(addresses.min(EXPECTED_MAX));
    }

    fn hash(&self, address: &str) -> u128 {
        let mut hasher = SipHasher13::new_with_keys(self.key.0, self.key.1);
        hasher.write(address.as_bytes());
        hasher.finish128().as_u128()
    }
}

/// Of a hash that nobody can foresee.
#[derive(Debug)]
struct Key(u64, u64);

impl Default for Key {
    fn default() -> Self {
        let half = || RandomState::new().build_hasher().finish();
        Self(half(), half())
    }
}

/// What is a hash already.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let first = bytes.first_chunk().copied().unwrap_or_default();
        self.0 = u64::from_ne_bytes(first);
    }
}

fn send_if(
    due: bool,
    lots: &mut LotBuilder,
    out: Option<&mpsc::Sender<Vec<NewLot>>>,
) -> Answer<()> {
    if due {
        send(lots.take_sealed(), out)
    } else {
        Ok(())
    }
}

fn send(lots: Vec<NewLot>, out: Option<&mpsc::Sender<Vec<NewLot>>>) -> Answer<()> {
    match out {
        Some(out) if !lots.is_empty() => out.blocking_send(lots).map_err(|_| {
            // Whoever takes the lots has an error of its own to tell, or nobody is left to be told.
            Refusal::new(Code::Unavailable, "the recipients could not be stored")
        }),
        // A dry run drops them here.
        _ => Ok(()),
    }
}

fn too_many(error: &super::lots::TooManyLots) -> Refusal {
    Refusal::new(Code::BodyTooLarge, error.to_string())
}

/// A recipient that is not JSON: says where in the document.
fn broken(error: &serde_json::Error, at: Position, index: u32) -> Refusal {
    let lines_in = u32::try_from(error.line().saturating_sub(1)).unwrap_or(u32::MAX);
    let line = at.line.saturating_add(lines_in);
    malformed(
        &format!("/recipients/{index}"),
        Position { line, ..at },
        &reason(error),
    )
}

/// The refusal of a document that is not JSON.
pub(crate) fn malformed(path: &str, at: Position, reason: &str) -> Refusal {
    let detail = format!("line {}, byte {}: {reason}", at.line, at.offset);
    let mut mistake = crate::admin::problem::mistake(path, Code::MalformedBody, detail.clone());
    mistake.line = Some(u64::from(at.line));
    Refusal(service::http::Problem::new(Code::MalformedBody, detail).with(mistake))
}

/// The text of an error without its place, which is that in a piece of the document.
pub(crate) fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    text.get(..end).unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::lines::Lines;
    use crate::intake::spool::Spool;

    fn content() -> Content {
        let spec = serde_json::json!({
            "from": {"email": "news@brand.example", "name": null},
            "reply_to": null, "subject": "Hello", "html": null, "text": "{{ v }}", "headers": {},
            "vars": {}, "tracking": content::TrackingSpec::default(), "list_unsubscribe": true,
            "feedback_id": null, "attachments": [], "raw": null, "report": null,
        });
        let spec = serde_json::from_value(spec).expect("a content");
        Content::compile(&spec).expect("a good one")
    }

    /// Written plainly or not, recipients are judged alike, and who is rejected may come again.
    #[test]
    fn a_look_and_a_reading_judge_alike() {
        let lines = [
            r#"{"email":"A@x.example","vars":{"w":1}}"#,
            r#"{"email":"a@x.example","vars":{"v":1}}"#,
            r#"{"email":"A@X.example","vars":{"v":2}}"#,
            r#"{"email":"b@x.example","vars":{"v":"\u0041"}}"#,
            r#"{"email":"b@x.example","vars":{"v":"B"}}"#,
            r#"{"email":"c@x.example","vars":{"v":"\ud800"}}"#,
            r#"{"email":"c@x.example","vars":{"v":null},"metadata":{"a":1}}"#,
            r#"{"email":"no"}"#,
            r#"{"email":"d@x.example"}"#,
            r#"{"email":"d@x.example","vars":{"v":1e3}}"#,
        ];
        let dir = tempfile::tempdir().expect("a directory");
        let (mut spool, mut split) = (Spool::new(dir.path()), Lines::without_head());
        let body = lines.join("\n");
        split.push(body.as_bytes(), &mut spool).expect("short");
        split.finish(&mut spool);
        let (contents, (out, mut groups)) = ([content()], mpsc::channel(1));
        let sorted = Judge::new(&contents, "default", 1, false)
            .sort(&mut spool.read().expect("rewound"), Some(&out))
            .expect("no mistake");
        let rejected: Vec<_> = sorted
            .rejected
            .iter()
            .map(|of| (of.index, of.code))
            .collect();
        assert_eq!(
            rejected,
            [
                (0, RejectionCode::MissingVariable),
                (2, RejectionCode::Duplicate),
                (4, RejectionCode::Duplicate),
                (5, RejectionCode::InvalidVars),
                (7, RejectionCode::InvalidAddress),
                (8, RejectionCode::MissingVariable),
            ]
        );
        let lots = groups.try_recv().expect("a group");
        let accepted: Vec<u32> = lots
            .iter()
            .flat_map(|lot| lot.rows.iter().map(|row| row.index))
            .collect();
        assert_eq!(accepted, [1, 3, 6, 9]);
    }
}
