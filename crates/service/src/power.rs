//! The power of a simulated process: whether its tasks run, stand still, or are gone.
//!
//! A real process has the machine's. In a simulation several processes live in one runtime, and
//! one of them is to stop between any two steps, as under SIGSTOP, or to die there, as under
//! SIGKILL. Must not know what the tasks do.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// The switch. Clones share it.
#[derive(Debug, Clone)]
pub struct Power(Arc<Switch>);

/// Not a watch channel: that wakes whoever waits in an order left to chance.
#[derive(Debug)]
struct Switch {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    On,
    Frozen,
    Off,
}

impl Default for Power {
    fn default() -> Self {
        Self::on()
    }
}

impl Power {
    /// Switched on.
    pub fn on() -> Self {
        Self(Arc::new(Switch {
            state: Mutex::new(State::On),
            changed: Notify::new(),
        }))
    }

    /// Nothing moves until [`Power::thaw`]; time goes on, and so does everybody else.
    pub fn freeze(&self) {
        self.change(State::Frozen);
    }

    /// Everything goes on where it stood.
    pub fn thaw(&self) {
        self.change(State::On);
    }

    /// Everything is dropped where it stands, for good.
    pub fn kill(&self) {
        self.change(State::Off);
    }

    fn change(&self, to: State) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != State::Off {
            *state = to;
        }
        drop(state);
        self.0.changed.notify_waiters();
    }

    fn state(&self) -> State {
        *self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `future` while there is power; `None` once it was killed.
    pub async fn run<F: Future>(self, future: F) -> Option<F::Output> {
        let mut future = std::pin::pin!(future);
        let mut changed = std::pin::pin!(self.0.changed.notified());
        loop {
            // Before the look at the state: no change is missed.
            changed.as_mut().enable();
            let now = self.state();
            tokio::select! {
                biased;
                () = &mut changed, if now != State::Off => {
                    changed.set(self.0.changed.notified());
                }
                done = &mut future, if now == State::On => return Some(done),
                else => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::{sleep, timeout};

    #[tokio::test(start_paused = true)]
    async fn what_is_frozen_waits_and_what_is_killed_is_gone() {
        let power = Power::on();
        let work = power.clone().run(sleep(Duration::from_secs(1)));
        let mut work = std::pin::pin!(work);
        power.freeze();
        let waited = timeout(Duration::from_secs(60), &mut work).await;
        assert!(waited.is_err(), "frozen");
        power.thaw();
        assert_eq!(work.await, Some(()), "its time is over");
        let forever = power.clone().run(std::future::pending::<()>());
        power.kill();
        power.thaw();
        assert_eq!(forever.await, None, "nobody comes back from there");
    }
}
