//! Pools: which egress sources carry a batch.
//!
//! Owns the way from a pool's name to its sources. Must not know what a source is: an index.

use std::collections::HashMap;
use std::sync::Arc;

use service::config::WeightedSource;

/// Egress sources that share the mail of the batches that name the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Index of each source, and its share.
    members: Vec<(usize, u32)>,
}

impl Pool {
    /// A pool of these sources (index and weight).
    pub fn new(members: Vec<(usize, u32)>) -> Self {
        Self { members }
    }

    /// The share of a source; none: it carries nothing of this pool.
    pub fn weight(&self, source: usize) -> Option<u32> {
        let member = self.members.iter().find(|(index, _)| *index == source);
        member.map(|(_, weight)| (*weight).max(1))
    }

    /// How many sources it has.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether it has no source, which no configuration allows.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

/// All pools; see the module.
#[derive(Debug, Clone)]
pub struct Pools {
    default: Arc<Pool>,
    named: HashMap<Box<str>, Arc<Pool>>,
}

impl Pools {
    /// One pool for everybody.
    pub fn single(pool: Pool) -> Self {
        Self {
            default: Arc::new(pool),
            named: HashMap::new(),
        }
    }

    /// The pools of the configuration. `index` finds a source by its name. The default is the pool
    /// of this name, else the first.
    pub fn configured(
        pools: &[service::config::Pool],
        index: impl Fn(&str) -> Option<usize>,
    ) -> Self {
        let known = |member: &WeightedSource| Some((index(&member.name)?, member.weight));
        let made = pools.iter().map(|pool| {
            let members = pool.sources.iter().filter_map(known).collect();
            (pool.name.as_str().into(), Arc::new(Pool::new(members)))
        });
        let named: HashMap<Box<str>, _> = made.collect();
        let first = pools.first().map_or("default", |pool| &*pool.name);
        let default = named.get("default").or_else(|| named.get(first));
        let default = default.map_or_else(|| Arc::new(Pool::new(vec![(0, 1)])), Arc::clone);
        Self { default, named }
    }

    /// The pool that a batch named. One that is no longer configured is as if none had been named:
    /// mail that was accepted is not left lying for a change of the configuration.
    pub fn of(&self, name: Option<&str>) -> &Arc<Pool> {
        name.and_then(|name| self.named.get(name))
            .unwrap_or(&self.default)
    }

    /// Every source in any pool, by index, without repetition.
    pub fn sources(&self) -> Vec<usize> {
        let all = self.named.values().chain([&self.default]);
        let mut sources: Vec<_> = all
            .flat_map(|pool| pool.members.iter().map(|(index, _)| *index))
            .collect();
        sources.sort_unstable();
        sources.dedup();
        sources
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str, sources: &[(&str, u32)]) -> service::config::Pool {
        let member = |&(name, weight): &(&str, u32)| WeightedSource {
            name: name.to_owned(),
            weight,
        };
        service::config::Pool {
            name: name.to_owned(),
            sources: sources.iter().map(member).collect(),
        }
    }

    fn index(name: &str) -> Option<usize> {
        ["ip0", "ip1", "ip2"].iter().position(|of| *of == name)
    }

    #[test]
    fn a_batch_gets_the_sources_of_its_pool() {
        let pools = Pools::configured(
            &[
                pool("marketing", &[("ip1", 1), ("ip2", 3)]),
                pool("default", &[("ip0", 1)]),
            ],
            index,
        );
        let weights = |name| [0, 1, 2].map(|source| pools.of(name).weight(source));
        assert_eq!(weights(Some("marketing")), [None, Some(1), Some(3)]);
        assert_eq!(weights(None), [Some(1), None, None]);
        assert_eq!(weights(Some("gone")), weights(None));
        assert_eq!(pools.sources(), [0, 1, 2]);
    }

    #[test]
    fn without_one_of_the_name_the_first_is_the_default() {
        let pools = Pools::configured(&[pool("a", &[("ip2", 1)]), pool("b", &[("ip1", 1)])], index);
        assert_eq!(pools.of(None).weight(2), Some(1));
        let none = Pools::configured(&[], index);
        assert_eq!(none.sources(), [0]);
    }
}
