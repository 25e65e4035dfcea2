//! `why`, `top`, `trace` and `doctor` as an operator types them, against a running service, a real
//! name server and receiving servers.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

use crate::dns::{Knot, txt};
use crate::harness::{FROM_DOMAIN, Site, newsletter, until};
use crate::postfix::dkim_records;

/// Runs a command that must end well; what it printed.
fn told(site: &Site, arguments: &[&str]) -> Result<String> {
    let (status, printed) = site.hikyaku(arguments)?;
    ensure!(status.success(), "{arguments:?}: {printed}");
    Ok(printed)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_why_mail_waits_and_hears_it_being_sent() -> Result<()> {
    let temper = Temper::accepting().rule(|question| {
        (question.event == smtp::ServerEvent::Rcpt && question.recipient.starts_with("user1@"))
            .then(|| Answer::reply(451, "4.7.1 greylisted, come again later"))
    });
    let peer = SmtpPeer::start(temper).await?;
    let shaping = format!(
        "[default]\nrate = \"20/s\"\nadaptive = false\nretry = [\"1h\"]\n[mx]\n\"*\" = \"{}\"\n",
        peer.address()
    );
    let site = Site::with(&shaping, "")?;
    let service = site.up().await?;
    assert!(told(&site, &["top", "--once"])?.contains("nothing waits, nothing leaves"));

    let mut listening = Command::new(env!("CARGO_BIN_EXE_hikyaku"))
        .args(["trace", "d0.example", "--for", "30s", "--config"])
        .arg(site.config())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(listening.stdout.take().context("an output")?).lines();
    let first = lines.next().context("a line")??;
    assert_eq!(first, "d0.example is idle");
    assert_eq!(
        lines.next().context("a line")??,
        "listening; Ctrl-C ends it"
    );

    let id = service.submit(&newsletter(400, 1)).await?;
    let why = until("a pace", async || {
        let why = told(&site, &["why", "d0.example"])?;
        Ok(why.contains("rate: ").then_some(why))
    })
    .await?;
    assert!(why.starts_with("domain d0.example to 127.0.0.1:"), "{why}");
    assert!(
        why.contains("rate: ") && why.contains("20/s") && why.contains("shaping.toml"),
        "{why}"
    );
    let batch: Value = serde_json::from_str(&told(&site, &["why", &id, "--json"])?)?;
    assert_eq!(
        batch["subject"],
        json!({"kind": "batch", "id": id, "destination": batch["subject"]["destination"], "status": "in_progress"})
    );
    let top = told(&site, &["top", "--once"])?;
    assert!(
        top.starts_with("1 destination: ") && top.contains(" 20/s "),
        "{top}"
    );
    assert!(!top.contains('\u{1b}'), "no colours where nobody looks");

    let deferred = until("the refusal", async || {
        let why = told(&site, &["why", &format!("{id}.1")])?;
        Ok(why.contains("greylisted").then_some(why))
    })
    .await?;
    assert!(
        deferred.contains("451 4.7.1 greylisted, come again later"),
        "{deferred}"
    );
    assert!(deferred.contains("until     in "), "{deferred}");

    let mut heard = String::new();
    while !(heard.contains("> MAIL FROM:<bounce+") && heard.contains(" bytes of content]")) {
        heard.push_str(&lines.next().context("the transcript ended")??);
        heard.push('\n');
    }
    listening.kill()?;
    listening.wait()?;
    assert!(
        heard.contains("* connecting") && heard.contains("> RCPT TO:<***@d0.example>"),
        "{heard}"
    );
    assert!(
        !heard.contains("Dear Person") && !heard.contains("user0@"),
        "{heard}"
    );

    let (status, printed) = site.hikyaku(&["why", "-"])?;
    assert_eq!(
        (status.code(), printed.contains("not_found")),
        (Some(1), true),
        "{printed}"
    );
    // One that was delivered, and, at 20 a second, one that will be while it is listened to.
    for index in [0, 399] {
        let (status, printed) = site.hikyaku(&["trace", &format!("{id}.{index}")])?;
        assert!(
            status.success() && printed.contains("Nothing more is said"),
            "{printed}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_tells_what_is_wrong_and_what_to_do() -> Result<()> {
    let peer = SmtpPeer::start(Temper::accepting()).await?;
    let probe = peer.address().to_string();
    let dns_port = testkit::port::free_port()?;
    let more = format!(
        "[dns]\nnameservers = [\"127.0.0.1:{dns_port}\"]\n[inbound]\nlisten = \"127.0.0.1:2526\"\n"
    );
    let site = Site::with(Site::quick_shaping(), &more)?;
    site.edit(|config| {
        let source = "[[smtp.sources]]\nname = \"ip1\"\nbind = \"127.0.0.2\"\nehlo = \"o1.brand.example\"\n[dkim]\n";
        config.replacen("[dkim]\n", source, 1)
    })?;
    let doctor = || site.hikyaku(&["doctor", FROM_DOMAIN, "--probe", &probe]);
    // Nobody answers on the port yet.
    let (status, offline) = doctor()?;
    assert_eq!(status.code(), Some(1), "{offline}");
    assert!(
        offline.contains("no name server answers") && offline.contains("ok    port 25"),
        "{offline}"
    );

    let bare = Knot::at(dns_port, "brand A 127.0.0.3\n").await?;
    let (status, missing) = doctor()?;
    assert_eq!(status.code(), Some(1), "{missing}");
    for line in [
        "fail  spf ",
        "fail  ptr ",
        "fail  dkim ",
        "fail  dmarc ",
        "warn  bounces ",
        "fail  tracking ",
    ] {
        assert!(missing.contains(line), "{line} in:\n{missing}");
    }
    drop(bare);

    let mut zone = String::from(
        "brand A 127.0.0.3\nbrand MX 10 mx.brand\nmx.brand A 127.0.0.3\no1.brand A 127.0.0.2\n",
    );
    zone.push_str(&txt(FROM_DOMAIN, "v=spf1 ip4:127.0.0.2 -all"));
    zone.push_str(&txt(
        &format!("_dmarc.{FROM_DOMAIN}"),
        "v=DMARC1; p=reject; rua=mailto:d@brand.example",
    ));
    for (name, value) in dkim_records(&site)? {
        zone.push_str(&txt(&name, &value));
    }
    let _full = Knot::at(dns_port, &zone).await?;
    let (_, mended) = doctor()?;
    for line in [
        "ok    spf ",
        "ok    dkim ",
        "ok    dmarc ",
        "ok    aligned ",
        "ok    bounces ",
        "ok    port 25 ",
    ] {
        assert!(mended.contains(line), "{line} in:\n{mended}");
    }
    // Reverse names are not in this zone, and links lead to loopback.
    assert!(
        mended.contains("fail  ptr ") && mended.contains("fail  tracking "),
        "{mended}"
    );
    assert!(!mended.contains('\u{1b}'), "no colours where nobody looks");
    Ok(())
}
