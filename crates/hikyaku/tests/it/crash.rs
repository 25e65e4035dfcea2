//! Death at any moment: nobody is forgotten, and nobody gets a second copy without cause.

use crate::harness::{Site, newsletter, until};
use crate::sink::Sink;
use anyhow::Result;

const RECIPIENTS: usize = 5_000;
const KILLS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_random_moments_forgets_nobody() -> Result<()> {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut chance = fastrand::Rng::with_seed(seed);
    let sink = Sink::start().await?;
    let site = Site::new(&sink.address())?;
    let mut service = site.up().await?;
    let id = service.submit(&newsletter(RECIPIENTS, 20)).await?;
    let mut second_copies_allowed = 0;
    for _ in 0..KILLS {
        let target = sink.copies() + chance.u64(1..=(RECIPIENTS / (KILLS + 5)) as u64);
        until("the moment of the kill", async || {
            Ok((sink.copies() >= target || sink.distinct() == RECIPIENTS).then_some(()))
        })
        .await?;
        second_copies_allowed += sink.open_connections();
        service.kill()?;
        service = site.up().await?;
        // Asserts the accounting identity.
        service.batch(&id).await?;
    }
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], RECIPIENTS, "{batch}");
    assert_eq!(sink.distinct(), RECIPIENTS, "nobody missing");
    let second_copies = sink.copies() - RECIPIENTS as u64;
    println!(
        "{second_copies} second copies, {second_copies_allowed} connections open at {KILLS} kills"
    );
    assert!(
        second_copies <= second_copies_allowed,
        "{second_copies} second copies, {second_copies_allowed} allowed"
    );
    sink.assert_copies_are_the_same();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_leaves_no_second_copy() -> Result<()> {
    let recipients = 2_000;
    let sink = Sink::start().await?;
    let site = Site::new(&sink.address())?;
    let mut service = site.up().await?;
    let id = service.submit(&newsletter(recipients, 20)).await?;
    for round in 1..=4 {
        until("some mail", async || {
            Ok((sink.copies() >= round * 400).then_some(()))
        })
        .await?;
        let status = service.terminate().await?;
        assert_eq!(status.code(), Some(0));
        service = site.up().await?;
    }
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], recipients, "{batch}");
    sink.assert_one_copy_each(recipients);
    Ok(())
}
