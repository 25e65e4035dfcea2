//! What a recipient costs the embedded store on disk: queued, delivered, per event.
//!
//! `cargo run -p store --example sizes -- [RECIPIENTS]` prints a table; the figures do not depend on
//! the profile. Five variables each, a thousand domains of which ten have half of the people.
#![allow(
    clippy::print_stdout,
    reason = "a command that prints what it measured"
)]

use anyhow::{Context as _, Result};
use model::{
    Attempt, AttemptDetail, AttemptResult, BatchId, Fact, JournalId, LotNumber, MessageId,
    Partition, Priority, Row, Timestamp, TrackingMode,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use store::sqlite::{Role, SqliteOptions, SqliteStore};
use store::{
    BatchHead, LOT_ROWS, LeaseRequest, LeasedRecipient, MIXED, NewBatch, NewLot, Retire, Shipment,
    Store as _, Want,
};

const T0: Timestamp = Timestamp::from_millis(1_800_000_000_000);
const DAY: Duration = Duration::from_secs(86_400);

fn word(rng: &mut fastrand::Rng) -> String {
    let length = rng.usize(4..10);
    (0..length).map(|_| rng.lowercase()).collect()
}

fn row(index: u32, domain: &str, rng: &mut fastrand::Rng) -> Result<Row> {
    let (first, last, town) = (word(rng), word(rng), word(rng));
    let tier = *rng.choice(&["gold", "silver", "none"]).context("tiers")?;
    let vars = serde_json::json!({
        "points": rng.u32(0..100_000), "tier": tier, "town": town,
        "since": format!("20{}-{:02}-{:02}", rng.u8(10..26), rng.u8(1..13), rng.u8(1..29)),
        "code": format!("{:08x}", rng.u32(..)),
    });
    Ok(Row {
        name: Some(format!("{first} {last}").into()),
        prospect_id: Some(format!("c-{}", 10_000_000 + index).into()),
        vars: Some(vars.to_string().into()),
        ..Row::new(
            index,
            format!("{first}.{last}{}@{domain}", rng.u16(0..1000)).parse()?,
        )
    })
}

/// Lots as intake makes them: of a domain that fills them, and mixed ones.
fn lots(recipients: u32) -> Result<Vec<NewLot>> {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut open: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    let mut full = Vec::new();
    for index in 0..recipients {
        let large = rng.bool();
        let domain = rng.u32(if large { 0..10 } else { 10..1_000 });
        let domain = format!("d{domain}.example");
        let queue = if large {
            domain.clone()
        } else {
            MIXED.to_owned()
        };
        let rows = open.entry(queue.clone()).or_default();
        rows.push(row(index, &domain, &mut rng)?);
        if rows.len() == LOT_ROWS {
            full.push((queue, std::mem::take(rows)));
        }
    }
    full.extend(open.into_iter().filter(|(_, rows)| !rows.is_empty()));
    (0..)
        .zip(full)
        .map(|(number, (queue, rows))| {
            let number = LotNumber::new(Partition(0), number).context("too many lots")?;
            let queue = queue.into();
            Ok(NewLot {
                number,
                queue,
                rows,
                variants: Vec::new(),
            })
        })
        .collect()
}

async fn open(path: &Path) -> Result<SqliteStore> {
    let options = SqliteOptions {
        path: path.to_owned(),
        partitions: 1,
        role: Role::Mta,
    };
    Ok(SqliteStore::open(options).await?)
}

/// Bytes of the file that something is in.
fn used(path: &Path) -> Result<i64> {
    let connection = rusqlite::Connection::open(path)?;
    let ask = |name: &str| -> rusqlite::Result<i64> {
        connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))
    };
    Ok((ask("page_count")? - ask("freelist_count")?) * ask("page_size")?)
}

async fn submit(store: &SqliteStore, recipients: u32) -> Result<()> {
    let id = BatchId::new(T0, 1);
    for some in lots(recipients)?.chunks(16) {
        store.stage_lots(id, some.to_vec()).await?;
    }
    let head = BatchHead {
        id,
        account: "default".into(),
        campaign: Some("sizes".into()),
        list: "default".into(),
        priority: Priority::Bulk,
        pool: None,
        rate: model::units::Rate::Unlimited,
        created_at: T0,
        release_at: T0,
        expires_at: None,
        tracking: TrackingMode::Individual,
        metadata: serde_json::json!({}),
        held: false,
        window: None,
        guardrails: None,
        variants: None,
    };
    let batch = NewBatch {
        head,
        content: vec![b'x'; 30_000].into(),
        accepted: u64::from(recipients),
        rejected: 0,
        call: None,
    };
    Ok(store.commit_batch(batch, T0).await?)
}

fn delivered(batch: BatchId, item: &LeasedRecipient, at: Timestamp) -> Fact {
    let (index, domain) = (item.row.index, item.row.email.domain());
    let id = index.wrapping_mul(2_654_435_761);
    let detail = AttemptDetail {
        smtp_code: Some(250),
        reply: format!("2.0.0 Ok: queued as {id:08X}").into(),
        host: format!("mx{}.{domain} (192.0.2.{})", index % 4, index % 250).into(),
        destination: domain.into(),
        source: "default".into(),
        transaction_ms: 40 + index % 400,
        ..AttemptDetail::default()
    };
    Fact::Attempt(Box::new(Attempt {
        message: MessageId { batch, index },
        place: item.place,
        number: 1,
        at,
        dot_at: Some(at),
        result: AttemptResult::Delivered,
        detail,
        suppress: None,
    }))
}

/// Delivers everything, in shipments as a node makes them.
async fn deliver(store: &SqliteStore) -> Result<()> {
    let node = JournalId::new(T0, 1);
    let (mut seq, mut at) = (0, T0);
    let queues = (0..10).map(|n| format!("d{n}.example"));
    let queues = queues.chain([MIXED.to_owned()]);
    let wants: Vec<Want> = queues.map(|queue| Want::of(&queue, 100)).collect();
    loop {
        let request = LeaseRequest {
            node,
            now: at,
            ttl: Duration::from_secs(45),
            wants: wants.clone(),
        };
        let leased = store.lease(request).await?;
        if leased.is_empty() {
            return Ok(());
        }
        let mut facts = Vec::new();
        for range in &leased {
            for item in &range.items {
                seq += 1;
                at = at + Duration::from_millis(1);
                facts.push((seq, delivered(range.batch.id, item, at)));
            }
        }
        let shipment = Shipment {
            journal: node,
            facts,
            through: seq,
            windows: Vec::new(),
            finished: leased.iter().map(|range| range.range).collect(),
            now: at,
        };
        store.ship(shipment).await?;
    }
}

/// Lets the events go.
async fn retire(store: &SqliteStore, now: Timestamp) -> Result<()> {
    let mut of = Retire {
        events_before: now,
        batches_before: T0,
        after: None,
    };
    loop {
        of.after = store.retire(of.clone(), now).await?.next;
        if of.after.is_none() {
            return Ok(());
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let asked = std::env::args().nth(1);
    let recipients: u32 = asked.map_or(Ok(100_000), |text| text.parse())?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("store.db");
    // Closing carries the log over into the file.
    drop(open(&path).await?);
    let empty = used(&path)?;
    let tell = |what: &str, bytes: i64| {
        let each = bytes / i64::from(recipients);
        println!("| {what} | {each} |");
    };
    println!("| {recipients} recipients | bytes each |\n|---|---|");
    let store = open(&path).await?;
    submit(&store, recipients).await?;
    drop(store);
    tell("queued", used(&path)? - empty);
    let store = open(&path).await?;
    deliver(&store).await?;
    drop(store);
    let done = used(&path)?;
    tell("delivered, with its event", done - empty);
    let later = T0 + 40 * DAY;
    let store = open(&path).await?;
    retire(&store, later).await?;
    drop(store);
    let kept = used(&path)?;
    tell("of that, the event", done - kept);
    Ok(())
}
