//! The specification of the API, kept by hand beside the code; a test compares it with the router.

/// Served at `/openapi.json`.
pub(super) const DOCUMENT: &str = include_str!("openapi.json");
