//! From a request body to a committed batch.
//!
//! Owns the shape of what callers submit: splitting a document while it arrives, checking its head
//! and every recipient, grouping recipients into lots, and the commit. Nothing of a batch is
//! visible before its commit, and memory does not grow with it. Must not send anything.

mod advice;
mod csv_rows;
pub(crate) mod decode;
pub(crate) mod fields;
mod followup;
mod head;
mod lines;
pub(crate) mod lots;
pub(crate) mod once;
pub(crate) mod parts;
mod prepare;
pub(crate) mod proof;
pub(crate) mod quota;
pub(crate) mod receive;
pub(crate) mod recipients;
mod row;
mod scan;
mod single;
mod splitter;
pub(crate) mod spool;
pub(crate) mod submit;
pub(crate) mod variants;
