//! The samples and the schema hold each other: what one knows, the other shows.

use std::path::{Path, PathBuf};

use super::document::FileConfig;
use super::reader::Reader;
use super::*;

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config")
}

fn read_text(text: &str) -> (Config, Reader) {
    let file = samples().join("hikyaku.toml");
    let typed = FileConfig::parse(&file, text).expect("TOML");
    let reader = Reader::new(typed, Vec::new());
    let config = reader.read(|root| sections::config(root, &Environment::default()));
    (config, reader)
}

/// Takes the `#` off every line that shows a key or a section.
fn with_examples(text: &str) -> String {
    let shows = |line: &str| {
        line.strip_prefix('#').is_some_and(|rest| {
            rest.starts_with(|c: char| c == '[' || c == '"' || c.is_ascii_lowercase())
        })
    };
    let lines = text.lines().map(|line| match shows(line) {
        true => line.trim_start_matches('#'),
        false => line,
    });
    lines.map(|line| format!("{line}\n")).collect()
}

#[test]
fn the_sample_shows_every_key_and_no_other() {
    let text = std::fs::read_to_string(samples().join("hikyaku.toml")).expect("the sample");
    let (_, reader) = read_text(&with_examples(&text));
    let hidden: Vec<String> = reader
        .asked()
        .into_iter()
        .filter_map(|(key, typed)| (!typed).then_some(key))
        .collect();
    assert_eq!(
        hidden,
        Vec::<String>::new(),
        "keys that the sample does not show"
    );
    let unknown: Vec<String> = reader
        .finish()
        .into_iter()
        .filter(|mistake| mistake.detail.starts_with("unknown key"))
        .map(|mistake| mistake.to_string())
        .collect();
    assert_eq!(
        unknown,
        Vec::<String>::new(),
        "keys that the sample invents"
    );
}

#[test]
fn the_sample_shows_the_defaults() {
    let text = std::fs::read_to_string(samples().join("hikyaku.toml")).expect("the sample");
    let (shown, _) = read_text(&text);
    let (default, _) = read_text("");
    let same_but_named = |config: &Config| {
        let mut config = config.clone();
        config.shaping.file.named = true;
        config.bounces.rules_file.named = true;
        config.engagement.rules_file.named = true;
        format!("{config:#?}")
    };
    assert_eq!(same_but_named(&shown), same_but_named(&default));
}

#[test]
fn the_sample_shaping_file_shows_the_defaults() {
    let file = samples().join("shaping.toml");
    let text = std::fs::read_to_string(&file).expect("the sample");
    let shaping = shaping::ShapingFile::parse(&file, &text).expect("no mistake");
    let without_lines = shaping::Limits {
        lines: shaping::Lines::default(),
        ..shaping.default.clone()
    };
    assert_eq!(without_lines, shaping::Limits::default());
    assert!(shaping.default.lines.rate < shaping.providers[0].limits.lines.rate);
    assert!(
        shaping
            .providers
            .iter()
            .all(
                |provider| provider.limits.max_rate != shaping.default.max_rate
                    || provider.limits.rate == shaping.default.rate
            )
    );
    let typed = FileConfig::parse(&file, &with_examples(&text)).expect("TOML");
    let reader = Reader::new(typed, Vec::new());
    let examples = reader.read(shaping::shaping);
    assert_eq!(reader.finish(), Vec::new());
    assert_eq!(examples.domains.len(), 1);
    assert_eq!(examples.warmups.len(), 1);
    assert_eq!(examples.routes.by_domain.len(), 1);
}

#[test]
fn every_sample_loads_as_it_stands() {
    let file = samples().join("hikyaku.toml");
    let checked = Config::check(Some(&file), &Environment::default(), &[]);
    let config = checked.expect("no mistake");
    assert_eq!(config.data_dir, Path::new("data"));
    assert_eq!(config.journal.dir, Path::new("data/journal"));
    assert_eq!(config.dkim.dir, samples().with_file_name("dkim-keys"));
}
