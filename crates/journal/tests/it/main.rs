//! Crash tests of the journal, from outside.

mod basics;
