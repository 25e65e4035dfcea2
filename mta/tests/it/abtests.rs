//! Tests of variants over HTTP: submitted, sent to a real peer, clicked, decided, sent on.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use hyper::{Method, StatusCode};
use model::{Actor, Fact, Hit, HitKind, MessageId, Timestamp, Verdict};
use serde_json::{Value, json};
use testkit::smtp_peer::{SmtpPeer, Temper};

use crate::harness::{Home, Service, batch, recipients};
use crate::hits::{Tracker, click, now, person};

/// A daemon whose mail goes to a peer, and a tracker's store beside it.
struct Place {
    service: Service,
    peer: SmtpPeer,
    tracker: Tracker,
}

impl Place {
    async fn new() -> Self {
        let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
        let home = Home::new("");
        let shaping = format!(
            "[default]\nrate = \"unlimited\"\n[mx]\n\"*\" = \"{}\"\n",
            peer.address()
        );
        std::fs::write(home.config_file().with_file_name("shaping.toml"), shaping)
            .expect("written");
        let service = Service::at(home).await;
        Self {
            tracker: Tracker::beside(&service).await,
            service,
            peer,
        }
    }

    async fn get(&self, path: &str) -> Value {
        let reply = self.service.api.get(path).await;
        assert_eq!(reply.status, StatusCode::OK, "{path}: {:?}", reply.bytes);
        reply.json()
    }

    async fn until(&self, path: &str, so: impl Fn(&Value) -> bool) -> Value {
        self.service.api.until(path, so).await
    }

    /// Submits and gives the id.
    async fn submit(&self, submission: &Value) -> String {
        let reply = self.service.api.submit(submission).await;
        assert_eq!(reply.status, StatusCode::ACCEPTED, "{:?}", reply.bytes);
        reply.json()["id"].as_str().expect("an id").to_owned()
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.service.api.with_json(Method::POST, path, body).await
    }

    /// The counters once everybody in the test has it: delivered and held back.
    async fn tested(&self, path: &str, of: u64) -> (u64, u64) {
        let count = |batch: &Value, name: &str| batch["counters"][name].as_u64().unwrap_or(0);
        let sum = |batch: &Value| count(batch, "delivered") + count(batch, "scheduled");
        let batch = self
            .until(path, |batch| {
                count(batch, "delivered") > 0 && sum(batch) == of
            })
            .await;
        (count(&batch, "delivered"), count(&batch, "scheduled"))
    }

    async fn rows(&self, id: &str) -> Vec<Value> {
        let path = format!("/v1/batches/{id}/recipients?limit=1000");
        self.get(&path).await["items"]
            .as_array()
            .expect("rows")
            .clone()
    }

    /// These people click, a moment after they got it.
    async fn click(&self, id: &str, rows: &[&Value]) {
        self.hit(id, rows, HitKind::Click, &person()).await;
    }

    /// Hits on these messages, a moment after they were delivered.
    async fn hit(&self, id: &str, rows: &[&Value], kind: HitKind, verdict: &Verdict) {
        let fact = |row: &&Value| {
            let at = row["delivered_at"].as_str().expect("delivered");
            let at = Timestamp::parse(at).expect("a time") + Duration::from_millis(1);
            let message = MessageId {
                batch: id.parse().expect("an id"),
                index: u32::try_from(row["index"].as_u64().expect("an index")).expect("few"),
            };
            Fact::Hit(Box::new(Hit {
                kind,
                verdict: verdict.clone(),
                ..click(message, at)
            }))
        };
        self.tracker.ship(rows.iter().map(fact).collect()).await;
    }

    /// What each address got: its subjects, in order.
    fn received(&self) -> HashMap<String, Vec<String>> {
        let mut all: HashMap<String, Vec<String>> = HashMap::new();
        for message in self.peer.messages() {
            let text = String::from_utf8_lossy(&message.content).into_owned();
            let subject = text.lines().find_map(|line| line.strip_prefix("Subject: "));
            for to in message.recipients {
                let subject = subject.unwrap_or("none").to_owned();
                all.entry(to).or_default().push(subject);
            }
        }
        all
    }

    /// The decisions as they were told. Each may be told again, by whoever finds that it is not known
    /// to have been: it has the same id then.
    async fn decisions(&self, id: &str) -> Vec<Value> {
        let path = format!("/v1/events?types=abtest.decided&batch={id}");
        let answer = self.get(&path).await;
        let mut told = answer["events"].as_array().expect("events").clone();
        told.dedup_by(|later, earlier| later["id"] == earlier["id"]);
        told
    }
}

/// A batch of two subjects.
fn tested(count: usize, ab_test: Value) -> Value {
    let mut submission = batch(&recipients(count, 3));
    submission["variants"] = json!([
        {"name": "A", "subject": "Subject A"},
        {"name": "B", "subject": "Subject B", "html": "<p>B</p><a href=\"https://shop.example/\">shop</a>"},
    ]);
    submission["ab_test"] = ab_test;
    submission
}

/// Each of 120 got the variant of the own row, once; those who were held back got B.
async fn everybody_got_one(place: &Place, id: &str, held: &[&Value]) {
    let received = place.received();
    assert_eq!(received.len(), 120);
    for row in place.rows(id).await {
        let got = &received[row["email"].as_str().expect("an address")];
        let name = row["variant"].as_str().expect("a variant");
        assert_eq!(got, &[format!("Subject {name}")], "{row}");
    }
    let was_held: HashSet<&str> = held
        .iter()
        .filter_map(|row| row["email"].as_str())
        .collect();
    assert!(
        received
            .iter()
            .all(|(to, got)| !was_held.contains(&**to) || got[0] == "Subject B")
    );
    // The time of a message is that of its wave.
    let times: HashSet<String> = place
        .peer
        .messages()
        .iter()
        .filter_map(|message| {
            let text = String::from_utf8_lossy(&message.content).into_owned();
            Some(
                text.lines()
                    .find_map(|line| line.strip_prefix("Date: "))?
                    .to_owned(),
            )
        })
        .collect();
    assert_eq!(times.len(), 2, "{times:?}");
}

/// The whole way: both variants leave, one is clicked, the rest gets that one, and nobody gets two.
#[tokio::test]
async fn the_rest_gets_the_variant_that_people_click() {
    let place = Place::new().await;
    let test = json!({"mode": "winner", "test_fraction": 0.5, "wait": "6s", "metric": "clicks"});
    let reply = place.service.api.submit(&tested(120, test)).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{:?}", reply.bytes);
    let answer = reply.json();
    assert_eq!(answer["ab_test"]["recipients_per_variant"], 30);
    let warning = answer["warnings"].as_array().expect("warnings");
    assert!(
        warning
            .iter()
            .any(|of| of.as_str().is_some_and(|of| of.contains("small test"))),
        "{answer}"
    );
    let id = answer["id"].as_str().expect("an id").to_owned();
    let path = format!("/v1/batches/{id}");
    let test = format!("{path}/ab_test");
    let (sent, kept_back) = place.tested(&path, 120).await;
    assert!((56..=64).contains(&sent), "{sent}");

    let rows = place.rows(&id).await;
    let of_b: Vec<&Value> = rows.iter().filter(|row| row["variant"] == "B").collect();
    let held: Vec<&Value> = rows
        .iter()
        .filter(|row| row["status"] == "scheduled")
        .collect();
    assert!((28..=32).contains(&of_b.len()), "{}", of_b.len());
    assert!(held.len() as u64 == kept_back && held.iter().all(|row| row["variant"].is_null()));
    let why = place
        .get(&format!(
            "/v1/why?message={}",
            held[0]["message_id"].as_str().expect("an id")
        ))
        .await;
    assert!(
        why["constraint"]["detail"]
            .as_str()
            .is_some_and(|of| of.contains("A/B test")),
        "{why}"
    );
    place.click(&id, &of_b).await;

    let decided = place.until(&test, |of| !of["decision"].is_null()).await;
    assert_eq!(
        (&decided["decision"], &decided["variant"]),
        (&json!("confident"), &json!("B"))
    );
    assert!(
        decided["variants"][1]["p_best"].as_f64() > Some(0.99),
        "{decided}"
    );
    assert_eq!(decided["variants"][1]["clicked"], of_b.len());
    let done = place.until(&path, |of| of["state"] == "completed").await;
    assert_eq!(done["counters"]["delivered"], 120);

    everybody_got_one(&place, &id, &held).await;
    let events = place.decisions(&id).await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(
        (&events[0]["variant"], &events[0]["data"]["decision"]),
        (&json!("B"), &json!("confident"))
    );
    assert_eq!(
        events[0]["data"]["record"]["inputs"]["variants"][0]["assigned"],
        sent - of_b.len() as u64
    );
    let report = place.get(&format!("{path}/report")).await;
    let variants = report["variants"].as_array().expect("variants");
    let delivered: Vec<_> = variants
        .iter()
        .map(|of| (&of["variant"], of["delivered"].as_u64()))
        .collect();
    assert_eq!(
        delivered,
        [
            (&json!("A"), Some(sent - of_b.len() as u64)),
            (&json!("B"), Some(kept_back + of_b.len() as u64))
        ]
    );
}

/// A decision by hand takes effect at once, and once.
#[tokio::test]
async fn a_person_may_decide_at_any_time() {
    let place = Place::new().await;
    let test = json!({"test_fraction": 0.2, "wait": "7d"});
    let id = place.submit(&tested(50, test)).await;
    let path = format!("/v1/batches/{id}");
    let decide = format!("{path}/ab_test/decide");
    place
        .until(&path, |of| of["counters"]["delivered"].as_u64() > Some(0))
        .await;
    let (status, problem) = place.post(&decide, &json!({"variant": "C"})).await;
    assert_eq!(
        (status, &problem["errors"][0]["path"]),
        (422, &json!("/variant"))
    );
    let (status, view) = place.post(&decide, &json!({"variant": "A"})).await;
    assert_eq!(
        (status, &view["decision"], &view["variant"]),
        (200, &json!("manual"), &json!("A")),
        "{view}"
    );
    let (status, again) = place.post(&decide, &json!({"variant": "A"})).await;
    assert_eq!((status, &again["at"]), (200, &view["at"]));
    let (status, problem) = place.post(&decide, &json!({"variant": "B"})).await;
    assert_eq!((status, &problem["code"]), (409, &json!("invalid_state")));
    let done = place.until(&path, |of| of["state"] == "completed").await;
    assert_eq!(done["counters"]["delivered"], 50);
    assert!(place.received().values().all(|got| got.len() == 1));
    assert_eq!(place.decisions(&id).await.len(), 1);
    // What is no test has nothing to decide.
    let plain = place.submit(&batch(&recipients(1, 1))).await;
    let reply = place
        .service
        .api
        .get(&format!("/v1/batches/{plain}/ab_test"))
        .await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND);
    let mut split = tested(9, Value::Null);
    split["variants"][1]["from"] = json!({"name": "Other"});
    let split = place.submit(&split).await;
    let (status, _) = place
        .post(
            &format!("/v1/batches/{split}/ab_test/decide"),
            &json!({"variant": "A"}),
        )
        .await;
    assert_eq!(status, 409);
    let done = place
        .until(&format!("/v1/batches/{split}"), |of| {
            of["state"] == "completed"
        })
        .await;
    assert_eq!(done["counters"]["delivered"], 9);
}

/// A pause stops the clock; a cancel ends what is held back.
#[tokio::test]
async fn a_pause_stops_the_clock_and_a_cancel_the_rest() {
    let place = Place::new().await;
    let id = place
        .submit(&tested(40, json!({"test_fraction": 0.5, "wait": "2s"})))
        .await;
    let path = format!("/v1/batches/{id}");
    place.tested(&path, 40).await;
    place.post(&format!("{path}/pause"), &Value::Null).await;
    let paused = place.get(&format!("{path}/ab_test")).await;
    let later = |of: &Value| of["decide_at"].as_str() > paused["decide_at"].as_str();
    // As long as it is paused, the time of the decision moves on.
    let moved = place
        .until(&format!("{path}/ab_test"), |of| later(of))
        .await;
    assert_eq!(moved["decision"], Value::Null);
    place.post(&format!("{path}/resume"), &Value::Null).await;
    let decided = place
        .until(&format!("{path}/ab_test"), |of| !of["decision"].is_null())
        .await;
    assert_eq!(
        (&decided["decision"], &decided["variant"]),
        (&json!("none"), &json!("A"))
    );
    assert!(
        warnings_of(&decided)[0].contains("nothing to decide on"),
        "{decided}"
    );
    assert!(
        decided["at"].as_str() >= decided["decide_at"].as_str(),
        "{decided}"
    );

    let id = place
        .submit(&tested(40, json!({"test_fraction": 0.5, "wait": "7d"})))
        .await;
    let path = format!("/v1/batches/{id}");
    let (_, kept_back) = place.tested(&path, 40).await;
    let (_, ended) = place.post(&format!("{path}/cancel"), &Value::Null).await;
    assert_eq!(
        (&ended["cancelled"], &ended["counters"]["cancelled"]),
        (&json!(kept_back), &json!(kept_back))
    );
    let (status, _) = place
        .post(&format!("{path}/ab_test/decide"), &json!({"variant": "A"}))
        .await;
    assert_eq!(status, 409);
}

/// What cannot be is refused with the place of each mistake; a dry run shows every variant.
#[tokio::test]
async fn variants_are_judged_one_by_one() {
    let service = Service::start().await;
    let mut wrong = tested(3, json!({"wait": "4h", "metric": "opens"}));
    wrong["variants"] = json!([
        {"name": "A", "subject": "{{ name", "html": "<p>{% if %}"},
        {"name": "B", "text": "{{ name | nosuch }}"},
    ]);
    wrong["tracking"] = json!({"opens": false});
    wrong["allow_duplicates"] = json!(true);
    let (status, code, paths) = service.api.submit(&wrong).await.problem();
    assert_eq!((status, &*code), (422, "invalid_field"), "{paths:?}");
    let place = |of: &'_ String| of.split(' ').next().unwrap_or_default().to_owned();
    let paths: HashSet<String> = paths.iter().map(place).collect();
    let expected = [
        "/allow_duplicates",
        "/ab_test/metric",
        "/variants/0/subject",
        "/variants/0/html",
        "/variants/1/text",
    ];
    assert_eq!(paths, expected.map(str::to_owned).into());
    for (change, status, path) in [
        (
            json!({"email": "news@elsewhere.example"}),
            403,
            "/variants/1/from/email",
        ),
        (
            json!({"email": "news@keyless.example"}),
            422,
            "/variants/1/from/email",
        ),
    ] {
        let mut foreign = tested(3, Value::Null);
        foreign["variants"][1]["from"] = change;
        let (found, _, paths) = service.api.submit(&foreign).await.problem();
        assert!(paths.len() == 1 && paths[0].starts_with(path), "{paths:?}");
        assert_eq!(found, status);
    }
    // What every variant has, the batch need not have; a missing variable of any variant rejects.
    let mut own = tested(2, json!({"wait": "1h"}));
    let fields = own.as_object_mut().expect("an object");
    fields.remove("subject");
    fields.remove("html");
    own["variants"] = json!([
        {"name": "A", "subject": "a", "text": "a"},
        {"name": "B", "subject": "b {{ points }}", "text": "b"},
    ]);
    own["recipients"][0]["vars"] = json!({"points": 3});
    let headers = [("content-type", "application/json")];
    let body = serde_json::to_vec(&own).expect("JSON");
    let reply = service
        .api
        .call(
            Method::POST,
            "/v1/batches?dry_run=true",
            &headers,
            body.into(),
        )
        .await;
    let checked = reply.json();
    assert_eq!(
        (reply.status, &checked["accepted"]),
        (StatusCode::OK, &json!(1)),
        "{checked}"
    );
    assert_eq!(checked["rejected"][0]["code"], "missing_variable");
    let subject = |at: usize| {
        checked["variants"][at]["message"]
            .as_str()
            .map(str::to_owned)
    };
    assert!(
        subject(0).is_some_and(|text| text.contains("Subject: a\r\n")),
        "{checked}"
    );
    assert!(subject(1).is_some_and(|text| text.contains("Subject: b 3\r\n")));
    assert_eq!(checked["variants"][1]["variant"], "B");
    assert!(checked["ab_test"]["chance_of_picking_right"].is_number());
    service.api.assert_nothing_accepted().await;
}

fn of_variant<'r>(rows: &'r [Value], name: &str) -> Vec<&'r Value> {
    rows.iter().filter(|row| row["variant"] == name).collect()
}

fn warnings_of(answer: &Value) -> Vec<&str> {
    let all = answer["warnings"].as_array().expect("warnings").iter();
    all.filter_map(Value::as_str).collect()
}

/// Submits a test of 60, half of them in it, by this metric: its id, and the rows once the test left.
async fn sent(place: &Place, metric: &str, caveat: Option<&str>) -> (String, Vec<Value>) {
    let test = json!({"test_fraction": 0.5, "wait": "8s", "metric": metric});
    let reply = place.service.api.submit(&tested(60, test)).await;
    assert_eq!(reply.status, StatusCode::ACCEPTED, "{:?}", reply.bytes);
    let answer = reply.json();
    let id = answer["id"].as_str().expect("an id").to_owned();
    place.tested(&format!("/v1/batches/{id}"), 60).await;
    let test = place.get(&format!("/v1/batches/{id}/ab_test")).await;
    for answer in [&answer, &test] {
        let (small, rest): (Vec<_>, Vec<_>) = warnings_of(answer)
            .into_iter()
            .partition(|warning| warning.contains("a small test: 15 recipients"));
        assert_eq!(
            (small.len(), rest.len()),
            (1, caveat.iter().count()),
            "{answer}"
        );
        let is_told = |caveat: &str| rest.iter().any(|warning| warning.contains(caveat));
        assert!(caveat.is_none_or(is_told), "{answer}");
    }
    assert_eq!(test["plan"], answer["ab_test"]);
    let rows = place.rows(&id).await;
    (id, rows)
}

/// The test of a batch once it is decided.
async fn decided(place: &Place, id: &str) -> Value {
    let path = format!("/v1/batches/{id}/ab_test");
    place.until(&path, |of| !of["decision"].is_null()).await
}

/// Each metric counts what it says, of people alone; what a machine did is told.
#[tokio::test]
async fn every_metric_counts_what_it_says() {
    let place = Place::new().await;
    let machine = Verdict {
        actor: Actor::Machine,
        ..person()
    };
    let (opens, rows) = sent(&place, "opens", Some("opens are a weak measure")).await;
    let (a, b) = (of_variant(&rows, "A"), of_variant(&rows, "B"));
    place.hit(&opens, &b, HitKind::Open, &person()).await;
    place.hit(&opens, &a, HitKind::Open, &machine).await;
    // Without an open a click says nothing of those who opened.
    let caveat = Some("click_to_open does not compare subjects");
    let (per_open, rows) = sent(&place, "click_to_open", caveat).await;
    let (a, b) = (of_variant(&rows, "A"), of_variant(&rows, "B"));
    let both: Vec<&Value> = a.iter().chain(&b).copied().collect();
    place.hit(&per_open, &both, HitKind::Open, &person()).await;
    place.hit(&per_open, &b, HitKind::Click, &person()).await;
    place.hit(&per_open, &a, HitKind::Click, &machine).await;
    let (bought, rows) = sent(&place, "conversion", None).await;
    let b = of_variant(&rows, "B");
    for row in &b {
        let body = json!({"type": "conversion", "message_id": row["message_id"], "id": row["index"].to_string()});
        for _ in 0..2 {
            let (status, answer) = place.post("/v1/events", &body).await;
            assert_eq!(status, 202, "{answer}");
        }
    }

    for (id, machines, warns) in [
        (&opens, 0.5, true),
        (&per_open, 0.5, true),
        (&bought, 0.0, false),
    ] {
        let test = decided(&place, id).await;
        assert_eq!(
            (&test["decision"], &test["variant"]),
            (&json!("confident"), &json!("B")),
            "{test}"
        );
        let (of_a, of_b) = (&test["variants"][0], &test["variants"][1]);
        assert_eq!(
            (&of_a["rate"], &of_b["rate"]),
            (&json!(0.0), &json!(1.0)),
            "{test}"
        );
        assert!(of_a["compared"].as_u64() > Some(12), "{test}");
        let share = test["machine_share"].as_f64().expect("a share");
        assert!((share - machines).abs() < 0.1, "{test}");
        let told = warnings_of(&test)
            .iter()
            .any(|of| of.contains("is machines"));
        assert_eq!(told, warns, "{test}");
    }
}

/// The part of a variant leaves at its own time, and the clock begins with the last of them.
#[tokio::test]
async fn a_variant_leaves_at_its_own_time() {
    let place = Place::new().await;
    let mut submission = tested(40, json!({"test_fraction": 0.5, "wait": "1s"}));
    let at = now() + Duration::from_secs(4);
    let at = Timestamp::from_millis(at.millis() / 1_000 * 1_000);
    submission["variants"][1]["send_at"] = json!(at);
    let id = place.submit(&submission).await;
    let path = format!("/v1/batches/{id}");
    let sent = |of: &Value| of["counters"]["delivered"].as_u64() > Some(8);
    place.until(&path, sent).await;
    if now() < at {
        let rows = place.rows(&id).await;
        let b = of_variant(&rows, "B");
        assert!(!b.is_empty() && b.iter().all(|row| row["status"] == "scheduled"));
    }
    let test = place.get(&format!("{path}/ab_test")).await;
    assert_eq!(
        test["decide_at"],
        json!(at + Duration::from_secs(1)),
        "{test}"
    );
    let done = place.until(&path, |of| of["state"] == "completed").await;
    assert_eq!(done["counters"]["delivered"], 40);
    let test = place.get(&format!("{path}/ab_test")).await;
    assert!(test["at"].as_str() >= test["decide_at"].as_str(), "{test}");
    let rows = place.rows(&id).await;
    let late = |row: &&Value| row["delivered_at"].as_str() >= json!(at).as_str();
    let b = of_variant(&rows, "B");
    assert!(!b.is_empty() && b.iter().all(late), "{b:?}");
    let early = of_variant(&rows, "A").into_iter().filter(|row| !late(row));
    assert!(early.count() > 8);
    let date = |subject: &str| -> HashSet<String> {
        let messages = place.peer.messages();
        let texts = messages
            .iter()
            .map(|message| String::from_utf8_lossy(&message.content));
        let theirs = texts.filter(|text| text.contains(subject));
        theirs
            .filter_map(|text| {
                Some(
                    text.lines()
                        .find_map(|line| line.strip_prefix("Date: "))?
                        .to_owned(),
                )
            })
            .collect()
    };
    // Nobody clicked, so the rest got the first: at the decision.
    assert_eq!((date("Subject A").len(), date("Subject B").len()), (2, 1));
}

/// A variant that too many complain about is not chosen, however well it is clicked; a complaint is
/// the recipient's, counts once, and stops what is not awaited.
#[tokio::test]
async fn a_variant_that_is_complained_about_is_not_chosen() {
    let place = Place::new().await;
    let mut submission = tested(120, json!({"test_fraction": 0.5, "wait": "8s"}));
    submission["guardrails"] = json!({"complaint_rate": 0.1, "min_delivered": 20});
    let id = place.submit(&submission).await;
    let path = format!("/v1/batches/{id}");
    let (delivered, _) = place.tested(&path, 120).await;
    let rows = place.rows(&id).await;
    let b = of_variant(&rows, "B");
    place.click(&id, &b).await;
    // More than a tenth of those who got it, and less of all.
    let angry = 5;
    assert!(angry * 10 > b.len() && (angry as u64) * 10 < delivered);
    for row in b.iter().take(angry) {
        let mut body = json!({"type": "email.complained", "message_id": row["message_id"],
                              "id": format!("fbl-{}", row["index"]), "data": {"provider": "x"}});
        for _ in 0..2 {
            let (status, answer) = place.post("/v1/events", &body).await;
            assert_eq!(status, 202, "{answer}");
        }
        // Told twice, in other words.
        body["id"] = json!(null);
        assert_eq!(place.post("/v1/events", &body).await.0, 202);
    }
    let nobody = json!({"type": "email.complained", "prospect_id": "p-1"});
    let (status, problem) = place.post("/v1/events", &nobody).await;
    assert_eq!(
        (status, &problem["errors"][0]["path"]),
        (422, &json!("/message_id"))
    );

    let test = decided(&place, &id).await;
    assert_eq!(test["variant"], "A", "{test}");
    assert_eq!(test["variants"][1]["complained"], angry, "{test}");
    assert_eq!(test["variants"][1]["breach"], "complaint_rate", "{test}");
    let done = place.until(&path, |of| of["state"] == "completed").await;
    assert_eq!(done["counters"]["complained"], angry, "{done}");
    assert_eq!(done["pause_reason"], Value::Null, "{done}");
    let rows = place.rows(&id).await;
    let complained = rows.iter().filter(|row| row["complained_at"].is_string());
    let complained: Vec<&Value> = complained.collect();
    assert!(complained.len() == angry && complained.iter().all(|row| row["variant"] == "B"));
    let email = complained[0]["email"].as_str().expect("an address");
    let known = place.get(&format!("/v1/suppressions/{email}")).await;
    assert_eq!(known["items"][0]["reason"], "complaint", "{known}");
    let report = place.get(&format!("{path}/report")).await;
    assert_eq!(report["variants"][1]["complained"], angry, "{report}");
    let events = place
        .get(&format!("/v1/events?types=email.complained&batch={id}"))
        .await;
    let events = events["events"].as_array().expect("events");
    assert_eq!(events.len(), angry);
    assert_eq!(
        (&events[0]["variant"], &events[0]["data"]["provider"]),
        (&json!("B"), &json!("x"))
    );
}
