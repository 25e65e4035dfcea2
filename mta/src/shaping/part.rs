//! What one node has of limits that all nodes keep together.
//!
//! Owns the arithmetic of it. Must not ask the store.

use super::{InForce, Pace};

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
    /// never come together in one breath.
    pub fn of(self, whole: InForce) -> InForce {
        if self.is_none() {
            return InForce {
                connections: 0,
                ..whole
            };
        }
        let connections = whole.connections.min(self.connections);
        let rate = whole.pace.per_second();
        let pace = if self.rate >= 1.0 || rate.is_infinite() {
            whole.pace
        } else {
            Pace::Even(rate * self.rate)
        };
        InForce {
            pace,
            connections,
            ..whole
        }
    }
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
        assert!((here.pace.per_second() - 50.0 / 3.0).abs() < 1e-9);
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
            prop_assert!(part.connections == 1 || part.connections * nodes <= connections);
        }
    }
}
