//! The conformance suite: every rule of the store as a test against the trait alone.
//!
//! An engine gives a [`Fixture`] and calls [`conformance_tests!`](crate::conformance_tests); it
//! then has one test per rule. Must not know an engine.

mod intake;
mod leases;
mod support;

pub use intake::*;
pub use leases::*;

use crate::Store;
use std::sync::Arc;

/// A place where stores live, which outlives their handles.
#[async_trait::async_trait]
pub trait Fixture: Send + Sync {
    /// Opens the store as an MTA: made empty at first, later with all that was in it. There is
    /// never more than one at a time.
    async fn mta(&self) -> Arc<dyn Store>;

    /// Opens the same store once more, as another process would.
    async fn another(&self) -> Arc<dyn Store>;
}

/// Makes a test of every rule; `$fixture` is an expression that gives a new [`Fixture`].
#[macro_export]
macro_rules! conformance_tests {
    ($fixture:expr) => {
        $crate::conformance_tests! { @each $fixture;
            nothing_is_visible_before_the_commit
            what_was_left_staged_is_thrown_away
            a_commit_shows_everything_at_once
            a_commit_can_be_repeated
            a_commit_that_does_not_add_up_is_refused
            all_rejected_is_completed_at_once
            mail_waits_for_its_release_time
            a_range_is_split_as_wanted
            transactional_mail_goes_first_and_batches_take_turns
            a_dead_holder_leaves_only_its_window_in_doubt
            doubt_outlives_a_second_holder
            a_holder_that_slept_is_fenced_but_its_outcomes_are_taken
            a_window_moves_with_its_holder
            a_finished_range_is_gone_and_an_unfinished_one_stays
            a_range_handed_back_is_untouched
            a_range_handed_back_waits_until_it_is_due
            recipients_move_out_of_a_mixed_lot
            a_restarted_node_has_its_own_back_at_once
            leases_are_renewed_only_while_they_last
        }
    };
    (@each $fixture:expr; $($rule:ident)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let fixture = $fixture;
                $crate::conformance::$rule(&fixture).await.expect("the store answers");
            }
        )+
    };
}
