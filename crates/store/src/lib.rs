//! All shared state behind one trait; the sqlite engine; the conformance suite.
