//! Time comes from here and nowhere else, so that a test can move it.
//!
//! Owns the only calls of `Instant::now` and `SystemTime::now` in the project; must not sleep, and
//! knows no timer.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use model::Timestamp;

/// What time it is, on the wall and on the stopwatch.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Wall-clock time, to the millisecond. It may jump either way: for what people read and what
    /// other machines compare, never for measuring.
    fn now(&self) -> Timestamp;

    /// Monotonic time, for deadlines and measuring. It may stand still while the machine is
    /// suspended, so what another node relies on (a lease) must also be fenced by the store.
    fn instant(&self) -> Instant;
}

/// A clock as it is handed around.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl SystemClock {
    /// The machine's clock, ready to be handed around.
    pub fn shared() -> SharedClock {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is where wall-clock time comes in"
    )]
    fn now(&self) -> Timestamp {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            // A clock before 1970 was never set; zero is as wrong and keeps time moving forward.
            .unwrap_or_default();
        Timestamp::from_millis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this is where monotonic time comes in"
    )]
    fn instant(&self) -> Instant {
        Instant::now()
    }
}

/// A clock that moves only when told. Clones share one time.
#[derive(Debug, Clone)]
pub struct Manual(Arc<Mutex<Times>>);

#[derive(Debug)]
struct Times {
    wall: Timestamp,
    monotonic: Instant,
}

impl Manual {
    /// A clock that stands at `wall`.
    pub fn at(wall: Timestamp) -> Self {
        let monotonic = SystemClock.instant();
        Self(Arc::new(Mutex::new(Times { wall, monotonic })))
    }

    /// Moves both times forward.
    pub fn advance(&self, by: Duration) {
        self.with(|times| {
            times.wall = times.wall + by;
            times.monotonic += by;
        });
    }

    /// Sets the wall clock alone, as an operator or NTP does; it may go backwards.
    pub fn set_wall(&self, wall: Timestamp) {
        self.with(|times| times.wall = wall);
    }

    fn with<T>(&self, act: impl FnOnce(&mut Times) -> T) -> T {
        // Nothing between lock and unlock can panic, so a poisoned lock still holds sane times.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Clock for Manual {
    fn now(&self) -> Timestamp {
        self.with(|times| times.wall)
    }

    fn instant(&self) -> Instant {
        self.with(|times| times.monotonic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told_and_its_clones_with_it() {
        let clock = Manual::at(Timestamp::from_millis(1_000));
        let other: SharedClock = Arc::new(clock.clone());
        let before = other.instant();
        clock.advance(Duration::from_millis(250));
        assert_eq!(other.now(), Timestamp::from_millis(1_250));
        assert_eq!(other.instant() - before, Duration::from_millis(250));
        clock.set_wall(Timestamp::from_millis(5));
        assert_eq!(other.now(), Timestamp::from_millis(5));
        assert_eq!(other.instant() - before, Duration::from_millis(250));
    }

    #[test]
    fn the_system_clock_is_in_this_century_and_does_not_run_backwards() {
        let clock = SystemClock::shared();
        assert!(clock.now() > Timestamp::from_millis(1_700_000_000_000));
        assert!(clock.instant() <= clock.instant());
    }
}
