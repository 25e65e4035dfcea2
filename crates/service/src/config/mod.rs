//! The configuration: what was typed becomes what is meant.
//!
//! `FileConfig` (private) is the document as typed with the environment over it; [`Config`] is what
//! the rooms work with: resolved paths, durations, parsed networks, every default filled in. All
//! mistakes are reported at once, each with its place. Owns the syntax of every file that an operator
//! writes, but for the bounce rules, which belong to who classifies; must not open a network
//! connection or create a file.

mod document;
mod reader;
mod sections;
pub mod shaping;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use document::{ENV_PREFIX, Mistake};
pub use sections::{
    Account, Acme, Api, ApiKey, Bind, Bounces, Certificate, Config, Dkim, Dns, Engagement, Inbound,
    Journal, KeyMaterial, Pool, Proxy, Redis, RedisTopology, Retention, Shaping, Smarthost, Smtp,
    SmtpTimeouts, Source, Store, StoreUrl, TlsReports, Tracker, Tracking, Webhooks, WeightedSource,
    base_url, https_host, link_target, page_origin,
};
pub use values::{
    AmbiguousPolicy, DanePolicy, DkimPolicy, Families, Scope, Secret, StatusProfile, TlsPolicy,
};

use document::FileConfig;
use reader::Reader;

/// Where the configuration is looked for when none is named, relative to the working directory.
pub const DEFAULT_PATH: &str = "config/hikyaku.toml";

/// The environment, as far as it is text.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// That of this process. Variables that are not UTF-8 name none of ours.
    pub fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// One variable.
    pub fn var(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let own = |(name, value): (N, V)| (name.into(), value.into());
        Self(variables.into_iter().map(own).collect())
    }
}

// Keys and passwords stand in the environment.
impl std::fmt::Debug for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Where a configuration was read.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The file that was named; none: the default one.
    path: Option<PathBuf>,
    environment: Environment,
}

/// All that is wrong with a configuration; never empty. `Display` is one line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<Mistake>);

impl Mistakes {
    /// `Ok` when there are none.
    ///
    /// # Errors
    /// When there are any.
    pub fn none_in(mistakes: Vec<Mistake>) -> Result<(), Self> {
        if mistakes.is_empty() {
            Ok(())
        } else {
            Err(Self(mistakes))
        }
    }

    /// Each of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Mistake> {
        self.0.iter()
    }
}

impl std::fmt::Display for Mistakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, mistake) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Checks another file that the configuration names, such as the bounce rules.
pub type Checker = fn(&Config) -> Vec<Mistake>;

impl Config {
    /// Reads the file and the environment. Without a path, [`DEFAULT_PATH`] if it exists, else every
    /// key has its default, as if that file were empty.
    ///
    /// # Errors
    /// Every mistake in the file and the environment.
    pub fn load(path: Option<&Path>, environment: &Environment) -> Result<Self, Mistakes> {
        let (config, mistakes) = read(path, environment);
        Mistakes::none_in(mistakes).map(|()| config)
    }

    /// Reads the same file again, under the same environment.
    ///
    /// # Errors
    /// Every mistake in them.
    pub fn again(&self) -> Result<Self, Mistakes> {
        Self::load(self.origin.path.as_deref(), &self.origin.environment)
    }

    /// Makes `data_dir`, for its owner alone: names and addresses of people lie in it. One that is
    /// there keeps its mode.
    ///
    /// # Errors
    /// When it cannot be made; the error names it.
    pub fn make_data_dir(&self) -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = &self.data_dir;
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
        made.map_err(|error| {
            std::io::Error::new(error.kind(), format!("data_dir {}: {error}", dir.display()))
        })
    }

    /// Like [`Config::load`], and reads the shaping file and whatever `others` check, even when the
    /// first file already has mistakes: one run shows everything. Needs no network.
    ///
    /// # Errors
    /// Every mistake in all of them.
    pub fn check(
        path: Option<&Path>,
        environment: &Environment,
        others: &[Checker],
    ) -> Result<Self, Mistakes> {
        let (config, mut mistakes) = read(path, environment);
        if let Err(in_shaping) = shaping::ShapingFile::load(&config) {
            mistakes.extend(in_shaping.0);
        }
        for check in others {
            mistakes.extend(check(&config));
        }
        Mistakes::none_in(mistakes).map(|()| config)
    }
}

/// Walks as far as there is anything to walk, with defaults where there are mistakes.
fn read(path: Option<&Path>, environment: &Environment) -> (Config, Vec<Mistake>) {
    let named = path.unwrap_or(Path::new(DEFAULT_PATH));
    let (mut typed, mut mistakes) = match std::fs::read_to_string(named) {
        Ok(text) => match FileConfig::parse(named, &text) {
            Ok(typed) => (typed, Vec::new()),
            Err(mistakes) => (FileConfig::empty(named), mistakes),
        },
        Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            (FileConfig::empty(named), Vec::new())
        }
        Err(error) => (FileConfig::empty(named), vec![unreadable(named, &error)]),
    };
    mistakes.extend(typed.overlay(environment.iter()));
    let reader = Reader::new(typed, mistakes);
    let mut config = reader.read(|root| sections::config(root, environment));
    config.origin = Origin {
        path: path.map(Path::to_owned),
        environment: environment.clone(),
    };
    (config, reader.finish())
}

fn unreadable(file: &Path, error: &std::io::Error) -> Mistake {
    Mistake {
        file: Some(file.to_owned()),
        line: None,
        path: String::new(),
        detail: format!("cannot be read: {error}"),
    }
}

/// A file that is read if it is there, and has to be there if it was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadFile {
    /// Where it is.
    pub path: PathBuf,
    /// Whether somebody named it; the default file may be missing, and defaults hold then.
    pub named: bool,
}

impl ReadFile {
    /// Its text; `None` when it is a default that does not exist.
    ///
    /// # Errors
    /// When it cannot be read: a mistake of its own.
    pub fn read(&self) -> Result<Option<String>, Mistake> {
        match std::fs::read_to_string(&self.path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if !self.named && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(&self.path, &error)),
        }
    }

    /// What it says, or what is shipped where it is a default that does not exist.
    ///
    /// # Errors
    /// When it cannot be read or parsed, with its path.
    pub fn parsed<T, E: std::fmt::Display>(
        &self,
        shipped: impl FnOnce() -> T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, String> {
        match self.read().map_err(|mistake| mistake.to_string())? {
            None => Ok(shipped()),
            Some(text) => parse(&text).map_err(|error| format!("{}: {error}", self.path.display())),
        }
    }
}
