//! Compiled contents: loaded from the store when a batch is leased, kept while they are used.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use content::{Content, ContentSpec, RenderContext, Tracker};
use links::KeyRing;
use model::{BatchId, Domain};
use service::tasks::blocking;
use store::{BatchHead, Store, StoreError};

use super::{Prepared, Variant, load_keys};
use crate::released::Released;

/// Bytes of stored content whose compiled form is kept; the one used longest ago goes first.
const BYTES_MAX: usize = 64 << 20;

/// Why the messages of a batch cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store did not answer: try again.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Trying again is of no use until somebody has changed something.
    #[error("{0}")]
    Final(String),
    /// A key cannot be had: it may be put (back) in its place.
    #[error("{0}")]
    Keys(String),
}

/// The compiled contents; see the module.
pub struct Contents {
    store: Arc<dyn Store>,
    ring: Arc<ArcSwap<KeyRing>>,
    dkim_dir: PathBuf,
    bounce_domain: Option<Domain>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    by_batch: HashMap<BatchId, Entry>,
    bytes: usize,
    uses: u64,
}

struct Entry {
    prepared: Arc<Prepared>,
    bytes: usize,
    used: u64,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contents")
            .field("dkim_dir", &self.dkim_dir)
            .finish_non_exhaustive()
    }
}

impl Contents {
    /// None yet. `ring` has the tracking keys, `dkim_dir` the signing keys.
    pub fn new(
        store: Arc<dyn Store>,
        ring: Arc<ArcSwap<KeyRing>>,
        dkim_dir: PathBuf,
        bounce_domain: Option<Domain>,
    ) -> Self {
        Self {
            store,
            ring,
            dkim_dir,
            bounce_domain,
            kept: Mutex::default(),
        }
    }

    /// The compiled content of a batch, if it is here.
    pub fn get(&self, batch: BatchId) -> Option<Arc<Prepared>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.uses += 1;
        let uses = kept.uses;
        let entry = kept.by_batch.get_mut(&batch)?;
        entry.used = uses;
        Some(Arc::clone(&entry.prepared))
    }

    /// Loads and compiles the content of a batch unless it is here.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub async fn load(self: &Arc<Self>, head: Arc<BatchHead>) -> Result<(), LoadError> {
        if self.get(head.id).is_some() {
            return Ok(());
        }
        let bytes = self.store.content(head.id).await?;
        let bytes = bytes
            .ok_or_else(|| LoadError::Final("the batch has no content in the store".to_owned()))?;
        let this = Arc::clone(self);
        // Compiling takes milliseconds, and keys are read from disk.
        let compiled = blocking(move || {
            let prepared = this.prepare(&head, &bytes)?;
            this.keep(head.id, prepared, bytes.len());
            Ok(())
        });
        compiled
            .await
            .map_err(|error| LoadError::Final(error.to_string()))?
    }

    fn prepare(&self, head: &BatchHead, bytes: &[u8]) -> Result<Prepared, LoadError> {
        let text = |error: &dyn std::error::Error| LoadError::Final(error.to_string());
        let released = Released::from_bytes(bytes).map_err(|error| text(&error))?;
        let host = Tracker::host(&released.tracker_base_url);
        let signer = self
            .ring
            .load()
            .signer(host, Some(released.tracking_key))
            .ok_or_else(|| {
                LoadError::Keys(format!(
                    "tracking key {} is not in the key file",
                    released.tracking_key
                ))
            })?;
        let tracker =
            Tracker::new(&released.tracker_base_url, signer).map_err(|error| text(&error))?;
        let context = RenderContext {
            batch: head.id,
            released_at: head.release_at,
            tracker: Arc::new(tracker),
            mode: head.tracking,
            proof: released.proof,
        };
        let specs = released.specs();
        let made = specs.iter().zip(released.selectors());
        let made = made.map(|(spec, selectors)| self.make(spec, selectors));
        Ok(Prepared {
            variants: made.collect::<Result<_, _>>()?,
            context,
        })
    }

    /// Compiles one content and reads the keys that sign it.
    fn make(&self, spec: &ContentSpec, selectors: &[String]) -> Result<Variant, LoadError> {
        let content = Content::compile(spec).map_err(|errors| {
            let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
            LoadError::Final(all.join("; "))
        })?;
        let from_domain: Box<str> = spec.from.email.domain().into();
        let keys = load_keys(&self.dkim_dir, &from_domain, selectors).map_err(|error| {
            let source = std::error::Error::source(&error)
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            LoadError::Keys(format!("{error}{source}"))
        })?;
        let bounce_domain = self
            .bounce_domain
            .as_ref()
            .map_or(&*from_domain, Domain::as_str)
            .into();
        Ok(Variant {
            content,
            keys,
            from_domain,
            bounce_domain,
        })
    }

    fn keep(&self, batch: BatchId, prepared: Prepared, bytes: usize) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while kept.bytes + bytes > BYTES_MAX && !kept.by_batch.is_empty() {
            let oldest = kept
                .by_batch
                .iter()
                .min_by_key(|(_, entry)| entry.used)
                .map(|(batch, _)| *batch);
            if let Some(entry) = oldest.and_then(|batch| kept.by_batch.remove(&batch)) {
                kept.bytes -= entry.bytes;
            }
        }
        kept.uses += 1;
        let entry = Entry {
            prepared: Arc::new(prepared),
            bytes,
            used: kept.uses,
        };
        kept.bytes += bytes;
        if let Some(before) = kept.by_batch.insert(batch, entry) {
            kept.bytes -= before.bytes;
        }
    }
}
