//! SIGHUP: new limits hold from then on; a file with a mistake changes nothing and says why.

use crate::harness::{Service, Site, newsletter, signal, until};
use crate::sink::Sink;
use anyhow::Result;

#[tokio::test(flavor = "multi_thread")]
async fn sighup_takes_new_limits_and_refuses_bad_ones() -> Result<()> {
    let sink = Sink::start().await?;
    let shaping = |rate: &str| {
        format!(
            "[default]\nrate = \"{rate}\"\nretry = [\"1s\"]\n[mx]\n\"*\" = \"{}\"\n",
            sink.address()
        )
    };
    let site = Site::with(&shaping("1/h"), "")?;
    let service = site.up().await?;
    let id = service.submit(&newsletter(50, 1)).await?;
    let file = site.dir.path().join("shaping.toml");

    std::fs::write(&file, shaping("very fast"))?;
    signal(service.pid(), "HUP")?;
    until("the complaint in the log", async || {
        Ok(service.log().contains("very fast").then_some(()))
    })
    .await?;
    assert!(sink.copies() <= 1, "the old limit holds");
    shows(&service, "hikyaku_reload_ok 0").await?;
    shows(&service, "hikyaku_egress_source_up{source=\"default\"} 1").await?;

    std::fs::write(&file, shaping("unlimited"))?;
    signal(service.pid(), "HUP")?;
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 50);
    shows(&service, "hikyaku_reload_ok 1").await?;
    Ok(())
}

/// Waits for a line of `/metrics`.
async fn shows(service: &Service, line: &str) -> Result<()> {
    until(line, async || {
        let page = service.client.get("/metrics").await?.ok()?.text();
        Ok(page.lines().any(|of| of == line).then_some(()))
    })
    .await
}
