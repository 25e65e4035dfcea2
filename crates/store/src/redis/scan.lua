#!lua flags=no-writes
-- Names of keys. KEYS: one on the server that is asked. ARGV: cursor, pattern.
-- Answers {the next cursor, names}.
return redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 1000)
