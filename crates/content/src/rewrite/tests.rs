use super::*;
use proptest::prelude::*;

fn rewritten(source: &str) -> (String, Rewriter) {
    let mut rewriter = Rewriter::new(Rules::default(), true);
    (rewriter.html(source, false), rewriter)
}

fn only_link(source: &str) -> String {
    let (out, rewriter) = rewritten(source);
    assert_eq!(rewriter.links.len(), 1, "{source}");
    out
}

/// Puts the plain form of each link back.
fn undone(mut out: String, rewriter: &Rewriter) -> String {
    for (number, link) in rewriter.links.iter().enumerate() {
        if let Link::Constant { plain, .. } = link {
            out = out.replace(&format!("{{{{ {PRIVATE}{number} }}}}"), plain);
        }
    }
    out
}

#[test]
fn only_the_attribute_value_changes() {
    for (source, expected) in [
        (r#"<a href="https://a/">"#, r#"<a href="{{ __hk_0 }}">"#),
        (
            r"<A  HREF = 'https://a/' id=x  >",
            r"<A  HREF = '{{ __hk_0 }}' id=x  >",
        ),
        (r"<a href=https://a/ id=x>", r"<a href={{ __hk_0 }} id=x>"),
        (
            r#"<area href="https://a/" href="https://b/"/>"#,
            r#"<area href="{{ __hk_0 }}" href="https://b/"/>"#,
        ),
        (
            r#"<p>é日<a href="https://a/?日">"#,
            r#"<p>é日<a href="{{ __hk_0 }}">"#,
        ),
        (
            r#"{% if a<b %}<a href="https://a/">{% endif %}"#,
            r#"{% if a<b %}<a href="{{ __hk_0 }}">{% endif %}"#,
        ),
        (
            r#"<a {% if x %}href="https://a/"{% endif %}>"#,
            r#"<a {% if x %}href="{{ __hk_0 }}"{% endif %}>"#,
        ),
        (
            r#"{% raw %}<a href="https://a/">{% endraw %}"#,
            r#"{% raw %}<a href="{% endraw %}{{ __hk_0 }}{% raw %}">{% endraw %}"#,
        ),
        (
            r#"<a href="https://a/?id={{ p.id }}">"#,
            r#"<a href="{% set __hk_url %}https://a/?id={{ p.id }}{% endset %}{{ __hk_html(0, __hk_url) }}">"#,
        ),
    ] {
        assert_eq!(only_link(source), expected);
    }
}

#[test]
fn what_only_outlook_reads_is_rewritten_too() {
    for (source, expected) in [
        (
            r#"<!--[if mso]><v:roundrect xmlns:v="urn:x" href="https://a/?x&amp;y" arcsize="4%"><center>B</center></v:roundrect><![endif]-->"#,
            r#"<!--[if mso]><v:roundrect xmlns:v="urn:x" href="{{ __hk_0 }}" arcsize="4%"><center>B</center></v:roundrect><![endif]-->"#,
        ),
        (
            "é<!-- [IF (gte mso 9)|(IE)]>\n<V:Rect HREF=https://a/ /><![endif]-->",
            "é<!-- [IF (gte mso 9)|(IE)]>\n<V:Rect HREF={{ __hk_0 }} /><![endif]-->",
        ),
        (
            r#"<!--[if !mso]><!--><a href="https://a/">A</a><!--<![endif]-->"#,
            r#"<!--[if !mso]><!--><a href="{{ __hk_0 }}">A</a><!--<![endif]-->"#,
        ),
        (
            r#"<!--[if mso]><a data-notrack href="https://b/"><a href="https://a/"><!-->"#,
            r#"<!--[if mso]><a href="https://b/"><a href="{{ __hk_0 }}"><!-->"#,
        ),
    ] {
        assert_eq!(only_link(source), expected);
    }
    for source in [
        r#"<!--[if mso]<a href="https://a/">-->"#,
        r#"<!--[if mso]><!-- <a href="https://a/"> --><![endif]-->"#,
        r#"<!--[if mso]><![endif]<a href="https://a/"-->"#,
        "<!--[if mso]>",
    ] {
        assert_eq!(rewritten(source).0, source);
    }
}

/// Both are the same button: the author says it once.
#[test]
fn a_link_opted_out_is_opted_out_where_only_outlook_looks() {
    let source = r#"<!--[if mso]><v:rect href="https://a/?x&amp;y"><![endif]--><a href="https://a/?x&y" data-notrack>A</a><a href="https://a/?x&y">B</a>"#;
    assert_eq!(
        only_link(source),
        r#"<!--[if mso]><v:rect href="https://a/?x&amp;y"><![endif]--><a href="https://a/?x&y">A</a><a href="{{ __hk_0 }}">B</a>"#
    );
}

#[test]
fn what_is_not_a_link_stays() {
    for source in [
        r#"<link href="https://a/"><img src="https://a/"><base href="https://a/">"#,
        r#"<!-- <a href="https://a/"> -->"#,
        r#"<script>"<a href='https://a/'>"</script><style><a href="https://a/"></style>"#,
        r#"<title><a href="https://a/"></title><textarea><a href="https://a/"></textarea>"#,
        r#"<p title='<a href="https://a/">'>"#,
        r#"{{ '<a href="https://a/">' }}"#,
        r#"{# <a href="https://a/"> #}"#,
        r"<a name=x>",
        r"<a href>",
        r#"<a href="https://a/"#,
        "",
    ] {
        let (out, rewriter) = rewritten(source);
        assert_eq!((out.as_str(), rewriter.links.len()), (source, 0));
    }
}

#[test]
fn skipped_links_say_why() {
    for (source, reason) in [
        (r#"<a href="mailto:a@b.example">"#, SkipReason::Scheme),
        (r#"<a href="java&#10;script:alert(1)">"#, SkipReason::Scheme),
        (r#"<a href="mailto:{{ email }}">"#, SkipReason::Scheme),
        (r##"<a href="#top">"##, SkipReason::Fragment),
        (r##"<a href="#{{ x }}">"##, SkipReason::Fragment),
        (r#"<a href="/x">"#, SkipReason::Relative),
        (r#"<a href="">"#, SkipReason::Empty),
        (r#"<a href="{{ unsubscribe_url }}">"#, SkipReason::Own),
        (r#"<a href=" {{unsubscribe_url|e}}">"#, SkipReason::Own),
        (
            r#"{% if x %}<a href="https://a/{% else %}<a href="https://b/{% endif %}c">"#,
            SkipReason::Template,
        ),
        (r#"<a href="https://">"#, SkipReason::Invalid),
    ] {
        let (out, rewriter) = rewritten(source);
        let reasons: Vec<_> = rewriter
            .report
            .skipped
            .iter()
            .map(|skipped| skipped.reason)
            .collect();
        assert_eq!((out.as_str(), &reasons[..]), (source, &[reason][..]));
    }
    let (_, rewriter) = rewritten(&r#"<a href="mailto:x">"#.repeat(200));
    assert_eq!(rewriter.report.skipped.len(), MOST_SKIPPED);
}

#[test]
fn attributes_that_opt_out_are_obeyed_and_taken_away() {
    for attribute in [
        "data-notrack",
        "data-pm-no-track",
        r#"data-pm-no-track="true""#,
        "ses:no-track",
        r#"clicktracking="off""#,
        "clicktracking=off",
        "clicktracking='OFF'",
        r#"disable-tracking="true""#,
        "mautic:disable-tracking",
        "mc:disable-tracking",
        r#"data-msys-clicktrack="0""#,
    ] {
        for (before, after) in [
            ("", " href=\"https://a/\""),
            (" href=\"https://a/\"", ""),
            ("\n id=x", "  href='https://a/' "),
        ] {
            let (out, rewriter) = rewritten(&format!("<a{before} {attribute}{after}>A</a>"));
            assert_eq!(out, format!("<a{before}{after}>A</a>"));
            assert_eq!(rewriter.report.skipped[0].reason, SkipReason::OptedOut);
        }
    }
    let tracked = r#"<a href="https://a/" clicktracking="on" data-notrack="false">"#;
    assert_eq!(
        only_link(tracked),
        r#"<a href="{{ __hk_0 }}" clicktracking="on" data-notrack="false">"#
    );
}

#[test]
fn a_url_opted_out_in_html_is_opted_out_in_text() {
    let mut rewriter = Rewriter::new(Rules::default(), true);
    rewriter.html(r#"<a data-notrack href="https://a/?x=1&amp;y=2">"#, false);
    assert_eq!(
        rewriter.text("https://a/?x=1&y=2 https://b/"),
        "https://a/?x=1&y=2 {{ __hk_0 }}"
    );
    rewriter.html(r#"<a ses:no-track href="https://a/{{ id }}">"#, false);
    assert_eq!(rewriter.text("https://a/{{ id }}."), "https://a/{{ id }}.");
}

#[test]
fn the_pixel_goes_before_the_last_body_end() {
    let at = |source: &str| Rewriter::new(Rules::default(), true).html(source, true);
    assert_eq!(
        at("<body>a</body></html>"),
        "<body>a{{ __hk_pixel }}</body></html>"
    );
    assert_eq!(at("<p>a</p>"), "<p>a</p>{{ __hk_pixel }}");
    assert_eq!(
        at("a</BODY><!-- </body> -->"),
        "a{{ __hk_pixel }}</BODY><!-- </body> -->"
    );
    assert_eq!(at("</body>b</body>"), "</body>b{{ __hk_pixel }}</body>");
    assert_eq!(
        at("{% raw %}a</body>{% endraw %}"),
        "{% raw %}a{% endraw %}{{ __hk_pixel }}{% raw %}</body>{% endraw %}"
    );
    assert_eq!(at(""), "{{ __hk_pixel }}");
}

#[test]
fn utm_parameters_are_encoded_once() {
    let rules = Rules {
        utm: vec![("utm_source".into(), "mail".into())],
        ..Rules::default()
    };
    let mut rewriter = Rewriter::new(rules.clone(), false);
    let out = rewriter.html(r#"<a href="https://a/?x=1&amp;y=2#f">"#, false);
    assert_eq!(
        out,
        r#"<a href="https://a/?x=1&amp;y=2&amp;utm_source=mail#f">"#
    );
    assert_eq!(rewriter.report.tracked, 0);
    let mut rewriter = Rewriter::new(rules, true);
    rewriter.html(r#"<a href="https://a/?x=1&amp;y=2">"#, false);
    let Some(Link::Constant { plain, target }) = rewriter.links.first() else {
        panic!("a constant link")
    };
    assert_eq!(
        (&**target, &**plain),
        (
            "https://a/?x=1&y=2&utm_source=mail",
            "https://a/?x=1&amp;y=2&amp;utm_source=mail"
        )
    );
}

#[test]
fn urls_in_text_end_where_people_end_them() {
    for (text, urls) in [
        (
            "See https://a.example/x. Or (https://b.example/y_(z)), ok?",
            vec!["https://a.example/x", "https://b.example/y_(z)"],
        ),
        (
            "<https://a.example>\nHTTP://B.example/?q=1!",
            vec!["https://a.example", "HTTP://B.example/?q=1"],
        ),
        ("詳細はhttps://a.example/日本", vec!["https://a.example/"]),
        ("xhttps://a.example ftp://b.example https://", vec![]),
        (
            "https://a.example/{{ id }}/x, y",
            vec!["https://a.example/{{ id }}/x"],
        ),
        (
            "https://a.example/{% if x %}b{% endif %}",
            vec!["https://a.example/"],
        ),
    ] {
        let masked = Tags::scan(text).mask(text);
        let found: Vec<_> = text_urls(&masked)
            .into_iter()
            .filter_map(|at| text.get(at))
            .collect();
        assert_eq!(found, urls, "{text}");
    }
}

#[test]
fn links_are_numbered_up_to_a_bound() {
    let source = r#"<a href="https://a/">"#.repeat(MOST_LINKS + 1);
    let (out, rewriter) = rewritten(&source);
    assert_eq!(rewriter.links.len(), MOST_LINKS);
    assert!(out.ends_with(r#"<a href="https://a/">"#));
}

/// Templates whose statements are balanced, and whose markup is anything.
fn template() -> impl Strategy<Value = String> {
    let leaf = "(<a href=\"https://a/\\{\\{ x \\}\\}\">|<a href=\"\\{\\{ x \\}\\}|\\{# < #\\}|<a href=|<!--|-->|\"|>|https://b| |é){0,4}";
    leaf.prop_recursive(4, 24, 4, |inner| {
        let pair = (inner.clone(), inner.clone());
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| a + &b),
            pair.prop_map(|(a, b)| format!("{{% if x %}}{a}{{% else %}}{b}{{% endif %}}")),
            inner
                .clone()
                .prop_map(|a| format!("{{%- for p in x -%}}{a}{{% endfor %}}")),
            inner.prop_map(|a| format!("{{% macro m() %}}{a}{{% endmacro %}}")),
            "(<a href=\"https://c/\">|\\{\\{|<a href=\")"
                .prop_map(|a| format!("{{% raw %}}{a}{{% endraw %}}")),
        ]
    })
}

proptest! {
    /// Whatever the document: with the links put back it is itself, byte for byte.
    #[test]
    fn every_other_byte_stays(
        source in "(<a href=\"https://a/\\?x&amp;y\">|<a href='http://b'|<a\\nhref=https://c/ x>|<|>|\"|'|=| |\n|é|</a>|<!--|<!--\\[if mso\\]>|<v:rect href=\"https://d/\"|<!\\[endif\\]-->|-->|<script>|</script>|<body>|</body>|[a-z]|&lt;|/){0,40}"
    ) {
        let (out, rewriter) = rewritten(&source);
        for link in &rewriter.links {
            let Link::Constant { plain, target } = link else { panic!("no template here") };
            let decoded = decode_attribute(plain);
            prop_assert_eq!(decoded.trim(), &**target);
        }
        prop_assert_eq!(undone(out, &rewriter), source);
    }

    /// With tags of the language between, and cut through by them: it stays a template.
    #[test]
    fn templates_stay_templates(source in template()) {
        let env = minijinja::Environment::new();
        prop_assert!(env.template_from_str(&source).is_ok(), "the generator makes templates");
        let (out, _) = rewritten(&source);
        let compiled = env.template_from_str(&out);
        prop_assert!(compiled.is_ok(), "{} {:?}", out, compiled.err());
    }

    #[test]
    fn no_text_panics(source in "(https?://|\\PC|[ .,()\\[\\]]){0,40}") {
        let mut rewriter = Rewriter::new(Rules::default(), true);
        let out = rewriter.text(&source);
        prop_assert_eq!(rewriter.links.is_empty(), out == source);
    }
}
