//! Bytes that are to leave, in order, and how many have left.
//!
//! Positions are counted from the start of the connection, so that a reply can
//! be told from one that came before its command was sent, and a final dot
//! that left from one that did not.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: VecDeque<Bytes>,
    queued: u64,
    written: u64,
}

impl Outbox {
    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.queued += bytes.len() as u64;
            self.queue.push_back(bytes);
        }
    }

    /// Where the next byte pushed will stand: the end of what is queued.
    pub(super) fn end(&self) -> u64 {
        self.queued
    }

    /// Whether all bytes before `position` were taken by the caller.
    pub(super) fn has_written(&self, position: u64) -> bool {
        self.written >= position
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn slices<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        out.iter_mut()
            .zip(&self.queue)
            .map(|(slot, bytes)| *slot = IoSlice::new(bytes))
            .count()
    }

    /// Takes `count` bytes off the front; more than there are is all of them.
    pub(super) fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let Some(front) = self.queue.front_mut() else {
                return;
            };
            let step = count.min(front.len());
            front.advance(step);
            self.written += step as u64;
            count -= step;
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    /// Forgets what did not leave, at the end of the session.
    pub(super) fn discard(&mut self) {
        self.queue.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_follow_partial_writes() {
        let mut outbox = Outbox::default();
        outbox.push(Bytes::from_static(b"abc"));
        let first = outbox.end();
        outbox.push(Bytes::new());
        outbox.push(Bytes::from_static(b"de"));
        let mut slices = [IoSlice::new(b""); 4];
        assert_eq!(outbox.slices(&mut slices), 2);
        outbox.advance(2);
        assert!(!outbox.has_written(first));
        outbox.advance(2);
        assert!(outbox.has_written(first) && !outbox.has_written(outbox.end()));
        let mut slices = [IoSlice::new(b""); 4];
        assert_eq!(outbox.slices(&mut slices), 1);
        assert_eq!(slices.first().map(|s| s.to_vec()), Some(b"e".to_vec()));
        outbox.advance(100);
        assert!(outbox.is_empty() && outbox.has_written(outbox.end()));
    }
}
