//! Every engine against the conformance suite, with one partition and with four.

mod bounds;
mod crash;
mod disk;
mod engine;
mod fixture;
mod kept;
mod moving;
mod redis;
mod trips;

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

mod redis_cluster {
    use crate::fixture::Redis;
    use testkit::redis::RedisCluster;

    fn started() -> (tempfile::TempDir, RedisCluster) {
        let directory = tempfile::tempdir().expect("a directory");
        let cluster = RedisCluster::start(directory.path(), 3, 1).expect("a Cluster");
        (directory, cluster)
    }

    store::conformance_tests!(together cluster = started(); Redis::on(&cluster.1, 4));
}
