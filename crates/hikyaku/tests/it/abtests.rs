//! A test of variants over kills of the process: everybody has one variant, and the rest is sent.

use crate::harness::{Service, Site, newsletter, until};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use testkit::smtp_peer::{SmtpPeer, Temper};

/// The variant of each recipient that has one.
fn variants(rows: &Value) -> BTreeMap<String, String> {
    let items = rows["items"].as_array().into_iter().flatten();
    let of = |row: &Value| {
        let email = row["email"].as_str()?.to_owned();
        Some((email, row["variant"].as_str()?.to_owned()))
    };
    items.filter_map(of).collect()
}

async fn get(service: &Service, path: &str) -> Result<Value> {
    service.client.get(path).await?.ok()?.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_goes_on_over_kills() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let shaping = format!(
        "[default]\nrate = \"40/s\"\nretry = [\"1s\"]\n[mx]\n\"*\" = \"{}\"\n",
        peer.address()
    );
    let site = Site::with(&shaping, "")?;
    let mut service = site.up().await?;
    let mut batch = newsletter(120, 4);
    batch["variants"] =
        json!([{"name": "A", "subject": "For A"}, {"name": "B", "subject": "For B"}]);
    batch["ab_test"] = json!({"test_fraction": 0.5, "wait": "3s", "fallback": "leader"});
    let id = service.submit(&batch).await?;
    let path = format!("/v1/batches/{id}/recipients?limit=1000");
    // In the middle of the test, then in the middle of the rest.
    let mut known = BTreeMap::new();
    for messages in [20, 80] {
        peer.wait_for(messages).await?;
        service.kill()?;
        service = site.up().await?;
        let now = variants(&get(&service, &path).await?);
        for (email, variant) in &known {
            assert_eq!(now.get(email), Some(variant), "{email}");
        }
        known = now;
    }
    let done = service.completed(&id).await?;
    assert_eq!(done["counters"]["delivered"], 120, "{done}");
    let after = variants(&get(&service, &path).await?);
    assert_eq!(after.len(), 120);
    for (email, copies) in peer.copies() {
        // Who was at a connection when it was killed may have it twice, but never another.
        assert!(copies.same, "{email}");
    }
    let mut rest = BTreeMap::<&str, usize>::new();
    for message in peer.messages() {
        let text = String::from_utf8_lossy(&message.content).into_owned();
        let to = message.recipients.first().context("a recipient")?;
        let variant = after.get(to).context("a variant")?;
        let subject = format!("Subject: For {variant}\r\n");
        assert!(text.contains(&subject), "{to} is in {variant}: {text}");
        *rest.entry(variant).or_default() += 1;
    }
    // Nobody clicked: the first of them has the rest.
    assert!(rest["A"] >= 85 && rest["B"] >= 25, "{rest:?}");
    let events = format!("/v1/events?types=abtest.decided&batch={id}");
    let told = until("the decision", async || {
        let page = get(&service, &events).await?;
        let told = page["events"].as_array().cloned().unwrap_or_default();
        Ok((!told.is_empty()).then_some(told))
    });
    let mut ids: Vec<_> = told.await?.iter().map(|of| of["id"].to_string()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    Ok(())
}
