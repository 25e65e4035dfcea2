//! Plays the people who got the newsletter: reads the mail that the sandbox received, fetches
//! pixels, follows links, unsubscribes, all over HTTP as a mail client or browser would.
//!
//! Who does what is decided by the address, so that every run is the same.

use crate::client::Client;
use crate::demo::sandbox::Sandbox;
use anyhow::{Context, Result, ensure};
use hyper::Method;
use hyper::body::Bytes;
use mail_parser::MessageParser;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// How many people are busy at the same moment.
const AT_ONCE: usize = 16;

/// What people read their mail with.
const BROWSERS: [&str; 4] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.6 Safari/605.1.15",
    "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Mobile Safari/537.36",
];
/// How often people look whether more mail has come.
const LOOK: Duration = Duration::from_millis(500);

/// What the audience did, each counted when the tracker had answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Played {
    pub(crate) opens: u64,
    pub(crate) opened: BTreeSet<String>,
    pub(crate) clicks: u64,
    pub(crate) clicked: BTreeSet<String>,
    pub(crate) unsubscribed: BTreeSet<String>,
    /// Requests by link checkers: they count for nobody.
    pub(crate) probes: u64,
}

impl Played {
    fn add(&mut self, other: Self) {
        self.opens += other.opens;
        self.clicks += other.clicks;
        self.probes += other.probes;
        self.opened.extend(other.opened);
        self.clicked.extend(other.clicked);
        self.unsubscribed.extend(other.unsubscribed);
    }
}

/// Plays everyone who got one of `mails` (recipient and message).
pub(crate) async fn play(mails: Vec<(String, Bytes)>) -> Result<Played> {
    let mut played = Played::default();
    let mut people = people(mails);
    while let Some(one) = people.join_next().await {
        played.add(one??);
    }
    Ok(played)
}

/// Plays whoever gets mail from now on, for as long as it is polled. What is not like the newsletter
/// (a pixel, links, a header to unsubscribe by) is not read to its end.
pub(crate) async fn follow(sandbox: &Sandbox) {
    let mut seen = Vec::new();
    sandbox.new_mails(&mut seen);
    loop {
        tokio::time::sleep(LOOK).await;
        let mut people = people(sandbox.new_mails(&mut seen));
        while let Some(one) = people.join_next().await {
            if let Ok(Err(error)) = one {
                tracing::debug!(%error, "somebody did not read on");
            }
        }
    }
}

fn people(mails: Vec<(String, Bytes)>) -> JoinSet<Result<Played>> {
    let client = Client::new("", None);
    let room = std::sync::Arc::new(Semaphore::new(AT_ONCE));
    let mut people = JoinSet::new();
    for (address, message) in mails {
        let (client, room) = (client.clone(), room.clone());
        people.spawn(async move {
            let _place = room.acquire_owned().await?;
            person(&client, &address, &message)
                .await
                .with_context(|| format!("playing {address}"))
        });
    }
    people
}

/// A number below `of` that belongs to the address (or the subject) and the `salt`.
fn lot(name: &str, salt: &str, of: u64) -> u64 {
    model::partition_hash(salt, name) % of
}

async fn person(client: &Client, address: &str, message: &[u8]) -> Result<Played> {
    let mail = Mail::read(message)?;
    let browser = usize::try_from(lot(address, "browser", BROWSERS.len() as u64))?;
    let client = &client.named(BROWSERS[browser]);
    let mut played = Played::default();
    if lot(address, "scanner", 100) < 4 {
        for link in &mail.links {
            ensure!(
                client
                    .call(Method::HEAD, link, None, Bytes::new())
                    .await?
                    .status
                    == 302,
                "HEAD {link}"
            );
            played.probes += 1;
        }
    }
    if lot(address, "opens", 100) < 55 {
        for _ in 0..=lot(address, "again", 2) {
            ensure!(client.get(&mail.pixel).await?.status == 200, "the pixel");
            played.opens += 1;
        }
        played.opened.insert(address.to_owned());
        // Some subjects are liked better than others.
        let liked = 20 + lot(&mail.subject, "subject", 31);
        if lot(address, "clicks", 100) < liked {
            let link =
                &mail.links[usize::try_from(lot(address, "which", mail.links.len() as u64))?];
            click(client, link).await?;
            played.clicks += 1;
            played.clicked.insert(address.to_owned());
        }
    }
    if lot(address, "leaves", 100) < 3 {
        unsubscribe(client, &mail).await?;
        played.unsubscribed.insert(address.to_owned());
    }
    Ok(played)
}

async fn click(client: &Client, link: &str) -> Result<()> {
    let answer = client.get(link).await?;
    let to = answer
        .headers
        .get("location")
        .and_then(|to| to.to_str().ok())
        .unwrap_or_default();
    ensure!(answer.status == 302, "HTTP {} for {link}", answer.status);
    ensure!(
        to.starts_with("https://shop.example/") || to.starts_with("https://blog.example/"),
        "{link} leads to {to:?}"
    );
    Ok(())
}

/// The mail client's button: RFC 8058.
async fn unsubscribe(client: &Client, mail: &Mail) -> Result<()> {
    let body = Bytes::from_static(b"List-Unsubscribe=One-Click");
    let answer = client
        .call(
            Method::POST,
            &mail.unsubscribe,
            Some("application/x-www-form-urlencoded"),
            body,
        )
        .await?;
    ensure!(
        answer.status == 200,
        "HTTP {} for the one-click unsubscribe",
        answer.status
    );
    Ok(())
}

/// What a mail client sees of the newsletter.
struct Mail {
    subject: String,
    pixel: String,
    links: Vec<String>,
    unsubscribe: String,
}

impl Mail {
    fn read(message: &[u8]) -> Result<Self> {
        let message = MessageParser::default()
            .parse(message)
            .context("not a message")?;
        let html = message.body_html(0).context("no HTML part")?;
        let header = message
            .header_raw("List-Unsubscribe")
            .context("no List-Unsubscribe")?;
        let unsubscribe = between(header, "<", ">")
            .next()
            .context("an empty List-Unsubscribe")?;
        let links = between(&html, "href=\"", "\"")
            .filter(|url| url.contains("/c/"))
            .map(|url| url.replace("&amp;", "&"))
            .collect();
        let pixel = between(&html, "src=\"", "\"")
            .find(|url| url.ends_with(".gif"))
            .context("no pixel")?
            .replace("&amp;", "&");
        let mail = Self {
            subject: message.subject().unwrap_or_default().to_owned(),
            pixel,
            links,
            unsubscribe: unsubscribe.split_whitespace().collect(),
        };
        ensure!(!mail.links.is_empty(), "no tracked link");
        Ok(mail)
    }
}

/// Every piece of `text` between `open` and the next `close`.
fn between<'a>(text: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(open)
        .skip(1)
        .filter_map(move |rest| rest.split_once(close))
        .map(|(inside, _)| inside)
}
