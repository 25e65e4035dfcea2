//! A receiving server that counts, and what it says while it does.

use crate::format::{bytes, count, float};
use crate::local;
use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use service::clock::{Clock as _, SystemClock};
use std::io::{self, Read as _, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use testkit::distance::Distance;
use testkit::smtp_peer::{SmtpPeer, Temper};
use tokio::time::MissedTickBehavior;

/// How exactly the time of the last message is known.
const TICK: Duration = Duration::from_millis(20);
const LINE: Duration = Duration::from_secs(1);

/// Count what arrives, and print a line each second
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Loopback address to listen on; port 0 is any
    #[arg(long, default_value = "127.0.0.1:2525", value_parser = local::address)]
    pub listen: SocketAddr,
    /// Listeners: on this port and those after it (any, with port 0)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub listeners: u16,
    #[command(flatten)]
    /// What it is like
    pub manner: Manner,
    /// End after so many messages
    #[arg(long)]
    pub messages: Option<u64>,
    /// Print only where it listens and the totals, each a line of JSON
    #[arg(long)]
    pub json: bool,
    /// End when standard input ends: for a parent that may die
    #[arg(long)]
    pub until_stdin_ends: bool,
}

/// How far away a sink is, and what it does not know.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub struct Manner {
    /// Round-trip time added on the way to the sink, as "50ms"
    #[arg(long, default_value = "0s", value_parser = model::units::parse_duration)]
    pub rtt: Duration,
    /// The sink does not offer PIPELINING
    #[arg(long)]
    pub no_pipelining: bool,
    /// The sink does not offer CHUNKING
    #[arg(long)]
    pub no_chunking: bool,
}

impl Manner {
    /// As arguments of a sink.
    pub fn arguments(&self) -> Vec<String> {
        let flags = [
            (self.no_pipelining, "--no-pipelining"),
            (self.no_chunking, "--no-chunking"),
        ];
        let flags = flags.into_iter().filter(|(on, _)| *on);
        let rtt = format!("{}ms", self.rtt.as_millis());
        ["--rtt".to_owned(), rtt]
            .into_iter()
            .chain(flags.map(|(_, flag)| flag.to_owned()))
            .collect()
    }

    fn temper(&self) -> Temper {
        let mut temper = Temper::counting();
        temper.server.pipelining &= !self.no_pipelining;
        temper.server.chunking &= !self.no_chunking;
        temper
    }
}

/// What a sink says. With `--json` a parent reads the first and the last line, and none between
/// that would fill the pipe while it is busy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Where it listens: the first line.
    Listening(Vec<SocketAddr>),
    /// What came in the last second.
    Second(Second),
    /// The last line.
    Total(Total),
}

/// What came in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Second {
    /// Messages accepted.
    pub messages: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Connections open at its end.
    pub connections: u64,
}

/// What came in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Total {
    /// Messages accepted.
    pub messages: u64,
    /// Recipients of them.
    pub recipients: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Connections accepted.
    pub connections: u64,
    /// Most open at a time.
    pub peak_connections: u64,
    /// From the first message to the last, to about 20 ms.
    pub seconds: f64,
}

impl Line {
    fn text(&self) -> String {
        match self {
            Self::Listening(addresses) => {
                let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                format!("listening on {}", all.join(" "))
            }
            Self::Second(second) => format!(
                "{:>9} messages/s  {:>6} connections  {:>10}/s",
                count(second.messages),
                count(second.connections),
                bytes(second.bytes)
            ),
            Self::Total(total) => format!(
                "total: {} messages to {} recipients, {}, over {} connections (at most {} at a time) in {:.2} s",
                count(total.messages),
                count(total.recipients),
                bytes(total.bytes),
                count(total.connections),
                count(total.peak_connections),
                total.seconds
            ),
        }
    }
}

/// Runs until there were enough messages, `stop` says so, or standard input ends if asked to.
///
/// # Errors
/// When it cannot listen, or nobody reads what it prints.
pub async fn run(
    args: &Args,
    out: &mut (dyn Write + Send),
    stop: impl Future<Output = Result<()>>,
) -> Result<Total> {
    let mut peers = Vec::new();
    let mut ways = Vec::new();
    for at in 0..args.listeners {
        let mut address = args.listen;
        if address.port() != 0 {
            let port = address.port().checked_add(at);
            address.set_port(port.context("no port is above 65535")?);
        }
        let listens = || format!("cannot listen on {address}");
        let temper = args.manner.temper();
        if args.manner.rtt.is_zero() {
            let peer = SmtpPeer::bind(address, temper).await;
            peers.push(peer.with_context(listens)?);
        } else {
            let peer = SmtpPeer::start(temper).await?;
            let way = Distance::bind(address, peer.address(), args.manner.rtt).await;
            ways.push(way.with_context(listens)?);
            peers.push(peer);
        }
    }
    let addresses = match &ways[..] {
        [] => peers.iter().map(SmtpPeer::address).collect(),
        ways => ways.iter().map(Distance::address).collect(),
    };
    say(out, args, &Line::Listening(addresses))?;
    let counted = {
        let mut counting = Counting::new(&peers, args.messages);
        tokio::select! {
            done = counting.run(out, args) => done,
            stopped = stop => stopped,
            () = end_of_input(), if args.until_stdin_ends => Ok(()),
        }?;
        counting.total()
    };
    for peer in peers {
        peer.shutdown().await;
    }
    say(out, args, &Line::Total(counted))?;
    Ok(counted)
}

fn say(out: &mut (dyn Write + Send), args: &Args, line: &Line) -> Result<()> {
    if args.json {
        writeln!(out, "{}", serde_json::to_string(line)?)?;
    } else {
        writeln!(out, "{}", line.text())?;
    }
    Ok(out.flush()?)
}

pub(crate) async fn end_of_input() {
    let read = tokio::task::spawn_blocking(|| {
        let mut bytes = [0; 64];
        // What cannot be read any more has ended, too.
        while io::stdin().read(&mut bytes).is_ok_and(|read| read > 0) {}
    });
    drop(read.await);
}

struct Counting<'a> {
    peers: &'a [SmtpPeer],
    enough: Option<u64>,
    first: Option<Instant>,
    last: Option<Instant>,
    seen: u64,
}

impl<'a> Counting<'a> {
    fn new(peers: &'a [SmtpPeer], enough: Option<u64>) -> Self {
        Self {
            peers,
            enough,
            first: None,
            last: None,
            seen: 0,
        }
    }

    async fn run(&mut self, out: &mut (dyn Write + Send), args: &Args) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut printed = Total::default();
        let mut due = SystemClock.instant() + LINE;
        loop {
            tick.tick().await;
            let now = SystemClock.instant();
            let total = self.look(now);
            if self.enough.is_some_and(|enough| total.messages >= enough) {
                return Ok(());
            }
            if now >= due {
                due = now + LINE;
                let open = self.peers.iter().map(|peer| peer.counts().open).sum();
                let second = Second {
                    messages: total.messages - printed.messages,
                    bytes: total.bytes - printed.bytes,
                    connections: open,
                };
                // Silence while nothing happens.
                if second != Second::default() && !args.json {
                    say(out, args, &Line::Second(second))?;
                }
                printed = total;
            }
        }
    }

    /// Notes when messages came, and gives what came so far.
    fn look(&mut self, now: Instant) -> Total {
        let total = self.total();
        if total.messages > self.seen {
            self.seen = total.messages;
            self.first.get_or_insert(now);
            self.last = Some(now);
        }
        total
    }

    fn total(&self) -> Total {
        let mut total = Total::default();
        for peer in self.peers {
            let counts = peer.counts();
            total.messages += counts.messages;
            total.recipients += counts.recipients;
            total.bytes += counts.bytes;
            total.connections += counts.connections;
            // Peaks of several listeners need not meet: an upper bound.
            total.peak_connections += counts.peak;
        }
        if let (Some(first), Some(last)) = (self.first, self.last) {
            total.seconds = last.duration_since(first).as_secs_f64();
        }
        total
    }
}

impl Total {
    /// Bytes of a message, on average.
    pub fn message_bytes(&self) -> f64 {
        if self.messages == 0 {
            return 0.0;
        }
        float(self.bytes) / float(self.messages)
    }

    /// Messages per second between the first and the last.
    pub fn per_second(&self) -> f64 {
        if self.seconds > 0.0 {
            float(self.messages) / self.seconds
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        manner: Manner,
    }

    #[test]
    fn a_manner_is_understood_as_it_was_meant() {
        for manner in [
            Manner::default(),
            Manner {
                rtt: Duration::from_millis(50),
                no_pipelining: true,
                no_chunking: true,
            },
        ] {
            let words = std::iter::once("sink".to_owned()).chain(manner.arguments());
            let line = Line::try_parse_from(words).expect("understood");
            assert_eq!(line.manner, manner);
        }
    }
}
