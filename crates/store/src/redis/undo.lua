#!lua
-- Takes events back that were added in one transaction with a step that was not done: the step sets
-- the counter to the last of them. Smaller numbers than theirs are no longer taken by the stream, so
-- the counter passes over them.
-- KEYS: the stream, its counter. ARGV: the first number, the last.
local counted, last = tonumber(redis.call('GET', KEYS[2]) or '0'), tonumber(ARGV[2])
if counted >= last then return end
-- Up to the counter they are others'.
for number = math.max(tonumber(ARGV[1]), counted + 1), last do
  redis.call('XDEL', KEYS[1], string.format('%d-0', number))
end
redis.call('SET', KEYS[2], ARGV[2])
