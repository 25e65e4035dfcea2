//! What a new egress source may send to one destination, day by day.
//!
//! Owns the arithmetic of a schedule. Pure: the day comes in. The budget of a day is a pace, evenly
//! spread, so that no stretch of 24 hours holds more, whatever was restarted meanwhile; an address
//! sends from one node, so nothing has to be counted together.

use std::sync::Arc;

use model::Timestamp;
use service::config::shaping::WarmUp;

const DAY_SECS: i64 = 86_400;

/// One source at one destination on its way to be known.
#[derive(Debug, Clone, PartialEq)]
pub struct Warming {
    plan: Arc<WarmUp>,
    held: HeldDays,
}

/// Days that are repeated, for what the destination answered on them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HeldDays {
    /// How many so far.
    count: u32,
    /// The latest, in days since 1970.
    latest: Option<i64>,
}

impl HeldDays {
    /// Whether none is.
    pub fn is_none(&self) -> bool {
        self.count == 0
    }
}

impl Warming {
    /// By this plan, from its beginning.
    pub fn new(plan: Arc<WarmUp>) -> Self {
        Self {
            plan,
            held: HeldDays::default(),
        }
    }

    /// The plan.
    pub fn plan(&self) -> &Arc<WarmUp> {
        &self.plan
    }

    /// The days held so far.
    pub fn held(&self) -> HeldDays {
        self.held
    }

    /// Goes on with the days that were held in former runs.
    pub fn restore(&mut self, held: HeldDays) {
        self.held = held;
    }

    /// The messages of the day of `now`; none once the source is warm. Before the first day they are
    /// those of the first.
    pub fn budget(&self, now: Timestamp) -> Option<u32> {
        let days = day_of(now).saturating_sub(day_of(self.plan.start)).max(0);
        let step = days.saturating_sub(i64::from(self.held.count)).max(0);
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        self.plan.schedule.get(step).copied()
    }

    /// The budget as messages in a second; infinite once the source is warm.
    pub fn rate(&self, now: Timestamp) -> f64 {
        let budget = self.budget(now).map(f64::from);
        budget.map_or(f64::INFINITY, |budget| budget / 86_400.0)
    }

    /// The destination complained: this day does not count. True the first time on a day.
    pub fn hold(&mut self, now: Timestamp) -> bool {
        let today = day_of(now);
        let is_new = self.held.latest.is_none_or(|latest| latest < today);
        if self.budget(now).is_none() || today < day_of(self.plan.start) || !is_new {
            return false;
        }
        self.held = HeldDays {
            count: self.held.count.saturating_add(1),
            latest: Some(today),
        };
        true
    }
}

fn day_of(at: Timestamp) -> i64 {
    at.seconds().div_euclid(DAY_SECS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    const DAY: Duration = Duration::from_secs(86_400);

    fn plan(schedule: &[u32]) -> Warming {
        Warming::new(Arc::new(WarmUp {
            source: "ip1".to_owned(),
            start: Timestamp::parse("2026-03-01T00:00:00Z").expect("a day"),
            schedule: schedule.to_vec(),
            destinations: Vec::new(),
            line: None,
        }))
    }

    #[test]
    fn a_step_a_day_and_then_it_is_warm() {
        let warming = plan(&[50, 100, 500]);
        let start = warming.plan().start;
        let budget = |days: u32| warming.budget(start + DAY * days);
        assert_eq!(
            [0, 1, 2, 3].map(budget),
            [Some(50), Some(100), Some(500), None]
        );
        assert_eq!(warming.budget(start - DAY), Some(50));
        assert_eq!(
            warming.budget(start + DAY - Duration::from_millis(1)),
            Some(50)
        );
        assert!(warming.rate(start + DAY * 3).is_infinite());
    }

    #[test]
    fn a_day_with_complaints_is_repeated_once() {
        let mut warming = plan(&[50, 100, 500]);
        let start = warming.plan().start;
        let noon = start + DAY + DAY / 2;
        // The day itself goes one step back, and the next one has its budget again.
        assert!(warming.hold(noon) && !warming.hold(noon + Duration::from_secs(60)));
        assert_eq!(warming.budget(noon), Some(50));
        assert_eq!(warming.budget(noon + DAY), Some(100));
        let mut again = plan(&[50, 100, 500]);
        again.restore(warming.held());
        assert_eq!(again, warming);
        assert!(!warming.hold(start + DAY * 9), "it is warm");
    }

    proptest! {
        #[test]
        fn a_budget_never_jumps_ahead(
            days in proptest::collection::vec(any::<bool>(), 1..60), schedule in proptest::collection::vec(1_u32..1_000, 1..20),
        ) {
            let mut schedule = schedule;
            schedule.sort_unstable();
            let mut warming = plan(&schedule);
            let mut now = warming.plan().start;
            let mut before = 0_usize;
            for complains in days {
                if complains {
                    warming.hold(now);
                }
                let step = warming.budget(now).map_or(schedule.len(), |budget| {
                    schedule.iter().rposition(|of| *of == budget).expect("of the schedule")
                });
                prop_assert!(step <= schedule.len());
                let steps: Vec<_> = schedule.iter().take(before + 2).collect();
                prop_assert!(warming.budget(now).is_none_or(|budget| steps.contains(&&budget)));
                before = step;
                now = now + DAY;
            }
        }
    }
}
