//! Where the template language stands in a source, found without parsing it.
//!
//! Owns the map between a template and the plain HTML or text around its tags, so that the
//! rewriters see markup only. Follows MiniJinja's lexer with its default delimiters; the template
//! is compiled before and after, so what is misread here ends as an error, never as other mail.

use std::ops::Range;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    /// `{{ … }}`: stands for text.
    Expression,
    /// `{% … %}` and `{# … #}`: stands for nothing.
    Silent,
}

/// The tags and raw blocks of a template.
#[derive(Debug, Default)]
pub(crate) struct Tags {
    tags: Vec<(Range<usize>, Tag)>,
    /// What stands between `{% raw %}` and `{% endraw %}`.
    raw: Vec<Range<usize>>,
}

impl Tags {
    /// Finds the tags of `source`, which compiles.
    pub(crate) fn scan(source: &str) -> Self {
        let mut found = Self::default();
        let bytes = source.as_bytes();
        let mut at = 0;
        while let Some(open) = memchr::memchr(b'{', bytes.get(at..).unwrap_or_default()) {
            let start = at + open;
            at = match bytes.get(start + 1) {
                Some(b'{') => found.push(start, tag_end(bytes, start + 2, *b"}}"), Tag::Expression),
                Some(b'#') => found.push(start, comment_end(bytes, start + 2), Tag::Silent),
                Some(b'%') => match raw_block(source, start) {
                    Some((inner, end)) => {
                        found.push(start, inner.start, Tag::Silent);
                        found.push(inner.end, end, Tag::Silent);
                        found.raw.push(inner);
                        end
                    }
                    None => found.push(start, tag_end(bytes, start + 2, *b"%}"), Tag::Silent),
                },
                _ => start + 1,
            };
        }
        found
    }

    fn push(&mut self, start: usize, end: usize, tag: Tag) -> usize {
        self.tags.push((start..end, tag));
        end
    }

    /// Whether there is nothing to render.
    pub(crate) fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// Whether there is anything but `{{ … }}` and comments.
    pub(crate) fn has_statements(&self, source: &str) -> bool {
        self.tags.iter().any(|(range, _)| {
            source
                .get(range.start..)
                .is_some_and(|tag| tag.starts_with("{%"))
        })
    }

    /// Whether output is kept in memory before it is put out: macros and the block forms of `set`,
    /// `filter` and `call`.
    pub(crate) fn captures(&self, source: &str) -> bool {
        let tags = self
            .tags
            .iter()
            .filter_map(|(range, _)| source.get(range.clone())?.strip_prefix("{%"));
        tags.map(|tag| {
            tag.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'))
        })
        .any(
            |tag| match tag.split(|c: char| !c.is_ascii_alphanumeric()).next() {
                Some("macro" | "filter" | "call") => true,
                Some("set") => !tag.contains('='),
                _ => false,
            },
        )
    }

    /// The longest stretch without a tag, in bytes.
    pub(crate) fn longest_literal(&self, source: &str) -> usize {
        let starts = self
            .tags
            .iter()
            .map(|(range, _)| range.start)
            .chain([source.len()]);
        let ends = [0]
            .into_iter()
            .chain(self.tags.iter().map(|(range, _)| range.end));
        starts
            .zip(ends)
            .map(|(start, end)| start.saturating_sub(end))
            .max()
            .unwrap_or(0)
    }

    /// The inside of each `{{ … }}`, without white space control.
    pub(crate) fn expressions<'a>(&self, source: &'a str) -> impl Iterator<Item = &'a str> {
        self.tags
            .iter()
            .filter(|(_, tag)| *tag == Tag::Expression)
            .filter_map(|(range, _)| {
                let inner = source.get(range.start + 2..range.end.saturating_sub(2))?;
                let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
                Some(inner.strip_suffix(['-', '+']).unwrap_or(inner).trim())
            })
    }

    /// `source` at the same offsets, with letters for what becomes text and spaces for what
    /// becomes nothing.
    pub(crate) fn mask(&self, source: &str) -> Vec<u8> {
        let mut masked = source.as_bytes().to_vec();
        for (range, tag) in &self.tags {
            if let Some(bytes) = masked.get_mut(range.clone()) {
                bytes.fill(if *tag == Tag::Expression { b'x' } else { b' ' });
            }
        }
        masked
    }

    /// Whether a tag touches `range`.
    pub(crate) fn touch(&self, range: &Range<usize>) -> bool {
        let after = self.tags.partition_point(|(tag, _)| tag.end <= range.start);
        self.tags
            .get(after)
            .is_some_and(|(tag, _)| tag.start < range.end)
    }

    /// `code`, so that it is run at `range` even inside a raw block.
    pub(crate) fn code_at(&self, range: &Range<usize>, code: String) -> String {
        let raw = self
            .raw
            .iter()
            .any(|raw| raw.start <= range.start && range.end <= raw.end);
        if raw {
            format!("{{% endraw %}}{code}{{% raw %}}")
        } else {
            code
        }
    }
}

/// The end of a tag: its delimiter outside strings and brackets.
fn tag_end(bytes: &[u8], mut at: usize, close: [u8; 2]) -> usize {
    let mut depth = 0_usize;
    while let Some(&byte) = bytes.get(at) {
        if depth == 0 && bytes.get(at..at + 2) == Some(&close) {
            return at + 2;
        }
        match byte {
            b'"' | b'\'' => at = string_end(bytes, at + 1, byte),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// Where the closing `quote` stands.
fn string_end(bytes: &[u8], mut at: usize, quote: u8) -> usize {
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 1,
            _ if byte == quote => return at,
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

fn comment_end(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    memchr::memmem::find(rest, b"#}").map_or(bytes.len(), |end| at + end + 2)
}

/// The inside of a raw block whose tag starts at `start`, and where the block ends.
fn raw_block(source: &str, start: usize) -> Option<(Range<usize>, usize)> {
    let inner = start + bare_tag(source.get(start..)?, "raw")?;
    let mut at = inner;
    loop {
        at += memchr::memmem::find(source.as_bytes().get(at..)?, b"{%")?;
        if let Some(len) = bare_tag(source.get(at..)?, "endraw") {
            return Some((inner..at, at + len));
        }
        at += 2;
    }
}

/// The length of `{% name %}` at the start of `text`.
fn bare_tag(text: &str, name: &str) -> Option<usize> {
    let rest = text.strip_prefix("{%")?;
    let rest = rest
        .strip_prefix(['-', '+'])
        .unwrap_or(rest)
        .trim_ascii_start();
    let rest = rest.strip_prefix(name)?.trim_ascii_start();
    let rest = rest
        .strip_prefix(['-', '+'])
        .unwrap_or(rest)
        .strip_prefix("%}")?;
    Some(text.len() - rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn masked(source: &str) -> String {
        String::from_utf8(Tags::scan(source).mask(source)).expect("still UTF-8")
    }

    #[test]
    fn tags_are_masked_at_their_length() {
        let cases = [
            ("a{{ x }}b", "axxxxxxxb"),
            ("{{ '}}' }}<", "xxxxxxxxxx<"),
            (r#"{{ "\"}}" }}<"#, "xxxxxxxxxxxx<"),
            ("{{ {'a': {'b': 1}} }}<", "xxxxxxxxxxxxxxxxxxxxx<"),
            (
                "{% if a < b %}<a>{% endif %}",
                "              <a>           ",
            ),
            ("{# <a> {{ #}<", "            <"),
            (
                "{%- raw -%}{{ x }}{% endraw %}<",
                "           {{ x }}            <",
            ),
            ("{ a } {a} é{{x}}", "{ a } {a} éxxxxx"),
        ];
        for (source, expected) in cases {
            assert_eq!(masked(source), expected, "{source}");
        }
    }

    #[test]
    fn ranges_are_found() {
        let source = "ab{{ x }}{% raw %}q{% endraw %}";
        let tags = Tags::scan(source);
        assert!(
            !tags.touch(&(0..2))
                && tags.touch(&(0..3))
                && tags.touch(&(8..9))
                && !tags.touch(&(18..19))
        );
        assert_eq!(
            tags.code_at(&(18..19), "X".into()),
            "{% endraw %}X{% raw %}"
        );
        assert_eq!(tags.code_at(&(0..1), "X".into()), "X");
        assert_eq!(tags.expressions("ab{{ x }}").collect::<Vec<_>>(), ["x"]);
        assert!(
            tags.has_statements(source)
                && !Tags::scan("{{ x }}{# y #}").has_statements("{{ x }}{# y #}")
        );
    }

    #[test]
    fn captures_are_seen() {
        for (source, captures) in [
            ("{% set a = 1 %}{% if x %}{% endif %}", false),
            ("{%- set a -%}x{% endset %}", true),
            ("{% filter upper %}x{% endfilter %}", true),
            ("{%macro m()%}x{%endmacro%}", true),
            ("{% raw %}{% macro m() %}{% endraw %}", false),
        ] {
            assert_eq!(Tags::scan(source).captures(source), captures, "{source}");
        }
        assert_eq!(
            Tags::scan("ab{{ x }}abc{# #}").longest_literal("ab{{ x }}abc{# #}"),
            3
        );
        assert_eq!(Tags::scan("abcd").longest_literal("abcd"), 4);
    }

    proptest! {
        /// Where the template compiles, what is not masked is what MiniJinja puts out.
        #[test]
        fn the_mask_agrees_with_the_lexer(source in "(\\{\\{ ?\\}?|\\}\\}|\\{% raw %\\}|\\{% endraw %\\}|\\{#|#\\}|'|1|<|\\{|\\}| |é){0,20}") {
            let env = minijinja::Environment::new();
            let Ok(template) = env.template_from_str(&source) else { return Ok(()) };
            let Ok(output) = template.render(()) else { return Ok(()) };
            let tags = Tags::scan(&source);
            let mut kept = String::new();
            let mut at = 0;
            for (range, tag) in &tags.tags {
                kept.push_str(source.get(at..range.start).expect("on a boundary"));
                if *tag == Tag::Expression {
                    let expression = source.get(range.clone()).expect("on a boundary");
                    kept.push_str(&env.render_str(expression, ()).expect("as before"));
                }
                at = range.end;
            }
            kept.push_str(source.get(at..).expect("on a boundary"));
            // MiniJinja drops one line break at the end of a template by default; here are none.
            prop_assert_eq!(kept, output);
        }

        #[test]
        fn no_source_panics(source in "\\PC{0,60}|[{}%#'\"\\\\ r]{0,60}") {
            prop_assert_eq!(Tags::scan(&source).mask(&source).len(), source.len());
        }
    }
}
