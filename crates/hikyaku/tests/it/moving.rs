//! A store that is kept as a file, filled from it, and completed from a journal, by the commands.

use crate::harness::{Site, newsletter};
use crate::sink::Sink;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::PathBuf;

/// The journal of the MTA of a site.
fn journal_of(site: &Site) -> Result<PathBuf> {
    let dir = site.dir.path().join("data/journal");
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("mta-"))
        {
            return Ok(path);
        }
    }
    anyhow::bail!("no journal")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_and_a_lost_nodes_journal_together_lose_nobody() -> Result<()> {
    let sink = Sink::start().await?;
    let old = Site::unsigned(&sink.address())?;
    let service = old.up().await?;
    let done = service.submit(&newsletter(40, 2)).await?;
    service.completed(&done).await?;
    let mut coming = newsletter(5, 1);
    coming["send_at"] = json!("2099-01-01T00:00:00Z");
    let coming = service.submit(&coming).await?;
    // Waits while the backup is made, and is delivered after it.
    let path = "/v1/destinations/held.example";
    let hold = json!({"for": "1h", "reason": "a test"});
    service
        .client
        .post(&format!("{path}/suspend"), &hold)
        .await?
        .ok()?;
    let mut flying = newsletter(30, 1);
    for (at, person) in flying["recipients"]
        .as_array_mut()
        .context("a list")?
        .iter_mut()
        .enumerate()
    {
        person["email"] = json!(format!("user{at}@held.example"));
    }
    let flying = service.submit(&flying).await?;
    let file = old.dir.path().join("backup");
    let file = file.to_str().context("a path")?;
    let (status, said) = old.hikyaku(&["store", "export", file])?;
    assert!(
        status.success() && said.contains("2 not finished"),
        "{said}"
    );
    let (status, said) = old.hikyaku(&["store", "export", file])?;
    assert_eq!(status.code(), Some(1), "{said}");
    service
        .client
        .post(&format!("{path}/resume"), &json!({}))
        .await?
        .ok()?;
    service.completed(&flying).await?;
    let journal = journal_of(&old)?;
    let journal = journal.to_str().context("a path")?;
    let (status, said) = old.hikyaku(&["journal", "ship", journal])?;
    assert!(!status.success() && said.contains("open"), "{said}");
    service.kill()?;
    let copies = sink.copies();

    // The machine is gone; the backup and the disk with the journal are not.
    let new = Site::unsigned(&sink.address())?;
    let (status, said) = new.hikyaku(&["store", "import", file])?;
    assert!(status.success() && said.contains("paused"), "{said}");
    let (status, said) = new.hikyaku(&["store", "import", file])?;
    assert!(
        status.code() == Some(1) && said.contains("not empty"),
        "{said}"
    );
    for (handed, known) in [(true, false), (false, true)] {
        let (status, said) = new.hikyaku(&["journal", "ship", journal])?;
        assert!(status.success(), "{said}");
        assert_eq!(said.starts_with("0 facts"), !handed, "{said}");
        assert_eq!(said.contains(" 70 were known"), known, "{said}");
    }
    // Links that were sent are signed with it: a node without it says that it is not ready.
    let key = "data/tracking.key";
    std::fs::copy(old.dir.path().join(key), new.dir.path().join(key))?;
    let service = new.up().await?;
    for (id, state, counter, count) in [
        (&done, "completed", "delivered", 40),
        (&flying, "completed", "delivered", 30),
        (&coming, "paused", "scheduled", 5),
    ] {
        let batch = service.batch(id).await?;
        assert_eq!(
            (&batch["state"], &batch["counters"][counter]),
            (&json!(state), &json!(count)),
            "{batch}"
        );
    }
    let events = service
        .client
        .get("/v1/events?types=email.delivered&limit=1000")
        .await?;
    let events: serde_json::Value = events.ok()?.json()?;
    assert_eq!(events["events"].as_array().map(Vec::len), Some(70));
    assert_eq!(sink.copies(), copies, "nobody got anything twice");
    Ok(())
}

#[test]
fn a_file_that_is_no_export_is_refused() -> Result<()> {
    let site = Site::unsigned("127.0.0.1:9")?;
    let file = site.dir.path().join("backup");
    std::fs::write(&file, b"HIKYAKUSTORE\x02\x00and so on")?;
    let (status, said) = site.hikyaku(&["store", "import", file.to_str().context("a path")?])?;
    assert!(
        status.code() == Some(1) && said.contains("version"),
        "{said}"
    );
    assert!(!site.dir.path().join("data/hikyaku.db").exists());
    Ok(())
}
