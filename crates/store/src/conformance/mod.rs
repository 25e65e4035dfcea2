//! The conformance suite: every rule of the store as a test against the trait alone.
//!
//! An engine gives a [`Fixture`] and calls [`conformance_tests!`](crate::conformance_tests); it
//! then has one test per rule. Must not know an engine.
#![expect(
    clippy::missing_errors_doc,
    reason = "every rule fails as the store does, with its error"
)]

mod consent;
mod control;
mod facts;
mod intake;
mod keeping;
mod leases;
mod moving;
mod parts;
mod reading;
mod shared;
mod simulation;
mod support;
mod waves;

pub use consent::*;
pub use control::*;
pub use facts::*;
pub use intake::*;
pub use keeping::*;
pub use leases::*;
pub use moving::*;
pub use parts::*;
pub use reading::*;
pub use shared::*;
pub use simulation::*;
pub use waves::*;

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

/// Makes a test of every rule; `$fixture` is an expression that gives a new [`Fixture`]. With
/// `together NAME = START;` before it, one test of all rules, one after the other, on what START
/// gives: for servers that take long to start.
#[macro_export]
macro_rules! conformance_tests {
    (together $servers:ident = $start:expr; $fixture:expr) => {
        $crate::conformance_tests! { @rules together { $servers = $start; $fixture } }
    };
    ($fixture:expr) => {
        $crate::conformance_tests! { @rules each { $fixture } }
    };
    (@rules $how:ident $with:tt) => {
        $crate::conformance_tests! { @$how $with;
            nothing_is_visible_before_the_commit
            what_was_left_staged_is_thrown_away
            a_commit_shows_everything_at_once
            a_commit_can_be_repeated
            staging_can_be_repeated
            a_commit_that_does_not_add_up_is_refused
            all_rejected_is_completed_at_once
            a_call_takes_effect_once
            a_call_is_kept_until_its_batch_has_ended
            a_call_that_ends_in_nothing_makes_room
            mail_waits_for_its_release_time
            an_open_batch_is_filled_and_started
            a_part_that_comes_to_nothing_leaves_nothing
            a_part_comes_before_the_start_or_not_at_all
            an_open_batch_ends_by_a_cancel_or_its_start
            addresses_of_earlier_parts_are_found
            waves_are_released_each_by_itself
            a_wave_is_shared_out_evenly
            a_wave_waits_for_its_batch
            parts_wait_for_their_wave
            a_range_is_split_as_wanted
            transactional_mail_goes_first_and_batches_take_turns
            no_batch_is_lost_among_many
            a_want_bounds_batches_ranges_and_ranks
            a_backlog_names_whose_work_it_is
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
            a_shut_window_keeps_its_recipients_waiting
            a_shut_window_keeps_nobody_from_an_end
            a_delivery_is_counted_once_wherever_it_is_told
            a_second_delivery_is_a_duplicate
            a_late_delivery_is_taken_over_any_end
            a_journal_is_taken_once_however_often_it_is_shipped
            a_fact_out_of_order_moves_nothing_back
            retries_come_when_they_are_due_and_not_before
            a_retry_that_was_overtaken_is_not_sent
            unknown_facts_are_dropped_and_counted
            a_batch_completes_with_its_last_recipient
            totals_and_uniques_are_counted_apart
            many_hits_are_taken_step_by_step
            a_revision_moves_the_counters_of_people
            page_views_and_replies_are_facts
            an_unsubscribe_leaves_the_list_in_the_same_step
            a_complaint_counts_once_and_stops_bulk_mail
            tracking_modes_are_kept
            an_archived_batch_leaves_no_trace_of_opens
            what_a_person_lets_be_kept_binds_mail_already_sent
            what_a_person_lets_be_kept_binds_mail_to_come
            the_suppressed_are_ended_at_the_lease
            a_dead_address_is_suppressed_with_its_fact
            a_lifted_suppression_stops_nothing
            a_weaker_suppression_does_not_replace_a_stronger
            a_paused_batch_is_not_leased
            a_cancel_ends_what_no_window_holds
            a_cancelled_batch_is_swept_when_its_holder_dies
            a_restarted_node_tells_what_it_had_begun_of_a_cancelled_batch
            a_suppression_of_whom_a_dead_node_may_have_written_to_says_so
            a_retry_of_a_cancelled_batch_is_cancelled
            changes_that_make_no_sense_are_impossible
            the_control_feed_tells_everything_in_order
            a_change_wakes_whoever_waits
            a_feed_that_was_trimmed_says_so
            events_are_told_once_each_and_never_change
            events_of_a_recipient_keep_their_order
            events_say_what_the_contract_says
            signs_are_read_of_events
            recipients_are_paged_and_filtered
            a_message_tells_its_story
            an_address_is_found_in_its_account
            suppressions_are_paged_by_address
            batches_are_listed_newest_first
            totals_and_the_oldest_due
            unfinished_work_says_who_holds_it
            a_setting_has_one_first_writer
            notes_are_shared_until_they_expire
            a_note_is_swapped_once
            notes_of_people_are_found_wherever_they_stand
            what_is_derived_changes_with_what_it_tells
            much_is_told_at_once
            a_job_is_one_nodes_at_a_time
            a_suspension_is_told_to_every_node
            announcements_are_events_of_their_account
            deferred_mail_is_made_due
            what_is_old_goes_and_counters_stay
            an_erased_person_leaves_only_a_suppression
            a_time_has_its_cursor
            a_cursor_older_than_what_is_kept_goes_on
            a_storm_agrees_with_a_simple_model
        }
    };
    (@together { $servers:ident = $start:expr; $fixture:expr }; $($rule:ident)+) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn every_rule() {
            let $servers = $start;
            $(
                eprintln!("{}", stringify!($rule));
                let fixture = $fixture;
                $crate::conformance::$rule(&fixture).await.expect("the store answers");
            )+
        }
    };
    (@each { $fixture:expr }; $($rule:ident)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                let fixture = $fixture;
                $crate::conformance::$rule(&fixture).await.expect("the store answers");
            }
        )+
    };
}
