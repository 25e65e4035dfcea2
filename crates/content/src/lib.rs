//! Templates, link rewriting, MIME and DKIM; pure.
