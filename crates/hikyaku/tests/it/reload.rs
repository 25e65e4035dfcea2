//! SIGHUP: new limits hold from then on; a file with a mistake changes nothing and says why.

use crate::harness::{Site, newsletter, signal, until};
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

    std::fs::write(&file, shaping("unlimited"))?;
    signal(service.pid(), "HUP")?;
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], 50);
    Ok(())
}
