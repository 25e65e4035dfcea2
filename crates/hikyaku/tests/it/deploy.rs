//! The files that start the service: units and containers name what exists, and say what is meant.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

const UNITS: [&str; 3] = ["hikyaku", "hikyaku-mta", "hikyaku-tracker"];

#[test]
fn the_units_are_known_to_systemd_and_let_nothing_out_that_is_not_needed() {
    let folder = tempfile::tempdir().unwrap();
    for unit in UNITS {
        let text = read(&format!("config/systemd/{unit}.service"));
        let here = text.replace("/usr/local/bin/hikyaku", env!("CARGO_BIN_EXE_hikyaku"));
        assert_ne!(text, here);
        let path = folder.path().join(format!("{unit}.service"));
        std::fs::write(&path, here).unwrap();
        let verified = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&verified.stderr);
        // What it says of a unit is a warning, and its exit status is good all the same.
        let of_unit = said.lines().filter(|line| line.contains(unit));
        assert_eq!(of_unit.collect::<Vec<_>>(), Vec::<&str>::new());
        assert!(verified.status.success(), "{said}");
        let judged = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=20"])
            .arg(&path)
            .output()
            .unwrap();
        assert!(
            judged.status.success(),
            "{}",
            String::from_utf8_lossy(&judged.stdout)
        );
    }
}

/// YAML as JSON, by the library that everybody has.
fn yaml(path: &str) -> serde_json::Value {
    let program =
        "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)";
    let read = Command::new("python3")
        .args(["-c", program])
        .arg(root().join(path))
        .output()
        .unwrap();
    assert!(
        read.status.success(),
        "{}",
        String::from_utf8_lossy(&read.stderr)
    );
    serde_json::from_slice(&read.stdout).unwrap()
}

#[test]
fn the_compose_file_names_files_volumes_and_commands_that_exist() {
    let compose = yaml("config/container/compose.yml");
    let volumes: BTreeSet<&str> = compose["volumes"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let services = compose["services"].as_object().unwrap();
    let of_kind = |start: &str| {
        services
            .keys()
            .filter(|name| name.starts_with(start))
            .count()
    };
    assert_eq!(
        (of_kind("mta-"), of_kind("tracker-"), of_kind("redis")),
        (2, 2, 1)
    );
    for (name, service) in services {
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let volume = volume.as_str().unwrap();
            let (from, _) = volume.split_once(':').unwrap();
            let exists = if from.starts_with('.') {
                root().join("config/container").join(from).exists()
            } else {
                volumes.contains(from)
            };
            assert!(exists, "{name}: {volume}");
        }
        for needed in service["depends_on"]
            .as_object()
            .into_iter()
            .flat_map(|of| of.keys())
        {
            assert!(services.contains_key(needed), "{name} needs {needed}");
        }
        if service["image"] != "hikyaku" || service["command"].is_null() {
            continue;
        }
        let command: Vec<&str> = service["command"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|of| of.as_str())
            .collect();
        let [daemon, "--config", "/etc/hikyaku/node.toml"] = command[..] else {
            panic!("{name}: {command:?}");
        };
        assert!(["mta", "tracker"].contains(&daemon));
    }
    let targets = yaml("config/container/prometheus.yml");
    for job in targets["scrape_configs"].as_array().unwrap() {
        for target in job["static_configs"][0]["targets"].as_array().unwrap() {
            let (service, _) = target.as_str().unwrap().split_once(':').unwrap();
            assert!(services.contains_key(service), "{target}");
        }
    }
}

#[test]
fn a_node_in_a_container_has_a_configuration_without_mistakes() {
    // As the image has them beside each other.
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in [
        ("config/container/node.toml", "node.toml"),
        ("config/shaping.toml", "shaping.toml"),
        ("config/bounce-rules.toml", "bounce-rules.toml"),
    ] {
        std::fs::write(folder.path().join(to), read(from)).unwrap();
    }
    std::fs::create_dir(folder.path().join("dkim-keys")).unwrap();
    let compose = yaml("config/container/compose.yml");
    let mut check = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
    check
        .arg("check-config")
        .arg(folder.path().join("node.toml"));
    for (name, value) in compose["x-node"]["environment"].as_object().unwrap() {
        check.env(name, value.as_str().unwrap());
    }
    let checked = check.output().unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
}

#[test]
fn the_dockerfile_copies_what_is_there_and_runs_as_nobody_special() {
    let text = read("config/container/Dockerfile");
    let mut user = None;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["COPY", "--from=build", ..] | ["COPY", ".", "."] => {}
            ["COPY", ref from @ .., _to] => {
                for path in from {
                    assert!(root().join(path).exists(), "{line}");
                }
            }
            ["USER", of] => user = Some(of),
            _ => {}
        }
    }
    assert!(
        user.is_some_and(|user| !user.starts_with('0') && user != "root"),
        "{user:?}"
    );
    let manifest = read("Cargo.toml");
    let version = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = "))
        .unwrap()
        .trim_matches('"');
    assert!(
        text.contains(&format!("FROM rust:{version}-")),
        "the toolchain of the workspace"
    );
}
