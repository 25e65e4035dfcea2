//! Commands that need no running service, as an operator runs them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::dns::{DnsServer, Zone};

fn hikyaku(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikyaku"));
    command.args(arguments).current_dir(folder);
    command.output().expect("the executable runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What stands after `label` on a line of its own.
fn field<'t>(printed: &'t str, label: &str) -> &'t str {
    let line = printed.lines().find_map(|line| line.strip_prefix(label));
    line.unwrap_or_else(|| panic!("no {label:?} in:\n{printed}"))
        .trim()
}

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config/hikyaku.toml")
}

#[test]
fn check_config_accepts_the_sample_and_prints_every_mistake_of_a_broken_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let sample = samples();
    let good = hikyaku(
        folder.path(),
        &["check-config", &sample.display().to_string()],
    );
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    assert_eq!(text(&good.stdout), format!("{}: ok\n", sample.display()));

    let broken = "[smtp]\nport = \"x\"\n[shaping]\nfile = \"s.toml\"\n[stroe]\n";
    std::fs::write(folder.path().join("broken.toml"), broken).expect("a file");
    std::fs::write(folder.path().join("s.toml"), "[default]\nrate = \"5\"\n").expect("a file");
    std::fs::write(
        folder.path().join("bounce-rules.toml"),
        "\n[[rule]]\nnam = 1\n",
    )
    .expect("a file");
    let bad = hikyaku(folder.path(), &["check-config", "broken.toml"]);
    assert_eq!(bad.status.code(), Some(2));
    let printed = text(&bad.stderr);
    let starts = [
        "broken.toml:2: smtp.port: ",
        "broken.toml:5: stroe: ",
        "s.toml:2: default.rate: ",
        "bounce-rules.toml:",
    ];
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), starts.len(), "{printed}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}");
    }
    assert_eq!(
        hikyaku(folder.path(), &["check-config"]).status.code(),
        Some(2)
    );
    assert_eq!(
        hikyaku(folder.path(), &["check-config", "none.toml"])
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn a_generated_key_is_private_is_not_replaced_and_passes_the_check_once_published() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = runtime
        .block_on(DnsServer::start(Zone::new()))
        .expect("a DNS server");
    let config = format!(
        "dns.nameservers = [\"{}\"]\ndkim.dir = \"keys\"\n",
        server.addr()
    );
    std::fs::write(at.join("h.toml"), config).expect("a file");
    let generate = |more: &[&str]| {
        let arguments = ["dkim", "generate", "Brand.example", "--config", "h.toml"];
        hikyaku(at, &[&arguments, more].concat())
    };
    let check = || {
        hikyaku(
            at,
            &["dkim", "check", "brand.example", "--config", "h.toml"],
        )
    };
    assert_eq!(check().status.code(), Some(1), "no key yet");

    for (more, file) in [
        (&[][..], "hikyaku.pem"),
        (&["--algorithm", "ed25519", "--selector", "S2"], "s2.pem"),
    ] {
        let made = generate(more);
        assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
        let file = at.join("keys/brand.example").join(file);
        let mode = std::fs::metadata(&file)
            .expect("the key")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let pem = std::fs::read_to_string(&file).expect("the key");
        assert!(!text(&made.stdout).contains(pem.lines().nth(1).expect("a line")));

        let again = generate(more);
        assert_eq!(again.status.code(), Some(1));
        assert_eq!(std::fs::read_to_string(&file).expect("the key"), pem);

        let unpublished = check();
        assert_eq!(unpublished.status.code(), Some(1));
        assert!(
            text(&unpublished.stdout).contains("missing"),
            "{}",
            text(&unpublished.stdout)
        );

        let printed = text(&made.stdout);
        let (name, value) = (field(&printed, "name"), field(&printed, "value"));
        let zone_line = printed.lines().last().expect("a line");
        let strings: String = zone_line.split('"').skip(1).step_by(2).collect();
        assert_eq!(strings, value, "the zone file says the same");
        server.change(|zone| zone.txt(name, value));
    }
    let published = check();
    assert_eq!(
        published.status.code(),
        Some(0),
        "{}",
        text(&published.stdout)
    );

    server.change(|zone| {
        let other = "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
        let name = "s2._domainkey.brand.example";
        zone.without(name).txt(name, other)
    });
    let replaced = check();
    assert_eq!(replaced.status.code(), Some(1));
    assert!(
        text(&replaced.stdout).contains("different"),
        "{}",
        text(&replaced.stdout)
    );
}

#[test]
fn a_name_server_that_does_not_answer_is_not_a_missing_record() {
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let zone = Zone::new().behave(
        "hikyaku._domainkey.brand.example",
        testkit::dns::Behaviour::ServFail,
    );
    let server = runtime
        .block_on(DnsServer::start(zone))
        .expect("a DNS server");
    let config = format!(
        "dns.nameservers = [\"{}\"]\ndkim.dir = \"keys\"\n",
        server.addr()
    );
    std::fs::write(folder.path().join("h.toml"), config).expect("a file");
    let dkim = |what| {
        hikyaku(
            folder.path(),
            &["dkim", what, "brand.example", "--config", "h.toml"],
        )
    };
    assert_eq!(dkim("generate").status.code(), Some(0));
    let checked = dkim("check");
    assert_eq!(checked.status.code(), Some(1));
    assert!(
        text(&checked.stdout).contains("no answer"),
        "{}",
        text(&checked.stdout)
    );
}
