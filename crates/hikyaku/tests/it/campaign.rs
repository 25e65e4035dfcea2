//! What campaign systems lean on: a call takes effect once through a kill, uploads and exports of any
//! size, a hand that stops mail on every node within a second, `hikyaku send` broken off and given
//! again, and content that arrives byte for byte.
//!
//! `HIKYAKU_TEST_FULL=1` uploads and exports a million recipients.

use crate::chaos::{full, role, share_key, sites};
use crate::harness::{FROM_DOMAIN, Service, Site, newsletter, peak_kib, program, until};
use crate::sink::Sink;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use testkit::redis::RedisServer;

const NDJSON: &str = "application/x-ndjson";

/// The head of a batch that nothing is sent of: its time is far away.
fn head() -> Value {
    json!({
        "from": {"email": format!("news@{FROM_DOMAIN}")}, "subject": "Hello {{ first }}",
        "text": "{{ first }} {{ last }} {{ city }} {{ points }} {{ code }}", "send_at": "2099-01-01T00:00:00Z",
    })
}

/// A line of about 150 bytes with five variables.
fn line(out: &mut String, n: usize) -> Result<()> {
    writeln!(
        out,
        "{{\"email\":\"person{n}@d{}.example\",\"vars\":{{\"first\":\"First{n}\",\"last\":\"Last{n}\",\"city\":\"Tokyo\",\"points\":{n},\"code\":\"C-{n:08}\"}}}}",
        n % 1_000
    )?;
    Ok(())
}

fn ndjson(count: usize) -> Result<Bytes> {
    let mut body = head().to_string() + "\n";
    (0..count).try_for_each(|n| line(&mut body, n))?;
    Ok(body.into())
}

fn csv(count: usize) -> Result<Bytes> {
    let mut body = "email,first,last,city,points,code\n".to_owned();
    for n in 0..count {
        writeln!(
            body,
            "person{n}@d{}.example,First{n},Last{n},Tokyo,{n},C-{n:08}",
            n % 1_000
        )?;
    }
    Ok(body.into())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_call_from_eight_callers_through_a_kill_is_one_batch() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let mut service = site.up().await?;
    let body = ndjson(4_000)?;
    for (round, delay) in [0, 30, 120, 400].into_iter().enumerate() {
        let key = format!("call-{round}");
        let client = service.client.clone();
        let ask = async || {
            until("an answer that stands", async || {
                // A process that is gone and a call on its way are both a reason to ask again.
                let asked = client.once("/v1/batches", NDJSON, body.clone(), &key).await;
                let Ok(answer) = asked else { return Ok(None) };
                if answer.status == 503 || answer.status == 409 {
                    ensure!(!answer.text().contains("idempotency_conflict"));
                    return Ok(None);
                }
                let answer: Value = answer.ok()?.json()?;
                Ok(answer["id"].as_str().map(str::to_owned))
            })
            .await
        };
        let kill = async {
            tokio::time::sleep(Duration::from_millis(delay)).await;
            service.kill()?;
            site.up().await
        };
        let (ids, again) = tokio::join!(try_join_all((0..8).map(|_| ask())), kill);
        service = again?;
        let ids: BTreeSet<String> = ids?.into_iter().collect();
        assert_eq!(ids.len(), 1, "{ids:?}");
        let all: Value = service
            .client
            .get("/v1/batches?limit=100")
            .await?
            .ok()?
            .json()?;
        let all = all["items"].as_array().context("batches")?;
        assert_eq!(all.len(), round + 1, "one for each key: {all:?}");
        let id = ids.first().context("an id")?;
        let batch = service.batch(id).await?;
        assert_eq!(batch["counters"]["accepted"], 4_000, "{batch}");
    }
    Ok(())
}

/// Lets the kernel count the peak anew from here.
fn forget_peak(pid: u32) -> Result<()> {
    Ok(std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

/// What `act` needs beyond what there is before it, in KiB.
async fn needs<T>(service: &Service, act: impl Future<Output = Result<T>>) -> Result<(T, u64)> {
    forget_peak(service.pid())?;
    let before = peak_kib(service.pid())?;
    let done = act.await?;
    Ok((done, peak_kib(service.pid())?.saturating_sub(before)))
}

/// Uploads a file, however long that takes; the answer.
async fn upload(service: &Service, url: &str, media: &str, file: &Path) -> Result<Value> {
    let mut command = Command::new("curl");
    command
        .args([
            "-sSf",
            "-X",
            "POST",
            "-H",
            &format!("Authorization: Bearer {}", service.key),
        ])
        .args(["-H", &format!("Content-Type: {media}"), "-T"])
        .arg(file)
        .arg(url);
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Reads an export to its end; how many lines it has.
async fn export(service: &Service, path: &str, accept: &str) -> Result<usize> {
    let mut command = Command::new("curl");
    command
        .args([
            "-sSf",
            "-H",
            &format!("Authorization: Bearer {}", service.key),
        ])
        .args(["-H", &format!("Accept: {accept}"), path]);
    let mut child = command.stdout(Stdio::piped()).spawn().context("curl")?;
    let mut out = child.stdout.take().context("its output")?;
    tokio::task::spawn_blocking(move || {
        let mut lines = 0;
        let mut piece = vec![0; 64 << 10];
        loop {
            let length = std::io::Read::read(&mut out, &mut piece)?;
            if length == 0 {
                ensure!(child.wait()?.success(), "the export broke off");
                return Ok(lines);
            }
            lines += piece[..length]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count();
        }
    })
    .await?
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_and_exports_need_no_more_memory_for_more_people() -> Result<()> {
    let (few, many) = if full() {
        (100_000, 1_000_000)
    } else {
        (20_000, 80_000)
    };
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let body = site.dir.path().join("body");
    // The addresses, kept to find duplicates: 16 bytes each in a table that doubles.
    let remembered = |count: usize| u64::try_from(count * 64 / 1_024).unwrap_or(0);
    let mut peaks = Vec::new();
    for count in [few, many] {
        std::fs::write(&body, ndjson(count)?)?;
        let whole = async {
            let url = format!("{}/v1/batches", site.api());
            let answer = upload(&service, &url, NDJSON, &body).await?;
            assert_eq!(answer["accepted"], count, "{answer}");
            answer["id"].as_str().map(str::to_owned).context("an id")
        };
        let (id, uploaded) = needs(&service, whole).await?;
        let mut held = head();
        (held["hold"], held["send_at"]) = (json!(true), Value::Null);
        let held = service.submit(&held).await?;
        std::fs::write(&body, csv(count)?)?;
        let part = async {
            let url = format!("{}/v1/batches/{held}/recipients", site.api());
            let answer = upload(&service, &url, "text/csv", &body).await?;
            assert_eq!(answer["accepted"], count, "{answer}");
            Ok(())
        };
        let ((), added) = needs(&service, part).await?;
        let url = format!("{}/v1/batches/{id}/recipients", site.api());
        let (lines, as_ndjson) = needs(&service, export(&service, &url, NDJSON)).await?;
        assert_eq!(lines, count);
        let (lines, as_csv) = needs(&service, export(&service, &url, "text/csv")).await?;
        assert_eq!(lines, count + 1);
        println!(
            "{count} people: NDJSON {uploaded} KiB, CSV part {added} KiB, exports {as_ndjson} and {as_csv} KiB"
        );
        peaks.push([uploaded, added, as_ndjson, as_csv]);
    }
    for (few_need, many_need) in peaks[0].iter().zip(peaks[1]) {
        // What stays does not grow with the people; what is remembered of them is told.
        let bound = few_need + remembered(many) + 24 * 1_024;
        assert!(
            many_need < bound,
            "{few_need} KiB for {few}, {many_need} KiB for {many}"
        );
        assert!(many_need < 150 * 1_024, "{many_need} KiB for {many}");
    }
    Ok(())
}

/// How long after the moment at which it was stopped mail came.
fn late(sink: &Sink, stopped: Instant, is_his: impl Fn(&str) -> bool) -> Vec<Duration> {
    let messages = sink.messages();
    let his = messages
        .iter()
        .filter(|message| message.recipients.iter().any(|to| is_his(to)));
    his.filter_map(|message| message.mail_at.into_std().checked_duration_since(stopped))
        .collect()
}

/// Gives an order to a node; when it was answered.
async fn order(node: &Service, batch: &str, order: &str) -> Result<Instant> {
    let path = format!("/v1/batches/{batch}/{order}");
    node.client.post(&path, &Value::Null).await?.ok()?;
    Ok(Instant::now())
}

/// A batch to so many, who are told by name.
async fn submit_to(node: &Service, name: &str, count: usize) -> Result<String> {
    let mut batch = newsletter(count, 3);
    let people = batch["recipients"].as_array_mut().context("people")?;
    for (n, recipient) in people.iter_mut().enumerate() {
        recipient["email"] = json!(address(name, n));
    }
    node.submit(&batch).await
}

fn address(name: &str, n: usize) -> String {
    format!("{name}{n}@{name}{}.example", n % 3)
}

/// Waits until these batches are being sent, and by both nodes.
async fn at_full_speed(nodes: [&Service; 2], batches: [&str; 2]) -> Result<()> {
    for batch in batches {
        until("mail of a batch", async || {
            let batch = nodes[0].batch(batch).await?;
            Ok((batch["counters"]["delivered"].as_u64() > Some(100)).then_some(()))
        })
        .await?;
    }
    let is_delivered = |line: &str| {
        line.starts_with("hikyaku_outcomes_total{") && line.contains("outcome=\"delivered\"")
    };
    for node in nodes {
        until("mail of a node", async || {
            let page = node.client.get("/metrics").await?.text();
            Ok(page.lines().any(is_delivered).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pause_cancel_and_suppression_hold_on_all_nodes_within_a_second() -> Result<()> {
    const PEOPLE: usize = 8_000;
    let directory = tempfile::tempdir()?;
    let redis = RedisServer::start(directory.path().to_owned(), &["--appendonly", "yes"])?;
    let sink = Sink::keeping_messages().await?;
    let mx = format!("[mx]\n\"*\" = \"{}\"\n", sink.address());
    // So that it takes long enough to be stopped in the middle, whatever the machine.
    let shaping = Site::quick_shaping().replace("\"unlimited\"", "\"400/s\"");
    let sites = sites(2, &redis.url(), &(shaping + &mx))?;
    let one = sites[0].start(role(&sites[0], "mta")).await?;
    share_key(&sites)?;
    let two = sites[1].start(role(&sites[1], "mta")).await?;
    let paused = submit_to(&one, "paused", PEOPLE).await?;
    let cancelled = submit_to(&one, "cancelled", PEOPLE).await?;
    at_full_speed([&one, &two], [&paused, &cancelled]).await?;

    // Told to one node, and to hold on the other, too.
    let unwanted: BTreeSet<String> = (PEOPLE / 2..PEOPLE).map(|n| address("paused", n)).collect();
    let line = |email| json!({"email": email, "reason": "manual"}).to_string() + "\n";
    let lines: String = unwanted.iter().map(line).collect();
    let asked = two.client.call(
        hyper::Method::POST,
        "/v1/suppressions",
        Some(NDJSON),
        lines.into(),
    );
    asked.await?.ok()?;
    let suppressed_at = Instant::now();
    let cancelled_at = order(&two, &cancelled, "cancel").await?;
    let paused_at = order(&two, &paused, "pause").await?;
    let done = two.ended(&cancelled, "cancelled").await?;
    ensure!(done["counters"]["cancelled"].as_u64() > Some(0), "{done}");
    let batch = one.batch(&paused).await?;
    ensure!(
        batch["state"] == "paused" && batch["counters"]["queued"].as_u64() > Some(0),
        "{batch}"
    );
    // Two seconds of mail at full speed: what was stopped would have left meanwhile.
    let after = submit_to(&one, "after", 2_400).await?;
    one.completed(&after).await?;
    let late_after = |what: &str, at: Instant, is_his: &dyn Fn(&str) -> bool| {
        let late = late(&sink, at, is_his);
        println!(
            "{what}: {} came after it, the last {:?}",
            late.len(),
            late.iter().max()
        );
        let in_time = late.iter().all(|after| *after < Duration::from_secs(1));
        assert!(in_time, "{what}: {:?}", late.iter().max());
    };
    late_after("pause", paused_at, &|to| to.starts_with("paused"));
    late_after("cancel", cancelled_at, &|to| to.starts_with("cancelled"));

    order(&one, &paused, "resume").await?;
    let done = one.completed(&paused).await?;
    late_after("suppression", suppressed_at, &|to| unwanted.contains(to));
    ensure!(done["counters"]["suppressed"].as_u64() > Some(0), "{done}");
    let mut people = BTreeSet::new();
    for message in sink.messages() {
        let to = &message.recipients[0];
        ensure!(people.insert(to.clone()), "twice: {to}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_is_broken_off_goes_on_when_it_is_given_again() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let (table, html) = (
        site.dir.path().join("people.csv"),
        site.dir.path().join("news.html"),
    );
    let mut people = "email,name,points\n".to_owned();
    for n in 0..12_000 {
        writeln!(people, "user{n}@d{}.example,\"Person, {n}\",{n}", n % 7)?;
    }
    std::fs::write(&table, people + "not-an-address,Nobody,0\n")?;
    std::fs::write(&html, "<p>Dear {{ name }}, {{ points }} points</p>")?;
    let config = site.config();
    let send = || {
        let mut command = Command::new(program());
        command
            .args([
                "send",
                "--from",
                &format!("Brand <news@{FROM_DOMAIN}>"),
                "--subject",
                "Hello {{ name }}",
            ])
            .args(["--campaign", "spring", "--html"])
            .arg(&html)
            .arg("--recipients")
            .arg(&table)
            .arg("--config")
            .arg(&config);
        command
    };
    let quiet = |command: &mut Command| -> Result<_> {
        Ok(command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?)
    };
    let mut broken_off = quiet(&mut send())?;
    let batches = async || -> Result<Vec<Value>> {
        let all: Value = service.client.get("/v1/batches").await?.ok()?.json()?;
        Ok(all["items"].as_array().context("batches")?.clone())
    };
    // Some parts are there, not all.
    until("the first part", async || {
        let all = batches().await?;
        let accepted = all
            .first()
            .and_then(|of| of["counters"]["accepted"].as_u64());
        Ok(accepted.filter(|accepted| *accepted > 0))
    })
    .await?;
    broken_off.kill()?;
    broken_off.wait()?;
    let mut again = send();
    let output = tokio::task::spawn_blocking(move || again.output()).await??;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{printed}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let all = batches().await?;
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all[0]["counters"]["delivered"], 12_000, "{}", all[0]);
    assert_eq!((sink.distinct(), sink.copies()), (12_000, 12_000));
    for part in [
        "1 recipients were rejected",
        "completed",
        "delivered       12000",
    ] {
        assert!(printed.contains(part), "{part:?} in {printed}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_messages_and_files_arrive_byte_for_byte() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let mut raw = format!(
        "From: News <news@{FROM_DOMAIN}>\r\nTo: You <you@x.example>\r\nSubject: =?utf-8?q?=E9=A3=9B?=\r\n folded\r\nMessage-ID: <own@{FROM_DOMAIN}>\r\nDate: Mon, 1 Dec 2025 09:00:00 +0000\r\nX-Odd:   spaces  \r\n\r\n"
    )
    .into_bytes();
    // Dots, tabs, long lines, bytes of eight bits, white space at the end of lines.
    raw.extend(b".\r\n..two\r\n.\r\n\ttab \r\n \r\n");
    raw.extend([b'x'; 900]);
    raw.extend(b"\r\n");
    raw.extend((0x80..=0xff).collect::<Vec<u8>>());
    raw.extend(b"\r\n\r\nlast\r\n");
    let file: Vec<u8> = (0..=255).cycle().take(100_003).collect();
    let to = json!([{"email": "a@x.example"}]);
    let batch = service
        .submit(&json!({"raw": STANDARD.encode(&raw), "recipients": to}))
        .await?;
    service.completed(&batch).await?;
    let mut with = newsletter(1, 1);
    with["attachments"] = json!([{
        "filename": "飛脚 \"1\".bin", "type": "application/octet-stream", "content": STANDARD.encode(&file), "content_id": null
    }]);
    let batch = service.submit(&with).await?;
    service.completed(&batch).await?;
    let messages = sink.messages();
    let content = &messages[0].content;
    assert!(
        content.ends_with(&raw),
        "{}",
        String::from_utf8_lossy(content)
    );
    let before = String::from_utf8(content[..content.len() - raw.len()].to_vec())?;
    // Headers alone stand before it, each whole.
    let is_header = |line: &str| {
        line.starts_with([' ', '\t'])
            || line
                .split_once(':')
                .is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_graphic()))
    };
    assert!(before.split_terminator("\r\n").all(is_header), "{before}");
    let parsed = mail_parser::MessageParser::default().parse(&messages[1].content);
    let parsed = parsed.context("a message")?;
    let attached: Vec<_> = parsed.attachments().collect();
    assert_eq!(attached.len(), 1);
    assert_eq!(attached[0].contents(), file);
    assert_eq!(
        mail_parser::MimeHeaders::attachment_name(attached[0]),
        Some("飛脚 \"1\".bin")
    );
    Ok(())
}
