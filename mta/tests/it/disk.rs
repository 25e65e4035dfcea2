//! A disk that cannot take more.

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::Value;

use crate::harness::{Service, batch, recipients};

#[tokio::test]
async fn without_room_for_the_spool_nothing_is_accepted() {
    let service = Service::start().await;
    std::fs::remove_dir_all(service.home.data_dir()).expect("removed");
    // More than a spool keeps in memory.
    let large = batch(&recipients(50_000, 3)).to_string();
    let reply = service.api.submit_bytes(large.clone()).await;
    assert_eq!(
        (reply.problem().0, reply.problem().1.as_str()),
        (503, "unavailable")
    );
    assert!(reply.headers.contains_key("retry-after"));
    service.api.assert_nothing_accepted().await;
    std::fs::create_dir_all(service.home.data_dir()).expect("made");
    let accepted = service.api.submit_bytes(large).await;
    assert_eq!(
        accepted.status,
        StatusCode::ACCEPTED,
        "{:?}",
        accepted.json()
    );
}
