//! Sends the TLS reports of the days that are over (RFC 8460 §4, §5).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use content::{ContentSpec, Mailbox, ReportPart};
use links::KeyRing;
use model::{BatchId, EmailAddress, JournalId, Partition, Priority, Row, TrackingMode};
use service::clock::SharedClock;
use service::tasks::Shutdown;
use store::{BatchHead, NewBatch, Note, Store};

use crate::compose::domain_selectors;
use crate::intake::lots::{Bounds, LotBuilder};
use crate::released::Released;
use crate::sending::SendingDeps;
use crate::tlspolicy::Policies;
use crate::tlspolicy::report::{self, Destination, Report, Reporter};
use crate::tlspolicy::tally::{self, Day, KIND, Sheet};

/// Between looks at the clock, and between notes of what was counted.
const LOOK: Duration = Duration::from_secs(60);
const NOTES_EVERY: u32 = 5;
/// Reports wait so long after midnight: for the notes of the other nodes, and so that not all of
/// the world reports at once (RFC 8460 §4.1).
const WAIT: std::ops::Range<u64> = 900..4_500;
/// How long the job is one node's.
const LEASE: Duration = Duration::from_secs(1_800);
/// Attempts to deliver a report end then.
const EXPIRE: Duration = Duration::from_secs(86_400);

/// The job; see the module.
pub(crate) struct TlsReporting {
    store: Arc<dyn Store>,
    policies: Arc<Policies>,
    clock: SharedClock,
    node: JournalId,
    from: EmailAddress,
    by: Reporter,
    account: String,
    dkim_dir: PathBuf,
    ring: Arc<ArcSwap<KeyRing>>,
    wait: Duration,
    /// The last day whose reports are sent.
    done: Option<Day>,
}

/// Why a report was not sent.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error("the report cannot be made: {0}")]
    Made(String),
}

impl TlsReporting {
    /// `None`: nobody is to report.
    pub(crate) fn new(deps: &SendingDeps, policies: Arc<Policies>) -> Option<Self> {
        let from = deps.tls_reports.from.clone()?;
        Some(Self {
            store: Arc::clone(&deps.store),
            policies,
            clock: deps.clock.clone(),
            node: deps.journal.id(),
            by: Reporter {
                organization: deps.tls_reports.organization.clone(),
                contact: deps.tls_reports.contact.clone(),
                domain: from.domain().to_owned(),
            },
            from,
            account: deps.tls_reports.account.clone(),
            dkim_dir: deps.dkim_dir.clone(),
            ring: Arc::clone(&deps.ring),
            wait: Duration::from_secs(fastrand::u64(WAIT)),
            done: None,
        })
    }

    /// Runs until the end begins.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let policies = Arc::clone(&self.policies);
        let keep = async {
            for turn in 0_u32.. {
                if turn % NOTES_EVERY == 0 {
                    self.policies.note_counts().await;
                }
                self.look().await;
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = keep => {}
            () = shutdown.begun() => {}
        }
        policies.note_counts().await;
    }

    /// Sends what is due.
    async fn look(&mut self) {
        let now = self.clock.now();
        let Some(due) = Day::of(now - self.wait).before() else {
            return;
        };
        if self.done == Some(due) {
            return;
        }
        let lease = self.store.job_lease("tls-reports", self.node, now, LEASE);
        match lease.await {
            Ok(Some(_)) => {}
            // Another node does it, or the store is away.
            Ok(None) | Err(_) => return,
        }
        match self.send_through(due).await {
            Ok(()) => self.done = Some(due),
            Err(error) => tracing::warn!(%error, "TLS reports are sent later"),
        }
        let ended = self
            .store
            .job_lease("tls-reports", self.node, now, Duration::ZERO);
        if let Err(error) = ended.await {
            tracing::debug!(%error, "the lease on TLS reports ends by itself");
        }
    }

    /// Sends the reports of all days up to `due`, and takes their notes away.
    async fn send_through(&self, due: Day) -> Result<(), ReportError> {
        let notes = self.store.notes(KIND, self.clock.now()).await?;
        let mut days = BTreeMap::<(Day, Box<str>), (Sheet, Vec<Note>)>::new();
        for note in notes {
            let Some((day, domain, sheet)) = tally::read(&note) else {
                tracing::warn!(key = %note.key, "a note of TLS counts cannot be read");
                continue;
            };
            if day <= due {
                let (sum, used) = days.entry((day, domain)).or_default();
                tally::add(sum, sheet);
                let value = Box::default();
                used.push(Note { value, ..note });
            }
        }
        let mut failed = None;
        for ((day, domain), (sheet, used)) in days {
            match self.send(day, &domain, &sheet).await {
                Ok(()) => self.store.put_notes(used, self.clock.now()).await?,
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn send(&self, day: Day, domain: &str, sheet: &Sheet) -> Result<(), ReportError> {
        let report = report::report(&self.by, domain, day, sheet)
            .map_err(|error| ReportError::Made(error.to_string()))?;
        let mut addresses = Vec::new();
        for wanted in self.policies.wanted(domain).await.iter() {
            match wanted {
                Destination::Mail(address) => match address.parse::<EmailAddress>() {
                    Ok(address) => addresses.push(address),
                    Err(_) => tracing::info!(domain, "a TLS report is wanted at no address"),
                },
                Destination::Https(host, port, path) => {
                    let to = (host.as_str(), *port, path.as_str());
                    // Once: it is the domain's loss, and tomorrow there is another.
                    if let Err(error) = self.policies.hand_in(to, report.gzip.clone()).await {
                        tracing::info!(domain, %host, %error, "a TLS report was not taken");
                    }
                }
            }
        }
        if addresses.is_empty() {
            return Ok(());
        }
        self.submit(domain, &report, addresses).await
    }

    /// Makes a batch of the report: from there on it is mail like any other.
    async fn submit(
        &self,
        domain: &str,
        report: &Report,
        to: Vec<EmailAddress>,
    ) -> Result<(), ReportError> {
        let made = |error: &dyn std::fmt::Display| ReportError::Made(error.to_string());
        let now = self.clock.now();
        let mut random = [0; 16];
        aws_lc_rs::rand::fill(&mut random).map_err(|error| made(&error))?;
        let id = BatchId::new(now, u128::from_be_bytes(random));
        let (dir, of) = (self.dkim_dir.clone(), self.by.domain.clone());
        let selectors = tokio::task::spawn_blocking(move || domain_selectors(&dir, &of));
        let dkim_selectors = selectors
            .await
            .map_err(|error| made(&error))?
            .map_err(|error| made(&error))?;
        if dkim_selectors.is_empty() {
            let text = format!(
                "{} has no DKIM key, which RFC 8460 asks for",
                self.by.domain
            );
            return Err(ReportError::Made(text));
        }
        let released = Released {
            form: Released::FORM,
            spec: self.content(domain, report),
            dkim_selectors,
            // Nothing in it is tracked; a batch names its key all the same.
            tracker_base_url: "http://localhost".to_owned(),
            tracking_key: self.ring.load().ids().next().unwrap_or_default(),
            allow_duplicates: false,
            proof: false,
            variants: Vec::new(),
            test: None,
        };
        let content = released.to_bytes().map_err(|error| made(&error))?;
        let (accepted, partitions) = (to.len() as u64, self.store.partitions());
        let mut lots = LotBuilder::new(Bounds::default(), 0);
        for (index, email) in (0_u32..).zip(to) {
            let at = Partition::of(&self.account, &email.normalised(), partitions);
            lots.push(at, row(index, email))
                .map_err(|error| made(&error))?;
        }
        let lots = lots.finish().map_err(|error| made(&error))?;
        self.store.stage_lots(id, lots).await?;
        let batch = NewBatch {
            head: self.head(id, now),
            content: content.into(),
            accepted,
            rejected: 0,
            call: None,
        };
        Ok(self.store.commit_batch(batch, now).await?)
    }

    fn content(&self, domain: &str, report: &Report) -> ContentSpec {
        let by = &self.by;
        let fields = [
            ("TLS-Report-Domain", domain),
            ("TLS-Report-Submitter", by.domain.as_str()),
            ("Auto-Submitted", "auto-generated"),
        ];
        ContentSpec {
            from: Mailbox {
                email: self.from.clone(),
                name: None,
            },
            reply_to: None,
            // RFC 8460 §5.3.
            subject: format!(
                "Report Domain: {domain} Submitter: {} Report-ID: <{}>",
                by.domain, report.id
            ),
            html: None,
            text: Some(format!(
                "This is a report on how TLS with the mail servers of {domain} went.\n\
                 Submitter: {}\nReport-ID: <{}>\n",
                by.domain, report.id
            )),
            headers: fields
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            vars: serde_json::Map::new(),
            tracking: content::TrackingSpec {
                opens: false,
                clicks: false,
                ..content::TrackingSpec::default()
            },
            list_unsubscribe: false,
            feedback_id: None,
            attachments: Vec::new(),
            raw: None,
            report: Some(ReportPart {
                report_type: "tlsrpt".to_owned(),
                media_type: report::MEDIA_TYPE.to_owned(),
                file_name: report.file_name.clone(),
                data: STANDARD.encode(&report.gzip),
            }),
        }
    }

    fn head(&self, id: BatchId, now: model::Timestamp) -> BatchHead {
        BatchHead {
            id,
            account: self.account.clone(),
            campaign: Some("tls-reports".to_owned()),
            list: "tls-reports".to_owned(),
            priority: Priority::Transactional,
            pool: None,
            rate: model::units::Rate::Unlimited,
            created_at: now,
            release_at: now,
            expires_at: Some(now + EXPIRE),
            tracking: TrackingMode::Off,
            metadata: serde_json::Value::Object(serde_json::Map::new()),
            held: false,
            window: None,
            guardrails: None,
            variants: None,
        }
    }
}

fn row(index: u32, email: EmailAddress) -> Row {
    Row::new(index, email)
}
