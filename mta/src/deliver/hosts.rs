//! What was learnt about hosts lately: which do not answer, and where TLS is broken.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A host that did not answer is tried after the others for this long.
const DOWN: Duration = Duration::from_secs(120);
/// Broken TLS is remembered this long.
const NO_TLS: Duration = Duration::from_secs(3 * 86_400);
/// Hosts remembered; beyond, what is over goes, then everything.
const HOSTS_MAX: usize = 20_000;

#[derive(Debug, Clone, Copy, Default)]
struct Known {
    down_until: Option<Instant>,
    no_tls_until: Option<Instant>,
}

/// The memory; see the module.
#[derive(Debug, Default)]
pub(super) struct HostMemory(Mutex<HashMap<String, Known>>);

impl HostMemory {
    pub(super) fn is_down(&self, host: &str, now: Instant) -> bool {
        self.known(host).down_until.is_some_and(|until| until > now)
    }

    pub(super) fn has_no_tls(&self, host: &str, now: Instant) -> bool {
        self.known(host)
            .no_tls_until
            .is_some_and(|until| until > now)
    }

    pub(super) fn went_down(&self, host: &str, now: Instant) {
        self.change(host, now, |known| known.down_until = Some(now + DOWN));
    }

    pub(super) fn came_up(&self, host: &str, now: Instant) {
        if self.known(host).down_until.is_some() {
            self.change(host, now, |known| known.down_until = None);
        }
    }

    pub(super) fn tls_broke(&self, host: &str, now: Instant) {
        self.change(host, now, |known| known.no_tls_until = Some(now + NO_TLS));
    }

    fn known(&self, host: &str) -> Known {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(host)
            .copied()
            .unwrap_or_default()
    }

    fn change(&self, host: &str, now: Instant, change: impl FnOnce(&mut Known)) {
        let mut hosts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= HOSTS_MAX && !hosts.contains_key(host) {
            let is_over = |until: Option<Instant>| until.is_none_or(|until| until <= now);
            hosts.retain(|_, known| !(is_over(known.down_until) && is_over(known.no_tls_until)));
            if hosts.len() >= HOSTS_MAX {
                hosts.clear();
            }
        }
        change(hosts.entry(host.to_owned()).or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use service::clock::{Clock as _, SystemClock};

    #[test]
    fn hosts_are_remembered_for_a_while_and_not_all_of_them() {
        let start = SystemClock.instant();
        let hosts = HostMemory::default();
        hosts.went_down("a", start);
        hosts.tls_broke("a", start);
        assert!(hosts.is_down("a", start) && hosts.has_no_tls("a", start + DOWN));
        assert!(!hosts.is_down("a", start + DOWN) && !hosts.has_no_tls("a", start + NO_TLS));
        hosts.came_up("a", start);
        assert!(!hosts.is_down("a", start));
        for n in 0..HOSTS_MAX + 10 {
            hosts.went_down(&n.to_string(), start);
        }
        assert!(hosts.0.lock().expect("unpoisoned").len() <= HOSTS_MAX);
    }
}
