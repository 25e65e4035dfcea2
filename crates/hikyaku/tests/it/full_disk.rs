//! A disk that fills up under a running service, and has room again.
//!
//! Once by a limit on the size of files, which every machine has; once by a tmpfs in a mount
//! namespace of the service's own, which needs no root and vanishes with it.

use crate::harness::{Service, Site, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result, bail, ensure};
use hikyaku::client::Answer;
use serde_json::Value;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use testkit::smtp_peer::Temper;

/// Room for the store with some hundred recipients, not for much more.
const DISK: &str = "24m";
const RECIPIENTS: usize = 300;

/// A way to take the room away from a service that runs, and to give it back.
enum Disk {
    Tmpfs { filler: PathBuf },
    FileSize { pid: u32 },
}

impl Disk {
    /// Whether an own mount may be made here.
    fn may_mount() -> bool {
        let mount = ["-rm", "mount", "-t", "tmpfs", "none", "/mnt"];
        let tried = Command::new("unshare").args(mount).output();
        tried.is_ok_and(|output| output.status.success())
    }

    async fn start(site: &Site, mount: bool) -> Result<(Service, Self)> {
        let data = site.dir.path().join("data");
        std::fs::create_dir(&data)?;
        let script = if mount {
            format!("mount -t tmpfs -o size={DISK} none \"$1\"; exec \"$0\" up --config \"$2\"")
        } else {
            // Ignored, the signal becomes an error of the write.
            "trap '' XFSZ; exec \"$0\" up --config \"$2\"".to_owned()
        };
        let mut command = Command::new(if mount { "unshare" } else { "env" });
        if mount {
            command.arg("-rm");
        }
        command
            .args(["sh", "-ec", &script, env!("CARGO_BIN_EXE_hikyaku")])
            .arg(&data)
            .arg(site.config());
        let service = site.start(command).await?;
        let pid = service.pid();
        let disk = if mount {
            let below = data.strip_prefix("/")?;
            let filler = PathBuf::from(format!("/proc/{pid}/root")).join(below);
            Self::Tmpfs {
                filler: filler.join("filler"),
            }
        } else {
            Self::FileSize { pid }
        };
        Ok((service, disk))
    }

    fn fill(&self) -> Result<()> {
        match self {
            Self::Tmpfs { filler } => {
                let mut file = std::fs::File::create(filler)?;
                loop {
                    match file.write(&[0; 4096]) {
                        Ok(_) => {}
                        Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            Self::FileSize { pid } => limit_files(*pid, "1:unlimited"),
        }
    }

    fn make_room(&self) -> Result<()> {
        match self {
            Self::Tmpfs { filler } => Ok(std::fs::remove_file(filler)?),
            Self::FileSize { pid } => limit_files(*pid, "unlimited:unlimited"),
        }
    }
}

fn limit_files(pid: u32, limit: &str) -> Result<()> {
    let status = Command::new("prlimit")
        .args([format!("--pid={pid}"), format!("--fsize={limit}")])
        .status()?;
    ensure!(status.success(), "prlimit: {status}");
    Ok(())
}

/// Submits until the disk is found to be full; the ids of what was taken before, and the refusal.
async fn submit_until_refused(service: &Service) -> Result<(Vec<String>, Answer)> {
    let mut taken = Vec::new();
    for _ in 0..100 {
        let answer = service
            .client
            .post("/v1/batches", &newsletter(RECIPIENTS, 5))
            .await?;
        if answer.status != 202 {
            return Ok((taken, answer));
        }
        let id = answer.json::<Value>()?["id"].as_str().map(str::to_owned);
        taken.push(id.context("id")?);
    }
    bail!("the disk is full, and a hundred batches were taken")
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_may_not_grow_refuse_and_recover_and_lose_nothing() -> Result<()> {
    fill_and_recover(false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_recovers_and_loses_nothing() -> Result<()> {
    if !Disk::may_mount() {
        eprintln!("no mount namespaces here: only the limit on files is tested");
        return Ok(());
    }
    fill_and_recover(true).await
}

async fn fill_and_recover(mount: bool) -> Result<()> {
    // Slow enough that the disk fills while mail is on its way.
    let temper = Temper::accepting().slow_messages(Duration::from_millis(30));
    let sink = Sink::tempered(temper).await?;
    let site = Site::unsigned(&sink.address())?;
    let (service, disk) = Disk::start(&site, mount).await?;
    let mut ids = vec![service.submit(&newsletter(RECIPIENTS, 5)).await?];
    until("mail on its way", async || {
        Ok((sink.copies() >= 20).then_some(()))
    })
    .await?;

    disk.fill()?;
    let (taken, refused) = submit_until_refused(&service).await?;
    ids.extend(taken);
    let problem: Value = refused.json()?;
    assert_eq!(refused.status, 503, "{problem}");
    assert_eq!(problem["code"], "unavailable", "{problem}");
    assert_eq!(refused.headers["content-type"], "application/problem+json");
    let wait: u64 = refused.headers["retry-after"].to_str()?.parse()?;
    assert!(wait > 0);
    until("readyz to tell", async || {
        let answer = service.client.get("/readyz").await?;
        Ok((answer.status == 503).then_some(()))
    })
    .await?;
    assert_eq!(service.client.get("/healthz").await?.status, 200);
    // What is there can be read, and adds up.
    for id in &ids {
        service.batch(id).await?;
    }

    disk.make_room()?;
    until("readiness without a restart", async || {
        let answer = service.client.get("/readyz").await?;
        Ok(answer.status.is_success().then_some(()))
    })
    .await
    .with_context(|| service.log())?;
    ids.push(service.submit(&newsletter(RECIPIENTS, 5)).await?);
    for id in &ids {
        let batch = service.completed(id).await?;
        assert_eq!(batch["counters"]["delivered"], RECIPIENTS, "{batch}");
    }
    let list: Value = service.client.get("/v1/batches").await?.ok()?.json()?;
    let list = list["items"].as_array().context("items")?;
    assert_eq!(list.len(), ids.len(), "nothing half accepted");
    assert_eq!(sink.distinct(), RECIPIENTS);
    assert_eq!(sink.copies(), (ids.len() * RECIPIENTS) as u64, "one each");
    Ok(())
}
