//! What one node has of limits that all nodes keep together.
//!
//! Owns the arithmetic of it. Must not ask the store.

use super::{InForce, Pace};
use model::units::Rate;
use std::time::Duration;

/// A share is told in millionths: this much of one permit may be lost by that.
const ROUNDED: f64 = 0.02;
/// A rate of more is not handed out permit by permit.
const UNITS_MAX: u32 = 10_000;

/// Into how many permits a second a rate can be shared out; 0: into parts of any size.
pub fn units(pace: Pace) -> u32 {
    match pace {
        Pace::Configured(Rate::Limited { count, per })
            if per <= Duration::from_secs(1) && count <= UNITS_MAX =>
        {
            count
        }
        Pace::Configured(_) | Pace::Even(_) | Pace::Part(_) => 0,
    }
}

/// A part of the limits of a destination.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// Of the rate, from 0 to 1.
    pub rate: f64,
    /// How many of the connections.
    pub connections: u32,
}

impl Part {
    /// All: nobody else sends.
    pub const ALL: Self = Self {
        rate: 1.0,
        connections: u32::MAX,
    };
    /// Nothing, or nothing yet.
    pub const NONE: Self = Self {
        rate: 0.0,
        connections: 0,
    };

    /// An equal part of each, where it is not known who has what; at least one connection.
    pub fn equal(nodes: u32, whole: InForce) -> Self {
        let nodes = nodes.max(1);
        Self {
            rate: 1.0 / f64::from(nodes),
            connections: (whole.connections / nodes).max(1),
        }
    }

    /// Whether anything may be sent.
    pub fn is_none(self) -> bool {
        self.rate <= 0.0 || self.connections == 0
    }

    /// The limits that hold here. A part of a rate is evenly spread, so that the parts of all nodes
    /// never come together in one breath; a part of a rate per second is whole permits, so that
    /// no second holds more of all parts than of the whole.
    pub fn of(self, whole: InForce) -> InForce {
        let none = InForce {
            connections: 0,
            ..whole
        };
        if self.is_none() {
            return none;
        }
        let connections = whole.connections.min(self.connections);
        let rate = whole.pace.per_second();
        let pace = if self.rate >= 1.0 || rate.is_infinite() {
            whole.pace
        } else {
            match units(whole.pace) {
                0 => Pace::Even(rate * self.rate),
                units => match whole_permits(f64::from(units) * self.rate) {
                    0 => return none,
                    count => Pace::Part(count),
                },
            }
        };
        InForce {
            pace,
            connections,
            ..whole
        }
    }
}

/// How many whole permits a part is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of at most UNITS_MAX, not less than 0"
)]
fn whole_permits(part: f64) -> u32 {
    (part + ROUNDED).floor() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(rate: &str, connections: u32) -> InForce {
        InForce {
            pace: Pace::Configured(rate.parse().expect("a rate")),
            connections,
            messages_per_connection: 10,
            paused_until: None,
        }
    }

    #[test]
    fn all_is_as_it_was_and_nothing_is_no_connection() {
        let limits = whole("50/s", 4);
        assert_eq!(Part::ALL.of(limits), limits);
        assert_eq!(Part::NONE.of(limits).connections, 0);
        let third = Part {
            rate: 1.0 / 3.0,
            connections: 1,
        };
        let here = third.of(limits);
        assert_eq!(here.connections, 1);
        assert_eq!(here.pace, Pace::Part(16));
        let told = |count: u32, of: u32| Part {
            rate: f64::from(1_000_000 * count / of) / 1e6,
            connections: 1,
        };
        assert_eq!(told(17, 50).of(limits).pace, Pace::Part(17));
        assert_eq!(told(1, 3).of(whole("3/s", 1)).pace, Pace::Part(1));
        assert_eq!(third.of(whole("2/s", 1)).connections, 0);
        let hourly = third.of(whole("3600/h", 1));
        assert!((hourly.pace.per_second() - 1.0 / 3.0).abs() < 1e-9);
        let unlimited = third.of(whole("unlimited", 4));
        assert!(unlimited.pace.per_second().is_infinite());
    }

    proptest! {
        #[test]
        fn parts_of_all_nodes_are_no_more_than_all(nodes in 1_u32..20, connections in 1_u32..100) {
            let limits = whole("50/s", connections);
            let part = Part::equal(nodes, limits);
            prop_assert!(part.rate * f64::from(nodes) <= 1.0 + 1e-9);
            prop_assert!(!part.is_none());
            if let Pace::Part(count) = part.of(limits).pace {
                prop_assert!(count * nodes <= 50);
            }
            prop_assert!(part.connections == 1 || part.connections * nodes <= connections);
        }
    }
}
