//! Writes a small store in the form of this program: the data that later programs must still open.
//!
//! `cargo run -p store --example kept -- DIR` writes `DIR/schema-N.db.zst`. Run before a change of
//! the schema; `tests/it/kept.rs` opens all of them. What is in it must stay the same.

use anyhow::{Context as _, Result};
use model::{
    Actor, Attempt, AttemptDetail, AttemptResult, BatchId, Fact, Hit, HitKind, JournalId,
    LotNumber, MessageId, Partition, Priority, Row, SuppressionReason, Timestamp, TrackingMode,
    Verdict,
};
use std::path::PathBuf;
use std::time::Duration;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchHead, LeaseRequest, LeasedRange, NewBatch, NewLot, Note, Shipment, Store as _,
    Suppression, Want,
};

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);

fn head(number: u128, release_at: Timestamp) -> Result<BatchHead> {
    // Fields that came later have defaults: an older program runs this as it is.
    let head = serde_json::json!({
        "id": BatchId::new(T0, number), "account": "acme", "campaign": "kept", "list": "news",
        "priority": Priority::Bulk, "pool": null, "rate": "unlimited", "created_at": T0,
        "release_at": release_at, "expires_at": null, "tracking": TrackingMode::Individual,
        "metadata": { "kept": number.to_string() },
    });
    Ok(serde_json::from_value(head)?)
}

async fn submit(store: &SqliteStore, head: BatchHead, count: u32) -> Result<()> {
    let row = |index: u32| -> Result<Row> {
        // What came later is none.
        let row = serde_json::json!({
            "index": index, "email": format!("n{index}@x.example"), "name": format!("Person {index}"),
            "prospect_id": format!("p-{index}"), "vars": "{\"points\":3}",
        });
        Ok(serde_json::from_value(row)?)
    };
    let lot = NewLot {
        number: LotNumber::new(Partition(0), 0).context("a number")?,
        queue: "x.example".into(),
        rows: (0..count).map(row).collect::<Result<_>>()?,
        variants: Vec::new(),
    };
    store.stage_lots(head.id, vec![lot]).await?;
    let batch = NewBatch {
        head,
        content: b"the content".as_slice().into(),
        accepted: u64::from(count),
        rejected: 0,
        call: None,
    };
    Ok(store.commit_batch(batch, T0).await?)
}

fn attempt(range: &LeasedRange, at: usize, result: AttemptResult) -> Result<Fact> {
    let item = range.items.get(at).context("an item")?;
    let index = item.row.index;
    let detail = AttemptDetail {
        smtp_code: Some(250),
        reply: "2.0.0 Ok: queued".into(),
        host: "mx.x.example (192.0.2.1)".into(),
        destination: "x.example".into(),
        source: "default".into(),
        ..AttemptDetail::default()
    };
    Ok(Fact::Attempt(Box::new(Attempt {
        message: MessageId {
            batch: range.batch.id,
            index,
        },
        place: item.place,
        number: 1,
        at: T0,
        dot_at: Some(T0),
        result,
        detail,
        suppress: None,
    })))
}

fn click(batch: BatchId, index: u32) -> Fact {
    Fact::Hit(Box::new(Hit {
        kind: HitKind::Click,
        message: MessageId { batch, index },
        at: T0,
        link: Some(1),
        target: Some("https://x.example/".into()),
        user_agent: "agent".into(),
        network: "192.0.2.0/24".into(),
        visitor: None,
        method: None,
        verdict: Verdict {
            actor: Actor::Human,
            machine_reasons: Vec::new(),
            rules: 1,
        },
    }))
}

/// 60 recipients: 20 delivered, of whom one clicked; 10 deferred for ten minutes; 10 held by a node
/// that is gone; 20 untouched. And five whose time has not come, a suppression and a note.
async fn fill(store: &SqliteStore) -> Result<()> {
    let sent = head(1, T0)?;
    let id = sent.id;
    submit(store, sent, 60).await?;
    submit(store, head(2, T0 + Duration::from_secs(5_000))?, 5).await?;
    let node = JournalId::new(T0, 1);
    let lease = async |rows| {
        let request = LeaseRequest {
            node,
            now: T0,
            ttl: Duration::from_secs(45),
            wants: vec![Want::of("x.example", rows)],
        };
        let leased = store.lease(request).await?;
        leased.into_iter().next().context("a range")
    };
    let range = lease(30).await?;
    let mut facts = Vec::new();
    for at in 0..30 {
        let result = match at {
            0..20 => AttemptResult::Delivered,
            _ => AttemptResult::TemporaryError {
                retry_at: T0 + Duration::from_secs(600),
                ambiguous: false,
            },
        };
        facts.push(attempt(&range, at, result)?);
    }
    facts.push(click(id, 3));
    let facts: Vec<_> = (1..).zip(facts).collect();
    let shipment = Shipment {
        journal: node,
        through: 31,
        facts,
        windows: Vec::new(),
        finished: vec![range.range],
        now: T0,
    };
    store.ship(shipment).await?;
    lease(10).await?;
    let entry = Suppression {
        email: "gone@x.example".into(),
        account: "acme".into(),
        list: None,
        reason: SuppressionReason::Manual,
        source: "api".into(),
        created_at: T0,
    };
    store.suppress(vec![entry], T0).await?;
    let note = Note {
        kind: "kept".into(),
        key: "a".into(),
        value: [1, 2, 3].into(),
        expires_at: None,
    };
    store.put_notes(vec![note], T0).await?;
    store.setting("kept", "as it was").await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let to = std::env::args().nth(1).context("where to?")?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("store.db");
    let options = SqliteOptions {
        path: path.clone(),
        partitions: 1,
        role: Role::Mta,
    };
    let store = SqliteStore::open(options).await?;
    fill(&store).await?;
    // Closing carries the log over into the file.
    drop(store);
    let connection = rusqlite::Connection::open(&path)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    drop(connection);
    let file = PathBuf::from(to).join(format!("schema-{version}.db.zst"));
    std::fs::write(file, zstd::encode_all(std::fs::read(path)?.as_slice(), 19)?)?;
    Ok(())
}
