//! What is next for one recipient: the only place that turns a finding into a result.
//!
//! Pure: time and chance come in. Runs in the task of the connection, so that an outcome can be
//! in the journal before that connection's next message goes, without a detour.

use std::time::Duration;

use model::{
    Attempt, AttemptDetail, AttemptResult, Blame, Class, DeliveryStatus, Status, SuppressionReason,
    Timestamp,
};
use service::config::{AmbiguousPolicy, StatusProfile};
use smtp::Reply;

use super::job::{Item, Policy, Trouble};
use crate::classify::{Action, Classification, suppression_for};

/// What stands for a reply when the sender died.
const IN_FLIGHT: &str = "the node that may have sent it died before it could tell";

/// The last try of a message comes at least so long before its end.
const LAST_MARGIN: Duration = Duration::from_secs(120);

/// The longest text kept of a reply, in bytes.
const REPLY_MAX: usize = 1_024;

/// What was found out about one recipient.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// The peer answered the final dot with 2yz.
    Delivered(Reply),
    /// The peer refused.
    Refused(Reply, Classification),
    /// The final dot left and no reply came.
    Ambiguous(String),
    /// The final dot may have left when its sender died.
    InFlight,
    /// Nothing could be sent to the destination: DNS, connection, TLS.
    Unreachable(Trouble),
    /// The message cannot be made.
    Unmade(String),
    /// Its time was over before it could be tried (again), because of this where it is known.
    TooLate(Option<Trouble>),
    /// Not sent: the person or address must not be written to.
    Suppressed(SuppressionReason),
    /// Not sent: the batch was cancelled.
    Cancelled,
}

/// When attempts for `item` end.
pub fn expires_at(item: &Item, policy: &Policy) -> Timestamp {
    item.batch
        .expires_at
        .unwrap_or(item.release_at() + policy.limits.expire)
}

/// The attempt as a fact. `chance` is from 0 to 1 and becomes the jitter of the retry time.
///
/// The caller adds the circumstances (host, TLS, timings) to `detail`.
pub fn decide(
    finding: Finding,
    item: &Item,
    policy: &Policy,
    now: Timestamp,
    chance: f64,
) -> Attempt {
    let mut detail = AttemptDetail {
        destination: policy.destination.as_str().into(),
        ..AttemptDetail::default()
    };
    let mut suppress = None;
    let result = match finding {
        Finding::Delivered(reply) => {
            describe(&mut detail, &reply);
            AttemptResult::Delivered
        }
        Finding::Refused(reply, reading) => {
            describe(&mut detail, &reply);
            detail.rule = reading.rule_ref();
            (detail.class, detail.blame) = (Some(reading.class), Some(reading.blame));
            match reading.action {
                Action::Bounce => {
                    suppress = reading.suppress;
                    AttemptResult::Bounce
                }
                Action::Retry => retry_or_expire(
                    &mut detail,
                    item,
                    policy,
                    now,
                    wait(item, policy, chance).max(reading.retry_after.unwrap_or_default()),
                    chance,
                ),
            }
        }
        Finding::Ambiguous(text) => {
            // Once more and no further: a peer that swallows every message would get it for days.
            let again = !item.ambiguous_before;
            ambiguous(&mut detail, &text, again, item, policy, now)
        }
        // Our own death says nothing about the peer. A second one must not cost a person the mail.
        Finding::InFlight => ambiguous(&mut detail, IN_FLIGHT, true, item, policy, now),
        Finding::Unreachable(trouble) => {
            (detail.class, detail.blame) = (Some(trouble.class), Some(trouble.blame));
            let is_final = trouble.is_final;
            if is_final {
                suppress =
                    suppression_for(trouble.class).filter(|_| trouble.blame == Blame::Recipient);
            }
            troubled(&mut detail, trouble);
            if is_final {
                AttemptResult::Failed
            } else {
                let wait = wait(item, policy, chance);
                retry_or_expire(&mut detail, item, policy, now, wait, chance)
            }
        }
        Finding::Unmade(text) => {
            detail.reply = bounded(&text);
            (detail.class, detail.blame) = (Some(Class::Other), Some(Blame::Us));
            AttemptResult::Failed
        }
        Finding::TooLate(trouble) => {
            let blame = trouble
                .as_ref()
                .map_or(Blame::Destination, |known| known.blame);
            if let Some(trouble) = trouble {
                troubled(&mut detail, trouble);
            }
            (detail.class, detail.blame) = (Some(Class::Expired), Some(blame));
            AttemptResult::Failed
        }
        Finding::Suppressed(reason) => AttemptResult::Suppressed(reason),
        Finding::Cancelled => AttemptResult::Cancelled,
    };
    if item.profile == StatusProfile::Satori {
        suppress = suppress.or_else(|| stopped_by_satori(&result, &detail));
    }
    Attempt {
        message: item.message(),
        place: item.place,
        number: item.attempt,
        at: now,
        dot_at: None,
        result,
        detail,
        suppress,
    }
}

/// Why the profile `satori` stops further mail (contract, section 6): whatever was refused or failed
/// for good does, but what we could not make, which is no word about the recipient.
fn stopped_by_satori(result: &AttemptResult, detail: &AttemptDetail) -> Option<SuppressionReason> {
    let status = match result {
        AttemptResult::Bounce => Status::Bounce,
        AttemptResult::Failed => Status::Failed,
        AttemptResult::Delivered
        | AttemptResult::TemporaryError { .. }
        | AttemptResult::Suppressed(_)
        | AttemptResult::Cancelled => return None,
    };
    if detail.blame == Some(Blame::Us) {
        return None;
    }
    match DeliveryStatus::of(status, detail.class)? {
        DeliveryStatus::InvalidAddress => Some(SuppressionReason::InvalidAddress),
        DeliveryStatus::Error if detail.class == Some(Class::InactiveMailbox) => {
            Some(SuppressionReason::Inactive)
        }
        DeliveryStatus::Error => Some(SuppressionReason::Error),
        DeliveryStatus::Spam => Some(SuppressionReason::Spam),
        DeliveryStatus::Unconfirmed | DeliveryStatus::Ok | DeliveryStatus::TemporaryError => None,
    }
}

/// The destination's wait before the next attempt, with up to a fifth more or less, so that what
/// failed together does not come back together.
fn wait(item: &Item, policy: &Policy, chance: f64) -> Duration {
    let step = usize::from(item.attempt.saturating_sub(1));
    let retry = &policy.limits.retry;
    let base = retry
        .get(step)
        .or(retry.last())
        .copied()
        .unwrap_or(Duration::from_secs(300));
    base.mul_f64(0.8 + 0.4 * chance.clamp(0.0, 1.0))
}

fn retry_or_expire(
    detail: &mut AttemptDetail,
    item: &Item,
    policy: &Policy,
    now: Timestamp,
    wait: Duration,
    chance: f64,
) -> AttemptResult {
    let over = expires_at(item, policy);
    let in_turn = Some(item.within_hours(now + wait)).filter(|at| *at < over);
    let last = || last_try(now, over, wait, chance).filter(|at| item.within_hours(*at) == *at);
    let retry_at = in_turn.or_else(last);
    // The last number stands for "and so on".
    match retry_at.filter(|_| item.attempt < u8::MAX) {
        Some(retry_at) => AttemptResult::TemporaryError {
            retry_at,
            ambiguous: false,
        },
        None => {
            detail.class = Some(Class::Expired);
            detail.blame.get_or_insert(Blame::Destination);
            AttemptResult::Failed
        }
    }
}

/// When a message whose next turn would come too late is tried once more: shortly before it is
/// over, each at another time, so that not all come at once. None soon after this attempt, which
/// would hear the same; that also makes it once.
fn last_try(now: Timestamp, over: Timestamp, wait: Duration, chance: f64) -> Option<Timestamp> {
    let left = over.since(now);
    let margin = (left / 16).min(LAST_MARGIN) + (left / 20).mul_f64(chance.clamp(0.0, 1.0));
    (left >= wait / 8).then(|| now + (left - margin))
}

fn ambiguous(
    detail: &mut AttemptDetail,
    text: &str,
    again: bool,
    item: &Item,
    policy: &Policy,
    now: Timestamp,
) -> AttemptResult {
    detail.reply = bounded(text);
    (detail.class, detail.blame) = (Some(Class::ConnectFailure), Some(Blame::Destination));
    if policy.ambiguous == AmbiguousPolicy::AssumeDelivered {
        (detail.class, detail.blame) = (None, None);
        return AttemptResult::Delivered;
    }
    let retry_at = item.within_hours(now + policy.ambiguous_after);
    if !again || retry_at >= expires_at(item, policy) {
        return AttemptResult::Failed;
    }
    AttemptResult::TemporaryError {
        retry_at,
        ambiguous: true,
    }
}

/// What was met instead of a transaction.
fn troubled(detail: &mut AttemptDetail, trouble: Trouble) {
    match &trouble.reply {
        Some(reply) => describe(detail, reply),
        None => detail.reply = bounded(&trouble.text),
    }
    detail.host = trouble.host;
}

fn describe(detail: &mut AttemptDetail, reply: &Reply) {
    detail.smtp_code = Some(reply.code);
    detail.enhanced_code = reply
        .enhanced
        .map(|code| model::EnhancedCode(code.class, code.subject, code.detail));
    detail.reply = bounded(&reply.to_string());
}

/// At most 1,024 bytes, printable, whole characters.
pub fn bounded(text: &str) -> Box<str> {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut kept = String::with_capacity(text.len().min(REPLY_MAX));
    for c in text.chars().map(clean) {
        if kept.len() + c.len_utf8() > REPLY_MAX {
            break;
        }
        kept.push(c);
    }
    kept.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::{Peer, Rules};
    use crate::queue::fixtures::{item, policy};
    use proptest::prelude::*;

    fn refused(code: u16, text: &str) -> Finding {
        let reply = Reply::new(code, text);
        let reading = Rules::shipped().classify(&reply, Peer::default());
        Finding::Refused(reply, reading)
    }

    fn unreachable(class: Class, blame: Blame, is_final: bool) -> Finding {
        Finding::Unreachable(Trouble {
            class,
            blame,
            text: "x".into(),
            reply: None,
            host: "".into(),
            is_final,
        })
    }

    const NOW: Timestamp = Timestamp::from_millis(1_000_000);

    #[test]
    fn findings_and_results() {
        let at = |millis| AttemptResult::TemporaryError {
            retry_at: Timestamp::from_millis(millis),
            ambiguous: false,
        };
        let table = [
            (
                Finding::Delivered(Reply::new(250, "2.0.0 ok")),
                AttemptResult::Delivered,
                None,
            ),
            (
                refused(550, "5.1.1 No such user"),
                AttemptResult::Bounce,
                Some(SuppressionReason::InvalidAddress),
            ),
            (
                refused(550, "5.7.1 blocked using zen.spamhaus.org"),
                AttemptResult::Bounce,
                None,
            ),
            (refused(451, "4.3.0 x"), at(1_300_000), None),
            (
                refused(451, "4.7.1 greylisted, try again in 600 seconds"),
                at(1_600_000),
                None,
            ),
            (
                unreachable(Class::BadDomain, Blame::Recipient, true),
                AttemptResult::Failed,
                Some(SuppressionReason::InvalidAddress),
            ),
            (
                unreachable(Class::DnsFailure, Blame::Destination, false),
                at(1_300_000),
                None,
            ),
            (Finding::TooLate(None), AttemptResult::Failed, None),
            (Finding::Unmade("x".into()), AttemptResult::Failed, None),
            (Finding::Cancelled, AttemptResult::Cancelled, None),
        ];
        for (finding, result, suppress) in table {
            let attempt = decide(finding.clone(), &item(1), &policy(), NOW, 0.5);
            assert_eq!(
                (attempt.result, attempt.suppress),
                (result, suppress),
                "{finding:?}"
            );
        }
    }

    /// Section 6 of the contract: what each end means for further mail, by profile. What a full
    /// mailbox does that repeats is the job's (`jobs::mailboxes`).
    #[test]
    fn what_stops_further_mail_is_the_profiles_word() {
        use SuppressionReason::{Error, Inactive, InvalidAddress, Spam};
        let table = [
            // unconfirmed
            (refused(451, "4.3.0 not now"), None, None),
            // ok
            (Finding::Delivered(Reply::new(250, "ok")), None, None),
            // invalid_address
            (
                refused(550, "5.1.1 No such user"),
                Some(InvalidAddress),
                Some(InvalidAddress),
            ),
            (
                unreachable(Class::BadDomain, Blame::Recipient, true),
                Some(InvalidAddress),
                Some(InvalidAddress),
            ),
            (
                unreachable(Class::NoMx, Blame::Recipient, true),
                Some(InvalidAddress),
                Some(InvalidAddress),
            ),
            // error
            (
                refused(550, "5.2.1 The mailbox is disabled"),
                Some(Inactive),
                Some(Inactive),
            ),
            (refused(550, "5.2.2 The mailbox is full"), None, Some(Error)),
            (
                refused(550, "5.7.1 blocked using zen.spamhaus.org"),
                None,
                Some(Error),
            ),
            (
                refused(552, "5.3.4 Message too big for system"),
                None,
                Some(Error),
            ),
            (Finding::Unmade("x".into()), None, None),
            // temporary_error
            (Finding::TooLate(None), None, None),
            // spam
            (
                refused(
                    550,
                    "5.7.1 This message is likely unsolicited email. To reduce the amount of spam sent to us, this message has been blocked.",
                ),
                None,
                Some(Spam),
            ),
        ];
        for (finding, by_default, by_satori) in table {
            for (profile, expected) in [
                (StatusProfile::Default, by_default),
                (StatusProfile::Satori, by_satori),
            ] {
                let item = Item { profile, ..item(1) };
                let attempt = decide(finding.clone(), &item, &policy(), NOW, 0.5);
                assert_eq!(attempt.suppress, expected, "{profile:?} {finding:?}");
            }
        }
    }

    #[test]
    fn retries_end_with_the_last_reply() {
        let mut item = item(3);
        std::sync::Arc::make_mut(&mut item.batch).expires_at = Some(NOW + Duration::from_secs(60));
        let attempt = decide(refused(451, "4.3.0 not now"), &item, &policy(), NOW, 0.5);
        assert_eq!(attempt.result, AttemptResult::Failed);
        assert_eq!(attempt.detail.class, Some(Class::Expired));
        assert_eq!(&*attempt.detail.reply, "451 4.3.0 not now");
        assert_eq!(attempt.suppress, None);
    }

    #[test]
    fn one_last_try_comes_shortly_before_the_end() {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let mut item = item(9);
        let mut retry_in = |left: Duration, reply: &str, chance| {
            std::sync::Arc::make_mut(&mut item.batch).expires_at = Some(NOW + left);
            let result = decide(refused(451, reply), &item, &policy(), NOW, chance).result;
            let AttemptResult::TemporaryError { retry_at, .. } = result else {
                return None;
            };
            Some(retry_at.since(NOW))
        };
        // The schedule has four hours here.
        assert_eq!(retry_in(minutes(192), "4.3.0 x", 0.0), Some(minutes(190)));
        assert_eq!(
            retry_in(minutes(192), "4.3.0 x", 1.0),
            Some(Duration::from_secs(180 * 60 + 24))
        );
        assert_eq!(
            retry_in(minutes(14), "4.3.0 x", 0.5),
            None,
            "it is the last try"
        );
        let wait = "4.7.1 greylisted, try again in 600 minutes";
        assert_eq!(
            retry_in(minutes(30), wait, 0.5),
            None,
            "too long before it would help"
        );
    }

    #[test]
    fn an_ambiguous_attempt_is_repeated_once_and_not_soon() {
        let once = decide(
            Finding::Ambiguous("x".into()),
            &item(1),
            &policy(),
            NOW,
            0.0,
        );
        let retry_at = NOW + Duration::from_secs(1_800);
        assert_eq!(
            once.result,
            AttemptResult::TemporaryError {
                retry_at,
                ambiguous: true
            }
        );
        let again = Item {
            ambiguous_before: true,
            ..item(2)
        };
        assert_eq!(
            decide(Finding::Ambiguous("x".into()), &again, &policy(), NOW, 0.0).result,
            AttemptResult::Failed
        );
        assert_eq!(
            decide(Finding::InFlight, &again, &policy(), NOW, 0.0).result,
            once.result,
            "a second death of ours does not end it"
        );
        let assume = Policy {
            ambiguous: AmbiguousPolicy::AssumeDelivered,
            ..policy()
        };
        assert_eq!(
            decide(Finding::Ambiguous("x".into()), &item(1), &assume, NOW, 0.0).result,
            AttemptResult::Delivered
        );
    }

    #[test]
    fn a_retry_waits_for_the_hours_of_its_recipient() {
        let night = Timestamp::parse("2026-12-01T20:58:00Z").expect("a time");
        let window = model::SendWindow {
            from: 9 * 60,
            to: 21 * 60,
            time_zone: None,
        };
        let within = |expires_at: &str, zone: Option<&str>| {
            let mut item = item(1);
            item.row.time_zone = zone.map(Box::from);
            item.batch = std::sync::Arc::new(store::BatchHead {
                window: Some(window.clone()),
                expires_at: Timestamp::parse(expires_at).ok(),
                ..(*item.batch).clone()
            });
            item
        };
        let retry =
            |item: &Item, finding: Finding| match decide(finding, item, &policy(), night, 0.5)
                .result
            {
                AttemptResult::TemporaryError { retry_at, .. } => Some(retry_at.to_string()),
                AttemptResult::Delivered
                | AttemptResult::Bounce
                | AttemptResult::Failed
                | AttemptResult::Suppressed(_)
                | AttemptResult::Cancelled => None,
            };
        let unreachable = || refused(451, "4.3.0 not now");
        let long = "2026-12-03T00:00:00Z";
        let of = |text: &str| Some(text.to_owned());
        assert_eq!(
            retry(&within(long, None), unreachable()),
            of("2026-12-02T09:00:00.000Z")
        );
        assert_eq!(
            retry(&within(long, None), Finding::InFlight),
            of("2026-12-02T09:00:00.000Z")
        );
        let new_york = Some("America/New_York");
        assert_eq!(
            retry(&within(long, new_york), unreachable()),
            of("2026-12-01T21:03:00.000Z")
        );
        // Nobody is written to at night because the end is near.
        assert_eq!(
            retry(&within("2026-12-02T08:00:00Z", None), unreachable()),
            None
        );
    }

    proptest! {
        /// Nothing is tried after its end, and the end of a schedule is a few tries, not many.
        #[test]
        fn every_message_ends_in_its_time(secs in 1_u64..500_000, wait in 1_u64..100_000, chance in 0.0_f64..=1.0) {
            let over = NOW + Duration::from_secs(secs);
            let wait = Duration::from_secs(wait);
            let mut now = NOW.max(over - wait);
            let mut tries = 0;
            while let Some(next) = last_try(now, over, wait, chance) {
                prop_assert!(next > now && next < over);
                (now, tries) = (next, tries + 1);
            }
            prop_assert!(tries <= 1, "{tries}");
        }

        #[test]
        fn jitter_is_a_fifth_and_the_last_wait_repeats(attempt in 1_u8..100, chance in 0.0_f64..=1.0) {
            let policy = policy();
            let base = policy.limits.retry[usize::from(attempt - 1).min(policy.limits.retry.len() - 1)];
            let wait = wait(&item(attempt), &policy, chance);
            prop_assert!(wait >= base.mul_f64(0.799) && wait <= base.mul_f64(1.201));
        }

        #[test]
        fn texts_are_bounded_and_printable(text: String) {
            let kept = bounded(&text);
            prop_assert!(kept.len() <= REPLY_MAX && !kept.chars().any(char::is_control));
        }
    }
}
