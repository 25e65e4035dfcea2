//! Human or machine, bindings, scores, A/B statistics; pure.
