//! The executable itself: killed at any moment, ended by SIGTERM, misconfigured.

use crate::harness::{Place, ask, token};
use links::Kind;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

struct Process {
    child: Child,
    lines: BufReader<ChildStderr>,
    addr: SocketAddr,
}

fn command(place: &Place) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tracker"));
    command
        .arg("--config")
        .arg(place.config_file())
        .env_remove("HIKYAKU_LOG")
        .env("HIKYAKU_LOG_FORMAT", "json")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

impl Process {
    fn start(place: &Place) -> Self {
        let mut child = command(place).spawn().expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let addr = loop {
            let mut line = String::new();
            assert_ne!(
                lines.read_line(&mut line).expect("a line"),
                0,
                "ended without listening"
            );
            let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            if line["message"] == "tracker is up" {
                break line["addr"]
                    .as_str()
                    .expect("an address")
                    .parse()
                    .expect("an address");
            }
        };
        Self { child, lines, addr }
    }

    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }

    fn terminate(mut self) -> (ExitStatus, String) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .expect("kill runs");
        assert!(sent.success());
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("lines");
        (self.child.wait().expect("ended"), rest)
    }
}

/// Clients that each click for one recipient after the other, until told to stop.
struct Clients {
    answered: Arc<AtomicU32>,
    asked: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    tasks: tokio::task::JoinSet<()>,
}

impl Clients {
    fn start(addr: SocketAddr, next: &Arc<AtomicU32>, answered: &Arc<AtomicU32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (next, answered, stop) = (next.clone(), answered.clone(), stop.clone());
            tasks.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    let path = format!("/c/{}", token(Kind::Click, index));
                    match ask(addr, "GET", &path, &[], b"").await {
                        Ok(answer) => {
                            assert_eq!(answer.status, 302);
                            answered.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(_) => return,
                    }
                }
            });
        }
        Self {
            answered: answered.clone(),
            asked: next.clone(),
            stop,
            tasks,
        }
    }

    async fn until_answered(&self, count: u32) {
        crate::harness::until("so many answers", async || {
            self.answered.load(Ordering::SeqCst) >= count
        })
        .await;
    }

    async fn end(mut self) -> u32 {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic");
        }
        self.asked.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answered_click_is_counted_once_across_kills() {
    const RECIPIENTS: u32 = 20_000;
    let place = Place::new(RECIPIENTS).await;
    let next = Arc::new(AtomicU32::new(0));
    let answered = Arc::new(AtomicU32::new(0));
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut goal = 0;
    for _ in 0..6 {
        let process = Process::start(&place);
        let clients = Clients::start(process.addr, &next, &answered);
        goal = answered.load(Ordering::SeqCst).max(goal) + rng.u32(1..400);
        clients.until_answered(goal).await;
        process.kill();
        let asked = clients.end().await;
        assert!(asked < RECIPIENTS, "seed {seed}");
    }
    let process = Process::start(&place);
    let least = u64::from(answered.load(Ordering::SeqCst));
    let most = u64::from(next.load(Ordering::SeqCst));
    let (status, rest) = process.terminate();
    assert!(status.success(), "{rest}");
    let counters = place.counters(|_| true).await;
    let clicked = counters.clicked_unique;
    assert!(
        (least..=most).contains(&clicked),
        "seed {seed}: {least} <= {clicked} <= {most}"
    );
    // Each recipient clicked once, so a hit counted twice would show.
    assert_eq!(counters.clicked_total, clicked, "seed {seed}");
}

#[tokio::test]
async fn sigterm_ships_what_was_answered_and_exits_0() {
    let place = Place::new(10).await;
    let process = Process::start(&place);
    for index in 0..10 {
        let path = format!("/o/{}.gif", token(Kind::Open, index));
        ask(process.addr, "GET", &path, &[], b"")
            .await
            .expect("an answer");
    }
    let (status, rest) = process.terminate();
    assert_eq!(status.code(), Some(0), "{rest}");
    assert!(rest.contains("tracker has ended"), "{rest}");
    assert_eq!(place.counters(|_| true).await.opened_unique, 10);
}

#[tokio::test]
async fn a_bad_configuration_is_2_and_a_taken_port_1() {
    let place = Place::new(1).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").to_string();
    for (name, value, code, told) in [
        ("HIKYAKU__TRACKER__LISTEN", "nowhere", 2, "tracker.listen"),
        (
            "HIKYAKU__TRACKER__LISTEN",
            port.as_str(),
            1,
            "tracker.listen",
        ),
    ] {
        let output = command(&place).env(name, value).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(told), "{text}");
    }
}
