//! Deferred mail is made due by an operator's hand, in short steps.
//!
//! Must not touch what a node holds, nor a recipient: only the time of a range changes.

use super::books::Books;
use super::ids::BatchNo;
use super::range::{Range, ranges};
use super::record::{BatchRecord, By, record};
use super::writer::{Step, Writer};
use crate::{Control, DueScope, Result, StoreError};
use model::{BatchState, Timestamp};
use rusqlite::params;

/// Ranges of one step.
const RANGES: i64 = 64;

/// Which ranges.
#[derive(Clone)]
enum Among {
    Batch(BatchNo),
    Queue(Box<str>),
}

/// Makes deferred recipients due; how many.
pub(super) async fn make_due(
    writer: &Writer,
    scope: DueScope,
    now: Timestamp,
    dry_run: bool,
) -> Result<u64> {
    let among = match scope {
        DueScope::Domains(queues) => queues.into_iter().map(Among::Queue).collect(),
        DueScope::Batch(id) => {
            let find = move |step: &mut Step<'_>| record(step.connection, By::Id(id.to_bytes()));
            let found = writer.write(find).await?;
            found
                .map(|batch| Among::Batch(batch.no))
                .into_iter()
                .collect::<Vec<_>>()
        }
    };
    let mut count = 0;
    for of in among {
        let mut after = Some(0);
        while let Some(from) = after {
            let of = of.clone();
            let (some, next) = writer
                .write(move |step| some_due(step, &of, from, now, dry_run))
                .await?;
            count += some;
            after = next;
        }
    }
    Ok(count)
}

/// One step: some ranges after `after`; how many recipients, and where to go on.
fn some_due(
    step: &mut Step<'_>,
    among: &Among,
    after: i64,
    now: Timestamp,
    dry_run: bool,
) -> Result<(u64, Option<i64>)> {
    let waiting = format!(
        "due_at>?2 AND due_at<{} AND expires<=?2 AND id>?3 ORDER BY id LIMIT ?4",
        crate::HELD_BACK
    );
    let now_at = now.millis();
    let some = match among {
        Among::Batch(no) => ranges(
            step,
            &format!("batch=?1 AND {waiting}"),
            params![no, now_at, after, RANGES],
        ),
        Among::Queue(queue) => ranges(
            step,
            &format!("queue=?1 AND {waiting}"),
            params![queue, now_at, after, RANGES],
        ),
    }?;
    let next = some.last().map(|range| range.id);
    let mut books = Books::open(step, now);
    let mut count = 0;
    for range in &some {
        let open = open_in(&mut books, range)?;
        count += open;
        if open > 0 && !dry_run {
            books
                .step
                .connection
                .prepare_cached("UPDATE work SET due_at=?2 WHERE id=?1")?
                .execute([range.id, now_at])?;
        }
    }
    if count > 0 && !dry_run {
        books.tell(&Control::Work)?;
    }
    books.close(None)?;
    Ok((count, next))
}

/// How many of a range wait in a batch whose mail has begun to leave. What cannot be read waits on.
fn open_in(books: &mut Books<'_, '_>, range: &Range) -> Result<u64> {
    let batch = books.batch(range.batch)?;
    let goes_on = |batch: &BatchRecord| {
        batch.released && matches!(batch.state, BatchState::InProgress | BatchState::Paused)
    };
    if !batch.as_ref().is_some_and(goes_on) {
        return Ok(0);
    }
    match range.unreported(books) {
        Ok(open) => Ok(u64::try_from(open.len()).unwrap_or(u64::MAX)),
        Err(StoreError::Damaged(_)) => Ok(0),
        Err(error) => Err(error),
    }
}
