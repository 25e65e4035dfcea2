//! Label values of closed lists, and handles resolved for each of them at start.

use model::{Actor, HitKind};
use prometheus::core::{MetricVec, MetricVecBuilder};

/// A closed list of values of one label.
pub trait Label: Copy + 'static {
    /// All values.
    const ALL: &'static [Self];

    /// The value as Prometheus sees it.
    fn text(self) -> &'static str;

    /// Its place in [`Self::ALL`].
    fn index(self) -> usize;
}

/// One handle for each value of a label.
#[derive(Debug)]
pub struct Resolved<L, M> {
    handles: Vec<M>,
    _label: std::marker::PhantomData<L>,
}

impl<L: Label, M> Resolved<L, M> {
    pub(super) fn of<B>(family: &MetricVec<B>) -> Self
    where
        B: MetricVecBuilder<M = M>,
        M: prometheus::core::Metric,
    {
        Self::made(|value| family.with_label_values(&[value.text()]))
    }

    /// The handles that `handle` makes.
    pub(super) fn made(handle: impl Fn(L) -> M) -> Self {
        Self {
            handles: L::ALL.iter().map(|value| handle(*value)).collect(),
            _label: std::marker::PhantomData,
        }
    }

    /// The handle of `value`.
    pub fn at(&self, value: L) -> &M {
        &self.handles[value.index()]
    }
}

/// One handle for each pair of values of two labels.
#[derive(Debug)]
pub struct Resolved2<A, B, M> {
    rows: Vec<Vec<M>>,
    _labels: std::marker::PhantomData<(A, B)>,
}

impl<A: Label, B: Label, M> Resolved2<A, B, M> {
    pub(super) fn of<V>(family: &MetricVec<V>) -> Self
    where
        V: MetricVecBuilder<M = M>,
        M: prometheus::core::Metric,
    {
        let row = |a: &A| {
            let cells = B::ALL.iter();
            cells
                .map(|b| family.with_label_values(&[a.text(), b.text()]))
                .collect()
        };
        Self {
            rows: A::ALL.iter().map(row).collect(),
            _labels: std::marker::PhantomData,
        }
    }

    /// The handle of `a` and `b`.
    pub fn at(&self, a: A, b: B) -> &M {
        &self.rows[a.index()][b.index()]
    }
}

/// Declares closed lists of label values.
macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn text(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    )+};
}

labels! {
    /// Why somebody may have got a message twice (DESIGN, promise 2).
    DuplicateCause {
        /// The final dot was sent and no reply came.
        ReplyLost = "reply_lost",
        /// A power cut took what came after the last sync.
        UnsyncedJournal = "unsynced_journal",
        /// A node was lost for good with outcomes that it had not shipped.
        LostNode = "lost_node",
        /// The store lost acknowledged writes in a failover.
        StoreFailover = "store_failover",
    }
    /// Recipients that are not finished, by status.
    QueueState {
        /// Their time has not come.
        Scheduled = "scheduled",
        /// Waiting for their first attempt.
        Queued = "queued",
        /// At least one attempt, more to come.
        TemporaryError = "temporary_error",
    }
    /// A step of delivery whose time is measured.
    SmtpStage {
        /// MX and addresses.
        Dns = "dns",
        /// TCP.
        Connect = "connect",
        /// STARTTLS and handshake.
        Tls = "tls",
        /// The peer's first line.
        Greeting = "greeting",
        /// MAIL to the reply to the final dot.
        Transaction = "transaction",
    }
    /// How a connection came to its security.
    TlsResult {
        /// TLS, and the certificate matches a TLSA record of the host.
        Dane = "dane",
        /// TLS, and the certificate verifies, as a policy wants it.
        Verified = "verified",
        /// TLS with any certificate.
        Unverified = "unverified",
        /// The peer offers no TLS.
        NotOffered = "not_offered",
        /// TLS failed; plaintext was allowed and used.
        FallenBack = "fallen_back",
        /// TLS failed or was missing where policy wants it.
        Refused = "refused",
        /// Policy says never.
        Off = "off",
    }
    /// What became of a TLS handshake.
    TlsHandshake {
        /// A new session.
        Full = "full",
        /// An earlier session went on.
        Resumed = "resumed",
        /// None.
        Failed = "failed",
    }
    /// Which limit of a destination.
    LimitKind {
        /// Open connections.
        Connections = "connections",
        /// MAIL commands in a second.
        Rate = "rate",
        /// Messages per connection.
        MessagesPerConnection = "messages_per_connection",
    }
    /// What held a recipient back.
    ThrottleReason {
        /// All connections are busy.
        Connections = "connections",
        /// The rate is spent.
        Rate = "rate",
        /// The destination could not be reached lately.
        Backoff = "backoff",
        /// An operator or a block signal suspended it.
        Suspended = "suspended",
        /// The batch's own rate is spent.
        BatchRate = "batch_rate",
        /// The source is new to the destination, and the budget of the day is spread over it.
        WarmUp = "warm_up",
    }
    /// A signature's algorithm.
    SignatureAlgorithm {
        /// RSA with SHA-256.
        RsaSha256 = "rsa-sha256",
        /// Ed25519 with SHA-256 (RFC 8463).
        Ed25519Sha256 = "ed25519-sha256",
    }
    /// Whether a signature was made.
    SignatureResult {
        /// It was.
        Ok = "ok",
        /// It was not.
        Failed = "failed",
    }
    /// What a full journal dropped.
    DroppedKind {
        /// An open.
        Open = "open",
        /// A click.
        Click = "click",
    }
    /// What is kept for a time.
    Kept {
        /// Events.
        Events = "events",
        /// Rows and statuses.
        Recipients = "recipients",
        /// Contents, and what else a batch has beside its counters.
        Batches = "batches",
    }
    /// What came of handing events to a webhook.
    WebhookResult {
        /// The receiver took them.
        Delivered = "delivered",
        /// It answered with a status that is none of success.
        Refused = "refused",
        /// There was no answer, or none in time.
        Failed = "failed",
        /// It had no success for so long that the webhook waits for a person.
        Parked = "parked",
    }
    /// What was asked of the tracker.
    TrackerKind {
        /// The pixel.
        Open = "open",
        /// A link.
        Click = "click",
        /// The unsubscribe page or its button.
        Unsubscribe = "unsubscribe",
        /// HEAD.
        Probe = "probe",
        /// The page tag or a page view.
        Page = "page",
        /// A path that does not exist.
        Other = "other",
    }
    /// Where a certificate of the tracker comes from.
    CertificateOrigin {
        /// From files that the configuration names.
        File = "file",
        /// From a certificate authority.
        Acme = "acme",
    }
    /// What came of reading or fetching one.
    CertificateResult {
        /// It is in use.
        Ok = "ok",
        /// What was in use before stays.
        Failed = "failed",
    }
    /// How the tracker answered.
    TrackerResult {
        /// As asked.
        Ok = "ok",
        /// The token is not ours.
        BadToken = "bad_token",
        /// The request made no sense.
        BadRequest = "bad_request",
        /// Our fault, or too busy.
        Error = "error",
    }
}

impl Label for Actor {
    const ALL: &'static [Self] = Self::ALL;

    fn text(self) -> &'static str {
        self.as_str()
    }

    fn index(self) -> usize {
        usize::from(self.code())
    }
}

impl Label for HitKind {
    const ALL: &'static [Self] = Self::ALL;

    fn text(self) -> &'static str {
        self.as_str()
    }

    fn index(self) -> usize {
        usize::from(self.code())
    }
}
