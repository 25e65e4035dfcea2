//! What is refused, and how it is said.

use crate::common::{compile, html, row, spec};
use content::{Content, ContentError, ContentSpec, Glimpse, RecipientError};

fn errors(spec: &ContentSpec) -> Vec<ContentError> {
    Content::compile(spec).err().unwrap_or_default()
}

#[test]
fn a_spec_survives_the_store() {
    let mut spec = html("<p>{{ a }}</p>");
    spec.vars.insert("a".into(), 1.into());
    let json = serde_json::to_string(&spec).expect("JSON");
    assert_eq!(
        serde_json::from_str::<ContentSpec>(&json).expect("our own"),
        spec
    );
}

#[test]
fn every_mistake_is_named_with_its_field_and_line() {
    let mut spec = html("<p>\n{% if x %}</p>");
    spec.subject = "{{ ".into();
    spec.text = Some("ok\n\n{{ a b }}".into());
    for (name, value) in [
        ("X-Ok", "{{ unclosed"),
        ("X Bad", "v"),
        ("Bcc", "v"),
        ("List-Unsubscribe", "v"),
        ("Resent-To", "v"),
        ("", "v"),
    ] {
        spec.headers.insert(name.into(), value.into());
    }
    let found = errors(&spec);
    let mut fields: Vec<_> = found
        .iter()
        .map(|e| (e.field.as_str(), e.line, e.template))
        .collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            ("headers.", None, false),
            ("headers.Bcc", None, false),
            ("headers.List-Unsubscribe", None, false),
            ("headers.Resent-To", None, false),
            ("headers.X Bad", None, false),
            ("headers.X-Ok", Some(1), true),
            ("html", Some(2), true),
            ("subject", Some(1), true),
            ("text", Some(3), true),
        ],
        "{found:?}"
    );
    assert_eq!(
        errors(&super::common::spec())
            .first()
            .map(|e| e.field.clone())
            .as_deref(),
        Some("html")
    );
}

#[test]
fn a_source_has_a_longest_length() {
    let mut spec = html(&"a".repeat((1 << 20) + 1));
    spec.subject = "a".repeat(9000);
    let fields: Vec<_> = errors(&spec)
        .into_iter()
        .map(|e| (e.field, e.template))
        .collect();
    assert_eq!(
        fields,
        [("subject".to_owned(), false), ("html".to_owned(), false)]
    );
    assert_eq!(errors(&html(&"a".repeat(1 << 20))), []);
}

#[test]
fn names_have_a_longest_length() {
    let mut spec = html("x");
    let content = compile(&spec);
    let mut row = row("{}");
    row.name = Some("é".repeat(500).into());
    assert_eq!(content.check(&row), Ok(()));
    row.name = Some("é".repeat(501).into());
    assert!(matches!(
        content.check(&row),
        Err(RecipientError::InvalidVars { .. })
    ));
    spec.from.name = Some("x".repeat(1001));
    assert_eq!(
        errors(&spec).first().map(|e| e.field.clone()).as_deref(),
        Some("from.name")
    );
}

#[test]
fn a_header_may_stand_once() {
    let mut spec = html("x");
    spec.headers.insert("X-A".into(), "1".into());
    spec.headers.insert("x-a".into(), "2".into());
    assert_eq!(errors(&spec).len(), 1);
    spec.headers.remove("x-a");
    spec.list_unsubscribe = false;
    spec.headers
        .insert("List-Unsubscribe".into(), "<https://own.example/>".into());
    assert_eq!(errors(&spec), []);
}

#[test]
fn what_fails_for_everybody_is_an_error_of_the_template() {
    let literal = "a".repeat(900_000);
    for template in [
        "{{ name|nofilter }}",
        "{{ nofunction() }}",
        "{% include 'other' %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 9000000 }}",
        "{% for i in range(9000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% set a = 'a' * 90000 %}{% set b %}{% for i in range(9000) %}{{ a }}{% endfor %}{% endset %}",
        "{% macro m() %}{% for i in range(9000) %}{{ [1, 'a' * 90000] }}{% endfor %}{% endmacro %}{{ m()|length }}",
        &format!("{{% set b %}}{{% for i in range(9000) %}}{literal}{{% endfor %}}{{% endset %}}"),
    ] {
        let found = errors(&html(template));
        assert!(
            matches!(&found[..], [e] if e.field == "html" && e.template),
            "{template}: {found:?}"
        );
    }
}

#[test]
fn a_missing_variable_rejects_the_recipient() {
    for (template, vars, missing) in [
        ("{{ shop }}", "{}", Some("shop")),
        ("{{ shop|upper }}", "{}", Some("shop")),
        (
            "{{ user.first }}",
            r#"{"user":{"last":"x"}}"#,
            Some("user.first"),
        ),
        ("{{ user.first }}", r#"{"user":{"first":"x"}}"#, None),
        ("{{ user.first }}", r#"{"user":"x"}"#, Some("user.first")),
        ("{% if vip %}x{% endif %}", "{}", Some("vip")),
        ("{% if vip is defined %}{{ vip }}{% endif %}", "{}", None),
        ("{{ vip|default('no') }}", "{}", None),
        (
            "{% for p in items %}{{ p.name }}{% endfor %}",
            r#"{"items":[{"name":1},{}]}"#,
            Some("p.name"),
        ),
        (
            "{% for p in items %}{{ p.name }}{% endfor %}",
            r#"{"items":[{"name":1}]}"#,
            None,
        ),
        (
            "{% for p in items %}<a href='https://x.example/{{ p.id }}'>{% endfor %}",
            r#"{"items":[{}]}"#,
            Some("p.id"),
        ),
        (
            "{{ email }}{{ name }}{{ prospect_id }}{{ message_id }}{{ unsubscribe_url }}",
            "{}",
            None,
        ),
        ("{{ nothing }}", r#"{"nothing":null}"#, None),
        (
            "{# {{ shop }} #}{% raw %}{{ shop }}{% endraw %}",
            "{}",
            None,
        ),
    ] {
        let checked = compile(&html(template)).check(&row(vars));
        let expected = missing.map(|name| RecipientError::MissingVariable { name: name.into() });
        assert_eq!(checked.err(), expected, "{template} {vars}");
    }
}

#[test]
fn a_variable_that_does_not_fit_rejects_the_recipient() {
    for (template, vars) in [
        ("{{ a }}", "[]"),
        ("{{ a }}", "{"),
        ("{{ a }}", ""),
        ("{% for i in n %}{% endfor %}", r#"{"n":1}"#),
        ("{{ n + 1 }}", r#"{"n":"x"}"#),
        (
            "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
            r#"{"n":9999}"#,
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{}"),
        (
            "{% for i in range(n) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
            r#"{"n":9999}"#,
        ),
    ] {
        let checked = compile(&html(template)).check(&row(vars));
        assert!(
            matches!(checked, Err(RecipientError::InvalidVars { .. })),
            "{template} {vars}: {checked:?}"
        );
    }
}

#[test]
fn defaults_of_the_batch_stand_in() {
    let mut spec = html("{{ shop }}");
    spec.vars.insert("shop".into(), "Tokyo".into());
    let content = compile(&spec);
    assert_eq!(content.check(&row("{}")), Ok(()));
    let mut without = row("{}");
    without.vars = None;
    assert_eq!(content.check(&without), Ok(()));
}

fn glimpse(vars: &str, name: &str) -> Glimpse {
    let vars: serde_json::Value = serde_json::from_str(vars).expect("JSON");
    match vars.get(name) {
        None => Glimpse::Absent,
        Some(serde_json::Value::String(_)) => Glimpse::Text,
        Some(_) => Glimpse::Other,
    }
}

#[test]
fn a_glimpse_is_enough_where_nothing_hangs_on_the_value() {
    // What would be read here is no JSON.
    let unread = row("{");
    for (template, default, answer, ends_well) in [
        ("{{ a }}", "", Glimpse::Other, true),
        ("{{ a|upper }}", "", Glimpse::Text, true),
        ("{{ a }}", "of the batch", Glimpse::Absent, true),
        ("no variable", "", Glimpse::Unknown, true),
        ("{{ a }}", "", Glimpse::Absent, false),
        ("{{ a }}", "", Glimpse::Unknown, false),
        ("{{ a|upper }}", "", Glimpse::Other, false),
        ("{{ a.b }}", "", Glimpse::Other, false),
        ("{% if a %}{% endif %}", "", Glimpse::Text, false),
    ] {
        let mut spec = html(template);
        if !default.is_empty() {
            spec.vars.insert("a".into(), default.into());
        }
        let checked = compile(&spec).check_by(&unread, |_| answer);
        assert_eq!(checked.is_ok(), ends_well, "{template} {answer:?}");
    }
}

/// The quick look at the variables and a whole rendering agree.
#[test]
fn the_check_and_the_rendering_agree() {
    let templates = [
        "{{ a }}",
        "{{ a|upper }}",
        "{{ a.b }}",
        "{{ a|e }}{{ name }}",
        "{{ a|length }}",
        "{{ a | trim }}",
    ];
    let values = [
        "{}",
        r#"{"a":1}"#,
        r#"{"a":"x"}"#,
        r#"{"a":null}"#,
        r#"{"a":{"b":2}}"#,
        r#"{"a":{"b":null}}"#,
        r#"{"a":[1]}"#,
    ];
    for template in templates {
        for vars in values {
            let content = compile(&ContentSpec {
                text: Some(template.into()),
                ..spec()
            });
            let rendered = content
                .render(&row(vars), &crate::common::context())
                .map(drop);
            assert_eq!(content.check(&row(vars)), rendered, "{template} {vars}");
            let by_glimpse = content.check_by(&row(vars), |name| glimpse(vars, name));
            assert_eq!(by_glimpse, rendered, "{template} {vars}");
        }
    }
}
