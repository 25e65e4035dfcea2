//! SIGHUP: new limits hold from then on; a file with a mistake changes nothing and says why.

use crate::harness::{Service, Site, newsletter, signal, until};
use crate::sink::Sink;
use crate::tracking::{Asked, PERSON, ask};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

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

#[tokio::test(flavor = "multi_thread")]
async fn new_rules_of_engagement_hold_and_history_is_judged_by_them() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::unsigned(&sink.address())?;
    site.edit(|config| config.replace("[tracker]\n", "[tracker]\nsettle = \"500ms\"\n"))?;
    let file = site.dir.path().join("engagement.toml");
    let shipped = include_str!("../../../../config/engagement.toml");
    std::fs::write(&file, shipped)?;
    let service = site.up().await?;
    let id = service.submit(&newsletter(2, 1)).await?;
    service.completed(&id).await?;
    let links = sink.links(&site.tracker());
    let agent = format!("{PERSON} Peeper/3.1");
    let click = async |at: usize| {
        let link = links.get(at).context("a link")?;
        let path = link.strip_prefix(&site.tracker()).context("ours")?;
        let asked = ask(site.tracker_port, path, &agent).await;
        ensure!(matches!(asked, Asked::Answered(302)));
        anyhow::Ok(())
    };
    let counted = async |all: u64, human: u64| {
        until("the clicks in the counters", async || {
            let counters = service.batch(&id).await?["counters"].clone();
            let both = (
                &counters["clicked_unique"],
                &counters["clicked_unique_human"],
            );
            Ok((both == (&all.into(), &human.into())).then_some(()))
        })
        .await
    };
    click(0).await?;
    counted(1, 1).await?;

    std::fs::write(&file, "version = \"the newest\"")?;
    signal(service.pid(), "HUP")?;
    shows(&service, "hikyaku_reload_ok 0").await?;
    let version = shipped
        .lines()
        .find_map(|line| line.strip_prefix("version = "));
    let version: u32 = version.context("a version")?.parse()?;
    let new = shipped.replace(
        &format!("version = {version}\n"),
        &format!("version = {}\n", version + 1),
    );
    let peeper =
        "\n[[agents]]\nkind = \"automated\"\nsource = \"this test\"\ncontains = [\"peeper/\"]\n";
    std::fs::write(&file, format!("{new}{peeper}"))?;
    signal(service.pid(), "HUP")?;
    shows(&service, "hikyaku_reload_ok 1").await?;
    until("judgement by the new rules", async || {
        let (status, said) = site.hikyaku(&["reclassify"])?;
        ensure!(status.success(), "{said}");
        Ok(said
            .contains(&format!("version {}", version + 1))
            .then_some(()))
    })
    .await?;
    counted(1, 0).await?;
    shows(
        &service,
        "hikyaku_engagement_reclassified_total{actor=\"machine\",kind=\"click\"} 1",
    )
    .await?;
    let path = "/v1/events?types=engagement.reclassified";
    let events: Value = service.client.get(path).await?.ok()?.json()?;
    let data = &events["events"][0]["data"];
    assert_eq!(
        data["machine_reasons"],
        serde_json::json!(["user_agent"]),
        "{events}"
    );
    // What comes from now on is judged so at once.
    click(1).await?;
    counted(2, 0).await?;
    Ok(())
}
