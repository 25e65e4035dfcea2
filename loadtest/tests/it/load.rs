//! What a load of requests counts, against the bare server.

use anyhow::Result;
use bytes::Bytes;
use loadtest::counterpart::Counterpart;
use loadtest::load::{self, Plan};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[tokio::test]
async fn a_load_is_bounded_in_number_and_every_answer_is_looked_at() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_loadtest"));
    let bare = Counterpart::start_of(program, "bare", &[]).await?;
    let request = Bytes::from_static(b"GET /c/x HTTP/1.1\r\nHost: t.example\r\n\r\n");
    let plan = Plan {
        address: bare.address(),
        requests: vec![request.clone(), request].into(),
        connections: 4,
        time: Duration::from_secs(120),
        most: 100,
        status: 302,
        pace: None,
        enough: Arc::default(),
        jar: None,
    };
    let answered = load::run(&plan).await?;
    assert_eq!(answered.latency.count(), 100);
    let other = Plan {
        status: 200,
        ..plan.clone()
    };
    let error = load::run(&other).await.expect_err("302 is not 200");
    assert!(error.to_string().contains("answered 302"), "{error}");
    // Half a second for 100 at 200 a second, less the pause after the last.
    let paced = Plan {
        pace: Some(200.0),
        ..plan.clone()
    };
    let answered = load::run(&paced).await?;
    assert_eq!(answered.latency.count(), 100);
    assert!(
        answered.took >= Duration::from_millis(480),
        "{:?}",
        answered.took
    );
    plan.enough.store(true, Ordering::Relaxed);
    assert_eq!(load::run(&plan).await?.latency.count(), 0);
    bare.stop().await?;
    Ok(())
}
