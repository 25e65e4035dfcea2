//! A real Chromium in front of received mail: whose browser it becomes, and whom machines cannot
//! make it. Over HTTPS, with an authority of the test's own, since cookies are told apart by it.

use crate::harness::{Service, Site, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use hikyaku::client::Client;
use serde_json::{Value, json};
use std::path::PathBuf;
use testkit::browser::Browser;
use testkit::https::{HttpsServer, Page};
use testkit::port::free_port;
use testkit::tls::Issuer;

const TRACKER: &str = "t.brand.example";
const SHOP: &str = "www.brand.example";
/// A site that no account names.
const STRANGER: &str = "www.stranger.example";

struct Place {
    site: Site,
    sink: Sink,
    shop: HttpsServer,
    tls_port: u16,
    browser: Browser,
}

impl Place {
    async fn new() -> Result<Self> {
        let issuer = Issuer::new("a test's authority")?;
        let shop = issuer.issue(&[SHOP, STRANGER])?;
        let shop = HttpsServer::start(shop.server_config()?).await?;
        let sink = Sink::keeping_messages().await?;
        let site = Site::unsigned(&sink.address())?;
        let tls_port = free_port()?;
        let own = issuer.issue(&[TRACKER])?;
        std::fs::write(site.dir.path().join("t.pem"), own.chain_pem())?;
        std::fs::write(site.dir.path().join("t.key"), own.key_pem())?;
        let (plain, shop_port) = (site.tracker(), shop.address().port());
        site.edit(|config| {
            let tracking = format!(
                "base_url = \"https://{TRACKER}:{tls_port}\"\npage_origins = [\"https://{SHOP}:{shop_port}\"]"
            );
            let tracker = format!(
                "[tracker.tls]\nlisten = \"127.0.0.1:{tls_port}\"\n[[tracker.certificates]]\n\
                 host = \"{TRACKER}\"\ncert_file = \"t.pem\"\nkey_file = \"t.key\"\n[smtp]\n"
            );
            config
                .replace(&format!("base_url = \"{plain}\""), &tracking)
                .replace("[tracker]\n", "[tracker]\nsettle = \"1s\"\ncookie_domain = \"brand.example\"\n")
                .replace("[smtp]\n", &tracker)
        })?;
        let page = |body: String| Page::text(body).header("Content-Type", "text/html");
        let tag = format!("<script src=\"https://{TRACKER}:{tls_port}/t.js\" async></script>");
        for host in [SHOP, STRANGER] {
            for path in ["/spring", "/basket"] {
                shop.put(
                    host,
                    path,
                    page(format!("<title>{path}</title>{tag}<p>Hello")),
                );
            }
        }
        let browser = Browser::start(&[TRACKER, SHOP, STRANGER], &issuer.pin()).await?;
        Ok(Self {
            site,
            sink,
            shop,
            tls_port,
            browser,
        })
    }

    fn page(&self, host: &str, path: &str) -> String {
        format!("https://{host}:{}{path}", self.shop.address().port())
    }

    /// Sends each of them a mail with a link to the shop; once they have it.
    async fn send(&self, service: &Service, people: &[&str]) -> Result<()> {
        let link = self.page(SHOP, "/spring");
        let to: Vec<Value> = people
            .iter()
            .map(|name| json!({"email": format!("{name}@x.example"), "prospect_id": name}))
            .collect();
        let batch = json!({
            "campaign": "spring", "from": {"email": "news@brand.example"}, "subject": "Spring",
            "html": format!("<html><body><p>Dear reader,</p><p><a id=\"shop\" href=\"{link}\">Shop</a></p></body></html>"),
            "recipients": to,
        });
        let id = service.submit(&batch).await?;
        service.completed(&id).await?;
        Ok(())
    }

    /// The mail that somebody got, parsed.
    fn mail(&self, name: &str) -> Result<Mail> {
        let to = format!("{name}@x.example");
        let message = self.sink.messages().into_iter();
        let mut message = message.filter(|message| message.recipients.contains(&to));
        let message = message.next_back().context("no mail")?;
        let parsed = mail_parser::MessageParser::default().parse(&message.content);
        let parsed = parsed.context("no message")?;
        let html = parsed.body_html(0).context("no HTML")?.into_owned();
        let path = self.site.dir.path().join(format!("{name}.html"));
        std::fs::write(&path, &html)?;
        let (_, rest) = html
            .split_once("<a id=\"shop\" href=\"")
            .context("no link")?;
        let link = rest.split('"').next().unwrap_or_default().to_owned();
        let unsubscribe = parsed.header_raw("List-Unsubscribe").context("no header")?;
        let unsubscribe = unsubscribe
            .split(['<', '>'])
            .find(|part| part.contains("/u/"));
        Ok(Mail {
            path,
            link,
            unsubscribe: unsubscribe.context("no link to unsubscribe")?.to_owned(),
        })
    }

    /// A request to the tracker as a program makes it, over its plain listener.
    async fn ask(&self, method: &str, url: &str, headers: &[(&str, &str)]) -> Result<u16> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let authority = format!("{TRACKER}:{}", self.tls_port);
        let path = url
            .strip_prefix(&format!("https://{authority}"))
            .context("ours")?;
        let mut text =
            format!("{method} {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        let mut stream =
            tokio::net::TcpStream::connect(("127.0.0.1", self.site.tracker_port)).await?;
        stream.write_all(text.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let status = answer.split(' ').nth(1).context("a status")?;
        Ok(status.parse()?)
    }
}

struct Mail {
    path: PathBuf,
    link: String,
    unsubscribe: String,
}

/// Events of these kinds, in order.
async fn events(client: &Client, kinds: &str) -> Result<Vec<Value>> {
    let path = format!("/v1/events?types={kinds}&limit=500");
    let answer: Value = client.get(&path).await?.ok()?.json()?;
    Ok(answer["events"].as_array().context("events")?.clone())
}

/// Waits for so many events of a kind.
async fn wait_for(client: &Client, kind: &str, count: usize) -> Result<Vec<Value>> {
    until(&format!("{count} {kind}"), async || {
        let found = events(client, kind).await?;
        Ok((found.len() >= count).then_some(found))
    })
    .await
}

/// What stands in a person's history: kinds of events, with the pages.
async fn timeline(client: &Client, person: &str) -> Result<Vec<(String, String)>> {
    let path = format!("/v1/prospects/{person}");
    let answer: Value = client.get(&path).await?.ok()?.json()?;
    let entries = answer["timeline"].as_array().context("a timeline")?.iter();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(entries
        .map(|entry| (text(&entry["type"]), text(&entry["url"])))
        .collect())
}

fn pages(timeline: &[(String, String)]) -> usize {
    timeline
        .iter()
        .filter(|(kind, _)| kind == "page.viewed")
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_is_bound_by_a_persons_click_and_by_nothing_else() -> Result<()> {
    let mut place = Place::new().await?;
    let service = place.site.up().await?;
    let api = &service.client;
    place.send(&service, &["ann", "bob", "mallory"]).await?;
    let (ann, bob, mallory) = (
        place.mail("ann")?,
        place.mail("bob")?,
        place.mail("mallory")?,
    );

    // A page before any click: nobody's browser, but a browser.
    place.browser.open(&place.page(SHOP, "/basket")).await?;
    wait_for(api, "page.viewed", 1).await?;
    // Who opens a link in the mail lands where it leads, with the cookie.
    place.browser.open_file(&ann.path).await?;
    place.browser.click("#shop").await?;
    let at = place.browser.evaluate("location.href").await?;
    assert_eq!(at, place.page(SHOP, "/spring").as_str());
    let bound = wait_for(api, "identity.bound", 1).await?;
    assert_eq!(bound[0]["data"]["prospect_id"], "ann");
    assert_eq!(bound[0]["data"]["confidence"], "high");
    // The page from before is hers now, and the one where she landed.
    let joined = bound[0]["data"]["pages_joined"].as_u64();
    ensure!(joined.is_some_and(|pages| pages >= 1), "{}", bound[0]);
    let cookies = place.browser.cookies(&ann.link).await?;
    let cookie = cookies.iter().find(|cookie| cookie["name"] == "hk_vid");
    let cookie = cookie.context("a cookie")?;
    assert_eq!(cookie["domain"], ".brand.example");
    assert_eq!(
        (&cookie["secure"], &cookie["httpOnly"], &cookie["sameSite"]),
        (&json!(true), &json!(true), &json!("Lax"))
    );
    // Pages cannot read it, and another site's views are not heard.
    assert_eq!(place.browser.evaluate("document.cookie").await?, "");
    wait_for(api, "page.viewed", 2).await?;
    place.browser.open(&place.page(STRANGER, "/basket")).await?;
    place.browser.open(&place.page(SHOP, "/basket")).await?;
    wait_for(api, "page.viewed", 3).await?;
    let viewed = events(api, "page.viewed").await?;
    assert!(viewed.iter().all(|event| {
        event["data"]["url"]
            .as_str()
            .is_some_and(|url| url.contains(SHOP))
    }));
    until("her history", async || {
        let history = timeline(api, "ann").await?;
        Ok((pages(&history) == 3).then_some(()))
    })
    .await?;
    let before = timeline(api, "ann").await?;

    // The same browser follows a link in somebody else's mail.
    place.browser.open_file(&bob.path).await?;
    place.browser.click("#shop").await?;
    let conflict = wait_for(api, "identity.conflict", 1).await?;
    assert_eq!(conflict[0]["data"]["prospect_id"], "ann");
    assert_eq!(conflict[0]["data"]["reason"], "other_prospect");
    let bound = wait_for(api, "identity.bound", 2).await?;
    assert_eq!(bound[1]["data"]["prospect_id"], "bob");
    assert_ne!(bound[1]["data"]["visitor"], bound[0]["data"]["visitor"]);
    place.browser.open(&place.page(SHOP, "/basket")).await?;
    until("his history", async || {
        let history = timeline(api, "bob").await?;
        Ok((pages(&history) == 2).then_some(()))
    })
    .await?;
    // History stays where it is.
    assert_eq!(timeline(api, "ann").await?, before);

    machines_bind_nobody(&mut place, api, &mallory).await?;
    assert_eq!(service.terminate().await?.code(), Some(0));
    Ok(())
}

/// HEAD, scanners and prefetchers follow everything in a mail.
async fn machines_bind_nobody(place: &mut Place, api: &Client, mail: &Mail) -> Result<()> {
    let before = events(api, "identity.bound,identity.conflict").await?;
    let person = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:144.0) Gecko/20100101 Firefox/144.0";
    let ours = ("User-Agent", person);
    assert_eq!(place.ask("HEAD", &mail.link, &[ours]).await?, 302);
    assert_eq!(place.ask("HEAD", &mail.unsubscribe, &[ours]).await?, 200);
    assert_eq!(place.ask("GET", &mail.unsubscribe, &[ours]).await?, 200);
    let scanner = [("User-Agent", "python-requests/2.32.3")];
    assert_eq!(place.ask("GET", &mail.link, &scanner).await?, 302);
    assert_eq!(place.ask("GET", &mail.unsubscribe, &scanner).await?, 200);
    let prefetch = [ours, ("Sec-Purpose", "prefetch;prerender")];
    assert_eq!(place.ask("GET", &mail.link, &prefetch).await?, 302);
    // And Chromium's own: a page that has the link fetched ahead.
    place.browser.open(&place.page(SHOP, "/basket")).await?;
    let fetch = format!(
        "new Promise((done) => {{ const link = document.createElement('link'); link.rel = 'prefetch'; \
         link.href = {:?}; link.onload = link.onerror = () => done(true); document.head.append(link); }})",
        mail.link
    );
    place.browser.evaluate(&fetch).await?;
    let clicked = until("the machines' clicks", async || {
        let clicked = events(api, "email.clicked").await?.into_iter();
        let theirs: Vec<Value> = clicked
            .filter(|event| event["recipient"]["prospect_id"] == "mallory")
            .collect();
        Ok((theirs.len() >= 3).then_some(theirs))
    })
    .await?;
    for event in &clicked {
        ensure!(event["data"]["actor"] == "machine", "{event}");
    }
    let prefetched = clicked.iter().filter(|event| {
        let reasons = event["data"]["machine_reasons"].as_array();
        reasons.is_some_and(|reasons| reasons.contains(&json!("prefetch")))
    });
    assert_eq!(prefetched.count(), 2, "{clicked:?}");
    // Once a person's click after all these is settled, so are they.
    place.browser.open_file(&mail.path).await?;
    place.browser.click("#shop").await?;
    let bound = until("the person's own click", async || {
        let found = events(api, "identity.bound,identity.conflict").await?;
        Ok((found.len() > before.len()).then_some(found))
    })
    .await?;
    let theirs: Vec<&Value> = bound
        .iter()
        .filter(|event| {
            event["type"] == "identity.bound" && event["data"]["prospect_id"] == "mallory"
        })
        .collect();
    assert_eq!(theirs.len(), 1, "{bound:?}");
    assert!(events(api, "email.unsubscribed").await?.is_empty());
    Ok(())
}
