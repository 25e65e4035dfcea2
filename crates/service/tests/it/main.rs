//! Configuration as operators type it: files with mistakes, and the environment over them.

use std::path::{Path, PathBuf};

use service::config::shaping::ShapingFile;
use service::config::{Config, Environment, KeyMaterial, Mistakes, StoreUrl};

/// Each file in `tests/broken` ends with the lines that `check-config` prints for it, after `#! `
/// and without the file's name.
#[test]
fn every_mistake_of_a_broken_file_is_reported_at_its_line() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/broken");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(
        files.len() > 5,
        "the folder of broken files is in {}",
        folder.display()
    );
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a broken file");
        let expected: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("#! "))
            .collect();
        let prefix = format!("{}:", file.display());
        let printed = check(&file)
            .expect_err("a broken file has mistakes")
            .to_string();
        let printed: Vec<String> = printed
            .lines()
            .map(|line| {
                line.replace(&prefix, "")
                    .replace(&folder.display().to_string(), "FOLDER")
            })
            .collect();
        assert_eq!(printed, expected, "{}", file.display());
    }
}

fn check(file: &Path) -> Result<(), Mistakes> {
    let name = file.file_name().expect("a name").to_string_lossy();
    if name.starts_with("shaping") {
        let text = std::fs::read_to_string(file).expect("a file");
        ShapingFile::parse(file, &text).map(drop)
    } else {
        Config::check(Some(file), &Environment::default(), &[]).map(drop)
    }
}

struct Written {
    folder: tempfile::TempDir,
}

impl Written {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let written = Self { folder };
        written.beside("hikyaku.toml", text);
        written
    }

    fn beside(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).expect("a file");
    }

    fn load(&self, environment: &[(&str, &str)]) -> Result<Config, Mistakes> {
        let environment: Environment = environment.iter().copied().collect();
        Config::load(Some(&self.folder.path().join("hikyaku.toml")), &environment)
    }
}

#[test]
fn the_environment_overrides_what_the_file_says() {
    let written = Written::new("[smtp]\nport = 2525\n[[accounts]]\nid = \"a\"\n");
    let config = written
        .load(&[
            ("HIKYAKU__SMTP__PORT", "26"),
            ("HIKYAKU__SMTP__EHLO", "mx.example"),
            ("HIKYAKU__SMTP__TIMEOUTS__FINAL_DOT", "5m"),
            ("HIKYAKU__STORE__URL", "sqlite:/var/lib/h.db"),
            ("HIKYAKU__DNS__NAMESERVERS", "127.0.0.1:5353, ::1"),
            ("HIKYAKU__SMTP__ALLOW_PRIVATE_MX", "[\"127.0.0.0/8\"]"),
            (
                "HIKYAKU__ACCOUNTS__0__TRACKING__BASE_URL",
                "https://t.example/",
            ),
            ("HIKYAKU__DKIM__DIR", "7"),
            ("HIKYAKU_LOG", "debug"),
        ])
        .expect("no mistake");
    assert_eq!(config.smtp.port, 26);
    assert_eq!(config.smtp.ehlo, "mx.example");
    assert_eq!(config.smtp.timeouts.final_dot.as_secs(), 300);
    assert_eq!(config.store.url, StoreUrl::Sqlite("/var/lib/h.db".into()));
    let servers: Vec<String> = config
        .dns
        .nameservers
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(servers, ["127.0.0.1:5353", "[::1]:53"]);
    assert_eq!(config.smtp.allow_private_mx.len(), 1);
    assert_eq!(config.accounts[0].id, "a");
    assert_eq!(config.accounts[0].tracking.base_url, "https://t.example");
    assert!(config.dkim.dir.ends_with("7"));
}

#[test]
fn mistakes_in_the_environment_name_the_variable() {
    let mistakes = Written::new("")
        .load(&[
            ("HIKYAKU__STORE__ULR", "sqlite:a.db"),
            ("HIKYAKU__TRACKER__SETTLE", "soon"),
            ("HIKYAKU__DATA_DIR__X", "1"),
            ("HIKYAKU__", "1"),
        ])
        .expect_err("mistakes");
    let mut lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
    lines.sort();
    let wanted = "a duration (such as \"20ms\", \"30s\", \"5m\", \"4h\", \"30d\")";
    assert_eq!(
        lines,
        [
            "HIKYAKU__: names no key: write HIKYAKU__SECTION__KEY".to_owned(),
            "HIKYAKU__DATA_DIR__X: data_dir: is a table, expected a string".to_owned(),
            "HIKYAKU__STORE__ULR: store.ulr: unknown key; did you mean `url`?".to_owned(),
            format!("HIKYAKU__TRACKER__SETTLE: tracker.settle: \"soon\" is not {wanted}"),
        ]
    );
}

#[test]
fn keys_come_from_files_variables_and_hashes_and_are_never_shown() {
    let written = Written::new(
        "[[api.keys]]\nname = \"a\"\nkey_file = \"a.key\"\n\
         [[api.keys]]\nname = \"b\"\nkey_env = \"B_KEY\"\nscopes = [\"admin\"]\n",
    );
    written.beside("a.key", "hk_secret_a\n");
    let config = written
        .load(&[("B_KEY", "hk_secret_b")])
        .expect("no mistake");
    let plain = |index: usize| match &config.api.keys[index].material {
        KeyMaterial::Plain(key) => key.reveal().to_owned(),
        KeyMaterial::Sha256(_) => String::new(),
    };
    assert_eq!(
        (plain(0), plain(1)),
        ("hk_secret_a".into(), "hk_secret_b".into())
    );
    assert!(!format!("{config:?}").contains("hk_secret"));
}

#[test]
fn one_account_may_be_written_as_a_table() {
    let config = Written::new("[accounts.tracking]\nmode = \"off\"\n")
        .load(&[])
        .expect("no mistake");
    assert_eq!(config.accounts.len(), 1);
    assert_eq!(config.accounts[0].id, "default");
    assert_eq!(config.accounts[0].tracking.mode, model::TrackingMode::Off);
}

#[test]
fn a_cluster_has_sixteen_partitions_unless_told() {
    let partitions = |text: &str| {
        Written::new(text)
            .load(&[])
            .expect("no mistake")
            .store
            .partitions
    };
    assert_eq!(partitions("store.url = \"redis+cluster://a,b\""), 16);
    assert_eq!(
        partitions("store.url = \"redis+cluster://a,b\"\nstore.partitions = 4"),
        4
    );
    assert_eq!(partitions("store.url = \"redis://a\""), 1);
}

#[test]
fn a_default_file_may_be_missing_and_a_named_one_may_not() {
    let written = Written::new("");
    let path = written.folder.path().join("hikyaku.toml");
    let checked = |path: &Path| Config::check(Some(path), &Environment::default(), &[]);
    let config = checked(&path).expect("no mistake");
    assert_eq!(ShapingFile::load(&config), Ok(ShapingFile::default()));
    let warmup = "[[warmup]]\nsource = \"ip3\"\nstart = \"2026-03-01\"\n";
    written.beside("shaping.toml", warmup);
    let unknown = checked(&path).expect_err("no such source").to_string();
    let told = "shaping.toml:2: warmup[0].source: there is no source \"ip3\" in smtp.sources";
    assert!(unknown.ends_with(told), "{unknown}");
    written.beside("hikyaku.toml", "[[smtp.sources]]\nname = \"ip3\"\n");
    checked(&path).expect("there it is");
    written.beside("hikyaku.toml", "shaping.file = \"mine.toml\"");
    let missing = checked(&path)
        .expect_err("a named file has to be there")
        .to_string();
    assert!(missing.contains("mine.toml: cannot be read"), "{missing}");
    let nowhere = checked(&written.folder.path().join("nowhere.toml"));
    assert!(nowhere.is_err_and(|mistakes| mistakes.to_string().contains("cannot be read")));
}

#[test]
fn sections_of_the_shaping_file_fill_in_for_each_other() {
    let text = r#"
        [default]
        connections = 7
        rate = "2/s"
        [[provider]]
        name = "big"
        mx_suffix = [".Big.example", "big.test"]
        rate = "10/m"
        [domain."Slow.Example"]
        connections = 1
        [mx]
        "sink.example" = "127.0.0.1:2525"
        "v6.example" = "[::1]:2525"
        "*" = "smarthost.example"
    "#;
    let shaping = ShapingFile::parse(Path::new("shaping.toml"), text).expect("no mistake");
    let big = &shaping.providers[0];
    assert_eq!(big.limits.connections, 7);
    assert_eq!(big.limits.rate.to_string(), "10/m");
    assert_eq!(big.limits.max_rate.to_string(), "40/m");
    assert_eq!(shaping.default.max_rate.to_string(), "8/s");
    let hosts = [
        "mx1.big.example",
        "big.test",
        "a.big.test",
        "notbig.test",
        "big.test.example",
    ];
    assert_eq!(
        hosts.map(|host| big.has_host(host)),
        [true, true, true, false, false]
    );
    let domain = |name: &str| name.parse().expect("a domain");
    let slow = &shaping.domains[&domain("slow.example")];
    assert_eq!(
        (slow.connections, slow.rate.to_string()),
        (1, "2/s".to_owned())
    );
    let route = |name: &str| {
        let route = shaping.routes.of(&domain(name)).expect("a route");
        (route.host.clone(), route.port)
    };
    assert_eq!(route("sink.example"), ("127.0.0.1".to_owned(), Some(2525)));
    assert_eq!(route("v6.example"), ("::1".to_owned(), Some(2525)));
    assert_eq!(route("any.example"), ("smarthost.example".to_owned(), None));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*", tail in "[a-z\\[\\]=\"0-9.\\n ]{0,200}") {
        let file = Path::new("x.toml");
        let _read = ShapingFile::parse(file, &text).is_ok();
        let _read = ShapingFile::parse(file, &tail).is_ok();
    }
}
