//! What people want to stop: one click out of a list, and nothing more of it arrives, not even what is
//! queued already; consent withdrawn, and nothing more is kept of them.

use crate::harness::{Service, Site, newsletter, until};
use crate::sink::Sink;
use anyhow::{Context, Result};
use hikyaku::client::Client;
use hyper::Method;
use serde_json::{Value, json};
use smtp::ServerEvent;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

/// The one-click link in the header of the newest message.
fn one_click(peer: &SmtpPeer) -> Result<String> {
    let message = peer.messages().pop().context("a message")?;
    let text = String::from_utf8_lossy(&message.content).into_owned();
    let (_, rest) = text
        .split_once("\r\nList-Unsubscribe: <")
        .context("the header")?;
    let (url, _) = rest.split_once('>').context("its end")?;
    Ok(url.to_owned())
}

fn deferring_while(busy: Arc<AtomicBool>) -> Temper {
    Temper::accepting().rule(move |question| {
        let defers = question.event == ServerEvent::Rcpt && busy.load(Ordering::SeqCst);
        defers.then(|| Answer::reply(451, "4.7.1 later"))
    })
}

async fn counters(service: &Service, batch: &Value, id: Option<&str>) -> Result<Value> {
    let id = match id {
        Some(id) => id.to_owned(),
        None => service.submit(batch).await?,
    };
    Ok(service.completed(&id).await?["counters"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_unsubscribes_gets_no_more_of_the_list() -> Result<()> {
    let busy = Arc::new(AtomicBool::new(false));
    let peer = SmtpPeer::start(deferring_while(Arc::clone(&busy))).await?;
    let site = Site::new(&peer.address().to_string())?;
    let service = site.up().await?;
    let of_list = |list: &str| {
        let mut batch = newsletter(1, 1);
        batch["list"] = json!(list);
        batch
    };
    let first = service.submit(&of_list("news")).await?;
    service.completed(&first).await?;
    let url = one_click(&peer)?;

    // Deferred, so that it is queued while they unsubscribe.
    busy.store(true, Ordering::SeqCst);
    let queued = service.submit(&of_list("news")).await?;
    until("a deferral", async || {
        let batch = service.batch(&queued).await?;
        Ok((batch["counters"]["temporary_error"] == 1).then_some(()))
    })
    .await?;

    let state = "/v1/suppressions/user0@d0.example";
    let browser = Client::new("", None);
    assert_eq!(browser.get(&url).await?.status, 200);
    assert_eq!(
        service.client.get(state).await?.status,
        404,
        "GET changes nothing"
    );
    let form = Some("application/x-www-form-urlencoded");
    let body = "List-Unsubscribe=One-Click";
    let answer = browser.call(Method::POST, &url, form, body.into()).await?;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let suppressions: Value = until("the suppression", async || {
        let answer = service.client.get(state).await?;
        Ok((answer.status == 200).then_some(answer))
    })
    .await?
    .json()?;
    assert_eq!(suppressions["items"][0]["reason"], "unsubscribed");
    assert_eq!(suppressions["items"][0]["list"], "news");
    busy.store(false, Ordering::SeqCst);

    let left = counters(&service, &Value::Null, Some(&queued)).await?;
    assert_eq!(
        (&left["suppressed"], &left["delivered"]),
        (&json!(1), &json!(0))
    );
    let next = counters(&service, &of_list("news"), None).await?;
    assert_eq!(next["suppressed"], 1, "the next batch of the list: {next}");
    let other = counters(&service, &of_list("offers"), None).await?;
    assert_eq!(other["delivered"], 1, "another list: {other}");
    let mut urgent = of_list("news");
    urgent["priority"] = json!("transactional");
    let urgent = counters(&service, &urgent, None).await?;
    assert_eq!(urgent["delivered"], 1, "transactional mail: {urgent}");
    let before = service.batch(&first).await?;
    assert_eq!(before["counters"]["unsubscribed"], 1, "{before}");
    assert_eq!(peer.counts().messages, 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_withdraws_consent_still_comes_where_links_lead() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let first = service.submit(&newsletter(1, 1)).await?;
    service.completed(&first).await?;
    let link = sink.links(&site.tracker()).pop().context("a link")?;
    let browser = Client::new("", None);
    let click = async |link: &str| {
        let answer = browser.get(link).await?;
        let location = answer.headers.get("location").cloned();
        assert_eq!(answer.status, 302);
        assert_eq!(
            location.context("where to")?,
            "https://shop.example/?a=1&b=2"
        );
        Ok::<_, anyhow::Error>(())
    };
    let clicks = async |id: &str| {
        Ok::<_, anyhow::Error>(service.batch(id).await?["counters"]["clicked_total"].clone())
    };
    let counted = async |id: &str| {
        until("a click in the counters", async || {
            Ok((clicks(id).await? == 1).then_some(()))
        })
        .await
    };
    click(&link).await?;
    counted(&first).await?;

    let json = Some("application/json");
    let path = "/v1/tracking/user0@d0.example";
    let put = service
        .client
        .call(Method::PUT, path, json, r#"{"mode": "off"}"#.into());
    put.await?.ok()?;
    click(&link).await?;
    // The next mail: theirs is as it was written, another person's link comes to the store after their click.
    let next = service.submit(&newsletter(2, 1)).await?;
    service.completed(&next).await?;
    let html = |to: &str| -> Result<String> {
        let messages = sink.messages().into_iter().rev();
        let mut theirs = messages.filter(|message| message.recipients == [to]);
        let content = theirs.next().context("a message")?.content;
        let parsed = mail_parser::MessageParser::default().parse(&content);
        let html = parsed.as_ref().and_then(|message| message.body_html(0));
        Ok(html.context("HTML")?.into_owned())
    };
    let (theirs, other) = (html("user0@d0.example")?, html("user1@d0.example")?);
    assert!(
        theirs.contains(r#"href="https://shop.example/?a=1&amp;b=2""#),
        "{theirs}"
    );
    assert!(
        !theirs.contains("/o/") && other.contains("/o/"),
        "{theirs} {other}"
    );
    let all = sink.links(&site.tracker());
    let other = all.iter().find(|other| **other != link).context("a link")?;
    click(other).await?;
    counted(&next).await?;
    assert_eq!(clicks(&first).await?, 1, "what came before it stays");
    let story: Value = service
        .client
        .get(&format!("/v1/messages/{first}.0"))
        .await?
        .json()?;
    assert_eq!(
        story["engagement"].as_array().map(Vec::len),
        Some(1),
        "{story}"
    );
    Ok(())
}
