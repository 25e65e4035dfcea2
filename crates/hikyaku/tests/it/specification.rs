//! The API does what its specification says, and nothing else: Schemathesis makes calls of it, good
//! and bad ones, against the running service.
//!
//! `test.sh` unpacks it into `target/schemathesis`. `HIKYAKU_TEST_FULL=1` makes many more calls.

use crate::chaos::full;
use crate::harness::{FROM_DOMAIN, Service, Site};
use crate::sink::Sink;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// What every answer must be: no 5xx, a status, a type and a shape that the specification has.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";

/// What calls may name, so that they reach more than a 404.
async fn furnish(service: &Service) -> Result<Vec<(&'static str, &'static str, String)>> {
    let batch = json!({
        "from": {"email": format!("news@{FROM_DOMAIN}")}, "subject": "Hello {{ name }}", "text": "t",
        "send_at": "2099-01-01T00:00:00Z", "window": {"from": "09:00", "to": "21:00"},
        "recipients": [{"email": "a@x.example", "name": "A", "prospect_id": "p-1", "time_zone": "Asia/Tokyo"}],
    });
    let batch = service.submit(&batch).await?;
    let hook = json!({"url": "http://hooks.example/x", "types": ["batch.completed"]});
    let hook: Value = service
        .client
        .post("/v1/webhooks", &hook)
        .await?
        .ok()?
        .json()?;
    let hook = hook["id"].as_str().context("an id")?.to_owned();
    let account = json!({"id": "shop", "from_domains": ["shop.example"]});
    service.client.post("/v1/accounts", &account).await?.ok()?;
    Ok(vec![
        ("^/v1/batches/[{]id[}]", "path.id", batch.clone()),
        ("^/v1/messages/", "path.message_id", format!("{batch}.0")),
        (
            "^/v1/(recipients|suppressions)/",
            "path.email",
            "a@x.example".to_owned(),
        ),
        ("^/v1/destinations/", "path.domain", "x.example".to_owned()),
        ("^/v1/webhooks/", "path.id", hook),
        ("^/v1/accounts/", "path.id", "shop".to_owned()),
        ("^/v1/prospects/", "path.prospect_id", "p-1".to_owned()),
        // A long poll would only be waited for.
        ("^/v1/events$", "query.wait", "0s".to_owned()),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn schemathesis_finds_no_answer_that_is_not_specified() -> Result<()> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/schemathesis");
    ensure!(
        tool.join("schemathesis").is_dir(),
        "test.sh installs it into {}",
        tool.display()
    );
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    // Whatever host a call names, nobody outside is looked up or spoken to.
    site.edit(|config| format!("{config}[dns]\nnameservers = [\"127.0.0.1:9\"]\n"))?;
    let service = site.up().await?;
    let mut config = String::new();
    for (paths, parameter, value) in furnish(&service).await? {
        writeln!(
            config,
            "[[operations]]\ninclude-path-regex = {paths:?}\nparameters = {{ {parameter:?} = {value:?} }}"
        )?;
    }
    let file = site.dir.path().join("schemathesis.toml");
    std::fs::write(&file, config)?;
    let (phases, examples, seconds) = if full() {
        ("examples,coverage,fuzzing", "50", "600")
    } else {
        ("examples,coverage", "3", "120")
    };
    let mut command = Command::new("python3");
    command
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(&file)
        .arg("run")
        .arg(format!("{}/openapi.json", site.api()))
        .args(["--header", &format!("Authorization: Bearer {}", service.key)])
        .args(["--checks", CHECKS, "--phases", phases, "--max-examples", examples])
        .args(["--seed", "1", "--max-time", seconds, "--request-timeout", "60"])
        .args(["--workers", "2", "--warnings", "off", "--continue-on-failure", "--no-color"])
        // A webhook is pushed to wherever it says, an address of the world, too.
        .args(["--exclude-operation-id", "addWebhook", "--exclude-operation-id", "changeWebhook"])
        .env("PYTHONPATH", &tool)
        .current_dir(site.dir.path());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{printed}");
    ensure!(
        output.status.success(),
        "{printed}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
