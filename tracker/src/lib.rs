//! The tracker: open pixels, click redirects, unsubscribes.
