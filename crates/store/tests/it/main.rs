//! Every engine against the conformance suite, with one partition and with four.

mod crash;
mod engine;
mod fixture;

mod one_partition {
    store::conformance_tests!(crate::fixture::Sqlite::new(1));
}

mod four_partitions {
    store::conformance_tests!(crate::fixture::Sqlite::new(4));
}

mod redis_one_partition {
    store::conformance_tests!(crate::fixture::Redis::single(1));
}

mod redis_four_partitions {
    store::conformance_tests!(crate::fixture::Redis::single(4));
}
