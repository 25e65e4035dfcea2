//! Tracking tokens: sign and verify.
//!
//! Owns the bytes of a token (see [`Token`]) and the keys that vouch for them. A token is complete:
//! whoever has the key can answer it. This crate must not look anything up, read a clock, a file
//! or a random source, and no token carries an address or a prospect id.
#![forbid(unsafe_code)]

mod key;
mod token;

pub use key::{KeyFileError, KeyRing, Signer};
pub use token::{
    Bad, Flags, Kind, MAX_TARGET, MAX_TOKEN, TargetError, Token, VerifiedToken, check_target,
};
