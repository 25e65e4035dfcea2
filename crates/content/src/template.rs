//! Templates: one environment per content, and what a template can reach.
//!
//! Owns the bounds (source, steps, output, depth), what counts as missing, and escaping. HTML
//! escapes values, text and headers do not; `null` prints as nothing.
//!
//! The bounds hold for what is put out, also where it is kept in memory first. One thing MiniJinja
//! gives no hold on: strings that an expression joins (`a ~ a`, again and again) before any of it
//! is put out.

use crate::jinja::Tags;
use crate::rewrite::PRIVATE;
use crate::scope::Scope;
use crate::sink::Sink;
use crate::spec::{ContentError, RecipientError};
use crate::url::escape_html;
use minijinja::syntax::SyntaxConfig;
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value,
};
use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;

/// Steps that one template may take: some milliseconds.
const FUEL: u64 = 250_000;
/// How deep macros and includes may nest.
const DEPTH: usize = 40;
/// Mailbox providers cut messages at a tenth of this.
const LONGEST_SOURCE: usize = 1 << 20;
/// The most literal text that a template may keep in memory in all its steps.
const CAPTURED: usize = 256 << 20;
const LEAST_FUEL: u64 = 256;
/// The most that one part may become, before it is encoded.
const LONGEST_PART: usize = 4 << 20;
/// The most that one header field may become.
const LONGEST_HEADER: usize = 8 << 10;

thread_local! {
    /// What the values of the template being rendered on this thread came to, in bytes.
    static EMITTED: Cell<usize> = const { Cell::new(0) };
}

/// One template, by the name of its field.
pub(crate) struct Field {
    name: String,
    kind: FieldKind,
    /// A guess at the size of the output.
    hint: usize,
}

enum FieldKind {
    /// No tag in it: the text itself, with CRLF line ends.
    Constant(Vec<u8>),
    /// In the environment under the field's name.
    Template,
}

/// All templates of a content.
pub(crate) struct Templates {
    env: Environment<'static>,
    fields: Vec<Field>,
    needs: Needs,
    fuel: u64,
}

/// What a recipient must bring, as far as it can be told without rendering.
#[derive(Default)]
struct Needs {
    /// Plain `{{ path.to.it }}`.
    paths: Vec<Box<str>>,
    /// Paths that a filter for strings is put on.
    strings: Vec<Box<str>>,
    /// There is more than that: only a trial can tell.
    trial: bool,
}

/// The place of a field among the templates.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldIndex(usize);

impl Templates {
    pub(crate) fn new() -> Self {
        Self {
            env: environment(UndefinedBehavior::Strict),
            fields: Vec::new(),
            needs: Needs::default(),
            fuel: FUEL,
        }
    }

    /// Compiles `source`, the field as its author wrote it, and keeps what `rewrite` makes of it.
    pub(crate) fn add(
        &mut self,
        name: &str,
        source: &str,
        rewrite: impl FnOnce(&str) -> String,
    ) -> Result<FieldIndex, ContentError> {
        let longest = if is_part(name) {
            LONGEST_SOURCE
        } else {
            LONGEST_HEADER
        };
        if source.len() > longest {
            let detail = format!("longer than {longest} bytes");
            return Err(ContentError {
                field: name.to_owned(),
                line: None,
                template: false,
                detail,
            });
        }
        // Errors speak of the source that the author knows.
        self.compile(name, source)?;
        self.bound_captures(source);
        self.needs.learn(source);
        let rewritten = rewrite(source);
        let kind = if Tags::scan(&rewritten).is_empty() {
            self.env.remove_template(name);
            FieldKind::Constant(crate::sink::crlf(&rewritten))
        } else {
            self.compile(name, &rewritten)?;
            FieldKind::Template
        };
        self.fields.push(Field {
            name: name.to_owned(),
            kind,
            hint: rewritten.len() + rewritten.len() / 4,
        });
        Ok(FieldIndex(self.fields.len() - 1))
    }

    /// Fuel counts steps, and a step may keep a whole stretch of literal text.
    fn bound_captures(&mut self, source: &str) {
        let tags = Tags::scan(source);
        if tags.captures(source) {
            let steps = CAPTURED / tags.longest_literal(source).max(1);
            let steps = u64::try_from(steps).unwrap_or(FUEL);
            self.fuel = self.fuel.min(steps.max(LEAST_FUEL));
            self.env.set_fuel(Some(self.fuel));
        }
    }

    fn compile(&mut self, name: &str, source: &str) -> Result<(), ContentError> {
        self.env
            .add_template_owned(name.to_owned(), source.to_owned())
            .map_err(|error| template_error(name, &error))
    }

    /// Renders everything once with nothing but the defaults of the batch and every unknown
    /// variable empty, to find what fails for everybody: unknown filters, endless loops.
    pub(crate) fn trial(&self, defaults: &Value) -> Vec<ContentError> {
        let mut env = self.env.clone();
        env.set_undefined_behavior(UndefinedBehavior::Chainable);
        let scope = Scope {
            defaults: defaults.clone(),
            ..Scope::empty()
        };
        let scope = Value::from_object(scope);
        let fatal = |field: &Field| match run(&env, field, &scope) {
            Ok(_) => None,
            Err(Failure::TooLarge) => Some(ContentError {
                field: field.name.clone(),
                line: None,
                template: true,
                detail: format!("becomes larger than {} bytes", field.limit()),
            }),
            Err(Failure::Template(error)) => {
                is_everyones(&error).then(|| template_error(&field.name, &error))
            }
        };
        self.fields.iter().filter_map(fatal).collect()
    }

    /// Renders a field with CRLF line ends.
    pub(crate) fn render(
        &self,
        field: FieldIndex,
        scope: &Value,
    ) -> Result<Vec<u8>, RecipientError> {
        let Some(field) = self.fields.get(field.0) else {
            return Ok(Vec::new());
        };
        run(&self.env, field, scope).map_err(|failure| failure.for_recipient(field))
    }

    /// Whether a recipient has what the templates need, as far as a glimpse at the variables tells;
    /// when not, [`Self::check`] has to say.
    pub(crate) fn is_enough(&self, defaults: &Value, glimpse: impl Fn(&str) -> Glimpse) -> bool {
        self.needs.are_met(defaults, glimpse)
    }

    /// Whether `scope` has what the templates need; renders them only when that cannot be told
    /// otherwise.
    pub(crate) fn check(&self, scope: &Arc<Scope>) -> Result<(), RecipientError> {
        if !self.needs.trial
            && self
                .needs
                .strings
                .iter()
                .all(|path| scope.path(path).as_str().is_some())
        {
            return match self.needs.paths.iter().find_map(|path| scope.missing(path)) {
                None => Ok(()),
                Some(name) => Err(RecipientError::MissingVariable {
                    name: name.to_owned(),
                }),
            };
        }
        let scope = Value::from_dyn_object(Arc::clone(scope));
        for field in &self.fields {
            run(&self.env, field, &scope).map_err(|failure| failure.for_recipient(field))?;
        }
        Ok(())
    }
}

/// What is known of a variable without reading its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Glimpse {
    /// There is none of this name.
    Absent,
    /// It is a text.
    Text,
    /// It is something else.
    Other,
    /// Not even that.
    Unknown,
}

impl Needs {
    /// Whether nothing is missing, as far as a glimpse at the variables tells.
    fn are_met(&self, defaults: &Value, glimpse: impl Fn(&str) -> Glimpse) -> bool {
        let default = |path: &str| defaults.get_attr(path).unwrap_or(Value::UNDEFINED);
        let is_there = |path: &str| match glimpse(path) {
            Glimpse::Text | Glimpse::Other => true,
            Glimpse::Absent => !default(path).is_undefined(),
            Glimpse::Unknown => false,
        };
        let is_text = |path: &str| match glimpse(path) {
            Glimpse::Text => true,
            Glimpse::Absent => default(path).as_str().is_some(),
            Glimpse::Other | Glimpse::Unknown => false,
        };
        // What stands below a variable takes reading it.
        let plain = |path: &str| !path.contains('.') && !path.starts_with(PRIVATE);
        !self.trial
            && self.paths.iter().all(|path| plain(path) && is_there(path))
            && self.strings.iter().all(|path| plain(path) && is_text(path))
    }

    fn learn(&mut self, source: &str) {
        let tags = Tags::scan(source);
        self.trial |= tags.has_statements(source);
        for expression in tags.expressions(source) {
            match simple(expression) {
                Some((path, filtered)) if !RESERVED.contains(&path) => {
                    let paths = if filtered {
                        &mut self.strings
                    } else {
                        &mut self.paths
                    };
                    if !paths.iter().any(|known| &**known == path) {
                        paths.push(path.into());
                    }
                }
                Some(_) => {}
                None => self.trial = true,
            }
        }
    }
}

/// What is always there.
const RESERVED: [&str; 5] = [
    "unsubscribe_url",
    "email",
    "name",
    "prospect_id",
    "message_id",
];
/// Filters that take any string.
const STRING_FILTERS: [&str; 10] = [
    "e",
    "escape",
    "upper",
    "lower",
    "title",
    "capitalize",
    "trim",
    "safe",
    "urlencode",
    "length",
];

/// `path.to.it`, or that with filters that take any string; `None` for all else.
fn simple(expression: &str) -> Option<(&str, bool)> {
    let mut pieces = expression.split('|').map(str::trim);
    let path = pieces.next()?;
    let name = |part: &str| {
        let mut bytes = part.bytes();
        bytes
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let literal = matches!(
        path,
        "true" | "false" | "none" | "True" | "False" | "None" | "self" | "loop"
    );
    let mut filtered = false;
    for filter in pieces {
        filtered = true;
        if !STRING_FILTERS.contains(&filter) {
            return None;
        }
    }
    (!literal && path.split('.').all(name)).then_some((path, filtered))
}

enum Failure {
    TooLarge,
    Template(Error),
}

impl Failure {
    fn for_recipient(self, field: &Field) -> RecipientError {
        match self {
            Self::TooLarge => RecipientError::InvalidVars {
                detail: format!("{} becomes larger than {} bytes", field.name, field.limit()),
            },
            Self::Template(error) if error.kind() == ErrorKind::UndefinedError => {
                let detail = error.detail().unwrap_or("a variable");
                let name = detail.split('`').nth(1).unwrap_or(detail).to_owned();
                RecipientError::MissingVariable { name }
            }
            Self::Template(error) => {
                let error = template_error(&field.name, &error);
                let line = error
                    .line
                    .map(|line| format!(", line {line}"))
                    .unwrap_or_default();
                RecipientError::InvalidVars {
                    detail: format!("{}{line}: {}", error.field, error.detail),
                }
            }
        }
    }
}

impl Field {
    fn limit(&self) -> usize {
        if is_part(&self.name) {
            LONGEST_PART
        } else {
            LONGEST_HEADER
        }
    }
}

/// Whether a field is a part of the body; the others are header fields.
fn is_part(name: &str) -> bool {
    matches!(name, "html" | "text")
}

fn run(env: &Environment<'_>, field: &Field, scope: &Value) -> Result<Vec<u8>, Failure> {
    match &field.kind {
        FieldKind::Constant(text) if text.len() > field.limit() => Err(Failure::TooLarge),
        FieldKind::Constant(text) => Ok(text.clone()),
        FieldKind::Template => {
            let mut sink = Sink::new(field.hint, field.limit());
            EMITTED.set(0);
            let template = env.get_template(&field.name).map_err(Failure::Template)?;
            match template
                .render_captured_to(scope.clone(), &mut sink)
                .map(drop)
            {
                Ok(()) => Ok(sink.into_text()),
                Err(_) if sink.overflowed() || EMITTED.get() > LONGEST_PART => {
                    Err(Failure::TooLarge)
                }
                Err(error) => Err(Failure::Template(error)),
            }
        }
    }
}

fn environment(undefined: UndefinedBehavior) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(undefined);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(DEPTH);
    // What is written stays as written, to its last line break. The default delimiters are sound.
    let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
    env.set_syntax(syntax.unwrap_or_default());
    env.set_auto_escape_callback(|name| {
        if name == "html" {
            AutoEscape::Html
        } else {
            AutoEscape::None
        }
    });
    env.set_formatter(format);
    // The only way to grow a value from one turn of a loop to the next.
    env.remove_global("namespace");
    env
}

/// As MiniJinja's own, but `null` is nothing, `/` stays (escaped, every URL would be unreadable),
/// and what all values come to is bounded, also in a `set` block or a macro.
fn format(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if value.is_none() {
        return Ok(());
    }
    if value.is_undefined() {
        return minijinja::escape_formatter(out, state, value);
    }
    let shown: Cow<'_, str> = value
        .as_str()
        .map_or_else(|| value.to_string().into(), Into::into);
    EMITTED.set(EMITTED.get().saturating_add(shown.len()));
    if EMITTED.get() > LONGEST_PART {
        return Err(Error::new(
            ErrorKind::WriteFailure,
            "values come to too much",
        ));
    }
    if value.is_safe() || matches!(state.auto_escape(), AutoEscape::None) {
        out.write_str(&shown)
    } else {
        escape_html(out, &shown)
    }
    .map_err(Error::from)
}

fn template_error(field: &str, error: &Error) -> ContentError {
    let detail = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    ContentError {
        field: field.to_owned(),
        line: error.line(),
        template: true,
        detail,
    }
}

/// Whether an error of the trial does not come from variables that were not there.
fn is_everyones(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::OutOfFuel
            | ErrorKind::UnknownFilter
            | ErrorKind::UnknownFunction
            | ErrorKind::UnknownTest
            | ErrorKind::TemplateNotFound
            | ErrorKind::BadInclude
            | ErrorKind::SyntaxError
    )
}
