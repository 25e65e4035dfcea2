//! The bytes that come out.

use crate::common::{attributes, context, html, html_of, rendered, row, spec, token, wire};
use content::{ContentSpec, TrackingSpec};
use links::Kind;
use model::TrackingMode;
use proptest::prelude::*;

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

#[test]
fn rendered_urls_are_judged_where_they_stand() {
    let template = concat!(
        r#"{% for p in items %}<a href="https://a.example/{{ p.path }}?x=1&amp;q={{ p.q }}">{{ p.q }}</a>"#,
        r#"<a href="{{ p.url }}">B</a>{% endfor %}"#,
    );
    let vars = r#"{"items":[{"path":"日","q":"a&b","url":"mailto:x@y.example"},{"path":"p","q":"'","url":"http://b.example/?a&b"}]}"#;
    let html = rendered(template, vars);
    let links = attributes(&html, "href");
    let target = |at: usize| token(links[at]).token().target.to_owned();
    assert_eq!(target(0), "https://a.example/日?x=1&q=a&b");
    assert_eq!(links[1], "mailto:x@y.example");
    assert_eq!(target(2), "https://a.example/p?x=1&q='");
    assert_eq!(target(3), "http://b.example/?a&b");
    assert_eq!(
        (token(links[2]).token().link, token(links[3]).token().link),
        (0, 1)
    );
}

#[test]
fn a_rendered_url_of_ours_or_of_another_scheme_stays() {
    for (vars, shown) in [
        (r#"{"u":"javascript:alert(1)"}"#, "javascript:alert(1)"),
        (r##"{"u":"#top"}"##, "#top"),
        (
            r#"{"u":"https://t.brand.example/u/x"}"#,
            "https://t.brand.example/u/x",
        ),
        (r#"{"u":""}"#, ""),
    ] {
        assert_eq!(
            attributes(&rendered(r#"<a href="{{ u }}">"#, vars), "href"),
            [shown]
        );
    }
    let own = rendered(
        r#"<a href="{{ unsubscribe_url }}">x</a> {% set u = unsubscribe_url %}<a href="{{ u }}">y</a>"#,
        "{}",
    );
    for url in attributes(&own, "href") {
        assert_eq!(token(url).token().kind, Kind::Unsubscribe);
    }
}

#[test]
fn links_work_in_macros_and_blocks() {
    let template = concat!(
        r#"{% macro b(u) %}<a href="https://a.example/{{ u }}">x</a><a href="https://c.example/">y</a>{% endmacro %}"#,
        r#"{{ b("1") }}{% raw %}<a href="https://raw.example/{{">z</a>{% endraw %}"#,
    );
    let html = rendered(template, "{}");
    let targets: Vec<_> = attributes(&html, "href")
        .into_iter()
        .map(|url| token(url).token().target.to_owned())
        .collect();
    assert_eq!(
        targets,
        [
            "https://a.example/1",
            "https://c.example/",
            "https://raw.example/{{"
        ]
    );
}

#[test]
fn without_tracking_the_content_is_as_written() {
    let source = "<body>é&copy;<a href=\"https://a.example/?x=1&amp;y=2\">A</a> <a href='https://b.example/{{ id }}&amp;z'>B</a></body>\n";
    let mut context = context();
    context.mode = TrackingMode::Off;
    let mut own = row(r#"{"id":"1/2"}"#);
    let expected = source.replace("{{ id }}", "1/2");
    assert_eq!(html_of(&wire(&html(source), &own, &context)), expected);
    // A recipient's own wish counts as much; a batch's is not undone by a recipient's.
    context.mode = TrackingMode::Individual;
    own.tracking = Some(TrackingMode::Off);
    assert_eq!(html_of(&wire(&html(source), &own, &context)), expected);
    let mut spec = html(source);
    spec.tracking = TrackingSpec {
        opens: false,
        clicks: false,
        ..TrackingSpec::default()
    };
    assert_eq!(
        html_of(&wire(&spec, &row(r#"{"id":"1/2"}"#), &context)),
        expected
    );
    // The way out is always there.
    assert!(wire(&spec, &own, &context).contains("List-Unsubscribe: <https://t.brand.example/u/"));
}

#[test]
fn the_mode_travels_in_the_token() {
    let mut context = context();
    context.mode = TrackingMode::LastDate;
    context.proof = true;
    let mut row = row("{}");
    for (own, expected) in [
        (None, TrackingMode::LastDate),
        (Some(TrackingMode::Individual), TrackingMode::LastDate),
        (Some(TrackingMode::Aggregate), TrackingMode::Aggregate),
    ] {
        row.tracking = own;
        let html = html_of(&wire(
            &html(r#"<a href="https://a.example/">"#),
            &row,
            &context,
        ));
        let flags = token(attributes(&html, "href")[0]).token().flags;
        assert_eq!((flags.mode, flags.proof), (expected, true));
    }
}

#[test]
fn text_links_only_when_asked() {
    let mut spec = html("<p>x</p>");
    spec.text = Some("Go to https://a.example/?id={{ id }}. Or https://b.example/\n".into());
    let text = |spec: &ContentSpec| {
        let wire = wire(spec, &row(r#"{"id":7}"#), &context());
        let parsed = mail_parser::MessageParser::new()
            .parse(wire.as_bytes())
            .expect("a message");
        parsed.body_text(0).expect("text").into_owned()
    };
    assert_eq!(
        text(&spec),
        "Go to https://a.example/?id=7. Or https://b.example/\r\n"
    );
    spec.tracking.text_links = true;
    let tracked = text(&spec);
    let urls: Vec<_> = tracked
        .split_whitespace()
        .filter(|word| word.starts_with("https://"))
        .collect();
    let targets: Vec<_> = urls
        .iter()
        .map(|url| token(url.trim_end_matches('.')).token().target.to_owned())
        .collect();
    assert_eq!(targets, ["https://a.example/?id=7", "https://b.example/"]);
}

#[test]
fn html_is_escaped_and_text_is_not() {
    let mut spec = html("{{ v }}{{ v|safe }}{{ n }}{{ nothing }}{{ f }}");
    spec.text = Some("{{ v }}{{ nothing }}".into());
    spec.subject = "{{ v }}".into();
    spec.tracking.opens = false;
    let wire = wire(
        &spec,
        &row(r#"{"v":"<b>&\"'/","n":3,"f":1.5,"nothing":null}"#),
        &context(),
    );
    assert_eq!(html_of(&wire), "&lt;b&gt;&amp;&quot;&#39;/<b>&\"'/31.5");
    assert!(wire.contains("\r\n\r\n<b>&\"'/\r\n"), "{wire}");
    assert!(wire.contains("\r\nSubject: <b>&\"'/\r\n"), "{wire}");
}

#[test]
fn what_is_ours_cannot_be_shadowed() {
    let vars = r#"{"email":"evil@x.example","unsubscribe_url":"https://evil.example","message_id":"x","name":"Other","__hk_0":"evil","__hk_pixel":"evil"}"#;
    let html = rendered(
        "{{ email }} {{ name }} {{ message_id }} <a href=\"https://a.example/\"> {{ unsubscribe_url }}",
        vars,
    );
    assert!(
        html.starts_with("ann@x.example Ann 01040G2081040G2081040G2081.41 "),
        "{html}"
    );
    assert!(
        !html.contains("evil") && html.contains("https://t.brand.example/u/"),
        "{html}"
    );
    let mut unnamed = row(vars);
    unnamed.name = None;
    let wire = wire(&super::common::html("{{ name }}"), &unnamed, &context());
    assert!(html_of(&wire).starts_with("Other"), "{wire}");
}

proptest! {
    /// No value brings a header of its own, a line break or a second body.
    #[test]
    fn headers_cannot_be_injected(value in "(\r|\n|\r\n|\\PC|\0|\t| |Bcc: x@y\\.example|:){0,40}") {
        let mut spec = html("<p>x</p>");
        spec.subject = "{{ v }}".into();
        spec.from.name = Some(value.clone());
        spec.headers.insert("X-Any".into(), "a {{ v }}".into());
        let vars = serde_json::json!({ "v": value }).to_string();
        let mut row = row(&vars);
        row.name = Some(value.as_str().into());
        let wire = wire(&spec, &row, &context());
        let (header, body) = wire.split_once("\r\n\r\n").expect("a header and a body");
        prop_assert!(body.starts_with("<p>x</p>"));
        prop_assert!(header.is_ascii() && !header.replace("\r\n", "").contains(['\r', '\n', '\0', '\t']));
        let names: Vec<_> = header.split("\r\n").filter(|line| !line.starts_with(' ')).filter_map(|line| line.split(':').next()).collect();
        prop_assert_eq!(names, [
            "Date", "From", "To", "Subject", "Message-ID", "X-Any", "List-Unsubscribe", "List-Unsubscribe-Post",
            "MIME-Version", "Content-Type", "Content-Transfer-Encoding",
        ]);
    }

    /// Whatever is written and whatever is put in arrives.
    #[test]
    fn what_goes_in_comes_out(before in "[^{}\0\r]{0,60}", value in "[^\0\r]{0,60}", after in "[^{}\0\r]{0,60}") {
        let mut spec = spec();
        spec.text = Some(format!("{before}{{{{ v }}}}{after}."));
        let wire = wire(&spec, &row(&serde_json::json!({ "v": value }).to_string()), &context());
        prop_assert!(wire.split("\r\n").all(|line| line.len() <= 998 && !line.contains(['\r', '\n'])));
        let parsed = mail_parser::MessageParser::new().parse(wire.as_bytes()).expect("a message");
        let text = parsed.body_text(0).expect("text").replace("\r\n", "\n");
        prop_assert_eq!(text.trim_end_matches('\n'), format!("{before}{value}{after}."));
    }
}
