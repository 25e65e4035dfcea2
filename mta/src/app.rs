//! Wires the rooms of the daemon into one running service.
