//! MTA and tracker as two processes on one store.

use crate::harness::{Site, TrackerProcess, newsletter, signal, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use std::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn a_click_at_the_tracker_is_counted_at_the_mta() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::new(&sink.address())?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
    command.arg("mta").arg("--config").arg(site.config());
    let mta = site.start(command).await?;
    let tracker = TrackerProcess::start(&site).await?;
    let id = mta.submit(&newsletter(3, 1)).await?;
    mta.completed(&id).await?;

    let links = sink.links(&site.tracker());
    ensure!(
        links.len() == 3,
        "a tracked link in each of three messages: {links:?}"
    );
    let browser = Client::new("", None);
    for link in &links {
        // The redirect needs neither the MTA nor the store.
        let answer = browser.get(link).await?;
        assert_eq!(answer.status, 302);
        assert_eq!(answer.headers["location"], "https://shop.example/?a=1&b=2");
    }
    let clicked = until("three clicks in the counters", async || {
        let batch = mta.batch(&id).await?;
        Ok((batch["counters"]["clicked_unique"] == 3).then_some(batch))
    })
    .await?;
    assert_eq!(clicked["counters"]["clicked_total"], 3);

    // A click that was answered survives the tracker's death, whatever the moment.
    browser
        .get(links.first().context("a link")?)
        .await?
        .ok()
        .ok();
    signal(tracker.pid(), "KILL")?;
    drop(tracker);
    let _tracker = TrackerProcess::start(&site).await?;
    until("the fourth click", async || {
        Ok((mta.batch(&id).await?["counters"]["clicked_total"] == 4).then_some(()))
    })
    .await?;
    let status = mta.terminate().await?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}
