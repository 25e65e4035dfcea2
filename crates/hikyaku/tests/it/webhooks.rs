//! Webhooks of a service that is killed, with a receiver that fails, hangs and comes back.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testkit::webhook::{Delivery, HookReceiver, Mood};

use crate::harness::{Service, Site, newsletter, until};
use crate::sink::Sink;

const PEOPLE: usize = 3_000;
/// The key below, as base64 with the prefix of Standard Webhooks.
const SECRET: &str = "whsec_aGlreWFrdSB0ZXN0IGtleSBvZiBzb21lIGxlbmd0aA==";
const KEY: &[u8] = b"hikyaku test key of some length";

/// The ids of what was taken, in order, the first time of each, and how many came again.
fn taken(deliveries: &[Delivery]) -> Result<(Vec<Value>, usize)> {
    let (mut events, mut known, mut again) = (Vec::new(), std::collections::HashSet::new(), 0);
    for delivery in deliveries.iter().filter(|delivery| delivery.is_taken) {
        let body: Value = serde_json::from_slice(&delivery.body)?;
        let some = body["events"].as_array().context("no events")?;
        ensure!((1..=500).contains(&some.len()), "{} events", some.len());
        for event in some {
            match known.insert(event["id"].to_string()) {
                true => events.push(event.clone()),
                false => again += 1,
            }
        }
    }
    Ok((events, again))
}

/// All events of the account, as they are read by cursor.
async fn all_events(service: &Service) -> Result<Vec<Value>> {
    let (mut events, mut path) = (Vec::new(), "/v1/events?limit=1000".to_owned());
    loop {
        let page: Value = service.client.get(&path).await?.ok()?.json()?;
        let some = page["events"].as_array().context("no events")?;
        if some.is_empty() {
            return Ok(events);
        }
        events.extend_from_slice(some);
        let next = page["next"].as_str().context("no cursor")?;
        path = format!("/v1/events?limit=1000&after={next}");
    }
}

/// What OpenSSL says the signature is.
fn signature(delivery: &Delivery) -> Result<String> {
    let header = |name| delivery.header(name).context("a header is missing");
    let mut signed = format!(
        "{}.{}.",
        header("webhook-id")?,
        header("webhook-timestamp")?
    );
    signed.push_str(std::str::from_utf8(&delivery.body)?);
    let key: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let command =
        format!("openssl dgst -sha256 -mac HMAC -macopt hexkey:{key} -binary | base64 -w0");
    let mut child = Command::new("sh")
        .args(["-c", &command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child
        .stdin
        .take()
        .context("no input")?
        .write_all(signed.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "openssl: {}", output.status);
    Ok(format!("v1,{}", String::from_utf8(output.stdout)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_missing_or_out_of_order_after_kills_and_a_failing_receiver() -> Result<()> {
    let (sink, receiver) = (Sink::start().await?, HookReceiver::start().await?);
    let site = Site::with(
        &format!(
            "{}[mx]\n\"*\" = \"{}\"\n",
            Site::quick_shaping(),
            sink.address()
        ),
        "[webhooks]\nallow_private = [\"127.0.0.0/8\"]\n",
    )?;
    let mut service = site.up().await?;
    let hook = json!({"url": receiver.url("/hook"), "secret": SECRET});
    let made = service.client.post("/v1/webhooks", &hook).await?;
    ensure!(made.status == 201, "{}", made.text());
    let hook: Value = made.json()?;
    assert_eq!(hook["secret"], SECRET);
    let path = format!("/v1/webhooks/{}", hook["id"].as_str().context("no id")?);

    let id = service.submit(&newsletter(PEOPLE, 20)).await?;
    for mood in [
        Mood::Take,
        Mood::TakeInSilence,
        Mood::Refuse(500),
        Mood::Hang,
    ] {
        receiver.mood(mood);
        let seen = receiver.got().len();
        until("a delivery", async || {
            Ok((receiver.got().len() > seen).then_some(()))
        })
        .await?;
        service.kill()?;
        service = site.up().await?;
    }
    receiver.mood(Mood::Take);
    let batch = service.completed(&id).await?;
    assert_eq!(batch["counters"]["delivered"], PEOPLE, "{batch}");
    // The last event is that of the completion; the receiver's turn comes by itself.
    let complete = until("the last event", async || {
        let (events, again) = taken(&receiver.got())?;
        let ended = events
            .last()
            .is_some_and(|event| event["type"] == "batch.completed");
        Ok(ended.then_some((events, again)))
    });
    let (events, again) = complete.await?;
    println!(
        "{} events, {again} came again, {} deliveries",
        events.len(),
        receiver.got().len()
    );
    assert_eq!(
        events,
        all_events(&service).await?,
        "all of them, in the order of the stream"
    );
    let delivered = events
        .iter()
        .filter(|event| event["type"] == "email.delivered");
    let mut each = BTreeMap::<String, usize>::new();
    for event in delivered {
        *each
            .entry(event["recipient"]["email"].to_string())
            .or_default() += 1;
    }
    assert_eq!(each.len(), PEOPLE);
    let rest: Value = until("rest", async || {
        let now: Value = service.client.get(&path).await?.ok()?.json()?;
        Ok((now["state"] == "active").then_some(now))
    })
    .await?;
    assert_eq!(rest["failure"], Value::Null);
    for delivery in receiver.got().iter().take(5) {
        let said = delivery
            .header("webhook-signature")
            .context("no signature")?;
        assert_eq!(said, signature(delivery)?);
    }
    Ok(())
}
