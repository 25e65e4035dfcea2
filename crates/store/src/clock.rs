//! How far a node's clock is from the store's.
//!
//! Owns the arithmetic; must not read a clock itself.

use model::Timestamp;

use crate::{Result, Store};

/// By how many seconds the clock `now` is ahead of the store's (negative: behind). Verdicts compare
/// times that different nodes noted, so an operator must be able to see that they agree.
///
/// It is true to half of the time that the store takes to answer, taken to be as long on the way
/// there as on the way back (RFC 5905 section 8). A store without a clock of its own is never off.
///
/// # Errors
/// What the store answers when asked for its time.
pub async fn clock_offset(
    store: &(impl Store + ?Sized),
    now: impl Fn() -> Timestamp,
) -> Result<f64> {
    let asked = now();
    let told = store.clock().await?;
    Ok(told.map_or(0.0, |told| offset(asked, told, now())))
}

fn offset(asked: Timestamp, told: Timestamp, answered: Timestamp) -> f64 {
    let ahead = |of: Timestamp| of.millis().saturating_sub(told.millis());
    // Milliseconds of any clock that is set fit into a float's 53 bits many times over.
    #[expect(clippy::cast_precision_loss, reason = "see above")]
    let seconds = |millis: i64| millis as f64 / 1_000.0;
    f64::midpoint(seconds(ahead(asked)), seconds(ahead(answered)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_the_round_trip_is_compared() {
        let at = Timestamp::from_millis;
        assert_eq!(offset(at(10_000), at(10_100), at(10_200)), 0.0);
        assert_eq!(offset(at(13_000), at(10_000), at(13_000)), 3.0);
        assert_eq!(offset(at(8_000), at(10_000), at(8_400)), -1.8);
    }
}
