//! A gauge that several of a process share: each has a part, the gauge has the sum.

use prometheus::IntGauge;

/// One's part of a gauge.
#[derive(Debug)]
pub struct Portion {
    gauge: IntGauge,
    own: i64,
}

impl Portion {
    /// A part of `gauge`, which is nothing so far.
    pub fn of(gauge: &IntGauge) -> Self {
        Self {
            gauge: gauge.clone(),
            own: 0,
        }
    }

    /// Makes the part `value`; those of others stay.
    pub fn set(&mut self, value: u64) {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        self.gauge.add(value - self.own);
        self.own = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_is_the_sum_of_its_portions() {
        let gauge = IntGauge::new("waiting", "what waits").expect("a name");
        let (mut hits, mut outcomes) = (Portion::of(&gauge), Portion::of(&gauge));
        hits.set(7);
        outcomes.set(5);
        assert_eq!(gauge.get(), 12);
        hits.set(0);
        outcomes.set(6);
        assert_eq!(gauge.get(), 6);
    }
}
