//! What a machine can see of the style guide. Lists of exceptions may only shrink.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// No function is longer. The style asks for near 70; this is where the build breaks.
const FUNCTION_LINES: usize = 100;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn files(ending: &str) -> Vec<PathBuf> {
    let mut open = vec![root()];
    let mut found = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != "target" && name != "data" {
                open.push(path);
            } else if name.ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn short(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

#[test]
fn every_module_says_what_it_is_for() {
    let silent: Vec<_> = files(".rs")
        .into_iter()
        // Unit tests beside the module that says it.
        .filter(|path| !path.ends_with("tests.rs"))
        .filter(|path| !fs::read_to_string(path).unwrap().starts_with("//!"))
        .map(|path| short(&path))
        .collect();
    assert!(silent.is_empty(), "no module documentation: {silent:#?}");
}

#[test]
fn no_function_is_very_long() {
    let mut long = Vec::new();
    for path in files(".rs") {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let head = line.trim_start();
            let is_function = [
                "fn ",
                "pub fn ",
                "pub(crate) fn ",
                "async fn ",
                "pub async fn ",
                "pub(crate) async fn ",
            ]
            .iter()
            .any(|prefix| head.starts_with(prefix));
            // A method without a body, in a trait, ends its signature with a semicolon.
            let signature = lines[start..]
                .iter()
                .find(|line| line.ends_with('{') || line.ends_with(';'));
            if !is_function || signature.is_some_and(|line| line.ends_with(';')) {
                continue;
            }
            let close = format!("{}}}", &line[..line.len() - head.len()]);
            let length = lines[start..]
                .iter()
                .position(|line| *line == close)
                .unwrap_or(0)
                + 1;
            if length > FUNCTION_LINES {
                long.push(format!("{}:{} has {length} lines", short(&path), start + 1));
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn nothing_is_left_unfinished() {
    // Written in two pieces, or this file would find itself.
    let marks = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[ig", "nore"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let mut found = Vec::new();
    for path in files(".rs") {
        let text = fs::read_to_string(&path).unwrap();
        found.extend(
            marks
                .iter()
                .filter(|mark| text.contains(**mark))
                .map(|mark| format!("{}: {mark}", short(&path))),
        );
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_declared_dependency_is_used() {
    let mut unused = Vec::new();
    for manifest in files("Cargo.toml") {
        let dir = manifest.parent().unwrap();
        let table: toml::Table = fs::read_to_string(&manifest).unwrap().parse().unwrap();
        let sources: String = files(".rs")
            .iter()
            .filter(|path| path.starts_with(dir))
            .map(|path| fs::read_to_string(path).unwrap())
            .collect();
        for section in ["dependencies", "dev-dependencies"] {
            let names = table
                .get(section)
                .and_then(toml::Value::as_table)
                .into_iter()
                .flat_map(|table| table.keys());
            let missing = names.filter(|name| !sources.contains(&name.replace('-', "_")));
            unused.extend(missing.map(|name| format!("{}: {name}", short(&manifest))));
        }
    }
    assert!(unused.is_empty(), "{unused:#?}");
}

#[test]
fn the_dashboards_and_alerts_ask_only_for_metrics_that_exist() {
    let known: BTreeSet<String> = service::metrics::Metrics::names()
        .into_iter()
        .map(|name| name.to_string())
        .collect();
    let mut unknown = BTreeSet::new();
    for path in files(".json")
        .into_iter()
        .chain(files("alerts.yml"))
        .filter(|path| path.starts_with(root().join("grafana")))
    {
        let text = fs::read_to_string(path).unwrap();
        for word in text
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("hikyaku_"))
        {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| word.strip_suffix(suffix))
                .filter(|base| known.contains(*base))
                .unwrap_or(word);
            if !known.contains(base) {
                unknown.insert(base.to_owned());
            }
        }
    }
    assert!(
        unknown.is_empty(),
        "nobody emits {unknown:?}; there are {known:?}"
    );
}
