//! The control feed, and what changes a whole batch: pause, resume, cancel, archive, release.
//!
//! Must not change a recipient but through the books.

use super::books::Books;
use super::feeds::{self, Feed};
use super::ids::{self, BatchNo};
use super::lease;
use super::parts;
use super::range::{cancel_range, ranges};
use super::record::{BatchRecord, By, read_counters, record};
use super::writer::{Step, Writer};
use crate::{
    Batch, BatchChange, ChangeOutcome, Control, ControlCursor, ControlPage, Result, StoreError,
};
use model::{BatchId, BatchState, EventKind, Timestamp};
use rusqlite::{Connection, params};
use serde_json::json;

/// How long the feed is kept, in milliseconds: a node that was away longer starts anew.
pub(super) const KEPT: i64 = 24 * 60 * 60 * 1000;
/// Items between two trimmings.
const TRIM: i64 = 256;
/// Items of one page.
const PAGE: i64 = 1_000;
/// Ranges cancelled in one step.
const RANGES: i64 = 64;

/// Appends to the feed.
pub(super) fn append(connection: &Connection, item: &Control, now: Timestamp) -> Result<()> {
    let text = serde_json::to_string(item)
        .map_err(|error| StoreError::Damaged(format!("a control item: {error}")))?;
    connection
        .prepare_cached("INSERT INTO control (at, item) VALUES (?1, ?2)")?
        .execute(params![now.millis(), text])?;
    if connection.last_insert_rowid() % TRIM == 0 {
        trim(connection, now.millis() - KEPT)?;
    }
    Ok(())
}

/// Forgets the items before the first that is not older than `oldest`: clocks of nodes differ, and
/// a feed with a hole would not show that something is missing.
pub(super) fn trim(connection: &Connection, oldest: i64) -> Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM control WHERE id < (SELECT COALESCE(MIN(id), 0) FROM control WHERE at>=?1)",
        )?
        .execute([oldest])?;
    Ok(())
}

/// Reads the feed after a cursor.
pub(super) fn page(connection: &Connection, after: Option<ControlCursor>) -> Result<ControlPage> {
    let last = feeds::last(connection, Feed::Control)?;
    let of_now = |reset| ControlPage {
        reset,
        items: Vec::new(),
        next: ControlCursor(vec![ids::nat(last)]),
    };
    let Some(cursor) = after else {
        return Ok(of_now(false));
    };
    let after = match cursor.0.as_slice() {
        [after] if *after <= ids::nat(last) => *after,
        _ => return Ok(of_now(true)),
    };
    let mut sql = connection
        .prepare_cached("SELECT id, item FROM control WHERE id>?1 ORDER BY id LIMIT ?2")?;
    let mut rows = sql.query([ids::int(after), PAGE])?;
    let (mut items, mut next) = (Vec::new(), after);
    while let Some(row) = rows.next()? {
        let id = ids::nat(row.get(0)?);
        if id != next + 1 {
            // Numbers have no gaps: what stood here was trimmed.
            return Ok(of_now(true));
        }
        next = id;
        let text: String = row.get(1)?;
        let item = serde_json::from_str(&text)
            .map_err(|error| StoreError::Damaged(format!("control item {next}: {error}")))?;
        items.push(item);
    }
    if items.is_empty() && after < ids::nat(last) {
        return Ok(of_now(true));
    }
    Ok(ControlPage {
        reset: false,
        items,
        next: ControlCursor(vec![next]),
    })
}

/// Lets the mail of batches leave whose time has come.
pub(super) fn release_due(step: &mut Step<'_>, now: Timestamp) -> Result<()> {
    let due: Vec<BatchNo> = {
        let mut sql = step
            .connection
            .prepare_cached("SELECT no FROM batch WHERE state=?1 AND release_at<=?2")?;
        let found = sql.query_map(params![BatchState::Scheduled.code(), now.millis()], |row| {
            row.get(0)
        })?;
        found.collect::<rusqlite::Result<_>>()?
    };
    if due.is_empty() {
        return Ok(());
    }
    let mut books = Books::open(step, now);
    for no in due {
        if let Some(batch) = books.batch(no)? {
            start(&mut books, batch)?;
        }
    }
    books.close(None)?;
    Ok(())
}

/// Its mail begins to leave.
pub(super) fn start(books: &mut Books<'_, '_>, mut batch: BatchRecord) -> Result<()> {
    let no = batch.no;
    batch.state = BatchState::InProgress;
    batch.started_at = Some(books.now);
    books.release_batch(batch)?;
    books.batch_event(EventKind::BatchStarted, no, &json!({}));
    books.tell(&Control::Work)
}

/// What the first step of a change came to.
enum Begun {
    Answer(Box<ChangeOutcome>),
    /// Which batch, and how many of it were cancelled before.
    Cancelling(BatchNo, u64),
}

/// Changes a batch; a cancel goes on in short steps after the one that makes it hold.
pub(super) async fn change(
    writer: &Writer,
    id: BatchId,
    change: BatchChange,
    now: Timestamp,
) -> Result<ChangeOutcome> {
    let begun = writer
        .write(move |step| begin(step, id, change, now))
        .await?;
    let (no, before) = match begun {
        Begun::Answer(outcome) => return Ok(*outcome),
        Begun::Cancelling(no, before) => (no, before),
    };
    cancel_all(writer, no, now).await?;
    writer
        .write(move |step| {
            let batch = Box::new(read(step, no)?);
            // Counted by what became of the recipients, not by who ended them: a holder hears of
            // the cancel too, and may be faster.
            Ok(ChangeOutcome::Done {
                cancelled: batch.counters.cancelled.saturating_sub(before),
                in_flight: batch.counters.open(),
                batch,
            })
        })
        .await
}

/// Ends what was not started of a cancelled batch, in short steps.
async fn cancel_all(writer: &Writer, no: BatchNo, now: Timestamp) -> Result<()> {
    let mut after = Some(0);
    while let Some(from) = after {
        after = writer
            .write(move |step| cancel_some(step, no, from, now))
            .await?;
    }
    Ok(())
}

/// One step of a cancel: some ranges after `after`, and where to go on.
fn cancel_some(
    step: &mut Step<'_>,
    no: BatchNo,
    after: i64,
    now: Timestamp,
) -> Result<Option<i64>> {
    let some = ranges(
        step,
        "batch=?1 AND id>?2 ORDER BY id LIMIT ?3",
        [no, after, RANGES],
    )?;
    let next = some.last().map(|range| range.id);
    let mut books = Books::open(step, now);
    for mut range in some {
        let held = range.held && range.expires > now.millis();
        if !held {
            range.settle_lost(&mut books)?;
        }
        match cancel_range(&mut books, &range, range.doubtful()) {
            Err(StoreError::Damaged(what)) if !held => {
                lease::put_off(books.step, range.id, now, &what)?;
            }
            // Its holder is asked first; what is left is swept later.
            Err(StoreError::Damaged(_)) => {}
            ended => drop(ended?),
        }
    }
    books.close(None)?;
    Ok(next)
}

/// Ends what a holder that is gone left of a cancelled batch; also what a crash left of a cancel.
pub(super) async fn sweep(writer: &Writer, batches: Vec<BatchNo>, now: Timestamp) -> Result<()> {
    for no in batches {
        cancel_all(writer, no, now).await?;
    }
    Ok(())
}

fn read(step: &Step<'_>, no: BatchNo) -> Result<Batch> {
    let found = record(step.connection, By::No(no))?
        .ok_or_else(|| StoreError::Damaged(format!("batch {no} is gone")))?;
    describe(
        step.connection,
        &found,
        step.cache.head(step.connection, no)?.as_ref().clone(),
    )
}

/// A batch as it is read.
pub(super) fn describe(
    connection: &Connection,
    record: &BatchRecord,
    head: crate::BatchHead,
) -> Result<Batch> {
    Ok(Batch {
        head,
        state: record.state,
        archived: record.archived,
        started_at: record.started_at,
        completed_at: record.completed_at,
        paused_at: record.paused_at,
        paused_for: std::time::Duration::from_millis(record.paused_ms),
        counters: read_counters(connection, record.no)?,
    })
}

fn begin(step: &mut Step<'_>, id: BatchId, change: BatchChange, now: Timestamp) -> Result<Begun> {
    let answer = |outcome| Ok(Begun::Answer(Box::new(outcome)));
    let Some(batch) = record(step.connection, By::Id(id.to_bytes()))? else {
        return answer(ChangeOutcome::Unknown);
    };
    let no = batch.no;
    let ended = matches!(batch.state, BatchState::Completed | BatchState::Cancelled);
    match change {
        BatchChange::Cancel if batch.state != BatchState::Completed => {
            let before = read(step, no)?.counters.cancelled;
            if !ended {
                cancel(step, batch, now)?;
            }
            return Ok(Begun::Cancelling(no, before));
        }
        BatchChange::Pause
        | BatchChange::PauseFor(_)
        | BatchChange::Resume
        | BatchChange::Cancel
            if ended =>
        {
            return answer(ChangeOutcome::Impossible(batch.state));
        }
        BatchChange::Cancel => {}
        BatchChange::Start if ended => return answer(ChangeOutcome::Impossible(batch.state)),
        BatchChange::Start if batch.state == BatchState::Open => parts::start(step, batch, now)?,
        BatchChange::Start => {}
        BatchChange::Pause | BatchChange::PauseFor(_) | BatchChange::Resume
            if batch.state == BatchState::Open =>
        {
            return answer(ChangeOutcome::Impossible(batch.state));
        }
        BatchChange::Pause => pause(step, batch, &json!({}), now)?,
        BatchChange::PauseFor(reason) => {
            pause(step, batch, &json!({ "reason": reason.as_str() }), now)?;
        }
        BatchChange::Resume => resume(step, batch, now)?,
        BatchChange::Archive => archive(step, batch, true, now)?,
        BatchChange::Unarchive => archive(step, batch, false, now)?,
    }
    answer(ChangeOutcome::Done {
        batch: Box::new(read(step, no)?),
        cancelled: 0,
        in_flight: 0,
    })
}

/// Takes hold with this step: from now on nothing of the batch is leased.
fn cancel(step: &mut Step<'_>, mut batch: BatchRecord, now: Timestamp) -> Result<()> {
    let (no, id) = (batch.no, batch.id);
    let mut books = Books::open(step, now);
    batch.state = BatchState::Cancelled;
    if batch.released {
        books.set_batch(batch)?;
    } else {
        books.release_batch(batch)?;
    }
    books.batch_event(EventKind::BatchCancelled, no, &json!({}));
    books.tell(&Control::Cancelled(id))?;
    books.close(None)?;
    Ok(())
}

fn pause(
    step: &mut Step<'_>,
    mut batch: BatchRecord,
    data: &serde_json::Value,
    now: Timestamp,
) -> Result<()> {
    if batch.state == BatchState::Paused {
        return Ok(());
    }
    let (no, id) = (batch.no, batch.id);
    let mut books = Books::open(step, now);
    batch.state = BatchState::Paused;
    batch.paused_at = batch.released.then_some(now);
    books.set_batch(batch)?;
    books.batch_event(EventKind::BatchPaused, no, data);
    books.tell(&Control::Paused(id))?;
    books.close(None)?;
    Ok(())
}

fn resume(step: &mut Step<'_>, mut batch: BatchRecord, now: Timestamp) -> Result<()> {
    if batch.state != BatchState::Paused {
        return Ok(());
    }
    let (no, id, released) = (batch.no, batch.id, batch.released);
    let mut books = Books::open(step, now);
    let due = batch.release_at <= now;
    if let Some(at) = batch.paused_at.take() {
        let paused = u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX);
        batch.paused_ms = batch.paused_ms.saturating_add(paused);
    }
    batch.state = if released || due {
        BatchState::InProgress
    } else {
        BatchState::Scheduled
    };
    books.batch_event(EventKind::BatchResumed, no, &json!({}));
    books.tell(&Control::Resumed(id))?;
    if due && !released {
        start(&mut books, batch)?;
    } else {
        books.set_batch(batch)?;
    }
    books.close(None)?;
    Ok(())
}

fn archive(
    step: &mut Step<'_>,
    mut batch: BatchRecord,
    archived: bool,
    now: Timestamp,
) -> Result<()> {
    if batch.archived == archived {
        return Ok(());
    }
    let id = batch.id;
    let mut books = Books::open(step, now);
    batch.archived = archived;
    books.set_batch(batch)?;
    books.tell(&if archived {
        Control::Archived(id)
    } else {
        Control::Unarchived(id)
    })?;
    books.close(None)?;
    Ok(())
}
