//! Links become placeholders of the template language, once per batch.
//!
//! Owns what is a link, which are tracked and why others are not. Changes attribute values of
//! `a` and `area` only (and takes away the attributes that ask not to track); every other byte
//! stays. Sees the template as markup through [`Tags::mask`].

use crate::jinja::Tags;
use crate::url::{Rules, SkipReason, decode_attribute, escape_html, skip_by_prefix};
use lol_html::{HtmlRewriter, Settings, element};
use std::collections::HashSet;
use std::ops::Range;

/// The names under which a template reaches what is made per recipient. Nothing of a caller's is
/// looked up under them.
pub(crate) const PRIVATE: &str = "__hk_";
pub(crate) const PIXEL: &str = "__hk_pixel";
pub(crate) const HTML_LINK: &str = "__hk_html";
pub(crate) const TEXT_LINK: &str = "__hk_text";

/// Links beyond this number stay untracked.
const MOST_LINKS: usize = 10_000;
/// How many skipped links a report names, and how much of each.
const MOST_SKIPPED: usize = 100;
const LONGEST_SHOWN: usize = 200;

/// A numbered link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// The same for everyone.
    Constant {
        /// What stands in the content when the link is not tracked, escaped for its place.
        plain: Box<str>,
        /// Where it leads.
        target: Box<str>,
    },
    /// Known when it is rendered. The source is for reports.
    Dynamic(Box<str>),
}

impl Link {
    /// The URL, or its template, for a person to read.
    pub(crate) fn shown(&self) -> &str {
        match self {
            Self::Constant { target, .. } => target,
            Self::Dynamic(source) => source,
        }
    }
}

/// A link that is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SkippedLink {
    /// The URL as written, at most 200 characters.
    pub url: String,
    /// Why.
    pub reason: SkipReason,
}

/// What became of the links of a content.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LinkReport {
    /// Links that are tracked, each occurrence counted.
    pub tracked: usize,
    /// The first 100 that are not.
    pub skipped: Vec<SkippedLink>,
}

/// What to do with links, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Rewriter {
    pub(crate) rules: Rules,
    /// Links get a token; otherwise only UTM parameters.
    pub(crate) clicks: bool,
    pub(crate) links: Vec<Link>,
    pub(crate) report: LinkReport,
    /// URLs that an attribute opts out, for the text part.
    opted_out: HashSet<String>,
}

/// One change of the source: what stands at the range is replaced.
struct Edit {
    at: Range<usize>,
    by: String,
}

/// A place of a link in the source.
struct Place<'a> {
    source: &'a str,
    tags: &'a Tags,
    at: Range<usize>,
    html: bool,
}

impl Rewriter {
    /// Tracks links when `clicks`, and adds the parameters of `rules` in any case.
    pub(crate) fn new(rules: Rules, clicks: bool) -> Self {
        Self {
            rules,
            clicks,
            ..Self::default()
        }
    }

    /// Rewrites the links of an HTML template, and puts the pixel in when `opens`.
    pub(crate) fn html(&mut self, source: &str, opens: bool) -> String {
        let tags = Tags::scan(source);
        let markup = Markup::read(&tags.mask(source));
        let mut edits = Vec::new();
        for anchor in &markup.anchors {
            self.anchor(source, &tags, anchor, &mut edits);
        }
        if opens {
            let at = markup.body_end..markup.body_end;
            let by = tags.code_at(&at, format!("{{{{ {PIXEL} }}}}"));
            edits.push(Edit { at, by });
        }
        apply(source, edits)
    }

    /// Rewrites the URLs of a plain text template.
    pub(crate) fn text(&mut self, source: &str) -> String {
        let tags = Tags::scan(source);
        let masked = tags.mask(source);
        let mut edits = Vec::new();
        for at in text_urls(&masked) {
            self.link(
                &Place {
                    source,
                    tags: &tags,
                    at,
                    html: false,
                },
                &mut edits,
            );
        }
        apply(source, edits)
    }

    fn anchor(&mut self, source: &str, tags: &Tags, anchor: &Anchor, edits: &mut Vec<Edit>) {
        for range in &anchor.opt_outs {
            edits.push(Edit {
                at: range.clone(),
                by: String::new(),
            });
        }
        let Some(at) = anchor.href.clone() else {
            return;
        };
        let Some(value) = source.get(at.clone()) else {
            return;
        };
        if anchor.opt_outs.is_empty() {
            self.link(
                &Place {
                    source,
                    tags,
                    at,
                    html: true,
                },
                edits,
            );
        } else {
            self.opted_out
                .insert(decode_attribute(value).trim().to_owned());
            self.skip(value, SkipReason::OptedOut);
        }
    }

    fn link(&mut self, place: &Place<'_>, edits: &mut Vec<Edit>) {
        if !self.clicks && self.rules.utm.is_empty() {
            return;
        }
        let value = place.source.get(place.at.clone()).unwrap_or_default();
        let done = if self.links.len() >= MOST_LINKS {
            Err(SkipReason::TooMany)
        } else if place.tags.touch(&place.at) {
            self.dynamic(value, place.html)
        } else {
            self.constant(value, place.html)
        };
        match done {
            Ok(code) => edits.push(Edit {
                at: place.at.clone(),
                by: place.tags.code_at(&place.at, code),
            }),
            Err(reason) => self.skip(value, reason),
        }
    }

    fn constant(&mut self, value: &str, html: bool) -> Result<String, SkipReason> {
        let url = if html {
            decode_attribute(value)
        } else {
            value.into()
        };
        if !html && self.opted_out.contains(url.trim()) {
            return Err(SkipReason::OptedOut);
        }
        let target = self.rules.target(&url)?;
        // Without UTM parameters an untracked link keeps its very bytes.
        let plain = if self.rules.utm.is_empty() {
            value.to_owned()
        } else if html {
            escaped(&target)
        } else {
            target.clone()
        };
        if !self.clicks {
            return Ok(plain);
        }
        let number = self.links.len();
        self.links.push(Link::Constant {
            plain: plain.into(),
            target: target.into(),
        });
        self.report.tracked += 1;
        Ok(format!("{{{{ {PRIVATE}{number} }}}}"))
    }

    fn dynamic(&mut self, value: &str, html: bool) -> Result<String, SkipReason> {
        let prefix = value.split('{').next().unwrap_or_default();
        if let Some(reason) = skip_by_prefix(prefix) {
            return Err(reason);
        }
        let own = Tags::scan(value)
            .expressions(value)
            .next()
            .is_some_and(|e| e.starts_with("unsubscribe_url"));
        if own && prefix.trim().is_empty() {
            return Err(SkipReason::Own);
        }
        // A value that is not a template by itself is cut through by a statement around it.
        if minijinja::Environment::new()
            .template_from_str(value)
            .is_err()
        {
            return Err(SkipReason::Template);
        }
        let number = self.links.len();
        self.links.push(Link::Dynamic(shown(value).into()));
        self.report.tracked += usize::from(self.clicks);
        let function = if html { HTML_LINK } else { TEXT_LINK };
        // Rendered in its place, so that loop variables are in reach.
        Ok(format!(
            "{{% set {PRIVATE}url %}}{value}{{% endset %}}{{{{ {function}({number}, {PRIVATE}url) }}}}"
        ))
    }

    fn skip(&mut self, url: &str, reason: SkipReason) {
        if self.report.skipped.len() < MOST_SKIPPED {
            self.report.skipped.push(SkippedLink {
                url: shown(url),
                reason,
            });
        }
    }
}

fn shown(url: &str) -> String {
    url.trim().chars().take(LONGEST_SHOWN).collect()
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    // A String takes everything.
    escape_html(&mut out, text).unwrap_or_default();
    out
}

fn apply(source: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end));
    let mut out =
        String::with_capacity(source.len() + edits.iter().map(|edit| edit.by.len()).sum::<usize>());
    let mut at = 0;
    for edit in edits {
        // Two edits of one place can only be one read twice: the first stands.
        let Some(kept) = source.get(at..edit.at.start) else {
            continue;
        };
        out.push_str(kept);
        out.push_str(&edit.by);
        at = edit.at.end;
    }
    out.push_str(source.get(at..).unwrap_or_default());
    out
}

/// An `a` or `area`.
struct Anchor {
    href: Option<Range<usize>>,
    /// Attributes that ask not to track, with the white space before them.
    opt_outs: Vec<Range<usize>>,
}

/// What the rewriter needs to know of a document.
struct Markup {
    anchors: Vec<Anchor>,
    /// Where the pixel goes: before the last `</body>`, or at the end.
    body_end: usize,
}

impl Markup {
    fn read(masked: &[u8]) -> Self {
        let mut anchors = Vec::new();
        let mut comment_ranges = Vec::new();
        let settings = Settings::new()
            .with_strict(false)
            .append_element_content_handler(element!("a, area", |el| {
                anchors.push(anchor(el.attributes(), masked));
                Ok(())
            }))
            .append_document_content_handler(lol_html::doc_comments!(|comment| {
                comment_ranges.push(comment.source_location().bytes());
                Ok(())
            }));
        let mut rewriter = HtmlRewriter::new(settings, |_: &[u8]| {});
        // Not strict and without a memory limit, it has no reason to fail; what was not read stays
        // as it is.
        if rewriter.write(masked).is_ok() {
            drop(rewriter.end());
        } else {
            drop(rewriter);
        }
        let outside = |at: &usize| !comment_ranges.iter().any(|range| range.contains(at));
        let body_end =
            memchr::memmem::rfind_iter(&masked.to_ascii_lowercase(), b"</body").find(outside);
        Self {
            anchors,
            body_end: body_end.unwrap_or(masked.len()),
        }
    }
}

fn anchor(attributes: &[lol_html::html_content::Attribute<'_>], masked: &[u8]) -> Anchor {
    let mut found = Anchor {
        href: None,
        opt_outs: Vec::new(),
    };
    for attribute in attributes {
        let Some(name) = attribute
            .name_source_location()
            .map(|location| location.bytes())
        else {
            continue;
        };
        let value = attribute
            .value_source_location()
            .map(|location| location.bytes());
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
        "disable-tracking" | "mautic:disable-tracking" => !off(&["false", "0"]),
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

/// The URLs in plain text: from `http://` or `https://` to white space, a quote, an angle bracket
/// or what is not ASCII, less the punctuation of the sentence around it.
fn text_urls(masked: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) =
        memchr::memmem::find(masked.get(from..).unwrap_or_default(), b"://").map(|at| from + at)
    {
        let head = masked.get(..at).unwrap_or_default();
        let letters = head
            .iter()
            .rev()
            .take_while(|b| b.is_ascii_alphanumeric())
            .count();
        let scheme = head
            .get(at - letters..)
            .unwrap_or_default()
            .to_ascii_lowercase();
        let rest = masked.get(at + 3..).unwrap_or_default();
        let ends = |b: &u8| !b.is_ascii_graphic() || matches!(b, b'<' | b'>' | b'"' | b'\'' | b'`');
        let len = rest.iter().position(ends).unwrap_or(rest.len());
        from = at + 3 + len;
        if matches!(scheme.as_slice(), b"http" | b"https") {
            let start = at - letters;
            let end = trim_sentence(masked, start, from);
            if end > at + 3 {
                found.push(start..end);
            }
        }
    }
    found
}

fn trim_sentence(masked: &[u8], start: usize, mut end: usize) -> usize {
    while let Some(url) = masked.get(start..end) {
        let count = |byte: u8| url.iter().filter(|&&b| b == byte).count();
        let surplus = match url.last() {
            Some(b'.' | b',' | b';' | b':' | b'!' | b'?' | b'*' | b'_') => true,
            Some(b')') => count(b')') > count(b'('),
            Some(b']') => count(b']') > count(b'['),
            Some(b'}') => count(b'}') > count(b'{'),
            _ => false,
        };
        if !surplus {
            break;
        }
        end -= 1;
    }
    end
}

#[cfg(test)]
mod tests;
