//! What the server is: its version, whether it keeps what it is told, its replicas, its clock.
//!
//! Must not touch a recipient.

use super::keys::{self, HOME};
use super::link::{Link, answer};
use super::{Inner, RedisOptions};
use crate::erased::{self, Eraser};
use crate::sqlite::Role;
use crate::{Result, StoreError};
use ::redis::{Cmd, Pipeline, Value};
use std::collections::BTreeSet;

/// The version of everything that is stored: another one is not touched. Rows and facts of form 1 are
/// read for ever, and new ones are written beside them: such a store has this one from then on.
const FORM: &str = "2";
const EARLIER: &str = "1";
/// That of a store of several partitions in which notes of people are spread over them. Only a new
/// store is made so: where notes stand is fixed as the number of partitions is, since nodes of two
/// versions that looked for them in different places would each write half of what is known.
const SPREAD: &str = "3";
/// The oldest server: scripts that say what they do, `ZRANGEBYLEX` within them on every key.
const OLDEST: u32 = 7;

/// How a server, or the weakest node of a Cluster, stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// What it does when its memory is full; only `noeviction` loses nobody.
    pub eviction: String,
    /// Whether it keeps an append-only file.
    pub append_only: bool,
    /// When it syncs that: `always`, `everysec`, `no`; empty where it does not say.
    pub sync: String,
    /// Replicas that are connected; of a Cluster the fewest of a node.
    pub replicas: u64,
    /// The histories of writes that it tells: a new one may lack some.
    pub histories: BTreeSet<String>,
}

impl Standing {
    /// Why an acknowledged write may be lost when one machine loses power; `None`: it may not.
    pub fn weakness(&self) -> Option<String> {
        if self.eviction != "noeviction" {
            return Some(format!(
                "maxmemory-policy is {}: keys are dropped when the memory is full",
                self.eviction
            ));
        }
        if !self.append_only {
            return Some(
                "appendonly is off: a restart forgets what came after the last snapshot".into(),
            );
        }
        if self.sync != "always" && self.replicas == 0 {
            return Some(format!(
                "appendfsync is {} and there is no replica: a power cut loses the last second or more",
                if self.sync.is_empty() {
                    "unknown"
                } else {
                    &self.sync
                }
            ));
        }
        None
    }

    /// Refuses what loses mail without anybody's fault.
    pub(super) fn must_be_durable(&self) -> Result<()> {
        let lost = self.eviction != "noeviction" || !self.append_only;
        match self.weakness().filter(|_| lost) {
            None => Ok(()),
            Some(why) => Err(StoreError::Refused(format!(
                "redis: {why}; set maxmemory-policy noeviction and appendonly yes, or store.require_durable = false"
            ))),
        }
    }
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Asks how the server stands.
pub(super) async fn standing(link: &Link) -> Result<Standing> {
    let mut info = Cmd::new();
    info.arg("INFO")
        .arg("server")
        .arg("memory")
        .arg("persistence")
        .arg("replication");
    let mut standing: Option<Standing> = None;
    for answered in link.everywhere(&info).await? {
        let text = answer::bytes(answered).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let one = read_info(&text)?;
        standing = Some(match standing {
            None => one,
            Some(before) => weaker(before, one),
        });
    }
    let mut standing =
        standing.ok_or_else(|| StoreError::Unavailable("redis: nobody answered".into()))?;
    // Some managed servers do not let it be asked; then it is unknown.
    let mut ask = Cmd::new();
    ask.arg("CONFIG").arg("GET").arg("appendfsync");
    if let Ok(answers) = link.everywhere(&ask).await {
        let said: BTreeSet<Vec<u8>> = answers
            .into_iter()
            .flat_map(answer::pairs)
            .map(|(_, value)| value)
            .collect();
        // The weakest of them: `no`, then `everysec`.
        let order: [&[u8]; 3] = [b"no", b"everysec", b"always"];
        let weakest = order.iter().find(|of| said.contains(**of));
        let text = weakest.map(|of| String::from_utf8_lossy(of).into_owned());
        standing.sync = text.unwrap_or_default();
    }
    Ok(standing)
}

fn read_info(info: &str) -> Result<Standing> {
    let version = field(info, "redis_version").unwrap_or_default();
    let major = version.split('.').next().and_then(|text| text.parse().ok());
    if major.is_some_and(|major: u32| major < OLDEST) {
        return Err(StoreError::Refused(format!(
            "redis: version {version}, at least {OLDEST}.0 is needed"
        )));
    }
    let history = field(info, "master_replid").unwrap_or_default();
    Ok(Standing {
        eviction: field(info, "maxmemory_policy").unwrap_or("unknown").into(),
        append_only: field(info, "aof_enabled") == Some("1"),
        sync: String::new(),
        replicas: field(info, "connected_slaves")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        histories: BTreeSet::from([history.to_owned()]),
    })
}

fn weaker(mut a: Standing, b: Standing) -> Standing {
    a.histories.extend(b.histories);
    Standing {
        eviction: if a.eviction == "noeviction" {
            b.eviction
        } else {
            a.eviction
        },
        append_only: a.append_only && b.append_only,
        sync: String::new(),
        replicas: a.replicas.min(b.replicas),
        histories: a.histories,
    }
}

/// How the server of a partition stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Shard {
    /// Which history of writes it tells.
    pub(super) history: String,
    /// Replicas that are connected to it.
    pub(super) replicas: u64,
    /// To which store the partition belongs.
    pub(super) generation: String,
    /// For how many seconds nothing is leased.
    pub(super) quiet_for: i64,
}

/// How many replicas a server says that it has.
pub(super) fn replicas(info: &[u8]) -> u64 {
    field(&String::from_utf8_lossy(info), "connected_slaves")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// Reads what `past.lua` answers.
pub(super) fn read_shard(answered: Value) -> Shard {
    let mut parts = answer::list(answered).into_iter();
    let mut text = || {
        let bytes = parts.next().and_then(answer::bytes).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (info, generation, known, now) = (text(), text(), text(), text());
    let history = field(&info, "master_replid").unwrap_or_default();
    let quiet_for = known
        .split_once(' ')
        .filter(|(of, _)| *of == history)
        .and_then(|(_, until)| until.parse::<i64>().ok())
        .map_or(0, |until| {
            until.div_euclid(1_000) - now.parse::<i64>().unwrap_or(0)
        });
    Shard {
        history: history.to_owned(),
        replicas: replicas(info.as_bytes()),
        generation,
        quiet_for,
    }
}

/// What is fixed when a store is made.
pub(super) struct Made {
    pub(super) partitions: u16,
    /// Notes of people stand in all partitions.
    pub(super) spread: bool,
    /// Its name.
    pub(super) generation: String,
    /// It was there before.
    pub(super) before: bool,
}

/// What was fixed when the store was made, by whoever came first.
pub(super) async fn made(link: &Link, options: &RedisOptions) -> Result<Made> {
    let meta = keys::meta(HOME);
    let mut pipeline = Pipeline::new();
    // Whoever comes before the MTA makes it as well: they have one configuration.
    let configured = options.partitions;
    let form = if configured > 1 { SPREAD } else { FORM };
    pipeline.cmd("HSETNX").arg(&meta).arg("form").arg(form);
    pipeline
        .cmd("HSETNX")
        .arg(&meta)
        .arg("partitions")
        .arg(configured);
    pipeline
        .cmd("HSETNX")
        .arg(&meta)
        .arg("generation")
        .arg(format!("{:032x}", fastrand::u128(..)));
    pipeline
        .cmd("HMGET")
        .arg(&meta)
        .arg("form")
        .arg("partitions")
        .arg("generation")
        .arg("made");
    let answers = link.bulk(&pipeline).await?;
    let mut of = answers
        .into_iter()
        .nth(3)
        .map(answer::list)
        .unwrap_or_default()
        .into_iter();
    let form = of.next().and_then(answer::bytes).unwrap_or_default();
    if form == EARLIER.as_bytes() {
        // From now on a program that does not know this one's form stays out.
        let mut pipeline = Pipeline::new();
        pipeline.cmd("HSET").arg(&meta).arg("form").arg(FORM);
        link.bulk(&pipeline).await?;
    } else if form != FORM.as_bytes() && form != SPREAD.as_bytes() {
        return Err(StoreError::Damaged(format!(
            "its form is {}, this program knows up to {SPREAD}",
            String::from_utf8_lossy(&form)
        )));
    }
    let partitions = u16::try_from(of.next().map_or(0, answer::number)).unwrap_or(0);
    if !(1..=256).contains(&partitions) {
        return Err(StoreError::Damaged(
            "it does not know its partitions".into(),
        ));
    }
    if options.role == Role::Mta && partitions != options.partitions {
        return Err(StoreError::Refused(format!(
            "it was made with {partitions} partitions, {} are configured",
            options.partitions
        )));
    }
    let generation = of.next().and_then(answer::bytes).unwrap_or_default();
    Ok(Made {
        partitions,
        spread: form == SPREAD.as_bytes(),
        generation: String::from_utf8_lossy(&generation).into_owned(),
        before: of.next().map_or(0, answer::number) == 1,
    })
}

/// Every partition knows to which store it belongs.
pub(super) async fn is_made(link: &Link) -> Result<()> {
    let mut done = Cmd::new();
    done.arg("HSET").arg(keys::meta(HOME)).arg("made").arg(1);
    link.short(&done).await.map(drop)
}

/// The key under which erased addresses are known: whoever comes first makes it.
pub(super) async fn eraser(link: &Link) -> Result<Eraser> {
    let key = keys::settings(HOME);
    let mut pipeline = Pipeline::new();
    pipeline
        .cmd("HSETNX")
        .arg(&key)
        .arg(erased::SETTING)
        .arg(Eraser::new_key()?);
    pipeline.cmd("HGET").arg(&key).arg(erased::SETTING);
    let kept = link.bulk(&pipeline).await?.into_iter().nth(1);
    let kept = kept.and_then(answer::bytes);
    kept.and_then(|kept| String::from_utf8(kept).ok())
        .map(|kept| Eraser::of(&kept))
        .ok_or_else(|| StoreError::Damaged("it has lost its erasure key".into()))
}

impl Inner {
    /// The server's time in milliseconds.
    pub(super) async fn wall(&self) -> Result<i64> {
        let mut pipeline = Pipeline::new();
        // With a key, so that it is partition 0's server on a Cluster too.
        pipeline.cmd("EXISTS").arg(keys::meta(HOME));
        pipeline.cmd("TIME");
        let answers = self.link.bulk(&pipeline).await?;
        let time = answers
            .into_iter()
            .nth(1)
            .map(answer::list)
            .unwrap_or_default();
        let mut parts = time.into_iter().map(answer::number);
        let (seconds, micros) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        Ok(seconds * 1_000 + micros / 1_000)
    }

    /// Proves that a durable write is possible now, and looks how the server stands.
    pub(super) async fn check(&self) -> Result<()> {
        for p in self.all_partitions() {
            let mut count = Cmd::new();
            count.arg("HINCRBY").arg(keys::meta(p)).arg("checks").arg(1);
            self.link.short(&count).await?;
        }
        self.look_again().await
    }

    /// Looks how the server stands, and which history it tells.
    pub(super) async fn look_again(&self) -> Result<()> {
        let now = standing(&self.link).await?;
        self.standing.send_replace(now);
        self.look_back().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# Server\r\nredis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\nconnected_slaves:0\r\nmaster_replid:abc\r\n";

    #[test]
    fn what_a_server_says_is_judged() {
        let mut good = read_info(GOOD).unwrap();
        good.sync = "always".into();
        assert_eq!((good.weakness(), good.must_be_durable()), (None, Ok(())));
        good.sync = "everysec".into();
        assert!(good.weakness().unwrap().contains("everysec"));
        assert_eq!(good.must_be_durable(), Ok(()));
        good.replicas = 1;
        assert_eq!(good.weakness(), None);
        let evicting = read_info(&GOOD.replace("noeviction", "allkeys-lru")).unwrap();
        let refused = evicting.must_be_durable();
        assert!(matches!(&refused, Err(StoreError::Refused(why)) if why.contains("allkeys-lru")));
        let forgetful = read_info(&GOOD.replace("aof_enabled:1", "aof_enabled:0")).unwrap();
        assert!(forgetful.must_be_durable().is_err());
        assert!(!weaker(good.clone(), forgetful).append_only);
        let old = read_info(&GOOD.replace("7.0.15", "6.2.1"));
        assert!(matches!(&old, Err(StoreError::Refused(why)) if why.contains("6.2.1")));
    }
}
