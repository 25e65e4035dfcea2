//! The closed lists of words of the contract: statuses, classes, blame, reasons.

/// A word that is not in the list it was looked up in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is not one of: {known}")]
pub struct UnknownName {
    /// What was found.
    pub word: String,
    /// The words that exist, comma-separated.
    pub known: String,
}

/// Declares an enum whose variants are words of the contract: as text outside, a number in stored forms.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// All of them, in the order of the contract.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word of the contract.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// Its place in [`Self::ALL`], which is also its stored form.
            pub const fn code(self) -> u8 {
                self as u8
            }

            /// The one with this stored form.
            pub fn from_code(code: u8) -> Option<Self> {
                Self::ALL.get(usize::from(code)).copied()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::UnknownName;
            fn from_str(word: &str) -> Result<Self, $crate::UnknownName> {
                Self::ALL.iter().copied().find(|known| known.as_str() == word).ok_or_else(|| $crate::UnknownName {
                    word: word.chars().take(64).collect(),
                    known: Self::ALL.iter().map(|known| known.as_str()).collect::<Vec<_>>().join(", "),
                })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() { to.serialize_str(self.as_str()) } else { to.serialize_u8(self.code()) }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    let word = <std::borrow::Cow<'de, str>>::deserialize(from)?;
                    word.parse().map_err(serde::de::Error::custom)
                } else {
                    let code = u8::deserialize(from)?;
                    Self::from_code(code).ok_or_else(|| serde::de::Error::custom("unknown code"))
                }
            }
        }
    };
}
pub(crate) use words;

words! {
    /// The status of a message (contract, section 4). Exactly one at any moment.
    Status {
        /// Its time has not come.
        Scheduled = "scheduled",
        /// Waiting for its first attempt.
        Queued = "queued",
        /// At least one attempt, more to come.
        TemporaryError = "temporary_error",
        /// Accepted by the receiving side.
        Delivered = "delivered",
        /// Refused by the receiving side for good.
        Bounce = "bounce",
        /// Ended without a refusal.
        Failed = "failed",
        /// Not sent, because the person or the address must not be written to.
        Suppressed = "suppressed",
        /// Ended by the caller before it was started.
        Cancelled = "cancelled",
    }
}

impl Status {
    /// Whether nothing more will be tried.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Scheduled | Self::Queued | Self::TemporaryError)
    }
}

words! {
    /// What a refusal or failure means.
    Class {
        /// No such mailbox.
        InvalidMailbox = "invalid_mailbox",
        /// The mailbox exists but is disabled or abandoned.
        InactiveMailbox = "inactive_mailbox",
        /// Over quota.
        MailboxFull = "mailbox_full",
        /// The domain does not exist.
        BadDomain = "bad_domain",
        /// The domain takes no mail (null MX, RFC 7505) or has no address.
        NoMx = "no_mx",
        /// DNS did not answer.
        DnsFailure = "dns_failure",
        /// No connection, or one that broke.
        ConnectFailure = "connect_failure",
        /// TLS could not be had where policy wants it.
        TlsFailure = "tls_failure",
        /// Come back later: greylisting.
        Greylisted = "greylisted",
        /// Too much, too fast.
        RateLimited = "rate_limited",
        /// The sending address is blocked.
        IpBlocked = "ip_blocked",
        /// The sending domain is blocked.
        DomainBlocked = "domain_blocked",
        /// Judged spam by its content.
        SpamContent = "spam_content",
        /// SPF, DKIM or DMARC.
        AuthFailed = "auth_failed",
        /// Another policy of the receiver.
        Policy = "policy",
        /// Larger than the receiver takes.
        TooLarge = "too_large",
        /// The host does not take mail for this domain.
        RelayDenied = "relay_denied",
        /// The peer does not speak SMTP as RFC 5321 says.
        Protocol = "protocol",
        /// Retries ended.
        Expired = "expired",
        /// An automatic answer.
        AutoReply = "auto_reply",
        /// None of these.
        Other = "other",
    }
}

words! {
    /// Whose trouble a refusal is.
    Blame {
        /// The recipient's address or mailbox.
        Recipient = "recipient",
        /// The address that we send from.
        SenderIp = "sender_ip",
        /// The domain in From or the reverse-path.
        SenderDomain = "sender_domain",
        /// What was sent.
        Content = "content",
        /// The receiving system.
        Destination = "destination",
        /// This service.
        Us = "us",
    }
}

words! {
    /// A recipient's delivery status (contract, section 6).
    DeliveryStatus {
        /// Nothing final yet.
        Unconfirmed = "unconfirmed",
        /// Delivered.
        Ok = "ok",
        /// Address or domain does not exist.
        InvalidAddress = "invalid_address",
        /// Another permanent refusal or failure.
        Error = "error",
        /// Retries ended without a refusal.
        TemporaryError = "temporary_error",
        /// Refused as spam.
        Spam = "spam",
    }
}

words! {
    /// Why a recipient gets no further mail.
    SuppressionReason {
        /// The address or its domain does not exist.
        InvalidAddress = "invalid_address",
        /// The mailbox is disabled, or was full three times in 30 days.
        Inactive = "inactive",
        /// The person called our mail spam.
        Complaint = "complaint",
        /// The person unsubscribed.
        Unsubscribed = "unsubscribed",
        /// Set by hand or over the API.
        Manual = "manual",
        /// The person was erased.
        Erased = "erased",
        /// A permanent refusal or failure, which stops mail under the profile `satori` alone.
        Error = "error",
        /// Refused as spam, likewise.
        Spam = "spam",
    }
}

impl DeliveryStatus {
    /// What the end of a message says of its recipient's address (contract, section 6). None: it
    /// has not ended, or was not tried.
    pub const fn of(status: Status, class: Option<Class>) -> Option<Self> {
        Some(match (status, class) {
            (Status::Delivered, _) => Self::Ok,
            (Status::Bounce | Status::Failed, Some(Class::BadDomain | Class::NoMx))
            | (Status::Bounce, Some(Class::InvalidMailbox)) => Self::InvalidAddress,
            (Status::Bounce, Some(Class::SpamContent)) => Self::Spam,
            // Retries that ended keep the class of the last reply, or say that they expired.
            (
                Status::Failed,
                Some(
                    Class::Expired
                    | Class::DnsFailure
                    | Class::ConnectFailure
                    | Class::Greylisted
                    | Class::RateLimited
                    | Class::MailboxFull,
                ),
            ) => Self::TemporaryError,
            (Status::Bounce | Status::Failed, _) => Self::Error,
            (
                Status::Scheduled
                | Status::Queued
                | Status::TemporaryError
                | Status::Suppressed
                | Status::Cancelled,
                _,
            ) => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_codes_read_back() {
        for &class in Class::ALL {
            assert_eq!(class.as_str().parse(), Ok(class));
            assert_eq!(Class::from_code(class.code()), Some(class));
        }
        assert_eq!(Class::ALL.len(), 21);
        let error = "nope".parse::<Status>().unwrap_err();
        assert!(error.to_string().contains("temporary_error"));
        assert_eq!(
            serde_json::to_string(&Status::TemporaryError).unwrap(),
            "\"temporary_error\""
        );
        let bytes = postcard::to_stdvec(&Blame::Us).unwrap();
        assert_eq!(postcard::from_bytes::<Blame>(&bytes), Ok(Blame::Us));
        assert!(postcard::from_bytes::<Blame>(&[99]).is_err());
    }

    #[test]
    fn a_delivery_status_follows_the_contract() {
        use DeliveryStatus::{Error, InvalidAddress, Ok, Spam, TemporaryError};
        for (status, class, expected) in [
            (Status::Delivered, None, Some(Ok)),
            (
                Status::Bounce,
                Some(Class::InvalidMailbox),
                Some(InvalidAddress),
            ),
            (Status::Bounce, Some(Class::MailboxFull), Some(Error)),
            (Status::Bounce, Some(Class::SpamContent), Some(Spam)),
            (Status::Bounce, None, Some(Error)),
            (Status::Failed, Some(Class::BadDomain), Some(InvalidAddress)),
            (Status::Failed, Some(Class::NoMx), Some(InvalidAddress)),
            (Status::Failed, Some(Class::Expired), Some(TemporaryError)),
            (Status::Failed, Some(Class::Protocol), Some(Error)),
            (Status::Queued, None, None),
            (Status::TemporaryError, Some(Class::Greylisted), None),
            (Status::Suppressed, None, None),
            (Status::Cancelled, None, None),
        ] {
            assert_eq!(
                DeliveryStatus::of(status, class),
                expected,
                "{status} {class:?}"
            );
        }
    }
}
