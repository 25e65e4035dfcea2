//! The bytes that come out.

use crate::common::{attributes, context, html, rendered, row, token, wire};
use links::Kind;

#[test]
fn a_message_says_what_the_contract_says() {
    let mut spec = html("<p>Hi {{ name }}</p>");
    spec.text = Some("Hi {{ name }}, {{ points }} points".into());
    spec.feedback_id = Some("spring:b1:bulk:default".into());
    spec.headers.insert("X-Any".into(), "{{ points }}".into());
    let wire = wire(&spec, &row(r#"{"points":3}"#), &context());
    assert_eq!(
        wire,
        concat!(
            "Date: Fri, 21 Nov 2025 08:05:00 +0000\r\n",
            "From: Brand <news@brand.example>\r\n",
            "To: Ann <ann@x.example>\r\n",
            "Subject: Hello Ann\r\n",
            "Message-ID: <01040G2081040G2081040G2081.41@brand.example>\r\n",
            "X-Any: 3\r\n",
            "Feedback-ID: spring:b1:bulk:default\r\n",
            "List-Unsubscribe: <https://t.brand.example/u/AUuwAwMBAQEBAQEBAQEBAQEBAQEBKQCQTPXrZQPvjmksX-M>\r\n",
            "List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n",
            "MIME-Version: 1.0\r\n",
            "Content-Type: multipart/alternative;\r\n",
            " boundary=\"=_01040G2081040G2081040G2081.41\"\r\n",
            "\r\n",
            "--=_01040G2081040G2081040G2081.41\r\n",
            "Content-Type: text/plain; charset=utf-8\r\n",
            "Content-Transfer-Encoding: 7bit\r\n",
            "\r\n",
            "Hi Ann, 3 points\r\n",
            "--=_01040G2081040G2081040G2081.41\r\n",
            "Content-Type: text/html; charset=utf-8\r\n",
            "Content-Transfer-Encoding: 7bit\r\n",
            "\r\n",
            "<p>Hi Ann</p><img src=\"https://t.brand.example/o/AUuwAQMBAQEBAQEBAQEBAQEBAQEBKQB5xk2McrodMyNOTmc.gif\" alt=\"\" width=\"1\" height=\"1\">\r\n",
            "--=_01040G2081040G2081040G2081.41--\r\n",
        )
    );
}

#[test]
fn links_lead_over_the_tracker() {
    let html = rendered(
        r#"<body><a href="https://a.example/?x=1&amp;y=2">A</a></body>"#,
        "{}",
    );
    let links = attributes(&html, "href");
    let verified = token(links[0]);
    assert_eq!(
        (
            verified.token().kind,
            verified.token().link,
            verified.token().index
        ),
        (Kind::Click, 0, 41)
    );
    assert_eq!(verified.token().target, "https://a.example/?x=1&y=2");
    let pixels = attributes(&html, "src");
    assert_eq!(token(pixels[0]).token().kind, Kind::Open);
    assert!(
        html.trim_end().ends_with(&format!(
            r#"<img src="{}" alt="" width="1" height="1"></body>"#,
            pixels[0]
        )),
        "{html}"
    );
}
