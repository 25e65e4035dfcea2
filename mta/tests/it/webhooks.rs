//! Webhooks from outside: real calls, a real receiver.

use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use testkit::webhook::{Delivery, HookReceiver, Mood};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Caller, Home, KEY, Reply, Service};

const PATIENCE: Duration = Duration::from_secs(60);
const ALLOW: &str = "\n[webhooks]\nallow_private = [\"127.0.0.0/8\"]\n";

/// A service that may push to loopback.
async fn start() -> Service {
    let home = Home::new("");
    edit(&home, |text| text + ALLOW);
    Service::at(home).await
}

fn edit(home: &Home, change: impl FnOnce(String) -> String) {
    let text = std::fs::read_to_string(home.config_file()).expect("read");
    std::fs::write(home.config_file(), change(text)).expect("written");
}

async fn call(api: &Caller, method: Method, path: &str, body: &Value) -> Reply {
    api.call(method, path, &[], Bytes::from(body.to_string()))
        .await
}

async fn create(api: &Caller, body: &Value) -> Value {
    let made = call(api, Method::POST, "/v1/webhooks", body).await;
    assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
    made.json()
}

fn path_of(hook: &Value) -> String {
    format!("/v1/webhooks/{}", hook["id"].as_str().expect("an id"))
}

/// Makes an event about a person: the address is suppressed, or no longer.
async fn happen(api: &Caller, address: &str, added: bool) {
    let method = if added { Method::PUT } else { Method::DELETE };
    let path = format!("/v1/suppressions/{address}");
    let reply = api.call(method, &path, &[], Bytes::new()).await;
    assert!(reply.status.is_success(), "{reply:?}");
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} did not happen"),
    }
}

/// Reads the webhook until it is so.
async fn until(api: &Caller, hook: &Value, what: &str, so: impl Fn(&Value) -> bool) -> Value {
    within(what, async {
        loop {
            let now = api.get(&path_of(hook)).await.json();
            if so(&now) {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    })
    .await
}

/// The events that a receiver has kept, the first time of each.
fn kept(deliveries: &[Delivery]) -> Vec<Value> {
    let mut events: Vec<Value> = Vec::new();
    for delivery in deliveries.iter().filter(|delivery| delivery.is_taken) {
        let body: Value = serde_json::from_slice(&delivery.body).expect("JSON");
        for event in body["events"].as_array().expect("events") {
            if !events.iter().any(|known| known["id"] == event["id"]) {
                events.push(event.clone());
            }
        }
    }
    events
}

#[tokio::test]
async fn events_arrive_in_order_through_every_trouble() {
    let (service, receiver) = (start().await, HookReceiver::start().await.expect("one"));
    let asked = json!({"url": receiver.url("/hook?a=b"), "types": ["suppression.added", "suppression.removed"], "secret": "two\nlines"});
    let refused = call(&service.api, Method::POST, "/v1/webhooks", &asked).await;
    assert_eq!(refused.problem().2, ["/secret invalid_field"]);
    let asked = json!({"url": receiver.url("/hook?a=b"), "types": ["suppression.added", "suppression.removed"]});
    let hook = create(&service.api, &asked).await;
    assert!(
        hook["secret"]
            .as_str()
            .expect("a secret")
            .starts_with("whsec_"),
        "{hook}"
    );
    let shown = service.api.get(&path_of(&hook)).await.json();
    assert_eq!(
        (shown.get("secret"), &shown["state"]),
        (None, &json!("active"))
    );

    receiver.mood(Mood::Refuse(500));
    happen(&service.api, "a@x.example", true).await;
    let twice = within("two tries", receiver.until(|got| got.len() >= 2)).await;
    assert_eq!(twice[0].path, "/hook?a=b");
    assert_eq!(twice[0].header("content-type"), Some("application/json"));
    assert_eq!(twice[0].header("webhook-id"), twice[1].header("webhook-id"));
    assert_eq!(twice[0].body, twice[1].body);
    let failing = until(&service.api, &hook, "failing", |now| {
        now["state"] == "failing"
    })
    .await;
    assert_eq!(failing["failure"]["status"], 500, "{failing}");
    for added in [false, true, false] {
        happen(&service.api, "a@x.example", added).await;
        happen(&service.api, "b@x.example", !added).await;
    }
    // Whatever a person changes, it is tried at once.
    receiver.mood(Mood::TakeInSilence);
    call(&service.api, Method::PATCH, &path_of(&hook), &json!({})).await;
    within("a silent take", receiver.until(|got| !kept(got).is_empty())).await;
    receiver.mood(Mood::Take);
    let got = within("all of it", receiver.until(|got| kept(got).len() >= 7)).await;
    let events = kept(&got);
    let listed = service.api.get("/v1/events?limit=1000").await.json();
    assert_eq!(json!(events), listed["events"]);
    let rests = |now: &Value| now["cursor"] == listed["next"];
    let now = until(&service.api, &hook, "rest", rests).await;
    assert_eq!(
        (&now["state"], &now["failure"]),
        (&json!("active"), &Value::Null)
    );
    let metrics = service.metrics().await;
    for result in ["delivered", "refused", "failed"] {
        let line = format!("hikyaku_webhook_deliveries_total{{result=\"{result}\"}} ");
        let count = metrics.lines().find_map(|found| found.strip_prefix(&line));
        assert_ne!(count, Some("0"), "{result}");
    }
    service.stop().await;
}

#[tokio::test]
async fn who_hangs_or_drips_holds_up_nobody_and_is_let_go() {
    let (service, good) = (start().await, HookReceiver::start().await.expect("one"));
    let (hanging, dripping) = (
        HookReceiver::start().await.expect("one"),
        HookReceiver::start().await.expect("one"),
    );
    hanging.mood(Mood::Hang);
    dripping.mood(Mood::Drip);
    let hangs = create(&service.api, &json!({"url": hanging.url("/")})).await;
    let drips = create(&service.api, &json!({"url": dripping.url("/")})).await;
    create(&service.api, &json!({"url": good.url("/")})).await;
    for number in 0..8_usize {
        happen(&service.api, &format!("p{number}@x.example"), true).await;
        within("a delivery", good.until(|got| kept(got).len() > number)).await;
    }
    within("both wait", async {
        tokio::join!(hanging.open(1), dripping.open(1))
    })
    .await;
    // One delivery each, however much has happened since.
    assert_eq!((hanging.got().len(), dripping.got().len()), (1, 1));
    let second = Duration::from_secs(1);
    let deleted = call(&service.api, Method::DELETE, &path_of(&hangs), &json!({})).await;
    assert_eq!(deleted.status, StatusCode::NO_CONTENT);
    let ended = tokio::time::timeout(second, hanging.open(0)).await;
    assert!(ended.is_ok(), "a deleted webhook goes on");
    assert_eq!(
        service.api.get(&path_of(&hangs)).await.problem().1,
        "not_found"
    );
    let no = json!({"enabled": false});
    let disabled = call(&service.api, Method::PATCH, &path_of(&drips), &no).await;
    assert_eq!(disabled.json()["state"], "disabled");
    let ended = tokio::time::timeout(second, dripping.open(0)).await;
    assert!(ended.is_ok(), "a disabled webhook goes on");
    // Enabled again, it goes on where it was.
    dripping.mood(Mood::Take);
    call(
        &service.api,
        Method::PATCH,
        &path_of(&drips),
        &json!({"enabled": true}),
    )
    .await;
    within("the rest", dripping.until(|got| kept(got).len() == 8)).await;
    // A process that ends does not wait for who hangs.
    good.mood(Mood::Hang);
    happen(&service.api, "last@x.example", true).await;
    within("it hangs", good.open(1)).await;
    let home = service.stop().await;
    good.mood(Mood::Take);
    let service = Service::at(home).await;
    within("it comes again", good.until(|got| kept(got).len() == 9)).await;
    service.stop().await;
}

#[tokio::test]
async fn events_are_told_again_from_a_cursor_or_a_time() {
    let (service, receiver) = (start().await, HookReceiver::start().await.expect("one"));
    happen(&service.api, "before@x.example", true).await;
    let hook = create(&service.api, &json!({"url": receiver.url("/")})).await;
    for number in 0..3 {
        happen(&service.api, &format!("p{number}@x.example"), true).await;
    }
    let got = within("the events", receiver.until(|got| kept(got).len() == 3)).await;
    let emails = |events: &[Value]| -> Vec<String> {
        let email = |event: &Value| event["recipient"]["email"].as_str().map(str::to_owned);
        events.iter().filter_map(email).collect()
    };
    assert_eq!(
        emails(&kept(&got)),
        ["p0@x.example", "p1@x.example", "p2@x.example"]
    );
    let replay = format!("{}/replay", path_of(&hook));
    let from = async |from: &Value| call(&service.api, Method::POST, &replay, from).await;
    let rest = async |seen: usize, count: usize| {
        let again = receiver.until(|got| kept(got.get(seen..).unwrap_or_default()).len() >= count);
        let got = within("a replay", again).await;
        emails(&kept(&got[seen..]))
    };
    let first = service.api.get("/v1/events?limit=2").await.json();
    let seen = receiver.got().len();
    let told = from(&json!({"from": first["next"]})).await;
    assert_eq!(
        (told.status, &told.json()["cursor"]),
        (StatusCode::OK, &first["next"])
    );
    assert_eq!(rest(seen, 2).await, ["p1@x.example", "p2@x.example"]);
    until(&service.api, &hook, "rest", |now| {
        now["cursor"] != first["next"]
    })
    .await;
    let seen = receiver.got().len();
    from(&json!({"from": "2020-01-01T00:00:00Z"})).await;
    assert_eq!(rest(seen, 4).await[0], "before@x.example");
    for (body, expected) in [
        (json!({}), "/from invalid_field"),
        (json!({"from": "nonsense"}), "/from invalid_field"),
        (json!({"from": 5}), "/from invalid_field"),
        (
            json!({"from": "2020-01-01T00:00:00Z", "to": 1}),
            "/to unknown_field",
        ),
    ] {
        assert_eq!(from(&body).await.problem().2, [expected], "{body}");
    }
    service.stop().await;
}

#[tokio::test]
async fn private_targets_are_refused_when_made_and_when_connected_to() {
    let (service, receiver) = (start().await, HookReceiver::start().await.expect("one"));
    let hook = create(&service.api, &json!({"url": receiver.url("/")})).await;
    receiver.mood(Mood::Redirect);
    happen(&service.api, "a@x.example", true).await;
    let status = |now: &Value| now["failure"]["status"] == 307;
    until(&service.api, &hook, "a redirect", status).await;
    assert!(
        receiver.got().iter().all(|one| one.path == "/"),
        "redirects are not followed"
    );
    receiver.mood(Mood::Take);
    let home = service.stop().await;
    let seen = receiver.got().len();

    // It was allowed, and is no longer.
    edit(&home, |text| text.replace(ALLOW, ""));
    let service = Service::at(home).await;
    call(&service.api, Method::PATCH, &path_of(&hook), &json!({})).await;
    let refused = |now: &Value| {
        let reason = now["failure"]["reason"].as_str();
        reason.is_some_and(|reason| reason.contains("127.0.0.1 is not public"))
    };
    until(&service.api, &hook, "a refusal", refused).await;
    assert_eq!(receiver.got().len(), seen);
    for url in [
        &*receiver.url("/"),
        "http://localhost/",
        "https://sub.localhost/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "http://0.0.0.0/",
        "http://[64:ff9b::7f00:1]/",
    ] {
        let made = call(
            &service.api,
            Method::POST,
            "/v1/webhooks",
            &json!({"url": url}),
        )
        .await;
        assert_eq!(made.problem().2, ["/url invalid_field"], "{url}");
        let changed = call(
            &service.api,
            Method::PATCH,
            &path_of(&hook),
            &json!({"url": url}),
        )
        .await;
        assert_eq!(changed.problem().0, 422, "{url}");
    }
    // A public address, and a name that cannot be looked up now, are taken.
    for url in ["https://192.88.99.1/", "https://campaigns.example/"] {
        create(&service.api, &json!({"url": url, "enabled": false})).await;
    }
    service.stop().await;
}

#[tokio::test]
async fn a_webhook_is_its_accounts_and_takes_both_scopes() {
    let service = start().await;
    let url = json!({"url": "https://campaigns.example/", "enabled": false});
    let hook = create(&service.api, &url).await;
    let (reader, other) = (
        service.api.with_key("hk_read"),
        service.api.with_key("hk_other"),
    );
    assert_eq!(reader.get(&path_of(&hook)).await.status, StatusCode::OK);
    for (method, path) in [
        (Method::POST, "/v1/webhooks".to_owned()),
        (Method::PATCH, path_of(&hook)),
        (Method::DELETE, path_of(&hook)),
        (Method::POST, format!("{}/replay", path_of(&hook))),
    ] {
        let refused = call(&reader, method.clone(), &path, &url).await;
        assert_eq!(refused.problem().1, "forbidden_scope", "{method} {path}");
    }
    assert_eq!(other.get(&path_of(&hook)).await.problem().1, "not_found");
    let changed = call(&other, Method::PATCH, &path_of(&hook), &json!({})).await;
    assert_eq!(changed.problem().1, "not_found");
    let gone = call(&other, Method::DELETE, &path_of(&hook), &json!({})).await;
    assert_eq!(gone.problem().1, "not_found");
    let list = async |api: &Caller| {
        let list = api.get("/v1/webhooks").await.json();
        list["items"].as_array().map(Vec::len)
    };
    assert_eq!(
        (list(&service.api).await, list(&other).await),
        (Some(1), Some(0))
    );
    let types =
        json!({"url": "https://campaigns.example/", "types": ["email.opened", "email.lost"]});
    let refused = call(&service.api, Method::POST, "/v1/webhooks", &types).await;
    assert!(
        refused.json()["detail"]
            .as_str()
            .expect("text")
            .contains("email.lost")
    );
    let gone = call(&service.api, Method::DELETE, &path_of(&hook), &json!({})).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert_eq!(list(&service.api).await, Some(0));
    service.stop().await;
}

/// A reader of the stream: its connection, and what came so far.
struct Reader {
    stream: TcpStream,
    text: String,
}

impl Reader {
    async fn connect(service: &Service, path: &str, last: Option<&str>) -> Self {
        let authority = service.api.base().trim_start_matches("http://").to_owned();
        let mut stream = TcpStream::connect(&authority).await.expect("connected");
        let last = last.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {authority}\r\nAuthorization: Bearer {KEY}\r\nAccept: text/event-stream\r\n{last}\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("sent");
        Self {
            stream,
            text: String::new(),
        }
    }

    /// The values of a field so far.
    fn field(&self, name: &str) -> Vec<&str> {
        let start = format!("{name}: ");
        let lines = self.text.lines();
        lines.filter_map(|line| line.strip_prefix(&start)).collect()
    }

    /// The numbers of the people told of so far.
    fn people(&self) -> Vec<usize> {
        let email = |json: &str| {
            let event: Value = serde_json::from_str(json).ok()?;
            let email = event["recipient"]["email"].as_str()?;
            email.strip_prefix('p')?.split_once('@')?.0.parse().ok()
        };
        self.field("data").into_iter().filter_map(email).collect()
    }

    /// Reads until so many people were told of, and the cursor after them.
    async fn read(&mut self, count: usize) {
        while self.people().len() < count || !self.text.ends_with("\n\n\r\n") {
            let mut some = vec![0; 4_096];
            let read = within("more of the stream", self.stream.read(&mut some)).await;
            let read = read.expect("bytes");
            assert_ne!(read, 0, "the stream ended: {}", self.text);
            self.text.push_str(&String::from_utf8_lossy(&some[..read]));
        }
    }
}

#[tokio::test]
async fn many_readers_follow_the_stream_and_come_back_where_they_were() {
    const READERS: usize = 20;
    let service = Service::start().await;
    let mut readers = Vec::new();
    for _ in 0..READERS {
        readers.push(Reader::connect(&service, "/v1/events", None).await);
    }
    for number in 0..10 {
        happen(&service.api, &format!("p{number}@x.example"), true).await;
    }
    let ten: Vec<usize> = (0..10).collect();
    for reader in &mut readers {
        reader.read(10).await;
        assert_eq!(reader.people(), ten);
    }
    // Half of them lose their connection, and miss nothing; what the query says is older.
    let mut back = Vec::new();
    for reader in readers.drain(..READERS / 2) {
        let last = *reader.field("id").last().expect("an id");
        let path = "/v1/events?after=e1-0&types=suppression.added";
        back.push(Reader::connect(&service, path, Some(last)).await);
    }
    for number in 10..20 {
        happen(&service.api, &format!("p{number}@x.example"), true).await;
    }
    for reader in &mut readers {
        reader.read(20).await;
        assert_eq!(reader.people(), (0..20).collect::<Vec<_>>());
    }
    for reader in &mut back {
        reader.read(10).await;
        assert_eq!(reader.people(), (10..20).collect::<Vec<_>>());
    }
    drop((readers, back));
    service.stop().await;
}
