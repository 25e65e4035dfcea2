//! A real Prometheus scrapes the service and evaluates every expression of the dashboards.

use crate::harness::{Site, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use testkit::port::free_port;

struct Prometheus {
    child: Child,
    client: Client,
}

impl Prometheus {
    fn start(dir: &Path, target: &str) -> Result<Self> {
        let port = free_port()?;
        let config = dir.join("prometheus.yml");
        std::fs::write(
            &config,
            format!(
                "global:\n  scrape_interval: 1s\nscrape_configs:\n  - job_name: hikyaku\n    static_configs:\n      - targets: [\"{target}\"]\n"
            ),
        )?;
        let log = std::fs::File::create(dir.join("prometheus.log"))?;
        let child = Command::new("/usr/bin/prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Self {
            child,
            client: Client::new(format!("http://127.0.0.1:{port}"), None),
        })
    }

    /// The series that an expression gives now.
    async fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let query: String = expression
            .bytes()
            .map(|byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            })
            .collect();
        let answer: Value = self
            .client
            .get(&format!("/api/v1/query?query={query}"))
            .await?
            .json()?;
        ensure!(answer["status"] == "success", "{expression}: {answer}");
        answer["data"]["result"]
            .as_array()
            .cloned()
            .context("no result")
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Every expression of every panel, with Grafana's variables filled in.
fn expressions() -> Result<Vec<String>> {
    let path: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../grafana/dashboards/hikyaku.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let targets = panels
        .iter()
        .filter_map(|panel| panel["targets"].as_array())
        .flatten();
    Ok(targets
        .filter_map(|target| target["expr"].as_str())
        .map(|expr| expr.replace("$__rate_interval", "10s"))
        .collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_evaluates_every_panel() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::new(&sink.address())?;
    let service = site.up().await?;
    let prometheus = Prometheus::start(site.dir.path(), &format!("127.0.0.1:{}", site.api_port))?;
    until("the first scrape", async || {
        Ok((!prometheus.query("up == 1").await?.is_empty()).then_some(()))
    })
    .await?;
    let id = service.submit(&newsletter(300, 5)).await?;
    service.completed(&id).await?;
    let delivered = until("the delivered count", async || {
        let series = prometheus
            .query("sum(hikyaku_outcomes_total{outcome=\"delivered\"}) == 300")
            .await?;
        Ok((!series.is_empty()).then_some(series.len()))
    })
    .await?;
    assert_eq!(delivered, 1);
    let expressions = expressions()?;
    assert!(expressions.len() > 15, "{}", expressions.len());
    for expression in &expressions {
        prometheus.query(expression).await?;
    }
    let metrics = service.client.get("/metrics").await?.ok()?.text();
    check_with_promtool(&metrics)
}

/// `promtool check metrics`: names, help texts and types as Prometheus wants them.
fn check_with_promtool(metrics: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("metrics");
    std::fs::write(&path, metrics)?;
    let output = Command::new("/usr/bin/promtool")
        .args(["check", "metrics"])
        .stdin(std::fs::File::open(path)?)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
    );
    Ok(())
}

#[test]
fn the_alerts_pass_their_unit_tests() -> Result<()> {
    let grafana = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../grafana");
    let output = Command::new("/usr/bin/promtool")
        .args(["test", "rules", "alerts_test.yml"])
        .current_dir(grafana)
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat())
    );
    Ok(())
}
