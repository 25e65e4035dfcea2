//! Configuration, clock, named tasks, drain, metrics and logging.
