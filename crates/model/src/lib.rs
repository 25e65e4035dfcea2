//! Ids, addresses, statuses, facts, events and time: the words every room shares.
