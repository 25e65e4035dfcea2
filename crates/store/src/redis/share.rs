//! Limits that all nodes keep together: each has a share of them for a time (`share.lua`).
//!
//! One script for all limits that a node asks about, in partition 0. Must not know what is limited.

use super::keys::{self, HOME};
use super::link::answer;
use super::{Clock, Inner};
use crate::{Result, Share, ShareRequest};

/// What stands for all of a rate.
const WHOLE: f64 = 1_000_000.0;

impl Inner {
    /// Takes, renews or gives up shares; in the order of the claims.
    pub(super) async fn shares(&self, request: &ShareRequest) -> Result<Vec<Share>> {
        let now = match self.clock {
            Clock::Server => Vec::new(),
            Clock::Caller => request.now.millis().to_string().into_bytes(),
        };
        let mut arguments = vec![
            keys::prefix(HOME).into_bytes(),
            now,
            request.ttl.as_millis().to_string().into_bytes(),
            request.node.to_string().into_bytes(),
        ];
        for claim in &request.claims {
            arguments.extend([
                claim.key.as_bytes().to_vec(),
                claim.connections.to_string().into_bytes(),
                claim.permits.to_string().into_bytes(),
                u8::from(claim.wanted).to_string().into_bytes(),
            ]);
        }
        let keys = [keys::queues(HOME)];
        let answered = self
            .script(&self.scripts.share, HOME, &keys, &arguments, false)
            .await?;
        let read = |one| {
            let mut parts = answer::list(one).into_iter().map(answer::number);
            let mut next = || u32::try_from(parts.next().unwrap_or(0)).unwrap_or(0);
            Share {
                rate: (f64::from(next()) / WHOLE).min(1.0),
                connections: next(),
                nodes: next(),
            }
        };
        Ok(answer::list(answered).into_iter().map(read).collect())
    }
}
