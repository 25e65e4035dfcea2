//! No token but ours leads anywhere.

use crate::harness::{HOST, Place, token};
use links::Kind;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn random(random: &mut fastrand::Rng, length: usize) -> String {
    (0..length)
        .map(|_| char::from(ALPHABET[random.usize(..64)]))
        .collect()
}

fn mutated(random: &mut fastrand::Rng, good: &str) -> String {
    let mut bytes = good.as_bytes().to_vec();
    let at = random.usize(..bytes.len());
    match random.u8(..4) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, ALPHABET[random.usize(..64)]),
        2 => drop(bytes.remove(at)),
        _ => bytes[at] = ALPHABET[random.usize(..64)],
    }
    String::from_utf8(bytes).expect("ASCII")
}

/// Many requests on one connection, as fast as they are answered.
async fn statuses(addr: std::net::SocketAddr, paths: &[String]) -> Vec<u16> {
    let requests: Vec<String> = paths
        .iter()
        .enumerate()
        .map(|(at, path)| {
            let last = if at + 1 == paths.len() {
                "Connection: close\r\n"
            } else {
                ""
            };
            format!("HEAD {path} HTTP/1.1\r\nHost: {HOST}\r\n{last}\r\n")
        })
        .collect();
    let answer = crate::harness::raw(addr, requests.concat().as_bytes()).await;
    let text = String::from_utf8(answer.expect("answers")).expect("heads are ASCII");
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("HTTP/1.1 "));
    lines
        .map(|line| {
            line.split(' ')
                .next()
                .expect("a status")
                .parse()
                .expect("a number")
        })
        .collect()
}

#[tokio::test]
async fn ten_thousand_bad_tokens_redirect_nobody() {
    const ROUND: usize = 100;
    let place = Place::new(1).await;
    let running = place.start().await;
    let seed = fastrand::u64(..);
    let mut rng = fastrand::Rng::with_seed(seed);
    let good = token(Kind::Click, 0);
    let mut asked = 0;
    while asked < 10_000 {
        let bad: Vec<String> = (0..ROUND)
            .map(|at| {
                let length = rng.usize(..200);
                if at % 2 == 0 {
                    random(&mut rng, length)
                } else {
                    mutated(&mut rng, &good)
                }
            })
            .filter(|bad| *bad != good)
            .map(|bad| format!("/c/{bad}"))
            .collect();
        let answered = statuses(running.tracker.addr(), &bad).await;
        assert_eq!(answered.len(), bad.len(), "seed {seed}");
        let strange = bad
            .iter()
            .zip(&answered)
            .find(|(_, status)| **status != 404);
        assert_eq!(strange, None, "seed {seed}");
        asked += bad.len();
    }
    // Tokens of other kinds and hosts are as bad.
    for path in [
        format!("/c/{}", token(Kind::Open, 0)),
        format!("/c/{}", token(Kind::Unsubscribe, 0)),
        format!("/u/{good}"),
    ] {
        let answer = running.get(&path).await;
        assert_eq!((answer.status, answer.header("location")), (404, None));
        assert!(answer.text().contains("<h1>This link does not work</h1>"));
    }
    let elsewhere = [("Host", "t.other.example")];
    let answer = running
        .ask("GET", &format!("/c/{good}"), &elsewhere, b"")
        .await;
    assert_eq!((answer.status, answer.header("location")), (404, None));
    assert_eq!(running.get(&format!("/c/{good}")).await.status, 302);
    running.drain().await;
    assert_eq!(place.hits(0).await.len(), 1);
}
