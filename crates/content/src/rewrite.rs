//! Links become placeholders of the template language, once per batch.
//!
//! Owns which links are tracked and why others are not. Changes values of `href` only (and takes
//! away the attributes that ask not to track); every other byte stays. Sees the template as markup
//! through [`Tags::mask`].

use crate::jinja::Tags;
use crate::url::{Rules, SkipReason, decode_attribute, escape_html, skip_by_prefix};
use markup::{Anchor, Markup};
use plain::text_urls;
use std::collections::HashSet;
use std::ops::Range;

mod markup;
mod plain;

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
    /// URLs that an attribute opts out, for the text part and for what only Outlook sees.
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
        let opted_out = markup.anchors.iter().filter(|a| !a.opt_outs.is_empty());
        let urls = opted_out.filter_map(|anchor| source.get(anchor.href.clone()?));
        self.opted_out
            .extend(urls.map(|url| decode_attribute(url).trim().to_owned()));
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
        let is_twin = || self.opted_out.contains(decode_attribute(value).trim());
        if !anchor.opt_outs.is_empty() || anchor.conditional && is_twin() {
            self.skip(value, SkipReason::OptedOut);
            return;
        }
        let place = Place {
            source,
            tags,
            at,
            html: true,
        };
        self.link(&place, edits);
    }

    fn link(&mut self, place: &Place<'_>, edits: &mut Vec<Edit>) {
        if !self.clicks && self.rules.utm.is_empty() {
            return;
        }
        let value = place.source.get(place.at.clone()).unwrap_or_default();
        let done = if self.links.len() >= MOST_LINKS {
            Err(SkipReason::TooMany)
        } else if !place.html && self.opted_out.contains(value.trim()) {
            Err(SkipReason::OptedOut)
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

#[cfg(test)]
mod tests;
