//! The source against a service that says what the real one would.

use crate::service::Service;
use anyhow::Result;
use loadtest::batch::Shape;
use loadtest::source::{self, Args};
use std::net::SocketAddr;
use std::time::Duration;
use tempfile::TempDir;

fn args(address: SocketAddr, dir: &TempDir) -> Result<Args> {
    let key_file = dir.path().join("api-key");
    std::fs::write(&key_file, "k-1\n")?;
    Ok(Args {
        url: format!("http://{address}"),
        key_file,
        shape: Shape {
            recipients: 2_500,
            domains: 10,
            in_a_row: 1,
            below: "example".to_owned(),
            beside: 0,
            vars: 5,
            links: 10,
            size: 10 * 1024,
            from: "news@brand.example".to_owned(),
        },
        batch_size: Some(1_000),
        timeout: Duration::from_secs(120),
    })
}

#[tokio::test]
async fn a_source_submits_everybody_once_and_waits_for_the_end() -> Result<()> {
    let (address, service, _running) = Service::default().start().await?;
    let dir = tempfile::tempdir()?;
    let mut out = Vec::new();
    let report = source::run(&args(address, &dir)?, &mut out).await?;
    assert_eq!(report.batches, ["0", "1", "2"]);
    assert_eq!((report.accepted, report.counters.delivered), (2_500, 2_500));
    let text = String::from_utf8(out)?;
    assert!(
        text.contains("accepted 2,500 in ") && text.contains("delivered 2,500 in "),
        "{text}"
    );
    let batches = service.batches.lock().expect("not poisoned");
    let mut emails = std::collections::HashSet::new();
    for batch in batches.iter() {
        for recipient in batch["recipients"].as_array().expect("recipients") {
            assert!(emails.insert(recipient["email"].as_str().expect("an address").to_owned()));
        }
    }
    assert_eq!(emails.len(), 2_500);
    Ok(())
}

#[tokio::test]
async fn a_measurement_of_something_else_is_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (service, expected) in [
        (
            Service {
                refusal: Some((422, "no key for \u{1b}[2Jbrand.example")),
                ..Service::default()
            },
            "refused: HTTP 422 Unprocessable Entity",
        ),
        (
            Service {
                bounces: 3,
                ..Service::default()
            },
            "not everything was delivered",
        ),
    ] {
        let (address, _service, _running) = service.start().await?;
        let error = source::run(&args(address, &dir)?, &mut Vec::new()).await;
        let error = format!("{:#}", error.expect_err("no result"));
        assert!(error.contains(expected), "{error}");
        assert!(
            !error.contains('\u{1b}'),
            "what a service says is escaped: {error:?}"
        );
    }
    Ok(())
}
