//! The shipped file: each provider's hosts roll up to it, and each value says where it came from.

use std::path::Path;

use service::config::shaping::ShapingFile;

use super::destination_of;

/// Largest providers of the world and of Japan that have to be there.
const EXPECTED: [&str; 33] = [
    "gmail",
    "yahoo",
    "outlook",
    "microsoft365",
    "apple",
    "comcast",
    "charter",
    "orange",
    "sfr",
    "free",
    "laposte",
    "gmx",
    "t-online",
    "ionos",
    "libero",
    "mailru",
    "yandex",
    "qq",
    "netease",
    "naver",
    "mimecast",
    "proofpoint",
    "barracuda",
    "docomo",
    "au",
    "softbank",
    "rakuten-mobile",
    "yahoo-japan",
    "nifty",
    "ocn",
    "biglobe",
    "so-net",
    "plala",
];

struct Sample {
    text: String,
    file: ShapingFile,
}

fn sample() -> Sample {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/shaping.toml");
    let text = std::fs::read_to_string(&path).expect("the sample");
    let file = ShapingFile::parse(&path, &text).expect("no mistake");
    Sample { text, file }
}

/// The text of each provider: its comments before and its keys after `[[provider]]`.
fn blocks(text: &str) -> Vec<(Vec<&str>, Vec<&str>)> {
    let lines: Vec<_> = text.lines().collect();
    let heads = (0..lines.len()).filter(|at| lines[*at] == "[[provider]]");
    heads
        .map(|at| {
            let before = lines[..at]
                .iter()
                .rev()
                .take_while(|line| line.starts_with('#'));
            let after = lines[at + 1..].iter().take_while(|line| !line.is_empty());
            (before.copied().collect(), after.copied().collect())
        })
        .collect()
}

#[test]
fn every_provider_gets_its_own_hosts() {
    let Sample { text, file } = sample();
    let names: Vec<_> = file.providers.iter().map(|of| of.name.as_str()).collect();
    for expected in EXPECTED {
        assert!(names.contains(&expected), "{expected} is missing");
    }
    let blocks = blocks(&text);
    assert_eq!(blocks.len(), names.len());
    for ((before, _), name) in blocks.iter().zip(names) {
        let samples = before
            .iter()
            .find_map(|line| line.strip_prefix("# samples: "));
        let hosts: Vec<_> = samples.expect("sample hosts").split(' ').collect();
        let domain = "customer.example".parse().expect("a domain");
        // One by one, and all together: no earlier provider takes any of them.
        for hosts in hosts.chunks(1).chain([&*hosts]) {
            let (destination, _) = destination_of(&domain, hosts, &file);
            assert_eq!(destination.as_str(), name, "{hosts:?}");
        }
    }
}

#[test]
fn every_value_says_where_it_came_from() {
    let says = |line: &str| {
        let source = line.trim_start_matches("# ").trim_start_matches("hosts: ");
        source == "assumed"
            || source
                .strip_prefix("source: ")
                .is_some_and(|of| of.starts_with("https://") || of.starts_with("as for "))
    };
    for (before, after) in blocks(&sample().text) {
        let hosts = before.iter().find(|line| line.starts_with("# hosts: "));
        assert!(hosts.is_some_and(|line| says(line)), "{before:?}");
        for pair in after.windows(2) {
            let is_limit = !pair[1].starts_with('#') && !pair[1].starts_with("mx_suffix");
            assert!(!is_limit || says(pair[0]), "{:?} of {after:?}", pair[1]);
        }
    }
}

#[test]
fn the_file_is_a_beginning_and_leaves_room_to_adapt() {
    for provider in sample().file.providers {
        let limits = provider.limits;
        assert!(limits.adaptive, "{}", provider.name);
        assert!(
            limits.max_rate.per_second() > limits.rate.per_second(),
            "{}",
            provider.name
        );
        assert!(
            limits.rate.per_second() <= 20.0 && limits.connections <= 25,
            "{}",
            provider.name
        );
    }
}
