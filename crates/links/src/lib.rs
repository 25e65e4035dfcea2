//! Tracking tokens: sign and verify.
