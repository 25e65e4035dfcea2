//! Sink, load source and report.
