//! Links in HTML, found by a real tokenizer.
//!
//! Owns which elements have links, also where only Outlook looks: inside conditional comments
//! (`<!--[if mso]> … <![endif]-->`), whose content other programs skip, and on the shapes of VML
//! that buttons are drawn with there. Must not change or judge anything.

use lol_html::html_content::Attribute;
use lol_html::{HtmlRewriter, Settings, element};
use std::ops::Range;

/// An `a`, an `area` or a VML shape.
pub(super) struct Anchor {
    pub(super) href: Option<Range<usize>>,
    /// Attributes that ask not to track, with the white space before them.
    pub(super) opt_outs: Vec<Range<usize>>,
    /// Whether only Outlook sees it: a twin of a link that everybody else sees.
    pub(super) conditional: bool,
}

/// What the rewriter needs to know of a document.
pub(super) struct Markup {
    /// In the order of the document.
    pub(super) anchors: Vec<Anchor>,
    /// Where the pixel goes: before the last `</body>`, or at the end.
    pub(super) body_end: usize,
}

impl Markup {
    /// Reads a document in which nothing of the template language is left.
    pub(super) fn read(masked: &[u8]) -> Self {
        let (mut anchors, comments) = links(masked, 0..masked.len(), false);
        for comment in &comments {
            if let Some(inner) = conditional(masked, comment) {
                anchors.extend(links(masked, inner, true).0);
            }
        }
        // Links are numbered as a reader meets them.
        anchors.sort_by_key(|anchor| anchor.href.as_ref().map(|href| href.start));
        let outside = |at: &usize| !comments.iter().any(|range| range.contains(at));
        let body_end =
            memchr::memmem::rfind_iter(&masked.to_ascii_lowercase(), b"</body").find(outside);
        Self {
            anchors,
            body_end: body_end.unwrap_or(masked.len()),
        }
    }
}

/// The links and the comments in `part` of the document.
fn links(masked: &[u8], part: Range<usize>, conditional: bool) -> (Vec<Anchor>, Vec<Range<usize>>) {
    let mut anchors = Vec::new();
    let mut comments = Vec::new();
    let settings = Settings::new()
        .with_strict(false)
        .append_element_content_handler(element!("*", |el| {
            if has_link(&el.tag_name()) {
                let anchor = anchor(el.attributes(), masked, part.start, conditional);
                anchors.push(anchor);
            }
            Ok(())
        }))
        .append_document_content_handler(lol_html::doc_comments!(|comment| {
            comments.push(moved(comment.source_location().bytes(), part.start));
            Ok(())
        }));
    let mut rewriter = HtmlRewriter::new(settings, |_: &[u8]| {});
    // Not strict and without a memory limit, it has no reason to fail; what was not read stays
    // as it is.
    if rewriter
        .write(masked.get(part.clone()).unwrap_or_default())
        .is_ok()
    {
        drop(rewriter.end());
    } else {
        drop(rewriter);
    }
    (anchors, comments)
}

fn moved(range: Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

/// Outlook draws buttons as `v:roundrect`, `v:rect` and the like, each with an `href`.
fn has_link(tag: &str) -> bool {
    matches!(tag, "a" | "area") || tag.starts_with("v:")
}

/// What Outlook reads of a conditional comment: all between `<!--[if …]>` and `<![endif]-->`.
fn conditional(masked: &[u8], comment: &Range<usize>) -> Option<Range<usize>> {
    let text = masked.get(comment.clone())?;
    let inner = text.strip_prefix(b"<!--")?;
    let condition = inner.trim_ascii_start();
    if !condition
        .get(..3)
        .is_some_and(|start| start.eq_ignore_ascii_case(b"[if"))
    {
        return None;
    }
    let head = memchr::memmem::find(inner, b"]>")?;
    let start = comment.start + 4 + head + 2;
    let tail = memchr::memmem::rfind(text, b"<![").unwrap_or(text.len());
    Some(start..(comment.start + tail).max(start))
}

fn anchor(attributes: &[Attribute<'_>], masked: &[u8], offset: usize, conditional: bool) -> Anchor {
    let mut found = Anchor {
        href: None,
        opt_outs: Vec::new(),
        conditional,
    };
    for attribute in attributes {
        let Some(name) = attribute.name_source_location() else {
            continue;
        };
        let name = moved(name.bytes(), offset);
        let value = attribute
            .value_source_location()
            .map(|location| moved(location.bytes(), offset));
        match attribute.name().as_str() {
            // Of several, browsers take the first.
            "href" if found.href.is_none() => found.href = value,
            other if opts_out(other, &attribute.value()) => {
                found.opt_outs.push(whole(masked, name, value))
            }
            _ => {}
        }
    }
    found
}

/// The attributes by which the services that people come from are told not to track a link.
fn opts_out(name: &str, value: &str) -> bool {
    let off = |words: &[&str]| {
        words
            .iter()
            .any(|word| value.trim().eq_ignore_ascii_case(word))
    };
    match name {
        "data-notrack" | "data-pm-no-track" | "ses:no-track" => !off(&["false"]),
        "disable-tracking" | "mautic:disable-tracking" | "mc:disable-tracking" => {
            !off(&["false", "0"])
        }
        "clicktracking" => off(&["off"]),
        "data-msys-clicktrack" => off(&["0"]),
        _ => false,
    }
}

/// An attribute with its quotes and the white space before it.
fn whole(masked: &[u8], name: Range<usize>, value: Option<Range<usize>>) -> Range<usize> {
    let head = masked.get(..name.start).unwrap_or_default();
    let start = head
        .iter()
        .rposition(|b| !b.is_ascii_whitespace())
        .map_or(0, |at| at + 1);
    let Some(value) = value else {
        return start..name.end;
    };
    let quote = value
        .start
        .checked_sub(1)
        .and_then(|at| masked.get(at))
        .filter(|b| matches!(b, b'"' | b'\''));
    let quoted = quote.is_some() && masked.get(value.end) == quote;
    start..value.end + usize::from(quoted)
}
