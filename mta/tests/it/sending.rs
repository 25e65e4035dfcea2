//! Sending from the store to scripted receiving servers and back: one behaviour a test, both ends
//! looked at.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use model::{Class, Status};
use smtp::ServerEvent;
use testkit::smtp_peer::{Answer, SmtpPeer, Temper};

use crate::station::{Station, people};

#[tokio::test]
async fn a_batch_goes_out_signed_and_every_outcome_is_in_the_store() {
    let peer = SmtpPeer::start(Temper::accepting()).await.expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 300)).await;
    let running = station.start().await;
    let counters = station.finished(batch).await;
    assert_eq!((counters.delivered, counters.accepted), (300, 300));
    let messages = peer.messages();
    let recipients: HashSet<_> = messages.iter().flat_map(|message| message.recipients.clone()).collect();
    assert_eq!((messages.len(), recipients.len()), (300, 300));
    for message in &messages {
        let text = String::from_utf8_lossy(&message.content);
        assert!(text.contains("DKIM-Signature:"), "{text}");
        assert!(message.reverse_path.starts_with(&format!("bounce+{batch}.")), "{}", message.reverse_path);
    }
    let row = station.row(batch, 7).await;
    assert_eq!((row.status, row.attempts, row.smtp_code), (Status::Delivered, 1, Some(250)));
    assert!(row.host.is_some_and(|host| host.contains("127.0.0.1")));
    running.drain().await;
}

#[tokio::test]
async fn refusals_are_read_and_what_is_temporary_is_tried_again() {
    let busy = AtomicU32::new(0);
    let temper = Temper::accepting().rule(move |question| {
        if question.event != ServerEvent::Rcpt {
            return None;
        }
        match question.recipient {
            "gone@x.example" => Some(Answer::reply(550, "5.1.1 No such user")),
            "busy@x.example" if busy.fetch_add(1, Ordering::Relaxed) == 0 => Some(Answer::reply(451, "4.3.0 Not now")),
            "never@x.example" => Some(Answer::reply(451, "4.3.0 Not today")),
            _ => None,
        }
    });
    let peer = SmtpPeer::start(temper).await.expect("a peer");
    let station = Station::new(&peer).await;
    let to = ["ok@x.example", "gone@x.example", "busy@x.example", "never@x.example"].map(str::to_owned);
    let batch = station.submit(&to).await;
    let running = station.start().await;
    let counters = station.finished(batch).await;
    assert_eq!((counters.delivered, counters.bounce, counters.failed), (2, 1, 1));
    let gone = station.row(batch, 1).await;
    assert_eq!((gone.status, gone.class, gone.attempts), (Status::Bounce, Some(Class::InvalidMailbox), 1));
    let busy = station.row(batch, 2).await;
    assert_eq!((busy.status, busy.attempts), (Status::Delivered, 2));
    let never = station.row(batch, 3).await;
    assert_eq!((never.status, never.class), (Status::Failed, Some(Class::Expired)));
    assert_eq!(never.reply.as_deref(), Some("451 4.3.0 Not today"));
    assert_eq!(station.suppressed().await, ["gone@x.example"]);
    running.drain().await;
}

#[tokio::test]
async fn a_drain_in_the_middle_leaves_no_second_copy() {
    let peer = SmtpPeer::start(Temper::accepting().slow_messages(Duration::from_millis(2))).await.expect("a peer");
    let station = Station::new(&peer).await;
    let batch = station.submit(&people("x.example", 400)).await;
    let running = station.start().await;
    peer.wait_for(50).await.expect("some messages");
    running.drain().await;
    let so_far = station.counters(batch).await;
    assert_eq!(so_far.delivered, peer.counts().messages);
    assert!(so_far.delivered < 400);
    let running = station.start().await;
    assert_eq!(station.finished(batch).await.delivered, 400);
    assert_eq!(peer.counts().messages, 400);
    running.drain().await;
}
