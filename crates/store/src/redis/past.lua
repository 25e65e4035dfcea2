#!lua flags=no-writes
-- Which history of writes the server of a partition tells.
-- KEYS: the generation of the store, the history that leases know.
-- Answers {what it says of replication, generation, history, seconds}.
local call = redis.call
return {call('INFO', 'replication'), call('GET', KEYS[1]) or '', call('GET', KEYS[2]) or '', call('TIME')[1]}
