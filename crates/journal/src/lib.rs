//! Local facts not yet in the store.
