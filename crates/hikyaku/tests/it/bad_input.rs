//! What strangers and mistaken callers send: each gets the contract's answer, and leaves nothing.

use crate::harness::{Service, Site, newsletter, peak_kib, until};
use crate::sink::Sink;
use anyhow::{Context, Result};
use hikyaku::client::Answer;
use hyper::Method;
use hyper::body::Bytes;
use serde_json::{Value, json};
use std::fmt::Write as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A batch that is right, with some of it replaced.
fn batch(changes: Value) -> Value {
    let mut batch = newsletter(2, 1);
    let Value::Object(changes) = changes else {
        panic!("changes are an object")
    };
    batch.as_object_mut().unwrap().extend(changes);
    batch
}

/// The codes and paths in a problem document, which must be one of this status.
fn problem(answer: &Answer, status: u16) -> (String, Vec<(String, String)>) {
    let text = answer.text();
    assert_eq!(answer.status.as_u16(), status, "{text}");
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let problem: Value = answer.json().unwrap();
    for field in ["type", "title", "code", "detail"] {
        assert!(problem[field].is_string(), "{field}: {text}");
    }
    assert_eq!(problem["status"], status, "{text}");
    let errors = problem["errors"].as_array().unwrap().iter();
    let errors = errors.map(|error| {
        assert!(error["detail"].is_string(), "{text}");
        assert!(error["line"].is_u64() || error["line"].is_null(), "{text}");
        (word(&error["path"]), word(&error["code"]))
    });
    (word(&problem["code"]), errors.collect())
}

fn word(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

async fn submit(service: &Service, body: impl Into<Bytes>) -> Result<Answer> {
    let json = Some("application/json");
    let call = service
        .client
        .call(Method::POST, "/v1/batches", json, body.into());
    call.await
}

async fn batches(service: &Service) -> Result<Vec<Value>> {
    let page: Value = service
        .client
        .get("/v1/batches?limit=1000")
        .await?
        .ok()?
        .json()?;
    Ok(page["items"].as_array().context("items")?.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_with_a_mistake_is_refused_whole_and_names_it() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::new(&sink.address())?;
    site.edit(|config| {
        config.replace(
            "from_domains = [\"*\"]",
            "from_domains = [\"brand.example\", \"unsigned.example\"]",
        )
    })?;
    let service = site.up().await?;
    let from = |domain: &str| json!({"from": {"email": format!("news@{domain}")}});
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
    let table = [
        (json!({"colour": "red"}), 422, "unknown_field", "/colour"),
        (
            json!({"recipients": [{"email": "a@x.example"}, {"email": "b@x.example", "colour": 1}]}),
            422,
            "unknown_field",
            "/recipients/1/colour",
        ),
        (
            json!({"tracking": {"colour": true}}),
            422,
            "unknown_field",
            "/tracking/colour",
        ),
        (
            json!({"from": {"email": "news@brand.example", "name": "B\r\nBcc: a@x.example"}}),
            422,
            "invalid_field",
            "/from/name",
        ),
        (
            json!({"headers": {"X-A: b\r\nBcc": "a@x.example"}}),
            422,
            "invalid_field",
            "/headers/X-A: b\u{fffd}\u{fffd}Bcc",
        ),
        (
            json!({"html": "<p>{% if %}"}),
            422,
            "template_error",
            "/html",
        ),
        (
            json!({"text": "a\n{{ name | nope }}"}),
            422,
            "template_error",
            "/text",
        ),
        (
            json!({"subject": "{{ name"}),
            422,
            "template_error",
            "/subject",
        ),
        (json!({"text": endless}), 422, "template_error", "/text"),
        (from("other.example"), 403, "forbidden_from", "/from/email"),
        (from("unsigned.example"), 422, "no_dkim_key", "/from/email"),
        (
            json!({"recipients": []}),
            422,
            "invalid_field",
            "/recipients",
        ),
    ];
    for (changes, status, code, path) in table {
        let answer = service.client.post("/v1/batches", &batch(changes)).await?;
        let (found, errors) = problem(&answer, status);
        assert_eq!(found, code);
        let expected = (path.to_owned(), code.to_owned());
        assert!(errors.contains(&expected), "{expected:?} in {errors:?}");
    }
    assert_eq!(batches(&service).await?, [] as [Value; 0]);
    assert_eq!(sink.copies(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_json_is_refused_with_its_line() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let good = newsletter(2, 1).to_string();
    let (head, tail) = good.split_at(good.find("\"recipients\"").context("recipients")?);
    let with = |noise: &[u8]| [head.as_bytes(), noise, tail.as_bytes()].concat();
    let nested = [&b"\"vars\":"[..], &b"[".repeat(100_000)].concat();
    let bodies = [
        Vec::new(),
        good.as_bytes()[..good.len() - 1].to_vec(),
        good.as_bytes()[..good.len() / 2].to_vec(),
        format!("{good},").into_bytes(),
        with(b"\n\n,"),
        with(b"\"campaign\":\"\xff\xfe\","),
        good.replace("Person 1", "\u{1}").into_bytes(),
        [good.replace("Person 1\"", "").as_bytes(), b"\xc3\x28"].concat(),
        with(&nested),
        b"\x00".repeat(1_000),
    ];
    for body in bodies {
        let about = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let answer = submit(&service, body).await?;
        let (code, errors) = problem(&answer, 400);
        assert_eq!(code, "malformed_body", "{about}");
        assert_eq!(errors.len(), 1, "{about}: {errors:?}");
    }
    let answer = submit(&service, with(b"\n\n,")).await?;
    assert_eq!(answer.json::<Value>()?["errors"][0]["line"], 3);
    assert_eq!(batches(&service).await?, [] as [Value; 0]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_recipient_is_rejected_by_index_and_the_rest_goes() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::new(&sink.address())?;
    let service = site.up().await?;
    let recipients = json!([
        {"email": "first@x.example", "name": "First", "vars": {"points": 1}},
        {"email": "no-at-sign", "name": "N", "vars": {"points": 1}},
        {"email": "FIRST@X.example", "name": "Again", "vars": {"points": 1}},
        {"email": "cr@x.example", "name": "A\r\nBcc: all@x.example", "vars": {"points": 1}},
        {"email": "missing@x.example", "name": "M"},
        {"email": "vars@x.example", "name": "V", "vars": "points"},
        {"name": "Nobody", "vars": {"points": 1}},
        {"email": "last@x.example", "name": "Last", "vars": {"points": 1}},
    ]);
    let answer = service
        .client
        .post("/v1/batches", &batch(json!({"recipients": recipients})))
        .await?;
    assert_eq!(answer.status, 202, "{}", answer.text());
    let answer: Value = answer.json()?;
    let rejected: Vec<(u64, Value, String)> = answer["rejected"]
        .as_array()
        .context("rejected")?
        .iter()
        .map(|one| {
            let index = one["index"].as_u64().unwrap();
            (index, one["email"].clone(), word(&one["code"]))
        })
        .collect();
    let of = |index, email: Value, code: &str| (index, email, code.to_owned());
    let expected = [
        of(1, json!("no-at-sign"), "invalid_address"),
        of(2, json!("FIRST@x.example"), "duplicate"),
        of(3, json!("cr@x.example"), "invalid_vars"),
        of(4, json!("missing@x.example"), "missing_variable"),
        of(5, json!("vars@x.example"), "invalid_vars"),
        of(6, Value::Null, "invalid_address"),
    ];
    assert_eq!(rejected, expected);
    assert_eq!(
        (&answer["accepted"], &answer["rejected_count"]),
        (&json!(2), &json!(6))
    );
    let id = answer["id"].as_str().context("id")?;
    let batch = service.completed(id).await?;
    assert_eq!(batch["counters"]["delivered"], 2, "{batch}");
    let rows: Value = service
        .client
        .get(&format!("/v1/batches/{id}/recipients"))
        .await?
        .ok()?
        .json()?;
    let names = rows["items"].as_array().context("items")?.iter();
    let names: Vec<_> = names.map(|row| word(&row["message_id"])).collect();
    assert_eq!(names, [format!("{id}.0"), format!("{id}.7")]);
    assert_eq!(sink.copies(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_value_breaks_a_line_of_the_header() -> Result<()> {
    let sink = Sink::keeping_messages().await?;
    let site = Site::new(&sink.address())?;
    let service = site.up().await?;
    let breaks = ["\r\n", "\n", "\r", "\u{b}", "\u{85}", "\u{2028}", "\u{0}"];
    let mut recipients = Vec::new();
    for (n, text) in breaks.iter().enumerate() {
        let value = format!("x{text}Bcc: stolen@x.example{text}{text}<p>body");
        recipients.push(json!({"email": format!("b{n}@x.example"), "vars": {"v": value}}));
    }
    let body = json!({
        "subject": "Hello {{ v }}", "headers": {"X-Value": "{{ v }}"},
        "html": "<p>{{ v }}", "text": "{{ v }}", "recipients": recipients,
    });
    let id = service.submit(&batch(body)).await?;
    service.completed(&id).await?;
    assert_eq!(sink.copies(), breaks.len() as u64);
    for message in sink.messages() {
        let parsed = mail_parser::MessageParser::default()
            .parse(&message.content)
            .context("a message")?;
        assert!(parsed.header("Bcc").is_none(), "{parsed:?}");
        let text = String::from_utf8_lossy(&message.content);
        let (head, _) = text.split_once("\r\n\r\n").context("a body")?;
        assert!(!head.contains("\nBcc"), "{head}");
        let bare = parsed.raw_message.windows(2).any(|pair| {
            (pair[0] != b'\r' && pair[1] == b'\n') || (pair[0] == b'\r' && pair[1] != b'\n')
        });
        assert!(!bare, "a bare CR or LF");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_mebibytes_are_read_and_one_byte_more_is_not_kept() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let small = newsletter(2, 1).to_string();
    let between = small.find("},{\"email\"").context("two recipients")? + 2;
    let of = |length: usize| {
        let space = " ".repeat(length - small.len());
        [&small[..between], &space, &small[between..]].concat()
    };
    let before = peak_kib(service.pid())?;
    let answer = submit(&service, of((64 << 20) + 1)).await?;
    assert_eq!(problem(&answer, 413).0, "body_too_large");
    assert_eq!(batches(&service).await?, [] as [Value; 0]);
    let answer = submit(&service, of(64 << 20)).await?;
    assert_eq!(answer.status, 202, "{}", answer.text());
    assert_eq!(answer.json::<Value>()?["accepted"], 2);
    let grown = peak_kib(service.pid())? - before;
    assert!(grown < 32 << 10, "{grown} KiB more for bodies of 64 MiB");
    Ok(())
}

/// The head of a request to submit `length` bytes.
fn request(service: &Service, length: usize) -> String {
    let mut head = "POST /v1/batches HTTP/1.1\r\nhost: x\r\n".to_owned();
    write!(
        head,
        "authorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n",
        service.key
    )
    .unwrap();
    head
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_in_the_body_leaves_nothing() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    // More than a spool in memory: its file goes too.
    let body = newsletter(60_000, 3).to_string();
    for (part, reset) in [(1, true), (body.len() / 2, false), (body.len() - 1, true)] {
        let mut stream = TcpStream::connect(("127.0.0.1", site.api_port)).await?;
        stream
            .write_all(request(&service, body.len()).as_bytes())
            .await?;
        stream.write_all(&body.as_bytes()[..part]).await?;
        if reset {
            stream.set_zero_linger()?;
        } else {
            stream.shutdown().await?;
        }
        drop(stream);
    }
    // What came after those is taken, so they are over.
    let id = service.submit(&newsletter(1, 1)).await?;
    service.completed(&id).await?;
    assert_eq!(batches(&service).await?.len(), 1);
    // The files are open and have no name.
    let open_files = format!("/proc/{}/fd", service.pid());
    until("the end of the spools", async || {
        let nameless = std::fs::read_dir(&open_files)?
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.starts_with(site.dir.path()))
            .any(|target| target.to_string_lossy().ends_with("(deleted)"));
        Ok((!nameless).then_some(()))
    })
    .await?;
    assert_eq!(sink.copies(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_body_holds_up_nobody_and_is_taken_when_it_is_whole() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let body = newsletter(3, 1).to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", site.api_port)).await?;
    stream.set_nodelay(true)?;
    stream
        .write_all(request(&service, body.len()).as_bytes())
        .await?;
    let (first, rest) = body.as_bytes().split_at(body.len() / 2);
    for byte in first {
        stream.write_all(&[*byte]).await?;
        tokio::task::yield_now().await;
    }
    // In the middle of it others are served, and nothing of it is seen.
    let id = service.submit(&newsletter(2, 1)).await?;
    service.completed(&id).await?;
    assert_eq!(batches(&service).await?.len(), 1);
    for byte in rest {
        stream.write_all(&[*byte]).await?;
        tokio::task::yield_now().await;
    }
    let mut answer = vec![0; 4096];
    let length = stream.read(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!(batches(&service).await?.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_submissions_at_once_are_all_taken() -> Result<()> {
    let sink = Sink::start().await?;
    let site = Site::unsigned(&sink.address())?;
    let service = site.up().await?;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..100 {
        let client = service.client.clone();
        let mut body = newsletter(20, 7);
        body["campaign"] = json!(format!("c{n}"));
        for (i, recipient) in body["recipients"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .enumerate()
        {
            recipient["email"] = json!(format!("u{n}-{i}@d{}.example", i % 7));
        }
        calls.spawn(async move { client.post("/v1/batches", &body).await });
    }
    let mut ids = Vec::new();
    while let Some(answer) = calls.join_next().await {
        let answer = answer??;
        assert_eq!(answer.status, 202, "{}", answer.text());
        ids.push(word(&answer.json::<Value>()?["id"]));
    }
    for id in &ids {
        let batch = service.completed(id).await?;
        assert_eq!(batch["counters"]["delivered"], 20, "{batch}");
    }
    assert_eq!(batches(&service).await?.len(), 100);
    assert_eq!((sink.distinct(), sink.copies()), (2_000, 2_000));
    Ok(())
}
