//! What a template can reach: the recipient's variables before the batch's, and what is ours
//! before both.
//!
//! Owns the links, the pixel and the unsubscribe URL of one message. Must not decide which links
//! there are: that is [`crate::rewrite`]'s, once per batch.

use crate::rewrite::{HTML_LINK, Link, PIXEL, PRIVATE, TEXT_LINK};
use crate::spec::Tracker;
use crate::url::{Rules, decode_attribute, escape_html, is_below};
use links::{Flags, Kind, Token};
use minijinja::value::Object;
use minijinja::{Error, ErrorKind, State, Value};
use model::{MessageId, TrackingMode};
use std::sync::Arc;

/// What links of a content need when they are rendered.
#[derive(Debug, Default)]
pub(crate) struct LinkTable {
    pub(crate) links: Vec<Link>,
    pub(crate) rules: Rules,
    pub(crate) clicks: bool,
}

/// The tracked side of one message.
#[derive(Debug, Clone)]
pub(crate) struct Tracked {
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) message: MessageId,
    pub(crate) flags: Flags,
}

impl Tracked {
    /// The URL of a token, or `None` for a target that no token takes.
    pub(crate) fn url(&self, kind: Kind, link: u16, target: &str) -> Option<String> {
        let path = match kind {
            Kind::Open => "/o/",
            Kind::Click => "/c/",
            Kind::Unsubscribe => "/u/",
        };
        let base = self.tracker.base_url();
        let mut url = String::with_capacity(base.len() + 80 + target.len() * 3 / 2);
        url.push_str(base);
        url.push_str(path);
        let Self {
            flags,
            message: MessageId { batch, index },
            ..
        } = *self;
        let token = Token {
            kind,
            flags,
            batch,
            index,
            link,
            target,
        };
        self.tracker.signer().sign(&token, &mut url).ok()?;
        Some(url)
    }

    fn click(&self, link: usize, target: &str) -> Option<String> {
        if self.flags.mode == TrackingMode::Off {
            return None;
        }
        self.url(Kind::Click, u16::try_from(link).ok()?, target)
    }
}

/// What a template can reach: the recipient's variables before the batch's, and what is ours
/// before both.
#[derive(Debug)]
pub(crate) struct Scope {
    pub(crate) vars: Value,
    pub(crate) defaults: Value,
    pub(crate) email: Value,
    pub(crate) name: Value,
    pub(crate) prospect_id: Value,
    pub(crate) table: Arc<LinkTable>,
    /// `None` in trials: links and pixel are empty then.
    pub(crate) tracked: Option<Tracked>,
}

impl Scope {
    /// Nothing but what is always there, for trials.
    pub(crate) fn empty() -> Self {
        let none = Value::UNDEFINED;
        Self {
            vars: none.clone(),
            defaults: none.clone(),
            email: Value::from(""),
            name: none.clone(),
            prospect_id: none,
            table: Arc::default(),
            tracked: None,
        }
    }

    fn of_callers(&self, key: &str) -> Option<Value> {
        let found = |map: &Value| map.get_attr(key).ok().filter(|value| !value.is_undefined());
        found(&self.vars).or_else(|| found(&self.defaults))
    }

    fn of_recipient(&self, given: &Value, key: &str) -> Value {
        if given.is_undefined() {
            self.of_callers(key).unwrap_or_else(|| Value::from(""))
        } else {
            given.clone()
        }
    }

    fn url(&self, kind: Kind) -> String {
        self.tracked
            .as_ref()
            .and_then(|tracked| tracked.url(kind, 0, ""))
            .unwrap_or_default()
    }

    fn pixel(&self) -> String {
        match &self.tracked {
            Some(tracked) if tracked.flags.mode != TrackingMode::Off => {
                format!(
                    "<img src=\"{}.gif\" alt=\"\" width=\"1\" height=\"1\">",
                    self.url(Kind::Open)
                )
            }
            _ => String::new(),
        }
    }

    fn link(&self, number: usize) -> Option<Value> {
        match self.table.links.get(number)? {
            Link::Constant { plain, target } => {
                let url = self
                    .tracked
                    .as_ref()
                    .and_then(|tracked| tracked.click(number, target));
                Some(Value::from_safe_string(
                    url.unwrap_or_else(|| plain.to_string()),
                ))
            }
            Link::Dynamic(_) => None,
        }
    }

    /// What stands in the place of a rendered URL.
    fn rendered_link(&self, number: usize, rendered: &str, html: bool) -> String {
        let Some(tracked) = &self.tracked else {
            return String::new();
        };
        let url = if html {
            decode_attribute(rendered)
        } else {
            rendered.into()
        };
        if is_below(url.trim(), tracked.tracker.base_url()) {
            return rendered.to_owned();
        }
        let Ok(target) = self.table.rules.target(&url) else {
            return rendered.to_owned();
        };
        let click = if self.table.clicks {
            tracked.click(number, &target)
        } else {
            None
        };
        match click {
            Some(url) => url,
            None if self.table.rules.utm.is_empty() => rendered.to_owned(),
            None if html => {
                let mut out = String::with_capacity(target.len() + 16);
                // A String takes everything.
                escape_html(&mut out, &target).unwrap_or_default();
                out
            }
            None => target,
        }
    }

    fn private(self: &Arc<Self>, key: &str) -> Option<Value> {
        match key {
            PIXEL => Some(Value::from_safe_string(self.pixel())),
            HTML_LINK => Some(Value::from_object(RenderedLink {
                scope: Arc::clone(self),
                html: true,
            })),
            TEXT_LINK => Some(Value::from_object(RenderedLink {
                scope: Arc::clone(self),
                html: false,
            })),
            _ => self.link(key.strip_prefix(PRIVATE)?.parse().ok()?),
        }
    }

    /// The first part of `path.to.it` that is not there.
    pub(crate) fn missing<'a>(self: &Arc<Self>, path: &'a str) -> Option<&'a str> {
        let ends = path
            .match_indices('.')
            .map(|(at, _)| at)
            .chain([path.len()]);
        ends.filter_map(|end| path.get(..end))
            .find(|part| self.path(part).is_undefined())
    }

    /// The value at `path.to.it`; undefined when a step is not there.
    pub(crate) fn path(self: &Arc<Self>, path: &str) -> Value {
        let mut steps = path.split('.');
        let first = steps
            .next()
            .and_then(|name| self.get_value_by_str(name))
            .unwrap_or(Value::UNDEFINED);
        steps.fold(first, |value, name| {
            value.get_attr(name).unwrap_or(Value::UNDEFINED)
        })
    }
}

impl Object for Scope {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        match key {
            "unsubscribe_url" => Some(Value::from_safe_string(self.url(Kind::Unsubscribe))),
            "message_id" => {
                let id = self
                    .tracked
                    .as_ref()
                    .map(|tracked| tracked.message.to_string());
                Some(Value::from(id.unwrap_or_default()))
            }
            "email" => Some(self.email.clone()),
            "name" => Some(self.of_recipient(&self.name, key)),
            "prospect_id" => Some(self.of_recipient(&self.prospect_id, key)),
            _ if key.starts_with(PRIVATE) => self.private(key),
            _ => self.of_callers(key),
        }
    }
}

/// The function that makes a link of a URL rendered in its place.
#[derive(Debug)]
struct RenderedLink {
    scope: Arc<Scope>,
    html: bool,
}

impl Object for RenderedLink {
    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let [number, rendered] = args else {
            return Err(Error::from(ErrorKind::MissingArgument));
        };
        let number = usize::try_from(number.clone()).unwrap_or(usize::MAX);
        let rendered = rendered.as_str().unwrap_or_default();
        Ok(Value::from_safe_string(
            self.scope.rendered_link(number, rendered, self.html),
        ))
    }
}
