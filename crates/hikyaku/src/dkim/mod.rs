//! `hikyaku dkim`: keys for a domain, and whether DNS knows them.

pub(crate) mod files;
pub(crate) mod lookup;
pub(crate) mod record;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use content::dkim::Algorithm;
use model::Domain;
use service::config::Config;

use crate::cli::{Failure, Terminal};
use record::Verdict;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key (mode 0600) and print the DNS record that announces it
    Generate(Generate),
    /// Compare what DNS says with the key files; exit status 1 if they differ
    Check(Check),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Generate {
    /// The From domain that the key signs for
    domain: Domain,
    /// Name of the key in DNS [default: "hikyaku" for RSA, "hikyaku-ed25519" for Ed25519]
    #[arg(long)]
    selector: Option<String>,
    /// Every receiver knows RSA; Ed25519 is for beside it
    #[arg(long, value_enum, default_value_t = Kind::Rsa2048)]
    algorithm: Kind,
    /// The configuration, which names the key directory [default: config/hikyaku.toml]
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// The From domain
    domain: Domain,
    /// The configuration, which names key directory and name servers [default: config/hikyaku.toml]
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Rsa2048,
    Ed25519,
}

impl Kind {
    fn algorithm(self) -> Algorithm {
        match self {
            Self::Rsa2048 => Algorithm::Rsa2048,
            Self::Ed25519 => Algorithm::Ed25519,
        }
    }

    /// Two keys of a domain sign beside each other, so each kind has a name of its own.
    fn selector(self) -> &'static str {
        match self {
            Self::Rsa2048 => "hikyaku",
            Self::Ed25519 => "hikyaku-ed25519",
        }
    }
}

pub(crate) fn run(command: Command, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    match command {
        Command::Generate(arguments) => generate(&arguments, terminal),
        Command::Check(arguments) => check(&arguments, terminal),
    }
}

fn generate(arguments: &Generate, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let config = Config::load(arguments.config.as_deref(), &terminal.environment)?;
    let selector = match &arguments.selector {
        Some(selector) => selector.to_ascii_lowercase(),
        None => arguments.algorithm.selector().to_owned(),
    };
    let domain = &arguments.domain;
    // Refused before two hundred milliseconds go into a key that could not be kept.
    let file = files::place(&config.dkim.dir, domain, &selector)?;
    let pem =
        content::dkim::generate(arguments.algorithm.algorithm()).context("cannot make a key")?;
    let key = content::dkim::Key::from_pem(&selector, &pem).context("cannot make a key")?;
    let value = key.public_record().context("cannot write the public key")?;
    files::write(&file, &pem)?;
    let name = record::name(&selector, domain);
    let out = &mut terminal.out;
    writeln!(
        out,
        "wrote {} (mode 0600; keep it secret)\n",
        file.display()
    )?;
    writeln!(
        out,
        "Publish this record, then run: hikyaku dkim check {domain}\n"
    )?;
    writeln!(out, "type   TXT")?;
    writeln!(out, "name   {name}")?;
    writeln!(out, "value  {value}\n")?;
    writeln!(
        out,
        "The same as a line of a zone file (a string holds at most 255 bytes):\n"
    )?;
    writeln!(out, "{}", record::zone_line(&name, &value))?;
    Ok(())
}

fn check(arguments: &Check, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let config = Config::load(arguments.config.as_deref(), &terminal.environment)?;
    let domain = &arguments.domain;
    let keys = files::keys_of(&config.dkim.dir, domain)?;
    if keys.is_empty() {
        let place = config.dkim.dir.join(domain.as_str());
        return Err(anyhow::anyhow!(
            "no key in {}: run hikyaku dkim generate {domain}",
            place.display()
        )
        .into());
    }
    let names: Vec<String> = keys
        .iter()
        .map(|key| record::name(key.selector(), domain))
        .collect();
    let answers = lookup::texts(&config.dns, &names)?;
    let mut all_well = true;
    writeln!(
        terminal.out,
        "{:<20} {:<8} {:<10} NOTE",
        "SELECTOR", "KEY", "DNS"
    )?;
    for (key, answer) in keys.iter().zip(answers) {
        let expected = key.public_record().context("cannot write the public key")?;
        let verdict = match answer {
            Ok(published) => record::judge(&expected, &published),
            Err(error) => Verdict::NoAnswer(error.to_string()),
        };
        all_well &= verdict.is_well();
        let kind = match key.algorithm() {
            Algorithm::Rsa2048 => "rsa",
            Algorithm::Ed25519 => "ed25519",
        };
        writeln!(
            terminal.out,
            "{:<20} {:<8} {:<10} {}",
            key.selector(),
            kind,
            verdict.word(),
            verdict.note()
        )?;
    }
    match all_well {
        true => Ok(()),
        false => Err(Failure::No),
    }
}
