//! How each type of the configuration is read from one typed value.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use model::units::{self, Rate};
use model::{Domain, EmailAddress, TrackingMode};

use super::document::{Item, Origin, Value};
use super::reader::{Meant, Name};

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByteSize(pub(crate) u64);

/// A listening socket, or an empty text for none.
pub(crate) struct OrOff<T>(pub(crate) Option<T>);

/// A name server: an address, port 53 unless said.
pub(crate) struct NameServer(pub(crate) SocketAddr);

/// Text that must not reach a log, a page or an error.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself; the caller keeps it out of sight.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

fn expected(item: &Item, what: &str) -> String {
    format!("is {}, expected {what}", item.value.kind())
}

/// The text of a string, or of a number and the like from the environment: there, `25` may be meant
/// as text.
fn text<'i>(item: &'i Item, what: &str) -> Result<&'i str, String> {
    match (&item.value, &item.origin) {
        (Value::String(text), _) => Ok(text),
        (Value::Array(_) | Value::Table(_), _) => Err(expected(item, what)),
        (_, Origin::Env { text, .. }) => Ok(text),
        (_, Origin::Line(_)) => Err(expected(item, what)),
    }
}

impl Meant for String {
    fn meant(item: &Item) -> Result<Self, String> {
        text(item, "a string").map(str::to_owned)
    }
}

impl Meant for bool {
    fn meant(item: &Item) -> Result<Self, String> {
        match item.value {
            Value::Boolean(flag) => Ok(flag),
            _ => Err(expected(item, "true or false")),
        }
    }
}

macro_rules! integer {
    ($($type:ty),+) => {$(
        impl Meant for $type {
            fn meant(item: &Item) -> Result<Self, String> {
                match item.value {
                    Value::Integer(number) => Self::try_from(number).map_err(|_| {
                        format!("{number} is not a whole number from 0 to {}", Self::MAX)
                    }),
                    _ => Err(expected(item, "a whole number")),
                }
            }
        }
    )+};
}
integer!(u16, u32);

impl Meant for Duration {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a duration such as \"30s\"")?;
        units::parse_duration(text).map_err(|error| error.to_string())
    }
}

impl Meant for ByteSize {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a size such as \"64MiB\"")?;
        let size = units::parse_size(text).map_err(|error| error.to_string())?;
        Ok(Self(size))
    }
}

impl Meant for Rate {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a rate such as \"5/s\"")?;
        text.parse()
            .map_err(|error: units::UnitError| error.to_string())
    }
}

impl Meant for SocketAddr {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "an address and port such as \"127.0.0.1:8025\"")?;
        text.parse().map_err(|_| {
            format!("{text:?} is not an IP address and port (such as \"127.0.0.1:8025\", \"[::1]:8025\")")
        })
    }
}

impl<T: Meant> Meant for OrOff<T> {
    fn meant(item: &Item) -> Result<Self, String> {
        match &item.value {
            Value::String(text) if text.is_empty() => Ok(Self(None)),
            _ => T::meant(item).map(|meant| Self(Some(meant))),
        }
    }
}

impl Meant for NameServer {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a name server such as \"127.0.0.1:53\"")?;
        let with_port = text.parse::<SocketAddr>().ok();
        let alone = || {
            text.parse::<IpAddr>()
                .ok()
                .map(|ip| SocketAddr::new(ip, 53))
        };
        with_port.or_else(alone).map(Self).ok_or_else(|| {
            format!(
                "{text:?} is not an IP address with or without a port (such as \"127.0.0.1:5353\")"
            )
        })
    }
}

impl Meant for IpAddr {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "an IP address")?;
        text.parse()
            .map_err(|_| format!("{text:?} is not an IP address"))
    }
}

impl Meant for IpNet {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a network such as \"127.0.0.0/8\"")?;
        let network = text.parse::<Self>().ok();
        let host = || text.parse::<IpAddr>().ok().map(Self::from);
        network.or_else(host).map(|net| net.trunc()).ok_or_else(|| {
            format!("{text:?} is not a network (such as \"127.0.0.0/8\", \"fd00::/8\")")
        })
    }
}

impl Meant for Domain {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a domain name")?;
        text.parse()
            .map_err(|_| format!("{text:?} is not a fully qualified domain name"))
    }
}

impl Meant for EmailAddress {
    fn meant(item: &Item) -> Result<Self, String> {
        let text = text(item, "a mail address")?;
        text.parse()
            .map_err(|_| format!("{text:?} is not a mail address"))
    }
}

impl Name for Domain {
    fn name(text: &str) -> Result<Self, String> {
        text.parse()
            .map_err(|_| "is not a fully qualified domain name".to_owned())
    }
}

/// A domain, or `*` for every other.
impl Name for Option<Domain> {
    fn name(text: &str) -> Result<Self, String> {
        match text {
            "*" => Ok(None),
            _ => Domain::name(text).map(Some),
        }
    }
}

/// Reads one word of a closed list, naming the list when it is another.
macro_rules! one_of {
    ($($type:ty),+) => {$(
        impl Meant for $type {
            fn meant(item: &Item) -> Result<Self, String> {
                let text = text(item, "a string")?;
                Self::ALL.iter().copied().find(|known| known.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|known| known.as_str()).collect();
                    format!("{text:?} is not one of {}", known.join(", "))
                })
            }
        }
    )+};
}

/// Declares a closed list of words of the configuration.
macro_rules! choices {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word of the configuration file.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }
    )+};
}

choices! {
    /// Which addresses of a host are connected to, and which first.
    Families {
        /// IPv4, then IPv6.
        PreferIpv4 = "prefer_ipv4",
        /// IPv6, then IPv4.
        PreferIpv6 = "prefer_ipv6",
        /// IPv4 alone.
        Ipv4 = "ipv4",
        /// IPv6 alone.
        Ipv6 = "ipv6",
    }
    /// Whether TLSA records are kept to.
    DanePolicy {
        /// Where the name servers are believed and show that they validate.
        Auto = "auto",
        /// Never.
        Off = "off",
    }
    /// Whether mail may leave unsigned.
    DkimPolicy {
        /// A batch whose From domain has no key is refused.
        Required = "required",
        /// It leaves unsigned.
        Optional = "optional",
    }
    /// What a delivery status means for further mail (contract, section 6).
    StatusProfile {
        /// The service's own.
        Default = "default",
        /// Stricter, as the Satori campaign system counts.
        Satori = "satori",
    }
    /// What becomes of a recipient of whom it is not known whether the message arrived.
    AmbiguousPolicy {
        /// Tried once more after `ambiguous_after`: perhaps a second copy.
        Retry = "retry",
        /// Taken as delivered: perhaps a lost message.
        AssumeDelivered = "assume_delivered",
    }
    /// How much TLS a destination gets.
    TlsPolicy {
        /// Never STARTTLS.
        None = "none",
        /// Any certificate; plaintext where there is no TLS.
        Opportunistic = "opportunistic",
        /// Never plaintext; any certificate.
        Require = "require",
        /// Never plaintext; a certificate that verifies.
        RequireVerified = "require-verified",
    }
    /// What a key of the API may do.
    Scope {
        /// Submit and steer batches.
        Submit = "submit",
        /// Read everything of its account.
        Read = "read",
        /// Accounts, keys, destinations.
        Admin = "admin",
    }
}

one_of!(
    DanePolicy,
    DkimPolicy,
    Families,
    StatusProfile,
    AmbiguousPolicy,
    TlsPolicy,
    Scope,
    TrackingMode
);
