//! From a request body to a committed batch.
