//! `hikyaku doctor`: what receivers look at before they take mail from a domain.
//!
//! Owns the order of the checks and how they are told. Asks DNS, the tracking host and one mail
//! host; sends nothing, changes nothing, and needs no running service.

mod address;
mod dmarc;
mod names;
mod web;

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use model::Domain;
use service::config::Config;

use crate::cli::{Failure, Terminal};
use crate::dkim::{files, record};
use crate::reach::runtime;
use crate::show::{Paint, Tone, wrapped};
use names::Names;

/// The width of a line, and where texts begin.
const WIDTH: usize = 100;
const INDENT: usize = 16;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The From domain
    domain: Domain,
    /// Address that mail leaves from, where the configuration has none (repeat for several)
    #[arg(long, value_name = "IP")]
    address: Vec<IpAddr>,
    /// Mail host to reach as proof that port 25 is open outward [default: the first of gmail.com]
    #[arg(long, value_name = "HOST[:PORT]")]
    probe: Option<String>,
    /// The configuration of the service [default: config/hikyaku.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Ok,
    Warn,
    Fail,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    check: &'static str,
    level: Level,
    text: String,
    /// What to do.
    advice: Option<String>,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            text: text.into(),
            advice: None,
        }
    }

    pub(crate) fn warn(
        check: &'static str,
        text: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warn,
            advice: Some(advice.into()),
            ..Self::ok(check, text)
        }
    }

    pub(crate) fn fail(
        check: &'static str,
        text: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(check, text, advice)
        }
    }
}

pub(crate) fn run(arguments: &Args, terminal: &mut Terminal<'_>) -> Result<(), Failure> {
    let config = Config::load(arguments.config.as_deref(), &terminal.environment)?;
    let paint = Paint(terminal.colours);
    let found = runtime()?.block_on(examine(&config, arguments))?;
    for finding in &found {
        show(terminal.out, finding, paint)?;
    }
    let count = |level| found.iter().filter(|of| of.level == level).count();
    let (ok, warn, fail) = (count(Level::Ok), count(Level::Warn), count(Level::Fail));
    writeln!(
        terminal.out,
        "\n{ok} well, {warn} to look at, {fail} to mend"
    )?;
    match fail {
        0 => Ok(()),
        _ => Err(Failure::No),
    }
}

async fn examine(config: &Config, arguments: &Args) -> anyhow::Result<Vec<Finding>> {
    let domain = &arguments.domain;
    let names = Names::new(&config.dns)?;
    let mut found = Vec::new();
    if let Err(why) = names.answer(domain.as_str()).await {
        // Each lookup would wait as long as this one, to say the same.
        let advice = "check [dns].nameservers and the network of this machine; without DNS nothing else can be told";
        found.push(Finding::fail(
            "dns",
            format!("no name server answers: {why}"),
            advice,
        ));
        found.push(address::port_25(config, &names, arguments.probe.as_deref()).await);
        return Ok(found);
    }
    let bounces = config.smtp.bounce_domain.as_ref().unwrap_or(domain);
    let addresses = address::of_sources(config, &arguments.address, &mut found).await;
    for address in &addresses {
        found.push(address::spf(&config.dns, address, bounces).await);
        found.push(address::ptr(&names, address).await);
    }
    let signs = dkim(config, &names, domain, &mut found).await?;
    found.extend(dmarc::check(&names, domain, bounces, signs).await);
    found.push(bounce_mx(config, &names, bounces).await);
    found.extend(web::tracking(config, &names).await);
    found.push(address::port_25(config, &names, arguments.probe.as_deref()).await);
    Ok(found)
}

/// Whether some key of the domain signs and DNS has it.
async fn dkim(
    config: &Config,
    names: &Names,
    domain: &Domain,
    found: &mut Vec<Finding>,
) -> anyhow::Result<bool> {
    let keys = files::keys_of(&config.dkim.dir, domain)?;
    if keys.is_empty() {
        let place = config.dkim.dir.join(domain.as_str());
        let text = format!("no key in {}: mail would leave unsigned", place.display());
        found.push(Finding::fail(
            "dkim",
            text,
            format!("run: hikyaku dkim generate {domain}"),
        ));
        return Ok(false);
    }
    let mut signs = false;
    for key in &keys {
        let name = record::name(key.selector(), domain);
        let expected = key.public_record().context("cannot write the public key")?;
        let verdict = match names.txt(&name).await {
            Ok(published) => record::judge(&expected, &published),
            Err(why) => record::Verdict::NoAnswer(why),
        };
        let text = format!("{name}: {}", verdict.note());
        found.push(match &verdict {
            record::Verdict::Same => Finding::ok("dkim", text),
            record::Verdict::Testing => Finding::warn("dkim", text, "publish it without t=y"),
            _ => Finding::fail("dkim", text, format!("publish as TXT: {expected}")),
        });
        signs |= verdict.is_well();
    }
    Ok(signs)
}

/// Receivers look whether the reverse-path's domain takes mail; bounces go there.
async fn bounce_mx(config: &Config, names: &Names, bounces: &Domain) -> Finding {
    let check = "bounces";
    let needs = "publish an MX record for it that leads to a host that takes the bounces";
    let hosts = match names.mx(bounces.as_str()).await {
        Ok(hosts) => hosts,
        Err(why) => {
            return Finding::fail(check, format!("MX of {bounces}: {why}"), "ask again later");
        }
    };
    if hosts.iter().any(String::is_empty) {
        return Finding::fail(
            check,
            format!("{bounces} says that it takes no mail (null MX)"),
            needs,
        );
    }
    let Some(first) = hosts.first() else {
        let has_address = names
            .addresses(bounces.as_str())
            .await
            .is_ok_and(|all| !all.is_empty());
        let text = format!("{bounces}, the domain of the reverse-path, has no MX record");
        return match has_address {
            true => Finding::warn(check, format!("{text}; its address stands in"), needs),
            false => Finding::fail(
                check,
                format!("{text} and no address: receivers refuse such mail"),
                needs,
            ),
        };
    };
    match names.addresses(first).await {
        Err(why) => Finding::fail(
            check,
            format!("MX of {bounces} is {first}: {why}"),
            "ask again later",
        ),
        Ok(addresses) if addresses.is_empty() => Finding::fail(
            check,
            format!("MX of {bounces} is {first}, which has no address"),
            needs,
        ),
        Ok(_) if config.inbound.listen.is_none() => Finding::warn(
            check,
            format!("bounces for {bounces} go to {first}; this service does not read them"),
            "switch [inbound] on where that host is this machine, or forward its mail here",
        ),
        Ok(_) => Finding::ok(check, format!("bounces for {bounces} go to {first}")),
    }
}

fn show(out: &mut dyn Write, finding: &Finding, paint: Paint) -> std::io::Result<()> {
    let (word, tone) = match finding.level {
        Level::Ok => ("ok", Tone::Good),
        Level::Warn => ("warn", Tone::Careful),
        Level::Fail => ("fail", Tone::Bad),
    };
    let word = paint.tone(tone, &format!("{word:<4}"));
    let mut lines = wrapped(&finding.text, WIDTH - INDENT).into_iter();
    writeln!(
        out,
        "{word}  {:<8}  {}",
        finding.check,
        lines.next().unwrap_or_default()
    )?;
    for line in lines {
        writeln!(out, "{:INDENT$}{line}", "")?;
    }
    if let Some(advice) = &finding.advice {
        // What is to be copied stays on one line.
        let lines = match advice.starts_with("publish as TXT: ") {
            true => vec![advice.clone()],
            false => wrapped(advice, WIDTH - INDENT - 2),
        };
        for (at, line) in lines.iter().enumerate() {
            let arrow = if at == 0 { "→" } else { " " };
            writeln!(
                out,
                "{:INDENT$}{}",
                "",
                paint.tone(Tone::Quiet, &format!("{arrow} {line}"))
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_what_to_do_under_what_was_found() {
        let mut out = Vec::new();
        let finding = Finding::fail("spf", "192.0.2.1 may not send", "publish it");
        show(&mut out, &finding, Paint(false)).expect("written");
        let expected = "fail  spf       192.0.2.1 may not send\n                → publish it\n";
        assert_eq!(String::from_utf8(out).expect("text"), expected);
    }
}
