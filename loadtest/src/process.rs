//! What Linux knows of a process: CPU, memory, context switches, by thread name.
//!
//! Owns the reading of `/proc`, and children that do not outlive us. Everything is read between
//! phases, never while one is measured.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

/// `AT_CLKTCK` of the auxiliary vector: clock ticks per second in `/proc`.
const AT_CLKTCK: u64 = 17;

/// CPU time and context switches of a process since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// In user space.
    pub user: Duration,
    /// In the kernel.
    pub system: Duration,
    /// Context switches, of threads that still run.
    pub switches: u64,
    /// Of threads that still run, by name.
    pub threads: BTreeMap<String, Threads>,
}

/// Threads of one name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Threads {
    /// How many.
    pub count: u64,
    /// Their CPU time.
    pub cpu: Duration,
}

impl Usage {
    /// CPU time in all.
    pub fn cpu(&self) -> Duration {
        self.user + self.system
    }

    /// Adds the CPU time of another process.
    pub fn add(&mut self, other: &Self) {
        self.user += other.user;
        self.system += other.system;
    }

    /// What was used since `before`. Threads that ended in between count in the sum alone.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let threads = self.threads.iter().map(|(name, now)| {
            let then = before.threads.get(name).copied().unwrap_or_default();
            let used = Threads {
                count: now.count,
                cpu: now.cpu.saturating_sub(then.cpu),
            };
            (name.clone(), used)
        });
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            switches: self.switches.saturating_sub(before.switches),
            threads: threads.collect(),
        }
    }
}

/// CPU time that a process and all below it have used so far, those that have ended included: of
/// these the kernel keeps the sum with whoever waited for them.
///
/// # Errors
/// When the process is gone.
pub fn family(pid: u32) -> Result<Usage> {
    let mut parents = BTreeMap::<u32, Vec<u32>>::new();
    for entry in fs::read_dir("/proc")? {
        let Some(other) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // It may end while we look.
        let stat = fs::read_to_string(format!("/proc/{other}/stat")).unwrap_or_default();
        if let Some(parent) = parse_parent(&stat) {
            parents.entry(parent).or_default().push(other);
        }
    }
    let ticks = ticks_per_second();
    let mut usage = Usage::default();
    let mut members = vec![pid];
    while let Some(member) = members.pop() {
        members.extend(parents.get(&member).into_iter().flatten());
        match fs::read_to_string(format!("/proc/{member}/stat")) {
            Ok(stat) => usage.add(&parse_family(&stat, ticks).context("cannot read /proc")?),
            // Its time is its parent's now, which was read before: missed, a moment of one process.
            Err(_) if member != pid => {}
            Err(error) => return Err(error).with_context(|| gone(pid)),
        }
    }
    Ok(usage)
}

/// What the process has used so far.
///
/// # Errors
/// When it is gone.
pub fn usage(pid: u32) -> Result<Usage> {
    let base = format!("/proc/{pid}");
    let (user, system) = cpu_of(Path::new(&base), ticks_per_second())?;
    let mut usage = Usage {
        user,
        system,
        ..Usage::default()
    };
    for task in fs::read_dir(format!("{base}/task")).with_context(|| gone(pid))? {
        let task = task?.path();
        // A thread may end while we look.
        if let Some((name, cpu, switches)) = thread(&task) {
            let threads = usage.threads.entry(name).or_default();
            threads.count += 1;
            threads.cpu += cpu;
            usage.switches += switches;
        }
    }
    Ok(usage)
}

/// The memory that the process has resident, in bytes.
///
/// # Errors
/// When it is gone.
pub fn memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| gone(pid))?;
    let kib = status_field(&status, "VmRSS").context("no VmRSS in /proc")?;
    Ok(kib * 1024)
}

/// The most memory that the process had resident, in bytes.
///
/// # Errors
/// When it is gone.
pub fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| gone(pid))?;
    let kib = status_field(&status, "VmHWM").context("no VmHWM in /proc")?;
    Ok(kib * 1024)
}

/// Lets the peak start anew from what is resident now; false where the kernel does not let us.
pub fn reset_peak_memory(pid: u32) -> bool {
    // "5" resets the peak alone: proc(5), /proc/PID/clear_refs.
    fs::write(format!("/proc/{pid}/clear_refs"), "5").is_ok()
}

/// CPU time of the calling thread, as of the scheduler's last tick: right to a few milliseconds.
///
/// # Errors
/// When the kernel does not say.
pub fn of_this_thread() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    parse_schedstat(&text).context("no CPU time in /proc/thread-self/schedstat")
}

fn gone(pid: u32) -> String {
    format!("process {pid} is gone")
}

fn cpu_of(base: &Path, ticks: u64) -> Result<(Duration, Duration)> {
    let stat = fs::read_to_string(base.join("stat"))
        .with_context(|| format!("{} is gone", base.display()))?;
    parse_stat(&stat, ticks).with_context(|| format!("cannot read {}/stat", base.display()))
}

fn thread(task: &Path) -> Option<(String, Duration, u64)> {
    let name = fs::read_to_string(task.join("comm")).ok()?;
    let status = fs::read_to_string(task.join("status")).ok()?;
    // Counted in nanoseconds where the kernel keeps it; ticks of 10 ms would round small threads
    // away.
    let exact = fs::read_to_string(task.join("schedstat")).ok();
    let cpu = match exact.as_deref().and_then(parse_schedstat) {
        Some(cpu) => cpu,
        None => cpu_of(task, ticks_per_second()).map(|(u, s)| u + s).ok()?,
    };
    let switches = ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"]
        .iter()
        .filter_map(|field| status_field(&status, field))
        .sum();
    Some((name.trim_end().to_owned(), cpu, switches))
}

/// Fields 14 and 15 of `stat`. The second field is a name in parentheses that may contain
/// anything, so fields are counted from its end.
fn parse_stat(text: &str, ticks: u64) -> Option<(Duration, Duration)> {
    let [user, system, ..] = parse_times(text, ticks)?;
    Some((user, system))
}

/// Its own time and, in fields 16 and 17, that of its children that it has waited for.
fn parse_family(text: &str, ticks: u64) -> Option<Usage> {
    let [user, system, user_below, system_below] = parse_times(text, ticks)?;
    Some(Usage {
        user: user + user_below,
        system: system + system_below,
        ..Usage::default()
    })
}

/// Fields 14 to 17.
fn parse_times(text: &str, ticks: u64) -> Option<[Duration; 4]> {
    let (_, after) = text.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace().skip(11);
    let mut time = || {
        let count: u64 = fields.next()?.parse().ok()?;
        let nanos = u128::from(count) * 1_000_000_000 / u128::from(ticks.max(1));
        Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
    };
    Some([time()?, time()?, time()?, time()?])
}

/// Field 4.
fn parse_parent(text: &str) -> Option<u32> {
    let (_, after) = text.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The first field: nanoseconds on a CPU.
fn parse_schedstat(text: &str) -> Option<Duration> {
    let nanos = text.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

/// The number after `name:` in a `status` file.
fn status_field(text: &str, name: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.split_ascii_whitespace().next()?.parse().ok()
}

/// Clock ticks per second, in which `/proc/PID/stat` counts: what `sysconf` reads as well, without
/// a call into C.
fn ticks_per_second() -> u64 {
    let vector = fs::read("/proc/self/auxv").unwrap_or_default();
    // Linux has given 100 to user space on every common machine since 2.6.
    parse_auxv(&vector).unwrap_or(100)
}

fn parse_auxv(bytes: &[u8]) -> Option<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let (pairs, _) = words.as_chunks::<2>();
    let found = pairs.iter().find(|[key, _]| *key == AT_CLKTCK);
    found.map(|[_, value]| *value).filter(|ticks| *ticks > 0)
}

/// The machine in one line: CPU, how many, kernel, and how busy it was.
pub fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown CPU", |(_, name)| name.trim());
    let cpus = cpu.lines().filter(|l| l.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_ascii_whitespace().take(3).collect();
    format!(
        "{cpus} × {model}, Linux {}, load {}",
        kernel.trim(),
        load.join(" ")
    )
}

/// A child process that is killed when this is dropped.
#[derive(Debug)]
pub struct Guarded {
    child: Child,
    name: &'static str,
}

impl Guarded {
    /// Guards `child`; `name` is for messages.
    pub fn new(name: &'static str, child: Child) -> Self {
        Self { child, name }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Fails when it has ended.
    ///
    /// # Errors
    /// Says with which status.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early with {status}", self.name),
        }
    }

    /// Waits for its end at most so long.
    ///
    /// # Errors
    /// When it does not end, or ends with a failure.
    pub async fn ended(&mut self, patience: Duration) -> Result<()> {
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait()? {
                    return anyhow::Ok(status);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let name = self.name;
        let status = tokio::time::timeout(patience, ended)
            .await
            .with_context(|| format!("{name} did not end within {patience:?}"))??;
        if status.success() {
            return Ok(());
        }
        bail!("{name} ended with {status}")
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Already gone, or about to be: there is nobody to tell.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STAT: &str = "1234 (a b) c) S 1 1234 1234 0 -1 4194560 2345 0 1 0 250 125 0 0 20 0 5 0 1";

    #[test]
    fn cpu_time_stands_after_a_name_that_may_be_anything() {
        let expected = (Duration::from_millis(2500), Duration::from_millis(1250));
        assert_eq!(parse_stat(STAT, 100), Some(expected));
        assert_eq!(parse_parent(STAT), Some(1));
        let family = parse_family(STAT, 100).expect("times").cpu();
        assert_eq!(family, Duration::from_millis(3750));
        assert_eq!(parse_stat("1234 (x) S 1", 100), None);
        assert_eq!(parse_stat("", 100), None);
        let exact = parse_schedstat("66905 1 2\n");
        assert_eq!(exact, Some(Duration::from_nanos(66_905)));
    }

    #[test]
    fn fields_of_status() {
        let text = "Name:\tx\nVmHWM:\t   12345 kB\nvoluntary_ctxt_switches:\t4\n";
        assert_eq!(status_field(text, "VmHWM"), Some(12_345));
        assert_eq!(status_field(text, "voluntary_ctxt_switches"), Some(4));
        assert_eq!(status_field(text, "Vm"), None);
        assert_eq!(status_field(text, "Name"), None);
    }

    #[test]
    fn ticks_come_from_the_auxiliary_vector() {
        let words = [6_u64, 4096, AT_CLKTCK, 250, 0, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(parse_auxv(&bytes), Some(250));
        assert_eq!(parse_auxv(&[]), None);
        assert!((1..=10_000).contains(&ticks_per_second()));
    }

    #[test]
    fn what_was_used_between_two_readings() {
        let reading = |user, writer| Usage {
            user: Duration::from_secs(user),
            system: Duration::from_secs(1),
            switches: user,
            threads: [(
                "writer".to_owned(),
                Threads {
                    count: 1,
                    cpu: Duration::from_secs(writer),
                },
            )]
            .into(),
        };
        let used = reading(10, 5).since(&reading(4, 2));
        assert_eq!(used.cpu(), Duration::from_secs(6));
        assert_eq!(used.switches, 6);
        assert_eq!(used.threads["writer"].cpu, Duration::from_secs(3));
    }

    #[test]
    fn a_family_counts_those_who_have_ended() {
        let spin = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        let before = family(std::process::id()).expect("our own").cpu();
        let ended = std::process::Command::new("sh").args(["-c", spin]).status();
        assert!(ended.expect("a shell").success());
        assert!(family(std::process::id()).expect("our own").cpu() > before);
    }

    #[test]
    fn this_process_can_be_read() {
        let usage = usage(std::process::id()).expect("our own");
        assert!(
            usage
                .threads
                .values()
                .map(|threads| threads.count)
                .sum::<u64>()
                >= 1
        );
        assert!(peak_memory(std::process::id()).expect("our own") > 1 << 20);
        assert!(of_this_thread().expect("our own") > Duration::ZERO);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String, bytes: Vec<u8>) {
            let _read = (parse_stat(&text, 100), parse_schedstat(&text), parse_auxv(&bytes));
            let _family = (parse_family(&text, 100), parse_parent(&text));
            let _field = status_field(&text, "VmHWM");
        }
    }
}
