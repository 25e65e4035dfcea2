//! What is synced and when, as the kernel sees it.

use crate::harness::{Site, newsletter, peak_kib};
use crate::sink::Sink;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;

fn traced(calls: &str, to: &Path, config: &Path) -> Command {
    let mut command = Command::new("/usr/bin/strace");
    command
        .args([
            "-f",
            // The service is the child here and ends with the test; strace follows it.
            "-D",
            "--seccomp-bpf",
            "-s",
            "48",
            "-e",
            &format!("trace={calls}"),
            "-o",
        ])
        .arg(to);
    command
        .arg(env!("CARGO_BIN_EXE_hikyaku"))
        .arg("up")
        .arg("--config")
        .arg(config);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sync_comes_before_the_202() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::new(&sink.address())?;
    let trace = site.dir.path().join("trace");
    let service = site
        .start(traced(
            "fsync,fdatasync,write,writev,sendto,sendmsg,pwrite64",
            &trace,
            &site.config(),
        ))
        .await?;
    let before = std::fs::read_to_string(&trace)?.lines().count();
    let id = service.submit(&newsletter(10, 2)).await?;
    service.completed(&id).await?;
    let trace = std::fs::read_to_string(&trace)?;
    let lines: Vec<&str> = trace.lines().skip(before).collect();
    let answer = lines
        .iter()
        .position(|line| line.contains("HTTP/1.1 202"))
        .context("no 202 in the trace")?;
    let syncs = lines[..answer]
        .iter()
        .filter(|line| line.contains("sync(") && line.trim_end().ends_with("= 0"))
        .count();
    let resumed = lines[..answer]
        .iter()
        .filter(|line| line.contains("sync resumed") && line.trim_end().ends_with("= 0"))
        .count();
    assert!(
        syncs + resumed >= 1,
        "no completed sync before the 202:\n{}",
        lines[..=answer].join("\n")
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_sync_per_message_on_the_way_out() -> Result<()> {
    let recipients = 4_000;
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let trace = site.dir.path().join("trace");
    let service = site
        .start(traced(
            "fsync,fdatasync,msync,sync_file_range",
            &trace,
            &site.config(),
        ))
        .await?;
    let id = service.submit(&newsletter(recipients, 10)).await?;
    let before = syncs(&trace)?;
    service.completed(&id).await?;
    let during = syncs(&trace)? - before;
    println!("{during} syncs while {recipients} messages left");
    assert!(
        during * 4 < recipients,
        "{during} syncs for {recipients} messages"
    );
    Ok(())
}

fn syncs(trace: &Path) -> Result<usize> {
    Ok(std::fs::read_to_string(trace)?
        .lines()
        .filter(|line| line.contains("sync("))
        .count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_recipients_in_one_call_stay_small() -> Result<()> {
    let recipients = 100_000;
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let body = newsletter(recipients, 500);
    let id = service.submit(&body).await?;
    drop(body);
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], recipients, "{batch}");
    let peak = peak_kib(service.pid())?;
    println!("peak resident {peak} KiB");
    assert!(peak < 300 * 1024, "{peak} KiB");
    assert_eq!(
        (sink.distinct(), sink.copies()),
        (recipients, recipients as u64)
    );
    Ok(())
}
