#!lua
-- Puts a value in the place of another. KEYS: where. ARGV: the one before, the new one.
-- Answers 1, or 0 when there was something else.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
